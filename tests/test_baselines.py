"""baselines.py: the bag of words against scikit-learn's TF-IDF in the same folds, and on labels that mean nothing."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_union

from baselines import FOLDS, LENGTH, STRENGTH, bag_of_words, commonest_label
from calibration import grouped_folds

WORDS = ["fly", "sea", "tree", "cold", "warm", "north", "river", "stone", "cloud", "road", "field", "house"]


def texts_of(labels, words_of_label, seed=0):
    """Texts of eight words, two of which are drawn from the label's own."""
    draw = np.random.default_rng(seed)
    found = []
    for label in labels:
        words = [*draw.choice(WORDS, 6), *draw.choice(words_of_label[label], 2)]
        found.append(" ".join(draw.permutation(words)))
    return found


def test_it_is_tf_idf_of_words_and_characters_in_folds_that_keep_groups_together():
    draw = np.random.default_rng(1)
    truth, groups = draw.integers(2, size=60), draw.integers(30, size=60)
    texts = texts_of(truth, [["good", "fine", "great"], ["bad", "poor", "awful"]])
    expected = np.zeros((60, 2))
    for train, test in grouped_folds(truth, truth, groups, FOLDS):
        assert not set(groups[train]) & set(groups[test])
        common = {"sublinear_tf": True, "min_df": 2}
        features = make_union(
            TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", **common),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **common),
        )
        given = features.fit_transform([texts[n] for n in train])
        model = LogisticRegression(C=STRENGTH, solver="liblinear", dual=True, tol=1e-6, random_state=0)
        expected[test] = model.fit(given, truth[train]).predict_proba(features.transform([texts[n] for n in test]))
    found = bag_of_words(texts, truth, 2, groups)
    assert np.abs(found - expected).max() < 0.01 and (found.argmax(axis=1) == truth).mean() > 0.8
    assert np.array_equal(found, bag_of_words(texts, truth, 2, groups))


def test_labels_that_mean_nothing_are_guessed_even_where_texts_stand_many_times():
    draw = np.random.default_rng(2)
    groups = np.repeat(np.arange(100), 4)  # each text four times, with the same label
    truth = np.repeat(draw.integers(3, size=100), 4)
    texts = np.repeat(texts_of(np.zeros(100, dtype=int), [WORDS]), 4).tolist()
    grouped, alone = (bag_of_words(texts, truth, 3, g).argmax(axis=1) == truth for g in (groups, None))
    assert grouped.mean() < 0.5 < alone.mean()  # without the groups it knows the copies


def test_of_a_label_that_a_fold_does_not_learn_nothing_is_said():
    truth = np.array([0, 1] * 20 + [2])
    texts = texts_of(truth, [["good", "fine"], ["bad", "poor"], ["odd", "odder"]])
    found = bag_of_words(texts, truth, 4)
    assert found[-1, 2] == 0 and not found[:, 3].any() and np.allclose(found.sum(axis=1), 1)


def test_only_the_beginning_of_a_text_counts():
    truth = np.array([0, 1] * 20)
    texts = texts_of(truth, [["good", "fine"], ["bad", "poor"]])
    padded = [f"{text} {'x' * LENGTH} {label}" for text, label in zip(texts, truth, strict=True)]
    cut = [text[:LENGTH] for text in padded]
    assert np.array_equal(bag_of_words(padded, truth, 2), bag_of_words(cut, truth, 2))


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(ValueError, match="too few for 5 folds"):
        bag_of_words(["a"] * 40, np.array([0, 1] * 20), 2, np.repeat(range(4), 10))
    with pytest.raises(ValueError, match="one label only"):
        bag_of_words(["a b"] * 20, np.zeros(20, dtype=int), 2)
    unlike = [chr(0x4E00 + n) for n in range(40)]  # no word and no characters twice
    with pytest.raises(ValueError, match="no word stands in two rows"):
        bag_of_words(unlike, np.array([0, 1] * 20), 2)


def test_of_equally_common_labels_the_first_is_taken():
    assert commonest_label(np.array([2, 5, 5, 1])) == (1, 5 / 13)
