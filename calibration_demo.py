"""The whole workflow on a predictions file: is the confidence true, how to make it so, what to automate, at what cost.

    python calibration_demo.py                                            # the recorded predictions of this repository
    python calibration_demo.py mine.jsonl --target-accuracy 0.95          # one file: every number out-of-fold
    python calibration_demo.py --calibrate-on cal.jsonl --test-on test.jsonl --error-cost 50 --html
    python calibration_demo.py mine.jsonl --relabel                       # predictions without their class bias
    python calibration_demo.py mine.jsonl --target billing=.99 other=.8 default=.9 --cost-matrix prices.csv

Reads labelled predictions files, no model and no torch. Prints what to act on (--verbose: everything) and writes into
--output-dir: calibrator.json (for `logprobs_confidence.py --calibrator`), report.json, decisions.csv and eight figures;
with --html also report.html, one page with a threshold to move, which needs no network.

With two files everything is fitted and chosen on the first and measured on the second (held-out). With one, each row is
measured by a calibrator that did not see its group (out-of-fold), and the figures that need separate test rows use a
fixed half of the groups. Nothing here is measured on the rows it was fitted on. In a program:

    study = calibration_study(labelled_rows("cal.jsonl"), labelled_rows("test.jsonl"), Goal(target_accuracy=0.8))
    report = study_report(study, review_cost=5, error_cost=50)
    print(text_report.report_text(report))
    draw_figures(study, report, Path("figures"))             # calibration_figures.py
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

import calibration_metrics as metrics
import command_line
import confusions
import decisions
import html_report
import label_decisions
import predictions
import relabelling
import tables
import text_report
from calibration_figures import draw_figures
from command_line import filled, printable
from verdict import Verdict, judge

if TYPE_CHECKING:
    from calibration import FittedCalibrator, Recipe, Scores
    from shortlists import Shortlist

ROOT = Path(__file__).resolve().parent
RECORDED = ("predictions/base_calibration.jsonl", "predictions/base_test.jsonl", "sentiment/splits.csv")  # in data/
METHOD_NAMES = ("platt", "temperature", "beta", "isotonic", "venn-abers")  # calibrators.METHODS, which imports slowly
LABEL_METHOD_NAMES = ("pooled", "vector")  # label_calibration.LABEL_METHODS; of two labels they are Platt's
TARGETS = (0.8, 0.85, 0.9, 0.95)  # of the guarantees, beside --target-accuracy
SHOWN_LABELS = 5  # in a line
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Goal:
    """What is to be guaranteed, and how surely; the calibrator file gets its thresholds."""

    target_accuracy: float = 0.9
    certainty: float | str = 0.95  # 1 - delta, or "average"
    label_targets: Sequence[str] = ()  # words as "billing=.99": a guarantee for each predicted label
    is_split: bool = False  # the risk is divided among the labels, so that all their guarantees hold together


@dataclass(frozen=True)
class LabelledRows:
    """The scored rows of a predictions file, as records and as arrays, and which of them belong together."""

    source: str
    rows: list[predictions.Prediction]
    scores: Scores
    groups: np.ndarray  # the number of each row's group [n]
    grouped_by: str | None  # a table of id and group; None: near-duplicate texts
    unscored: int
    before: LabelledRows | None = None  # the same rows, where a calibrator has changed predictions

    @property
    def original(self) -> LabelledRows:
        """The rows with the model's own predictions."""
        return self.before or self


