"""scripts/monitor.py: does it see what changed, stay quiet when nothing did, and alarm no more often than it says?

Recorded values, sums by hand, scipy's tests and simulations whose truth is known say what is right. The script runs in
this process; only its exit code needs a process of its own.
"""

import functools
import json
import math
import re
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_error
from scipy.stats import binom, binomtest, chi2, ks_2samp

import command_line
import monitor
import predictions
from calibration import FittedCalibrator, PlattScalingCalibrator, Recipe, load_calibrator, save_calibrator
from monitor import (
    Watched,
    decile_counts,
    drift_statistics,
    estimates,
    kolmogorov_smirnov,
    population_stability_index,
    shuffled_p_values,
)
from tables import groups_of, text_key

ROOT = Path(__file__).parent.parent
VECTORS = json.loads((Path(__file__).parent / "data/reference_vectors.json").read_text(encoding="utf-8"))
CONFIDENCE, DECILES, KS = "change of mean confidence", "mean confidence, PSI of its deciles", "the same, Kolmogorov"
THRESHOLDED, CALIBRATED, LABELS = "thresholded confidence", "mean calibrated confidence", "predicted labels, PSI"


def row(confidence, right=True, predicted="b", labels=("a", "b"), **changes):
    """A row of two labels that predicts one of them; `right` None leaves it without a label."""
    (other,) = set(labels) - {predicted}
    label = None if right is None else predicted if right else other
    common = {"method": "logprobs", "model": "m", "task": "t", "fingerprint": "0123abcd"} | changes
    probabilities = {name: confidence if name == predicted else 1 - confidence for name in labels}
    return predictions.Prediction("id", "text", label, predicted, confidence, probabilities, 0.9, **common)


def rows_of(confidence, right):
    return [row(float(c), bool(r)) for c, r in zip(confidence, right, strict=True)]


FAILED = replace(row(0.9), prediction=None, confidence=None, probabilities=None, label_mass=None, error="too long")


def write(path, rows):
    """The rows as a predictions file, each with an id of its own: r0, r1, ..."""
    path.write_bytes(b"".join(predictions.to_line(replace(r, id=f"r{i}")) for i, r in enumerate(rows)))
    return path


def apart(path, n):
    """A table that says of the rows r0, r1, ... that none belongs to another."""
    path.write_text("id,group\n" + "".join(f"r{i},{i}\n" for i in range(n)))
    return path


def calibrator(path, threshold=0.9, slope=1.0, seen="another text", **record):
    """A calibrator file with P = sigma(slope logit(c)): with slope 1 the calibrated confidence is the confidence."""
    platt, keys = PlattScalingCalibrator(), frozenset([text_key(seen)])
    platt.slope_, platt.intercept_ = slope, 0.0
    goal = {"value": threshold, "target_accuracy": 0.9, "delta": 0.05, "kind": "exact"}
    fitted = (Recipe("platt", False), platt, ("a", "b"), "0123abcd", "m", "t", 100, 100, keys, {}, goal | record)
    save_calibrator(path, FittedCalibrator(*fitted))
    return path


@pytest.fixture
def call(outcome):
    return functools.partial(outcome, monitor.main)


@pytest.fixture
def report_on(call, tmp_path, monkeypatch):
    """The same on rows, with a calibrator that guarantees 90 % from .9 on; each row is its own group."""
    monkeypatch.setattr(monitor, "N_SHUFFLES", 99)
    monkeypatch.setattr(monitor, "N_RESAMPLES", 50)

    def run_on(reference, current, *flags, **settings):
        files = write(tmp_path / "r.jsonl", reference), write(tmp_path / "c.jsonl", current)
        groups = apart(tmp_path / "groups.csv", max(len(reference), len(current)))
        return call(*files, "--groups", groups, "--calibrator", calibrator(tmp_path / "k.json", **settings), *flags)

    return run_on


