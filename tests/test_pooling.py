"""pooling.py: one prediction from two, never a confidence in a label that the evidence rejects.

scikit-learn's logistic regression, likelihoods written out again, simulations with a known truth and hand-computed
cases say what is right.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

import pooling
import predictions
import voting
from pooling import FEATURES, Combination, Pair, Pool, combination_for, combine, features_of, fitted_pool, true_labels

ROOT = Path(__file__).parent.parent
VECTORS = json.loads((ROOT / "tests/data/reference_vectors.json").read_text(encoding="utf-8"))["combination"]
LABELS, THREE = ("negative", "positive"), ("bad", "fair", "good")
FINGERPRINTS = ("aaaa1111", "bbbb2222")
GEOMETRIC, GEOMETRIC_OF_THREE = combination_for(FINGERPRINTS, 2), combination_for(FINGERPRINTS, 3)
USED = [("logprobs",), ("consistency",), ("logprobs", "consistency"), FEATURES]


def pair(number, p, votes, label=None, labels=LABELS, text=None, unparsed=0):
    """A row by both methods, the second as consistency_confidence.py records it."""
    identity, common = (f"r{number}", text or f"text {number}", label), {"model": "m", "task": "t"}
    by_label = dict(zip(labels, p, strict=True))
    one = predictions.scored(*identity, by_label, 0.9, method="logprobs", fingerprint=FINGERPRINTS[0], **common)
    votes = dict(zip(labels, map(int, votes), strict=True))
    common |= {"method": "consistency", "fingerprint": FINGERPRINTS[1]}
    return Pair(one, voting.record(identity, votes, unparsed, {}, False, **common))


def made(n, seed, name="", labels=LABELS, own=True):
    """Rows of two noisy views of a true label: an overconfident p, and ten votes by the other view, or (not own) by p.

    A view is normal around 1.4 in the true label's place, so the log odds of a label are 1.4 times its place.
    """
    draw, k = np.random.default_rng(seed), len(labels)
    truth = draw.integers(k, size=n)
    views = draw.normal(0, 1, (2, n, k)) + 1.4 * np.eye(k)[truth]
    p = softmax(1.5 * 1.4 * views[0], axis=1)
    votes = draw.multinomial(10, softmax(1.4 * views[1], axis=1) if own else p)
    words = draw.choice(list("abcdefghijklmnopqrstuvwxyz"), (n, 6, 7))  # no near-duplicates
    texts = [" ".join(map("".join, of_row)) for of_row in words]
    return [pair(f"{name}{i}", p[i].tolist(), votes[i], labels[truth[i]], labels, texts[i]) for i in range(n)]


def changed(both, **fields):
    """A pair with other fields in both records."""
    return Pair(*(replace(row, **fields) for row in both))


def failed(number, method, error="too long", label=None):
    """A row that one method could not score."""
    both = pair(number, (0.5, 0.5), (5, 5), label)._asdict()
    row = both[method]
    common = {"method": method, "model": "m", "task": "t", "fingerprint": row.fingerprint}
    return Pair(**both | {method: predictions.failed(row.id, row.text, label, error, **common)})


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


# Without labels: the geometric mean


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case['p_logprob']} {case['p_consistency']}")
def test_without_labels_two_probabilities_become_the_recorded_geometric_mean(case):
    p, q = case["p_logprob"], case["p_consistency"]
    features = np.array([[[math.log(1 - p), math.log(1 - q), 0], [math.log(p), math.log(q), 1]]])
    ((no, yes),) = GEOMETRIC.pool.probabilities(features)
    assert yes == pytest.approx(case["geometric_mean_renormalised"], abs=1e-12)
    assert no + yes == pytest.approx(1, abs=1e-15)


def test_three_labels_become_the_hand_computed_geometric_mean_and_votes_count_smoothed():
    # Of 8 votes 1, 5, 2: q = (4, 16, 7) / 27. The roots of .5 x 4, .3 x 16 and .2 x 7, divided by their sum.
    (row,) = combine([pair(0, (0.5, 0.3, 0.2), (1, 5, 2), None, THREE, unparsed=2)], GEOMETRIC_OF_THREE)
    roots = [math.sqrt(x) for x in (2.0, 4.8, 1.4)]
    assert [*row.probabilities.values()] == pytest.approx([root / sum(roots) for root in roots], abs=1e-12)
    assert row.probabilities == pytest.approx({"bad": 0.295347, "fair": 0.457549, "good": 0.247104}, abs=2e-6)
    assert (row.prediction, row.label_mass, row.method, row.extras["calls"]) == ("fair", 0.8, "combined", 11)
    assert row.model == "m"
    assert row.extras["logprobs_prediction"] == "bad" and row.extras["consistency_prediction"] == "fair"


def test_the_fingerprint_is_of_both_methods_and_of_the_labelled_rows():
    pairs = made(30, 0)
    relabelled = [changed(pairs[0], label=LABELS[pairs[0].logprobs.label == "negative"]), *pairs[1:]]
    arguments = [(FINGERPRINTS, 2), (FINGERPRINTS[::-1], 2), (("aaaa1111", "x"), 2)]
    arguments += [(FINGERPRINTS, 2, rows) for rows in (pairs, pairs[:29], relabelled)]
    assert len({combination_for(*each).fingerprint for each in arguments}) == len(arguments)
    assert combination_for(FINGERPRINTS, 2).fingerprint == GEOMETRIC.fingerprint


# With labels: fitted weights


@pytest.mark.parametrize("used", USED, ids=str)
def test_with_no_prior_two_labels_are_scikit_learns_logistic_regression(used):
    pairs, places = made(500, 1), [FEATURES.index(name) for name in used]
    x, positive = design(pairs)
    theirs = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12).fit(x[:, places], positive)
    pool = fitted_pool(features_of(pairs), true_labels(pairs), used, prior_sd=1e6)
    assert pool.weights[places] == pytest.approx(theirs.coef_[0], abs=2e-5)
    assert pool.biases[1] - pool.biases[0] == pytest.approx(theirs.intercept_[0], abs=2e-5)
    assert all(pool.weights[k] == 0 for k in range(3) if k not in places)
    ours = pool.probabilities(features_of(pairs))[:, 1]
    np.testing.assert_allclose(ours, theirs.predict_proba(x[:, places])[:, 1], atol=1e-5)


def test_of_three_labels_the_fit_is_the_most_probable_one_written_as_a_product_of_powers():
    pairs = made(400, 4, labels=THREE)
    truth = true_labels(pairs)
    p = np.array([[*one.probabilities.values()] for one, _ in pairs]).clip(1e-6, 1)
    q = np.array([[(v + 1 / 3) / 11 for v in two.extras["votes"].values()] for _, two in pairs])
    same = [one.prediction if one.prediction == two.prediction else None for one, two in pairs]
    boost = np.array([[label == named for label in THREE] for named in same])
    center = np.array([0.5, 0.5, 0, 0, 0, 0])

    def loss(t):  # of the labels, and of a normal prior around the geometric mean
        product = np.exp(t[3:]) * p ** t[0] * q ** t[1] * np.where(boost, np.exp(t[2]), 1)
        off = (t - center) / 0.7
        return (off**2).sum() / 2 - np.log(product[np.arange(len(truth)), truth] / product.sum(axis=1)).sum()

    best = minimize(loss, center, method="BFGS", options={"gtol": 1e-3}).x
    pool = fitted_pool(features_of(pairs), truth, prior_sd=0.7)
    ours = np.append(pool.weights, pool.biases)
    assert ours == pytest.approx(best, abs=1e-4) and loss(ours) <= loss(best) + 1e-8
    assert np.abs(ours - center)[:3].min() > 0.05  # the labels move every weight


def test_rows_that_a_method_separates_stay_finite_and_are_pushed_the_right_way():
    pairs = [pair(i, (0.1, 0.9), (0, 10), "positive") for i in range(40)]
    pairs += [pair(i, (0.9, 0.1), (10, 0), "negative") for i in range(40, 80)]
    features, truth = features_of(pairs), true_labels(pairs)
    pool = fitted_pool(features, truth)
    assert (pool.weights > [0.5, 0.5, 0]).all() and (pool.weights < 3).all()
    p = pool.probabilities(features)[np.arange(80), truth]
    assert (p > 0.99).all() and (p < 1).all()
    one_label = fitted_pool(features[:40], truth[:40])  # nothing tells the weights from the bias but the prior
    assert np.isfinite(one_label.weights).all() and np.inf > one_label.biases[1] > 0 > one_label.biases[0]


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
    one, two = both = pair(0, p, votes, None, labels)
    (row,) = combine([both], Combination(Pool(np.array(weights), np.array(biases)), "stacked", "cccc3333"))
    scores = []
    for k, x, v, b in zip(labels, p, votes, biases, strict=True):
        q = (v + 1 / n_labels) / (sum(votes) + 1)
        named = one.prediction == k == two.prediction
        scores.append(b + weights[0] * math.log(max(x, 1e-6)) + weights[1] * math.log(q) + weights[2] * named)
    total = math.fsum(math.exp(score) for score in scores)
    assert [*row.probabilities.values()] == pytest.approx([math.exp(s) / total for s in scores], abs=1e-9)
    assert scores[labels.index(row.prediction)] >= max(scores) - 1e-9
    best = [label for label in labels if row.probabilities[label] == max(row.probabilities.values())]
    assert row.prediction == best[0] and row.confidence == row.probabilities[row.prediction]
    agreed = one.prediction == two.prediction == row.prediction
    assert (row.extras["reason"] == f"both methods say {row.prediction}") == agreed


def test_equal_evidence_for_two_labels_is_the_label_listed_first():
    # The votes of 10 to 0, smoothed, against a probability that says as much for the other label.
    for p, votes, labels in (
        ((0.5 / 11, 10.5 / 11), (10, 0), LABELS),
        ((10.5 / 11, 0.5 / 11), (0, 10), LABELS),
        ((0.5 / 11, 10.5 / 11), (10, 0), LABELS[::-1]),
    ):
        (row,) = combine([pair(0, p, votes, None, labels)], GEOMETRIC)
        assert (row.prediction, row.confidence) == (labels[0], 0.5)


def test_methods_that_disagree_never_give_a_confidence_in_the_label_not_chosen():
    # Method 1 is 95 % sure of positive, all ten answers are negative: the roots of .05 x 10.5 and .95 x .5.
    (row,) = combine([pair(0, (0.05, 0.95), (10, 0))], GEOMETRIC)
    no, yes = math.sqrt(0.05 * 10.5), math.sqrt(0.95 * 0.5)
    assert row.prediction == "negative" and row.confidence == pytest.approx(no / (no + yes), abs=1e-12)
    said = "the probability says positive (95.0%), the answers negative ({} agree); {} by the {}"
    assert row.extras["reason"] == said.format("100.0%", "negative", "geometric mean")
    assert (row.extras["logprobs_prediction"], row.extras["consistency_prediction"]) == LABELS[::-1]
    trusting = Combination(Pool(np.array([1.0, 0.1, 0.0]), np.zeros(2)), "stacked", "cccc3333")
    (row,) = combine([pair(0, (0.05, 0.95), (7, 1), unparsed=2)], trusting)
    assert row.prediction == "positive" and row.confidence > 0.9
    assert row.extras["reason"] == said.format("70.0%", "positive", "weights fitted on labelled rows")


def test_where_both_agree_and_the_labelled_rows_say_otherwise_the_reason_says_so():
    # Rows of which four in five are negative, although both methods say positive.
    agree = pair(0, (0.45, 0.55), (4, 6))
    fit_on = [pair(f"c{i}", (0.45, 0.55), (4, 6), LABELS[i % 5 == 0], text=f"other {i}") for i in range(100)]
    (row,) = combine([agree], combination_for(FINGERPRINTS, 2, fit_on))
    assert row.prediction == "negative" and row.confidence == pytest.approx(0.8, abs=0.02)
    assert row.extras["rule"] == "stacked" and row.extras["reason"] == (
        "both methods say positive, but among the labelled rows such texts are rather negative"
    )


# Two files of the same rows


def test_rows_are_paired_by_id_in_the_order_of_the_first_file():
    pairs = made(5, 7)
    first, second = zip(*pairs, strict=True)
    assert pooling.pair_rows(first, second[::-1]) == pairs
    assert pooling.pair_rows(first[::-1], second) == pairs[::-1]


def one_row(number, which=1, **fields):
    """A change of one row of one file."""

    def change(files):
        files[which][number] = replace(files[which][number], **fields)

    return change


REFUSED = {
    "a missing id": (lambda files: files[1].pop(2), "row 'r2' of the logprobs file is not in the consistency file"),
    "the files in the wrong order": (lambda files: files.reverse(), "row 'r0' of the logprobs file is by method 'cons"),
    "another method": (one_row(4, method="combined"), "row 'r4' of the consistency file is by method 'combined'"),
    "mixed fingerprints": (one_row(4, 0, fingerprint="x"), "row 'r4' of the logprobs file has another"),
    "no votes": (one_row(2, extras={"calls": 10}), "row 'r2' of the consistency file does not say its votes and calls"),
    "no calls": (one_row(2, extras={"votes": {}}), "row 'r2' of the consistency file does not say its votes and calls"),
    "calls that are no count": (one_row(2, extras={"votes": {}, "calls": True}), "row 'r2' .+ votes and calls"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_not_of_the_same_rows_are_refused_in_a_line_that_names_the_row(kind):
    change, message = REFUSED[kind]
    files = [[*rows] for rows in zip(*made(5, 7), strict=True)]
    change(files)
    with pytest.raises(ValueError, match=rf"^{message}"):
        pooling.pair_rows(*files)


def test_a_row_that_a_method_could_not_score_is_an_error_that_names_the_method_and_no_number():
    good = made(2, 8)
    neither = Pair(failed("n", "logprobs").logprobs, failed("n", "consistency").consistency)
    empty = failed("y", "consistency", "")  # an error is an error, whatever it says
    pairs = [failed("x", "logprobs", label="positive"), good[0], empty, neither, good[1]]
    rows = [*combine(pairs, GEOMETRIC)]
    errors = ["logprobs: too long", None, "consistency: ", "logprobs: too long", None]
    assert [row.error for row in rows] == errors and (rows[0].id, rows[0].label) == ("rx", "positive")
    for row in (rows[0], rows[2], rows[3]):
        assert row.probabilities is None and row.extras == {}
        assert (row.method, row.fingerprint) == ("combined", GEOMETRIC.fingerprint)
    assert [rows[1], rows[4]] == [*combine(good, GEOMETRIC)]  # the errors between them change nothing


def test_weights_of_other_fingerprints_or_of_unlabelled_rows_are_refused():
    pairs = made(30, 20)
    for other in (("x", "bbbb2222"), ("aaaa1111", "x")):
        with pytest.raises(ValueError, match=r"^--calibrate-on has the fingerprints aaaa1111 and bbbb2222, these rows"):
            combination_for(other, 2, pairs)
    with pytest.raises(ValueError, match=r"^row 'r0' has no label$"):
        combination_for(FINGERPRINTS, 2, [changed(pairs[0], label=None), *pairs[1:]])
