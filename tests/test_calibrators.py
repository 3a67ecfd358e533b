"""calibrators.py: each calibrator of a confidence, and of two labels' probabilities.

Recorded values of scikit-learn, betacal, MAPIE and venn-abers, the venn-abers library itself, pooling in exact
fractions, scipy's optimisers and simulations with a known truth say what is right.
"""

import json
import math
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError

from calibrators import METHODS
from calibrators import BetaCalibrator as Beta
from calibrators import IsotonicRegressionCalibrator as Isotonic
from calibrators import PlattScalingCalibrator as Platt
from calibrators import TemperatureScalingCalibrator as Temperature
from calibrators import VennAbersCalibrator as VennAbers
from label_calibration import LABEL_METHODS, ClasswiseCalibrator

with np.errstate():  # importing venn_abers silences numpy's warnings everywhere
    from venn_abers import VennAbers as TheirVennAbers

VECTORS = json.loads((Path(__file__).parent / "data/reference_vectors.json").read_text(encoding="utf-8"))
ARRAYS = [*VECTORS["calibrators"]]
LOGIT_ARRAYS = [name for name in ARRAYS if name != "constant_07"]


def vectors(name):
    """(confidence, correct, grid, what the reference implementations returned)"""
    case, metrics = VECTORS["calibrators"][name], VECTORS["metrics"][name]
    return np.array(metrics["confidence"]), np.array(metrics["correct"]), np.array(case["grid"]), case["ref"]


def pooled(confidence, correct):
    """Pool adjacent violators in exact fractions: [[first score, last score, right, rows], ...], ascending."""
    blocks = []
    for score in sorted(set(confidence)):
        rows = [bool(y) for c, y in zip(confidence, correct, strict=True) if c == score]
        blocks.append([score, score, sum(rows), len(rows)])
        while len(blocks) > 1 and Fraction(*blocks[-2][2:]) >= Fraction(*blocks[-1][2:]):
            _, last, right, rows = blocks.pop()
            blocks[-1] = [blocks[-1][0], last, blocks[-1][2] + right, blocks[-1][3] + rows]
    return blocks


