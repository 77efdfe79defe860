import sqlite3
import subprocess
import sys
import threading

import pytest

pytest.importorskip("sqlalchemy", reason="the fleet extra is not installed")

from edge_ll.errors import RegistryError
from edge_ll.fleet.registry import Registry
from edge_ll.fleet.rows import BundleRow, UpdateRow
from edge_ll.messages import BundleRef, Event, Reported, Status

pytestmark = pytest.mark.fleet

OLD, NEW = "0" * 16, "1" * 16


def bundle_row(digest="a" * 64):
    return BundleRow(
        digest=digest,
        name="toy",
        version=1,
        size_bytes=10,
        parent=None,
        created_s=1.0,
        file="x.bundle",
        manifest_json=b"{}",
    )


def test_a_birth_registers_a_device_once_and_renews_it(tmp_path, make_birth):
    now = [100.0]
    registry = Registry(tmp_path / "r.sqlite3", clock=lambda: now[0])
    assert registry.record_birth("home", "hub", make_birth())
    now[0] = 200.0
    assert not registry.record_birth("home", "hub", make_birth(session=NEW))
    row = registry.device("home", "hub")
    assert (row.first_seen_s, row.last_seen_s) == (100.0, 200.0)
    assert (row.online, row.session, row.engine) == (True, NEW, "step-graph")
    assert row.bundle is None
    assert registry.devices("elsewhere") == []


def test_the_same_report_is_kept_once(registry, make_report):
    report = make_report(3, seen=7, peak=7.5)
    assert registry.record_report("home", "hub", report, report.encode())
    assert not registry.record_report("home", "hub", report, report.encode())
    assert registry.record_report("home", "other", report, report.encode())
    (row,) = registry.reports("home", "hub")
    assert row.report() == report
    assert (row.seq, row.at_s, row.phase) == (3, 13.0, "progress")


def test_a_report_renews_the_memory_figure_of_its_own_session_only(
    registry, make_birth, make_report
):
    registry.record_birth("home", "hub", make_birth(session=NEW))
    for session, rss in ((OLD, 5), (NEW, 7)):
        report = make_report(session=session, rss_bytes=rss)
        registry.record_report("home", "hub", report, report.encode())
        assert registry.device("home", "hub").rss_bytes == (1000 if session == OLD else 7)


def test_the_will_of_an_earlier_session_does_not_take_a_device_offline(registry, make_birth):
    registry.record_birth("home", "hub", make_birth(session=NEW))
    registry.record_status("home", "hub", Status(online=False, session=OLD))
    assert registry.device("home", "hub").online
    registry.record_status("home", "hub", Status(online=False, session=NEW))
    assert not registry.device("home", "hub").online


def test_a_retained_status_is_no_sign_of_life(tmp_path, make_birth):
    now = [100.0]
    registry = Registry(tmp_path / "r.sqlite3", clock=lambda: now[0])
    registry.record_birth("home", "hub", make_birth())
    now[0] = 200.0
    registry.record_status("home", "hub", Status(online=True, session=NEW), retained=True)
    assert registry.device("home", "hub").last_seen_s == 100.0


def test_only_an_active_bundle_counts_as_running(registry):
    one = BundleRef(name="toy", version=1, digest="a" * 64)
    two = BundleRef(name="toy", version=2, digest="b" * 64)
    registry.record_reported("home", "hub", Reported(session=NEW, bundle=one, state="active"))
    refused = Reported(session=NEW, bundle=two, state="refused", detail="unknown key")
    registry.record_reported("home", "hub", refused)
    row = registry.device("home", "hub")
    assert row.bundle == one
    assert (row.state, row.state_digest, row.detail) == ("refused", "b" * 64, "unknown key")


def test_events_and_alarms_are_kept_once(registry, make_report):
    event = Event(session=NEW, at_s=1.0, kind="drift", detail="loss")
    assert registry.record_event("home", "hub", event)
    assert not registry.record_event("home", "hub", event)
    report = make_report(peak=7.0)
    for expected in (True, False):
        assert expected == registry.raise_alarm(
            "home", "hub", "loss", report=report, evidence=report.evidence["loss"]
        )
    (alarm,) = registry.alarms("home")
    assert (alarm.evidence, alarm.threshold, alarm.bundle_digest) == (7.0, 6.9, "a" * 64)
    assert registry.alarms("home", bundle_digest="b" * 64) == []


def test_desired_changes_only_from_what_was_expected(registry):
    for digest in ("a" * 64, "b" * 64):
        assert registry.add_bundle(bundle_row(digest))
        assert not registry.add_bundle(bundle_row(digest))
    assert not registry.set_desired("home", "b" * 64, expected="a" * 64)
    assert registry.desired("home") is None
    assert registry.set_desired("home", "a" * 64)
    assert registry.set_desired("home", "b" * 64, expected="a" * 64)
    assert not registry.set_desired("home", "a" * 64, expected="a" * 64)
    assert registry.desired("home").digest == "b" * 64
    with pytest.raises(RegistryError, match="FOREIGN KEY"):
        registry.set_desired("home", "c" * 64)


def test_an_update_sent_again_replaces_its_row(registry):
    for samples in (1, 2):
        registry.record_update(
            UpdateRow(
                tenant="home",
                device="hub",
                base_digest="a" * 64,
                digest="b" * 64,
                samples=samples,
                classes=(0, 3),
                received_s=float(samples),
                file="f",
            )
        )
    (row,) = registry.updates("home")
    assert (row.samples, row.classes) == (2, (0, 3))


def test_refusals_are_counted(registry):
    assert [registry.reject("home", "hub", "report: malformed") for _ in range(3)] == [1, 2, 3]
    assert [(row.reason, row.count) for row in registry.rejected("home")] == [
        ("report: malformed", 3)
    ]


def test_threads_write_side_by_side(registry, make_report):
    def write(device):
        for seq in range(25):
            report = make_report(seq)
            registry.record_report("home", device, report, report.encode())
            registry.reject("home", "all", "x")

    threads = [threading.Thread(target=write, args=(f"d{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(registry.reports("home", f"d{i}")) for i in range(4)] == [25] * 4
    assert registry.rejected("home")[0].count == 100


WRITER = """
import sys
from edge_ll.fleet.registry import Registry
registry = Registry(sys.argv[1])
for _ in range(100):
    registry.reject("home", "all", "x")
    registry.devices("home")
"""


def test_processes_create_and_write_one_file(tmp_path):
    path = tmp_path / "r.sqlite3"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors.decode()
    assert Registry(path).rejected("home")[0].count == 300


def test_what_is_written_survives_reopening(tmp_path):
    url = f"sqlite:///{tmp_path / 'r.sqlite3'}"
    first = Registry(url)
    first.add_bundle(bundle_row())
    first.close()
    assert Registry(url).bundles() == [bundle_row()]


@pytest.mark.parametrize("version", [0, 99])
def test_an_unknown_schema_is_refused(tmp_path, version):
    path = tmp_path / "r.sqlite3"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (x)")
        connection.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(RegistryError, match=f"schema version 1, got version {version}"):
        Registry(path)


def test_what_is_not_sqlite_is_refused(tmp_path):
    path = tmp_path / "r.sqlite3"
    path.write_bytes(b"no database at all, but long enough to be taken for one" * 40)
    with pytest.raises(RegistryError, match="not a database"):
        Registry(path)
    with pytest.raises(RegistryError, match="expected a SQLite path"):
        Registry("postgresql://host/fleet")
