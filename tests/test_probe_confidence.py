"""probe_confidence.py, in this process and as a user types it: a folder is fitted, read again, and scores as Method 1.

A tiny random model serves where the numbers do not matter: its words tell the labels apart. What only a trained model
can show uses the real one.
"""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import hidden_features
import predictions
import scoring
import task as tasks
from calibration import FittedCalibrator, PlattScalingCalibrator, Recipe, save_calibrator
from llama import load_llama
from probe import WORDS
from probe_confidence import Classifier, main, probe_scorer
from probe_files import ProbeRecord, load_probe, save_tensors
from probe_training import task_of_labels, train_probe
from tables import Example, Table, text_key

ROOT = Path(__file__).parent.parent
WORDS_OF = {
    "billing": ["invoice", "charged", "refund", "paid", "price"],
    "delivery": ["parcel", "late", "courier", "address", "arrived"],
    "other": ["hello", "question", "thanks", "opening", "hours"],
}
COMMON = ["please", "my", "the", "it", "was", "and", "for", "today"]


def sentences(n, seed=0, labels=tuple(WORDS_OF)):
    """n examples of three labels, told by one or two of their words among others."""
    draw = random.Random(seed)
    rows = []
    for number in range(n):
        label = told = labels[number % len(labels)]
        if draw.random() < 0.15:  # nobody is always right
            label = draw.choice(labels)
        words = draw.choices(COMMON, k=draw.randint(2, 9)) + draw.choices(WORDS_OF[told], k=draw.randint(1, 2))
        draw.shuffle(words)
        rows.append(Example(f"r{seed}-{number}", " ".join(words), label))
    return rows


