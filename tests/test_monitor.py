"""scripts/monitor.py: does it see what changed, stay quiet when nothing did, and alarm no more often than it says?

Recorded values, sums by hand, binomial tails in fractions, scipy's binomtest and simulations whose truth is known say
what is right. The script runs in this process; only its exit code and its pipe need processes of their own.
"""

import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, binomtest, chi2

import command_line
import monitor
import predictions
from calibration import FittedCalibrator, PlattScalingCalibrator, Recipe, save_calibrator
from monitor import decile_counts, estimates, population_stability_index, print_audit, rows_for_power
from tables import text_key

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


def calibrator(path, threshold=0.9, slope=1.0, seen="another text"):
    """A calibrator file with P = sigma(slope logit(c)): with slope 1 the calibrated confidence is the confidence."""
    platt, keys = PlattScalingCalibrator(), frozenset([text_key(seen)])
    platt.slope_, platt.intercept_ = slope, 0.0
    fitted = (Recipe("platt", False), platt, ("a", "b"), "0123abcd", "m", "t", 100, 100, keys, {}, {"value": threshold})
    save_calibrator(path, FittedCalibrator(*fitted))
    return path


@pytest.fixture
def call(capsys):
    """Run the script in this process: -> exit code, stdout, stderr."""

    def run_main(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command_line.run(lambda: monitor.main([*map(str, arguments)]))
        return stopped.value.code, *capsys.readouterr()

    return run_main


@pytest.fixture
def report_on(call, tmp_path):
    """The same on rows, with a calibrator that automates from .9 on."""

    def run_on(reference, current, *flags, **settings):
        files = write(tmp_path / "r.jsonl", reference), write(tmp_path / "c.jsonl", current)
        return call(*files, "--calibrator", calibrator(tmp_path / "k.json", **settings), *flags)

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
    index, p = population_stability_index(*recorded_counts)
    tail = chi2.sf(30 * recorded["psi_deciles_add_half"], 9)  # 1/60 + 1/60 = 1/30
    assert (index, p) == pytest.approx((recorded["psi_deciles_add_half"], tail), rel=1e-9)
    edges = [-1, *np.sort(reference)[5:54:6], 2]  # rows 6, 12, ... 54 begin the upper bins
    counts = [[sum(low <= c < high for c in side) for low, high in pairwise(edges)] for side in (reference, current)]
    assert [c.tolist() for c in decile_counts(reference, current)] == counts
    p, q = [(np.array(c) + 0.5) / 65 for c in counts]
    ours = sum((q - p) * np.log(q / p))
    expected = recorded["doc_estimate"], recorded["atc_estimate_current"]
    assert estimates(reference, right, current) == pytest.approx(expected, abs=1e-12)
    assert estimates(reference, right, reference) == pytest.approx((0.65, recorded["atc_estimate_source"]), abs=1e-12)

    files = write(tmp_path / "r", rows_of(reference, right)), write(tmp_path / "c", rows_of(current, right))
    code, out, err = call(*files)
    assert (code, err) == (0, "") and "no row has a decision" in out and LABELS not in out
    assert cells(out, DECILES) == [
        f"{reference.mean():.3f}",
        f"{current.mean():.3f}",
        f"{ours:.4f}",
        f"{chi2.sf(30 * ours, 9):.3g}",
    ]
    assert cells(out, KS) == ["0.4167", f"{recorded['ks']['pvalue']:.3g}"]
    assert (cells(out, CONFIDENCE)[0], cells(out, THRESHOLDED)[0]) == ("0.762", "1.000")
    assert "reference accuracy 0.650, n = 60" in out and cells(out, "mean label mass") == ["0.900", "0.900"]


@pytest.mark.parametrize(("m", "point"), [(100, 0.186), (200, 0.102), (500, 0.051), (1000, 0.034), (10_000, 0.019)])
def test_the_5_percent_points_are_the_published_ones(m, point):
    # What is beyond the published point must have a p below 5 %, for windows of m rows and 1,000 reference rows.
    draw, reference = np.random.default_rng(m), np.full(10, 100)
    for strength in np.linspace(0, 0.9, 200):
        weights = 1 + strength * np.linspace(-1, 1, 10)
        index, p = population_stability_index(reference, draw.multinomial(m, weights / weights.sum()))
        assert abs(index - point) < 0.01 * point + 0.0005 or (p < 0.05) == (index > point), (index, p)


REPEATS = 1000


def alarms(counts):
    return sum(population_stability_index(*next(counts))[1] < 0.05 for _ in range(REPEATS))


@pytest.mark.parametrize("pile", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1000, 200), (300, 600)])
def test_without_drift_one_p_value_in_twenty_is_below_5_percent(n, m, pile):
    draw = np.random.default_rng(n + m)

    def world(size, a=5):
        return np.minimum(draw.uniform(0.6, 1.4, size), 1.0) if pile else draw.beta(a, 1, size)

    small = alarms(decile_counts(world(n), world(m)) for _ in range(REPEATS))
    side = "greater" if pile else "two-sided"  # a pile at 1 is one wide bin: the test is cautious there
    assert binomtest(small, REPEATS, 0.05, alternative=side).pvalue > 1e-3, small
    small = alarms([draw.multinomial(size, [0.5, 0.3, 0.2]) for size in (n, m)] for _ in range(REPEATS))
    assert binomtest(small, REPEATS, 0.05).pvalue > 1e-3, small
    assert pile or population_stability_index(*decile_counts(world(n), world(m, a=3)))[1] < 1e-4


