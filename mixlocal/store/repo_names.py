"""Names that the Hub uses, checked by pattern before anything is made of them."""

from __future__ import annotations

import re

from mixlocal.errors import RefusedError
from mixlocal.store.paths import is_plain_name

# All that is ever fetched, beside *.safetensors: never .bin, .pt, .pkl or .py, never an archive.
WANTED = frozenset({
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
})  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_UNSAFE = re.compile(r'[\\:\x00-\x1f\x7f]')


def is_repository(reference: str) -> bool:
    """Whether it has the form org/repo."""
    return _REPOSITORY.fullmatch(reference) is not None and ".." not in reference


def is_commit(revision: str) -> bool:
    return _COMMIT.fullmatch(revision) is not None


def is_revision(revision: str) -> bool:
    """Whether it can be a branch, a tag or a commit."""
    return _REVISION.fullmatch(revision) is not None and ".." not in revision


def is_wanted(path: str) -> bool:
    return path in WANTED or (is_plain_name(path) and path.endswith(".safetensors"))


def check_path(repository: str, path: object) -> None:
    """Raises `RefusedError` for a file that would leave its folder: that is no accident, even if nobody wants it."""
    parts = path.split("/") if isinstance(path, str) else [".."]
    if any(part in ("", ".", "..") or len(part) > 255 for part in parts) or _UNSAFE.search(str(path)):
        raise RefusedError(f"{repository}: lists a file named {str(path)[:80]!r}", "this is no honest repository")
