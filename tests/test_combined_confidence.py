"""combined_confidence.py: both methods run and combined, and all methods measured on the same rows.

scikit-learn's metrics, weights fitted again by hand and simulations say what is right. Two views of a text with
independent noise are worth more than one; votes drawn from the first view are worth nothing: the report has to tell the
two apart.
"""

import json
import math
import re
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
from made_predictions import few_resamples
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from test_pooling import FINGERPRINTS, GEOMETRIC, LABELS, THREE, changed, failed, made, pair

import calibration_metrics
import combined_confidence as combined
import command_line
import consistency_confidence as consistency
import plotting
import predictions
from calibration import FittedCalibrator, PlattScalingCalibrator, Recipe, save_calibrator
from combined_confidence import CONTENDERS, compare_methods, contender_numbers, log_loss_gain
from decisions import choose_threshold
from llama import load_llama
from pooling import combination_for, combine, features_of, fitted_pool, scored_by_both, true_labels, unfitted_pool
from tables import text_key
from task import TASKS


def copies(pairs, name):
    """The same rows again under other ids, in other case: near-duplicates."""
    return [changed(both, id=f"{name}{both.logprobs.id}", text=both.logprobs.text.upper()) for both in pairs]


def save(folder, pairs, names=("one", "two")):
    """Two predictions files, the second in another order."""
    paths = [folder / f"{name}.jsonl" for name in names]
    for path, rows in zip(paths, zip(*pairs, strict=True), strict=True):
        with open(path, "wb") as file:
            predictions.append(file, rows if path is paths[0] else rows[::-1])
    return paths


