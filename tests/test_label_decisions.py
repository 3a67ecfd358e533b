"""label_decisions.py: targets and prices of labels, against loops over the rows written out."""

import math

import numpy as np
import pytest

from decisions import choose_threshold, cost_optimal_threshold
from label_decisions import (
    automated_by_label,
    choose_label_thresholds,
    cost_rules,
    expected_costs,
    label_automation,
    label_distribution,
    label_targets,
    mean_error_price,
    read_cost_matrix,
)

LABELS = ("billing", "a=b", "other")


def test_targets_are_those_named_and_the_default_for_all_others():
    words = ["billing=.99", "a=b=0.8", "default=.9"]
    assert label_targets(words, LABELS, 0.5) == {"billing": 0.99, "a=b": 0.8, "other": 0.9}
    assert label_targets(["other=.7"], LABELS, 0.95) == {"billing": 0.95, "a=b": 0.95, "other": 0.7}
    assert label_targets([], LABELS, 0.6) == dict.fromkeys(LABELS, 0.6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["billing"], "is no target: write LABEL=ACCURACY"),
        (["billing=high"], "is no target"),
        (["billing=1"], "is no target"),
        (["billing=nan"], "is no target"),
        ([".9"], "is no target"),
        (["red=.9"], "no label is called 'red'; there are billing, a=b, other, and default"),
        (["other=.9", "other=.8"], "'other' has two targets"),
    ],
)
def test_words_that_are_no_targets_are_refused_with_the_way_out(words, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        label_targets(words, LABELS, 0.9)


def rows(n=900, seed=1):
    """(confidence, correct, predicted, groups): the third label is never predicted; copies of every third row."""
    rng = np.random.default_rng(seed)
    confidence, predicted = rng.uniform(0.5, 1, n), rng.integers(0, 2, n)
    return (
        confidence,
        rng.random(n) < confidence,
        predicted,
        np.where(np.arange(n) % 3 == 2, np.arange(n) - 1, np.arange(n)),
    )


def test_each_label_s_threshold_is_chosen_on_the_rows_with_that_prediction_alone():
    confidence, correct, predicted, groups = rows()
    targets = {"billing": 0.85, "a=b": 0.8, "other": 0.9}
    for is_split, delta in ((False, 0.1), (True, 0.1 / 3)):
        found = choose_label_thresholds(confidence, correct, predicted, targets, 0.9, groups, is_split)
        for number, label in enumerate(LABELS[:2]):
            mine = predicted == number
            expected = choose_threshold(confidence[mine], correct[mine], targets[label], delta, groups[mine])
            assert (found[label].value, found[label].more_labels) == (expected.value, expected.more_labels)
            assert found[label].delta == pytest.approx(delta) and found[label].n == mine.sum()
        nothing = found["other"]
        assert (nothing.value, nothing.n, nothing.more_labels) == (None, 0, None)
        assert "no labelled row has this prediction" in str(nothing)
    automated = automated_by_label(confidence, predicted, found)
    values = [found[label].value for label in LABELS]
    loop = [values[k] is not None and c >= values[k] for c, k in zip(confidence, predicted, strict=True)]
    assert automated.tolist() == loop and any(loop)
    for number, measured in enumerate(label_automation(confidence, correct, predicted, found).values()):
        if values[number] is None:
            assert measured is None
            continue
        taken = automated & (predicted == number)
        assert (measured["automated"], measured["right"]) == (taken.sum(), correct[taken].sum())
        assert measured["share"] == pytest.approx(taken.sum() / (predicted == number).sum())
    assert {
        label: each.kind
        for label, each in choose_label_thresholds(confidence, correct, predicted, targets, "average", groups).items()
    } == dict.fromkeys(LABELS, "average")
    with pytest.raises(ValueError, match="no risk that could be divided"):
        choose_label_thresholds(confidence, correct, predicted, targets, "average", groups, True)


# Prices


def table(tmp_path, text):
    path = tmp_path / "prices.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_cost_matrix_is_read_whatever_the_order_of_its_rows_and_columns(tmp_path):
    path = table(tmp_path, "\ufefftrue,other,billing,a=b\nother,0,$5,6\n\nbilling, 1 ,0.5,2\na=b,3,4,0\n")
    assert read_cost_matrix(path, LABELS).tolist() == [[0.5, 2, 1], [4, 0, 3], [5, 6, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("true,a,b\na,0,1\n", "the first column names a, not each label once: a, b"),
        ("true,a\na,0\nb,1\n", "the first row names a, not each label once"),
        ("true,a,b\na,0,1\na,0,1\n", "the first column names a, a"),
        ("true,a,b\na,0\nb,0,1\n", "the row of 'a' has 1 prices, not 2"),
        ("true,a,b\na,0,-1\nb,0,1\n", "'a' as 'b' costs '-1'"),
        ("true,a,b\na,0,much\nb,0,1\n", "'a' as 'b' costs 'much'; it must be dollars"),
        ("true,a,b\na,nan,1\nb,0,1\n", "'a' as 'a' costs 'nan'"),
    ],
)
def test_a_table_that_is_no_cost_matrix_is_refused_in_one_line_that_says_why(text, message, tmp_path):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        read_cost_matrix(table(tmp_path, text), ("a", "b"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        read_cost_matrix(tmp_path / "binary.csv", ("a", "b"))


def test_the_distribution_keeps_the_calibrated_confidence_and_divides_the_rest_as_the_model_did():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]])
    found = label_distribution(probabilities, np.array([0.8, 0.6, 0.9]))
    expected = [[0.8, 0.2 * 0.6, 0.2 * 0.4], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05]]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_expected_costs_and_rules_are_those_of_loops():
    rng = np.random.default_rng(2)
    probabilities = rng.dirichlet([1, 1, 1], 300)
    truth, calibrated = rng.integers(0, 3, 300), rng.uniform(0.3, 1, 300)
    dollars = np.array([[0.0, 20, 3], [50, 1, 9], [2, 7, 0]])
    distribution, predicted = label_distribution(probabilities, calibrated), probabilities.argmax(axis=1)
    expected = expected_costs(distribution, dollars)
    for i in range(5):
        assert expected[i, 1] == pytest.approx(sum(distribution[i, t] * dollars[t, 1] for t in range(3)))
    price = mean_error_price(predicted, truth, dollars)
    wrong = [dollars[t, k] for t, k in zip(truth, predicted, strict=True) if t != k]
    assert price == pytest.approx(math.fsum(wrong) / len(wrong))
    assert mean_error_price(truth, truth, dollars) == 0
    groups = np.arange(300) // 2
    given = {"review_cost": 5.0, "error_cost": price, "groups": groups}
    rules = {rule["rule"]: rule for rule in cost_rules(probabilities, calibrated, truth, dollars, **given)}
    threshold, total = cost_optimal_threshold(5.0, price), {"Chow": 0.0, "expected": 0.0}
    for i, k in enumerate(predicted):
        total["Chow"] += dollars[truth[i], k] if calibrated[i] >= threshold else 5
        total["expected"] += dollars[truth[i], k] if expected[i, k] <= 5 else 5
    assert rules[f"Chow's threshold, {threshold:.3f}"]["cost"] == pytest.approx(total["Chow"] / 300)
    assert rules["expected cost"]["cost"] == pytest.approx(total["expected"] / 300)
    assert rules["review everything"] == {
        "rule": "review everything",
        "share": 0.0,
        "cost": 5.0,
        "low": 5.0,
        "high": 5.0,
    }
    assert rules["automate everything"]["cost"] == pytest.approx(dollars[truth, predicted].mean())


def test_with_one_price_for_all_mistakes_the_expected_cost_decides_as_chow_s_threshold():
    rng = np.random.default_rng(3)
    probabilities, calibrated = rng.dirichlet([1, 1, 1], 200), rng.uniform(0, 1, 200)
    expected = expected_costs(label_distribution(probabilities, calibrated), 25 * (1 - np.eye(3)))
    own = expected[np.arange(200), probabilities.argmax(axis=1)]
    assert ((own <= 5) == (calibrated >= cost_optimal_threshold(5, 25))).all()
