"""The predictions file: what a model said about each text, one JSON object a line.

A script that touches a model ends by writing this file, a script that analyses starts by reading it. So everything
after the model runs on a laptop, in seconds, without torch.

    {"id": "7", "text": "...", "label": "positive", "prediction": "positive", "confidence": 0.5224,
     "probabilities": {"negative": 0.4776, "positive": 0.5224}, "label_mass": 0.9976, "method": "logprobs",
     "model": "smollm2-135m-instruct", "task": "sentiment", "fingerprint": "3f9c2a71"}

Writing is an append in input order, so a run that was killed is continued by the same command: a torn last line is
dropped, finished rows are checked against the input and skipped. A row that could not be scored carries `error` and
nulls, never a number.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from dataclasses import replace as replace_field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from files import whole_file

try:
    import fcntl
except ImportError:  # Windows has no advisory lock; two runs on one output are then the user's to avoid.
    fcntl = None


@dataclass(frozen=True)
class Prediction:
    """One scored text. `probabilities` are over the task's labels and sum to 1; `confidence` is the prediction's.

    `label_mass` is the share of the raw distribution that named any label; `confidence * label_mass` is the total
    probability of the predicted label. `label` is None for unlabelled rows. When `error` is set, every number is None.
    """

    id: str
    text: str
    label: str | None
    prediction: str | None
    confidence: float | None
    probabilities: Mapping[str, float] | None
    label_mass: float | None
    method: str
    model: str
    task: str
    fingerprint: str
    error: str | None = None
    extras: Mapping[str, object] = field(default_factory=dict)  # method-specific flat fields: votes, epistemic, ...

    def __post_init__(self) -> None:
        if not (isinstance(self.id, str) and isinstance(self.text, str) and isinstance(self.label, str | None)):
            raise ValueError(f"prediction {self.id!r}: id, text and label must be strings, the label may be null")
        for name in ("method", "model", "task", "fingerprint"):
            if not (isinstance(value := getattr(self, name), str) and value):
                raise ValueError(f"prediction {self.id!r}: {name} is {value!r}, not a name")
        if (self.prediction is None) != (self.error is not None):
            raise ValueError(f"prediction {self.id!r} needs either a prediction or an error")
        if self.error is not None:
            if not (self.confidence is self.probabilities is self.label_mass is None):
                raise ValueError(f"prediction {self.id!r} has an error and yet a number")
        else:
            probabilities = self.probabilities or {}
            if self.prediction not in probabilities or probabilities[self.prediction] != self.confidence:
                raise ValueError(f"prediction {self.id!r}: confidence is not the predicted label's probability")
            if self.confidence < max(probabilities.values()):
                raise ValueError(f"prediction {self.id!r}: another label than the predicted one is more probable")
            if not all(0 <= p <= 1 for p in probabilities.values()) or abs(sum(probabilities.values()) - 1) > 1e-6:
                raise ValueError(f"prediction {self.id!r}: probabilities do not sum to 1")
            if not 0 <= self.label_mass <= 1 + 1e-6:
                raise ValueError(f"prediction {self.id!r}: label_mass {self.label_mass} is outside [0, 1]")
            if self.label is not None and self.label not in probabilities:
                known = ", ".join(probabilities)
                raise ValueError(f"prediction {self.id!r}: its label {self.label!r} is not one of the task's ({known})")


def scored(
    id: str, text: str, label: str | None, probabilities: Mapping[str, float], label_mass: float, **common: object
) -> Prediction:
    """The record of a scored text; the prediction is the most probable label, of equals the one listed first.

    `common` are method, model, task, fingerprint and the method's extras.
    """
    prediction = max(probabilities, key=probabilities.__getitem__)
    return Prediction(id, text, label, prediction, probabilities[prediction], probabilities, label_mass, **common)


def failed(id: str, text: str, label: str | None, error: str, **common: object) -> Prediction:
    """The record of a text that could not be scored: the reason and no number."""
    return Prediction(id, text, label, None, None, None, None, error=error, **common)


FIELDS = tuple(f.name for f in fields(Prediction) if f.name not in ("error", "extras"))
ORIGINAL = ("original_prediction", "original_probabilities")  # extras where a calibrator may change the prediction
CALIBRATED = ("calibrated_confidence", "decision", "fitted_on", "shortlist", *ORIGINAL)  # extras that a calibrator adds
EXPORTS = (".csv", ".parquet", ".xlsx")  # tables that exports.py makes of a predictions file, which stays beside them
RETRY = "retry"  # the extra of a row that failed for a passing reason


def uncalibrated(row: Prediction) -> Prediction:
    """The record without what a calibrator has added, and with the prediction that it had before."""
    extras = {name: value for name, value in row.extras.items() if name not in CALIBRATED}
    if "original_prediction" not in row.extras:
        return replace_field(row, extras=extras)
    prediction, probabilities = (row.extras.get(name) for name in ORIGINAL)
    if not isinstance(probabilities, Mapping) or prediction not in probabilities:
        raise ValueError(f"row {row.id!r}: its original_probabilities are not those of its original_prediction")
    confidence = probabilities[prediction]
    return replace_field(row, prediction=prediction, confidence=confidence, probabilities=probabilities, extras=extras)


def as_scored(row: Prediction) -> Prediction:
    """The record with the model's own prediction, where a calibrator has changed it; any other as it is."""
    return uncalibrated(row) if "original_prediction" in row.extras else row