def cells(out, name):
    """The cells of the one line of a report that begins with `name`."""
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    return re.split(r"\s{2,}", line)[1:]


# Drift


def test_the_recorded_drift_values_come_out_and_are_printed(call, tmp_path):
    recorded, source = VECTORS["drift"], VECTORS["metrics"]["deterministic_60"]
    reference, right = np.array(source["confidence"]), np.array(source["correct"], dtype=bool)
    current = np.array(recorded["current_values"])
    # The recorded deciles lie halfway between two rows. Ours are rows, so that tied confidences leave no bin empty.
    recorded_counts = [np.histogram(side, recorded["psi_edges"])[0] for side in (reference, current)]
    index = population_stability_index(*recorded_counts)
    assert index == pytest.approx(recorded["psi_deciles_add_half"], rel=1e-9)
    edges = [-1, *np.sort(reference)[5:54:6], 2]  # rows 6, 12, ... 54 begin the upper bins
    counts = [[sum(low <= c < high for c in side) for low, high in pairwise(edges)] for side in (reference, current)]
    assert [c.tolist() for c in decile_counts(reference, current)] == counts
    p, q = [(np.array(c) + 0.5) / 65 for c in counts]
    ours = sum((q - p) * np.log(q / p))
    expected = recorded["doc_estimate"], recorded["atc_estimate_current"]
    assert estimates(reference, right, current) == pytest.approx(expected, abs=1e-12)
    assert estimates(reference, right, reference) == pytest.approx((0.65, recorded["atc_estimate_source"]), abs=1e-12)

    files = write(tmp_path / "r", rows_of(reference, right)), write(tmp_path / "c", rows_of(current, right))
    code, out, err = call(*files, "--groups", apart(tmp_path / "groups.csv", 60))
    assert (code, err) == (0, "") and "no row has a decision" in out and LABELS not in out
    assert cells(out, DECILES) == [
        f"{reference.mean():.3f}",
        f"{current.mean():.3f}",
        f"{ours:.4f}",
        "0.001",  # none of 999 shuffles is as large; by the chi-square approximation the chance is 2e-4
    ]
    assert chi2.sf(30 * ours, 9) < 1e-3 and recorded["ks"]["pvalue"] < 1e-3
    assert cells(out, KS) == ["0.4167", "0.001"]
    assert (cells(out, CONFIDENCE)[0], cells(out, THRESHOLDED)[0]) == ("0.762", "1.000")
    assert "reference accuracy 0.650, n = 60" in out and cells(out, "mean label mass") == ["0.900", "0.900"]


def watched(groups):
    """Rows of a file of which only the groups count."""
    return Watched([None] * len(groups), np.asarray(groups))


def p_values_of(confidence, groups, is_reference, seed=0):
    """Of the three drift tests; all rows predict the same label but where the confidence is above .8."""
    order = np.argsort(~is_reference, kind="stable")
    confidence, groups, n = confidence[order], groups[order], int(is_reference.sum())
    predicted = (confidence > 0.8).astype(int)

    def statistics(mask):
        return drift_statistics(confidence, predicted, mask)

    return shuffled_p_values(statistics, watched(groups[:n]), watched(groups[n:]), seed)


def test_of_few_rows_the_p_value_is_the_share_of_all_divisions(monkeypatch):
    monkeypatch.setattr(monitor, "N_SHUFFLES", 4000)
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    found = np.arange(6) < 2

    def statistic(mask):
        return [abs(values[mask].mean() - values[~mask].mean())]

    divisions = [np.isin(np.arange(6), pair) for pair in combinations(range(6), 2)]
    exact = np.mean([statistic(mask)[0] >= statistic(found)[0] - 1e-9 for mask in divisions])
    (p,) = shuffled_p_values(statistic, watched([0, 1]), watched([2, 3, 4, 5]), seed=0)
    assert p == pytest.approx(exact, abs=0.03)
    # In two groups of three there are two divisions, and both are as far apart.
    (p,) = shuffled_p_values(lambda mask: [abs(values[mask].mean() - 3.5)], watched([0] * 3), watched([1] * 3), seed=0)
    assert p == 1


