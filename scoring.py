"""How texts and tables go through a method, whichever it is: checks, windows, resume, report, calibrator.

A script makes a method of a model and a task; here it is run:

    flags -> Job -> explain_texts      each text explained, with its calibrated confidence
                 -> score_table        a predictions file, continued where it was
                 -> finish_table       the report on it, and the calibrator applied to it
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

import calibration_metrics
import confusions
import exports
import predictions
import verdict
from command_line import advance_by, natural, pace, printable, progress, worth
from predictions import RETRY, Prediction
from tables import Example, Table, add_table_arguments, column_arguments, groups_of, open_table, sampled
from task import Task, add_task_argument, check_examples

if TYPE_CHECKING:
    from calibration import FittedCalibrator


FLUSH_SECONDS = 20.0  # a run that is killed loses at most the work of so long


class Method(Protocol):
    """A model joined with a task: what a script offers to be run here."""

    name: str  # as records say it: "logprobs", "consistency", ...
    model_name: str
    task: Task
    fingerprint: str
    window: int  # rows that are scored together: a run is continued at a multiple of it

    def score(
        self, examples: Iterator[Example], advance: Callable[[int], None], saved: SavedRows
    ) -> Iterator[Prediction]:
        """A prediction for each example, in order; `advance(n)` is called after every n.

        What scores a window of rows together asks `saved` for the rows that a stopped run had finished, and gives it
        its own as they are finished.
        """

    def explain(self, text: str) -> dict:
        """A text's prediction with the work shown, for people and for `--json`."""


@dataclass(frozen=True)
class Job:
    """What a command line asks for, checked as far as can be without the model: texts, or a table of `total` rows."""

    texts: Sequence[str]
    as_json: bool
    table: Table | None
    total: int
    output: Path | None  # the predictions file
    export: Path | None  # the same as a table with the user's own columns, made at the end
    overwrite: bool
    calibrator: FittedCalibrator | None
    threshold: float | None
    select_fdr: float | None = None  # of a whole table: the share of errors among what is selected

    def check(self, method: Method) -> None:
        """ValueError when the calibrator is not for this method's predictions."""
        if self.calibrator:
            check_calibrator(self.calibrator, method)


def check_calibrator(calibrator: FittedCalibrator, method: Method) -> None:
    """ValueError when the calibrator is not for the predictions of this method."""
    calibrator.check(method.fingerprint, method.model_name, method.task.name, list(method.task.labels))


def calibrator_of(method: Method, path: str | Path | None) -> FittedCalibrator | None:
    """The calibrator in a file, if one is named; ValueError when it is not for the predictions of this method."""
    if path is None:
        return None
    from calibration import load_calibrator  # late: scikit-learn takes a second

    calibrator = load_calibrator(path)
    check_calibrator(calibrator, method)
    return calibrator


def record_fields(method: Method) -> dict[str, str]:
    """What every record of a method says."""
    return {
        "method": method.name,
        "model": method.model_name,
        "task": method.task.name,
        "fingerprint": method.fingerprint,
    }


# Flags


