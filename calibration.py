"""Turn a raw score into a probability of being right: choosing a calibrator, cross-fitting, and the calibrator file.

Seven calibrators are tried, the five of `calibrators.py` on the confidence, and those of `label_calibration.py` on the
probabilities of all labels, where a class bias is then corrected for each label (classwise calibration) instead of
averaged. `choose` picks one by its log loss on rows it was not fitted on, never by ECE. The calibrator file is JSON:
`calibration_demo.py` writes one, `logprobs_confidence.py --calibrator FILE` applies it.

    recipe, out_of_fold = choose(scores_of(rows), groups)
    load_calibrator("calibrator.json").apply(rows)
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, InstanceOf, Strict, StrictBool, StrictStr
from sklearn.base import BaseEstimator, clone

import predictions
from calibration_metrics import group_count, group_numbers, log_loss
from calibrators import (  # noqa: F401 (the calibrators are this file's too)
    METHODS,
    BetaCalibrator,
    IsotonicRegressionCalibrator,
    PlattScalingCalibrator,
    Share,
    TemperatureScalingCalibrator,
    VennAbersCalibrator,
    check_both_outcomes,
)
from command_line import SHOW_AFTER_S, progress
from decisions import conformal_selection, floor
from files import read_json, validated, write_text
from label_calibration import LABEL_METHODS, ClasswiseCalibrator, PooledCalibrator, VectorScalingCalibrator  # noqa: F401
from shortlists import Shortlist
from tables import text_key

MANY_GROUPS = 50_000
MANY_ROWS = 50_000  # of so many, log losses by five divisions into folds had standard deviations of 2e-4 at most
MOST_TO_FIT = 100_000  # rows of a fold's fit: no calibrator has that many parameters
RARE = 10  # rows of a label below which a report says so
LEAST_ROWS = 20  # below this nothing is fitted: no calibrator can be told from any other
FORMAT = "calibrated-confidence calibrator, version 1"

# What a file may hold
Count = Annotated[int, Strict(), Field(ge=1)]
Name = Annotated[str, Strict(), Field(min_length=1)]
Wrong = Annotated[tuple[Share, ...], Field(min_length=1)]
TextKey = Annotated[str, Strict(), Field(pattern="^[0-9a-f]{12}$")]


# Cross-fitting and choosing


def cross_fit(
    calibrator: BaseEstimator,
    confidence: np.ndarray,
    correct: np.ndarray,
    groups: Sequence[object] | None = None,
    n_splits: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Calibrated confidence [n], each row's from a calibrator fitted on the folds that hold neither it nor its group.

    For a calibrator of labels, `confidence` is probabilities [n, labels] and `correct` the true labels' numbers [n].
    """
    confidence, correct = np.asarray(confidence), np.asarray(correct)
    answers = np.empty(len(correct))
    for train, test in grouped_folds(confidence, correct, groups, n_splits, seed):
        answers[test] = clone(calibrator).fit(confidence[train], correct[train]).predict(confidence[test])
    return answers


def cross_fit_labels(
    calibrator: BaseEstimator,
    probabilities: np.ndarray,
    truth: np.ndarray,
    groups: Sequence[object] | None = None,
    seeds: Sequence[int] = range(5),
) -> np.ndarray:
    """Calibrated probabilities of all labels [n, labels], as `cross_fit`; the mean over the seeds' folds.

    Of more than MANY_ROWS rows it is the first seed's.
    """
    answers, seeds = np.zeros(probabilities.shape), seeds[:1] if len(truth) > MANY_ROWS else seeds
    for seed in seeds:
        for train, test in grouped_folds(probabilities, truth, groups, seed=seed):
            fitted = clone(calibrator).fit(probabilities[train], truth[train])
            answers[test] += fitted.predict_labels(probabilities[test]) / len(seeds)
    return answers


