"""compare_base_vs_finetuned.py: was it the fine-tuning or would a temperature have done it, and is every number right?

Pairs of models with a planted relation are written as plain predictions files: one that knows more than the other, one
that is the other at another temperature, one that is the other under another name. What is said of them is counted
again by loops, by scikit-learn and by binomial coefficients.
"""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_predictions import arrays, captured, changed, few_resamples, random_texts, save, unscored
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

import calibration
import compare_base_vs_finetuned as compare
import comparison_figures
import comparison_text
import plotting
import predictions
import tables
from calibration_metrics import area_under_risk_coverage, expected_calibration_error
from decisions import average_threshold, choose_threshold

ROOT = Path(__file__).parent.parent
FIGURES = {"accuracy_comparison", "calibration_error_comparison", "confidence_distributions"}
FIGURES |= {"reliability_raw", "reliability_platt", "reliability_isotonic"}
FILES = {f"{name}.png" for name in FIGURES} | {"report.json"}
LABELS, THREE = ("negative", "positive"), ("bad", "fair", "good")
BASE, TUNED = {"model": "m", "fingerprint": "aaaa1111"}, {"model": "m + adapter", "fingerprint": "bbbb2222"}
STEPS = (
    "what it does for the base model",
    "what fine-tuning does beyond it",
    "what the fine-tuned model lacks without it",
    "together: fine-tuned raw - base raw",
)
HOSTILE = "m$\\frac{$ 100% \x1b[31mred\x1b]0;title\x07\r\nerror: forged"
CHOOSE, RECIPES = calibration.choose, calibration.recipes


def rows_of(truth, scores, name="r", labels=LABELS, seed=0, **fields):
    """Predictions whose probabilities are the softmax of `scores`; texts of random words, no two alike."""
    texts, rows = random_texts(len(truth), [seed, len(truth)]), []
    for i, p in enumerate(softmax(scores, axis=1).tolist()):
        probabilities = dict(zip(labels, p, strict=True))
        prediction = max(probabilities, key=probabilities.get)
        row = {"id": f"{name}{i}", "text": texts[i], "label": labels[truth[i]]}
        row |= {"prediction": prediction, "confidence": probabilities[prediction], "probabilities": probabilities}
        rows.append(row | {"label_mass": 0.9, "method": "logprobs", "task": "t"} | fields)
    return rows


def views(n, seed, labels=LABELS, noise=(1.5, 0.8)):
    """(truth [n], log-odds [2, n, labels]): two honest views of the same truth, by default the second sees more.

    A view is normal around 1 in the true label's place with sd s, so the log-odds of a label are its place / s^2.
    """
    draw = np.random.default_rng(seed)
    truth = draw.integers(len(labels), size=n)
    at = np.eye(len(labels))[truth]
    return truth, [(at + draw.normal(0, s, at.shape)) / s**2 for s in noise]


def pair(n, seed, name="r", labels=LABELS, noise=(1.5, 0.8)):
    """The same rows by an overconfident base model with a class bias, and by one that knows more."""
    truth, (one, two) = views(n, seed, labels, noise)
    biased = 2.0 * one + 0.8 * np.eye(len(labels))[-1]
    return rows_of(truth, biased, name, labels, seed, **BASE), rows_of(truth, 1.5 * two, name, labels, seed, **TUNED)


def copies(rows, n):
    """The rows and n of them again under other ids, in other case: near-duplicates."""
    return rows + changed(rows[:n], id=lambda r, i: f"copy-{r['id']}", text=lambda r, i: r["text"].upper())


def compared(folder, base, tuned, calibrate_on=None, **options):
    """The comparison of these rows, its report and everything that would be printed."""
    paths = [str(save(folder / "base.jsonl", base)), str(save(folder / "tuned.jsonl", tuned))]
    if calibrate_on:
        names = "base_cal.jsonl", "tuned_cal.jsonl"
        calibrate_on = [str(save(folder / name, rows)) for name, rows in zip(names, calibrate_on, strict=True)]
    comparison = compare.read_comparison(paths, calibrate_on, **options)
    report = compare.comparison_report(comparison)
    text = f"{comparison_text.summary(report)}\n\n{comparison_text.details(report)}"
    return SimpleNamespace(comparison=comparison, report=report, out=text, paths=paths, calibrate_on=calibrate_on)


def command(*argv):
    return captured(compare.main, *argv)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Fewer resamples, fewer candidates to choose from, coarser pictures: what is tested does not depend on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "recipes", lambda n, method="auto", n_labels=2: RECIPES(100, method, n_labels))
        patch.setattr(
            calibration, "choose", lambda rows, groups, method, seeds: CHOOSE(rows, groups, method, seeds[:2])
        )
        patch.setattr(plotting, "DPI", 30)
        few_resamples(patch, 40)
        yield


