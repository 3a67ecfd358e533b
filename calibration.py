"""Turn a raw score into a probability of being right: five calibrators, cross-fitting, and the calibrator file.

    fit(confidence [n], correct [n])  ->  predict(confidence [m])  ->  P(correct) [m]

    platt        sigma(a logit(c) + b), Platt's smoothed targets        few labels; two numbers
    temperature  sigma(logit(c) / T), of all labels softmax(log p / T)  few labels; one number, keeps the ranking
    beta         logit = a ln c - b ln(1 - c) + m                        bends where Platt cannot
    isotonic     any non-decreasing step function, its ends smoothed     a thousand labels or more
    venn-abers   two isotonic fits that bracket the truth                as isotonic, and says how sure it is

All are scikit-learn estimators. With two labels it pays to calibrate P(label) instead of the confidence (classwise
calibration): a class bias is then corrected for both labels, where calibrating the confidence averages the two.
`choose` picks a calibrator by its log loss on rows it was not fitted on, never by ECE. The calibrator file is JSON:
`calibration_demo.py` writes one, `logprobs_confidence.py --calibrator FILE` applies it.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, Field, InstanceOf, Strict, StrictBool, StrictStr
from scipy.optimize import isotonic_regression, minimize_scalar
from scipy.special import expit, logsumexp, softmax
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

import predictions
from calibration_metrics import checked, group_numbers, log_loss
from files import read_json, validated, write_text
from tables import text_key

SMALLEST = 1e-6  # confidences are clipped to [SMALLEST, 1 - SMALLEST] before their logit is taken
LARGEST = 1e9  # no fitted parameter and no count comes near
RARE = 10  # rows of a label below which a report says so
LEAST_ROWS = 20  # below this nothing is fitted: no calibrator can be told from any other
PER_LABEL_ROWS = 50  # with three labels or more: a predicted label with fewer rows shares the calibrator of all
FORMAT = "calibrated-confidence calibrator, version 1"

# What a file may hold; a list of numbers is read as an array.
Number = Annotated[float, Strict(), Field(gt=-LARGEST, lt=LARGEST)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Strict(), Field(ge=1)]
Name = Annotated[str, Strict(), Field(min_length=1)]
TextKey = Annotated[str, Strict(), Field(pattern="^[0-9a-f]{12}$")]
Numbers = Annotated[list[Number], AfterValidator(np.array)]
NotNegatives = Annotated[list[NotNegative], AfterValidator(np.array)]
Shares = Annotated[list[Share], Field(min_length=1), AfterValidator(np.array)]


def logit(confidence: np.ndarray) -> np.ndarray:
    """ln(c / (1 - c)) of clipped confidences."""
    clipped = np.clip(confidence, SMALLEST, 1 - SMALLEST)
    return np.log(clipped) - np.log1p(-clipped)


def logistic_regression(features: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Maximum likelihood: [coefficients..., intercept]; the penalty is only enough to keep separable data finite."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    with warnings.catch_warnings():  # equal or separable scores: it says so, and changes to a solver that ends
        warnings.simplefilter("ignore")
        model.fit(features, correct, sample_weight=weights)
    return np.append(model.coef_[0], model.intercept_[0])


def check_both_outcomes(correct: np.ndarray) -> None:
    """ValueError when the rows are all right or all wrong."""
    if correct.all() or not correct.any():
        outcome = "right" if correct.all() else "wrong"
        raise ValueError(f"all {len(correct)} rows are {outcome}; this calibrator needs both")


# The calibrators


class PlattScalingCalibrator(BaseEstimator):
    """P = sigma(slope * logit(c) + intercept), fitted to Platt's targets (N+ + 1) / (N+ + 2) and 1 / (N- + 2).

    Platt, "Probabilistic outputs for support vector machines", 1999. It works on the logit: on the confidence itself
    the output could not leave the range from sigma(b) to sigma(a + b).
    """

    FITTED: ClassVar = {"slope_": Number, "intercept_": Number}

    def fit(self, confidence: Sequence[float], correct: Sequence[bool]) -> PlattScalingCalibrator:
        confidence, correct = checked(confidence, correct)
        right = correct.sum()
        target = np.where(correct, (right + 1) / (right + 2), 1 / (len(correct) - right + 2))
        features = np.tile(logit(confidence), 2)[:, None]  # each row once as right and once as wrong, by its target
        outcome = np.repeat([True, False], len(correct))
        self.slope_, self.intercept_ = logistic_regression(features, outcome, np.concatenate([target, 1 - target]))
        return self

    def predict(self, confidence: Sequence[float]) -> np.ndarray:
        check_is_fitted(self)
        return expit(self.slope_ * logit(_scores(confidence)) + self.intercept_)


class TemperatureScalingCalibrator(BaseEstimator):
    """P = sigma(logit(c) / T), or softmax(log p / T) of the labels' probabilities [n, labels]; T between 0.05 and 20.

    Guo et al., "On calibration of modern neural networks", ICML 2017. The same T as scikit-learn's, which has no
    bounds and so no answer when all rows are right. One parameter: it keeps every prediction, cannot correct a class
    bias, and of two labels' confidences none falls below one half.
    """

    FITTED: ClassVar = {"temperature_": Annotated[Number, Field(ge=0.05, le=20)]}

    def fit(self, confidence: np.ndarray, correct: Sequence[int]) -> TemperatureScalingCalibrator:
        """`confidence` [n] with `correct` [n], or probabilities [n, labels] with the number of each true label [n]."""
        if np.ndim(confidence) == 2:
            probabilities, truth = _checked_labels(confidence, correct)
            scores = np.log(np.clip(probabilities, SMALLEST, 1))
        else:
            confidence, correct = checked(confidence, correct)
            check_both_outcomes(correct)
            scores, truth = logit(confidence)[:, None] * [0.0, 1.0], correct.astype(int)
        true_scores = scores[np.arange(len(truth)), truth]

        def loss(log_temperature: float) -> float:
            beta = np.exp(-log_temperature)
            return float(np.mean(logsumexp(scores * beta, axis=1) - true_scores * beta))

        best = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded", options={"xatol": 1e-9})
        self.temperature_ = float(np.exp(best.x))
        return self

    def predict(self, confidence: np.ndarray) -> np.ndarray:
        """P(correct) [n]; of probabilities [n, labels] those of each row's most probable label."""
        check_is_fitted(self)
        if np.ndim(confidence) == 2:
            confidence = _checked_labels(confidence)[0]
            scaled = np.log(np.clip(confidence, SMALLEST, 1)) / self.temperature_
            return softmax(scaled, axis=1)[np.arange(len(scaled)), np.argmax(confidence, axis=1)]
        return expit(logit(_scores(confidence)) / self.temperature_)


