"""``edge-ll``: train, export, push, watch. Each verb imports what it needs, and only then."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from edge_ll import __version__, logs
from edge_ll.cli.demo.verb import add_demo
from edge_ll.cli.export_verbs import add_export, add_inspect, add_train, add_verify
from edge_ll.cli.fleet_verbs import add_devices, add_fleet, add_push
from edge_ll.errors import EdgeLLError

OK, FAILED = 0, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Returns:
        0 when it worked; 1 when a check that was asked for failed; 2 when it could not be done,
        with the reason on standard error.
    """
    arguments = parser().parse_args(argv)
    logs.configure(level=arguments.log_level, style=arguments.log_format)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has enough; leave without a fuss at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except EdgeLLError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return FAILED
    return code


def parser() -> argparse.ArgumentParser:
    """The command's whole grammar."""
    top = argparse.ArgumentParser(
        prog="edge-ll", description="On-device continual learning, and the fleet around it."
    )
    top.add_argument("--version", action="version", version=f"edge-ll {__version__}")
    top.add_argument("--log-level", choices=logs.LEVELS, default="info")
    top.add_argument("--log-format", choices=("text", "json"), default="text")
    verbs = top.add_subparsers(title="verbs", required=True, metavar="VERB")
    for add in (
        *(add_demo, add_train, add_export, add_inspect, add_verify),
        *(add_fleet, add_push, add_devices),
    ):
        add(verbs)
    return top


if __name__ == "__main__":
    sys.exit(main())