def test_kolmogorov_smirnov_is_scipys():
    draw = np.random.default_rng(0)
    for n, m in ((5, 9), (200, 130)):
        one, two = np.round(draw.random(n), 1), np.round(draw.random(m) ** 1.3, 1)
        assert kolmogorov_smirnov(one, two) == pytest.approx(ks_2samp(one, two).statistic, abs=1e-12)


@cache
def recorded_groups():
    """Confidences and groups of the recorded test rows, in which many rows are alike."""
    rows = predictions.read(ROOT / "data/predictions/base_test.jsonl")
    numbers = np.unique(groups_of(rows, ROOT / "data/sentiment/splits.csv"), return_inverse=True)[1]
    return np.array([row.confidence for row in rows]), numbers


def false_alarms(repeats, as_groups=True):
    """How often each drift test is below 5 % when the groups of one file are divided at random."""
    confidence, groups = recorded_groups()
    count = np.zeros(3)
    for seed in range(repeats):
        is_reference = np.random.default_rng(seed).permutation(groups.max() + 1)[groups] < (groups.max() + 1) / 2
        units = groups if as_groups else np.arange(len(groups))
        count += np.array(p_values_of(confidence, units, is_reference, seed)) < 0.05
    return count


def test_rows_that_belong_together_are_no_drift(monkeypatch):
    monkeypatch.setattr(monitor, "N_SHUFFLES", 59)
    assert (false_alarms(20) <= binom.ppf(0.999, 20, 0.05)).all()
    confidence, groups = recorded_groups()
    shifted = np.where(groups % 2 == 0, confidence, confidence**1.5)  # and what has drifted is still found
    assert max(p_values_of(shifted, groups, groups % 2 == 0)[:2]) < 0.02


@pytest.mark.study
def test_drift_tests_that_take_rows_for_independent_raise_false_alarms_and_those_of_groups_do_not(monkeypatch):
    monkeypatch.setattr(monitor, "N_SHUFFLES", 199)
    by_group, as_independent = false_alarms(200), false_alarms(200, as_groups=False)
    assert (by_group <= binom.ppf(0.999, 200, 0.05)).all(), by_group
    assert (as_independent > binom.ppf(0.999, 200, 0.05)).sum() >= 2, as_independent


def test_equal_confidences_stay_together_and_constant_ones_are_no_drift(report_on):
    # Deciles .7 and 1: what lies below a decile is not in the bin that begins there.
    counts = decile_counts(np.repeat([0.5, 0.7, 1.0], [10, 30, 60]), np.array([0.69, 0.7, 0.99, 1.0, 1.0]))
    assert [c.tolist()[-1] for c in counts] == [60, 2]
    _, out, _ = report_on([row(1.0)] * 300, [row(1.0)] * 200)
    assert float(cells(out, DECILES)[-1]) > 0.8 and cells(out, KS) == ["0.0000", "1"]
    for other in (0.9, 0.7):
        assert float(cells(report_on([row(0.8)] * 300, [row(other)] * 5)[1], KS)[-1]) == 0.01


def test_predicted_labels_that_come_more_often_are_shown(report_on):
    reference = [row(0.8), row(0.8, False)] * 120 + [row(0.8, False, predicted="a")] * 60
    _, out, _ = report_on(reference, [row(0.8)] * 100 + [row(0.8, predicted="a")] * 100)
    p, q = (60.5 / 301, 240.5 / 301), (0.5, 0.5)
    index = sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert cells(out, LABELS) == ["20.0% a, 80.0% b", "50.0% a, 50.0% b", f"{index:.4f}", "0.01"]
    assert float(cells(report_on(reference, reference[::-1] * 2)[1], LABELS)[-1]) > 0.9
    _, out, _ = report_on([row(0.8)] * 300, [row(0.8, predicted="a")] * 200)
    assert cells(out, LABELS)[:2] == ["0.0% a, 100.0% b", "100.0% a, 0.0% b"] and cells(out, LABELS)[-1] == "0.01"


