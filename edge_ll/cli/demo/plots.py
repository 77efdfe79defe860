"""The figures of the demo's report, one device or one merge each, as inline SVG.

Each figure is small, about as wide as a phone, so that its text keeps its size wherever the page
puts it. A function answers None where the record holds nothing that could be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from edge_ll.cli.demo.record import DeviceRecord, MergeRecord
from edge_ll.cli.demo.svg import INK, MUTED
from edge_ll.cli.demo.wording import abbreviate, percent, share, shorten
from edge_ll.metrics import Counts, Matrix

PAPER, GRID = "#ffffff", "#eceef1"
ALARM, DRIFT = "#b3261e", "#fbe6cf"
# Okabe and Ito's hues, darkened until they can be read as text on white; no two groups differ by
# colour alone.
_COLORS = ("#0067a8", "#b84300", "#00755a", "#9c3f78", "#7a5c00", "#3d3d3d")
_MARKERS, _GLYPHS = ("o", "s", "^", "D", "v", "P", "*"), "●■▲◆▼✚★"
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (3, 1.5))
# As wide as a column of three on the page, so that 10 is about ten pixels there.
_WIDTH, _LEFT = 320.0, 40.0
_LN10 = math.log(10)
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class GroupStyle(NamedTuple):
    """How one anchor group looks, in the curves and in their legend."""

    color: str
    marker: str
    glyph: str
    dashes: tuple[float, ...]


def group_style(index: int) -> GroupStyle:
    """The look of the group that is taught as number ``index``."""
    # The lengths have no common factor, so that looks repeat late.
    shape = index % len(_MARKERS)
    color, dashes = _COLORS[index % len(_COLORS)], _DASHES[index % len(_DASHES)]
    return GroupStyle(color, _MARKERS[shape], _GLYPHS[shape], dashes)


def curves(
    device: DeviceRecord, groups: Sequence[str], *, x_max: float, merged: bool
) -> Figure | None:
    """Accuracy on each anchor group over samples seen.

    Args:
        device: Whose.
        groups: All anchor groups, as taught.
        x_max: Most samples that any device saw.
        merged: Whether ``device.final`` belongs to a merged bundle, and is drawn beside the rest.
    """
    if not any(c.n for moment in device.moments for c in moment.anchors.values()):
        return None
    x_max = max(x_max, 1.0)
    figure, axes = _figure(_WIDTH, 244, left=_LEFT, right=96, top=42, bottom=36)
    axes.set(xlim=(0, 1.12 * x_max), ylim=(-0.03, 1.03), yticks=[0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    _x_axis(axes, x_max, "samples seen")
    seen = [float(moment.seen) for moment in device.moments]
    _drift_region(axes, device.drifts_at, seen[-1], height=1.155)
    _experiences(axes, device.experience_ends, groups, x_max)
    merged_x, labels = 1.09 * x_max, []
    for index, group in enumerate(groups):
        style = group_style(index)
        values = [_accuracy(moment.anchors, group) for moment in device.moments]
        final = _accuracy(device.final, group) if merged else math.nan
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
            labels.append((shown, f"{abbreviate(group, 8)} {percent(shown)}", style.color))
    if merged and any(not math.isnan(_accuracy(device.final, group)) for group in groups):
        _note(axes, merged_x, 1.05, "merged", color=MUTED, ha="center")
    _end_labels(axes, 1.145 * x_max, labels)
    return figure


def heatmap(matrix: Matrix, groups: Sequence[str]) -> Figure | None:
    """Accuracy matrix: rows after each experience, columns the anchor groups."""
    columns = max((len(row) for row in matrix), default=0)
    if not columns:
        return None
    height = 38 if columns <= 6 else 26
    left, top = 78.0, 24.0
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
        text = abbreviate(name, max(3, int(width / 6.8)))
        axes.text(j + 0.5, -0.12, text, ha="center", va="bottom", color=MUTED, fontsize=10)
    return figure


def evidence_limits(devices: Sequence[DeviceRecord]) -> tuple[float, float]:
    """Lowest and highest log10 evidence to draw, the same for all devices."""
    values = [y for device in devices for _, y in evidence_points(device)]
    lines = [d.threshold / _LN10 for d in devices if math.isfinite(d.threshold)]
    line = max([0.5, *lines])
    # Evidence of a real drift grows without bound and would flatten all that comes before it.
    top = min(max([1.35 * line, *(1.12 * value for value in values)]), 2.2 * line)
    return max(min([0.0, *values]), -line) - 0.06 * line, top


def evidence(device: DeviceRecord, *, x_max: float, limits: tuple[float, float]) -> Figure | None:
    """log10 of the drift evidence over watched samples, with the alarm's threshold.

    Args:
        device: Whose.
        x_max: Most samples that any device watched.
        limits: From ``evidence_limits``.
    """
    points, threshold = evidence_points(device), device.threshold / _LN10
    if not points or not math.isfinite(threshold):
        return None
    x_max, (bottom, top) = max(x_max, 1.0), limits
    highest = max(value for _, value in points)
    figure, axes = _figure(_WIDTH, 218, left=30, right=12, top=22, bottom=36)
    axes.set(xlim=(0, 1.02 * x_max), ylim=(bottom, top))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
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
    refused = "refused by the gate" if math.isfinite(merge.merged_acc) else "nothing was merged"
    rows.append(("merged", merge.merged_acc, "" if merge.accepted else refused, "merged"))
    values = [value for _, value, _, _ in rows if math.isfinite(value)]
    if not values:
        return None
    low = max(0.0, math.floor((min(values) - 0.05) * 10) / 10)
    height, bottom = 34.0 * len(rows), 26.0
    figure, axes = _figure(440, height + bottom + 6, left=104, right=48, top=6, bottom=bottom)
    axes.set(xlim=(low, 1.0), ylim=(len(rows) - 0.4, -0.5), yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    if math.isfinite(merge.base_acc):
        axes.axvline(merge.base_acc, color=MUTED, linewidth=1, dashes=(3, 3))
    for y, (name, value, remark, kind) in enumerate(rows):
        weight = "bold" if kind == "merged" else "normal"
        axes.text(
            -0.02,
            y,
            abbreviate(name, 15),
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=10.5,
            weight=weight,
        )
        if math.isfinite(value):
            _merge_dot(axes, y, value, kind, hollow=bool(remark))
        if remark:
            # Under the dot's row, so that the two cannot meet.
            text = shorten(f"left out: {remark}" if kind == "single" else remark, 52)
            place = y + 0.33 if math.isfinite(value) else y
            ground = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}
            axes.text(
                low + 0.01 * (1 - low),
                place,
                text,
                va="center",
                color=ALARM,
                fontsize=9.5,
                bbox=ground,
            )
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
    if 0 <= exponent < 6:
        return f"{10**exponent:,.0f}"
    return "10" + f"{exponent:.0f}".translate(_SUPERSCRIPT)


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
    axes.text(x, y, text, transform=axes.get_xaxis_transform(), color=color, ha=ha, fontsize=9.5)


def _x_axis(axes: Axes, x_max: float, label: str) -> None:
    ticks = MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]).tick_values(0, x_max)
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= x_max])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.spines["bottom"].set_bounds(0, x_max)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=7)
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


def _experiences(axes: Axes, ends: Sequence[int], groups: Sequence[str], x_max: float) -> None:
    """A line at each experience's end; above the experience the group that it teaches."""
    start = 0
    for number, end in enumerate((end for end in ends if end <= x_max), start=1):
        axes.axvline(end, color="#9aa3ad", linewidth=0.9, dashes=(1.5, 2.5), zorder=1)
        room = (end - start) / (1.12 * x_max) * _pixels(axes)
        name = abbreviate(groups[number] if number < len(groups) else f"exp. {number}", 12)
        if len(name) * 5.6 <= room:
            color = group_style(number).color if number < len(groups) else MUTED
            _note(axes, (start + end) / 2, 1.05, name, color=color, ha="center")
        start = end