@pytest.fixture
def quick(monkeypatch):
    """The slow calibrators are not shown."""
    monkeypatch.setattr(compare, "CALIBRATORS", ("temperature", "platt"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """500 test rows, 60 of them twice, two unscored; 320 calibration rows, 40 twice; a breakdown by length."""
    folder = tmp_path_factory.mktemp("held_out")
    test, cal = [[copies(rows, n) for rows in pair(*size)] for *size, n in ((500, 1, "t", 60), (320, 2, "c", 40))]
    lost = changed(test[0][:2], id=lambda r, i: f"x{i}", text=lambda r, i: f"unscored {i}")
    base = [*test[0], unscored(lost[0]), lost[1]]
    tuned = [*test[1], lost[0] | TUNED, unscored(lost[1] | TUNED)]
    lines = [f"{row['id']},{'abc'[i % 3]},{i % 2}\n" for i, row in enumerate(base)]
    (folder / "table.csv").write_text("id,kind,half\n" + "".join(lines))
    by = {"table": str(folder / "table.csv"), "by": ["kind", "kind,half"]}
    found = compared(folder, base, tuned[::-1], cal, **by)
    found.test, found.cal, found.folder = test, cal, folder
    found.groups, found.fit_groups = np.array([*range(500), *range(60)]), np.array([*range(320), *range(40)])
    return found


def by_temperature(fit, truth, asked):
    """(P(most probable label) [n] of the asked probabilities, temperature) by the temperature that scipy finds."""
    scores = np.log(np.clip(fit, 1e-6, 1))

    def loss(t):
        return -np.mean(np.log(softmax(scores / t, axis=1))[range(len(truth)), truth])

    t = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}).x
    return softmax(np.log(np.clip(asked, 1e-6, 1)) / t, axis=1).max(axis=1), t


def slow_mcnemar(only_base, only_tuned):
    n = only_base + only_tuned
    tail = sum(math.comb(n, k) for k in range(min(only_base, only_tuned) + 1)) / 2**n
    return min(1.0, 2 * tail)


# Every number


def test_the_scores_of_both_models_and_their_differences_are_counted_again(held_out):
    raw = held_out.report["scores"]["raw"]["paired"]
    truths = {}
    for name, rows in zip(compare.NAMES, held_out.test, strict=True):
        *_, c, correct = arrays(rows)
        truth = {"accuracy": correct.mean(), "mean confidence": c.mean(), "log loss": log_loss(correct, c)}
        truth |= {"Brier": brier_score_loss(correct, c), "AUROC": roc_auc_score(correct, c)}
        truth |= {"ECE": expected_calibration_error(c, correct), "AURC": area_under_risk_coverage(c, correct)}
        assert {key: raw[key][name][0] for key in truth} == pytest.approx(truth, abs=1e-9)
        truths[name] = truth
    for key in truth:
        value, low, high = raw[key]["difference"]
        assert value == pytest.approx(truths["fine-tuned"][key] - truths["base"][key], abs=1e-9)
        assert low <= high and (key == "ECE" or low <= value <= high)


def test_the_rows_that_one_model_alone_has_right_and_the_exact_test_are_counted_again(held_out):
    (*_, base), (*_, tuned) = map(arrays, held_out.test)
    for name, rows in (("all rows", np.arange(560)), ("one row of each group", np.arange(500))):
        b, t, found = base[rows], tuned[rows], held_out.report["right"][name]
        counts = [int(x.sum()) for x in (b & t, b & ~t, t & ~b, ~b & ~t)]
        assert [found[key] for key in ("both", "only base", "only fine-tuned", "neither")] == counts
        assert found["n"] == len(rows) and found["p"] == pytest.approx(slow_mcnemar(*counts[1:3]))


def test_intervals_of_differences_draw_whole_groups_and_the_same_rows_for_both(held_out):
    (*_, c, right), (*_, d, also) = map(arrays, held_out.test)
    losses = [-np.log(np.where(y, x, 1 - x)) for x, y in ((c, right), (d, also))]
    differences, draw = [], np.random.default_rng(0)
    for _ in range(40):
        taken = [row for group in draw.integers(500, size=500) for row in range(560) if held_out.groups[row] == group]
        differences.append(np.mean([losses[1][row] - losses[0][row] for row in taken]))
    ends = np.quantile(differences, [0.025, 0.975])
    assert held_out.report["scores"]["raw"]["paired"]["log loss"]["difference"][1:] == pytest.approx(ends, abs=1e-9)