@dataclass(frozen=True)
class CalibrationStudy:
    """Test rows with their raw and calibrated confidences, and what the calibrators were fitted on."""

    fit: LabelledRows  # what the calibrators may see
    test: LabelledRows  # the same rows when out-of-fold
    fitted: FittedCalibrator
    candidates: dict[Recipe, np.ndarray]  # out-of-fold confidences [seeds, n] of the fit rows
    calibrated: dict[Recipe, np.ndarray]  # test rows' confidences by each calibrator that is shown
    label_probabilities: np.ndarray  # of the fit rows by vector scaling, out-of-fold [n, labels]
    near_duplicates: int  # test rows with one among the fit rows
    goal: Goal
    method: str
    seed: int

    @property
    def protocol(self) -> str:
        return "out-of-fold" if self.test is self.fit else "held-out"

    @property
    def where(self) -> str:
        """What every table and figure says of its numbers: n, groups if rows belong together, and the protocol."""
        n, groups = len(self.test.rows), metrics.group_count(self.test.groups)
        return f"n = {n:,}{f' in {groups:,} groups' if groups < n else ''}, {self.protocol}"

    @property
    def confidences(self) -> dict[str, np.ndarray]:
        """The test rows' raw confidences, and the chosen calibrator's."""
        return {"raw": self.test.original.scores.confidence, "calibrated": self.calibrated[self.fitted.recipe]}

    @property
    def cross_fitted(self) -> np.ndarray:
        """The confidences of the fit rows that thresholds are chosen on [n]: the mean of the seeds."""
        return self.candidates[self.fitted.recipe].mean(axis=0)

    @property
    def correct(self) -> dict[str, np.ndarray]:
        """Whether the prediction that each confidence is about is right; another one where calibration changes it."""
        return {"raw": self.test.original.scores.correct, "calibrated": self.test.scores.correct}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    fit = labelled_rows(args.predictions or args.calibrate_on, args.groups)
    test = None if args.predictions else labelled_rows(args.test_on, args.groups)
    goal = Goal(args.target_accuracy, args.certainty, args.target or (), args.split_certainty)
    dollars = label_decisions.read_cost_matrix(args.cost_matrix, fit.scores.labels) if args.cost_matrix else None
    study = calibration_study(fit, test, goal, method=args.method, relabel=args.relabel, seed=args.seed)
    report = study_report(
        study, review_cost=args.review_cost, error_cost=args.error_cost, volume=args.volume, cost_matrix=dollars
    )
    print(text_report.report_text(report, args.verbose))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".") as part:  # all files or none
        write_files(study, report, Path(part), dollars)
        draw_figures(study, report, Path(part))
        if args.html:
            by_label = targets_by_label(study)
            calibrated, before = study.confidences["calibrated"], study.test.original.rows
            page = html_report.page_data(report, study.test.rows, calibrated, by_label, before)
            html_report.write_page(Path(part) / "report.html", page)
        made = sorted(Path(part).iterdir())
        if blocked := [path.name for path in made if (folder / path.name).is_dir()]:
            raise ValueError(f"{folder / blocked[0]} is a folder; nothing was written")
        for path in made:
            path.replace(folder / path.name)
    names = ", ".join(path.name for path in made)
    print("\n" + filled(f"Written to {printable(str(folder))}: {names}", 100))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("predictions", metavar="PREDICTIONS", nargs="?", help="one labelled predictions file, cross-fitted")
    add("--calibrate-on", metavar="FILE", help="predictions to fit and choose on (default: the recorded ones)")
    add("--test-on", metavar="FILE", help="predictions to measure on, of other rows")
    methods = ["auto", *METHOD_NAMES, *LABEL_METHOD_NAMES]
    add("--method", default="auto", choices=methods, help="the calibrator (default: auto)")
    add("--relabel", action="store_true", help="the label that is most probable once calibrated is the prediction")
    add("--target-accuracy", type=float, default=0.9, metavar="A", help="of what is automated (default: 0.9)")
    add("--certainty", type=certainty, default=0.95, metavar="C", help="of the guarantee, or average (default: 0.95)")
    add("--target", metavar="LABEL=A", nargs="+", help="a target for each predicted label, as billing=.99 default=.9")
    add("--split-certainty", action="store_true", help="all labels' guarantees together have it, not each by itself")
    decisions.add_cost_arguments(parser)
    add("--cost-matrix", metavar="CSV", help="dollars of acting: a row a true label, a column a predicted one")
    tables.add_groups_argument(parser)
    add("--seed", type=command_line.natural, metavar="N", default=0, help="of folds and resampling (default: 0)")
    add("--verbose", action="store_true", help="print every calibrator, predicted label, threshold and band, too")
    add("--html", action="store_true", help="also write report.html, a page with a threshold to move")
    add("--output-dir", default="calibration_report", metavar="FOLDER", help="default: calibration_report")
    args = parser.parse_args(argv)
    if args.relabel and args.method not in ("auto", "vector"):
        parser.error(f"--relabel is vector scaling, not --method {args.method}")
    if args.predictions and (args.calibrate_on or args.test_on):
        parser.error("give either one predictions file or --calibrate-on and --test-on")
    if bool(args.calibrate_on) != bool(args.test_on):
        parser.error("--calibrate-on and --test-on belong together")
    if not args.predictions and not args.calibrate_on:
        args.calibrate_on, args.test_on, groups = (os.path.relpath(ROOT / "data" / path) for path in RECORDED)
        args.groups = args.groups or groups
    if not 0 < args.target_accuracy < 1:
        parser.error(f"--target-accuracy {args.target_accuracy}: between 0 and 1, both excluded")
    if args.split_certainty and (not args.target or args.certainty == decisions.AVERAGE):
        parser.error("--split-certainty is for --target LABEL=A with a certainty that is a number")
    decisions.check_cost_arguments(parser, args)
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        parser.error(f"--output-dir {args.output_dir} is a file")
    return args


