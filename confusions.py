"""Which labels are missed, and what is said in their place: a whole table of few labels, the worst of many.

    worst = recalls(labels, truth, predicted)         # of each label the share that is found, the lowest first
    mistaken = confusions(labels, truth, predicted)   # which label is taken for which, the most frequent first
    print(label_errors_text(label_errors(labels, truth, predicted)))

`truth` and `predicted` [n] are the numbers of labels. Of 77 labels nobody reads 5,929 cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from calibration_metrics import exact_interval
from command_line import columns, printable

WHOLE_TABLE = 8  # labels
WORST = 10  # lines of each list in place of the whole table


def recalls(labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray) -> list[dict]:
    """Rows, right answers, recall and its exact 95 % interval of each label that has rows, the lowest recall first.

    The interval takes rows for independent; of two labels of the same recall the one with more rows comes first.
    """
    found = []
    for number in np.unique(truth).tolist():
        rows = truth == number
        n, right = int(rows.sum()), int((predicted[rows] == number).sum())
        low, high = exact_interval(right, n)
        found.append({"label": labels[number], "n": n, "right": right, "recall": right / n, "low": low, "high": high})
    return sorted(found, key=lambda row: (row["recall"], -row["n"]))


def confusions(labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray) -> list[dict]:
    """How many rows of a label have another prediction, for each such pair, the most frequent first."""
    wrong = truth != predicted
    pairs, counts = np.unique(np.stack([truth[wrong], predicted[wrong]]), axis=1, return_counts=True)
    found = []
    for n in np.argsort(-counts, kind="stable").tolist():
        true, said = pairs[:, n]
        found.append({"label": labels[true], "prediction": labels[said], "n": int(counts[n])})
    return found


def label_errors(labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray) -> dict:
    """All recalls and confusions as a record for a report.json; of few labels with the whole table of counts.

    `table` [true label][prediction]; None of more than WHOLE_TABLE labels.
    """
    table = None
    if len(labels) <= WHOLE_TABLE:
        cells = np.bincount(truth * len(labels) + predicted, minlength=len(labels) ** 2)
        table = cells.reshape(len(labels), len(labels)).tolist()
    found = {"labels": list(labels), "table": table, "recalls": recalls(labels, truth, predicted)}
    return found | {"confusions": confusions(labels, truth, predicted)}


def label_errors_text(errors: Mapping) -> str:
    """A row for each label and a column for each prediction; of many labels the worst, and the largest confusions."""
    worst, mistaken = errors["recalls"], errors["confusions"]
    if errors["table"]:
        cells = [["", *(f"said {label}" for label in errors["labels"]), "recall"]]
        recall = {row["label"]: recall_words(row) for row in worst}
        for label, said in zip(errors["labels"], errors["table"], strict=True):
            cells.append([label, *(f"{n:,}" for n in said), recall.get(label, "no rows")])
        return columns(cells, "  ")
    lines = [f"  The lowest recalls of {len(worst)} labels with rows:"]
    lines.append(columns([[row["label"], recall_words(row)] for row in worst[:WORST]], "    "))
    if mistaken:
        lines.append(f"  The most frequent of {len(mistaken):,} confusions:")
        taken = [[f"{row['label']} taken for {row['prediction']}", f"{row['n']:,}"] for row in mistaken[:WORST]]
        lines.append(columns(taken, "    "))
    return "\n".join(lines)


def recall_words(row: Mapping) -> str:
    """A label's recall with its interval and rows."""
    return f"{row['recall']:.3f} [{row['low']:.3f}, {row['high']:.3f}] of {row['n']:,}"


def worst_words(labels: Sequence[str], truth: np.ndarray, predicted: np.ndarray, most: int = 3) -> list[str]:
    """The lowest recalls and the largest confusions, each in a line; no line of what there is none of."""
    worst = [f"{row['label']!r} {recall_words(row)}" for row in recalls(labels, truth, predicted) if row["recall"] < 1]
    mistaken = [
        f"{row['label']!r} for {row['prediction']!r} {row['n']:,}" for row in confusions(labels, truth, predicted)
    ]
    lines = [f"lowest recall: {', '.join(worst[:most])}"] if worst else []
    if mistaken:
        lines.append(f"most often taken for another, of the true for the said: {', '.join(mistaken[:most])}")
    return [printable(line) for line in lines]
