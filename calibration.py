"""Turn a raw score into a probability of being right: five calibrators, cross-fitting, and the calibrator file.

    fit(confidence [n], correct [n])  ->  predict(confidence [m])  ->  P(correct) [m]

    platt        sigma(a logit(c) + b), Platt's smoothed targets        few labels; two numbers
    temperature  sigma(logit(c) / T), of all labels softmax(log p / T)  few labels; one number, keeps the ranking
    beta         logit = a ln c - b ln(1 - c) + m                        bends where Platt cannot
    isotonic     any non-decreasing step function, its ends smoothed     a thousand labels or more
    venn-abers   two isotonic fits that bracket the truth                as isotonic, and says how sure it is

All are scikit-learn estimators. With two labels it pays to calibrate P(label) instead of the confidence (classwise
calibration, `ClasswiseCalibrator`): a class bias is then corrected for both labels, where calibrating the confidence
averages the two.
`choose` picks a calibrator by its log loss on rows it was not fitted on, never by ECE.

The calibrator file is JSON: what was fitted, on how many labels, how it does out-of-fold, and the threshold that goes
with it. `calibration_demo.py` writes one, `logprobs_confidence.py --calibrator FILE` applies it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

import predictions
from calibration_metrics import checked, group_numbers, log_loss
from tables import text_key

SMALLEST = 1e-6  # confidences are clipped to [SMALLEST, 1 - SMALLEST] before their logit is taken
LARGEST = 1e9  # no fitted parameter and no count comes near
LEAST_ROWS = 20  # below this nothing is fitted: no calibrator can be told from any other
PER_LABEL_ROWS = 50  # with three labels or more: a predicted label with fewer rows shares the calibrator of all
FORMAT = "calibrated-confidence calibrator, version 1"
HEAD_FORMAT = "calibrated-confidence head, version 1"
HEAD_STRENGTHS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # variance of what a head adds to a logit, before fitting


def logit(confidence: np.ndarray) -> np.ndarray:
    """ln(c / (1 - c)) of clipped confidences."""
    clipped = np.clip(confidence, SMALLEST, 1 - SMALLEST)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(x)


def _logistic_regression(features: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Maximum likelihood: [coefficients..., intercept]; the penalty is only enough to keep separable data finite."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    with warnings.catch_warnings():  # equal or separable scores: it says so, and changes to a solver that ends
        warnings.simplefilter("ignore")
        model.fit(features, correct, sample_weight=weights)
    return np.append(model.coef_[0], model.intercept_[0])


def _need_both(correct: np.ndarray) -> None:
    if correct.all() or not correct.any():
        raise ValueError(
            f"all {len(correct)} rows are {'right' if correct.all() else 'wrong'}; this calibrator needs both"
        )


# The calibrators


class PlattScalingCalibrator(BaseEstimator):
    """P = sigma(slope * logit(c) + intercept), fitted to Platt's targets (N+ + 1) / (N+ + 2) and 1 / (N- + 2).

    Platt, "Probabilistic outputs for support vector machines", 1999. It works on the logit: on the confidence itself
    the output could not leave the range from sigma(b) to sigma(a + b).
    """

    FITTED = ("slope_", "intercept_")

    def fit(self, confidence: Sequence[float], correct: Sequence[bool]) -> PlattScalingCalibrator:
        confidence, correct = checked(confidence, correct)
        right = correct.sum()
        target = np.where(correct, (right + 1) / (right + 2), 1 / (len(correct) - right + 2))
        features = np.tile(logit(confidence), 2)[:, None]  # each row once as right and once as wrong, by its target
        outcome = np.repeat([True, False], len(correct))
        self.slope_, self.intercept_ = _logistic_regression(features, outcome, np.concatenate([target, 1 - target]))
        return self

    def predict(self, confidence: Sequence[float]) -> np.ndarray:
        check_is_fitted(self)
        return _sigmoid(self.slope_ * logit(_scores(confidence)) + self.intercept_)


class TemperatureScalingCalibrator(BaseEstimator):
    """P = sigma(logit(c) / T), or softmax(log p / T) of the labels' probabilities [n, labels]; T between 0.05 and 20.

    Guo et al., "On calibration of modern neural networks", ICML 2017. The same T as scikit-learn's, which has no
    bounds and so no answer when all rows are right. One parameter: it keeps every prediction, cannot mend a lean to
    one label, and of two labels' confidences none falls below one half.
    """

    FITTED = ("temperature_",)

    def fit(self, confidence: np.ndarray, correct: Sequence[int]) -> TemperatureScalingCalibrator:
        """`confidence` [n] with `correct` [n], or probabilities [n, labels] with the number of each true label [n]."""
        from scipy.optimize import minimize_scalar
        from scipy.special import logsumexp

        if np.ndim(confidence) == 2:
            probabilities, truth = _checked_labels(confidence, correct)
            scores = np.log(np.clip(probabilities, SMALLEST, 1))
        else:
            confidence, correct = checked(confidence, correct)
            _need_both(correct)
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
        from scipy.special import softmax

        check_is_fitted(self)
        if np.ndim(confidence) == 2:
            confidence = _checked_labels(confidence)[0]
            scaled = np.log(np.clip(confidence, SMALLEST, 1)) / self.temperature_
            return softmax(scaled, axis=1)[np.arange(len(scaled)), np.argmax(confidence, axis=1)]
        return _sigmoid(logit(_scores(confidence)) / self.temperature_)


class BetaCalibrator(BaseEstimator):
    """logit P = a ln c - b ln(1 - c) + m, a and b not below 0 (Kull, Silva Filho and Flach, AISTATS 2017)."""

    FITTED = ("a_", "b_", "m_")

    def fit(self, confidence: Sequence[float], correct: Sequence[bool]) -> BetaCalibrator:
        confidence, correct = checked(confidence, correct)
        _need_both(correct)
        features, used = self._features(confidence), [0, 1]
        while used:
            *slopes, intercept = _logistic_regression(features[:, used], correct)
            if min(slopes) >= 0:
                break
            del used[int(np.argmin(slopes))]  # a negative one would make the map fall
        self.a_, self.b_ = (float(slopes[used.index(k)]) if k in used else 0.0 for k in (0, 1))
        self.m_ = float(intercept if used else logit(correct.mean()))
        return self

    def predict(self, confidence: Sequence[float]) -> np.ndarray:
        check_is_fitted(self)
        return _sigmoid(self._features(_scores(confidence)) @ [self.a_, self.b_] + self.m_)

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

    FITTED = ("scores_", "values_")

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
    1511.00213). By definition: two fits for every place among the known scores that is asked about.
    """

    FITTED = ("scores_", "right_", "count_")

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
    from scipy.optimize import isotonic_regression

    return isotonic_regression(right / count, weights=count).x