def certainty(word: str) -> float | str:
    """A --certainty: a number from one half to below 1, or "average"."""
    if word == decisions.AVERAGE:
        return word
    try:
        value = float(word)
    except ValueError:
        value = np.nan
    if not 0.5 <= value < 1:
        raise argparse.ArgumentTypeError(f"{word!r}: from 0.5 to below 1, as 0.95, or {decisions.AVERAGE}")
    return value


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
    goal: Goal | None = None,
    *,
    method: str = "auto",
    relabel: bool = False,
    seed: int = 0,
) -> CalibrationStudy:
    """Choose and fit a calibrator, and apply it to rows it did not see; without test rows, out-of-fold to its own.

    With `relabel` it is vector scaling, and its most probable label is the prediction: all but what is called raw is
    then about that prediction.
    ValueError when the test rows are another model's, or when one of them was fitted on.
    """
    from calibration import VectorScalingCalibrator, choose, cross_fit_labels, rare_labels

    goal = goal or Goal()
    own_targets(fit, goal)
    try:
        recipe, candidates = choose(fit.scores, fit.groups, method, range(seed, seed + 5))
        given, seeds = (fit.scores.probabilities, fit.scores.truth), range(seed, seed + 5)
        label_probabilities = cross_fit_labels(VectorScalingCalibrator(), *given, fit.groups, seeds)
        if relabel:
            fit, test = relabelled_rows(fit, test, label_probabilities)
            recipe = replace(recipe, method="vector", class_aware=True, relabel=True)
            candidates = {recipe: fit.scores.confidence[None]}
    except ValueError as error:
        raise ValueError(f"{fit.source}: {error}") from None
    if rare := rare_labels(fit.scores):
        few = ", ".join(f"{count} of {label!r}" for label, count in [*rare.items()][:SHOWN_LABELS])
        more = f" and few of {len(rare) - SHOWN_LABELS} more labels" if len(rare) > SHOWN_LABELS else ""
        said = f"{few}{more}; what is guaranteed says next to nothing about such labels"
        print(f"note: rows in {fit.source}: {said}", file=sys.stderr)
    fitted = fit_calibrator(fit, recipe, candidates[recipe], goal, seed)
    fitted = replace(fitted, shortlist=fitted_shortlist(fit, fitted, candidates[recipe], label_probabilities))
    near_duplicates = 0
    if test is not None:
        first = test.original.rows[0]
        try:
            fitted.check(first.fingerprint, first.model, first.task, tuple(first.probabilities))
        except ValueError as error:
            raise ValueError(f"{test.source} does not fit {fit.source}: {error}") from None
        near_duplicates = tables.check_disjoint(fit.rows, test.rows, fit.source, test.source, test.grouped_by)
    calibrated = calibrated_by_method(recipe, fit, test, seed)
    known = fit, test or fit, fitted, candidates, calibrated, label_probabilities
    return CalibrationStudy(*known, near_duplicates, goal, method, seed)