def test_each_model_has_a_temperature_of_its_own_fitted_on_calibration_rows_alone(held_out):
    found = held_out.report["scores"]["temperature"]
    for name, cal, test in zip(compare.NAMES, held_out.cal, held_out.test, strict=True):
        asked, *_, correct = arrays(test)
        c, t = by_temperature(*arrays(cal)[:2], asked)
        assert held_out.report["models"][name]["temperature"] == pytest.approx(t, rel=1e-4)
        truths = [log_loss(correct, c), brier_score_loss(correct, c), expected_calibration_error(c, correct)]
        ours = [found["paired"][key][name][0] for key in ("log loss", "Brier", "ECE")]
        assert ours == pytest.approx(truths, abs=1e-3) and ours[0] == pytest.approx(truths[0], abs=1e-6)
        assert found[name]["protocol"] == "held-out" and 0 < found[name]["ece_noise_floor"] < 0.1
    assert {*held_out.report["scores"]} == {"raw", *compare.CALIBRATORS, "calibrated"}


def test_the_steps_from_base_to_tuned_are_differences_of_log_losses_and_add_up(held_out):
    losses = []
    for cal, test in zip(held_out.cal, held_out.test, strict=True):
        asked, _, raw, correct = arrays(test)
        losses.append((log_loss(correct, raw), log_loss(correct, by_temperature(*arrays(cal)[:2], asked)[0])))
    (base, base_t), (tuned, tuned_t) = losses
    for key, found in held_out.report["steps"].items():
        *three, whole = [found[step][0] for step in STEPS]
        assert whole == pytest.approx(sum(three), abs=1e-9) == tuned - base
        assert all(low <= value <= high for value, low, high in found.values())
        if key == "temperature":
            assert three == pytest.approx([base_t - base, tuned_t - base_t, tuned - tuned_t], abs=1e-6)
            removed = held_out.report["scores"][key]["paired"]["calibration part"]
            assert [removed[name][0] for name in compare.NAMES] == pytest.approx(
                [base - base_t, tuned - tuned_t], abs=1e-6
            )


def test_sure_answers_and_dollars_are_counted_again(held_out):
    report = held_out.report
    for name, rows in zip(compare.NAMES, held_out.test, strict=True):
        *_, c, correct = arrays(rows)
        for gate, row in zip((0.9, 0.95), report["sure"]["raw"][name], strict=True):
            taken = c >= gate
            ends = binomtest(int(correct[taken].sum()), int(taken.sum())).proportion_ci(0.95, "exact")
            assert (row["automated"], row["right"]) == (taken.sum(), correct[taken].sum())
            assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx(ends)
        row, money = report["money"][name], report["money"]["dollars"]
        assert row["review_dollars"] == pytest.approx(5000 * (1 - row["share"]))
        assert row["error_dollars"] == pytest.approx(25000 * row["share"] * (1 - row["accuracy"]))
        assert money[name][0] == pytest.approx(row["review_dollars"] + row["error_dollars"])
        assert row["automate_everything"] == pytest.approx(25000 * (~correct).mean())
    assert money["difference"][0] == pytest.approx(money["fine-tuned"][0] - money["base"][0])
    assert report["money"]["threshold"] == 0.8 and report["money"]["review_everything"] == 5000


def test_guarantees_come_from_cross_fitted_scores_of_all_rows_with_their_groups(held_out):
    for found in held_out.report["guarantees"]:
        for k, (name, model) in enumerate(held_out.comparison.models.items()):
            *_, correct = arrays(held_out.cal[k])
            assert (model.fit_correct == correct).all() and len(model.out_of_fold) == 360
            known = model.out_of_fold, correct, found["target"]
            groups, share = held_out.fit_groups, 0.0
            expected = [choose_threshold(*known, 0.05, groups), choose_threshold(*known, 0.2, groups)]
            expected.append(average_threshold(*known, groups))
            ladder = found[name]["ladder"]
            assert [rung["threshold"] for rung in ladder] == [each.record() for each in expected]
            assert found[name]["threshold"] == ladder[0]["threshold"] and expected[0].kind == "approximate"
            for rung in ladder:
                value = rung["threshold"]["value"]
                if value is not None:
                    *_, right = arrays(held_out.test[k])
                    taken = model.confidence["calibrated"] >= value
                    assert rung["measured"]["right"] == right[taken].sum()
            if expected[0].value is not None:
                share = (model.confidence["calibrated"] >= expected[0].value).mean()
            assert found["share"][name][0] == pytest.approx(share)
        base, tuned, difference = (found["share"][name][0] for name in (*compare.NAMES, "difference"))
        assert difference == pytest.approx(tuned - base)
    assert [found["target"] for found in held_out.report["guarantees"]] == [0.8, 0.9, 0.95]
    assert held_out.report["guarantees"][1]["fine-tuned"]["threshold"]["value"] is not None


