"""The dataset: what data/README.md promises of it, how it is built, how a split is read, and the audit that checks it.

The promises are checked on the committed files by plain counting, not by the code that built them.
"""

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest

import audit_dataset
import build_dataset
import tables
import task
from task import TASKS, read_examples, read_rows

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data" / "sentiment"
SIZES = {"strong": 500, "medium": 1000, "weak": 2500, "neutral": 1000}
CATEGORIES = {f"{difficulty}_{label}": n for difficulty, n in SIZES.items() for label in ("positive", "negative")}
SPLITS = {"train": 6000, "validation": 1000, "calibration": 1000, "test": 2000}


@pytest.fixture(scope="module")
def rows():
    """Every row of splits.csv with its text, read with nothing but csv and split."""
    texts = {c: (DATA / f"{c}.txt").read_text(encoding="utf-8").rstrip("\n").split("\n") for c in CATEGORIES}
    with open(DATA / "splits.csv", encoding="utf-8", newline="") as file:
        return [row | {"text": texts[row["category"]][int(row["line"]) - 1]} for row in csv.DictReader(file)]


def script(name, *arguments, **variables):
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | variables, timeout=300)


# What data/README.md promises


def test_ten_thousand_texts_each_once_in_the_sizes_promised(rows):
    assert len(rows) == len({" ".join(row["text"].casefold().split()) for row in rows}) == 10_000
    assert Counter(row["category"] for row in rows) == CATEGORIES
    assert len({(row["category"], row["line"]) for row in rows}) == len({row["id"] for row in rows}) == 10_000
    assert Counter(row["split"] for row in rows) == SPLITS
    for row in rows:
        assert row["id"].startswith(row["split"] + "-") and 4 <= len(row["text"].split()) <= 35
        assert row["text"] == " ".join(row["text"].split()) and not re.search(r"[\[\]{}|]", row["text"])


def test_every_split_has_its_share_of_every_category_and_two_thirds_of_the_rules_domain(rows):
    count = Counter((row["split"], row["category"]) for row in rows)
    ruled = Counter((r["split"], r["category"]) for r in rows if r["domain"] in ("sports", "workplace"))
    for split, size in SPLITS.items():
        for category, total in CATEGORIES.items():
            assert count[split, category] == total * size // 10_000
            assert abs(ruled[split, category] - count[split, category] * 2 / 3) < 1
    for row in rows:
        assert row["domain"] != ("workplace" if row["category"].endswith("positive") else "sports")
    assert len({row["domain"] for row in rows}) > 10


def test_frames_are_in_one_split_small_and_give_both_labels_where_a_coin_does(rows):
    homes, sizes, labels = defaultdict(set), Counter(), defaultdict(set)
    for row in rows:
        homes[row["group"]].add(row["split"])
        sizes[row["category"], row["group"]] += 1
        if row["category"].startswith("neutral") and row["domain"] not in ("sports", "workplace"):
            labels[row["group"]].add(row["category"])
    assert all(len(splits) == 1 for splits in homes.values())
    assert all(n <= 0.015 * CATEGORIES[category] for (category, _), n in sizes.items())
    both = sum(len(found) == 2 for found in labels.values())
    assert both > 0.7 * len(labels)  # the coin falls for each row, not for each frame
    written = sum(len(build_dataset.read_frames(path)) for path in (DATA / "frames").glob("*_*.txt"))
    assert len(homes) == written  # no frame is idle


@pytest.mark.parametrize("width", [1, 2, 3])
def test_no_two_texts_are_near_duplicates(rows, width):
    assert list(tables.near_duplicates([row["text"] for row in rows], 0.6, width)) == []


def test_no_text_resembles_what_the_prompt_or_the_sample_shows(rows):
    shown = [text for t in TASKS.values() for text, _ in t.examples]
    shown += [example.text for example in read_examples(ROOT / "data" / "sample.csv")]
    words = [set(re.findall(r"\w+", text.casefold())) for text in shown]
    for row in rows:
        mine = set(re.findall(r"\w+", row["text"].casefold()))
        assert all(len(mine & other) < 0.6 * len(mine | other) for other in words), row


