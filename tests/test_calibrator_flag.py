"""logprobs_confidence.py --calibrator and --threshold: what they add to a file and to a text, and what they refuse.

Calibrators are made by hand for the tiny model, so the sigmoid says what every calibrated confidence must be; unbroken
runs say what a broken one must end with. The model is loaded once for the whole file, and nothing here depends on what
it says.
"""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_error, records

import logprobs_confidence
import predictions
from calibration import (
    ClasswiseCalibrator,
    FittedCalibrator,
    PlattScalingCalibrator,
    Recipe,
    VectorScalingCalibrator,
    calibrate_file,
    load_calibrator,
    save_calibrator,
)
from decisions import floor
from llama import load_llama
from logprobs_confidence import LabelScorer, label_scorer, main
from tables import text_key
from task import TASKS

ADDED = {"calibrated_confidence", "decision", "fitted_on"}
LABELS = ("negative", "positive")
WORDS = ["a", "film", "that", "is", "not", "good", "bad", "long", "funny", "dull", "and", "never", "quite"]
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=1 + i)) for i in range(12)]
TEXTS[4:6] = ["Not BAD", " "]  # a text that the calibrators have seen in another case, and one that is an error


@pytest.fixture(scope="module")
def llama(tiny_folder):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_llama(str(tiny_folder), device="cpu")
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prints(llama):
    """The fingerprints of plain predictions and of debiased ones."""
    scorer = label_scorer(llama, TASKS["sentiment"])
    return scorer.fingerprint, scorer.debiased_fingerprint


