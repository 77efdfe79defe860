"""The verbs of the fleet: ``edge-ll fleet serve``, ``edge-ll push`` and ``edge-ll devices``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_ll.fleet.overview import DeviceSummary
    from edge_ll.metrics import Counts
    from edge_ll.transport import Transport

_CONNECT_S = 5.0
_WIDTH_WITHOUT_TERMINAL = 140

_SERVE_EXAMPLE = """\
example:
  edge-ll fleet serve --data fleet-data --broker mqtt://localhost:1883
"""
_PUSH_EXAMPLE = """\
example:
  edge-ll push digits-v2.bundle --data fleet-data --trust signing.pem.pub
"""
_DEVICES_EXAMPLE = """\
example:
  edge-ll devices --data fleet-data
"""
_NO_DEVICES = """\
No devices of tenant {tenant!r} in {data} yet. A device appears when its agent says hello:
  1. start the server:  edge-ll fleet serve --data {data} --broker mqtt://HOST:1883
  2. push a bundle:     edge-ll push BUNDLE --data {data} --trust PUBFILE
  3. start an agent on the same broker and tenant:  edge-ll-agent --help\
"""


def add_fleet(subparsers: Any) -> None:
    """Add ``fleet`` with its verb ``serve``."""
    fleet = _verb(subparsers, "fleet", "run the fleet server")
    fleet.epilog = _SERVE_EXAMPLE
    verbs = fleet.add_subparsers(required=True, metavar="VERB")
    serve = _verb(verbs, "serve", "take in reports and deliver bundles until stopped")
    serve.epilog = _SERVE_EXAMPLE
    _add_data(serve)
    serve.add_argument(
        "--broker", required=True, metavar="URL", help="mqtt://[user:password@]host[:port]"
    )
    serve.set_defaults(run=run_serve)


def add_push(subparsers: Any) -> None:
    """Add ``push``."""
    push = _verb(subparsers, "push", "make a bundle the one that all devices should run")
    push.epilog = _PUSH_EXAMPLE
    push.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's file")
    _add_data(push)
    push.add_argument(
        "--trust",
        nargs="+",
        type=Path,
        required=True,
        metavar="PUBFILE",
        help="public keys that may have signed it",
    )
    push.add_argument("--json", action="store_true", help="print one JSON object")
    push.set_defaults(run=run_push)


def add_devices(subparsers: Any) -> None:
    """Add ``devices``."""
    devices = _verb(subparsers, "devices", "show every device: what it runs, learned and forgot")
    devices.epilog = _DEVICES_EXAMPLE
    _add_data(devices)
    devices.add_argument("--json", action="store_true", help="print one JSON array")
    devices.set_defaults(run=run_devices)


def run_serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 0 at a clean end."""
    import signal

    from edge_ll import logs
    from edge_ll.fleet.registry import DATABASE, Registry
    from edge_ll.fleet.server import FleetServer
    from edge_ll.transport.mqtt import MqttTransport

    logs.configure()
    ends = {signal.SIGTERM, signal.SIGINT}
    # Blocked before any thread starts, so that only the wait below ever sees them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        args.data.mkdir(parents=True, exist_ok=True)
        registry = Registry(args.data / DATABASE)
        with MqttTransport(args.broker, client_id=f"edge-ll-fleet:{args.tenant}") as transport:
            server = FleetServer(
                transport, registry, tenant=args.tenant, folder=args.data, trust=None
            )
            server.start()
            try:
                _connect(transport)
                signal.sigwait(ends)
            finally:
                server.stop()
        registry.close()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def run_push(args: argparse.Namespace) -> int:
    """Publish a bundle; a running server offers it within a second."""
    import msgspec

    from edge_ll.fleet.publishing import publish_bundle
    from edge_ll.fleet.registry import DATABASE, Registry
    from edge_ll.trust import TrustStore

    _check_tenant(args.tenant)
    trust = TrustStore.from_file(*args.trust)
    args.data.mkdir(parents=True, exist_ok=True)
    registry = Registry(args.data / DATABASE)
    ref = publish_bundle(registry, args.data, args.bundle, trust=trust, tenant=args.tenant)
    known = len(registry.devices(args.tenant))
    registry.close()
    if args.json:
        print(msgspec.json.encode(ref).decode())
    else:
        print(
            f"{ref.name} version {ref.version} ({ref.digest[:12]}) is what tenant "
            f"{args.tenant!r} should run now; known devices: {known}"
        )
    return 0


def run_devices(args: argparse.Namespace) -> int:
    """Print the devices, as a table or as JSON."""
    import msgspec

    from edge_ll.fleet.overview import overview
    from edge_ll.fleet.registry import DATABASE, Registry

    _check_tenant(args.tenant)
    summaries: list[DeviceSummary] = []
    if (args.data / DATABASE).exists():  # looking must not create anything
        registry = Registry(args.data / DATABASE)
        summaries = overview(registry, args.tenant)
        registry.close()
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(summaries)).decode())
    elif summaries:
        _print_table(summaries)
    else:
        print(_NO_DEVICES.format(tenant=args.tenant, data=args.data))
    return 0


def _verb(subparsers: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="the server's data folder"
    )
    parser.add_argument("--tenant", default="default", help="whose devices (default: default)")


def _check_tenant(tenant: str) -> None:
    from edge_ll.messages import check_level

    check_level(tenant)


def _connect(transport: Transport) -> None:
    """Wait a little for the broker; the transport goes on trying when it is merely away."""
    import logging

    from edge_ll.errors import TransportError
    from edge_ll.transport.link import RefusedError

    try:
        transport.connect(_CONNECT_S)
    except TransportError as error:
        if isinstance(error, RefusedError) and error.permanent:
            raise
        logging.getLogger(__name__).warning("broker.unreachable", extra={"reason": str(error)})


def _print_table(summaries: Iterable[DeviceSummary]) -> None:
    import sys
    import time

    from edge_ll.errors import MissingExtraError

    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise MissingExtraError("the table of devices", "fleet") from error
    table = Table()
    for title in ("device", "online", "bundle", "state"):
        table.add_column(title)
    for title in ("seen / learned", "anchors old", "anchors new", "forgetting"):
        table.add_column(title, justify="right")
    table.add_column("drift alarms")
    table.add_column("last seen")
    now = time.time()
    for item in summaries:
        table.add_row(
            item.device,
            "yes" if item.online else "no",
            f"v{item.bundle_version}" if item.bundle_version else "-",
            item.state or "-",
            f"{item.seen} / {item.learned}",
            _share(item.old),
            _share(item.new),
            "-" if item.forgetting is None else f"{100 * item.forgetting:.1f} %",
            _printable(", ".join(item.alarms)) or "-",
            _ago(now - item.last_seen_s),
        )
    width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    # What devices sent is text, never markup.
    Console(width=width, markup=False, highlight=False).print(table)


def _printable(text: str) -> str:
    """Without control characters: a device must not drive the operator's terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _share(counts: Counts | None) -> str:
    return "-" if counts is None else f"{100 * counts.accuracy:.1f} % of {counts.n}"


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