def add_arguments(parser: argparse.ArgumentParser, **task_default: str | None) -> None:
    """The flags of every script that scores texts and tables; `task_default` as in `task.add_task_argument`."""
    add = parser.add_argument
    add("text", metavar="TEXT", nargs="*", help="texts to classify and explain")
    add_task_argument(parser, **task_default)
    add_table_arguments(parser)
    add("--truncate", action="store_true", help="shorten a text too long for the model, instead of failing its row")
    add("--json", action="store_true", help="print each explanation as one JSON object a line")
    add("--output", metavar="FILE", help="predictions file to write or continue: .jsonl; .csv .parquet .xlsx beside it")
    add("--overwrite", action="store_true", help="replace an output made with other settings or input")
    add("--calibrator", metavar="FILE", help="add calibrated confidence and decision; calibration_demo.py makes one")
    add(
        "--threshold", type=float, metavar="P", help="automate from this calibrated confidence on (default: the file's)"
    )
    add("--select-fdr", type=float, metavar="Q", help="select what to automate of this table, at most Q of it wrong")
    add("--batch-size", type=natural, metavar="N", help="rows run together (default: by length and device)")
    add("--shard", metavar="I/N", help="only every Nth row, from the Ith on; export.py --merge joins the N outputs")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what never goes together: `args` has the flags above."""
    if bool(args.text) == bool(args.input):
        parser.error("give either texts or a table (--input FILE)")
    if bool(args.input) != bool(args.output):
        parser.error("--input and --output go together")
    if args.json and args.input:
        parser.error("--json is for texts; a table becomes a predictions file, which is JSON Lines")
    for number, text in enumerate(args.text, 1):
        if not text.strip():
            parser.error(f"text {number} is empty")
    if args.batch_size == 0:
        parser.error("--batch-size 0: at least 1")
    if args.shard and (not args.input or args.select_fdr is not None):
        parser.error("--shard is a part of a table (--input), of which --select-fdr needs the whole")
    check_calibrator_arguments(parser, args)
    check_selection_arguments(parser, args)


def check_calibrator_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a calibrator without a name and a threshold that is none."""
    if args.calibrator == "":
        parser.error("--calibrator needs a file name")
    if args.threshold is not None and not (args.calibrator and 0 <= args.threshold <= 1):
        parser.error("--threshold is a calibrated confidence between 0 and 1 and needs --calibrator")


