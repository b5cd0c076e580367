"""Names for a shell to complete: of models, of their variants, of saved chats. Reads little, and imports no torch.

A name that cannot be typed as it is, or that a file does not give, is left out: completion has nobody to complain to.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tomllib
from pathlib import Path
from urllib.parse import quote

from mixlocal.store.paths import BUILDING_SUFFIX, Home, is_plain_name

# app.catalog has them too, behind torch; a test holds them together.
VARIANTS = ("q4", "int4", "int4-32", "q8", "mix", "bf16")
MAX_NAMES = 100
_PACKAGE = Path(__file__).parent.parent


def installed_models(folders: Home) -> dict[str, list[str]]:
    """Each model below the models folder with its variants."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):
        for manifest in sorted(folders.models.glob("*/*/manifest.json")):
            variant, name = manifest.parent.name, manifest.parent.parent.name
            if is_plain_name(name) and variant in VARIANTS and not variant.endswith(BUILDING_SUFFIX):
                found.setdefault(name, []).append(variant)
    return found


def catalogue_models() -> dict[str, str]:
    """Each model of models.toml with its description. `app.catalog` reads the same file with all checks."""
    for path in (_PACKAGE / "models.toml", _PACKAGE.parent / "models.toml"):
        with contextlib.suppress(OSError, ValueError):
            models = tomllib.loads(path.read_text(encoding="utf-8")).get("model", {})
            return {name: str(entry.get("description", "")) for name, entry in models.items()}
    return {}


def session_names(folders: Home) -> list[str]:
    """Saved chats, newest first. The file is only read, and not made."""
    address = f"file:{quote(str(folders.sessions_db))}?mode=ro"
    query = f"SELECT name FROM session ORDER BY updated DESC LIMIT {MAX_NAMES}"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=0.1)) as connection:
            rows = connection.execute(query).fetchall()
    except sqlite3.Error:
        return []
    return [name for (name,) in rows if isinstance(name, str) and name.isprintable()]
