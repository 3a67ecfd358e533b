"""combined_confidence.py: one confidence from both methods, never for a label that the evidence rejects.

scikit-learn's logistic regression, likelihoods written out again, simulations with a known truth and hand-computed
cases say what is right. Two views of a text with independent noise are worth more than one; votes drawn from the first
view are worth nothing: the report has to tell the two apart.
"""

import json
import math
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits

import calibration_demo
import calibration_metrics
import combined_confidence as combined
import command_line
import consistency_confidence as consistency
import plotting
import predictions
from calibration import load_calibrator
from combined_confidence import METHODS, Pool, combine, fit, join, pooled, study
from decisions import choose_threshold
from llama import load_llama
from task import TASKS

ROOT = Path(__file__).parent.parent
VECTORS = json.loads((ROOT / "tests/data/reference_vectors.json").read_text(encoding="utf-8"))
LABELS, THREE = ("negative", "positive"), ("bad", "fair", "good")
FINGERPRINTS = ("aaaa1111", "bbbb2222")
RESAMPLES = calibration_metrics.resamples
MEMBERS = {"logprobs": (0,), "consistency": (1,), "both": (0, 1), "all": (0, 1, 2)}


def pair(number, p, votes, label=None, labels=LABELS, text=None, unparsed=0, **fields):
    """A row by both methods, the second as consistency_confidence.py records it."""
    identity = (f"r{number}", text or f"text {number}", label)
    common = {"model": "m", "task": "t"} | fields
    one = predictions.scored(
        *identity, dict(zip(labels, p, strict=True)), 0.9, method="logprobs", fingerprint=FINGERPRINTS[0], **common
    )
    votes = dict(zip(labels, map(int, votes), strict=True))
    common |= {"method": "consistency", "fingerprint": FINGERPRINTS[1]}
    return one, consistency.record(identity, votes, unparsed, {}, False, **common)


def made(n, seed, name="", labels=LABELS, own=True, over=1.5):
    """Rows of two noisy views of a true label: an overconfident p, and ten votes by the other view, or (not own) by p.

    A view is normal around 1.4 in the true label's place, so the log odds of a label are 1.4 times its place.
    """
    draw, k = np.random.default_rng(seed), len(labels)
    truth = draw.integers(k, size=n)
    views = draw.normal(0, 1, (2, n, k)) + 1.4 * np.eye(k)[truth]
    p = softmax(over * 1.4 * views[0], axis=1)
    votes = draw.multinomial(10, softmax(1.4 * views[1], axis=1) if own else p)
    words = draw.choice(list("abcdefghijklmnopqrstuvwxyz"), (n, 6, 7))  # no near-duplicates
    texts = [" ".join(map("".join, of_row)) for of_row in words]
    return [
        pair(f"{name}{i}", p[i].tolist(), votes[i], labels[truth[i]], labels, texts[i], unparsed=0) for i in range(n)
    ]


def copies(pairs, name):
    """The same rows again under other ids, in other case: near-duplicates."""
    return [tuple(replace(row, id=f"{name}{row.id}", text=row.text.upper()) for row in both) for both in pairs]


def failed(number, method, error="too long", label=None):
    """A row that one method could not score."""
    one, two = pair(number, (0.5, 0.5), (5, 5), label)
    common = {"model": "m", "task": "t", "method": method}
    identity = (one.id, one.text, label)
    if method == "logprobs":
        return predictions.failed(*identity, error, fingerprint=FINGERPRINTS[0], **common), two
    return one, predictions.failed(*identity, error, fingerprint=FINGERPRINTS[1], **common)


def design(pairs):
    """(logit p, logit q, signed "same label" [n, 3], whether positive [n]) of two labels, read off the records."""
    columns, positive = [], []
    for one, two in pairs:
        p, (no, yes) = one.probabilities, two.extras["votes"].values()
        logit_p = math.log(max(p["positive"], 1e-6)) - math.log(max(p["negative"], 1e-6))
        same = {("positive", "positive"): 1, ("negative", "negative"): -1}.get((one.prediction, two.prediction), 0)
        columns.append([logit_p, math.log(yes + 0.5) - math.log(no + 0.5), same])
        positive.append(one.label == "positive")
    return np.array(columns), np.array(positive)


def truth_of(pairs):
    return np.array([[*one.probabilities].index(one.label) for one, _ in pairs])


def geometric(n_labels=2):
    return combined.pool_for(FINGERPRINTS, n_labels)


def save(folder, pairs, names=("one", "two")):
    """Two predictions files, the second in another order."""
    paths = [folder / f"{name}.jsonl" for name in names]
    for path, rows in zip(paths, zip(*pairs, strict=True), strict=True):
        with open(path, "wb") as file:
            predictions.append(file, rows if path is paths[0] else rows[::-1])
    return paths


def call(*argv):
    """Run the script's main as the command line does."""
    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            command_line.run(lambda: combined.main([*map(str, argv)]))
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def cells(text, first, table=0):
    """The cells of the printed line that begins with that cell, in the first table or a later one."""
    lines = [line for line in text.splitlines() if re.match(rf"\s*{re.escape(first)}(  |$)", line)]
    return re.split(r"\s{2,}", lines[table].strip())


