"""verdict.py: worlds whose verdict is known, tests against scipy's, and how often chance alone is called better."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

import verdict
from calibration_metrics import log_loss
from predictions import scored

COMMON = {"method": "logprobs", "model": "m", "task": "t", "fingerprint": "00000000"}
NEUTRAL = [f"{word}{n}" for word in ("fly", "sea", "tree", "cold", "warm", "north", "river") for n in range(15)]


def world(truth, scores, labels=("ham", "spam"), telling=False, mass=0.9, **common):
    """Rows of these labels whose probabilities are a softmax of scores [n, labels]; words tell the label or nothing."""
    draw, rows = np.random.default_rng(3), []
    for number, (label, values) in enumerate(zip(truth, scores, strict=True)):
        words = [*draw.choice(NEUTRAL, 8), *([f"sign{label}"] * telling)]
        p = np.exp(values - np.max(values))
        probabilities = dict(zip(labels, (p / p.sum()).tolist(), strict=True))
        rows.append(scored(str(number), " ".join(words), labels[label], probabilities, mass, **COMMON | common))
    return rows


def two_labels(n, share, separation, shift, seed=0):
    """Truth with that share of spam, and scores whose difference is normal around +-separation, moved by shift."""
    draw = np.random.default_rng(seed)
    truth = (np.arange(n) < share * n).astype(int)[draw.permutation(n)]
    spam = draw.normal((2 * truth - 1) * separation) + shift
    return truth, np.stack([np.zeros(n), spam], axis=1)


def judged(*made, **options):
    found = verdict.judge(world(*made, **options))
    return found, found.record()["sentences"]


# Worlds


def test_a_classifier_that_says_spam_to_everything_but_ranks_well_has_a_class_bias():
    found, said = judged(*two_labels(300, 0.3, 2, 4), mass=0.2)
    assert said[0] == "worse than always answering 'ham' (0.700): the question does not work"
    assert said[1].startswith("the ranking by P(spam) (AUC 0.9") and said[1].endswith("is good")
    assert said[2].startswith("the answers have a class bias") and "--relabel may change predictions" in said[2]
    assert said[3].startswith("a label mass of 0.200")
    assert found.accuracy.value < 0.5 and found.relabelled > 0.9 and found.calibration_part > 0.3
    assert verdict.next_steps(found)[:2] == ["probe_confidence.py", "calibration_demo.py --relabel"]


def test_a_classifier_with_swapped_answer_words_is_recognised():
    _, said = judged(*two_labels(300, 0.3, -1, 0))
    assert said[0].startswith("worse than always answering 'ham'") and "are the answer words swapped?" in said[1]


def test_scores_that_mean_nothing_do_not_tell_the_labels_apart():
    _, said = judged(*two_labels(300, 0.5, 0, 0))
    assert said[0].startswith("no better than always answering 'ham' (0.500), as far as 300 rows can show")
    assert "does not tell the labels apart" in said[1]


def test_only_one_label_is_ever_predicted():
    found, said = judged(*two_labels(200, 0.4, 1, -20))
    assert said[0] == "only 'ham' is ever predicted: the question does not work"
    assert found.over_commonest.difference == 0


@pytest.mark.parametrize(
    ("separation", "telling", "sentence"),
    [
        (2, False, "better than always answering 'ham' (0.600) and than a bag of words learned from the same labels"),
        (0.5, True, "better than always answering 'ham' (0.600), but worse than a bag of words"),
        (5, True, "as well, as far as 300 rows can show: consider whether you need a language model"),
    ],
)
def test_a_working_classifier_stands_beside_a_bag_of_words(separation, telling, sentence):
    found, said = judged(*two_labels(300, 0.4, separation, 0), telling=telling)
    assert sentence in said[0] and len(said) == 1
    assert bool(verdict.next_steps(found)) == telling


def test_many_labels_have_a_verdict_too():
    draw = np.random.default_rng(0)
    truth, labels = draw.integers(20, size=400), [f"label {n}" for n in range(20)]
    scores = draw.normal(size=(400, 20)) + 3 * np.eye(20)[truth]
    found, said = judged(truth, scores, labels=labels)
    assert said[0].startswith(f"better than always answering {found.commonest!r}") and found.auc is None
    assert found.labels == 20 and found.commonest_share == np.bincount(truth).max() / 400


# Numbers


def test_the_numbers_are_those_of_the_rows():
    truth, scores = two_labels(250, 0.4, 1, 1)
    rows = world(truth, scores)
    found = verdict.judge(rows)
    confidence = np.array([row.confidence for row in rows])
    correct = np.array([row.prediction == row.label for row in rows])
    low, high = binomtest(int(correct.sum()), 250).proportion_ci(0.95, "exact")
    assert (found.accuracy.value, found.n, found.groups) == (correct.mean(), 250, 250)
    assert np.allclose([found.accuracy.low, found.accuracy.high], [low, high])
    spam = [row.probabilities["spam"] for row in rows]
    assert np.isclose(found.auc.value, roc_auc_score(truth, spam))
    assert np.isclose(found.auroc.value, roc_auc_score(correct, confidence))
    assert np.isclose(found.log_loss, log_loss(confidence, correct)) and np.isclose(found.label_mass, 0.9)
    assert np.isclose(found.refinement + found.calibration_part, found.log_loss)
    # A calibrator of the caller's own takes the place of Platt's.
    told = verdict.judge(rows, recalibrated=np.full(250, correct.mean()))
    assert np.isclose(told.refinement, log_loss(np.full(250, correct.mean()), correct))
    # And what was learned from the words once need not be learned again.
    words = verdict.bag_of_words_for(rows, range(250))
    assert verdict.judge(rows, range(250), words=words) == verdict.judge(rows, range(250))


def test_a_difference_counts_where_mcnemar_s_test_and_whole_groups_say_so():
    alone = np.arange(40)
    ours, theirs = np.ones(40, dtype=bool), np.arange(40) >= 5
    assert binomtest(0, 5).pvalue > 0.05  # five rows of which all speak for one: the bootstrap alone would call it sure
    found = verdict.gain(ours, theirs, alone)
    assert found.low > 0 and found.sign == 0 and found.difference == 5 / 40
    assert verdict.gain(ours, np.arange(40) >= 8, alone).sign == 1
    assert verdict.gain(np.arange(40) >= 8, ours, alone).sign == -1
    one_group = np.where(np.arange(40) < 8, 0, np.arange(40))  # all eight of them are one text
    assert verdict.gain(ours, np.arange(40) >= 8, one_group).sign == 0
    assert verdict.gain(ours, ours, alone) == verdict.Gain(0, 0, 0, 0)


def test_of_many_rows_a_sample_is_tested_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(verdict, "ROWS", 200)
    rows = world(*two_labels(700, 0.3, 2, 0))
    found = verdict.judge(rows)
    right = sum(row.prediction == row.label for row in rows)
    assert (found.n, found.tested, found.accuracy.value) == (700, 200, right / 700)
    assert "200 of them drawn" in verdict.text(found.record())


def false_alarms(worlds, n, groups):
    """How often a classifier that is as good as another on average is called better or worse."""
    draw, alarms = np.random.default_rng(4), 0
    for _ in range(worlds):
        ours, theirs = draw.random((2, n // groups)) < 0.7
        alarms += verdict.gain(*(np.repeat(o, groups) for o in (ours, theirs)), np.arange(n) // groups).sign != 0
    return alarms


@pytest.mark.study
def test_chance_is_called_a_difference_in_one_world_of_twenty():
    for n, groups in ((60, 1), (300, 1), (300, 3)):
        assert false_alarms(1000, n, groups) <= 67  # 99 % of Bin(1000, .05)


# No verdict


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (world(*two_labels(19, 0.5, 1, 0)), "19 labelled rows are too few, at least 20"),
        (world(*two_labels(40, 0, 1, 0)), "all 40 labelled rows are 'ham'"),
        (
            [replace(row, extras={"purpose": "chosen"}) for row in world(*two_labels(40, 0.5, 1, 0))],
            "40 of 40 labelled rows were chosen to be labelled",
        ),
    ],
)
def test_where_nothing_can_be_said_there_is_no_number(rows, why):
    text = verdict.text(verdict.judge(rows).record())
    assert text.startswith(f"Verdict: none: {why}") and "accuracy" not in text and "next" not in text


def test_what_cannot_be_fitted_is_left_out():
    rows = [replace(row, text="the same words") for row in world(*two_labels(40, 0.5, 3, 0))]
    found = verdict.judge(rows)  # one group, so no folds
    assert (found.groups, found.bag_of_words, found.relabelled, found.refinement) == (1, None, None, None)
    assert "bag of words" not in verdict.text(found.record())
    assert verdict.judge(world(*two_labels(40, 0.5, 30, 0))).auroc is None  # all are right


def test_a_hostile_label_cannot_command_the_terminal():
    truth, scores = two_labels(60, 0.4, 1, 0)
    assert "\x1b" not in verdict.text(verdict.judge(world(truth, scores, labels=("a", "\x1b[2J\nb"))).record())


def test_chance_is_seldom_called_a_difference():
    assert false_alarms(60, 100, 2) <= 8  # 99 % of Bin(60, .05)