def grouped_folds(
    confidence: np.ndarray, correct: np.ndarray, groups: Sequence | None = None, n_splits: int = 5, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row numbers (train, test) of each fold: whole groups, and each value of `correct` spread evenly.

    More than MANY_GROUPS groups are dealt out at random, which spreads them as evenly and takes no minutes. Of the rows
    to train on MOST_TO_FIT are drawn where there are more.
    """
    groups = np.arange(len(correct)) if groups is None else group_numbers(groups)
    if not len(confidence) == len(correct) == len(groups):
        raise ValueError(f"{len(confidence)} confidences, {len(correct)} values of correct and {len(groups)} groups")
    n_groups = group_count(groups)
    if n_groups < n_splits or np.bincount(correct.astype(int)).max() < n_splits:
        raise ValueError(f"{len(correct)} rows in {n_groups} groups are too few for {n_splits} folds")
    if n_groups > MANY_GROUPS:
        fold_of = np.random.default_rng(seed).permutation(n_groups)[groups] % n_splits
    else:
        fold_of = _fold_of(correct.astype(np.int64).tobytes(), groups.astype(np.int64).tobytes(), n_splits, seed)
    folds = []
    for number in range(n_splits):
        train = np.flatnonzero(fold_of != number)
        if len(train) > MOST_TO_FIT:
            train = np.sort(np.random.default_rng(seed).choice(train, MOST_TO_FIT, replace=False))
        folds.append((train, np.flatnonzero(fold_of == number)))
    return folds


@lru_cache(maxsize=16)
def _fold_of(outcome: bytes, groups: bytes, n_splits: int, seed: int) -> np.ndarray:
    """The fold that each row is in [n], from both as int64. Every calibrator that is tried asks for the same ones."""
    from sklearn.model_selection import StratifiedGroupKFold

    outcome, groups = (np.frombuffer(each, dtype=np.int64) for each in (outcome, groups))
    folds, fold_of = StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed), np.empty(len(outcome), dtype=int)
    with warnings.catch_warnings():  # a label with fewer rows than folds is absent from some; that is no fault
        warnings.simplefilter("ignore", UserWarning)
        for number, (_, test) in enumerate(folds.split(outcome, outcome, groups)):
            fold_of[test] = number
    return fold_of


@dataclass(frozen=True)
class Recipe:
    """Which calibrator, whether it is given P(label) or the confidence, and whether it may change predictions."""

    method: str
    class_aware: StrictBool
    relabel: StrictBool = False  # the label that has become the most probable is the prediction

    def __post_init__(self) -> None:
        if self.method not in METHODS | LABEL_METHODS:
            names = ", ".join(METHODS | LABEL_METHODS)
            raise ValueError(f"method: no calibrator is called {self.method!r:.60}; there are {names}")
        if self.method in LABEL_METHODS and not self.class_aware:
            raise ValueError(f"class_aware: {self.method} is a calibrator of P(label)")
        if self.relabel and self.method != "vector":
            raise ValueError(f"relabel: {self.method} gives no probabilities of all labels")

    def __str__(self) -> str:
        if self.relabel:
            return f"{self.method}, of P(label), with new predictions"
        return f"{self.method}, of P(label)" if self.class_aware else f"{self.method}, of the confidence"

    def estimator(self) -> BaseEstimator:
        if self.method in LABEL_METHODS:
            return LABEL_METHODS[self.method]()
        calibrator = METHODS[self.method]()
        return ClasswiseCalibrator(calibrator) if self.class_aware else calibrator

    def inputs(self, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
        """What `fit` takes."""
        probabilities = scores.probabilities
        return (probabilities, scores.truth) if self.class_aware else (probabilities.max(axis=1), scores.correct)


@dataclass(frozen=True)
class Scores:
    """A labelled predictions file as arrays."""

    labels: tuple[str, ...]
    probabilities: np.ndarray  # [n, labels], votes smoothed: what calibrators are given
    truth: np.ndarray  # number of the true label [n]
    confidence: np.ndarray  # [n]
    correct: np.ndarray  # [n]

    def __getitem__(self, rows: np.ndarray) -> Scores:
        arrays = self.probabilities[rows], self.truth[rows], self.confidence[rows], self.correct[rows]
        return Scores(self.labels, *arrays)


def scores_of(rows: Sequence[predictions.Prediction]) -> Scores:
    """The arrays of the scored rows; ValueError when any lacks a label or has other labels than the first."""
    confidence, correct = predictions.confidence_and_correct(rows)
    scored = [row for row in rows if row.error is None]
    labels = tuple(scored[0].probabilities)
    for row in scored:
        if tuple(row.probabilities) != labels:
            raise ValueError(f"row {row.id!r}: its labels are not {', '.join(labels)}, as the first row's")
    values = chain.from_iterable(predictions.smoothed(row).values() for row in scored)
    probabilities = np.fromiter(values, dtype=np.float64).reshape(len(scored), len(labels))
    truth = np.array([labels.index(row.label) for row in scored])
    return Scores(labels, probabilities, truth, confidence, correct)


def rare_labels(scores: Scores) -> dict[str, int]:
    """The labels with fewer rows than RARE, and how many: whatever is guaranteed says next to nothing about them."""
    counts = np.bincount(scores.truth, minlength=len(scores.labels)).tolist()
    return {label: count for label, count in zip(scores.labels, counts, strict=True) if count < RARE}


def recipe_of(method: str, labels: int, class_aware: bool = True) -> Recipe:
    """The recipe of a method for so many labels: given P(label) or the confidence as asked, where it takes either.

    Of more than two labels, one-dimensional calibrators take the confidence. Temperature scaling of two labels is the
    same for both targets, so it is always of P(label).
    """
    if method == "temperature" or method in LABEL_METHODS:
        return Recipe(method, True)
    return Recipe(method, class_aware and labels == 2)


def recipes(n: int, method: str = "auto", labels: int = 2) -> list[Recipe]:
    """The candidates for n rows: few parameters for few rows, steps only from a thousand on.

    Isotonic regression loses to Platt scaling on few rows and catches up near a thousand (Niculescu-Mizil and Caruana,
    ICML 2005). The calibrators of many labels are for few rows as well, by their ridge; of two they are Platt's.
    """
    if method != "auto":
        names = [method]
    elif n < 200:
        names = ["temperature", "platt"]
    elif n < 1000:
        names = ["temperature", "platt", "beta", "venn-abers"]
    else:
        names = list(METHODS)
    if method == "auto" and labels > 2:
        names += LABEL_METHODS
    return list(dict.fromkeys(recipe_of(name, labels, aware) for name in names for aware in (True, False)))


def choose(
    scores: Scores, groups: Sequence[object], method: str = "auto", seeds: Sequence[int] = range(5)
) -> tuple[Recipe, dict[Recipe, np.ndarray]]:
    """The recipe with the lowest out-of-fold log loss, and every recipe's out-of-fold confidences [seeds, n].

    The chosen one's own out-of-fold numbers are a little too good, because it was chosen by them. Of more than
    MANY_ROWS rows the first seed is the only one.
    """
    n, groups = len(scores.correct), None if groups is None else group_numbers(groups)
    seeds = seeds[:1] if n > MANY_ROWS else seeds
    if n < LEAST_ROWS:
        raise ValueError(f"{n} labelled rows; a calibrator needs at least {LEAST_ROWS}")
    present = {scores.labels[k] for k in scores.truth.tolist()}
    if len(present) == 1:
        problem = f"all {n} labelled rows are {present.pop()!r}"
        raise ValueError(f"{problem}; rows of every label are needed, for these say nothing of the others")
    check_both_outcomes(scores.correct)
    tried, found, problem = recipes(n, method, len(scores.labels)), {}, ""
    with progress(len(tried), 0, "calibrators fitted", after_s=SHOW_AFTER_S) as advance:
        for recipe in tried:
            try:
                folds = [cross_fit(recipe.estimator(), *recipe.inputs(scores), groups, seed=seed) for seed in seeds]
                found[recipe] = np.array(folds)
            except ValueError as error:  # a fold without any error, or without one of the labels
                problem = problem or str(error)
            advance(1)
    if not found:
        raise ValueError(f"{n} rows with {np.sum(~scores.correct)} wrong cannot be cross-fitted: {problem}")
    losses = {r: np.mean([log_loss(c, scores.correct) for c in oof]) for r, oof in found.items()}
    return min(losses, key=losses.__getitem__), found


# The calibrator file


@dataclass(frozen=True)
class FittedCalibrator:
    """A calibrator, what it was fitted on, how it does on rows it did not see, and the threshold that goes with it."""

    recipe: Recipe
    estimator: InstanceOf[BaseEstimator]
    labels: Annotated[tuple[StrictStr, ...], Field(min_length=2)]
    fingerprint: Name  # of the predictions it is for
    model: Name
    task: Name
    n: Count
    groups: Count
    fitted_on: Annotated[frozenset[TextKey], Field(min_length=1)]  # text_key of each row
    report_card: Mapping[str, Any]  # its out-of-fold numbers
    threshold: Mapping[str, Any] | None  # decisions.Threshold as a record
    shortlist: Shortlist | None = None  # for the rows to review, with three labels or more
    label_thresholds: Mapping[str, Mapping[str, Any]] | None = None  # of each predicted label, instead of `threshold`
    wrong_confidences: Wrong | None = None  # cross-fitted, of the wrong rows among the n: for selecting in a batch

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels: one stands twice")
        if self.shortlist and len(self.shortlist.least) != len(self.labels):
            raise ValueError("shortlist: not for these labels")
        if max(self.groups, len(self.fitted_on)) > self.n:
            raise ValueError(f"n: {self.n} rows, {self.groups} groups and fitted_on {len(self.fitted_on)} texts")
        if self.label_thresholds is not None and self.label_thresholds.keys() != set(self.labels):
            raise ValueError("label_thresholds: not one for each label")
        named = {"threshold": self.threshold} if self.threshold is not None else {}
        named |= {f"label_thresholds: {label}": record for label, record in (self.label_thresholds or {}).items()}
        for name, record in named.items():
            if "value" not in record:
                raise ValueError(f"{name}: it has no value")
            validated(Share | None, record["value"], name)

    def check(self, fingerprint: str, model: str, task: str, labels: Sequence[str]) -> None:
        """ValueError when the calibrator is for another model, task or method."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the calibrator is for {self.model} on task {self.task!r} with fingerprint {self.fingerprint}, these "
                f"predictions are {model}'s on {task!r} with {fingerprint}; fit a calibrator on predictions like these"
            )
        if tuple(labels) != self.labels:
            raise ValueError(f"the calibrator's labels are {', '.join(self.labels)}, not {', '.join(labels)}")

    def check_selects(self) -> None:
        """ValueError when the file was made before it held what selecting in a batch takes."""
        if self.wrong_confidences is None:
            raise ValueError(
                "the calibrator file does not hold the confidences of its wrong rows, which --select-fdr needs; fit it "
                "anew with calibration_demo.py"
            )

    def calibrate(self, rows: Sequence[predictions.Prediction]) -> np.ndarray:
        """Calibrated confidence [n] of scored rows; ValueError when they are another model's, task's or method's."""
        probabilities = self._probabilities(rows)
        if self.recipe.relabel:
            return self.estimator.predict_labels(probabilities).max(axis=1)
        return self.estimator.predict(probabilities if self.recipe.class_aware else probabilities.max(axis=1))

    def _probabilities(self, rows: Sequence[predictions.Prediction]) -> np.ndarray:
        """What the model said of scored rows, [n, labels]."""
        rows = [predictions.uncalibrated(row) for row in rows]
        for row in rows:
            self.check(row.fingerprint, row.model, row.task, tuple(row.probabilities))
        return np.array([[*predictions.smoothed(row).values()] for row in rows])

    def relabelled(self, rows: Sequence[predictions.Prediction]) -> list[predictions.Prediction]:
        """Scored rows with the prediction that this calibrator gives them: another one, if it may change them."""
        rows = [predictions.uncalibrated(row) for row in rows]
        if not self.recipe.relabel or not rows:
            return rows
        by_label = self.estimator.predict_labels(self._probabilities(rows)).tolist()
        pairs = zip(rows, by_label, strict=True)
        return [predictions.relabelled(row, dict(zip(self.labels, values, strict=True))) for row, values in pairs]

    def apply(
        self, rows: Sequence[predictions.Prediction], threshold: float | None = None
    ) -> list[predictions.Prediction]:
        """The rows with `calibrated_confidence` and `decision`, and `fitted_on` where the calibrator has seen the text.

        "automate" from `threshold` on, else from the file's own, which may be one for each predicted label; without any
        all "review". Errors stay as they are.
        """
        return self.decide(rows, self.thresholds(threshold))

    def thresholds(self, threshold: float | None = None) -> dict[str, float | None]:
        """From which calibrated confidence on rows of each predicted label are automated; None: never."""
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"the threshold is {threshold}, outside [0, 1]")
        if threshold is None and self.label_thresholds:
            return {label: record["value"] for label, record in self.label_thresholds.items()}
        if threshold is None and self.threshold:
            threshold = self.threshold["value"]
        return dict.fromkeys(self.labels, threshold)

    def decide(
        self, rows: Sequence[predictions.Prediction], thresholds: Mapping[str, float | None]
    ) -> list[predictions.Prediction]:
        """The rows as `apply` makes them, automated from the threshold of their predicted label on."""
        scored = [row for row in rows if row.error is None]
        values = self.calibrate(scored).tolist() if scored else []
        relabelled = self.relabelled(scored)
        decided = zip(relabelled, values, self.shortlists(relabelled), strict=True)
        applied = []
        for row in rows:
            if row.error is None:
                row, value, shortlist = next(decided)
                extras = {**row.extras, "calibrated_confidence": value}
                threshold = thresholds[row.prediction]
                extras["decision"] = "automate" if threshold is not None and value >= threshold else "review"
                if shortlist and extras["decision"] == "review":
                    extras["shortlist"] = shortlist
                if text_key(row.text) in self.fitted_on:
                    extras["fitted_on"] = True
                row = replace(row, extras=extras)
            applied.append(row)
        return applied

    def shortlists(self, rows: Sequence[predictions.Prediction]) -> list[list[str]]:
        """The labels on the list of each scored row, the most probable first; empty lists without a shortlist."""
        if self.shortlist is None or not rows:
            return [[] for _ in rows]
        calibrated = self.shortlist.probabilities(self._probabilities(rows))
        predicted = np.array([self.labels.index(row.prediction) for row in rows])
        on_list, lists = self.shortlist.lists(calibrated, predicted), []
        for order, listed in zip(np.argsort(-calibrated, axis=1, kind="stable"), on_list, strict=True):
            lists.append([self.labels[number] for number in order if listed[number]])
        return lists


