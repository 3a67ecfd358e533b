"""Predictions that calibration changes: what it does when the label that has become the most probable is the answer.

    after = relabelled_scores(scores, cross_fit_labels(VectorScalingCalibrator(), scores.probabilities, scores.truth))
    effect(scores, after, groups, seed=0)["accuracy_gain"]

A calibrator that keeps the prediction cannot repair a bias to one label: it can only say that the answer is doubtful.
Where the ranking of the rows is good, calibrated probabilities of all labels give better answers. Both are compared on
the same rows, the gains with paired intervals that resample whole groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

import calibration_metrics as metrics

if TYPE_CHECKING:
    from calibration import Scores


def relabelled_scores(scores: Scores, probabilities: np.ndarray) -> Scores:
    """The scores of the same rows when these probabilities [n, labels] decide."""
    correct = probabilities.argmax(axis=1) == scores.truth
    return replace(scores, probabilities=probabilities, confidence=probabilities.max(axis=1), correct=correct)


def effect(
    before: Scores, after: Scores, groups: Sequence[object], seed: int = 0
) -> dict[str, float | int | bool | str]:
    """How many predictions have changed, and what that did to accuracy and to the log loss of P(label).

    A gain is after better than before, with a 95 % interval, NAME_low and NAME_high; `above_commonest` is the accuracy
    after, less that of always answering the commonest label. It `helps` when all three intervals lie above 0.
    """
    was, now = before.probabilities.argmax(axis=1), after.probabilities.argmax(axis=1)
    losses = [metrics.label_losses(scores.probabilities, scores.truth) for scores in (before, after)]
    commonest = np.bincount(before.truth).argmax()
    now_right = after.correct.astype(float)
    gained = np.stack(
        [now_right - before.correct, losses[0] - losses[1], now_right - (before.truth == commonest)], axis=1
    )
    intervals = metrics.bootstrap_interval(lambda drawn: gained[drawn].mean(axis=0), groups, seed=seed)
    found = {
        "n": len(was),
        "changed": int((was != now).sum()),
        "became_right": int((after.correct & ~before.correct).sum()),
        "became_wrong": int((before.correct & ~after.correct).sum()),
        "commonest_label": before.labels[commonest],
        "commonest_share": float((before.truth == commonest).mean()),
        "accuracy_before": float(before.correct.mean()),
        "accuracy_after": float(after.correct.mean()),
        "label_log_loss_before": float(losses[0].mean()),
        "label_log_loss_after": float(losses[1].mean()),
    }
    names = "accuracy_gain", "label_log_loss_gain", "above_commonest"
    for name, value, (low, high) in zip(names, gained.mean(axis=0).tolist(), intervals.tolist(), strict=True):
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return found | {"helps": all(found[f"{name}_low"] > 0 for name in names)}


def effect_text(found: Mapping, done: bool) -> str:
    """What a report says of it: of predictions that were changed, or, while they are not, whether that would help."""
    outcome = (
        f"{found['changed']:,} of {found['n']:,} predictions, {found['became_right']:,} of them become right and "
        f"{found['became_wrong']:,} wrong:\n"
        f"  accuracy {found['accuracy_before']:.3f} -> {found['accuracy_after']:.3f}, {found['protocol']}, a gain of "
        f"{_gain(found, 'accuracy_gain')}; always {found['commonest_label']!r}: {found['commonest_share']:.3f}\n"
        f"  log loss of P(label) {found['label_log_loss_before']:.3f} -> {found['label_log_loss_after']:.3f}, a gain "
        f"of {_gain(found, 'label_log_loss_gain')}"
    )
    if found["above_commonest_low"] <= 0:
        outcome += f"\n  That is not shown to beat always answering {found['commonest_label']!r}."
    if done:
        return f"Calibration has changed {outcome}"
    advice = "would help" if found["helps"] else "is not shown to help"
    return f"Letting calibration change predictions (--relabel) {advice}. It would change {outcome}"


def _gain(found: Mapping, name: str) -> str:
    return f"{found[name]:+.3f} [{found[f'{name}_low']:+.3f}, {found[f'{name}_high']:+.3f}]"
