"""Calibrators of the probabilities of all labels, which know which label was predicted, and so correct a class bias.

    fit(probabilities [n, labels], number of the true label [n])  ->  predict(probabilities [m, labels])  ->  [m]

    classwise   two labels: a calibrator of P(second label)              the other label gets the rest
    pooled      logit P = a logit(c) + b + u of the predicted label      Platt scaling with an intercept for each label
    vector      q proportional to p^beta exp(b of the label)             all labels at once; may change the prediction

`predict` gives the calibrated probability that the most probable label is right. With many labels most of them have few
rows. A ridge draws what is learned about each label towards what is learned about all, as strongly as its rows are
few, so no label needs a least number of them. `VectorScaling.predict_labels` gives every label its probability: after a
class bias is taken out, another label than the predicted one may be the most probable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from calibrators import (
    SMALLEST,
    Number,
    Numbers,
    TemperatureScalingCalibrator,
    checked_labels,
    logit,
    platts_targets,
)

RIDGE = 1.0  # a label's own parameter weighs as one standard normal prior; measured in tests/test_label_calibration.py


class ClasswiseCalibrator(BaseEstimator):
    """Calibrate P(label) rather than the confidence, so that a class bias is corrected for both of two labels.

    `calibrator` maps P(second label) to its true frequency; the first gets the rest. The prediction stays, so a
    calibrated confidence may fall below one half. Temperature scaling takes any number of labels and divides all
    labels' logits by one T; for more than two labels there are `PooledCalibrator` and `VectorScalingCalibrator`.
    """

    def __init__(self, calibrator: BaseEstimator) -> None:
        self.calibrator = calibrator

    def fit(self, probabilities: np.ndarray, truth: Sequence[int]) -> ClasswiseCalibrator:
        """`probabilities` [n, labels] and the number of each row's true label [n]."""
        probabilities, truth = checked_labels(probabilities, truth)
        if isinstance(self.calibrator, TemperatureScalingCalibrator):
            self.calibrator_ = clone(self.calibrator).fit(probabilities, truth)
            return self
        _check_two_labels(probabilities)
        self.calibrator_ = clone(self.calibrator).fit(probabilities[:, 1], truth == 1)
        return self

    def predict(self, probabilities: np.ndarray) -> np.ndarray:
        """P(the most probable label is right) [n]."""
        check_is_fitted(self)
        probabilities, _ = checked_labels(probabilities)
        if isinstance(self.calibrator, TemperatureScalingCalibrator):
            return self.calibrator_.predict(probabilities)
        _check_two_labels(probabilities)
        second = self.calibrator_.predict(probabilities[:, 1])
        return np.where(probabilities.argmax(axis=1) == 1, second, 1 - second)


def _check_two_labels(probabilities: np.ndarray) -> None:
    if probabilities.shape[1] != 2:
        raise ValueError(f"{probabilities.shape[1]} labels; P(label) of more than two is for pooled or vector")


class PooledCalibrator(BaseEstimator):
    """logit P = slope logit(c) + intercept + offset of the predicted label: Platt scaling with pooled intercepts.

    A ridge on the offsets (partial pooling, as of a random intercept: Gelman and Hill, "Data analysis using regression
    and multilevel models", 2007, chapter 12) keeps those of labels with few rows near 0. Platt's smoothed targets.
    """

    FITTED: ClassVar = {"slope_": Number, "intercept_": Number, "offsets_": Numbers}

    def __init__(self, ridge: float = RIDGE) -> None:
        self.ridge = ridge

    def fit(self, probabilities: np.ndarray, truth: Sequence[int]) -> PooledCalibrator:
        """`probabilities` [n, labels] and the number of each row's true label [n]."""
        probabilities, truth = checked_labels(probabilities, truth)
        predicted, labels = probabilities.argmax(axis=1), probabilities.shape[1]
        scores, target = logit(probabilities.max(axis=1)), platts_targets(predicted == truth)

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            slope, intercept, offsets = parameters[0], parameters[1], parameters[2:]
            value = slope * scores + intercept + offsets[predicted]
            wrong_by = expit(value) - target
            of_offsets = np.bincount(predicted, wrong_by, labels) + self.ridge * offsets
            total = (np.logaddexp(0, value) - target * value).sum() + self.ridge / 2 * (offsets**2).sum()
            return total, np.concatenate([[wrong_by @ scores, wrong_by.sum()], of_offsets])

        best = _minimum(loss, np.append([1.0, 0.0], np.zeros(labels)))
        self.slope_, self.intercept_, self.offsets_ = float(best[0]), float(best[1]), best[2:]
        return self

    def predict(self, probabilities: np.ndarray) -> np.ndarray:
        """P(the most probable label is right) [n]."""
        check_is_fitted(self)
        probabilities, _ = checked_labels(probabilities)
        offsets = self.offsets_[probabilities.argmax(axis=1)]
        return expit(self.slope_ * logit(probabilities.max(axis=1)) + self.intercept_ + offsets)


class VectorScalingCalibrator(BaseEstimator):
    """log q = beta log p + bias of the label, up to what makes q sum to 1; a ridge on the biases.

    Guo et al., "On calibration of modern neural networks", ICML 2017, with one beta for all labels (their temperature)
    in place of one a label: with few rows of each there is no telling these apart.
    """

    FITTED: ClassVar = {"beta_": Annotated[Number, Field(ge=0.05, le=20)], "biases_": Numbers}

    def __init__(self, ridge: float = RIDGE) -> None:
        self.ridge = ridge

    def fit(self, probabilities: np.ndarray, truth: Sequence[int]) -> VectorScalingCalibrator:
        """`probabilities` [n, labels] and the number of each row's true label [n]."""
        probabilities, truth = checked_labels(probabilities, truth)
        rows, labels = probabilities.shape
        log_p, is_true = np.log(np.clip(probabilities, SMALLEST, 1)), np.eye(labels)[truth]

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            beta, biases = parameters[0], parameters[1:]
            log_q = log_softmax(beta * log_p + biases, axis=1)
            too_much = np.exp(log_q) - is_true
            of_biases = too_much.sum(axis=0) + self.ridge * biases
            total = self.ridge / 2 * (biases**2).sum() - log_q[np.arange(rows), truth].sum()
            return total, np.append((too_much * log_p).sum(), of_biases)

        bounds = [(0.05, 20)] + [(None, None)] * labels
        best = _minimum(loss, np.append(1.0, np.zeros(labels)), bounds)
        self.beta_, self.biases_ = float(best[0]), best[1:]
        return self

    def predict_labels(self, probabilities: np.ndarray) -> np.ndarray:
        """P(label) of every label [n, labels]."""
        check_is_fitted(self)
        probabilities, _ = checked_labels(probabilities)
        return softmax(self.beta_ * np.log(np.clip(probabilities, SMALLEST, 1)) + self.biases_, axis=1)

    def predict(self, probabilities: np.ndarray) -> np.ndarray:
        """P(the label that is most probable before calibration is right) [n]."""
        predicted = np.argmax(probabilities, axis=1)
        return self.predict_labels(probabilities)[np.arange(len(predicted)), predicted]


def _minimum(loss: object, start: np.ndarray, bounds: Sequence | None = None) -> np.ndarray:
    """Where a smooth convex function, which also gives its gradient, is least."""
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-13, "maxiter": 2000})
    return found.x


LABEL_METHODS = {"pooled": PooledCalibrator, "vector": VectorScalingCalibrator}
