"""calibration.py: the calibrators, cross-fitting and choosing, the calibrator file.

Recorded values of scikit-learn, betacal, MAPIE and venn-abers, the venn-abers library itself, pooling in exact
fractions, scipy's optimisers and simulations with a known truth say what is right.
"""

import copy
import json
import math
import re
import warnings
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, softmax
from scipy.stats import binom
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import StratifiedGroupKFold

import calibration
import predictions
from calibration import METHODS, ClasswiseCalibrator, FittedCalibrator, Recipe, Scores, choose, cross_fit, recipes, scores_of
from calibration import BetaCalibrator as Beta
from calibration import IsotonicRegressionCalibrator as Isotonic
from calibration import PlattScalingCalibrator as Platt
from calibration import TemperatureScalingCalibrator as Temperature
from calibration import VennAbersCalibrator as VennAbers
from calibration import load_calibrator as load
from calibration import save_calibrator as save

with np.errstate():  # importing venn_abers silences numpy's warnings everywhere
    from venn_abers import VennAbers as TheirVennAbers

VECTORS = json.loads((Path(__file__).parent / "data/reference_vectors.json").read_text(encoding="utf-8"))
ARRAYS = [*VECTORS["calibrators"]]
TWO_CLASSES = [name for name in ARRAYS if name != "single_class_all_correct"]
LOGIT_ARRAYS = [name for name in ARRAYS if name != "constant_07"]
COMMON = {"method": "logprobs", "model": "tiny", "task": "sentiment", "fingerprint": "3f9c2a71"}


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


@pytest.mark.parametrize("name", LOGIT_ARRAYS)
def test_platt_on_the_raw_confidence_is_another_and_lower_map(name):
    # logit(expit(c)) = c, so our Platt on expit(c) is theirs on c; it never exceeds sigma(slope + intercept).
    confidence, correct, grid, ref = vectors(name)
    raw, article = ref["sklearn._SigmoidCalibration(raw confidence)"], ref[[*ref][-1]]
    ours = Platt().fit(expit(confidence), correct).predict(expit(grid))
    np.testing.assert_allclose(ours, raw["predict_grid"], atol=2e-5)
    if "error" not in article:  # The article's adds a penalty and is flatter still.
        assert np.ptp(article["predict_grid"]) < np.ptp(raw["predict_grid"])
        assert Platt().fit(confidence, correct).predict([1])[0] > 0.95 > 0.86 > raw["predict_grid"][-1]


def test_a_constant_input_has_no_slope_so_ours_are_flat_at_the_base_rate():
    # scikit-learn and betacal stop where their search began to move; only the value at 0.7 is determined.
    confidence, correct, grid, ref = vectors("constant_07")
    smoothed = (7 * 8 / 9 + 3 * 1 / 5) / 10  # the mean of Platt's targets
    for calibrator, key, rate in (
        (Platt(), "sklearn._SigmoidCalibration(logit, eps=1e-6)", smoothed),
        (Beta(), "betacal.BetaCalibration(abm)", 0.7),
    ):
        theirs = np.array(ref[key]["predict_grid"])
        assert theirs[grid == 0.7] == pytest.approx(rate, abs=1e-6) and np.ptp(theirs) > 0.2
        np.testing.assert_allclose(calibrator.fit(confidence, correct).predict(grid), rate, atol=1e-6)


@pytest.mark.parametrize("name", TWO_CLASSES)
def test_temperature_is_scikit_learns(name):
    confidence, correct, grid, ref = vectors(name)
    ours = Temperature().fit(confidence, correct)
    assert ours.temperature_ == pytest.approx(ref["sklearn._TemperatureScaling(logit/2)"]["temperature"], rel=1e-6)
    for key in ("_TemperatureScaling(logit/2)", "CalibratedClassifierCV(temperature) decision_function=logit/2"):
        theirs = ref[f"sklearn.{key}"].get("predict_grid", ours.predict(grid))  # CalibratedClassifierCV needs 5 wrong
        np.testing.assert_allclose(ours.predict(grid), theirs, atol=1e-7)
    probabilities = ref["sklearn.CalibratedClassifierCV(temperature) predict_proba"]
    if "error" not in probabilities:
        theirs, inner = np.array(probabilities["predict_grid"]), slice(1, -1)
        np.testing.assert_allclose(ours.predict(grid)[inner], theirs[inner], atol=1e-7)
        # At 0 and 1 it adds 1e-12 where we clip at 1e-6.
        assert theirs[-1] == pytest.approx(expit(-math.log(1e-12) * probabilities["inverse_temperature"]), abs=1e-6)


def test_rows_that_are_all_right_give_no_temperature_and_no_beta():
    confidence, correct, _, ref = vectors("single_class_all_correct")
    assert ref["sklearn._TemperatureScaling(logit/2)"]["temperature"] < 0.006  # on its way to 0
    assert "one class" in ref["betacal.BetaCalibration(abm)"]["error"]
    for calibrator in (Temperature(), Beta()):
        with pytest.raises(ValueError, match=r"^all 6 rows are right; this calibrator needs both$"):
            calibrator.fit(confidence, correct)
        with pytest.raises(ValueError, match=r"^all 6 rows are wrong; this calibrator needs both$"):
            calibrator.fit(confidence, 1 - correct)