def calibrate_file(
    path: str | Path,
    calibrator: FittedCalibrator,
    threshold: float | None = None,
    select_fdr: float | None = None,
) -> str:
    """Add calibrated confidence and decision to every row of a finished predictions file; returns what to say of it.

    With `select_fdr` the rows to automate are selected in this file as a whole, so that on average at most this share
    of them is wrong; ValueError when the calibrator's file was made before it held what that takes.
    """
    thresholds = calibrator.thresholds(threshold)
    if select_fdr is not None:
        thresholds = dict.fromkeys(calibrator.labels, selecting_threshold(path, calibrator, select_fdr))

    def applied() -> Iterator[predictions.Prediction]:
        rows = predictions.iterate(path)
        while chunk := list(islice(rows, 4096)):
            yield from calibrator.decide(chunk, thresholds)

    made, changed, relabelled = Counter(), False, 0
    for row, before in zip(applied(), predictions.iterate(path), strict=True):
        made[row.extras.get("decision", "not scored")] += 1
        relabelled += row.extras.get("original_prediction", row.prediction) != row.prediction
        changed = changed or row != before
    if changed:
        predictions.replace(path, applied())
    counts = ", ".join(f"{decision} {count:,}" for decision, count in sorted(made.items()))
    if calibrator.recipe.relabel:
        counts += f"; {relabelled:,} predictions changed"
    said = f"  calibrated: {counts} ({rule_words(thresholds, select_fdr is not None)})"
    if select_fdr is not None:
        said += (
            f"\n    on average over labelled sets and files at most {select_fdr:.1%} of what is automated is wrong, if "
            "these rows\n    and the calibration rows are exchangeable, as draws of one pool; no guarantee for one file"
        )
    return said


