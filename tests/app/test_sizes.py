"""--ram 12G, 11GiB, 80%"""

from __future__ import annotations

import pytest

from mixlocal.app.sizes import parse_size
from mixlocal.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12G", 12 * 10**9), ("11GiB", 11 << 30), ("500MB", 5 * 10**8), ("1.5g", 15 * 10**8), ("4096", 4096),
        ("2 KiB", 2048), ("80%", 8000), ("12.5 %", 1250), ("100%", 10000),
    ],
)  # fmt: skip
def test_sizes(text: str, expected: int) -> None:
    assert parse_size("--ram", text, 10000) == expected


@pytest.mark.parametrize("text", ["", "G", "-1G", "1e9", "101%", "12 parsecs", "1.2.3G", "inf", "٣G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--ram"):
        parse_size("--ram", text, 10000)
