"""The broker's configuration in ``deploy/``: true to the protocol, and it keeps devices apart."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from edge_ll.errors import TransportError
from edge_ll.messages import FROM_DEVICE, TO_DEVICE, Address, Report, Status
from edge_ll.transport.mqtt import MqttTransport
from tests.conftest import Mosquitto, skip_unless_ci, wait_until

FOLDER = Path(__file__).parents[1] / "deploy/mosquitto"
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"


def test_the_access_rules_are_the_protocol_s():
    rules = [line for line in (FOLDER / "acl").read_text("utf-8").splitlines() if line[:1] != "#"]
    wanted = ["user fleet"]
    for who, device in (("topic", "+"), ("pattern", "%u")):
        up, down = ("read", "write") if who == "topic" else ("write", "read")
        for verb, kinds in ((up, FROM_DEVICE), (down, TO_DEVICE)):
            wanted += [f"{who} {verb} el/v1/default/d/{device}/{kind.suffix}" for kind in kinds]
    assert [rule for rule in rules if rule] == wanted


@pytest.fixture
def guarded(tmp_path):
    """Mosquitto with the access rules, and accounts ``fleet``, ``hub-1`` and ``hub-2``."""
    passwd = shutil.which("mosquitto_passwd", path=PATH)
    if passwd is None or shutil.which("mosquitto", path=PATH) is None:
        skip_unless_ci("Mosquitto is not installed; run: apt-get install mosquitto")
    broker = Mosquitto(tmp_path)
    accounts, rules = tmp_path / "passwd", tmp_path / "acl"
    shutil.copy(FOLDER / "acl", rules)
    accounts.touch()
    for name in ("fleet", "hub-1", "hub-2"):
        subprocess.run([passwd, "-b", accounts, name, "secret"], check=True, capture_output=True)
    for path in (tmp_path, accounts, rules):
        path.chmod(0o755)  # the broker gives up root's rights
    config = tmp_path / "mosquitto.conf"
    text = config.read_text("utf-8").replace("allow_anonymous true", "allow_anonymous false")
    config.write_text(f"{text}password_file {accounts}\nacl_file {rules}\nuser root\n", "utf-8")
    broker.start()
    yield broker
    broker.stop()


def _client(broker: Mosquitto, name: str, password: str = "secret") -> MqttTransport:
    return MqttTransport(
        f"mqtt://{name}:{password}@127.0.0.1:{broker.port}", client_id=f"test:{name}"
    )


@pytest.mark.mosquitto
def test_no_device_speaks_for_another(guarded):
    heard = []
    with _client(guarded, "fleet") as fleet, _client(guarded, "hub-1") as hub:
        fleet.subscribe(Status.topic_filter("default"), lambda message: heard.append(message.topic))
        fleet.connect(5)
        hub.connect(5)
        payload = Status(online=True, session="0" * 16).encode()
        own = Status.topic(Address("default", "hub-1"))
        hub.publish(Status.topic(Address("default", "hub-2")), payload).wait(5)

        def spoken() -> bool:  # Mosquitto may cut the connection of who was denied
            with suppress(TransportError):
                hub.publish(own, payload).wait(1)
            return own in heard

        assert wait_until(spoken)
    assert set(heard) == {own}


@pytest.mark.mosquitto
def test_no_device_listens_to_another(guarded):
    heard = []
    with _client(guarded, "hub-2") as spy, _client(guarded, "hub-1") as hub:
        with suppress(TransportError):  # a broker may also refuse the subscription
            spy.subscribe("el/#", heard.append)
            spy.connect(5)
        hub.connect(5)
        hub.publish(Report.topic(Address("default", "hub-1")), b"secret").wait(5)
        time.sleep(0.3)
    assert heard == []


@pytest.mark.mosquitto
def test_strangers_stay_outside(guarded):
    with pytest.raises(TransportError), _client(guarded, "hub-1", "wrong") as stranger:
        stranger.connect(5)
