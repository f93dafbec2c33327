"""The report's charts as inline SVG: they use the page's light or dark colours and need no script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = 8  # number of line colours in the page's style sheet: .c0 to .c7
LINES = 2 * COLOURS  # most lines of a chart
LABEL_WIDTH = 56  # characters that fit into the label of a forest plot's line


@dataclass(frozen=True)
class Line:
    """A curve of a chart.

    Attributes:
        name: shown when the mouse is over the curve.
        colour: number of the colour; from `COLOURS` on, the same colours dashed.
        points: (x, y).
        bars: half the height of the error bar at each point; empty for none.
        faint: whether the line is thin and pale.
        label: text beside the last point.
    """

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    bars: Sequence[float] = ()
    faint: bool = False
    label: str = ""


@dataclass(frozen=True)
class Interval:
    """A line of a forest plot; without an interval only the mean is drawn."""

    name: str
    mean: float
    low: float | None
    high: float | None


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers between two numbers, for an axis."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers; also twice and five times these if they are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        found = [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]
        if len(found) > 2:
            break
    return found


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    width: int = 380,
    height: int = 240,
    marks: bool = False,
    round_ticks: bool = False,
    log_x: bool = False,
) -> Markup:
    """A chart of curves; empty without points.

    Args:
        marks: draw points, error bars and labels.
        round_ticks: the x axis has round numbers, even with few points.
        log_x: the x axis is logarithmic; all x must be positive.
    """
    along = math.log10 if log_x else float
    xs = [x for line in lines for x, _ in line.points]
    ys = [y + sign * bar for line in lines for (_, y), bar in _barred(line) for sign in (-1, 1)]
    if not xs:
        return Markup()
    left, right, top, bottom = 52, 10, 10, 36
    x_low, x_high = _widened(along(min(xs)), along(max(xs)), 0.02 if not marks else 0.06)
    y_low, y_high = _widened(min(ys), max(ys), 0.06)

    def x_at(x: float) -> float:
        return left + (along(x) - x_low) / (x_high - x_low) * (width - left - right)

    def y_at(y: float) -> float:
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img">').format(width, height)]
    for y in ticks(y_low, y_high):
        parts.append(_rule(left, y_at(y), width - right, y_at(y)))
        parts.append(_text(left - 6, y_at(y) + 3.5, number(y), "end"))
    few = marks and not round_ticks and len(set(xs)) <= 8
    shown = sorted(set(xs)) if few else log_ticks(10**x_low, 10**x_high) if log_x else ticks(x_low, x_high, 5)
    for x in shown:
        parts.append(_text(x_at(x), height - bottom + 15, number(x), "middle"))
    parts.append(_text((left + width - right) / 2, height - 4, x_label, "middle"))
    middle = (top + height - bottom) / 2
    parts.append(
        Markup('<text transform="translate(11 {:.0f}) rotate(-90)" text-anchor="middle">{}</text>').format(
            middle, y_label
        )
    )
    for line in lines:
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        kind = f"c{line.colour % COLOURS}{' dash' * (line.colour >= COLOURS)}{' faint' * line.faint}"
        parts.append(Markup('<g class="{}"><title>{}</title><polyline points="{}"/>').format(kind, line.name, path))
        for (x, y), bar in _barred(line) if marks else ():
            if bar:
                parts.append(_rule(x_at(x), y_at(y - bar), x_at(x), y_at(y + bar), "bar"))
            label = f"{line.name}: {number(x)}, {y:.4g}" + (f" ± {bar:.2g}" if bar else "")
            parts.append(
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>').format(
                    x_at(x), y_at(y), label
                )
            )
        parts.append(Markup("</g>"))
        if line.label:
            x, y = x_at(line.points[-1][0]), y_at(line.points[-1][1])
            inward = (x - 7, "end") if x > (left + width - right) / 2 else (x + 7, "start")
            parts.append(_text(inward[0], y + 3.5, line.label, inward[1], "small"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def forest(intervals: Sequence[Interval], x_label: str, width: int = 760) -> Markup:
    """A forest plot: mean differences with their intervals; right of 0 is better."""
    if not intervals:
        return Markup()
    ends = [v for i in intervals for v in (i.mean, i.low, i.high) if v is not None]
    low, high = _widened(min(0.0, *ends), max(0.0, *ends), 0.04)
    left, right, step = min(400, 40 + 6.4 * max(len(i.name) for i in intervals)), 14, 20  # `LABEL_WIDTH` characters fit
    height = step * len(intervals) + 42

    def at(x: float) -> float:
        return left + (x - low) / (high - low) * (width - left - right)

    parts = [Markup('<svg class="chart wide" viewBox="0 0 {} {}" role="img">').format(width, height)]
    for x in ticks(low, high, 6):
        parts.append(_rule(at(x), 6, at(x), height - 34))
        parts.append(_text(at(x), height - 20, number(x), "middle"))
    parts.append(_rule(at(0), 2, at(0), height - 32, "zero"))
    for row, i in enumerate(intervals):
        y = 14 + step * row
        kind = "better" if i.low is not None and i.low > 0 else "worse" if i.high is not None and i.high < 0 else "open"
        text = f"{i.name}: {i.mean:+.4g}"
        parts.append(_text(left - 8, y + 4, i.name, "end"))
        parts.append(Markup('<g class="{}">').format(kind))
        if i.low is not None and i.high is not None:
            parts.append(_rule(at(i.low), y, at(i.high), y, "bar"))
            text += f" ({i.low:+.4g} to {i.high:+.4g})"
        parts.append(
            Markup('<circle cx="{:.1f}" cy="{}" r="4"><title>{}</title></circle></g>').format(at(i.mean), y, text)
        )
    parts.append(_text((left + width - right) / 2, height - 4, x_label, "middle"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def heatmap(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    frames: Sequence[Sequence[bool]] = (),
    centre: float | Sequence[float] = 0.0,
    most: float = 1.0,
    cell: int = 30,
) -> Markup:
    """A heatmap with one column for each layer and one row for each module type.

    Args:
        values: L x N. Cells above ``centre`` have one colour, cells below another. NaN leaves the place blank.
        rows: names of the N types; empty for a small picture without text.
        frames: L x N, the cells that get a frame.
        centre: one number, or one for each layer.
        most: the distance from ``centre`` at which a colour is strongest.
        cell: width of a cell in pixels.
    """
    layers, types = len(values), len(values[0]) if values else 0
    centres = [centre] * layers if isinstance(centre, float) else centre
    left = 8 + 6.4 * max(map(len, rows)) if rows else 2
    high = cell * 0.72
    width, height = left + cell * layers + 2, high * types + (20 if rows else 2)
    parts = [
        Markup('<svg class="heat" viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" role="img">').format(width, height, width)
    ]
    for j in range(types):
        if rows:
            parts.append(_text(left - 6, high * (j + 0.5) + 4, rows[j], "end"))
        for i in range(layers):
            if math.isnan(values[i][j]):
                continue
            value, share = values[i][j], (values[i][j] - centres[i]) / most
            x, y = left + cell * i, 1 + high * j
            parts.append(
                Markup(
                    '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.2f}">'
                    "<title>layer {}: {:.3f}</title></rect>"
                ).format("more" if share >= 0 else "less", x, y, cell - 1, high - 1, abs(share) * 0.9, i + 1, value)
            )
            if frames and frames[i][j]:
                box = Markup('<rect class="frame" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>')
                parts.append(box.format(x + 1, y + 1, cell - 3, high - 3))
            if rows:
                parts.append(
                    _text(x + cell / 2, y + high / 2 + 3, f"{value:.2f}".lstrip("0") or "0", "middle", "small")
                )
    if rows:
        for i in range(layers):
            parts.append(_text(left + cell * (i + 0.5), height - 5, str(i + 1), "middle"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def number(value: float) -> str:
    """A number as text, for an axis."""
    return f"{value:.6g}" if abs(value) < 1e5 else f"{value:.3g}"


def _barred(line: Line) -> list[tuple[tuple[float, float], float]]:
    return list(zip(line.points, line.bars or [0.0] * len(line.points), strict=True))


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    more = (high - low) * share or abs(high) * 0.05 or 0.5
    return low - more, high + more


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str = "rule") -> Markup:
    line = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    return line.format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    label = Markup('<text{} x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return label.format(Markup(f' class="{kind}"') if kind else "", x, y, anchor, escape(text))
