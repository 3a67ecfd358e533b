"""predictions.py: the record, its file, safe appending and resuming."""

import hashlib
import io
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_error
from hypothesis import given, settings
from hypothesis import strategies as st

import predictions
from predictions import (
    Finished,
    Prediction,
    confidence_and_correct,
    failed,
    fingerprint,
    from_line,
    scored,
    smoothed,
    to_line,
)

VECTORS = json.loads((Path(__file__).parent / "data" / "reference_vectors.json").read_text(encoding="utf-8"))
COMMON = {"method": "logprobs", "model": "tiny", "task": "sentiment", "fingerprint": "3f9c2a71"}
# The order of design.md, by which people read the file.
SCORE = ["prediction", "confidence", "probabilities", "label_mass"]
CONTRACT = ["id", "text", "label", *SCORE, "method", "model", "task", "fingerprint"]


def record(number=0, text="a text", positive=0.75, label="positive", **extras):
    probabilities = {"negative": 1 - positive, "positive": positive}
    return scored(f"r{number}", text, label, probabilities, 0.9, **COMMON, extras=extras)


def expected(rows):
    return [(row.id, row.text, row.label) for row in rows]


def write(path, rows, tail=b""):
    path.write_bytes(b"".join(map(to_line, rows)) + tail)
    return path


# The record


HARD_TEXTS = [
    "",
    "\x00\x1b[31m",
    "two\nlines\r\n",
    "a\u2028b\u2029c\x85d",
    "caf\u00e9 \U0001f3ac",
    "\ud83c lone",
    '"\\',
]


@settings(deadline=None)
@given(
    text=st.text() | st.sampled_from(HARD_TEXTS),
    label=st.sampled_from([None, "negative", "positive"]),
    positive=st.floats(0, 1) | st.sampled_from([5e-324, 1e-17, 0.1 + 0.2, 1 - 2**-53]),
    mass=st.floats(0, 1),
    votes=st.dictionaries(st.text(), st.integers()),
)
def test_a_record_survives_its_line_bit_for_bit(text, label, positive, mass, votes):
    probabilities = {"negative": 1 - positive, "positive": positive}
    row = scored("7", text, label, probabilities, mass, **COMMON, extras={"votes": votes, "note": text})
    line = to_line(row)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    back = from_line(line, "here")
    assert back == row and back.confidence.hex() == row.confidence.hex()
    assert list(back.probabilities) == ["negative", "positive"]


def test_words_that_a_million_rows_repeat_are_in_memory_once():
    one, other = (from_line(to_line(record(number)), "here") for number in (1, 2))
    for name in ("label", "prediction", "method", "model", "task", "fingerprint"):
        assert getattr(one, name) is getattr(other, name)
    assert all(mine is theirs for mine, theirs in zip(one.probabilities, other.probabilities, strict=True))


def test_what_the_fast_parser_refuses_is_read_as_json_has_it():
    line = to_line(record(text="a \ud83c alone"))
    assert from_line(b"\xef\xbb\xbf" + line, "here") == from_line(line, "here") == record(text="a \ud83c alone")


def test_the_fields_of_a_line_are_the_contract_s_in_its_order():
    assert list(json.loads(to_line(record()))) == CONTRACT
    assert list(json.loads(to_line(record(votes={"positive": 3}, calls=5)))) == [*CONTRACT, "votes", "calls"]
    broken = json.loads(to_line(failed("7", "", None, "the text is empty", **COMMON)))
    assert list(broken) == [*CONTRACT, "error"] and broken["error"] == "the text is empty"
    assert [name for name in CONTRACT if broken[name] is None] == ["label", *SCORE]


def test_the_line_is_plain_utf8_that_other_programs_read():
    import pandas

    row = record(text="caf\u00e9 \u65e5\u672c")
    assert "caf\u00e9 \u65e5\u672c".encode() in to_line(row)
    table = pandas.read_json(io.BytesIO(to_line(row)), lines=True)
    assert table.loc[0, "text"] == row.text and table.loc[0, "confidence"] == row.confidence


def test_ties_go_to_the_label_listed_first():
    for labels in (["b", "a", "c"], ["c", "b", "a"]):
        row = scored("1", "x", None, dict.fromkeys(labels, 1 / 3), 1.0, **COMMON)
        assert (row.prediction, row.confidence) == (labels[0], 1 / 3)


