"""The audit: repeats, near-duplicates and groups across splits, and how well words and a model guess the labels."""

import json
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
from conftest import exit_code_of, write_csv

import audit_dataset
import predictions
from tables import read_examples

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


def audit(capsys, *arguments):
    """(exit code, what is printed, the error) of the audit, run in this process."""
    return exit_code_of(audit_dataset.main, *arguments), *capsys.readouterr()


def write(path, *rows, columns=("text", "label")):
    return write_csv(path, rows, columns)


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*\.?\d*", text)]


# Our own dataset


def test_our_own_dataset_is_clean_and_the_card_shows_what_the_audit_prints(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = audit(capsys, "--predictions", ROOT / "data/predictions/base_test.jsonl")
    assert code == 0 and "No text has a near-duplicate in another split, and no group is in two splits." in out
    card = (ROOT / "data" / "README.md").read_text(encoding="utf-8").split("```")[3].strip("\n").splitlines()
    printed = out.splitlines()
    assert len(card) == len(printed)
    for line, shown in zip(printed, card, strict=True):  # another processor may round a baseline's row otherwise
        assert re.sub(r"[\d.]+", "#", line).split() == re.sub(r"[\d.]+", "#", shown).split()
        assert numbers(line) == pytest.approx(numbers(shown), abs=0.011)


# Repeats and leaks


def test_repeats_and_near_duplicates_are_counted_in_a_split_and_across(tmp_path, capsys):
    text = "one two three four five six"
    a = write(tmp_path / "a.csv", (text, "x"), ("ONE  two three four five six", "y"), ("q", "x"))
    b = write(tmp_path / "b.csv", ("zero " + text, "x"), ("another thing", "y"), ("r", "x"))
    code, out, _ = audit(capsys, a, b)
    assert code == 1 and "LEAK: 3 rows" in out
    lines = [line.split() for line in out.splitlines() if line.startswith(str(tmp_path))]
    #                  rows  labels             words               repeated, alike in it, in others
    assert lines[0][1:] == ["3", "2", "x,", "1", "y", "1,", "6,", "6", "1", "2", "2"]
    assert lines[1][1:] == ["3", "2", "x,", "1", "y", "1,", "2,", "7", "0", "0", "1"]
    assert f"{b} 1: zero one two three four five six" in out
    code, out, _ = audit(capsys, a, b, "--threshold", "0.9")
    assert code == 0 and "No text has a near-duplicate in another split." in out
    assert audit(capsys, a, b, "--shingle", "7")[0] == 0


def test_copies_of_a_text_leak_wherever_the_first_of_them_stands(tmp_path, capsys):
    """The search pairs copies with the first alone; every row with a copy elsewhere is still counted."""
    a = write(tmp_path / "a.csv", ("the same old words", "x"), ("the same old words", "x"))
    b = write(tmp_path / "b.csv", ("the same old words", "x"), ("the same old words", "y"), ("apples", "y"))
    c = write(tmp_path / "c.csv", ("pears", "y"))
    code, out, _ = audit(capsys, c, b, a)
    assert code == 1 and "LEAK: 4 rows" in out
    assert [line.split()[-2:] for line in out.splitlines()[1:4]] == [["0", "0"], ["2", "2"], ["2", "2"]]


def test_a_group_in_two_splits_is_a_leak(tmp_path, capsys):
    rows = ("apples", "one", "u1"), ("pears", "two", "u1")
    table = write(tmp_path / "t.csv", *rows, columns=("text", "split", "user"))
    assert audit(capsys, table, "--split-column", "split")[0] == 0
    code, out, _ = audit(capsys, table, "--split-column", "split", "--group-column", "user")
    assert code == 1 and "LEAK: 1 groups stand in more than one split, the first is 'u1'" in out
    assert audit(capsys, table, "--group-column", "user")[0] == 0
    blank = write(tmp_path / "b.csv", ("apples", "one", ""), ("pears", "two", ""), columns=("text", "split", "user"))
    assert audit(capsys, blank, "--split-column", "split", "--group-column", "user")[0] == 0


@pytest.fixture
def leaking(tmp_path):
    """A training table, and a test table of six rows: two have a near-duplicate there, one more its group."""
    columns = ("id", "text", "label", "group", "note")
    train = [("1", "one two three four five six", "x", "g1", ""), ("2", "apples and pears", "y", "g2", "")]
    test = [
        ("1", "zero one two three four five six", "x", "h1", "alike"),
        ("2", "Apples, and PEARS!", "y", "g2", "alike and of the group"),
        ("3", "quite another thing", "y", "g2", "of the group"),
        ("4", 'a "quoted" text\nof two lines', "x", "h2", "=1+1"),
        ("5", "this stands here twice", "x", "h3", "1,5"),
        ("6", "this stands here twice", "y", "", ""),
    ]
    return write(tmp_path / "a.csv", *train, columns=columns), write(tmp_path / "b.csv", *test, columns=columns)


def test_a_clean_table_is_the_last_one_without_what_leaks(leaking, tmp_path, capsys):
    clean = tmp_path / "clean.csv"
    code, out, _ = audit(capsys, *leaking, "--write-clean", clean)
    assert code == 1  # the tables as they are do leak
    assert f"{clean}: 3 of 6 rows of {leaking[1]}. Left out: 2 with a near-duplicate" in out
    assert "1 more of a group that stands in another" in out
    given, written = (pandas.read_csv(path, dtype=str, keep_default_na=False) for path in (leaking[1], clean))
    assert written.equals(given[3:].reset_index(drop=True))
    assert audit(capsys, leaking[0], clean)[0] == 0
    clean.write_text("my own table")
    code, _, err = audit(capsys, *leaking, "--write-clean", clean)
    assert code == 2 and "is there already, with another content" in err and clean.read_text() == "my own table"
    audit(capsys, *leaking, "--write-clean", clean, "--overwrite")
    assert len(pandas.read_csv(clean)) == 3


def test_a_clean_table_of_one_file_is_its_last_split_with_every_row_s_columns(tmp_path, capsys):
    rows = [
        {"text": "apples and pears", "part": "train"},
        {"text": "something else", "part": "test", "n": 1},
        {"text": "a third thing", "part": "train"},
        {"text": "apples and pears!", "part": "test"},
        {"text": "the last of them", "part": "test", "other": None},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    clean = tmp_path / "clean.csv"
    audit(capsys, tmp_path / "t.jsonl", "--split-column", "part", "--write-clean", clean)
    expected = "text,part,n,other\r\nsomething else,test,1,\r\nthe last of them,test,,\r\n"
    assert clean.read_bytes().decode() == expected


# Many rows and labels


@pytest.mark.parametrize("columns", [50, 100])
def test_nothing_is_wider_than_the_terminal(columns, tmp_path, monkeypatch, capsys):
    """77 labels, the n-th of them with n + 5 rows; long names of files, labels, ids and groups; texts that leak."""
    monkeypatch.setenv("COLUMNS", str(columns))
    folder = tmp_path / ("a_folder_with_a_long_name" * 3)
    folder.mkdir()
    files, labels = [], [f"a_long_label_{n}" for n in range(77)]
    for split in ("train", "test"):
        rows = [("leak", "of two tables the same " * 9, labels[9], "group" * 40)]
        for n, label in enumerate(labels):
            rows += [(f"{'row' * 9}{n}-{copy}", f"{split} {n} {copy}", label, "g") for copy in range(n + 5)]
        files.append(write(folder / f"{split}.csv", *rows, columns=("id", "text", "label", "group")))
    with open(tmp_path / "p.jsonl", "wb") as file:
        for row in read_examples(str(files[1])):
            even = dict.fromkeys(labels, 1 / 77)
            common = {"method": "m", "model": "model" * 30, "task": "t", "fingerprint": "00000000"}
            file.write(predictions.to_line(predictions.scored(row.id, row.text, row.label, even, 1.0, **common)))
    code, out, _ = audit(capsys, *files, "--predictions", tmp_path / "p.jsonl")
    assert code == 1 and max(map(len, out.splitlines())) <= columns
    told = " ".join(out.split())
    for named in ("3,312", "81 a_long_label_76, 80 a_long_label_75, 79 a_long_label_74, ... 71 more ..., 7 "):
        assert named in told
    assert "LEAK: 2 rows" in told and "LEAK: 2 groups" in told and "Bag of words" in told and "0.002" in told


def test_a_baseline_of_many_rows_is_one_of_a_random_sample(learnable, monkeypatch, capsys):
    monkeypatch.setattr(audit_dataset, "LEARNED", 30)
    out = audit(capsys, *learnable)[1]
    assert f"trained on {learnable[0]}, n = 30 of 60, drawn at random), tested on {learnable[1]}, n = 30 of 60" in out
    assert out.splitlines()[-3].split()[:2] == ["all", "30"]
    assert out == audit(capsys, *learnable, "--seed", "0")[1] != audit(capsys, *learnable, "--seed", "1")[1]


# Baselines


def test_domain_words_are_over_represented_among_texts_of_one_label():
    """ "goal" is a word of sports; "glad" is as frequent in both domains of its label, and only its label's."""
    from sklearn.feature_extraction.text import CountVectorizer

    texts = ["glad goal"] * 4 + ["glad home"] * 4 + ["cross memo"] * 4 + ["cross home"] * 4 + ["glad rare"]
    labels, domains = ["p"] * 8 + ["n"] * 8 + ["p"], ["s"] * 4 + ["h"] * 4 + ["w"] * 4 + ["h"] * 4 + ["s"]
    words = CountVectorizer(binary=True)
    counts = words.fit_transform(texts)
    each = zip(texts, labels, domains, strict=True)
    rows = [audit_dataset.TableRow("", "", text, label, domain=domain) for text, label, domain in each]
    found = audit_dataset.domain_words(counts, rows)
    assert dict(zip(words.get_feature_names_out(), found.tolist(), strict=True)) == {
        "cross": False, "glad": False, "goal": True, "home": True, "memo": True, "rare": False
    }  # fmt: skip


@pytest.fixture
def learnable(tmp_path):
    """Two splits of 60 texts: "up" and "down" give the label in the texts of part a, nothing does in part b."""
    draw = np.random.default_rng(0)
    files = []
    for split in ("train", "test"):
        rows = []
        for n in range(60):
            label = ("bad", "good")[n % 2]
            word = {"bad": "down", "good": "up"}[label] if n < 40 else "even"
            filler = " ".join(f"{split}{draw.integers(1000)}" for _ in range(8))
            rows.append((f"{split}-{n}", f"{word} {filler}", label, "ab"[n >= 40]))
        files.append(write(tmp_path / f"{split}.csv", *rows, columns=("id", "text", "label", "part")))
    return files


def test_the_baseline_learns_on_the_first_split_and_answers_on_the_last(learnable, capsys):
    code, out, _ = audit(capsys, *learnable)
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[-3:]}
    assert code == 0 and lines["a"][:2] == ["40", "1.000"] and lines["b"][:2] == ["20", "0.500"]
    assert lines["all"][1] == "0.833" and lines["a"][4] == "1.000"
    assert "domain words" not in out  # the table has no domains
    _, out, _ = audit(capsys, learnable[0])
    assert "5-fold out-of-fold" in out and "n = 60." in out


def predictions_of(path, table, **changes):
    """A predictions file that is right, at .8, about every row of a table."""
    with open(path, "w", encoding="utf-8") as file:
        for example in read_examples(table):
            other = {"good": "bad", "bad": "good"}[example.label]
            record = {"id": example.id, "text": example.text, "label": example.label, "prediction": example.label}
            record |= {"confidence": 0.8, "probabilities": {example.label: 0.8, other: 0.2}, "label_mass": 1.0}
            record |= {"method": "m", "model": "m", "task": "t", "fingerprint": "00000000"}
            file.write(json.dumps(record | changes.get(example.id.replace("-", "_"), {})) + "\n")
    return path


def test_a_models_numbers_stand_beside_the_baselines(learnable, tmp_path, capsys):
    nothing = {"prediction": None, "confidence": None, "probabilities": None, "label_mass": None, "error": "too long"}
    wrong = {"prediction": "bad", "probabilities": {"bad": 0.8, "good": 0.2}}
    path = predictions_of(tmp_path / "p.jsonl", learnable[1], test_0=nothing, test_59=wrong)
    code, out, _ = audit(capsys, *learnable, "--predictions", path)
    last = {line.split()[0]: " ".join(line.split()[-5:]) for line in out.splitlines()[-3:]}
    assert code == 0
    assert re.fullmatch(r"\[0\.\d+, 1\.000\], 1 without 1\.000", last["a"])
    # the one wrong row's P(good) = .2 ties with the ten right bad rows: 9 of 10 positives above, one tied
    assert last["b"].endswith("0.950 [0.751, 0.999] 0.950")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"test_3": {"id": "test-x"}}, "none of 'test-3' as it stands; make them with --input"),
        ({"test_3": {"label": "up", "prediction": "up", "probabilities": {"up": 0.8, "bad": 0.2}}}, "not in both"),
    ],
)
def test_predictions_of_other_rows_are_refused(learnable, tmp_path, capsys, changes, named):
    path = predictions_of(tmp_path / "p.jsonl", learnable[1], **changes)
    code, _, error = audit(capsys, *learnable, "--predictions", path)
    assert code == 2 and named in error