def test_the_rule_can_be_learned_in_the_neutral_categories_and_the_coin_cannot():
    """A bag of words, trained on train: high accuracy on the domain part of neutral, chance on its coin part."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = ([row for _, row in read_rows(f"data:{split}")] for split in ("train", "test"))
    model = make_pipeline(CountVectorizer(binary=True), LogisticRegression(max_iter=1000))
    model.fit([row["text"] for row in train], [row["label"] for row in train])
    right = defaultdict(list)
    for row, answer in zip(test, model.predict([row["text"] for row in test]), strict=True):
        right[row["difficulty"], row["part"]].append(answer == row["label"])
    assert np.mean(right["neutral", "domain"]) > 0.8
    assert len(right["neutral", "other"]) == 134 and 0.38 < np.mean(right["neutral", "other"]) < 0.62


# How it is built


def test_building_again_gives_the_committed_bytes():
    for hash_seed in ("1", "2"):
        done = script("build_dataset.py", "--check", PYTHONHASHSEED=hash_seed)
        assert done.returncode == 0, done.stdout + done.stderr


def test_check_names_what_differs_and_another_seed_gives_another_set(tmp_path):
    done = script("build_dataset.py", "--seed", 1, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"splits.csv", *(f"{c}.txt" for c in CATEGORIES)}
    assert len((tmp_path / "weak_negative.txt").read_text(encoding="utf-8").splitlines()) == 2500
    assert (tmp_path / "splits.csv").read_bytes() != (DATA / "splits.csv").read_bytes()
    (tmp_path / "weak_negative.txt").write_text("something else\n", encoding="utf-8")
    done = script("build_dataset.py", "--seed", 1, "--output", tmp_path, "--check")
    assert done.returncode == 1 and "weak_negative.txt" in done.stdout and "splits.csv" not in done.stdout


def texts_of(pattern, banks=None, n=None):
    return list(islice(build_dataset.texts_of(build_dataset.Frame("f-001", "sports", pattern), banks or {}, 0), n))


def test_slots_take_each_alternative_before_any_comes_again():
    texts = texts_of("[one|two|three|four] apples in [a|b|c|d] basket", n=4)
    assert sorted(text.split()[0] for text in texts) == ["four", "one", "three", "two"]
    assert sorted(text.split()[3] for text in texts) == ["a", "b", "c", "d"]


def test_banks_give_two_entries_in_one_sentence_and_capitals_where_asked():
    banks = {"team": ["the foxes", "the otters", "the herons"], "town": ["Bramley", "Yarrow"]}
    for text in texts_of("{Team} met {team} [in {town} today|at home, as ever, on a wet field]", banks):
        teams = re.findall("[Tt]he (foxes|otters|herons)", text)
        assert text.startswith("The ") and len(set(teams)) == 2 and "{" not in text


def test_texts_of_a_frame_are_within_length_and_no_near_duplicates():
    assert texts_of("too [short|few] words") == []
    assert texts_of("one word differs of the many in [this|that|our] long row") != texts_of("x", n=1)
    assert len(texts_of("one word differs of the many in [this|that|our] long row")) == 1
    texts = texts_of("[a b c d|e f g h|i j k l|m n o p] [q r s t|u v w x|y z|0 1 2 3] again")
    for one, other in combinations(map(set, map(str.split, texts)), 2):
        assert len(one & other) < 0.6 * len(one | other)


@pytest.fixture
def frames(tmp_path, monkeypatch):
    """A folder of small frames for categories of 20 rows, and the function that builds from it."""
    monkeypatch.setattr(build_dataset, "SIZES", {"strong": 20, "neutral": 20})
    monkeypatch.setattr(build_dataset, "MOST", 1.0)
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "banks.txt").write_text("# names\nperson: Amy | Bo\n", encoding="utf-8")
    files = {"strong_positive": ("sports", "home"), "strong_negative": ("workplace", "home")}
    files |= {"neutral_positive": ("sports",), "neutral_negative": ("workplace",), "neutral_other": ("home", "food")}
    for file, domains in files.items():
        lines = []
        for domain in domains:
            for n in range(16):  # every word is this frame's own
                slots = [f"{file}{domain}{n}{slot}" for slot in "abcdefgh"]
                lines.append(
                    f"{domain}: {slots[0]} [{slots[1]}|{slots[2]}] {slots[3]} [{slots[4]} {slots[5]}|{slots[6]}]"
                )
        (folder / f"{file}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_a_text_too_like_another_frames_is_replaced(frames):
    rows = build_dataset.build(frames, 0)
    assert len(rows) == 80
    assert Counter((row.category, row.split) for row in rows)["neutral_positive", "train"] == 12
    path = frames / "strong_positive.txt"
    path.write_text(path.read_text(encoding="utf-8") + "\n" + "\n".join(["home: these are always the same words"] * 3))
    again = build_dataset.build(frames, 0)
    assert len(again) == 80 and sum(row.text == "these are always the same words" for row in again) <= 1


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        ("strong_positive.txt", "sports no colon", r"strong_positive.txt line 17: write it as name: text"),
        ("strong_positive.txt", "sports: {nobody} is at home today", r"strong_positive-017: no bank 'nobody'"),
        ("neutral_other.txt", None, "neutral_other"),
    ],
)
def test_a_broken_frame_is_one_line(frames, file, line, named):
    path = frames / file
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:16], line] if line else lines[:1]), encoding="utf-8")
    with pytest.raises(ValueError, match=named) as caught:
        for seed in range(30):
            build_dataset.build(frames, seed)
    assert "\n" not in str(caught.value)


# How a split is read


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_read_by_its_name(rows, split):
    expected = [(r["id"], r["text"], r["category"].partition("_")[2]) for r in rows if r["split"] == split]
    assert [(e.id, e.text, e.label) for e in read_examples(f"data:{split}")] == expected
    assert expected[16][0] == f"{split}-0017"
    head = Counter(label for _, _, label in expected[:200])
    assert min(head.values()) > 60  # --limit gives a fair sample


def broken_copy(tmp_path, monkeypatch, change):
    """A copy of the dataset with a changed splits.csv, in the dataset's place."""
    for path in DATA.glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "splits.csv").write_text(change((DATA / "splits.csv").read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.setattr(task, "DATASET", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t + t.splitlines()[1] + "\n", "splits.csv line 10002: the id 'train-0001' stands twice"),
        (lambda t: t.replace("domain", "subject"), "splits.csv line 2: a column is missing"),
        (lambda t: re.sub(r"(test-0001,\w+),\d+", r"\1,99999", t), "has no line '99999'"),
        (lambda t: re.sub(r"(test-0001,\w+),\d+", r"\1,x", t), "has no line 'x'"),
        (lambda t: re.sub(r"test-0001,\w+", "test-0001,mild_positive", t), "no such file: .*mild_positive.txt"),
        (lambda t: t.splitlines()[0], "no such split"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path, monkeypatch, change, named):
    broken_copy(tmp_path, monkeypatch, change)
    with pytest.raises(ValueError, match=named) as caught:
        list(read_examples("data:test"))
    assert "\n" not in str(caught.value)


def test_an_unknown_split_and_a_missing_dataset_are_one_line(tmp_path, monkeypatch):
    for source in ("data:", "data:Test", "data:tests"):
        with pytest.raises(ValueError, match=f"{source}: no such split; .*train, validation, calibration, test"):
            list(read_examples(source))
    monkeypatch.setattr(task, "DATASET", tmp_path)
    with pytest.raises(ValueError, match=r"no such file: .*splits\.csv"):
        list(read_examples("data:test"))


# The audit


def audit(capsys, *arguments):
    """(exit code, printed text) of the audit, run in this process."""
    with pytest.raises(SystemExit) as ended:
        audit_dataset.main([str(argument) for argument in arguments])
    return ended.value.code, capsys.readouterr().out


def write(path, *rows, columns=("text", "label")):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*\.?\d*", text)]


def test_our_own_dataset_is_clean_and_the_card_shows_what_the_audit_prints():
    done = script("audit_dataset.py", "--predictions", "data/predictions/base_test.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No text has a near-duplicate in another split, and no group is in two splits." in done.stdout
    card = (ROOT / "data" / "README.md").read_text(encoding="utf-8").split("```")[3].strip("\n").splitlines()
    printed = done.stdout.splitlines()
    assert len(card) == len(printed)
    for line, shown in zip(printed, card, strict=True):  # another processor may round a baseline's row otherwise
        assert re.sub(r"[\d.]+", "#", line).split() == re.sub(r"[\d.]+", "#", shown).split()
        assert numbers(line) == pytest.approx(numbers(shown), abs=0.011)


def test_the_model_orders_the_difficulties_as_intended():
    """On the recorded answers of the untouched default model, by counting pairs."""
    difficulty = {row["id"]: row["difficulty"] for _, row in read_rows("data:test")}
    answers = defaultdict(lambda: ([], []))
    for line in (ROOT / "data" / "predictions" / "base_test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers[difficulty[row["id"]]][row["label"] == "positive"].append(row["probabilities"]["positive"])
    found = {}
    for name, (negative, positive) in answers.items():
        difference = np.subtract.outer(positive, negative)
        found[name] = np.mean((difference > 0) + 0.5 * (difference == 0))
    assert found["strong"] > 0.99 and found["medium"] > 0.95
    assert 0.60 < found["weak"] < 0.92 and 0.45 < found["neutral"] < 0.62


def test_repeats_and_near_duplicates_are_counted_in_a_split_and_across(tmp_path, capsys):
    text = "one two three four five six"
    a = write(tmp_path / "a.csv", (text, "x"), ("ONE  two three four five six", "y"), ("q", "x"))
    b = write(tmp_path / "b.csv", ("zero " + text, "x"), ("another thing", "y"), ("r", "x"))
    code, out = audit(capsys, a, b)
    assert code == 1 and "LEAK: 3 rows" in out
    lines = [line.split() for line in out.splitlines() if line.startswith(str(tmp_path))]
    #                  rows  labels             words               repeated, alike in it, in others
    assert lines[0][1:] == ["3", "2", "x,", "1", "y", "1,", "6,", "6", "1", "2", "2"]
    assert lines[1][1:] == ["3", "2", "x,", "1", "y", "1,", "2,", "7", "0", "0", "1"]
    assert f"{b} 1: zero one two three four five six" in out
    code, out = audit(capsys, a, b, "--threshold", "0.9")
    assert code == 0 and "No text has a near-duplicate in another split." in out
    assert audit(capsys, a, b, "--shingle", "7")[0] == 0


def test_copies_of_a_text_leak_wherever_the_first_of_them_stands(tmp_path, capsys):
    """The search pairs copies with the first alone; every row with a copy elsewhere is still counted."""
    a = write(tmp_path / "a.csv", ("the same old words", "x"), ("the same old words", "x"))
    b = write(tmp_path / "b.csv", ("the same old words", "x"), ("the same old words", "y"), ("apples", "y"))
    c = write(tmp_path / "c.csv", ("pears", "y"))
    code, out = audit(capsys, c, b, a)
    assert code == 1 and "LEAK: 4 rows" in out
    assert [line.split()[-2:] for line in out.splitlines()[1:4]] == [["0", "0"], ["2", "2"], ["2", "2"]]


def test_a_group_in_two_splits_is_a_leak(tmp_path, capsys):
    table = write(
        tmp_path / "t.csv", ("apples", "one", "u1"), ("pears", "two", "u1"), columns=("text", "split", "user")
    )
    assert audit(capsys, table, "--split-column", "split")[0] == 0
    code, out = audit(capsys, table, "--split-column", "split", "--group-column", "user")
    assert code == 1 and "LEAK: 1 groups stand in more than one split, the first is 'u1'" in out
    assert audit(capsys, table, "--group-column", "user")[0] == 0


def test_a_hostile_text_cannot_write_to_the_terminal(tmp_path, capsys):
    text = "\x1b[2J these words are the same \x1b]0;title\x07"
    code, out = audit(capsys, write(tmp_path / "a.csv", (text, "x")), write(tmp_path / "b.csv", (text, "x")))
    assert code == 1 and "\x1b" not in out and "\x07" not in out


def test_domain_words_are_over_represented_among_texts_of_one_label():
    """ "goal" is a word of sports; "glad" is as frequent in both domains of its label, and only its label's."""
    from sklearn.feature_extraction.text import CountVectorizer

    texts = ["glad goal"] * 4 + ["glad home"] * 4 + ["cross memo"] * 4 + ["cross home"] * 4 + ["glad rare"]
    labels, domains = ["p"] * 8 + ["n"] * 8 + ["p"], ["s"] * 4 + ["h"] * 4 + ["w"] * 4 + ["h"] * 4 + ["s"]
    words = CountVectorizer(binary=True)
    counts = words.fit_transform(texts)
    rows = [
        audit_dataset.Row("", "", t, *ld[:1], None, ld[1], ()) for t, *ld in zip(texts, labels, domains, strict=True)
    ]
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
    code, out = audit(capsys, *learnable)
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[-3:]}
    assert code == 0 and lines["a"][:2] == ["40", "1.000"] and lines["b"][:2] == ["20", "0.500"]
    assert lines["all"][1] == "0.833" and lines["a"][4] == "1.000"
    assert "domain words" not in out  # the table has no domains
    code, out = audit(capsys, learnable[0])
    assert "5-fold out-of-fold" in out and "n = 60" in out


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
    code, out = audit(capsys, *learnable, "--predictions", path)
    last = {line.split()[0]: " ".join(line.split()[-5:]) for line in out.splitlines()[-3:]}
    assert code == 0
    assert re.fullmatch(r"\[0\.\d+, 1\.000\], 1 without 1\.000", last["a"])
    assert re.search(r"0\.950 \[0\.751, 0\.999\] 0\.9\d\d$", last["b"])
    # the one wrong row's P(good) = .2 ties with the ten right bad rows: 9 of 10 positives above, one tied
    assert last["b"].endswith("0.950")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"test_3": {"id": "test-x"}}, "none of 'test-3' as it stands; make them with --input"),
        ({"test_3": {"text": "other"}}, "none of 'test-3' as it stands"),
        ({"test_3": {"label": "up", "prediction": "up", "probabilities": {"up": 0.8, "bad": 0.2}}}, "not in both"),
    ],
)
def test_predictions_of_other_rows_are_refused(learnable, tmp_path, changes, named):
    path = predictions_of(tmp_path / "p.jsonl", learnable[1], **changes)
    with pytest.raises(ValueError, match=named):
        audit_dataset.main([*map(str, learnable), "--predictions", str(path)])


