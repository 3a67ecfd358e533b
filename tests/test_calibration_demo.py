"""calibration_demo.py: an honest report from predictions files, written whole or not at all.

Predictions with a planted class bias and overconfidence are made here and written as plain JSON. What the report says
of them is counted again by loops, by scikit-learn and binomial tails; its calibrator is fitted again by scikit-learn.
"""

import csv
import hashlib
import json
import math
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax
from scipy.stats import binom, binomtest
from sklearn.calibration import _SigmoidCalibration
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

import calibration_demo
import calibration_metrics
import command_line
import label_counts
import plotting
import predictions
from calibration import Recipe, load_calibrator
from text_report import report_text

FIGURES = {"raw_confidence_histogram", "reliability_by_method", "business_reliability", "business_progression"}
FIGURES |= {"accuracy_threshold", "sample_size", "cost_curve", "risk_coverage"}
FILES = {f"{name}.png" for name in FIGURES} | {"calibrator.json", "report.json", "decisions.csv"}
GATES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BANDS = [("auto-approve", 0.9, 2), ("human review", 0.7, 0.9), ("manual check", 0.5, 0.7)]
BANDS += [("manual processing", 0, 0.5)]
CHOSEN, HOSTILE = "platt, of P(label)", "m$\\frac{$ 100% \x1b[31mred\x1b]0;title\x07\r\nerror: forged"


def made(n, seed, name, labels=("negative", "positive"), over=2.5, bias=1.2, spread=1.2, **fields):
    """Rows whose true P(label) is softmax(z), while the model says softmax(over * z + bias to the last label)."""
    draw = np.random.default_rng(seed)
    z, letters = draw.normal(0, spread, (n, len(labels))), list("abcdefghijklmnopqrstuvwxyz")
    said, texts = softmax(over * z + bias * np.eye(len(labels))[-1], axis=1).tolist(), draw.choice(letters, (n, 6, 7))
    rows = []
    for i in range(n):
        probabilities = dict(zip(labels, said[i], strict=True))
        prediction = max(probabilities, key=probabilities.get)
        row = {"id": f"{name}{i}", "text": " ".join(map("".join, texts[i]))}
        row |= {"label": str(draw.choice(labels, p=softmax(z[i]))), "prediction": prediction}
        row |= {"confidence": probabilities[prediction], "probabilities": probabilities, "label_mass": 0.9}
        rows.append(row | {"method": "logprobs", "model": "m", "task": "t", "fingerprint": "abcd1234"} | fields)
    return rows


def changed(rows, **fields):
    """The rows with fields replaced; a function is given the row and its number."""
    return [row | {k: f(row, i) if callable(f) else f for k, f in fields.items()} for i, row in enumerate(rows)]


def marked(rows, wrong):
    """The rows with labels such that wrong(i) says which are wrong."""
    return changed(rows, label=lambda r, i: next(x for x in r["probabilities"] if (x != r["prediction"]) == wrong(i)))


def failed(n, name, **fields):
    """Rows that could not be scored."""
    nulls = dict.fromkeys(("prediction", "confidence", "probabilities", "label_mass"))
    return [row | nulls | {"error": "too long"} for row in made(n, 10, name, **fields)]


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def demo(*argv):
    """Run the script's main as the command line does."""
    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            command_line.run(lambda: calibration_demo.main([*map(str, argv)]))
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def opened(folder, run=None):
    report, record = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("report", "calibrator"))
    with open(folder / "decisions.csv", encoding="utf-8", newline="") as file:
        decisions = list(csv.DictReader(file))
    return SimpleNamespace(folder=folder, run=run, report=report, record=record, decisions=decisions)


def arrays(path):
    """(probabilities, number of the true label, confidence, correct) of a file's scored rows, read as plain JSON."""
    rows = [row for row in map(json.loads, path.read_text("utf-8").splitlines()) if "error" not in row]
    truth = np.array([list(row["probabilities"]).index(row["label"]) for row in rows])
    p = np.array([[*row["probabilities"].values()] for row in rows])
    return p, truth, p.max(axis=1), p.argmax(axis=1) == truth


def cells(text, first):
    """The cells of the printed line that begins with that cell."""
    line = next(line for line in text.splitlines() if re.match(rf"\s*{re.escape(first)}(  |$)", line))
    return re.split(r"\s{2,}", line.strip())


@pytest.fixture(scope="module", autouse=True)
def small():
    """Fewer resamples and coarser pictures: the numbers tested here do not depend on them."""
    real = calibration_metrics.resamples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_counts, "REPEATS", 3)
        patch.setattr(plotting, "DPI", 30)
        patch.setattr(calibration_metrics, "resamples", lambda groups, n=0, seed=0: real(groups, 20, seed))
        yield


