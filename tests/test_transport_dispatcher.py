from __future__ import annotations

import threading

from edge_ll.transport import Message
from edge_ll.transport.dispatcher import Dispatcher


def test_a_full_queue_is_told_once_per_burst_and_spares_the_tasks(caplog):
    started, release, done = threading.Event(), threading.Event(), threading.Event()
    got: list[bytes] = []
    dispatcher = Dispatcher("d", max_messages=2)
    dispatcher.route("a", lambda message: got.append(message.payload))
    dispatcher.call(lambda: (started.set(), release.wait(10)))
    assert started.wait(10)
    assert [dispatcher.deliver(Message("a", b"%d" % n)) for n in range(5)] == [True] * 2 + [
        False
    ] * 3
    dispatcher.call(done.set)
    release.set()
    assert done.wait(10)
    assert got == [b"0", b"1"]
    assert dispatcher.dropped == 3
    assert caplog.text.count("queue is full") == 1
    dispatcher.stop(5)


def test_waiting_bytes_are_bounded_but_one_large_message_passes():
    started, release = threading.Event(), threading.Event()
    dispatcher = Dispatcher("d", max_bytes=10)
    dispatcher.call(lambda: (started.set(), release.wait(10)))
    assert started.wait(10)
    assert dispatcher.deliver(Message("a", bytes(100)))
    assert not dispatcher.deliver(Message("a", b"x"))
    release.set()
    dispatcher.stop(5)
    assert dispatcher.dropped == 1


def test_stopping_gives_up_on_a_stuck_handler(caplog):
    release = threading.Event()
    dispatcher = Dispatcher("d")
    dispatcher.call(lambda: release.wait(10))
    dispatcher.deliver(Message("a", b"never"))
    dispatcher.stop(0.1)
    assert "1 messages not handled" in caplog.text
    release.set()