@pytest.fixture
def call(outcome, llama, tmp_path, monkeypatch):
    """Run the script in this process and in an empty folder: -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logprobs_confidence, "load_llama", lambda **_: llama)
    table = [{"id": f"r{i}", "text": text, "label": "positive"} for i, text in enumerate(TEXTS)]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")

    return lambda command, *more: outcome(main, *command.split(), *more)


@pytest.fixture
def no_scoring(monkeypatch):
    """From here on it is a fault to run the model."""

    def forbid():
        for name in ("score", "explain"):
            monkeypatch.setattr(LabelScorer, name, lambda *_, **__: pytest.fail("the model ran"))

    return forbid


def save(path, fingerprint, threshold=0.6, slope=2.0, class_aware=False, model="tiny", seen=("not  bad", "x"), **more):
    """A calibrator file with logit P = slope logit(c) - 1/2."""
    platt, keys = PlattScalingCalibrator(), frozenset(map(text_key, seen))
    platt.slope_, platt.intercept_ = slope, -0.5
    estimator = ClasswiseCalibrator(platt) if class_aware else platt
    if class_aware:
        estimator.calibrator_ = platt
    threshold = None if threshold is None else {"value": threshold}
    identity = (fingerprint, model, "sentiment", 100, 90)
    known = Recipe("platt", class_aware), estimator, LABELS, *identity, keys, {}, threshold
    save_calibrator(path, FittedCalibrator(*known, **more))
    return path


def platt(p, slope=2.0):
    return 1 / (1 + math.exp(0.5 - slope * (math.log(p) - math.log1p(-p))))


def listing():
    return sorted(path.name for path in Path().iterdir())


PLAIN, RUN = "--input t.jsonl --output plain.jsonl", "--input t.jsonl --output p.jsonl"


# A table


@pytest.mark.parametrize("class_aware", [False, True])
def test_every_scored_row_gets_its_calibrated_confidence_and_the_right_decision(class_aware, call, prints):
    assert call(PLAIN)[0] == 0
    plain = records("plain.jsonl")
    truth = {}
    for row in plain:
        if "error" not in row:
            second = platt(row["probabilities"]["positive"])
            aware = second if row["prediction"] == "positive" else 1 - second
            truth[row["id"]] = aware if class_aware else platt(row["confidence"])
    save("k.json", prints[0], class_aware=class_aware, threshold=None)
    fitted = load_calibrator("k.json")
    own = fitted.calibrate([row for row in predictions.read("plain.jsonl") if row.error is None])
    limit = sorted(own.tolist())[5]  # a row that stands exactly on the threshold is automated
    code, out, _ = call(RUN, "--calibrator", save("k.json", prints[0], class_aware=class_aware, threshold=limit))
    rows = records("p.jsonl")
    scored = [row for row in rows if "error" not in row]
    assert code == 0 and len(scored) == len(truth) == 11 and len({row["prediction"] for row in scored}) == 2
    assert [row["calibrated_confidence"] for row in scored] == own.tolist()
    assert own.tolist() == pytest.approx([truth[row["id"]] for row in scored], abs=1e-12)
    assert [row["decision"] for row in scored] == ["automate" if c >= limit else "review" for c in own]
    assert [row["id"] for row in rows if "fitted_on" in row] == ["r4"] and rows[4]["fitted_on"] is True
    # Nothing else changed: without what was added, each line is that of a run without the flag.
    stripped = [json.dumps({k: v for k, v in row.items() if k not in ADDED}, ensure_ascii=False) for row in rows]
    assert stripped == Path("plain.jsonl").read_text(encoding="utf-8").splitlines() and "error" in rows[5]
    assert f"  calibrated: automate 6, not scored 1, review 5 (automated from {floor(limit)} on)" in out.splitlines()


def test_a_long_file_is_calibrated_in_pieces_as_a_whole(tmp_path):
    common = {"method": "logprobs", "model": "tiny", "task": "sentiment", "fingerprint": "0123abcd", "label": None}
    rows = []
    for i, p in enumerate(np.random.default_rng(0).uniform(0.01, 0.99, 5000).tolist()):
        by_label = {"negative": 1 - p, "positive": p}
        rows.append(predictions.scored(str(i), f"text {i}", probabilities=by_label, label_mass=0.5, **common))
    predictions.replace(tmp_path / "p.jsonl", rows)
    seen = [f"Text {i}" for i in (0, 4095, 4096, 4999)]
    fitted = load_calibrator(save(tmp_path / "k.json", "0123abcd", threshold=0.9, seen=seen))
    said = calibrate_file(tmp_path / "p.jsonl", fitted, None)
    written, truth = records(tmp_path / "p.jsonl"), [platt(row.confidence) for row in rows]
    assert [row["calibrated_confidence"] for row in written] == pytest.approx(truth, abs=1e-12)
    assert [row["id"] for row in written if "fitted_on" in row] == ["0", "4095", "4096", "4999"]
    assert f"automate {sum(c >= 0.9 for c in truth):,}, review {sum(c < 0.9 for c in truth):,} " in said


def test_each_predicted_label_has_its_own_threshold_where_the_file_has_them(call, prints):
    save("k.json", prints[0], threshold=0)
    assert call(RUN, "--calibrator", "k.json")[0] == 0
    values = {row["id"]: row["calibrated_confidence"] for row in records("p.jsonl") if "error" not in row}
    middle = sorted(values.values())[3]
    for thresholds in ({"negative": middle, "positive": None}, {"negative": None, "positive": 0.0}):
        by_label = {label: {"value": value} for label, value in thresholds.items()}
        code, out, _ = call(RUN, "--calibrator", save("k.json", prints[0], threshold=0, label_thresholds=by_label))
        rows = [row for row in records("p.jsonl") if "error" not in row]
        limits = [2 if thresholds[row["prediction"]] is None else thresholds[row["prediction"]] for row in rows]
        expected = [
            "automate" if values[row["id"]] >= limit else "review" for row, limit in zip(rows, limits, strict=True)
        ]
        assert code == 0 and [row["decision"] for row in rows] == expected
        assert "automated by predicted label: negative" in out and "never" in out
    assert len({row["prediction"] for row in rows}) == 2


# Selecting in a whole table


def selected(values, wrong, n, rate):
    """Benjamini and Hochberg's step-up on p = (1 + wrong ones as confident) / (n + 1), written out."""
    p = [(1 + sum(w >= c for w in wrong)) / (n + 1) for c in values]
    passed = [k for k, value in enumerate(sorted(p), 1) if value <= rate * k / len(p)]
    return [bool(passed) and value <= sorted(p)[passed[-1] - 1] for value in p]


def test_a_table_is_selected_as_a_whole_and_the_selection_is_its_decision_column(call, prints, no_scoring):
    assert call(RUN, "--calibrator", save("k.json", prints[0]))[0] == 0
    values = [row["calibrated_confidence"] for row in records("p.jsonl") if "error" not in row]
    wrong = sorted([*sorted(values)[:6], 0.01, 0.02])
    save("k.json", prints[0], threshold=0.0, wrong_confidences=wrong)
    no_scoring()
    counts = set()
    for rate in ("0.05", "0.1", "0.2"):
        code, out, err = call(RUN, "--calibrator", "k.json", "--select-fdr", rate)
        decisions = [row["decision"] for row in records("p.jsonl") if "error" not in row]
        expected = selected(values, wrong, 100, float(rate))  # 100 rows, as `save` writes
        assert decisions == ["automate" if yes else "review" for yes in expected]
        assert (code, err) == (0, "") and f"at most {float(rate):.1%} of what is automated is wrong" in out
        assert "exchangeable" in out
        counts.add(sum(expected))
    assert len(counts) > 1
    assert call(RUN, "--calibrator", "k.json")[0] == 0
    assert {row["decision"] for row in records("p.jsonl") if "error" not in row} == {"automate"}


