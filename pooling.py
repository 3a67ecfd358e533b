"""The opinion pool of Method 3: what Method 1 and Method 2 say of a row becomes one prediction.

P(label) ~ exp(b_label + w1 log p(label) + w2 log q(label) + w3 [both name it]),    q = (votes + 1/L) / (n + 1)

pairs = read_pairs("one.jsonl", "two.jsonl")                    # the same rows by Method 1 and by Method 2
rows = combine(pairs, combination_of(pairs))                    # w1 = w2 = 1/2: the geometric mean
rows = combine(pairs, combination_of(pairs, labelled_pairs))    # weights fitted on labelled rows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import predictions
from predictions import Prediction

SMALLEST = 1e-6  # probabilities are clipped here before their logarithm is taken
METHODS = ("logprobs", "consistency")
FEATURES = (*METHODS, "both")  # of a label: log p, log q, whether both methods name it
GEOMETRIC_MEAN, STACKED = "geometric mean", "stacked"


# Two predictions files, row by row


class Pair(NamedTuple):
    """The same row by both methods."""

    logprobs: Prediction
    consistency: Prediction

    @property
    def error(self) -> str | None:
        """Of the first method that could not score the row; None when both could."""
        return next((f"{row.method}: {row.error}" for row in self if row.error is not None), None)

    @property
    def model(self) -> str:
        one, two = self.logprobs.model, self.consistency.model
        return one if one == two else f"{one} + {two}"


def pair_rows(first: Sequence[Prediction], second: Sequence[Prediction]) -> list[Pair]:
    """The rows of both by id, in the first's order; ValueError when they are not of the same texts, labels and task."""
    for method, rows in zip(METHODS, (first, second), strict=True):
        for row in rows:
            if row.method != method:
                raise ValueError(f"row {row.id!r} of the {method} file is by method {row.method!r}")
    for row in second:
        if row.error is None and not ("votes" in row.extras and type(row.extras.get("calls")) is int):
            raise ValueError(f"row {row.id!r} of the consistency file does not say its votes and calls")
    return [Pair(*rows) for rows in predictions.paired_rows(first, second, METHODS)]


def read_pairs(one: str | Path, two: str | Path) -> list[Pair]:
    """The rows of two files; ValueErrors name them."""
    first, second = predictions.read(one), predictions.read(two)
    try:
        return pair_rows(first, second)
    except ValueError as error:
        raise ValueError(f"{one} and {two}: {error}") from None


def scored_by_both(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair.error is None]


def features_of(pairs: Sequence[Pair]) -> np.ndarray:
    """log p, log q and whether both methods name the label; [n, labels, 3]."""
    rows = []
    for one, two in pairs:
        p, q = predictions.smoothed(one), predictions.smoothed(two)
        rows.append([[p[label], q[label], label == one.prediction == two.prediction] for label in p])
    features = np.array(rows, dtype=np.float64)
    features[:, :, :2] = np.log(np.clip(features[:, :, :2], SMALLEST, 1))
    return features


def true_labels(pairs: Sequence[Pair]) -> np.ndarray:
    """The number of each row's true label [n]; ValueError for a row without one."""
    for row, _ in pairs:
        if row.label is None:
            raise ValueError(f"row {row.id!r} has no label")
    return np.array([[*row.probabilities].index(row.label) for row, _ in pairs], dtype=int)


# The pool


@dataclass(frozen=True)
class Pool:
    """A logarithmic opinion pool: the weights of log p, log q and of "both name it", and a bias for each label.

    Genest and Zidek, "Combining probability distributions", Statistical Science 1986.
    """

    weights: np.ndarray  # [3]
    biases: np.ndarray  # [labels]

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """[n, labels] of features [n, labels, 3]."""
        from scipy.special import softmax

        return softmax(features @ self.weights + self.biases, axis=1)


def unfitted_pool(n_labels: int, used: Sequence[str] = METHODS) -> Pool:
    """The pool without labels: weight 1 for a method alone, 1/2 for each of two, none for "both name it"."""
    methods = [name for name in used if name in METHODS]
    return Pool(np.array([1 / len(methods) if name in methods else 0.0 for name in FEATURES]), np.zeros(n_labels))


def fitted_pool(features: np.ndarray, truth: np.ndarray, used: Sequence[str] = FEATURES, prior_sd: float = 1.0) -> Pool:
    """The pool of greatest posterior density for features [n, labels, 3] and true labels [n]; only `used` ones count.

    The prior is normal around the unfitted pool, so that few labels change little and separable ones stay finite; a
    thousand labels outweigh it. The problem is convex.
    """
    from scipy.optimize import minimize

    places, prior = [FEATURES.index(name) for name in used], unfitted_pool(features.shape[1], used)
    center = np.append(prior.weights[places], prior.biases)
    loss = partial(negative_log_posterior, features[:, :, places], truth, center, prior_sd)
    best = minimize(loss, center, jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-8, "maxiter": 1000})
    weights = np.zeros(len(FEATURES))
    weights[places] = best.x[: len(places)]
    return Pool(weights, best.x[len(places) :])