def call(*argv):
    """Run the script's main as the command line does."""
    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            command_line.run(lambda: combined.main([*map(str, argv)]))
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def cells(text, first, table=0):
    """The cells of the printed line that begins with that cell, in the first table or a later one."""
    lines = [line for line in text.splitlines() if re.match(rf"\s*{re.escape(first)}(  |$)", line)]
    return re.split(r"\s{2,}", lines[table].strip())


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer draws and coarser pictures: no number tested here depends on them."""
    noise = calibration_metrics.consistency_resampling
    monkeypatch.setattr(plotting, "DPI", 30)
    monkeypatch.setattr(calibration_metrics, "consistency_resampling", partial(noise, n_draws=10))
    few_resamples(monkeypatch, 10)


# All methods on the same rows


def test_held_out_numbers_are_those_of_weights_fitted_elsewhere_and_metrics_of_scikit_learn():
    fit_pairs, pairs = made(300, 10, "c"), made(250, 11, "t")
    found, truth, losses = compare_methods(pairs, fit_pairs), true_labels(pairs), {}
    for name, contender in CONTENDERS.items():
        pool = unfitted_pool(2, contender.features)
        if contender.is_fitted:
            pool = fitted_pool(features_of(fit_pairs), true_labels(fit_pairs), contender.features)
        p = pool.probabilities(features_of(pairs))
        correct, row = p.argmax(axis=1) == truth, contender_numbers(found, name)
        losses[name] = log_loss(truth, p)
        assert row["log_loss"] == pytest.approx(losses[name], abs=1e-9)
        assert row["accuracy"] == pytest.approx(correct.mean(), abs=1e-12)
        assert row["auroc"] == pytest.approx(roc_auc_score(correct, p.max(axis=1)), abs=1e-9)
        assert row["log_loss_low"] < row["log_loss"] < row["log_loss_high"] and row["n"] == 250
        assert row["protocol"] == ("held-out" if contender.is_fitted else "nothing fitted")
    gain = log_loss_gain(found, "3 stacked", "1 logprobs, fitted")
    assert gain.value == pytest.approx(losses["1 logprobs, fitted"] - losses["3 stacked"], abs=1e-9)
    assert found.protocol == "held-out" and found.related == 0


def test_of_three_labels_the_log_loss_is_that_of_the_true_label_and_not_of_being_right():
    # A method that knows nothing of many labels is rightly unsure of its guess, which must not look like a merit.
    pairs = made(300, 13, labels=THREE)
    found, truth = compare_methods(pairs), true_labels(pairs)
    for name in CONTENDERS:
        expected = log_loss(truth, found.measured.probabilities[name], labels=[0, 1, 2])
        assert contender_numbers(found, name)["log_loss"] == pytest.approx(expected, abs=1e-9)
    p = found.measured.probabilities["1 logprobs"]
    assert (
        contender_numbers(found, "1 logprobs")["log_loss"] > log_loss(p.argmax(axis=1) == truth, p.max(axis=1)) + 0.05
    )


def test_cross_fitted_rows_are_predicted_by_weights_fitted_on_all_other_groups_and_no_other_row():
    pairs = made(40, 14)
    pairs += copies(pairs[:20], "copy")
    features, truth, groups = features_of(pairs), true_labels(pairs), [*range(40), *range(20)]
    found = compare_methods(pairs, seed=3)
    assert found.protocol == "out-of-fold" and found.choosing is found.measured
    for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=3).split(features, truth, groups):
        for name, contender in CONTENDERS.items():
            if contender.is_fitted:
                expected = fitted_pool(features[train], truth[train], contender.features).probabilities(features[test])
                np.testing.assert_allclose(found.measured.probabilities[name][test], expected, atol=1e-12)


def test_votes_drawn_from_the_probability_itself_gain_nothing(monkeypatch):
    # Ten draws at the first token's own probability: the stack must not claim more than Method 1, once it is fitted.
    few_resamples(monkeypatch, 200)
    gain = log_loss_gain(compare_methods(made(700, 0, own=False)), "3 stacked", "1 logprobs, fitted")
    assert abs(gain.value) < 0.006 and gain.low < 0 and gain.high < 0.012


def test_votes_with_evidence_of_their_own_gain_clearly(monkeypatch):
    few_resamples(monkeypatch, 200)
    found = compare_methods(made(500, 0))
    for name, over in (("3 stacked", "1 logprobs, fitted"), ("3 geometric mean", "1 logprobs")):
        gain = log_loss_gain(found, name, over)
        assert 0.05 < gain.low < gain.value < gain.high < 0.4
    assert (
        contender_numbers(found, "3 stacked")["accuracy"]
        > contender_numbers(found, "1 logprobs, fitted")["accuracy"] + 0.02
    )


def test_thresholds_come_from_all_calibration_rows_with_their_groups():
    fit_pairs, pairs = made(260, 16, "c"), made(200, 17, "t")
    found = compare_methods(pairs, fit_pairs + copies(fit_pairs[:100], "copy"))
    truth, fit_truth, some = true_labels(pairs), true_labels(fit_pairs), 0
    both_truth, groups = np.append(fit_truth, fit_truth[:100]), [*range(260), *range(100)]
    for name, contender in CONTENDERS.items():
        chosen, p = found.choosing.probabilities[name], found.measured.probabilities[name]
        start = "predicted" if contender.is_fitted else "strictest"
        known = chosen.max(axis=1), chosen.argmax(axis=1) == both_truth
        for target in combined.TARGETS:
            threshold = choose_threshold(*known, target, 0.05, groups, start).value
            automated = combined.automated_rows(found, name, target)
            if threshold is None:
                assert automated is None
                continue
            taken = p.max(axis=1) >= threshold
            assert automated["automated"] == taken.sum() and automated["share"] == pytest.approx(taken.mean())
            assert automated["accuracy"] == pytest.approx((p.argmax(axis=1) == truth)[taken].mean())
            some += 1
    assert some >= 6
    # They were chosen on out-of-fold numbers, which the weights that are measured are not fitted for.
    stacked, features = found.choosing.probabilities["3 stacked"][:260], features_of(fit_pairs)
    assert np.abs(stacked - fitted_pool(features, fit_truth).probabilities(features)).max() > 1e-3


def test_copies_of_the_measured_rows_make_no_interval_narrower():
    fit_pairs, pairs = made(100, 23, "c"), made(80, 24, "t")
    once, twice = (compare_methods(rows, fit_pairs) for rows in (pairs, pairs + copies(pairs, "copy")))
    for name in CONTENDERS:
        one, two = contender_numbers(once, name), contender_numbers(twice, name)
        assert (one["n"], two["n"], two["groups"]) == (80, 160, 80)
        for key in ("log_loss", "log_loss_low", "log_loss_high", "auroc_low", "auroc_high"):
            assert two[key] == pytest.approx(one[key], abs=1e-9), (name, key)
    one, two = (log_loss_gain(each, "3 stacked", "1 logprobs, fitted") for each in (once, twice))
    assert two == pytest.approx(one, abs=1e-9) and one.low < one.value < one.high


def test_measuring_on_rows_that_the_weights_were_fitted_on_is_refused(capsys):
    fit_pairs, pairs = made(30, 18, "c"), made(10, 19, "t")
    seen = copies(fit_pairs[4:6], "x")  # other id, other case: the same text
    with pytest.raises(ValueError, match=r"^2 rows of the measured file are in --calibrate-on too: 'xrc4' "):
        compare_methods(pairs + seen, fit_pairs)
    alike = [changed(both, id=f"n{both.logprobs.id}", text=f"{both.logprobs.text} more") for both in fit_pairs[:3]]
    found = compare_methods(pairs + alike, fit_pairs)  # near-duplicates are other texts, and are counted
    combined.print_report(found)
    text = "n = 13; 3 of them have a near-duplicate among the calibration rows; fitted ones held-out"
    assert found.related == 3 and capsys.readouterr().out.startswith(text)


# The command line


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Labelled rows for measuring, of which two have an error, and others for fitting; the same rows without labels."""
    folder = tmp_path_factory.mktemp("files")
    test = made(90, 21, "t")
    test += [failed("e1", "logprobs", label="positive"), failed("e2", "consistency", "none", label="negative")]
    fit_pairs = made(60, 22, "c")
    fit_pairs += copies(fit_pairs[:10], "copy")
    one, two = save(folder, test)
    cal1, cal2 = save(folder, fit_pairs, ("cal1", "cal2"))
    plain1, plain2 = save(folder, [changed(both, label=None) for both in test], ("plain1", "plain2"))
    return SimpleNamespace(
        test=test,
        fit=fit_pairs,
        join=("--logprobs", one, "--consistency", two),
        fit_on=("--calibrate-on", cal1, cal2),
        join_fit=("--logprobs", cal1, "--consistency", cal2),
        plain=("--logprobs", plain1, "--consistency", plain2),
    )