def write_table(path, rows, with_labels=True):
    lines = [{"id": row.id, "text": row.text} | ({"label": row.label} if with_labels else {}) for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_llama(str(tiny_folder), device="cpu")


@pytest.fixture(scope="module")
def fitted(tiny, tmp_path_factory):
    """(folder, table, examples, record) of a probe on a tiny model; two rows cannot be read."""
    folder = tmp_path_factory.mktemp("probe")
    examples = sentences(90)
    examples[7] = Example("too long", "word " * 600, "other")
    examples[40] = Example("empty", " ", "billing")
    table = write_table(folder / "train.jsonl", examples)
    task = task_of_labels(Table(str(table)))
    record = train_probe(tiny, task, tasks.labelled_examples(Table(str(table)), task, "a probe"), folder / "probe")
    return folder / "probe", table, examples, record


@pytest.fixture
def call(outcome, tiny_folder, one_tokenizer):
    """Run the script in this process on the tiny model: -> exit code, stdout, stderr."""

    return lambda *arguments, model=tiny_folder: outcome(main, *arguments, "--model", model)


def rows_of(path):
    return predictions.read(path)


# What a folder holds


def test_out_of_fold_predictions_are_a_predictions_file_of_the_training_rows(fitted):
    folder, _, examples, record = fitted
    rows = rows_of(folder / "out_of_fold.jsonl")
    assert [(row.id, row.text, row.label) for row in rows] == [(e.id, e.text, e.label) for e in examples]
    assert [row.id for row in rows if row.error] == ["too long", "empty"]
    scored = [row for row in rows if row.error is None]
    assert {(row.method, row.label_mass, row.model, row.fingerprint) for row in scored} == {
        ("probe", 1.0, "tiny", record.fingerprint)
    }
    right = np.mean([row.prediction == row.label for row in scored])
    loss = -np.mean([np.log(row.probabilities[row.label]) for row in scored])
    assert right == pytest.approx(record.out_of_fold["accuracy"]) and right > 0.7
    assert loss == pytest.approx(record.out_of_fold["log_loss"])
    assert record.n == len(scored) == 88 and record.labels == ["billing", "delivery", "other"]
    assert {path.name for path in folder.iterdir()} == {
        "features.f32",
        "features.json",
        "out_of_fold.jsonl",
        "probe.json",
        "probe.safetensors",
    }


def test_a_probe_that_is_read_again_says_the_same_to_the_last_bit(fitted, tiny, tmp_path):
    folder, _, _, record = fitted
    again, probe = load_probe(folder)
    assert vars(again) == vars(record) and isinstance(again, ProbeRecord)
    save_tensors(tmp_path / "probe.safetensors", probe)
    assert (tmp_path / "probe.safetensors").read_bytes() == (folder / "probe.safetensors").read_bytes()
    shutil.copytree(folder, tmp_path / "copy")
    texts = [row.text for row in sentences(20, seed=2)]
    one, two = (probe_scorer(tiny, *load_probe(place)) for place in (folder, tmp_path / "copy"))
    examples = [Example(str(n), text, None) for n, text in enumerate(texts)]
    assert one.score_together(examples) == two.score_together(examples)


def test_the_probe_tells_unseen_rows_and_knows_those_it_was_fitted_to(fitted, tiny):
    folder, _, examples, _ = fitted
    scorer = probe_scorer(tiny, *load_probe(folder))
    unseen = scorer.score_together(sentences(60, seed=1))
    assert np.mean([row.prediction == row.label for row in unseen]) > 0.7
    assert not any("trained_on" in row.extras for row in unseen)
    assert all(row.extras["trained_on"] for row in scorer.score_together(examples[:5]))


def test_contributions_of_an_explained_text_add_up_to_its_log_odds(fitted, tiny):
    scorer = probe_scorer(tiny, *load_probe(fitted[0]))
    found = scorer.explain("was the parcel late")
    (row,) = scorer.score_together([Example("1", "was the parcel late", None)])
    assert found["probabilities"] == pytest.approx(dict(row.probabilities), abs=1e-6)
    assert (found["prediction"], found["fingerprint"]) == (row.prediction, row.fingerprint)
    odds = found["probabilities"][found["prediction"]] / found["probabilities"][found["runner_up"]]
    assert sum(found["contributions"].values()) == pytest.approx(np.log(odds))
    assert any(member.name == WORDS for member in scorer.probe.members) and WORDS in found["contributions"]


# The command line


def test_a_table_is_fitted_scored_and_calibrated(fitted, call, tmp_path):
    _, table, _, record = fitted
    code, out, _ = call("--train", table, "--output-dir", tmp_path / "probe")
    assert code == 0 and "88 rows in" in out and "chosen: layer" in out and "the commonest label" in out
    again, _ = load_probe(tmp_path / "probe")
    assert again.made_from == record.made_from and again.out_of_fold == pytest.approx(record.out_of_fold, abs=1e-3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "probe").iterdir()}
    assert call("--train", table, "--output-dir", tmp_path / "probe")[:2] == (0, out)  # a finished one stays
    assert {path.name: path.read_bytes() for path in (tmp_path / "probe").iterdir()} == before

    new = write_table(tmp_path / "new.jsonl", sentences(70, seed=3))
    scored = tmp_path / "scored.jsonl"
    code, out, err = call("--probe", tmp_path / "probe", "--input", new, "--output", scored)
    assert code == 0 and "70 of 70 rows scored" in out and "fitted to" not in err
    platt = PlattScalingCalibrator()
    platt.slope_, platt.intercept_ = 0.5, 0.0
    known = Recipe("platt", False), platt, tuple(WORDS_OF), again.fingerprint, again.model, "table", 88, 80
    calibrator = tmp_path / "calibrator.json"
    save_calibrator(calibrator, FittedCalibrator(*known, frozenset({text_key("x")}), {}, {"value": 0.6}))
    code, out, err = call("--probe", tmp_path / "probe", "--input", new, "--output", scored, "--calibrator", calibrator)
    assert code == 0 and "calibrated: " in out
    assert all("calibrated_confidence" in row.extras for row in rows_of(scored))
    code, out, _ = call("--probe", tmp_path / "probe", "--calibrator", calibrator, "the courier was late")
    assert code == 0 and "Verdict: delivery" in out and "Calibrated confidence" in out and "Log odds of delivery" in out


def test_texts_are_explained_for_people_and_as_json(fitted, call):
    code, out, _ = call("--probe", fitted[0], "a refund, please", "my parcel")
    assert code == 0 and out.count("Verdict") == 2 and "Text: a refund, please" in out
    code, out, _ = call("--probe", fitted[0], "--json", "a refund, please")
    found = json.loads(out)
    assert found["prediction"] in WORDS_OF and found["label_mass"] == 1.0 and len(found["probabilities"]) == 3


def test_rows_that_the_probe_was_fitted_to_are_counted(fitted, call, tmp_path):
    folder, table, _, _ = fitted
    code, _, err = call("--probe", folder, "--input", table, "--output", tmp_path / "p.jsonl")
    assert code == 0 and "the probe was fitted to 88 of these texts" in err
    assert sum(bool(row.error) for row in rows_of(tmp_path / "p.jsonl")) == 2


