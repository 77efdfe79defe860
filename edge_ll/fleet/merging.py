"""From collected tails to a published bundle: average, measure, decide, sign, push."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from edge_ll.bundle import Bundle
from edge_ll.fleet.evaluation import Evaluate
from edge_ll.fleet.merge import (
    Float32,
    TailUpdate,
    Verdict,
    check_updates,
    federated_average,
    gate,
)
from edge_ll.fleet.publishing import BUNDLES, store_bundle, write_merged
from edge_ll.fleet.registry import Registry
from edge_ll.fleet.rounds import CollectResult
from edge_ll.messages import BundleRef
from edge_ll.metrics import Counts, total
from edge_ll.trust import Signer, TrustStore

log = logging.getLogger(__name__)

UNDER_ALARM = "under drift alarm"


@dataclass(frozen=True)
class MergeResult:
    """What a merge round came to; accuracies are shares of 1 on the whole hold-out.

    Attributes:
        accepted: Whether a new bundle was published.
        reasons: Why not, in sentences.
        merged_acc: The merged tail; None where there was nothing to merge.
        best_single_acc: The best device's own tail.
        base_acc: The bundle that is desired now.
        single_accs: Each merged device's own tail.
        bundle: The new bundle.
        left_out: Devices that did not take part, and why.
    """

    accepted: bool
    reasons: tuple[str, ...]
    merged_acc: float | None
    best_single_acc: float | None
    base_acc: float
    single_accs: dict[str, float] = field(default_factory=dict)
    bundle: BundleRef | None = None
    left_out: dict[str, str] = field(default_factory=dict)


class Merger:
    """Merges on behalf of one tenant."""

    def __init__(
        self,
        registry: Registry,
        *,
        tenant: str,
        folder: Path,
        trust: TrustStore,
        signer: Signer,
        clock: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._tenant = tenant
        self._folder = folder
        self._trust = trust
        self._signer = signer
        self._clock = clock

    def without_alarms(
        self, devices: Sequence[str], digest: str
    ) -> tuple[list[str], dict[str, str]]:
        """Devices without a drift alarm on a bundle, and the others with the reason."""
        alarms = self._registry.alarms(self._tenant, bundle_digest=digest)
        alarmed = {alarm.device for alarm in alarms}
        asked = [device for device in dict.fromkeys(devices) if device not in alarmed]
        return asked, {device: UNDER_ALARM for device in devices if device in alarmed}

    def merge(
        self,
        base: Bundle,
        collected: CollectResult,
        evaluate: Evaluate,
        *,
        max_forgetting: float,
        norm_factor: float,
        left_out: Mapping[str, str],
    ) -> MergeResult:
        """Average the usable tails and publish the result if it passes the gate."""
        theta, known = base.theta(), base.manifest.known_classes
        before = evaluate(theta, known)
        checked = check_updates(theta, collected.updates, norm_factor=norm_factor)
        # An alarm may have been raised while the tails were on their way.
        _, alarmed = self.without_alarms([item.device for item in checked.kept], base.digest)
        kept = [item for item in checked.kept if item.device not in alarmed]
        left_out = {**left_out, **collected.missing, **checked.left_out, **alarmed}
        base_acc = total(before.values()).accuracy
        if not kept:
            result = MergeResult(
                accepted=False,
                reasons=("no device sent an update that could be merged.",),
                merged_acc=None,
                best_single_acc=None,
                base_acc=base_acc,
                left_out=left_out,
            )
            _tell(result)
            return result
        singles = {item.device: _single(item, known, evaluate) for item in kept}
        merged = federated_average(kept)
        classes = sorted({*known, *(index for item in kept for index in item.classes)})
        after = evaluate(merged, classes)
        verdict = gate(
            before, after, max_forgetting=max_forgetting, groups_to_keep=_known_groups(base)
        )
        ref = None
        if verdict.accepted:
            figures = _figures(base_acc, max(singles.values()), after)
            devices = [item.device for item in kept]
            ref = self._publish(base, merged, devices, classes, figures)
            if ref is None:
                lost = "another bundle became the desired one during the round."
                verdict = Verdict(accepted=False, reasons=(lost,))
        result = MergeResult(
            accepted=verdict.accepted,
            reasons=verdict.reasons,
            merged_acc=total(after.values()).accuracy,
            best_single_acc=max(singles.values()),
            base_acc=base_acc,
            single_accs=singles,
            bundle=ref,
            left_out=left_out,
        )
        _tell(result)
        return result

    def _publish(
        self,
        base: Bundle,
        theta: Float32,
        devices: Sequence[str],
        classes: Sequence[int],
        figures: Mapping[str, float],
    ) -> BundleRef | None:
        """The new bundle; None when ``base`` is no longer the desired one."""
        with TemporaryDirectory(dir=self._folder / BUNDLES, prefix="merge-") as staging:
            path = Path(staging) / "merged.bundle"
            write_merged(
                path,
                base,
                theta,
                devices=devices,
                classes=classes,
                metrics=figures,
                created_at_s=self._clock(),
                signer=self._signer,
            )
            ref = store_bundle(self._registry, self._folder, path, trust=self._trust)
        # Somebody may have pushed while the round ran: what people push wins.
        won = self._registry.set_desired(self._tenant, ref.digest, expected=base.digest)
        return ref if won else None


def _single(update: TailUpdate, known: Sequence[int], evaluate: Evaluate) -> float:
    classes = sorted({*known, *update.classes})
    return total(evaluate(update.theta, classes).values()).accuracy


def _known_groups(base: Bundle) -> list[str]:
    """Anchor groups of which the bundle can predict at least one class."""
    known = set(base.manifest.known_classes)
    return [name for name, classes in base.manifest.anchor_groups.items() if known & set(classes)]


def _figures(base_acc: float, best_single: float, after: Mapping[str, Counts]) -> dict[str, float]:
    overall = {
        "holdout_base_acc": base_acc,
        "holdout_best_single_acc": best_single,
        "holdout_merged_acc": total(after.values()).accuracy,
    }
    groups = {f"holdout_acc_{name}": item.accuracy for name, item in after.items() if item.n}
    return {**overall, **groups}


def _tell(result: MergeResult) -> None:
    fields = {
        "merged_acc": result.merged_acc,
        "base_acc": result.base_acc,
        "best_single_acc": result.best_single_acc,
        "left_out": len(result.left_out),
    }
    if result.accepted and result.bundle is not None:
        log.info("merge.accepted", extra={**fields, "version": result.bundle.version})
    else:
        log.warning("merge.refused", extra={**fields, "reason": " ".join(result.reasons)})
