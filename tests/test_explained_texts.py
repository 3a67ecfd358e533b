"""Explanations of two models read again and put side by side, whatever is wrong with the files."""

import json
import math
import re
from types import SimpleNamespace

import pytest

import explained_texts

NAMES = ("base", "fine-tuned")
MODELS = [
    SimpleNamespace(method="logprobs", fingerprint=fingerprint, probabilities={"negative": 0.5, "positive": 0.5})
    for fingerprint in ("aaaa1111", "bbbb2222")
]


def explained(text, p, fingerprint, **fields):
    """What logprobs_confidence.py --json prints, as far as it is read."""
    tokens = [(" positive", 0.9 * p, "positive"), (" negative", 0.9 * (1 - p), "negative"), (" x\x1b", 0.06, None)]
    row = {"text": text, "prompt": f"Text: {text}\nSentiment:", "label_mass": 0.9, "fingerprint": fingerprint}
    row["top_tokens"] = [
        {"token": token, "id": 1, "logprob": math.log(q), "label": label}
        for token, q, label in sorted(tokens, key=lambda entry: -entry[1])
    ]
    row |= {"probabilities": {"negative": 1 - p, "positive": p}, "confidence": max(p, 1 - p)}
    return row | {"prediction": "positive" if p > 0.5 else "negative"} | fields


SAID = [explained("Not bad", 0.6, "aaaa1111"), explained("Shift ends\x1b at 15:00.", 0.7, "aaaa1111")]
HEARD = [explained("Not bad", 0.95, "bbbb2222"), explained("Shift ends\x1b at 15:00.", 0.1, "bbbb2222")]


def read(tmp_path, base, tuned):
    paths = [tmp_path / "said.jsonl", tmp_path / "heard.jsonl"]
    for path, rows in zip(paths, (base, tuned), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return explained_texts.read_pairs([str(path) for path in paths], NAMES, MODELS)


def cells(text, first):
    """The cells of the line that begins with that cell."""
    line = next(line for line in text.splitlines() if line.strip().startswith(first))
    return re.split(r"\s{2,}", line.strip())


def test_first_tokens_stand_side_by_side_with_sums_and_verdicts(tmp_path):
    found = read(tmp_path, SAID, HEARD)
    assert found[0]["text"] == "Not bad" and found[0]["fine-tuned"]["tokens"][0]["probability"] == pytest.approx(0.855)
    assert found[0]["base"]["total_probabilities"] == pytest.approx({"negative": 0.36, "positive": 0.54})
    first, second = (explained_texts.side_by_side(each, NAMES) for each in found)
    assert cells(first, "rank") == ["rank", "base", "percent", "counts for", "fine-tuned", "percent", "counts for"]
    assert cells(first, "1") == ["1", '" positive"', "54.00%", "positive", '" positive"', "85.50%", "positive"]
    assert cells(first, "3") == ["3", '" x\\x1b"', "6.00%", '" negative"', "4.50%", "negative"]
    assert cells(first, "P(positive)") == ["P(positive)", "54.00%", "85.50%"]
    assert cells(second, "verdict") == ["verdict", "positive 70.00%", "negative 90.00%"]
    assert cells(second, "label mass") == ["label mass", "90.00%", "90.00%"]
    assert second.startswith("Text: Shift ends\\x1b at 15:00.") and "\x1b" not in first + second


def test_a_server_s_label_that_is_not_listed_counts_with_the_most_it_can_have(tmp_path):
    row = explained("Not bad", 0.6, "aaaa1111", missing=["negative"], label_mass=0.54, label_mass_high=0.9)
    found = read(tmp_path, [row], HEARD[:1])[0]["base"]
    assert found["total_probabilities"] == pytest.approx({"negative": 0.36, "positive": 0.54})


def token(**fields):
    return [SAID[0] | {"top_tokens": [{"token": "x", "logprob": -1, "label": None} | fields]}]


TURNED = [HEARD[0] | {"probabilities": {"positive": 0.95, "negative": 0.05}}]
REFUSED = {
    "a text too few": (SAID, HEARD[:1], "not of the same texts and prompt: line 2 differs"),
    "none": ([], [], "hold no texts"),
    "another text": (SAID, HEARD[::-1], "line 1 differs"),
    "another order of labels": (SAID[:1], TURNED, "heard.jsonl line 1 has the fingerprint bbbb2222 and the labels pos"),
    "places changed": (HEARD, SAID, "said.jsonl line 1 has the fingerprint bbbb2222"),
    "a number that is none": ([SAID[0] | {"label_mass": float("nan")}], HEARD[:1], "line 1 is not"),
    "a probability above one": ([SAID[0] | {"confidence": 1.2}], HEARD[:1], "line 1 is not what"),
    "a token that is no string": (token(token=5), HEARD[:1], "line 1 is not what"),
}


@pytest.mark.parametrize(("base", "tuned", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_explanations_that_cannot_be_compared_are_refused(base, tuned, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, base, tuned)
    assert "\n" not in str(caught.value)


def test_of_few_labels_all_are_shown_and_of_many_the_most_probable():
    assert explained_texts.most_probable({"a": 0.1, "b": 0.9}) == ["a", "b"]
    many = {f"label {n}": n / 100 for n in range(77)}
    assert explained_texts.most_probable(many) == [f"label {n}" for n in range(76, 68, -1)]