@pytest.mark.parametrize("name", [name for name in TWO_CLASSES if name != "constant_07"])
def test_beta_is_betacals_up_to_its_optimiser_and_no_worse(name):
    confidence, correct, grid, ref = vectors(name)
    theirs, ours = ref["betacal.BetaCalibration(abm)"], Beta().fit(confidence, correct)

    def loss(a, b, m):
        return sklearn.metrics.log_loss(correct, expit(a * np.log(confidence) - b * np.log(1 - confidence) + m))

    their_loss = loss(theirs["a"], theirs["b"], theirs["intercept"])
    assert loss(ours.a_, ours.b_, ours.m_) <= their_loss + 1e-12
    assert [ours.a_, ours.b_, ours.m_] == pytest.approx([theirs[k] for k in ("a", "b", "intercept")], abs=1e-3)
    np.testing.assert_allclose(ours.predict(grid)[:-1], theirs["predict_grid"][:-1], atol=1e-4)
    assert ours.predict([1])[0] == pytest.approx(theirs["predict_grid"][-1], abs=3.2e-3)  # they clip at 2e-16


@pytest.mark.parametrize("name", ARRAYS)
def test_isotonic_without_smoothing_is_scikit_learns(name):
    confidence, correct, grid, ref = vectors(name)
    theirs = ref["sklearn.IsotonicRegression(y_min=0,y_max=1,clip)"]
    ours = Isotonic(smoothing=None).fit(confidence, correct)
    np.testing.assert_allclose(ours.scores_, theirs["X_thresholds"], rtol=0, atol=0)
    np.testing.assert_allclose(ours.values_, theirs["y_thresholds"], atol=1e-15)
    np.testing.assert_allclose(ours.predict(grid), theirs["predict_grid"], atol=1e-15)
    np.testing.assert_allclose(ours.predict(confidence), theirs["in_sample"], atol=1e-15)


@pytest.mark.parametrize("name", ARRAYS)
def test_venn_abers_is_the_librarys_and_mapies_but_for_mapies_error_above_the_largest_score(name):
    confidence, correct, grid, ref = vectors(name)
    ours, theirs = VennAbers().fit(confidence, correct), ref["venn_abers.VennAbers (IVAP)"]
    for expected in (theirs, VECTORS["calibrators"][name]["own"]["ivap_by_definition"]):
        np.testing.assert_allclose(ours.predict_interval(grid), np.transpose([expected["p0"], expected["p1"]]), 1e-14)
        np.testing.assert_allclose(ours.predict(grid), expected["p"], 1e-14)
    # MAPIE 1.6.0 repeats the last block's value above it, which is wrong when that block holds errors.
    wrong = (grid > confidence.max()) & (name in ("ties", "constant_07"))
    mapie = np.array(ref["mapie.VennAbersCalibrator(prefit)"]["p"])
    np.testing.assert_allclose(ours.predict(grid)[~wrong], mapie[~wrong], 1e-14)
    np.testing.assert_allclose(mapie[wrong], 2 / 3, 1e-14)
    np.testing.assert_allclose(ours.predict(grid)[wrong], 8 / 11 if name == "ties" else 11 / 15, 1e-14)


def test_temperature_of_three_labels_is_scikit_learns():
    case = VECTORS["multiclass_temperature"]
    probabilities = softmax(case["logits"], axis=1)
    for calibrator in (Temperature(), ClasswiseCalibrator(Temperature())):
        calibrator.fit(probabilities, case["labels"])
        fitted = getattr(calibrator, "calibrators_", {"all": calibrator})["all"]
        for theirs in case["ref"].values():
            assert 1 / fitted.temperature_ == pytest.approx(theirs["inverse_temperature"], rel=1e-6)
            np.testing.assert_allclose(
                calibrator.predict(probabilities), np.max(theirs["probabilities"], axis=1), atol=1e-7
            )


# The calibrators against slow ones


def test_platts_targets_are_his():
    assert Platt().fit([0.6, 0.7, 0.9], [1, 1, 1]).predict([0.1, 0.8]) == pytest.approx(4 / 5)
    assert Platt().fit([0.6, 0.7, 0.9], [0, 0, 0]).predict([0.1, 0.8]) == pytest.approx(1 / 5)
    rng = np.random.default_rng(3)
    confidence, correct = rng.uniform(0.5, 1, 40), rng.random(40) < 0.7
    target = np.where(correct, (correct.sum() + 1) / (correct.sum() + 2), 1 / ((~correct).sum() + 2))
    z = np.log(confidence / (1 - confidence))

    def loss(v):
        return np.sum(np.logaddexp(0, v[0] * z + v[1]) - target * (v[0] * z + v[1]))

    ours = Platt().fit(confidence, correct)
    assert [ours.slope_, ours.intercept_] == pytest.approx(minimize(loss, [1, 0], tol=1e-12).x, abs=1e-4)


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


@settings(deadline=None, max_examples=60)
@given(rows=TABLES, asked=st.lists(st.floats(0, 1), max_size=4))
def test_venn_abers_is_two_exact_fits_with_the_row_added(rows, asked):
    confidence, correct = map(list, zip(*rows, strict=True))
    asked = [*asked, 0.0, 1.0, *confidence[:6]]
    ours = VennAbers().fit(confidence, correct)
    for score, pair in zip(asked, ours.predict_interval(asked), strict=True):
        for outcome in (0, 1):
            blocks = pooled([*confidence, score], [*correct, outcome])
            expected = next(right / count for first, last, right, count in blocks if first <= score <= last)
            assert pair[outcome] == pytest.approx(expected, abs=1e-12)
        assert ours.predict([score])[0] == pytest.approx(pair[1] / (1 - pair[0] + pair[1]), abs=1e-12)


