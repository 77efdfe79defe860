"""``report.html``: one file that explains a demo run to somebody who has never seen the project.

It needs neither network nor script: style sheet and figures are inside, every figure's numbers
stand in a table below it, and every name from outside is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from edge_ll.cli.demo import wording
from edge_ll.cli.demo.record import DemoRecord, DeviceRecord
from edge_ll.cli.demo.wording import NONE, clean, points, share
from edge_ll.errors import MissingExtraError
from edge_ll.metrics import Counts, Matrix, wilson_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELLS = "<p>Each cell: accuracy (correct/asked; 95 % interval in per cent).</p>\n"
_EMPTY = '<p class="empty">no data</p>'


def write_report(record: DemoRecord, path: Path) -> None:
    """Write the page.

    Args:
        record: The run.
        path: The file; overwritten.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from edge_ll.cli.demo import svg
    except ImportError as error:
        raise MissingExtraError("the demo's report", "fleet") from error
    groups = _groups(record)
    merged = record.merge.version is not None
    with svg.house_style():
        sections = [
            _head(record),
            _curves(record, groups, merged=merged),
            _forgetting(record, groups),
            _drift(record),
            _merge(record),
            _run(record),
        ]
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(record.name)}: edge_ll demo report</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _groups(record: DemoRecord) -> tuple[str, ...]:
    """The groups as taught, then any others that devices report."""
    reported = [
        group
        for device in record.devices
        for counts in (*(moment.anchors for moment in device.moments), device.final)
        for group in counts
    ]
    return tuple(dict.fromkeys([*record.groups, *reported]))


def _head(record: DemoRecord) -> str:
    cards = "".join(
        f'<li><span class="name">{_text(name)}</span><span class="value">{_text(value)}</span>'
        f'<span class="note">{_text(note)}</span></li>\n'
        for name, value, note in wording.cards(record)
    )
    return (
        "<header>\n"
        f'<p class="kicker">edge_ll demo report</p>\n<h1>{_text(wording.title(record))}</h1>\n'
        f'<p class="verdict">{_text(wording.verdict(record))}</p>\n'
        f'</header>\n<ul class="cards">\n{cards}</ul>'
    )


def _curves(record: DemoRecord, groups: Sequence[str], *, merged: bool) -> str:
    from edge_ll.cli.demo import plots

    x_max = max((m.seen for d in record.devices for m in d.moments), default=0)
    panels, legend, tables = [], [], []
    for number, device in enumerate(record.devices):
        note = "" if device.drifts_at is None else f"inputs drift from sample {device.drifts_at:,}"
        figure = plots.curves(device, groups, x_max=float(x_max), merged=merged)
        title = f"{device.name}: accuracy on each anchor group over samples seen"
        panels.append(_panel(device.name, note, _svg(figure, f"c{number}-", title)))
        tables.append(_curve_table(device, groups, merged=merged))
    for index, group in enumerate(groups):
        style = plots.group_style(index)
        what = ", ".join(record.group_labels.get(group, ()))
        text = f"<b>{_text(group)}</b>" + (f": {_text(what)}" if what else "")
        legend.append(f'<li><i style="color:{style.color}">{style.glyph}</i>{text}</li>')
    after = (
        "The hollow mark at the right is the same device on the merged bundle, and the figure "
        "beside it belongs to that mark."
        if merged
        else "The figure at the right belongs to the last report."
    )
    if tables:
        tables.insert(0, _CELLS)
    return _section(
        "What each device learns, and keeps",
        "Every device starts from the same bundle and learns the new groups one after the other, "
        "on its own. A good curve rises when its group is taught and stays up afterwards.",
        panels,
        f"<b>How to read it.</b> Each line is the accuracy on the anchors of one group of classes. "
        f"Dotted vertical lines end an experience; above it stands the group that it teaches. "
        f"{after} {_text(wording.noise(record))}",
        tables,
        before=f'<ul class="legend">{"".join(legend)}</ul>\n' if legend else "",
    )


def _curve_table(device: DeviceRecord, groups: Sequence[str], *, merged: bool) -> str:
    rows = [
        [f"{m.seen:,}", *(_cell(m.anchors.get(group)) for group in groups), _cell(m.prequential)]
        for m in device.moments
    ]
    if merged:
        rows.append(["merged", *(_cell(device.final.get(group)) for group in groups), ""])
    return _table(device.name, ["samples seen", *groups, "prequential, so far"], rows)