def check_selection_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse --select-fdr without a whole table and its calibrator, and beside another rule."""
    if args.select_fdr is None:
        return
    if not 0 < args.select_fdr < 1:
        parser.error(f"--select-fdr {args.select_fdr:g}: a share of errors between 0 and 1, both excluded")
    if not (args.calibrator and args.output) or args.threshold is not None:
        parser.error("--select-fdr is for a table (--output) with --calibrator, and takes the place of --threshold")


def job_from_arguments(args: argparse.Namespace, task: Task, more_outputs: Sequence[str] = ()) -> Job:
    """What the flags ask for; everything that can be wrong without a model is told here, before one is loaded.

    `more_outputs` are the suffixes of files that will be written beside the predictions file, as ".raw.jsonl".
    """
    table, total, output, export = None, 0, None, None
    if args.output:
        output = exports.resumable_path(args.output)
        export = Path(args.output) if Path(args.output) != output else None
    if args.input:
        for path in (output, args.output, *(output.with_suffix(suffix) for suffix in more_outputs)):
            for source in (args.input, args.calibrator):
                predictions.check_output(path, source)
        if export:
            exports.check_replaceable(export, args.overwrite)
        columns = column_arguments(args) | {"shard": shard_of(args.shard)}
        table = open_table(args.input, **columns, text_template=task.text_template)
        total = check_examples(table, task, args.input)
        if args.limit:
            _warn_of_order(table, args.limit)
    calibrator = None
    if args.calibrator:
        from calibration import load_calibrator  # late: scikit-learn takes a second

        calibrator = load_calibrator(args.calibrator)
        if args.select_fdr is not None:
            calibrator.check_selects()
    return Job(
        args.text, args.json, table, total, output, export, args.overwrite, calibrator, args.threshold, args.select_fdr
    )


def shard_of(text: str | None) -> tuple[int, int] | None:
    """(3, 8) of "3/8"; ValueError for what is no part of a whole."""
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--shard {text}: write it as I/N, from 1/N to N/N")
    return int(number), int(count)


def _warn_of_order(table: Table, limit: int) -> None:
    """Say so when the first rows of a table all have one label: it may be sorted, and they are no sample of it."""
    labels = {example.label for example in table}
    if limit >= 20 and len(labels) == 1 and None not in labels:
        advice = f"of a table sorted by label --sample {limit} takes rows from everywhere"
        print(f"note: the first {limit:,} rows are all {labels.pop()!r}; {advice}", file=sys.stderr)


# Texts


def conclusion(by_label: Mapping[str, float], label_mass: float, shared_mass: float | None = None) -> dict:
    """What the probabilities over the labels say; they are shares of `shared_mass`, by default the label mass."""
    prediction = max(by_label, key=by_label.__getitem__)
    return {
        "probabilities": dict(by_label),
        "label_mass": label_mass,
        "total_probability": by_label[prediction] * (label_mass if shared_mass is None else shared_mass),
        "prediction": prediction,
        "confidence": by_label[prediction],
    }


def explain_texts(job: Job, method: Method, print_explanation: Callable[[dict], None]) -> None:
    """Explain each text of a job, with what its calibrator says; for people, or one JSON object a line."""
    for text in job.texts:
        explanation, added = method.explain(text), {}
        if job.calibrator:
            added = calibrated(explanation, method, job.calibrator, job.threshold)
        if job.as_json:
            print(json.dumps(explanation | added))
        else:  # what the model said is shown, and what follows from it
            print_explanation(explanation | {"calibrated_prediction": added.get("prediction")} | added | explanation)


def calibrated(
    explanation: Mapping, method: Method, calibrator: FittedCalibrator, threshold: float | None = None
) -> dict[str, object]:
    """What a calibrator adds to an explained text, of `predictions.CALIBRATED`.

    One that may change the prediction also gives prediction, confidence and probabilities, in place of the model's.
    """
    row = predictions.scored(
        id="",
        text=explanation["text"],
        label=None,
        probabilities=explanation["probabilities"],
        label_mass=explanation["label_mass"],
        **record_fields(method),
        extras={"votes": explanation["votes"]} if "votes" in explanation else {},
    )
    row = calibrator.apply([row], threshold)[0]
    added = {name: row.extras[name] for name in predictions.CALIBRATED if name in row.extras}
    if "original_prediction" in added:
        added |= {"prediction": row.prediction, "confidence": row.confidence, "probabilities": row.probabilities}
    return added


def print_decision(explanation: Mapping[str, object]) -> None:
    """What a calibrator added to an explained text, if one did."""
    if "decision" in explanation:
        seen = "; the calibrator was fitted on this very text" if explanation.get("fitted_on") else ""
        percent = 100 * explanation["calibrated_confidence"]
        label = f" in {printable(new)}" if (new := explanation.get("calibrated_prediction")) else ""
        print(f"  Calibrated confidence {percent:.2f} %{label}: {explanation['decision']}{seen}")
        if shortlist := explanation.get("shortlist"):
            print(f"  Shortlist: {', '.join(map(printable, shortlist))}")


# Tables


class SavedRows:
    """Rows of a window that are finished before the window is: kept beside the output, so that a stop costs seconds.

    They are appended to `PATH.unfinished` every FLUSH_SECONDS, and a continued run takes them from there. Once their
    window is in the output they are dropped, and at the end of a run the file is gone.
    """

    def __init__(self, path: str | Path | None = None, fingerprint: str = "") -> None:
        self.path = Path(f"{path}.unfinished") if path else None
        self.rows: dict[str, Prediction] = {}
        self.unwritten: list[Prediction] = []
        self.written = time.monotonic()
        if self.path and self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):  # a kill has cut it off
                os.truncate(self.path, sum(map(len, lines[:-1])))
                lines.pop()
            rows = [predictions.from_line(line, f"{self.path} line {n}") for n, line in enumerate(lines, 1)]
            self.rows = {row.id: row for row in rows if row.fingerprint == fingerprint}

    def get(self, example: Example) -> Prediction | None:
        """The finished row of an example, if there is one."""
        row = self.rows.get(example.id)
        return row if row and row.text == example.text else None

    def keep(self, rows: Iterable[Prediction]) -> None:
        """Take rows that are finished."""
        self.unwritten += rows
        if time.monotonic() - self.written >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is kept and not written yet."""
        if self.path and self.unwritten:
            with open(self.path, "ab") as file:
                predictions.append(file, self.unwritten)
        self.unwritten = []
        self.written = time.monotonic()

    def drop(self) -> None:
        """Forget all rows: they are in the output now."""
        self.rows, self.unwritten = {}, []
        if self.path:
            self.path.unlink(missing_ok=True)