SELECTIONS = {
    "--select-fdr 0.1": "--select-fdr is for a table (--output) with --calibrator",
    "--select-fdr 1 --calibrator k.json": "--select-fdr 1: a share of errors between 0 and 1",
    "--select-fdr 0.1 --calibrator k.json --threshold 0.5": "takes the place of --threshold",
    "--select-fdr 0.1 --calibrator k.json": "fit it anew with calibration_demo.py",
}


@pytest.mark.parametrize(("flags", "named"), SELECTIONS.items())
def test_a_selection_that_cannot_be_made_is_refused_before_any_scoring(flags, named, call, prints, no_scoring):
    save("k.json", prints[0])  # made before a file held what a selection takes
    no_scoring()
    assert_one_error(call(RUN, *flags.split()), named)
    assert not Path("p.jsonl").exists()
    assert_one_error(call("--calibrator k.json --select-fdr 0.1", "A text"), "is for a table")


# Running it again


def stamp(*paths):
    return [(Path(p).read_bytes(), Path(p).stat().st_mtime_ns, Path(p).stat().st_ino) for p in paths]


def test_a_repeated_run_and_one_without_the_flag_leave_the_file_as_it_is(call, prints, no_scoring):
    first = call(RUN, "--calibrator", save("k.json", prints[0]))
    before = stamp("p.jsonl")
    no_scoring()
    for flags in (["--calibrator", "k.json"], ["--calibrator", "k.json", "--overwrite"], []):
        code, out, err = call(RUN, *flags)
        assert (code, err) == (0, "") and stamp("p.jsonl") == before
        assert out == first[1] if flags else "calibrated" not in out
    assert listing() == ["k.json", "p.jsonl", "t.jsonl"]


def test_another_calibrator_or_threshold_replaces_the_decisions_without_scoring_again(call, prints, no_scoring):
    save("k.json", prints[0]), save("other.json", prints[0], slope=3.0, threshold=0.9, seen=[TEXTS[0]])
    for name, flags in (("fresh", ["--calibrator", "other.json"]), ("p", ["--calibrator", "k.json"])):
        assert call(f"--input t.jsonl --output {name}.jsonl", *flags)[0] == 0
    fresh = Path("fresh.jsonl").read_bytes()
    assert Path("p.jsonl").read_bytes() != fresh
    no_scoring()
    code, _, err = call(RUN, "--calibrator", "other.json")
    assert (code, err) == (0, "") and Path("p.jsonl").read_bytes() == fresh
    assert [row["id"] for row in records("p.jsonl") if "fitted_on" in row] == ["r0"]
    assert call(RUN, "--calibrator", "other.json", "--threshold", "0")[0] == 0
    assert {row.get("decision") for row in records("p.jsonl")} == {"automate", None}
    assert call(RUN, "--calibrator", "other.json")[0] == 0 and Path("p.jsonl").read_bytes() == fresh


def test_a_run_killed_at_any_byte_ends_with_the_bytes_of_an_unbroken_one(call, prints, monkeypatch):
    monkeypatch.setattr(logprobs_confidence, "ROWS_PER_WINDOW", {"cpu": 4})
    save("k.json", prints[0])
    assert call(PLAIN)[0] == 0 and call(RUN, "--calibrator", "k.json")[0] == 0
    plain, whole = Path("plain.jsonl").read_bytes(), Path("p.jsonl").read_bytes()
    draw = random.Random(0)
    for left in [plain[: draw.randrange(len(plain))] for _ in range(3)] + [plain, whole[:-9], whole[:2000]]:
        Path("p.jsonl").write_bytes(left)
        assert call(RUN, "--calibrator", "k.json")[0] == 0 and Path("p.jsonl").read_bytes() == whole, len(left)
    # A table that grew by whole windows since its first rows were calibrated is such a run too.
    Path("p.jsonl").unlink()
    assert call(RUN, "--calibrator", "k.json", "--limit", "8")[0] == 0 and len(records("p.jsonl")) == 8
    assert call(RUN, "--calibrator", "k.json")[0] == 0 and Path("p.jsonl").read_bytes() == whole


# Single texts


