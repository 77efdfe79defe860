"""The demo's report: one self-contained page, made from any record, the same every time."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from edge_ll.cli.demo.record import DemoRecord, DeviceRecord, MergeRecord, Moment
from edge_ll.errors import MissingExtraError
from edge_ll.metrics import Counts, forgetting

pytestmark = pytest.mark.fleet
pytest.importorskip("matplotlib", reason="the fleet extra is not installed")

from edge_ll.cli.demo import plots, svg, wording  # noqa: E402
from edge_ll.cli.demo.report import write_report  # noqa: E402

GROUPS = ("base", "exp-1", "exp-2")
VOID = {"meta", "br", "hr", "img", "link", "input", "path", "use", "rect"}
EVIL = "<script>alert(1)</script>\"'&amp; $x$ \x00\u202e --> ]]>"
NAN = math.nan


def counted(*correct):
    return tuple(Counts(item, 50) for item in correct)


def device(number):
    drifts_at = 220 if number == 3 else None
    moments = []
    for step in range(12):
        seen = 40 * step
        drifted = max(0, seen - 220) if drifts_at else 0
        anchors = counted(48 - step // 4, min(46, 6 * step), max(0, min(45, 9 * (step - 6))))
        moments.append(
            Moment(
                seen=seen,
                prequential=Counts(seen * 3 // 4, seen),
                anchors=dict(zip(GROUPS, anchors, strict=True)),
                log_evidence=0.5 + 0.35 * drifted,
                watched=seen,
            )
        )
    matrix = (counted(48, 0, 1), counted(47, 46, 0), counted(46, 45, 45))
    naive = (counted(48, 0, 1), counted(20, 49, 0), counted(5, 11, 49))
    return DeviceRecord(
        name=f"hub-{number}",
        drifts_at=drifts_at,
        moments=tuple(moments),
        experience_ends=(220, 440),
        matrix=matrix,
        naive_matrix=naive,
        forgetting=forgetting(matrix),
        naive_forgetting=forgetting(naive),
        alarms=int(number == 3),
        threshold=math.log(10_000),
        rss_bytes=(60 + number) * 2**20,
        final=dict(zip(GROUPS, counted(47, 46, 44), strict=True)),
    )


def record():
    return DemoRecord(
        name="digits",
        groups=GROUPS,
        group_labels={"base": tuple("012345"), "exp-1": ("6", "7"), "exp-2": ("8", "9")},
        summary={
            "teacher_acc": 0.9871,
            "student_acc": 0.9744,
            "student_acc_without_teacher": 0.9612,
            "bundle_bytes": 412_345,
            "seconds": 48.3,
            "acc_before": {"old": 0.96, "new": 0.0125},
            "agents_without_torch": True,
        },
        devices=tuple(device(number) for number in (1, 2, 3)),
        merge=MergeRecord(
            accepted=True,
            reasons=(),
            base_acc=0.59,
            single_acc={"hub-1": 0.921, "hub-2": 0.905},
            merged_acc=0.938,
            left_out={"hub-3": "under a drift alarm"},
            version=2,
        ),
        steps=(("train teacher and student", 21.4), ("learn on the devices", 9.8)),
    )


def hostile():
    sane = record()
    groups = tuple(f"{EVIL}{index}" for index in range(3))
    devices = []
    for item in sane.devices:
        moments = tuple(
            replace(m, anchors=dict(zip(groups, m.anchors.values(), strict=True)))
            for m in item.moments
        )
        final = dict(zip(groups, item.final.values(), strict=True))
        devices.append(replace(item, name=EVIL + item.name, moments=moments, final=final))
    names = [item.name for item in devices]
    return DemoRecord(
        name=EVIL,
        groups=groups,
        group_labels=dict.fromkeys(groups, (EVIL,)),
        summary={EVIL: EVIL, "nested": {EVIL: [EVIL]}},
        devices=tuple(devices),
        merge=MergeRecord(False, (EVIL,), 0.5, {names[0]: 0.4}, 0.45, {names[2]: EVIL}, None),
        steps=((EVIL, 1.0),),
    )


def empty():
    merge = MergeRecord(False, (), NAN, {}, NAN, {}, None)
    return DemoRecord("empty", (), {}, {}, (), merge, ())


def nothing_counted():
    none = Counts(0, 0)
    silent = DeviceRecord("silent", None, (), (), (), (), NAN, NAN, 0, NAN, 0, {})
    moment = Moment(0, none, {"base": none}, -math.inf, 0)
    cells = ((none,),)
    deaf = DeviceRecord(
        "deaf", 5, (moment, moment), (), cells, cells, NAN, NAN, 0, 9.2, 0, {"base": none}
    )
    return replace(empty(), groups=("base",), devices=(silent, deaf), steps=(("wait", NAN),))


class Page(HTMLParser):
    """What a test asks about a page: ids, references, tags, table cells."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.tags, self.cells = [], [], [], []
        self.svgs, self._open, self._in_cell = [], [], False
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self._start(tag, dict(attributes))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._start(tag, dict(attributes))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag
        self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.cells.append(data)

    def _start(self, tag, attributes):
        self.tags.append(tag)
        self._in_cell = tag in {"td", "th"}
        if tag == "svg":
            self.svgs.append(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for value in attributes.values():
            self.references += re.findall(r"url\(#([^)]+)\)", value or "")
        if attributes.get("href", "").startswith("#"):
            self.references.append(attributes["href"][1:])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of the sane record."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(record(), path)
    return path.read_text(encoding="utf-8")


def write(made, tmp_path):
    write_report(made, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_but_itself(written):
    assert len(written.encode()) < 1_000_000
    for foreign in ("http:", "https:", "<script", "<link", "@import", " src=", "url(data"):
        assert foreign not in written
    assert not re.search(r"url\((?!#)", written)


def test_each_figure_is_there_and_says_what_it_is(written):
    page = Page(written)
    # Per device: curves, two matrices, evidence; and one figure of the merge.
    assert len(page.svgs) == 3 * 4 + 1
    assert all(item["role"] == "img" and item["aria-label"] for item in page.svgs)
    assert len({item["aria-label"] for item in page.svgs}) == len(page.svgs)
    assert "no data" not in written
    assert page.tags.count("details") == 4


def test_ids_are_unique_and_every_reference_is_met(written):
    page = Page(written)
    assert page.ids
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.references) <= set(page.ids)


def test_names_from_outside_stay_text(tmp_path):
    page = write(hostile(), tmp_path)
    assert "script" not in Page(page).tags
    assert "<script" not in page
    assert "\x00" not in page
    assert "\u202e" not in page
    # An escaped name is shown as it is: nothing is escaped twice.
    assert "&amp;amp; $x$" in page
    assert "&amp;amp;amp;" not in page


@pytest.mark.parametrize("made", [empty, nothing_counted], ids=["empty", "nothing counted"])
def test_missing_data_is_said_not_raised(made, tmp_path):
    page = write(made(), tmp_path)
    assert "no data" in page
    assert not re.search(r"\bnan\b|\binf\b", page, re.IGNORECASE)
    Page(page)


def test_a_device_that_knows_other_groups_is_drawn_too(tmp_path):
    made = record()
    odd = replace(made.devices[0], final={"surprise": Counts(1, 2)}, experience_ends=(9999,))
    page = write(replace(made, devices=(odd,), group_labels={}), tmp_path)
    assert "surprise" in Page(page).cells


def test_the_numbers_stand_in_the_tables(written):
    cells = Page(written).cells
    joined = " ".join(cells).replace("\N{NO-BREAK SPACE}", " ")
    assert "92.0 % (46/50; 81 to 97)" in joined  # an anchor group
    assert "10.0 % (5/50; 4 to 21)" in joined  # the naive matrix
    assert f"{(0.5 + 0.35 * 220) / math.log(10):.3f}" in cells  # evidence
    assert "4.000" in cells  # the alarm line
    for figure in ("93.8 %", "59.0 %", "under a drift alarm", "acc_before.new", "0.0125"):
        assert figure in joined


def test_the_verdict_is_made_from_the_numbers():
    text = wording.verdict(record()).replace("\N{NO-BREAK SPACE}", " ")
    assert text == (
        "3 devices learned 4 new classes (accuracy 1.0 % → 90.0 %) and forgot 3.0 points of what "
        "they knew (without replay: 81.0); the drift alarm rose on hub-3 only, whose inputs did "
        "change; the merged bundle was published as version 2."
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alarms": 0, "drifts_at": None}, "no inputs drifted and no alarm rose"),
        ({"alarms": 0, "drifts_at": 9}, "no drift alarm rose on hub-1, although inputs changed"),
        ({"alarms": 2, "drifts_at": None}, "a false drift alarm rose on hub-1"),
        ({"forgetting": -0.01}, "forgot nothing"),
        ({"forgetting": NAN}, "90.0\N{NO-BREAK SPACE}%); "),
        ({"matrix": ()}, "none reported what it learned"),
    ],
)
def test_the_verdict_says_what_went_wrong(change, said):
    made = record()
    one = replace(made.devices[0], **change)
    assert said in wording.verdict(replace(made, devices=(one,)))