METHODS = {
    "platt": PlattScalingCalibrator,
    "temperature": TemperatureScalingCalibrator,
    "beta": BetaCalibrator,
    "isotonic": IsotonicRegressionCalibrator,
    "venn-abers": VennAbersCalibrator,
}


class ClasswiseCalibrator(BaseEstimator):
    """Calibrate P(label) rather than the confidence, so that a lean to one label is mended.

    Two labels: `calibrator` maps P(second label) to its true frequency; the first gets the rest. The prediction stays,
    so a calibrated confidence may fall below one half. More labels: one calibrator for each predicted label (Gupta and
    Ramdas, "Top-label calibration", ICLR 2022), those with fewer than 50 rows sharing one fitted on all rows;
    temperature scaling instead divides all labels' logits by one T.
    """

    FITTED = ("calibrators_",)

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


# A head on the last hidden state


@dataclass(frozen=True)
class ConfidenceHead:
    """P(right) = sigma(slope * logit(confidence) + intercept + weights . standardised hidden state).

    What Platt scaling is to the confidence, with all that the model knew besides: Kadavath et al., "Language models
    (mostly) know what they know", 2022. `fingerprint` is that of the predictions it belongs to; `record` holds n, the
    share of right answers, and the out-of-fold log loss of the head and of Platt scaling alone on the same folds.
    """

    slope: float
    intercept: float
    weights: np.ndarray  # [hidden]
    mean: np.ndarray  # [hidden]
    scale: np.ndarray  # [hidden]
    fingerprint: str
    record: Mapping[str, object]

    @property
    def digest(self) -> str:
        """Eight hex digits of all its numbers."""
        return hashlib.sha256(_head_text(self).encode()).hexdigest()[:8]

    def predict(self, hidden: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        """P(right) [n] from hidden states [n, hidden] and confidences [n]."""
        extra = ((hidden - self.mean) / self.scale) @ self.weights
        return _sigmoid(self.slope * logit(confidence) + self.intercept + extra)


def fit_head(
    hidden: np.ndarray, confidence: np.ndarray, correct: np.ndarray, groups: Sequence[object], fingerprint: str
) -> ConfidenceHead:
    """Fit a head to rows [n] that the model was not trained on; what it adds to Platt scaling is shrunk by ridge.

    The penalty is chosen by grouped cross-validation, no weights at all being among the choices. ValueError when the
    rows are too few, or all right or all wrong.
    """
    hidden, correct = np.asarray(hidden, dtype=np.float64), np.asarray(correct, dtype=bool)
    if len(correct) < LEAST_ROWS:
        raise ValueError(f"{len(correct)} rows are too few for a confidence head; {LEAST_ROWS} are the least")
    folds = grouped_folds(confidence, correct, groups)
    losses = {}
    for strength in HEAD_STRENGTHS:
        answers = np.empty(len(correct))
        for train, test in folds:
            answers[test] = _head(hidden[train], confidence[train], correct[train], strength).predict(
                hidden[test], confidence[test]
            )
        losses[strength] = log_loss(answers, correct)
    best = min(losses, key=losses.__getitem__)
    record = {"n": len(correct), "right": float(correct.mean()), "strength": best}
    record |= {"out_of_fold_log_loss": losses[best], "platt_log_loss": losses[0.0]}
    return replace(_head(hidden, confidence, correct, best), fingerprint=fingerprint, record=record)


def _head(hidden: np.ndarray, confidence: np.ndarray, correct: np.ndarray, strength: float) -> ConfidenceHead:
    """The head whose weights have the prior variance strength / hidden; 0 is Platt scaling."""
    _need_both(correct)
    mean, scale = hidden.mean(axis=0), np.maximum(hidden.std(axis=0), SMALLEST)
    width = hidden.shape[1]
    # One logistic regression with one penalty: columns so large that their coefficients cost nothing are free.
    columns = [logit(confidence)[:, None] * 1e3, (hidden - mean) / scale * np.sqrt(strength / width / 1e6)]
    fitted = _logistic_regression(np.hstack(columns if strength else columns[:1]), correct)
    weights = fitted[1:-1] * np.sqrt(strength / width / 1e6) if strength else np.zeros(width)
    return ConfidenceHead(float(fitted[0] * 1e3), float(fitted[-1]), weights, mean, scale, "", {})


def _head_text(head: ConfidenceHead) -> str:
    record = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(head).items()}
    return json.dumps({"format": HEAD_FORMAT} | record, allow_nan=False) + "\n"