class BetaCalibrator(BaseEstimator):
    """logit P = a ln c - b ln(1 - c) + m, a and b not below 0 (Kull, Silva Filho and Flach, AISTATS 2017)."""

    FITTED: ClassVar = {"a_": NotNegative, "b_": NotNegative, "m_": Number}

    def fit(self, confidence: Sequence[float], correct: Sequence[bool]) -> BetaCalibrator:
        confidence, correct = checked(confidence, correct)
        check_both_outcomes(correct)
        features, used = self._features(confidence), [0, 1]
        while used:
            *slopes, intercept = logistic_regression(features[:, used], correct)
            if min(slopes) >= 0:
                break
            del used[int(np.argmin(slopes))]  # a negative one would make the map fall
        self.a_, self.b_ = (float(slopes[used.index(k)]) if k in used else 0.0 for k in (0, 1))
        self.m_ = float(intercept if used else logit(correct.mean()))
        return self

    def predict(self, confidence: Sequence[float]) -> np.ndarray:
        check_is_fitted(self)
        return expit(self._features(_scores(confidence)) @ [self.a_, self.b_] + self.m_)

    @staticmethod
    def _features(confidence: np.ndarray) -> np.ndarray:
        clipped = np.clip(confidence, SMALLEST, 1 - SMALLEST)
        return np.stack([np.log(clipped), -np.log1p(-clipped)], axis=1)