def test_equal_confidences_stay_together_and_constant_ones_are_no_drift(report_on):
    # Deciles .7 and 1: what lies below a decile is not in the bin that begins there.
    counts = decile_counts(np.repeat([0.5, 0.7, 1.0], [10, 30, 60]), np.array([0.69, 0.7, 0.99, 1.0, 1.0]))
    assert [c.tolist()[-1] for c in counts] == [60, 2]
    _, out, _ = report_on([row(1.0)] * 300, [row(1.0)] * 200)
    assert float(cells(out, DECILES)[-1]) > 0.8 and cells(out, KS) == ["0.0000", "1"]
    for other in (0.9, 0.7):
        assert float(cells(report_on([row(0.8)] * 300, [row(other)] * 5)[1], KS)[-1]) < 1e-6


def test_predicted_labels_that_come_more_often_are_shown(report_on):
    reference = [row(0.8), row(0.8, False)] * 120 + [row(0.8, False, predicted="a")] * 60
    _, out, _ = report_on(reference, [row(0.8)] * 100 + [row(0.8, predicted="a")] * 100)
    p, q = (60.5 / 301, 240.5 / 301), (0.5, 0.5)
    index = sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))
    tail = math.erfc(math.sqrt(index / (1 / 300 + 1 / 200) / 2))  # of chi-square with one degree of freedom
    assert cells(out, LABELS) == ["20.0% a, 80.0% b", "50.0% a, 50.0% b", f"{index:.4f}", f"{tail:.3g}"]
    assert tail < 1e-9 and float(cells(report_on(reference, reference[::-1] * 2)[1], LABELS)[-1]) > 0.9
    _, out, _ = report_on([row(0.8)] * 300, [row(0.8, predicted="a")] * 200)
    assert cells(out, LABELS)[:2] == ["0.0% a, 100.0% b", "100.0% a, 0.0% b"] and float(cells(out, LABELS)[-1]) < 1e-50


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
    confidence = draw.uniform(low, 1, 4000)
    return rows_of(confidence, draw.uniform(size=4000) < confidence - loss)


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
        assert min(drift) > 0.01 if rows is changed else max(drift) < 1e-9


def test_the_bands_are_as_wide_as_the_sampling_error_and_follow_the_seed(report_on):
    draw = np.random.default_rng(1)
    confidence, right = draw.uniform(0.5, 1, 2500), draw.uniform(size=2500) < 0.75
    files = rows_of(confidence, right), rows_of(draw.uniform(0.5, 1, 200), [True] * 200)
    _, out, _ = report_on(*files)
    # Means of independent rows: a 95 % band is 3.92 standard errors wide. A uniform's variance is width squared / 12.
    before, after = np.std(right - confidence) / 50, np.sqrt(0.25 / 12 / 200)
    for name, error in ((CONFIDENCE, np.hypot(before, after)), (CALIBRATED, after)):
        _, low, high = map(float, re.findall(r"\d\.\d+", " ".join(cells(out, name))))
        assert high - low == pytest.approx(3.92 * error, rel=0.1)
    assert report_on(*files)[1] == out != report_on(*files, "--seed", 1)[1]


# Audit


def audit(right, n, target=0.9, level=0.05):
    """Whether n labelled automated rows of which `right` are right raise the alarm."""
    rows = [row(0.95, i < right, extras={"decision": "automate"}) for i in range(n)]
    return print_audit(rows, target, level)