@pytest.mark.parametrize(
    "change",
    [
        {"confidence": 0.25},  # the other label's
        {"confidence": None},
        {"prediction": "neutral"},
        {"prediction": None},
        {"probabilities": {"negative": 0.5, "positive": 0.75}},
        {"probabilities": {"negative": math.nan, "positive": 0.75}},
        {"probabilities": {"negative": -0.25, "positive": 1.25}, "confidence": 1.25},
        {"probabilities": None},
        {"label_mass": 1.1},
        {"label_mass": math.nan},
        {"label_mass": None},
        {"label": "Positive"},  # else every comparison with it would count as wrong
        {"error": "half an error"},
        # An error never comes with a number.
        {"error": "late", "prediction": None},
        {"error": "late", "prediction": None, "confidence": None, "probabilities": None},
    ],
)
def test_a_record_that_contradicts_itself_can_be_neither_made_nor_read(change):
    values = {name: getattr(record(), name) for name in CONTRACT} | change
    with pytest.raises((ValueError, TypeError)):
        Prediction(**values)
    with pytest.raises(ValueError, match="here is not a prediction"):
        from_line(json.dumps(values).encode() + b"\n", "here")


@pytest.mark.parametrize("line", [b"", b"text,label\n", b"[1]\n", b'{"id": "1"}\n', b"\xff\n", b"[" * 100_000 + b"\n"])
def test_a_line_that_is_no_record_is_one_line_that_says_where(line):
    with pytest.raises(ValueError, match=r"is not a prediction: [^\n]*; a table is scored first"):
        from_line(b"text,label\n", "mine.csv line 1")
    with pytest.raises(ValueError, match=r"^here is not a prediction: [^\n]*$"):
        from_line(line, "here")


def test_reading_names_the_line_that_is_wrong(tmp_path):
    rows = [record(0), record(1)]
    assert predictions.read(write(tmp_path / "good.jsonl", rows)) == rows
    with pytest.raises(ValueError, match=r"bad.jsonl line 3 is not a prediction"):
        predictions.read(write(tmp_path / "bad.jsonl", rows, b"text,label\n"))
    with pytest.raises(ValueError, match=r"torn.jsonl line 3 is cut off; repeat the command"):
        predictions.read(write(tmp_path / "torn.jsonl", rows, to_line(record(2))[:-1]))
    with pytest.raises(ValueError, match=r"empty.jsonl holds no predictions"):
        predictions.read(write(tmp_path / "empty.jsonl", []))


def test_a_file_joined_with_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"twice\.jsonl: 2 ids stand more than once, the first is 'r0'"):
        predictions.read(write(tmp_path / "twice.jsonl", [record(0), record(1)] * 2))


def test_confidence_and_correct_leave_out_what_could_not_be_scored():
    broken = failed("9", "", "positive", "the text is empty", **COMMON)
    rows = [record(0), broken, record(1, positive=0.2), record(2, positive=0.2, label="negative")]
    confidence, correct = confidence_and_correct(rows)
    assert confidence.tolist() == [0.75, 0.8, 0.8] and correct.tolist() == [True, False, True]
    assert confidence.dtype == np.float64 and correct.dtype == bool
    with pytest.raises(ValueError, match="1 of 2 scored rows have no label"):
        confidence_and_correct([record(0), record(1, label=None), broken])
    for nothing in ([], [broken]):
        with pytest.raises(ValueError, match="no row was scored"):
            confidence_and_correct(nothing)


# Votes


def voted(*counts):
    """A row of so many votes for each label."""
    votes = dict(zip("abcd", counts, strict=False))
    shares = {label: count / sum(counts) for label, count in votes.items()}
    return scored("r0", "a text", "a", shares, 1.0, **COMMON, extras={"votes": votes, "calls": sum(counts)})


@pytest.mark.parametrize("case", VECTORS["consistency"]["k_of_n"], ids=lambda c: "{k}-of-{n}-{classes}".format(**c))
def test_votes_are_smoothed_to_the_recorded_posterior_means(case):
    k, n, classes = case["k"], case["n"], case["classes"]
    counts = [k, n - k] + [0] * (classes - 2)
    values = smoothed(voted(*counts))
    assert values["a"] == pytest.approx(case["perks"], abs=1e-15)
    if classes == 2:
        assert values["a"] == pytest.approx(case["jeffreys_binary"], abs=1e-15)
    assert list(values) == list("abcd"[:classes]) and sum(values.values()) == pytest.approx(1, abs=1e-15)
    assert [values[label] for label in "abcd"[2:classes]] == [1 / classes / (n + 1)] * (classes - 2)


