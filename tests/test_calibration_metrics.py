"""calibration_metrics.py: bins, errors, noise, intervals, scores, the diagram and the command line.

What netcal, torchmetrics, scikit-learn, MAPIE, relplot, uncertainty-calibration and model-diagnostics returned is
recorded in data/reference_vectors.json. They put a confidence on the edge of a bin into different bins; our functions
give their numbers wherever no row stands on an edge that they treat otherwise.
"""

import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import relplot
from conftest import assert_one_error
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import beta, chisquare, kstest
from sklearn import metrics as sklearn_metrics
from sklearn.isotonic import IsotonicRegression

import calibration_metrics as cm
import predictions

VECTORS = json.loads((Path(__file__).parent / "data" / "reference_vectors.json").read_text(encoding="utf-8"))
ARRAYS = VECTORS["metrics"]
EDGES, LINSPACE = [i / 20 for i in range(21)], np.linspace(0, 1, 21).tolist()
CONFIDENCE = st.floats(0, 1) | st.sampled_from([*EDGES, *LINSPACE, 5e-324, 1 - 2**-53])
ROWS = st.lists(st.tuples(CONFIDENCE, st.booleans()), min_size=1, max_size=40)


def arrays(rows):
    confidence, correct = zip(*rows, strict=True)
    return np.array(confidence, dtype=float), np.array(correct, dtype=bool)


def vector(name):
    return arrays(zip(ARRAYS[name]["confidence"], ARRAYS[name]["correct"], strict=True))