def tails(n, target):
    """P(Bin(n, target) <= k) for k = 0 ... n, exactly."""
    share = Fraction(str(target))
    terms = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    return [sum(terms[: k + 1]) for k in range(n + 1)]


AUDITS = [(50, 0.9, "1/20"), (50, 0.9, "1/240"), (20, 0.8, "1/10"), (25, 0.99, "1/300"), (1, 0.96, "1/20")]
AUDITS += [(3, 0.5, "1/8")]  # here a tail is exactly the level, and the alarm is due


@pytest.mark.parametrize(("n", "target", "level"), AUDITS)
def test_the_audit_alarms_exactly_where_the_binomial_tail_is_small(n, target, level, capsys):
    level = Fraction(level)
    alarmed = [audit(k, n, target, float(level)) for k in range(n + 1)]
    assert alarmed == [tail <= level for tail in tails(n, target)]
    lines = [line for line in capsys.readouterr().out.splitlines() if "by chance" in line]
    for k, line in enumerate(lines):
        low, high = binomtest(k, n).proportion_ci(0.95, "exact")
        assert line.startswith(f"{k} of {n} right, {k / n:.3f} [{low:.3f}, {high:.3f}]")
        assert line.endswith(f"p = {binomtest(k, n, target, alternative='less').pvalue:.3g}")
    assert len(lines) == n + 1


def test_only_automated_rows_with_a_label_are_audited(report_on):
    reference = [row(0.9)] * 20
    current = [row(0.95, i % 10 > 0) for i in range(100)] + [row(0.95, None)] * 50 + [row(0.6, False)] * 40
    code, out, _ = report_on(reference, current)
    assert code == 0 and "150 of 190 rows automated, 100 of them labelled" in out and "90 of 100 right" in out
    code, out, _ = report_on(reference, current, "--threshold", 0.5)  # now the wrong ones below .9 count too
    assert code == 1 and "190 of 190 rows automated, 140 of them labelled" in out and "90 of 140 right" in out
    code, out, _ = report_on(reference, [row(0.95, None)] * 30)
    assert code == 0 and f"nothing to test; label a random sample of {power_rows(0.9, 0.8)} automated rows" in out
    code, out, _ = report_on(reference, [row(1.0, False)] * 30, threshold=None)  # no guarantee, no decision to automate
    assert code == 0 and "0 of 30 rows automated, 0 of them labelled" in out


def test_decisions_already_in_the_file_are_used_and_looks_divide_the_risk(call, tmp_path):
    extras = {"calibrated_confidence": 0.95, "decision": "automate"}
    reference = write(tmp_path / "r.jsonl", [row(0.9)] * 9)
    current = write(tmp_path / "c.jsonl", [row(0.95, i >= 9, extras=extras) for i in range(50)])
    assert 0.05 < tails(50, 0.9)[41] < 0.1
    for flags, code in (("", 0), ("--alpha 0.1", 1), ("--alpha 0.1 --looks 2", 0), ("--target-accuracy 0.95", 1)):
        done = call(reference, current, *flags.split())
        assert done[0] == code and ("ALARM" if code else "no alarm at 0.05") in done[1]
    assert cells(done[1], CALIBRATED) == ["0.950", "[0.950, 0.950]"]


@cache
def power_of(n, guaranteed, true, level):
    """P(alarm) of n rows, the alarms found by going through all counts."""
    alarmed = np.flatnonzero(binom.cdf(np.arange(n + 1), n, guaranteed) <= level)
    return binom.cdf(alarmed[-1], n, true) if len(alarmed) else 0.0


def power_rows(guaranteed, true, level=0.05):
    """The least n from which on every n has a power of 80 %."""
    return max(n for n in range(1, 400) if power_of(n, guaranteed, true, level) < 0.8) + 1


# The literature's 180 and 284 only begin a stretch of n: with 188 and 290 rows the power is below 80 % once more.
POWER = [(0.95, 0.90, 180, 188), (0.95, 0.85, 59, None), (0.90, 0.85, 284, 290), (0.90, 0.80, 89, None)]


@pytest.mark.parametrize(("guaranteed", "true", "published", "too_few"), [*POWER, (0.99, 0.95, 110, None)])
def test_the_rows_for_power_are_those_of_brute_force_and_of_the_literature(guaranteed, true, published, too_few):
    found = rows_for_power(guaranteed, 0.05, fall=guaranteed - true)
    assert found == power_rows(guaranteed, true) and power_of(published, guaranteed, true, 0.05) >= 0.8
    if too_few:
        assert published < too_few < found and power_of(too_few, guaranteed, true, 0.05) < 0.8
    else:
        assert found == published