def _forgetting(record: DemoRecord, groups: Sequence[str]) -> str:
    from edge_ll.cli.demo import plots

    pairs, tables = [], []
    for number, device in enumerate(record.devices):
        panels = []
        for key, name, matrix in (
            ("m", "with replay", device.matrix),
            ("n", "naive, without replay", device.naive_matrix),
        ):
            title = f"{device.name}, {name}: accuracy on each group after each experience"
            svg = _svg(plots.heatmap(matrix, record.groups), f"{key}{number}-", title)
            panels.append(_panel(device.name, name, svg))
            tables.append(_matrix_table(f"{device.name}, {name}", groups, matrix))
        said = (
            f'<div class="said"><h3>{_text(device.name)} forgot</h3><dl>'
            f"<dt>{_text(points(device.forgetting))}</dt><dd>points with replay</dd>"
            f"<dt>{_text(points(device.naive_forgetting))}</dt>"
            f"<dd>points without, on the same stream</dd></dl></div>"
        )
        pairs.append(f'<div class="panels pair">{"".join(panels)}{said}</div>')
    if tables:
        tables.insert(0, _CELLS)
    return _section(
        "What is forgotten",
        "Learning something new overwrites what was learned before, unless the device repeats it. "
        "The same stream was therefore learned twice: with replay, and naively without.",
        pairs,
        "<b>How to read it.</b> Down a column: what becomes of one group while later ones are "
        "learned. Dark is accurate, and each cell holds accuracy and correct/asked. Hatched "
        "cells are groups not taught yet. The diagonal is a group just taught; a column that turns "
        "pale below its diagonal is forgotten.",
        tables,
        grid=False,
    )


def _matrix_table(name: str, groups: Sequence[str], matrix: Matrix) -> str:
    rows = [
        ["before" if i == 0 else f"after experience {i}", *(_cell(cell) for cell in row)]
        for i, row in enumerate(matrix)
    ]
    return _table(name, ["", *groups], rows)


def _drift(record: DemoRecord) -> str:
    from edge_ll.cli.demo import plots

    watched = [plots.evidence_points(device) for device in record.devices]
    x_max = max((x for points in watched for x, _ in points), default=0.0)
    limits = plots.evidence_limits(record.devices)
    panels, tables = [], []
    for number, device in enumerate(record.devices):
        title = f"{device.name}: evidence that its inputs drift, over samples watched"
        figure = plots.evidence(device, x_max=x_max, limits=limits)
        alarms = "no alarm" if not device.alarms else wording.count(device.alarms, "alarm")
        panels.append(_panel(device.name, alarms, _svg(figure, f"d{number}-", title)))
        rows = [
            [f"{m.watched:,}", _number(m.log_evidence / math.log(10), 3)] for m in device.moments
        ]
        rows.append(["alarm line", _number(device.threshold / math.log(10), 3)])
        rows.append(["alarms raised", f"{device.alarms:,}"])
        tables.append(_table(device.name, ["samples watched", "log10 evidence"], rows))
    return _section(
        "Whether inputs drift",
        "Each device scores how unusual its inputs are and bets against “nothing has changed”. "
        "The evidence is what it has won: it stays low while inputs are as expected and grows "
        "tenfold again and again once they are not. No labels are needed.",
        panels,
        "<b>How to read it.</b> One step up is ten times the evidence (log10). An alarm is due "
        "at the dashed line A; while nothing drifts, at most one false alarm in A samples is to be "
        "expected on average. The shade begins where the inputs really changed, placed between "
        "the two reports around it; the cross is the first report above the line.",
        tables,
    )