def score_table(
    method: Method, table: Table, total: int, path: str | Path, overwrite: bool = False, verb: str = "scored"
) -> float | None:
    """Write or continue the predictions file of a whole table, and say how fast; returns seconds a row scored now.

    Scoring starts at a multiple of the method's window, so that a continued run makes the same batches and numbers as
    an unbroken one. Rows that failed for a passing reason (RETRY among their extras) are asked again, once, at the end.
    """
    started = time.monotonic()
    with predictions.open_output(path) as file:
        finished = predictions.resume(file, map(method.task.identify, table), method.fingerprint, overwrite)
        done, count = finished.rows, total - finished.rows
        if count:
            start = done - done % method.window
            saved = SavedRows(path, method.fingerprint)
            try:
                with progress(total, start) as advance:
                    rows = method.score(islice(table, start, None), advance, saved)
                    for row in _with_purpose(islice(rows, done - start, None), table, done):
                        predictions.append(file, [row])
                saved.drop()
            finally:  # also when the run is stopped
                saved.flush()
        count += _ask_again(method, table, path, done)
        if finished.relabelled:
            _relabel(method.task, table, path, finished.relabelled)
    if not count:
        return None
    seconds = time.monotonic() - started
    print(f"{verb} {count:,} rows in {seconds:.1f} s, {pace(count / seconds)}", file=sys.stderr)
    return seconds / count


def _with_purpose(rows: Iterator[Prediction], table: Table, start: int) -> Iterator[Prediction]:
    """The rows from number `start` on; those whose `purpose` in the table is chosen (scripts/label_next.py) say so."""
    if not isinstance(table, Table) or "purpose" not in next(table.with_columns())[1]:
        yield from rows
        return
    for row, (_, columns) in zip(rows, islice(table.with_columns(), start, None), strict=True):
        yield replace(row, extras=row.extras | {"purpose": "chosen"}) if columns["purpose"] == "chosen" else row


def _ask_again(method: Method, table: Table, path: str | Path, done: int) -> int:
    """Score again the rows that failed for a passing reason; returns how many of them are among the first `done`."""
    again = [number for number, row in enumerate(predictions.iterate(path)) if row.extras.get(RETRY)]
    if not again:
        return 0
    print(f"asking again for {len(again):,} rows that failed for a passing reason", file=sys.stderr)
    wanted = set(again)
    examples = (example for number, example in enumerate(table) if number in wanted)
    fresh = dict(zip(again, method.score(examples, lambda n: None, SavedRows()), strict=True))
    for number, row in enumerate(predictions.iterate(path)):
        if number in wanted and "purpose" in row.extras:
            fresh[number] = replace(fresh[number], extras=fresh[number].extras | {"purpose": row.extras["purpose"]})
    rows = predictions.iterate(path)
    predictions.replace(path, (fresh.get(number, row) for number, row in enumerate(rows)))
    return sum(number < done for number in again)


def _relabel(task: Task, table: Table, path: str | Path, count: int) -> None:
    """Write the labels that the table has now; the scores stay."""
    print(f"note: {count:,} rows have another label in the table now; their scores stay", file=sys.stderr)
    identities = map(task.identify, table)
    rows = predictions.iterate(path)
    predictions.replace(path, (replace(row, label=label) for row, (_, _, label) in zip(rows, identities, strict=True)))


def encode_all(
    examples: Sequence[Example], encode: Callable[[str], object]
) -> tuple[dict[int, object], dict[int, str]]:
    """What `encode` makes of each text, and the message of each that it refuses, both by the example's number."""
    encoded, errors = {}, {}
    for number, example in enumerate(examples):
        try:
            encoded[number] = encode(example.text)
        except ValueError as error:
            errors[number] = str(error)
    return encoded, errors