def resample(monkeypatch, times):
    """Make bootstraps draw so often."""
    monkeypatch.setattr(calibration_metrics, "resamples", lambda groups, n=0, seed=0: RESAMPLES(groups, times, seed))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer draws and coarser pictures: no number tested here depends on them. Tiny matrices need no threads."""
    noise = calibration_metrics.consistency_resampling
    monkeypatch.setattr(plotting, "DPI", 30)
    monkeypatch.setattr(calibration_metrics, "consistency_resampling", partial(noise, n_draws=10))
    resample(monkeypatch, 10)
    with threadpool_limits(1):
        yield


# Without labels: the geometric mean


@pytest.mark.parametrize(
    "case", VECTORS["combination"], ids=lambda case: f"{case['p_logprob']} {case['p_consistency']}"
)
def test_without_labels_two_probabilities_become_the_recorded_geometric_mean(case):
    p, q = case["p_logprob"], case["p_consistency"]
    features = np.array([[[math.log(1 - p), math.log(1 - q), 0], [math.log(p), math.log(q), 1]]])
    pool = geometric()
    ((no, yes),) = pooled(features, pool.weights, pool.biases)
    assert yes == pytest.approx(case["geometric_mean_renormalised"], abs=1e-12)
    assert no + yes == pytest.approx(1, abs=1e-15)


def test_three_labels_become_the_hand_computed_geometric_mean_and_votes_count_smoothed():
    # Of 8 votes 1, 5, 2: q = (4, 16, 7) / 27. The roots of .5 x 4, .3 x 16 and .2 x 7, divided by their sum.
    (row,) = combine([pair(0, (0.5, 0.3, 0.2), (1, 5, 2), None, THREE, unparsed=2)], geometric(3))
    roots = [math.sqrt(x) for x in (2.0, 4.8, 1.4)]
    assert [*row.probabilities.values()] == pytest.approx([root / sum(roots) for root in roots], abs=1e-12)
    assert row.probabilities == pytest.approx({"bad": 0.295347, "fair": 0.457549, "good": 0.247104}, abs=2e-6)
    assert (row.prediction, row.label_mass, row.method, row.extras["calls"]) == ("fair", 0.8, "combined", 11)
    assert row.extras["logprobs_prediction"] == "bad" and row.extras["consistency_prediction"] == "fair"


def test_a_probability_of_nothing_is_clipped_and_ten_of_ten_is_no_certainty():
    (row,) = combine([pair(0, (0.0, 1.0), (10, 0))], geometric())
    no, yes = math.sqrt(1e-6 * 10.5 / 11), math.sqrt(0.5 / 11)
    assert row.prediction == "positive" and row.confidence == pytest.approx(yes / (no + yes), abs=1e-12)
    assert 0.99 < row.confidence < 0.9999


def test_the_fingerprint_is_of_both_methods_and_of_the_weights():
    pairs = made(30, 0)
    pools = [geometric(), combined.pool_for(FINGERPRINTS[::-1], 2), combined.pool_for(("aaaa1111", "x"), 2)]
    pools += [combined.pool_for(FINGERPRINTS, 2, pairs), combined.pool_for(FINGERPRINTS, 2, pairs[:29])]
    one, two = pairs[0]
    other = LABELS[one.label == "negative"]
    pools += [combined.pool_for(FINGERPRINTS, 2, [(replace(one, label=other), two), *pairs[1:]])]
    assert len({pool.fingerprint for pool in pools}) == len(pools)
    assert geometric().fingerprint == geometric().fingerprint == combined.pool_for(FINGERPRINTS, 2).fingerprint


# With labels: fitted weights


@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
def test_with_no_prior_two_labels_are_scikit_learns_logistic_regression(members):
    pairs = made(500, 1)
    x, positive = design(pairs)
    theirs = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12).fit(x[:, list(members)], positive)
    weights, biases = fit(combined.features_of(pairs), truth_of(pairs), members, prior_sd=1e6)
    assert weights[list(members)] == pytest.approx(theirs.coef_[0], abs=2e-5)
    assert biases[1] - biases[0] == pytest.approx(theirs.intercept_[0], abs=2e-5)
    assert all(weights[k] == 0 for k in range(3) if k not in members)
    ours = pooled(combined.features_of(pairs), weights, biases)[:, 1]
    np.testing.assert_allclose(ours, theirs.predict_proba(x[:, list(members)])[:, 1], atol=1e-5)


def random_features(n, n_labels, seed):
    """log p, log q of ten votes and the flag, independent of each other [n, labels, 3]."""
    draw = np.random.default_rng(seed)
    p = softmax(draw.normal(0, 1.5, (n, n_labels)), axis=1)
    votes = draw.multinomial(10, softmax(draw.normal(0, 1.5, (n, n_labels)), axis=1))
    same = (p.argmax(axis=1) == votes.argmax(axis=1))[:, None] * np.eye(n_labels)[p.argmax(axis=1)]
    return np.stack([np.log(p), np.log((votes + 1 / n_labels) / 11), same], axis=2)


@pytest.mark.parametrize("n_labels", [2, 3])
def test_the_weights_and_biases_that_made_the_labels_are_found_again(n_labels):
    features, draw = random_features(20_000, n_labels, 2), np.random.default_rng(3)
    weights, biases = np.array([0.8, 0.3, 0.6]), np.array([0.0, 0.7, -0.4])[:n_labels]
    scores = np.exp(features @ weights + biases)
    share = scores / scores.sum(axis=1, keepdims=True)
    truth = (draw.random(len(share))[:, None] > share.cumsum(axis=1)).sum(axis=1)
    found = fit(features, truth)
    # Standard errors by Fisher's information, the sum of X' (diag P - P P') X; the first bias is fixed at 0.
    x = np.concatenate([features, np.broadcast_to(np.eye(n_labels)[:, 1:], (*share.shape, n_labels - 1))], axis=2)
    centered = x - np.einsum("nl,nlf->nf", share, x)[:, None]
    errors = np.sqrt(np.diag(np.linalg.inv(np.einsum("nl,nlf,nlg->fg", share, centered, centered))))
    off = np.append(found[0] - weights, found[1][1:] - found[1][0] - biases[1:])
    assert errors.max() < 0.05  # so four of them tell every weight from that of the label-free rule
    assert (np.abs(off) < 4 * errors).all(), (off, errors)


def test_of_three_labels_the_fit_is_the_most_likely_one_written_as_a_product_of_powers():
    pairs = made(400, 4, labels=THREE)
    truth = truth_of(pairs)
    p = np.array([[*one.probabilities.values()] for one, _ in pairs]).clip(1e-6, 1)
    q = np.array([[(v + 1 / 3) / 11 for v in two.extras["votes"].values()] for _, two in pairs])
    same = [one.prediction if one.prediction == two.prediction else None for one, two in pairs]
    boost = np.array([[label == named for label in THREE] for named in same])

    def loss(t):
        product = np.exp([0, *t[3:]]) * p ** t[0] * q ** t[1] * np.where(boost, np.exp(t[2]), 1)
        return -np.log(product[np.arange(len(truth)), truth] / product.sum(axis=1)).sum()

    best = minimize(
        loss, [0.5, 0.5, 0, 0, 0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 5000}
    )
    assert best.success
    weights, biases = fit(combined.features_of(pairs), truth, prior_sd=1e6)
    assert [*weights, *(biases[1:] - biases[0])] == pytest.approx(best.x, abs=1e-4)
    assert loss([*weights, *(biases[1:] - biases[0])]) <= best.fun + 1e-8


def test_rows_that_a_method_separates_stay_finite_and_are_pushed_the_right_way():
    pairs = [pair(i, (0.1, 0.9), (0, 10), "positive") for i in range(40)]
    pairs += [pair(i, (0.9, 0.1), (10, 0), "negative") for i in range(40, 80)]
    features, truth = combined.features_of(pairs), truth_of(pairs)
    weights, biases = fit(features, truth)
    assert np.isfinite(weights).all() and (weights > [0.5, 0.5, 0]).all() and (weights < 3).all()
    p = pooled(features, weights, biases)[np.arange(80), truth]
    assert (p > 0.99).all() and (p < 1).all()
    one_label = fit(features[:40], truth[:40])  # nothing tells the weights from the bias but the prior
    assert np.isfinite(np.concatenate(one_label)).all() and one_label[1][1] > 0 > one_label[1][0]


def test_few_labels_move_the_weights_little_and_many_as_far_as_they_say():
    # Four texts of which the votes are right and the probability is not.
    few = [pair(i, (0.65, 0.35), (3, 7), "positive") for i in range(2)]
    few += [pair(i, (0.35, 0.65), (7, 3), "negative") for i in range(2, 4)]
    features, truth = combined.features_of(few), truth_of(few)
    near, _ = fit(features, truth)
    far, _ = fit(np.tile(features, (300, 1, 1)), np.tile(truth, 300))
    assert 0.1 < 0.5 - near[0] < 0.75 and 0.1 < near[1] - 0.5 < 0.95 and near[2] == 0
    assert far[0] < -1.5 and far[1] > 2.5
    nothing = fit(features[:0], truth[:0])  # the prior alone
    assert nothing[0].tolist() == [0.5, 0.5, 0] and nothing[1].tolist() == [0, 0]


@pytest.mark.parametrize("n_labels", [2, 3])
@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
def test_the_gradient_is_that_of_finite_differences(members, n_labels):
    features, draw = random_features(40, n_labels, 5)[:, :, list(members)], np.random.default_rng(6)
    truth, size = draw.integers(n_labels, size=40), len(members) + n_labels
    center, at, step = draw.normal(size=size), draw.normal(size=size), 1e-5

    def value(parameters):
        return combined.negative_log_posterior(features, truth, center, 0.7, parameters)[0]

    differences = [(value(at + step * e) - value(at - step * e)) / (2 * step) for e in np.eye(size)]
    gradient = combined.negative_log_posterior(features, truth, center, 0.7, at)[1]
    assert gradient == pytest.approx(differences, abs=1e-5)


# The label and its confidence


@settings(deadline=None, max_examples=200)
@given(data=st.data(), n_labels=st.integers(2, 4))
def test_the_label_returned_is_the_most_probable_and_the_confidence_is_its_own(data, n_labels):
    labels = ("a", "b", "c", "d")[:n_labels]
    raw = data.draw(st.lists(st.floats(0, 1), min_size=n_labels, max_size=n_labels).filter(lambda xs: sum(xs) > 1e-3))
    votes = data.draw(st.lists(st.integers(0, 12), min_size=n_labels, max_size=n_labels).filter(any))
    weights = data.draw(st.lists(st.floats(-2, 3), min_size=3, max_size=3))
    biases = data.draw(st.lists(st.floats(-3, 3), min_size=n_labels, max_size=n_labels))
    p = [x / sum(raw) for x in raw]
    one, two = pair(0, p, votes, None, labels)
    (row,) = combine([(one, two)], Pool(np.array(weights), np.array(biases), "stacked", "cccc3333"))
    q = [(v + 1 / n_labels) / (sum(votes) + 1) for v in votes]
    scores = [
        b
        + weights[0] * math.log(max(x, 1e-6))
        + weights[1] * math.log(y)
        + weights[2] * (one.prediction == k == two.prediction)
        for k, x, y, b in zip(labels, p, q, biases, strict=True)
    ]
    total = math.fsum(math.exp(score) for score in scores)
    assert [*row.probabilities.values()] == pytest.approx([math.exp(s) / total for s in scores], abs=1e-9)
    assert scores[labels.index(row.prediction)] >= max(scores) - 1e-9
    best = [label for label in labels if row.probabilities[label] == max(row.probabilities.values())]
    assert row.prediction == best[0] and row.confidence == row.probabilities[row.prediction]
    assert predictions.from_line(predictions.to_line(row), "here") == row
    assert (f"both methods say {row.prediction}" == row.extras["reason"]) == (
        one.prediction == two.prediction == row.prediction
    )


def test_equal_evidence_for_two_labels_is_the_label_listed_first():
    # The votes of 10 to 0, smoothed, against a probability that says as much for the other label.
    for p, votes, labels in (
        ((0.5 / 11, 10.5 / 11), (10, 0), LABELS),
        ((10.5 / 11, 0.5 / 11), (0, 10), LABELS),
        ((0.5, 0.5), (3, 3), LABELS),
        ((0.5 / 11, 10.5 / 11), (10, 0), LABELS[::-1]),
    ):
        (row,) = combine([pair(0, p, votes, None, labels)], geometric())
        assert (row.prediction, row.confidence) == (labels[0], 0.5)


def test_methods_that_disagree_never_give_a_confidence_in_the_label_not_chosen():
    # Method 1 is 95 % sure of positive, all ten answers are negative: the roots of .05 x 10.5 and .95 x .5.
    (row,) = combine([pair(0, (0.05, 0.95), (10, 0))], geometric())
    no, yes = math.sqrt(0.05 * 10.5), math.sqrt(0.95 * 0.5)
    assert row.prediction == "negative" and row.confidence == pytest.approx(no / (no + yes), abs=1e-12)
    assert row.confidence == pytest.approx(0.51251, abs=1e-5)
    assert row.extras["reason"] == (
        "the probability says positive (95.0%), the answers negative (100.0% agree); negative by the geometric mean"
    )
    assert (row.extras["logprobs_prediction"], row.extras["consistency_prediction"]) == LABELS[::-1]
    trusting = Pool(np.array([1.0, 0.1, 0.0]), np.zeros(2), "stacked", "cccc3333")
    (row,) = combine([pair(0, (0.05, 0.95), (7, 1), unparsed=2)], trusting)
    assert row.prediction == "positive" and row.confidence > 0.9
    assert row.extras["reason"] == (
        "the probability says positive (95.0%), the answers negative (70.0% agree); positive by the weights fitted on "
        "labelled rows"
    )


def test_where_both_agree_and_the_labelled_rows_say_otherwise_the_reason_says_so():
    agree = pair(0, (0.45, 0.55), (4, 6))
    (row,) = combine([agree], geometric())
    assert (row.prediction, row.extras["reason"], row.extras["rule"]) == (
        "positive",
        "both methods say positive",
        "geometric mean",
    )
    # Rows of which four in five are negative, although both methods say positive.
    fit_on = [pair(f"c{i}", (0.45, 0.55), (4, 6), LABELS[i % 5 == 0], text=f"other {i}") for i in range(100)]
    pool = combined.pool_for(FINGERPRINTS, 2, fit_on)
    (row,) = combine([agree], pool)
    assert row.prediction == "negative" and row.confidence == pytest.approx(0.8, abs=0.02)
    assert row.extras["rule"] == "stacked" and row.extras["reason"] == (
        "both methods say positive, but among the labelled rows such texts are rather negative"
    )


# Two files of the same rows


def test_rows_are_joined_by_id_in_the_order_of_the_first_file():
    pairs = made(5, 7)
    first, second = [[*rows] for rows in zip(*pairs, strict=True)]
    assert join(first, second[::-1]) == pairs
    assert join(first[::-1], second) == pairs[::-1]


def changed(number, which=1, **fields):
    """A change of one row of one file."""

    def change(files):
        files[which][number] = replace(files[which][number], **fields)

    return change


def with_labels(files):
    row = files[1][2]
    files[1][2] = replace(row, probabilities=dict(reversed(row.probabilities.items())))


def with_third_label(files):
    files[1][2] = pair(2, (0.2, 0.3, 0.5), (1, 2, 3), files[0][2].label, (*LABELS, "neutral"), files[0][2].text)[1]


REFUSED = {
    "a missing id": (lambda files: files[1].pop(2), "row 'r2' of the logprobs file is not in the consistency file"),
    "more rows": (lambda files: files[0].pop(3), "row 'r3' of the consistency file is not in the logprobs file"),
    "another text": (changed(1, text="another"), "row 'r1' is not the same in both files: its text, label or task"),
    "another label": (changed(4, 0, label="other"), "row 'r4' is not the same in both files"),
    "one label missing": (changed(0, label=None), "row 'r0' is not the same in both files"),
    "another task": (changed(3, task="other"), "row 'r3' is not the same in both files"),
    "labels in another order": (with_labels, "row 'r2': the labels of the two files differ"),
    "one label more": (with_third_label, "row 'r2': the labels of the two files differ"),
    "the files in the wrong order": (lambda files: files.reverse(), "row 'r0' of the logprobs file is by method 'cons"),
    "one file twice": (lambda files: files.__setitem__(1, files[0]), "row 'r0' of the consistency file is by method"),
    "another method": (changed(4, method="combined"), "row 'r4' of the consistency file is by method 'combined'"),
    "mixed fingerprints": (changed(3, fingerprint="x"), "row 'r3' of the consistency file has another fingerprint"),
    "mixed fingerprints of the first": (changed(4, 0, fingerprint="x"), "row 'r4' of the logprobs file has another"),
    "an id twice": (changed(1, id="r0"), "row 'r0' stands twice in the consistency file"),
    "an id twice in the first": (changed(3, 0, id="r2"), "row 'r2' stands twice in the logprobs file"),
    "no votes": (changed(2, extras={"calls": 10}), "row 'r2' of the consistency file does not say its votes and calls"),
    "no calls": (changed(2, extras={"votes": {}}), "row 'r2' of the consistency file does not say its votes and calls"),
    "calls that are no count": (changed(2, extras={"votes": {}, "calls": True}), "row 'r2' .+ votes and calls"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_not_of_the_same_rows_are_refused_in_a_line_that_names_the_row(kind):
    change, message = REFUSED[kind]
    files = [[*rows] for rows in zip(*made(5, 7), strict=True)]
    change(files)
    with pytest.raises(ValueError, match=rf"^{message}"):
        join(*files)


def test_a_row_that_a_method_could_not_score_is_an_error_that_names_the_method_and_no_number():
    good = made(2, 8)
    empty = failed("y", "consistency", "")  # an error is an error, whatever it says
    pairs = [
        failed("x", "logprobs", label="positive"),
        good[0],
        empty,
        failed("z", "consistency", "none parsed"),
        good[1],
    ]
    pairs.append((pairs[0][0], failed("x", "consistency", label="positive")[1]))
    rows = [*combine(join(*zip(*pairs[:-1], strict=True)), geometric()), *combine(pairs[-1:], geometric())]
    assert [row.error for row in rows] == [
        "logprobs: too long",
        None,
        "consistency: ",
        "consistency: none parsed",
        None,
        "logprobs: too long",
    ]
    for row in (rows[0], rows[2], rows[3], rows[5]):
        assert row.prediction is row.confidence is row.probabilities is row.label_mass is None and row.extras == {}
        assert row.method == "combined" and row.fingerprint == geometric().fingerprint
    assert (rows[0].id, rows[0].label) == ("rx", "positive")
    alone = [*combine(good, geometric())]  # the errors between them change nothing
    assert [rows[1], rows[4]] == alone


def test_two_models_are_named_with_a_plus():
    one, two = pair(0, (0.4, 0.6), (4, 6))
    (row,) = combine([(one, replace(two, model="other"))], geometric())
    assert row.model == "m + other"


@pytest.mark.parametrize(
    "votes",
    [
        {"positive": 6, "negative": 4},
        {"negative": 4},
        {"negative": 4, "positive": 6.0},
        {"negative": -1, "positive": 11},
        {"negative": 8, "positive": 2},
        [4, 6],
    ],
    ids=str,
)
def test_votes_that_are_no_counts_of_these_labels_or_for_another_label_are_refused(votes):
    one, two = pair(0, (0.4, 0.6), (4, 6))
    with pytest.raises(ValueError, match=r"^row 'r0': its votes are .+, not a count for each label, most for the pred"):
        [*combine([(one, replace(two, extras=two.extras | {"votes": votes}))], geometric())]


# All methods on the same rows


def most_probable_weights(x, positive, center):
    """(weights, bias) of a logistic regression with a standard normal prior around `center`, its loss written out.

    The biases of two labels have a standard normal prior each, so their difference has twice the variance.
    """

    def loss(t):
        margin = np.where(positive, 1, -1) * (x @ t[:-1] + t[-1])
        return np.logaddexp(0, -margin).sum() + ((t[:-1] - center) ** 2).sum() / 2 + t[-1] ** 2 / 4

    best = minimize(loss, [*center, 0], method="BFGS", options={"gtol": 1e-4}).x
    return best[:-1], best[-1]


CENTERS = {(0,): [1], (1,): [1], (0, 1): [0.5, 0.5], (0, 1, 2): [0.5, 0.5, 0]}


def by_hand(name, x, train_x, train_positive):
    """P(positive) [n] of a method, fitted on the training rows if it is one of the fitted."""
    is_fitted, members = METHODS[name]
    members, center = list(members), CENTERS[members]
    weights, bias = most_probable_weights(train_x[:, members], train_positive, center) if is_fitted else (center, 0)
    return expit(x[:, members] @ np.array(weights) + bias)


def test_held_out_numbers_are_those_of_weights_fitted_elsewhere_and_metrics_of_scikit_learn():
    fit_pairs, pairs = made(300, 10, "c"), made(250, 11, "t")
    found = study(pairs, fit_pairs, None, 0)
    report = combined.measure(found, {"logprobs": 1.0, "consistency": 10.0}, {}, 0)
    (fit_x, fit_positive), (x, positive) = design(fit_pairs), design(pairs)
    losses = {}
    for name in METHODS:
        p = by_hand(name, x, fit_x, fit_positive)
        np.testing.assert_allclose(found.measured[name][:, 1], p, atol=1e-4)
        correct, confidence, row = (p > 0.5) == positive, np.maximum(p, 1 - p), report[name]
        losses[name] = log_loss(positive, p)
        assert row["log_loss"] == pytest.approx(losses[name], abs=1e-4)
        assert row["accuracy"] == pytest.approx(correct.mean(), abs=1e-12)
        assert row["auroc"] == pytest.approx(roc_auc_score(correct, confidence), abs=1e-3)
        assert row["log_loss_low"] < row["log_loss"] < row["log_loss_high"]
        assert row["protocol"] == ("held-out" if METHODS[name][0] else "nothing fitted") and row["n"] == 250
    gain = report["gain"]
    assert gain["fitted"][0] == pytest.approx(losses["1 logprobs, fitted"] - losses["3 stacked"], abs=2e-4)
    assert gain["unfitted"][0] == pytest.approx(losses["1 logprobs"] - losses["3 geometric mean"], abs=1e-4)
    assert found.protocol == "held-out" and found.related == 0


def test_of_three_labels_the_log_loss_is_that_of_the_true_label_and_not_of_being_right():
    # A method that knows nothing of many labels is rightly unsure of its guess, which must not look like a merit.
    pairs = made(300, 13, labels=THREE)
    found = study(pairs, None, None, 0)
    report, truth = combined.measure(found, {}, {}, 0), truth_of(pairs)
    for name in METHODS:
        assert report[name]["log_loss"] == pytest.approx(
            log_loss(truth, found.measured[name], labels=[0, 1, 2]), abs=1e-9
        )
    p = found.measured["1 logprobs"]
    assert report["1 logprobs"]["log_loss"] > log_loss(p.argmax(axis=1) == truth, p.max(axis=1)) + 0.05


def test_cross_fitted_rows_are_predicted_by_weights_fitted_on_all_other_groups_and_no_other_row(monkeypatch):
    pairs = made(40, 14)
    pairs += copies(pairs[:20], "copy")
    features, truth = combined.features_of(pairs), truth_of(pairs)
    groups = [*range(40), *range(20)]
    calls, real = [], fit

    def spy(used, of_used, members):
        calls.append(({row.tobytes() for row in used}, len(used), members))
        return real(used, of_used, members)

    monkeypatch.setattr(combined, "fit", spy)
    found = study(pairs, None, None, 3)
    assert found.protocol == "out-of-fold" and len(calls) == 15 and found.choosing is found.measured
    told = [row.tobytes() for row in features]  # a copy has the numbers of its original
    for name in ("1 logprobs, fitted", "2 consistency, fitted", "3 stacked"):
        times = np.zeros(len(pairs))
        for seen, count, members in calls:
            if members == METHODS[name][1]:
                rest = np.array([key not in seen for key in told])
                assert count + rest.sum() == len(pairs)  # all others, so both of a group are in or out
                weights = real(features[~rest], truth[~rest], members)
                np.testing.assert_allclose(found.measured[name][rest], pooled(features[rest], *weights), atol=1e-9)
                times += rest
        assert (times == 1).all()
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=3).split(features, truth, groups)
    seen = {frozenset(told[i] for i in train) for train, _ in folds}
    assert seen == {frozenset(keys) for keys, _, _ in calls}


def test_labels_that_are_noise_look_learnable_in_sample_and_not_out_of_fold():
    # 25 texts in four copies each, all four with the same coin's label: 100 rows that are only 25.
    draw, gained = np.random.default_rng(15), {"in-sample": [], "out-of-fold": [], "copies apart": []}
    for seed in range(6):
        base = made(25, seed)
        label = [LABELS[k] for k in draw.permutation(np.arange(25) % 2)]
        base = [tuple(replace(row, label=y) for row in both) for both, y in zip(base, label, strict=True)]
        pairs = [both for k in "abcd" for both in copies(base, k)]
        features, truth = combined.features_of(pairs), truth_of(pairs)
        floor = log_loss(truth, np.full(100, truth.mean()))
        out_of_fold = study(pairs, None, None, seed).measured["3 stacked"][:, 1]
        gained["in-sample"].append(floor - log_loss(truth, pooled(features, *fit(features, truth))[:, 1]))
        gained["out-of-fold"].append(floor - log_loss(truth, out_of_fold))
        apart = combined.cross_fitted(features, truth, [*range(100)], seed)["3 stacked"][:, 1]
        gained["copies apart"].append(floor - log_loss(truth, apart))
    assert np.mean(gained["in-sample"]) > 0.05 and np.mean(gained["copies apart"]) > 0.02
    assert np.mean(gained["out-of-fold"]) < -0.05 and max(gained["out-of-fold"]) < 0.05


@pytest.mark.parametrize("seed", [0, 2])
def test_votes_drawn_from_the_probability_itself_gain_nothing(seed, monkeypatch):
    # Ten draws at the first token's own probability: the stack must not claim more than Method 1, once it is fitted.
    resample(monkeypatch, 200)
    report = combined.measure(study(made(700, seed, own=False), None, None, 0), {}, {}, 0)
    gain, low, high = report["gain"]["fitted"]
    assert abs(gain) < 0.006 and low < 0 and high < 0.012


@pytest.mark.parametrize("seed", [0, 1])
def test_votes_with_evidence_of_their_own_gain_clearly(seed, monkeypatch):
    resample(monkeypatch, 200)
    report = combined.measure(study(made(500, seed), None, None, 0), {}, {}, 0)
    for gain, low, high in report["gain"].values():
        assert 0.05 < low < gain < high < 0.4
    assert report["3 stacked"]["accuracy"] > report["1 logprobs, fitted"]["accuracy"] + 0.02


def test_thresholds_come_from_the_calibration_rows_one_of_each_group():
    fit_pairs, pairs = made(260, 16, "c"), made(200, 17, "t")
    # Copies that would double the evidence if each counted; the first of each group is the one that counts.
    found = study(pairs, fit_pairs + copies(fit_pairs[:100], "copy"), None, 0)
    report = combined.measure(found, {}, {}, 0)
    truth, fit_truth, made_some = truth_of(pairs), truth_of(fit_pairs), 0
    for name in METHODS:
        chosen = found.choosing[name][:260]
        for promise, target in zip(report[name]["promises"], (0.8, 0.9, 0.95), strict=True):
            by_hand = choose_threshold(chosen.max(axis=1), chosen.argmax(axis=1) == fit_truth, target, 0.05)
            assert promise["threshold"] == by_hand.record() and promise["threshold"]["n"] == 260
            if by_hand.value is None:
                assert promise["measured"] is None
                continue
            taken = [i for i, p in enumerate(found.measured[name]) if max(p) >= by_hand.value]
            right = sum(found.measured[name][i].argmax() == truth[i] for i in taken)
            assert promise["measured"]["share"] == pytest.approx(len(taken) / 200)
            assert promise["measured"]["automated"] == len(taken)
            assert promise["measured"]["accuracy"] == pytest.approx(right / len(taken))
            made_some += 1
    assert made_some >= 6
    # They were chosen on out-of-fold numbers, which the weights that are measured are not fitted for.
    all_rows = fit_pairs + copies(fit_pairs[:100], "copy")
    features, fit_truth, expected = combined.features_of(all_rows), truth_of(all_rows), np.empty((360, 2))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(features, fit_truth, [*range(260), *range(100)])
    for train, test in folds:
        expected[test] = pooled(features[test], *fit(features[train], fit_truth[train]))
    np.testing.assert_allclose(found.choosing["3 stacked"], expected, atol=1e-9)
    assert np.abs(expected - pooled(features, *fit(features, fit_truth))).max() > 1e-3


def test_copies_of_the_measured_rows_make_no_interval_narrower():
    fit_pairs, pairs = made(100, 23, "c"), made(80, 24, "t")
    once, twice = (
        combined.measure(study(rows, fit_pairs, None, 0), {}, {}, 0) for rows in (pairs, pairs + copies(pairs, "copy"))
    )
    assert (once["3 stacked"]["n"], twice["3 stacked"]["n"], twice["3 stacked"]["groups"]) == (80, 160, 80)
    for name in METHODS:
        for key in ("log_loss", "log_loss_low", "log_loss_high", "auroc_low", "auroc_high"):
            assert twice[name][key] == pytest.approx(once[name][key], abs=1e-9), (name, key)
    for name, values in once["gain"].items():
        assert twice["gain"][name] == pytest.approx(values, abs=1e-9) and values[1] < values[0] < values[2]


def test_measuring_on_rows_that_the_weights_were_fitted_on_is_refused():
    fit_pairs, pairs = made(30, 18, "c"), made(10, 19, "t")
    seen = copies(fit_pairs[4:6], "x")  # other id, other case: the same text
    with pytest.raises(
        ValueError, match=r"^2 of the rows are among those of --calibrate-on, the first is 'xrc4'; noth"
    ):
        study(pairs + seen, fit_pairs, None, 0)
    alike = [tuple(replace(row, id=f"n{row.id}", text=f"{row.text} more") for row in both) for both in fit_pairs[:3]]
    found = study(pairs + alike, fit_pairs, None, 0)  # near-duplicates are other texts, and are counted
    assert found.related == 3
    text = combined.render(combined.measure(found, {}, {}, 0), found)
    assert text.startswith("n = 13; 3 of them have a near-duplicate among the calibration rows; fitted ones held-out")


def test_weights_of_other_fingerprints_or_of_unlabelled_rows_are_refused():
    pairs = made(30, 20)
    for which, other in ((0, ("x", "bbbb2222")), (1, ("aaaa1111", "x"))):
        with pytest.raises(
            ValueError, match=r"^--calibrate-on has the fingerprints aaaa1111 and bbbb2222, these rows "
        ):
            combined.pool_for(other, 2, pairs)
        assert other[which] == "x"
    for label in (None, "neutral"):
        wrong = [tuple(replace(row, label=label) for row in both) for both in pairs[:1]] + pairs[1:]
        with pytest.raises(ValueError, match=rf"^row 'r0' has the label {label!r}; the task has negative, positive$"):
            combined.pool_for(FINGERPRINTS, 2, wrong)


# The command line


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Labelled rows for measuring, of which two have an error, and others for fitting; the same rows without labels."""
    folder = tmp_path_factory.mktemp("files")
    pairs = made(90, 21, "t")
    test = [*pairs, failed("e1", "logprobs", label="positive"), failed("e2", "consistency", "none", label="negative")]
    unlabelled = [tuple(replace(row, label=None) for row in both) for both in test]
    fit_pairs = made(60, 22, "c")
    fit_pairs += copies(fit_pairs[:10], "copy")
    one, two = save(folder, test)
    cal1, cal2 = save(folder, fit_pairs, ("cal1", "cal2"))
    plain1, plain2 = save(folder, unlabelled, ("plain1", "plain2"))
    return SimpleNamespace(
        folder=folder,
        test=test,
        fit=fit_pairs,
        join=("--logprobs", one, "--consistency", two),
        fit_on=("--calibrate-on", cal1, cal2),
        plain=("--logprobs", plain1, "--consistency", plain2),
        **{name: folder / f"{name}.jsonl" for name in ("one", "two", "cal1", "cal2", "plain1", "plain2")},
    )


