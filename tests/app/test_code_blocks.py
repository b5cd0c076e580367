"""Fenced code blocks: CommonMark's rules, and the depth of list items."""

from __future__ import annotations

import pytest

from mixlocal.app.code_blocks import CodeBlock, code_blocks


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("no code at all", []),
        ("", []),
        ("Here:\n```python\nprint(1)\n```\nDone.", [CodeBlock("print(1)\n", "python", True)]),
        ("```\n```", [CodeBlock("", "", True)]),
        ("~~~ sh -x\nls\n~~~~  \n", [CodeBlock("ls\n", "sh", True)]),
        ("````md\n```sh\nls\n```\n````\n", [CodeBlock("```sh\nls\n```\n", "md", True)]),
        ("```sh\n~~~\n```\n", [CodeBlock("~~~\n", "sh", True)]),
        ("```sh\nls\n``` not the end\nend\n```\n", [CodeBlock("ls\n``` not the end\nend\n", "sh", True)]),
        ("```not `code` ```\n", []),
        ("use `x` and ``y``\n", []),
        ("```sh\nls", [CodeBlock("ls", "sh", False)]),
        ("```sh\n", [CodeBlock("", "sh", False)]),
        ("1. so:\n\n   ```sh\n   if a\n     b\n  c\n   ```\n", [CodeBlock("if a\n  b\nc\n", "sh", True)]),
        ("- so:\n        ```sh\n        a\n        ```\n", [CodeBlock("a\n", "sh", True)]),
        (
            "```a\r\n1\r\n```\r\ntext\r\n```b\r\n2\r\n```",
            [CodeBlock("1\r\n", "a", True), CodeBlock("2\r\n", "b", True)],
        ),
        ("```sh\nls\n\n\n```\n", [CodeBlock("ls\n\n\n", "sh", True)]),
    ],
)
def test_blocks(text: str, blocks: list[CodeBlock]) -> None:
    assert code_blocks(text) == blocks
