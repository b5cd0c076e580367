"""What a saved chat may be called, and what it is called when nobody says."""

from __future__ import annotations

import sqlite3
import time
import unicodedata
from itertools import count

from mixlocal.errors import UsageError

MAX_NAME = 80
SLUG_WORDS, SLUG = 5, 40
_APOSTROPHES = {ord("'"): "", ord("\N{RIGHT SINGLE QUOTATION MARK}"): ""}


def check_chat_name(name: str) -> str:
    """`name` without spaces around it, its accents composed; safe as a file's name too.

    Raises `UsageError` if it cannot be a chat's.
    """
    name = unicodedata.normalize("NFC", name.strip())
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name[0] in "-." or "/" in name:
        raise UsageError(
            f"{name[:MAX_NAME]!r} cannot be the name of a chat",
            f"1 to {MAX_NAME} characters, all visible, no slash, and the first no dash or dot",
        )
    return name


def new_name(connection: sqlite3.Connection, name: str, of: str = "") -> str:
    """`name` if it can be one and no session but `of` has it."""
    name = check_chat_name(name)
    if connection.execute("SELECT 1 FROM session WHERE name = ? AND id != ?", (name, of)).fetchone():
        raise UsageError(f"there is a chat called {name!r} already", "choose another name")
    return name


def free_name(connection: sqlite3.Connection, first: str) -> str:
    """ "why-is-the-sky-blue", "why-is-the-sky-blue-2", ..., or "chat-2026-11-26-1" where there are no words."""
    taken = {name for (name,) in connection.execute("SELECT name FROM session")}
    slug, dated = _slug(first), time.strftime("chat-%Y-%m-%d-")
    names = (f"{slug}-{n}" if slug and n > 1 else slug or f"{dated}{n}" for n in count(1))
    return next(name for name in names if name not in taken)


def _slug(text: str) -> str:
    """Its first words, of letters and digits alone."""
    text = unicodedata.normalize("NFC", text[:500].lower()).translate(_APOSTROPHES)
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    visible = [word for word in words if any(c.isalnum() for c in word)]  # a mark may stand alone after an emoji
    return "-".join(visible[:SLUG_WORDS])[:SLUG].rstrip("-")