def test_a_task_asks_in_its_prompt_without_its_examples_unless_told(tiny_folder, call, tmp_path):
    rows = sentences(24, labels=("billing", "other"))
    named = [Example(row.id, row.text, {"billing": "negative", "other": "positive"}[row.label]) for row in rows]
    table = write_table(tmp_path / "t.jsonl", named)
    common = ["--train", table, "--task", "sentiment"]
    assert call(*common, "--output-dir", tmp_path / "without")[0] == 0
    assert call(*common, "--with-examples", "--output-dir", tmp_path / "with")[0] == 0
    without, with_examples = (load_probe(tmp_path / name)[0] for name in ("without", "with"))
    assert without.prompt == ["Text: ", "\nSentiment:"] and without.task["examples"] == []
    assert with_examples.prompt[0].endswith("Text: ") and "Setup took two minutes" in with_examples.prompt[0]
    assert without.fingerprint != with_examples.fingerprint
    assert any(candidate["name"] == "first token" for candidate in without.candidates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probe", "P", "x", "--endpoint", "http://127.0.0.1/v1"], "a server shows no hidden states"),
        (["x"], "give either --train FILE --output-dir DIR, or --probe DIR"),
        (["--train", "T"], "--train needs --output-dir DIR"),
        (["--train", "T", "--output-dir", "d", "--json"], "--train fits a probe; --json has no part in it"),
        (["--train", "T", "--output-dir", "d", "--with-examples"], "--with-examples keeps those of a --task"),
        (["--probe", "P", "--task", "sentiment", "x"], "--task belongs to --train"),
        (["--probe", "P"], "give either texts or a table"),
        (["--probe", "nowhere", "x"], "nowhere holds no probe"),
        (["--train", "UNLABELLED", "--output-dir", "d"], "has 0 labels; a probe tells at least two apart"),
        (["--train", "PARTLY", "--output-dir", "d"], "row 'r9-3' has no label"),
        (["--train", "FEW", "--output-dir", "d"], "6 rows of 3 labels; a probe needs at least 20 rows"),
        (["--train", "T", "--output-dir", "TMP"], "holds other files; name a new folder"),
        (["--train", "T", "--limit", "60", "--output-dir", "P"], "a probe of other rows or settings; --overwrite"),
    ],
)
def test_bad_input_is_one_line(arguments, message, fitted, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = sentences(30, seed=9)
    places = {
        "P": fitted[0],
        "T": fitted[1],
        "TMP": tmp_path,
        "UNLABELLED": write_table(tmp_path / "u.jsonl", rows, with_labels=False),
        "PARTLY": write_table(tmp_path / "p.jsonl", [*rows[:3], Example("r9-3", "no label", None), *rows[4:]]),
        "FEW": write_table(tmp_path / "f.jsonl", rows[:6]),
    }
    code, out, err = call(*[places.get(argument, argument) for argument in arguments])
    assert code == 2 and message in err and err.splitlines()[-1].startswith("error: ") and out == ""


# Refusals


def test_a_probe_for_other_weights_precision_or_prompt_is_refused(fitted, call, tiny_folder, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = fitted[0]
    code, _, err = call("--probe", folder, "--dtype", "bfloat16", "x")
    assert code == 2 and "with precision float32, this is tiny with bfloat16" in err
    other = tmp_path / "tiny"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 0.001 for k, v in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    code, _, err = call("--probe", folder, "x", model=other)
    assert code == 2 and "the probe was fitted on tiny with weights" in err and torch is not None
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    content = json.loads((changed / "probe.json").read_text())
    (changed / "probe.json").write_text(json.dumps(content | {"prompt": ["Text: ", ""]}))
    code, _, err = call("--probe", changed, "x")
    assert code == 2 and "another prompt" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"format": "another"}, "its format is not"),
        (lambda content: content | {"layer": "two"}, "layer: Input should be a valid integer"),
        (lambda content: content | {"members": [{"name": "layer 9", "strength": 1}]}, "damaged or edited by hand"),
        (lambda content: {k: v for k, v in content.items() if k != "identity"}, "identity: Field required"),
    ],
)
def test_a_damaged_record_is_one_line(change, message, fitted, tmp_path):
    shutil.copytree(fitted[0], tmp_path / "probe")
    path = tmp_path / "probe" / "probe.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        load_probe(tmp_path / "probe")


def test_numbers_of_another_probe_are_refused(fitted, tmp_path):
    shutil.copytree(fitted[0], tmp_path / "probe")
    _, probe = load_probe(tmp_path / "probe")
    probe.weights[0] += 0.1
    save_tensors(tmp_path / "probe" / "probe.safetensors", probe)
    with pytest.raises(ValueError, match=r"is not the file that .* was written with"):
        load_probe(tmp_path / "probe")


# Killed and continued