@pytest.mark.parametrize(
    "votes",
    [
        {"b": 2, "a": 8},
        {"a": 8},
        {"a": True, "b": False},
        {"a": 8, "b": -1},
        {"a": 2, "b": 8},
        [8, 2],
    ],
    ids=str,
)
def test_votes_that_are_no_counts_or_not_those_of_the_prediction_are_refused(votes):
    row = scored("r7", "a text", "a", {"a": 0.8, "b": 0.2}, 1.0, **COMMON, extras={"votes": votes})
    with pytest.raises(
        ValueError, match=r"^row 'r7': its votes are .+, not a count for each label, most for the predic"
    ):
        smoothed(row)


# The fingerprint


def test_a_fingerprint_is_the_same_for_ever_and_changes_with_every_part():
    parts = {"weights": "abc", "precision": "float32", "task": {"labels": [["a", ["x"]], ["b", ["y"]]]}, "seed": 0}
    canonical = (
        '{"precision": "float32", "seed": 0, "task": {"labels": [["a", ["x"]], ["b", ["y"]]]}, "weights": "abc"}'
    )
    assert fingerprint(**parts) == hashlib.sha256(canonical.encode()).hexdigest()[:8] == "ac0081b7"
    assert fingerprint(**dict(reversed(parts.items()))) == fingerprint(**parts)
    changed = [parts | {name: "other"} for name in parts] + [parts | {"adapter": "1234"}, parts | {"seed": 1}]
    changed += [{k: v for k, v in parts.items() if k != name} for name in parts]
    changed += [parts | {"task": {"labels": [["b", ["y"]], ["a", ["x"]]]}}]  # order of labels
    assert len({fingerprint(**p) for p in [parts, *changed]}) == len(changed) + 1


# Appending and resuming


def test_a_file_torn_at_any_byte_is_resumed_to_the_same_bytes(tmp_path):
    rows = [record(n, text) for n, text in enumerate(HARD_TEXTS)]
    whole = b"".join(map(to_line, rows))
    path = tmp_path / "p.jsonl"
    # Every byte of the first line, where a tail is most easily taken for something else, then a sample.
    for end in [*range(1, len(to_line(rows[0])) + 3), *random.Random(0).sample(range(len(whole)), 60), len(whole)]:
        path.write_bytes(whole[:end] + (b"\0" * 7 if end % 2 else b""))  # zeros are what a power cut leaves
        with predictions.open_output(path) as file:
            done = predictions.resume(file, iter(expected(rows)), "3f9c2a71").rows
            assert done == whole[:end].count(b"\n")
            assert file.seek(0, os.SEEK_END) == sum(len(to_line(row)) for row in rows[:done])
            predictions.append(file, rows[done:])
        assert path.read_bytes() == whole, end


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other fingerprint", r"other settings \(fingerprint 3f9c2a71, now 00000000\).*--overwrite"),
        ("other text", r"line 2 \(id r1\) was made from another input.*--overwrite"),
        ("other id", "another input"),
        ("shorter input", r"line 3 \(id r2\) was made from another input"),
    ],
)
def test_a_file_made_otherwise_is_refused_and_left_alone(case, message, tmp_path):
    rows = [record(0), record(1), record(2)]
    path = write(tmp_path / "p.jsonl", rows, b'{"id": "r3", "te')
    before, want = path.read_bytes(), expected(rows)
    want[1] = {
        "other text": ("r1", "b text", "positive"),
        "other id": ("r9", "a text", "positive"),
    }.get(case, want[1])
    want = want[:2] if case == "shorter input" else want
    mark = "00000000" if case == "other fingerprint" else "3f9c2a71"
    with predictions.open_output(path) as file, pytest.raises(ValueError, match=message):
        predictions.resume(file, iter(want), mark)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"text,label\nGood,positive\n",
        b"one line and no end",
        b'{"id": "r0", "mine": "preci',
        b'{"id": 1, "mine": "precious"}\n',
        b"\x00\x01\x02",
    ],
)
def test_a_file_that_is_not_ours_is_never_touched(content, tmp_path):
    path = tmp_path / "notes"
    path.write_bytes(content)
    rows = [record(0)]
    with predictions.open_output(path) as file, pytest.raises(ValueError, match="not a prediction"):
        predictions.resume(file, iter(expected(rows)), "3f9c2a71")
    assert path.read_bytes() == content