def negative_log_posterior(
    used: np.ndarray, truth: np.ndarray, center: np.ndarray, prior_sd: float, parameters: np.ndarray
) -> tuple[float, np.ndarray]:
    """(value, gradient) at `parameters`: the weights of the features `used` [n, labels, k], then the biases."""
    weights, rows = parameters[: used.shape[2]], np.arange(len(truth))
    scores = used @ weights + parameters[len(weights) :]
    log_p = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    residual = np.exp(log_p)
    residual[rows, truth] -= 1
    gradient = np.append(np.einsum("nl,nlf->f", residual, used), residual.sum(axis=0))
    off = (parameters - center) / prior_sd
    return (off**2).sum() / 2 - log_p[rows, truth].sum(), gradient + off / prior_sd


# One prediction from two


@dataclass(frozen=True)
class Combination:
    """A pool with the name of its rule and the fingerprint of the predictions that it makes."""

    pool: Pool
    rule: str
    fingerprint: str


def combination_for(
    fingerprints: tuple[str, str], n_labels: int, fit_pairs: Sequence[Pair] | None = None
) -> Combination:
    """How rows of these fingerprints are combined: by the geometric mean, or by weights fitted on labelled rows.

    Raises ValueError when those are another model's, task's or method's.
    """
    known = {"method": "combined", **dict(zip(METHODS, fingerprints, strict=True))}
    if fit_pairs is None:
        fingerprint = predictions.fingerprint(**known, rule=GEOMETRIC_MEAN)
        return Combination(unfitted_pool(n_labels), GEOMETRIC_MEAN, fingerprint)
    fit_pairs = scored_by_both(fit_pairs)
    if not fit_pairs:
        raise ValueError("no labelled row was scored by both methods")
    theirs = tuple(row.fingerprint for row in fit_pairs[0])
    if theirs != fingerprints:
        raise ValueError(
            f"--calibrate-on has the fingerprints {' and '.join(theirs)}, these rows {' and '.join(fingerprints)}: "
            "another model, task, method or sampling"
        )
    features, rows = features_of(fit_pairs), []
    for (row, _), of_row in zip(fit_pairs, features, strict=True):
        rows.append([row.id, row.text, row.label, [*map(repr, of_row.ravel())]])
    fitted_on = predictions.fingerprint(rows=rows)
    fingerprint = predictions.fingerprint(**known, rule=STACKED, fitted_on=fitted_on)
    return Combination(fitted_pool(features, true_labels(fit_pairs)), STACKED, fingerprint)


def combination_of(pairs: Sequence[Pair], fit_pairs: Sequence[Pair] | None = None) -> Combination:
    """How the rows of two files are combined; ValueError when both methods scored none of them."""
    both = scored_by_both(pairs)
    if not both:
        raise ValueError("no row was scored by both methods")
    one, two = both[0]
    return combination_for((one.fingerprint, two.fingerprint), len(one.probabilities), fit_pairs)


def combine(pairs: Sequence[Pair], combination: Combination) -> Iterator[Prediction]:
    """The prediction of each pair; one that a method could not score has that method's error.

    `label_mass` is the smaller of the two: what both are sure to have put on a label.
    """
    both = scored_by_both(pairs)
    combined = iter(combination.pool.probabilities(features_of(both)).tolist() if both else [])
    for pair in pairs:
        one, two = pair
        identity, common = (one.id, one.text, one.label), {"method": "combined", "model": pair.model, "task": one.task}
        common["fingerprint"] = combination.fingerprint
        if pair.error is not None:
            yield predictions.failed(*identity, pair.error, **common)
            continue
        by_label = dict(zip(one.probabilities, next(combined), strict=True))
        extras = {
            "logprobs_prediction": one.prediction,
            "consistency_prediction": two.prediction,
            "rule": combination.rule,
            "reason": reason(pair, by_label, combination.rule),
            "calls": 1 + two.extras["calls"],
        }
        mass = min(one.label_mass, two.label_mass)
        yield predictions.scored(*identity, by_label, mass, **common, extras=extras)


def reason(pair: Pair, by_label: Mapping[str, float], rule: str) -> str:
    """Why this label is returned, in words."""
    one, two = pair
    label = max(by_label, key=by_label.__getitem__)
    if one.prediction == two.prediction == label:
        return f"both methods say {label}"
    if one.prediction == two.prediction:
        return f"both methods say {one.prediction}, but among the labelled rows such texts are rather {label}"
    said = f"the probability says {one.prediction} ({one.confidence:.1%}), "
    said += f"the answers {two.prediction} ({two.confidence * two.label_mass:.1%} agree)"
    return f"{said}; {label} by the {rule if rule == GEOMETRIC_MEAN else 'weights fitted on labelled rows'}"
