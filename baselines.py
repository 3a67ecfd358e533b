"""What a classifier must beat to be worth its cost: always the commonest label, and a bag of words on the same labels.

    number, share = commonest_label(rows_of_each_label)
    probabilities = bag_of_words(texts, truth, n_labels, groups)       # P(label) [n, labels], out-of-fold

The bag of words is a logistic regression for each label against the others on TF-IDF of words, pairs of words and runs
of two to five characters (`probe.word_counts`, the probe's own). Each row is scored by a fit to four fifths of the
others, none of its group among them. Nothing is chosen, so nothing flatters it. Some hundred rows take a fraction of a
second, 2,000 rows of two labels one or two; callers bound the rows, and texts count up to LENGTH characters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LENGTH = 2000  # characters of a text: its time is in proportion
STRENGTH = 10.0  # prior variance of a logit; from 3 to 100 no accuracy moved by more than .01 where it was tried
FOLDS = 5


def commonest_label(rows: np.ndarray) -> tuple[int, float]:
    """(the number of the label with most rows, of equals the first; its share), from the rows of each [labels]."""
    return int(rows.argmax()), float(rows.max() / rows.sum())


def bag_of_words(
    texts: Sequence[str], truth: np.ndarray, n_labels: int, groups: Sequence[object] | None = None, seed: int = 0
) -> np.ndarray:
    """P(label) [n, labels] of each row, by a bag of words that has not seen its group.

    `truth` [n] are the numbers of the rows' labels; `groups` [n] say which rows belong together, `seed` draws the
    folds. ValueError for fewer groups than folds, or where a fold would learn from one label alone.
    """
    from calibration import grouped_folds
    from probe import weighted_counts, word_counts, word_weights

    counts = word_counts([text[:LENGTH] for text in texts])
    probabilities = np.zeros((len(texts), n_labels))
    for train, test in grouped_folds(truth, truth, groups, FOLDS, seed):
        columns, inverse_frequency = word_weights(counts[train])
        learned, unseen = (weighted_counts(counts[rows], columns, inverse_frequency) for rows in (train, test))
        seen, found = one_against_rest(learned, truth[train], unseen)
        probabilities[np.ix_(test, seen)] = found
    return probabilities


def one_against_rest(learned: object, truth: np.ndarray, unseen: object) -> tuple[np.ndarray, np.ndarray]:
    """(labels that occur in `truth` [seen], their probabilities for the `unseen` rows [m, seen])."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    if len(np.unique(truth)) < 2:
        raise ValueError("a fold has rows of one label only; a bag of words needs two")
    if not learned.shape[1]:
        raise ValueError("no word stands in two rows; a bag of words has nothing to learn from")
    # liblinear, because it is the quickest for some thousand sparse rows of up to a hundred labels.
    one = LogisticRegression(C=STRENGTH, solver="liblinear", dual=True, tol=0.01, random_state=0)
    model = OneVsRestClassifier(one).fit(learned, truth)
    return model.classes_, model.predict_proba(unseen)