class IsotonicRegressionCalibrator(BaseEstimator):
    """The best non-decreasing map, by pooling adjacent violators; linear between its blocks.

    Plain isotonic regression says 0 and 1 at its ends, which one error makes infinitely wrong. With smoothing="laplace"
    (the default) a block of k right among n says (k + 1) / (n + 2), made non-decreasing by a running maximum; with
    smoothing=None it is scikit-learn's. Zadrozny and Elkan, KDD 2002.
    """

    FITTED: ClassVar = {"scores_": Shares, "values_": Shares}

    def __init__(self, smoothing: str | None = "laplace") -> None:
        self.smoothing = smoothing

    def fit(self, confidence: Sequence[float], correct: Sequence[bool]) -> IsotonicRegressionCalibrator:
        if self.smoothing not in ("laplace", None):
            raise ValueError(f'smoothing is "laplace" or None, not {self.smoothing!r}')
        score, right, count = _tally(*checked(confidence, correct))
        value = _pool(right, count)
        first = np.flatnonzero(np.diff(value, prepend=-1) > 1e-12)  # of each block, whatever rounding made of it
        last = np.append(first[1:], len(value)) - 1
        if self.smoothing:
            k, n = np.add.reduceat(right, first), np.add.reduceat(count, first)
            blocks = np.maximum.accumulate((k + 1) / (n + 2))
        else:
            blocks = value[first]
        ends = np.stack([first, last], axis=1).ravel()
        ends, kept = np.unique(ends, return_index=True)
        self.scores_, self.values_ = score[ends], np.repeat(blocks, 2)[kept]
        return self

    def predict(self, confidence: Sequence[float]) -> np.ndarray:
        check_is_fitted(self)
        return np.interp(_scores(confidence), self.scores_, self.values_)


class VennAbersCalibrator(BaseEstimator):
    """P = p1 / (1 - p0 + p1), p0 and p1 the isotonic fits that take the row as wrong and as right; p1 - p0 is doubt.

    Inductive Venn-Abers: Vovk, Petej and Fedorova, "Large-scale probabilistic predictors", NeurIPS 2015 (arXiv
    1511.00213). By definition: two fits for every place among the known scores that is asked about. It is ours and not
    the venn-abers library's, to which it is tested to be equal, because its parameters are arrays that JSON holds.
    """

    FITTED: ClassVar = {"scores_": Shares, "right_": NotNegatives, "count_": Numbers}

    def fit(self, confidence: Sequence[float], correct: Sequence[bool]) -> VennAbersCalibrator:
        self.scores_, self.right_, self.count_ = _tally(*checked(confidence, correct))
        return self

    def predict(self, confidence: Sequence[float]) -> np.ndarray:
        low, high = self.predict_interval(confidence).T
        return high / (1 - low + high)

    def predict_interval(self, confidence: Sequence[float]) -> np.ndarray:
        """(p0, p1) of each confidence, [n, 2]."""
        check_is_fitted(self)
        score = _scores(confidence)
        place = np.searchsorted(self.scores_, score)
        known = self.scores_[np.minimum(place, len(self.scores_) - 1)] == score
        asked, index = np.unique(2 * place + known, return_inverse=True)  # all between two known scores fare alike
        ends = np.empty((len(asked), 2))
        for number, code in enumerate(asked):
            at, is_known = divmod(int(code), 2)
            right, count = self.right_, self.count_
            if not is_known:
                right, count = np.insert(right, at, 0.0), np.insert(count, at, 0.0)
            here = np.arange(len(count)) == at
            for outcome in (0, 1):
                ends[number, outcome] = _pool(right + outcome * here, count + here)[at]
        return ends[index]