def test_in_a_process_of_its_own_two_files_become_one_with_a_report_and_a_figure_and_no_torch(files, tmp_path, run):
    code = """if True:
        import runpy, sys
        sys.argv = sys.argv[1:]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            print(sorted({"torch", "transformers", "tokenizers", "openai", "anthropic"} & set(sys.modules)))
    """
    output, figure = tmp_path / "both.jsonl", tmp_path / "curves.png"
    script = ["combined_confidence.py", *files.join, "--output", output]
    done = run("-c", code, *script, "--figure", figure)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("[]\n") and f"{output}: 90 of 92 rows scored, 2 with an error" in done.stdout
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    rows = predictions.read(output)
    assert rows == [*combine(files.test, geometric())]  # in the order of the first file
    assert [row.error for row in rows[-2:]] == ["logprobs: too long", "consistency: none"]
    done = run(*script, "--input", "t.csv")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_repeating_the_command_changes_nothing_and_a_torn_file_is_finished(files, tmp_path):
    output = tmp_path / "both.jsonl"
    command = (*files.join, "--output", output)
    first = call(*command)
    whole, stamp = output.read_bytes(), output.stat().st_mtime_ns
    again = call(*command)
    assert first.code == again.code == 0 and again.out == first.out and again.err == ""
    assert (output.read_bytes(), output.stat().st_mtime_ns) == (whole, stamp)
    for end in (1, len(whole) // 2, len(whole) - 1):
        output.write_bytes(whole[:end])
        assert call(*command).code == 0 and output.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.jsonl"]


def test_other_weights_are_another_file_unless_it_may_be_overwritten(files, tmp_path):
    output = tmp_path / "both.jsonl"
    assert call(*files.join, "--output", output).code == 0
    whole = output.read_bytes()
    done = call(*files.join, *files.fit_on, "--output", output)
    assert done.code == 2 and done.out == "" and output.read_bytes() == whole
    assert re.fullmatch(r"error: .+ line 1 was made with other settings \(.+\); use --overwrite .+\n", done.err)
    done = call(*files.join, *files.fit_on, "--output", output, "--overwrite")
    assert done.code == 0 and "stacked; the methods name different labels in" in done.out
    pool = combined.pool_for(FINGERPRINTS, 2, files.fit)
    assert predictions.read(output) == [*combine(files.test, pool)]
    assert {row.extras.get("rule") for row in predictions.read(output)} == {"stacked", None}


def test_a_row_that_failed_is_combined_anew_once_its_method_has_answered(files, tmp_path):
    one, two = save(tmp_path, files.test)
    command = ("--logprobs", one, "--consistency", two, "--output", tmp_path / "both.jsonl")
    assert call(*command).code == 0
    before = predictions.read(tmp_path / "both.jsonl")
    mended = [*files.test[:-1], (files.test[-1][0], pair("e2", (0.5, 0.5), (2, 8), "negative")[1])]
    save(tmp_path, mended)
    assert "91 of 92 rows scored, 1 with an error" in call(*command).out
    after = predictions.read(tmp_path / "both.jsonl")
    assert after[:-1] == before[:-1] and before[-1].error == "consistency: none"
    assert (after[-1].prediction, after[-1].extras["consistency_prediction"]) == ("positive", "positive")


def test_the_report_says_n_groups_protocol_and_cost_and_its_numbers_are_those_measured(files, tmp_path):
    done = call(*files.join, *files.fit_on)
    assert (done.code, done.err) == (0, "")
    found = study(combined.scored(files.test), files.fit, None, 0)
    report = combined.measure(found, {"logprobs": 1.0, "consistency": 10.0}, {}, 0)
    lines = done.out.splitlines()
    assert lines[:3] == [
        "",
        "2 rows left out: a method could not score them",
        "n = 90; fitted ones held-out, the others as they are; brackets are 95 % intervals;",
    ]
    assert lines[4].split() == ["accuracy", "log", "loss", "AUROC", "AURC"]
    heads = ["80% right", "90% right", "95% right", "ECE", "floor", "calls", "seconds"]
    assert heads in [re.split(r"\s{2,}", line.strip()) for line in lines]
    calls = {"1": "1.0", "2": "10.0", "3": "11.0"}
    for name in METHODS:
        row, shown = report[name], cells(done.out, name, table=1)
        for number, key in enumerate(("accuracy", "log_loss", "auroc", "aurc"), 1):
            ends = row[key], row[f"{key}_low"], row[f"{key}_high"]
            assert cells(done.out, name)[number] == "{:.3f} [{:.3f}, {:.3f}]".format(*ends)
        assert shown[4:6] == [f"{row['ece']:.3f}", f"{row['ece_noise_floor']:.3f}"]
        assert shown[-2:] == [calls[name[0]], "-"]  # how long the methods ran is not known here
    assert "one row of each group of the calibration rows." in lines and "in-sample" not in done.out
    share, accuracy = (report["3 stacked"]["promises"][0]["measured"][key] for key in ("share", "accuracy"))
    assert cells(done.out, "3 stacked", table=1)[1] == f"{share:.1%} at {accuracy:.1%}"
    gain, low, high = report["gain"]["fitted"]
    assert f"fitted logprobs, on the same rows: {gain:+.4f} [{low:+.4f}, {high:+.4f}]" in lines[-2]
    assert not any(path.name.startswith("both") for path in files.folder.iterdir())  # nothing is written unasked


def test_cross_fitted_thresholds_are_called_in_sample_and_groups_are_counted(files, tmp_path):
    done = call("--logprobs", files.cal1, "--consistency", files.cal2)
    assert done.code == 0 and "n = 70 in 60 groups; fitted ones out-of-fold, the others as they are" in done.out
    assert "one row of each group of these very rows, so these shares are in-sample." in done.out
    assert "held-out" not in done.out and "left out" not in done.out
    table = tmp_path / "groups.csv"
    table.write_text("id,group\n" + "".join(f"{one.id},{i % 30}\n" for i, (one, _) in enumerate(files.fit)))
    done = call("--logprobs", files.cal1, "--consistency", files.cal2, "--groups", table)
    assert "n = 70 in 30 groups; " in done.out


def test_rows_without_labels_or_too_few_to_fit_are_combined_and_not_compared(files, tmp_path):
    done = call(*files.plain, "--output", tmp_path / "plain.jsonl")
    assert done.code == 0 and "the methods are not compared: 90 of 90 rows have no label" in done.out
    assert "accuracy" not in done.out and len(predictions.read(tmp_path / "plain.jsonl")) == 92
    done = call(*files.plain, *files.fit_on, "--output", tmp_path / "stacked.jsonl")
    assert done.code == 0 and predictions.read(tmp_path / "stacked.jsonl")[0].extras["rule"] == "stacked"
    one, two = save(tmp_path, files.test[:4])
    done = call("--logprobs", one, "--consistency", two, "--output", tmp_path / "few.jsonl")
    assert done.code == 0 and len(predictions.read(tmp_path / "few.jsonl")) == 4
    assert "the methods are not compared: 4 rows in 4 groups are too few for 5 folds" in done.out
    mixed = [tuple(replace(row, label=None) for row in both) if i < 3 else both for i, both in enumerate(files.test)]
    one, two = save(tmp_path, mixed)
    done = call("--logprobs", one, "--consistency", two, "--output", tmp_path / "mixed.jsonl")
    assert done.code == 0 and "not compared: 3 of 90 rows have no label" in done.out


@pytest.fixture(scope="module")
def calibrator(files, tmp_path_factory):
    """A calibrator fitted by calibration_demo.py on the combined file of the calibration rows."""
    folder = tmp_path_factory.mktemp("calibrator")
    assert call("--logprobs", files.cal1, "--consistency", files.cal2, "--output", folder / "c.jsonl").code == 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(calibration_demo, "draw", lambda *ignored: None)
        patch.setattr(calibration_demo, "METHOD_NAMES", ("temperature", "platt"))
        patch.setattr(calibration_demo, "REPEATS", 2)
        calibration_demo.main([str(folder / "c.jsonl"), "--output-dir", str(folder), "--target-accuracy", "0.7"])
    return folder / "calibrator.json"


def test_a_calibrator_fitted_on_a_combined_file_calibrates_another(files, calibrator, tmp_path):
    output = tmp_path / "both.jsonl"
    done = call(*files.join, "--output", output, "--calibrator", calibrator)
    assert (done.code, done.err) == (0, "") and re.search(r"calibrated: .*not scored 2", done.out)
    fitted, rows = load_calibrator(calibrator), predictions.read(output)
    plain = [row for row in combine(files.test, geometric()) if row.error is None]
    values = [row.extras["calibrated_confidence"] for row in rows if row.error is None]
    assert values == fitted.calibrate(plain).tolist() and fitted.fingerprint == geometric().fingerprint
    # The numbers underneath are those of a run without it, and that run leaves what was added.
    bare = [{k: v for k, v in row.extras.items() if k not in predictions.CALIBRATED} for row in rows]
    assert bare == [row.extras for row in combine(files.test, geometric())]
    before = output.read_bytes()
    assert call(*files.join, "--output", output).code == 0 and output.read_bytes() == before
    done = call(*files.join, "--output", output, "--calibrator", calibrator, "--threshold", "0.9")
    decided = [row.extras.get("decision") for row in predictions.read(output)]
    assert decided == [None if v is None else ("review", "automate")[v >= 0.9] for v in [*values, None, None]]


def test_a_calibrator_of_other_weights_is_refused_before_anything_is_written(files, calibrator, tmp_path):
    done = call(*files.join, *files.fit_on, "--output", tmp_path / "both.jsonl", "--calibrator", calibrator)
    assert done.code == 2 and done.err.startswith("error: the calibrator is for m on task 't' with fingerprint")
    assert [*tmp_path.iterdir()] == []


def bad_votes(files, folder):
    one, two = files.test[3]
    wrong = replace(two, extras=two.extras | {"votes": {"negative": "4", "positive": 6}})
    save(folder, [*files.test[:3], (one, wrong), *files.test[4:]])
    return "--logprobs", folder / "one.jsonl", "--consistency", folder / "two.jsonl", "--output", folder / "o.jsonl"


def bad_calls(files, folder):
    one, two = files.test[3]
    save(folder, [*files.test[:3], (one, replace(two, extras=two.extras | {"calls": "10"})), *files.test[4:]])
    return "--logprobs", folder / "one.jsonl", "--consistency", folder / "two.jsonl", "--output", folder / "o.jsonl"


def few_rows(files, folder):
    return (*files.plain, "--calibrate-on", *save(folder, files.fit[:19], ("few1", "few2")), "--output", folder / "o")


def all_failed(files, folder):
    save(folder, [failed("a", "logprobs"), failed("b", "consistency")])
    return "--logprobs", folder / "one.jsonl", "--consistency", folder / "two.jsonl", "--output", folder / "o.jsonl"


def same_as_input(files, folder):
    one, two = save(folder, files.test)
    return "--logprobs", one, "--consistency", two, "--output", two


def same_as_fit_on(files, folder):
    return (*files.plain, "--calibrate-on", *save(folder, files.fit), "--output", folder / "one.jsonl")


def member_is_fit_on(files, folder):
    """The file that Method 2 would write beside the output is one to fit on."""
    (folder / "t.csv").write_text("text\nx\n")
    fit_on = save(folder, files.fit, ("o.logprobs", "two"))
    return "--input", folder / "t.csv", "--output", folder / "o.jsonl", "--calibrate-on", *fit_on


BAD = {
    "one of two files": (lambda f, d: f.join[:2], "--logprobs and --consistency go together"),
    "the other of two files": (lambda f, d: f.join[2:], "--logprobs and --consistency go together"),
    "texts and files": (lambda f, d: ("a text", *f.join), "give texts, a table, or two predictions files"),
    "a table and files": (lambda f, d: ("--input", "x.csv", *f.join), "give texts, a table, or two predictions files"),
    "nothing": (lambda f, d: (), "give either texts or a table"),
    "a file that is not there": (lambda f, d: (*f.join[:3], d / "no.jsonl"), r"\S+no.jsonl: No such file"),
    "a figure for texts": (lambda f, d: ("text", "--figure", "x.png"), "--figure x.png: a file name that ends in .png"),
    "a figure that is no png": (lambda f, d: (*f.join, "--figure", "x.pdf"), "--figure x.pdf: a file name that ends"),
    "json of files": (lambda f, d: (*f.join, "--json"), "two predictions files are joined without a model; --json"),
    "a server for files": (
        lambda f, d: (*f.join, "--endpoint", "http://x"),
        "two predictions files .+ --endpoint has no part in it",
    ),
    "a limit of files": (
        lambda f, d: (*f.join, "--limit", "5"),
        "two predictions files are .+; --limit has no part in it",
    ),
    "samples of files": (
        lambda f, d: (*f.join, "--samples", "5"),
        "two predictions files are .+; --samples has no part in it",
    ),
    "a calibrator and no output": (lambda f, d: (*f.join, "--calibrator", "x"), "--calibrator adds to the rows of"),
    "a calibrator of no name": (lambda f, d: (*f.join, "--calibrator", ""), "--calibrator needs a file name"),
    "a threshold alone": (lambda f, d: (*f.join, "--threshold", "0.5"), "--threshold is a calibrated confidence"),
    "output is an input": (same_as_input, r"\S+two.jsonl is both input and output"),
    "output is fitted on": (same_as_fit_on, r"\S+one.jsonl is both input and output"),
    "a method's file is fitted on": (member_is_fit_on, r"\S+o.logprobs.jsonl is both input and output"),
    "an output in no folder": (lambda f, d: (*f.join, "--output", d / "no/o.jsonl"), "the output's folder .+ does not"),
    "few rows to fit on": (few_rows, "19 rows scored by both methods in --calibrate-on; at least 20 are needed"),
    "no row scored by both": (all_failed, "no row was scored by both methods"),
    "no labels and no output": (lambda f, d: f.plain, "the methods cannot be compared: 90 of 90 rows have no label"),
    "a figure without labels": (
        lambda f, d: (*f.plain, "--output", d / "o.jsonl", "--figure", d / "x.png"),
        "the methods cannot be compared: 90 of 90 rows have no label",
    ),
    "malformed votes": (bad_votes, "row 'rt3': its votes are .+, not a count for each label"),
    "malformed calls": (bad_calls, r"\S+one.jsonl and \S+two.jsonl: row 'rt3' of the consistency file does not say"),
    "measured where fitted": (
        lambda f, d: ("--logprobs", f.cal1, "--consistency", f.cal2, *f.fit_on, "--output", d / "o.jsonl"),
        "70 of the rows are among those of --calibrate-on, the first is 'rc0'",
    ),
    "fitted on unlabelled rows": (
        lambda f, d: (*f.join, "--calibrate-on", f.plain1, f.plain2, "--output", d / "o.jsonl"),
        "row 'rt0' has the label None",
    ),
    "files to fit on in the wrong order": (
        lambda f, d: (*f.join, "--calibrate-on", f.cal2, f.cal1),
        r"\S+cal2.jsonl and \S+cal1.jsonl: row 'copyrc9' of the logprobs file is by method 'consistency'",
    ),
    "groups that lack a row": (
        lambda f, d: (*f.join, "--output", d / "o.jsonl", "--groups", ROOT / "data/sample.csv"),
        r"\S+sample.csv line 2: --groups needs the columns id and group",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_command_is_one_line_and_exit_code_2_and_leaves_no_file(kind, files, tmp_path):
    command, message = BAD[kind]
    argv = command(files, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = call(*argv)
    assert done.code == 2 and done.out == "", done
    assert re.match(rf"error: {message}", done.err) and done.err.count("\n") == 1, done.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# With a model


TEXTS = ["Good", "A bad film", "Nothing happens for an hour"]
ROWS = [f"Text {i} is {word}" for i, word in enumerate(["good", "bad", "long", "dull", "bright", "new"] * 4)]


@pytest.fixture(scope="module")
def speaking(tiny_folder, tmp_path_factory):
    """The tiny model with a head that answers these texts with a label, the log odds from -3 to 3.

    Both answers' scores are solved for from the last states of the prompts; 25 is more than all other tokens have.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    with torch.no_grad():
        prompts = [tokenizer(TASKS["sentiment"].prompt(text), return_tensors="pt") for text in (*TEXTS, *ROWS)]
        last = torch.stack([model.model(**ids).last_hidden_state[0, -1] for ids in prompts]).double()
        odds = torch.linspace(-3, 3.2, len(last), dtype=torch.float64)[torch.arange(len(last)) * 10 % len(last)]
        for word, sign in ((" negative", -1), (" positive", 1)):
            (token,) = tokenizer.encode(word, add_special_tokens=False)
            model.lm_head.weight[token] = (torch.linalg.pinv(last) @ (25 + sign * odds / 2)).float()
    folder = tmp_path_factory.mktemp("models") / "speaking"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_llama(str(folder), adapter=None, device="cpu")
    torch.set_num_threads(threads)


@pytest.fixture
def flags(speaking, monkeypatch):
    """What makes the script use that model, which is loaded once."""
    monkeypatch.setattr(combined, "load_from", lambda *ignored: speaking)
    return "--device", "cpu", "--max-tokens", "1", "--samples", "6"


def test_single_texts_are_shown_by_all_three_methods_and_as_json_with_the_contracts_fields(flags, capsys):
    combined.main([*map(str, (*TEXTS, *flags))])
    shown = capsys.readouterr().out
    combined.main([*map(str, (*TEXTS, *flags, "--json"))])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == TEXTS and shown.count("Text: ") == 3
    for row, block in zip(rows, shown.split("Text: ")[1:], strict=True):
        one, two = row["logprobs"], row["consistency"]
        assert set(row) == {
            "text",
            "logprobs",
            "consistency",
            "logprobs_prediction",
            "consistency_prediction",
            "rule",
        } | {
            "reason",
            "calls",
            "probabilities",
            "label_mass",
            "total_probability",
            "prediction",
            "confidence",
            "fingerprint",
        }
        assert {"prompt", "prompt_token_ids", "top_tokens", "answer_tokens", "model_path"} <= set(one)
        assert {"votes", "unparsed", "agreement", "answers"} <= set(two)
        # The roots of the products, by hand.
        n = sum(two["votes"].values())
        roots = {k: math.sqrt(one["probabilities"][k] * (two["votes"][k] + 0.5) / (n + 1)) for k in LABELS}
        expected = {k: root / sum(roots.values()) for k, root in roots.items()}
        assert row["probabilities"] == pytest.approx(expected, abs=1e-9)
        assert row["confidence"] == max(row["probabilities"].values()) and row["calls"] == 7
        assert row["total_probability"] == pytest.approx(row["confidence"] * row["label_mass"])
        assert row["label_mass"] == min(one["label_mass"], two["label_mass"])
        for name, found in (("1 logprobs", one), ("2 consistency", two), ("3 geometric mean", row)):
            cell = cells(block, name)
            assert cell[1:4] == [
                found["prediction"],
                f"{100 * found['confidence']:.2f} %",
                f"{100 * found['label_mass']:.2f} %",
            ]
        assert f"Verdict: {row['prediction']}, confidence {100 * row['confidence']:.2f} %: {row['reason']}" in block
        assert f"{two['votes'][two['prediction']]} of 6 answers" in block


def test_a_table_is_scored_by_both_methods_beside_the_combined_file_and_continued(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(consistency, "ROWS_PER_WINDOW", {"cpu": 4})
    table, output = tmp_path / "t.jsonl", tmp_path / "both.jsonl"
    lines = [{"id": f"r{i}", "text": text, "label": LABELS[i % 2]} for i, text in enumerate([*ROWS, " "])]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    command = ("--input", table, "--output", output, *flags)
    first = call(*command)
    names = ("both.jsonl", "both.logprobs.jsonl", "both.consistency.jsonl")
    paths = [tmp_path / name for name in names]
    assert first.code == 0 and sorted(path.name for path in tmp_path.iterdir()) == sorted((*names, "t.jsonl"))
    whole = [path.read_bytes() for path in paths]
    ours, one, two = map(predictions.read, paths)
    assert [row.id for row in ours] == [line["id"] for line in lines]
    assert [row.error for row in ours] == [None] * 24 + ["logprobs: the text is empty"]
    assert {row.method for row in one} == {"logprobs"} and {row.method for row in two} == {"consistency"}
    by_id = {row.id: row for row in two}
    pool = combined.pool_for((one[0].fingerprint, two[0].fingerprint), 2)
    assert ours == [*combine([(row, by_id[row.id]) for row in one], pool)]
    p = [row.probabilities["positive"] for row in one[:-1]]
    assert (
        min(p) < 0.1 < 0.9 < max(p) and len({row.prediction for row in ours}) == 3
    )  # a comparison of rows that differ
    counted = re.compile(r"^(logprobs|consistency): (\d+) rows, [\d,.]+ a second, into .+jsonl$", re.M)
    assert counted.findall(first.err) == [("logprobs", "25"), ("consistency", "25")]
    seconds = {name: cells(first.out, name, table=1)[-1] for name in METHODS}
    assert all(re.fullmatch(r"\d+\.\d{3}", value) for value in seconds.values())
    # A finished command runs no model, so it knows no seconds, and touches no file.
    stamps = [path.stat().st_mtime_ns for path in paths]
    again = call(*command)
    assert again.code == 0 and counted.findall(again.err) == [] and cells(again.out, "3 stacked", table=1)[-1] == "-"
    assert [path.stat().st_mtime_ns for path in paths] == stamps
    # Torn files are finished to the same bytes; what is counted and timed is what ran now.
    lines_kept = whole[2].splitlines(keepends=True)
    paths[2].write_bytes(b"".join(lines_kept[:18]) + lines_kept[18][:40])
    paths[0].write_bytes(whole[0][:700])
    torn = call(*command)
    assert torn.code == 0 and [path.read_bytes() for path in paths] == whole
    assert counted.findall(torn.err) == [("consistency", "7")]
    assert {cells(torn.out, name, table=1)[-1] for name in ("1 logprobs", "3 stacked")} == {"-"}
    assert re.fullmatch(r"\d+\.\d{3}", cells(torn.out, "2 consistency", table=1)[-1])


def test_weights_and_calibrators_of_other_rows_are_refused_before_the_model_scores_a_row(
    flags, files, calibrator, tmp_path, monkeypatch
):
    for name in ("score_table", "explain"):
        monkeypatch.setattr(combined.logprobs, name, lambda *_, **__: pytest.fail("the model ran"))
    (tmp_path / "t.csv").write_text("text\nA film\n", encoding="utf-8")
    table = ("--input", tmp_path / "t.csv", "--output", tmp_path / "both.jsonl", *flags)
    for command in (("a text", *flags), table):
        for extra, message in (
            (files.fit_on, "--calibrate-on has the fingerprints aaaa1111 and bbbb2222, these rows "),
            (("--calibrator", calibrator), "the calibrator is for m on task 't' with fingerprint "),
        ):
            done = call(*command, *extra)
            assert done.code == 2 and f"error: {message}" in done.err and done.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