# Accuracy without labels


def test_the_label_free_estimates_by_hand(report_on, call, tmp_path):
    reference, right = np.array([0.9, 0.6, 0.8, 0.7]), np.array([True, False, True, True])
    current = np.array([0.5, 0.65, 0.95])
    # Accuracy .75; mean .75 -> .70. Three of four reference rows lie above .675, and one of three current ones.
    assert estimates(reference, right, current) == pytest.approx((0.70, 1 / 3))
    assert estimates(reference, ~right, current) == pytest.approx((0.20, 1 / 3))  # one of four lies above .825
    _, out, _ = report_on(rows_of(reference, right), rows_of(current, right[1:]), slope=2.0)
    odds = (current / (1 - current)) ** 2
    assert [cells(out, name)[0] for name in (CONFIDENCE, THRESHOLDED)] == ["0.700", "0.333"]
    assert cells(out, CALIBRATED)[0] == f"{np.mean(odds / (1 + odds)):.3f}" and "fewer than 200 rows" in out
    _, out, _ = call(tmp_path / "r.jsonl", tmp_path / "c.jsonl")
    assert cells(out, CALIBRATED) == ["-", "needs --calibrator"]


def world(draw, low, loss):
    """Confidences from `low` to 1 with P(right) = confidence - loss."""
    confidence = draw.uniform(low, 1, 2000)
    return rows_of(confidence, draw.uniform(size=2000) < confidence - loss)


def test_the_estimates_follow_a_shift_of_confidence_but_only_the_audit_sees_a_changed_task(report_on):
    draw = np.random.default_rng(5)
    reference, shifted, changed = world(draw, 0.5, 0.0), world(draw, 0.8, 0.0), world(draw, 0.5, 0.15)
    # Of the shifted rows 90 % are right, which ATC overstates: all of .8 to 1 lies above its threshold of .625.
    # Of the changed ones only 60 % are, but their confidences still come as those of the reference, of which 75 % are.
    truths = [np.mean([r.prediction == r.label for r in rows]) for rows in (reference, shifted, changed)]
    assert truths == pytest.approx([0.75, 0.9, 0.6], abs=0.03)
    for rows, expected in ((shifted, (0.9, 1.0, 0.9)), (changed, (0.75, 0.75, 0.75))):
        code, out, _ = report_on(reference, rows)
        for name, truth in zip((CONFIDENCE, THRESHOLDED, CALIBRATED), expected, strict=True):
            value, low, high = map(float, re.findall(r"\d\.\d+", " ".join(cells(out, name))))
            assert value == pytest.approx(truth, abs=0.03) and low <= value <= high
        assert (code, "ALARM" in out) == ((1, True) if rows is changed else (0, False))
        drift = [float(cells(out, name)[-1]) for name in (DECILES, KS)]
        assert min(drift) > 0.01 if rows is changed else max(drift) == 0.01


def test_the_bands_are_as_wide_as_the_sampling_error_and_follow_the_seed(report_on, monkeypatch):
    monkeypatch.setattr(monitor, "N_RESAMPLES", 500)
    draw = np.random.default_rng(1)
    confidence, right = draw.uniform(0.5, 1, 2500), draw.uniform(size=2500) < 0.75
    files = rows_of(confidence, right), rows_of(draw.uniform(0.5, 1, 200), [True] * 200)
    _, out, _ = report_on(*files)
    # Means of independent rows: a 95 % band is 3.92 standard errors wide. A uniform's variance is width squared / 12.
    before, after = np.std(right - confidence) / 50, np.sqrt(0.25 / 12 / 200)
    for name, error in ((CONFIDENCE, np.hypot(before, after)), (CALIBRATED, after)):
        _, low, high = map(float, re.findall(r"\d\.\d+", " ".join(cells(out, name))))
        assert high - low == pytest.approx(3.92 * error, rel=0.1)
    assert out != report_on(*files, "--seed", 1)[1]


