"""shortlists.py: is the true label on nine lists of ten, of each label's rows too, and how long are the lists?

The conformal rank is checked against every rank of a new row, coverage in simulated worlds.
"""

import numpy as np
import pytest
from test_label_calibration import world

import shortlists
from calibration import VectorScalingCalibrator, cross_fit_labels, grouped_folds
from shortlists import (
    Shortlist,
    coverage_report,
    cross_fitted_lists,
    fit_shortlist,
    least_probabilities,
    least_probability,
    on_list,
)


@pytest.mark.parametrize(("n", "coverage"), [(9, 0.9), (8, 0.9), (19, 0.95), (20, 0.8), (1, 0.5), (57, 0.9)])
def test_a_new_row_at_any_rank_is_covered_often_enough_and_no_more_often_than_must_be(n, coverage):
    # Of n + 1 exchangeable rows each is as likely the new one: the others choose, and it is on the list or not.
    values, covered = np.linspace(0.1, 0.9, n + 1), 0
    for new in range(n + 1):
        covered += values[new] >= least_probability(np.delete(values, new), coverage)
    assert covered / (n + 1) >= coverage - 1e-9
    assert covered == n + 1 or covered / (n + 1) < coverage + 1 / (n + 1)


def test_a_label_with_enough_rows_has_its_own_least_probability_and_the_rest_share_one():
    truth = np.repeat([0, 1, 2], [20, 19, 40])
    draw = np.random.default_rng(0)
    of_truth = draw.random(79)
    calibrated = np.zeros((79, 3))
    calibrated[np.arange(79), truth] = of_truth
    least = least_probabilities(calibrated, truth, 0.9)
    by_hand = [np.sort(of_truth[:20])[1], np.sort(of_truth)[7], np.sort(of_truth[39:])[3]]  # ranks 2.1, 8, 4.1
    assert least.tolist() == by_hand
    lists = on_list(np.array([[0.0, 1.0, 0.0]]), np.array([2]), np.array([0.5, 0.5, 0.5]))
    assert lists.tolist() == [[False, True, True]]  # the prediction is on every list


def fitted(seed, labels, rows, to_review=None, **world_of):
    probabilities, truth = world(seed, labels, rows, **world_of)
    out_of_fold = cross_fit_labels(VectorScalingCalibrator(), probabilities, truth, seeds=[0])
    to_review = np.ones(rows, dtype=bool) if to_review is None else to_review(out_of_fold)
    return fit_shortlist(probabilities, truth, out_of_fold, to_review)


def test_rows_to_review_are_covered_and_no_label_is_hidden_by_the_others():
    """One least probability for all labels covers 90 % of the rows, and of a rare label far fewer."""
    worst = {"one for all": [], "one for each": []}
    for seed in range(4):
        shortlist = fitted(seed, 6, 800, hard, imbalance=2.0)
        probabilities, truth = world(seed, 6, 4000, imbalance=2.0)
        calibrated = shortlist.probabilities(probabilities)
        rows = np.flatnonzero(hard(calibrated))
        calibrated, truth, predicted = calibrated[rows], truth[rows], probabilities[rows].argmax(axis=1)
        one = np.full(6, least_probability(calibrated[np.arange(len(truth)), truth], 0.9))
        for name, lists in (
            ("one for all", on_list(calibrated, predicted, one)),
            ("one for each", shortlist.lists(calibrated, predicted)),
        ):
            covered = lists[np.arange(len(truth)), truth]
            assert abs(covered.mean() - 0.9) < 0.06
            worst[name].append(min(covered[truth == label].mean() for label in np.flatnonzero(shortlist.own)))
    assert np.mean(worst["one for all"]) < 0.75 < 0.82 < np.mean(worst["one for each"]), worst


def hard(calibrated):
    """The rows that a person would get."""
    return calibrated.max(axis=1) < 0.8


def test_cross_fitted_lists_do_not_see_their_own_fold():
    probabilities, truth = world(1, 4, 200)
    to_review, predicted = np.arange(200) % 3 > 0, probabilities.argmax(axis=1)
    folds = grouped_folds(probabilities, truth)
    lists = cross_fitted_lists(probabilities, predicted, truth, to_review, folds)
    for train, test in folds:
        rows = np.array([row for row in train if to_review[row]])
        least = least_probabilities(probabilities[rows], truth[rows], shortlists.COVERAGE)
        assert (lists[test] == on_list(probabilities[test], predicted[test], least)).all()


def test_two_labels_or_few_rows_have_no_shortlist_and_one_for_other_labels_is_refused():
    probabilities, truth = world(0, 2, 100)
    assert fit_shortlist(probabilities, truth, probabilities, np.ones(100, dtype=bool)) is None
    probabilities, truth = world(0, 3, 100)
    assert fit_shortlist(probabilities, truth, probabilities, np.arange(100) < 19) is None
    assert fit_shortlist(probabilities, truth, probabilities, np.arange(100) < 20) is not None
    with pytest.raises(ValueError, match="differ in length"):
        Shortlist(0.9, 1.0, (0.0, 0.0), (0.1,), (5, 5))


def test_nine_of_ten_new_rows_of_each_label_are_covered():
    covered, counts, own = np.zeros(6), np.zeros(6), []
    for seed in range(6):
        shortlist = fitted(seed, 6, 500)
        probabilities, truth = world(seed, 6, 500 + 1500)
        asked, truth = probabilities[500:], truth[500:]  # the first 500 differ from those fitted on: another draw
        lists = shortlist.lists(shortlist.probabilities(asked), asked.argmax(axis=1))
        report = coverage_report(lists, truth, list("abcdef"), shortlist)
        assert 1 <= report["mean_length"] < 5
        own.append(shortlist.own)
        for number, found in enumerate(report["by_label"].values()):
            counts[number] += found["n"]
            covered[number] += found["covered"]
    assert np.all(own) and (covered / counts > 0.86).all() and abs(covered.sum() / counts.sum() - 0.9) < 0.03
