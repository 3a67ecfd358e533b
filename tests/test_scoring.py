"""scoring.py: tables go through a method by windows, are continued, asked again and reported; texts are explained."""

import contextlib
import io
import json
import re
from dataclasses import dataclass, field, replace

import pytest
from scipy.stats import binomtest

import predictions
import scoring
from predictions import RETRY, failed, scored, to_line
from tables import Example, open_table
from task import TASKS

SENTIMENT = TASKS["sentiment"]
COMMON = {"method": "logprobs", "model": "tiny", "task": "sentiment", "fingerprint": "3f9c2a71"}
PASSING, LASTING = ("the server is down", {RETRY: True}), ("the text is too long", {})


def example(number):
    return Example(f"r{number}", f"text {number}", "positive")


def answered(one):
    return scored(one.id, one.text, one.label, {"negative": 0.25, "positive": 0.75}, 0.9, **COMMON)


@dataclass
class ServerThatIsDown:
    """A method that fails for some rows at first, id -> [(error, extras), ...], and remembers what it was asked."""

    down: dict = field(default_factory=dict)
    window: int = 1
    asked: list = field(default_factory=list)
    name, model_name, task, fingerprint = "logprobs", "tiny", SENTIMENT, "3f9c2a71"

    def score(self, examples, advance, saved):
        self.asked.append([])
        for one in examples:
            self.asked[-1].append(one.id)
            if errors := self.down.get(one.id):
                error, extras = errors.pop(0)
                yield failed(one.id, one.text, one.label, error, **COMMON, extras=extras)
            else:
                yield answered(one)
            advance(1)