def rule_words(thresholds: Mapping[str, float | None], is_selected: bool = False) -> str:
    """How it was decided, in words."""
    values = set(thresholds.values())
    if is_selected:
        return "selected in this file: " + (f"from {floor(values.pop())} on" if values != {None} else "none")
    if values == {None}:
        return "the calibrator guarantees nothing, so nothing is automated; --threshold sets a threshold of yours"
    if len(values) == 1:
        return f"automated from {floor(values.pop())} on"
    each = (f"{label} {'never' if v is None else f'from {floor(v)} on'}" for label, v in thresholds.items())
    return f"automated by predicted label: {', '.join(each)}"


def selecting_threshold(path: str | Path, calibrator: FittedCalibrator, select_fdr: float) -> float | None:
    """The least calibrated confidence that conformal selection takes from a predictions file; None where it takes none.

    The labelled rows' confidences are cross-fitted, those of the file are by the calibrator that all of them fitted,
    which is nearly exchangeable.
    """
    calibrator.check_selects()
    found, rows = [np.empty(0)], predictions.iterate(path)
    while chunk := list(islice(rows, 4096)):
        if scored := [row for row in chunk if row.error is None]:
            found.append(calibrator.calibrate(scored))
    confidence = np.concatenate(found)
    selected = conformal_selection(confidence, calibrator.wrong_confidences, calibrator.n, select_fdr)
    return float(confidence[selected].min()) if selected.any() else None