def test_in_a_process_of_its_own_two_files_become_one_without_torch(files, tmp_path, run):
    code = """if True:
        import runpy, sys
        sys.argv = sys.argv[1:]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            print(sorted({"torch", "transformers", "tokenizers", "openai", "anthropic"} & set(sys.modules)))
    """
    done = run("-c", code, "combined_confidence.py", *files.plain, "--output", tmp_path / "both.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("[]\n") and "both.jsonl: 90 of 92 rows scored, 2 with an error" in done.stdout


def test_repeating_the_command_changes_nothing_a_torn_file_is_finished_and_other_weights_are_another(files, tmp_path):
    output, figure = tmp_path / "both.jsonl", tmp_path / "curves.png"
    command = (*files.join, "--output", output)
    first = call(*command, "--figure", figure)
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert predictions.read(output) == [*combine(files.test, GEOMETRIC)]  # in the order of the first file
    whole, stamp = output.read_bytes(), output.stat().st_mtime_ns
    again = call(*command, "--figure", figure)
    assert first.code == again.code == 0 and again.out == first.out and again.err == ""
    assert (output.read_bytes(), output.stat().st_mtime_ns) == (whole, stamp)
    output.write_bytes(whole[: len(whole) // 2])
    assert call(*command).code == 0 and output.read_bytes() == whole
    done = call(*command, *files.fit_on)
    assert done.code == 2 and done.out == "" and output.read_bytes() == whole
    assert re.fullmatch(r"error: .+ line 1 was made with other settings \(.+\); use --overwrite .+\n", done.err)
    done = call(*command, *files.fit_on, "--overwrite")
    assert done.code == 0 and "stacked; the methods name different labels in" in done.out
    assert predictions.read(output) == [*combine(files.test, combination_for(FINGERPRINTS, 2, files.fit))]
    assert {path.name for path in tmp_path.iterdir()} == {"both.jsonl", "curves.png"}


def test_a_row_that_failed_is_combined_anew_once_its_method_has_answered(files, tmp_path):
    one, two = save(tmp_path, files.test)
    command = ("--logprobs", one, "--consistency", two, "--output", tmp_path / "both.jsonl")
    assert call(*command).code == 0
    before = predictions.read(tmp_path / "both.jsonl")
    answered = pair("e2", (0.5, 0.5), (2, 8), "negative").consistency
    save(tmp_path, [*files.test[:-1], files.test[-1]._replace(consistency=answered)])
    assert "91 of 92 rows scored, 1 with an error" in call(*command).out
    after = predictions.read(tmp_path / "both.jsonl")
    assert after[:-1] == before[:-1] and before[-1].error == "consistency: none"
    assert (after[-1].prediction, after[-1].extras["consistency_prediction"]) == ("positive", "positive")


def test_the_report_says_n_groups_protocol_and_cost_and_its_numbers_are_those_measured(files):
    done = call(*files.join, *files.fit_on)
    assert (done.code, done.err) == (0, "")
    found, lines = compare_methods(scored_by_both(files.test), files.fit), done.out.splitlines()
    assert lines[1:3] == [
        "2 rows left out: a method could not score them",
        "n = 90; fitted ones held-out, the others as they are; brackets are 95 % intervals;",
    ]
    assert lines[4].split() == ["accuracy", "log", "loss", "AUROC", "AURC"]
    heads = ["80% right", "90% right", "95% right", "ECE", "floor", "calls", "seconds"]
    assert heads in [re.split(r"\s{2,}", line.strip()) for line in lines]
    for name in CONTENDERS:
        row, shown = contender_numbers(found, name), cells(done.out, name, table=1)
        for number, key in enumerate(("accuracy", "log_loss", "auroc", "aurc"), 1):
            ends = row[key], row[f"{key}_low"], row[f"{key}_high"]
            assert cells(done.out, name)[number] == "{:.3f} [{:.3f}, {:.3f}]".format(*ends)
        automated = combined.automated_rows(found, name, 0.8)
        expected = "{share:.1%} at {accuracy:.1%}".format(**automated) if automated else "nothing"
        assert shown[1] == expected and shown[4:6] == [f"{row['ece']:.3f}", f"{row['ece_noise_floor']:.3f}"]
        calls = {"1": "1.0", "2": "10.0", "3": "11.0"}[name[0]]
        assert shown[-2:] == [calls, "-"]  # how long the methods ran is not known here
    assert "thresholds come from the calibration rows." in done.out and "in-sample" not in done.out
    gain = log_loss_gain(found, "3 stacked", "1 logprobs, fitted")
    shown = f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
    assert f"fitted logprobs, on the same rows: {shown}" in lines[-2]


def test_cross_fitted_thresholds_are_called_in_sample_and_groups_are_counted(files, tmp_path):
    done = call(*files.join_fit)
    assert done.code == 0 and "n = 70 in 60 groups; fitted ones out-of-fold, the others as they are" in done.out
    assert "thresholds come from these very rows, so these shares are in-sample." in done.out
    assert "held-out" not in done.out and "left out" not in done.out
    table = tmp_path / "groups.csv"
    table.write_text("id,group\n" + "".join(f"{one.id},{i % 30}\n" for i, (one, _) in enumerate(files.fit)))
    assert "n = 70 in 30 groups; " in call(*files.join_fit, "--groups", table).out


def test_rows_without_labels_or_too_few_to_fit_are_combined_and_not_compared(files, tmp_path):
    done = call(*files.plain, *files.fit_on, "--output", tmp_path / "plain.jsonl")
    assert done.code == 0 and "the methods are not compared: 90 of 90 rows have no label" in done.out
    assert "accuracy" not in done.out and len(predictions.read(tmp_path / "plain.jsonl")) == 92
    one, two = save(tmp_path, files.test[:4])
    done = call("--logprobs", one, "--consistency", two, "--output", tmp_path / "few.jsonl")
    assert done.code == 0 and len(predictions.read(tmp_path / "few.jsonl")) == 4
    assert "the methods are not compared: 4 rows in 4 groups are too few for 5 folds" in done.out


@pytest.fixture(scope="module")
def calibrator(tmp_path_factory):
    """A calibrator for the geometric mean of two methods' rows."""
    platt = PlattScalingCalibrator()
    platt.slope_, platt.intercept_ = 2.0, -0.5
    identity, seen = (GEOMETRIC.fingerprint, "m", "t", 100, 90), frozenset([text_key("another text")])
    path = tmp_path_factory.mktemp("calibrator") / "k.json"
    fitted = Recipe("platt", False), platt, LABELS, *identity, seen, {}, {"value": 0.6}
    save_calibrator(path, FittedCalibrator(*fitted))
    return path


def test_a_calibrator_adds_to_the_rows_and_a_run_without_it_leaves_what_was_added(files, calibrator, tmp_path):
    command = (*files.join, "--output", tmp_path / "both.jsonl")
    done = call(*command, "--calibrator", calibrator)
    assert (done.code, done.err) == (0, "") and re.search(r"calibrated: .*not scored 2", done.out)
    rows = predictions.read(tmp_path / "both.jsonl")
    for row, bare in zip(rows, combine(files.test, GEOMETRIC), strict=True):
        assert {k: v for k, v in row.extras.items() if k not in predictions.CALIBRATED} == bare.extras
        if row.error is None:
            truth = 1 / (1 + math.exp(0.5) * ((1 - row.confidence) / row.confidence) ** 2)
            assert row.extras["calibrated_confidence"] == pytest.approx(truth, abs=1e-9)
    before = (tmp_path / "both.jsonl").read_bytes()
    assert call(*command).code == 0 and (tmp_path / "both.jsonl").read_bytes() == before
    done = call(*files.join, *files.fit_on, "--output", tmp_path / "new.jsonl", "--calibrator", calibrator)
    assert done.code == 2 and done.err.startswith("error: the calibrator is for m on task 't' with fingerprint")
    assert not (tmp_path / "new.jsonl").exists()


def all_failed(files, folder):
    one, two = save(folder, [failed("a", "logprobs"), failed("b", "consistency")])
    return "--logprobs", one, "--consistency", two, "--output", folder / "o.jsonl"


def same_as_input(files, folder):
    one, two = save(folder, files.test)
    return "--logprobs", one, "--consistency", two, "--output", two


def few_rows(files, folder):
    return *files.plain, "--calibrate-on", *save(folder, files.fit[:19]), "--output", folder / "o.jsonl"


def member_is_fit_on(files, folder):
    """The file that Method 2 would write beside the output is one to fit on."""
    (folder / "t.csv").write_text("text\nx\n")
    fit_on = save(folder, files.fit, ("o.logprobs", "two"))
    return "--input", folder / "t.csv", "--output", folder / "o.jsonl", "--calibrate-on", *fit_on


BAD = {
    "one of two files": (lambda f, d: f.join[:2], "--logprobs and --consistency go together"),
    "texts and files": (lambda f, d: ("a text", *f.join), "two predictions files are joined without a model; a text"),
    "a calibrator and no output": (lambda f, d: (*f.join, "--calibrator", "x"), "--calibrator adds to the rows of"),
    "output is an input": (same_as_input, r"\S+two.jsonl is both input and output"),
    "a method's file is fitted on": (member_is_fit_on, r"\S+o.logprobs.jsonl is both input and output"),
    "few rows to fit on": (few_rows, "19 rows scored by both in --calibrate-on; at least 20 are needed"),
    "no row scored by both": (all_failed, "no row was scored by both methods"),
    "a figure without labels": (
        lambda f, d: (*f.plain, "--figure", d / "x.png"),
        "the methods cannot be compared: 90 of",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_command_is_one_line_and_exit_code_2_and_leaves_no_file(kind, files, tmp_path):
    command, message = BAD[kind]
    argv = command(files, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = call(*argv)
    assert done.code == 2 and done.out == "", done
    assert re.match(rf"error: {message}", done.err) and done.err.count("\n") == 1, done.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# With a model


TEXTS = ["Good", "A bad film", "Nothing happens for an hour"]
ROWS = [f"Text {i} is {word}" for i, word in enumerate(["good", "bad", "long", "dull", "bright", "new"] * 4)]


@pytest.fixture(scope="module")
def speaking(tiny_folder, tmp_path_factory):
    """The tiny model with a head that answers these texts with a label, the log odds from -3 to 3.

    Both answers' scores are solved for from the last states of the prompts; 25 is more than all other tokens have.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    with torch.no_grad():
        prompts = [tokenizer(TASKS["sentiment"].prompt(text), return_tensors="pt") for text in (*TEXTS, *ROWS)]
        last = torch.stack([model.model(**ids).last_hidden_state[0, -1] for ids in prompts]).double()
        odds = torch.linspace(-3, 3.2, len(last), dtype=torch.float64)[torch.arange(len(last)) * 10 % len(last)]
        for word, sign in ((" negative", -1), (" positive", 1)):
            (token,) = tokenizer.encode(word, add_special_tokens=False)
            model.lm_head.weight[token] = (torch.linalg.pinv(last) @ (25 + sign * odds / 2)).float()
    folder = tmp_path_factory.mktemp("models") / "speaking"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_llama(str(folder), adapter=None, device="cpu")


@pytest.fixture
def flags(speaking, monkeypatch):
    """What makes the script use that model, which is loaded once."""
    monkeypatch.setattr(combined, "load_llama", lambda **ignored: speaking)
    return "--device", "cpu", "--max-tokens", "1", "--samples", "6"


def test_single_texts_are_shown_by_all_three_methods_and_as_json_with_the_contracts_fields(flags):
    shown, rows = (
        call(*TEXTS, *flags).out,
        [json.loads(line) for line in call(*TEXTS, *flags, "--json").out.splitlines()],
    )
    assert [row["text"] for row in rows] == TEXTS and shown.count("Text: ") == 3
    fields = {"text", "logprobs", "consistency", "logprobs_prediction", "consistency_prediction", "rule", "reason"}
    fields |= {"calls", "probabilities", "label_mass", "total_probability", "prediction", "confidence", "fingerprint"}
    for row, block in zip(rows, shown.split("Text: ")[1:], strict=True):
        one, two = row["logprobs"], row["consistency"]
        assert set(row) == fields and {"prompt", "top_tokens", "answer_tokens"} <= set(one)
        assert {"votes", "unparsed", "agreement", "answers"} <= set(two)
        # The roots of the products, by hand.
        n = sum(two["votes"].values())
        roots = {k: math.sqrt(one["probabilities"][k] * (two["votes"][k] + 0.5) / (n + 1)) for k in LABELS}
        expected = {k: root / sum(roots.values()) for k, root in roots.items()}
        assert row["probabilities"] == pytest.approx(expected, abs=1e-9) and row["calls"] == 7
        assert row["total_probability"] == pytest.approx(row["confidence"] * row["label_mass"])
        assert row["label_mass"] == min(one["label_mass"], two["label_mass"])
        for name, found in (("1 logprobs", one), ("2 consistency", two), ("3 geometric mean", row)):
            shares = [f"{100 * found[key]:.2f} %" for key in ("confidence", "label_mass")]
            assert cells(block, name)[1:4] == [found["prediction"], *shares]
        assert f"Verdict: {row['prediction']}, confidence {100 * row['confidence']:.2f} %: {row['reason']}" in block
        assert f"{two['votes'][two['prediction']]} of 6 answers" in block


def test_a_table_is_scored_by_both_methods_beside_the_combined_file_and_continued(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(consistency, "ROWS_PER_WINDOW", {"cpu": 4})
    table, output = tmp_path / "t.jsonl", tmp_path / "both.jsonl"
    lines = [{"id": f"r{i}", "text": text, "label": LABELS[i % 2]} for i, text in enumerate([*ROWS, " "])]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    command = ("--input", table, "--output", output, *flags)
    first = call(*command)
    names = ("both.jsonl", "both.logprobs.jsonl", "both.consistency.jsonl")
    paths = [tmp_path / name for name in names]
    assert first.code == 0 and sorted(path.name for path in tmp_path.iterdir()) == sorted((*names, "t.jsonl"))
    whole = [path.read_bytes() for path in paths]
    ours, one, two = map(predictions.read, paths)
    assert [row.error for row in ours] == [None] * 24 + ["logprobs: the text is empty"]
    assert {row.method for row in one} == {"logprobs"} and {row.method for row in two} == {"consistency"}
    combination = combination_for((one[0].fingerprint, two[0].fingerprint), 2)
    assert ours == [*combine(combined.read_pairs(*paths[1:]), combination)]
    assert len({row.prediction for row in ours}) == 3  # a comparison of rows that differ
    counted = re.compile(r"^(logprobs|consistency): scored (\d+) rows in", re.M)
    assert counted.findall(first.err) == [("logprobs", "25"), ("consistency", "25")]
    assert all(re.fullmatch(r"\d+\.\d{3}", cells(first.out, name, table=1)[-1]) for name in CONTENDERS)
    # A finished command runs no model, so it knows no seconds, and touches no file.
    stamps = [path.stat().st_mtime_ns for path in paths]
    again = call(*command)
    assert again.code == 0 and counted.findall(again.err) == [] and cells(again.out, "3 stacked", table=1)[-1] == "-"
    assert [path.stat().st_mtime_ns for path in paths] == stamps
    # Torn files are finished to the same bytes; what is counted and timed is what ran now.
    lines_kept = whole[2].splitlines(keepends=True)
    paths[2].write_bytes(b"".join(lines_kept[:18]) + lines_kept[18][:40])
    torn = call(*command)
    assert torn.code == 0 and [path.read_bytes() for path in paths] == whole
    assert counted.findall(torn.err) == [("consistency", "7")]
    assert {cells(torn.out, name, table=1)[-1] for name in ("1 logprobs", "3 stacked")} == {"-"}
    assert re.fullmatch(r"\d+\.\d{3}", cells(torn.out, "2 consistency", table=1)[-1])


def test_weights_and_calibrators_of_other_rows_are_refused_before_the_model_scores_a_row(
    flags, speaking, files, calibrator, tmp_path, monkeypatch
):
    monkeypatch.setattr(speaking.model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    (tmp_path / "t.csv").write_text("text\nA film\n", encoding="utf-8")
    table = ("--input", tmp_path / "t.csv", "--output", tmp_path / "both.jsonl", *flags)
    for command in (("a text", *flags), table):
        for extra, message in (
            (files.fit_on, "--calibrate-on has the fingerprints aaaa1111 and bbbb2222, these rows "),
            (("--calibrator", calibrator), "the calibrator is for m on task 't' with fingerprint "),
        ):
            done = call(*command, *extra)
            assert done.code == 2 and f"error: {message}" in done.err and done.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
