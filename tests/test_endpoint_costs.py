"""endpoint_costs.py: sums and estimates by hand."""

import pytest

from endpoint_costs import Asking, Prices, Usage, drawn_texts, planned
from tables import Example


def rows(*texts):
    return [Example(str(number), text, None) for number, text in enumerate(texts)]


def test_usage_sums_what_replies_say_in_either_layout():
    usage = Usage()
    for reply in (
        {"usage": {"prompt_tokens": 100, "completion_tokens": 1}},
        {"usage": {"input_tokens": 20, "output_tokens": 3}},
        {"usage": None},
        {},
        {"usage": {"prompt_tokens": 5}},
        {"usage": {"prompt_tokens": -5, "completion_tokens": "1"}},
    ):
        usage.add(reply)
    assert usage == Usage(requests=6, told=2, tokens_in=120, tokens_out=4)
    assert usage.summary(Prices()) == "6 requests, 120 tokens in, 4 out in the 2 replies that say so"
    assert Usage(3).summary(Prices(1, 1)) == "3 requests; the server does not say how many tokens they took"
    thousands = Usage(2000, 2000, 1_000_000, 500_000)
    assert thousands.summary(Prices(2, 6)) == "2,000 requests, 1,000,000 tokens in, 500,000 out, $5.00"


def test_a_plan_counts_different_texts_and_the_least_and_the_most():
    table = rows("a b", "c", "a b", "", "d e f")

    def count(text):
        if not text:
            raise ValueError("the text is empty")
        return 10 * len(text.split())

    told = planned(table, Asking((4, 9), 2, count), Prices(5e5, 5e5))
    assert told.splitlines() == [
        "5 rows, 3 different texts: 12 to 27 requests, and a few to learn what the server takes",
        "tokens: 240 to 540 in, 24 to 54 out (by the tokenizer; of answers the most that they can have)",
        "cost: $132.00 to $297.00",
    ]
    sampled = planned(table, Asking((1, 1), 1), Prices(), (2, Usage(2, 2, 30, 2)))
    assert "tokens: 60 in, 4 out (about, by what the server says that 2 texts took)" in sampled
    assert "cost: not known; --price-in and --price-out" in sampled
    assert "the server does not say" in planned(table, Asking((1, 1), 1), Prices(), (2, Usage(2)))
    with pytest.raises(ValueError, match="--price-out -1"):
        Prices(1, -1)


def test_texts_that_are_drawn_are_different_and_the_same_for_a_seed():
    table = rows(*"abcabcabd")
    drawn = [example.text for example in drawn_texts(table, 3, 0)]
    assert len({*drawn}) == 3 and [example.text for example in drawn_texts(table, 3, 0)] == drawn
    assert sorted(example.text for example in drawn_texts(table, 99, 0)) == ["a", "b", "c", "d"]