def test_a_refused_merge_gives_its_reason(tmp_path):
    made = record()
    why = "group 'base' falls from 96.0 % to 71.2 %."
    refused = replace(made.merge, accepted=False, version=None, reasons=(why,))
    made = replace(made, merge=refused)
    assert wording.verdict(made).endswith(f"the merged bundle was refused, because {why}")
    page = write(made, tmp_path)
    assert "Refused by the gate" in page
    # Nobody moved to a merged bundle, so no curve may claim it.
    assert ">merged</text>" not in page.split("What the fleet makes of it")[0]


def test_same_record_same_bytes(written, tmp_path):
    assert write(record(), tmp_path) == written


def test_users_matplotlib_settings_do_not_matter(written, tmp_path):
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True}):
        assert write(record(), tmp_path) == written


def test_huge_evidence_does_not_flatten_the_others():
    made = record()
    low, high = plots.evidence_limits(made.devices)
    assert low < 0
    assert 4 < high < 10
    with svg.house_style():
        figure = plots.evidence(made.devices[2], x_max=440.0, limits=(low, high))
        text = svg.to_svg(figure, prefix="x-", title="t")
    assert "goes on to 10³" in text
    assert "alarm at 280" in text


@pytest.mark.parametrize(
    ("name", "limit", "short"),
    [("exp-1", 8, "exp-1"), ("group-with-long-name-6", 8, "grou…e-6"), ("abcd", 3, "a…d")],
)
def test_abbreviations_keep_both_ends(name, limit, short):
    assert wording.abbreviate(name, limit) == short


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    for name in ("svg", "plots"):
        monkeypatch.delitem(sys.modules, f"edge_ll.cli.demo.{name}")
        monkeypatch.delattr(f"edge_ll.cli.demo.{name}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"edge-ll\[fleet\]"):
        write_report(record(), tmp_path / "report.html")
