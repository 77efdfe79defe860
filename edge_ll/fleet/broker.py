"""An embedded MQTT 3.1.1 broker for the demo and the tests, as a process of its own.

It is amqtt with its known faults mended where we meet them (see ``_mended_broker``), it lets
everybody in, and it keeps everything in memory: never put it on a network. Deployments use a
real broker, such as Mosquitto.

    python -m edge_ll.fleet.broker --host 127.0.0.1 --port 1883
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

from edge_ll.errors import MissingExtraError, TransportError

_HOST = "127.0.0.1"
_START_S = 20.0
_STOP_S = 5.0
_READY = b"ready\n"
_BAD_VERSION = b"\x20\x02\x00\x01"
_MOST_CONNECT_BYTES = 400_000  # its five strings are of 64 KiB at most


class EmbeddedBroker:
    """A broker in a child process, running from construction until ``stop``.

    The child also ends when this process dies, however it dies: it watches a pipe from here.

    Args:
        port: The loopback port; None takes a free one.

    Raises:
        MissingExtraError: amqtt is not installed.
        TransportError: The broker did not start; the message holds what it said.
    """

    def __init__(self, port: int | None = None) -> None:
        _require_amqtt()
        self._process: subprocess.Popen[bytes] | None = None
        for attempt in range(3):
            self.port = port or _free_port()
            try:
                self._start()
            except TransportError:
                # Another process may have taken the free port meanwhile: try another one.
                if port is not None or attempt == 2:
                    raise
            else:
                return

    @property
    def url(self) -> str:
        """For ``MqttTransport``."""
        return f"mqtt://{_HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The child's process id; None while it does not run."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """End the broker in an orderly way; idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the broker at once, as a crash or a power cut would."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop if it still runs, and start again on the same port, with nothing remembered."""
        self.stop()
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self) -> None:
        command = [sys.executable, "-m", "edge_ll.fleet.broker", "--host", _HOST]
        command += ["--port", str(self.port), "--as-child"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)  # noqa: S603
        self._process = process
        # The child's own word, not an answer on the port: that could be a stranger's.
        if process.stdout is not None and select.select([process.stdout], [], [], _START_S)[0]:
            ready = process.stdout.readline() == _READY
            if ready:
                # What it says later must not fill the pipe and stop it.
                threading.Thread(target=_pass_on, args=(process,), daemon=True).start()
                return
        said = self._end(signal.SIGKILL) or "nothing was said"
        raise TransportError(
            f"the embedded broker did not start on {_HOST}:{self.port} within {_START_S:g} s: "
            f"{said}; is the port taken?"
        )

    def _end(self, number: signal.Signals) -> str:
        process, self._process = self._process, None
        if process is None:
            return ""
        with suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        said = b""
        if process.stderr is not None and not process.stderr.closed:
            with suppress(ValueError):  # the passing thread may be closing it
                said = process.stderr.read() or b""
                process.stderr.close()
        return said.decode(errors="replace").strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the broker in the foreground until SIGTERM or SIGINT; prints only errors."""
    parser = argparse.ArgumentParser(prog="python -m edge_ll.fleet.broker", description=__doc__)
    parser.add_argument("--host", default=_HOST, help="the address to listen on")
    parser.add_argument("--port", type=int, default=1883, help="the TCP port to listen on")
    parser.add_argument("--as-child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    # A client that hangs up is no error of ours, but amqtt and asyncio print a traceback for it.
    logging.getLogger("amqtt").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        _require_amqtt()
        asyncio.run(_serve(options.host, options.port, child=options.as_child))
    except (MissingExtraError, TransportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


async def _serve(host: str, port: int, *, child: bool) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if child:
        watcher = threading.Thread(target=_wait_for_end_of_stdin, args=(loop, stopped), daemon=True)
        watcher.start()
    broker = _mended_broker(host, port)
    try:
        await broker.start()
    except Exception as error:  # amqtt wraps what asyncio raised, and not always
        raise TransportError(f"cannot listen on {host}:{port}: {error}") from error
    if child:
        sys.stdout.buffer.write(_READY)
        sys.stdout.flush()
    await stopped.wait()
    with suppress(TimeoutError):
        await asyncio.wait_for(broker.shutdown(), _STOP_S / 2)


def _wait_for_end_of_stdin(loop: asyncio.AbstractEventLoop, stopped: asyncio.Event) -> None:
    # Not sys.stdin: a thread blocked in its lock makes the interpreter abort at exit.
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    with suppress(RuntimeError):  # the loop has ended first
        loop.call_soon_threadsafe(stopped.set)


def _mended_broker(host: str, port: int) -> Any:
    """An amqtt broker without the faults of 0.12 that would bite us.

    - It answers silence past the keep-alive with nothing, so a frozen or unplugged client stays
      "connected" and its will is never sent. Here such a client is disconnected.
    - A client that returns to a session whose old connection is still open shares one state
      object with it, is marked disconnected when the old one ends, and is then thrown out. And
      for anonymous clients no session outlives its connection by more than a second anyway.
      Here every session is a clean one, and says so in CONNACK.
    - A clean session that takes over a client id leaves the old connection open. Here it is
      ended, and its will comes before the newcomer's first message, not long after it.
    - It misreads an MQTT 5 CONNECT and waits for bytes that never come. Here such a client is
      told at once that its version is not spoken.
    - Every client that connects is sent the retained messages of everybody's subscriptions.
      Here only those of its own.
    """
    import amqtt.broker  # noqa: PLC0415 - an extra, and heavy
    from amqtt.adapters import BufferReader  # noqa: PLC0415
    from amqtt.codecs_amqtt import read_or_raise  # noqa: PLC0415
    from amqtt.contexts import BrokerConfig, ListenerConfig  # noqa: PLC0415
    from amqtt.errors import MQTTError  # noqa: PLC0415
    from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler  # noqa: PLC0415

    class Handler(BrokerProtocolHandler):  # type: ignore[misc]
        @classmethod
        async def init_from_connect(cls, reader: Any, writer: Any, *more: Any, **named: Any) -> Any:
            head, body = await _whole_packet(partial(read_or_raise, reader))
            if body.startswith(b"\x00\x04MQTT\x05"):
                writer.write(_BAD_VERSION)
                await writer.drain()
                await writer.close()
                raise MQTTError("MQTT 5")
            first = BufferReader(head + body)
            handler, session = await super().init_from_connect(first, writer, *more, **named)
            session.clean_session = True
            if session.keep_alive:  # half as much again is the standard's patience
                session.keep_alive = session.keep_alive * 3 // 2 + 1
            return handler, session

        def handle_read_timeout(self) -> None:
            if self._disconnect_waiter is not None and not self._disconnect_waiter.done():
                self._disconnect_waiter.set_result(None)

    class Broker(amqtt.broker.Broker):  # type: ignore[misc]
        async def _delete_session(self, client_id: str) -> None:
            _, handler = self._sessions.get(client_id, (None, None))
            await super()._delete_session(client_id)
            if handler is not None:
                await handler.handle_connection_closed()
                await asyncio.sleep(0)  # let the old connection's loop send the will

        async def _publish_retained_messages_for_subscription(
            self, subscription: tuple[str, int], session: Any
        ) -> None:
            subscribers = self._subscriptions.get(subscription[0], [])
            if any(subscriber.client_id == session.client_id for subscriber, _ in subscribers):
                await super()._publish_retained_messages_for_subscription(subscription, session)

    # The broker names the handler's class only through its module; this process is all ours.
    amqtt.broker.BrokerProtocolHandler = Handler
    return Broker(
        BrokerConfig(
            listeners={"default": ListenerConfig(bind=f"{host}:{port}")},
            plugins={"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        )
    )


async def _whole_packet(read: Callable[[int], Awaitable[bytes]]) -> tuple[bytes, bytes]:
    """One packet's fixed header and its body; no longer than a CONNECT can be."""
    head = await read(2)
    length, shift = head[1] & 0x7F, 7
    while head[-1] & 0x80 and len(head) < 5:
        head += await read(1)
        length |= (head[-1] & 0x7F) << shift
        shift += 7
    return head, await read(min(length, _MOST_CONNECT_BYTES))


def _require_amqtt() -> None:
    try:
        import amqtt  # noqa: F401, PLC0415 - an extra, asked for only here
    except ImportError as error:
        raise MissingExtraError("the embedded broker", "fleet") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _pass_on(process: subprocess.Popen[bytes]) -> None:
    """Write the child's errors to ours until it ends."""
    if process.stderr is None:
        return
    with suppress(ValueError, OSError), process.stderr as errors:
        for line in errors:
            sys.stderr.write(f"embedded broker: {line.decode(errors='replace')}")


if __name__ == "__main__":
    sys.exit(main())
