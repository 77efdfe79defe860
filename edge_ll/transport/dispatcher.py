"""The queue and the thread between a network and the handlers, shared by all transports."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from edge_ll.transport import topics
from edge_ll.transport.port import Handler, Message

log = logging.getLogger(__name__)


class Dispatcher:
    """Routes of filters to handlers, a bounded queue, and the one thread that empties it.

    Args:
        name: The thread's name.
        max_messages: How many messages may wait.
        max_bytes: How many bytes of payload may wait; one message may always wait alone.
    """

    def __init__(
        self, name: str, *, max_messages: int = 10_000, max_bytes: int = 64 * 1024 * 1024
    ) -> None:
        self.dropped = 0
        self.handler_errors = 0
        self._name = name
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._routes: tuple[tuple[str, Handler], ...] = ()
        self._queue: deque[Message | Callable[[], None]] = deque()
        self._messages = 0
        self._bytes = 0
        self._bursting = False
        self._stopping = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def filters(self) -> tuple[str, ...]:
        """Every filter once, in the order of the first subscription."""
        return tuple(dict.fromkeys(topic_filter for topic_filter, _ in self._routes))

    def route(self, topic_filter: str, handler: Handler) -> None:
        """Call ``handler`` for messages that match ``topic_filter``, from now on."""
        with self._changed:
            # A new tuple, so that the thread reads without the lock.
            self._routes = (*self._routes, (topic_filter, handler))

    def deliver(self, message: Message) -> bool:
        """Queue ``message`` for its handlers; False when it was dropped for want of room."""
        size = len(message.payload)
        with self._changed:
            full = self._messages >= self._max_messages or (
                self._messages > 0 and self._bytes + size > self._max_bytes
            )
            if full:
                self.dropped += 1
                first, self._bursting = not self._bursting, True
            else:
                self._bursting = False
                self._messages += 1
                self._bytes += size
                self._put(message)
        if full and first:
            log.warning(
                "%s: the queue is full (%d messages); dropping new ones, first on %s; "
                "the handlers are too slow for what arrives",
                self._name,
                self._messages,
                message.topic,
            )
        return not full

    def call(self, task: Callable[[], None]) -> None:
        """Run ``task`` on the thread after what is queued now; never dropped."""
        with self._changed:
            self._put(task)

    def stop(self, timeout_s: float) -> None:
        """Run what is queued for up to ``timeout_s`` seconds, then stop for good."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            thread = self._thread
        # A handler may close its own transport: the thread cannot wait for itself.
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout_s)
        with self._changed:
            left = len(self._queue)
            self._queue.clear()
        if left:
            log.warning("%s: stopped with %d messages not handled", self._name, left)

    def _put(self, item: Message | Callable[[], None]) -> None:
        if self._stopping:
            return
        self._queue.append(item)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if not self._queue:
                    return
                item = self._queue.popleft()
                if isinstance(item, Message):
                    self._messages -= 1
                    self._bytes -= len(item.payload)
            if isinstance(item, Message):
                self._hand_out(item)
            else:
                self._guarded(item, "on_connect")

    def _hand_out(self, message: Message) -> None:
        handlers = [
            handler for pattern, handler in self._routes if topics.matches(pattern, message.topic)
        ]
        if not handlers:
            # A persistent session may hold subscriptions of an earlier program.
            log.debug("%s: no handler for %s", self._name, message.topic)
        for handler in handlers:
            self._guarded(partial(handler, message), message.topic)

    def _guarded(self, task: Callable[[], None], cause: str) -> None:
        try:
            task()
        except Exception:
            self.handler_errors += 1
            log.exception("%s: a handler failed on %s", self._name, cause)
