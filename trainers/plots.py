"""The drawings of a sweep's page as SVG: small, sharp at any size, coloured by the page's CSS, and without a script.

The same numbers give the same bytes. What the drawings say to a screen reader is in their label; each mark has a title.
Classes: `pt` a trial, with `e0` to `e4` for how far it was trained; `best`, `default`, `stopped`, `failed`, `front`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from launcher.space import Domain
from launcher.sweeps import METRICS, SHARES, Trial, metric_name, metric_text, setting_text
from trainers.curves import finite
from trainers.page import printable

DRAWN = 500
"""The most trials of a drawing: more would only cover one another."""
_POINTS = 60
"""The most points of a learning curve."""
_ERRORS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)

Value = tuple[Trial, float]
"""A trial with its value by the first objective."""


@dataclass(frozen=True)
class Scale:
    """Where values lie between 0 and 1. `kind` is `linear`, `log`, `error` (shares: as much room from 90 % to 99 % as
    from 0 to 90 %) or `places` (by their place in `names`)."""

    kind: str
    low: float
    high: float
    names: tuple[str, ...] = ()

    def at(self, value: Any, jitter: float = 0.5) -> float | None:
        """None for what the scale cannot show; `jitter` (0 to 1) is where within the place of a name."""
        if self.kind == "places":
            name = setting_text(value)
            return (self.names.index(name) + 0.2 + 0.6 * jitter) / len(self.names) if name in self.names else None
        number = self._warp(value)
        return None if number is None else min(max((number - self.low) / (self.high - self.low), 0.0), 1.0)

    def _warp(self, value: Any) -> float | None:
        number = finite(value, math.nan)
        if math.isnan(number) or (self.kind == "log" and number <= 0):
            return None
        return _warped(self.kind, number)

    def ticks(self, count: int) -> list[tuple[float, float]]:
        """Up to about `count` round values with their places."""
        if self.kind == "linear":
            rough = (self.high - self.low) / max(count - 1, 1)
            power = 10 ** math.floor(math.log10(rough))
            step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
            first = math.ceil(self.low / step - 1e-9)
            values = [round(number * step, 12) for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        elif self.kind == "log":
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            factors = (1,) if self.high - self.low > 2 else (1, 2, 5) if self.high - self.low > 0.5 else range(1, 10)
            values = [factor * 10.0**decade for decade in decades for factor in factors]
        else:
            values = list(_ERRORS)
        found: list[tuple[float, float]] = []
        for value in sorted(values, reverse=True):  # where there is no room for all, the upper ones stay
            place = ((self._warp(value) or 0.0) - self.low) / (self.high - self.low)
            if -1e-9 <= place <= 1 + 1e-9 and all(abs(place - other) > 0.7 / count for _, other in found):
                found.append((value, place))
        return found[::-1]


def _warped(kind: str, value: float) -> float:
    if kind == "log":
        return math.log10(value)
    return -math.log10(max(1 - value, 1e-5)) if kind == "error" else value


def _scale(kind: str, low: float, high: float, room: float = 0.05) -> Scale:
    low, high = _warped(kind, low), _warped(kind, high)
    spare = (high - low) * room or max(abs(high) * 0.05, 0.05)
    return Scale(kind, low - spare, high + spare)


def metric_scale(metric: str, values: Sequence[float]) -> Scale:
    """For the values of a metric: those near the best get room."""
    low, high = min(values), max(values)
    if metric in SHARES and metric != "data_wait" and high > 0.8:
        return _scale("error", max(low, 0.0), high)
    return _scale("log" if "loss" in metric and 0 < 2 * low < high else "linear", low, high)


def field_scale(domain: Domain | None, values: Sequence[Any]) -> Scale:
    """For a searched field: over its domain, or without one over the values that were tried."""
    if domain is not None and not domain.finite:
        low, high = domain.values[:2]
        return _scale("log" if domain.kind == "loguniform" else "linear", low, high, 0.03)
    numbers = [value for value in values if type(value) in (int, float) and math.isfinite(value)]
    if domain is None and numbers and len(numbers) == len(values) and len(set(numbers)) > 1:
        wide = min(numbers) > 0 and max(numbers) / min(numbers) > 50
        return _scale("log" if wide else "linear", min(numbers), max(numbers))
    known = domain.values if domain is not None else sorted(values, key=setting_text)
    return Scale("places", 0, 1, tuple(dict.fromkeys(setting_text(value) for value in [*known, *values])))


# -- the drawings


def scatter(
    label: str, points: Sequence[tuple[Trial, Any, Any]], scales: tuple[Scale, Scale], names: tuple[str, str],
    marks: Callable[[Trial], str], title: Callable[[Trial], str], line: Sequence[tuple[Any, Any]] = (),
) -> Markup:  # fmt: skip
    """Trials by two values, (trial, x, y); `line` joins some places. `marks` gives each its classes."""
    canvas = _Canvas(330, 230, left=46, right=8, top=8, bottom=36)
    canvas.axes(scales, names)
    if line:
        canvas.line([canvas.place(scales, x, y) for x, y in line], "front")
    late = {"best": 2, "default": 1}
    for trial, x, y in sorted(points, key=lambda point: max(late.get(word, 0) for word in marks(point[0]).split())):
        if place := canvas.place(scales, x, y, (trial.number * 0.618034) % 1):
            canvas.mark(place, marks(trial), title(trial))
    return canvas.svg(label)


def parallel(
    label: str, found: Sequence[Value], columns: Sequence[tuple[str, Scale, Callable[[Trial], Any]]],
    marks: Callable[[Trial], str], title: Callable[[Trial], str],
) -> Markup:  # fmt: skip
    """A line for each trial over axes side by side, each (name, scale, value of a trial); the last is the objective.

    What a trial does not have lies below the axis.
    """
    canvas = _Canvas(1000, 340, left=52, right=70, top=34, bottom=34)
    xs = [canvas.x(number / max(len(columns) - 1, 1)) for number in range(len(columns))]
    below = canvas.height - 8
    for trial, _ in reversed(found):  # the best last, on top
        spots = []
        for x, (_, scale, value) in zip(xs, columns, strict=True):
            share = scale.at(value(trial), (trial.number * 0.618034) % 1)
            spots.append((x, below if share is None else canvas.y(share)))
        canvas.line(spots, marks(trial), title(trial))
    for number, (x, (name, scale, _)) in enumerate(zip(xs, columns, strict=True)):
        canvas.add(f'<path class="axis" d="M{x:.1f} {canvas.y(0):.1f}V{canvas.y(1):.1f}"/>')
        shift, anchor = {0: (-24, "start"), len(columns) - 1: (24, "end")}.get(number, (0, "middle"))
        canvas.text(x + shift, 16, _cut(_named(name), 1100 / len(columns)), anchor, "name")
        for spot, words in _labels(scale, name):
            canvas.text(x + 6, canvas.y(spot) + 3.5, _cut(words, 720 / len(columns)), "start", "halo")
    return canvas.svg(label)


def _labels(scale: Scale, name: str) -> list[tuple[float, str]]:
    if scale.kind == "places":
        return [((number + 0.5) / len(scale.names), word) for number, word in enumerate(scale.names[:12])]
    return [(place, tick_text(name, value)) for value, place in scale.ticks(5)]


def learning(
    label: str, found: Sequence[Trial], metric: str, epochs: int, rungs: Sequence[int], marks: Callable[[Trial], str],
    title: Callable[[Trial], str],
) -> Markup:  # fmt: skip
    """The value of each trial after each epoch; the rungs at which trials were compared are lines."""
    canvas = _Canvas(1000, 380, left=52, right=14, top=20, bottom=36)
    curves = [(trial, _thin([(finite(epoch.get("epoch"), number), finite(epoch.get(metric), math.nan))
                             for number, epoch in enumerate(trial.epochs, 1)])) for trial in found]  # fmt: skip
    values = [value for _, curve in curves for _, value in curve]
    last = max([epochs, *(at for _, curve in curves for at, _ in curve)])
    scales = _scale("linear", 1, last, 0.01), metric_scale(metric, values)
    canvas.axes(scales, ("epoch", metric), whole=True)
    for rung in rungs:
        x = canvas.x(scales[0].at(rung) or 0.0)
        canvas.add(f'<path class="rung" d="M{x:.1f} {canvas.y(0):.1f}V{canvas.y(1):.1f}"/>')
        canvas.text(x, 12, f"rung {rung}", "middle", "")
    for trial, curve in sorted(curves, key=lambda pair: _layer(marks(pair[0]))):
        spots = [spot for at, value in curve if (spot := canvas.place(scales, at, value))]
        if len(spots) > 1:
            canvas.line(spots, marks(trial), title(trial))
        if spots:
            canvas.mark(spots[-1], f"end {marks(trial)}", title(trial), 2.2)
    return canvas.svg(label)


def _layer(marks: str) -> int:
    """Later ones are drawn over earlier ones."""
    return next((number for number, word in enumerate(("stopped", "failed", "default", "best"), 1) if word in marks), 0)


def _thin(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The finite points, evenly fewer where there are very many; the last stays."""
    known = [point for point in curve if math.isfinite(point[1])]
    step = math.ceil(len(known) / _POINTS) or 1
    return known[:-1][::step] + known[-1:]


