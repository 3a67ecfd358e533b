"""decisions.py: thresholds with a guarantee, and what they cost.

Binomial tails summed from math.comb, searches written out, simulations whose true accuracy is known, the article's
arithmetic and recorded values of MAPIE and SGR say what is right; nothing is compared with our own output.
"""

import json
import math
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest
from scipy.stats import t as student

from decisions import (
    Threshold,
    automation,
    average_threshold,
    bucket_of,
    buckets,
    choose_threshold,
    cost_band,
    cost_optimal_threshold,
    costs,
    dollars_a_day,
    guarantee_p_value,
    measured_ladder,
    priced_automation,
    rows_needed,
    rung_words,
    threshold_for,
)

VECTORS = json.loads((Path(__file__).parent / "data/reference_vectors.json").read_text(encoding="utf-8"))
CASES, RANKS = VECTORS["thresholds"]["cases"], "fixed_sequence_ranks_2pct_start_max_nmin_10pct"
NAN = math.nan


def tail(n, errors, target):
    """P(Bin(n, 1 - target) <= errors), term by term."""
    return math.fsum(math.comb(n, k) * (1 - target) ** k * target ** (n - k) for k in range(min(errors, n) + 1))


def recorded_rows(case):
    """The rows of a recorded case; where only counts were kept, rows that give the same counts at every rank."""
    if case["data"] in VECTORS["thresholds"]["arrays"]:
        arrays = VECTORS["thresholds"]["arrays"][case["data"]]
        return np.array(arrays["confidence"]), np.array(arrays["correct"])
    rows, n_before, errors_before = [], 0, 0
    for threshold, n, errors, *_ in case["own"][RANKS]["table"]:
        rows += [(threshold, i >= errors - errors_before) for i in range(n - n_before)]
        n_before, errors_before = n, errors
    return tuple(map(np.array, zip(*rows, strict=True)))


