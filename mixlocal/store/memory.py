"""Memory that files are read into: whole pages, so that a direct read needs no copy, and huge ones where there are."""

from __future__ import annotations

import mmap

import torch

from mixlocal.errors import MemoryBudgetError

HUGE_PAGE = 1 << 21


def page_memory(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] at the start of a page. It takes physical memory only where it has been written to.

    Raises `MemoryBudgetError` if the system does not give it.
    """
    try:
        pages = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryBudgetError(
            f"the system does not give {nbytes / 1e9:.2f} GB of memory", "give a smaller --ram, or close other programs"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # fewer page-table walks: weights are read once a token, front to back
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + nbytes]