def test_tables_without_labels_are_audited_for_leaks_alone(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one text\nanother one\n", encoding="utf-8")
    code, out = audit(capsys, tmp_path / "a.txt")
    assert code == 0 and "2 none" in out and "No baseline" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere.csv"], "no such file: nowhere.csv"),
        ([""], "is not a table"),
        (["data:tset"], "data:tset: no such split"),
        (["data:test", "data:test"], "given twice"),
        (["data:test", "--threshold", "0"], "--threshold 0.0"),
        (["data:test", "--threshold", "nan"], "--threshold nan"),
        (["data:test", "--shingle", "0"], "--shingle 0"),
        (["data:test", "--split-column", "fold"], "no column 'fold'"),
        (["data:test", "--by", "colour"], "no column 'colour'"),
        (["data:test", "--limit", "0"], "--limit 0"),
        (["data:test", "--predictions", "nowhere.jsonl"], "nowhere.jsonl"),
        (["twice.csv"], "twice.csv line 3: the id '7' stands twice"),
        (["empty.csv"], "empty.csv has no rows"),
    ],
)
def test_bad_input_of_the_audit_is_one_line_and_exit_code_2(arguments, named, tmp_path):
    write(tmp_path / "twice.csv", ("7", "x"), ("7", "y"), columns=("id", "text"))
    (tmp_path / "empty.csv").write_text("text\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "audit_dataset.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and named in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
