"""What the demo's report says in words: the verdict and the key figures."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from edge_ll.cli.demo.record import DemoRecord, DeviceRecord, MergeRecord
from edge_ll.metrics import Counts, total, wilson_interval

NONE = "\N{EN DASH}"
_SPACE = "\N{NO-BREAK SPACE}"
# Not printable in Python's sense, but harmless: the joiners are part of how some languages are
# written.
_KEPT = {_SPACE, "\N{ZERO WIDTH NON-JOINER}", "\N{ZERO WIDTH JOINER}"}

GLOSSARY = {
    "experience": (
        "A stretch of the stream that teaches one group of new classes; when it ends, those "
        "classes are not taught again."
    ),
    "anchor": (
        "A labelled sample that travels in the bundle and is never learned from. Each device "
        "asks itself about its anchors again and again, so what it forgets shows without "
        "collecting anybody's data."
    ),
    "forgetting": (
        "How far accuracy on a group has fallen from its best value before the last experience, "
        "averaged over the groups taught earlier (Chaudhry et al., 2018). Zero is ideal; below "
        "zero the group even improved."
    ),
    "prequential": (
        "Test, then train: each sample is predicted before its label is learned, so every "
        "sample tests the device on something new."
    ),
    "replay": (
        "While it learns something new, the device also repeats a few stored examples of what "
        "it has learned before. Naive learning leaves that out."
    ),
}


def clean(text: str) -> str:
    """Text on one line and without characters that XML forbids or that reorder the line."""
    one_line = re.sub(r"[\t\r\n]+", " ", text)
    return "".join(char if char.isprintable() or char in _KEPT else "\ufffd" for char in one_line)


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters of text, cleaned."""
    text = clean(text)
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def abbreviate(name: str, limit: int) -> str:
    """At most ``limit`` >= 3 characters of a name: both ends, where names of a kind differ."""
    name = clean(name)
    if len(name) <= limit:
        return name
    tail = max(1, (limit - 1) // 2)
    return f"{name[: max(1, limit - 1 - tail)]}…{name[-tail:]}"


def share(value: float) -> str:
    """A share of 1 as a percentage; a dash where there is none."""
    return f"{100 * value:.1f}{_SPACE}%" if math.isfinite(value) else NONE


def percent(value: float) -> str:
    """A share of 1 as a whole percentage, for figures."""
    return f"{100 * value:.0f}{_SPACE}%" if math.isfinite(value) else NONE


def points(value: float) -> str:
    """A difference of shares in percentage points."""
    if not math.isfinite(value):
        return NONE
    # Adding zero turns -0.0 into 0.0.
    return f"{round(100 * value, 1) + 0.0:.1f}".replace("-", "\N{MINUS SIGN}")


def count(number: int, what: str, *, plural: str = "s") -> str:
    """A number of things, with the plural's ending where it is due."""
    return f"{number:,}{_SPACE}{what}{'' if number == 1 else plural}"


def names(items: Sequence[str]) -> str:
    """A list in a sentence."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def title(record: DemoRecord) -> str:
    """The page's title."""
    devices = len(record.devices)
    return f"{record.name}: {count(devices, 'device')} that kept learning"


def verdict(record: DemoRecord) -> str:
    """The run in one sentence, made from its numbers."""
    said = [_learned(record), _drifted(record.devices), _merged(record.merge)]
    return "; ".join(filter(None, said)) + "."


def cards(record: DemoRecord) -> list[tuple[str, str, str]]:
    """Key figures: (name, value, what it means)."""
    old, new = _old_and_new(record)
    summary = record.summary
    trained = [_figure(summary.get(key)) for key in ("student_acc", "teacher_acc")]
    alone = _figure(summary.get("student_acc_without_teacher"))
    memory = max((device.rss_bytes for device in record.devices), default=0)
    seconds = _figure(summary.get("seconds"))
    if math.isnan(seconds):
        seconds = sum(s for _, s in record.steps) if record.steps else math.nan
    lost = _mean(device.forgetting for device in record.devices)
    naive = _mean(device.naive_forgetting for device in record.devices)
    devices = count(len(record.devices), "device")
    found = [
        (
            "Old classes: before → after",
            f"{share(old[0])} → {share(old[1])}",
            _after(record, old[2], "anchors of what the bundle knew"),
        ),
        (
            "New classes: before → after",
            f"{share(new[0])} → {share(new[1])}",
            _after(record, new[2], "anchors of what was taught"),
        ),
        (
            "Forgetting",
            f"{points(lost)} points",
            f"{points(naive)} without replay; mean of {devices}",
        ),
        (
            "Student",
            share(trained[0]),
            f"teacher {share(trained[1])}; the same student without a teacher {share(alone)}",
        ),
        (
            "Drift alarms",
            f"{sum(d.alarms for d in record.devices):,}",
            _where_drift(record.devices),
        ),
        ("Bundle", _bytes(_figure(summary.get("bundle_bytes"))), "all that a device downloads"),
        ("Agent's memory", _bytes(memory or math.nan), "the most that one agent process held"),
        ("Run time", _duration(seconds), "everything, from training to rollout"),
    ]
    return [
        (name, value if re.search(r"\d", value) else "no data", note) for name, value, note in found
    ]


def noise(record: DemoRecord) -> str:
    """How much chance alone moves an anchor accuracy, from the counts at hand."""
    counted = [c.n for d in record.devices for m in d.moments for c in m.anchors.values() if c.n]
    if not counted:
        return ""
    n = min(counted)
    low, high = wilson_interval(Counts(round(0.9 * n), n))
    return (
        f"With {count(n, 'anchor')} in a group, 90{_SPACE}% means: between {100 * low:.0f} and "
        f"{100 * high:.0f}{_SPACE}% (95{_SPACE}% interval); smaller steps may be chance."
    )


def merge_outcome(merge: MergeRecord) -> tuple[str, bool]:
    """What became of the merge, and whether that is good."""
    if merge.version is not None:
        return f"Published as version {merge.version}.", True
    if not math.isfinite(merge.merged_acc):
        return "Nothing was merged.", False
    return "Refused by the gate, so not published.", False


def _learned(record: DemoRecord) -> str:
    _, (before, after, _) = _old_and_new(record)
    if not math.isfinite(after):
        return f"{count(len(record.devices), 'device')} ran, but none reported what it learned"
    taught = [label for group in record.groups[1:] for label in _classes(record, group)]
    new_classes = count(len(taught), "new class", plural="es")
    verb = "learned" if after > before else "did not learn"
    text = f"{count(len(record.devices), 'device')} {verb} {new_classes}"
    if math.isfinite(before):
        text += f" (accuracy {share(before)} → {share(after)})"
    lost = _mean(device.forgetting for device in record.devices)
    naive = _mean(device.naive_forgetting for device in record.devices)
    if math.isfinite(lost):
        text += f" and forgot {points(lost)} points" if lost >= 0.0005 else " and forgot nothing"
        if math.isfinite(naive):
            text += f" of what they knew (without replay: {points(naive)})"
    return text


def _classes(record: DemoRecord, group: str) -> list[str]:
    return list(record.group_labels.get(group, (group,)))


def _where_drift(devices: Sequence[DeviceRecord]) -> str:
    alarmed = [device.name for device in devices if device.alarms]
    drifted = [device.name for device in devices if device.drifts_at is not None]
    on = f"on {names(alarmed)}" if alarmed else "on no device"
    return f"{on}; inputs did change on {names(drifted)}" if drifted else f"{on}; no inputs changed"


def _drifted(devices: Sequence[DeviceRecord]) -> str:
    drifted = [device.name for device in devices if device.drifts_at is not None]
    alarmed = [device.name for device in devices if device.alarms]
    if not drifted and not alarmed:
        return "no inputs drifted and no alarm rose"
    said = []
    caught = [name for name in alarmed if name in drifted]
    missed = [name for name in drifted if name not in alarmed]
    false = [name for name in alarmed if name not in drifted]
    if caught:
        only = "" if false else " only"
        said.append(f"the drift alarm rose on {names(caught)}{only}, whose inputs did change")
    if missed:
        said.append(f"no drift alarm rose on {names(missed)}, although inputs changed there")
    if false:
        said.append(f"a false drift alarm rose on {names(false)}")
    return ", ".join(said)


def _merged(merge: MergeRecord) -> str:
    if merge.version is not None:
        return f"the merged bundle was published as version {merge.version}"
    because = f", because {merge.reasons[0].rstrip('.')}" if merge.reasons else ""
    if not math.isfinite(merge.merged_acc):
        return f"nothing was merged{because}"
    return f"the merged bundle was refused{because}"


def _old_and_new(
    record: DemoRecord,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(before, after learning, on the merged bundle) on the first group, and on all others."""
    matrices = [device.matrix for device in record.devices if device.matrix]
    found = []
    for part in (slice(0, 1), slice(1, None)):
        rows = [total(c for m in matrices for c in m[row][part]).accuracy for row in (0, -1)]
        groups = record.groups[part]
        final = total(d.final[g] for d in record.devices for g in groups if g in d.final).accuracy
        found.append((rows[0], rows[1], final))
    return found[0], found[1]


def _after(record: DemoRecord, final: float, what: str) -> str:
    if record.merge.version is None or not math.isfinite(final):
        return what
    return f"{what}; {share(final)} on the merged bundle"


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _figure(value: object) -> float:
    """A figure of the summary; NaN where it is missing or no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def _bytes(value: float) -> str:
    if not math.isfinite(value):
        return NONE
    if value >= 2**20:
        return f"{value / 2**20:,.1f}{_SPACE}MiB"
    return f"{value / 2**10:,.0f}{_SPACE}KiB"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return NONE
    if seconds < 120:
        return f"{seconds:.1f}{_SPACE}s"
    return f"{seconds // 60:.0f}{_SPACE}min {seconds % 60:.0f}{_SPACE}s"
