"""voting.py: from votes to a record, when asking may stop, and how far a vote share is off.

Truth comes from counting by hand, from scipy, from exact sums over all courses a vote can take, and from simulation.
"""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

import predictions
from task import TASKS
from voting import (
    answer_seed,
    converge,
    convergence_table,
    count_votes,
    decided,
    first_token_draws,
    jeffreys_interval,
    next_numbers,
    record,
    recounted,
)

DATA = Path(__file__).parent / "data"
VECTORS = json.loads((DATA / "reference_vectors.json").read_text(encoding="utf-8"))["consistency"]
SENTIMENT = TASKS["sentiment"]
COMMON = {"method": "consistency", "model": "m", "task": "sentiment", "fingerprint": "f"}


# Votes


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=4).filter(any), st.integers(0, 30), st.booleans())
def test_shares_sum_to_one_and_confidence_times_label_mass_is_the_vote_share(counts, unparsed, adaptive):
    votes = dict(zip("abcd", counts, strict=False))  # what names no label stays in the denominator
    row = record(("1", "x", None), votes, unparsed, {}, adaptive, **COMMON)
    n = sum(counts) + unparsed
    assert row.probabilities == pytest.approx({label: count / sum(counts) for label, count in votes.items()})
    assert row.confidence * row.label_mass == pytest.approx(row.extras["agreement"], abs=1e-12)
    assert row.extras["agreement"] == max(counts) / n and row.extras["calls"] == n
    # The first of the labels with most votes, as with equal probabilities in Method 1.
    assert row.prediction == "abcd"[counts.index(max(counts))]
    shares = [count / n for count in [*counts, unparsed] if count]
    assert row.extras["vote_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-12)
    bounds = row.extras["agreement_low"], row.extras["agreement_high"]
    assert bounds == ((None, None) if adaptive else jeffreys_interval(max(counts), n))
    assert predictions.from_line(predictions.to_line(row), "here") == row


def test_when_no_answer_names_a_label_there_is_an_error_and_no_number():
    answers = ["Perhaps, it depends on what the reader of it would like", "neither", ""]
    row = record(("1", "x", "positive"), *count_votes(answers, SENTIMENT), {"answers": answers}, False, **COMMON)
    assert row.error == "none of 3 answers names a label, as 'Perhaps, it depends on what the reader o'"
    assert row.prediction is row.confidence is row.probabilities is row.label_mass is None
    assert row.extras["answers"] == answers and row.extras["unparsed"] == 3 and row.extras["calls"] == 3
    assert [row.extras[name] for name in ("agreement", "agreement_low", "agreement_high")] == [None] * 3
    assert row.extras["vote_entropy"] == 0 and math.copysign(1, row.extras["vote_entropy"]) == 1
    assert predictions.from_line(predictions.to_line(row), "here") == row


def test_the_interval_is_jeffreys_and_closed_at_its_ends():
    for vector in VECTORS["k_of_n"]:
        found = jeffreys_interval(vector["k"], vector["n"])
        assert found == pytest.approx(vector["credible95_jeffreys"], abs=1e-12), vector
    for k, n in ((0, 1), (1, 1), (0, 10), (10, 10), (3, 7), (500, 1000)):
        low, high = beta.interval(0.95, k + 0.5, n - k + 0.5)
        assert jeffreys_interval(k, n) == pytest.approx((0.0 if k == 0 else low, 1.0 if k == n else high), abs=1e-12)
    assert jeffreys_interval(10, 10) == pytest.approx((0.783, 1.0), abs=5e-4)  # the 78 % at the top of the script


# When to stop asking


MANY = 10**6  # answers left, so that no lead is too large to be overtaken


def test_asking_stops_when_the_leader_is_safe():
    for vector in VECTORS["beta_stop"]:
        for votes in ([vector["v1"], vector["v2"]], [vector["v2"], vector["v1"]], [0, vector["v2"], vector["v1"]]):
            assert decided(votes, MANY) == vector["stop_at_0p95"], vector
    for first, second in ((4, 0), (6, 1), (8, 2), (9, 3)):
        assert decided([first, second], MANY) and not decided([first - 1, second], MANY)
    assert decided([2, 9, 3], MANY) and not decided([4, 9, 3], MANY)  # against the second, whoever that is


def test_asking_stops_when_the_leader_cannot_be_overtaken():
    assert decided([3, 1], 1) and not decided([3, 1], 2)  # 3-3 is not overtaken but no longer a lead
    assert decided([5, 4], 0) and not decided([5, 5], 0)
    assert decided([2, 1, 3], 0) and not decided([2, 2, 3], 1)


def answered(positive, negative, unparsed=0):
    return ["positive"] * positive + ["negative"] * negative + ["mixed"] * unparsed


def test_no_more_answers_are_asked_for_than_there_may_be():
    for answers in (answered(5, 5), answered(0, 0, 10), answered(3, 3, 4), answered(10, 0)):
        assert not next_numbers(answers, SENTIMENT, 10, adaptive=True)
    assert next_numbers(answered(5, 4), SENTIMENT, 10, adaptive=True) == range(9, 10)
    assert next_numbers([], SENTIMENT, 10, adaptive=True) == range(4)
    assert next_numbers([], SENTIMENT, 3, adaptive=True) == range(3)
    assert not next_numbers(answered(2, 1), SENTIMENT, 3, adaptive=True)
    assert next_numbers([], SENTIMENT, 10, adaptive=False) == range(10)
    assert not next_numbers(answered(10, 0), SENTIMENT, 10, adaptive=False)


def course(p, stops, cap=10):
    """(expected calls, chance of another leader than the likelier label), exactly: a sum over all courses of a vote."""
    going, calls, other = {(0, 0): 1.0}, 0.0, 0.0
    for n in range(cap + 1):
        after = Counter()
        for (a, b), chance in going.items():
            if stops(a, b, cap - n):
                calls += chance * n
                other += chance * (1.0 if b > a else 0.5 if a == b else 0.0)
            else:
                after[a + 1, b] += chance * p
                after[a, b + 1] += chance * (1 - p)
        going = after
    assert not going
    return calls, other


def test_adaptive_asking_costs_and_errs_as_much_as_it_should():
    def safe(a, b, left):  # statistics.md section 5, without the rule about overtaking
        return not left or (a + b >= 4 and decided([a, b], MANY))

    def ours(a, b, left):
        return a + b > 0 and not next_numbers(answered(a, b), SENTIMENT, 10, adaptive=True)

    expected = {1: 4.0, 0.99: 4.1, 0.9: 5.4, 0.8: 6.9, 0.7: 8.1, 0.5: 9.1}
    assert {p: round(course(p, safe)[0], 1) for p in expected} == expected
    # The same votes win; to stop when a lead cannot be overtaken saves up to half an answer and changes no winner.
    cheaper = {1: 4.0, 0.99: 4.12, 0.9: 5.21, 0.8: 6.41, 0.7: 7.51, 0.5: 8.58}
    assert {p: round(course(p, ours)[0], 2) for p in cheaper} == cheaper
    for p, other, fixed in ((0.9, 0.0009, 0.0009), (0.8, 0.020, 0.0196), (0.7, 0.0996, 0.0988)):
        assert course(p, ours)[1] == pytest.approx(other, abs=6e-5)
        assert course(p, lambda a, b, left: not left)[1] == pytest.approx(fixed, abs=6e-5)


# Counting again


def test_a_recount_takes_the_first_answers_and_adaptively_no_more_than_would_have_been_asked_for():
    answers = answered(4, 0) + answered(0, 6)
    row = record(("1", "x", None), *count_votes(answers, SENTIMENT), {"answers": answers}, False, **COMMON)
    for samples, adaptive, used in ((None, False, 10), (7, False, 7), (None, True, 4), (3, True, 3), (2, True, 2)):
        found = recounted(row, SENTIMENT, samples, adaptive, "g")
        assert found.extras["answers"] == answers[:used] and found.fingerprint == "g"
        assert found.extras["votes"] == {"negative": max(0, used - 4), "positive": min(4, used)}
        assert (found.extras["agreement_low"] is None) == adaptive
    undecided = record(("1", "x", None), {"negative": 0, "positive": 0}, 10, {"answers": ["?"] * 10}, False, **COMMON)
    assert recounted(undecided, SENTIMENT, None, True, "g").extras["calls"] == 10
    empty = predictions.failed("1", " ", None, "the text is empty", **COMMON)
    assert recounted(empty, SENTIMENT, 5, True, "g") == replace(empty, fingerprint="g")


# Draws


def test_seeds_differ_by_run_row_text_and_number_and_every_server_takes_them():
    rows = [(f"r{i}", text) for i in range(25) for text in ("one", "two")]
    seeds = [answer_seed(seed, *row, number) for seed in (0, 1) for row in rows for number in range(20)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds) and max(seeds) > 2**30
    assert answer_seed(0, "1", "\ud83d", 0) > 0  # an unreadable text has a seed as well


def test_fewer_draws_are_the_first_of_more_and_wordings_take_turns():
    masses = np.array([[0.2, 0.5]])
    whole = first_token_draws(masses, 11, 1000)
    assert set(whole.tolist()) == {0, 1, 2}
    for n in (1, 10, 100):
        assert first_token_draws(masses, 11, n).tolist() == whole[:n].tolist()
    assert first_token_draws(masses, 12, 1000).tolist() != whole.tolist()
    for label in (0, 1, 2):  # what has no probability is never drawn, and what has all of it always
        assert set(first_token_draws(np.eye(3)[[label], :2], 5, 1000).tolist()) == {label}
    masses = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert first_token_draws(masses, 0, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_vote_share_approaches_the_probability_as_one_over_the_root_of_the_draws():
    n = 3000
    by_label = np.random.default_rng(0).dirichlet([2, 3, 1], n)[:, :2]
    p = by_label.max(axis=1)
    pairs = converge(by_label, range(7000, 7000 + n), [10, 100, 1000])
    shown = convergence_table(pairs).splitlines()[2:]
    for (size, found), line in zip(pairs.items(), shown, strict=True):
        assert found.shape == (n, 2) and found[:, 0].tolist() == p.tolist()
        measured, binomial = np.sqrt(((found[:, 1] - p) ** 2).mean()), np.sqrt((p * (1 - p)).mean() / size)
        # A mean of 3,000 squares of nearly normal distances varies by sqrt(2 / 3000), its root by half of that, 1.3 %.
        assert abs(measured / binomial - 1) < 4 * 0.5 * math.sqrt(2 / n)
        assert abs((found[:, 1] - p).mean()) < 4 * binomial / math.sqrt(n)
        *numbers, low, to, high = line.split()
        assert numbers == [f"{size:,}", f"{measured:.4f}", f"{binomial:.4f}"] and to == "to"
        # 1.96 of those standard deviations to either side, as well as 1,000 simulated tables can tell.
        expected = [binomial * (1 + z * math.sqrt(0.5 / n)) for z in (-1.96, 1.96)]
        assert [float(low), float(high)] == pytest.approx(expected, rel=6e-3)
        assert (np.round(found[:, 1] * size, 6) % 1 == 0).all()