@pytest.fixture
def no_figures(monkeypatch):
    """Nothing drawn and few calibrators shown beside the chosen one, to save time."""
    monkeypatch.setattr(calibration_demo, "draw_figures", lambda *ignored: None)
    monkeypatch.setattr(calibration_demo, "METHOD_NAMES", ("temperature", "isotonic"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """260 rows, 40 copies in other case and spaces, one without a score; 300 test rows, some with ids like formulas."""
    folder = tmp_path_factory.mktemp("held_out")
    rows = made(260, 1, "c")
    copies = changed(rows[:40], id=lambda r, i: f"copy{i}", text=lambda r, i: "  " + r["text"].upper())
    cal = save(folder / "cal.jsonl", rows + copies + failed(1, "x"))
    ids = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"]
    test = save(folder / "test.jsonl", changed(made(300, 2, "t"), id=lambda r, i: ids[i] if i < 5 else r["id"]))
    argv = ("--calibrate-on", cal, "--test-on", test, "--method", "platt", "--output-dir", folder / "out")
    found = opened(folder / "out", demo(*argv))
    found.cal, found.test, found.argv = cal, test, argv
    found.groups = np.array([*range(260), *range(40)])
    found.oof = cross_fitted(found, refitted, *arrays(cal)[:2])
    return found


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    """80 rows of three labels, every third in two copies, two without a score, of a model with a hostile name."""
    folder = tmp_path_factory.mktemp("one_file")
    labels = ("no", "maybe", "yes\x1b[2J")
    rows = made(60, 3, "r", labels, over=2, bias=0.8, spread=4, model=HOSTILE, task="\x1b[1mt")
    copies = changed(rows[:20], id=lambda r, i: f"copy{i}")
    path = save(folder / "one.jsonl", [*rows, *failed(2, "failed", model=HOSTILE), *copies])
    argv = (path, "--method", "temperature", "--target-accuracy", "0.7", "--output-dir", folder / "new" / "out")
    real, captions = plotting.figure, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plotting, "figure", lambda p, c, *rest, **flags: captions.append(c) or real(p, c, *rest, **flags))
        found = opened(folder / "new" / "out", demo(*argv))
    found.captions = captions
    found.cal, found.argv, found.groups = path, argv, np.array([*range(60), *range(20)])
    found.oof = cross_fitted(found, refitted, *arrays(path)[:2])
    return found


# Recomputing


def clipped(p):
    return np.clip(p, 1e-6, 1 - 1e-6)


def logit(p):
    return np.log(clipped(p) / (1 - clipped(p)))


def by_hand(record, p):
    """The calibrated confidences that a calibrator file's numbers mean, written out."""
    assert record["class_aware"]
    values = record["parameters"]["all"]
    if record["method"] == "temperature":
        return softmax(np.log(clipped(p)) / values["temperature_"], axis=1).max(axis=1)
    second = expit(values["slope_"] * logit(p[:, 1]) + values["intercept_"])
    return np.where(p[:, 1] > p[:, 0], second, 1 - second)


def refitted(p, truth, asked):
    """Platt scaling of P(second label) by scikit-learn; of more labels the temperature by scipy."""
    if p.shape[1] == 2:
        second = sigmoid(p[:, 1], truth, asked[:, 1])
        return np.where(asked[:, 1] > asked[:, 0], second, 1 - second)
    scores = np.log(clipped(p))

    def loss(t):
        return -np.mean(log_softmax(scores / t, axis=1)[range(len(truth)), truth])

    t = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}).x
    return softmax(np.log(clipped(asked)) / t, axis=1).max(axis=1)


def sigmoid(p, outcome, asked):
    fitted = _SigmoidCalibration().fit(logit(p), outcome)
    return expit(-(fitted.a_ * logit(asked) + fitted.b_))


def cross_fitted(found, fit, given, outcome):
    """Out-of-fold confidences [5 seeds, n], each group's from the other folds."""
    answers = np.empty((5, len(outcome)))
    for seed in range(5):
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for train, test in folds.split(given, outcome, found.groups):
            assert not set(found.groups[train]) & set(found.groups[test])
            answers[seed, test] = fit(given[train], outcome[train], given[test])
    return answers


def slow_ece(confidence, correct):
    error = 0.0
    for i in range(20):
        inside = [c >= i / 20 and (c < (i + 1) / 20 or i == 19) for c in confidence]
        if any(inside):
            error += abs(correct[inside].mean() - confidence[inside].mean()) * sum(inside) / len(inside)
    return error