def relabelled(row: Prediction, probabilities: Mapping[str, float]) -> Prediction:
    """The record with calibrated probabilities, whose most probable label is its prediction now.

    What the model said is kept in `original_prediction` and `original_probabilities`.
    """
    extras = {**row.extras, "original_prediction": row.prediction, "original_probabilities": row.probabilities}
    prediction = max(probabilities, key=probabilities.__getitem__)
    confidence = probabilities[prediction]
    return replace_field(row, prediction=prediction, confidence=confidence, probabilities=probabilities, extras=extras)


def fingerprint(**settings: object) -> str:
    """Eight hex digits of everything that changes a score: model, adapter, quantization, task, method and settings."""
    canonical = json.dumps(settings, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def to_line(prediction: Prediction) -> bytes:
    """The record as one line of UTF-8 JSON, floats at full precision."""
    record = {name: getattr(prediction, name) for name in FIELDS}
    if prediction.error is not None:
        record["error"] = prediction.error
    return _json(record | prediction.extras) + b"\n"


def _json(record: dict) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # a lone surrogate in the text: only its \u escape can be stored
        return json.dumps(record, ensure_ascii=True, allow_nan=False).encode()


def from_line(line: bytes, where: str) -> Prediction:
    """Parse one line; a ValueError names `where` it stands and what is wrong."""
    try:
        record = _parsed(line)
        known = {name: record.pop(name) for name in FIELDS}
        return Prediction(**known, error=record.pop("error", None), extras={**record})  # without the room of what left
    except json.JSONDecodeError as error:
        advice = "a table is scored first (logprobs_confidence.py --input TABLE --output FILE.jsonl)"
        raise ValueError(f"{where} is not a prediction: {error}; {advice}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} is not a prediction: {error}") from None
    except KeyError as error:
        raise ValueError(f"{where} is not a prediction: it has no field {error}") from None


def _parsed(line: bytes) -> dict:
    """The object of a line by pydantic's parser, three times as fast as json's, equal words once in memory.

    What it refuses, as a lone surrogate that json reads, json reads or says what is wrong with.
    """
    from pydantic_core import from_json  # slow to import

    try:
        return from_json(line, allow_inf_nan=False, cache_strings="all")
    except ValueError:
        return json.loads(line, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def iterate(path: str | os.PathLike) -> Iterator[Prediction]:
    """Yield the records of a predictions file one at a time; of a table that was made of one, an error names that."""
    origin = Path(path).with_suffix(".jsonl")
    if Path(path).suffix in EXPORTS and origin.exists():
        raise ValueError(f"{path} is a table for people; its predictions are in {origin}")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                raise ValueError(f"{path} line {number} is cut off; repeat the command that wrote it to finish it")
            yield from_line(line, f"{path} line {number}")


def read(path: str | os.PathLike) -> list[Prediction]:
    """Read a whole predictions file; an empty one, and one with an id that stands twice, is a ValueError."""
    rows = list(iterate(path))
    if not rows:
        raise ValueError(f"{path} holds no predictions")
    check_ids([row.id for row in rows], str(path))
    return rows


def check_ids(ids: Sequence[str], where: str) -> None:
    """ValueError when an id stands twice: a row would count twice."""
    repeated = [id for id, times in Counter(ids).items() if times > 1]
    if repeated:
        raise ValueError(
            f"{where}: {len(repeated):,} ids stand more than once, the first is {repeated[0]!r}; has a file been "
            "joined with itself?"
        )


def read_labelled(path: str | os.PathLike, score: str = "confidence") -> tuple[list[Prediction], int]:
    """The scored rows of a file, all of one fingerprint, and how many rows have an error; ValueErrors name the file.

    `score` "confidence" is the model's: where a calibrator has changed predictions, the model's own come back. Raises
    as `confidence_and_correct` does, and for rows that were chosen to be labelled because they are hard: what is
    measured on them is true of no others (scripts/label_next.py).
    """
    rows = read(path)
    if chosen := sum(row.extras.get("purpose") == "chosen" for row in rows):
        raise ValueError(
            f"{path}: {chosen:,} of {len(rows):,} rows were chosen to be labelled (their purpose), so they are no "
            "sample of all rows and nothing is measured or guaranteed with them; score the table with --where "
            "purpose=random"
        )
    try:
        if score == "confidence":
            rows = [as_scored(row) for row in rows]
        confidence_and_correct(rows, score)
        return one_fingerprint(rows), sum(row.error is not None for row in rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def paired_rows(
    first: Sequence[Prediction], second: Sequence[Prediction], names: tuple[str, str]
) -> list[tuple[Prediction, Prediction]]:
    """The rows of two files by id, in the first's order; ValueError when they are not the same texts, labels and task.

    They are as the models scored them. `names` says what a message calls each file.
    """
    first, second = ([as_scored(row) for row in rows] for rows in (first, second))
    by_id = [{row.id: row for row in rows} for rows in (first, second)]
    for name, rows, mine in zip(names, (first, second), by_id, strict=True):
        if different := [row.id for row in rows if row.fingerprint != rows[0].fingerprint]:
            raise ValueError(f"row {different[0]!r} of the {name} file has another fingerprint than the first row")
        if len(mine) < len(rows):
            twice = next(row.id for row in rows if mine[row.id] is not row)
            raise ValueError(f"row {twice!r} stands twice in the {name} file")
    for here, there in ((0, 1), (1, 0)):
        if lost := [id for id in by_id[here] if id not in by_id[there]]:
            raise ValueError(
                f"row {lost[0]!r} of the {names[here]} file is not in the {names[there]} file; score the same rows"
            )
    pairs = [(row, by_id[1][row.id]) for row in first]
    for one, two in pairs:
        if (one.text, one.label, one.task) != (two.text, two.label, two.task):
            raise ValueError(f"row {one.id!r} is not the same in both files: its text, label or task differs")
        if one.error is None and two.error is None and [*one.probabilities] != [*two.probabilities]:
            raise ValueError(f"row {one.id!r}: the labels of the two files differ")
    return pairs


def one_fingerprint(rows: Iterable[Prediction]) -> list[Prediction]:
    """The scored rows; ValueError when there are none, or when they are not all one model's, task's and method's."""
    scored = [row for row in rows if row.error is None]
    if not scored:
        raise ValueError("no row was scored")
    if other := next((row for row in scored if row.fingerprint != scored[0].fingerprint), None):
        raise ValueError(
            f"it mixes the fingerprints {scored[0].fingerprint} and, in row {other.id!r}, {other.fingerprint}: "
            "answers of different models, tasks or methods"
        )
    return scored


def confidence_and_correct(rows: Iterable[Prediction], score: str = "confidence") -> tuple[np.ndarray, np.ndarray]:
    """(float64 [n], bool [n]) of the scored rows. Rows with an error have no confidence and are left out; count them.

    `score` may be "calibrated_confidence". Raises ValueError when no row was scored, when a scored row has no label or
    no such score, or when the calibrator was fitted on rows that it is to be judged by.
    """
    scored = [row for row in rows if row.error is None]
    unlabelled = sum(row.label is None for row in scored)
    if unlabelled:
        raise ValueError(f"{unlabelled} of {len(scored)} scored rows have no label, so nobody knows if they are right")
    if not scored:
        raise ValueError("no row was scored")
    if score != "confidence" and (missing := sum(row.extras.get(score) is None for row in scored)):
        raise ValueError(f"{missing} of {len(scored)} rows have no {score}; --calibrator adds it")
    if score != "confidence" and (seen := sum(bool(row.extras.get("fitted_on")) for row in scored)):
        raise ValueError(
            f"{seen} of {len(scored)} rows are among those the calibrator was fitted on (fitted_on); a report on them "
            "would be in-sample. Score it on other rows"
        )
    values = np.array([score_of(row, score) for row in scored], dtype=np.float64)
    return values, np.array([row.prediction == row.label for row in scored], dtype=bool)


def smoothed(row: Prediction) -> Mapping[str, float]:
    """The probabilities of a scored row as a calibrator should see them: votes as (v + 1/L) / (n + 1), others as is.

    Ten of ten answers are no certainty, and the logit of 1 would outweigh all other rows. This is the posterior mean
    under Perks' prior, of two labels that of Jeffreys. Raises ValueError for votes that are no counts or not the row's.
    """
    votes = row.extras.get("votes")
    if votes is None:
        return row.probabilities
    if not (
        isinstance(votes, Mapping)
        and [*votes] == [*row.probabilities]
        and all(type(count) is int and count >= 0 for count in votes.values())
        and 0 < votes[row.prediction] == max(votes.values())
    ):
        raise ValueError(f"row {row.id!r}: its votes are {votes!r}, not a count for each label, most for the predicted")
    total = sum(votes.values()) + 1
    return {label: (count + 1 / len(votes)) / total for label, count in votes.items()}


def score_of(row: Prediction, score: str = "confidence") -> float:
    """The confidence of a scored row, or its `calibrated_confidence`; ValueError if that is no number in [0, 1]."""
    value = row.confidence if score == "confidence" else row.extras.get(score)
    if value is None:
        raise ValueError(f"row {row.id!r} has no {score}; --calibrator adds it")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"row {row.id!r}: {score} is {value!r}, not a number in [0, 1]")
    return value


# Writing: append, resume, overwrite


def check_output(path: str | os.PathLike, input_path: str | None = None) -> None:
    """Refuse an output that cannot be written, before any model is loaded. Creates nothing."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"the output {path} is a folder; name a file in it, as {path / 'predictions.jsonl'}")
    if path.exists() and not path.is_file():
        raise ValueError(f"the output {path} is not a regular file; predictions must be readable again to continue")
    if not path.parent.is_dir():
        raise ValueError(f"the output's folder {path.parent} does not exist; create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"the output {path} cannot be written: permission denied")
    if input_path is not None and path.exists() and Path(input_path).exists() and path.samefile(input_path):
        raise ValueError(f"{path} is both input and output; choose another --output")


@contextmanager
def open_output(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a predictions file to be continued, locked against a second run; remove it if nothing came of it.

    At the end what was written is on the disk, whatever happens to the machine.
    """
    with open(path, "ab+") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"another run is writing {path}; wait for it or choose another --output") from None
        try:
            yield file
        finally:
            file.flush()
            os.fsync(file.fileno())
            if not os.fstat(file.fileno()).st_size and os.path.samestat(os.fstat(file.fileno()), Path(path).stat()):
                Path(path).unlink()  # unless a whole file has taken its place


@dataclass(frozen=True)
class Finished:
    """What a file to be continued holds already: its rows, and how many have another label than the input now."""

    rows: int
    relabelled: int


def resume(
    file: BinaryIO,
    expected: Iterable[tuple[str, str, str | None]],
    expected_fingerprint: str,
    overwrite: bool = False,
) -> Finished:
    """Count the rows already in `file`, verified one by one against the input's (id, text, label); drop a torn tail.

    A file made with other settings or from other texts is emptied with `overwrite`, else it is a ValueError and is not
    touched. A file that fits is continued either way, so the same command always goes on where it was. A label is no
    part of a score, so it may have changed; the caller writes it anew.
    """
    try:
        finished, end = _verify(file, expected, expected_fingerprint)
    except ValueError:
        if not overwrite:
            raise
        finished, end = Finished(0, 0), 0
    if end < os.fstat(file.fileno()).st_size:
        file.truncate(end)
    return finished


def _verify(file: BinaryIO, expected: Iterable[tuple], expected_fingerprint: str) -> tuple[Finished, int]:
    """What of `file` are whole records of this input and these settings, and its bytes; a ValueError for any other."""
    advice = "use --overwrite to replace it, or another --output"
    file.seek(0)
    count, relabelled, end, expected = 0, 0, 0, iter(expected)
    for line in file:
        where = f"{file.name} line {count + 1}"
        wanted = next(expected, ())
        if not line.endswith(b"\n"):
            # Torn by a kill, if it begins as the next row would (a power cut leaves zeros); else it is somebody's file.
            torn, beginning = line.rstrip(b"\0"), _json(dict(zip(FIELDS, wanted, strict=False)))[:-1]
            if not (torn.startswith(beginning) or beginning.startswith(torn)):
                raise ValueError(f"{where} is not a prediction; {advice}")
            break
        row = from_line(line, where)
        if row.fingerprint != expected_fingerprint:
            made = f"(fingerprint {row.fingerprint}, now {expected_fingerprint})"
            raise ValueError(f"{where} was made with other settings {made}; {advice}")
        if (row.id, row.text) != wanted[:2]:
            raise ValueError(f"{where} (id {row.id}) was made from another input; {advice}")
        relabelled += row.label != wanted[2]
        count, end = count + 1, end + len(line)
    return Finished(count, relabelled), end


def replace(path: str | os.PathLike, rows: Iterable[Prediction]) -> None:
    """Write a whole file at once: the old one stays until the new one is complete. A link is written through."""
    with whole_file(path) as scratch, open(scratch, "wb") as file:
        file.writelines(map(to_line, rows))


def append(file: BinaryIO, rows: Iterable[Prediction]) -> None:
    """Append rows and flush: all of them, or, when the disk is full, none."""
    end = file.seek(0, os.SEEK_END)
    data = b"".join(map(to_line, rows))
    try:
        while data:  # unbuffered semantics: what write() has not taken yet is still ours to undo
            data = data[os.write(file.fileno(), data) :]
    except OSError as error:
        file.truncate(end)
        raise OSError(
            f"cannot write {file.name}: {error.strerror}; nothing is lost, repeat the command to continue"
        ) from None
