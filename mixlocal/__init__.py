"""Mixture-of-experts language models on one ordinary computer.

from mixlocal import Session
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixlocal.app.session import Session as Session

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`Session` on first use: importing mixlocal loads no torch."""
    if name == "Session":
        from mixlocal.app.session import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