def save_calibrator(path: str | Path, fitted: FittedCalibrator) -> None:
    """Write the calibrator file: JSON, numbers exact, whole or not at all."""
    record = {
        "format": FORMAT,
        "method": fitted.recipe.method,
        "class_aware": fitted.recipe.class_aware,
        **({"relabel": True} if fitted.recipe.relabel else {}),
        "labels": list(fitted.labels),
        "parameters": _parameters(fitted.estimator),
        **{name: getattr(fitted, name) for name in ("fingerprint", "model", "task", "n", "groups")},
        "report_card": dict(fitted.report_card),
        "threshold": fitted.threshold and dict(fitted.threshold),
        "label_thresholds": fitted.label_thresholds and {k: dict(v) for k, v in fitted.label_thresholds.items()},
        "wrong_confidences": fitted.wrong_confidences and list(fitted.wrong_confidences),
        **({"shortlist": asdict(fitted.shortlist)} if fitted.shortlist else {}),
        "fitted_on": sorted(fitted.fitted_on),
    }
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def _parameters(estimator: BaseEstimator) -> dict:
    if isinstance(estimator, ClasswiseCalibrator):
        return {"all": _parameters(estimator.calibrator_)}
    values = {name: getattr(estimator, name) for name in estimator.FITTED}
    return {name: value.tolist() if isinstance(value, np.ndarray) else float(value) for name, value in values.items()}