def test_venn_abers_is_the_librarys_on_random_rows_with_ties():
    rng = np.random.default_rng(5)
    for decimals in (1, 2, 12):
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


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_temperature_is_the_best_of_a_grid_and_of_scipy(labels):
    probabilities, truth = drawn(400, labels)

    def loss(temperature):
        return -log_softmax(np.log(probabilities) / temperature, axis=1)[np.arange(400), truth].mean()

    ours, best = Temperature().fit(probabilities, truth).temperature_, minimize_scalar(loss, bounds=(0.1, 10)).x
    assert ours == pytest.approx(best, rel=1e-4) and 1.5 < best < 2.5  # the simulation's is 2
    assert loss(ours) <= min(map(loss, np.geomspace(0.05, 20, 500)))
    if labels == 2:  # then it is the same of the confidence
        confidence = Temperature().fit(probabilities.max(axis=1), probabilities.argmax(axis=1) == truth)
        assert confidence.temperature_ == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize(("confidence", "right", "bound"), [(0.99, 500, 20), (0.501, 999, 0.05), (0.01, 999, 20)])
def test_temperature_stays_between_its_bounds(confidence, right, bound):
    temperature = Temperature().fit(np.full(1000, confidence), np.arange(1000) < right).temperature_
    assert temperature == pytest.approx(bound, rel=1e-6) and 0.05 <= temperature <= 20


# What all calibrators share


@pytest.mark.parametrize("method", METHODS)
def test_every_calibrator_keeps_scikit_learns_convention(method):
    calibrator = METHODS[method]()
    assert calibrator.get_params() == ({"smoothing": "laplace"} if method == "isotonic" else {})
    with pytest.raises(NotFittedError):
        calibrator.predict([0.5])
    confidence, correct = np.array([0.0, 1.0, 1.0, 0.0, 1.0]), np.array([0, 1, 0, 1, 1])
    kept = confidence.copy(), correct.copy()
    assert calibrator.fit(confidence, correct) is calibrator
    expected = calibrator.predict(confidence)
    assert (confidence == kept[0]).all() and (correct == kept[1]).all()
    for inputs in ((confidence.tolist(), correct == 1), ([0, 1, 1, 0, 1], correct.tolist()), kept):
        np.testing.assert_array_equal(clone(calibrator).fit(*inputs).predict(inputs[0]), expected)
    mirrored = clone(calibrator).fit(confidence[::-1], correct[::-1]).predict(confidence)
    np.testing.assert_allclose(mirrored, expected, rtol=1e-7)
    assert not [name for name in vars(clone(calibrator)) if name.endswith("_")]
    for bad in ([], 0.5, [math.nan], [1.1], [-0.1], [math.inf], ["a"], [[0.5], [0.5, 0.6]]):
        for call in (calibrator.predict, lambda bad: clone(calibrator).fit(bad, np.zeros(np.size(bad)))):
            with pytest.raises(ValueError, match=r"^.+$"):
                call(bad)


def test_class_aware_keeps_scikit_learns_convention():
    calibrator = ClasswiseCalibrator(Isotonic(smoothing=None))
    assert clone(calibrator).get_params()["calibrator__smoothing"] is None
    with pytest.raises(NotFittedError):
        calibrator.predict([[0.5, 0.5]])
    probabilities, truth = drawn(60)
    assert calibrator.fit(probabilities.tolist(), truth.tolist()) is calibrator
    with pytest.raises(NotFittedError):
        calibrator.calibrator.predict([0.5])  # what it was given stays as it was
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


# ClasswiseCalibrator


class Share(BaseEstimator):
    """Answers the share of right rows it was fitted on."""

    def fit(self, confidence, correct):
        self.share_ = np.mean(correct)
        return self

    def predict(self, confidence):
        return np.full(len(confidence), self.share_)


def test_class_aware_mends_a_lean_on_both_sides_where_the_confidence_cannot():
    rng = np.random.default_rng(6)
    second = rng.uniform(0.02, 0.98, 8000)
    true = expit(np.log(second / (1 - second)) + 1)  # the model leans to the first label
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
    three = ClasswiseCalibrator(Share()).fit(np.tile([0.2, 0.4, 0.4], (50, 1)), np.repeat([1, 2], [30, 20]))
    assert three.calibrators_["1"].share_ == 0.6 and "2" not in three.calibrators_


def test_of_three_labels_each_with_fifty_rows_has_its_own_calibrator_and_the_rest_share_one():
    predicted = np.repeat([0, 1, 2], [50, 49, 60])
    truth = np.concatenate([np.repeat([0, 1], [40, 10]), np.repeat([1, 2], [7, 42]), np.full(60, 2)])
    fitted = ClasswiseCalibrator(Share()).fit(np.eye(3)[predicted] * 0.4 + 0.2, truth)
    shared = (40 + 7 + 60) / 159  # 49 rows are too few, 60 that are all right too alike
    assert fitted.predict(np.eye(3)) == pytest.approx([0.8, shared, shared])


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("calibrator", [Temperature(), ClasswiseCalibrator(Temperature()), ClasswiseCalibrator(Platt())], ids=str)
def test_bad_probabilities_and_true_labels_are_a_clear_value_error(calibrator, labels):
    probabilities, truth = drawn(60, labels)
    bad_truth = [np.append(truth[1:], labels), np.append(truth[1:], -1), truth + 0.5, truth[1:], np.array(["a"] * 60)]
    bad = [np.where(probabilities > 0.9, math.nan, probabilities), probabilities * 3, probabilities - 0.5]
    bad += [probabilities[1:], np.empty((0, labels)), probabilities[None]]
    for inputs in [(p, truth) for p in bad] + [(probabilities, t) for t in bad_truth]:
        with pytest.raises(ValueError, match=r"^.+$"):
            clone(calibrator).fit(*inputs)
    calibrator = clone(calibrator).fit(probabilities, truth)
    for asked in bad[:3]:
        with pytest.raises(ValueError, match=r"^.+$"):
            calibrator.predict(asked)