def drawn(n, labels=2, seed=0):
    """Probabilities [n, labels] of an overconfident model, and the numbers of the true labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, labels)) * 2
    truth = [rng.choice(labels, p=p) for p in softmax(logits / 2, axis=1)]
    return softmax(logits, axis=1), np.array(truth)


# The recorded values of other programs


@pytest.mark.parametrize("name", LOGIT_ARRAYS)
def test_platt_on_the_logit_is_scikit_learns(name):
    confidence, correct, grid, ref = vectors(name)
    theirs, ours = ref["sklearn._SigmoidCalibration(logit, eps=1e-6)"], Platt().fit(confidence, correct)
    # scikit-learn stops L-BFGS at a gradient of about 1e-6, we at 1e-10.
    assert [ours.slope_, ours.intercept_] == pytest.approx([-theirs["a"], -theirs["b"]], abs=1e-6)
    np.testing.assert_allclose(ours.predict(grid), theirs["predict_grid"], atol=2e-7)
    again = ref["sklearn.CalibratedClassifierCV(sigmoid) on logit"]
    if "error" not in again:  # it refuses rows that are all right
        np.testing.assert_allclose(ours.predict(grid), again["predict_grid"], atol=2e-7)


@pytest.mark.parametrize("calibrator", [Temperature(), Beta()])
def test_rows_that_are_all_right_give_no_temperature_and_no_beta(calibrator):
    confidence, correct, _, _ = vectors("single_class_all_correct")
    for outcome, word in ((correct, "right"), (1 - correct, "wrong")):
        with pytest.raises(ValueError, match=rf"^all 6 rows are {word}; this calibrator needs both$"):
            calibrator.fit(confidence, outcome)


@pytest.mark.parametrize("name", ARRAYS)
def test_isotonic_without_smoothing_is_scikit_learns(name):
    confidence, correct, grid, ref = vectors(name)
    theirs = ref["sklearn.IsotonicRegression(y_min=0,y_max=1,clip)"]
    ours = Isotonic(smoothing=None).fit(confidence, correct)
    np.testing.assert_allclose(ours.scores_, theirs["X_thresholds"], rtol=0, atol=0)
    np.testing.assert_allclose(ours.values_, theirs["y_thresholds"], atol=1e-15)
    np.testing.assert_allclose(ours.predict(grid), theirs["predict_grid"], atol=1e-15)
    np.testing.assert_allclose(ours.predict(confidence), theirs["in_sample"], atol=1e-15)


def test_temperature_of_three_labels_is_scikit_learns():
    case = VECTORS["multiclass_temperature"]
    probabilities = softmax(case["logits"], axis=1)
    for calibrator in (Temperature(), ClasswiseCalibrator(Temperature())):
        calibrator.fit(probabilities, case["labels"])
        fitted = getattr(calibrator, "calibrator_", calibrator)
        for theirs in case["ref"].values():
            assert 1 / fitted.temperature_ == pytest.approx(theirs["inverse_temperature"], rel=1e-6)
            np.testing.assert_allclose(
                calibrator.predict(probabilities), np.max(theirs["probabilities"], axis=1), atol=1e-7
            )


# The calibrators against slow ones


def test_platts_targets_are_his():
    assert Platt().fit([0.6, 0.7, 0.9], [1, 1, 1]).predict([0.1, 0.8]) == pytest.approx(4 / 5)
    assert Platt().fit([0.6, 0.7, 0.9], [0, 0, 0]).predict([0.1, 0.8]) == pytest.approx(1 / 5)


@pytest.mark.parametrize("shape", [lambda c: c, lambda c: 1 - c, lambda c: np.abs(2 * c - 1), lambda c: 0 * c + 0.5])
def test_beta_is_the_best_map_with_no_falling_term(shape):
    rng = np.random.default_rng(4)
    confidence = rng.random(200)
    correct, features = rng.random(200) < shape(confidence), np.c_[np.log(confidence), -np.log(1 - confidence)]

    def loss(v):
        z = features @ v[:2] + v[2]
        slope = expit(z) - correct
        return np.mean(np.logaddexp(0, z) - correct * z), np.append(slope @ features, slope.sum()) / 200

    best = minimize(loss, [0.5, 0.5, 0], jac=True, bounds=[(0, None), (0, None), (None, None)], options={"ftol": 1e-14})
    ours = Beta().fit(confidence, correct)
    assert loss(np.array([ours.a_, ours.b_, ours.m_]))[0] <= best.fun + 1e-9 and min(ours.a_, ours.b_) >= 0


TABLES = st.lists(st.tuples(st.integers(0, 12).map(lambda i: i / 12), st.booleans()), min_size=1, max_size=40)


@settings(deadline=None)
@given(rows=TABLES)
@example(rows=[(0, False), *((0.5, i == 0) for i in range(10))])  # 0/1 says 1/3, 1/10 would say 1/6
def test_isotonic_with_laplace_is_slow_pooling(rows):
    confidence, correct = zip(*rows, strict=True)
    ours, best = Isotonic().fit(confidence, correct), 0
    for first, last, right, count in pooled(confidence, correct):
        best = max(best, (right + 1) / (count + 2))
        np.testing.assert_allclose(ours.predict([first, (first + last) / 2, last]), best, 1e-12)
    assert np.ptp(ours.predict([0, min(confidence)])) == np.ptp(ours.predict([1, max(confidence)])) == 0


def test_isotonic_pools_blocks_that_are_equal_but_for_rounding():
    # 15/22 and 0/1 pool to a float that differs from the next block's 15/23 in its last bit.
    confidence = np.repeat([0.2, 0.4, 0.6], [22, 1, 23])
    correct = np.repeat([True, False, True, False], [15, 8, 15, 8])
    assert [b[2:] for b in pooled(confidence.tolist(), correct)] == [[30, 46]]
    np.testing.assert_allclose(Isotonic().fit(confidence, correct).predict(confidence), 31 / 48)


@pytest.mark.parametrize("decimals", [1, 2, 12])
def test_venn_abers_is_the_librarys_on_random_rows_with_ties(decimals):
    rng = np.random.default_rng(5)
    for n in (2, 15, 200):
        confidence = np.round(rng.random(n), decimals)
        correct, asked = rng.random(n) < confidence, np.append(np.round(rng.random(40), decimals), [0, 1])
        with np.errstate(all="ignore"):
            theirs = TheirVennAbers()
            theirs.fit(np.c_[1 - confidence, confidence], correct.astype(int))
            probability, interval = theirs.predict_proba(np.c_[1 - asked, asked])
        ours = VennAbers().fit(confidence, correct)
        np.testing.assert_allclose(ours.predict(asked), probability[:, 1], atol=1e-12)
        np.testing.assert_allclose(ours.predict_interval(asked), interval, atol=1e-12)


@pytest.mark.parametrize(("confidence", "right", "bound"), [(0.99, 500, 20), (0.501, 999, 0.05), (0.01, 999, 20)])
def test_temperature_stays_between_its_bounds(confidence, right, bound):
    temperature = Temperature().fit(np.full(1000, confidence), np.arange(1000) < right).temperature_
    assert temperature == pytest.approx(bound, rel=1e-6) and 0.05 <= temperature <= 20


# What all calibrators share


@pytest.mark.parametrize("method", METHODS)
def test_every_calibrator_keeps_scikit_learns_convention(method):
    calibrator = METHODS[method]()
    with pytest.raises(NotFittedError):
        calibrator.predict([0.5])
    confidence, correct = np.array([0.0, 1.0, 1.0, 0.0, 1.0]), np.array([0, 1, 0, 1, 1])
    kept = confidence.copy(), correct.copy()
    assert calibrator.fit(confidence, correct) is calibrator
    expected = calibrator.predict(confidence)
    assert (confidence == kept[0]).all() and (correct == kept[1]).all()
    np.testing.assert_array_equal(clone(calibrator).fit([0, 1, 1, 0, 1], correct == 1).predict(confidence), expected)
    mirrored = clone(calibrator).fit(confidence[::-1], correct[::-1]).predict(confidence)
    np.testing.assert_allclose(mirrored, expected, rtol=1e-7)
    for bad in ([], 0.5, [math.nan], [1.1], ["a"], [[0.5], [0.5, 0.6]]):
        for call in (calibrator.predict, lambda bad: clone(calibrator).fit(bad, np.zeros(np.size(bad)))):
            with pytest.raises(ValueError, match=r"^.+$"):
                call(bad)


def test_the_classwise_calibrator_keeps_scikit_learns_convention():
    calibrator = ClasswiseCalibrator(Isotonic(smoothing=None))
    assert clone(calibrator).get_params()["calibrator__smoothing"] is None
    with pytest.raises(NotFittedError):
        calibrator.predict([[0.5, 0.5]])
    with pytest.raises(NotFittedError):
        calibrator.fit(*drawn(60)).calibrator.predict([0.5])  # what it was given stays as it was
    with pytest.raises(ValueError, match=r'^smoothing is "laplace" or None, not 1$'):
        Isotonic(smoothing=1).fit([0.5], [1])


UNIT = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5, 0.9, 5e-324, 1 - 2**-53])


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(UNIT, st.booleans()), min_size=2, max_size=30))
def test_every_calibrated_confidence_is_a_probability_and_never_falls(method, rows):
    confidence, correct = zip(*rows, strict=True)
    if len(set(correct)) == 1 and method in ("temperature", "beta"):
        return
    fitted = METHODS[method]().fit(confidence, correct)
    values = fitted.predict(np.sort(np.append(confidence, np.linspace(0, 1, 41))))
    assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1
    rises = np.diff(values) * (np.sign(fitted.slope_) if method == "platt" else 1)  # Platt's may fall throughout
    assert rises.min() >= -1e-12


@pytest.mark.parametrize("method", METHODS)
def test_separable_and_constant_rows_stay_finite_and_raise_no_warning(method):
    rng = np.random.default_rng(9)
    tables = [(np.full(n, c), rng.permutation(n) < n // 2) for n in range(2, 12) for c in (0.0, 0.5, 0.7, 1.0)]
    tables += [(x := np.sort(rng.random(n)), x > x[n // 2]) for n in range(3, 60)]
    tables += [(np.full(100_000, 0.7), np.arange(100_000) < 70_000)]
    for confidence, correct in tables:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fitted = METHODS[method]().fit(confidence, correct)
            values = fitted.predict(np.append(confidence[:50], [0, 1]))
        assert np.isfinite(values).all() and all(np.isfinite(getattr(fitted, name)).all() for name in fitted.FITTED)


# Classwise calibration


class Share(BaseEstimator):
    """Answers the share of right rows it was fitted on."""

    def fit(self, confidence, correct):
        self.share_ = np.mean(correct)
        return self

    def predict(self, confidence):
        return np.full(len(confidence), self.share_)


def test_a_class_bias_is_corrected_for_both_labels_where_calibrating_the_confidence_cannot():
    rng = np.random.default_rng(6)
    second = rng.uniform(0.02, 0.98, 8000)
    true = expit(np.log(second / (1 - second)) + 1)  # the model has a bias to the first label
    probabilities, truth = np.c_[1 - second, second], (rng.random(8000) < true).astype(int)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    right = np.where(predicted == 1, true, 1 - true)
    aware = ClasswiseCalibrator(Platt()).fit(probabilities, truth).predict(probabilities)
    blind = Platt().fit(confidence, predicted == truth).predict(confidence)
    for label in (0, 1):
        rows = predicted == label
        assert np.abs(aware - right)[rows].mean() < 0.02 and np.abs(blind - right)[rows].mean() > 0.08
    unsure = (predicted == 0) & (confidence < 0.55)
    assert right[unsure].max() < 0.35 and aware[unsure].max() < 0.4  # a calibrated confidence below one half


def test_equal_probabilities_are_the_first_labels():
    two = ClasswiseCalibrator(Share()).fit(np.tile([0.5, 0.5], (10, 1)), [1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert two.predict([[0.5, 0.5], [0.4, 0.6]]) == pytest.approx([0.7, 0.3])


LABEL_CALIBRATORS = [(Temperature(), 2), (Temperature(), 3), (ClasswiseCalibrator(Platt()), 2)]
LABEL_CALIBRATORS += [(kind(), 3) for kind in LABEL_METHODS.values()]


@pytest.mark.parametrize(("calibrator", "labels"), LABEL_CALIBRATORS, ids=str)
def test_bad_probabilities_and_true_labels_are_a_clear_value_error(calibrator, labels):
    probabilities, truth = drawn(60, labels)
    wrong_truth = [np.append(truth[1:], labels), np.append(truth[1:], -1), truth + 0.5, truth[1:], np.array(["a"] * 60)]
    not_numbers, unsummed = np.where(probabilities > 0.9, math.nan, probabilities), probabilities * 3
    cases = [(probabilities, outcome) for outcome in wrong_truth]
    cases += [
        (bad, truth) for bad in (not_numbers, unsummed, probabilities - 0.5, probabilities[1:], probabilities[None])
    ]
    for inputs in cases:
        with pytest.raises(ValueError, match=r"^.+$"):
            clone(calibrator).fit(*inputs)
    for asked in (not_numbers, unsummed):
        with pytest.raises(ValueError, match=r"^.+$"):
            clone(calibrator).fit(probabilities, truth).predict(asked)