def _scores(confidence: Sequence[float]) -> np.ndarray:
    return checked(confidence, np.zeros(np.shape(confidence)))[0]


def _checked_labels(
    probabilities: np.ndarray, truth: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """(float64 [n, labels], int [n] or None) or a ValueError that says what is wrong with them."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or 0 in probabilities.shape:
        raise ValueError(f"probabilities must be [rows, labels], they are {list(probabilities.shape)}")
    if not (np.abs(probabilities.sum(axis=1) - 1) < 1e-6).all() or probabilities.min() < 0:
        raise ValueError("the probabilities of a row must be 0 or more and sum to 1")
    if truth is None:
        return probabilities, None
    truth = np.asarray(truth)
    if truth.shape != probabilities.shape[:1]:
        raise ValueError(f"{len(probabilities)} rows of probabilities, but true labels of shape {list(truth.shape)}")
    if truth.dtype.kind not in "biu" or truth.min() < 0 or truth.max() >= probabilities.shape[1]:
        raise ValueError(f"a true label is the number of a label, 0 to {probabilities.shape[1] - 1}")
    return probabilities, truth.astype(int)


def _tally(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distinct confidences, right rows, rows), ascending; equal confidences must get equal values."""
    score, index, count = np.unique(confidence, return_inverse=True, return_counts=True)
    return score, np.bincount(index, correct), count.astype(float)


def _pool(right: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The non-decreasing least-squares fit to right / count, weighted by count."""
    return isotonic_regression(right / count, weights=count).x


METHODS = {
    "platt": PlattScalingCalibrator,
    "temperature": TemperatureScalingCalibrator,
    "beta": BetaCalibrator,
    "isotonic": IsotonicRegressionCalibrator,
    "venn-abers": VennAbersCalibrator,
}


class ClasswiseCalibrator(BaseEstimator):
    """Calibrate P(label) rather than the confidence, so that a class bias is corrected.

    Two labels: `calibrator` maps P(second label) to its true frequency; the first gets the rest. The prediction stays,
    so a calibrated confidence may fall below one half. More labels: one calibrator for each predicted label (Gupta and
    Ramdas, "Top-label calibration", ICLR 2022), those with fewer than 50 rows sharing one fitted on all rows;
    temperature scaling instead divides all labels' logits by one T.
    """

    def __init__(self, calibrator: BaseEstimator) -> None:
        self.calibrator = calibrator

    def fit(self, probabilities: np.ndarray, truth: Sequence[int]) -> ClasswiseCalibrator:
        """`probabilities` [n, labels] and the number of each row's true label [n]."""
        probabilities, truth = _checked_labels(probabilities, truth)
        if isinstance(self.calibrator, TemperatureScalingCalibrator):
            self.calibrators_ = {"all": clone(self.calibrator).fit(probabilities, truth)}
            return self
        if probabilities.shape[1] == 2:
            self.calibrators_ = {"all": clone(self.calibrator).fit(probabilities[:, 1], truth == 1)}
            return self
        predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        correct = predicted == truth
        self.calibrators_ = {"all": clone(self.calibrator).fit(confidence, correct)}
        for label in range(probabilities.shape[1]):
            rows = predicted == label
            if rows.sum() >= PER_LABEL_ROWS and 0 < correct[rows].sum() < rows.sum():
                self.calibrators_[str(label)] = clone(self.calibrator).fit(confidence[rows], correct[rows])
        return self

    def predict(self, probabilities: np.ndarray) -> np.ndarray:
        """P(the most probable label is right) [n]."""
        check_is_fitted(self)
        probabilities, _ = _checked_labels(probabilities)
        predicted = probabilities.argmax(axis=1)
        if isinstance(self.calibrator, TemperatureScalingCalibrator):
            return self.calibrators_["all"].predict(probabilities)
        if probabilities.shape[1] == 2:
            second = self.calibrators_["all"].predict(probabilities[:, 1])
            return np.where(predicted == 1, second, 1 - second)
        answers = np.empty(len(probabilities))
        for label in np.unique(predicted):
            rows = predicted == label
            calibrator = self.calibrators_.get(str(label), self.calibrators_["all"])
            answers[rows] = calibrator.predict(probabilities[rows].max(axis=1))
        return answers


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

    For a `ClasswiseCalibrator`, `confidence` is probabilities [n, labels] and `correct` the true labels' numbers [n].
    """
    confidence, correct = np.asarray(confidence), np.asarray(correct)
    answers = np.empty(len(correct))
    for train, test in grouped_folds(confidence, correct, groups, n_splits, seed):
        answers[test] = clone(calibrator).fit(confidence[train], correct[train]).predict(confidence[test])
    return answers


def grouped_folds(
    confidence: np.ndarray, correct: np.ndarray, groups: Sequence | None = None, n_splits: int = 5, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row numbers (train, test) of each fold: whole groups, and each value of `correct` spread evenly."""
    from sklearn.model_selection import StratifiedGroupKFold

    groups = np.arange(len(correct)) if groups is None else group_numbers(groups)
    if not len(confidence) == len(correct) == len(groups):
        raise ValueError(f"{len(confidence)} confidences, {len(correct)} values of correct and {len(groups)} groups")
    if len(np.unique(groups)) < n_splits or np.bincount(correct.astype(int)).max() < n_splits:
        raise ValueError(f"{len(correct)} rows in {len(np.unique(groups))} groups are too few for {n_splits} folds")
    folds = StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # a label with fewer rows than folds is absent from some; that is no fault
        warnings.simplefilter("ignore", UserWarning)
        return list(folds.split(confidence, correct, groups))


@dataclass(frozen=True)
class Recipe:
    """Which calibrator, and whether it is given P(label) or the confidence."""

    method: str
    class_aware: StrictBool

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: no calibrator is called {self.method!r:.60}; there are {', '.join(METHODS)}")

    def __str__(self) -> str:
        return f"{self.method}, of P(label)" if self.class_aware else f"{self.method}, of the confidence"

    def estimator(self) -> BaseEstimator:
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
    probabilities = np.array([[*predictions.smoothed(row).values()] for row in scored])
    truth = np.array([labels.index(row.label) for row in scored])
    return Scores(labels, probabilities, truth, confidence, correct)


def rare_labels(scores: Scores) -> dict[str, int]:
    """The labels with fewer rows than RARE, and how many: whatever is guaranteed says next to nothing about them."""
    counts = np.bincount(scores.truth, minlength=len(scores.labels)).tolist()
    return {label: count for label, count in zip(scores.labels, counts, strict=True) if count < RARE}


def recipes(n: int, method: str = "auto") -> list[Recipe]:
    """The candidates for n labels: few parameters for few labels, steps only from a thousand on.

    Isotonic regression loses to Platt scaling on few labels and catches up near a thousand (Niculescu-Mizil and
    Caruana, ICML 2005). Temperature scaling of two labels is the same for both targets, so it stands once.
    """
    if method != "auto":
        names = [method]
    elif n < 200:
        names = ["temperature", "platt"]
    elif n < 1000:
        names = ["temperature", "platt", "beta", "venn-abers"]
    else:
        names = list(METHODS)
    return [Recipe(name, aware) for name in names for aware in (True, False) if aware or name != "temperature"]


def choose(
    scores: Scores, groups: Sequence[object], method: str = "auto", seeds: Sequence[int] = range(5)
) -> tuple[Recipe, dict[Recipe, np.ndarray]]:
    """The recipe with the lowest out-of-fold log loss, and every recipe's out-of-fold confidences [seeds, n].

    The chosen one's own out-of-fold numbers are a little too good, because it was chosen by them.
    """
    n = len(scores.correct)
    if n < LEAST_ROWS:
        raise ValueError(f"{n} labelled rows; a calibrator needs at least {LEAST_ROWS}")
    present = {scores.labels[k] for k in scores.truth.tolist()}
    if len(present) == 1:
        problem = f"all {n} labelled rows are {present.pop()!r}"
        raise ValueError(f"{problem}; rows of every label are needed, for these say nothing of the others")
    check_both_outcomes(scores.correct)
    found, problem = {}, ""
    for recipe in recipes(n, method):
        try:
            folds = [cross_fit(recipe.estimator(), *recipe.inputs(scores), groups, seed=seed) for seed in seeds]
            found[recipe] = np.array(folds)
        except ValueError as error:  # a fold without any error, or without one of the labels
            problem = problem or str(error)
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

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels: one stands twice")
        if max(self.groups, len(self.fitted_on)) > self.n:
            raise ValueError(f"n: {self.n} rows, {self.groups} groups and fitted_on {len(self.fitted_on)} texts")
        if self.threshold is not None:
            if "value" not in self.threshold:
                raise ValueError("threshold: it has no value")
            validated(Share | None, self.threshold["value"], "threshold")

    def check(self, fingerprint: str, model: str, task: str, labels: Sequence[str]) -> None:
        """ValueError when the calibrator is for another model, task or method."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the calibrator is for {self.model} on task {self.task!r} with fingerprint {self.fingerprint}, these "
                f"predictions are {model}'s on {task!r} with {fingerprint}; fit a calibrator on predictions like these"
            )
        if tuple(labels) != self.labels:
            raise ValueError(f"the calibrator's labels are {', '.join(self.labels)}, not {', '.join(labels)}")

    def calibrate(self, rows: Sequence[predictions.Prediction]) -> np.ndarray:
        """Calibrated confidence [n] of scored rows; ValueError when they are another model's, task's or method's."""
        for row in rows:
            self.check(row.fingerprint, row.model, row.task, tuple(row.probabilities))
        probabilities = np.array([[*predictions.smoothed(row).values()] for row in rows])
        return self.estimator.predict(probabilities if self.recipe.class_aware else probabilities.max(axis=1))

    def apply(
        self, rows: Sequence[predictions.Prediction], threshold: float | None = None
    ) -> list[predictions.Prediction]:
        """The rows with `calibrated_confidence` and `decision`, and `fitted_on` where the calibrator has seen the text.

        "automate" from `threshold` on, else from the file's own; without either all "review". Errors stay as they are.
        """
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"the threshold is {threshold}, outside [0, 1]")
        if threshold is None and self.threshold:
            threshold = self.threshold["value"]
        scored = [row for row in rows if row.error is None]
        values = iter(self.calibrate(scored).tolist() if scored else [])
        applied = []
        for row in rows:
            if row.error is None:
                value = next(values)
                extras = {k: v for k, v in row.extras.items() if k not in predictions.CALIBRATED}
                extras["calibrated_confidence"] = value
                extras["decision"] = "automate" if threshold is not None and value >= threshold else "review"
                if text_key(row.text) in self.fitted_on:
                    extras["fitted_on"] = True
                row = replace(row, extras=extras)
            applied.append(row)
        return applied


def calibrate_file(path: str | Path, calibrator: FittedCalibrator, threshold: float | None = None) -> str:
    """Add calibrated confidence and decision to every row of a finished predictions file; returns what to say of it."""

    def applied() -> Iterator[predictions.Prediction]:
        rows = predictions.iterate(path)
        while chunk := list(islice(rows, 4096)):
            yield from calibrator.apply(chunk, threshold)

    decisions, changed = Counter(), False
    for row, before in zip(applied(), predictions.iterate(path), strict=True):
        decisions[row.extras.get("decision", "not scored")] += 1
        changed = changed or row != before
    if changed:
        predictions.replace(path, applied())
    counts = ", ".join(f"{decision} {count:,}" for decision, count in sorted(decisions.items()))
    if threshold is None and calibrator.threshold:
        threshold = calibrator.threshold["value"]
    rule = "the calibrator guarantees nothing, so nothing is automated; --threshold sets a threshold of yours"
    if threshold is not None:
        rule = f"automated from {threshold:.4f} on"
    return f"  calibrated: {counts} ({rule})"


def save_calibrator(path: str | Path, fitted: FittedCalibrator) -> None:
    """Write the calibrator file: JSON, numbers exact, whole or not at all."""
    record = {
        "format": FORMAT,
        "method": fitted.recipe.method,
        "class_aware": fitted.recipe.class_aware,
        "labels": list(fitted.labels),
        "parameters": _parameters(fitted.estimator),
        **{name: getattr(fitted, name) for name in ("fingerprint", "model", "task", "n", "groups")},
        "report_card": dict(fitted.report_card),
        "threshold": fitted.threshold and dict(fitted.threshold),
        "fitted_on": sorted(fitted.fitted_on),
    }
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def _parameters(estimator: BaseEstimator) -> dict:
    if isinstance(estimator, ClasswiseCalibrator):
        return {place: _parameters(calibrator) for place, calibrator in estimator.calibrators_.items()}
    values = {name: getattr(estimator, name) for name in estimator.FITTED}
    return {name: value.tolist() if isinstance(value, np.ndarray) else float(value) for name, value in values.items()}


def load_calibrator(path: str | Path) -> FittedCalibrator:
    """Read and check a calibrator file; ValueError in one line that names the field that is wrong."""
    content, where = read_json(path), f"{path}: damaged or edited by hand"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a calibrator file: its format is not {FORMAT!r}")
    recipe = validated(Recipe, content, where)
    estimator, parameters = recipe.estimator(), content.get("parameters")
    if not recipe.class_aware:
        _restore(estimator, parameters, where)
    elif isinstance(parameters, dict) and "all" in parameters:
        estimator.calibrators_ = {place: clone(estimator.calibrator) for place in parameters}
        for place, calibrator in estimator.calibrators_.items():
            _restore(calibrator, parameters[place], where)
    else:
        raise ValueError(f"{where}: parameters: none for all rows")
    fitted = validated(FittedCalibrator, content | {"recipe": recipe, "estimator": estimator}, where)
    numbers = {str(number) for number in range(len(fitted.labels))} if len(fitted.labels) > 2 else set()
    if recipe.class_aware and not parameters.keys() <= numbers | {"all"}:
        raise ValueError(f"{where}: parameters: not those of all rows and of labels")
    return fitted


def _restore(estimator: BaseEstimator, parameters: object, where: str) -> None:
    """Give a calibrator its parameters, each of which is checked."""
    if not isinstance(parameters, dict) or parameters.keys() != estimator.FITTED.keys():
        raise ValueError(f"{where}: parameters: they must be {', '.join(estimator.FITTED)}")
    for name, kind in estimator.FITTED.items():
        setattr(estimator, name, validated(kind, parameters[name], f"{where}: parameters: {name}"))
    if len({np.size(getattr(estimator, name)) for name in estimator.FITTED}) > 1:
        raise ValueError(f"{where}: parameters: the lists differ in length")
    if "scores_" in estimator.FITTED and (np.diff(estimator.scores_) <= 0).any():
        raise ValueError(f"{where}: parameters: scores_: they do not rise")
    if "values_" in estimator.FITTED and (np.diff(estimator.values_) < 0).any():
        raise ValueError(f"{where}: parameters: values_: they fall")
    if "right_" in estimator.FITTED and (np.maximum(estimator.right_, 1) > estimator.count_).any():
        raise ValueError(f"{where}: parameters: count_: fewer rows than right ones, or none")