def newly_scored(path, table, method):
    """How many rows `score_table` says it scored."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        seconds_a_row = scoring.score_table(method, table, len(table), path)
    line = said.getvalue().splitlines()[-1:]
    assert (seconds_a_row is None) == (line == [])
    return int(re.match(r"scored (\d+) rows in", line[0])[1]) if line else 0


def test_rows_that_failed_for_a_passing_reason_are_asked_again_and_no_others(tmp_path):
    table, path = [example(n) for n in range(6)], tmp_path / "p.jsonl"
    method = ServerThatIsDown({"r1": [PASSING], "r3": [PASSING] * 3, "r4": [LASTING]})
    assert newly_scored(path, table, method) == 6  # a row that is asked twice is still one row
    assert method.asked == [[f"r{n}" for n in range(6)], ["r1", "r3"]]
    lines = path.read_bytes().splitlines(keepends=True)
    assert [lines[n] for n in (0, 1, 2, 5)] == [to_line(answered(table[n])) for n in (0, 1, 2, 5)]
    assert [row.error for row in predictions.iterate(path)] == [None, None, None, PASSING[0], LASTING[0], None]
    # Repeated, the command asks for what is still open; then for nothing, and leaves the file alone.
    assert newly_scored(path, table, method) == 1 and method.asked[2:] == [["r3"]]
    assert predictions.read(path)[3].error == PASSING[0]
    assert newly_scored(path, table, method) == 1 and predictions.read(path)[3] == answered(table[3])
    stamp, asked = path.stat().st_mtime_ns, len(method.asked)
    assert newly_scored(path, table, method) == 0 and len(method.asked) == asked
    assert path.stat().st_mtime_ns == stamp and list(tmp_path.iterdir()) == [path]


def test_rows_that_were_chosen_to_be_labelled_say_so_and_no_report_takes_them(tmp_path):
    lines = [f"r{n},text {n},positive,{'chosen' if n % 2 else 'random'}" for n in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["id,text,label,purpose", *lines]) + "\n", encoding="utf-8")
    path, method = tmp_path / "p.jsonl", ServerThatIsDown({"r3": [PASSING]})
    path.write_bytes(to_line(answered(example(0))) + b'{"id": "r1')  # a run that was killed
    scoring.score_table(method, open_table(str(tmp_path / "t.csv")), 4, path)
    assert [row.extras.get("purpose") for row in predictions.read(path)] == [None, "chosen", None, "chosen"]
    assert predictions.read(path)[3].error is None
    with pytest.raises(ValueError, match=r"p.jsonl: 2 of 4 rows were chosen to be labelled.*--where purpose=random"):
        predictions.read_labelled(path)
    only = open_table(str(tmp_path / "t.csv"), where={"purpose": "random"})
    scoring.score_table(ServerThatIsDown(), only, 2, tmp_path / "random.jsonl")
    assert [row.id for row in predictions.read_labelled(tmp_path / "random.jsonl")[0]] == ["r0", "r2"]


@pytest.mark.parametrize(("done", "start"), [(0, 0), (3, 0), (4, 4), (7, 4), (10, None)])
def test_a_continued_table_is_scored_from_the_start_of_a_window(done, start, tmp_path):
    table, method, path = [example(n) for n in range(10)], ServerThatIsDown(window=4), tmp_path / "p.jsonl"
    path.write_bytes(b"".join(to_line(answered(one)) for one in table[:done]) + (b'{"id": "r' if done < 10 else b""))
    assert newly_scored(path, table, method) == 10 - done
    assert method.asked == ([] if start is None else [[one.id for one in table[start:]]])
    assert predictions.read(path) == [answered(one) for one in table]


def test_a_table_whose_second_asking_breaks_off_keeps_every_row(tmp_path):
    table, path = [example(n) for n in range(3)], tmp_path / "p.jsonl"
    method = ServerThatIsDown({"r1": [PASSING]})
    first = method.score

    def breaks_at_the_second_call(examples, advance, saved):
        if method.asked:
            raise KeyboardInterrupt
        return first(examples, advance, saved)

    method.score = breaks_at_the_second_call
    with pytest.raises(KeyboardInterrupt):
        scoring.score_table(method, table, 3, path)
    assert [row.error for row in predictions.iterate(path)] == [None, PASSING[0], None]
    method.score = first
    assert newly_scored(path, table, method) == 1 and predictions.read(path) == [answered(one) for one in table]


def test_new_labels_are_taken_over_and_no_row_is_scored_again(tmp_path, capsys):
    table, method, path = [example(n) for n in range(4)], ServerThatIsDown(), tmp_path / "p.jsonl"
    assert newly_scored(path, table[:3], method) == 3
    table[1] = Example("r1", "text 1", "negative")
    assert newly_scored(path, table, method) == 1 and method.asked[1] == ["r3"]
    assert [row.label for row in predictions.iterate(path)] == ["positive", "negative", "positive", "positive"]
    table[2] = Example("r2", "another text", "positive")
    with pytest.raises(ValueError, match="another input"):
        newly_scored(path, table, method)


class OneByOneInWindows:
    """A method that finishes the rows of a window from the last to the first, and may be stopped after some."""

    name, model_name, task, fingerprint, window = "logprobs", "tiny", SENTIMENT, "3f9c2a71", 5

    def __init__(self, stop_after):
        self.left, self.asked = stop_after, []

    score = scoring.by_windows

    def score_together(self, window, advance, saved):
        rows = {}
        for one in reversed(window):
            rows[one.id] = saved.get(one)
            if rows[one.id] is None:
                if not self.left:
                    raise KeyboardInterrupt
                self.left -= 1
                self.asked.append(one.id)
                rows[one.id] = answered(one)
                saved.keep([rows[one.id]])
        return [rows[one.id] for one in window]


@pytest.mark.parametrize("stops", [[3, 99], [7, 99], [1, 1, 1, 99], [5, 2, 99]])
def test_what_a_window_had_finished_is_not_scored_again_by_a_continued_run(stops, tmp_path):
    table, path, asked = [example(n) for n in range(12)], tmp_path / "p.jsonl", []
    beside = tmp_path / "p.jsonl.unfinished"
    for number, stop_after in enumerate(stops, 1):
        method = OneByOneInWindows(stop_after)
        if number < len(stops):
            with pytest.raises(KeyboardInterrupt):
                scoring.score_table(method, table, 12, path)
            if beside.exists():  # and a kill that came in the middle of writing
                beside.write_bytes(beside.read_bytes() + b'{"id": "r')
        else:
            scoring.score_table(method, table, 12, path)
        asked += method.asked
    assert sorted(asked) == sorted(one.id for one in table)
    assert predictions.read(path) == [answered(one) for one in table] and list(tmp_path.iterdir()) == [path]


def test_rows_are_saved_every_few_seconds_and_those_of_other_settings_are_not_taken(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(scoring.time, "monotonic", lambda: now[0])
    rows = [answered(example(n)) for n in range(4)]
    saved = scoring.SavedRows(tmp_path / "p.jsonl", "3f9c2a71")
    saved.keep(rows[:2])
    assert list(tmp_path.iterdir()) == []
    now[0] += scoring.FLUSH_SECONDS
    saved.keep(rows[2:3])
    again = scoring.SavedRows(tmp_path / "p.jsonl", "3f9c2a71")
    assert [again.get(example(n)) for n in range(4)] == [*rows[:3], None]
    assert again.get(Example("r0", "another text", None)) is None
    assert scoring.SavedRows(tmp_path / "p.jsonl", "00000000").get(example(0)) is None


def test_derived_rows_are_written_once_and_only_over_a_file_of_theirs(tmp_path):
    rows, path = [answered(example(n)) for n in range(3)], tmp_path / "p.jsonl"

    def derive(fingerprint="3f9c2a71", **options):
        scoring.write_derived(path, lambda: iter(rows), fingerprint, **options)

    derive()
    assert predictions.read(path) == rows
    stamp = path.stat().st_mtime_ns
    derive()
    assert path.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="other settings"):
        derive("00000000")
    assert predictions.read(path) == rows
    path.write_bytes(to_line(rows[0]))  # as left by another program: finished by the same command
    derive()
    assert predictions.read(path) == rows
    # What a calibrator has added stays, and a row that has been answered since takes its error's place.
    calibrated = [replace(row, extras={"calibrated_confidence": 0.6, "decision": "review"}) for row in rows]
    lost = failed("r1", "text 1", "positive", "the server is down", **COMMON)
    predictions.replace(path, [calibrated[0], lost, calibrated[2]])
    derive()
    assert predictions.read(path) == [calibrated[0], rows[1], calibrated[2]]


def test_what_one_calibrator_adds_is_all_that_is_added_to_an_explanation(capsys):
    explanation = {"text": "x", "probabilities": {"negative": 0.25, "positive": 0.75}, "label_mass": 0.9}

    class AlwaysSixty:
        def apply(self, rows, threshold):
            (row,) = rows
            assert (row.method, row.model, row.task, row.fingerprint) == tuple(COMMON.values())
            extras = {"calibrated_confidence": 0.6, "decision": "review" if threshold > 0.6 else "automate"}
            return [scored("", "x", None, row.probabilities, 0.9, **COMMON, extras=extras)]

    method = ServerThatIsDown()
    method.explain = lambda text: dict(explanation)
    job = scoring.Job(["x"], True, None, 0, None, None, False, AlwaysSixty(), 0.5)
    scoring.explain_texts(job, method, print)
    added = {"calibrated_confidence": 0.6, "decision": "automate"}
    assert json.loads(capsys.readouterr().out) == explanation | added
    scoring.print_decision(added)
    assert capsys.readouterr().out == "  Calibrated confidence 60.00 %: automate\n"


def table_of(path, truth, predicted, **fields):
    """A predictions file of labels and predictions, n or p a row."""
    names, rows = {"n": "negative", "p": "positive"}, []
    for number, (label, answer) in enumerate(zip(truth, predicted, strict=True)):
        p = 0.75 if answer == "p" else 0.25
        row = scored(str(number), f"text {number}", names[label], {"negative": 1 - p, "positive": p}, 0.9, **COMMON)
        rows.append(replace(row, **fields))
    predictions.replace(path, rows)
    return path


@pytest.mark.parametrize(
    ("truth", "predicted", "verdict"),
    [
        ("p" * 90 + "n" * 10, "p" * 20 + "n" * 80, "worse than always answering 'positive' (0.900)"),
        ("p" * 60 + "n" * 40, "p" * 100, "only 'positive' is ever predicted"),
        ("p" * 60 + "n" * 40, "p" * 60 + "n" * 40, "better than always answering 'positive' (0.600)"),
        ("p" * 100, "p" * 90 + "n" * 10, "none: all 100 labelled rows are 'positive'"),
        ("pnn", "pnp", "none: 3 labelled rows are too few"),
    ],
)
def test_a_report_opens_with_the_verdict(truth, predicted, verdict, tmp_path):
    report = scoring.report(table_of(tmp_path / "p.jsonl", truth, predicted)).splitlines()
    assert report[1].startswith(f"Verdict: {verdict}")
    right = sum(a == b for a, b in zip(truth, predicted, strict=True))
    assert any(f"accuracy {right / len(truth):.3f}" in line for line in report)
    assert report[-1] == "  all rows: mean confidence 0.750, label mass 0.900 (lowest 0.900)"


def test_rows_that_were_chosen_to_be_labelled_get_no_verdict(tmp_path):
    path = table_of(tmp_path / "p.jsonl", "pn" * 30, "p" * 60, extras={"purpose": "chosen"})
    report = scoring.report(path)
    assert report.splitlines()[1].startswith("Verdict: none: 60 of 60 labelled rows were chosen to be labelled")
    low, high = binomtest(30, 60).proportion_ci(0.95, "exact")
    assert f"  accuracy 0.500, 95 % exact interval {low:.3f} to {high:.3f}, n = 60 labelled rows" in report


def test_a_report_on_many_rows_keeps_few_texts_and_counts_all(tmp_path, monkeypatch):
    monkeypatch.setattr("verdict.ROWS", 50)
    path = table_of(tmp_path / "p.jsonl", "pn" * 200, "p" * 100 + "pn" * 150)
    report = scoring.report(path)
    assert "n = 400 labelled rows, 50 of them drawn" in report and "accuracy 0.875" in report
    assert report == scoring.report(path)


def test_of_more_than_two_labels_the_worst_are_named(tmp_path):
    rows, labels = [], ("a", "b", "c")
    for number in range(60):
        truth = number % 3
        p = [0.1, 0.1, 0.1]
        p[0 if truth == 1 else truth] = 0.8
        by_label = dict(zip(labels, p, strict=True))
        rows.append(scored(str(number), f"text {number}", labels[truth], by_label, 1, **COMMON))
    predictions.replace(tmp_path / "p.jsonl", rows)
    report = scoring.report(tmp_path / "p.jsonl")
    assert "lowest recall: 'b' 0.000 [0.000, 0.168] of 20" in report and "'b' for 'a' 20" in report