def fit_calibrator(
    fit: LabelledRows, recipe: Recipe, out_of_fold: np.ndarray, goal: Goal, seed: int
) -> FittedCalibrator:
    """The calibrator fitted on all rows, with its out-of-fold report card and the thresholds of its guarantees.

    `out_of_fold` is [seeds, n]. The card is the first seed's; thresholds are chosen on the mean, which hangs less on
    one division into folds.
    """
    from calibration import FittedCalibrator

    first, confidence, correct = fit.rows[0], out_of_fold.mean(axis=0), fit.scores.correct
    threshold = decisions.threshold_for(confidence, correct, goal.target_accuracy, goal.certainty, fit.groups)
    by_label = None
    if goal.label_targets:
        chosen = label_thresholds(fit, confidence, goal, own_targets(fit, goal))
        by_label = {label: each.record() | {"protocol": "cross-fitted"} for label, each in chosen.items()}
    common = {"groups": fit.groups, "protocol": "out-of-fold", "seed": seed}
    return FittedCalibrator(
        recipe=recipe,
        estimator=recipe.estimator().fit(*recipe.inputs(fit.original.scores)),
        labels=fit.scores.labels,
        fingerprint=first.fingerprint,
        model=first.model,
        task=first.task,
        n=len(fit.rows),
        groups=metrics.group_count(fit.groups),
        fitted_on=frozenset(tables.text_key(row.text) for row in fit.rows),
        report_card=metrics.calibration_metrics(out_of_fold[0], fit.scores.correct, **common),
        threshold=threshold.record() | {"protocol": "cross-fitted"},
        label_thresholds=by_label,
        wrong_confidences=np.sort(confidence[~correct]).tolist(),
    )


def own_targets(fit: LabelledRows, goal: Goal) -> dict[str, float]:
    """The target of each label; ValueError for words that are none."""
    return label_decisions.label_targets(goal.label_targets, fit.scores.labels, goal.target_accuracy)


def label_thresholds(
    fit: LabelledRows, confidence: np.ndarray, goal: Goal, targets: Mapping[str, float]
) -> dict[str, decisions.Threshold]:
    """The threshold of each predicted label, from confidences [n] of the fit rows."""
    predicted, correct = predicted_labels(fit), fit.scores.correct
    return label_decisions.choose_label_thresholds(
        confidence, correct, predicted, targets, goal.certainty, fit.groups, goal.is_split
    )


def predicted_labels(rows: LabelledRows) -> np.ndarray:
    """The number of each row's predicted label [n]."""
    number = {label: number for number, label in enumerate(rows.scores.labels)}
    return np.array([number[row.prediction] for row in rows.rows])


def fitted_shortlist(
    fit: LabelledRows, fitted: FittedCalibrator, out_of_fold: np.ndarray, label_probabilities: np.ndarray
) -> Shortlist | None:
    """The shortlist for the rows that this calibrator leaves to review; all rows where it guarantees nothing."""
    from shortlists import fit_shortlist

    scores, to_review = fit.original.scores, ~is_automated(fit, out_of_fold.mean(axis=0), fitted)
    return fit_shortlist(scores.probabilities, scores.truth, label_probabilities, to_review)


def is_automated(rows: LabelledRows, calibrated: np.ndarray, fitted: FittedCalibrator) -> np.ndarray:
    """Which rows reach the calibrator's threshold for their predicted label, bool [n]."""
    thresholds = {label: {"value": value} for label, value in fitted.thresholds().items()}
    return label_decisions.automated_by_label(calibrated, predicted_labels(rows), thresholds)


def relabelled_rows(
    fit: LabelledRows, test: LabelledRows | None, label_probabilities: np.ndarray
) -> tuple[LabelledRows, LabelledRows | None]:
    """Both with the predictions of vector scaling: cross-fitted those of `fit`, and fitted on it those of `test`."""
    from calibration import VectorScalingCalibrator

    if test is not None:
        fitted = VectorScalingCalibrator().fit(fit.scores.probabilities, fit.scores.truth)
        test = with_probabilities(test, fitted.predict_labels(test.scores.probabilities))
    return with_probabilities(fit, label_probabilities), test


def with_probabilities(labelled: LabelledRows, probabilities: np.ndarray) -> LabelledRows:
    """The rows with these probabilities [n, labels], whose most probable label is the prediction."""
    scores, rows = relabelling.relabelled_scores(labelled.scores, probabilities), []
    for row, values in zip(labelled.rows, probabilities.tolist(), strict=True):
        rows.append(predictions.relabelled(row, dict(zip(scores.labels, values, strict=True))))
    return replace(labelled, rows=rows, scores=scores, before=labelled)


