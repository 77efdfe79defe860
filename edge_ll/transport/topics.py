"""MQTT topic names and filters: the rules of MQTT 3.1.1, section 4.7."""

from __future__ import annotations

from edge_ll.errors import TransportError

MAX_TOPIC_BYTES = 256
"""The longest topic or filter, in bytes of UTF-8: the smallest limit of the common brokers."""

MAX_PAYLOAD_BYTES = 256 * 1024 * 1024 - 1024
"""The longest payload: MQTT's 256 MiB packet, less room for the header and the topic."""


def matches(topic_filter: str, topic: str) -> bool:
    """Whether ``topic`` is matched by ``topic_filter``; both are taken as valid.

    ``+`` stands for one level, a last ``#`` for any number of levels including none. A leading
    wildcard does not match a topic that starts with ``$``.

    >>> matches("sport/#", "sport"), matches("sport/+", "sport"), matches("#", "$SYS/uptime")
    (True, False, False)
    """
    if topic.startswith("$") and topic_filter.startswith(("+", "#")):
        return False
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted.pop()
        levels = levels[: len(wanted)]
    if len(wanted) != len(levels):
        return False
    return all(want in {"+", level} for want, level in zip(wanted, levels, strict=True))


def check_topic(topic: str) -> None:
    """Refuse a name that cannot be published to.

    Raises:
        TransportError: Empty, too long, not UTF-8, or with a NUL character or a wildcard.
    """
    _check(topic, "topic")
    if "+" in topic or "#" in topic:
        raise TransportError(f"topic {topic!r}: expected a name without wildcards (+ and #)")


def check_filter(topic_filter: str) -> None:
    """Refuse a filter that cannot be subscribed to.

    Raises:
        TransportError: Empty, too long, not UTF-8, with a NUL character, with a misplaced
            wildcard, or a shared subscription.
    """
    _check(topic_filter, "filter")
    levels = topic_filter.split("/")
    if levels[0] == "$share":
        # MQTT 3.1.1 has none, and a broker without them would quietly deliver nothing.
        raise TransportError(f"filter {topic_filter!r}: shared subscriptions are not supported")
    if any(len(level) > 1 and ("+" in level or "#" in level) for level in levels):
        raise TransportError(f"filter {topic_filter!r}: a wildcard must be a whole level")
    if "#" in levels[:-1]:
        raise TransportError(f"filter {topic_filter!r}: # must be the last level")


def check_message(topic: str, payload: bytes, qos: int) -> None:
    """Refuse what cannot be published, before it reaches any queue.

    Raises:
        TransportError: The topic, the QoS or the size of the payload is not allowed.
    """
    check_topic(topic)
    if qos not in {0, 1}:
        # Exactly once needs state that outlives a connection and the process; nobody here needs it.
        raise TransportError(f"topic {topic!r}: expected QoS 0 or 1, got {qos!r}")
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise TransportError(
            f"topic {topic!r}: {len(payload):,} bytes of payload, the most is "
            f"{MAX_PAYLOAD_BYTES:,}; send it in chunks"
        )


def _check(text: str, what: str) -> None:
    if not text:
        raise TransportError(f"{what}: expected at least one character, got an empty string")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise TransportError(f"{what} {text!r}: not valid UTF-8 ({error.reason})") from error
    if size > MAX_TOPIC_BYTES:
        raise TransportError(f"{what}: {size} bytes, expected at most {MAX_TOPIC_BYTES}: {text!r}")
    if "\0" in text:
        raise TransportError(f"{what} {text!r}: a NUL character is not allowed")