# Cross-fitting


GROUPS = {
    "numbers": np.arange(60) // 3,
    "strings": [f"group {i // 3}" for i in range(60)],
    "objects": np.array([f"{i // 3}" for i in range(60)], dtype=object),
    "none": None,
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", GROUPS)
def test_no_row_is_calibrated_by_its_own_group_and_each_is_once(kind, seed):
    fits, asked = [], []

    class Spy(Share):
        def fit(self, confidence, correct):
            fits.append(confidence)
            return super().fit(confidence, correct)

        def predict(self, confidence):
            asked.append(confidence)
            return super().predict(confidence)

    number, correct = np.arange(60) / 60, np.arange(60) % 4 > 0
    groups = list(range(60)) if GROUPS[kind] is None else list(GROUPS[kind])
    answers = cross_fit(spy := Spy(), number, correct, GROUPS[kind], n_splits=4, seed=seed)
    assert not hasattr(spy, "share_")
    assert np.sort(np.concatenate(asked)).tolist() == number.tolist() and len(fits) == len(asked) == 4
    for trained, tested in zip(fits, asked, strict=True):
        train, test = ({round(x * 60) for x in rows} for rows in (trained, tested))
        assert train | test == {*range(60)} and not {groups[i] for i in train} & {groups[i] for i in test}
        assert answers[sorted(test)] == pytest.approx(np.mean(correct[sorted(train)]))


def test_cross_fitting_is_the_loop_written_out_and_repeats_by_seed():
    probabilities, truth = drawn(80, 3)
    groups = np.arange(80) // 2
    expected = np.empty(80)
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=7).split(probabilities, truth, groups):
        fitted = ClasswiseCalibrator(Temperature()).fit(probabilities[train], truth[train])
        expected[test] = fitted.predict(probabilities[test])
    answers = [cross_fit(ClasswiseCalibrator(Temperature()), probabilities, truth, groups, seed=s) for s in (7, 7, 8)]
    assert (answers[0] == expected).all() and (answers[1] == expected).all() and (answers[2] != expected).any()