def save_head(path: str | Path, head: ConfidenceHead) -> None:
    """Write a head as JSON, numbers exact, whole or not at all."""
    _write_whole(path, _head_text(head))


def load_head(path: str | Path) -> ConfidenceHead:
    """Read and check a head; ValueError in one line."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant, parse_float=_finite)
        _require(record.pop("format", None) == HEAD_FORMAT, "format", "another")
        arrays = {name: np.array(record.pop(name), dtype=np.float64) for name in ("weights", "mean", "scale")}
        _require(
            len({array.shape for array in arrays.values()}) == 1, "weights", "of another length than mean or scale"
        )
        _require(all(np.isfinite(array).all() for array in arrays.values()), "weights", "not numbers")
        _require(arrays["weights"].ndim == 1 and (arrays["scale"] > 0).all(), "scale", "not above 0")
        _require(_is_number(record["slope"]) and _is_number(record["intercept"]), "slope", "no number")
        return ConfidenceHead(**record, **arrays)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a confidence head: {error}") from None


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

    For `ClasswiseCalibrator`, `confidence` is probabilities [n, labels] and `correct` the number of the true label [n].
    Raises ValueError when the rows are too few for the folds.
    """
    confidence, correct = np.asarray(confidence), np.asarray(correct)
    answers = np.empty(len(correct))
    for train, test in grouped_folds(confidence, correct, groups, n_splits, seed):
        answers[test] = clone(calibrator).fit(confidence[train], correct[train]).predict(confidence[test])
    return answers