def test_overwrite_replaces_only_what_does_not_fit_and_an_output_of_nothing_is_removed(tmp_path):
    path = write(tmp_path / "p.jsonl", [record(0)])
    with predictions.open_output(path) as file:
        fits = predictions.resume(file, iter(expected([record(0)])), "3f9c2a71", overwrite=True)
        assert fits == Finished(rows=1, relabelled=0)
        assert predictions.resume(file, iter([]), "00000000", overwrite=True) == Finished(0, 0)
        predictions.append(file, [record(5)])
    assert predictions.read(path) == [record(5)]
    with pytest.raises(KeyError), predictions.open_output(tmp_path / "new.jsonl"):
        raise KeyError("the model did not load")
    assert not (tmp_path / "new.jsonl").exists()


def test_a_full_disk_loses_nothing(tmp_path, run):
    path, rows = tmp_path / "p.jsonl", [record(n) for n in range(9)]
    whole = b"".join(map(to_line, rows))
    limit = len(whole) // 2 + 7  # a file of this size at most makes a write fail in its middle, as a full disk does
    code = f"""if True:
        import sys, resource
        import command_line, predictions
        rows = [predictions.from_line(line, "") for line in sys.stdin.buffer]
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        with predictions.open_output(sys.argv[1]) as file:
            command_line.run(lambda: [predictions.append(file, [row]) for row in rows])
    """
    done = run("-c", code, path, input=whole.decode())
    assert_one_error((done.returncode, done.stdout, done.stderr), "cannot write", str(path), "repeat the command")
    kept = path.read_bytes()
    assert whole.startswith(kept) and kept.count(b"\n") == limit // len(to_line(rows[0])) and kept.endswith(b"\n")


def test_a_second_writer_is_refused_and_the_first_is_not_disturbed(tmp_path):
    path = tmp_path / "p.jsonl"
    with predictions.open_output(path) as file:
        with pytest.raises(ValueError, match="another run is writing"), predictions.open_output(path):
            pass
        predictions.append(file, [record(0)])
        with pytest.raises(ValueError, match="another run is writing"), predictions.open_output(path):
            pass
    assert predictions.read(path) == [record(0)]


def test_outputs_that_cannot_work_are_refused_before_anything_is_made(tmp_path):
    table = tmp_path / "in.csv"
    table.write_text("text\nx\n", encoding="utf-8")
    (tmp_path / "link.csv").symlink_to(table)
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "missing" / "p.jsonl", "does not exist"),
        ("/dev/full", "not a regular file"),
        ("/dev/null", "not a regular file"),
        (table, "both input and output"),
        (tmp_path / "link.csv", "both input and output"),
    ):
        with pytest.raises(ValueError, match=message):
            predictions.check_output(path, str(table))
    predictions.check_output(tmp_path / "p.jsonl", str(table))
    predictions.check_output(tmp_path / "p.jsonl", "hf:some/name")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "link.csv"]


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = write(tmp_path / "p.jsonl", [record(0)])

    def breaks():
        yield record(1)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        predictions.replace(path, breaks())
    assert predictions.read(path) == [record(0)] and list(tmp_path.iterdir()) == [path]
    predictions.replace(path, [record(1)])
    assert predictions.read(path) == [record(1)] and list(tmp_path.iterdir()) == [path]


def test_reading_takes_one_line_at_a_time(tmp_path):
    iterator = predictions.iterate(write(tmp_path / "p.jsonl", [record(0), record(1)], b"not a record\n"))
    assert [next(iterator).id, next(iterator).id] == ["r0", "r1"]
    with pytest.raises(ValueError, match="line 3"):
        next(iterator)


def test_a_table_that_was_made_of_predictions_names_them(tmp_path):
    for name in ("p.jsonl", "p.xlsx", "q.csv"):
        (tmp_path / name).write_bytes(b"PK\xa3\n")
    with pytest.raises(ValueError, match=r"p.xlsx is a table for people; its predictions are in .*p.jsonl$"):
        predictions.read(tmp_path / "p.xlsx")
    with pytest.raises(ValueError, match=r"q.csv line 1 is not a prediction"):
        predictions.read(tmp_path / "q.csv")
