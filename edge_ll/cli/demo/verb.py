"""The verb itself: options, what the terminal shows, and the files that remain."""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from edge_ll import logs
from edge_ll.cli.extras import need
from edge_ll.errors import DataError

if TYPE_CHECKING:
    from edge_ll.cli.demo.record import DemoRecord

RECIPES = Path("export/recipes")
OUTPUT = Path("demo-out")


def add_demo(subparsers: Any) -> None:
    """Add ``demo``."""
    demo = subparsers.add_parser(
        "demo",
        help="the whole lifecycle on this machine, from teacher to fleet report",
        description="Train, distil, export, sign, deliver to three agents, learn, watch, merge.",
        epilog="example: edge-ll demo --dataset digits --out demo-out",
    )
    demo.add_argument("--dataset", choices=("digits", "fsdd"), default="digits")
    demo.add_argument("--recipe", type=Path, help="a recipe file instead of the data set's own")
    demo.add_argument("--engine", choices=("step-graph", "ort-training"), default="step-graph")
    demo.add_argument("--broker", metavar="URL", help="a running broker, mqtt://host:port")
    demo.add_argument("--device-python", type=Path, help="the interpreter for the agents")
    demo.add_argument("--out", type=Path, default=OUTPUT, help="folder for everything it makes")
    demo.add_argument("--json", action="store_true", help="print summary.json at the end")
    demo.set_defaults(run=run_demo)


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the lifecycle, print a table, leave ``summary.json`` and ``report.html``."""
    need("fleet", "the demo")
    need("export", "the demo")
    from edge_ll.cli.demo.lifecycle import Options, run_lifecycle
    from edge_ll.cli.demo.measure import measure
    from edge_ll.cli.demo.report import write_report

    # The terminal belongs to the progress bars; agents log into files of their own.
    for package in logs.PACKAGES:
        logging.getLogger(package).setLevel(logging.ERROR)
    recipe = arguments.recipe or RECIPES / f"{arguments.dataset}.toml"
    if not recipe.exists():
        raise DataError(f"{recipe} does not exist; run this in the project's folder, or --recipe")
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with _Screen() as screen:
        options = Options(
            recipe_file=recipe,
            folder=arguments.out,
            engine=arguments.engine,
            broker=arguments.broker,
            device_python=arguments.device_python,
        )
        run = run_lifecycle(options, screen)
    record = measure(run, time.perf_counter() - started)
    (arguments.out / "summary.json").write_text(json.dumps(record.summary, indent=1) + "\n")
    write_report(record, arguments.out / "report.html")
    if arguments.json:
        print(json.dumps(record.summary))
    else:
        _print_table(record, arguments.out)
    return 0


class _Screen:
    """Progress bars, on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("  {task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._tasks: dict[str, Any] = {}
        self._number = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """A new stage begins: a line of its own, below what is done."""
        self._number += 1
        self._progress.console.print(f"[bold]{self._number}.[/bold] {text}", highlight=False)

    def progress(self, what: str, done: int, total: int) -> None:
        """Move a bar, made when it is first heard of."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)


def _print_table(record: DemoRecord, folder: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    held = "; ".join(f"{group}: {' '.join(record.group_labels[group])}" for group in record.groups)
    table = Table(
        title=f"{record.name}: accuracy in % on each group of classes, before -> after learning",
        caption=held,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("device")
    for group in record.groups:
        table.add_column(group.replace("experience-", "exp. "), justify="right")
    table.add_column("forgot", justify="right")
    table.add_column("no replay", justify="right", style="dim")
    table.add_column("drift", justify="right")
    table.add_column("MB", justify="right")
    for device in record.devices:
        first, last = device.matrix[0], device.matrix[-1]
        table.add_row(
            device.name,
            *(
                f"{100 * a.accuracy:.0f} -> {100 * b.accuracy:.0f}"
                for a, b in zip(first, last, strict=True)
            ),
            f"{device.forgetting:+.3f}",
            f"{device.naive_forgetting:+.3f}",
            "alarm" if device.alarms else "no",
            f"{device.rss_bytes / 2**20:.0f}",
        )
    console = Console()
    console.print(table)
    summary, merge = record.summary, record.merge
    after: Any = summary["acc_after"]
    outcome = f"published as version {merge.version}" if merge.accepted else "not published"
    console.print(
        f"merged tail: {merge.merged_acc:.1%} on the hold-out (best device "
        f"{summary['best_single_acc']:.1%}), {outcome}; devices now: "
        f"old {after['old']:.1%}, new {after['new']:.1%}",
        highlight=False,
    )
    for device in record.devices:
        if device.drifts_at is not None:
            console.print(
                f"{device.name} learned from distorted inputs from sample {device.drifts_at} on; "
                "the accuracies are on undistorted ones",
                highlight=False,
            )
    for device_name, reason in merge.left_out.items():
        console.print(f"left out of the merge: {device_name} ({reason})", highlight=False)
    for reason in () if merge.accepted else merge.reasons:
        console.print(f"gate: {reason}", highlight=False)
    console.print(
        f"teacher {summary['teacher_acc']:.1%}, student {summary['student_acc']:.1%}, "
        f"without teacher {summary['student_acc_without_teacher']:.1%}; "
        f"{summary['seconds']} s; see {folder / 'report.html'} and {folder / 'summary.json'}",
        highlight=False,
    )