def test_a_stopped_training_goes_on_from_the_features_that_are_there(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(hidden_features.ROWS_PER_WINDOW, "cpu", 16)
    examples = sentences(40, seed=5)
    task, real, asked = task_of_labels(examples), tiny.hidden_states, []

    def stopping(rows, *arguments):
        asked.append(len(rows))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(rows, *arguments)

    monkeypatch.setattr(type(tiny), "hidden_states", lambda llama, *arguments: stopping(*arguments))
    with pytest.raises(KeyboardInterrupt):
        train_probe(tiny, task, examples, tmp_path / "probe")
    assert not (tmp_path / "probe" / "probe.json").exists()
    record = train_probe(tiny, task, examples, tmp_path / "probe")
    assert asked == [16, 16, 16, 8] and record.n == 40
    assert record.tensors == train_probe(tiny, task, examples, tmp_path / "unbroken").tensors


def test_a_stopped_scoring_is_continued_and_makes_the_same_file(fitted, tiny, tmp_path, monkeypatch):
    scorer = probe_scorer(tiny, *load_probe(fitted[0]), batch_size=4)
    monkeypatch.setitem(hidden_features.ROWS_PER_WINDOW, "cpu", 8)
    table, together = sentences(30, seed=5), tiny.hidden_states
    scoring.score_table(scorer, table, 30, tmp_path / "whole.jsonl")
    calls = []

    def stopping(*arguments):
        for batch in together(*arguments):
            calls.append(len(batch.rows))
            if len(calls) == 4:  # inside the second window
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(type(tiny), "hidden_states", lambda llama, *arguments: stopping(*arguments))
    with pytest.raises(KeyboardInterrupt):
        scoring.score_table(scorer, table, 30, tmp_path / "p.jsonl")
    assert len(rows_of(tmp_path / "p.jsonl")) == 8 and (tmp_path / "p.jsonl.unfinished").exists()
    scoring.score_table(scorer, table, 30, tmp_path / "p.jsonl")
    assert (tmp_path / "p.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sum(calls) == 30 + 4  # the rows of the batch that was stopped ran twice


# From Python


def test_a_classifier_gives_records_in_order_and_an_error_where_there_is_no_text(fitted, tiny_folder):
    classifier = Classifier(fitted[0], model=str(tiny_folder))
    one, two, three = classifier.predict(["the invoice was paid", " ", "thanks, a question"])
    assert one.prediction in WORDS_OF and two.error == "the text is empty" and three.error is None
    assert one.fingerprint == fitted[3].fingerprint and sum(one.probabilities.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="a list of texts"):
        classifier.predict("one text")


def test_many_labels_of_few_rows_each_are_fitted_and_the_rarest_are_named(tiny, tmp_path):
    draw, labels = random.Random(0), [f"intent {n}" for n in range(25)]
    numbers = [n % 25 for n in range(25 * 5 + 3)]
    texts = [f"word{number} " + " ".join(draw.choices(COMMON, k=4)) for number in numbers]
    examples = [Example(str(n), text, labels[n % 25]) for n, text in enumerate(texts)]
    examples.append(Example("rare", "nothing like it", "intent rare"))
    task = tasks.Task("table", {label: (label,) for label in [*labels, "intent rare"]}, "{text}")
    record = train_probe(tiny, task, examples, tmp_path / "probe")
    assert record.rare == {"intent rare": 1} and len(record.labels) == 26
    rows = rows_of(tmp_path / "probe" / "out_of_fold.jsonl")
    assert len(rows[0].probabilities) == 26 and record.out_of_fold["accuracy"] > 0.2
    explanation = probe_scorer(tiny, *load_probe(tmp_path / "probe")).explain("word5 please")
    assert len(explanation["probabilities"]) == 26


# What the real model knows


@pytest.mark.study
def test_the_default_model_tells_questions_apart_after_sixty_of_them(embedded, tmp_path):
    people, places = ("doctor", "singer", "king", "painter", "poet"), ("river", "city", "island", "lake", "mountain")
    ask = "Tell me about the {} {}.", "I read of a {} {}.", "What of that {} {}?", "The {} {}, please."
    manner = ("old", "famous", "small", "great", "unknown", "Greek")
    rows = [(a.format(m, n), "who") for a in ask for m in manner for n in people]
    rows += [(a.format(m, n), "where") for a in ask for m in manner for n in places]
    draw = random.Random(0)
    draw.shuffle(rows)
    known = [(text, label) for text, label in rows if not any(n in text for n in ("poet", "mountain"))][:60]
    unseen = [(text, label) for text, label in rows if any(n in text for n in ("poet", "mountain"))]
    task = tasks.Task("table", {"where": ("where",), "who": ("who",)}, "{text}")
    examples = [Example(str(n), *row) for n, row in enumerate(known)]
    record = train_probe(embedded, task, examples, tmp_path / "probe", groups=range(len(examples)))
    assert record.out_of_fold["accuracy"] > 0.95
    scorer = probe_scorer(embedded, *load_probe(tmp_path / "probe"))
    found = scorer.score_together([Example(str(n), *row) for n, row in enumerate(unseen)])
    assert np.mean([row.prediction == row.label for row in found]) > 0.9  # nouns that no training row has