def calibrated_by_method(
    chosen: Recipe, fit: LabelledRows, test: LabelledRows | None, seed: int
) -> dict[Recipe, np.ndarray]:
    """Confidences of the test rows, or without any out-of-fold ones of the fit rows, by each calibrator to be shown.

    These are the chosen one, and every other method, given the same, that can be fitted.
    """
    from calibration import cross_fit, recipe_of

    if chosen.relabel:  # all others keep the model's predictions, and so are about other ones
        return {chosen: (test or fit).scores.confidence}
    found, labels = {}, len(fit.scores.labels)
    for method in (chosen.method, *METHOD_NAMES, *(LABEL_METHOD_NAMES if labels > 2 else ())):
        recipe = recipe_of(method, labels, chosen.class_aware)
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
    study: CalibrationStudy,
    *,
    review_cost: float = 5.0,
    error_cost: float = 25.0,
    volume: int = 1000,
    cost_matrix: np.ndarray | None = None,
) -> dict:
    """Every number of the report, as report.json has it; costs in dollars, the volume in predictions a day.

    `cost_matrix` are dollars [true label, predicted label] of acting on a prediction.
    """
    correct, confidences, goal, scores = study.correct, study.confidences, study.goal, study.test.scores
    prices = {"review_cost": review_cost, "error_cost": error_cost}
    targets = sorted({*TARGETS, goal.target_accuracy})
    gates, buckets = {}, {}
    for name, confidence in confidences.items():
        gates[name] = decisions.priced_automation(confidence, correct[name], THRESHOLDS, volume, **prices)
        buckets[name] = decisions.buckets(confidence, correct[name])
    settings = {"method": study.method, "target_accuracy": goal.target_accuracy, "certainty": goal.certainty}
    settings |= {"label_targets": [*goal.label_targets], "is_split": goal.is_split}
    settings |= {**prices, "volume": volume, "groups": study.fit.grouped_by, "seed": study.seed}
    return {
        **study_facts(study),
        "verdict": study_verdict(study).record(),
        "label_errors": confusions.label_errors(scores.labels, scores.truth, scores.probabilities.argmax(axis=1)),
        "settings": settings,
        "candidates": candidate_losses(study),
        "chosen": str(study.fitted.recipe),
        "metrics": metrics_by_calibrator(study),
        "log_loss_gain": log_loss_gain(study),
        "refinement": refinement(study),
        "relabelling": relabelling_effect(study),
        "shortlists": shortlist_report(study),
        "by_predicted_label": metrics.by_predicted_label(study.test.original.rows),
        "threshold": dict(study.fitted.threshold),
        "threshold_measured_protocol": "held-out" if study.protocol == "held-out" else "in-sample",
        "guarantees": [guarantees_at(study, target) for target in targets],
        "guarantee_words": text_report.guarantee_words(goal.target_accuracy, goal.certainty, study.fitted.threshold),
        "by_label": guarantees_by_label(study) if goal.label_targets else None,
        "gates": gates,
        "buckets": buckets,
        "cost_optimal_threshold": decisions.cost_optimal_threshold(**prices),
        "cost_per_row": cost_per_row(confidences, correct, **prices),
        "cost_matrix": None if cost_matrix is None else priced_labels(study, cost_matrix, review_cost),
    }


def study_verdict(study: CalibrationStudy) -> Verdict:
    """Whether the classifier works at all, on the test rows; changed predictions are judged by themselves."""
    recalibrated = None if study.fitted.recipe.relabel else study.confidences["calibrated"]
    return judge(study.test.rows, study.test.groups, recalibrated, seed=study.seed, scores=study.test.scores)


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
        found[str(recipe)] = {"log_loss": np.mean(losses), "sd_over_seeds": np.std(losses), "seeds": len(losses)}
    return found


def metrics_by_calibrator(study: CalibrationStudy) -> dict[str, dict]:
    """The report row of the raw confidence and of every calibrator that is shown."""
    raw, common = study.test.original.scores, {"groups": study.test.groups, "seed": study.seed}
    found = {"raw": metrics.calibration_metrics(raw.confidence, raw.correct, **common)}
    unit = "calibrators measured"
    with command_line.progress(len(study.calibrated), 0, unit, after_s=command_line.SHOW_AFTER_S) as advance:
        for recipe, confidence in study.calibrated.items():
            correct = study.correct["calibrated"]
            row = metrics.calibration_metrics(confidence, correct, protocol=study.protocol, **common)
            found[str(recipe)] = row
            advance(1)
    return found


def log_loss_gain(study: CalibrationStudy) -> list[float]:
    """(raw - calibrated log loss, low, high), paired: both losses are of the same rows in every bootstrap sample."""
    pairs = [*zip(study.confidences.values(), study.correct.values(), strict=True)]

    def gain(rows: np.ndarray) -> list[float]:
        raw, calibrated = (metrics.log_loss(confidence[rows], correct[rows]) for confidence, correct in pairs)
        return [raw - calibrated]

    interval = metrics.bootstrap_interval(gain, study.test.groups, seed=study.seed)
    return [*gain(np.arange(len(study.test.rows))), *interval[0]]


