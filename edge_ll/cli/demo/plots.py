"""The figures of the demo's report, one device or one merge each, as inline SVG.

Each figure is small, about as wide as a phone, so that its text keeps its size wherever the page
puts it. A function answers None where the record holds nothing that could be drawn.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from xml.etree import ElementTree as ET  # parses only what matplotlib wrote a moment ago

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from edge_ll.cli.demo.record import DeviceRecord, MergeRecord
from edge_ll.metrics import Matrix

INK, MUTED, RULE, PAPER = "#1f2328", "#57606a", "#c9ced6", "#ffffff"
ALARM, DRIFT = "#b3261e", "#fbe6cf"
# Okabe and Ito's hues, darkened until they can be read as text on white; no two groups differ by
# colour alone.
_COLORS = ("#0067a8", "#b84300", "#00755a", "#9c3f78", "#7a5c00", "#3d3d3d")
_MARKERS, _GLYPHS = ("o", "s", "^", "D", "v", "P"), "●■▲◆▼✚"
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (3, 1.5))
_LEFT, _GAP = 38.0, 13.0
_WIDTH = 360.0
_LN10 = math.log(10)

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_JOINERS = "\u200c\u200d"  # invisible, but part of how some languages are written


class GroupStyle(NamedTuple):
    """How one anchor group looks, in the curves and in their legend."""

    color: str
    marker: str
    glyph: str
    dashes: tuple[float, ...]


def group_style(index: int) -> GroupStyle:
    """The look of the group that is taught as number ``index``."""
    shape = index % len(_MARKERS)
    return GroupStyle(_COLORS[shape], _MARKERS[shape], _GLYPHS[shape], _DASHES[index % 5])


def clean(text: str) -> str:
    """Text on one line and without characters that XML forbids or that reorder the line."""
    return "".join(
        char if char.isprintable() or char in _JOINERS else "\ufffd"
        for char in " ".join(text.split())
    )


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters of text, cleaned."""
    text = clean(text)
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's own defaults and these few changes, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({
            "axes.edgecolor": RULE,
            "axes.linewidth": 1.0,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "font.size": 10.0,
            "hatch.linewidth": 0.6,
            "svg.fonttype": "none",
            "svg.hashsalt": "edge_ll",
            "text.color": INK,
            "text.parse_math": False,  # a device may be called "$x$"
            "xtick.color": RULE,
            "xtick.labelcolor": MUTED,
            "ytick.color": RULE,
            "ytick.labelcolor": MUTED,
        })
        yield


def to_svg(figure: Figure, *, prefix: str, title: str) -> str:
    """A figure as an element for a page: accessible, free of namespaces, all ids its own.

    Args:
        figure: What to draw, at 72 dots per inch.
        prefix: Put before each id, unique on the page: matplotlib's ids repeat between figures.
        title: What the figure shows, for those who cannot see it.
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The browser draws the text, with fonts that may hold what matplotlib's lack.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(file.getvalue())  # noqa: S314
    for child in list(root):
        # Its licence note, and a style sheet that would apply to the whole page.
        if child.tag == f"{_SVG}metadata" or child.find(f"{_SVG}style") is not None:
            root.remove(child)
    used = set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", ET.tostring(root, encoding="unicode")))
    for element in root.iter():
        _tidy(element, used, prefix)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    name = clean(title)
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": name})
    heading = ET.Element("title")
    heading.text = name
    root.insert(0, heading)
    return ET.tostring(root, encoding="unicode")


def _tidy(element: ET.Element, used: set[str], prefix: str) -> None:
    """Shorten one element and make its ids and references its figure's own."""
    element.tag = element.tag.removeprefix(_SVG)
    if element.tail is not None:
        element.tail = element.tail.strip()
    if element.tag != "text" and element.text is not None:
        element.text = element.text.strip()
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        if key == "id":
            if value in used:
                element.attrib["id"] = prefix + value
        elif key == f"{_XLINK}href":
            element.attrib["href"] = value.replace("#", f"#{prefix}", 1)
        elif key == "style":
            # The page's own font, which is the reader's system font.
            style = re.sub(r"font-family:[^;]*;?\s*", "", value)
            element.attrib[key] = style.replace("url(#", f"url(#{prefix}")
        elif key == "d":
            element.attrib[key] = " ".join(value.split())
        elif not (key == "transform" and value.startswith("rotate(-0 ")):
            element.attrib[key] = value.replace("url(#", f"url(#{prefix}")