@pytest.mark.parametrize(
    "groups",
    [
        [("a", i // 3) for i in range(60)],
        [None] * 3 + [i // 3 for i in range(57)],
        [*range(30), *map(str, range(30))],  # 1 and "1" are two groups
    ],
)
def test_groups_may_be_labelled_with_anything_that_hashes(groups):
    number, places = np.arange(60) / 60, {g: i for i, g in enumerate(dict.fromkeys(groups))}
    correct = np.arange(60) % 4 > 0
    expected = cross_fit(Platt(), number, correct, [places[g] for g in groups])
    np.testing.assert_array_equal(cross_fit(Platt(), number, correct, groups), expected)


def test_too_few_rows_or_groups_are_a_value_error():
    few = "^(.+ too few for 5 folds|.+ confidences, .+ groups)$"
    for n, groups in ((4, None), (60, np.arange(60) % 4), (0, None), (60, [1, 2, 3]), (60, [*range(61)])):
        with pytest.raises(ValueError, match=few):
            cross_fit(Platt(), np.full(n, 0.7), np.arange(n) % 2, groups)


def test_labels_that_are_noise_look_perfect_in_sample_and_worthless_out_of_fold():
    rng, losses = np.random.default_rng(8), []
    for _ in range(8):
        confidence, correct = rng.random(150), rng.permutation(150) < 75
        in_sample = Isotonic(smoothing=None).fit(confidence, correct).predict(confidence)
        for value in np.unique(in_sample):  # an ECE of 0
            assert correct[in_sample == value].mean() == pytest.approx(value)
        out_of_fold = [cross_fit(c, confidence, correct) for c in (Isotonic(smoothing=None), Isotonic(), Platt())]
        losses.append([sklearn.metrics.log_loss(correct, p) for p in (in_sample, *out_of_fold)])
    flattering, *honest = np.mean(losses, axis=0)
    assert flattering < math.log(2) - 0.01 and min(honest) > math.log(2), (flattering, honest)


# Choosing


def test_few_labels_get_few_parameters():
    def names(n):
        return {(r.method, r.class_aware) for r in recipes(n)}

    few = {("temperature", True), ("platt", True), ("platt", False)}
    some = few | {(m, aware) for m in ("beta", "venn-abers") for aware in (True, False)}
    assert names(20) == names(199) == few and names(200) == names(999) == some
    assert names(1000) == names(10**6) == some | {("isotonic", True), ("isotonic", False)}
    assert recipes(20, "isotonic") == [Recipe("isotonic", True), Recipe("isotonic", False)]
    assert [str(r) for r in recipes(9, "platt")] == ["platt, of P(label)", "platt, of the confidence"]


def scores_from(probabilities, truth, labels=("no", "yes")):
    predicted = probabilities.argmax(axis=1)
    return Scores(labels, probabilities, truth, probabilities.max(axis=1), predicted == truth)


def test_the_lowest_mean_log_loss_wins_not_the_lowest_ece_nor_the_first_seed(monkeypatch):
    scores = scores_from(*drawn(100))
    given = {"t": [], "aware": [], "blind": []}

    def planted(estimator, inputs, outcome, groups, seed):
        name = "blind" if isinstance(estimator, Platt) else "aware" if isinstance(estimator.calibrator, Platt) else "t"
        given[name].append((inputs, outcome, seed))
        sure = {"t": 0.5, "aware": 0.99 if seed == 3 else 0.01, "blind": 0.8}[name]
        return np.full(100, scores.correct.mean()) if name == "t" else np.where(scores.correct, sure, 1 - sure)

    monkeypatch.setattr(calibration, "cross_fit", planted)
    recipe, found = choose(scores, np.arange(100), seeds=(3, 4))
    assert recipe == Recipe("platt", False) and {v.shape for v in found.values()} == {(2, 100)} and len(found) == 3
    assert [seed for _, _, seed in given["blind"]] == [3, 4]
    assert np.array_equal(given["blind"][0][0], scores.confidence) and given["blind"][0][1] is scores.correct
    assert given["aware"][0][0] is scores.probabilities and given["t"][0][1] is scores.truth


def test_too_few_rows_or_one_outcome_are_one_clear_line():
    probabilities, truth = drawn(19)
    with pytest.raises(ValueError, match=r"^19 labelled rows; a calibrator needs at least 20$"):
        choose(scores_from(probabilities, truth), np.arange(19))
    probabilities, _ = drawn(20)
    for label, word in ((probabilities.argmax(axis=1), "right"), (probabilities.argmin(axis=1), "wrong")):
        with pytest.raises(ValueError, match=rf"^all 20 rows are {word}"):
            choose(scores_from(probabilities, label), np.arange(20))


@pytest.mark.parametrize("case", ["one error", "one true label"])
def test_a_rare_error_or_label_leaves_the_calibrators_that_can_bear_it(case):
    probabilities, _ = drawn(300)
    truth = probabilities.argmax(axis=1)
    truth = np.where(np.arange(300) == 7, 1 - truth, truth) if case == "one error" else np.zeros(300, int)
    try:
        recipe, _ = choose(scores_from(probabilities, truth), np.arange(300), seeds=(0,))
    except ValueError as error:
        assert "300" in str(error)
    else:
        assert recipe.method in METHODS


def test_a_promise_from_cross_fitted_scores_is_kept_by_the_calibrator_fitted_on_all_rows():
    """The threshold is chosen on scores of other calibrators than the one it is used with: does it still hold?"""
    from decisions import choose_threshold

    def world(draw, n):
        z = draw.normal(0, 1.6, n)  # the model's logit of label 1: too far out, and leaning to label 1
        true = expit(0.5 * z - 0.45)
        return np.column_stack([expit(-z), expit(z)]), true, (draw.random(n) < true).astype(int)

    draw = np.random.default_rng(0)
    everywhere, true, _ = world(draw, 20_000)
    right = np.where(everywhere.argmax(axis=1) == 1, true, 1 - true)
    broken, made = 0, 0
    for repeat in range(60):
        probabilities, _, truth = world(draw, 500)
        scores = cross_fit(ClasswiseCalibrator(Platt()), probabilities, truth, seed=repeat)
        threshold = choose_threshold(scores, probabilities.argmax(axis=1) == truth, 0.8).value
        if threshold is not None:
            taken = ClasswiseCalibrator(Platt()).fit(probabilities, truth).predict(everywhere) >= threshold
            made += 1
            broken += right[taken].mean() < 0.8
    assert made > 5 and broken <= binom.ppf(0.999, 60, 0.05)


# The calibrator file


def rows_of(probabilities, truth, labels, **common):
    return [
        predictions.scored(f"r{i}", f"secret zebra {i}", labels[t], dict(zip(labels, p, strict=True)), 0.9, **common)
        for i, (p, t) in enumerate(zip(probabilities.tolist(), truth, strict=True))
    ]


LABELS = {2: ("no", "yes"), 3: ("no", "yes", "maybe")}
ROWS = {k: rows_of(*drawn(220, k), LABELS[k], **COMMON) for k in LABELS}
FRESH = {k: rows_of(*drawn(90, k, seed=1), LABELS[k], **COMMON) for k in LABELS}
ALL = [Recipe(method, aware) for method in METHODS for aware in (True, False)]


@cache
def fitted(recipe, labels=2):
    estimator = recipe.estimator().fit(*recipe.inputs(scores_of(ROWS[labels])))
    on = frozenset(calibration.text_key(row.text) for row in ROWS[labels])
    rest = {"report_card": {"log_loss": 0.1 + 0.2, "n": 220}, "threshold": {"value": 0.75, "delta": 0.05}}
    identity = {name: COMMON[name] for name in ("fingerprint", "model", "task")}
    return FittedCalibrator(recipe, estimator, LABELS[labels], n=220, groups=200, fitted_on=on, **identity, **rest)


def test_a_predictions_file_becomes_arrays_and_bad_ones_are_refused():
    probabilities, truth = drawn(220, 3)
    failed = predictions.failed("x", "text", "yes", "too long", **COMMON)
    scores = scores_of([failed, *ROWS[3]])
    assert scores.labels == LABELS[3] and (scores.probabilities == probabilities).all()
    assert (scores.truth == truth).all() and (scores.confidence == probabilities.max(axis=1)).all()
    assert (scores.correct == (probabilities.argmax(axis=1) == truth)).all()
    assert scores[np.array([5, 2])].truth.tolist() == truth[[5, 2]].tolist()
    a, b = ROWS[2][:2]
    swapped = replace(b, probabilities=dict(reversed(b.probabilities.items())))
    for rows, message in (
        ([a, replace(b, label=None)], "1 of 2 scored rows have no label.*"),
        ([a, replace(b, label="other")], "row 'r1': its labels are not no, yes.*"),
        ([a, swapped], "row 'r1': its labels are not no, yes.*"),
        ([a, ROWS[3][0]], "row 'r0': its labels are not no, yes.*"),
        ([failed], "no row was scored"),
        ([], "no row was scored"),
    ):
        with pytest.raises(ValueError, match=rf"^{message}$"):
            scores_of(rows)


def voted(number, yes, label, n=10):
    """A row of Method 2: so many of its answers say yes."""
    votes = {"no": n - yes, "yes": yes}
    shares, extras = {name: count / n for name, count in votes.items()}, {"votes": votes, "calls": n}
    return predictions.scored(f"v{number}", f"vote {number}", label, shares, 1.0, **COMMON, extras=extras)


# 120 rows whose agreement says how often they are right, 60 of them unanimous of which 6 are wrong.
VOTED = [voted(i, 10, "yes" if i >= 6 else "no") for i in range(60)]
VOTED += [voted(60 + i, 7, "yes" if i % 10 < 7 else "no") for i in range(60)]


@pytest.mark.parametrize("recipe", [Recipe("platt", False), Recipe("platt", True)], ids=str)
def test_a_calibrator_of_votes_is_fitted_on_and_applied_to_smoothed_votes(recipe):
    scores = scores_of(VOTED)
    yes = np.array([(row.extras["votes"]["yes"] + 0.5) / 11 for row in VOTED])
    assert scores.probabilities == pytest.approx(np.stack([1 - yes, yes], axis=1), abs=1e-15)
    assert scores.confidence.tolist() == [row.confidence for row in VOTED]  # what a report of raw numbers shows
    estimator = recipe.estimator().fit(*recipe.inputs(scores))
    inputs = np.stack([1 - yes, yes], axis=1) if recipe.class_aware else np.maximum(yes, 1 - yes)
    truth = np.array([row.label == "yes" for row in VOTED]).astype(int)
    target = truth if recipe.class_aware else truth == 1  # every row says yes
    assert np.array_equal(estimator.predict(inputs), recipe.estimator().fit(inputs, target).predict(inputs))
    calibrator = replace(fitted(recipe), estimator=estimator)
    assert calibrator.calibrate(VOTED) == pytest.approx(estimator.predict(inputs), abs=1e-15)
    # Ten of ten is a log odds of 3, not of 14: the six unanimous wrong rows do not flatten the curve of all others.
    said = dict(zip(yes.round(3).tolist(), calibrator.calibrate(VOTED).tolist(), strict=True))
    assert said == pytest.approx({0.955: 0.9, 0.682: 0.7}, abs=0.02)
    raw = np.array([row.confidence for row in VOTED])
    assert (
        Platt().fit(raw, truth == 1).predict(np.array([0.9]))[0]
        < estimator.predict(np.array([[0.1, 0.9]]) if recipe.class_aware else np.array([0.9]))[0] - 0.05
    )


def test_votes_that_are_no_counts_stop_fitting_and_applying():
    wrong = replace(VOTED[0], id="w", extras={"votes": {"yes": 10, "no": 0}})
    for call in (lambda: scores_of([*VOTED, wrong]), lambda: fitted(Recipe("platt", False)).calibrate([wrong])):
        with pytest.raises(ValueError, match=r"^row 'w': its votes are .+, not a count for each label"):
            call()


@pytest.mark.parametrize("recipe", ALL, ids=str)
def test_applying_adds_the_confidence_the_decision_and_what_was_seen(recipe):
    calibrator = fitted(recipe)
    failed = predictions.failed("x", "text", "yes", "too long", **COMMON)
    rows = [failed, *(replace(row, text=f"new {row.id}", extras={"note": 3}) for row in FRESH[2]), ROWS[2][0], failed]
    applied, scored = calibrator.apply(rows), rows[1:-1]
    assert applied[0] is failed and applied[-1] is failed
    inputs = [row.confidence for row in scored]
    if recipe.class_aware:
        inputs = [[row.probabilities["no"], row.probabilities["yes"]] for row in scored]
    expected = calibrator.estimator.predict(np.array(inputs))
    for before, after, value in zip(scored, applied[1:-1], expected, strict=True):
        added = {"calibrated_confidence": value, "decision": "automate" if value >= 0.75 else "review"}
        added |= {"fitted_on": True} if before is ROWS[2][0] else {}
        assert after == replace(before, extras={**before.extras, **added})
    highest = max(expected)
    for threshold, count in ((highest, (expected == highest).sum()), (0, len(expected)), (np.nextafter(highest, 2), 0)):
        assert [row.extras.get("decision") for row in calibrator.apply(rows, threshold)].count("automate") == count
    for nothing in (None, {"value": None}):
        decisions = [r.extras.get("decision") for r in replace(calibrator, threshold=nothing).apply(rows)]
        assert decisions == [None] + ["review"] * len(scored) + [None]
    assert calibrator.apply([]) == [] and calibrator.apply([failed]) == [failed]


def test_applying_again_replaces_what_another_calibrator_said():
    stale = {"note": 3, "calibrated_confidence": 2.0, "decision": "?", "fitted_on": True}
    row = replace(FRESH[2][0], text="never seen", extras=stale)
    assert fitted(ALL[0]).apply([row]) == fitted(ALL[0]).apply([replace(row, extras={"note": 3})])


def test_another_models_rows_or_labels_are_refused():
    calibrator, row = fitted(Recipe("platt", False)), FRESH[2][0]
    with pytest.raises(ValueError, match=r"^the calibrator is for tiny on task 'sentiment' .+ 3f9c2a71.+ deadbeef.+$"):
        calibrator.apply([row, replace(row, fingerprint="deadbeef")])
    swapped = replace(row, id="s", probabilities=dict(reversed(row.probabilities.items())))
    for other in (swapped, FRESH[3][0]):
        with pytest.raises(ValueError, match=r"^the calibrator's labels are no, yes, not .+$"):
            calibrator.apply([row, other])


@pytest.mark.parametrize("text", ["Good  FILM\n", "\ud83c lone"])
def test_a_text_is_known_again_whatever_its_case_and_spaces(text):
    calibrator = replace(fitted(ALL[0]), fitted_on=frozenset([calibration.text_key(f" {text.lower()} ")]))
    assert calibrator.apply([replace(FRESH[2][0], text=text)])[0].extras["fitted_on"] is True
    assert "fitted_on" not in calibrator.apply([replace(FRESH[2][0], text=text + "!")])[0].extras


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("recipe", ALL, ids=str)
def test_every_number_survives_the_file_and_no_text_gets_into_it(recipe, labels, tmp_path):
    calibrator, path = fitted(recipe, labels), tmp_path / "calibrator.json"
    save(path, calibrator)
    loaded = load(path)
    assert replace(loaded, estimator=None) == replace(calibrator, estimator=None)
    assert (loaded.calibrate(FRESH[labels]) == calibrator.calibrate(FRESH[labels])).all()
    assert "secret" not in path.read_text() and "zebra" not in path.read_text() and [*tmp_path.iterdir()] == [path]
    save(tmp_path / "again", loaded)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("step", ["write_text", "replace", "numbers"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_write_leaves_the_old_file_or_none(step, existing, tmp_path, monkeypatch):
    path, calibrator = tmp_path / "calibrator.json", fitted(ALL[0])
    if existing:
        save(path, calibrator)
    before = path.read_bytes() if existing else None

    def full_disk(self, *args, **kwargs):
        self.write_bytes(b'{"format": "half')
        raise OSError("no space left")

    if step == "numbers":
        calibrator = replace(calibrator, report_card={"log_loss": math.nan})
    else:
        monkeypatch.setattr(Path, step, full_disk)
    with pytest.raises((OSError, ValueError)):
        save(path, calibrator)
    assert (path.read_bytes() if path.exists() else None) == before


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrators")


@cache
def record(folder, recipe, labels=2):
    save(folder / "file.json", fitted(recipe, labels))
    return json.loads((folder / "file.json").read_text(encoding="utf-8"))


GONE = object()
PLATT, TEMPERATURE, BETA, ISOTONIC, VENN_ABERS = (Recipe(method, False) for method in METHODS)
AWARE = Recipe("platt", True)


def edited(record, path, value):
    record = copy.deepcopy(record)
    *parents, last = path
    holder = record
    for key in parents:
        holder = holder[key]
    if value is GONE:
        del holder[last]
    else:
        holder[last] = value
    return record


NAMES = ["method", "labels", "parameters", "n", "report_card", "threshold", "class_aware", "fingerprint", "model"]
BAD = [  # recipe, path of the field, values it cannot have
    *((PLATT, name, [GONE]) for name in [*NAMES, "task", "groups", "fitted_on"]),
    (PLATT, "format", [GONE, "calibrated-confidence calibrator, version 2"]),
    (PLATT, "method", ["forest", "beta", None, [], "x" * 10**6]),
    (PLATT, "class_aware", [0, 1, None, True]),
    (AWARE, "class_aware", [False]),
    (PLATT, "labels", [["no", "no", "yes"], ["no"], "no", [1, 2], [["no"], "yes"], ["no"] * 10**5]),
    (PLATT, "model", ["", None]),
    (PLATT, "fingerprint", [3]),
    (PLATT, "n", [219, 220.0, 0, "220"]),
    (PLATT, "groups", [221, 0, True]),
    (PLATT, "fitted_on", [[], "0123456789ab", ["0123456789AB"], ["0123456789ab\n"], ["0123456789a"]]),
    (PLATT, "report_card", [[], None, "good"]),
    (PLATT, "fitted_on", [{"0123456789ab": 1}, [12], None]),
    (PLATT, "threshold", [{}, 0.9, [0.9], "0.9", False, ""]),
    (PLATT, "threshold value", [1.01, -0.01, "0.9", True, [0.9], 10**400]),
    (PLATT, "parameters slope_", [GONE, "0.5", True, None, [1.0], 10**400]),
    (AWARE, "parameters", [{}, [], {"0": {"slope_": 1, "intercept_": 0}}]),
    (AWARE, "parameters 0", [{"slope_": 1, "intercept_": 0}]),
    (TEMPERATURE, "parameters temperature_", [0, 0.04, 20.1, -1]),
    (BETA, "parameters a_", [-1e-9]),
    (BETA, "parameters b_", [-1e-9]),
    (PLATT, "parameters", [None, [], 1, {"slope_": 1, "intercept_": 0, "more_": 0}]),
    (ISOTONIC, "parameters", [{"scores_": [x, 0.5], "values_": [0.1, 0.2]} for x in (0.5, 0.6, -0.1)]),
    (VENN_ABERS, "parameters", [{"scores_": [0.5], "right_": [0], "count_": [n]} for n in (0, 0.5, -1)]),
    (ISOTONIC, "parameters scores_", [[], 0.5, [0.1], "0.5"]),
    (ISOTONIC, "parameters scores_ -1", [0.1, -0.1, 1.1, "1", None, [0.9], True, GONE]),
    (ISOTONIC, "parameters values_ -1", [0.0, 1.1]),
    (VENN_ABERS, "parameters count_ 3", [0.5, 0, GONE]),
    (VENN_ABERS, "parameters right_ 3", [10**9, -1]),
]
CASES = [
    pytest.param(recipe, path, value, id=f"{recipe.method} {path} {str(value)[:20]}")
    for recipe, path, values in BAD
    for value in values
]


@pytest.mark.parametrize(("recipe", "path", "value"), CASES)
def test_an_edited_file_is_refused_in_one_line_that_names_the_field(recipe, path, value, folder):
    keys = [int(key) if key in ("-1", "3") else key for key in path.split()]
    (folder / "edited.json").write_text(json.dumps(edited(record(folder, recipe), keys, value)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as caught:
        load(folder / "edited.json")
    where, reason = str(caught.value).split("edited.json")
    # Some edits first show in another field: a smaller n in fitted_on, another method in the parameters.
    also = {"n": "fitted_on", "method": "parameters", "class_aware": "parameters", "format": "calibrator file"}
    named = "|".join(
        [keys[0], also.get(keys[0], keys[0]), *(METHODS[recipe.method].FITTED if keys[0] == "parameters" else [])]
    )
    assert where == f"{folder}/" and re.search(rf"\b({named})( |'|:|$)", reason), reason


TEXTS = {
    "empty": "",
    "not JSON": "method = platt",
    "cut off": '{"format": "calibrated-',
    "an array": "[1]",
    "null": "null",
    "NaN": '{"n": NaN}',
    "infinity": '{"n": -Infinity}',
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "endless digits": '{"n": ' + "9" * 5000 + "}",
    "huge": json.dumps([0] * 2_000_000),
    "not UTF-8": b"\xff\xfe\x00{}",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_no_calibrator_file_is_refused_in_one_line(text, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"^[^\n]{1,400}$") as caught:
        load(path)
    assert str(path) in str(caught.value)
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(OSError, match=r"^[^\n]+$"):
            load(missing)


@pytest.mark.parametrize("field", ["parameters slope_", "report_card log_loss"])
@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused(field, constant, folder):
    text = json.dumps(edited(record(folder, PLATT), field.split(), "HERE")).replace('"HERE"', constant)
    (folder / "edited.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$"):
        load(folder / "edited.json")


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, 9e307, -9e307, 1e-308, -0.0, True])
JSON = st.recursive(
    st.none() | NUMBERS | st.text(max_size=5) | st.sampled_from([*METHODS, "all", "no", "maybe"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.just("value"), inner),
    max_leaves=5,
)


@settings(deadline=None, max_examples=250, derandomize=True)
@given(recipe=st.sampled_from(ALL), labels=st.sampled_from([2, 3]), value=JSON, data=st.data())
def test_a_fuzzed_file_is_refused_or_still_gives_probabilities(recipe, labels, value, data, folder):
    path, inner = [], record(folder, recipe, labels)
    while isinstance(inner, dict | list) and inner and (not path or data.draw(st.booleans())):
        path.append(data.draw(st.sampled_from([*(inner if isinstance(inner, dict) else range(len(inner)))])))
        inner = inner[path[-1]]
    file = folder / "fuzzed.json"
    file.write_text(json.dumps(edited(record(folder, recipe, labels), path, value)), encoding="utf-8")
    try:
        loaded = load(file)
    except ValueError:
        return
    assert all(isinstance(label, str) for label in loaded.labels) and {type(loaded.n), type(loaded.groups)} == {int}
    common = COMMON | {"fingerprint": loaded.fingerprint}
    probabilities = np.vstack([drawn(20, len(loaded.labels))[0], np.eye(len(loaded.labels))])
    rows = rows_of(probabilities, [0] * len(probabilities), loaded.labels, **common)
    values = loaded.calibrate(rows)
    assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1
    assert {row.extras["decision"] for row in loaded.apply(rows)} <= {"automate", "review"}


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        (PLATT, {"slope_": 9e307, "intercept_": 0}),
        (BETA, {"a_": 9e307, "b_": 9e307, "m_": 0}),
        (VENN_ABERS, {"scores_": [0.6, 0.8], "right_": [9e307] * 2, "count_": [9e307] * 2}),
    ],
)
def test_parameters_no_fit_could_give_are_refused_or_stay_finite(recipe, parameters, folder):
    (folder / "edited.json").write_text(
        json.dumps(record(folder, recipe) | {"parameters": parameters}), encoding="utf-8"
    )
    try:
        values = load(folder / "edited.json").calibrate(FRESH[2])
    except ValueError:
        return
    assert np.isfinite(values).all()
