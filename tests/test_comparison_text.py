"""What is printed of a comparison: numbers as they are, signs only where they mean something, words for the verdict."""

import pytest

import comparison_text


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [
        ([0.1234, -0.00001, 0.5], "", "0.123 [0.000, 0.500]"),
        ([0.1, -0.2, 0.4], "+", "+0.100 [-0.200, +0.400]"),
        ([-1e-9, -1e-9, 0.0], "+", "+0.000 [+0.000, +0.000]"),
        ([0.5, None, None], "", "0.500"),
        ([None, None, None], "+", "-"),
        (1234, "", "1,234"),
        (-2442.4, "+", "-2,442"),
        ("nothing", "", "nothing"),
    ],
)
def test_numbers_as_they_are_printed(value, sign, text):
    assert comparison_text.cell(value, sign) == text


def test_only_differences_have_a_sign():
    records = {"a": {"base": 0.5, "difference": 0.25, "p": 3.2e-59}, "b": {"base": None, "difference": 0.0, "p": 1.0}}
    records["c"] = {"base": 0.5, "difference": 0.25, "p": 0.0}  # too small for a float
    lines = [line.split() for line in comparison_text.records_table("Title", records).splitlines()[2:]]
    assert lines[0] == ["a", "0.500", "+0.250", "3.2e-59"] and lines[1] == ["b", "-", "+0.000", "1"]
    assert lines[2] == ["c", "0.500", "+0.250", "below", "1e-300"]


def test_nothing_can_be_guaranteed_is_an_answer():
    measured = {"share": 0.42, "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95}
    row = {
        "target": 0.9,
        "base": {"threshold": {"value": None, "more_labels": 6097, "n": 300}, "measured": None},
        "fine-tuned": {"threshold": {"value": 0.7019, "more_labels": None, "n": 300}, "measured": measured},
        "share": {"difference": [0.42, 0.4, 0.44]},
    }
    records = comparison_text.guarantee_records({"guarantees": [row]})
    assert records["90% right, base"] == {
        "coverage": "nothing",
        "from": "",
        "right": "about 6,097 more labels are needed",
    }
    assert records["90% right, fine-tuned"] == {"coverage": 0.42, "from": "0.701", "right": [0.9, 0.8, 0.95]}
    assert records["90% right, difference"] == {"coverage": "+0.420 [+0.400, +0.440]"}
    row["base"]["threshold"]["more_labels"] = None
    records = comparison_text.guarantee_records({"guarantees": [row]})
    assert records["90% right, base"]["right"] == "not reachable with this model: raise its accuracy"


def test_the_ladder_has_a_column_for_each_certainty():
    measured = {"share": 0.42, "accuracy": 0.9, "automated": 84}
    proved, nothing = {"value": 0.7019, "more_labels": None}, {"value": None, "more_labels": 6097}
    rungs = [
        {"certainty": 0.95, "threshold": nothing, "measured": None},
        {"certainty": 0.8, "threshold": nothing | {"more_labels": None}, "measured": None},
        {"certainty": "average", "threshold": proved, "measured": measured},
    ]
    row = {"target": 0.9, "share": {"difference": [0.0, -0.01, 0.01]}}
    row |= {name: {"ladder": rungs} for name in comparison_text.NAMES}
    records = comparison_text.ladder_records({"guarantees": [row]})
    words = ["nothing, 6,097 labels more", "not reachable", "42.0% from 0.701 (0.900)"]
    heads = ("95 % certain", "80 % certain", "on average")
    assert records["90% right, base"] == dict(zip(heads, words, strict=True))
    assert [*records["90% right, difference"].values()] == ["+0.000 [-0.010, +0.010]", "", ""]


@pytest.mark.parametrize(
    ("change", "said"), [([-0.1, -0.2, -0.01], -1), ([0.1, 0.01, 0.2], 1), ([-0.1, -0.2, 0.01], 0), ([0, -1e-5, 1], 0)]
)
def test_a_change_has_a_direction_when_its_whole_interval_has(change, said):
    assert comparison_text.direction(change) == said


def test_more_than_half_of_randomly_labelled_rows_right_is_called_a_leak_or_chance():
    part = {name: {"accuracy": [0.9, 0.83, 0.95], "raw": 0.9, "calibrated": 0.88} for name in comparison_text.NAMES}
    part["base"]["accuracy"] = [0.5, 0.4, 0.6]
    lines = list(comparison_text.about_randomly_labelled(part | {"n": 100}))
    assert "base: right 50.0% [40.0%, 60.0%], 50 % is inside; its mean confidence is 90.0% raw" in lines[1]
    assert "50 % is NOT inside, by a leak or by chance" in lines[2]