# Audit


def evidence_line(out):
    return cells(out, "all automated rows")


def test_only_automated_rows_with_a_label_are_audited(report_on):
    reference = [row(0.9)] * 20
    current = [row(0.95, i % 10 > 0) for i in range(100)] + [row(0.95, None)] * 50 + [row(0.6, False)] * 40
    code, out, _ = report_on(reference, current)
    low, high = binomtest(90, 100).proportion_ci(0.95, "exact")
    assert code == 0 and "150 of 190 rows automated, 100 of them labelled" in out
    assert evidence_line(out)[:3] == ["90.0%", "100", f"0.900 [{low:.3f}, {high:.3f}]"]
    code, out, _ = report_on(reference, current, "--threshold", 0.5)  # now the wrong ones below .9 count too
    assert code == 1 and "190 of 190 rows automated, 140 of them labelled" in out and evidence_line(out)[1] == "140"
    code, out, _ = report_on(reference, [row(0.95, None)] * 30)
    assert code == 0 and "nothing new to count" in out
    code, out, _ = report_on(reference, [row(1.0, False)] * 30, threshold=None)
    assert code == 0 and "nothing is guaranteed, so there is nothing to audit" in out


def test_target_and_risk_are_the_calibrators_unless_they_are_given(report_on):
    reference, current = [row(0.9)] * 20, [row(0.95, i % 5 > 0) for i in range(60)]  # .8 of them right
    for flags, record, code, target, level in (
        ((), {}, 0, "90.0%", 20),
        ((), {"target_accuracy": 0.97}, 1, "97.0%", 20),
        ((), {"target_accuracy": 0.97, "delta": 1e-6}, 0, "97.0%", 1e6),
        ((), {"target_accuracy": 0.75, "delta": 0.2}, 0, "75.0%", 5),
        ((), {"delta": None, "kind": "average"}, 0, "90.0%", 20),
        (("--target-accuracy", 0.95), {}, 1, "95.0%", 20),
        (("--alpha", 0.5), {}, 1, "90.0%", 2),
    ):
        found, out, _ = report_on(reference, current, *flags, **record)
        assert found == code and evidence_line(out)[0] == target, out
        assert ("ALARM at look 1" in out) == bool(code) and (code or f"it takes evidence of {level:.4g}" in out)
        assert ("below its target about every second time" in out) == (record.get("kind") == "average")


def test_evidence_adds_up_in_the_state_file_each_row_once_and_an_alarm_stays(report_on, tmp_path):
    reference, state = [row(0.9)] * 20, tmp_path / "audit.json"
    day = [row(0.95, i >= 5) for i in range(20)]  # 15 of 20 right, day after day
    codes = []
    for number in range(1, 6):
        rows = [replace(each, text=f"day {number}") for each in day]
        codes.append(report_on(reference, rows, "--state", state)[0])
        before = state.read_bytes()
        code, out, _ = report_on(reference, rows, "--state", state)  # the same command again
        assert code == codes[-1] and state.read_bytes() == before and "20 of them have counted before" in out
        assert evidence_line(out)[1] == str(20 * number)
    first = codes.index(1)
    assert codes == [0] * first + [1] * (5 - first) and 1 <= first <= 4
    good = [replace(row(0.95), text=f"later {i}") for i in range(200)]
    code, out, _ = report_on(reference, good, "--state", state)
    assert code == 1 and f"ALARM at look {first + 1}" in out
    code, out, err = report_on(reference, good, "--state", state, "--target-accuracy", 0.8)
    assert code == 2 and "another guarantee" in err and err.count("\n") == 1


