"""Where a chat is kept: its turns in the database as they come, its KV cache in a file when it is left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from mixlocal.app.chat import Chat
from mixlocal.app.kv_snapshot import load_snapshot, prune_snapshots, save_snapshot, snapshot_identity
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import UsageError
from mixlocal.store.kv_file import snapshot_path
from mixlocal.store.paths import Home
from mixlocal.store.session_db import SavedSession, SessionDb, Turn
from mixlocal.store.session_names import check_chat_name

SNAPSHOT_BYTES = 8 << 30  # of all chats' KV caches together
LEAST_TOKENS = 64  # a cache of fewer is computed as fast as it is read


@dataclass(frozen=True, slots=True)
class About:
    """What is remembered of a chat besides its turns."""

    model: str
    variant: str
    system: str
    params: SamplingParams


class SavedChat:
    """The `Record` of a chat. It appears in the database with its first turn, so that an empty one leaves nothing."""

    def __init__(self, db: SessionDb, folders: Home, about: About) -> None:
        self.db, self.about = db, about
        self.head: SavedSession | None = None
        self._wanted: str | None = None
        self._snapshots = folders.kv_snapshots

    @property
    def name(self) -> str:
        """Empty while it has none."""
        return self.head.name if self.head else self._wanted or ""

    def begin(self, name: str | None = None) -> None:
        """What comes next is another chat, called `name`. Raises `UsageError` if that cannot be."""
        if name is not None:
            name = free_name(self.db, name)
        self.head, self._wanted = None, name

    def load(self, head: SavedSession) -> list[Turn]:
        """What comes next goes on with this one."""
        self.head, self._wanted = head, None
        return self.db.turns(head.id)

    def call(self, name: str) -> None:
        if self.head is None:
            self.begin(name)
        else:
            self.db.describe(self.head.id, name=name)
            self.head = self.db.find(name)

    def describe(self, about: About) -> None:
        """Remember these from now on."""
        self.about = about
        if self.head is not None:
            params = json.dumps(asdict(about.params))
            self.db.describe(
                self.head.id, model=about.model, variant=about.variant, system=about.system, params=params
            )

    def put(self, n: int, turn: Turn) -> None:
        if self.head is None:
            about = self.about
            self.head = self.db.create(self._wanted, about.model, about.variant, about.system, first=turn.content)
            self.describe(about)
        self.db.put(self.head.id, n, turn)

    def truncate(self, count: int) -> None:
        if self.head is not None:
            self.db.truncate(self.head.id, count)

    def restore_cache(self, chat: Chat) -> str:
        """Read the KV cache of before. Empty, or why the chat will be read anew."""
        if self.head is None:
            return ""
        path = snapshot_path(self._snapshots, self.head.id)
        return load_snapshot(path, chat.cache, snapshot_identity(chat.session)) or ""

    def save_cache(self, chat: Chat) -> None:
        """Keep the KV cache for the next time. Raises what writing a file can raise; all that is lost then is time."""
        if self.head is None or chat.cache.length < LEAST_TOKENS:
            return
        save_snapshot(snapshot_path(self._snapshots, self.head.id), chat.cache, snapshot_identity(chat.session))
        prune_snapshots(self._snapshots, SNAPSHOT_BYTES)


def free_name(db: SessionDb, name: str) -> str:
    """`name` as it is kept. Raises `UsageError` if it cannot be a chat's, or is one's already."""
    name = check_chat_name(name)
    if any(name == saved.name for saved in db.list()):
        raise UsageError(f"there is a chat called {name!r} already", f"to go on with it: /load {name}")
    return name


def saved_params(head: SavedSession, defaults: SamplingParams) -> SamplingParams:
    """The settings a chat was left with; the model's own where they cannot be read."""
    try:
        given = msgspec.json.decode(head.params, type=dict[str, Any])
        return msgspec.convert(asdict(defaults) | given, SamplingParams)
    except (msgspec.DecodeError, UsageError):
        return defaults


def turns_for(turns: Sequence[Turn], head: SavedSession, model: str, variant: str) -> list[Turn]:
    """The turns as another model sees them: without the tokens of the one that they were made with."""
    same = (head.model, head.variant) == (model, variant)
    return list(turns) if same else [replace(turn, ids=()) for turn in turns]

