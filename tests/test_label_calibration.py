"""label_calibration.py: calibrators of all labels' probabilities, against slow optimisers and simulated worlds.

The worlds have a class bias, few rows a label, and a truth that is known: do pooled intercepts and vector scaling beat
Platt scaling of the confidence there, and do they do no harm where there is no bias?
"""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from calibration_metrics import log_loss
from calibrators import PlattScalingCalibrator, TemperatureScalingCalibrator
from label_calibration import LABEL_METHODS, ClasswiseCalibrator, PooledCalibrator, VectorScalingCalibrator

KINDS = LABEL_METHODS.values()


def world(seed, labels, rows, bias=1.5, over_confident=1.4, imbalance=0.5):
    """(probabilities that a model with a class bias says, true labels) of rows drawn from true probabilities."""
    draw = np.random.default_rng(seed)
    bias = bias * draw.permutation(np.linspace(-1, 1, labels)) * 3**0.5  # of this standard deviation, or nearly
    prior = draw.normal(0, imbalance, labels)
    scores = 2.5 * draw.normal(size=(rows, labels)) + prior
    truth = (softmax(scores, axis=1).cumsum(axis=1) > draw.random((rows, 1))).argmax(axis=1)
    return softmax(over_confident * scores + bias, axis=1), truth


def halves(seed, labels, rows, **world_of):
    """Rows to fit on and 3,000 others of the same world."""
    probabilities, truth = world(seed, labels, rows + 3000, **world_of)
    return (probabilities[:rows], truth[:rows]), (probabilities[rows:], truth[rows:])


def losses(seed, labels, rows, **world_of):
    """The log loss of "the top label is right" on rows that were not fitted on, by calibrator."""
    fit, (asked, truth) = halves(seed, labels, rows, **world_of)
    correct = asked.argmax(axis=1) == truth
    platt = PlattScalingCalibrator().fit(fit[0].max(axis=1), fit[0].argmax(axis=1) == fit[1])
    found = {"raw": asked.max(axis=1), "platt": platt.predict(asked.max(axis=1))}
    found |= {name: kind().fit(*fit).predict(asked) for name, kind in LABEL_METHODS.items()}
    found["temperature"] = ClasswiseCalibrator(TemperatureScalingCalibrator()).fit(*fit).predict(asked)
    return {name: log_loss(confidence, correct, clip=1e-6) for name, confidence in found.items()}


# Worlds with a known truth


@pytest.mark.parametrize(("labels", "rows"), [(3, 200), (20, 500), (77, 500)])
def test_with_a_class_bias_vector_beats_pooled_and_both_beat_platt(labels, rows):
    found = [losses(seed, labels, rows) for seed in range(3)]
    raw, platt, pooled, vector = (
        np.mean([each[name] for each in found]) for name in ("raw", "platt", "pooled", "vector")
    )
    assert vector < pooled - 0.01 and pooled < platt - 0.02 and platt < raw


@pytest.mark.parametrize(("labels", "rows"), [(3, 200), (77, 500)])
def test_without_a_class_bias_little_is_lost(labels, rows):
    found = [losses(seed, labels, rows, bias=0.0) for seed in range(3)]
    best = min(np.mean([each[name] for each in found]) for name in ("platt", "temperature"))
    for name in LABEL_METHODS:
        assert np.mean([each[name] for each in found]) < best + 0.03, name  # and then another one is chosen


# Against slow ones


def test_vector_scaling_minimises_its_loss():
    probabilities, truth = world(2, 4, 120)
    log_p = np.log(np.clip(probabilities, 1e-6, 1))

    def loss(parameters):
        parameters = np.array(parameters)
        log_q = log_softmax(parameters[0] * log_p + parameters[1:], axis=1)
        return -sum(log_q[row, label] for row, label in enumerate(truth)) + 0.5 * 3.0 * np.sum(parameters[1:] ** 2)

    slow = minimize(
        loss, [1.0, 0, 0, 0, 0], method="Nelder-Mead", options={"maxiter": 20_000, "xatol": 1e-9, "fatol": 1e-12}
    )
    ours = VectorScalingCalibrator(ridge=3.0).fit(probabilities, truth)
    assert loss([ours.beta_, *ours.biases_]) <= slow.fun + 1e-7
    np.testing.assert_allclose([ours.beta_, *ours.biases_], slow.x, atol=1e-3)
    np.testing.assert_allclose(ours.predict_labels(probabilities).sum(axis=1), 1)
    expected = softmax(ours.beta_ * log_p + ours.biases_, axis=1)
    np.testing.assert_allclose(
        ours.predict(probabilities), expected[range(120), probabilities.argmax(axis=1)], rtol=1e-12
    )


