"""calibration_demo.py: an honest report from predictions files, written whole or not at all.

Predictions with a planted class bias and overconfidence are made here and written as plain JSON. Calibrators, metrics
and thresholds are tested in files of their own; here it is which rows they see, and what is said and written of them.
"""

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from made_predictions import arrays, captured, changed, few_resamples, save, unscored
from scipy.special import softmax
from sklearn.metrics import log_loss, roc_auc_score

import calibration_demo
import calibration_figures
import calibration_metrics
import plotting
import predictions
from calibration import Recipe, VectorScalingCalibrator, cross_fit, cross_fit_labels, load_calibrator
from calibration_metrics import expected_calibration_error
from decisions import automation, average_threshold, buckets, choose_threshold, costs, floor, priced_automation
from text_report import report_text

FIGURES = {"raw_confidence_histogram", "reliability_by_method", "business_reliability", "business_progression"}
FIGURES |= {"accuracy_threshold", "sample_size", "cost_curve", "risk_coverage"}
FILES = {f"{name}.png" for name in FIGURES} | {"calibrator.json", "report.json", "decisions.csv"}
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


def marked(rows, wrong):
    """The rows with labels such that wrong(i) says which are wrong."""
    return changed(rows, label=lambda r, i: next(x for x in r["probabilities"] if (x != r["prediction"]) == wrong(i)))


def failed(n, name, **fields):
    """Rows that could not be scored."""
    return [unscored(row) for row in made(n, 10, name, **fields)]


def demo(*argv):
    return captured(calibration_demo.main, *argv)


def opened(folder, run=None, **others):
    """What a run wrote, read as plain JSON and CSV."""
    report, record = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("report", "calibrator"))
    with open(folder / "decisions.csv", encoding="utf-8", newline="") as file:
        decisions = list(csv.DictReader(file))
    return SimpleNamespace(folder=folder, run=run, report=report, record=record, decisions=decisions, **others)


def cross_fitted(found, recipe):
    """Out-of-fold confidences [5 seeds, n] of the calibration rows, their groups as they were made here."""
    p, truth, confidence, correct = arrays(found.cal)
    given = (p, truth) if recipe.class_aware else (confidence, correct)
    return np.array([cross_fit(recipe.estimator(), *given, found.groups, seed=seed) for seed in range(5)])


def calibrated(found):
    """The test rows' confidences by the calibrator file."""
    rows = [row for row in predictions.read(found.test) if row.error is None]
    return load_calibrator(found.folder / "calibrator.json").calibrate(rows)


def cells(text, first):
    """The cells of the printed line that begins with that cell."""
    line = next(line for line in text.splitlines() if re.match(rf"\s*{re.escape(first)}(  |$)", line))
    return re.split(r"\s{2,}", line.strip())


@pytest.fixture(scope="module", autouse=True)
def small():
    """Fewer resamples and coarser pictures: the numbers tested here do not depend on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_figures, "REPEATS", 3)
        patch.setattr(plotting, "DPI", 30)
        few_resamples(patch, 20)
        yield


def undrawn(*argv):
    """The same without its figures, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_demo, "draw_figures", lambda *ignored: None)
        return demo(*argv)


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
    groups = np.array([*range(260), *range(40)])
    return opened(folder / "out", undrawn(*argv), cal=cal, test=test, argv=argv, groups=groups)


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
        run = demo(*argv)
    groups = np.array([*range(60), *range(20)])
    return opened(folder / "new" / "out", run, cal=path, test=path, argv=argv, captions=captions, groups=groups)