def test_each_label_with_a_target_of_its_own_is_audited_by_itself(report_on, tmp_path, call):
    current = [row(0.95, i % 5 > 0, predicted="a") for i in range(50)] + [row(0.95, i % 5 > 0) for i in range(50)]
    report_on([row(0.9)] * 20, current)
    loaded = load_calibrator(tmp_path / "k.json")
    common = {"value": 0.9, "delta": 0.05, "kind": "exact"}
    by_label = {label: common | {"target_accuracy": target} for label, target in (("a", 0.7), ("b", 0.97))}
    save_calibrator(tmp_path / "k.json", replace(loaded, label_thresholds=by_label))
    files = tmp_path / "r.jsonl", tmp_path / "c.jsonl", "--calibrator", tmp_path / "k.json"
    code, out, _ = call(*files, "--groups", tmp_path / "groups.csv")
    assert code == 1 and cells(out, "a")[:2] == ["70.0%", "50"] and cells(out, "b")[:2] == ["97.0%", "50"]
    assert float(cells(out, "a")[3]) < 1 and float(cells(out, "b")[3]) > 40  # 2 / .05: they share the risk
    save_calibrator(
        tmp_path / "k.json", replace(loaded, label_thresholds=by_label | {"b": by_label["b"] | {"value": None}})
    )
    code, out, _ = call(*files, "--groups", tmp_path / "groups.csv")
    assert code == 0 and "50 of 100 rows automated" in out and not re.search("^b ", out, re.M)


def test_rows_chosen_to_be_labelled_are_no_sample(report_on):
    chosen = [row(0.95, False, extras={"purpose": "chosen"})] * 50
    code, out, _ = report_on([row(0.9)] * 20, chosen + [row(0.95, extras={"purpose": "random"})] * 30)
    assert code == 0 and "50 left out: they were chosen to be labelled" in out and evidence_line(out)[1] == "30"


def test_rows_that_belong_together_are_evidence_once(report_on, call, tmp_path):
    reference, current = [row(0.9)] * 20, [row(0.95, False)] * 12
    assert report_on(reference, current)[0] == 1
    (tmp_path / "groups.csv").write_text("id,group\n" + "".join(f"r{i},one\n" for i in range(20)))
    files = tmp_path / "r.jsonl", tmp_path / "c.jsonl", "--calibrator", tmp_path / "k.json"
    code, out, _ = call(*files, "--groups", tmp_path / "groups.csv")
    assert code == 0 and "12 rows in 1 groups" in out


def test_decisions_already_in_the_file_are_used(call, tmp_path):
    extras = {"calibrated_confidence": 0.95, "decision": "automate"}
    files = (
        write(tmp_path / "r.jsonl", [row(0.9)] * 9),
        write(tmp_path / "c.jsonl", [row(0.95, i >= 15, extras=extras) for i in range(50)]),
    )
    groups = "--groups", apart(tmp_path / "groups.csv", 50)
    assert call(*files, *groups)[0] == 0 and "nothing is guaranteed" in call(*files, *groups)[1]
    code, out, _ = call(*files, *groups, "--target-accuracy", 0.9)
    assert code == 1 and cells(out, CALIBRATED) == ["0.950", "[0.950, 0.950]"]


# Small files and hostile ones


@pytest.mark.parametrize("right", [True, False])
def test_a_few_rows_give_a_report_and_a_warning(right, report_on):
    for n, m in ((1, 1), (1, 200)):
        code, out, err = report_on([row(1.0, right)] * n, [row(0.95, right)] * m)
        assert (code, err) == (int(not right and m > 3), "") and "nan" not in out and "fewer than 200 rows" in out