def test_scores_that_thresholds_are_chosen_on_are_out_of_fold(held_out):
    # By a calibrator that saw the row, log losses on the fit rows would be those of the refitted one.
    p, truth, *_, correct = arrays(held_out.cal[0])
    method, _, kind = held_out.report["models"]["base"]["calibrator"].partition(", ")
    seen = calibration.Recipe(method, kind == "of P(label)").estimator().fit(p, truth)
    assert log_loss(correct, held_out.comparison.models["base"].out_of_fold) > log_loss(correct, seen.predict(p))


def test_parts_are_counted_again(held_out):
    (*_, base), (*_, tuned) = map(arrays, held_out.test)
    kinds = np.array(["abc"[i % 3] for i in range(560)])
    both = np.array([f"{kind}, {i % 2}" for i, kind in enumerate(kinds)])
    assert [*held_out.report["parts"]] == ["kind", "kind,half"]
    for column, values in (("kind", kinds), ("kind,half", both)):
        assert [*held_out.report["parts"][column]] == sorted({*values})
        for value, found in held_out.report["parts"][column].items():
            mine = values == value
            only = [int((one & ~other)[mine].sum()) for one, other in ((base, tuned), (tuned, base))]
            assert [found["only base"], found["only fine-tuned"]] == only and found["n"] == mine.sum()
            assert found["difference"][0] == pytest.approx(tuned[mine].mean() - base[mine].mean())
            assert found["p"] == pytest.approx(slow_mcnemar(*only))
            for name, correct, rows in zip(compare.NAMES, (base, tuned), held_out.test, strict=True):
                k, n = int(correct[mine].sum()), int(mine.sum())
                assert found[name]["accuracy"] == pytest.approx([k / n, *binomtest(k, n).proportion_ci(0.95, "exact")])
                assert found[name]["raw"] == pytest.approx(arrays(rows)[2][mine].mean())


def test_rows_that_a_model_could_not_score_are_left_out_of_both_and_counted(held_out):
    assert held_out.report["left_out"] == 2 and held_out.report["rows"] == 560
    assert "2 rows left out, as a model could not score them" in held_out.out


@pytest.mark.study
def test_the_command_writes_the_same_report_and_six_figures_and_twice_the_same_bytes(held_out, tmp_path, monkeypatch):
    figure, captions = plotting.figure, []
    monkeypatch.setattr(
        plotting, "figure", lambda p, c, *rest, **more: captions.append(c) or figure(p, c, *rest, **more)
    )
    argv = [*held_out.paths, "--calibrate-on", *held_out.calibrate_on, "--rows", held_out.folder / "table.csv"]
    argv += ["--by", "kind", "kind,half", "--output-dir", tmp_path / "out"]
    brief = command(*argv)
    assert (brief.code, brief.err) == (0, "") and brief.out.startswith(comparison_text.summary(held_out.report))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {*before} == FILES and before["reliability_raw.png"].startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads(before["report.json"]) == json.loads(json.dumps(held_out.report))
    full = command(*argv, "--verbose", "--images", tmp_path / "pictures")
    assert full.out.startswith(held_out.out) and "report.json and six figures, in" in full.out
    after = [*(tmp_path / "out").iterdir(), *(tmp_path / "pictures").iterdir()]
    assert len(after) == 13 and all(before[path.name] == path.read_bytes() for path in after)
    for caption, protocol in zip(
        captions, 2 * (["nothing"] + ["held-out"] * 2 + ["nothing"] + ["held-out"] * 2), strict=True
    ):
        assert "n = 560 in 500 groups" in caption and "base.jsonl and tuned.jsonl" in caption, caption
        assert protocol in caption and caption.isprintable()


# Fine-tuning or a temperature


def test_a_model_that_knows_more_is_said_to_and_one_that_knows_less_to_have_been_harmed(quick, held_out, tmp_path):
    assert "With a temperature for each model, fine-tuning helped. The base model needed it." in held_out.out
    assert "With its own calibrator for each model, fine-tuning helped." in held_out.out
    assert held_out.report["right"]["all rows"]["p"] < 0.001
    (base, tuned), (cal, tuned_cal) = held_out.test, held_out.cal
    swap = [changed(rows, **fields) for rows, fields in ((tuned, BASE), (base, TUNED), (tuned_cal, BASE), (cal, TUNED))]
    found = compared(tmp_path, *swap[:2], swap[2:])
    assert "With a temperature for each model, fine-tuning did harm" in found.out
    before, after = held_out.report["scores"]["raw"]["paired"], found.report["scores"]["raw"]["paired"]
    for key in before:
        value, low, high = before[key]["difference"]
        assert after[key]["difference"] == pytest.approx([-value, -high, -low], abs=1e-12)
    assert found.report["right"]["all rows"]["p"] == held_out.report["right"]["all rows"]["p"]