def load_calibrator(path: str | Path) -> FittedCalibrator:
    """Read and check a calibrator file; ValueError in one line that names the field that is wrong."""
    content, where = read_json(path), f"{path}: damaged or edited by hand"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a calibrator file: its format is not {FORMAT!r}")
    recipe, labels = validated(Recipe, content, where), content.get("labels")
    if recipe.class_aware and isinstance(labels, list) and not recipe_of(recipe.method, len(labels)).class_aware:
        raise ValueError(f"{where}: labels: {recipe} is for two, and these are {len(labels)}; fit it anew")
    estimator = _restored(recipe.estimator(), content.get("parameters"), where)
    for name in ("offsets_", "biases_"):
        if hasattr(estimator, name) and isinstance(labels, list) and len(getattr(estimator, name)) != len(labels):
            raise ValueError(f"{where}: parameters: {name}: not one for each of the labels")
    return validated(FittedCalibrator, content | {"recipe": recipe, "estimator": estimator}, where)


def _restored(estimator: BaseEstimator, parameters: object, where: str) -> BaseEstimator:
    """The estimator with its parameters from a file."""
    if not isinstance(estimator, ClasswiseCalibrator):
        _restore(estimator, parameters, where)
        return estimator
    if not isinstance(parameters, dict) or parameters.keys() != {"all"}:
        raise ValueError(f"{where}: parameters: they must be those of all rows")
    estimator.calibrator_ = clone(estimator.calibrator)
    _restore(estimator.calibrator_, parameters["all"], where)
    return estimator


def _restore(estimator: BaseEstimator, parameters: object, where: str) -> None:
    """Give a calibrator its parameters, each of which is checked."""
    if not isinstance(parameters, dict) or parameters.keys() != estimator.FITTED.keys():
        raise ValueError(f"{where}: parameters: they must be {', '.join(estimator.FITTED)}")
    for name, kind in estimator.FITTED.items():
        setattr(estimator, name, validated(kind, parameters[name], f"{where}: parameters: {name}"))
    values = [getattr(estimator, name) for name in estimator.FITTED]
    if len({len(value) for value in values if np.ndim(value)}) > 1:
        raise ValueError(f"{where}: parameters: the lists differ in length")
    if "scores_" in estimator.FITTED and (np.diff(estimator.scores_) <= 0).any():
        raise ValueError(f"{where}: parameters: scores_: they do not rise")
    if "values_" in estimator.FITTED and (np.diff(estimator.values_) < 0).any():
        raise ValueError(f"{where}: parameters: values_: they fall")
    if "right_" in estimator.FITTED and (np.maximum(estimator.right_, 1) > estimator.count_).any():
        raise ValueError(f"{where}: parameters: count_: fewer rows than right ones, or none")
