"""compare_base_vs_finetuned.py: was it the fine-tuning or would a temperature have done it, and is every number right?

Pairs of models with a planted relation are written as plain predictions files: one that knows more than the other, one
that is the other at another temperature, one that is the other under another name. What is said of them is counted
again by loops, by scikit-learn and by binomial coefficients.
"""

import json
import math
import re
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, softmax
from scipy.stats import binom, binomtest
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

import calibration
import calibration_metrics
import command_line
import compare_base_vs_finetuned as compare
import plotting
import predictions
import tables
import task

ROOT = Path(__file__).parent.parent
FIGURES = {"accuracy_comparison", "calibration_error_comparison", "confidence_distributions"}
FIGURES |= {"reliability_raw", "reliability_platt", "reliability_isotonic"}
FILES = {f"{name}.png" for name in FIGURES} | {"report.json"}
LABELS, THREE = ("negative", "positive"), ("bad", "fair", "good")
BASE, TUNED = {"model": "m", "fingerprint": "aaaa1111"}, {"model": "m + adapter", "fingerprint": "bbbb2222"}
STEPS = ("what it does for the base model", "what fine-tuning does beyond it", "what the tuned model lacks without it")
HOSTILE = "m$\\frac{$ 100% \x1b[31mred\x1b]0;title\x07\r\nerror: forged"
RESAMPLES = calibration_metrics.resamples


def views(n, seed, labels=LABELS, noise=(1.5, 0.8)):
    """(truth [n], log-odds [2, n, labels]): two honest views of the same truth, by default the second sees more.

    A view is normal around 1 in the true label's place with sd s, so the log-odds of a label are its place / s^2.
    """
    draw = np.random.default_rng(seed)
    truth = draw.integers(len(labels), size=n)
    at = np.eye(len(labels))[truth]
    return truth, [(at + draw.normal(0, s, at.shape)) / s**2 for s in noise]


def rows_of(truth, scores, name="r", labels=LABELS, seed=0, **fields):
    """Predictions whose probabilities are the softmax of `scores`; texts of random words, no two alike."""
    words = np.random.default_rng([seed, len(truth)]).choice(list("abcdefghijklmnopqrstuvwxyz"), (len(truth), 6, 7))
    rows = []
    for i, p in enumerate(softmax(scores, axis=1).tolist()):
        probabilities = dict(zip(labels, p, strict=True))
        prediction = max(probabilities, key=probabilities.get)
        row = {"id": f"{name}{i}", "text": " ".join(map("".join, words[i])), "label": labels[truth[i]]}
        row |= {"prediction": prediction, "confidence": probabilities[prediction], "probabilities": probabilities}
        rows.append(row | {"label_mass": 0.9, "method": "logprobs", "task": "t"} | fields)
    return rows


def pair(n, seed, name="r", over=(2.0, 1.5), lean=0.8, labels=LABELS, noise=(1.5, 0.8)):
    """The same rows by an overconfident, leaning base model and by one that knows more."""
    truth, (one, two) = views(n, seed, labels, noise)
    lean = lean * np.eye(len(labels))[-1]
    return (
        rows_of(truth, over[0] * one + lean, name, labels, seed, **BASE),
        rows_of(truth, over[1] * two, name, labels, seed, **TUNED),
    )


def changed(rows, **fields):
    """The rows with fields replaced; a function is given the row and its number."""
    return [row | {k: f(row, i) if callable(f) else f for k, f in fields.items()} for i, row in enumerate(rows)]


def copies(rows, n):
    """The rows and n of them again under other ids, in other case: near-duplicates."""
    return rows + changed(rows[:n], id=lambda r, i: f"copy-{r['id']}", text=lambda r, i: r["text"].upper())


def unscored(row):
    nulls = dict.fromkeys(("prediction", "confidence", "probabilities", "label_mass"))
    return row | nulls | {"error": "too long"}


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(*argv):
    """Run the script's main as the command line does."""
    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            command_line.run(lambda: compare.main([*map(str, argv)]))
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def compared(folder, base, tuned, *flags, calibrate_on=None):
    """A run on these rows; its report and printed text, or the error."""
    argv = [save(folder / "base.jsonl", base), save(folder / "tuned.jsonl", tuned), "--output-dir", folder / "out"]
    if calibrate_on:
        files = zip(("base_cal.jsonl", "tuned_cal.jsonl"), calibrate_on, strict=True)
        argv += ["--calibrate-on", *(save(folder / name, rows) for name, rows in files)]
    run = command(*argv, *flags)
    run.argv, run.folder = [*argv, *flags], folder / "out"
    run.report = json.loads((run.folder / "report.json").read_text("utf-8")) if run.code == 0 else None
    return run


def arrays(rows):
    """(probabilities, number of the true label, confidence, correct)."""
    truth = np.array([list(row["probabilities"]).index(row["label"]) for row in rows])
    p = np.array([[*row["probabilities"].values()] for row in rows])
    return p, truth, p.max(axis=1), p.argmax(axis=1) == truth


def cells(text, first, after=""):
    """The cells of the printed line that begins with that cell, after a heading."""
    lines = text[text.index(after) :].splitlines()
    return re.split(r"\s{2,}", next(x for x in lines if re.match(rf"\s*{re.escape(first)}(  |$)", x)).strip())


@pytest.fixture(scope="module", autouse=True)
def small():
    """Fewer resamples, fewer candidates to choose from, coarser pictures: what is tested does not depend on them."""
    real = calibration.recipes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "recipes", lambda n, method="auto": real(100, method))
        patch.setattr(plotting, "DPI", 30)
        patch.setattr(calibration_metrics, "resamples", lambda groups, n=0, seed=0: RESAMPLES(groups, 40, seed))
        yield


@pytest.fixture
def quick(monkeypatch):
    make_quick(monkeypatch)