def grouped_folds(
    confidence: np.ndarray,
    correct: np.ndarray,
    groups: Sequence[object] | None = None,
    n_splits: int = 5,
    seed: int = 0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row numbers (train, test) of each fold: whole groups, and as many of each value of `correct` as can be."""
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
    class_aware: bool

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
        return Scores(
            self.labels, *(getattr(self, f)[rows] for f in ("probabilities", "truth", "confidence", "correct"))
        )


def scores_of(rows: Sequence[predictions.Prediction]) -> Scores:
    """The arrays of the scored rows; ValueError when any lacks a label, or names one the task does not have."""
    confidence, correct = predictions.confidence_and_correct(rows)
    scored = [row for row in rows if row.error is None]
    labels = tuple(scored[0].probabilities)
    for row in scored:
        if tuple(row.probabilities) != labels or row.label not in labels:
            raise ValueError(f"row {row.id!r}: its labels are not {', '.join(labels)}, as the first row's")
    probabilities = np.array([[*predictions.smoothed(row).values()] for row in scored])
    truth = np.array([labels.index(row.label) for row in scored])
    return Scores(labels, probabilities, truth, confidence, correct)


def recipes(n: int, method: str = "auto") -> list[Recipe]:
    """The candidates for n labels: few parameters for few labels, steps only from a thousand on.

    Isotonic regression loses to Platt scaling on few labels and catches up near a thousand (Niculescu-Mizil and
    Caruana, ICML 2005). Temperature scaling of two labels is the same for both targets, so it stands once.
    """
    if method not in ("auto", *METHODS):
        raise ValueError(f"no calibrator {method!r}; there are auto, {', '.join(METHODS)}")
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
    _need_both(scores.correct)
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
    estimator: BaseEstimator
    labels: tuple[str, ...]
    fingerprint: str  # of the predictions it is for
    model: str
    task: str
    n: int
    groups: int
    fitted_on: frozenset[str]  # text_key of each row
    report_card: Mapping[str, object]  # its out-of-fold numbers
    threshold: Mapping[str, object] | None = None  # decisions.Threshold as a record

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

        "automate" from `threshold` on, else from the file's own. Without either nothing is promised: all "review".
        Rows with an error are left as they are.
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
    value = calibrator.threshold and calibrator.threshold["value"] if threshold is None else threshold
    rule = "the calibrator promises nothing, so nothing is automated; --threshold sets a threshold of yours"
    return f"  calibrated: {counts} ({rule if value is None else f'automated from {value:.4f} on'})"


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
    _write_whole(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def _write_whole(path: str | Path, text: str) -> None:
    part = Path(f"{path}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _parameters(estimator: BaseEstimator) -> dict:
    if isinstance(estimator, ClasswiseCalibrator):
        return {label: _parameters(calibrator) for label, calibrator in estimator.calibrators_.items()}
    values = {name: getattr(estimator, name) for name in estimator.FITTED}
    return {name: value.tolist() if isinstance(value, np.ndarray) else float(value) for name, value in values.items()}


def load_calibrator(path: str | Path) -> FittedCalibrator:
    """Read and check a calibrator file; ValueError names the field that is wrong."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a calibrator file: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not a calibrator file of this version; calibration_demo.py writes one")
    try:
        return _from_record(record)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: damaged or edited by hand: {reason}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"it holds {text}")
    return value