def by_windows(
    method: Method, examples: Iterator[Example], advance: Callable[[int], None], saved: SavedRows
) -> Iterator[Prediction]:
    """`Method.score` of methods that have `score_together(examples, advance, saved)`: a window at a time, in order.

    A row that cannot be scored gets its error and no number.
    """
    while together := list(islice(examples, method.window)):
        yield from method.score_together(together, advance, saved)
        saved.drop()


def failed(method: Method, example: Example, error: str, will_pass: bool = False) -> Prediction:
    """The record of a row that a method could not score; what will pass is asked again at the end of a run."""
    extras = {RETRY: True} if will_pass else {}
    return predictions.failed(*method.task.identify(example), error, **record_fields(method), extras=extras)


def predict(method: Method, texts: Sequence[str], calibrator: FittedCalibrator | None) -> list[Prediction]:
    """A prediction for each text, in order, numbered from 1; one that cannot be scored carries an `error`."""
    if isinstance(texts, str):
        raise ValueError("predict takes a list of texts; put the one text into a list")
    rows = method.score_together([Example(str(number), text, None) for number, text in enumerate(texts, 1)])
    return calibrator.apply(rows) if calibrator else rows


def in_batches(
    method: Method,
    examples: Sequence[Example],
    encode: Callable[[str], object],
    score_batches: Callable[[dict[int, object], frozenset[int]], Iterator[dict[int, Prediction]]],
    advance: Callable[[int], None] = lambda n: None,
    saved: SavedRows | None = None,
) -> list[Prediction]:
    """Score examples in one sorting by length, returned in their order; errors and `saved` rows are not scored.

    `score_batches(encoded, skip)` runs what `encode` made of the texts, by the example's number and in that order, a
    batch at a time: but for the places `skip` in that order, which keep their part in how batches are made, so that a
    continued run gives the same numbers. It yields the records of each batch by the example's number.
    """
    saved = saved or SavedRows()
    encoded, errors = encode_all(examples, encode)
    records = {number: failed(method, examples[number], error) for number, error in errors.items()}
    done = {}
    for place, number in enumerate(encoded):
        if row := saved.get(examples[number]):
            done[place] = records[number] = row
    advance_by(advance, len(records), 0)
    texts = {number: examples[number].text for number in encoded.keys() - records.keys()}
    for fresh in score_batches(encoded, frozenset(done)):
        new = [texts[n] for n in fresh.keys() - records.keys()]  # a batch of which some rows are saved runs whole
        advance_by(advance, len(new), worth(new, texts.values()))
        records |= fresh
        saved.keep(fresh.values())
    return [records[number] for number in range(len(examples))]


def write_derived(
    path: str | Path, rows: Callable[[], Iterable[Prediction]], fingerprint: str, overwrite: bool = False
) -> None:
    """Write rows that were computed from other predictions, at once; those that the file holds already stay.

    So they keep what a calibrator has added, and a row that has been answered since takes its error's place. `rows()`
    gives them anew. ValueError for a file with other settings, unless `overwrite`.
    """

    def merged() -> Iterator[Prediction]:
        for new, old in zip_longest(rows(), predictions.iterate(path)):
            yield old if old is not None and predictions.uncalibrated(old) == new else new

    with predictions.open_output(path) as file:
        identities = ((row.id, row.text, row.label) for row in rows())
        predictions.resume(file, identities, fingerprint, overwrite)
        if any(after != before for after, before in zip_longest(merged(), predictions.iterate(path))):
            predictions.replace(path, merged())


def finish_table(job: Job, report_text: str) -> None:
    """Print the report on a finished predictions file, apply the job's calibrator to it, and make the export."""
    print(report_text)
    if job.calibrator:
        from calibration import calibrate_file

        with predictions.open_output(job.output):  # locked: a run that continued the file now would lose its rows
            print(calibrate_file(job.output, job.calibrator, job.threshold, job.select_fdr))
    if job.export:
        print(f"{job.export}: {exports.write_export(job.output, job.export, job.table):,} rows")


