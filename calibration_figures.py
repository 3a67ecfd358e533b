"""The eight figures of a calibration study, each drawn from its records; no model and no command line.

    draw_figures(study, report, Path("figures"))     # of calibration_demo.calibration_study and study_report

A figure that cannot be drawn of these rows is left out, with a note.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import calibration_metrics as metrics
import decisions
import plotting
from calibration_metrics import bins_of
from command_line import SHOW_AFTER_S, one_line, printable, progress
from plotting import Curve

if TYPE_CHECKING:
    from calibration import Recipe, Scores
    from calibration_demo import CalibrationStudy

LABEL_COUNTS = (50, 100, 200, 500, 1000)
REPEATS = 40  # subsamples for each label count
SPREAD = (0.05, 0.5, 0.95)  # quantiles of the repeats


def draw_figures(study: CalibrationStudy, report: Mapping, folder: Path) -> None:
    """The eight figures."""
    chosen, where = report["chosen"], caption_words(study)
    (raw, calibrated), (raw_correct, correct) = study.confidences.values(), study.correct.values()
    both = ("raw", raw, raw_correct), (chosen, calibrated, correct)
    model, tested = printable(report["model"]), printable(Path(study.test.source).name)
    with missing_at_most():
        plotting.raw_confidence_histogram(
            folder / "raw_confidence_histogram.png", raw, raw_correct, model=model, source=tested
        )
    with missing_at_most():
        plotting.reliability_diagrams(
            folder / "reliability_by_method.png",
            panels_by_method(study, report),
            what="raw and the calibrated confidence",
            where=f"{where}; raw: nothing fitted",
            height=3.8,
        )
    with missing_at_most():
        plotting.business_reliability(
            folder / "business_reliability.png",
            [reliability_curve([confidence], right, name) for name, confidence, right in both],
            [[band["n"] for band in bands] for bands in report["buckets"].values()],
            decisions.BUCKETS,
            lowest=min(raw.min(), calibrated.min()),
            where=where,
        )
    gates = report["gates"]
    with missing_at_most():
        plotting.accuracy_threshold(folder / "accuracy_threshold.png", gates, where=f"{where}; calibrated: {chosen}")
    risks = {name: metrics.risk_coverage(confidence, right) for name, confidence, right in both}
    about = (
        f"{where}; raw: nothing fitted. Area: under the curve, lower is better. A calibrator of the confidence cannot "
        "move this curve; knowing which label was predicted can."
    )
    with missing_at_most():
        plotting.risk_coverage(folder / "risk_coverage.png", risks, about=about)
    with missing_at_most():
        draw_costs(study, report, folder)
    with missing_at_most():
        draw_label_counts(study, folder)


@contextmanager
def missing_at_most() -> Iterator[None]:
    """A figure that cannot be drawn of these rows costs that figure, not the report."""
    try:
        yield
    except (ValueError, ArithmeticError, LookupError) as error:
        print(f"note: a figure is missing: {one_line(error)}", file=sys.stderr)


def draw_costs(study: CalibrationStudy, report: Mapping, folder: Path) -> None:
    """What 1,000 rows cost at each threshold, with a band that resamples whole groups."""
    test, seed, where = study.test, study.seed, caption_words(study)
    prices = {key: report["settings"][key] for key in ("review_cost", "error_cost")}
    thresholds, curves = np.linspace(0.4, 1, 121), []
    names = "raw", report["chosen"]
    for name, confidence, right in zip(names, study.confidences.values(), study.correct.values(), strict=True):
        costs = decisions.cost_band(confidence, right, thresholds, **prices, groups=test.groups, seed=seed)
        cost, low, high = 1000 * costs.T
        curves.append(Curve(name, thresholds, cost, low, high))
    optimum = report["cost_optimal_threshold"]
    plotting.cost_curve(folder / "cost_curve.png", curves, **prices, optimum=optimum, where=where, seed=seed)


def draw_label_counts(study: CalibrationStudy, folder: Path) -> None:
    """The two figures of how many labels it takes."""
    recipe, fit, seed = study.fitted.recipe, study.fit, study.seed
    if recipe.relabel:
        raise ValueError("how many labels it takes is not drawn where calibration changes predictions")
    test = None if study.test is fit else study.test.scores
    found = few_labels(recipe, fit.scores, fit.groups, test, seed)
    common = {"calibrator": str(recipe), "where": found.where, "repeats": REPEATS, "seed": seed}
    sizes = [size for size in found.calibrated if size >= 100] or list(found.calibrated)
    curves = {size: reliability_curve(found.calibrated[size], found.correct) for size in sizes}
    plotting.business_progression(folder / "business_progression.png", curves, decisions.BUCKETS, **common)
    panels = {threshold: automation_curves(found, threshold) for threshold in (0.7, 0.8, 0.9, 0.95)}
    plotting.sample_size(folder / "sample_size.png", panels, **common)


def caption_words(study: CalibrationStudy) -> str:
    """What a caption says of its numbers: n, protocol, and the files."""
    tested, fitted = (printable(Path(rows.source).name) for rows in (study.test, study.fit))
    how = "each row by a calibrator that did not see its group"
    if study.protocol == "held-out":
        how = f"fitted on {len(study.fit.rows):,} rows of {fitted}"
    return f"{study.where} ({tested}, {how})"


def panels_by_method(study: CalibrationStudy, report: Mapping) -> list[plotting.ReliabilityPanel]:
    """Before and after the article's three calibrators."""
    shown = {"raw": study.confidences["raw"]}
    for method in ("platt", "isotonic", "temperature"):
        shown |= {str(recipe): found for recipe, found in study.calibrated.items() if recipe.method == method}
    if study.fitted.recipe.relabel:
        shown |= {str(recipe): found for recipe, found in study.calibrated.items()}
    panels = []
    for name, confidence in shown.items():
        right = study.correct["raw" if name == "raw" else "calibrated"]
        row, bins = report["metrics"][name], metrics.reliability_bins(confidence, right)
        numbers = f"ECE {row['ece']:.3f} ({row['ece_noise_floor']:.3f}), log loss {row['log_loss']:.3f}"
        panels.append(plotting.ReliabilityPanel(f"{name}\n{numbers}", bins, plotting.color_of(name)))
    return panels