def _from_record(record: dict) -> FittedCalibrator:
    method, labels, keys = record["method"], record["labels"], record["fitted_on"]
    _require(isinstance(method, str) and method in METHODS, "method", method)
    _require(isinstance(record["class_aware"], bool), "class_aware", record["class_aware"])
    _require(isinstance(labels, list) and all(isinstance(label, str) for label in labels), "labels", labels)
    _require(len(set(labels)) == len(labels) >= 2, "labels", labels)
    for name in ("fingerprint", "model", "task"):
        _require(isinstance(record[name], str) and record[name], name, record[name])
    for name in ("n", "groups"):
        _require(type(record[name]) is int and 0 < record[name] <= record["n"], name, record[name])
    _require(isinstance(keys, list) and 0 < len(keys) <= record["n"], "fitted_on", keys)
    _require(all(isinstance(key, str) and re.fullmatch("[0-9a-f]{12}", key) for key in keys), "fitted_on", keys)
    _require(isinstance(record["report_card"], dict), "report_card", record["report_card"])
    threshold = record["threshold"]
    _require(threshold is None or (isinstance(threshold, dict) and "value" in threshold), "threshold", threshold)
    value = threshold and threshold["value"]
    _require(value is None or (_is_number(value) and 0 <= value <= 1), "threshold", value)
    _require(isinstance(record["parameters"], dict), "parameters", record["parameters"])
    recipe = Recipe(record["method"], record["class_aware"])
    estimator, parameters = recipe.estimator(), record["parameters"]
    if recipe.class_aware:
        places = {"all", *(str(k) for k in range(len(labels)) if len(labels) > 2)}
        _require("all" in parameters and parameters.keys() <= places, "parameters", list(parameters))
        estimator.calibrators_ = {place: _restored(recipe.method, values) for place, values in parameters.items()}
    else:
        estimator = _restored(recipe.method, parameters)
    given = {name: record[name] for name in ("fingerprint", "model", "task", "n", "groups", "report_card", "threshold")}
    return FittedCalibrator(recipe, estimator, tuple(labels), fitted_on=frozenset(keys), **given)


def _restored(method: str, parameters: dict) -> BaseEstimator:
    """A fitted calibrator from its parameters, each of which is checked."""
    estimator = METHODS[method]()
    _require(isinstance(parameters, dict) and parameters.keys() == {*estimator.FITTED}, "parameters", parameters)
    for name, value in parameters.items():
        if isinstance(value, list):
            _require(value and all(map(_is_number, value)), name, "")
            setattr(estimator, name, np.array(value, dtype=np.float64))
        else:
            _require(_is_number(value), name, value)
            setattr(estimator, name, float(value))
    arrays = [getattr(estimator, name) for name in estimator.FITTED]
    if method in ("isotonic", "venn-abers"):
        _require(all(np.shape(array) == np.shape(arrays[0]) != () for array in arrays), "parameters", "arrays differ")
        scores = estimator.scores_
        _require((np.diff(scores) > 0).all() and scores[0] >= 0 and scores[-1] <= 1, "scores_", "not rising in [0, 1]")
    else:
        _require(not any(map(np.ndim, arrays)), "parameters", "a list where a number stands")
    if method == "isotonic":
        values = estimator.values_
        _require((np.diff(values) >= 0).all() and values[0] >= 0 and values[-1] <= 1, "values_", "falling")
    elif method == "venn-abers":
        right, count = estimator.right_, estimator.count_
        _require((right >= 0).all() and (right <= count).all() and (count >= 1).all(), "count_", "not counts")
    elif method == "temperature":
        _require(0.05 <= estimator.temperature_ <= 20, "temperature_", estimator.temperature_)
    elif method == "beta":
        _require(min(estimator.a_, estimator.b_) >= 0, "a_", "below 0")
    return estimator


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _require(holds: object, name: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} cannot be {repr(value)[:60]}")
