"""Pictures of results, as PNG files. They need Matplotlib, which nothing else does."""

from __future__ import annotations

import importlib.util
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from mixlocal.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


def check_plot(path: Path) -> None:
    """Raises `UsageError` or `NotFoundError` if no picture could be written there. Called before the work begins."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path}: pictures are PNG files", "give a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise NotFoundError(f"--plot {path}: there is no folder {path.parent}", "make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs Matplotlib", "pip install 'mixlocal[plot]' into mixlocal's environment")


def new_figure(width: float, height: float) -> Figure:
    """In inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Whole or not at all. Raises what writing a file can raise."""
    from mixlocal.store.durable import write_file

    data = BytesIO()
    figure.savefig(data, format="png")
    write_file(path.absolute(), data.getvalue())