def refinement(study: CalibrationStudy) -> dict[str, float]:
    """The log loss that calibration leaves, and what it takes off; of changed predictions, by being better ones too."""
    correct = study.correct
    left = metrics.log_loss(study.confidences["calibrated"], correct["calibrated"])
    return {"refinement": left, "calibration_error": metrics.log_loss(study.confidences["raw"], correct["raw"]) - left}


def relabelling_effect(study: CalibrationStudy) -> dict:
    """What changed predictions did on the test rows; while they stay, what changing them would do on the fit rows."""
    if study.fitted.recipe.relabel:
        before, after, groups, protocol = study.test.original, study.test, study.test.groups, study.protocol
    else:
        before, groups, protocol = study.fit, study.fit.groups, "out-of-fold"
        after = with_probabilities(before, study.label_probabilities)
    found = relabelling.effect(before.scores, after.scores, groups, study.seed)
    return found | {"done": study.fitted.recipe.relabel, "protocol": protocol}


def shortlist_report(study: CalibrationStudy) -> dict | None:
    """How often the true label of a row to review is on its list, by label, and how long the lists are."""
    from shortlists import coverage_report

    shortlist, test = study.fitted.shortlist, study.test
    to_review = ~is_automated(test, study.confidences["calibrated"], study.fitted)
    if shortlist is None or not to_review.any():
        return None
    predicted, truth = predicted_labels(test), test.scores.truth
    if study.protocol == "held-out":
        lists = shortlist.lists(shortlist.probabilities(test.original.scores.probabilities), predicted)
    else:
        lists = cross_fitted_shortlists(study, predicted, to_review)
    found = coverage_report(lists[to_review], truth[to_review], test.scores.labels, shortlist)
    return found | {"protocol": study.protocol}


def cross_fitted_shortlists(study: CalibrationStudy, predicted: np.ndarray, to_review: np.ndarray) -> np.ndarray:
    """Which labels are on each fit row's list [n, labels], by cutoffs chosen on rows of other folds."""
    from calibration import grouped_folds
    from shortlists import cross_fitted_lists

    given, truth = study.label_probabilities, study.fit.scores.truth
    folds = grouped_folds(given, truth, study.fit.groups, seed=study.seed)
    return cross_fitted_lists(given, predicted, truth, to_review, folds, study.fitted.shortlist.coverage)


def guarantees_at(study: CalibrationStudy, target: float) -> dict:
    """A ladder of certainty: each threshold from cross-fitted scores, and how it fares on the test rows.

    With one file the test rows are those that chose the threshold, so that measurement is in-sample. Beside it what raw
    scores would guarantee at the certainty that was asked for.
    """
    fit, calibrated = study.fit, study.confidences["calibrated"]
    known, test = (study.cross_fitted, fit.scores.correct), (calibrated, study.test.scores.correct)
    certainties = (study.goal.certainty, *decisions.CERTAINTIES)
    ladder = decisions.measured_ladder(known, test, target, fit.groups, certainties)
    delta = 0.05 if study.goal.certainty == decisions.AVERAGE else round(1 - study.goal.certainty, 12)
    own = fit.original.scores
    raw = decisions.choose_threshold(own.confidence, own.correct, target, delta, fit.groups, start="strictest")
    return {"target_accuracy": target, "ladder": ladder, "raw": raw.record()}


def guarantees_by_label(study: CalibrationStudy) -> dict:
    """The threshold of each predicted label and how it fares on the test rows, and what all of them automate."""
    test, targets = study.test, own_targets(study.fit, study.goal)
    thresholds = label_thresholds(study.fit, study.cross_fitted, study.goal, targets)
    given = study.confidences["calibrated"], test.scores.correct, predicted_labels(test)
    found = label_decisions.label_automation(*given, thresholds)
    automated = label_decisions.automated_by_label(given[0], given[2], thresholds)
    (together,) = decisions.automation(automated.astype(float), test.scores.correct, [1.0])
    labels = {
        label: {
            "threshold": threshold.record(),
            "measured": found[label],
            "rows": int((predicted_labels(study.fit) == number).sum()),
        }
        for number, (label, threshold) in enumerate(thresholds.items())
    }
    return {"labels": labels, "together": together}


