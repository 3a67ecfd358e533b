"""relabelling.py: what changed predictions did, counted by hand and in simulated worlds."""

import numpy as np
import pytest
from scipy.stats import binom
from test_label_calibration import world

import relabelling
from calibration import Scores, VectorScalingCalibrator, cross_fit_labels
from decisions import choose_threshold
from relabelling import effect, effect_text, relabelled_scores


def scores_of(probabilities, truth):
    labels = tuple("abcdefghijklmnopqrstuvwxyz"[: probabilities.shape[1]])
    return Scores(labels, probabilities, truth, probabilities.max(axis=1), probabilities.argmax(axis=1) == truth)


def test_the_counts_and_gains_are_those_by_hand():
    before = scores_of(np.array([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.1, 0.9]]), np.array([1, 1, 0, 1]))
    after = relabelled_scores(before, np.array([[0.4, 0.6], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]]))
    assert after.correct.tolist() == [True, False, False, True] and after.confidence.tolist() == [0.6, 0.6, 0.7, 0.8]
    found = effect(before, after, np.arange(4))
    assert [found[name] for name in ("n", "changed", "became_right", "became_wrong")] == [4, 2, 1, 1]
    assert (found["accuracy_before"], found["accuracy_after"], found["accuracy_gain"]) == (0.5, 0.5, 0)
    assert (found["commonest_label"], found["commonest_share"], found["above_commonest"]) == ("b", 0.75, -0.25)
    assert found["label_log_loss_after"] == pytest.approx(-np.mean(np.log([0.6, 0.4, 0.3, 0.8])))
    assert not found["helps"] and "not shown to beat always answering 'b'" in effect_text(
        found | {"protocol": "held-out"}, True
    )


def cross_fitted_effect(seed, bias, rows=400, labels=5):
    before = scores_of(*world(seed, labels, rows, bias=bias))
    after = cross_fit_labels(VectorScalingCalibrator(), before.probabilities, before.truth, seeds=[0])
    return effect(before, relabelled_scores(before, after), np.arange(rows), seed)


def test_it_is_said_to_help_where_there_is_a_class_bias_and_not_where_there_is_none(monkeypatch):
    monkeypatch.setattr("calibration_metrics.resamples.__defaults__", (200, 0))
    biased, fair = ([cross_fitted_effect(seed, bias) for seed in range(6)] for bias in (1.5, 0.0))
    assert sum(found["helps"] for found in biased) >= 5 and sum(found["helps"] for found in fair) <= 1
    text = effect_text(biased[0] | {"protocol": "out-of-fold"}, False)
    assert "(--relabel) would help" in text and f"{biased[0]['accuracy_after']:.3f}, out-of-fold" in text
    assert "is not shown to help" in effect_text(fair[0] | {"protocol": "out-of-fold", "helps": False}, False)


def test_a_ranking_that_is_no_good_is_not_said_to_help():
    # Always the wrong label of two, at random: turned round it is the majority's answer, and no better.
    draw = np.random.default_rng(0)
    truth = (draw.random(300) < 0.15).astype(int)
    second = draw.uniform(0.9, 0.99, 300)
    before = scores_of(np.stack([1 - second, second], axis=1), truth)
    after = cross_fit_labels(VectorScalingCalibrator(), before.probabilities, truth, seeds=[0])
    found = effect(before, relabelled_scores(before, after), np.arange(300))
    assert found["accuracy_gain_low"] > 0.5 and not found["helps"] and found["above_commonest"] <= 0
    assert relabelling.effect_text(found | {"protocol": "out-of-fold"}, False).count("not shown") == 2


def broken_guarantees(repeats, rows, target):
    """(guarantees made, broken ones) of new predictions: thresholds from cross-fitted ones, used with all rows' fit."""
    made, broken = 0, 0
    for seed in range(repeats):
        probabilities, truth = world(seed, 3, rows + 4000, bias=1.0)
        fit = probabilities[:rows], truth[:rows]
        out_of_fold = cross_fit_labels(VectorScalingCalibrator(), *fit, seeds=[seed])
        value = choose_threshold(out_of_fold.max(axis=1), out_of_fold.argmax(axis=1) == fit[1], target).value
        if value is not None:
            q = VectorScalingCalibrator().fit(*fit).predict_labels(probabilities[rows:])
            taken = q.max(axis=1) >= value
            made += 1
            broken += (q.argmax(axis=1) == truth[rows:])[taken].mean() < target
    return made, broken


@pytest.mark.study
def test_guarantees_about_new_predictions_are_broken_in_one_set_of_twenty_at_most():
    for rows, target in ((200, 0.9), (1000, 0.9), (300, 0.8)):
        made, broken = broken_guarantees(150, rows, target)
        assert made >= 15 and broken <= binom.ppf(0.99, 150, 0.05), (rows, target, made, broken)


def test_a_guarantee_about_new_predictions_is_kept():
    made, broken = broken_guarantees(20, 300, 0.85)
    assert made >= 10 and broken <= binom.ppf(0.999, 20, 0.05)
