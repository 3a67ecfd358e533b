"""near_duplicates.py against comparing every pair the obvious way, and for texts too many for that, by construction."""

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import near_duplicates as search
from near_duplicates import duplicate_groups, near_duplicates, partners, shingles

TEXTS = st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=9).map(" ".join), max_size=25)
THRESHOLDS = st.sampled_from([0.2, 0.5, 0.6, 0.7, 0.75, 0.8, 1.0])


def jaccard(one, other, width):
    """Of the sets of `width` consecutive words, the obvious way; plain words with spaces between."""
    sets = []
    for text in (one, other):
        words = text.split()
        sets.append({" ".join(words[i : i + width]) for i in range(len(words) - width + 1)} or {text})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.fixture(params=["one block", "many small blocks"], scope="class")  # of a test outside a class: that test
def blocks(request):
    """The search as it is, and with every limit so low that ten texts are a crowd and fill several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many small blocks":
            for name, value in {"CROWD": 2, "NEIGHBOURS": 1, "PAIRS_AT_ONCE": 3, "MEETINGS_AT_ONCE": 10}.items():
                patch.setattr(search, name, value)
        yield


@settings(max_examples=200, deadline=None)
@given(TEXTS, THRESHOLDS, st.integers(1, 3))
def test_near_duplicates_are_those_that_comparing_every_pair_finds(blocks, texts, threshold, width):
    found = list(near_duplicates(texts, threshold, width))
    first = [min(j for j in range(len(texts)) if jaccard(texts[i], texts[j], width) == 1) for i in range(len(texts))]
    expected = set()
    for i, j in combinations(range(len(texts)), 2):
        alike = jaccard(texts[i], texts[j], width)
        originals = first[i] == i and first[j] == j
        if alike >= threshold and (originals or first[j] == i):  # a repeat is paired with the first of its equals
            expected.add((i, j, alike))
    assert len(found) == len(set(found)) and set(found) == expected


@settings(max_examples=200, deadline=None)
@given(TEXTS, THRESHOLDS, st.integers(1, 3))
def test_groups_are_what_chains_of_pairs_link(blocks, texts, threshold, width):
    expected = list(range(len(texts)))  # each pair gives all of the later group the earlier one's number
    for i, j in combinations(range(len(texts)), 2):
        if jaccard(texts[i], texts[j], width) >= threshold:
            low, high = sorted((expected[i], expected[j]))
            expected = [low if group == high else group for group in expected]
    assert duplicate_groups(texts, threshold, width) == expected


@settings(max_examples=200, deadline=None)
@given(TEXTS, THRESHOLDS, st.integers(1, 3), st.lists(st.sampled_from("xyz"), min_size=25, max_size=25))
def test_a_partner_is_alike_and_on_the_side_it_should_be(blocks, texts, threshold, width, sides):
    within, elsewhere = partners(texts, sides[: len(texts)], threshold, width)
    for i, text in enumerate(texts):
        others = [j for j in range(len(texts)) if j != i and jaccard(text, texts[j], width) >= threshold]
        for partner, possible in (
            (within[i], [j for j in others if sides[j] == sides[i]]),
            (elsewhere[i], [j for j in others if sides[j] != sides[i]]),
        ):
            assert partner in possible if possible else partner == -1


def test_groups_follow_chains_and_no_further():
    texts = ["a b c d e", "z", "b c d e f", "c d e f g", "x y", "Z!"]
    assert jaccard(texts[0], texts[3], 1) < 0.6
    assert duplicate_groups(texts, 0.6, width=1) == [0, 1, 0, 0, 4, 1]
    assert duplicate_groups([], 0.6) == []


def test_shingles_forget_case_and_punctuation_and_nothing_else():
    assert shingles("Don't STOP: now!") == {("don't", "stop"), ("stop", "now")}
    assert shingles("don\u2019t stop") != shingles("dont stop")
    assert shingles("one", 2) == {("one",)}
    assert shingles("!?") == {("!?",)} != shingles(":-)")
    assert shingles("\u00c9T\u00c9 2024", 1) == {("\u00e9t\u00e9",), ("2024",)}


def test_a_thousand_copies_are_a_thousand_pairs():
    assert len(list(near_duplicates(["the same words here"] * 1000))) == 999


def test_all_planted_pairs_of_many_texts_are_found_and_no_other():
    """30,000 texts of words of their own, 2,000 of them edited in the middle: 12 words, 11 pairs, 9 of 13 the same."""
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(10**6)}" for _ in range(12)) for _ in range(30_000)]
    planted = []
    for i in draw.sample(range(30_000), 2_000):
        words = texts[i].split()
        words[draw.randrange(1, 11)] = "edited"
        planted.append((i, len(texts), 9 / 13))
        texts.append(" ".join(words))
    assert sorted(near_duplicates(texts)) == sorted(planted)
    assert list(near_duplicates(texts, 0.7)) == []


def test_texts_that_are_all_alike_are_grouped_without_comparing_every_pair(monkeypatch):
    """20,000 notices that differ by a number have 200,000,000 pairs."""
    texts = [f"your order number {n} was shipped today, thank you for your patience" for n in range(20_000)]
    sides = ["train"] * 19_990 + ["test"] * 10
    compared, wanted = [], search._Groups.wanted
    monkeypatch.setattr(search._Groups, "wanted", lambda *pair: compared.append(len(pair[1])) or wanted(*pair))
    assert set(duplicate_groups(texts)) == {0}
    assert sum(compared) < 2_000_000
    within, elsewhere = partners(texts, sides)
    assert (within >= 0).all() and (elsewhere[:19_990] >= 19_990).all() and (elsewhere[19_990:] < 19_990).all()
