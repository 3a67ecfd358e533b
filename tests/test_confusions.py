"""confusions.py: against scikit-learn's confusion matrix and recalls, and short where labels are many."""

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, recall_score

from confusions import WORST, confusions, label_errors, label_errors_text, recalls, worst_words

LABELS = ("a", "b", "c", "d")


def drawn(n_labels, n, seed=0):
    draw = np.random.default_rng(seed)
    truth = draw.integers(n_labels, size=n)
    return truth, np.where(draw.random(n) < 0.6, truth, draw.integers(n_labels, size=n))


def test_recalls_and_confusions_are_scikit_learn_s():
    truth, predicted = drawn(3, 200)  # of the fourth label there is no row
    found = recalls(LABELS, truth, predicted)
    by_label = {row["label"]: row for row in found}
    assert list(by_label) == sorted(by_label, key=lambda label: by_label[label]["recall"]) and len(found) == 3
    for number, recall in enumerate(recall_score(truth, predicted, average=None)):
        row = by_label[LABELS[number]]
        interval = binomtest(row["right"], row["n"]).proportion_ci(0.95, "exact")
        assert np.allclose([row["recall"], row["low"], row["high"]], [recall, *interval])
    matrix = confusion_matrix(truth, predicted)
    mistaken = confusions(LABELS, truth, predicted)
    counts = [row["n"] for row in mistaken]
    assert counts == sorted(counts, reverse=True) and len(counts) == 6
    for row in mistaken:
        assert row["n"] == matrix[LABELS.index(row["label"]), LABELS.index(row["prediction"])]


def test_of_few_labels_the_whole_table_is_shown():
    truth, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    lines = [line.split() for line in label_errors_text(label_errors(LABELS, truth, predicted)).splitlines()]
    assert lines[0] == ["said", "a", "said", "b", "said", "c", "said", "d", "recall"]
    assert [line[:6] for line in lines[1:4]] == [
        ["a", "2", "1", "0", "0", "0.667"],
        ["b", "0", "2", "0", "0", "1.000"],
        ["c", "1", "0", "0", "0", "0.000"],
    ]
    assert lines[4] == ["d", "0", "0", "0", "0", "no", "rows"]


def test_of_many_labels_the_worst_are_shown():
    labels = [f"label {n}" for n in range(77)]
    truth, predicted = drawn(77, 2000)
    text = label_errors_text(label_errors(labels, truth, predicted))
    assert len(text.splitlines()) == 2 * WORST + 2 and max(map(len, text.splitlines())) < 80
    worst, mistaken = recalls(labels, truth, predicted), confusions(labels, truth, predicted)
    assert f"{worst[0]['label']} " in text.splitlines()[1] and f"{worst[WORST]['label']} " not in text
    assert f"{mistaken[0]['label']} taken for {mistaken[0]['prediction']}" in text


def test_the_three_worst_fit_in_two_lines_and_nothing_is_said_of_no_errors():
    truth, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    recall, taken = worst_words(("a", "\x1b[1m", "c"), truth, predicted)
    assert recall.startswith("lowest recall: 'c' 0.000 [0.000, 0.975] of 1, 'a' 0.667") and "\x1b" not in taken
    assert taken.endswith(": 'a' for '\\x1b[1m' 1, 'c' for 'a' 1")
    assert worst_words(LABELS, truth, truth) == []