def curves(device: DeviceRecord, groups: Sequence[str], *, x_max: float) -> Figure | None:
    """Accuracy on each anchor group over samples seen, and after the merged bundle."""
    if not device.moments:
        return None
    x_max = max(x_max, 1.0)
    figure, axes = _figure(_WIDTH, 244, left=_LEFT, right=110, top=36, bottom=34)
    axes.set(xlim=(0, 1.12 * x_max), ylim=(-0.03, 1.03), yticks=[0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.grid(axis="y", color="#eceef1", linewidth=0.8)
    _x_axis(axes, x_max, "samples seen")
    seen = [float(moment.seen) for moment in device.moments]
    _drift_region(axes, device.drifts_at, seen[-1], height=1.155)
    _experiences(axes, device.experience_ends, groups, x_max)
    merged_x, labels = 1.09 * x_max, []
    for index, group in enumerate(groups):
        style = group_style(index)
        values = [_accuracy(moment.anchors, group) for moment in device.moments]
        final = _accuracy(device.final, group)
        dense = max(1, len(seen) // 20)
        (line,) = axes.plot(seen, values, color=style.color, linewidth=1.7, clip_on=False)
        line.set(marker=style.marker, markersize=4, markeredgewidth=0, markevery=dense)
        if style.dashes:
            line.set_dashes(style.dashes)
        last = next((value for value in reversed(values) if not math.isnan(value)), math.nan)
        if not math.isnan(final):
            if not math.isnan(last):
                axes.plot([seen[-1], merged_x], [last, final], color=style.color, linewidth=0.7)
            (mark,) = axes.plot([merged_x], [final], color=style.color, marker=style.marker)
            mark.set(markersize=6.5, markerfacecolor=PAPER, markeredgewidth=1.6, clip_on=False)
        shown = last if math.isnan(final) else final
        if not math.isnan(shown):
            labels.append((shown, f"{shorten(group, 12)} {shown:.0%}", style.color))
    if any(not math.isnan(_accuracy(device.final, group)) for group in groups):
        _note(axes, merged_x, 1.05, "merged", color=MUTED, ha="center")
    _end_labels(axes, 1.145 * x_max, labels)
    return figure


def heatmap(matrix: Matrix, groups: Sequence[str]) -> Figure | None:
    """Accuracy matrix: rows after each experience, columns the anchor groups."""
    columns = max((len(row) for row in matrix), default=0)
    if not columns:
        return None
    height = 38 if columns <= 6 else 26
    left, top = 84.0, 24.0
    figure, axes = _figure(
        _WIDTH, top + 6 + height * len(matrix), left=left, right=6, top=top, bottom=6
    )
    axes.set(xlim=(0, columns), ylim=(len(matrix), 0), xticks=[], yticks=[])
    axes.set_frame_on(False)
    width = (_WIDTH - left - 6) / columns
    for i, row in enumerate(matrix):
        name = "before" if i == 0 else f"after exp. {i}"
        axes.text(-0.06, i + 0.5, name, ha="right", va="center", color=MUTED, fontsize=10)
        for j, cell in enumerate(row):
            _cell(axes, i, j, cell, width)
    for j in range(columns):
        name = groups[j] if j < len(groups) else f"group {j}"
        text = shorten(name, max(2, int(width / 6.2)))
        axes.text(j + 0.5, -0.12, text, ha="center", va="bottom", color=MUTED, fontsize=10)
    return figure


def evidence(device: DeviceRecord, *, x_max: float, floor: float) -> Figure | None:
    """log10 of the drift evidence over watched samples, with the alarm's threshold.

    Args:
        device: Whose.
        x_max: Most samples that any device watched.
        floor: Lowest log10 evidence of any device.
    """
    points = evidence_points(device)
    threshold = device.threshold / _LN10
    if not points or not math.isfinite(threshold):
        return None
    x_max, scale = max(x_max, 1.0), max(threshold, 0.5)
    highest = max(value for _, value in points)
    # Evidence of a real drift grows without bound and would flatten all that comes before it.
    top = min(max(highest * 1.12, 1.35 * scale), 2.2 * scale)
    bottom = max(min(floor, 0.0), -scale) - 0.06 * scale
    figure, axes = _figure(_WIDTH, 226, left=_LEFT, right=16, top=30, bottom=34)
    axes.set(xlim=(0, 1.02 * x_max), ylim=(bottom, top))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", color="#eceef1", linewidth=0.8)
    _x_axis(axes, x_max, "samples watched")
    _drift_region(axes, drift_in_watched(device), points[-1][0], height=1.02)
    axes.axhline(threshold, color=ALARM, linewidth=1.2, dashes=(4, 3))
    line = f"alarm line, A = {power(threshold)}"
    axes.text(0.02 * x_max, threshold + 0.03 * top, line, color=ALARM, fontsize=9.5, va="bottom")
    axes.plot(*zip(*points, strict=True), color=_COLORS[0], linewidth=1.7, marker="o", markersize=3)
    crossing = first_crossing(device)
    if crossing is not None:
        x, y = crossing[0], min(crossing[1], top)
        axes.plot([x], [y], marker="X", markersize=9, color=ALARM, clip_on=False, linestyle="")
        _beside(axes, x, y - 0.09 * (top - bottom), f"alarm at {x:,.0f}", x_max)
    if highest > top:
        text = f"goes on to {power(highest)} ↑"
        axes.text(0.02 * x_max, top, text, color=_COLORS[0], fontsize=9.5, va="top")
    return figure


def merge_dots(merge: MergeRecord) -> Figure | None:
    """Accuracy on the server's hold-out: the base, each device alone, the merged tail."""
    rows: list[tuple[str, float, str, str]] = [("base bundle", merge.base_acc, "", "base")]
    rows += [
        (device, merge.single_acc.get(device, math.nan), merge.left_out.get(device, ""), "single")
        for device in sorted({*merge.single_acc, *merge.left_out})
    ]
    refused = "" if merge.accepted else "refused by the gate"
    rows.append(("merged", merge.merged_acc, refused, "merged"))
    values = [value for _, value, _, _ in rows if math.isfinite(value)]
    if not values:
        return None
    low = max(0.0, math.floor((min(values) - 0.05) * 10) / 10)
    height, bottom = 38.0 * len(rows), 30.0
    figure, axes = _figure(520, height + bottom + 6, left=122, right=52, top=6, bottom=bottom)
    axes.set(xlim=(low, 1.0), ylim=(len(rows) - 0.5, -0.5), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.grid(axis="x", color="#eceef1", linewidth=0.8)
    axes.spines["left"].set_visible(False)
    if math.isfinite(merge.base_acc):
        axes.axvline(merge.base_acc, color=MUTED, linewidth=1, dashes=(3, 3))
    for y, (name, value, remark, kind) in enumerate(rows):
        weight = "bold" if kind == "merged" else "normal"
        axes.text(
            -0.02, y, shorten(name, 18), transform=axes.get_yaxis_transform(),
            ha="right", va="center", fontsize=11, weight=weight,
        )
        if math.isfinite(value):
            _merge_dot(axes, y, value, kind, hollow=bool(remark))
        if remark:
            # Under the dot's row, so that the two cannot meet.
            text = shorten(f"left out: {remark}" if kind == "single" else remark, 62)
            offset = 0.34 if math.isfinite(value) else 0.0
            axes.text(low, y + offset, text, va="center", color=ALARM, fontsize=9.5)
    axes.tick_params(axis="x", labelsize=10.5, length=3)
    return figure


def evidence_points(device: DeviceRecord) -> list[tuple[float, float]]:
    """(samples watched, log10 of the evidence) of each report that holds a finite one."""
    return [
        (float(moment.watched), moment.log_evidence / _LN10)
        for moment in device.moments
        if math.isfinite(moment.log_evidence)
    ]


def first_crossing(device: DeviceRecord) -> tuple[float, float] | None:
    """The first of the device's ``evidence_points`` at or above its alarm's threshold."""
    above = (point for point in evidence_points(device) if point[1] >= device.threshold / _LN10)
    return next(above, None)


def drift_in_watched(device: DeviceRecord) -> float | None:
    """``drifts_at`` on the axis of watched samples, between the two reports around it."""
    if device.drifts_at is None or not device.moments:
        return None
    seen = [0, *(moment.seen for moment in device.moments)]
    watched = [0, *(moment.watched for moment in device.moments)]
    return float(np.interp(device.drifts_at, seen, watched))


def power(exponent: float) -> str:
    """Ten to an exponent: in digits while they can be read at a glance."""
    return f"{10**exponent:,.0f}" if 0 <= exponent < 6 else f"10^{exponent:.0f}"


def _accuracy(counts: Mapping[str, Counts], group: str) -> float:
    return counts[group].accuracy if group in counts else math.nan


def _figure(
    width: float, height: float, *, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; everything in pixels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    box = (
        left / width,
        bottom / height,
        (width - left - right) / width,
        (height - top - bottom) / height,
    )
    return figure, figure.add_axes(box)


def _pixels(axes: Axes) -> float:
    """How wide the axes are."""
    return float(axes.bbox.width)


def _note(axes: Axes, x: float, y: float, text: str, *, color: str, ha: str) -> None:
    """Small text at ``x`` in data and ``y`` in heights of the axes."""
    axes.text(
        x, y, text, transform=axes.get_xaxis_transform(), color=color, ha=ha, fontsize=9.5
    )


def _x_axis(axes: Axes, x_max: float, label: str) -> None:
    ticks = MaxNLocator(4, integer=True).tick_values(0, x_max)
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= x_max])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.spines["bottom"].set_bounds(0, x_max)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label, color=MUTED, fontsize=10, labelpad=2)


def _drift_region(axes: Axes, start: float | None, end: float, *, height: float) -> None:
    """Shade what follows the drift, up to ``height`` heights of the axes, and name it there."""
    if start is None or end <= start:
        return
    axes.axvspan(start, end, ymax=height, color=DRIFT, linewidth=0, clip_on=False, zorder=0.5)
    # Centred over the shade, but never beyond the axes' left or right end.
    low, high = axes.get_xlim()
    half = 30 / _pixels(axes) * (high - low)
    x = min(max((start + end) / 2, low + half), high - half)
    _note(axes, x, height + 0.02, "inputs drift", color="#8a4b00", ha="center")


def _experiences(
    axes: Axes, ends: Sequence[int], groups: Sequence[str], x_max: float
) -> None:
    """A line at each experience's end; above the experience the group that it teaches."""
    start = 0
    for number, end in enumerate(ends, start=1):
        axes.axvline(end, color="#9aa3ad", linewidth=0.9, dashes=(1.5, 2.5), zorder=1)
        room = (end - start) / (1.12 * x_max) * _pixels(axes)
        name = shorten(groups[number] if number < len(groups) else f"exp. {number}", 12)
        if len(name) * 5.6 <= room:
            color = group_style(number).color if number < len(groups) else MUTED
            _note(axes, (start + end) / 2, 1.05, name, color=color, ha="center")
        start = end


def _end_labels(axes: Axes, x: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """Text at the lines' ends, moved apart where lines end close together."""
    gap = _GAP / float(axes.bbox.height) * 1.06
    ordered = sorted(labels)
    places: list[float] = []
    for value, _, _ in ordered:
        places.append(max(value, places[-1] + gap) if places else value)
    # What was pushed out at the top pushes back down.
    ceiling = 1.02
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    for place, (_, text, color) in zip(places, ordered, strict=True):
        axes.text(x, place, text, color=color, fontsize=10, va="center", clip_on=False)


def _cell(axes: Axes, row: int, column: int, cell: Counts, width: float) -> None:
    accuracy, taught = cell.accuracy, column <= row
    paint = mpl.colormaps["Blues"](0.05 + 0.87 * accuracy) if cell.n and taught else "#eef0f2"
    box = Rectangle((column, row), 1, 1, facecolor=paint, edgecolor=PAPER, linewidth=1.5)
    axes.add_patch(box)
    if not taught:
        hatch = Rectangle((column, row), 1, 1, fill=False, edgecolor="#d3d8de", linewidth=0)
        hatch.set_hatch("///")
        axes.add_patch(hatch)
    color = _readable_on(to_hex(paint)) if taught else MUTED
    fits = width >= 34
    text = f"{accuracy:.0%}" if cell.n else "–"
    axes.text(
        column + 0.5, row + (0.42 if fits else 0.5), text, ha="center", va="center",
        color=color, fontsize=11.5 if fits else 9, weight="bold" if taught else "normal",
    )
    if fits:
        counted = f"{cell.correct}/{cell.n}"
        axes.text(
            column + 0.5, row + 0.78, counted, ha="center", va="center", color=color, fontsize=8.5
        )


def _readable_on(paint: str) -> str:
    """White or ink, whichever stands out more: WCAG's relative luminance."""
    channels = [int(paint[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return PAPER if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.065 else INK


def _beside(axes: Axes, x: float, y: float, text: str, x_max: float) -> None:
    """A label on that side of ``x`` where there is more room."""
    right = x < x_max / 2
    shift = 0.035 * x_max * (1 if right else -1)
    axes.text(
        x + shift, y, text, ha="left" if right else "right", va="center",
        color=ALARM, fontsize=10, weight="bold",
    )


def _merge_dot(axes: Axes, y: int, value: float, kind: str, *, hollow: bool) -> None:
    color = {"base": MUTED, "single": _COLORS[0], "merged": _COLORS[2]}[kind]
    (mark,) = axes.plot([value], [y], linestyle="", color=color, clip_on=False)
    mark.set(marker="D" if kind == "merged" else "o", markersize=9, markeredgewidth=1.8)
    if hollow:
        mark.set_markerfacecolor(PAPER)
    low, high = axes.get_xlim()
    shift = 0.025 * (high - low)
    weight = "bold" if kind == "merged" else "normal"
    axes.text(value + shift, y, f"{value:.1%}", va="center", color=INK, fontsize=11, weight=weight)
