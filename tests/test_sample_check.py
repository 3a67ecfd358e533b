"""sample_check.py: which rows are drawn, what is said of them, and that hostile texts stay texts."""

import csv
import re
from dataclasses import dataclass

import pytest

import sample_check
from predictions import failed, scored
from tables import open_table
from task import TASKS

SENTIMENT = TASKS["sentiment"]
COMMON = {"method": "logprobs", "model": "m", "task": "sentiment", "fingerprint": "00000000"}


@dataclass
class AlwaysPositive:
    """A method that says positive, the surer the longer the text; it cannot score an empty one."""

    task = SENTIMENT

    def score(self, examples, advance, saved):
        for one in examples:
            advance(1)
            if not one.text.strip():
                yield failed(one.id, one.text, one.label, "the text is empty", **COMMON)
                continue
            p = 1 - 0.5 / (1 + len(one.text))
            yield scored(one.id, one.text, one.label, {"negative": 1 - p, "positive": p}, 0.9, **COMMON)


def table_of(path, rows, columns=("text", "label", "purpose")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return open_table(str(path))


def test_labelled_rows_are_drawn_by_seed_and_chosen_ones_never(tmp_path):
    rows = [(f"text {n}", "positive" if n % 2 else "negative", "random") for n in range(40)]
    rows += [("hard", "positive", "chosen")] * 40 + [("new", "", "")] * 20
    table = table_of(tmp_path / "t.csv", rows)
    sample = sample_check.draw_sample(table, SENTIMENT, 30)
    assert (len(sample.examples), sample.total, sample.labelled) == (30, 100, 40)
    assert {one.text[:4] for one in sample.examples} == {"text"} and len({one.id for one in sample.examples}) == 30
    assert sample == sample_check.draw_sample(table, SENTIMENT, 30)
    assert sample != sample_check.draw_sample(table, SENTIMENT, 30, seed=1)
    with pytest.raises(ValueError, match="no labelled rows"):
        sample_check.draw_sample(table_of(tmp_path / "u.csv", [("new", "", "")]), SENTIMENT, 30)
    with pytest.raises(ValueError, match="'mixed', which task 'sentiment' does not know"):
        sample_check.draw_sample(table_of(tmp_path / "v.csv", [("new", "mixed", "")]), SENTIMENT, 30)


def test_rows_that_cannot_be_scored_are_counted_apart(tmp_path):
    table = table_of(tmp_path / "t.csv", [("fine", "positive", ""), (" ", "negative", ""), ("bad", "negative", "")])
    found = sample_check.score_sample(AlwaysPositive(), sample_check.draw_sample(table, SENTIMENT, 50))
    assert (len(found.rows), found.errors) == (2, ["the text is empty"]) and found.rate > 0


def test_the_worst_answers_are_one_safe_line_each_and_the_surest_errors_first(tmp_path):
    hostile = "\x1b[2J first\nline\r\tsecond \u202e" + "long " * 40
    texts = [
        ("good", "positive"),
        ("bad", "negative"),
        ("quite bad", "negative"),
        (hostile, "negative"),
        ("x", "negative"),
    ]
    table = table_of(tmp_path / "t.csv", texts, ("text", "label"))
    rows = sample_check.score_sample(AlwaysPositive(), sample_check.draw_sample(table, SENTIMENT, 50)).rows
    lines = sample_check.wrong_answers(rows).splitlines()
    assert lines[1].split() == ["negative", "0", "4", "0.000", "[0.000,", "0.602]", "of", "4"]
    assert len(lines) == 3 + sample_check.WORST and max(map(len, lines)) < 120 and all(map(str.isprintable, lines))
    assert [re.search(r"first line|quite bad|'bad'", line)[0] for line in lines[3:]] == [
        "first line",
        "quite bad",
        "'bad'",
    ]
    assert lines[4] == "  'quite bad' is 'negative', said 'positive' with 0.950"