def targets_by_label(study: CalibrationStudy) -> dict[str, list[dict]]:
    """For each predicted label the threshold of every target that the page offers, and how it fares."""
    test, found = study.test, {label: [] for label in study.fit.scores.labels}
    given = study.confidences["calibrated"], test.scores.correct, predicted_labels(test)
    own = own_targets(study.fit, study.goal)
    for target in sorted({*html_report.LABEL_TARGETS, *own.values()}):
        thresholds = label_thresholds(study.fit, study.cross_fitted, study.goal, dict.fromkeys(own, target))
        measured = label_decisions.label_automation(*given, thresholds)
        for label, threshold in thresholds.items():
            is_own = target == own[label]
            found[label].append({"threshold": threshold.record(), "measured": measured[label], "is_own": is_own})
    return found


def priced_labels(study: CalibrationStudy, dollars: np.ndarray, review_cost: float) -> dict:
    """What the test rows cost by each rule, when every mistake has its own price."""
    fit, test = study.fit.scores, study.test.scores
    price = label_decisions.mean_error_price(predicted_labels(study.fit), fit.truth, dollars)
    rules = label_decisions.cost_rules(
        test.probabilities,
        study.confidences["calibrated"],
        test.truth,
        dollars,
        review_cost=review_cost,
        error_cost=price,
        groups=study.test.groups,
        seed=study.seed,
    )
    return {"labels": [*fit.labels], "dollars": dollars.tolist(), "mean_error_price": price, "rules": rules}


def cost_per_row(
    confidences: Mapping[str, np.ndarray], correct: Mapping[str, np.ndarray], review_cost: float, error_cost: float
) -> dict[str, float]:
    """Dollars a row at the cost-optimal threshold, and without any threshold."""
    threshold, found = decisions.cost_optimal_threshold(review_cost, error_cost), {}
    for name, confidence in confidences.items():
        found[name] = float(decisions.costs(confidence, correct[name], [threshold], review_cost, error_cost)[0])
    found["review everything"] = review_cost
    found["automate everything"] = float(error_cost * (1 - correct["calibrated"].mean()))
    return found


def write_files(study: CalibrationStudy, report: Mapping, folder: Path, cost_matrix: np.ndarray | None = None) -> None:
    """calibrator.json, report.json and decisions.csv."""
    from calibration import save_calibrator

    save_calibrator(folder / "calibrator.json", study.fitted)
    text = json.dumps(report, indent=1, allow_nan=False, default=float)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    columns = decision_columns(study, report, cost_matrix)
    with open(folder / "decisions.csv", "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def decision_columns(
    study: CalibrationStudy, report: Mapping, cost_matrix: np.ndarray | None = None
) -> dict[str, Sequence[str]]:
    """The columns of decisions.csv; with a cost matrix also the expected price and the decision by it."""
    rows, calibrated = study.test.rows, study.confidences["calibrated"]
    thresholds = study.fitted.thresholds()
    from_values = [thresholds[row.prediction] for row in rows]
    pairs = zip(calibrated.tolist(), from_values, strict=True)
    columns = {name: [spreadsheet_safe(getattr(row, name)) for row in rows] for name in ("id", "label", "prediction")}
    columns |= {
        "confidence": [f"{value:.6f}" for value in study.confidences["raw"]],
        "calibrated_confidence": [f"{value:.6f}" for value in calibrated],
        "decision": ["automate" if value is not None and c >= value else "review" for c, value in pairs],
        "bucket": [decisions.bucket_of(value) for value in calibrated.tolist()],
    }
    if study.fitted.recipe.relabel:  # `confidence` is the model's in this one
        columns["original_prediction"] = [spreadsheet_safe(row.prediction) for row in study.test.original.rows]
    if cost_matrix is not None:
        distribution = label_decisions.label_distribution(study.test.scores.probabilities, calibrated)
        expected = label_decisions.expected_costs(distribution, cost_matrix)
        expected = expected[np.arange(len(rows)), predicted_labels(study.test)].tolist()
        review_cost = report["settings"]["review_cost"]
        columns["expected_cost"] = [f"{cost:.6f}" for cost in expected]
        columns["decision_by_cost"] = ["automate" if cost <= review_cost else "review" for cost in expected]
    return columns


def spreadsheet_safe(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return "'" + cell if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


if __name__ == "__main__":
    command_line.run(main)