def test_the_base_model_at_another_temperature_is_no_gain_of_fine_tuning(quick, tmp_path):
    truth, (view, _) = views(700, 3)
    found = compared(tmp_path, rows_of(truth, 3 * view, **BASE), rows_of(truth, view, **TUNED))
    steps, models = found.report["steps"]["temperature"], found.report["models"]
    assert steps[STEPS[0]][2] < 0 and steps[STEPS[3]][2] < 0  # it looks like a gain
    assert steps[STEPS[1]] == pytest.approx([0, 0, 0], abs=1e-6)
    for what in ("a temperature", "its own calibrator"):
        said = (
            f"With {what} for each model, fine-tuning adds nothing that these rows can show. The base model needed it."
        )
        assert said in found.out
    assert "-0.000" not in found.out  # a nothing has no sign
    assert "fine-tuning helped" not in found.out and found.report["right"]["all rows"]["p"] == 1
    assert models["base"]["temperature"] == pytest.approx(3 * models["fine-tuned"]["temperature"], rel=1e-4)
    for row in found.report["guarantees"]:
        assert row["share"]["difference"] == pytest.approx([0, 0, 0], abs=1e-6)


# Protocols and shapes


@pytest.fixture(scope="module")
def cross_fitted(tmp_path_factory):
    """210 rows of three labels, 30 of them twice, one file a model, with hostile names."""
    base, tuned = [copies(rows, 30) for rows in pair(210, 7, labels=THREE, noise=(0.9, 0.5))]
    base = changed(base, model=HOSTILE, task="\x1b[1mt")
    tuned = changed(tuned, model=f"{HOSTILE} tuned", task="\x1b[1mt")
    found = compared(tmp_path_factory.mktemp("cross"), base, tuned)
    found.test = (base, tuned)
    return found


def test_one_file_a_model_is_cross_fitted_keeping_groups_out_of_their_own_calibrator(cross_fitted):
    report, out = cross_fitted.report, cross_fitted.out
    assert report["protocol"] == "out-of-fold" and report["calibrated_on"] is None and report["parts"] == {}
    assert "n = 240 in 210 groups, out-of-fold" in out and "so in-sample" in out and "\nBy " not in out
    assert "calibrators cross-fitted, each row by calibrators that did not see its group" in out
    assert report["scores"]["calibrated"]["fine-tuned"]["protocol"] == "out-of-fold"
    assert not re.search(r"[^\n -~]", out) and "\nerror: forged" not in out  # whatever the names
    groups = np.array([*range(210), *range(30)])
    for name, rows in zip(compare.NAMES, cross_fitted.test, strict=True):
        p, truth, *_, correct = arrays(rows)
        out_of_fold = np.empty(240)
        for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(p, truth, groups):
            out_of_fold[test] = by_temperature(p[train], truth[train], p[test])[0]
        found = report["scores"]["temperature"]["paired"]["log loss"][name][0]
        seen = log_loss(correct, by_temperature(p, truth, p)[0])
        assert found == pytest.approx(log_loss(correct, out_of_fold), abs=1e-6) and abs(found - seen) > 1e-4


def test_of_three_labels_the_log_loss_of_the_true_label_is_told_too(cross_fitted, held_out):
    found = cross_fitted.report["scores"]["raw"]["paired"]["log loss of the true label"]
    for name, rows in zip(compare.NAMES, cross_fitted.test, strict=True):
        p, truth, *_ = arrays(rows)
        assert found[name][0] == pytest.approx(-np.log(p[range(len(p)), truth]).mean())
    assert "log loss of the true label" not in held_out.report["scores"]["raw"]["paired"]


def test_a_tuned_model_without_any_error_is_compared_and_the_missing_calibrator_named(quick, tmp_path):
    base, tuned = pair(260, 8)
    right = changed(tuned, prediction=lambda r, i: r["label"], confidence=0.97)
    right = changed(right, probabilities=lambda r, i: {x: 0.97 if x == r["label"] else 0.03 for x in LABELS})
    found = compared(tmp_path, base, right)
    assert found.report["models"]["fine-tuned"]["calibrator"].startswith("raw, as every row")
    raw, guarantee = found.report["scores"]["raw"]["paired"], found.report["guarantees"][2]
    assert raw["accuracy"]["fine-tuned"][0] == 1 and raw["AUROC"]["fine-tuned"] == [None] * 3
    assert raw["AUROC"]["difference"][0] is None
    assert guarantee["fine-tuned"]["measured"]["share"] == 1 and guarantee["base"]["threshold"]["value"] is None
    assert "nan" not in found.out and "inf" not in found.out


