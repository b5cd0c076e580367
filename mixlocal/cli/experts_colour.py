"""A text on a terminal, every token coloured by the expert that its router chose first (Mixtral paper, Figure 8)."""

from __future__ import annotations

import sys
from colorsys import hsv_to_rgb
from typing import TYPE_CHECKING

from mixlocal.cli.render import console
from mixlocal.cli.safe_text import SafeStream
from mixlocal.errors import UsageError

if TYPE_CHECKING:
    from rich.style import Style

    from mixlocal.app.expert_reading import TextRouting
    from mixlocal.cli.options import Globals

# Behind black text; and what stands for it on a terminal of 16 colours.
EIGHT = (
    ("#ff8787", "bright_red"), ("#ffaf5f", "yellow"), ("#ffff87", "bright_yellow"), ("#87d787", "bright_green"),
    ("#5fd7ff", "bright_cyan"), ("#87afff", "bright_blue"), ("#ff87ff", "bright_magenta"), ("#c6c6c6", "white"),
)  # fmt: skip


def check_colour(options: Globals) -> None:
    """Raises `UsageError` where colours cannot be shown: told before the work, not behind it."""
    if options.as_json:
        raise UsageError("--colour and --json contradict each other")
    out = console(options, sys.stdout)
    if out.no_color or out.color_system is None:
        hint = "give --color always before the command; NO_COLOR and TERM=dumb rule that out"
        raise UsageError("--colour: standard output shows no colours", hint)


def print_coloured(options: Globals, routing: TextRouting, layer: int) -> None:
    """The text as it is read by the terminal: what a token completes has its colour."""
    from rich.text import Text

    out = console(options, sys.stdout)
    record, safe = routing.record, SafeStream()
    styles = palette(record.n_experts, few=out.color_system == "standard")
    first = record.chosen[layer, :, 0].tolist()
    legend = Text(f"layer {layer}, first expert: ")
    for expert, style in enumerate(styles):
        legend.append(f" {expert} ", style)
    out.print(legend, soft_wrap=True)
    text = Text()
    for piece, expert in zip(routing.texts, first, strict=True):
        text.append(safe.push(piece), styles[expert])
    out.print(text, soft_wrap=True)


def palette(n_experts: int, *, few: bool = False) -> list[Style]:
    """One style an expert. few: for a terminal of 16 colours, on which more than eight experts share them."""
    from rich.style import Style

    if few or n_experts <= len(EIGHT):
        return [Style(color="black", bgcolor=EIGHT[expert % len(EIGHT)][few]) for expert in range(n_experts)]
    return [Style(color="black", bgcolor=_hue(expert, n_experts)) for expert in range(n_experts)]


def _hue(expert: int, n_experts: int) -> str:
    """Around the circle, neighbours of different strength."""
    strength = (0.35, 0.6, 0.85)[expert % 3]
    red, green, blue = hsv_to_rgb(expert / n_experts, strength, 1.0)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