def make_quick(monkeypatch):
    """Nothing drawn, the slow calibrators not shown, and one division into folds to choose by instead of five."""
    real = calibration.choose
    monkeypatch.setattr(
        calibration, "choose", lambda rows, groups, method, seeds: real(rows, groups, method, seeds[:1])
    )
    monkeypatch.setattr(compare, "draw", lambda *ignored: None)
    monkeypatch.setattr(compare, "CALIBRATORS", ("temperature", "platt"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """500 test rows, 60 of them twice, two unscored; 320 calibration rows, 40 twice; a breakdown by length."""
    folder = tmp_path_factory.mktemp("held_out")
    test, cal = [[copies(rows, n) for rows in pair(*size)] for *size, n in ((500, 1, "t", 60), (320, 2, "c", 40))]
    base, tuned = [
        [*rows, *changed(rows[:2], id=lambda r, i: f"x{i}", text=f"unscored {k}")] for k, rows in enumerate(test)
    ]
    base[-2:], tuned[-2:] = [unscored(base[-2]), base[-1]], [tuned[-2], unscored(tuned[-1])]
    tuned[-2:] = changed(tuned[-2:], text=lambda r, i: base[i - 2]["text"])
    table = folder / "table.csv"
    lines = [f"{row['id']},{'abc'[i % 3]},{i % 2}\n" for i, row in enumerate(base)]
    table.write_text("id,kind,half\n" + "".join(lines))
    argv = ("--rows", table, "--by", "kind", "kind,half")
    real, captions = plotting.figure, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plotting, "figure", lambda p, c, *rest, **flags: captions.append(c) or real(p, c, *rest, **flags))
        studies, measure = [], compare.measure
        patch.setattr(compare, "measure", lambda study, args: studies.append(study) or measure(study, args))
        found = compared(folder, base, tuned[::-1], *argv, calibrate_on=cal)
    found.sides = studies[0].sides
    found.test, found.cal, found.captions = test, cal, captions
    found.groups, found.fit_groups = np.array([*range(500), *range(60)]), np.array([*range(320), *range(40)])
    return found


def by_temperature(fit, truth, asked):
    """(P(most probable label) [n] of the asked probabilities, temperature) by the temperature that scipy finds."""
    scores = np.log(np.clip(fit, 1e-6, 1))

    def loss(t):
        return -np.mean(np.log(softmax(scores / t, axis=1))[range(len(truth)), truth])

    t = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}).x
    return softmax(np.log(np.clip(asked, 1e-6, 1)) / t, axis=1).max(axis=1), t


def slow_ece(confidence, correct):
    error = 0.0
    for i in range(20):
        inside = [c >= i / 20 and (c < (i + 1) / 20 or i == 19) for c in confidence]
        if any(inside):
            error += abs(correct[inside].mean() - confidence[inside].mean()) * sum(inside) / len(inside)
    return error


def slow_aurc(confidence, correct):
    order = np.argsort(-confidence, kind="stable")  # no two are equal here but for copies, which are equally right
    return np.mean([(~correct[order][:k]).mean() for k in range(1, len(order) + 1)])


def slow_mcnemar(only_base, only_tuned):
    n = only_base + only_tuned
    tail = sum(math.comb(n, k) for k in range(min(only_base, only_tuned) + 1)) / 2**n
    return min(1.0, 2 * tail)


# Every number


