"""The whole workflow on a predictions file: is the confidence true, how to make it so, what to automate, at what cost.

    python calibration_demo.py                                            # the recorded predictions of this repository
    python calibration_demo.py mine.jsonl --target-accuracy 0.95          # one file: every number out-of-fold
    python calibration_demo.py --calibrate-on cal.jsonl --test-on test.jsonl --error-cost 50 --html

Reads labelled predictions files, no model and no torch. Prints what to act on (--verbose: everything) and writes into
--output-dir: calibrator.json (for `logprobs_confidence.py --calibrator`), report.json, decisions.csv and eight figures;
with --html also report.html, one page with a threshold to move, which needs no network.

With two files everything is fitted and chosen on the first and measured on the second (held-out). With one, each row is
measured by a calibrator that did not see its group (out-of-fold), and the figures that need separate test rows use a
fixed half of the groups. Nothing here is measured on the rows it was fitted on. In a program:

    study = calibration_study(labelled_rows("cal.jsonl"), labelled_rows("test.jsonl"), target_accuracy=0.8)
    report = study_report(study, review_cost=5, error_cost=50)
    print(text_report.report_text(report))
    draw_figures(study, report, Path("figures"))
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

import calibration_metrics as metrics
import command_line
import decisions
import html_report
import label_counts
import plotting
import predictions
import tables
import text_report
from command_line import one_line, printable

if TYPE_CHECKING:
    from calibration import FittedCalibrator, Recipe, Scores

ROOT = Path(__file__).resolve().parent
RECORDED = ("predictions/base_calibration.jsonl", "predictions/base_test.jsonl", "sentiment/splits.csv")  # in data/
METHOD_NAMES = ("platt", "temperature", "beta", "isotonic", "venn-abers")  # calibration.METHODS, which imports slowly
TARGETS = (0.8, 0.85, 0.9, 0.95)  # of the guarantees, beside --target-accuracy
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class LabelledRows:
    """The scored rows of a predictions file, as records and as arrays, and which of them belong together."""

    source: str
    rows: list[predictions.Prediction]
    scores: Scores
    groups: np.ndarray  # the number of each row's group [n]
    grouped_by: str | None  # a table of id and group; None: near-duplicate texts
    unscored: int


@dataclass(frozen=True)
class CalibrationStudy:
    """Test rows with their raw and calibrated confidences, and what the calibrators were fitted on."""

    fit: LabelledRows  # what the calibrators may see
    test: LabelledRows  # the same rows when out-of-fold
    fitted: FittedCalibrator
    candidates: dict[Recipe, np.ndarray]  # out-of-fold confidences [seeds, n] of the fit rows
    calibrated: dict[Recipe, np.ndarray]  # test rows' confidences by each calibrator that is shown
    near_duplicates: int  # test rows with one among the fit rows
    method: str
    seed: int

    @property
    def protocol(self) -> str:
        return "out-of-fold" if self.test is self.fit else "held-out"

    @property
    def where(self) -> str:
        """What every table and figure says of its numbers: n, groups if rows belong together, and the protocol."""
        n, groups = len(self.test.rows), len(np.unique(self.test.groups))
        return f"n = {n:,}{f' in {groups:,} groups' if groups < n else ''}, {self.protocol}"

    @property
    def confidences(self) -> dict[str, np.ndarray]:
        """The test rows' raw confidences, and the chosen calibrator's."""
        return {"raw": self.test.scores.confidence, "calibrated": self.calibrated[self.fitted.recipe]}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    fit = labelled_rows(args.predictions or args.calibrate_on, args.groups)
    test = None if args.predictions else labelled_rows(args.test_on, args.groups)
    study = calibration_study(
        fit, test, method=args.method, target_accuracy=args.target_accuracy, delta=args.delta, seed=args.seed
    )
    report = study_report(study, review_cost=args.review_cost, error_cost=args.error_cost, volume=args.volume)
    print(text_report.report_text(report, args.verbose))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".") as part:  # all files or none
        write_files(study, report, Path(part))
        draw_figures(study, report, Path(part))
        if args.html:
            page = html_report.page_data(report, study.test.rows, study.confidences["calibrated"])
            html_report.write_page(Path(part) / "report.html", page)
        made = sorted(Path(part).iterdir())
        if blocked := [path.name for path in made if (folder / path.name).is_dir()]:
            raise ValueError(f"{folder / blocked[0]} is a folder; nothing was written")
        for path in made:
            path.replace(folder / path.name)
    names = ", ".join(path.name for path in made)
    print("\n" + textwrap.fill(f"Written to {printable(str(folder))}: {names}", 100, break_long_words=False))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("predictions", metavar="PREDICTIONS", nargs="?", help="one labelled predictions file, cross-fitted")
    add("--calibrate-on", metavar="FILE", help="predictions to fit and choose on (default: the recorded ones)")
    add("--test-on", metavar="FILE", help="predictions to measure on, of other rows")
    add("--method", default="auto", choices=["auto", *METHOD_NAMES], help="the calibrator (default: auto)")
    add("--target-accuracy", type=float, default=0.9, metavar="A", help="of what is automated (default: 0.9)")
    add("--delta", type=float, default=0.05, metavar="D", help="risk that the guarantee fails (default: 0.05)")
    decisions.add_cost_arguments(parser)
    tables.add_groups_argument(parser)
    add("--seed", type=command_line.natural, metavar="N", default=0, help="of folds and resampling (default: 0)")
    add("--verbose", action="store_true", help="print every calibrator, predicted label, threshold and band, too")
    add("--html", action="store_true", help="also write report.html, a page with a threshold to move")
    add("--output-dir", default="calibration_report", metavar="FOLDER", help="default: calibration_report")
    args = parser.parse_args(argv)
    if args.predictions and (args.calibrate_on or args.test_on):
        parser.error("give either one predictions file or --calibrate-on and --test-on")
    if bool(args.calibrate_on) != bool(args.test_on):
        parser.error("--calibrate-on and --test-on belong together")
    if not args.predictions and not args.calibrate_on:
        args.calibrate_on, args.test_on, groups = (os.path.relpath(ROOT / "data" / path) for path in RECORDED)
        args.groups = args.groups or groups
    for name in ("target_accuracy", "delta"):
        if not 0 < getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: between 0 and 1, both excluded")
    decisions.check_cost_arguments(parser, args)
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        parser.error(f"--output-dir {args.output_dir} is a file")
    return args


# Fitting


def labelled_rows(path: str | os.PathLike, groups: str | None = None) -> LabelledRows:
    """Read a labelled predictions file; `groups` is a table of id and group (default: near-duplicates are found)."""
    from calibration import scores_of

    rows, unscored = predictions.read_labelled(path)
    numbers = metrics.group_numbers(tables.groups_of(rows, groups))
    return LabelledRows(str(path), rows, scores_of(rows), numbers, groups, unscored)


def calibration_study(
    fit: LabelledRows,
    test: LabelledRows | None = None,
    *,
    method: str = "auto",
    target_accuracy: float = 0.9,
    delta: float = 0.05,
    seed: int = 0,
) -> CalibrationStudy:
    """Choose and fit a calibrator, and apply it to rows it did not see; without test rows, out-of-fold to its own.

    ValueError when the test rows are another model's, or when one of them was fitted on.
    """
    from calibration import choose, rare_labels

    try:
        recipe, candidates = choose(fit.scores, fit.groups, method, range(seed, seed + 5))
    except ValueError as error:
        raise ValueError(f"{fit.source}: {error}") from None
    for label, count in rare_labels(fit.scores).items():
        said = f"{count} rows of {label!r}; what is guaranteed says next to nothing about that label"
        print(f"note: {fit.source} has {said}", file=sys.stderr)
    fitted = fit_calibrator(fit, recipe, candidates[recipe], target_accuracy, delta, seed)
    near_duplicates = 0
    if test is not None:
        first = test.rows[0]
        try:
            fitted.check(first.fingerprint, first.model, first.task, tuple(first.probabilities))
        except ValueError as error:
            raise ValueError(f"{test.source} does not fit {fit.source}: {error}") from None
        near_duplicates = tables.check_disjoint(fit.rows, test.rows, fit.source, test.source, test.grouped_by)
    calibrated = calibrated_by_method(recipe, fit, test, seed)
    return CalibrationStudy(fit, test or fit, fitted, candidates, calibrated, near_duplicates, method, seed)


def fit_calibrator(
    fit: LabelledRows, recipe: Recipe, out_of_fold: np.ndarray, target_accuracy: float, delta: float, seed: int
) -> FittedCalibrator:
    """The calibrator fitted on all rows, with its out-of-fold report card and the threshold of its guarantee.

    `out_of_fold` is [seeds, n]. The card is the first seed's; the threshold is chosen on the mean, which hangs less on
    one division into folds.
    """
    from calibration import FittedCalibrator

    first, threshold = fit.rows[0], guaranteed_threshold(fit, out_of_fold.mean(axis=0), target_accuracy, delta)
    common = {"groups": fit.groups, "protocol": "out-of-fold", "seed": seed}
    return FittedCalibrator(
        recipe=recipe,
        estimator=recipe.estimator().fit(*recipe.inputs(fit.scores)),
        labels=fit.scores.labels,
        fingerprint=first.fingerprint,
        model=first.model,
        task=first.task,
        n=len(fit.rows),
        groups=len(np.unique(fit.groups)),
        fitted_on=frozenset(tables.text_key(row.text) for row in fit.rows),
        report_card=metrics.calibration_metrics(out_of_fold[0], fit.scores.correct, **common),
        threshold=threshold | {"protocol": "cross-fitted"},
    )


def guaranteed_threshold(fit: LabelledRows, confidence: np.ndarray, target_accuracy: float, delta: float) -> dict:
    """The threshold record from one row of each group: an exact test takes rows that do not depend on each other."""
    alone = metrics.one_of_each(fit.groups)
    return decisions.choose_threshold(confidence[alone], fit.scores.correct[alone], target_accuracy, delta).record()


def calibrated_by_method(
    chosen: Recipe, fit: LabelledRows, test: LabelledRows | None, seed: int
) -> dict[Recipe, np.ndarray]:
    """Confidences of the test rows, or without any out-of-fold ones of the fit rows, by each calibrator to be shown.

    These are the chosen one, and every other method, given the same, that can be fitted.
    """
    from calibration import Recipe, cross_fit

    found = {}
    for method in (chosen.method, *METHOD_NAMES):
        recipe = Recipe(method, chosen.class_aware or method == "temperature")
        given, truth = recipe.inputs(fit.scores)
        try:
            if test is None:
                found[recipe] = cross_fit(recipe.estimator(), given, truth, fit.groups, seed=seed)
            else:
                found[recipe] = recipe.estimator().fit(given, truth).predict(recipe.inputs(test.scores)[0])
        except ValueError:  # rows, or a fold, without any error; the others can be shown
            continue
    return found


# Measuring


def study_report(
    study: CalibrationStudy, *, review_cost: float = 5.0, error_cost: float = 25.0, volume: int = 1000
) -> dict:
    """Every number of the report, as report.json has it; costs in dollars, the volume in predictions a day."""
    correct, confidences = study.test.scores.correct, study.confidences
    prices = {"review_cost": review_cost, "error_cost": error_cost}
    threshold = study.fitted.threshold
    targets = sorted({*TARGETS, threshold["target_accuracy"]})
    gates, buckets = {}, {}
    for name, confidence in confidences.items():
        gates[name] = decisions.priced_automation(confidence, correct, THRESHOLDS, volume, **prices)
        buckets[name] = decisions.buckets(confidence, correct)
    settings = {"method": study.method, "target_accuracy": threshold["target_accuracy"], "delta": threshold["delta"]}
    settings |= {**prices, "volume": volume, "groups": study.fit.grouped_by, "seed": study.seed}
    return {
        **study_facts(study),
        "settings": settings,
        "candidates": candidate_losses(study),
        "chosen": str(study.fitted.recipe),
        "metrics": metrics_by_calibrator(study),
        "log_loss_gain": log_loss_gain(study),
        "refinement": metrics.refinement_split(*confidences.values(), correct),
        "by_predicted_label": metrics.by_predicted_label(study.test.rows),
        "threshold": dict(threshold),
        "threshold_measured_protocol": "held-out" if study.protocol == "held-out" else "in-sample",
        "guarantees": [guarantee_at(study, target) for target in targets],
        "gates": gates,
        "buckets": buckets,
        "cost_optimal_threshold": decisions.cost_optimal_threshold(**prices),
        "cost_per_row": cost_per_row(confidences, correct, **prices),
    }


def study_facts(study: CalibrationStudy) -> dict:
    """Which model and which rows."""
    fitted, fit, test = study.fitted, study.fit, study.test
    return {
        "model": fitted.model,
        "task": fitted.task,
        "fingerprint": fitted.fingerprint,
        "calibrated_on": fit.source,
        "tested_on": test.source,
        "protocol": study.protocol,
        "where": study.where,
        "unscored": fit.unscored + (0 if test is fit else test.unscored),
        "near_duplicates_of_calibration_rows": study.near_duplicates,
        "calibration_rows": fitted.n,
        "calibration_groups": fitted.groups,
    }


def candidate_losses(study: CalibrationStudy) -> dict[str, dict]:
    """The out-of-fold log loss of each candidate on the fit rows, over the seeds."""
    found = {}
    for recipe, out_of_fold in study.candidates.items():
        losses = [metrics.log_loss(confidence, study.fit.scores.correct) for confidence in out_of_fold]
        found[str(recipe)] = {"log_loss": np.mean(losses), "sd_over_seeds": np.std(losses)}
    return found


def metrics_by_calibrator(study: CalibrationStudy) -> dict[str, dict]:
    """The report row of the raw confidence and of every calibrator that is shown."""
    test, common = study.test.scores, {"groups": study.test.groups, "seed": study.seed}
    found = {"raw": metrics.calibration_metrics(test.confidence, test.correct, **common)}
    for recipe, confidence in study.calibrated.items():
        row = metrics.calibration_metrics(confidence, test.correct, protocol=study.protocol, **common)
        found[str(recipe)] = row
    return found


def log_loss_gain(study: CalibrationStudy) -> list[float]:
    """(raw - calibrated log loss, low, high), paired: both losses are of the same rows in every bootstrap sample."""
    correct, (raw, calibrated) = study.test.scores.correct, study.confidences.values()

    def gain(rows: np.ndarray) -> list[float]:
        return [metrics.log_loss(raw[rows], correct[rows]) - metrics.log_loss(calibrated[rows], correct[rows])]

    interval = metrics.bootstrap_interval(gain, study.test.groups, seed=study.seed)
    return [*gain(np.arange(len(correct))), *interval[0]]


def guarantee_at(study: CalibrationStudy, target: float) -> dict:
    """What can be guaranteed from cross-fitted and from raw scores, and how the first fares on the test rows.

    With one file the test rows are those that chose the threshold, so that measurement is in-sample.
    """
    delta, cross_fitted = study.fitted.threshold["delta"], study.candidates[study.fitted.recipe].mean(axis=0)
    threshold = guaranteed_threshold(study.fit, cross_fitted, target, delta)
    measured = None
    if threshold["value"] is not None:
        calibrated, correct = study.confidences["calibrated"], study.test.scores.correct
        measured = decisions.automation(calibrated, correct, [threshold["value"]])[0]
    raw = guaranteed_threshold(study.fit, study.fit.scores.confidence, target, delta)
    return {"threshold": threshold, "measured": measured, "raw": raw}


def cost_per_row(
    confidences: Mapping[str, np.ndarray], correct: np.ndarray, review_cost: float, error_cost: float
) -> dict[str, float]:
    """Dollars a row at the cost-optimal threshold, and without any threshold."""
    threshold, found = decisions.cost_optimal_threshold(review_cost, error_cost), {}
    for name, confidence in confidences.items():
        found[name] = float(decisions.costs(confidence, correct, [threshold], review_cost, error_cost)[0])
    found["review everything"] = review_cost
    found["automate everything"] = float(error_cost * (1 - correct.mean()))
    return found


def write_files(study: CalibrationStudy, report: Mapping, folder: Path) -> None:
    """calibrator.json, report.json and decisions.csv."""
    from calibration import save_calibrator

    save_calibrator(folder / "calibrator.json", study.fitted)
    text = json.dumps(report, indent=1, allow_nan=False, default=float)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    value = study.fitted.threshold["value"]
    with open(folder / "decisions.csv", "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "prediction", "confidence", "calibrated_confidence", "decision", "bucket"])
        for row, confidence in zip(study.test.rows, study.confidences["calibrated"].tolist(), strict=True):
            names = map(spreadsheet_safe, (row.id, row.label, row.prediction))
            decision = "automate" if value is not None and confidence >= value else "review"
            numbers = f"{row.confidence:.6f}", f"{confidence:.6f}"
            writer.writerow([*names, *numbers, decision, decisions.bucket_of(confidence)])


def spreadsheet_safe(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return "'" + cell if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


# Figures


def draw_figures(study: CalibrationStudy, report: Mapping, folder: Path) -> None:
    """The eight figures."""
    correct, chosen, where = study.test.scores.correct, report["chosen"], caption_words(study)
    raw, calibrated = study.confidences.values()
    model, tested = printable(report["model"]), printable(Path(study.test.source).name)
    with missing_at_most():
        plotting.raw_confidence_histogram(
            folder / "raw_confidence_histogram.png", raw, correct, model=model, source=tested
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
            [label_counts.reliability_curve([c], correct, name) for name, c in (("raw", raw), (chosen, calibrated))],
            [[band["n"] for band in bands] for bands in report["buckets"].values()],
            decisions.BUCKETS,
            lowest=min(raw.min(), calibrated.min()),
            where=where,
        )
    gates = report["gates"]
    with missing_at_most():
        plotting.accuracy_threshold(folder / "accuracy_threshold.png", gates, where=f"{where}; calibrated: {chosen}")
    risks = {"raw": metrics.risk_coverage(raw, correct), chosen: metrics.risk_coverage(calibrated, correct)}
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
    for name, confidence in zip(("raw", report["chosen"]), study.confidences.values(), strict=True):
        costs = decisions.cost_band(
            confidence, test.scores.correct, thresholds, **prices, groups=test.groups, seed=seed
        )
        cost, low, high = 1000 * costs.T
        curves.append(plotting.Curve(name, thresholds, cost, low, high))
    optimum = report["cost_optimal_threshold"]
    plotting.cost_curve(folder / "cost_curve.png", curves, **prices, optimum=optimum, where=where, seed=seed)


def draw_label_counts(study: CalibrationStudy, folder: Path) -> None:
    """The two figures of how many labels it takes."""
    recipe, fit, seed = study.fitted.recipe, study.fit, study.seed
    test = None if study.test is fit else study.test.scores
    found = label_counts.few_labels(recipe, fit.scores, fit.groups, test, seed)
    common = {"calibrator": str(recipe), "where": found.where, "repeats": label_counts.REPEATS, "seed": seed}
    sizes = [size for size in found.calibrated if size >= 100] or list(found.calibrated)
    curves = {size: label_counts.reliability_curve(found.calibrated[size], found.correct) for size in sizes}
    plotting.business_progression(folder / "business_progression.png", curves, decisions.BUCKETS, **common)
    panels = {threshold: label_counts.automation_curves(found, threshold) for threshold in (0.7, 0.8, 0.9, 0.95)}
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
    shown = {"raw": study.test.scores.confidence}
    for method in ("platt", "isotonic", "temperature"):
        shown |= {str(recipe): found for recipe, found in study.calibrated.items() if recipe.method == method}
    panels = []
    for name, confidence in shown.items():
        row, bins = report["metrics"][name], metrics.reliability_bins(confidence, study.test.scores.correct)
        numbers = f"ECE {row['ece']:.3f} ({row['ece_noise_floor']:.3f}), log loss {row['log_loss']:.3f}"
        panels.append(plotting.ReliabilityPanel(f"{name}\n{numbers}", bins, plotting.color_of(name)))
    return panels


if __name__ == "__main__":
    command_line.run(main)
