"""Decisions that hang on the predicted label: a guarantee for each label, and a price for each mistake.

    choose_label_thresholds(confidence, correct, predicted, {"billing": 0.99, "other": 0.8})     a threshold a label
    expected_costs(label_distribution(probabilities, calibrated), matrix)                        dollars a row

A guarantee of all rows together may hide a label that is often wrong. With a target for each label the rows predicted
as that label are tested by themselves, so each needs labels of its own. With a table of prices, true label x predicted
label, a row is automated where the expected price of acting on its prediction is no more than that of a review.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from calibration_metrics import bootstrap_interval
from decisions import AVERAGE, Threshold, automation, cost_optimal_threshold, threshold_for, threshold_without_rows

DEFAULT = "default"  # in --target: all labels that are not named

# A target for each label


def label_targets(words: Sequence[str], labels: Sequence[str], default: float) -> dict[str, float]:
    """The target of every label, from words such as "billing=.99" and "default=.9"; ValueError for any that is none."""
    given = {}
    for word in words:
        label, sign, number = word.rpartition("=")
        try:
            target = float(number) if sign else math.nan
        except ValueError:
            target = math.nan
        if not 0 < target < 1:
            raise ValueError(
                f"{word!r} is no target: write LABEL=ACCURACY, the accuracy between 0 and 1, as billing=.99"
            )
        if label not in labels and label != DEFAULT:
            raise ValueError(f"{word!r}: no label is called {label!r}; there are {', '.join(labels)}, and {DEFAULT}")
        if label in given:
            raise ValueError(f"{word!r}: {label!r} has two targets")
        given[label] = target
    return {label: given.get(label, given.get(DEFAULT, default)) for label in labels}


def choose_label_thresholds(
    confidence: np.ndarray,
    correct: np.ndarray,
    predicted: np.ndarray,
    targets: Mapping[str, float],
    certainty: float | str = 0.95,
    groups: Sequence[Hashable] | None = None,
    is_split: bool = False,
) -> dict[str, Threshold]:
    """A threshold for each predicted label, from the rows with that prediction; `predicted` [n] numbers of `targets`.

    Each guarantee by itself has the certainty; with `is_split` all of them together have it, as the risk is divided
    among them (Bonferroni). A label that no row was predicted as has no threshold.
    """
    if is_split and certainty == AVERAGE:
        raise ValueError("a threshold that holds on average has no risk that could be divided among labels")
    groups, found = np.arange(len(predicted)) if groups is None else np.asarray(groups), {}
    share = 1 - (1 - certainty) / len(targets) if is_split else certainty
    for number, (label, target) in enumerate(targets.items()):
        rows = np.flatnonzero(predicted == number)
        if len(rows):
            found[label] = threshold_for(confidence[rows], correct[rows], target, share, groups[rows])
        else:
            found[label] = threshold_without_rows(target, share)
    return found


def automated_by_label(
    confidence: np.ndarray, predicted: np.ndarray, thresholds: Mapping[str, Mapping | Threshold]
) -> np.ndarray:
    """Which rows reach the threshold of their predicted label, bool [n]; `predicted` are numbers of `thresholds`."""
    records = [each.record() if isinstance(each, Threshold) else each for each in thresholds.values()]
    values = np.array([np.inf if record["value"] is None else record["value"] for record in records])
    return confidence >= values[predicted]


def label_automation(
    confidence: np.ndarray, correct: np.ndarray, predicted: np.ndarray, thresholds: Mapping[str, Threshold]
) -> dict[str, dict | None]:
    """What each label's threshold automates of the rows with that prediction, None where there is nothing to measure.

    The shares are of the rows with that prediction.
    """
    found = {}
    for number, (label, threshold) in enumerate(thresholds.items()):
        rows, found[label] = predicted == number, None
        if threshold.value is not None and rows.any():
            (found[label],) = automation(confidence[rows], correct[rows], [threshold.value])
    return found


# A price for each mistake


def read_cost_matrix(path: str | Path, labels: Sequence[str]) -> np.ndarray:
    """Dollars [true label, predicted label] of acting on a prediction, in the order of `labels`.

    A CSV table: the first row names predicted labels, the first column true ones. ValueError that says what is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8: write the prices as CSV") from None
    rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
    if not rows:
        raise ValueError(f"{path} is empty: it has a row for each true label, a column for each predicted one")
    columns, names = ([cell.strip() for cell in cells] for cells in (rows[0][1:], [row[0] for row in rows[1:]]))
    for where, found in (("the first row", columns), ("the first column", names)):
        if sorted(found) != sorted(labels):
            raise ValueError(
                f"{path}: {where} names {', '.join(found) or 'nothing'}, not each label once: {', '.join(labels)}"
            )
    dollars = np.empty((len(labels), len(labels)))
    for row in rows[1:]:
        true = row[0].strip()
        if len(row) != len(columns) + 1:
            raise ValueError(f"{path}: the row of {true!r} has {len(row) - 1} prices, not {len(columns)}")
        for predicted, cell in zip(columns, row[1:], strict=True):
            dollars[labels.index(true), labels.index(predicted)] = _price(cell, f"{path}: {true!r} as {predicted!r}")
    return dollars