def slow_guarantee(confidence, correct, target, delta=0.05):
    """(value, accepted, errors): every 2 % of rank from the strictest down until the exact test fails."""
    n, best = len(confidence), (None, 0, 0)
    for percent in range(2, 101, 2):
        value = sorted(confidence, reverse=True)[math.ceil(n * percent / 100) - 1]
        taken = confidence >= value
        k, errors = int(taken.sum()), int((~correct[taken]).sum())
        if k < n / 10 or target**k > delta:
            continue
        if binom.cdf(errors, k, 1 - target) > delta:
            break
        best = (value, k, errors)
    return best


def check_guarantees(found, test_confidence, test_correct):
    """Each guarantee recounted: chosen on one row of each group, measured on all test rows."""
    *_, confidence, correct = arrays(found.cal)
    alone = np.sort(np.unique(found.groups, return_index=True)[1])
    assert any(guarantee["threshold"]["value"] is not None for guarantee in found.report["guarantees"])
    for guarantee in found.report["guarantees"]:
        for key, scores in (("threshold", found.oof.mean(axis=0)), ("raw", confidence)):
            ours, target = guarantee[key], guarantee[key]["target_accuracy"]
            value, accepted, errors = slow_guarantee(scores[alone], correct[alone], target)
            assert (ours["n"], ours["accepted"], ours["errors"]) == (len(alone), accepted, errors), (key, target)
            assert ours["value"] == (None if value is None else pytest.approx(value, abs=1e-5))
        value, measured = guarantee["threshold"]["value"], guarantee["measured"]
        assert (value is None) == (measured is None)
        if measured:
            taken = test_confidence >= value
            assert (measured["automated"], measured["right"]) == (taken.sum(), test_correct[taken].sum())