class _Canvas:
    """Collects the elements of an SVG; a plot area lies within its margins."""

    def __init__(self, width: int, height: int, *, left: int, right: int, top: int, bottom: int) -> None:
        self.width = width
        self.height = height
        self._edges = left, right, top, bottom
        self._parts: list[str] = []

    def x(self, share: float) -> float:
        left, right, _, _ = self._edges
        return left + share * (self.width - left - right)

    def y(self, share: float) -> float:
        _, _, top, bottom = self._edges
        return self.height - bottom - share * (self.height - top - bottom)

    def place(self, scales: tuple[Scale, Scale], x: Any, y: Any, jitter: float = 0.5) -> tuple[float, float] | None:
        across, up = scales[0].at(x, jitter), scales[1].at(y)
        return None if across is None or up is None else (self.x(across), self.y(up))

    def add(self, element: str) -> None:
        self._parts.append(element)

    def text(self, x: float, y: float, words: str, anchor: str, kind: str) -> None:
        named = f' class="{kind}"' if kind else ""
        self.add(f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(printable(words))}</text>')

    def line(self, places: Sequence[tuple[float, float] | None], kind: str, title: str = "") -> None:
        path = "L".join(f"{place[0]:.1f} {place[1]:.1f}" for place in places if place)
        self.add(f'<path class="ln {kind}" d="M{path}">{_title(title)}</path>')

    def mark(self, place: tuple[float, float], kind: str, title: str, radius: float = 3.6) -> None:
        x, y = place
        if "default" in kind and "end" not in kind:
            self.add(f'<path class="pt {kind}" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5-5z">{_title(title)}</path>')
            return
        size = radius + 1.6 if "best" in kind else radius
        self.add(f'<circle class="pt {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size:g}">{_title(title)}</circle>')

    def axes(self, scales: tuple[Scale, Scale], names: tuple[str, str], *, whole: bool = False) -> None:
        """Grid lines and numbers; `names` are those of x and y, the second told by the caption alone."""
        across, up = scales
        for value, place in up.ticks(5):
            self.add(f'<path class="grid" d="M{self.x(0):.1f} {self.y(place):.1f}H{self.x(1):.1f}"/>')
            self.text(self.x(0) - 6, self.y(place) + 3.5, tick_text(names[1], value), "end", "")
        base = self.height - self._edges[3] + 15
        if across.kind == "places":
            room = (self.x(1) - self.x(0)) / len(across.names)
            for number, name in enumerate(across.names if room > 14 else ()):
                self.text(self.x((number + 0.5) / len(across.names)), base, _cut(name, room), "middle", "")
        else:
            for value, place in across.ticks(9 if self.width > 500 else 5):
                if not whole or value == round(value):
                    self.text(self.x(place), base, tick_text(names[0], value), "middle", "")
        self.text((self.x(0) + self.x(1)) / 2, self.height - 5, _named(names[0]), "middle", "name")

    def svg(self, label: str) -> Markup:
        head = f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(printable(label))}">'
        return Markup(head + "".join(self._parts) + "</svg>")


def _title(text: str) -> str:
    return f"<title>{escape(printable(text))}</title>" if text else ""


def _named(name: str) -> str:
    return metric_name(name) if name in METRICS else name


def _cut(text: str, room: float) -> str:
    """As many characters as have room, at the size of the page's labels."""
    most = max(int(room / 6), 3)
    return text if len(text) <= most else text[: most - 1] + "…"


def tick_text(metric: str, value: float) -> str:
    """A round value of an axis."""
    if metric in SHARES:
        return f"{100 * value:.6g} %"
    return metric_text("", value) if abs(value) >= 1000 else f"{value:g}"
