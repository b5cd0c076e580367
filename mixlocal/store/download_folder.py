"""Where a pull keeps what has come so far: the listing it began with, the small files, and the shards on their way."""

from __future__ import annotations

from pathlib import Path

import msgspec

from mixlocal.errors import PermissionDeniedError
from mixlocal.store.digest import Digest
from mixlocal.store.durable import make_folder, named_errors, remove_file, remove_folder, write_file
from mixlocal.store.listing import Listing, RepoFile
from mixlocal.store.manifest import UNDECODABLE
from mixlocal.store.repo_names import is_commit, is_wanted

NOTE = "pull.json"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    nbytes: int
    digest: str


class _Begun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A branch may move on meanwhile: what it was at the first call holds until the model is finished."""

    repository: str
    revision: str
    commit: str
    files: tuple[_File, ...]


class DownloadFolder:
    """The caller holds its lock for whatever writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def listing(self, repository: str, revision: str) -> Listing | None:
        """What an earlier call for the same revision began with."""
        path = self.path / NOTE
        if not path.is_file():
            return None
        with named_errors(path):
            data = path.read_bytes()
        try:
            begun = msgspec.json.decode(data, type=_Begun)
            files = {f.path: RepoFile(f.path, f.nbytes, Digest(f.digest)) for f in begun.files if is_wanted(f.path)}
        except (*UNDECODABLE, ValueError):
            return None
        if begun.repository != repository or revision not in (begun.revision, begun.commit):
            return None
        return Listing(repository, begun.commit, files) if is_commit(begun.commit) else None

    def begin(self, listing: Listing, revision: str) -> None:
        """Remember a listing. Raises `PermissionDeniedError` for a symbolic link in the folder's place."""
        if self.path.is_symlink():
            raise PermissionDeniedError(f"{self.path}: is a symbolic link", "remove it")
        make_folder(self.path)
        files = tuple(_File(f.path, f.nbytes, f.digest.value) for f in listing.files.values())
        begun = _Begun(listing.repository, revision, listing.commit, files)
        data = msgspec.json.encode(begun)
        if not (self.path / NOTE).is_file() or (self.path / NOTE).read_bytes() != data:
            write_file(self.path / NOTE, data)

    def forget(self) -> None:
        """What the listing said is not what came: it is asked for anew."""
        remove_file(self.path / NOTE)

    def copy_of(self, file: RepoFile) -> Path | None:
        """A whole file that an earlier call kept; its hash is still to be checked."""
        path = self.path / file.path
        return path if path.is_file() and not path.is_symlink() and path.stat().st_size == file.nbytes else None

    def keep(self, name: str, data: bytes) -> None:
        if not (self.path / name).is_file() or (self.path / name).read_bytes() != data:
            write_file(self.path / name, data)

    def landed(self, file: RepoFile) -> int:
        """Bytes of an unfinished file."""
        part = self.path / f"{file.path}.part"
        return min(part.stat().st_size, file.nbytes) if part.is_file() else 0

    def is_leftover(self) -> bool:
        """Whether it is of a pull that was killed behind its last step; one with shards that were to be kept is not."""
        return (self.path / NOTE).is_file() and not any(self.path.glob("*.safetensors"))

    def remove(self) -> None:
        if self.path.is_dir():
            remove_folder(self.path)
