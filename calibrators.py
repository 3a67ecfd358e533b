"""Five calibrators of one score: from a confidence to the probability of being right.

    fit(confidence [n], correct [n])  ->  predict(confidence [m])  ->  P(correct) [m]

    platt        sigma(a logit(c) + b), Platt's smoothed targets        few labels; two numbers
    temperature  sigma(logit(c) / T), of all labels softmax(log p / T)  few labels; one number, keeps the ranking
    beta         logit = a ln c - b ln(1 - c) + m                        bends where Platt cannot
    isotonic     any non-decreasing step function, its ends smoothed     a thousand labels or more
    venn-abers   two isotonic fits that bracket the truth                as isotonic, and says how sure it is

All are scikit-learn estimators. `FITTED` of each names its parameters and what a calibrator file may hold of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import AfterValidator, Field, Strict
from scipy.optimize import isotonic_regression, minimize_scalar
from scipy.special import expit, logsumexp, softmax
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from calibration_metrics import checked

SMALLEST = 1e-6  # confidences are clipped to [SMALLEST, 1 - SMALLEST] before their logit is taken
LARGEST = 1e9  # no fitted parameter and no count comes near

# What a file may hold; a list of numbers is read as an array.
Number = Annotated[float, Strict(), Field(gt=-LARGEST, lt=LARGEST)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
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


def platts_targets(correct: np.ndarray) -> np.ndarray:
    """(N+ + 1) / (N+ + 2) for a right row, 1 / (N- + 2) for a wrong one: what a prior of one row each makes of them."""
    right = np.count_nonzero(correct)
    return np.where(correct, (right + 1) / (right + 2), 1 / (len(correct) - right + 2))


# The calibrators


class PlattScalingCalibrator(BaseEstimator):
    """P = sigma(slope * logit(c) + intercept), fitted to Platt's targets (N+ + 1) / (N+ + 2) and 1 / (N- + 2).

    Platt, "Probabilistic outputs for support vector machines", 1999. It works on the logit: on the confidence itself
    the output could not leave the range from sigma(b) to sigma(a + b).
    """

    FITTED: ClassVar = {"slope_": Number, "intercept_": Number}

    def fit(self, confidence: Sequence[float], correct: Sequence[bool]) -> PlattScalingCalibrator:
        confidence, correct = checked(confidence, correct)
        target = platts_targets(correct)
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
            probabilities, truth = checked_labels(confidence, correct)
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
            confidence = checked_labels(confidence)[0]
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
    1511.00213). Two fits for every place among the known scores that is asked about, of which only the block around the
    place is made: the blocks before and after it are found once. It is ours and not the venn-abers library's, to which
    it is tested to be equal, because its parameters are arrays that JSON holds.
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
        at, is_known = np.divmod(asked, 2)
        right, count = (is_known * np.append(rows, 0.0)[at] for rows in (self.right_, self.count_))
        blocks = _last_blocks(self.right_, self.count_), _first_blocks(self.right_, self.count_)
        ends = [_values_between(right + outcome, count + 1, *blocks, at - 1, at + is_known) for outcome in (0, 1)]
        return np.stack(ends, axis=1)[index]


class Blocks(NamedTuple):
    """Blocks of rows that an isotonic fit gives one value, one for each place [n]."""

    right: np.ndarray
    count: np.ndarray
    places: np.ndarray


def _last_blocks(right: np.ndarray, count: np.ndarray) -> Blocks:
    """The last block of the isotonic fit to the places up to each one.

    The block before it is the last one of the places that are left then: the fit to any beginning is a chain of these.
    """
    right, count, places = right.tolist(), count.tolist(), [1] * len(right)
    for at in range(len(right)):
        previous = at - 1
        while previous >= 0 and right[previous] * count[at] >= right[at] * count[previous]:
            right[at] += right[previous]
            count[at] += count[previous]
            places[at] += places[previous]
            previous = at - places[at]
    return Blocks(np.array(right), np.array(count), np.array(places))


def _first_blocks(right: np.ndarray, count: np.ndarray) -> Blocks:
    """The first block of the isotonic fit to the places from each one on: the same of wrong rows from the other end."""
    wrong, count, places = _last_blocks((count - right)[::-1], count[::-1])
    return Blocks((count - wrong)[::-1], count[::-1], places[::-1])


def _values_between(
    right: np.ndarray, count: np.ndarray, before: Blocks, after: Blocks, last: np.ndarray, first: np.ndarray
) -> np.ndarray:
    """The fit's value at places with these rows [m], each between the places up to `last` and those from `first` on."""
    right, count, ends = right.copy(), count.copy(), [last.copy(), first.copy()]
    sides = ((before, np.greater_equal, -1), (after, np.less_equal, 1))  # which blocks join, and where the next stands
    growing = np.arange(len(right))
    while len(growing):
        still = np.zeros(len(growing), dtype=bool)
        for end, (blocks, violates, step) in zip(ends, sides, strict=True):
            place = end[growing]
            there = (place >= 0) & (place < len(blocks.right)) & ~still
            rows, place = growing[there], place[there]
            violating = violates(blocks.right[place] * count[rows], right[rows] * blocks.count[place])
            still[there] = violating
            rows, place = rows[violating], place[violating]
            right[rows] += blocks.right[place]
            count[rows] += blocks.count[place]
            end[rows] += step * blocks.places[place]
        growing = growing[still]
    return right / count


def _scores(confidence: Sequence[float]) -> np.ndarray:
    return checked(confidence, np.zeros(np.shape(confidence)))[0]


def checked_labels(
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