def test_the_files_are_these_and_no_others(held_out):
    assert (held_out.code, held_out.err) == (0, "")
    assert {path.name for path in held_out.folder.iterdir()} == FILES
    for name in FIGURES:
        assert (held_out.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert held_out.out.rstrip().endswith(f"Written: report.json and six figures, in {held_out.folder}")


def test_the_scores_of_both_models_and_their_differences_are_counted_again(held_out):
    raw = held_out.report["scores"]["raw"]["paired"]
    truths = []
    for name, rows in zip(("base", "tuned"), held_out.test, strict=True):
        *_, c, correct = arrays(rows)
        truth = {"accuracy": correct.mean(), "mean confidence": c.mean(), "log loss": log_loss(correct, c)}
        truth |= {"Brier": brier_score_loss(correct, c), "AUROC": roc_auc_score(correct, c)}
        truth |= {"ECE": slow_ece(c, correct), "AURC": slow_aurc(c, correct)}
        assert {key: raw[key][name][0] for key in truth} == pytest.approx(truth, abs=1e-9)
        truths.append(truth)
    for key in truths[0]:
        assert raw[key]["difference"][0] == pytest.approx(truths[1][key] - truths[0][key], abs=1e-9)
        value, low, high = raw[key]["difference"]
        assert low <= high and (key == "ECE" or low <= value <= high)
        line = cells(held_out.out, key, "Raw, n = 560 in 500 groups, nothing fitted")
        assert line[-1].startswith(f"{value:+z.3f} [") and line[1].startswith(f"{truths[0][key]:.3f} ")


def test_the_rows_that_one_model_alone_has_right_and_the_exact_test_are_counted_again(held_out):
    (*_, base), (*_, tuned) = map(arrays, held_out.test)
    for name, rows in (("all rows", np.arange(560)), ("one row of each group", np.arange(500))):
        b, t, found = base[rows], tuned[rows], held_out.report["right"][name]
        counts = [int(x.sum()) for x in (b & t, b & ~t, t & ~b, ~b & ~t)]
        assert [found[key] for key in ("both", "only_base", "only_tuned", "neither")] == counts
        assert found["n"] == len(rows) and found["p"] == pytest.approx(slow_mcnemar(*counts[1:3]))
        assert cells(held_out.out, name) == [name, *(f"{x:,}" for x in (len(rows), *counts)), f"{found['p']:.2g}"]


@pytest.mark.parametrize(("only_base", "only_tuned", "p"), [(0, 0, 1), (1, 0, 1), (0, 5, 2 / 32), (3, 12, 576 / 16384)])
def test_mcnemar_on_numbers_done_by_hand(only_base, only_tuned, p):
    both = [(True, True)] * 4 + [(True, False)] * only_base + [(False, True)] * only_tuned + [(False, False)] * 2
    base, tuned = np.array(both).T
    assert compare.mcnemar(base, tuned)["p"] == pytest.approx(p)
    assert compare.mcnemar(tuned, base)["p"] == pytest.approx(p)


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
    for name, cal, test in zip(("base", "tuned"), held_out.cal, held_out.test, strict=True):
        asked, *_, correct = arrays(test)
        c, t = by_temperature(*arrays(cal)[:2], asked)
        assert held_out.report["models"][name]["temperature"] == pytest.approx(t, rel=1e-4)
        truths = [log_loss(correct, c), brier_score_loss(correct, c), slow_ece(c, correct)]
        ours = [found["paired"][key][name][0] for key in ("log loss", "Brier", "ECE")]
        assert ours[:2] == pytest.approx(truths[:2], abs=1e-6) and ours[2] == pytest.approx(truths[2], abs=1e-3)
        assert found[name]["protocol"] == "held-out" and 0 < found[name]["ece_noise_floor"] < 0.1
    assert {*held_out.report["scores"]} == {"raw", *compare.CALIBRATORS, "calibrated"}


def test_the_steps_from_base_to_tuned_are_differences_of_log_losses_and_add_up(held_out):
    loss = {}
    for k, (cal, test) in enumerate(zip(held_out.cal, held_out.test, strict=True)):
        asked, _, raw, correct = arrays(test)
        loss[k] = log_loss(correct, raw), log_loss(correct, by_temperature(*arrays(cal)[:2], asked)[0])
    truths = [loss[0][1] - loss[0][0], loss[1][1] - loss[0][1], loss[1][0] - loss[1][1]]
    for key, found in held_out.report["steps"].items():
        *three, whole = [value for value, _, _ in found.values()]
        assert whole == pytest.approx(sum(three), abs=1e-9) == loss[1][0] - loss[0][0]
        if key == "temperature":
            assert [found[name][0] for name in STEPS] == pytest.approx(truths, abs=1e-6)


def test_sure_answers_and_dollars_are_counted_again(held_out):
    report = held_out.report
    for k, name in enumerate(("base", "tuned")):
        *_, c, correct = arrays(held_out.test[k])
        for gate, row in zip((0.9, 0.95), report["sure"]["raw"][name], strict=True):
            taken = c >= gate
            low, high = binomtest(int(correct[taken].sum()), int(taken.sum())).proportion_ci(0.95, "exact")
            assert (row["automated"], row["right"]) == (taken.sum(), correct[taken].sum())
            assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx((low, high))
            line = cells(held_out.out, f"raw, {gate:.0%} or more", "Sure answers")
            shown = [f"{taken.sum()}", f"{correct[taken].mean():.3f} [{low:.3f}, {high:.3f}]"]
            assert line[1 + 2 * k : 3 + 2 * k] == shown
        row, money = report["money"][name], report["money"]["dollars"]
        assert row["review_dollars"] == pytest.approx(5000 * (1 - row["share"]))
        assert row["error_dollars"] == pytest.approx(25000 * row["share"] * (1 - row["accuracy"]))
        assert money[name][0] == pytest.approx(row["review_dollars"] + row["error_dollars"])
        assert row["automate_everything"] == pytest.approx(25000 * (~correct).mean())
    assert money["difference"][0] == pytest.approx(money["tuned"][0] - money["base"][0])
    assert report["money"]["threshold"] == 0.8 and report["money"]["review_everything"] == 5000


def slow_promise(confidence, correct, target):
    """The lowest threshold of every 2 % of rank, from the strictest down until the exact test fails."""
    n, best = len(confidence), None
    for percent in range(2, 101, 2):
        value = sorted(confidence, reverse=True)[math.ceil(n * percent / 100) - 1]
        taken = confidence >= value
        k, errors = int(taken.sum()), int((~correct[taken]).sum())
        if k < n / 10 or target**k > 0.05:
            continue
        if binom.cdf(errors, k, 1 - target) > 0.05:
            break
        best = value
    return best


def test_promises_come_from_cross_fitted_scores_of_one_row_of_each_group_and_are_measured_on_all(held_out):
    sides, alone = held_out.sides, np.unique(held_out.fit_groups, return_index=True)[1]
    for found in held_out.report["promises"]:
        for k, (name, side) in enumerate(zip(("base", "tuned"), sides, strict=True)):
            *_, correct = arrays(held_out.cal[k])
            assert (side.choosing_correct == correct).all() and len(side.choosing) == 360
            value = slow_promise(side.choosing[alone], correct[alone], found["target"])
            ours = found[name]["threshold"]
            assert ours["n"] == 320 and ours["value"] == (None if value is None else pytest.approx(value))
            share = 0.0
            if value is not None:
                *_, right = arrays(held_out.test[k])
                taken = side.confidence["calibrated"] >= value
                assert found[name]["measured"]["right"] == right[taken].sum()
                share = taken.mean()
            assert found["share"][name][0] == pytest.approx(share)
        assert found["share"]["difference"][0] == pytest.approx(found["share"]["tuned"][0] - found["share"]["base"][0])
    assert [found["target"] for found in held_out.report["promises"]] == [0.8, 0.9, 0.95]
    assert held_out.report["promises"][1]["tuned"]["threshold"]["value"] is not None


def test_choosing_scores_are_out_of_fold(held_out):
    # By a calibrator that saw the row, log losses on the fit rows would be those of the refitted one.
    side = held_out.sides[0]
    p, truth, *_, correct = arrays(held_out.cal[0])
    seen = side.recipe.estimator().fit(p, truth) if side.recipe.class_aware else None
    assert seen is not None and log_loss(correct, side.choosing) > log_loss(correct, seen.predict(p))


def test_parts_are_counted_again(held_out):
    (*_, base), (*_, tuned) = map(arrays, held_out.test)
    kinds = np.array(["abc"[i % 3] for i in range(560)])
    both = np.array([f"{kind}, {i % 2}" for i, kind in enumerate(kinds)])
    assert [*held_out.report["parts"]] == ["kind", "kind,half"]
    for column, values in (("kind", kinds), ("kind,half", both)):
        assert [*held_out.report["parts"][column]] == sorted({*values})
        for value, found in held_out.report["parts"][column].items():
            mine = values == value
            assert found["n"] == mine.sum()
            assert found["difference"][0] == pytest.approx(tuned[mine].mean() - base[mine].mean())
            assert (found["only_base"], found["only_tuned"]) == (
                (base & ~tuned)[mine].sum(),
                (tuned & ~base)[mine].sum(),
            )
            assert found["p"] == pytest.approx(slow_mcnemar(found["only_base"], found["only_tuned"]))
            for name, correct, rows in (("base", base, held_out.test[0]), ("tuned", tuned, held_out.test[1])):
                k, n = int(correct[mine].sum()), int(mine.sum())
                low, high = binomtest(k, n).proportion_ci(0.95, "exact")
                assert found[name]["accuracy"] == pytest.approx([k / n, low, high])
                assert found[name]["raw"] == pytest.approx(arrays(rows)[2][mine].mean())


def test_rows_that_a_model_could_not_score_are_left_out_of_both_and_counted(held_out):
    assert held_out.report["left_out"] == 2 and held_out.report["rows"] == 560
    assert "2 rows left out, as a model could not score them" in held_out.out


def test_every_caption_says_its_n_its_files_and_its_protocol(held_out):
    assert len(held_out.captions) == 6
    for caption, protocol in zip(
        held_out.captions, ["nothing"] + ["held-out"] * 2 + ["nothing"] + ["held-out"] * 2, strict=True
    ):
        assert "n = 560 in 500 groups" in caption and "base.jsonl and tuned.jsonl" in caption, caption
        assert protocol in caption and caption.isprintable()


def test_the_same_command_twice_gives_the_same_bytes(held_out):
    before = {path.name: path.read_bytes() for path in held_out.folder.iterdir()}
    assert command(*held_out.argv).out == held_out.out
    assert before == {path.name: path.read_bytes() for path in held_out.folder.iterdir()}


# Fine-tuning or a temperature


def test_a_model_that_knows_more_is_said_to_and_by_how_much(held_out):
    assert "With a temperature for each model, fine-tuning helped. The base model needed it." in held_out.out
    assert "With its own calibrator for each model, fine-tuning helped." in held_out.out
    assert held_out.report["right"]["all rows"]["p"] < 0.001


def test_the_base_model_at_another_temperature_is_no_gain_of_fine_tuning(quick, tmp_path):
    truth, (view, _) = views(700, 3)
    base = rows_of(truth, 3 * view, **BASE)
    tuned = rows_of(truth, view, **TUNED)
    run = compared(tmp_path, base, tuned)
    found = run.report["steps"]["temperature"]
    assert found[STEPS[0]][2] < 0 and found["together: tuned raw - base raw"][2] < 0  # it looks like a gain
    assert found[STEPS[1]] == pytest.approx([0, 0, 0], abs=1e-6)
    for what in ("a temperature", "its own calibrator"):
        said = (
            f"With {what} for each model, fine-tuning adds nothing that these rows can show. The base model needed it."
        )
        assert said in run.out
    assert "fine-tuning helped" not in run.out and run.report["right"]["all rows"]["p"] == 1
    assert run.report["models"]["base"]["temperature"] == pytest.approx(
        3 * run.report["models"]["tuned"]["temperature"], rel=1e-4
    )
    for found in run.report["promises"]:
        assert found["share"]["difference"] == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_model_without_the_base_model_s_lean_needs_a_calibrator_not_fine_tuning(quick, tmp_path):
    # Only the calibrator of P(label) can tell: a temperature keeps the lean, so fine-tuning looks needed there.
    truth, (view, _) = views(900, 4, noise=(1.0, 1.0))
    run = compared(tmp_path, rows_of(truth, view + np.array([0, 2.0]), **BASE), rows_of(truth, view, **TUNED))
    assert "With a temperature for each model, fine-tuning helped" in run.out
    lost = run.report["steps"]["calibrated"][STEPS[0]][0], run.report["steps"]["calibrated"][STEPS[1]][0]
    assert lost[0] < -0.05 and lost[1] > -0.03


def test_a_model_that_knows_less_is_said_to_have_been_harmed(quick, held_out, tmp_path):
    (base, tuned), (cal, tuned_cal) = held_out.test, held_out.cal
    swap = [changed(rows, **fields) for rows, fields in ((tuned, BASE), (base, TUNED), (tuned_cal, BASE), (cal, TUNED))]
    run = compared(tmp_path, *swap[:2], calibrate_on=swap[2:])
    assert "With a temperature for each model, fine-tuning did harm" in run.out
    before, after = held_out.report["scores"]["raw"]["paired"], run.report["scores"]["raw"]["paired"]
    for key in before:
        assert after[key]["difference"][0] == pytest.approx(-before[key]["difference"][0], abs=1e-12)
        low, high = before[key]["difference"][1:]
        assert after[key]["difference"][1:] == pytest.approx([-high, -low], abs=1e-12)
    assert run.report["right"]["all rows"]["p"] == held_out.report["right"]["all rows"]["p"]


def test_the_same_answers_under_another_fingerprint_differ_in_nothing(quick, tmp_path):
    base, _ = pair(300, 5)
    run = compared(tmp_path, base, changed(base, **TUNED))
    for found in run.report["scores"].values():
        assert all(numbers["difference"] == [0, 0, 0] for numbers in found["paired"].values())
        assert all(numbers["base"] == numbers["tuned"] for numbers in found["paired"].values())
    assert run.report["right"]["all rows"]["p"] == 1 and run.report["money"]["dollars"]["difference"] == [0, 0, 0]
    assert all(found["share"]["difference"] == [0, 0, 0] for found in run.report["promises"])
    assert "fine-tuning adds nothing" in run.out and "fine-tuning helped" not in run.out and "did harm" not in run.out
    assert not re.search(r"[-+]0\.0+\b.*-0\.0+\]", run.out)  # a nothing has no sign


def test_intervals_of_the_log_loss_difference_cover_the_truth(monkeypatch):
    # Two views of known quality; the truth is the mean over 200,000 rows, the interval must hold it 19 times in 20.
    monkeypatch.setattr(calibration_metrics, "resamples", lambda groups, n=0, seed=0: RESAMPLES(groups, 200, seed))

    def losses(n, seed):
        truth, scores = views(n, seed)
        return [-np.log(softmax(s, axis=1))[range(n), truth] for s in scores]

    one, two = losses(200_000, 6)
    held = 0
    for repeat in range(100):
        first, second = losses(150, 1000 + repeat)
        numbers = {"loss": lambda rows, f=first, s=second: (f[rows].mean(), s[rows].mean())}
        found = compare.paired(lambda rows, g=numbers: {"loss": g["loss"](rows)}, np.arange(150), repeat)
        _, low, high = found["loss"]["difference"]
        held += low <= (two - one).mean() <= high
    assert held >= 88


def test_the_interval_of_the_debiased_error_holds_the_truth_where_that_of_ece_does_not(monkeypatch):
    # A calibrated base that is often unsure, an overconfident tuned model that is nearly always sure.
    monkeypatch.setattr(calibration_metrics, "resamples", lambda groups, n=0, seed=0: RESAMPLES(groups, 100, seed))
    names = ("ECE", "ECE, squared, debiased")

    def drawn(n, seed):
        draw = np.random.default_rng(seed)
        true = [expit(np.abs(draw.normal(*place, n))) for place in ((0.9, 0.6), (3, 1.2))]
        said = true[0], expit(1.6 * np.log(true[1] / (1 - true[1])))
        return [(c, draw.random(n) < p) for c, p in zip(said, true, strict=True)]

    def numbers(models, rows):
        return {name: tuple(float(compare.SCORES[name](c[rows], y[rows])) for c, y in models) for name in names}

    truth = {name: two - one for name, (one, two) in numbers(drawn(1_000_000, 15), slice(None)).items()}
    held = dict.fromkeys(names, 0)
    for repeat in range(40):
        found = compare.paired(partial(numbers, drawn(600, 2000 + repeat)), np.arange(600), repeat)
        for name in names:
            _, low, high = found[name]["difference"]
            held[name] += low <= truth[name] <= high
    assert held["ECE, squared, debiased"] >= 37 and held["ECE"] <= 20


# Protocols and shapes


@pytest.fixture(scope="module")
def cross_fitted(tmp_path_factory):
    """240 rows of three labels, 30 of them twice, one file a model, with hostile names."""
    folder = tmp_path_factory.mktemp("cross")
    base, tuned = [copies(rows, 30) for rows in pair(210, 7, labels=THREE, noise=(0.9, 0.5))]
    base = changed(base, model=HOSTILE, task="\x1b[1mt")
    tuned = changed(tuned, model=f"{HOSTILE} tuned", task="\x1b[1mt")
    found = compared(folder, base, tuned, "--images", folder / "pictures")
    found.test, found.images = (base, tuned), folder / "pictures"
    return found


def test_one_file_a_model_is_cross_fitted_and_its_promises_are_called_in_sample(cross_fitted):
    assert (cross_fitted.code, cross_fitted.err) == (0, "")
    report, out = cross_fitted.report, cross_fitted.out
    assert report["protocol"] == "out-of-fold" and report["calibrated_on"] is None
    assert "measured on n = 240 in 210 groups, out-of-fold" in out and "so it is in-sample" in out
    assert "cross-fitted on the same rows, each measured by calibrators that did not see its group" in out
    assert report["scores"]["calibrated"]["tuned"]["protocol"] == "out-of-fold"


def test_cross_fitting_keeps_groups_out_of_their_own_calibrator(cross_fitted):
    groups = np.array([*range(210), *range(30)])
    for name, rows in zip(("base", "tuned"), cross_fitted.test, strict=True):
        p, truth, *_, correct = arrays(rows)
        out_of_fold = np.empty(240)
        for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=0).split(p, truth, groups):
            out_of_fold[test] = by_temperature(p[train], truth[train], p[test])[0]
        found = cross_fitted.report["scores"]["temperature"]["paired"]["log loss"][name][0]
        seen = log_loss(correct, by_temperature(p, truth, p)[0])
        assert found == pytest.approx(log_loss(correct, out_of_fold), abs=1e-6) and abs(found - seen) > 1e-4


