"""Shortlists for rows that a person decides: the labels that may be right, the most probable first.

    shortlist = fit_shortlist(probabilities, truth, out_of_fold, to_review)
    shortlist.lists(shortlist.probabilities(probabilities), predicted)          # bool [n, labels]

A label is on the list from a least probability on, which is chosen so that 90 % of the rows to review have their true
label on it (split conformal prediction with the LAC score: Sadinle, Lei and Wasserman, JASA 2019). Over all labels
together some would be covered far less than others; so a label that enough of the rows have gets a least probability
of its own (class-conditional: Vovk, 2012), and 90 % of *its* rows are covered. It is chosen on rows that go to review,
because those are what a reviewer sees, from probabilities of calibrators that did not see the row's group.

A list is help for the reviewer, never a rule for automation: that the right label is on 90 % of the lists says nothing
about how often a list of one label is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.special import softmax

from calibrators import SMALLEST, Number, Share
from label_calibration import VectorScalingCalibrator

COVERAGE = 0.9
ENOUGH = 2.0  # expected misses among a label's rows from which on it has a least probability of its own


@dataclass(frozen=True)
class Shortlist:
    """From which probability on each label is on the list, and the vector scaling that gives the probabilities."""

    coverage: Annotated[Number, Field(gt=0, lt=1)]
    beta: Number
    biases: tuple[Number, ...]  # [labels]
    least: tuple[Share, ...]  # [labels]
    rows: tuple[Annotated[int, Field(ge=0)], ...]  # to review, of each true label, that it was chosen on

    def __post_init__(self) -> None:
        if not len(self.biases) == len(self.least) == len(self.rows):
            raise ValueError("biases, least and rows differ in length")

    @property
    def own(self) -> list[bool]:
        """Which labels have a least probability chosen on their own rows."""
        return [has_enough(count, self.coverage) for count in self.rows]

    def probabilities(self, probabilities: np.ndarray) -> np.ndarray:
        """The calibrated probabilities that a list is ordered by, [n, labels]."""
        return softmax(self.beta * np.log(np.clip(probabilities, SMALLEST, 1)) + np.array(self.biases), axis=1)

    def lists(self, calibrated: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Which labels are on the list of each row, bool [n, labels]; the predicted one [n] always is."""
        return on_list(calibrated, predicted, np.array(self.least))


def has_enough(count: int, coverage: float) -> bool:
    return count * (1 - coverage) >= ENOUGH - 1e-9


def on_list(calibrated: np.ndarray, predicted: np.ndarray, least: np.ndarray) -> np.ndarray:
    """bool [n, labels]"""
    lists = calibrated >= least
    lists[np.arange(len(predicted)), predicted] = True
    return lists


def least_probability(of_truth: np.ndarray, coverage: float) -> float:
    """The probability that the true label of so large a share of new rows has or exceeds; 0 where rows are too few.

    The floor((n + 1)(1 - coverage))-th smallest: a new row like these, at any rank among them with the same chance,
    falls below it with probability 1 - coverage at most.
    """
    rank = math.floor((len(of_truth) + 1) * (1 - coverage) + 1e-9)
    return float(np.sort(of_truth)[rank - 1]) if rank else 0.0


def least_probabilities(calibrated: np.ndarray, truth: np.ndarray, coverage: float) -> np.ndarray:
    """For each label [labels]: from its own rows where these are enough, else from all."""
    of_truth = calibrated[np.arange(len(truth)), truth]
    least = np.full(calibrated.shape[1], least_probability(of_truth, coverage))
    for label, count in enumerate(np.bincount(truth, minlength=calibrated.shape[1])):
        if has_enough(int(count), coverage):
            least[label] = least_probability(of_truth[truth == label], coverage)
    return least


def fit_shortlist(
    probabilities: np.ndarray,
    truth: np.ndarray,
    out_of_fold: np.ndarray,
    to_review: np.ndarray,
    coverage: float = COVERAGE,
) -> Shortlist | None:
    """The shortlist of labelled rows: `out_of_fold` are their vector-scaled probabilities [n, labels], cross-fitted.

    `to_review` [n] says which of the rows a person would get. None with two labels, where a list says nothing, and
    with too few rows to review.
    """
    labels = probabilities.shape[1]
    if labels < 3 or not has_enough(int(to_review.sum()), coverage):
        return None
    fitted = VectorScalingCalibrator().fit(probabilities, truth)
    least = least_probabilities(out_of_fold[to_review], truth[to_review], coverage)
    rows = np.bincount(truth[to_review], minlength=labels)
    arrays = (tuple(array.tolist()) for array in (fitted.biases_, least, rows))
    return Shortlist(coverage, fitted.beta_, *arrays)


def cross_fitted_lists(
    out_of_fold: np.ndarray,
    predicted: np.ndarray,
    truth: np.ndarray,
    to_review: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    coverage: float = COVERAGE,
) -> np.ndarray:
    """Which labels are on each row's list, bool [n, labels], by least probabilities of the other folds' rows."""
    lists = np.zeros(out_of_fold.shape, dtype=bool)
    for train, test in folds:
        chosen = train[to_review[train]]
        least = least_probabilities(out_of_fold[chosen], truth[chosen], coverage)
        lists[test] = on_list(out_of_fold[test], predicted[test], least)
    return lists


def coverage_report(lists: np.ndarray, truth: np.ndarray, labels: Sequence[str], shortlist: Shortlist) -> dict:
    """How many of the rows have their true label on the list, of all and of each label, and how long lists are."""
    covered, by_label = lists[np.arange(len(truth)), truth], {}
    for number, label in enumerate(labels):
        mine = truth == number
        counts = {"n": int(mine.sum()), "covered": int(covered[mine].sum())}
        by_label[label] = counts | {"own": shortlist.own[number]}
    return {
        "coverage_asked": shortlist.coverage,
        "n": len(truth),
        "covered": int(covered.sum()),
        "mean_length": float(lists.sum(axis=1).mean()),
        "labels": len(labels),
        "by_label": by_label,
    }