def test_a_single_text_is_shown_with_its_calibrated_confidence_and_decision(call, prints):
    assert call(RUN, "--calibrator", save("k.json", prints[0], threshold=None))[0] == 0
    table = {row["text"]: row for row in records("p.jsonl")}
    shown = [TEXTS[0], "Not BAD", TEXTS[7]]
    limit = sorted(table[text]["calibrated_confidence"] for text in shown)[1] - 1e-4
    save("k.json", prints[0], threshold=limit)
    code, out, err = call("--json", *shown)
    plain = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and not any(ADDED & row.keys() for row in plain)
    code, out, err = call("--json --calibrator k.json", *shown)
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and sorted(row["decision"] for row in rows) == ["automate", "automate", "review"]
    for row, before, text in zip(rows, plain, shown, strict=True):
        added = {key: row.pop(key) for key in list(row) if key in ADDED}
        assert row == before and row["text"] == text
        assert added["calibrated_confidence"] == pytest.approx(platt(row["confidence"]), abs=1e-12)
        assert added["calibrated_confidence"] == pytest.approx(table[text]["calibrated_confidence"], abs=1e-4)
        assert added["decision"] == ("automate" if added["calibrated_confidence"] >= limit else "review")
        assert added.get("fitted_on") is (True if text == "Not BAD" else None)
        row |= added
    code, out, _ = call("--calibrator k.json", *shown)
    lines = [line for line in out.splitlines() if line.startswith("  Calibrated confidence ")]
    ends = ["", "; the calibrator was fitted on this very text", ""]
    expected = [f"{100 * row['calibrated_confidence']:.2f} %: {row['decision']}" for row in rows]
    assert lines == [f"  Calibrated confidence {a}{b}" for a, b in zip(expected, ends, strict=True)]
    endings = [part.split("\n\n")[0].splitlines()[-1] for part in out.split("  Verdict: ")[1:]]
    assert endings == lines
    assert "%: automate" in call("--calibrator k.json --threshold 0", "Fine")[1]
    assert "Calibrated" not in call("Fine")[1]


def test_a_calibrator_may_change_the_prediction_of_a_text_and_says_what_the_model_said(call, prints):
    vector = VectorScalingCalibrator()
    plain = [json.loads(line) for line in call("--json", *TEXTS[:4])[1].splitlines()]
    (other,) = set(LABELS) - {plain[0]["prediction"]}
    vector.beta_, vector.biases_ = 1.0, np.array([9.0 if label == other else 0.0 for label in LABELS])
    known = prints[0], "tiny", "sentiment", 100, 90, frozenset([text_key("x")]), {}, {"value": 0.6}
    save_calibrator("k.json", FittedCalibrator(Recipe("vector", True, relabel=True), vector, LABELS, *known))
    _, out, _ = call("--json --calibrator k.json", *TEXTS[:4])
    for before, line in zip(plain, out.splitlines(), strict=True):
        row = json.loads(line)
        odds = {label: p * (math.exp(9) if label == other else 1) for label, p in before["probabilities"].items()}
        expected = {label: value / sum(odds.values()) for label, value in odds.items()}
        assert row["probabilities"] == pytest.approx(expected, rel=1e-9) and row["prediction"] == other
        assert row["confidence"] == row["calibrated_confidence"] == row["probabilities"][other]
        assert (row["original_prediction"], row["original_probabilities"]) == (
            before["prediction"],
            before["probabilities"],
        )
    _, out, _ = call("--calibrator k.json", TEXTS[0])
    assert f"Verdict: {plain[0]['prediction']}" in out and f" % in {other}: automate" in out


# With --debias batch


DEBIASED = RUN + " --debias batch"


def test_a_debiased_file_is_calibrated_by_its_own_calibrator_and_the_raw_one_by_none(call, prints, no_scoring):
    save("k.json", prints[1])
    assert call(PLAIN)[0] == 0 and call(DEBIASED)[0] == 0
    corrected = Path("p.jsonl").read_bytes()
    code, out, err = call(DEBIASED, "--calibrator", "k.json")
    assert (code, err) == (0, "") and Path("p.raw.jsonl").read_bytes() == Path("plain.jsonl").read_bytes()
    rows = records("p.jsonl")
    stripped = [json.dumps({k: v for k, v in row.items() if k not in ADDED}, ensure_ascii=False) for row in rows]
    assert stripped == corrected.decode().splitlines() and "calibrated: " in out
    for row in rows[:5] + rows[6:]:
        assert row["fingerprint"] == prints[1]
        assert row["calibrated_confidence"] == pytest.approx(platt(row["confidence"]), abs=1e-12)
    before = stamp("p.jsonl", "p.raw.jsonl")
    no_scoring()
    for flags in (["--calibrator", "k.json"], []):
        assert call(DEBIASED, *flags)[0] == 0 and stamp("p.jsonl", "p.raw.jsonl") == before


