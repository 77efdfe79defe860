"""``edge-ll``: train, export, push, watch. Each verb imports what it needs, and only then."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from edge_ll.cli.demo.verb import add_demo
from edge_ll.cli.export_verbs import add_export, add_inspect, add_train, add_verify
from edge_ll.cli.fleet_verbs import add_devices, add_fleet, add_push
from edge_ll.terminal import add_common, run_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; its exit code, see :func:`edge_ll.terminal.run_verb`."""
    return run_verb(parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    """The command's whole grammar."""
    top = argparse.ArgumentParser(
        prog="edge-ll", description="On-device continual learning, and the fleet around it."
    )
    add_common(top)
    verbs = top.add_subparsers(title="verbs", required=True, metavar="VERB")
    for add in (
        *(add_demo, add_train, add_export, add_inspect, add_verify),
        *(add_fleet, add_push, add_devices),
    ):
        add(verbs)
    return top


if __name__ == "__main__":
    sys.exit(main())
