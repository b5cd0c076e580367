"""Sizes as people write them."""

from __future__ import annotations

import re

from mixlocal.errors import UsageError

UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 1 << 10,
    "MI": 1 << 20,
    "GI": 1 << 30,
    "TI": 1 << 40,
}
SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]I?)?B?", re.IGNORECASE | re.ASCII)
SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%", re.ASCII)


def parse_size(option: str, text: str, whole: int) -> int:
    """Bytes of "12G", "11GiB", "500MB", or of "80%" of `whole`. Raises `UsageError` naming `option`."""
    if (share := SHARE.fullmatch(text.strip())) and float(share[1]) <= 100:
        return int(whole * float(share[1]) / 100)
    if size := SIZE.fullmatch(text.strip()):
        return int(float(size[1]) * UNITS[(size[2] or "").upper()])
    raise UsageError(f"{option} {text!r} is no size", "for example 12G, 11GiB or 80%")
