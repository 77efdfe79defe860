"""From results to tables that people read and one JSON object that programs read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.engines.cases import ENGINES, TAILS
from benchmarks.engines.coordinator import CaseResult

TORCH = ("torch_default", "torch_fused")
ARTIFACTS = ("step_graph", "ort_training")

Row = Sequence[str]


@dataclass
class Timed:
    """What was measured with one number of threads.

    Attributes:
        results: By tail and size of batch.
        gflops: The GEMM peak of each engine's runtime.
        installed: What each engine's process said about its packages.
    """

    results: dict[str, dict[int, CaseResult]] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)
    installed: dict[str, dict[str, Any]] = field(default_factory=dict)


def summary(
    timed: Mapping[int, Timed], costs: Mapping[str, Mapping[str, Any]], index: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON object; ``timed`` is by number of threads, and most threads are the main keys."""
    most = max(timed)
    one = timed.get(1) if most > 1 else None
    tails = index["tails"]
    return {
        **times(timed[most]),
        "threads": most,
        "one_thread": times(one) if one else None,
        "rss_mb": {name: cost.get("rss_mb") for name, cost in costs.items()},
        "start_s": {
            name: {"import": cost.get("import_s"), "load": cost.get("load_s")}
            for name, cost in costs.items()
        },
        "disk_mb": {name: cost.get("disk_mb") for name, cost in costs.items()},
        "artifact_bytes": {name: told["artifact_bytes"] for name, told in tails.items()},
        "gemm_share": gemm_share(timed[most], tails),
        "gemm_share_one_thread": gemm_share(one, tails) if one else None,
        "gemm_gflops": {str(threads): run.gflops for threads, run in timed.items()},
        "compile_s": _compile_s(timed[most]),
        "disturbed": {str(threads): _disturbed(run) for threads, run in timed.items()},
        "versions": {name: cost.get("versions") for name, cost in costs.items()},
    }


def times(timed: Timed) -> dict[str, dict[str, dict[str, float | None]] | None]:
    """Milliseconds a step by tail and batch; null for a tail that could not be exported."""
    return {
        tail: {str(n): _times(result) for n, result in cases.items()} or None
        for tail, cases in timed.results.items()
    }


def _times(result: CaseResult) -> dict[str, float | None]:
    """``torch`` is the faster of its two optimizers, not compiled."""
    best = result.faster(*TORCH)
    return {
        "torch": _rounded(result.ms(best)) if best else None,
        **{name: _rounded(result.ms(name)) for name in ENGINES},
        "torch_over_step_graph": _rounded(result.ratio(best, "step_graph")) if best else None,
    }


def gemm_share(timed: Timed, tails: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The arithmetic of a step in its time, as a share of the same runtime's peak."""
    shares: dict[str, dict[str, dict[str, float]]] = {}
    for tail, cases in timed.results.items():
        for n, result in cases.items():
            flops = tails[tail]["flops"][str(n)]
            measured = {name: result.ms(name) for name in timed.gflops}
            shares.setdefault(tail, {})[str(n)] = {
                name: round(flops / (ms * 1e6) / timed.gflops[name], 4)
                for name, ms in measured.items()
                if ms
            }
    return shares


def _compile_s(timed: Timed) -> dict[str, dict[str, float]]:
    """Seconds until the first step of ``torch.compile`` was done."""
    return {
        tail: {
            str(n): round(result.ready_s["torch_compile"], 1)
            for n, result in cases.items()
            if "torch_compile" in result.ready_s
        }
        for tail, cases in timed.results.items()
    }


def _disturbed(timed: Timed) -> dict[str, list[int]]:
    """The cases without enough quiet rounds."""
    found = {
        tail: [n for n, result in cases.items() if result.disturbed]
        for tail, cases in timed.results.items()
    }
    return {tail: sizes for tail, sizes in found.items() if sizes}


def reasons(
    timed: Mapping[int, Timed], exported: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Why a cell is empty: by tail and engine, each reason once."""
    found = {
        f"{tail}, {engine}": reason
        for tail, by_engine in exported.items()
        for engine, reason in by_engine.items()
    }
    for threads, run in timed.items():
        for tail, cases in run.results.items():
            for n, result in cases.items():
                for engine, reason in result.reasons.items():
                    if found.setdefault(f"{tail}, {engine}", reason) != reason:
                        found[f"{tail}, {engine}, batch {n}, threads {threads}"] = reason
    return found


def reasons_text(found: Mapping[str, str]) -> str:
    """The reasons as lines."""
    lines = [f"  {cell}: {reason}" for cell, reason in found.items()]
    return "\n".join(["empty cells:", *(lines or ["  none"])])


def times_table(timed: Timed, threads: int) -> str:
    """Milliseconds a step; the ratio is of torch's faster optimizer to the step graph."""
    rows = []
    for tail, cases in timed.results.items():
        for n, result in cases.items():
            row = _times(result)
            ratio, compiled = row["torch_over_step_graph"], result.ready_s.get("torch_compile")
            rows.append(
                [
                    tail,
                    f"{n}{'*' if result.disturbed else ''}",
                    *(_cell(row[name], 3) for name in ENGINES),
                    "-" if ratio is None else f"{ratio:.2f}x",
                    _cell(compiled, 1),
                ]
            )
    head = ["tail", "batch", *ENGINES, "torch / step graph", "compile s"]
    title = f"median ms a step, threads: {threads} (* others were on the processors meanwhile)\n"
    return title + table(head, rows)


def share_table(timed: Timed, tails: Mapping[str, Any], threads: int) -> str:
    """Shares of the peak in percent, the peaks in the first line."""
    names = list(timed.gflops)
    peaks = ["peak, GFLOP/s", "", *(f"{timed.gflops[name]:.0f}" for name in names)]
    rows = [
        [tail, n, *(f"{100 * share[name]:.1f}" if name in share else "-" for name in names)]
        for tail, cases in gemm_share(timed, tails).items()
        for n, share in cases.items()
    ]
    title = f"arithmetic of a step, % of the runtime's own GEMM peak, threads: {threads}\n"
    return title + table(["tail", "batch", *names], [peaks, *rows])


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> str:
    """Memory, start and disk of each engine."""
    rows = [
        [
            name,
            ", ".join(f"{mb:.0f} at {int(k):,}" for k, mb in cost.get("rss_mb", {}).items()) or "-",
            _cell(cost.get("peak_mb"), 0),
            _cell(cost.get("import_s"), 2),
            _cell(cost.get("load_s"), 2),
            _cell(cost.get("disk_mb"), 0),
            str(cost.get("error", "")),
        ]
        for name, cost in costs.items()
    ]
    head = ["one thread", "MB resident at steps", "peak", "import s", "load s", "MB on disk", ""]
    return table(head, rows)


def artifact_table(tails: Mapping[str, Any]) -> str:
    """Bytes in the bundle for each engine."""
    rows = [
        [name, *(_kilo(told["artifact_bytes"].get(engine)) for engine in ARTIFACTS)]
        for name, told in tails.items()
    ]
    return "kB in the bundle, θ included\n" + table(["tail", *ARTIFACTS], rows)


def what_table() -> str:
    """The tails and their shapes."""
    rows = [
        [case.name, _shape(case.latent), str(case.capacity), _options(case.options), case.what]
        for case in TAILS.values()
    ]
    return table(["tail", "latent", "classes", "options", "as in"], rows)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {list(value)}" for key, value in options.items() if value) or "-"


def table(head: Row, rows: Iterable[Row]) -> str:
    """Columns as wide as they must be, numbers to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _kilo(value: int | None) -> str:
    return _cell(None if value is None else value / 1e3, 0)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