@dataclass
class Tally:
    """What a report counts while it reads rows: numbers alone, 36 bytes a row at most."""

    total: int = 0
    chosen: int = 0  # labelled rows that were chosen to be labelled
    labels: tuple[str, ...] = ()
    confidence: array = field(default_factory=lambda: array("d"))  # of the scored rows
    label_mass: array = field(default_factory=lambda: array("d"))
    labelled_confidence: array = field(default_factory=lambda: array("d"))
    labelled_mass: array = field(default_factory=lambda: array("d"))
    truth: array = field(default_factory=lambda: array("i"))  # numbers of labels
    predicted: array = field(default_factory=lambda: array("i"))

    def counting(self, rows: Iterable[Prediction]) -> Iterator[Prediction]:
        """Count the rows that pass; those that are scored and labelled pass on."""
        for row in rows:
            self.total += 1
            if row.error is not None:
                continue
            self.labels = self.labels or tuple(row.probabilities)
            self.confidence.append(row.confidence)
            self.label_mass.append(row.label_mass)
            if row.label is not None:
                self.labelled_confidence.append(row.confidence)
                self.labelled_mass.append(row.label_mass)
                self.truth.append(self.labels.index(row.label))
                self.predicted.append(self.labels.index(row.prediction))
                self.chosen += row.extras.get("purpose") == "chosen"
                yield row

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the true and the predicted labels [labelled rows]."""
        return np.frombuffer(self.truth, dtype=np.int32), np.frombuffer(self.predicted, dtype=np.int32)

    def totals(self) -> verdict.Totals:
        """What a verdict needs of all labelled rows."""
        truth, predicted = self.arrays()
        correct = truth == predicted
        return verdict.Totals(
            labels=self.labels,
            true_rows=np.bincount(truth, minlength=len(self.labels)),
            predicted_rows=np.bincount(predicted, minlength=len(self.labels)),
            right=int(correct.sum()),
            label_mass=float(np.mean(self.labelled_mass)),
            log_loss=calibration_metrics.log_loss(np.frombuffer(self.labelled_confidence), correct),
        )


def report(path: str | Path, groups_file: str | None = None) -> str:
    """Counts, label mass and confidence of a predictions file; with labels the verdict on them first.

    Rows are read one at a time; of the labelled ones a random sample is kept for what has to be learned from texts.
    `groups_file` says which rows belong together (default: near-duplicates).
    """
    tally = Tally()
    labelled = tally.counting(predictions.iterate(path))
    sample = [row for _, row in sampled(enumerate(labelled), verdict.ROWS)]
    scored = len(tally.confidence)
    lines = [f"{path}: {scored:,} of {tally.total:,} rows scored, {tally.total - scored:,} with an error"]
    if sample:
        groups = groups_of(sample, groups_file) if groups_file else None
        lines += verdict_lines(tally, sample, groups)
    if scored:
        mass, lowest = np.mean(tally.label_mass), f"(lowest {min(tally.label_mass):.3f})"
        lines.append(f"  all rows: mean confidence {np.mean(tally.confidence):.3f}, label mass {mass:.3f} {lowest}")
    return "\n".join(lines)


def verdict_lines(tally: Tally, sample: Sequence[Prediction], groups: Sequence[object] | None = None) -> Iterator[str]:
    """What labelled rows say, and of more than two labels the worst; where there is no verdict the accuracy alone."""
    truth, predicted = tally.arrays()
    right, n = int((truth == predicted).sum()), len(truth)
    found = verdict.no_sample(tally.chosen, n) if tally.chosen else verdict.judge_sample(sample, tally.totals(), groups)
    yield verdict.text(found.record())
    if found.problem:
        low, high = calibration_metrics.exact_interval(right, n)
        interval = f"95 % exact interval {low:.3f} to {high:.3f}"
        yield f"  accuracy {right / n:.3f}, {interval}, n = {n:,} labelled rows"
    elif len(tally.labels) > 2:
        yield from (f"  {line}" for line in confusions.worst_words(tally.labels, truth, predicted))