def _merge(record: DemoRecord) -> str:
    from edge_ll.cli.demo import plots

    merge = record.merge
    svg = _svg(
        plots.merge_dots(merge),
        "g-",
        "Accuracy on the hold-out of the base bundle, each device alone, and the merged tail",
    )
    word, good = wording.merge_outcome(merge)
    said = [f'<p class="{"good" if good else "bad"}">{_text(word)}</p>']
    if merge.reasons:
        items = "".join(f"<li>{_text(reason)}</li>" for reason in merge.reasons)
        said.append(f'<p>The gate says:</p><ul class="reasons">{items}</ul>')
    elif merge.accepted:
        said.append("<p>The gate found nothing against it.</p>")
    if merge.left_out:
        items = "".join(
            f"<li><b>{_text(device)}</b>: {_text(reason)}</li>"
            for device, reason in merge.left_out.items()
        )
        said.append(f'<p>Left out of the merge:</p><ul class="reasons">{items}</ul>')
    devices = sorted({*merge.single_acc, *merge.left_out})
    rows = [["base bundle", share(merge.base_acc), ""]]
    rows += [
        [device, share(merge.single_acc.get(device, math.nan)), merge.left_out.get(device, "")]
        for device in devices
    ]
    rows.append(["merged", share(merge.merged_acc), "" if merge.accepted else "refused"])
    row = (
        f'<div class="panels merge"><div class="panel wide">{svg}</div>'
        f'<div class="said">{"".join(said)}</div></div>'
    )
    return _section(
        "What the fleet makes of it",
        "The server averages what the devices learned, and a gate compares the result with the "
        "bundle that is in use, on samples that no device has seen. Only what passes is signed "
        "and rolled out.",
        [row],
        "<b>How to read it.</b> Further right is better; the dashed line is the base bundle. "
        "Accuracy is over all classes together. The axis need not begin at zero.",
        [_table("", ["", "hold-out accuracy", "remark"], rows)],
        grid=False,
    )


def _run(record: DemoRecord) -> str:
    longest = max((s for _, s in record.steps if math.isfinite(s)), default=0.0)
    bars = "".join(
        f'<dt>{_text(stage)}</dt><dd><i style="width:{_percent(seconds, longest):.1f}%"></i>'
        f"{_text(_number(seconds, 1))} s</dd>\n"
        for stage, seconds in record.steps
    )
    stages = f'<dl class="stages">\n{bars}</dl>' if bars else _EMPTY
    rows = [[key, _value(value)] for key, value in _flat(record.summary)]
    summary = _table("", ["figure", "value"], rows, words=True) if rows else _EMPTY
    terms = "".join(
        f"<dt>{_text(term)}</dt><dd>{_text(text)}</dd>\n" for term, text in wording.GLOSSARY.items()
    )
    return (
        f"<section>\n<h2>Where the time went</h2>\n{stages}\n</section>\n"
        f"<section>\n<h2>All figures</h2>\n<p>As they stand in <code>summary.json</code>.</p>\n"
        f"{summary}\n</section>\n"
        f'<section>\n<h2>Words</h2>\n<dl class="glossary">\n{terms}</dl>\n</section>'
    )


def _section(
    heading: str,
    lead: str,
    panels: Sequence[str],
    caption: str,
    tables: Iterable[str],
    *,
    before: str = "",
    grid: bool = True,
) -> str:
    """A section; ``caption`` and ``before`` are HTML already."""
    inside = "\n".join(panels) or _EMPTY
    if grid and panels:
        inside = f'<div class="panels">\n{inside}\n</div>'
    numbers = "\n".join(tables)
    return (
        f"<section>\n<h2>{_text(heading)}</h2>\n<p>{_text(lead)}</p>\n{before}<figure>\n{inside}\n"
        f"<figcaption>{caption}</figcaption>\n</figure>\n"
        + (f"<details><summary>Numbers</summary>\n{numbers}\n</details>\n" if numbers else "")
        + "</section>"
    )


def _panel(name: str, note: str, svg: str) -> str:
    small = f" <small>{_text(note)}</small>" if note else ""
    return f'<div class="panel"><h3>{_text(name)}{small}</h3>{svg}</div>'


def _svg(figure: Figure | None, prefix: str, title: str) -> str:
    from edge_ll.cli.demo import svg

    if figure is None:
        return _EMPTY
    return svg.to_svg(figure, prefix=prefix, title=title)


def _table(
    caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False
) -> str:
    """A table; escapes all that it is given."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return (
        f'<div class="scroll"><table{" class=words" if words else ""}>'
        + (f"<caption>{_text(caption)}</caption>" if caption else "")
        + f"\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def _text(text: str) -> str:
    return escape(clean(text))


def _cell(counts: Counts | None) -> str:
    """Accuracy with its counts and the interval that chance allows."""
    if counts is None or not counts.n:
        return NONE
    low, high = wilson_interval(counts)
    interval = f"{100 * low:.0f} to {100 * high:.0f}"
    return f"{share(counts.accuracy)} ({counts.correct}/{counts.n}; {interval})"


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else NONE


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole > 0 and math.isfinite(part) else 0.0


def _flat(items: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The items of a mapping and of the mappings in it, with dots in their names."""
    for key, value in items.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