def test_more_looks_need_more_rows_and_so_says_the_report(capsys):
    found = [rows_for_power(0.9, 0.05 / looks) for looks in (1, 2, 4)]
    assert found == [power_rows(0.9, 0.8, 0.05 / looks) for looks in (1, 2, 4)] and found == sorted(set(found))
    audit(95, 100, level=0.05 / 4)
    assert f"four times in five with {found[2]} labelled rows" in capsys.readouterr().out
    audit(found[0] - 5, found[0])
    assert "four times in five" not in capsys.readouterr().out


# Small files and hostile ones


@pytest.mark.parametrize("right", [True, False])
def test_a_few_rows_give_a_report_and_a_warning(right, report_on):
    for n, m in ((1, 1), (2, 3), (1, 200), (200, 200)):
        code, out, err = report_on([row(1.0, right)] * n, [row(0.95, right)] * m)
        assert (code, err) == (int(not right and m > 1), "") and "nan" not in out
        assert ("fewer than 200 rows" in out) == (n < 200)


def test_rows_with_an_error_are_counted_and_are_no_numbers(report_on):
    plain = report_on([row(0.9)] * 5, [row(0.8), row(0.95, False)])[1]
    code, out, _ = report_on([FAILED, *[row(0.9)] * 5], [row(0.8), FAILED, row(0.95, False), FAILED])
    assert code == 0 and out[out.index("1. ") :] == plain[plain.index("1. ") :]
    assert "r.jsonl: 1 rows with an error" in out and "c.jsonl: 2 rows with an error" in out


def test_rows_that_the_calibrator_was_fitted_on_are_not_audited(report_on):
    known, others = [row(0.95, False)] * 50, [replace(row(0.95), text="unknown")] * 30
    code, out, err = report_on(others, known + others, seen="text")
    assert (code, err) == (0, "") and "80 of 80 rows automated, 30 of them labelled" in out
    assert "50 left out: the calibrator was fitted on" in out and "30 of 30 right" in out


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


def test_an_alarm_is_the_process_s_exit_code_1(run, tmp_path):
    rows = write(tmp_path / "r.jsonl", [row(0.95, False)] * 30)
    done = run("scripts/monitor.py", rows, rows, "--calibrator", calibrator(tmp_path / "k.json"))
    assert (done.returncode, done.stderr) == (1, "") and "ALARM: the guarantee is broken" in done.stdout


FILES = {
    "good": [row(0.9)] * 5,
    "empty": [],
    "unlabelled": [row(0.9), row(0.9, None)],
    "other": [row(0.9, fingerprint="ffff0000")],
    "mixed": [row(0.9), row(0.9, fingerprint="ffff0000")],
    "failed": [FAILED],
    "labels": [row(0.9, labels=("b", "c"))],
    "words": [row(0.9, extras={"calibrated_confidence": "high", "decision": "automate"})],
}
COMMANDS = {
    "missing good": "missing: No such file",
    "empty good": "empty holds no predictions",
    "good torn": "torn line 5 is cut off",
    "good failed": "failed: no row was scored",
    "good other": "fingerprints 0123abcd and ffff0000",
    "unlabelled good": "unlabelled: 1 of 2 scored rows have no label",
    "good mixed": "mixed: it mixes the fingerprints 0123abcd and, in row 'r1', ffff0000",
    "good words": "words: row 'r0': calibrated_confidence is 'high'",
    "other other --calibrator k.json": "with fingerprint 0123abcd, these predictions",
    "good labels --calibrator k.json": "labels are a, b, not b, c",
    "good good --calibrator nothing.json": "nothing.json is not a calibrator file",
    "good good --threshold 0.9": "--threshold",
    "good": "CURRENT",
    "good good --looks 0": "--looks",
    "good good --alpha nan": "--alpha",
    "good good --target-accuracy 90": "--target-accuracy",
}


@pytest.mark.parametrize(("command", "named"), COMMANDS.items())
def test_bad_input_is_one_line_and_exit_code_2(command, named, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in FILES.items():
        write(Path(name), rows)
    Path("torn").write_bytes(Path("good").read_bytes()[:-9])
    Path("nothing.json").write_text("{}")
    calibrator(Path("k.json"))
    code, out, err = call(*command.split())
    assert (code, out, err[:7], err.count("\n")) == (2, "", "error: ", 1) and named in err, err