def test_the_files_are_these_and_no_others(held_out, one_file):
    for found in (held_out, one_file):
        assert found.run.code == 0
        assert {path.name for path in found.folder.iterdir()} == FILES
        for name in FIGURES:
            assert (found.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        said = " ".join(found.run.out.split())
        assert said.endswith(f"Written to {found.folder}: {', '.join(sorted(FILES))}")


def test_the_calibrator_file_is_scikit_learn_s_fit_of_the_calibration_rows_alone(held_out):
    p, truth, *_ = arrays(held_out.cal)
    record, fitted = held_out.record, _SigmoidCalibration().fit(logit(p[:, 1]), truth)
    ours = record["parameters"]["all"]
    assert (ours["slope_"], ours["intercept_"]) == pytest.approx((-fitted.a_, -fitted.b_), rel=1e-3)
    assert (record["n"], record["groups"], record["labels"]) == (300, 260, ["negative", "positive"])
    texts = [json.loads(line)["text"] for line in held_out.cal.read_text("utf-8").splitlines()[:300]]
    keys = {hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()[:12] for text in texts}
    assert record["fitted_on"] == sorted(keys) and len(keys) == 260
    *_, correct = arrays(held_out.cal)
    card, oof = record["report_card"], held_out.oof[0]
    assert card["protocol"] == "out-of-fold" and card["log_loss"] == pytest.approx(log_loss(correct, oof), abs=1e-5)
    assert card["ece"] == pytest.approx(slow_ece(oof, correct), abs=1e-5)


def test_candidates_are_scored_by_their_grouped_out_of_fold_log_loss_over_five_seeds(held_out):
    *_, confidence, correct = arrays(held_out.cal)
    candidates, plain = held_out.report["candidates"], cross_fitted(held_out, sigmoid, confidence, correct)
    for name, out_of_fold in ((CHOSEN, held_out.oof), ("platt, of the confidence", plain)):
        losses = [log_loss(correct, oof) for oof in out_of_fold]
        assert candidates[name]["log_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
        assert candidates[name]["sd_over_seeds"] == pytest.approx(np.std(losses), abs=1e-5)
    assert held_out.report["chosen"] == CHOSEN == min(candidates, key=lambda name: candidates[name]["log_loss"])


def test_every_number_of_the_report_is_counted_again_on_the_test_rows(held_out):
    p, _, raw, correct = arrays(held_out.test)
    report, calibrated, n = held_out.report, by_hand(held_out.record, p), len(correct)
    assert (report["protocol"], report["calibration_rows"], report["calibration_groups"]) == ("held-out", 300, 260)
    assert report["threshold_measured_protocol"] == "held-out" and report["unscored"] == 1
    for name, key, c in (("raw", "raw", raw), (CHOSEN, "calibrated", calibrated)):
        m = report["metrics"][name]
        assert m["protocol"] == ("nothing fitted" if name == "raw" else "held-out") and m["n"] == n
        truths = {"log_loss": log_loss(correct, c), "brier": brier_score_loss(correct, c), "accuracy": correct.mean()}
        truths |= {"auroc": roc_auc_score(correct, c), "ece": slow_ece(c, correct), "mean_confidence": c.mean()}
        assert {metric: m[metric] for metric in truths} == pytest.approx(truths, abs=1e-9)
        interval = binomtest(int(correct.sum()), n).proportion_ci(0.95, "exact")
        assert (m["accuracy_low"], m["accuracy_high"]) == pytest.approx((interval.low, interval.high))
        for threshold, row in zip(GATES, report["gates"][key], strict=True):
            taken, right = sum(c >= threshold), sum((c >= threshold) & correct)
            assert (row["threshold"], row["automated"], row["right"]) == (threshold, taken, right)
            assert row["review_dollars"] == pytest.approx((n - taken) / n * 1000 * 5)
            assert row["error_dollars"] == pytest.approx((taken - right) / n * 1000 * 25)
            assert row["dollars"] == pytest.approx(row["review_dollars"] + row["error_dollars"])
        for (zone, low, high), row in zip(BANDS, report["buckets"][key], strict=True):
            inside = (c >= low) & (c < high)
            assert (row["bucket"], row["n"], row["right"]) == (zone, inside.sum(), (inside & correct).sum())
        cost = sum(25 * (not right) if x >= 0.8 else 5 for x, right in zip(c, correct, strict=True)) / n
        assert report["cost_per_row"][key] == pytest.approx(cost)
    assert report["cost_optimal_threshold"] == pytest.approx(1 - 5 / 25)
    assert report["cost_per_row"]["automate everything"] == pytest.approx(25 * (~correct).mean())
    assert report["refinement"]["refinement"] == pytest.approx(log_loss(correct, calibrated))


def test_guarantees_are_recounted_from_cross_fitted_scores_of_one_row_of_each_group(held_out):
    p, *_, correct = arrays(held_out.test)
    targets = [guarantee["threshold"]["target_accuracy"] for guarantee in held_out.report["guarantees"]]
    assert targets == [0.8, 0.85, 0.9, 0.95]
    kept = held_out.report["guarantees"][2]["threshold"] | {"protocol": "cross-fitted"}
    assert held_out.report["threshold"] == held_out.record["threshold"] == kept
    check_guarantees(held_out, by_hand(held_out.record, p), correct)


def test_decisions_are_those_of_the_calibrator_file_and_no_cell_is_a_formula(held_out):
    fitted, rows = load_calibrator(held_out.folder / "calibrator.json"), predictions.read(held_out.test)
    value = held_out.record["threshold"]["value"]
    assert value is not None
    by_formula = by_hand(held_out.record, arrays(held_out.test)[0])
    for line, row, c in zip(held_out.decisions, fitted.apply(rows), by_formula, strict=True):
        assert line["id"] == ("'" + row.id if row.id[0] in "=+-@\t" else row.id)
        assert (line["label"], line["prediction"]) == (row.label, row.prediction)
        assert abs(float(line["confidence"]) - row.confidence) < 1e-6
        assert abs(float(line["calibrated_confidence"]) - row.extras["calibrated_confidence"]) < 1e-6
        assert abs(float(line["calibrated_confidence"]) - c) < 1e-6
        assert line["decision"] == row.extras["decision"] == ("automate" if c >= value else "review")
        assert line["bucket"] == next(zone for zone, low, _ in BANDS if c >= low)
    assert [line["id"][:2] for line in held_out.decisions[:5]] == ["'=", "'+", "'-", "'@", "'\t"]
    assert {line["decision"] for line in held_out.decisions} == {"automate", "review"}


def test_what_is_printed_first_is_what_to_act_on_in_two_screens(held_out):
    *_, raw, correct = arrays(held_out.test)
    calibrated, report, out = by_hand(held_out.record, arrays(held_out.test)[0]), held_out.report, held_out.run.out
    taken = calibrated >= report["threshold"]["value"]
    interval = binomtest(int(correct[taken].sum()), int(taken.sum())).proportion_ci(0.95, "exact")
    right = f"{correct[taken].mean():.3f} [{interval.low:.3f}, {interval.high:.3f}]"
    first, second, *_ = out.splitlines()
    assert re.fullmatch("Guaranteed with 95% certainty: from .* 0[.][0-9]{3} on, at least 90.0% are right.", first)
    assert second == f"That automates {taken.mean():.1%} of the rows (coverage), {right} of them right, held-out."
    for name, numbers in (
        ("log loss (nats)", (log_loss(correct, raw), log_loss(correct, calibrated))),
        ("ECE (expected if calibrated: the noise floor)", (slow_ece(raw, correct), slow_ece(calibrated, correct))),
        ("AUROC of confidence for correctness", (roc_auc_score(correct, raw), roc_auc_score(correct, calibrated))),
    ):
        assert [cell[:5] for cell in cells(out, name)[1:]] == [f"{number:.3f}" for number in numbers]
    assert cells(out, "its calibration part, a paired gain")[1][:5] == f"{report['log_loss_gain'][0]:.3f}"
    _, accepted, errors = slow_guarantee(held_out.oof.mean(axis=0)[:260], arrays(held_out.cal)[3][:260], 0.9)
    target = cells(out, "90.0%")
    assert target[2:4] == [f"{taken.mean():.1%}", right] and f"{errors} wrong of {accepted} labels, " in target[4]
    lines = report_text(report | dict.fromkeys(("calibrated_on", "tested_on"), "data/predictions/base.jsonl"))
    assert out.count("\n") <= 48 and max(map(len, lines.splitlines())) <= 100


def test_verbose_adds_every_calibrator_label_band_and_threshold(held_out):
    p, _, raw, correct = arrays(held_out.test)
    out, calibrated = report_text(held_out.report, verbose=True), by_hand(held_out.record, p)
    assert out.startswith(held_out.run.out[: held_out.run.out.index("Guarantees with")])
    line = cells(out[out.index("lowest log loss first") :], CHOSEN)
    assert (line[1], line[4]) == (f"{log_loss(correct, calibrated):.3f}", f"{slow_ece(calibrated, correct):.3f}")
    assert cells(out[out.index("Candidates") :], CHOSEN)[-1] == "chosen"
    mine = p.argmax(axis=1) == 0
    expected = ["negative", str(mine.sum()), f"{raw[mine].mean():.3f}", f"{correct[mine].mean():.3f}"]
    assert cells(out, "negative") == expected
    band, high = cells(out, "auto-approve"), [c >= 0.9 for c in (raw, calibrated)]
    assert band[2:] == [x for h in high for x in (str(h.sum()), f"{correct[h].mean():.1%}")]
    gate, taken = cells(out[out.index("A day of 1,000") :], "80%"), calibrated >= 0.8
    reviews, errors = 5000 * (~taken).mean(), 25e3 * (taken & ~correct).mean()
    shares = [f"{taken.mean():.1%}", f"{correct[taken].mean():.1%}"]
    assert gate[5:9] == [*shares, f"${reviews:,.0f}", f"${reviews + errors:,.0f}"]
    assert cells(out, "80.0%")[5] == f"from {held_out.report['guarantees'][0]['threshold']['naive_value']:.3f}"


def test_from_a_program_the_study_and_the_report_are_had_without_a_command_line(held_out):
    fit, test = (calibration_demo.labelled_rows(path) for path in (held_out.cal, held_out.test))
    study = calibration_demo.calibration_study(fit, test, method="platt", target_accuracy=0.8)
    report = calibration_demo.study_report(study, error_cost=50)
    assert report["guarantees"] == held_out.report["guarantees"] and report["cost_optimal_threshold"] == 0.9
    assert report["threshold"]["target_accuracy"] == 0.8 and report["metrics"] == held_out.report["metrics"]


# Honesty


@pytest.fixture(scope="module")
def relabelled(held_out, tmp_path_factory):
    """The same test rows with labels drawn from the raw confidences, which makes these true; three texts moved near."""
    folder, draw = tmp_path_factory.mktemp("relabelled"), np.random.default_rng(4)
    near = [json.loads(line)["text"] + " indeed" for line in held_out.cal.read_text("utf-8").splitlines()[:3]]
    rows = list(map(json.loads, held_out.test.read_text("utf-8").splitlines()))
    truth = [str(draw.choice([*row["probabilities"]], p=[*row["probabilities"].values()])) for row in rows]
    rows = changed(rows, label=lambda r, i: truth[i], text=lambda r, i: near[i] if i < 3 else r["text"])
    test = save(folder / "test.jsonl", rows + failed(1, "y"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_demo, "draw_figures", lambda *ignored: None)
        argv = (*held_out.argv[:3], test, *held_out.argv[4:6], "--output-dir", folder / "out")
        found = opened(folder / "out", demo(*argv))
    found.test = test
    return found


def test_a_calibrator_that_makes_it_worse_is_said_to(relabelled):
    p, _, raw, correct = arrays(relabelled.test)
    calibrated = by_hand(relabelled.record, p)
    assert log_loss(correct, calibrated) > log_loss(correct, raw)
    assert slow_ece(calibrated, correct) > relabelled.report["metrics"][CHOSEN]["ece_noise_95"]
    assert "log loss is NOT below the raw one" in relabelled.run.out
    assert "ECE is NOT within what" in relabelled.run.out and relabelled.report["log_loss_gain"][0] < 0


def test_nothing_is_fitted_or_chosen_on_test_rows(held_out, relabelled):
    files = [(found.folder / "calibrator.json").read_bytes() for found in (held_out, relabelled)]
    assert files[0] == files[1]
    kept = ("id", "prediction", "confidence", "calibrated_confidence", "decision", "bucket")
    decisions = [[[line[key] for key in kept] for line in found.decisions] for found in (held_out, relabelled)]
    assert decisions[0] == decisions[1]
    assert relabelled.report["candidates"] == held_out.report["candidates"] and relabelled.report["unscored"] == 2
    assert relabelled.report["metrics"]["raw"]["ece"] < held_out.report["metrics"]["raw"]["ece"] / 2


def test_near_duplicates_across_the_two_files_are_counted(held_out, relabelled):
    key = "near_duplicates_of_calibration_rows"
    assert (held_out.report[key], relabelled.report[key]) == (0, 3)
    assert "near-duplicate" not in held_out.run.out and "3 test rows have a near-duplicate" in relabelled.run.out


def test_one_file_is_out_of_fold_and_its_threshold_in_sample(one_file):
    report, out = one_file.report, one_file.run.out
    assert report["protocol"] == "out-of-fold" and report["threshold_measured_protocol"] == "in-sample"
    assert {m["protocol"] for name, m in report["metrics"].items() if name != "raw"} == {"out-of-fold"}
    assert "right, in-sample" in out and "each by a calibrator that did not see its group" in out
    assert (report["unscored"], report["calibration_rows"], report["calibration_groups"]) == (2, 80, 60)
    assert "2 rows had no score" in out and len(one_file.decisions) == 80
    # Each row by a temperature that its fold did not set: not the file's own, yet near it.
    p, _, _, correct = arrays(one_file.cal)
    ours = np.array([float(line["calibrated_confidence"]) for line in one_file.decisions])
    assert abs(ours - one_file.oof[0]).max() < 1e-5 < abs(ours - by_hand(one_file.record, p)).max() < 0.2
    m = report["metrics"]["temperature, of P(label)"]
    assert (m["log_loss"], m["ece"]) == pytest.approx((log_loss(correct, ours), slow_ece(ours, correct)), abs=1e-5)
    check_guarantees(one_file, one_file.oof[0], correct)
    assert report["guarantees"][0]["threshold"]["target_accuracy"] == 0.7
    assert (ours[60:] == ours[:20]).all()  # copies share their fold


def test_pure_noise_does_not_look_calibrated_out_of_fold(no_figures, tmp_path):
    rows = marked(made(150, 5, "n"), lambda i: bool(np.random.default_rng(i).integers(2)))
    demo(save(tmp_path / "noise.jsonl", rows), "--method", "isotonic", "--output-dir", tmp_path / "out")
    found, (*_, confidence, correct) = opened(tmp_path / "out"), arrays(tmp_path / "noise.jsonl")
    seen = IsotonicRegression(y_min=0.01, y_max=0.99).fit_transform(confidence, correct)
    base = log_loss(correct, np.full(150, correct.mean()))
    assert slow_ece(seen, correct) < 0.01 and log_loss(correct, seen) < base - 0.01  # how it looks on the rows it saw
    metrics = [m for name, m in found.report["metrics"].items() if name.startswith("isotonic")]
    assert metrics and all(m["ece"] > 0.04 and m["log_loss"] > base - 0.002 for m in metrics)
    assert all(promise["threshold"]["value"] is None for promise in found.report["guarantees"])
    assert {line["decision"] for line in found.decisions} == {"review"}


def test_half_of_the_groups_not_of_the_rows_are_kept_for_the_figures_of_one_file(one_file, monkeypatch):
    real, pools = label_counts.some_groups, []
    monkeypatch.setattr(label_counts, "some_groups", lambda g, *rest: pools.append(g) or real(g, *rest))
    rows = calibration_demo.labelled_rows(one_file.cal)
    drawn = label_counts.few_labels(Recipe("temperature", True), rows.scores, rows.groups)
    whole, pool = np.bincount(rows.groups), np.bincount(pools[0], minlength=60)
    assert set(pool / whole) == {0, 1} and (pool > 0).sum() == 30 and len(drawn.correct) == 80 - pool.sum()
    chosen = real(rows.groups, 50, np.random.default_rng(1))
    taken = np.bincount(rows.groups[chosen], minlength=60)
    assert len(set(chosen.tolist())) == 50 and ((taken > 0) & (taken < whole)).sum() <= 1


# What is refused


def tried(tmp_path, rows, *flags):
    """A run on these rows alone."""
    return demo(save(tmp_path / "CAL", rows), "--method", "temperature", "--output-dir", tmp_path / "out", *flags)


def refused(run, message, *folders):
    assert run.code == 2 and re.fullmatch(r"error: [ -~]+\n", run.err), run.err
    assert message in run.err and not any(folder.exists() for folder in folders)


CAL, TEST = made(40, 7, "c"), made(20, 8, "t")
SEEN = CAL[4] | {"id": "seen\x1b[31m", "text": f" {CAL[4]['text'].upper()}\n"}
BEEF = changed(TEST, fingerprint="beef0000")
UNLABELLED = changed(TEST, label=lambda r, i: r["label"] if i else None)
GROUPED = [row | {"text": CAL[i % 4]["text"]} for i, row in enumerate(CAL)]
REFUSED = {
    "seen in other case and spaces": (CAL, [*TEST, SEEN], r"of TEST are in CAL too: 'seen\x1b[31m' (there 'c4')"),
    "another fingerprint": (CAL, BEEF, "TEST does not fit CAL"),
    "mixed fingerprints": (CAL, [*TEST[:2], *BEEF[2:]], "in row 't2', beef0000"),
    "an unlabelled row": (CAL, UNLABELLED, "TEST: 1 of 20 scored rows have no label"),
    "unlabelled calibration rows": (changed(CAL, label=None), TEST, "CAL: 40 of 40 scored rows have no label"),
    "all right": (marked(CAL, lambda i: False), TEST, "CAL: all 40 rows are right"),
    "all wrong": (marked(CAL, lambda i: True), TEST, "CAL: all 40 rows are wrong"),
    "19 labels": (CAL[:19], TEST, "CAL: 19 labelled rows; a calibrator needs at least 20"),
    "four groups": (GROUPED, TEST, "40 rows in 4 groups are too few for 5 folds"),
    "a label of no such name": (CAL, changed(TEST, label="neutral"), "'t0'"),
    "no rows": (CAL, [], "TEST holds no predictions"),
}


@pytest.mark.parametrize(("cal", "test", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_rows_that_can_give_no_honest_report_are_refused(cal, test, message, no_figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "CAL", cal), save(tmp_path / "TEST", test)
    run = demo("--calibrate-on", "CAL", "--test-on", "TEST", "--method", "temperature", "--output-dir", "out")
    refused(run, message, tmp_path / "out")


FLAGS = {flag: flag for flag in ("--target-accuracy 1.5", "--target-accuracy nan", "--delta 0", "--delta 1")}
FLAGS |= {flag: flag for flag in ("--volume 0", "--review-cost -1", "--error-cost -0.5", "--error-cost inf")}
FLAGS |= {flag: flag.split()[0] for flag in ("--method best", "--seed -1")}
FLAGS |= dict.fromkeys(("--test-on CAL", "--calibrate-on CAL"), "either one predictions file or")
FLAGS |= {"--groups groups.csv": "groups.csv names no group for the row 'c39'", "--groups none.csv": "none.csv"}


@pytest.mark.parametrize(("flags", "message"), FLAGS.items(), ids=FLAGS.keys())
def test_flags_that_make_no_sense_are_refused_and_nothing_is_written(flags, message, no_figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "groups.csv").write_text("id,group\n" + "".join(f"{row['id']},1\n" for row in CAL[:-1]))
    refused(tried(tmp_path, CAL, *flags.split()), message, tmp_path / "out")


def test_files_that_are_missing_or_named_alone_are_refused(tmp_path):
    path, gone, out = save(tmp_path / "CAL", CAL), tmp_path / "gone.jsonl", tmp_path / "out"
    for flag in ("--calibrate-on", "--test-on"):
        refused(demo(flag, path, "--output-dir", out), "belong together", out)
    refused(demo(gone, "--output-dir", out), f"{gone}: No such file or directory", out)
    refused(demo(tmp_path, "--output-dir", out), f"{tmp_path}: Is a directory", out)
    refused(demo("--calibrate-on", path, "--test-on", gone, "--output-dir", out), f"{gone}: No such file", out)


def test_an_output_that_cannot_be_a_folder_is_refused_and_left_alone(no_figures, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "below"):
        refused(tried(tmp_path, CAL, "--output-dir", folder), str(folder))
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_folder_that_takes_not_every_file_is_left_as_it_was(no_figures, tmp_path):
    (tmp_path / "out/report.json").mkdir(parents=True)
    refused(tried(tmp_path, CAL), "report.json is a folder; nothing was written")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


@pytest.mark.parametrize("field", ["id", "text"])
def test_half_a_character_leaves_nothing_half_written(field, no_figures, tmp_path):
    run = tried(tmp_path, changed(CAL, **{field: lambda r, i: r[field] + "\ud800" * (i == 30)}))
    assert (run.code, run.err) == (0, "") and len(opened(tmp_path / "out").decisions) == 40


@pytest.mark.parametrize("rows", [changed(CAL, label="negative"), marked(CAL, lambda i: not i)], ids=["truth", "wrong"])
def test_a_method_that_is_only_shown_does_not_end_the_run(rows, no_figures, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_demo, "METHOD_NAMES", ("platt", "temperature", "beta"))
    assert tried(tmp_path, rows, "--method", "platt").code == 0


# Names that are not ours, and what is said of the run


def test_the_gain_in_log_loss_is_the_paired_difference_with_its_interval(held_out):
    p, _, raw, correct = arrays(held_out.test)
    calibrated = by_hand(held_out.record, p)
    gain, low, high = held_out.report["log_loss_gain"]
    assert gain == pytest.approx(log_loss(correct, raw) - log_loss(correct, calibrated), abs=1e-9)
    each = [np.log(np.where(correct, c, 1 - c)) for c in (calibrated, raw)]
    half = 1.96 * np.std(each[0] - each[1]) / np.sqrt(len(correct))  # of a mean of independent rows
    assert (low, high) == pytest.approx((gain - half, gain + half), abs=0.25 * half)


def test_what_flatters_or_depends_on_independence_is_said_so(one_file, held_out):
    for run, chosen_here, related in ((one_file, True, True), (held_out, False, False)):
        assert ("was chosen by these very losses" in run.run.out) == chosen_here
        assert ("take rows for independent; rows of a group are not" in run.run.out) == related


def test_a_name_with_dollars_and_percents_breaks_no_caption_and_each_says_its_n_and_protocol(one_file):
    assert one_file.run.code == 0 and one_file.report["model"] == HOSTILE == one_file.record["model"]
    assert one_file.record["labels"] == ["no", "maybe", "yes\x1b[2J"]
    assert len(one_file.captions) == 8 and "m$\\frac{$ 100%" in one_file.captions[0]
    for caption in one_file.captions:
        assert caption.isprintable()
        choice = ", held-out but for the choice of the method, which saw all rows"
        own = ("n = 80, nothing fitted" in caption, "n = 80 in 60 groups, out-of-fold" in caption, choice in caption)
        assert sum(own) == 1 and (not own[2] or re.search(rf"test n = \d+{choice}", caption)), caption
        assert any(protocol in caption for protocol in ("out-of-fold", "held-out", "nothing fitted"))


def test_hostile_names_write_no_escapes_to_the_terminal(one_file):
    assert not re.search(r"[^\n -~]", one_file.run.out) and "\nerror: forged" not in one_file.run.out


def test_a_certainty_below_one_is_not_printed_as_100_percent(no_figures, tmp_path):
    assert " with 99.6% certainty" in tried(tmp_path, CAL, "--delta", "0.004").out.splitlines()[0]


# The command line


def test_the_same_command_twice_writes_the_same_bytes(held_out):
    before = {path.name: path.read_bytes() for path in held_out.folder.iterdir()}
    assert demo(*held_out.argv).out == held_out.run.out
    assert before == {path.name: path.read_bytes() for path in held_out.folder.iterdir()}


def test_without_arguments_the_recorded_predictions_are_used_wherever_one_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args, data = calibration_demo.parse_arguments([]), Path(calibration_demo.__file__).parent / "data"
    found = [Path(path).resolve() for path in (args.calibrate_on, args.test_on, args.groups)]
    names = ("predictions/base_calibration.jsonl", "predictions/base_test.jsonl", "sentiment/splits.csv")
    assert found == [data / name for name in names] and all(path.is_file() for path in found)
    assert args.predictions is None and args.method == "auto"
    assert calibration_demo.parse_arguments(["--groups", "mine.csv"]).groups == "mine.csv"
    assert calibration_demo.parse_arguments(["mine.jsonl"]).groups is None