def test_rows_with_an_error_are_counted_and_are_no_numbers(report_on):
    plain = report_on([row(0.9)] * 5, [row(0.8), row(0.95, False)])[1]
    code, out, _ = report_on([FAILED, *[row(0.9)] * 5], [row(0.8), FAILED, row(0.95, False), FAILED])
    assert code == 0 and out[out.index("1. ") :] == plain[plain.index("1. ") :]
    assert "r.jsonl: 1 rows with an error" in out and "c.jsonl: 2 rows with an error" in out


def test_rows_that_the_calibrator_was_fitted_on_are_not_audited(report_on):
    known, others = [row(0.95, False)] * 50, [replace(row(0.95), text="unknown")] * 30
    code, out, err = report_on(others, known + others, seen="text")
    assert (code, err) == (0, "") and "80 of 80 rows automated, 80 of them labelled" in out
    assert "50 left out: the calibrator was fitted on" in out and evidence_line(out)[1] == "30"
    code, out, err = report_on(known + others, others, seen="text")
    assert (code, out) == (2, "") and "r.jsonl: the calibrator was fitted on 50 of its 80 texts" in err


HOSTILE = "\x1b[2J\nerror: \u202e"


def test_a_hostile_name_cannot_command_the_terminal(report_on, call, tmp_path):
    rows = [replace(row(0.9, model=HOSTILE, task=HOSTILE, method=HOSTILE), text=HOSTILE)] * 3
    code, out, err = report_on(rows, rows)
    assert (code, err) == (0, "") and out.isascii() and "\x1b" not in out
    code, out, err = report_on(rows, [replace(r, fingerprint=HOSTILE) for r in rows])
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.isascii() and "\x1b" not in err
    names = ("a", HOSTILE)
    labelled = write(tmp_path / "l.jsonl", [row(0.9, labels=names, predicted=name) for name in names])
    code, out, err = call(labelled, labelled)
    assert (code, err) == (0, "") and out.isascii() and command_line.printable(HOSTILE) in out


# The command line


FILES = {
    "good": [row(0.9)] * 5,
    "unlabelled": [row(0.9), row(0.9, None)],
    "other": [row(0.9, fingerprint="ffff0000")],
    "words": [row(0.9, extras={"calibrated_confidence": "high", "decision": "automate"})],
}
COMMANDS = {
    "missing good": "missing: No such file",
    "good other": "fingerprints 0123abcd and ffff0000",
    "unlabelled good": "unlabelled: 1 of 2 scored rows have no label",
    "good words": "words: row 'r0': calibrated_confidence is 'high'",
    "other other --calibrator k.json": "with fingerprint 0123abcd, these predictions",
    "good good --calibrator nothing.json": "nothing.json is not a calibrator file",
    "good good --threshold 0.9": "--threshold",
    "good good --state folder/s.json": "folder does not exist",
    "good good --calibrator k.json --state nothing.json": "nothing.json: damaged, or no state file",
    "good good --groups nothing.json": "nothing.json",
    "good good --alpha nan": "--alpha",
}


@pytest.mark.parametrize(("command", "named"), COMMANDS.items())
def test_bad_input_is_one_line_and_exit_code_2(command, named, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in FILES.items():
        write(Path(name), rows)
    Path("nothing.json").write_text("{}")
    calibrator(Path("k.json"))
    assert_one_error(call(*command.split()), named)


@pytest.mark.parametrize(("m", "point"), [(200, 0.102), (1000, 0.034)])
def test_for_independent_rows_the_5_percent_points_are_the_published_ones(m, point):
    # Of 1,000 reference rows and m others, the deciles' PSI that one shuffle in twenty exceeds.
    draw = np.random.default_rng(m)
    values, mask, found = draw.random(1000 + m), np.arange(1000 + m) < 1000, []
    for _ in range(600):
        shuffled = draw.permutation(mask)
        found.append(population_stability_index(*decile_counts(values[shuffled], values[~shuffled])))
    assert np.quantile(found, 0.95) == pytest.approx(point, rel=0.15)
