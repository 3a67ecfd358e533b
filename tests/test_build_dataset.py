"""The dataset: what data/README.md says of it, how a split is read, and how it is built.

What the card says is checked on the committed files by plain counting, not by the code that built them.
"""

import csv
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations, islice
from pathlib import Path

import pytest

import build_dataset
import tables
from near_duplicates import near_duplicates
from tables import read_examples
from task import TASKS

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


# What data/README.md says


def test_ten_thousand_texts_each_once_in_the_sizes_of_the_card(rows):
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


def test_templates_are_in_one_split_small_and_give_both_labels_where_rows_are_labelled_at_random(rows):
    homes, sizes, labels = defaultdict(set), Counter(), defaultdict(set)
    for row in rows:
        homes[row["group"]].add(row["split"])
        sizes[row["category"], row["group"]] += 1
        if row["category"].startswith("neutral") and row["domain"] not in ("sports", "workplace"):
            labels[row["group"]].add(row["category"])
    assert all(len(splits) == 1 for splits in homes.values())
    assert all(n <= 0.015 * CATEGORIES[category] for (category, _), n in sizes.items())
    both = sum(len(found) == 2 for found in labels.values())
    assert both > 0.7 * len(labels)  # the label is drawn for each row, not for each template
    written = sum(len(build_dataset.read_templates(path)) for path in (DATA / "frames").glob("*_*.txt"))
    assert len(homes) == written  # no template is idle


@pytest.mark.parametrize("width", [1, 2, 3])
def test_no_two_texts_are_near_duplicates(rows, width):
    assert list(near_duplicates([row["text"] for row in rows], 0.6, width)) == []


def test_no_text_resembles_what_the_prompt_or_the_sample_shows(rows):
    shown = [text for task in TASKS.values() for text, _ in task.examples]
    shown += [example.text for example in read_examples(ROOT / "data" / "sample.csv")]
    words = [set(re.findall(r"\w+", text.casefold())) for text in shown]
    for row in rows:
        mine = set(re.findall(r"\w+", row["text"].casefold()))
        assert all(len(mine & other) < 0.6 * len(mine | other) for other in words), row


# How a split is read


def test_a_split_is_read_by_its_name(rows):
    for split in SPLITS:
        expected = [(r["id"], r["text"], r["category"].partition("_")[2]) for r in rows if r["split"] == split]
        assert [(e.id, e.text, e.label) for e in read_examples(f"data:{split}")] == expected
        assert expected[16][0] == f"{split}-0017"
        assert min(Counter(label for _, _, label in expected[:200]).values()) > 60  # --limit gives a fair sample
    with pytest.raises(ValueError, match=r"data:Test: no such split; .*train, validation, calibration, test"):
        list(read_examples("data:Test"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: re.sub(r"(test-0001,\w+),\d+", r"\1,99999", t), "has no line '99999'"),
        (lambda t: re.sub(r"test-0001,\w+", "test-0001,mild_positive", t), "no such file: .*mild_positive.txt"),
        (None, r"no such file: .*splits\.csv"),
    ],
)
def test_a_damaged_dataset_is_one_line(tmp_path, monkeypatch, change, named):
    for path in DATA.glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if change:
        changed = change((DATA / "splits.csv").read_text(encoding="utf-8"))
        (tmp_path / "splits.csv").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(tables, "DATASET", tmp_path)
    with pytest.raises(ValueError, match=named) as caught:
        list(read_examples("data:test"))
    assert "\n" not in str(caught.value)


# How it is built


def test_building_again_gives_the_committed_bytes():
    command = [sys.executable, ROOT / "scripts" / "build_dataset.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_names_what_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_dataset, "build", lambda folder, seed: [])
    monkeypatch.setattr(build_dataset, "files_of", lambda rows, seed: {"a.txt": "a\n", "b.txt": "b\n"})
    check = ["--output", str(tmp_path), "--check"]
    build_dataset.main(check[:2])
    build_dataset.main(check)
    (tmp_path / "a.txt").write_text("something else\n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        build_dataset.main(check)
    assert ended.value.code == 1 and "a.txt differ from" in capsys.readouterr().out


def texts_of(pattern, banks=None, n=None):
    return list(islice(build_dataset.texts_of(build_dataset.Template("t-001", "sports", pattern), banks or {}, 0), n))


def test_slots_take_each_alternative_before_any_comes_again():
    texts = texts_of("[one|two|three|four] apples in [a|b|c|d] basket", n=4)
    assert sorted(text.split()[0] for text in texts) == ["four", "one", "three", "two"]
    assert sorted(text.split()[3] for text in texts) == ["a", "b", "c", "d"]


def test_banks_give_two_entries_in_one_sentence_and_capitals_where_asked():
    banks = {"team": ["the foxes", "the otters", "the herons"], "town": ["Bramley", "Yarrow"]}
    for text in texts_of("{Team} met {team} [in {town} today|at home, as ever, on a wet field]", banks):
        teams = re.findall("[Tt]he (foxes|otters|herons)", text)
        assert text.startswith("The ") and len(set(teams)) == 2 and "{" not in text


def test_texts_of_a_template_are_within_length_and_no_near_duplicates():
    assert texts_of("too [short|few] words") == []
    assert len(texts_of("one word differs of the many in [this|that|our] long row")) == 1
    texts = texts_of("[a b c d|e f g h|i j k l|m n o p] [q r s t|u v w x|y z|0 1 2 3] again")
    for one, other in combinations(map(set, map(str.split, texts)), 2):
        assert len(one & other) < 0.6 * len(one | other)


@pytest.fixture
def templates(tmp_path, monkeypatch):
    """A folder of small templates for categories of 20 rows; every word is its template's own."""
    monkeypatch.setattr(build_dataset, "SIZES", {"strong": 20, "neutral": 20})
    monkeypatch.setattr(build_dataset, "MOST", 1.0)
    (tmp_path / "banks.txt").write_text("# names\nperson: Amy | Bo\n", encoding="utf-8")
    files = {"strong_positive": ("sports", "home"), "strong_negative": ("workplace", "home")}
    files |= {"neutral_positive": ("sports",), "neutral_negative": ("workplace",), "neutral_other": ("home", "food")}
    for file, domains in files.items():
        lines = []
        for own in (f"{file}{domain}{n}" for domain in domains for n in range(16)):
            domain = own.removeprefix(file).rstrip("0123456789")
            lines.append(f"{domain}: {own}a [{own}b|{own}c] {own}d [{own}e {own}f|{own}g]")
        (tmp_path / f"{file}.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_a_text_too_like_another_templates_is_replaced(templates):
    rows = build_dataset.build(templates, 0)
    assert len(rows) == 80
    assert Counter((row.category, row.split) for row in rows)["neutral_positive", "train"] == 12
    path = templates / "strong_positive.txt"
    path.write_text(path.read_text(encoding="utf-8") + "\nhome: these are always the same words" * 3)
    again = build_dataset.build(templates, 0)
    assert len(again) == 80 and sum(row.text == "these are always the same words" for row in again) <= 1


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        ("strong_positive.txt", "sports no colon", r"strong_positive.txt line 17: write it as name: text"),
        ("strong_positive.txt", "sports: {nobody} is at home today", r"strong_positive-017: no bank 'nobody'"),
        ("neutral_other.txt", None, "neutral_other"),
    ],
)
def test_a_broken_template_is_one_line(templates, file, line, named):
    path = templates / file
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:16], line] if line else lines[:1]), encoding="utf-8")
    with pytest.raises(ValueError, match=named) as caught:
        for seed in range(30):
            build_dataset.build(templates, seed)
    assert "\n" not in str(caught.value)
