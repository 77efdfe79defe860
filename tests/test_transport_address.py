from __future__ import annotations

import pytest

from edge_ll.errors import TransportError
from edge_ll.transport import address
from edge_ll.transport.mqtt import MqttTransport


def test_a_full_address():
    parsed = address.parse("mqtts://me%40home:p%3Aw@broker.local:9999")
    assert (parsed.host, parsed.port, parsed.tls) == ("broker.local", 9999, True)
    assert (parsed.username, parsed.password) == ("me@home", "p:w")
    assert "p:w" not in repr(parsed)
    assert str(parsed) == "broker.local:9999"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("mqtt://h", "h:1883"),
        ("mqtts://h/", "h:8883"),
        ("mqtt://[::1]:5", "[::1]:5"),
    ],
)
def test_ports_have_defaults(url, shown):
    assert str(address.parse(url)) == shown


def test_arguments_win_over_the_url():
    parsed = address.parse("mqtt://a:b@h", username="c", password="d")
    assert (parsed.username, parsed.password) == ("c", "d")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:1883",
        "http://h",
        "mqtt://",
        "mqtt://h:99999",
        "mqtt://h:x",
        "mqtt://h:0",
        "mqtt://h/t",
        "mqtt://h?x=1",
        "mqtt://:secret@h",
    ],
)
def test_anything_else_is_refused_without_repeating_a_password(url):
    with pytest.raises(TransportError, match="expected mqtt://") as caught:
        MqttTransport(url, client_id="device")
    assert "secret" not in str(caught.value)


def test_a_client_needs_a_name():
    with pytest.raises(TransportError, match="client id"):
        MqttTransport("mqtt://h", client_id="")