def test_a_calibrator_of_the_other_fingerprint_is_refused_before_any_scoring(call, prints, no_scoring):
    save("raw.json", prints[0]), save("debiased.json", prints[1])
    no_scoring()
    for command, name, wanted, given in ((DEBIASED, "raw", *prints), (RUN, "debiased", *prints[::-1])):
        code, out, err = call(command, "--calibrator", f"{name}.json")
        assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: the calibrator is for tiny")
        assert err.index(wanted) < err.index(given) and listing() == ["debiased.json", "raw.json", "t.jsonl"]


def test_decisions_about_raw_confidences_are_not_carried_over_to_debiased_ones(call, prints):
    assert call("--input t.jsonl --output p.raw.jsonl", "--calibrator", save("k.json", prints[0]))[0] == 0
    assert call(DEBIASED)[0] == 0 and not any(ADDED & row.keys() for row in records("p.jsonl"))


# What is refused


def test_a_calibrator_for_something_else_is_refused_and_the_output_left_alone(call, prints, no_scoring):
    hostile = "a\x1b[2J\nb"
    save("k.json", prints[0]), save("wrong.json", "ffffffff", model=hostile)
    assert call(RUN, "--calibrator", "k.json")[0] == 0
    before = stamp("p.jsonl")
    no_scoring()
    new = "--input t.jsonl --output new.jsonl"
    for command in (RUN, new, RUN + " --task sentiment-yes-no", "One text"):
        name = "k.json" if "task" in command else "wrong.json"
        code, out, err = call(command, "--calibrator", name, *(["--overwrite"] if "--" in command else []))
        assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: the calibrator is for ")
        assert "fit a calibrator on predictions like these" in err and "\x1b" not in err
        assert stamp("p.jsonl") == before and not Path("new.jsonl").exists()


REFUSED = {
    "--calibrator .": "Is a directory",
    "--calibrator old.json": "old.json is not a calibrator file",
    "--calibrator edited.json": "edited.json: damaged or edited by hand: parameters: slope_",
    "--calibrator labels.json": "positive, negative",
    "--threshold 0.9": "needs --calibrator",
    "--calibrator k.json --threshold 1.5": "between 0 and 1",
    "--calibrator k.json --raw-prompt": "--raw-prompt",
}


@pytest.mark.parametrize(("flags", "named"), REFUSED.items())
def test_a_bad_flag_is_one_line_and_exit_code_2_before_any_scoring(flags, named, call, prints, no_scoring):
    record = json.loads(Path(save("k.json", prints[0])).read_text(encoding="utf-8"))
    edited = {"parameters": {"slope_": "steep", "intercept_": 0}}
    for name, changes in {"old": {"format": "version 0"}, "edited": edited, "labels": {"labels": LABELS[::-1]}}.items():
        Path(f"{name}.json").write_text(json.dumps(record | changes), encoding="utf-8")
    files = listing()
    no_scoring()
    for command in (["--input", "t.jsonl", "--output", "p.jsonl"], ["A text"]):
        assert_one_error(call("", *command, *flags.split(" ")), named)
        assert listing() == files


def test_the_calibrator_is_not_taken_for_an_output(call, prints):
    before = Path(save("k.json", prints[0])).read_bytes()
    code, _, err = call("--input t.jsonl --output k.json --calibrator k.json --overwrite")
    assert code == 2 and err.count("\n") == 1 and Path("k.json").read_bytes() == before


def test_a_threshold_of_ours_goes_before_that_of_the_file_and_without_any_nothing_is_automated(call, prints):
    save("k.json", prints[0], threshold=0.99), save("none.json", prints[0], threshold=None)
    assert call(RUN, "--calibrator", "k.json")[0] == 0
    values = [row["calibrated_confidence"] for row in records("p.jsonl") if "error" not in row]
    middle = sorted(values)[5]
    for name, threshold, limit in (("k.json", 0, 0), ("k.json", middle, middle), ("none.json", None, 2)):
        flags = [] if threshold is None else ["--threshold", str(threshold)]
        code, out, err = call(RUN, "--calibrator", name, *flags)
        rows = [row for row in records("p.jsonl") if "error" not in row]
        assert (code, err) == (0, "") and [row["calibrated_confidence"] for row in rows] == values
        assert [row["decision"] for row in rows] == ["automate" if c >= limit else "review" for c in values]
        said = "the calibrator guarantees nothing" if limit == 2 else f"automated from {floor(limit)} on"
        assert said in out