# How many labels a calibrator needs: fitted on random subsamples of the labels, applied to the same other rows


@dataclass(frozen=True)
class LabelCounts:
    """Calibrators fitted on few labels, many times, each applied to the same test rows."""

    correct: np.ndarray  # [test rows]
    calibrated: dict[int, np.ndarray]  # labels -> [repeats, test rows]
    where: str


def few_labels(
    recipe: Recipe, scores: Scores, groups: np.ndarray, test: Scores | None = None, seed: int = 0
) -> LabelCounts:
    """Fit the recipe on whole groups of 50 to 1,000 labels, many times; without test rows, half of the groups are.

    More than half of the labels are fitted to once. Of more test rows than metrics.MOST_ROWS, as many are drawn.
    """
    from sklearn.model_selection import GroupShuffleSplit

    protocol = "held-out"
    if test is None:
        halves = GroupShuffleSplit(1, test_size=0.5, random_state=seed)
        train, rest = next(halves.split(groups, groups=groups))
        scores, groups, test = scores[train], groups[train], scores[rest]
        protocol = "held-out but for the choice of the method, which saw all rows"
    n, draw, calibrated = len(scores.correct), np.random.default_rng(seed), {}
    tested = f"{len(test.correct):,}"
    if len(test.correct) > metrics.MOST_ROWS:
        test = test[np.sort(draw.choice(len(test.correct), metrics.MOST_ROWS, replace=False))]
        tested = f"{len(test.correct):,} drawn from {tested}"
    # Subsamples of more than half of the labels are nearly the same: many would look surer than they are.
    times = {size: REPEATS if 2 * size <= n else 1 for size in LABEL_COUNTS if size <= n} or {n: 1}
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
    return LabelCounts(test.correct, calibrated, f"test n = {tested}, {protocol}")


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


def spread(repeats: Sequence[float]) -> np.ndarray:
    """Low end, middle and high end of the repeats [3]; a single one has no ends."""
    return np.quantile(repeats, SPREAD) if len(repeats) > 1 else np.array([np.nan, repeats[0], np.nan])


def automation_curves(found: LabelCounts, threshold: float) -> tuple[Curve, Curve]:
    """Share of the rows automated from a threshold on, and share of these that are right, by number of labels."""
    sizes, shares, accuracies = np.array(list(found.calibrated)), [], []
    for calibrated in found.calibrated.values():
        taken = calibrated >= threshold
        right = [found.correct[row].mean() for row in taken if row.any()] or [np.nan]
        shares.append(spread(taken.mean(axis=1)))
        accuracies.append(spread(right))
    (low, half, high), (least, middle, most) = np.transpose(shares), np.transpose(accuracies)
    share = Curve("share of rows automated", sizes, half, low, high)
    return share, Curve("right among them", sizes, middle, least, most)
