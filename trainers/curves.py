"""The curves of a run as SVG elements of a page, drawn by matplotlib, sized and coloured by the page's CSS.

The same numbers give the same bytes. The page defines the colours --ink-2, --line, --train and --val.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

from markupsafe import Markup

# matplotlib knows no CSS variables: it draws with these colours, which then follow the theme of the page.
_THEME = {"#010101": "ink-2", "#020202": "line", "#030303": "train", "#040404": "val"}
_INK, _LINE, _TRAIN, _VAL = _THEME

_PANELS = (
    ("Loss", {"train": "train_loss", "validation": "val.loss"}, False),
    ("Top-1", {"train": "train_top1", "validation": "val.top1"}, True),
    ("Learning rate", {"": "lr"}, False),
    ("Images per second", {"": "images_per_second"}, False),
    ("Share of time waiting for data", {"": "data_wait"}, True),
)
"""Title, the lines by name with the key of each in an epoch, and whether they are shares."""


def curves(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The panels as {"title", "svg", "lines": names}; one without any finite number is left out."""
    x = [finite(epoch.get("epoch"), number) for number, epoch in enumerate(epochs, 1)]
    best = max((index for index, epoch in enumerate(epochs) if epoch.get("best") is True), default=None)
    panels = []
    for title, keys, shares in _PANELS:
        lines = {name: [_at(epoch, key) for epoch in epochs] for name, key in keys.items()}
        if any(math.isfinite(value) for values in lines.values() for value in values):
            svg = _draw(title, x, lines, shares, best)
            panels.append({"title": title, "svg": svg, "lines": [name for name in lines if name]})
    return panels


def _at(epoch: dict[str, Any], key: str) -> float:
    value: Any = epoch
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    number = finite(value, math.nan)
    return number if abs(number) < 1e30 else math.nan  # what lies far beyond, matplotlib cannot scale


def _draw(title: str, x: list[float], lines: dict[str, list[float]], shares: bool, best: int | None) -> Markup:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    wide = len(lines) > 1
    with matplotlib.rc_context({
        "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8.5, "text.color": _INK, "xtick.color": _INK,
        "ytick.color": _INK, "axes.labelcolor": _INK, "axes.spines.left": False, "axes.spines.top": False,
        "axes.spines.right": False, "axes.edgecolor": _LINE, "grid.color": _LINE, "axes.axisbelow": True,
    }):  # fmt: skip
        figure = Figure(figsize=(4.7, 2.5) if wide else (3.3, 1.9), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot(facecolor="none")
        for name, values in lines.items():
            colour = _VAL if name == "validation" else _TRAIN
            axes.plot(x, values, color=colour, lw=1.7, marker="o" if len(x) < 3 else "", ms=4, solid_capstyle="round")
            if best is not None and name == "validation":
                axes.plot(x[best : best + 1], values[best : best + 1], "o", color=colour, ms=5.5)
        axes.grid(axis="y", lw=0.6)
        axes.tick_params(length=0, pad=5)
        axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 4, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5 if wide else 4))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %") if shares else "{x:g}")
        if not wide:  # rates: cut off at their least, a steady one would look restless
            axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(out.getvalue(), title)


def _inline(svg: str, title: str) -> Markup:
    """matplotlib's file as an element of the page: sized and coloured by CSS, without addresses or ids that clash."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' id="[\w.]+_\d+"| xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<svg( width="[^"]*"| height="[^"]*"|[^>])*?( viewBox="[^"]*")[^>]*>', r"<svg\2 ROLE>", svg, count=1)
    for colour, variable in _THEME.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg.replace("ROLE", f'role="img" aria-label="{title} by epoch"', 1))


def finite(value: Any, otherwise: float) -> float:
    """The value if it is a finite number, else `otherwise`."""
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else otherwise
    except OverflowError:  # JSON knows integers that no float can hold
        return otherwise
