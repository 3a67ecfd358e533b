"""How many labels a calibrator needs: fitted on random subsamples of the labels, applied to the same other rows.

found = few_labels(recipe, scores, groups, test_scores)
reliability_curve(found.calibrated[100], found.correct)    # with the spread of what 100 labels would have given
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration_metrics import bins_of
from command_line import SHOW_AFTER_S, progress
from plotting import Curve

if TYPE_CHECKING:
    from calibration import Recipe, Scores

LABEL_COUNTS = (50, 100, 200, 500, 1000)
REPEATS = 40  # subsamples for each label count
SPREAD = (0.05, 0.5, 0.95)  # quantiles of the repeats


@dataclass(frozen=True)
class LabelCounts:
    """Calibrators fitted on few labels, many times, each applied to the same test rows."""

    correct: np.ndarray  # [test rows]
    calibrated: dict[int, np.ndarray]  # labels -> [repeats, test rows]
    where: str


def few_labels(
    recipe: Recipe, scores: Scores, groups: np.ndarray, test: Scores | None = None, seed: int = 0
) -> LabelCounts:
    """Fit the recipe on whole groups of 50 to 1,000 labels, many times; without test rows, half of the groups are."""
    from sklearn.model_selection import GroupShuffleSplit

    protocol = "held-out"
    if test is None:
        halves = GroupShuffleSplit(1, test_size=0.5, random_state=seed)
        train, rest = next(halves.split(groups, groups=groups))
        scores, groups, test = scores[train], groups[train], scores[rest]
        protocol = "held-out but for the choice of the method, which saw all rows"
    n, draw, calibrated = len(scores.correct), np.random.default_rng(seed), {}
    times = {size: REPEATS if size < n else 1 for size in LABEL_COUNTS if size <= n} or {n: 1}
    with progress(sum(times.values()), 0, "fits on few labels", after_s=SHOW_AFTER_S) as advance:
        for size in times:
            answers = []
            for _ in range(times[size]):
                rows = scores[some_groups(groups, size, draw)]
                if 0 < rows.correct.sum() < size and len(np.unique(rows.truth)) > 1:
                    fitted = recipe.estimator().fit(*recipe.inputs(rows))
                    answers.append(fitted.predict(recipe.inputs(test)[0]))
                advance(1)
            if answers:
                calibrated[size] = np.array(answers)
    return LabelCounts(test.correct, calibrated, f"test n = {len(test.correct):,}, {protocol}")


def some_groups(groups: np.ndarray, size: int, draw: np.random.Generator) -> np.ndarray:
    """The numbers of `size` rows, whole groups but for the last."""
    _, index = np.unique(groups, return_inverse=True)
    return np.argsort(draw.permutation(index.max() + 1)[index], kind="stable")[:size]


def reliability_curve(calibrated: np.ndarray, correct: np.ndarray, name: str = "accuracy") -> Curve:
    """Median accuracy of each of ten bins over confidences [repeats, n], where half of the repeats have rows."""
    bins = [bins_of(confidence, correct, 10) for confidence in calibrated]
    confidence, accuracy = np.array([each.confidence for each in bins]), np.array([each.accuracy for each in bins])
    often = np.isfinite(confidence).mean(axis=0) >= 0.5
    low, half, high = np.nanquantile(accuracy[:, often], SPREAD, axis=0)
    middle = np.nanmedian(confidence[:, often], axis=0)
    return Curve(name, middle, half, low, high) if len(calibrated) > 1 else Curve(name, middle, half)


def automation_curves(found: LabelCounts, threshold: float) -> tuple[Curve, Curve]:
    """Share of the rows automated from a threshold on, and share of these that are right, by number of labels."""
    sizes, shares, accuracies = np.array(list(found.calibrated)), [], []
    for calibrated in found.calibrated.values():
        taken = calibrated >= threshold
        right = [found.correct[row].mean() for row in taken if row.any()] or [np.nan]
        shares.append(np.quantile(taken.mean(axis=1), SPREAD))
        accuracies.append(np.quantile(right, SPREAD))
    (low, half, high), (least, middle, most) = np.transpose(shares), np.transpose(accuracies)
    share = Curve("share of rows automated", sizes, half, low, high)
    return share, Curve("right among them", sizes, middle, least, most)