def test_pooled_intercepts_minimise_their_loss():
    probabilities, truth = world(3, 3, 90)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    correct = predicted == truth
    target = np.where(correct, (correct.sum() + 1) / (correct.sum() + 2), 1 / ((~correct).sum() + 2))  # Platt's
    clipped = np.clip(confidence, 1e-6, 1 - 1e-6)
    logit = np.log(clipped / (1 - clipped))

    def loss(parameters):
        p = expit(parameters[0] * logit + parameters[1] + parameters[2:][predicted])
        return -np.sum(target * np.log(p) + (1 - target) * np.log(1 - p)) + 0.5 * 2.0 * np.sum(parameters[2:] ** 2)

    slow = minimize(loss, np.zeros(5), method="Nelder-Mead", options={"maxiter": 20_000, "xatol": 1e-9, "fatol": 1e-12})
    ours = PooledCalibrator(ridge=2.0).fit(probabilities, truth)
    assert loss(np.array([ours.slope_, ours.intercept_, *ours.offsets_])) <= slow.fun + 1e-7
    # What no penalty holds but their sum: the offsets' mean is the intercept's to have.
    assert abs(ours.offsets_.sum()) < 1e-4


def test_with_a_strong_ridge_they_are_platt_and_temperature_scaling():
    probabilities, truth = world(4, 5, 300)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    pooled = PooledCalibrator(ridge=1e7).fit(probabilities, truth).predict(probabilities)
    np.testing.assert_allclose(pooled, PlattScalingCalibrator().fit(confidence, correct).predict(confidence), atol=1e-4)
    vector = VectorScalingCalibrator(ridge=1e7).fit(probabilities, truth)
    scaled = TemperatureScalingCalibrator().fit(probabilities, truth)
    np.testing.assert_allclose(vector.predict(probabilities), scaled.predict(probabilities), atol=1e-4)


# What they share


@pytest.mark.parametrize("kind", KINDS)
def test_they_keep_scikit_learns_convention_and_any_rows_give_probabilities(kind):
    with pytest.raises(NotFittedError):
        kind().predict([[0.5, 0.5]])
    probabilities, truth = world(5, 4, 60)
    calibrator = kind(ridge=2.0)
    assert calibrator.fit(probabilities, truth) is calibrator and clone(calibrator).ridge == 2.0
    lonely = np.eye(3)[[0, 1, 0, 1, 0, 1]]  # of the third label there is no row, and all are certain
    for right in ([0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0], [2, 2, 2, 2, 2, 2]):
        values = kind().fit(lonely, right).predict(np.vstack([np.eye(3), np.full((1, 3), 1 / 3)]))
        assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1


def test_a_calibrator_of_two_labels_refuses_more():
    calibrator = ClasswiseCalibrator(PlattScalingCalibrator())
    with pytest.raises(ValueError, match=r"^3 labels; P\(label\) of more than two is for pooled or vector$"):
        calibrator.fit(*world(6, 3, 60))
    with pytest.raises(ValueError, match=r"^3 labels"):
        calibrator.fit(*world(6, 2, 60)).predict(world(6, 3, 60)[0])


def test_a_ridge_of_one_is_near_the_best():
    fit, (asked, truth) = halves(0, 20, 500)
    correct = asked.argmax(axis=1) == truth
    for kind in KINDS:
        by_ridge = {ridge: log_loss(kind(ridge).fit(*fit).predict(asked), correct) for ridge in (0.1, 0.3, 1, 3, 10)}
        assert by_ridge[1] < min(by_ridge.values()) + 0.005


def test_changed_predictions_are_right_more_often_where_a_bias_was_and_no_less_where_none_was():
    for bias, least_gain in ((1.5, 0.05), (0.0, -0.02)):
        fit, (asked, truth) = halves(1, 20, 500, bias=bias)
        now = VectorScalingCalibrator().fit(*fit).predict_labels(asked).argmax(axis=1)
        assert (now == truth).mean() - (asked.argmax(axis=1) == truth).mean() > least_gain