def test_a_calibrator_that_cannot_be_fitted_leaves_its_picture_and_says_so(held_out):
    panels = comparison_figures.reliability_panels(held_out.comparison, {}, "isotonic")
    wanted = [f"{name}, isotonic\ncannot be fitted to both models here" for name in compare.NAMES]
    assert [panel.title for panel in panels] == wanted and not any(panel.bins for panel in panels)


# Our own dataset


def test_the_recorded_predictions_are_meant_by_default_and_broken_down_wherever_one_stands(
    quick, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done, out = command(), tmp_path / "comparison_report"
    assert (done.code, done.err) == (0, "") and {path.name for path in out.iterdir()} == FILES
    assert len(done.out.splitlines()) <= 56 and max(map(len, done.out.splitlines())) <= 120
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert (report["rows"], report["groups"], report["calibration_rows"], report["left_out"]) == (2000, 603, 1000, 0)
    assert "both fingerprints stand in" in report["prompt"] and report["settings"]["groups"].endswith("splits.csv")
    assert len(report["first_tokens"]) == 2
    parts, table = report["parts"], [row for _, row in tables.read_rows("data:test")]
    neutral = [row for row in table if row["difficulty"] == "neutral"]
    assert [*parts] == ["category", "difficulty,part", compare.PLANTED_RULE]
    assert {*parts["category"]} == {row["category"] for row in table}
    counts = {name: sum(row["domain"] == name for row in neutral) for name in ("sports", "workplace")}
    counts["randomly labelled"] = parts["difficulty,part"]["neutral, other"]["n"]
    assert sum(counts.values()) == len(neutral)
    assert {name: found["n"] for name, found in parts[compare.PLANTED_RULE].items()} == counts


# What is refused

SHORT = pair(40, 12)
CAL = pair(40, 13, "c")
OTHER = {"fingerprint": "cccc3333"}
SEEN = [
    [*cal, rows[0] | {"id": "seen", "text": f" {rows[0]['text'].upper()}"}]
    for cal, rows in zip(CAL, SHORT, strict=True)
]
WRONG = changed(SHORT[0], label=lambda r, i: min(r["probabilities"], key=r["probabilities"].get))
TURNED = changed(SHORT[1], probabilities=lambda r, i: dict(reversed(r["probabilities"].items())))
MIXED = [*SHORT[1][:-1], SHORT[1][-1] | OTHER]
REFUSED = {
    "the same model": (SHORT[0], SHORT[0], None, "both have the fingerprint aaaa1111: it is one model"),
    "mixed fingerprints": (SHORT[0], MIXED, None, "row 'r39' of the fine-tuned file has"),
    "a row too few": (SHORT[0], SHORT[1][:-1], None, "row 'r39' of the base file is not in the fine-tuned file"),
    "another label": (SHORT[0], changed(SHORT[1], label="negative"), None, "its text, label or task differs"),
    "another method": (SHORT[0], changed(SHORT[1], method="x"), None, "by method 'x', another by 'logprobs'"),
    "another order of labels": (SHORT[0], TURNED, None, "row 'r0': the labels of the two files differ"),
    "no labels": (*(changed(rows, label=None) for rows in SHORT), None, "40 of 40 rows have no label"),
    "no scores": ([unscored(row) for row in SHORT[0]], SHORT[1], None, "no row was scored by both models"),
    "all wrong": (WRONG, changed(WRONG, **TUNED), None, "base.jsonl: all 40 rows are wrong"),
    "empty": (SHORT[0], [], None, "tuned.jsonl holds no predictions"),
    "calibrated by another model": (*SHORT, (CAL[1], CAL[0]), "base_cal.jsonl is not by the model, task and settings"),
    "calibrated on test rows": (*SHORT, SEEN, "1 rows of"),
}


@pytest.mark.parametrize(("base", "tuned", "calibrate_on", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_files_that_cannot_be_compared_are_refused(base, tuned, calibrate_on, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        compared(tmp_path, base, tuned, calibrate_on)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_further_files_get_a_column_with_differences_from_the_first_model(quick, tmp_path):
    truth, (one, two) = views(240, 5)
    words = {"method": "words", "model": "bag of words", "fingerprint": "cccc3333"}
    base, tuned = pair(240, 5)
    third = rows_of(truth, one + two, seed=5, **words)  # knows what both know
    cal_truth, (cal_one, cal_two) = views(120, 6)
    known = save(tmp_path / "known.jsonl", rows_of(cal_truth, cal_one + cal_two, "k", seed=6, **words))
    path = save(tmp_path / "words.jsonl", third[::-1])
    cal = pair(200, 7, "c")
    found = compared(tmp_path, base, tuned, cal, also=[[path], [path, known]])
    models = found.report["all_models"]
    assert [*models] == ["base", "fine-tuned", "words", "words 2"]
    (p, y, _, right), (q, _, d, right_too) = arrays(base), arrays(third)
    losses = [log_loss(y, of, labels=[0, 1]) for of in (p, q)]
    scores, apart = models["words"]["scores"], models["words"]["minus base"]
    assert scores["accuracy"][0] == pytest.approx(right_too.mean())
    assert scores["log loss of the true label"][0] == pytest.approx(losses[1])
    assert scores["AUROC of the confidence"][0] == pytest.approx(roc_auc_score(right_too, d))
    assert apart["accuracy"][0] == pytest.approx(right_too.mean() - right.mean())
    assert apart["log loss of the true label"][0] == pytest.approx(losses[1] - losses[0])
    assert apart["log loss of the true label"][2] < 0  # beyond doubt
    assert models["base"]["minus base"]["accuracy"] == [0, 0, 0]
    assert models["words"]["guarantees"] == [] and models["words"]["about"]["calibrator"] == "none"
    chosen = models["words 2"]["guarantees"][0]
    assert chosen["threshold"]["n"] == 120 and chosen["target"] == compare.TARGETS[0]
    (table,) = re.findall(r"All models, .*?\n\n", found.out, re.S)
    assert f"{scores['accuracy'][0]:.3f}" in table and "words 2" in table and "in-sample" not in table
    crossed = compared(tmp_path, base, tuned, also=[[path]])
    (row, *_) = crossed.report["all_models"]["words"]["guarantees"]
    assert row["threshold"]["n"] == 240 and "in-sample where these rows chose" in crossed.out


def test_further_files_of_other_rows_or_of_rows_that_calibrate_them_are_refused(tmp_path):
    tested = predictions.read(save(tmp_path / "base.jsonl", SHORT[0]))
    words = {"method": "words", "fingerprint": "cccc3333"}
    third = changed(SHORT[0], **words)
    path = save(tmp_path / "words.jsonl", third)
    for rows, more, message in (
        (third[:-1], [], "row 'r39' of the base file is not in the further file"),
        (changed(third, label="negative"), [], "its text, label or task differs"),
        ([*third[:-1], unscored(third[-1])], [], "row 'r39' was not scored"),
        (third, [path], r"rows of .*further\.jsonl are in .*words\.jsonl too"),
        (third, [save(tmp_path / "other.jsonl", CAL[0])], "other.jsonl is not by the model, task and settings of"),
    ):
        other = save(tmp_path / "further.jsonl", rows)
        with pytest.raises(ValueError, match=message):
            compare.further_model(other, *more, tested=tested, protocol="out-of-fold")


def test_near_duplicates_of_calibration_rows_are_counted(quick, tmp_path):
    near = [row["text"] + " indeed" for row in SHORT[0][:3]]
    cal = [changed(rows, text=lambda r, i: near[i] if i < 3 else r["text"]) for rows in CAL]
    found = compared(tmp_path, *SHORT, cal)
    assert found.report["near_duplicates_of_calibration_rows"] == 3
    assert "3 test rows have a near-duplicate among the calibration rows" in found.out


FLAGS = {
    "one": "two predictions files are compared: BASE and FINE_TUNED",
    "--calibrate-on base.jsonl base.jsonl": "--calibrate-on goes with BASE and FINE_TUNED",
    "base.jsonl folder": "folder: Is a directory",
    "--volume 0": "--volume 0",
    "--also a.jsonl b.jsonl c.jsonl": "--also FILE [CALIBRATION_FILE]: once for each file",
    "--by kind": "--by needs --rows TABLE",
    "--rows none.csv": "no such file: none.csv",
    "--rows noid.csv": "--rows needs the column id; it has name",
    "--rows twice.csv": "the id 'r0' stands twice",
    "--rows other.csv": "other.csv does not hold the row 'r0' with its text",
    "--rows table.csv --by kind,size": "--by kind,size: not every row of table.csv has the column 'size'",
    "--groups few.csv": "few.csv",
    "--images noid.csv": "--images noid.csv is a file",
    "--adapter folder": "folder/training_config.json: No such file",
    "--first-tokens none.jsonl none.jsonl": "no such file: none.jsonl",
}


@pytest.mark.parametrize(("flags", "message"), FLAGS.items(), ids=FLAGS.keys())
def test_flags_that_make_no_sense_are_refused_and_nothing_is_written(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("noid.csv").write_text("name\nr0\n")
    Path("few.csv").write_text("id,kind\nr0,a\n")
    Path("twice.csv").write_text("id,kind\nr0,a\nr0,b\n")
    Path("table.csv").write_text("id,kind\n" + "".join(f"{row['id']},a\n" for row in SHORT[0]))
    Path("other.csv").write_text("id,text\n" + "".join(f"{row['id']},another text\n" for row in SHORT[0]))
    Path("folder").mkdir()
    save(Path("base.jsonl"), SHORT[0]), save(Path("tuned.jsonl"), SHORT[1])
    has_files = "BASE" in message or "Is a directory" in message
    files = [] if has_files else ["base.jsonl", "tuned.jsonl"]
    done = command(*files, "--output-dir", "out", *flags.split())
    assert done.code == 2 and done.out == "" and not Path("out").exists()
    assert message in done.err and done.err.startswith("error: ") and done.err.count("\n") == 1


# The prompt


PROMPTS = {
    "another tuned": ({"base": "aaaa1111", "tuned": "ffff0000"}, "tuned.jsonl has the fingerprint bbbb2222, "),
    "places changed": ({"base": "bbbb2222", "tuned": "aaaa1111"}, "change their places"),
    "one": ({"base": "aaaa1111"}, "says None of the fine-tuned model"),
    "none": (None, "training_config.json: fingerprints of base and tuned"),
}


@pytest.mark.parametrize(("record", "message"), PROMPTS.values(), ids=PROMPTS.keys())
def test_another_prompt_than_the_training_s_is_refused_and_the_file_named(record, message, tmp_path):
    (tmp_path / "training_config.json").write_text(json.dumps({"fingerprints": record}))
    with pytest.raises(ValueError, match=message):
        compared(tmp_path, *SHORT, adapter=str(tmp_path))


def test_how_the_prompt_was_checked_is_said(tmp_path):
    path, paths = tmp_path / "training_config.json", ("base.jsonl", "tuned.jsonl")
    path.write_text(json.dumps({"task": {}, "fingerprints": {"base": "aaaa1111", "tuned": "bbbb2222"}}))
    votes = [changed(rows, method="consistency") for rows in SHORT]
    asked, voted = ([predictions.read(save(tmp_path / "p.jsonl", rows)) for rows in both] for both in (SHORT, votes))
    said = compare.check_prompt(str(tmp_path), paths, asked)
    assert f"both fingerprints stand in {path}" in said
    assert "by task name and method only; --adapter FOLDER" in compare.check_prompt("none", paths, asked)
    with pytest.raises(ValueError, match="knows the prompt of Method 1"):
        compare.check_prompt(str(tmp_path), paths, voted)


@pytest.mark.parametrize(("only_base", "only_tuned", "p"), [(0, 0, 1), (1, 0, 1), (0, 5, 2 / 32), (3, 12, 576 / 16384)])
def test_mcnemar_on_numbers_done_by_hand(only_base, only_tuned, p):
    both = [(True, True)] * 4 + [(True, False)] * only_base + [(False, True)] * only_tuned + [(False, False)] * 2
    base, tuned = np.array(both).T
    assert compare.mcnemar(base, tuned)["p"] == pytest.approx(p)
    assert compare.mcnemar(tuned, base)["p"] == pytest.approx(p)


def test_intervals_of_the_log_loss_difference_cover_the_truth(monkeypatch):
    # Two views of known quality; the truth is the mean over 200,000 rows, the interval must hold it 19 times in 20.
    few_resamples(monkeypatch, 200)

    def losses(n, seed):
        truth, scores = views(n, seed)
        return dict(zip(compare.NAMES, (-np.log(softmax(s, axis=1))[range(n), truth] for s in scores), strict=True))

    many, held = losses(200_000, 6), 0
    for repeat in range(100):
        drawn, few = SimpleNamespace(groups=np.arange(150), seed=repeat), losses(150, 1000 + repeat)
        found = compare.paired(drawn, lambda name, rows, few=few: {"loss": few[name][rows].mean()})
        _, low, high = found["loss"]["difference"]
        held += low <= (many["fine-tuned"] - many["base"]).mean() <= high
    assert held >= 88


def test_one_file_alone_or_calibration_rows_alone_are_refused(tmp_path):
    path = save(tmp_path / "base.jsonl", SHORT[0])
    for argv, message in (
        ([path], "two predictions files are compared: BASE and FINE_TUNED"),
        (["--calibrate-on", path, path], "--calibrate-on goes with BASE and FINE_TUNED"),
        ([path, tmp_path], f"{tmp_path}: Is a directory"),
    ):
        done = command(*argv, "--output-dir", tmp_path / "out")
        assert done.code == 2 and message in done.err and done.err.count("\n") == 1 and not (tmp_path / "out").exists()