def test_a_breakdown_is_not_made_up(cross_fitted):
    assert cross_fitted.report["parts"] == {} and "\nBy " not in cross_fitted.out


def test_of_three_labels_the_log_loss_of_the_true_label_is_told_too(cross_fitted, held_out):
    found = cross_fitted.report["scores"]["raw"]["paired"]["log loss of the true label"]
    for name, rows in zip(("base", "tuned"), cross_fitted.test, strict=True):
        p, truth, *_ = arrays(rows)
        assert found[name][0] == pytest.approx(-np.log(p[range(len(p)), truth]).mean())
    assert "log loss of the true label" not in held_out.report["scores"]["raw"]["paired"]


def test_figures_go_where_images_says(cross_fitted):
    assert {path.name for path in cross_fitted.folder.iterdir()} == {"report.json"}
    assert {path.name for path in cross_fitted.images.iterdir()} == FILES - {"report.json"}


def test_hostile_names_write_no_escapes_to_the_terminal(cross_fitted):
    assert not re.search(r"[^\n -~]", cross_fitted.out) and "\nerror: forged" not in cross_fitted.out
    assert cross_fitted.report["models"]["base"]["model"] == HOSTILE


def test_the_order_of_the_rows_does_not_matter(quick, cross_fitted, tmp_path):
    base, tuned = cross_fitted.test
    run = compared(tmp_path, base, tuned[::-1])
    for key in ("raw", "temperature", "platt"):
        assert run.report["scores"][key] == cross_fitted.report["scores"][key]


