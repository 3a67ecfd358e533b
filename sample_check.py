"""Some labelled rows of a table, drawn at random and scored: enough to see whether a question works, in seconds.

    sample = draw_sample(open_table("labelled.csv"), task, 50)
    scored = score_sample(scorer, sample)           # any method
    print(wrong_answers(scored.rows))               # which labels are taken for which, and the worst texts

`scripts/doctor.py --input` shows them. Their texts go to the terminal, made safe for it, and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from command_line import printable, progress
from confusions import label_errors, label_errors_text
from predictions import Prediction
from scoring import Method, SavedRows
from tables import Example, Table, sampled
from task import Task, check_examples

WORST = 3  # answers shown
LENGTH, LINE = 60, 119  # characters of a text, of a line


@dataclass(frozen=True)
class LabelledSample:
    """Labelled rows of a table, drawn at random, and how many rows and labelled rows it has."""

    source: str
    examples: list[Example]
    total: int
    labelled: int


@dataclass(frozen=True)
class ScoredSample:
    """The drawn rows that were scored, the error of each other, and rows a second once the first were done."""

    rows: list[Prediction]
    errors: list[str]
    rate: float


def draw_sample(table: Table, task: Task, size: int, seed: int = 0) -> LabelledSample:
    """Draw that many labelled rows; ValueError for a label that the task does not know, or for a table without any.

    Rows that were chosen to be labelled because they are hard (`purpose`) are left out: they are no sample.
    """
    total, labelled = check_examples(table, task, table.source), 0

    def labelled_rows() -> Iterator[Example]:
        nonlocal labelled
        for example, columns in table.with_columns():
            if example.label is not None and columns.get("purpose") != "chosen":
                labelled += 1
                yield example

    examples = [example for _, example in sampled(enumerate(labelled_rows()), size, seed)]
    if not examples:
        raise ValueError(f"{table.source} has no labelled rows to look at (--label-column names the column)")
    return LabelledSample(table.source, examples, total, labelled)


def score_sample(method: Method, sample: LabelledSample) -> ScoredSample:
    """Score the drawn rows by any method; a row that cannot be scored is an error among the others."""
    started = time.monotonic()
    with progress(len(sample.examples), 0) as advance:
        rows = list(method.score(iter(sample.examples), advance, SavedRows()))
    rate = advance.rate or len(rows) / (time.monotonic() - started)
    errors = [row.error for row in rows if row.error is not None]
    return ScoredSample([row for row in rows if row.error is None], errors, rate)


def wrong_answers(rows: Sequence[Prediction]) -> str:
    """Which labels are taken for which, and the texts whose own label is the least probable, one line each."""
    labels = list(rows[0].probabilities)
    truth, predicted = (np.array([labels.index(getattr(row, of)) for row in rows]) for of in ("label", "prediction"))
    lines = [label_errors_text(label_errors(labels, truth, predicted))]
    wrong = sorted((row for row in rows if row.prediction != row.label), key=lambda row: row.probabilities[row.label])
    for row in wrong[:WORST]:
        text = " ".join(row.text.split())
        shown = text if len(text) <= LENGTH else f"{text[: LENGTH - 4]} ..."
        said = f"{shown!r} is {row.label!r}, said {row.prediction!r} with {row.confidence:.3f}"
        lines.append(printable(f"  {said}")[:LINE])
    return "\n".join(lines)
