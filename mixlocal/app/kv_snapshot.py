"""A chat's KV cache, kept so that going on with the chat computes nothing again.

A snapshot is only a cache: one that does not fit, or is not whole, is left alone, and the chat is read anew.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import torch

from mixlocal import __version__
from mixlocal.app.session import Session
from mixlocal.kernels import select
from mixlocal.model.kv_cache import KV_DTYPES, KVCache
from mixlocal.quant.packing import byte_view
from mixlocal.store.kv_file import KvHead, KvReader, Piece, Unusable, UnusableError, prune_kv_files, write_kv_file

PIECE_BYTES = 1 << 20  # stays in a processor's cache between its reading and its check
_DTYPE_NAMES = {dtype: name for name, dtype in KV_DTYPES.items()}


def save_snapshot(path: Path, cache: KVCache, identity: str) -> None:
    """Replace the file at `path`, piece by piece, without a second copy in memory.

    Raises what writing a file can raise; nothing is left behind then, and an older snapshot stays.
    """
    cache.clear_unused()
    write_kv_file(path, _head(cache, identity, cache.length), _saved_parts(cache))


def load_snapshot(path: Path, cache: KVCache, identity: str) -> Unusable | None:
    """Fill `cache` with as much as it has room for, to the bit as it was; or say why not, and leave it empty."""
    cache.truncate(0)
    try:
        with KvReader(path) as reader:
            cache.advance(_load(reader, cache, identity))
    except UnusableError as error:
        cache.truncate(0)
        return error.why
    return None


def prune_snapshots(folder: Path, keep_bytes: int) -> None:
    """Keep the newest that take `keep_bytes` together, and nothing that a killed process left half written."""
    prune_kv_files(folder, keep_bytes)


def snapshot_identity(session: Session) -> str:
    """Of all that decides what a token's keys and values are: weights, recipe, precision, experts, arithmetic."""
    run = session.run
    kernels = select(run.device).name
    arithmetic = "native" if kernels.startswith("cpu-") else kernels  # all instruction sets give the same bits
    facts = (__version__, str(run.kv_dtype), str(session.model.top_k), arithmetic)
    return hashlib.sha256(msgspec.json.encode((run.store.manifest, facts))).hexdigest()


def _head(cache: KVCache, identity: str, length: int) -> KvHead:
    keys, values = cache.layers[0].keys, cache.layers[0].values
    return KvHead(
        identity, _DTYPE_NAMES[keys.dtype], length,
        layers=len(cache.layers), kv_heads=keys.shape[1], head_dim=keys.shape[3], value_width=values.shape[3],
    )  # fmt: skip


def _saved_parts(cache: KVCache) -> Iterator[Iterable[Piece]]:
    yield [memoryview(struct.pack(f"<{cache.length}I", *cache.ids))]
    for rows, tokens in cache.rows():
        own = rows[cache.table.to(rows.device)].flatten(0, 1)
        yield _pieces(_bytes(own[: -(-cache.length // tokens)]))


def _pieces(data: torch.Tensor) -> Iterator[Piece]:
    for start in range(0, len(data), PIECE_BYTES):
        yield byte_view(data[start : start + PIECE_BYTES].cpu())


def _load(reader: KvReader, cache: KVCache, identity: str) -> list[int]:
    """The ids of the tokens that are in the cache's memory now."""
    length = reader.head.length
    if reader.head != _head(cache, identity, length):
        raise UnusableError(Unusable.IDENTITY)
    if 4 * length > reader.left():
        raise UnusableError(Unusable.DAMAGED)
    ids = bytearray(4 * length)
    reader.read_part([memoryview(ids)])
    fitting, scrap = min(length, cache.limit), torch.empty(PIECE_BYTES, dtype=torch.uint8)
    cache.make_room(fitting)
    for rows, tokens in cache.rows():
        own = torch.zeros((len(cache.table), *rows.shape[1:]), dtype=rows.dtype)
        nbytes = -(-length // tokens) * rows[0, 0].nbytes
        reader.read_part(_places(_bytes(own.flatten(0, 1)[: -(-fitting // tokens)]), nbytes, scrap))
        rows[cache.table.to(rows.device)] = own.to(rows.device)
    if reader.left():
        raise UnusableError(Unusable.DAMAGED)
    return list(struct.unpack(f"<{length}I", ids)[:fitting])


def _places(data: torch.Tensor, nbytes: int, scrap: torch.Tensor) -> Iterator[Piece]:
    """Where a part of `nbytes` is to be read to: `data` takes the beginning, and nobody the rest."""
    for start in range(0, len(data), PIECE_BYTES):
        yield byte_view(data[start : start + PIECE_BYTES])
    for start in range(len(data), nbytes, PIECE_BYTES):
        yield byte_view(scrap[: min(PIECE_BYTES, nbytes - start)])


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.flatten().view(torch.uint8)