def _end_labels(axes: Axes, x: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """Text at the lines' ends, moved apart where lines end close together."""
    gap = 13.0 / float(axes.bbox.height) * 1.06
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
    text = percent(accuracy)
    axes.text(
        column + 0.5,
        row + (0.42 if fits else 0.5),
        text,
        ha="center",
        va="center",
        color=color,
        fontsize=11.5 if fits else 9,
        weight="bold" if taught else "normal",
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
        x + shift,
        y,
        text,
        ha="left" if right else "right",
        va="center",
        color=ALARM,
        fontsize=10,
        weight="bold",
    )


def _merge_dot(axes: Axes, y: int, value: float, kind: str, *, hollow: bool) -> None:
    color = {"base": MUTED, "single": _COLORS[0], "merged": _COLORS[2]}[kind]
    (mark,) = axes.plot([value], [y], linestyle="", color=color, clip_on=False, zorder=4)
    mark.set(marker="D" if kind == "merged" else "o", markersize=9, markeredgewidth=1.8)
    if hollow:
        mark.set_markerfacecolor(PAPER)
    low, high = axes.get_xlim()
    shift = 0.032 * (high - low)
    weight = "bold" if kind == "merged" else "normal"
    axes.text(value + shift, y, share(value), va="center", color=INK, fontsize=10.5, weight=weight)
