"""The recordings in data/predictions/: what they are of, that the code still gives them, and how they are remade."""

import json
from dataclasses import replace
from itertools import islice

import pytest
from test_architecture import ROOT

import pooling
import predictions
import record_predictions as record
from consistency_confidence import answer_sampler
from logprobs_confidence import label_scorer
from record_predictions import RECORDINGS
from tables import read_examples
from task import TASKS
from voting import Sampling

TABLES = [name for name, recording in RECORDINGS.items() if "--output" in recording.arguments]
SHOWN = [name for name, recording in RECORDINGS.items() if recording.prints]
COMBINED = [name for name in TABLES if RECORDINGS[name].method == "combined"]


def read_json(name):
    return [json.loads(line) for line in (ROOT / RECORDINGS[name].path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def fingerprints():
    """Model -> method -> the fingerprint that today's code gives, from the tokenizer and the files' hashes alone."""
    from llama import load_reader
    from model_files import folder_hash, locate

    reader, found = load_reader("default"), {}
    for model, adapter in record.MODELS.items():
        identity = {"weights": locate("default")[2], "precision": "float32"}
        identity |= {} if adapter == "none" else {"adapter": folder_hash(ROOT / adapter)}
        llama, task = replace(reader, identity=identity), TASKS["sentiment"]
        one, two = label_scorer(llama, task).fingerprint, answer_sampler(llama, task, Sampling()).fingerprint
        both = pooling.combination_for((one, two), 2).fingerprint
        found[model] = {"logprobs": one, "consistency": two, "combined": both}
    return found


# What is recorded


def test_every_file_has_its_command_and_every_command_its_file_and_its_place_in_the_data_card():
    # public/ is scripts/public_study.py's
    files = {path.name for path in (ROOT / record.FOLDER).iterdir() if path.suffix != ".part" and path.is_file()}
    assert files == {recording.path.name for recording in RECORDINGS.values()}
    card = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for name, recording in RECORDINGS.items():
        assert f"\n{recording.command}\n" in card, name


@pytest.mark.parametrize("name", TABLES)
def test_a_table_holds_its_split_in_order_scored_by_one_model_and_method(name, fingerprints):
    model, split, recording = name.partition("_")[0], name.rpartition("_")[2], RECORDINGS[name]
    rows = predictions.read(ROOT / recording.path)
    examples = [(e.id, e.text, e.label) for e in read_examples(f"data:{split}")]
    assert [(row.id, row.text, row.label) for row in rows] == examples and len(rows) == recording.rows
    said = {(row.error, row.method, row.model, row.task, row.fingerprint) for row in rows}
    expected = fingerprints[model][recording.method]
    assert said == {(None, recording.method, "smollm2-135m-instruct", "sentiment", expected)}


@pytest.mark.parametrize("name", SHOWN)
def test_explanations_are_of_their_texts_and_say_nothing_of_the_machine(name, fingerprints):
    recording, rows = RECORDINGS[name], read_json(name)
    texts = record.TOUR if name.endswith("tour") else recording.arguments[-len(rows) :]
    assert [row["text"] for row in rows] == [*texts] and len(rows) == recording.rows
    of_model = fingerprints["tuned" if name.startswith("tuned") else "base"]
    assert {row["fingerprint"] for row in rows} == {of_model[recording.method]}
    assert "model_path" not in json.dumps(rows)


@pytest.mark.parametrize("name", COMBINED)
def test_method_3_is_remade_from_the_other_two_byte_for_byte(name, tmp_path):
    compared, differences = record.check(RECORDINGS[name], 24, tmp_path)
    assert not differences and compared.startswith(f"all {RECORDINGS[name].rows:,} rows")


# Checking


@pytest.fixture
def rerun(monkeypatch):
    """Stand in for the model: a command gives the recorded rows, as `change` alters them."""

    def stand_in(change):
        def run(recording, output, *more, quiet=False):
            limit = int(more[1]) if more else None
            with open(ROOT / recording.path, encoding="utf-8") as file:
                rows = [json.loads(line) for line in islice(file, limit)]
            output.write_text("".join(json.dumps(change(row)) + "\n" for row in rows), encoding="utf-8")

        monkeypatch.setattr(record, "run", run)

    return stand_in


def other(**values):
    return lambda row: row | values


def off_by(difference):
    return lambda row: row | {"probabilities": {name: p + difference for name, p in row["probabilities"].items()}}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("base_test", off_by(5e-5), None),
        ("base_test", off_by(2e-4), "row 1: probabilities.negative is"),
        ("tuned_calibration", other(fingerprint="00000000"), 'fingerprint is "00000000", recorded as "'),
        ("tuned_consistency_test", other(unparsed=7), "row 1: unparsed is 7, recorded as"),
        ("tuned_consistency_test", other(answers=["x"] * 10), "sampled answers are others"),
        ("base_first_tokens", other(prompt_token_ids=[1]), "row 1: prompt_token_ids is [1], recorded as"),
        ("tour", other(reason="because"), 'row 1: reason is "because", recorded as'),
    ],
)
def test_check_tells_a_change_from_rounding(name, change, said, rerun, capsys):
    rerun(change)
    if said is None:
        record.main(["--check", name])
    else:
        with pytest.raises(SystemExit) as ended:
            record.main(["--check", name])
        assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert ("DIFFERS" in printed) == (said is not None) and (said or "same") in printed