def bins_by_hand(confidence, correct, bin_of):
    """[(rows, mean confidence, accuracy)] of the bins that hold rows, in order; a row of bin None is dropped."""
    bins = {}
    for c, y in zip(confidence, correct, strict=True):
        bins.setdefault(bin_of(c), []).append((c, y))
    filled = [bins[b] for b in sorted(b for b in bins if b is not None)]
    return [(len(b), math.fsum(c for c, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in filled]


def error_by_hand(bins, n, power=1):
    return math.fsum(m * abs(a - c) ** power for m, c, a in bins) / n


def debiased_by_hand(bins, n):
    terms = (m * ((a - c) ** 2 - (a * (1 - a) / (m - 1) if m > 1 else 0)) for m, c, a in bins)
    return math.fsum(terms) / n


def our_rule(c):
    return max(i for i in range(20) if i / 20 <= c)


# Other programs' numbers


def equal_mass_error(confidence, correct):
    return cm.equal_mass_bins(confidence, correct, 5).mean_gap


def root_mean_square(confidence, correct):
    bins = cm.bins_of(confidence, correct)
    return math.sqrt(np.nansum(bins.count * bins.gap**2) / len(confidence))


def curve(bins):
    full = bins.count > 0
    return [*bins.confidence[full], *bins.accuracy[full]]


EDGE_ARRAYS = {"edges_k_over_20", "edges_linspace"}
HALF = {*EDGE_ARRAYS, "deterministic_60"}  # it holds 0.5, which right-closed bins have in the bin below
UNEVEN = {*EDGE_ARRAYS, "single_class_all_correct", "single_class_all_wrong", "overconfident_12"}  # do not divide by 5
EXTREME = {*HALF, "zeros_and_ones", "all_zeros_conf"}  # 0 is in no bin of the article's
RECORDED = {  # recorded value -> our function, and the arrays of which that program puts rows into other bins
    "netcal.ECE(20)": (cm.expected_calibration_error, {"edges_k_over_20"}),
    "netcal.MCE(20)": (cm.maximum_calibration_error, {"edges_k_over_20"}),
    "torchmetrics.BinaryCalibrationError(20,l1,float64)": (cm.expected_calibration_error, EDGE_ARRAYS),
    "torchmetrics.BinaryCalibrationError(20,max,float64)": (cm.maximum_calibration_error, EDGE_ARRAYS),
    "torchmetrics.BinaryCalibrationError(20,l2,float64)": (root_mean_square, EDGE_ARRAYS),
    "mapie.expected_calibration_error(num_bins=21,uniform)": (cm.expected_calibration_error, HALF),
    "mapie.expected_calibration_error(num_bins=20,uniform)": (
        lambda *arrays: cm.expected_calibration_error(*arrays, n_bins=19),
        EDGE_ARRAYS,
    ),
    "relplot.binnedECE(20)": (cm.expected_calibration_error, EDGE_ARRAYS),
    "relplot.smECE": (cm.smooth_calibration_error, set()),
    "uncertainty_calibration.get_ece(20,equal_prob)": (cm.expected_calibration_error, HALF),
    "uncertainty_calibration.get_ece_em(5,equal_mass)": (equal_mass_error, UNEVEN),
    "sklearn.calibration_curve(n_bins=20,uniform)": (lambda *arrays: curve(cm.bins_of(*arrays)), HALF),
    "sklearn.calibration_curve(n_bins=5,quantile)": (lambda *arrays: curve(cm.equal_mass_bins(*arrays, 5)), UNEVEN),
    "sklearn.brier_score_loss": (cm.brier_score, set()),
    "sklearn.log_loss": (cm.log_loss, set()),
    "sklearn.roc_auc_score": (cm.auroc, set()),
    "ece": (cm.expected_calibration_error, EXTREME),
    "mce": (cm.maximum_calibration_error, EXTREME),
}


@pytest.mark.parametrize("key", RECORDED)
def test_the_numbers_of_other_programs_are_ours_wherever_their_bins_are(key):
    function, other_bins = RECORDED[key]
    for name in ARRAYS.keys() - other_bins:
        recorded = ARRAYS[name]["public_article_code" if key in ("ece", "mce") else "ref"][key]
        if isinstance(recorded, dict):
            recorded = recorded["prob_pred"] + recorded["prob_true"]
        recorded = recorded if isinstance(recorded, list) else float(recorded)  # "nan" is a string there
        tolerance = 1e-9 if key == "relplot.smECE" else 1e-12
        assert function(*vector(name)) == pytest.approx(recorded, rel=tolerance, abs=tolerance, nan_ok=True), name


@pytest.mark.parametrize("name", ARRAYS)
def test_corp_and_the_debiased_error_are_the_recorded_ones(name):
    confidence, correct = vector(name)
    ref, own, corp = ARRAYS[name]["ref"], ARRAYS[name]["own"], cm.corp_decomposition(confidence, correct)
    names = ("miscalibration", "discrimination", "uncertainty")
    assert [corp[f"corp_{n}"] for n in names] == pytest.approx(list(own["corp_brier"].values()), abs=1e-12)
    theirs = ref["model_diagnostics.decompose(SquaredError)"]
    if name != "one_row":  # where model-diagnostics fails
        assert [corp[f"corp_{n}"] for n in names] == pytest.approx([theirs[n] for n in names], abs=1e-12)
    debiased = cm.debiased_calibration_error(confidence, correct)
    by_hand = debiased_by_hand(bins_by_hand(confidence, correct, our_rule), len(confidence))
    assert debiased == pytest.approx(by_hand, abs=1e-12)
    if name not in HALF:
        assert debiased == pytest.approx(own["l2_20"]["debiased_squared_skip_singletons"], abs=1e-12)


# Bins


@pytest.mark.parametrize("n_bins", [1, 2, 3, 7, 10, 20, 100])
def test_a_confidence_on_an_edge_is_in_the_bin_above_it(n_bins):
    for k in range(n_bins + 1):
        count = cm.bins_of([float(Fraction(k, n_bins))], [1], n_bins).count
        assert count.tolist() == [int(b == min(k, n_bins - 1)) for b in range(n_bins)]
        if k:
            assert cm.bins_of([math.nextafter(k / n_bins, 0)], [1], n_bins).count[k - 1] == 1


@settings(deadline=None)
@given(rows=ROWS, n_bins=st.integers(1, 30), random=st.randoms())
@example(rows=[(0.3, True)] * 3, n_bins=20, random=None)
def test_bins_are_those_of_a_loop_over_rows_in_any_order(rows, n_bins, random):
    confidence, correct = arrays(rows)
    copies = confidence.copy(), correct.copy()
    by_hand = bins_by_hand(*copies, lambda c: max(i for i in range(n_bins) if i / n_bins <= c))
    bins = cm.bins_of(confidence, correct, n_bins)
    full = bins.count > 0
    assert bins.count.sum() == len(rows) and len(bins.count) == n_bins
    found = np.array([bins.count[full], bins.confidence[full], bins.accuracy[full]]).T
    np.testing.assert_allclose(found, by_hand, rtol=0, atol=1e-12)
    assert np.isnan(bins.gap[~full]).all()
    ece = cm.expected_calibration_error(confidence, correct, n_bins)
    assert ece == pytest.approx(error_by_hand(by_hand, len(rows)), abs=1e-12)
    np.testing.assert_array_equal(copies, (confidence, correct))
    if random:
        random.shuffle(rows)
    assert cm.expected_calibration_error(*zip(*rows, strict=True), n_bins) == pytest.approx(ece, abs=1e-12)


@settings(deadline=None)
@given(rows=ROWS, n_bins=st.integers(1, 30))
def test_equal_mass_bins_keep_ties_together_and_differ_by_one_row_without_ties(rows, n_bins):
    confidence, correct = arrays(rows)
    bins = cm.equal_mass_bins(confidence, correct, n_bins)
    assert bins.count.sum() == len(rows) and (bins.count > 0).all() and len(bins.count) <= n_bins
    filled = [(confidence >= low) & (confidence < high) for low, high in pairwise(bins.edges)]
    assert [f.sum() for f in filled] == bins.count.tolist()  # so a value, and all its ties, is in one bin
    np.testing.assert_allclose(bins.accuracy, [correct[f].mean() for f in filled])
    if len(set(confidence)) == len(rows):
        assert len(bins.count) == min(n_bins, len(rows)) and np.ptp(bins.count) <= 1


def test_equal_mass_bins_are_at_most_20_of_about_50_rows():
    for n, expected in [(1, 1), (99, 1), (100, 2), (500, 10), (1000, 20), (5000, 20)]:
        assert len(cm.equal_mass_bins(np.linspace(0, 1, n), np.ones(n)).count) == expected
    assert cm.equal_mass_bins([1.0] * 990 + [0.5] * 10, [1] * 1000).count.tolist() == [10, 990]


def test_mce_looks_only_at_bins_with_enough_rows():
    confidence, correct = [0.9] * 40 + [0.1], [1] * 41
    assert cm.maximum_calibration_error(confidence, correct) == pytest.approx(0.9)
    assert cm.maximum_calibration_error(confidence, correct, min_count=2) == pytest.approx(0.1)
    assert cm.maximum_calibration_error(confidence, correct, min_count=40) == pytest.approx(0.1)
    assert math.isnan(cm.maximum_calibration_error(confidence, correct, min_count=41))


BAD = {
    "1-D, they are 1-D and 2-D": ([0.5], [[1]]),
    "2 confidences, but 1 values of correct": ([0.5, 0.5], [1]),
    "confidence is empty": ([], []),
    "confidence is NaN in 1 of 2": ([0.5, math.nan], [1, 0]),
    "NaN in 2 of 2": ([None, None], [1, 0]),
    "from -0.5 to 1": ([1, -0.5], [1, 0]),
    r"to 1\.0000000000000002, outside": ([0.5, 1 + 2**-52], [1, 0]),
    "confidence must hold a number for each row": (["high", 0.5], [1, 0]),
    "confidence must hold a number": ([[0.5], [0.5, 0.5]], [1, 0]),
    "correct must be true or false": ([1, 1], [1, 2]),
    "correct must be true or false .*every row": ([1, 1], [1, math.nan]),
    "or false": ([1, 1], [True, None]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arrays_are_one_line_that_says_which(message):
    functions = [cm.expected_calibration_error, cm.maximum_calibration_error, cm.debiased_calibration_error]
    functions += [cm.smooth_calibration_error, cm.equal_mass_bins, cm.calibration_metrics, cm.plot_reliability_diagram]
    for function in functions:
        with pytest.raises(ValueError, match=message) as error:
            function(*BAD[message])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", [cm.bins_of, cm.calibration_metrics, cm.equal_mass_bins, cm.consistency_resampling])
def test_fewer_than_one_bin_is_an_error(call):
    arguments = [[0.5]] if call is cm.consistency_resampling else [[0.5], [1]]
    with pytest.raises(ValueError, match="n_bins is 0"):
        call(*arguments, n_bins=0)


# Noise


def own_null(confidence, n_draws, seed):
    """ECE of n_draws models whose confidences are true, a matrix product with the rows' bins."""
    member = np.array([our_rule(c) for c in confidence]) == np.arange(20)[:, None]
    right = np.random.default_rng(seed).random((n_draws, len(confidence))) < confidence
    return np.abs((right - confidence) @ member.T).sum(axis=1) / len(confidence)


def test_p_values_are_uniform_for_calibrated_confidences_and_tiny_for_others():
    draw, found = np.random.default_rng(3), {0: [], 0.2: []}
    for number in range(200):
        confidence = draw.uniform(0.5, 1, 200)
        for shift, p_values in found.items():
            ece = cm.expected_calibration_error(confidence, draw.random(200) < confidence - shift)
            null = cm.consistency_resampling(confidence, n_draws=199, seed=number)
            p_values.append((1 + np.count_nonzero(null >= ece)) / 200)
    assert kstest(found[0], "uniform").pvalue > 0.01
    assert np.mean(np.array(found[0.2]) <= 0.01) > 0.98


# Intervals


@pytest.mark.parametrize("case", VECTORS["intervals"], ids=lambda case: f"{case['k']} of {case['n']}")
def test_exact_intervals_are_the_recorded_ones(case):
    assert cm.exact_interval(case["k"], case["n"]) == pytest.approx(case["clopper_pearson_95"], abs=1e-9)


@pytest.mark.parametrize("groups", [["b", "a", "b", "c", "c", "c"], (7, 3, 7, 900, 900, 900)])
def test_the_bootstrap_draws_whole_groups_as_many_as_there_are(groups):
    drawn = [np.bincount(rows, minlength=6) for rows in cm.resamples(groups, 3000, seed=2)]
    for times in drawn:
        assert times[0] == times[2] and times[3] == times[4] == times[5]
        assert times[0] + times[1] + times[3] == 3
    found, counts = np.unique([times[[1, 0, 3]] for times in drawn], axis=0, return_counts=True)
    multinomial = [6 / math.prod(map(math.factorial, times)) / 27 * 3000 for times in found.tolist()]
    assert len(found) == 10 and chisquare(counts, multinomial).pvalue > 0.001
    again, other = (list(cm.resamples(groups, 9, seed=seed)) for seed in (2, 3))
    assert [np.bincount(rows, minlength=6).tolist() for rows in again] == [times.tolist() for times in drawn[:9]]
    assert any(a.tolist() != b.tolist() for a, b in zip(again, other, strict=True))


def test_bootstrap_intervals_are_percentiles_and_nan_where_never_defined():
    drawn = iter(range(1, 102))

    def statistics(rows):
        number = next(drawn)
        return [number, math.nan, math.nan if number % 2 else 5.0]

    found = cm.bootstrap_interval(statistics, [1, 1, 2], n_resamples=101)
    assert found[0].tolist() == pytest.approx([3.5, 98.5]) and np.isnan(found[1]).all() and found[2].tolist() == [5, 5]


def test_intervals_of_many_groups_come_from_samples_of_some_and_are_as_wide(monkeypatch):
    draw = np.random.default_rng(5)
    groups, confidence = np.repeat(np.arange(1000), 2), np.repeat(draw.uniform(0.5, 1, 1000), 2)
    correct = np.repeat(draw.random(1000) < confidence[::2] - 0.1, 2)

    def statistics(rows):
        return [correct[rows].mean(), cm.auroc(confidence[rows], correct[rows]), math.nan]

    whole = cm.bootstrap_interval(statistics, groups, n_resamples=2000)
    monkeypatch.setattr(cm, "MOST_GROUPS", 250)
    sampled = cm.bootstrap_interval(statistics, groups, n_resamples=2000, seed=1)
    assert {len(rows) for rows in cm.resamples(groups, 5, most=250)} == {500}
    assert np.diff(sampled[:2]) == pytest.approx(np.diff(whole[:2]), rel=0.1)
    assert sampled[:2] == pytest.approx(whole[:2], abs=0.006) and np.isnan(sampled[2]).all()


def test_the_noise_of_many_rows_is_that_of_some_of_them_scaled(monkeypatch):
    confidence = np.random.default_rng(6).uniform(0.5, 1, 40_000)
    whole = cm.consistency_resampling(confidence)
    monkeypatch.setattr(cm, "MOST_ROWS", 4000)
    sampled = cm.consistency_resampling(confidence)
    assert sampled.mean() == pytest.approx(whole.mean(), rel=0.03)
    assert np.quantile(sampled, 0.95) == pytest.approx(np.quantile(whole, 0.95), rel=0.05)


# Scores


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=6))
def test_aurc_is_the_mean_over_all_orders_of_ties(rows):
    orders = [order for order in permutations(rows) if all(a[0] >= b[0] for a, b in pairwise(order))]
    risks = [sum(not y for _, y in order[:k]) / k for order in orders for k in range(1, len(rows) + 1)]
    assert cm.area_under_risk_coverage(*arrays(rows)) == pytest.approx(math.fsum(risks) / len(risks), abs=1e-12)


def test_risk_at_each_coverage_counts_equal_confidences_as_their_mean():
    # By confidence: two rows at .9 of which one is wrong, one right at .8, one wrong at .5; given in another order.
    confidence, correct = np.array([0.5, 0.9, 0.8, 0.9]), np.array([False, True, True, False])
    for kind in (bool, int, list):
        y = correct.tolist() if kind is list else correct.astype(kind)
        assert cm.risk_coverage(confidence, y) == pytest.approx([0.5, 0.5, 1 / 3, 0.5], abs=1e-15)
        assert cm.auroc(confidence, y) == pytest.approx(2.5 / 4)


@pytest.mark.parametrize(
    "groups", [[0, 1, 0, 2], [0, 2, 1, 2], [1, 0, 2], [0, 0, -1], [5], [], ["b", "a", "b"], [0.0, 2.0]]
)
def test_groups_are_numbered_in_order_of_appearance_as_a_list_and_as_an_array(groups):
    names = list(dict.fromkeys(groups))
    for each in (groups, np.array(groups)):
        assert cm.group_numbers(each).tolist() == [names.index(group) for group in groups]
        assert cm.group_count(each) == len(names)


def test_one_row_of_each_group_is_its_first_whatever_names_the_groups_have():
    assert cm.one_of_each(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 3]
    assert cm.one_of_each([1, "1", 1, "1", (1, 2), (1, 2)]).tolist() == [0, 1, 4]


def test_the_refinement_split_adds_up_to_the_log_loss_of_the_raw_confidence():
    split = cm.refinement_split(np.array([0.8, 0.8]), np.array([0.5, 0.25]), np.array([True, False]))
    assert split["refinement"] == pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2)
    assert sum(split.values()) == pytest.approx(-(math.log(0.8) + math.log(0.2)) / 2)


# The report row

WITH_INTERVAL = ["accuracy", "mean_confidence", "gap", "brier", "log_loss", "log_loss_clipped", "auroc", "aurc"]
KEYS = {"n", "groups", "protocol", "ece", "mce", "mce_count", "mce_30", "mce_30_count", *WITH_INTERVAL}
KEYS |= {f"ece_{name}" for name in ["noise_floor", "noise_95", "p_value", "equal_mass", "debiased", "smooth"]}
KEYS |= {f"corp_{name}" for name in ["miscalibration", "discrimination", "uncertainty"]}
KEYS |= {f"{name}_{end}" for name in WITH_INTERVAL for end in ("low", "high")}


def overconfident(n, seed=0):
    draw = np.random.default_rng(seed)
    confidence = draw.uniform(0.5, 1, n)
    return confidence, draw.random(n) < confidence - 0.15


def test_the_report_row_holds_every_number_under_its_name():
    confidence, correct = overconfident(300)
    found, bins = cm.calibration_metrics(confidence, correct), bins_by_hand(confidence, correct, our_rule)
    assert found.keys() == KEYS and json.loads(json.dumps(found, allow_nan=False)) == found
    widest, counted = (max((abs(a - c), m) for m, c, a in bins if m >= least) for least in (1, 30))
    null, thirds = own_null(confidence, 1000, seed=9), np.array_split(np.argsort(confidence), 6)
    expected = {
        "n": 300,
        "groups": 300,
        "accuracy": correct.mean(),
        "mean_confidence": confidence.mean(),
        "gap": confidence.mean() - correct.mean(),
        "brier": sklearn_metrics.brier_score_loss(correct, confidence),
        "log_loss": sklearn_metrics.log_loss(correct, confidence),
        "log_loss_clipped": sklearn_metrics.log_loss(correct, np.clip(confidence, 0.001, 0.999)),
        "auroc": sklearn_metrics.roc_auc_score(correct, confidence),
        "aurc": (np.cumsum(~correct[np.argsort(-confidence)]) / np.arange(1, 301)).mean(),
        "ece": error_by_hand(bins, 300),
        "ece_equal_mass": sum(abs(correct[third].mean() - confidence[third].mean()) for third in thirds) / 6,
        "ece_debiased": debiased_by_hand(bins, 300) ** 0.5,
        "ece_smooth": relplot.smECE(confidence, correct.astype(float)),
        **{"mce": widest[0], "mce_count": widest[1], "mce_30": counted[0], "mce_30_count": counted[1]},
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert found["ece_noise_floor"] == pytest.approx(null.mean(), rel=0.05)
    assert found["ece_noise_95"] == pytest.approx(np.quantile(null, 0.95), rel=0.08)
    assert found["ece_p_value"] == pytest.approx((1 + (null >= found["ece"]).sum()) / 1001, abs=0.006)
    exact = beta.ppf([0.025, 0.975], [correct.sum(), correct.sum() + 1], [301 - correct.sum(), 300 - correct.sum()])
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx(exact, abs=1e-9)
    for name, values in [("gap", confidence - correct), ("brier", (confidence - correct) ** 2)]:
        half = 1.96 * values.std() / math.sqrt(300)
        ends = pytest.approx((values.mean() - half, values.mean() + half), abs=half / 5)
        assert (found[f"{name}_low"], found[f"{name}_high"]) == ends


def test_the_report_row_passes_its_protocol_on_and_repeats_itself():
    data = overconfident(50)
    in_one_bin = cm.calibration_metrics(*data, n_bins=1)
    assert in_one_bin["ece"] == in_one_bin["mce"] == pytest.approx(abs(in_one_bin["gap"]))
    one, two, other = (cm.calibration_metrics(*data, protocol="out-of-fold", seed=seed) for seed in (4, 4, 5))
    assert one == two and one["protocol"] == "out-of-fold"
    assert {"ece_noise_floor", "brier_low", "aurc_high"} <= {name for name in one if one[name] != other[name]}


def test_copies_of_rows_in_one_group_make_no_interval_narrower():
    confidence, correct = overconfident(40)
    once = cm.calibration_metrics(confidence, correct)
    tenfold = cm.calibration_metrics(np.repeat(confidence, 10), np.repeat(correct, 10), groups=np.arange(400) // 10)
    assert (tenfold["n"], tenfold["groups"]) == (400, 40)
    for name in WITH_INTERVAL[1:-1]:  # of 400 rows the AURC has more steps
        ends = [tuple(m[f"{name}_{end}"] for end in ("low", "high")) for m in (once, tenfold)]
        assert ends[0] == pytest.approx(ends[1], abs=1e-9), name
    assert tenfold["accuracy_high"] - tenfold["accuracy_low"] > 1.8 * 1.96 * correct.std() / math.sqrt(40)
    with pytest.raises(ValueError, match="40 confidences, but 39 groups"):
        cm.calibration_metrics(confidence, correct, groups=np.arange(39))


@pytest.mark.parametrize("confidence", [[0.83], [1.0] * 5, [0.0, 0.5, 0.95, 1.0]])
@pytest.mark.parametrize("right", [True, False])
def test_what_is_undefined_on_one_row_or_one_class_is_none(confidence, right):
    found = cm.calibration_metrics(confidence, [right] * len(confidence))
    undefined = {"auroc", "auroc_low", "auroc_high", "mce_30", "mce_30_count"}
    assert found.keys() == KEYS and {name for name in found if found[name] is None} == undefined
    json.dumps(found, allow_nan=False)
    assert found["accuracy"] == right and (found["accuracy_low"], found["accuracy_high"])[right] == right
    assert found["corp_uncertainty"] == found["corp_discrimination"] == 0
    if confidence == [1.0] * 5:  # certain, so that no draw has an error
        assert (found["ece_noise_95"], found["ece_p_value"]) == (0, 1 if right else 1 / 1001)


COMMON = {"method": "logprobs", "model": "tiny", "task": "sentiment", "fingerprint": "3f9c2a71"}
WORDS = ["alder", "birch", "cedar", "dogwood", "elm", "fir", "hazel", "ivy", "juniper", "larch", "maple", "oak"]


def rows_of(n, seed=0, **extras):
    """Scored rows without near-duplicates; the last one failed."""
    rows = []
    for i, (c, y) in enumerate(zip(*overconfident(n, seed), strict=True)):
        label = ("negative", "positive")[i % 3 > 0]
        other = "positive" if label == "negative" else "negative"
        text = f"{WORDS[i % 12]} {i} {WORDS[i // 12]} {i * i}"
        rows.append(predictions.scored(f"r{i}", text, label if y else other, {label: c, other: 1 - c}, 0.9, **COMMON))
    rows = [replace(row, extras={name: value(i) for name, value in extras.items()}) for i, row in enumerate(rows)]
    return [*rows, predictions.failed("last", "", "positive", "the text is empty", **COMMON)]


# Figures


def test_a_reliability_diagram_has_a_dot_and_an_interval_for_each_bin_with_rows():
    from matplotlib.figure import Figure

    confidence, correct = [0.1, 0.52, 0.54, 0.95, 0.96, 0.99, 1.0], [0, 0, 1, 1, 1, 0, 1]
    axis, middles = Figure().subplots(), [0.1, 0.53, 0.975]
    assert cm.plot_reliability_diagram(confidence, correct, ax=axis) is axis
    spokes, dots = axis.collections
    np.testing.assert_allclose(dots.get_offsets(), np.transpose([middles, [0, 0.5, 0.75]]))
    assert len(set(dots.get_sizes())) == 3 and np.argmax(dots.get_sizes()) == 2
    ends = [(0, 0.975), *(beta.ppf([0.025, 0.975], [k, k + 1], [n - k + 1, n - k]) for k, n in [(1, 2), (3, 4)])]
    np.testing.assert_allclose([segment[:, 1] for segment in spokes.get_segments()], ends, atol=1e-9)
    np.testing.assert_allclose([segment[:, 0] for segment in spokes.get_segments()], np.transpose([middles] * 2))
    assert [text.get_text() for text in axis.texts] == ["1", "2", "4"]
    assert any(np.array_equal(line.get_xydata(), [[0, 0], [1, 1]]) for line in axis.lines)
    alone = cm.plot_reliability_diagram(confidence, correct, n_bins=1)
    np.testing.assert_allclose(alone.collections[1].get_offsets(), [[5.06 / 7, 4 / 7]])
    assert alone.figure is not axis.figure


# Command line


def write(path, rows):
    path.write_bytes(b"".join(map(predictions.to_line, rows)))
    return path


def lines_of(text):
    """A printed table as title -> cells."""
    split = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {title: cells for title, *cells in split}


def cell(metrics, line):
    """What a line of the table shows of a report row."""
    number = metrics[line.name]
    shown = f"{number:,}" if isinstance(number, int) else f"{number:.{line.decimals}f}"
    if line.name in WITH_INTERVAL:
        low, high = (f"{metrics[f'{line.name}_{end}']:.{line.decimals}f}" for end in ("low", "high"))
        shown += f" [{low}, {high}]"
    if line.beside:
        beside = metrics[line.beside]
        shown += f" ({beside})" if isinstance(beside, int) else f" ({beside:.{line.decimals}f})"
    return shown


def test_the_command_line_prints_ten_rows_and_with_verbose_every_number(capsys, tmp_path):
    one, two = rows_of(60), rows_of(90, seed=1)
    two[1] = replace(two[1], text=two[0].text)
    files, figure = [str(write(tmp_path / f"{n}.jsonl", rows)) for n, rows in enumerate((one, two))], tmp_path / "y.png"
    flags = [*files, "--n-bins", "5", "--seed", "3"]
    cm.main([*flags, "--figure", str(figure)])
    head, _, table = capsys.readouterr().out.partition("\n\n")
    assert head.splitlines()[0] == f"{files[0]}: 60 of 61 rows scored, nothing fitted"
    assert figure.read_bytes().startswith(b"\x89PNG") and table.endswith(f"{figure}\n")
    found = []
    for rows, groups in ((one, range(60)), (two, [0, 0, *range(2, 90)])):
        confidence, correct = predictions.confidence_and_correct(rows)
        found.append(cm.calibration_metrics(confidence, correct, 5, list(groups), seed=3))
        isotonic = IsotonicRegression().fit(confidence, correct).predict(confidence)
        found[-1]["refinement"] = sklearn_metrics.log_loss(correct, isotonic)
        found[-1]["calibration_error"] = found[-1]["log_loss"] - found[-1]["refinement"]
    short = lines_of(table)
    assert len(short) == 12 and short["rows (groups)"] == ["60 (60)", "90 (89)"]
    cm.main([*flags, "--verbose"])
    head, _, table = capsys.readouterr().out.partition("\n\n")
    every = lines_of(table)
    for line in cm.LINES:
        title = line.title.strip()
        assert every[title] == short[title] == [cell(m, line) for m in found]
    for line in cm.MORE_LINES[:-1]:
        assert every[line.title.strip()] == [cell(m, line) for m in found]
    assert every["MCE of bins with 30 rows or more (rows)"] == ["-", cell(found[1], cm.MORE_LINES[-1])]
    mine = [row for row in one if row.prediction == "negative"]
    right, mean = sum(row.label == "negative" for row in mine), np.mean([row.confidence for row in mine])
    low, high = cm.exact_interval(right, len(mine))
    numbers = f"mean confidence {mean:.3f}, accuracy {right / len(mine):.3f} [{low:.3f}, {high:.3f}]"
    assert f"  predicted negative: {len(mine)} rows, {numbers}" in head


def test_calibrated_confidences_of_other_rows_are_held_out_and_groups_come_from_a_table(capsys, tmp_path):
    path = write(tmp_path / "a.jsonl", rows_of(8, calibrated_confidence=lambda i: 0.6 + i % 2 / 5))
    (tmp_path / "g.csv").write_text("group,id\n" + "".join(f"g{i % 3},r{i}\n" for i in range(8)))
    cm.main([str(path), str(path), "--score", "calibrated_confidence", "--groups", str(tmp_path / "g.csv")])
    out = capsys.readouterr().out
    for text in ["8 of 9 rows scored, held-out", r"rows \(groups\) +8 \(3\)", r"mean confidence +0\.700 \["]:
        assert re.search(text, out), text
    assert out.count("rows scored") == 1  # a file named twice is one column


CALIBRATED = "--score calibrated_confidence"


def changed(path, number, **fields):
    """A predictions file of eight rows with raw fields of one line replaced, whether they make sense or not."""
    lines = [json.loads(line) for line in map(predictions.to_line, rows_of(8, calibrated_confidence=lambda i: 0.5))]
    lines[number] |= fields
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("fields", "flags", "message"),
    [
        ({"label": None}, "", "a.jsonl: 1 of 8 scored rows have no label"),
        ({"fitted_on": True}, CALIBRATED, "would be in-sample"),
        ({}, "--n-bins 0", "--n-bins 0: at least one"),
        ({}, "--figure plot", "--figure plot: a file name that ends in .png"),
        ({"id": "\x1b[2J\n\u202e", "text": "\x1b[31m\x00"}, "--groups g.csv", r"\x1b[2J"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(outcome, tmp_path, monkeypatch, fields, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.csv").write_text("id,group\n" + "".join(f"r{i},1\n" for i in range(8)))
    assert_one_error(outcome(cm.main, changed(Path("a.jsonl"), 2, **fields), *flags.split()), message)


def test_a_hostile_label_does_not_reach_the_terminal(capsys, tmp_path):
    hostile = "\x1b[31mred\n"
    sure = {"confidence": 0.75, "probabilities": {hostile: 0.75, "other": 0.25}}
    cm.main([str(changed(tmp_path / "a.jsonl", 2, prediction=hostile, label=hostile, **sure)), "--verbose"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"predicted \x1b[31mred\n: 1 rows" in out


@pytest.mark.parametrize(("a", "b", "n"), [(1, 1, 2000), (0.5, 0.5, 4000)])
def test_the_expected_ece_is_that_of_calibrated_models(a, b, n):
    confidence = np.random.default_rng(5).beta(a, b, n)
    truth = own_null(confidence, 500, seed=6)
    ours = cm.consistency_resampling(confidence, n_draws=500, seed=7)
    assert ours.mean() == pytest.approx(truth.mean(), rel=0.03)
    assert np.quantile(ours, 0.95) == pytest.approx(np.quantile(truth, 0.95), rel=0.06)
