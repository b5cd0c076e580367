"""Where things lie: XDG folders, or everything under one folder with MIXLOCAL_HOME or --home."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mixlocal.errors import UsageError

MAX_ROOT_BYTES = 3500  # of the 4096 that a system call takes
BUILDING_SUFFIX = ".building"  # of a folder that is not a model yet
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


_IN_DATA = Path()  # a folder of its own was not named


@dataclass(frozen=True, slots=True)
class Home:
    """data: models and saved chats.  config: config.toml.  state: what was typed.

    cache: downloads, what was learnt of a model's routing, KV caches of chats; may be deleted at any time.
    """

    data: Path
    cache: Path
    config: Path = _IN_DATA
    state: Path = _IN_DATA

    def __post_init__(self) -> None:
        if self.config == _IN_DATA:
            object.__setattr__(self, "config", self.data)
        if self.state == _IN_DATA:
            object.__setattr__(self, "state", self.data / "state")

    @property
    def models(self) -> Path:
        return self.data / "models"

    @property
    def sessions_db(self) -> Path:
        return self.data / "sessions.db"

    @property
    def config_file(self) -> Path:
        return self.config / "config.toml"

    @property
    def history(self) -> Path:
        """What was typed in the chat."""
        return self.state / "history"

    @property
    def kv_snapshots(self) -> Path:
        """The folder with KV caches of saved chats."""
        return self.cache / "kv"

    @property
    def logits(self) -> Path:
        """The folder with reference logits of texts, made anew where they are missed."""
        return self.cache / "logits"

    @property
    def downloads(self) -> Path:
        return self.cache / "downloads"

    def profile(self, name: str, variant: str) -> Path:
        """The file with what was learnt of a model's routing."""
        return self.cache / "routing" / f"{check_name(name)}.{variant}.json"

    def store(self, name: str, variant: str) -> Path:
        """The folder of one model and variant. Raises `UsageError` if the name could leave the models folder."""
        return self.models / check_name(name) / variant


def home(override: Path | None = None) -> Home:
    root = override or (Path(os.environ["MIXLOCAL_HOME"]) if os.environ.get("MIXLOCAL_HOME") else None)
    if root is not None:
        root = root.expanduser().absolute()
        if len(os.fsencode(root)) > MAX_ROOT_BYTES:
            raise UsageError(f"{str(root)[:60]}...: too long a path", "choose another folder with --home")
        return Home(data=root, cache=root / "cache")
    folders = platformdirs.PlatformDirs("mixlocal", appauthor=False)
    return Home(
        data=folders.user_data_path, cache=folders.user_cache_path,
        config=folders.user_config_path, state=folders.user_state_path,
    )  # fmt: skip


def is_plain_name(name: str) -> bool:
    """Whether `name`, from outside, is one component of a path that stays in its folder and prints as it is."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """`name` if it is safe as a folder name."""
    if not is_plain_name(name):
        raise UsageError(f"{name!r} cannot be the name of a model", "use letters, digits, dot, dash and underscore")
    return name