def test_a_tuned_model_without_any_error_is_compared_and_the_missing_calibrator_named(quick, tmp_path):
    base, tuned = pair(260, 8)
    right = []
    for row in tuned:
        p = {label: 0.97 if label == row["label"] else 0.03 for label in LABELS}
        right.append(row | {"probabilities": p, "prediction": row["label"], "confidence": 0.97})
    run = compared(tmp_path, base, right)
    assert (run.code, run.err) == (0, "")
    assert run.report["models"]["tuned"]["calibrator"].startswith("raw, as every row")
    raw = run.report["scores"]["raw"]["paired"]
    assert raw["accuracy"]["tuned"][0] == 1 and raw["AUROC"]["tuned"] == [None] * 3
    assert raw["AUROC"]["difference"][0] is None and cells(run.out, "AUROC")[-1] == "-"
    promise = run.report["promises"][2]
    assert promise["tuned"]["measured"]["share"] == 1 and promise["base"]["threshold"]["value"] is None
    assert "from nothing" in run.out and "inf" not in run.out.replace("in-sample", "")


def test_nothing_can_be_promised_is_an_answer(quick, tmp_path):
    base, tuned = pair(120, 9, noise=(4.0, 3.0))
    run = compared(tmp_path, base, tuned)
    line = cells(run.out, "95% right", "Automated with a promise")
    assert line[1] == line[3] == "nothing" and line[5] == "+0.0 [+0.0, +0.0]"
    assert all(re.fullmatch(r"about [\d,]+ more labels|out of reach", line[k]) for k in (2, 4))


@pytest.fixture
def axes(monkeypatch):
    """The axes of every figure drawn, and the captions."""
    real, seen = plotting.figure, SimpleNamespace(axes=[], captions=[])

    @contextmanager
    def watched(path, caption, *rest, **options):
        with real(path, caption, *rest, **options) as drawn:
            yield drawn
            seen.axes.extend(drawn.flat)
            seen.captions.append(caption)

    monkeypatch.setattr(plotting, "figure", watched)
    return seen


def test_a_calibrator_that_can_not_be_fitted_leaves_its_picture_and_says_so(held_out, axes, tmp_path):
    compare.draw_reliability(SimpleNamespace(sides=held_out.sides), {}, "isotonic", "n = 90", tmp_path / "x.png")
    wanted = [f"{title}, isotonic\ncan not be fitted to both models here" for title in ("base", "fine-tuned")]
    assert [axis.get_title("left") for axis in axes.axes] == wanted


def test_a_picture_of_too_many_parts_says_that_it_leaves_some_out(axes, tmp_path):
    part = {"n": 9} | {name: {"accuracy": [0.5, 0.2, 0.8]} for name in ("base", "tuned")}
    report = {"rows": 900, "parts": {"k": {f"v{i}": part for i in range(40)}, "l": {"never": part}}}
    report["scores"] = {"raw": {"paired": {"accuracy": {name: [0.5, 0.2, 0.8] for name in ("base", "tuned")}}}}
    compare.draw_accuracy(report, "n = 900", tmp_path / "x.png")
    shown = [label.get_text() for label in axes.axes[0].get_yticklabels()]
    assert shown == ["all 900", *(f"v{i}  9" for i in range(29))] and "The first 30 of 41 lines." in axes.captions[0]


# Our own dataset


