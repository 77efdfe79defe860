"""The verbs of the server side: ``train``, ``export``, ``inspect`` and ``verify``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ll.cli.extras import need
from edge_ll.terminal import CHECK_FAILED, OK

if TYPE_CHECKING:
    from edge_ll.bundle import Bundle
    from edge_ll.manifest import Manifest
    from edge_ll_export.parity import Parity


def add_train(subparsers: Any) -> None:
    """Add ``train``."""
    train = _verb(subparsers, "train", "pre-train a teacher and distil a student from it", _train,
                  "edge-ll train export/recipes/digits.toml --out runs/digits")  # fmt: skip
    train.add_argument("recipe", type=Path, help="a recipe in TOML")
    train.add_argument("--out", type=Path, required=True, help="folder for the trained student")


def add_export(subparsers: Any) -> None:
    """Add ``export``."""
    export = _verb(subparsers, "export", "turn a trained student into a signed bundle", _export,
                   "edge-ll export runs/digits --out my.bundle --key signing.pem")  # fmt: skip
    export.add_argument("run_folder", type=Path, help="folder written by `edge-ll train`")
    export.add_argument("--out", type=Path, required=True, help="the bundle to write")
    export.add_argument(
        "--key", type=Path, required=True, help="private key; made, with its .pub, if missing"
    )
    export.add_argument("--version", type=int, default=1, help="version of the bundle (1)")


def add_inspect(subparsers: Any) -> None:
    """Add ``inspect``."""
    inspect = _verb(subparsers, "inspect", "show what a bundle holds", _inspect,
                    "edge-ll inspect my.bundle --trust signing.pem.pub")  # fmt: skip
    _bundle(inspect)


def add_verify(subparsers: Any) -> None:
    """Add ``verify``."""
    verify = _verb(subparsers, "verify", "check a bundle, and its engines against torch", _verify,
                   "edge-ll verify my.bundle --trust signing.pem.pub")  # fmt: skip
    _bundle(verify)
    verify.add_argument("--engine", choices=("all", "step-graph", "ort-training"), default="all")
    verify.add_argument("--steps", type=int, default=100, help="training steps to compare (100)")


def _verb(subparsers: Any, name: str, text: str, run: Any, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=text, description=text, epilog=f"example: {example}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    return parser


def _bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a bundle's file")
    parser.add_argument("--trust", type=Path, required=True, help="public key (*.pub)")


def _open(arguments: argparse.Namespace) -> Bundle:
    from edge_ll.bundle import Bundle
    from edge_ll.trust import TrustStore

    return Bundle.open(arguments.bundle, TrustStore.from_file(arguments.trust))


def _train(arguments: argparse.Namespace) -> int:
    need("export", "training")
    from dataclasses import asdict

    from edge_ll import config
    from edge_ll_export.pipeline import save_trained, train
    from edge_ll_export.recipe import Recipe

    recipe = config.load(arguments.recipe, Recipe)

    def told(stage: str, epoch: int, epochs: int, loss: float) -> None:
        if not arguments.json and (epoch == epochs or epoch % 10 == 0):
            print(f"{stage}: epoch {epoch}/{epochs}, loss {loss:.4f}", flush=True)

    trained = train(recipe, on_progress=told)
    save_trained(trained, arguments.out, arguments.recipe)
    metrics = asdict(trained.metrics)
    if arguments.json:
        print(json.dumps(metrics))
    else:
        for name, value in metrics.items():
            print(f"{name:28} {value:.4f}")
        print(
            f"next: edge-ll export {arguments.out} --out {recipe.name}-1.bundle --key signing.pem"
        )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    need("export", "exporting")
    from edge_ll.trust import Signer
    from edge_ll_export.pack import export_bundle
    from edge_ll_export.pipeline import load_trained

    trained = load_trained(arguments.run_folder)
    signer = Signer.load_or_create(arguments.key)
    bundle, parities = export_bundle(
        trained,
        arguments.out,
        signer,
        version=arguments.version,
        on_stage=lambda text: None if arguments.json else print(f"- {text}", flush=True),
    )
    return _print_parities(bundle, parities, arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    import msgspec

    bundle = _open(arguments)
    manifest = bundle.manifest
    if arguments.json:
        plain = msgspec.to_builtins(manifest)
        print(json.dumps({"digest": bundle.digest, "signed_by": bundle.key_id} | plain))
        return 0
    rows = {
        "bundle": f"{manifest.name} version {manifest.version}, format {manifest.format}",
        "digest": bundle.digest,
        "signed by": bundle.key_id,
        "size": f"{bundle.size_bytes:,} bytes in {len(manifest.files)} files",
        "input": f"{manifest.input.dtype} {list(manifest.input.shape)}",
        "latent": f"{manifest.latent.dtype} {list(manifest.latent.shape)}",
        "backbone": _backbone(manifest),
        "tail": f"{manifest.theta_size:,} parameters in {len(manifest.theta)} tensors",
        "labels": ", ".join(manifest.labels),
        "knows": ", ".join(manifest.labels[c] for c in manifest.known_classes),
        "engines": ", ".join(manifest.engines),
        "made from": manifest.provenance.recipe,
        "merged from": ", ".join(manifest.provenance.merged_from) or "-",
        "metrics": ", ".join(f"{k} {v:.4f}" for k, v in manifest.provenance.metrics.items()),
    }
    for name, value in rows.items():
        print(f"{name:12} {value}")
    return 0


def _backbone(manifest: Manifest) -> str:
    """The shipped precision, and what int8 cost and gained where it was tried."""
    figures = manifest.provenance.metrics
    if "backbone_int8_acc_change" not in figures:
        return manifest.backbone_precision
    tried = "" if manifest.backbone_precision == "int8" else "; int8 was tried and left out"
    return (
        f"{manifest.backbone_precision}{tried}: int8 changes the accuracy by "
        f"{figures['backbone_int8_acc_change']:+.4f} on {figures['backbone_int8_acc_n']:.0f} "
        f"samples, is {figures['backbone_int8_speedup']:.2f} times as fast at batch 1"
    )


def _verify(arguments: argparse.Namespace) -> int:
    bundle = _open(arguments)
    need("export", "comparing engines with torch")
    from edge_ll_export.parity import check_parity, tail_of

    tail = tail_of(bundle)
    engines = bundle.manifest.engines if arguments.engine == "all" else (arguments.engine,)
    parities = [check_parity(bundle, name, tail, steps=arguments.steps) for name in engines]
    return _print_parities(bundle, parities, arguments)


def _print_parities(bundle: Bundle, parities: list[Parity], arguments: argparse.Namespace) -> int:
    import msgspec

    ok = all(parity.ok for parity in parities)
    if arguments.json:
        plain = [msgspec.to_builtins(parity) | {"ok": parity.ok} for parity in parities]
        precision = bundle.manifest.backbone_precision
        print(json.dumps({
            "digest": bundle.digest, "ok": ok, "engines": plain, "backbone_precision": precision,
            "metrics": bundle.manifest.provenance.metrics,
        }))  # fmt: skip
    else:
        print(f"{bundle.manifest.name} {bundle.manifest.version}: {bundle.size_bytes:,} bytes, "
              f"signed by {bundle.key_id}, all hashes match")  # fmt: skip
        print("worst difference from torch, absolute and as a share of the largest value:")
        for parity in parities:
            print(f"  {parity.engine} on {parity.runtime}, {parity.provider}:"
                  f" {'ok' if parity.ok else 'FAILED'}")  # fmt: skip
            for name in ("logits", "losses", "gradients", "theta"):
                gap = getattr(parity, name)
                shown = f"θ after {parity.steps} steps" if name == "theta" else name
                print(f"    {shown:22} {gap.absolute:.1e}  {gap.relative:.1e}")
    return OK if ok else CHECK_FAILED
