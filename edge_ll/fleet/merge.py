"""Merging what devices learned: pure functions on θ and on counts, no IO.

The rule is weighted averaging (McMahan et al., AISTATS 2017). What a device sends is checked
before it weighs anything, and a gate on held-out data decides whether the result may ship.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from edge_ll.errors import DataError
from edge_ll.metrics import Counts, total

Float32 = npt.NDArray[np.float32]


WEIGHT_FACTOR = 2.0


@dataclass(frozen=True, eq=False)
class TailUpdate:
    """A tail that a device learned.

    Attributes:
        device: Who learned it.
        theta: float32 [P].
        samples: How many samples it was learned from: its weight.
        classes: What it can predict.
    """

    device: str
    theta: Float32
    samples: int
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checked:
    """Updates that may be merged, and why the others may not."""

    kept: tuple[TailUpdate, ...]
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Whether a merged tail may ship; ``reasons`` says why not."""

    accepted: bool
    reasons: tuple[str, ...] = ()


def check_updates(base: Float32, updates: Sequence[TailUpdate], *, norm_factor: float) -> Checked:
    """Leave out what is malformed or far off.

    An update whose distance to ``base`` (Euclidean) is more than ``norm_factor`` times the median
    distance is left out: bounding norms limits what one broken or hostile device can do (Sun et
    al., "Can you really backdoor federated learning?", 2019). With fewer than three updates there
    is no majority, and with a factor of 2 or more nothing is left out for its distance.

    How many samples an update stands for is the device's own claim, so it counts for at most
    :data:`WEIGHT_FACTOR` times the median claim.
    """
    left_out: dict[str, str] = {}
    norms: dict[str, float] = {}
    for update in updates:
        reason = _malformed(update, base)
        if reason is None:
            delta = update.theta.astype(np.float64) - base.astype(np.float64)
            norms[update.device] = float(np.linalg.norm(delta))
        else:
            left_out[update.device] = reason
    median = float(np.median(list(norms.values()))) if norms else 0.0
    for device, norm in norms.items():
        # A median of zero (most devices learned nothing) gives no scale to compare with.
        if median > 0 and norm > norm_factor * median:
            left_out[device] = (
                f"its change of {norm:.3g} is {norm / median:.1f} times the median {median:.3g}; "
                f"at most {norm_factor:g} times is allowed"
            )
    kept = [update for update in updates if update.device not in left_out]
    most = int(WEIGHT_FACTOR * float(np.median([update.samples for update in kept] or [0])))
    return Checked(
        tuple(replace(update, samples=min(update.samples, max(most, 1))) for update in kept),
        left_out,
    )


def federated_average(updates: Sequence[TailUpdate]) -> Float32:
    """The sample-weighted mean of the tails, summed in float64: float32 [P].

    McMahan et al., "Communication-efficient learning of deep networks from decentralized data",
    AISTATS 2017, algorithm 1.

    Raises:
        DataError: No updates, differing lengths, no samples, or values that are not finite.
    """
    if not updates:
        raise DataError("expected at least one update to average, got none")
    first = updates[0].theta
    for update in updates:
        reason = _malformed(update, first)
        if reason is not None:
            raise DataError(f"{update.device}: {reason}")
    weight = float(sum(update.samples for update in updates))
    accumulated = np.zeros(len(first), np.float64)
    for update in updates:
        accumulated += update.theta.astype(np.float64) * (update.samples / weight)
    return accumulated.astype(np.float32)


def gate(
    before: Mapping[str, Counts],
    after: Mapping[str, Counts],
    *,
    max_forgetting: float,
    groups_to_keep: Collection[str],
) -> Verdict:
    """Decide on held-out counts whether a merged tail may replace the current one.

    Args:
        before: Counts of the current bundle per anchor group.
        after: Counts of the merged tail on the same samples.
        max_forgetting: How much accuracy a group may lose, as a share of 1.
        groups_to_keep: What the current bundle already knew.

    Returns:
        Refused when a group to keep loses more than that or is not measured, or when the
        accuracy over all groups does not rise.
    """
    reasons: list[str] = []
    for group in groups_to_keep:
        old, new = before.get(group, Counts(0, 0)), after.get(group, Counts(0, 0))
        if not old.n or not new.n:
            reasons.append(f"group {group!r} must be kept, but the hold-out has no sample of it.")
        # The tolerance is for rounding: 0.95 - 0.90 is more than 0.05 in binary.
        elif old.accuracy - new.accuracy > max_forgetting + 1e-9:
            reasons.append(
                f"group {group!r} falls from {_share(old)} to {_share(new)}, by "
                f"{100 * (old.accuracy - new.accuracy):.1f} points; "
                f"at most {100 * max_forgetting:.1f} are allowed."
            )
    old, new = total(before.values()), total(after.values())
    if not old.n or not new.n:
        reasons.append("the hold-out is empty, so nothing shows an improvement.")
    elif new.accuracy <= old.accuracy:
        reasons.append(
            f"accuracy on the whole hold-out does not rise: {_share(old)} before, "
            f"{_share(new)} after."
        )
    return Verdict(not reasons, tuple(reasons))


def _malformed(update: TailUpdate, like: Float32) -> str | None:
    theta = update.theta
    if theta.dtype != np.float32 or theta.shape != like.shape:
        return f"expected float32 {list(like.shape)}, got {theta.dtype} {list(theta.shape)}"
    if not np.isfinite(theta).all():
        return f"{int((~np.isfinite(theta)).sum())} of {theta.size} values are not finite"
    if update.samples < 1:
        return "it was learned from no sample"
    return None


def _share(counts: Counts) -> str:
    return f"{100 * counts.accuracy:.1f} % ({counts.correct} of {counts.n})"