def test_tables_without_labels_are_audited_for_leaks_alone(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one text\nanother one\n", encoding="utf-8")
    code, out, _ = audit(capsys, tmp_path / "a.txt")
    assert code == 0 and "2 none" in out and "No baseline" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["data:test", "data:test"], "given twice"),
        (["data:test", "--threshold", "nan"], "--threshold nan"),
        (["data:test", "--sample", "9"], "--sample: an audit reads every row"),
        (["data:test", "--split-column", "fold"], "no column 'fold'"),
        (["twice.csv"], "twice.csv: 1 ids stand more than once, the first is '7'"),
        (["many.csv", "--split-column", "id"], "101 splits, the first '0': at most 100"),
        (["data:test", "--write-clean", "clean.jsonl"], "a file that ends in .csv"),
        (["data:test", "--write-clean", "clean.csv"], "there is only one"),
        (["many.csv", "--write-clean", "many.csv"], "many.csv is both input and output"),
        (["same.csv", "many.csv", "--write-clean", "clean.csv"], "no row of many.csv would be left"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("twice.csv", ("7", "x"), ("7", "y"), columns=("id", "text"))
    write("same.csv", ("1", "x"), columns=("id", "text"))
    write("many.csv", *((n, "x") for n in range(101)), columns=("id", "text"))
    code, _, error = audit(capsys, *arguments)
    assert code == 2 and named in error and error.startswith("error: ") and error.count("\n") == 1