def slow_threshold(confidence, correct, target, delta, start):
    """(value, accepted, errors, empirical threshold, rows at or above that) by the definition, rank by rank."""

    def taken(value):
        return [right for c, right in zip(confidence, correct, strict=True) if c >= value]

    n, ranked, best = len(confidence), sorted(confidence, reverse=True), (None, 0, 0)
    fewest = next(m for m in range(1, 10_000) if target**m <= delta)
    values = [ranked[-(-n * percent // 100) - 1] for percent in range(2, 101, 2)]
    values = [value for value in values if len(taken(value)) >= fewest]

    def significance(value):  # in standard errors, but for a constant
        above = [c for c in confidence if c >= value]
        return sum(c - target for c in above) / math.sqrt(len(above))

    if start == "predicted":
        values = values[max(range(len(values)), key=lambda i: round(significance(values[i]), 9)) :] if values else []
    else:
        values = [value for value in values if 10 * len(taken(value)) >= n]
    for value in values:
        rows = taken(value)
        if tail(len(rows), rows.count(False), target) > delta:
            break
        best = (value, len(rows), rows.count(False))
    met = [v for v in confidence if Fraction(sum(taken(v)), len(taken(v))) >= Fraction(str(target))]
    empirical = min(met, default=None)
    return (*best, empirical, len(taken(empirical)) if met else 0)


# The exact test and its recorded values


def test_the_guarantee_is_the_exact_binomial_tail_and_never_mapie_s_rounded_one():
    for case in VECTORS["binomial_p_values"]:
        n, errors, target = case["n"], case["errors"], case["target_accuracy"]
        for truth in (case["p_value"], case["binomtest_p"], tail(n, errors, target)):
            assert guarantee_p_value(n, errors, target) == pytest.approx(truth, rel=1e-9)
    for case in VECTORS["mapie_pvalue_rounding"]:
        assert guarantee_p_value(case["n"], case["errors"], 0.9) == pytest.approx(case["exact"], rel=1e-9)
        assert (case["mapie"] > 1.5 * case["exact"]) == (case["errors"] > 0)  # the documented difference


def test_the_rows_needed_are_the_recorded_ones_at_every_target_and_error_count():
    for name, table in VECTORS["rows_needed_95pct"].items():
        if name != "what":
            target = float(name.removeprefix("accuracy>="))
            assert {errors: rows_needed(target, 0.05, int(errors)) for errors in table} == table
            assert all(tail(n, int(e), target) <= 0.05 < tail(n - 1, int(e), target) for e, n in table.items())


# The search


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['data']} at {case['target']}")
def test_the_recorded_fixed_sequence_selections_are_reproduced(case):
    selected, table = case["own"][RANKS]["selected"], case["own"][RANKS]["table"]
    chosen = choose_threshold(*recorded_rows(case), case["target"], start="strictest")
    assert (chosen.value, chosen.accepted, chosen.errors) == tuple(selected[k] for k in ("threshold", "n", "errors"))
    assert guarantee_p_value(chosen.accepted, chosen.errors, case["target"]) == pytest.approx(selected["p"], rel=1e-8)
    assert rows_needed(case["target"], 0.05) == case["n_min_zero_error"]
    _, n, errors, p, _ = map(np.array, zip(*table, strict=True))
    np.testing.assert_allclose(guarantee_p_value(n, errors, case["target"]), p, rtol=1e-7)


def test_the_search_stops_at_the_first_failure_as_mapie_s_control_does():
    proved = [p <= 0.05 for p in VECTORS["fwer"]["p_values"]]
    cumulative = [0, 2, 5, 8, 12, 22, 22]  # errors in the first 50, 100, ... rows
    assert [tail(50 * (i + 1), errors, 0.9) <= 0.05 for i, errors in enumerate(cumulative)] == proved
    correct = np.ones(350, dtype=bool)
    for block, errors in enumerate(np.diff([0, *cumulative])):
        correct[50 * block : 50 * block + errors] = False
    confidence = np.repeat([0.99, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7], 50)
    last = VECTORS["fwer"]["ref"]["mapie.control_fwer(fixed_sequence)"][-1]
    chosen = choose_threshold(confidence, correct, 0.9, start="strictest")
    assert (chosen.value, chosen.accepted, chosen.naive_value) == (confidence[50 * last], 50 * (last + 1), 0.7)


@given(
    n=st.integers(1, 160),
    levels=st.sampled_from([1, 3, 10, 40, 1000]),
    accuracy=st.sampled_from([0, 0.5, 0.8, 0.95, 1]),
    target=st.sampled_from([0.3, 0.55, 0.7, 0.8, 0.9, 0.95]),
    delta=st.sampled_from([0.01, 0.05, 0.13, 0.37]),
    start=st.sampled_from(["predicted", "strictest"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_the_choice_is_that_of_a_search_written_out_whatever_the_ties(n, levels, accuracy, target, delta, start, seed):
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, levels + 1, n) / levels
    correct = rng.random(n) < accuracy + (1 - accuracy) * confidence
    chosen = choose_threshold(confidence, correct, target, delta, start=start)
    found = (chosen.value, chosen.accepted, chosen.errors, chosen.naive_value, chosen.naive_accepted)
    assert found == slow_threshold(confidence.tolist(), correct.tolist(), target, delta, start)
    assert (chosen.kind, chosen.groups, chosen.rho, chosen.effective) == ("exact", n, 0.0, chosen.accepted)
    assert (chosen.n, chosen.target_accuracy, chosen.delta) == (n, target, delta)
    if chosen.value is None:
        assert chosen.more_labels is None or type(chosen.more_labels) is int
        return
    accepted = confidence >= chosen.value
    assert (chosen.accepted, chosen.errors) == (accepted.sum(), (~correct[accepted]).sum())
    right = binomtest(chosen.accepted - chosen.errors, chosen.accepted, alternative="greater")
    assert right.proportion_ci(1 - delta, "exact").low >= target - 1e-9 and chosen.more_labels is None
    assert chosen.naive_value <= chosen.value and chosen.start <= chosen.accepted


def slow_grouped_threshold(confidence, correct, groups, target, delta):
    """(value, effective rows, first rank tested, rho) by the formulas, rank by rank and group by group."""
    sizes = np.array([(groups == g).sum() for g in range(groups.max() + 1)])
    shares = np.array([(~correct[groups == g]).mean() for g in range(groups.max() + 1)])
    n, n_groups, rate = len(groups), len(sizes), (~correct).mean()
    between = (sizes * (shares - rate) ** 2).sum() / (n_groups - 1)
    within = sum((~correct[groups == g] - shares[g]) @ (~correct[groups == g] - shares[g]) for g in range(n_groups))
    within, typical = within / (n - n_groups), (n - (sizes**2).sum() / n) / (n_groups - 1)
    rho = min(1, max(0, (between - within) / (between + (typical - 1) * within)))
    least, tried = math.ceil(math.log(delta) / math.log(target)), []
    for percent in range(2, 101, 2):
        value = sorted(confidence)[::-1][-(-n * percent // 100) - 1]
        taken = confidence >= value
        k, wrong = taken.sum(), (~correct[taken]).sum()
        members = {g: (taken & (groups == g)).sum() for g in set(groups[taken])}
        deff = max(1, 1 + (sum(m**2 for m in members.values()) / k - 1) * rho)
        few = (student.ppf(1 - delta, k - 1) / student.ppf(1 - delta, len(members) - 1)) ** 2
        start = k / deff * few
        if wrong >= 4 and wrong < k:
            errors = {g: (~correct & taken & (groups == g)).sum() for g in members}
            spread = sum((errors[g] - wrong / k * m) ** 2 for g, m in members.items())
            spread *= len(members) / (len(members) - 1) / k**2
            deff = max(deff, spread / (wrong / k * (1 - wrong / k) / k))
        worth = k / deff * few
        p = beta.sf(1 - target, wrong / k * worth + 1, worth - wrong / k * worth) if wrong < k else 1
        if start >= least:
            expected = (1 - target - (1 - confidence[taken]).sum() / k) * math.sqrt(start)
            tried.append((expected, value, worth, p <= delta, k))
    first, best = max(range(len(tried)), key=lambda i: tried[i][0]), (None, 0.0)
    for _, value, worth, proved, _ in tried[first:]:
        if not proved:
            break
        best = value, worth
    return *best, tried[first][4], rho


@pytest.mark.parametrize(("seed", "target", "delta"), [(1, 0.7, 0.05), (2, 0.75, 0.2), (3, 0.9, 0.05), (4, 0.6, 0.01)])
def test_with_groups_the_choice_is_that_of_the_formulas_written_out(seed, target, delta):
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1, 2, 9], 90)
    groups = np.repeat(np.arange(90), sizes)
    confidence = rng.integers(50, 100, len(groups)) / 100
    luck = np.where(rng.random(len(groups)) < 0.5, rng.random(90)[groups], rng.random(len(groups)))  # half is shared
    correct, names = luck < confidence, [f"group {g}" for g in groups]
    chosen = choose_threshold(confidence, correct, target, delta, names)
    value, worth, start, rho = slow_grouped_threshold(confidence, correct, groups, target, delta)
    assert (chosen.value, chosen.start, chosen.kind, chosen.groups) == (value, start, "approximate", 90)
    assert (chosen.effective, chosen.rho) == (pytest.approx(worth), pytest.approx(rho)) and rho > 0.05
    assert (value is None) == (target == 0.9)


def test_groups_of_one_row_each_change_nothing_and_groups_of_another_length_are_refused():
    rng = np.random.default_rng(2)
    confidence = rng.random(300)
    correct = rng.random(300) < confidence
    alone = choose_threshold(confidence, correct, 0.8)
    assert alone == choose_threshold(confidence, correct, 0.8, groups=[f"row {i}" for i in range(300)])
    assert alone.kind == "exact" and alone.value is not None
    one = choose_threshold(confidence, correct, 0.8, groups=["all"] * 300)
    assert (one.value, one.groups, one.kind) == (None, 1, "approximate")  # a group alone says nothing
    for groups in ([1, 2], []):
        with pytest.raises(ValueError, match="300 confidences, but"):
            choose_threshold(confidence, correct, 0.8, groups=groups)
    with pytest.raises(ValueError, match="start is 'best'"):
        choose_threshold(confidence, correct, 0.8, start="best")


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1), st.sampled_from([0.5, 0.8, 0.9]))
@settings(max_examples=60, deadline=None)
def test_the_threshold_on_average_is_the_lowest_with_an_error_to_spare(rows, target):
    confidence, correct = (np.array(column) for column in zip(*rows, strict=True))
    confidence = confidence / 20
    found = average_threshold(confidence, correct, target)
    fits = [
        c for c in confidence if 1 + (~correct[confidence >= c]).sum() <= (1 - target) * (confidence >= c).sum() + 1e-9
    ]
    assert found.value == min(fits, default=None) and (found.kind, found.delta) == ("average", None)
    assert "on average over labelled sets" in str(found)
    if fits:
        taken = confidence >= found.value
        assert (found.accepted, found.errors) == (taken.sum(), (~correct[taken]).sum())


def test_a_certainty_is_one_minus_delta_or_on_average():
    rng = np.random.default_rng(3)
    confidence = rng.random(400)
    rows = confidence, rng.random(400) < confidence
    assert threshold_for(*rows, 0.8, 0.8) == choose_threshold(*rows, 0.8, 0.2)
    assert threshold_for(*rows, 0.8, 0.95) == choose_threshold(*rows, 0.8, 0.05)  # not 0.05000000000000004
    assert threshold_for(*rows, 0.8, "average") == average_threshold(*rows, 0.8)
    ladder = measured_ladder(rows, rows, 0.8, None, (0.8, "average", 0.99, 0.8))
    assert [rung["certainty"] for rung in ladder] == [0.99, 0.8, "average"]
    assert rung_words(ladder[0] | {"threshold": {"value": None, "more_labels": None}}) == "not reachable"
    value, measured = ladder[1]["threshold"]["value"], ladder[1]["measured"]
    assert measured == automation(*rows, [value])[0]
    share = f"{measured['share']:.1%} from {int(1000 * value) / 1000:.3f} ({measured['accuracy']:.3f})"
    assert rung_words(ladder[1]) == share


def test_rows_all_right_all_wrong_one_row_and_confidences_of_0_and_1():
    perfect = choose_threshold([0.0, 1.0] * 20, [1] * 40, np.float32(0.9))
    assert (perfect.value, perfect.accepted, perfect.errors) == (0.0, 40, 0)
    json.dumps(perfect.record())  # a target of any float type
    one = choose_threshold([1], [True], 0.9)
    assert (one.value, one.naive_value, one.naive_accepted, one.n) == (None, 1.0, 1, 1)
    assert choose_threshold([0], [True], 0.04).value == 0.0  # a single right row has p = 0.04
    half = choose_threshold(np.repeat([1.0, 0.0], 100_000), np.repeat([True, False], 100_000), 0.9)
    assert (half.value, half.accepted, half.naive_value) == (1.0, 100_000, 1.0)
    wrong = choose_threshold([1.0] * 40, [0] * 40, 0.9)
    assert (wrong.value, wrong.naive_value, wrong.naive_accepted, wrong.more_labels) == (None, None, 0, None)


@pytest.mark.parametrize("bad", [0, 1, -0.1, NAN, math.inf, True])
def test_a_target_or_delta_outside_0_and_1_is_a_value_error_that_names_it(bad):
    for function, arguments in ((choose_threshold, ([0.9], [1])), (rows_needed, ())):
        with pytest.raises(ValueError, match=r"^the target accuracy is .* must be between 0 and 1.*$"):
            function(*arguments, bad, 0.05)
        with pytest.raises(ValueError, match=r"^delta is .* must be between 0 and 1.*$"):
            function(*arguments, 0.9, bad)


@pytest.mark.parametrize("function", [choose_threshold, lambda c, y, _: buckets(c, y), automation, cost_band])
def test_bad_rows_are_a_value_error_of_one_line_in_every_function(function):
    extra = ([0.9], 5, 50) if function is cost_band else (0.9,) if function is choose_threshold else ([0.9],)
    for rows in (([], []), ([0.9], [1, 0]), ([1.1], [1])):
        with pytest.raises(ValueError, match=r"^[^\n]*(confidence|correct)[^\n]*$"):
            function(*rows, *extra)


# The guarantee


def overconfident(rng, n):
    """s is uniform on [0.5, 1], P(correct | s) = 0.55 + 0.86 (s - 0.5), shown as a confidence that piles up at 1."""
    s = rng.uniform(0.5, 1, n)
    return 1 - 2 * (1 - s) ** 2, rng.random(n) < 0.55 + 0.86 * (s - 0.5)


def overconfident_tied(rng, n):
    confidence, correct = overconfident(rng, n)
    return np.floor(confidence * 50) / 50, correct  # rounded down: rows at or above k/50 stay the same rows


def overconfident_accuracy(threshold):
    """Of the rows at or above it: 0.55 + 0.43 s, where s is shown as the threshold."""
    return 0.55 + 0.43 * (1 - math.sqrt((1 - threshold) / 2))


def flat(accuracy):
    return lambda rng, n: (rng.random(n), rng.random(n) < accuracy)


def broken(rule, world, true_accuracy, repeats=300, n=500):
    """In how many repeats each of the rule's thresholds has a true accuracy below 90 %."""
    rng = np.random.default_rng(7)
    values = [rule(*world(rng, n)) for _ in range(repeats)]
    return [sum(v is not None and true_accuracy(v) < 0.9 for v in of_one) for of_one in zip(*values, strict=True)]


def ours(confidence, correct):
    chosen = choose_threshold(confidence, correct, 0.9, 0.05)
    return chosen.value, chosen.naive_value


def pointwise(confidence, correct):
    """Wrong on purpose: the lowest threshold that passes its own test, however many fail before it."""
    order = np.argsort(-confidence)
    n, errors = np.arange(1, len(order) + 1), np.cumsum(~correct[order])
    passed = np.flatnonzero((binom.cdf(errors, n, 0.1) <= 0.05) & (10 * n >= len(n)))
    return (confidence[order][passed[-1]] if len(passed) else None,)


LIMIT = binom.ppf(0.999, 300, 0.05)  # a rule that breaks 5 % breaks more of 300 once in 1,000 times


@pytest.mark.parametrize("world", [overconfident, overconfident_tied])
def test_a_guarantee_holds_where_the_empirical_threshold_misses_the_target_half_the_time(world):
    confidence, correct = world(np.random.default_rng(1), 400_000)
    assert correct[confidence >= 0.8].mean() == pytest.approx(overconfident_accuracy(0.8), abs=0.005)
    guaranteed, empirical = broken(ours, world, overconfident_accuracy)
    assert guaranteed <= min(0.06 * 300, LIMIT)
    assert 0.35 * 300 <= empirical <= 0.65 * 300


def test_guarantees_hold_where_no_threshold_reaches_the_target_and_a_wrong_rule_would_be_caught():
    guaranteed, empirical = broken(ours, flat(0.895), lambda _: 0.895)
    assert guaranteed <= min(0.06 * 300, LIMIT)
    assert empirical > 0.9 * 300
    assert broken(pointwise, flat(0.895), lambda _: 0.895)[0] > LIMIT


def calibrated(rng, n):
    """P(correct) is uniform on [0.55, 0.98], and shown as it is."""
    confidence = rng.uniform(0.55, 0.98, n)
    return confidence, rng.random(n) < confidence


@pytest.mark.parametrize("world, start", [(calibrated, "predicted"), (overconfident, "strictest")])
def test_about_as_many_more_labels_as_it_says_do_and_a_tenth_of_them_do_not(world, start):
    rng, proved = np.random.default_rng(3), {1: [], 10: []}
    for _ in range(100):
        confidence, correct = world(rng, 150)
        chosen = choose_threshold(confidence, correct, 0.9, start=start)
        if chosen.value is None and chosen.more_labels:
            assert type(chosen.more_labels) is int and chosen.more_labels >= 1
            for part, results in proved.items():
                more = world(rng, -(-chosen.more_labels // part))
                both = [np.concatenate(pair) for pair in zip((confidence, correct), more, strict=True)]
                results.append(choose_threshold(*both, 0.9, start=start).value is not None)
    assert len(proved[1]) > 40 and 0.5 <= np.mean(proved[1]) <= 0.9
    assert np.mean(proved[10]) < 0.6 * np.mean(proved[1])


@pytest.mark.parametrize("top, rest", [([1] * 60, [0, 1] * 470), ([1, 1, 1, 1, 0] * 20, [1] * 900)])
def test_more_labels_like_these_guarantee_something_when_it_says_so(top, rest):
    confidence, correct = np.linspace(1, 0.5, 1000), np.array(top + rest)
    chosen = choose_threshold(confidence, correct, 0.9, start="strictest")
    assert chosen.value is None
    times = -(-(1000 + (chosen.more_labels or 0)) // 1000)
    again = choose_threshold(np.tile(confidence, times), np.tile(correct, times), 0.9, start="strictest")
    assert (again.value is not None) == (chosen.more_labels is not None)
    # 59 right rows would do; with the one error more that is counted, no number of rows would.
    assert (choose_threshold([0.9] * 19, [1] * 19, 0.95).more_labels or 0) < 10**6


# The record and its sentence


def test_the_sentence_tells_what_the_record_holds_and_the_record_survives_json():
    for case in CASES:
        chosen = choose_threshold(*recorded_rows(case), case["target"], start="strictest")
        assert Threshold(**json.loads(json.dumps(chosen.record(), allow_nan=False))) == chosen
        for part in (f"{chosen.accepted:,} of {chosen.n:,} rows", f"{chosen.errors} of them wrong", "95% certainty"):
            assert part in str(chosen)
        assert f"{case['target']:.1%}" in str(chosen) and f"from {chosen.value:.4f} on" in str(chosen)
    few = choose_threshold([0.9] * 20, [1] * 20, 0.9)
    assert few.more_labels > 0 and f"about {few.more_labels:,} more labels" in str(few)
    hopeless = choose_threshold(np.linspace(0, 1, 1200), np.zeros(1200), 0.9)
    assert "nothing can be guaranteed with these 1,200 labels" in str(hopeless)
    assert "not reachable with this model: raise its accuracy" in str(hopeless)
    for nothing in (few, hopeless):
        assert Threshold(**json.loads(json.dumps(nothing.record()))) == nothing
        assert "\n" not in str(nothing) and "None" not in str(nothing) and "nan" not in str(nothing)


@pytest.mark.parametrize("low, delta, wrong", [(0.5, 0.001, "100% certainty"), (0.99996, 0.05, "from 1.0000 on")])
def test_the_sentence_does_not_round_up_to_a_certainty(low, delta, wrong):
    chosen = choose_threshold(np.linspace(low, 0.99999, 200), [1] * 200, 0.9, delta)
    assert chosen.value == low and wrong not in str(chosen)


# Confidence bands and shares


def test_every_recorded_interval_is_the_one_shown_for_a_share_and_bounds_a_threshold():
    for case in VECTORS["intervals"]:
        k, n = case["k"], case["n"]
        rows = [0.95] * n, [1] * k + [0] * (n - k)
        for shown in (automation(*rows, [0.95])[0], buckets(*rows)[0]):
            assert (shown["right"], shown["accuracy"]) == (k, k / n)
            assert [shown["accuracy_low"], shown["accuracy_high"]] == pytest.approx(case["clopper_pearson_95"], 1e-9)
        for delta, name in ((0.05, "one_sided_lower_95"), (0.1, "one_sided_lower_90")):
            if case[name] > 0.01:
                assert choose_threshold(*rows, case[name] - 0.0001, delta).value == 0.95
                assert choose_threshold(*rows, case[name] + 0.0001, delta).value is None


def test_the_confidence_bands_begin_exactly_at_90_70_and_50_percent():
    bands = ["auto-approve", "human review", "manual check", "manual processing"]
    below = [float(np.nextafter(edge, 0)) for edge in (0.9, 0.7, 0.5)]
    edges = [1, 0.9, below[0], 0.7, below[1], 0.5, below[2], 0]
    assert [bucket_of(c) for c in edges] == [band for band in bands for _ in range(2)]
    table = buckets(edges, [1, 0, 1, 0, 1, 1, 0, 0])
    assert [(row["bucket"], row["from"]) for row in table] == list(zip(bands, (0.9, 0.7, 0.5, 0.0), strict=True))
    assert [(row["n"], row["right"]) for row in table] == [(2, 1), (2, 1), (2, 2), (2, 0)]


@given(st.lists(st.tuples(st.sampled_from([0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1]), st.booleans()), min_size=1))
@settings(max_examples=60, deadline=None)
def test_bands_and_shares_count_the_rows_and_an_empty_one_has_no_accuracy(rows):
    confidence, correct = zip(*rows, strict=True)
    for row in buckets(confidence, correct):
        inside = [y for c, y in rows if bucket_of(c) == row["bucket"]]
        assert (row["n"], row["right"]) == (len(inside), sum(inside))
    for row in priced_automation(confidence, correct, [0, 0.5, 0.65, 0.9, 1], 1000, 5, 50):
        inside = [y for c, y in rows if c >= row["threshold"]]
        assert (row["automated"], row["right"]) == (len(inside), sum(inside))
        assert row["share"] == pytest.approx(len(inside) / len(rows))
        assert row["accuracy"] == (sum(inside) / len(inside) if inside else None)
        assert (row["accuracy_low"] is None) == (row["accuracy_high"] is None) == (not inside)
        cost = sum(50 * (not y) if c >= row["threshold"] else 5 for c, y in rows)
        assert row["dollars"] == pytest.approx(1000 * cost / len(rows))


# Money


def test_the_cost_threshold_is_the_recorded_one_clipped_to_0_and_1():
    for case in VECTORS["chow"]:
        ours = cost_optimal_threshold(case["cost_review"], case["cost_error"], case["cost_auto"])
        assert ours == pytest.approx(min(max(case["threshold"], 0), 1), abs=1e-12)
    assert min(case["threshold"] for case in VECTORS["chow"]) == -0.25  # ours is 0 there: the one difference
    assert [cost_optimal_threshold(*c) for c in ((5, 50), (5, 0), (0, 50), (9, 5), (5, 50, 9), (5, 0, 10))] == [
        *(0.9, 0, 1, 0, 1, 1)
    ]


@given(st.integers(0, 40), st.integers(1, 100), st.integers(0, 40), st.integers(1, 99))
def test_a_row_is_automated_exactly_where_its_expected_cost_is_no_more_than_a_review(review, error, automatic, percent):
    worth = (100 - percent) * error + 100 * automatic <= 100 * review
    threshold = cost_optimal_threshold(review, error, automatic)
    near = abs(percent / 100 - threshold) < 1e-9  # equal but for a rounding: either is as good
    assert near or (percent / 100 >= threshold) == worth


@pytest.mark.parametrize("bad", [-1, NAN, math.inf])
def test_a_cost_that_is_negative_or_not_finite_is_a_value_error_that_names_it(bad):
    for place, name in enumerate(("review", "error", "automation")):
        arguments = [5, 50, 1]
        arguments[place] = bad
        with pytest.raises(ValueError, match=rf"^the {name} cost is [^\n]+finite[^\n]+$"):
            cost_optimal_threshold(*arguments)


@given(st.lists(st.tuples(st.sampled_from([0, 0.3, 0.5, 0.9, 1]), st.booleans()), min_size=1))
@settings(max_examples=50, deadline=None)
def test_costs_are_those_of_a_loop_over_the_rows(rows):
    confidence, correct = map(np.array, zip(*rows, strict=True))
    thresholds = [0, 0.3, 0.7, 1, 1.01]
    loop = [sum((0 if y else 50) if c >= t else 5 for c, y in rows) / len(rows) for t in thresholds]
    assert costs(confidence, correct, np.array(thresholds), 5, 50) == pytest.approx(loop)
    band = cost_band(confidence.tolist(), correct.astype(int).tolist(), thresholds, 5, 50, n_resamples=20)
    assert band.shape == (5, 3) and band[:, 0] == pytest.approx(loop)
    assert (band[:, 1] <= band[:, 2]).all() and (band >= 0).all() and (band <= 50).all()
    assert band[4].tolist() == [5, 5, 5]  # nothing automated: no luck involved


def test_the_cost_band_is_the_quantiles_of_every_draw_of_whole_groups():
    groups = ["b", "a", "c", "a", "d", "d", "d"]  # of 1, 2, 1 and 3 rows, not next to each other
    confidence, correct = np.array([0.9, 0.8, 0.7, 0.6, 0.95, 0.5, 0.85]), np.array([1, 0, 0, 1, 1, 1, 0])
    each = [50 * (1 - y) if c >= 0.75 else 5 for c, y in zip(confidence, correct, strict=True)]
    members = {g: [cost for cost, name in zip(each, groups, strict=True) if name == g] for g in "abcd"}
    draws = [[x for g in drawn for x in members[g]] for drawn in product("abcd", repeat=4)]  # 256, equally likely
    means = sorted(sum(draw) / len(draw) for draw in draws)
    band = cost_band(confidence, correct, [0.75], 5, 50, groups, n_resamples=4000, seed=1)[0]
    assert band[0] == pytest.approx(np.mean(each))
    for found, share in zip(band[1:], (0.025, 0.975), strict=True):  # 4,000 draws are within 1 % of the 256
        assert np.quantile(means, share - 0.01) - 1e-9 <= found <= np.quantile(means, share + 0.01) + 1e-9
    shuffled = np.random.default_rng(0).permutation(7)
    again = (confidence[shuffled], correct[shuffled], [0.75], 5, 50, np.array(groups)[shuffled])
    assert cost_band(*again, n_resamples=4000, seed=1)[0] == pytest.approx(band)


def test_dollars_a_day_are_the_article_s_and_what_it_leaves_out():
    article = [(532, 88, 2340, 6740), (779, 181, 1105, 10_155), (936, 249, 320, 12_770)]
    printed = (0.835, 0.768, 0.734)
    for (rows, errors, reviews, total), accuracy in zip(article, printed, strict=True):
        exact = dollars_a_day(rows / 1000, 1 - errors / rows, 1000, 5, 50)
        assert exact == pytest.approx({"review_dollars": reviews, "error_dollars": total - reviews, "dollars": total})
        assert dollars_a_day(rows / 1000, accuracy, 1000, 5, 50)["dollars"] == pytest.approx(total, abs=25)
    reviews = [dollars_a_day(share, 0.95, 10_000, 5, 50)["review_dollars"] for share in (0.25, 0.4)]
    assert reviews[0] - reviews[1] == pytest.approx(7500)
    nothing = {"review_dollars": 5000, "error_dollars": 0, "dollars": 5000}
    assert dollars_a_day(0, None, 1000, 5, 50) == nothing == dollars_a_day(0, 0.5, 1000, 5, 50)


IMPOSSIBLE = [
    (dollars_a_day, 1.5, 0.9, 1000, 5, 50),
    (dollars_a_day, NAN, 0.9, 1000, 5, 50),
    (dollars_a_day, 0.5, 1.5, 1000, 5, 50),
    (dollars_a_day, 0.5, None, 1000, 5, 50),  # fine only where nothing is automated
    (dollars_a_day, 0.5, 0.9, -1, 5, 50),
    (dollars_a_day, 0.5, 0.9, 1000, 5, NAN),
    (cost_band, [0.9, 0.8, 0.7], [1, 0, 1], [0.75], 5, 50, [1, 2]),
    (cost_band, [0.9, 0.8, 0.7], [1, 0, 1], [0.75], NAN, 50),
    (cost_band, [0.9, 0.8, 0.7], [1, 0, 1], [NAN], 5, 50),
    (automation, [0.9], [1], [NAN]),
    (bucket_of, NAN),
    (bucket_of, 1.2),
    (rows_needed, 0.9, 0.05, -1),
    (rows_needed, 0.9, 0.05, 1.5),
]


@pytest.mark.parametrize("call", IMPOSSIBLE, ids=lambda call: f"{call[0].__name__}{call[1:]}")
def test_impossible_arguments_are_a_value_error(call):
    function, *arguments = call
    with pytest.raises(ValueError):
        function(*arguments)