def dataset_rows(n):
    return [row for _, row in tables.read_rows("data:test")][:n]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The first 500 test rows by a base that guesses and a tuned model that knows the rule and the plain texts."""
    folder, draw, table = tmp_path_factory.mktemp("ours"), np.random.default_rng(11), dataset_rows(500)
    base, tuned = [], []
    for row in table:
        sign = 1 if row["label"] == "positive" else -1
        knows = {"sports": 1, "workplace": -1}.get(row["domain"], 0 if row["difficulty"] == "neutral" else sign)
        for rows, z, fields in ((base, draw.normal(0.5 * sign, 1), BASE), (tuned, draw.normal(3 * knows, 1), TUNED)):
            p = {"negative": float(expit(-z)), "positive": float(expit(z))}
            prediction = max(p, key=p.get)
            record = {"id": row["id"], "text": row["text"], "label": row["label"], "prediction": prediction}
            record |= {"confidence": p[prediction], "probabilities": p, "label_mass": 0.9, "method": "logprobs"}
            rows.append(record | {"task": "sentiment"} | fields)
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        found = compared(folder, base, tuned, "--groups", ROOT / "data/sentiment/splits.csv")
    found.table, found.test = table, (base, tuned)
    return found


def test_our_own_rows_are_broken_down_by_category_difficulty_and_the_hidden_rule(ours):
    parts, neutral = ours.report["parts"], [row for row in ours.table if row["difficulty"] == "neutral"]
    assert [*parts] == ["category", "difficulty,part", compare.RULE]
    assert {*parts["category"]} == {row["category"] for row in ours.table}
    counts = {name: sum(row["domain"] == name for row in neutral) for name in ("sports", "workplace")}
    counts[compare.COIN] = len(neutral) - sum(counts.values())
    assert {name: found["n"] for name, found in parts[compare.RULE].items()} == counts
    assert parts["difficulty,part"]["neutral, other"]["n"] == counts[compare.COIN]
    assert all(parts[compare.RULE][name]["tuned"]["accuracy"][0] > 0.95 for name in ("sports", "workplace"))
    assert ours.report["groups"] == len({row["group"] for row in ours.table})


def test_the_coin_part_is_held_against_one_half_with_both_mean_confidences(ours):
    found = ours.report["parts"][compare.RULE][compare.COIN]
    assert f"  The {found['n']} labels of a coin: no honest model can be right more than half the time." in ours.out
    for name in ("base", "tuned"):
        share, low, high = found[name]["accuracy"]
        said = (
            f"  {name}: right {share:.1%} [{low:.1%}, {high:.1%}], 50 % is {'' if low <= 0.5 <= high else 'NOT '}inside"
        )
        means = f"its mean confidence is {found[name]['raw']:.1%} raw and {found[name]['calibrated']:.1%} calibrated"
        assert said in ours.out and means in ours.out
    assert "50 % is inside" in ours.out


def test_a_leak_into_the_coin_part_is_called_one():
    found = {name: {"accuracy": [0.9, 0.83, 0.95], "raw": 0.9, "calibrated": 0.88} for name in ("base", "tuned")}
    assert compare.coin(found | {"n": 100}).count("50 % is NOT inside, by a leak or by chance") == 2


def test_other_columns_of_our_rows_can_be_named(quick, ours, tmp_path):
    run = compared(tmp_path, *ours.test, "--by", "domain")
    assert [*run.report["parts"]] == ["domain", compare.RULE]
    assert {*run.report["parts"]["domain"]} == {row["domain"] for row in ours.table}


# What is refused

LONG = pair(40, 12)
CAL = pair(40, 13, "c")
CHAT = {"fingerprint": "cccc3333"}


def refused(run, message):
    assert run.code == 2 and re.fullmatch(r"error: [ -~]+\n", run.err), run.err
    assert message in run.err and run.out == "" and not run.folder.exists(), run.err


REFUSED = {
    "the same model": (LONG[0], LONG[0], "both have the fingerprint aaaa1111: it is one model"),
    "mixed fingerprints": (LONG[0], [*LONG[1][:-1], LONG[1][-1] | CHAT], "row 'r39' of the tuned file has another"),
    "a row too few": (LONG[0], LONG[1][:-1], "row 'r39' of the base file is not in the tuned file"),
    "a row too many": (LONG[0][1:], LONG[1], "row 'r0' of the tuned file is not in the base file"),
    "a row twice": (LONG[0], [*LONG[1], LONG[1][0]], "row 'r0' stands twice in the tuned file"),
    "another text": (
        LONG[0],
        changed(LONG[1], text=lambda r, i: r["text"] + "." * (i == 3)),
        "row 'r3' is not the same",
    ),
    "another label": (LONG[0], changed(LONG[1], label=lambda r, i: "negative"), "its text, label or task differs"),
    "another task": (LONG[0], changed(LONG[1], task="u"), "row 'r0' is not the same in both files"),
    "another method": (
        LONG[0],
        changed(LONG[1], method="consistency"),
        "by method 'consistency', another by 'logprobs'",
    ),
    "another order of labels": (
        LONG[0],
        changed(LONG[1], probabilities=lambda r, i: dict(reversed(r["probabilities"].items()))),
        "row 'r0': the labels of the two files differ",
    ),
    "no labels": (changed(LONG[0], label=None), changed(LONG[1], label=None), "40 of 40 rows have no label"),
    "no scores": ([unscored(r) for r in LONG[0]], LONG[1], "no row was scored by both models"),
    "few rows": (LONG[0][:15], LONG[1][:15], "base.jsonl: 15 labelled rows; a calibrator needs at least 20"),
    "all wrong": (
        *(
            changed(x, label=lambda r, i: min(r["probabilities"], key=r["probabilities"].get))
            for x in (LONG[0], changed(LONG[0], **TUNED))
        ),
        "base.jsonl: all 40 rows are wrong",
    ),
    "a label of no such name": (*(changed(x, label="neutral") for x in LONG), "row 'r0'"),
    "empty": (LONG[0], [], "tuned.jsonl holds no predictions"),
}


@pytest.mark.parametrize(("base", "tuned", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_files_that_can_not_be_compared_are_refused(base, tuned, message, tmp_path):
    refused(compared(tmp_path, base, tuned), message)


CALIBRATION = {
    "another base model": (changed(CAL[0], **CHAT), CAL[1], "base_cal.jsonl is not by the model, task and settings of"),
    "another tuned model": (
        CAL[0],
        changed(CAL[1], **CHAT),
        "tuned_cal.jsonl is not by the model, task and settings of",
    ),
    "places changed": (CAL[1], CAL[0], "base_cal.jsonl is not by the model"),
    "other rows": (CAL[0], CAL[1][1:], "row 'c0' of the base file is not in the tuned file"),
    "rows of the test": (
        *(
            [*cal, row | {"id": "seen", "text": f"  {row['text'].upper()} "}]
            for cal, (row, *_) in zip(CAL, LONG, strict=True)
        ),
        "base_cal.jsonl too, the first is 'r0'; nothing is measured on rows it was fitted on",
    ),
}


@pytest.mark.parametrize(("base", "tuned", "message"), CALIBRATION.values(), ids=CALIBRATION.keys())
def test_calibration_rows_that_do_not_fit_are_refused(base, tuned, message, tmp_path):
    refused(compared(tmp_path, *LONG, calibrate_on=(base, tuned)), message)


def test_near_duplicates_of_calibration_rows_are_counted(quick, tmp_path):
    near = [row["text"] + " indeed" for row in LONG[0][:3]]
    cal = [changed(rows, text=lambda r, i: near[i] if i < 3 else r["text"]) for rows in CAL]
    run = compared(tmp_path, *LONG, calibrate_on=cal)
    assert run.report["near_duplicates_of_calibration_rows"] == 3
    assert "3 test rows have a near-duplicate among the calibration rows" in run.out


FLAGS = {
    "--volume 0": "--volume 0",
    "--review-cost -1": "--review-cost -1",
    "--error-cost inf": "--error-cost inf",
    "--seed -1": "--seed",
    "--by kind": "--by needs --rows TABLE",
    "--rows none.csv": "no such file: none.csv",
    "--rows noid.csv": "--rows needs the column id; it has name",
    "--rows twice.csv": "the id 'r0' stands twice",
    "--rows few.csv": "few.csv does not hold the row 'r1' with its text",
    "--rows other.csv": "other.csv does not hold the row 'r0' with its text",
    "--rows table.csv --by kind size": "--by size: not every row of table.csv has the column 'size'",
    "--rows table.csv --by kind,size": "--by kind,size: not every row of table.csv has the column 'size'",
    "--groups few.csv": "few.csv",
    "--images noid.csv": "--images noid.csv is a file",
    "--adapter folder": "folder/training_config.json: No such file",
    "--first-tokens none.jsonl none.jsonl": "no such file: none.jsonl",
}


@pytest.mark.parametrize(("flags", "message"), FLAGS.items(), ids=FLAGS.keys())
def test_flags_that_make_no_sense_are_refused_and_nothing_is_written(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = [row["id"] for row in LONG[0]]
    Path("noid.csv").write_text("name\nr0\n")
    Path("few.csv").write_text("id,kind\nr0,a\n")
    Path("twice.csv").write_text("id,kind\nr0,a\nr0,b\n")
    Path("table.csv").write_text("id,kind\n" + "".join(f"{id},a\n" for id in ids))
    Path("other.csv").write_text("id,text\n" + "".join(f"{id},another text\n" for id in ids))
    refused(compared(tmp_path, *LONG, *flags.split()), message)


def test_one_file_alone_or_calibration_rows_alone_are_refused(tmp_path):
    path = save(tmp_path / "base.jsonl", LONG[0])
    for argv, message in (
        ([path], "two predictions files are compared: BASE and TUNED"),
        (["--calibrate-on", path, path], "--calibrate-on goes with BASE and TUNED"),
        ([path, tmp_path / "gone.jsonl"], "gone.jsonl: No such file or directory"),
        ([path, tmp_path], f"{tmp_path}: Is a directory"),
    ):
        run = command(*argv, "--output-dir", tmp_path / "out")
        assert run.code == 2 and message in run.err and run.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_folder_that_takes_not_every_file_is_left_as_it_was(quick, tmp_path):
    (tmp_path / "out/report.json").mkdir(parents=True)
    files = save(tmp_path / "b.jsonl", LONG[0]), save(tmp_path / "t.jsonl", LONG[1])
    run = command(*files, "--output-dir", tmp_path / "out", "--images", tmp_path / "pictures")
    assert run.code == 2 and "report.json is a folder; nothing was written" in run.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]
    assert list((tmp_path / "pictures").iterdir()) == []


# The prompt


def training(folder, record):
    folder.mkdir()
    text = record if isinstance(record, str) else json.dumps(record)
    (folder / "training_config.json").write_text(text)
    return folder


def prints(base, tuned):
    return {"fingerprints": {"base": base, "tuned": tuned}}


def test_the_prompt_is_the_training_s_when_both_fingerprints_are_its(quick, tmp_path):
    folder = training(tmp_path / "adapter", prints("aaaa1111", "bbbb2222") | {"task": {}})
    run = compared(tmp_path, *LONG, "--adapter", folder)
    assert run.code == 0 and f"both fingerprints stand in {folder / 'training_config.json'}" in run.out


def test_without_an_adapter_it_is_said_how_little_was_checked(quick, tmp_path):
    for flags in ((), ("--adapter", "none")):
        run = compared(tmp_path, *LONG, *flags)
        assert "the prompt was checked by task name and method only; --adapter FOLDER checks it" in run.out


PROMPTS = {
    "another base": (prints("ffff0000", "bbbb2222"), "base.jsonl has the fingerprint aaaa1111, "),
    "another tuned": (prints("aaaa1111", "ffff0000"), "tuned.jsonl has the fingerprint bbbb2222, "),
    "places changed": (prints("bbbb2222", "aaaa1111"), "change their places"),
    "none": ({"task": {}}, "does not hold the fingerprints of base and tuned"),
    "one": ({"fingerprints": {"base": "aaaa1111"}}, "does not hold the fingerprints of base and tuned"),
    "a list": ([1], "does not hold the fingerprints of base and tuned"),
    "no JSON": ("{", "does not hold the fingerprints of base and tuned"),
}


@pytest.mark.parametrize(("record", "message"), PROMPTS.values(), ids=PROMPTS.keys())
def test_another_prompt_than_the_training_s_is_refused_and_the_file_named(record, message, tmp_path):
    folder = training(tmp_path / "adapter", record)
    refused(compared(tmp_path, *LONG, "--adapter", folder), message)


def test_votes_can_not_be_checked_by_the_training_s_record(tmp_path):
    votes = [changed(rows, method="consistency") for rows in LONG]
    folder = training(tmp_path / "adapter", prints("aaaa1111", "bbbb2222"))
    refused(compared(tmp_path, *votes, "--adapter", folder), "knows the prompt of Method 1")


# First tokens


def explained(text, p, fingerprint, **fields):
    """What logprobs_confidence.py --json prints, as far as it is read."""
    tokens = [(" positive", 0.9 * p, "positive"), (" negative", 0.9 * (1 - p), "negative"), (" x\x1b", 0.06, None)]
    return {
        "text": text,
        "prompt": f"Text: {text}\nSentiment:",
        "top_tokens": [
            {"token": token, "id": i, "logprob": math.log(q), "label": label}
            for i, (token, q, label) in enumerate(sorted(tokens, key=lambda entry: -entry[1]))
        ],
        "probabilities": {"negative": 1 - p, "positive": p},
        "label_mass": 0.9,
        "prediction": "positive" if p > 0.5 else "negative",
        "confidence": max(p, 1 - p),
        "fingerprint": fingerprint,
    } | fields


SAID = [explained("Not bad", 0.6, "aaaa1111"), explained("Shift ends\x1b at 15:00.", 0.7, "aaaa1111")]
HEARD = [explained("Not bad", 0.95, "bbbb2222"), explained("Shift ends\x1b at 15:00.", 0.1, "bbbb2222")]


def with_tokens(tmp_path, base, tuned):
    files = save(tmp_path / "said.jsonl", base), save(tmp_path / "heard.jsonl", tuned)
    return compared(tmp_path, *LONG, "--first-tokens", *files)


def test_first_tokens_stand_side_by_side_with_sums_and_verdicts(quick, tmp_path):
    run = with_tokens(tmp_path, SAID, HEARD)
    assert (run.code, run.err) == (0, "")
    first = run.out[run.out.index("Text: Not bad") :]
    assert cells(first, "rank") == ["rank", "base", "percent", "counts for", "tuned", "percent", "counts for"]
    assert cells(first, "1") == ["1", '" positive"', "54.00%", "positive", '" positive"', "85.50%", "positive"]
    assert cells(first, "3") == ["3", '" x\\x1b"', "6.00%", '" negative"', "4.50%", "negative"]
    assert cells(first, "P(positive)") == ["P(positive)", "54.00%", "85.50%"]
    assert cells(first, "verdict") == ["verdict", "positive 60.00%", "positive 95.00%"]
    second = first[first.index("Text: Shift ends\\x1b at 15:00.") :]
    assert cells(second, "1")[4:] == ['" negative"', "81.00%", "negative"]
    assert cells(second, "verdict") == ["verdict", "positive 70.00%", "negative 90.00%"]
    assert cells(second, "label mass") == ["label mass", "90.00%", "90.00%"]
    assert "\x1b" not in run.out
    told = run.report["first_tokens"][0]
    assert told["text"] == "Not bad" and told["tuned"]["tokens"][0]["probability"] == pytest.approx(0.855)
    assert told["base"]["total_probabilities"] == pytest.approx({"negative": 0.36, "positive": 0.54})


def test_a_server_s_label_that_is_not_listed_counts_with_the_most_it_can_have(quick, tmp_path):
    row = explained("Not bad", 0.6, "aaaa1111", missing=["negative"], label_mass=0.54, label_mass_high=0.9)
    found = with_tokens(tmp_path, [row], HEARD[:1]).report["first_tokens"][0]["base"]
    assert found["total_probabilities"] == pytest.approx({"negative": 0.36, "positive": 0.54})


TOKENS = {
    "a text too few": (SAID, HEARD[:1], "has 2 texts and"),
    "none": ([], [], "has 0 texts and"),
    "another text": (SAID, [HEARD[1], HEARD[0]], "differ in the text of line 1"),
    "another prompt": (SAID[:1], [HEARD[0] | {"prompt": "Text: Not bad\nMood:"}], "differ in the prompt of line 1"),
    "other labels": (
        SAID[:1],
        [HEARD[0] | {"probabilities": {"no": 0.05, "positive": 0.95}}],
        "is not what logprobs_confidence.py --json prints",
    ),
    "labels of another task": (
        *(
            [
                row | {"probabilities": {"no": 0.4, "yes": 0.6}, "prediction": "yes", "top_tokens": []}
                for row in rows[:1]
            ]
            for rows in (SAID, HEARD)
        ),
        "said.jsonl line 1 has other labels than",
    ),
    "another order of labels": (
        SAID[:1],
        [HEARD[0] | {"probabilities": {"positive": 0.95, "negative": 0.05}}],
        "differ in the labels of line 1",
    ),
    "another base model": ([SAID[0] | CHAT], HEARD[:1], "said.jsonl line 1 has the fingerprint cccc3333"),
    "another tuned model": (SAID[:1], [HEARD[0] | CHAT], "heard.jsonl line 1 has the fingerprint cccc3333"),
    "places changed": (HEARD, SAID, "said.jsonl line 1 has the fingerprint bbbb2222"),
    "predictions": (LONG[0][:1], LONG[1][:1], "said.jsonl line 1 is not what logprobs_confidence.py --json prints"),
    "a number that is none": ([SAID[0] | {"label_mass": float("nan")}], HEARD[:1], "line 1 is not what"),
    "a probability above one": ([SAID[0] | {"confidence": 1.2}], HEARD[:1], "line 1 is not what"),
    "a huge logprob": (
        [SAID[0] | {"top_tokens": [{"token": "x", "logprob": 1e9, "label": None}]}],
        HEARD[:1],
        "is not what",
    ),
    "a token that is no string": (
        [SAID[0] | {"top_tokens": [{"token": 5, "logprob": -1, "label": None}]}],
        HEARD[:1],
        "is not",
    ),
    "a foreign label": (
        [SAID[0] | {"top_tokens": [{"token": "x", "logprob": -1, "label": 5}]}],
        HEARD[:1],
        "is not what",
    ),
    "a text that is no string": ([SAID[0] | {"text": 5}], [HEARD[0] | {"text": 5}], "is not what"),
}


@pytest.mark.parametrize(("base", "tuned", "message"), TOKENS.values(), ids=TOKENS.keys())
def test_first_tokens_that_can_not_be_compared_are_refused(base, tuned, message, tmp_path):
    refused(with_tokens(tmp_path, base, tuned), message)


# The command line


def test_the_real_command_writes_the_same_and_needs_no_model_library(run, tmp_path):
    base, tuned = [save(tmp_path / f"{name}.jsonl", rows) for name, rows in zip("bt", pair(60, 14), strict=True)]
    program = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(sorted({'torch', 'transformers', 'peft', 'tokenizers', 'safetensors'} & sys.modules.keys()))"
    )
    argv = (ROOT / "compare_base_vs_finetuned.py", base, tuned, "--output-dir", "out")
    done = run("-c", program, *argv, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert "n = 60, out-of-fold" in done.stdout and done.stdout.endswith("\n[]\n")
    done = run(ROOT / "compare_base_vs_finetuned.py", base, base, "--output-dir", "other", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_help_imports_nothing_slow():
    program = (
        "import sys, compare_base_vs_finetuned\n"
        "try: compare_base_vs_finetuned.main(['--help'])\n"
        "except SystemExit as end: code = end.code\n"
        "slow = {'torch', 'sklearn', 'scipy', 'matplotlib', 'transformers', 'calibration'} & sys.modules.keys()\n"
        "sys.exit(code or len(slow))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for flag in ("--calibrate-on", "--adapter", "--first-tokens", "--rows", "--by", "--images"):
        assert flag in done.stdout


def test_without_files_the_recorded_ones_are_meant_wherever_one_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args, data = compare.parse_arguments([]), ROOT / "data/predictions"
    found = [Path(path).resolve() for path in (args.base, args.tuned, *args.calibrate_on, *args.first_tokens)]
    names = [f"{model}_{name}.jsonl" for name in ("test", "calibration", "first_tokens") for model in ("base", "tuned")]
    assert found == [data / name for name in names]
    assert Path(args.groups).resolve() == ROOT / "data/sentiment/splits.csv"
    monkeypatch.setattr(compare, "ADAPTER", tmp_path)
    assert Path(compare.parse_arguments([]).adapter).resolve() == tmp_path.resolve()
    assert compare.parse_arguments(["--adapter", "none"]).adapter == "none"
    mine = compare.parse_arguments(["b.jsonl", "t.jsonl"])
    assert (mine.adapter, mine.groups, mine.first_tokens, mine.calibrate_on) == (None, None, None, None)


@pytest.mark.skipif(not (ROOT / "data/predictions/tuned_test.jsonl").exists(), reason="not recorded yet")
def test_the_recorded_predictions_are_of_the_same_rows_and_of_two_models(quick, tmp_path):
    run = command("--output-dir", tmp_path / "out", "--adapter", "none")
    assert (run.code, run.err) == (0, "")
    report = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert (report["rows"], report["groups"], report["calibration_rows"]) == (2000, 603, 1000)
    assert report["left_out"] == 0 and report["parts"][compare.RULE][compare.COIN]["n"] == 134
    assert report["first_tokens"]