def _price(cell: str, where: str) -> float:
    try:
        price = float(cell.strip().removeprefix("$"))
    except ValueError:
        price = math.nan
    if not 0 <= price <= 1e9:
        raise ValueError(f"{where} costs {cell!r}; it must be dollars, from 0 to a billion")
    return price


def label_distribution(probabilities: np.ndarray, calibrated: np.ndarray) -> np.ndarray:
    """P(label) [n, labels] that agrees with the calibrated confidence [n] of the most probable one.

    The rest is divided among the other labels as the model did; of two labels there is only one way.
    """
    rows, predicted = np.arange(len(probabilities)), probabilities.argmax(axis=1)
    others = probabilities.copy()
    others[rows, predicted] = 0
    total = others.sum(axis=1, keepdims=True)
    equally = np.full_like(others, 1 / (others.shape[1] - 1))
    equally[rows, predicted] = 0
    distribution = np.where(total > 0, others / np.where(total > 0, total, 1), equally) * (1 - calibrated)[:, None]
    distribution[rows, predicted] = calibrated
    return distribution


def expected_costs(distribution: np.ndarray, dollars: np.ndarray) -> np.ndarray:
    """Expected dollars [n, labels] of acting on each label: sum over true labels of P(true) x price."""
    return distribution @ dollars


def cost_rules(
    probabilities: np.ndarray,
    calibrated: np.ndarray,
    truth: np.ndarray,
    dollars: np.ndarray,
    *,
    review_cost: float,
    error_cost: float,
    groups: Sequence[Hashable],
    seed: int = 0,
) -> list[dict]:
    """What rows with known labels cost by each rule, mean dollars a row with a 95 % interval of whole groups.

    `error_cost` is the one price an error that Chow's threshold knows.
    """
    predicted = probabilities.argmax(axis=1)
    paid, threshold = dollars[truth, predicted], cost_optimal_threshold(review_cost, error_cost)
    expected = expected_costs(label_distribution(probabilities, calibrated), dollars)[np.arange(len(truth)), predicted]
    rules = {
        "review everything": np.zeros(len(truth), dtype=bool),
        "automate everything": np.ones(len(truth), dtype=bool),
        f"Chow's threshold, {threshold:.3f}": calibrated >= threshold,
        "expected cost": expected <= review_cost,
    }
    costs = np.column_stack([np.where(automated, paid, review_cost) for automated in rules.values()])
    intervals = bootstrap_interval(lambda rows: costs[rows].mean(axis=0), groups, seed=seed)
    found = []
    for (rule, automated), cost, (low, high) in zip(rules.items(), costs.mean(axis=0), intervals.tolist(), strict=True):
        found.append({"rule": rule, "share": float(automated.mean()), "cost": float(cost), "low": low, "high": high})
    return found


def mean_error_price(predicted: np.ndarray, truth: np.ndarray, dollars: np.ndarray) -> float:
    """What the errors of labelled rows cost on average: the one price an error that stands for the whole table."""
    wrong = predicted != truth
    return float(dollars[truth[wrong], predicted[wrong]].mean()) if wrong.any() else 0.0