@pytest.mark.parametrize(
    ("moved", "said"), [(1, "10 rows, 100 answers (1 moved by rounding)"), (2, "2 of 100 sampled answers are others")]
)
def test_a_draw_that_rounding_moved_is_told_and_forgiven_but_not_two(moved, said, rerun, capsys):
    first = [row["id"] for row in read_json("base_consistency_test")[:moved]]

    def move(row):
        answers = [*row["answers"][:-1], " moved"]
        return row | {"answers": answers, "confidence": 0.5, "votes": {}} if row["id"] in first else row

    rerun(move)
    recording = RECORDINGS["base_consistency_test"]
    assert record.check_all([recording], limit=10) == (moved == 1) and said in capsys.readouterr().out


@pytest.mark.study
def test_check_runs_the_real_model(capsys):
    record.main(["--check", "--limit", "2", "tuned_consistency_calibration"])
    assert "tuned_consistency_calibration.jsonl    same  2 rows, 20 answers" in capsys.readouterr().out


# Making


def test_a_recording_is_replaced_when_complete_and_a_stopped_run_says_what_is_left(tmp_path, monkeypatch, capsys):
    (tmp_path / record.FOLDER).mkdir(parents=True)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    paths = {name: tmp_path / RECORDINGS[name].path for name in ("base_test", "tour")}
    for path in paths.values():
        path.write_text("old", encoding="utf-8")

    def run(recording, output, *more, quiet=False):
        output.write_text("new", encoding="utf-8")
        if recording.prints:
            raise KeyboardInterrupt

    monkeypatch.setattr(record, "run", run)
    with pytest.raises(SystemExit) as ended:
        record.main(["tour", "base_test"])
    left = "to go on: python scripts/record_predictions.py tour\n"
    assert ended.value.code == 130 and left in capsys.readouterr().err
    assert [path.read_text(encoding="utf-8") for path in paths.values()] == ["new", "old"]
    assert not paths["base_test"].with_suffix(".jsonl.part").exists()


def test_a_command_that_fails_is_an_error_and_changes_nothing(tmp_path):
    broken = replace(RECORDINGS["tour"], arguments=(*RECORDINGS["tour"].arguments, " "))
    with pytest.raises(ValueError, match="tour: its command ended with exit code 2: error: text 7 is empty"):
        record.run(broken, tmp_path / "x", quiet=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing"], "no recording 'nothing'; there are base_calibration, "),
        (["--limit", "3"], "--limit 3: at least 1, with --check"),
        (["--check", "--limit", "0"], "--limit 0: at least 1"),
        (["ablation"], "ablation is made by python scripts/ablation.py --run FOLDER"),
    ],
)
def test_bad_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        record.main(flags)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and message in said
