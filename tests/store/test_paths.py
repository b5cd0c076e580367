"""Where things lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixlocal.store.paths import Home, home


def test_everything_below_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLOCAL_HOME", str(tmp_path / "other"))
    folders = home(tmp_path)
    assert folders == Home(tmp_path, tmp_path / "cache", tmp_path, tmp_path / "state")
    assert folders.config_file == tmp_path / "config.toml"
    assert folders.sessions_db == tmp_path / "sessions.db"
    assert folders.history == tmp_path / "state" / "history"
    assert folders.kv_snapshots == tmp_path / "cache" / "kv"
    assert home().config_file == tmp_path / "other" / "config.toml"


def test_the_new_folders_may_be_left_out(tmp_path: Path) -> None:
    folders = Home(tmp_path / "data", tmp_path / "cache")
    assert folders.config_file == tmp_path / "data" / "config.toml"
    assert folders.history == tmp_path / "data" / "state" / "history"


def test_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIXLOCAL_HOME", raising=False)
    for name in ("config", "data", "cache", "state"):
        monkeypatch.setenv(f"XDG_{name.upper()}_HOME", str(tmp_path / name))
    folders = home()
    assert folders.config_file == tmp_path / "config" / "mixlocal" / "config.toml"
    assert folders.sessions_db == tmp_path / "data" / "mixlocal" / "sessions.db"
    assert folders.history == tmp_path / "state" / "mixlocal" / "history"
    assert folders.kv_snapshots == tmp_path / "cache" / "mixlocal" / "kv"
    assert not list(tmp_path.iterdir()), "to ask creates nothing"
