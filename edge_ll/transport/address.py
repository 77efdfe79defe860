"""The address of an MQTT broker, read from a URL."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from edge_ll.errors import TransportError

_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True)
class Address:
    """Where the broker is and as whom to speak; prints as ``host:port``, never the password."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse(url: str, *, username: str | None = None, password: str | None = None) -> Address:
    """Read ``mqtt://user:password@host:1883`` (or ``mqtts://`` for TLS, port 8883).

    User and password are percent-decoded, and give way to the arguments; the port may be left out.

    Raises:
        TransportError: Anything else; the message does not repeat the URL, which may hold a
            password.
    """
    form = "expected mqtt://[user:password@]host[:port], or mqtts:// for TLS"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise TransportError(f"broker URL: {error}; {form}") from error
    if parts.scheme not in _DEFAULT_PORTS:
        raise TransportError(f"broker URL: got the scheme {parts.scheme!r}; {form}")
    if not parts.hostname or port == 0:
        raise TransportError(f"broker URL: no host or no usable port; {form}")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise TransportError(f"broker URL: unexpected text after the port; {form}")
    if username is None and parts.username:
        username = unquote(parts.username)
    if password is None and parts.password is not None:
        password = unquote(parts.password)
    if password is not None and username is None:
        raise TransportError(f"broker: a password without a user; {form}")
    return Address(
        host=parts.hostname,
        port=port or _DEFAULT_PORTS[parts.scheme],
        tls=parts.scheme == "mqtts",
        username=username,
        password=password,
    )