def test_the_files_are_these_and_no_others(one_file):
    assert one_file.run.code == 0 and {path.name for path in one_file.folder.iterdir()} == FILES
    for name in FIGURES:
        assert (one_file.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    said = " ".join(one_file.run.out.split())
    assert said.endswith(f"Written to {one_file.folder}: {', '.join(sorted(FILES))}")


def test_the_calibrator_file_is_fitted_on_the_calibration_rows_alone(held_out):
    p, truth, _, correct = arrays(held_out.cal)
    record, recipe = held_out.record, Recipe("platt", True)
    fitted = recipe.estimator().fit(p, truth).calibrator_
    assert record["parameters"]["all"] == {"slope_": fitted.slope_, "intercept_": fitted.intercept_}
    assert (record["n"], record["groups"], record["labels"]) == (300, 260, ["negative", "positive"])
    assert len(record["fitted_on"]) == 260
    card, first = record["report_card"], cross_fitted(held_out, recipe)[0]
    assert card == calibration_metrics.calibration_metrics(first, correct, 20, held_out.groups, "out-of-fold")


def test_candidates_are_scored_by_their_grouped_out_of_fold_log_loss_over_five_seeds(held_out):
    *_, correct = arrays(held_out.cal)
    candidates = held_out.report["candidates"]
    assert candidates.keys() == {str(Recipe("platt", aware)) for aware in (True, False)}
    for recipe in (Recipe("platt", True), Recipe("platt", False)):
        losses = [log_loss(correct, confidence) for confidence in cross_fitted(held_out, recipe)]
        expected = {"log_loss": np.mean(losses), "sd_over_seeds": np.std(losses), "seeds": 5}
        assert candidates[str(recipe)] == pytest.approx(expected)
    assert held_out.report["chosen"] == CHOSEN == min(candidates, key=lambda name: candidates[name]["log_loss"])


def test_every_number_of_the_report_is_measured_on_the_test_rows(held_out):
    *_, raw, correct = arrays(held_out.test)
    report, chosen = held_out.report, calibrated(held_out)
    assert (report["protocol"], report["calibration_rows"], report["calibration_groups"]) == ("held-out", 300, 260)
    assert report["threshold_measured_protocol"] == "held-out" and report["unscored"] == 1
    for name, key, c in (("raw", "raw", raw), (CHOSEN, "calibrated", chosen)):
        protocol = "nothing fitted" if name == "raw" else "held-out"
        expected = calibration_metrics.calibration_metrics(c, correct, protocol=protocol)
        assert report["metrics"][name] == pytest.approx(expected, nan_ok=True)
        assert report["gates"][key] == priced_automation(c, correct, (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99), 1000, 5, 25)
        assert report["buckets"][key] == buckets(c, correct)
        assert report["cost_per_row"][key] == pytest.approx(costs(c, correct, [0.8], 5, 25)[0])
    assert report["cost_optimal_threshold"] == pytest.approx(1 - 5 / 25)
    assert report["cost_per_row"]["automate everything"] == pytest.approx(25 * (~correct).mean())
    gain, low, high = report["log_loss_gain"]
    assert gain == pytest.approx(log_loss(correct, raw) - log_loss(correct, chosen), abs=1e-9)
    assert report["refinement"]["calibration_error"] == pytest.approx(gain)
    each = [np.log(np.where(correct, c, 1 - c)) for c in (chosen, raw)]
    half = 1.96 * np.std(each[0] - each[1]) / np.sqrt(len(correct))  # of a mean of independent rows
    assert (low, high) == pytest.approx((gain - half, gain + half), abs=0.25 * half)


@pytest.mark.parametrize("kind", ["held_out", "one_file"])
def test_a_ladder_of_guarantees_comes_from_cross_fitted_scores_of_all_rows_with_their_groups(kind, request):
    found = request.getfixturevalue(kind)
    *_, confidence, correct = arrays(found.cal)
    *_, test_correct = arrays(found.test)
    oof = cross_fitted(found, Recipe(found.record["method"], True))
    on_test = calibrated(found) if kind == "held_out" else oof[0]
    targets, some = [0.8, 0.85, 0.9, 0.95] if kind == "held_out" else [0.7, 0.8, 0.85, 0.9, 0.95], 0
    for target, guarantee in zip(targets, found.report["guarantees"], strict=True):
        rows, groups = (oof.mean(axis=0), correct, target), found.groups
        ladder = [choose_threshold(*rows, delta, groups) for delta in (0.05, 0.2)] + [average_threshold(*rows, groups)]
        assert [rung["certainty"] for rung in guarantee["ladder"]] == [0.95, 0.8, "average"]
        for expected, rung in zip(ladder, guarantee["ladder"], strict=True):
            assert rung["threshold"] == expected.record()
            measured = None if expected.value is None else automation(on_test, test_correct, [expected.value])[0]
            assert rung["measured"] == measured
            some += measured is not None
        assert guarantee["raw"] == choose_threshold(confidence, correct, target, 0.05, groups, "strictest").record()
    assert some >= 5
    asked = found.report["guarantees"][targets.index(0.9 if kind == "held_out" else 0.7)]["ladder"][0]["threshold"]
    assert asked["value"] is not None and asked["kind"] == "approximate"
    assert found.report["threshold"] == found.record["threshold"] == asked | {"protocol": "cross-fitted"}
    wrong = oof.mean(axis=0)[~correct]
    assert found.record["wrong_confidences"] == pytest.approx(sorted(wrong))
    assert found.record["label_thresholds"] is None


@pytest.fixture(scope="module")
def by_label(held_out, tmp_path_factory):
    """Targets for each label, a price for each mistake, on average: the three ways in which a run differs."""
    folder, found = tmp_path_factory.mktemp("by_label"), {}
    prices = folder / "prices.csv"
    prices.write_text("true,positive,negative\nnegative,$40,0\npositive,1,10\n", encoding="utf-8")
    for name, flags in (
        ("each", ("--target", "negative=.75", "default=.9", "--cost-matrix", prices)),
        ("split", ("--target", "negative=.75", "default=.9", "--split-certainty", "--certainty", ".9")),
        ("average", ("--certainty", "average", "--target-accuracy", ".85")),
    ):
        run = undrawn(*held_out.argv[:6], *flags, "--output-dir", folder / name)
        found[name] = opened(folder / name, run)
        assert run.code == 0, run.err
    return found


@pytest.mark.parametrize("name, delta", [("each", 0.05), ("split", 0.05)])  # 0.1 divided between two labels
def test_targets_of_labels_are_guaranteed_on_the_rows_with_that_prediction_and_decide(name, delta, held_out, by_label):
    found, oof = by_label[name], cross_fitted(held_out, Recipe("platt", True)).mean(axis=0)
    p, _, _, correct = arrays(held_out.cal)
    predicted, thresholds = p.argmax(axis=1), {}
    for number, (label, target) in enumerate({"negative": 0.75, "positive": 0.9}.items()):
        mine = predicted == number
        expected = choose_threshold(oof[mine], correct[mine], target, delta, held_out.groups[mine])
        record = found.record["label_thresholds"][label]
        assert record == expected.record() | {"protocol": "cross-fitted"}
        assert found.report["by_label"]["labels"][label]["rows"] == mine.sum()
        thresholds[label] = expected.value
    assert thresholds["negative"] is not None
    automated = []
    applied = load_calibrator(found.folder / "calibrator.json").apply(predictions.read(held_out.test))
    for line, row in zip(found.decisions, applied, strict=True):
        value = thresholds[row.prediction]
        automate = value is not None and row.extras["calibrated_confidence"] >= value
        assert line["decision"] == row.extras["decision"] == ("automate" if automate else "review")
        automated.append((automate, row.label == row.prediction))
    taken, right = map(np.array, zip(*automated, strict=True))
    together = found.report["by_label"]["together"]
    assert (together["automated"], together["right"]) == (taken.sum(), right[taken].sum()) and taken.any()
    said = {
        "each": "Each guarantee by itself with 95% certainty",
        "split": "All guarantees together with 90% certainty",
    }
    assert said[name] in found.run.out and f"Together they automate {taken.mean():.1%} of the rows" in found.run.out
    lines = found.run.out[found.run.out.index("A target for each") :]
    assert cells(lines, "negative")[2:4] == ["75.0%", f"{int(1000 * thresholds['negative']) / 1000:.3f}"]
    other = thresholds["positive"]
    assert cells(lines, "positive")[2:4] == ["90.0%", "nothing" if other is None else f"{int(1000 * other) / 1000:.3f}"]


def test_prices_of_mistakes_decide_by_the_expected_cost_beside_chow_s_threshold(held_out, by_label):
    p, truth, *_ = arrays(held_out.test)
    cal_p, cal_truth, *_ = arrays(held_out.cal)
    found, chosen = by_label["each"], calibrated(held_out)
    dollars = np.array([[0, 40], [10, 1]])  # true negative, positive; predicted likewise
    predicted, cal_predicted = p.argmax(axis=1), cal_p.argmax(axis=1)
    pairs = zip(predicted, chosen, strict=True)
    expected = [c * dollars[k, k] + (1 - c) * dollars[1 - k, k] for k, c in pairs]
    assert [float(line["expected_cost"]) for line in found.decisions] == pytest.approx(expected, abs=1e-6)
    by_cost = np.array(expected) <= 5
    assert [line["decision_by_cost"] == "automate" for line in found.decisions] == by_cost.tolist()
    paid, matrix = dollars[truth, predicted], found.report["cost_matrix"]
    wrong = cal_predicted != cal_truth
    price = dollars[cal_truth, cal_predicted][wrong].mean()
    assert matrix["mean_error_price"] == pytest.approx(price) and matrix["dollars"] == dollars.tolist()
    rules = {rule["rule"].split(",")[0]: rule for rule in matrix["rules"]}
    for name, taken in (("expected cost", by_cost), ("Chow's threshold", chosen >= 1 - 5 / price)):
        assert rules[name]["share"] == pytest.approx(taken.mean())
        assert rules[name]["cost"] == pytest.approx(np.where(taken, paid, 5).mean())
        assert rules[name]["low"] <= rules[name]["cost"] <= rules[name]["high"]
    assert rules["expected cost"]["cost"] < rules["Chow's threshold"]["cost"] < rules["automate everything"]["cost"]
    assert f"{rules['expected cost']['cost']:.3f} [" in found.run.out


def test_on_average_is_called_no_guarantee_and_the_file_gets_that_threshold(by_label):
    found = by_label["average"]
    assert found.record["threshold"]["kind"] == "average" and found.record["threshold"]["delta"] is None
    assert "Without a guarantee for this threshold, on average over labelled sets: from calibrated" in found.run.out
    assert "on average over labelled sets like yours at least 85 % of what is automated is" in " ".join(
        found.run.out.lower().split()
    )


def test_decisions_are_those_of_the_calibrator_file_and_no_cell_is_a_formula(held_out):
    fitted, value = load_calibrator(held_out.folder / "calibrator.json"), held_out.record["threshold"]["value"]
    bands = {
        "auto-approve": (0.9, 2),
        "human review": (0.7, 0.9),
        "manual check": (0.5, 0.7),
        "manual processing": (0, 0.5),
    }
    for line, row in zip(held_out.decisions, fitted.apply(predictions.read(held_out.test)), strict=True):
        confidence = row.extras["calibrated_confidence"]
        assert line["id"] == ("'" + row.id if row.id[0] in "=+-@\t" else row.id)
        assert (line["label"], line["prediction"]) == (row.label, row.prediction)
        assert (line["confidence"], line["calibrated_confidence"]) == (f"{row.confidence:.6f}", f"{confidence:.6f}")
        assert line["decision"] == row.extras["decision"] == ("automate" if confidence >= value else "review")
        low, high = bands[line["bucket"]]
        assert low <= confidence < high
    assert [line["id"][:2] for line in held_out.decisions[:5]] == ["'=", "'+", "'-", "'@", "'\t"]
    assert {line["decision"] for line in held_out.decisions} == {"automate", "review"}


# What is printed


def test_what_is_printed_first_is_what_to_act_on_in_two_screens(held_out):
    *_, raw, correct = arrays(held_out.test)
    chosen, report, out = calibrated(held_out), held_out.report, held_out.run.out
    value, measured = report["threshold"]["value"], report["guarantees"][2]["ladder"][0]["measured"]
    right = f"{measured['accuracy']:.3f} [{measured['accuracy_low']:.3f}, {measured['accuracy_high']:.3f}]"
    assert (
        out.startswith("Verdict: ")
        and (
            f"\n\nGuaranteed with 95% certainty: from calibrated confidence {floor(value, 3)} on, "
            "at least 90.0% are right.\n"
            f"That automates {measured['share']:.1%} of the rows (coverage), {right} of them right, held-out.\n"
        )
        in out
    )
    assert f"calibrated on {held_out.cal}: 300 rows in 260 groups" in out and "n = 300, held-out" in out
    for name, score in (
        ("log loss (nats)", log_loss),
        ("ECE (expected if calibrated: the noise floor)", lambda truth, c: expected_calibration_error(c, truth)),
        ("AUROC of confidence for correctness", roc_auc_score),
    ):
        assert [cell[:5] for cell in cells(out, name)[1:]] == [f"{score(correct, c):.3f}" for c in (raw, chosen)]
    assert cells(out, "its calibration part, a paired gain")[1][:5] == f"{report['log_loss_gain'][0]:.3f}"
    assert cells(out, "90.0%")[1] == f"{measured['share']:.1%} from {int(1000 * value) / 1000:.3f} ({right[:5]})"
    assert cells(out, "its refinement, which takes a better model")[1] == f"{log_loss(correct, chosen):.3f}"
    lines = report_text(report | dict.fromkeys(("calibrated_on", "tested_on"), "data/predictions/base.jsonl"))
    assert out.count("\n") <= 66 and max(map(len, lines.splitlines())) <= 110


def test_verbose_adds_every_calibrator_label_band_and_threshold(held_out):
    p, _, raw, correct = arrays(held_out.test)
    report, out = held_out.report, report_text(held_out.report, verbose=True)
    first, guarantees = held_out.run.out.index("calibrated on"), held_out.run.out.index("Guarantees:")
    assert out.startswith(held_out.run.out[:first])
    assert held_out.run.out[guarantees : held_out.run.out.index("Cost-optimal")] in out
    m, line = report["metrics"][CHOSEN], cells(out[out.index("lowest log loss first") :], CHOSEN)
    assert (line[1], line[4], line[8]) == (f"{m['log_loss']:.3f}", f"{m['ece']:.3f}", f"{m['auroc']:.3f}")
    assert cells(out[out.index("Candidates") :], CHOSEN)[-1] == "chosen"
    mine = p.argmax(axis=1) == 0
    expected = ["negative", str(mine.sum()), f"{raw[mine].mean():.3f}", f"{correct[mine].mean():.3f}"]
    assert cells(out, "negative") == expected
    bands = [report["buckets"][key][0] for key in ("raw", "calibrated")]
    assert cells(out, "auto-approve")[2:] == [x for b in bands for x in (str(b["n"]), f"{b['accuracy']:.1%}")]
    gate = report["gates"]["calibrated"][3]
    expected = [f"{gate['share']:.1%}", f"{gate['accuracy']:.1%}"]
    expected += [f"${gate['review_dollars']:,.0f}", f"${gate['dollars']:,.0f}"]
    assert cells(out[out.index("A day of 1,000") :], "80%")[5:9] == expected
    threshold, lines = report["guarantees"][2]["ladder"][0]["threshold"], out[out.index("The evidence of") :]
    wrong = f"{threshold['errors']} wrong of {threshold['accepted']} labels"
    assert cells(lines[lines.index("  90.0%") :], "90.0%")[3:7] == [
        wrong,
        f"{threshold['effective']:,.0f}",
        f"{threshold['start']} rows",
        f"{threshold['naive_value']:.3f}",
    ]


def test_from_a_program_the_study_and_the_report_are_had_without_a_command_line(held_out):
    fit, test = (calibration_demo.labelled_rows(path) for path in (held_out.cal, held_out.test))
    study = calibration_demo.calibration_study(fit, test, calibration_demo.Goal(0.8), method="platt")
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
    run = undrawn(*held_out.argv[:3], test, *held_out.argv[4:6], "--output-dir", folder / "out")
    return opened(folder / "out", run, test=test)


def test_a_calibrator_that_makes_it_worse_is_said_to(relabelled):
    raw, chosen = (relabelled.report["metrics"][name] for name in ("raw", CHOSEN))
    assert chosen["log_loss"] > raw["log_loss"] and chosen["ece"] > chosen["ece_noise_95"]
    assert relabelled.report["log_loss_gain"][0] < 0 and "log loss is ABOVE the raw one" in relabelled.run.out
    assert "ECE is NOT within what" in relabelled.run.out


def test_nothing_is_fitted_or_chosen_on_test_rows(held_out, relabelled):
    files = [(found.folder / "calibrator.json").read_bytes() for found in (held_out, relabelled)]
    assert files[0] == files[1]
    kept = ("id", "prediction", "confidence", "calibrated_confidence", "decision", "bucket")
    decisions = [[[line[key] for key in kept] for line in found.decisions] for found in (held_out, relabelled)]
    assert decisions[0] == decisions[1]
    assert relabelled.report["candidates"] == held_out.report["candidates"] and relabelled.report["unscored"] == 2
    key = "near_duplicates_of_calibration_rows"
    assert (held_out.report[key], relabelled.report[key]) == (0, 3)
    assert "near-duplicate" not in held_out.run.out and "3 test rows have a near-duplicate" in relabelled.run.out


def test_one_file_is_out_of_fold_and_its_threshold_in_sample(one_file, held_out):
    report, out = one_file.report, one_file.run.out
    assert report["protocol"] == "out-of-fold" and report["threshold_measured_protocol"] == "in-sample"
    assert {m["protocol"] for name, m in report["metrics"].items() if name != "raw"} == {"out-of-fold"}
    assert "right, in-sample" in out and "each by a calibrator that did not see its group" in out
    assert (report["unscored"], report["calibration_rows"], report["calibration_groups"]) == (2, 80, 60)
    assert "2 rows had no score" in out and len(one_file.decisions) == 80
    # Each row by a temperature that its fold did not set: not the file's own, yet near it.
    ours = np.array([float(line["calibrated_confidence"]) for line in one_file.decisions])
    assert abs(ours - cross_fitted(one_file, Recipe("temperature", True))[0]).max() < 1e-5
    assert 1e-5 < abs(ours - calibrated(one_file)).max() < 0.2 and (ours[60:] == ours[:20]).all()
    for found, flattered in ((one_file, True), (held_out, False)):
        assert ("was chosen by these very losses" in found.run.out) == flattered
        assert ("take rows for independent; rows of a group are not" in found.run.out) == flattered


def test_half_of_the_groups_not_of_the_rows_are_kept_for_the_figures_of_one_file(one_file, monkeypatch):
    real, pools = calibration_figures.some_groups, []
    monkeypatch.setattr(calibration_figures, "some_groups", lambda g, *rest: pools.append(g) or real(g, *rest))
    rows = calibration_demo.labelled_rows(one_file.cal)
    drawn = calibration_figures.few_labels(Recipe("temperature", True), rows.scores, rows.groups)
    whole, pool = np.bincount(rows.groups), np.bincount(pools[0], minlength=60)
    assert set(pool / whole) == {0, 1} and (pool > 0).sum() == 30 and len(drawn.correct) == 80 - pool.sum()
    chosen = real(rows.groups, 50, np.random.default_rng(1))
    taken = np.bincount(rows.groups[chosen], minlength=60)
    assert len(set(chosen.tolist())) == 50 and ((taken > 0) & (taken < whole)).sum() <= 1
    monkeypatch.setattr(calibration_figures.metrics, "MOST_ROWS", 9)
    few = calibration_figures.few_labels(Recipe("temperature", True), rows.scores, rows.groups)
    assert len(few.correct) == 9 and few.where.startswith(f"test n = 9 drawn from {len(drawn.correct)}, held-out")
    assert all(answers.shape[1] == 9 for answers in few.calibrated.values())


def test_more_than_half_of_the_labels_are_one_sample_without_a_band(one_file, monkeypatch):
    monkeypatch.setattr(calibration_figures, "LABEL_COUNTS", (20, 30, 10_000))  # of some 40
    rows = calibration_demo.labelled_rows(one_file.cal)
    found = calibration_figures.few_labels(Recipe("temperature", True), rows.scores, rows.groups)
    assert [len(answers) > 1 for answers in found.calibrated.values()] == [True, False]
    for curve in calibration_figures.automation_curves(found, 0.5):
        assert np.isnan([curve.low, curve.high]).tolist() == [[False, True]] * 2 and np.isfinite(curve.y).all()


def test_hostile_names_break_no_caption_and_no_terminal_and_each_caption_says_its_n_and_protocol(one_file):
    assert one_file.report["model"] == HOSTILE == one_file.record["model"]
    assert one_file.record["labels"] == ["no", "maybe", "yes\x1b[2J"]
    assert not re.search(r"[^\n -~]", one_file.run.out) and "\nerror: forged" not in one_file.run.out
    assert len(one_file.captions) == 8 and "m$\\frac{$ 100%" in one_file.captions[0]
    for caption in one_file.captions:
        choice = ", held-out but for the choice of the method, which saw all rows"
        own = ("n = 80, nothing fitted" in caption, "n = 80 in 60 groups, out-of-fold" in caption, choice in caption)
        assert caption.isprintable() and sum(own) == 1 and (not own[2] or re.search(rf"test n = \d+{choice}", caption))


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
REFUSED = {
    "seen in other case and spaces": (CAL, [*TEST, SEEN], r"of TEST are in CAL too: 'seen\x1b[31m' (there 'c4')"),
    "another fingerprint": (CAL, BEEF, "TEST does not fit CAL"),
    "an unlabelled row": (CAL, UNLABELLED, "TEST: 1 of 20 scored rows have no label"),
    "all right": (marked(CAL, lambda i: False), TEST, "CAL: all 40 rows are right"),
}


@pytest.mark.parametrize(("cal", "test", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_rows_that_can_give_no_honest_report_are_refused(cal, test, message, no_figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "CAL", cal), save(tmp_path / "TEST", test)
    run = demo("--calibrate-on", "CAL", "--test-on", "TEST", "--method", "temperature", "--output-dir", "out")
    refused(run, message, tmp_path / "out")


FLAGS = {flag: flag for flag in ("--target-accuracy nan", "--split-certainty")}
FLAGS |= {f"--certainty {word}": f"--certainty: '{word}': from 0.5" for word in ("0.4", "nan", "mean")}
FLAGS |= {"--target red=.9": "no label is called 'red'", "--target .9": "is no target: write LABEL=ACCURACY"}
FLAGS |= {flag: flag for flag in ("--volume 0", "--review-cost -1", "--error-cost inf")}
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
    refused(demo("--calibrate-on", path, "--test-on", gone, "--output-dir", out), f"{gone}: No such file", out)


def test_an_output_that_cannot_be_a_folder_and_one_that_takes_not_every_file_are_left_alone(no_figures, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "below"):
        refused(tried(tmp_path, CAL, "--output-dir", folder), str(folder))
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "out").exists()
    (tmp_path / "out/report.json").mkdir(parents=True)
    refused(tried(tmp_path, CAL), "report.json is a folder; nothing was written")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


@pytest.mark.parametrize("field", ["id", "text"])
def test_half_a_character_leaves_nothing_half_written(field, no_figures, tmp_path):
    run = tried(tmp_path, changed(CAL, **{field: lambda r, i: r[field] + "\ud800" * (i == 30)}), "--certainty", "0.996")
    assert (run.code, run.err) == (0, "") and len(opened(tmp_path / "out").decisions) == 40
    assert " with 99.6% certainty" in run.out  # not 100 %


def test_a_method_that_is_only_shown_does_not_end_the_run(no_figures, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_demo, "METHOD_NAMES", ("platt", "temperature", "beta"))
    assert tried(tmp_path, marked(CAL, lambda i: not i), "--method", "platt").code == 0


# The command line


@pytest.mark.study
def test_the_same_command_twice_writes_the_same_bytes(one_file):
    before = {path.name: path.read_bytes() for path in one_file.folder.iterdir()}
    assert demo(*one_file.argv).out == one_file.run.out
    assert before == {path.name: path.read_bytes() for path in one_file.folder.iterdir()}


# Predictions that calibration may change, and shortlists


@pytest.fixture(scope="module")
def three_labels(tmp_path_factory):
    """Rows of three labels whose model has a strong bias to the last."""
    folder, labels = tmp_path_factory.mktemp("three"), ("a", "b", "c")
    cal, test = (
        save(folder / f"{name}.jsonl", made(n, seed, name, labels, bias=3, spread=1.5))
        for n, seed, name in ((199, 1, "cal"), (300, 2, "test"))
    )
    return SimpleNamespace(cal=cal, test=test, folder=folder)


def test_relabel_measures_new_predictions_held_out_and_the_file_makes_the_same_ones(three_labels, no_figures):
    found = three_labels
    run = demo(
        "--calibrate-on",
        found.cal,
        "--test-on",
        found.test,
        "--relabel",
        "--html",
        "--target-accuracy",
        0.7,
        "--output-dir",
        found.folder,
    )
    assert (run.code, run.err) == (0, "") and (found.folder / "report.html").exists()
    report, fitted = opened(found.folder, run), load_calibrator(found.folder / "calibrator.json")
    p, truth, confidence, was_right = arrays(found.test)
    q = fitted.estimator.predict_labels(p)
    now, is_right = q.argmax(axis=1), q.argmax(axis=1) == truth
    effect = report.report["relabelling"]
    assert (
        effect["done"]
        and effect["protocol"] == "held-out"
        and effect["changed"] == (now != p.argmax(axis=1)).sum() > 50
    )
    assert (
        effect["became_right"]
        == (is_right & ~was_right).sum()
        > effect["became_wrong"]
        == (was_right & ~is_right).sum()
    )
    rows = report.report["metrics"]
    assert rows["raw"]["accuracy"] == pytest.approx(was_right.mean())
    assert rows["raw"]["log_loss"] == pytest.approx(log_loss(was_right, confidence), rel=1e-6)
    chosen = rows["vector, of P(label), with new predictions"]
    assert chosen["accuracy"] == pytest.approx(is_right.mean()) and chosen["protocol"] == "held-out"
    assert chosen["log_loss"] == pytest.approx(log_loss(is_right, q.max(axis=1)), rel=1e-6)
    assert f"{was_right.mean():.3f} -> {is_right.mean():.3f}, held-out" in run.out
    # The guarantee is about the new predictions: chosen on cross-fitted ones.
    c, cal_truth, _, _ = arrays(found.cal)
    oof = cross_fit_labels(VectorScalingCalibrator(), c, cal_truth)
    expected = choose_threshold(oof.max(axis=1), oof.argmax(axis=1) == cal_truth, 0.7)
    assert fitted.threshold["value"] == expected.value is not None
    applied = fitted.apply(predictions.read(found.test))
    assert [row["prediction"] for row in report.decisions] == [row.prediction for row in applied]
    assert [row["decision"] for row in report.decisions] == [row.extras["decision"] for row in applied]
    assert [row["original_prediction"] for row in report.decisions] == ["abc"[k] for k in p.argmax(axis=1)]
    shown = report.report["shortlists"]
    to_review = [row for row in applied if row.extras["decision"] == "review"]
    assert shown["n"] == len(to_review) and shown["covered"] == sum(r.label in r.extras["shortlist"] for r in to_review)
    assert shown["mean_length"] == pytest.approx(np.mean([len(row.extras["shortlist"]) for row in to_review]))


def test_without_the_flag_the_report_says_out_of_fold_when_it_would_help(three_labels, no_figures, tmp_path):
    run = demo(three_labels.cal, "--output-dir", tmp_path)
    report = opened(tmp_path, run).report
    p, truth, _, was_right = arrays(three_labels.cal)
    is_right = cross_fit_labels(VectorScalingCalibrator(), p, truth).argmax(axis=1) == truth
    effect = report["relabelling"]
    assert (effect["done"], effect["protocol"], effect["helps"]) == (False, "out-of-fold", True)
    assert effect["accuracy_after"] == pytest.approx(is_right.mean())
    assert "(--relabel) would help" in run.out and report["metrics"]["raw"]["accuracy"] == pytest.approx(
        was_right.mean()
    )
    assert {"pooled, of P(label)", "vector, of P(label)", "platt, of the confidence"} <= report["candidates"].keys()
    assert report["chosen"] == "vector, of P(label)" and "Shortlists for the" in run.out
    fair = save(tmp_path / "fair.jsonl", made(199, 3, "fair", ("a", "b", "c"), bias=0, spread=1.5))
    assert "--relabel" not in demo(fair, "--output-dir", tmp_path / "fair").out.partition("Guarantees")[2]
    assert demo(fair, "--relabel", "--method", "isotonic").err.startswith("error: --relabel is vector scaling, not")
