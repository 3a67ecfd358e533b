"""Scored tables as people want them back: their own columns with the model's beside, as .csv, .parquet or .xlsx.

    write_export("predictions.jsonl", "result.xlsx", table=open_table("tickets.csv"))

    their columns,  prediction, confidence, label_mass, p_LABEL ..., calibrated_confidence, decision, shortlist, error

A cell of text stays text: what a spreadsheet would take for a formula is marked with an apostrophe in a .csv, which
knows no other way, and typed as text in an .xlsx. A column of ours whose name is taken is called `model_...`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import predictions
from files import whole_file
from predictions import Prediction
from tables import Table, read_rows

BATCH = 10_000  # rows in memory
SHEET_ROWS = 1_048_576  # the most that Excel reads
CELL_LENGTH = 32_767
ADDED = {  # what a calibrator may have added, in the order of the columns
    "calibrated_confidence": "number",
    "decision": "text",
    "shortlist": "text",
    "original_prediction": "text",
}


def resumable_path(output: str | Path) -> Path:
    """The predictions file behind an output: itself, or for an export the .jsonl beside it; ValueError for others."""
    path = Path(output)
    if path.suffix not in (".jsonl", *predictions.EXPORTS):
        raise ValueError(
            f"the output {path} must end in .jsonl (a predictions file), or in {', '.join(predictions.EXPORTS)}"
        )
    return path.with_suffix(".jsonl")


def check_replaceable(output: str | Path, overwrite: bool = False) -> None:
    """ValueError where a table is there that no export has made: it may be somebody's only copy of their rows."""
    if overwrite or not Path(output).exists():
        return
    try:
        columns = set(next(read_rows(output), ("", {}))[1])
    except ValueError:
        columns = set()
    if not columns & {"label_mass", "model_label_mass"}:
        raise ValueError(f"{output} is there already, and is no table with predictions; use --overwrite to replace it")


@dataclass(frozen=True)
class Column:
    """A column of an export: its name, what it shows of a record or of the user's row, "text", "number" or "own"."""

    name: str
    field: str
    kind: str

    def value(self, mine: Mapping[str, object], row: Prediction | None) -> object:
        """The cell of one row; empty where the row was not scored."""
        if self.kind == "own":
            return mine.get(self.field)
        if row is None:
            return None
        if self.field.startswith("p_"):
            return (row.probabilities or {}).get(self.field.removeprefix("p_"))
        value = row.extras[self.field] if self.field in row.extras else getattr(row, self.field, None)
        return "; ".join(value) if isinstance(value, list) else value


def write_export(path: str | Path, output: str | Path, table: Table | None = None) -> int:
    """Write a predictions file as a table, beside the columns of `table`, if given, by id; returns its rows.

    The whole file takes the place of an old one at the end. Raises ValueError when the table is not the one that was
    scored, and for more rows than a sheet has.
    """
    rows = own_rows(path) if table is None else joined_rows(path, table)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} holds no predictions")
    columns = [Column(name, name, "own") for name in first[0]] + model_columns(path, first[0])
    values = ([column.value(mine, row) for column in columns] for mine, row in chain([first], rows))
    write = {".csv": _write_csv, ".parquet": _write_parquet, ".xlsx": _write_sheet}[Path(output).suffix]
    with whole_file(output) as scratch:
        return write(scratch, columns, values)


def own_rows(path: str | Path) -> Iterator[tuple[Mapping[str, object], Prediction]]:
    """Each record with what it repeats of the input."""
    for row in predictions.iterate(path):
        yield {"id": row.id, "text": row.text, "label": row.label}, row


def merged_shards(paths: Sequence[str | Path], table: Table) -> Iterator[Prediction]:
    """The rows of the N outputs of --shard 1/N to N/N, named in any order, in the order of the table they are of.

    Raises ValueError where they are not all of it, or not of one fingerprint.
    """
    files = [predictions.iterate(path) for path in paths]
    firsts = [next(rows, None) for rows in files]
    if empty := [path for path, first in zip(paths, firsts, strict=True) if first is None]:
        raise ValueError(f"{empty[0]} holds no predictions")
    if other := next((row for row in firsts if row.fingerprint != firsts[0].fingerprint), None):
        raise ValueError(f"the shards have different fingerprints: {firsts[0].fingerprint} and {other.fingerprint}")
    following = {row.id: (row, rows) for row, rows in zip(firsts, files, strict=True)}  # of each file its next row
    for number, example in enumerate(table, 1):
        row, rows = following.pop(example.id, (None, None))
        if row is None or row.text != example.text:
            raise ValueError(
                f"row {number:,} of {table.source} (id {example.id!r}) is not the next of any of the {len(files)} "
                "files: are all shards finished, and is the table read with the flags that it was scored with?"
            )
        yield row
        if after := next(rows, None):
            following[after.id] = (after, rows)
    if following:
        left = next(iter(following))
        raise ValueError(f"row {left!r} of a shard is not in {table.source}; is it the table that was scored?")


def joined_rows(path: str | Path, table: Table) -> Iterator[tuple[Mapping[str, object], Prediction | None]]:
    """Each row of a table with its record, by id; None where it was not scored. Of the same order, none is held."""
    rows = predictions.iterate(path)
    ahead: dict[str, Prediction] = {}
    for example, columns in table.with_columns():
        row = ahead.pop(example.id, None)
        while row is None and (following := next(rows, None)) is not None:
            if following.id == example.id:
                row = following
            else:
                ahead[following.id] = following
        if row is not None and row.text != example.text:
            raise ValueError(
                f"row {example.id!r} has another text in {table.source} than in {path}: is it the table that was "
                "scored, read with the same flags?"
            )
        yield columns, row
    if left := len(ahead) + sum(1 for _ in rows):
        raise ValueError(f"{left:,} rows of {path} are not in {table.source}; is it the table that was scored?")


def model_columns(path: str | Path, taken: Iterable[str]) -> list[Column]:
    """The columns of the model's, after those that a file's records have; a taken name gets `model_` before it."""
    labels: list[str] = []
    found = set()
    for row in predictions.iterate(path):
        labels = labels or list(row.probabilities or ())
        found.update(name for name in ADDED if name in row.extras)
    fields = {"prediction": "text", "confidence": "number", "label_mass": "number"}
    fields |= {f"p_{label}": "number" for label in labels}
    fields |= {name: kind for name, kind in ADDED.items() if name in found}
    fields["error"] = "text"
    taken = set(taken)
    return [Column(f"model_{name}" if name in taken else name, name, kind) for name, kind in fields.items()]


# The three formats


def text_cell(value: object) -> object:
    """A text that a spreadsheet would take for a formula, marked as text; numbers, also those in words, as they are."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
        return value
    except ValueError:
        return "'" + value


def _write_csv(path: Path, columns: list[Column], rows: Iterator[list[object]]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([text_cell(column.name) for column in columns])
        for row in rows:
            count += 1
            writer.writerow([text_cell(value) for value in row])
    return count


def _write_parquet(path: Path, columns: list[Column], rows: Iterator[list[object]]) -> int:
    """Our columns as text and float64; the user's as the one type that all of the first rows have, else as text."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    batch = list(islice(rows, BATCH))
    types = {"text": pyarrow.string(), "number": pyarrow.float64()}
    fields = []
    for place, column in enumerate(columns):
        kind = types.get(column.kind) or _arrow_type({type(row[place]) for row in batch}, pyarrow)
        fields.append(pyarrow.field(column.name, kind))
    schema = pyarrow.schema(fields)
    count = 0
    with ParquetWriter(path, schema) as writer:
        while batch:
            arrays = []
            for place, field in enumerate(schema):
                values = [row[place] for row in batch]
                if field.type == pyarrow.string():
                    values = [None if value is None else str(value) for value in values]
                arrays.append(pyarrow.array(values, field.type))
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
            count += len(batch)
            batch = list(islice(rows, BATCH))
    return count


def _arrow_type(found: set[type], pyarrow: object) -> object:
    found = found - {type(None)}
    if found == {bool}:
        return pyarrow.bool_()
    if found and found <= {int, float}:
        return pyarrow.float64() if float in found else pyarrow.int64()
    return pyarrow.string()


def _write_sheet(path: Path, columns: list[Column], rows: Iterator[list[object]]) -> int:
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    book = Workbook(write_only=True)
    sheet = book.create_sheet("predictions")

    def cell(value: object) -> object:
        if not isinstance(value, str):
            return value if isinstance(value, bool | int | float | None) else str(value)
        written = WriteOnlyCell(sheet, re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", value)[:CELL_LENGTH])
        written.data_type = "s"  # whatever it begins with
        return written

    sheet.append([cell(column.name) for column in columns])
    count = 0
    for count, row in enumerate(rows, 1):
        if count >= SHEET_ROWS:
            raise ValueError(f"a sheet holds {SHEET_ROWS - 1:,} rows; export to .csv or .parquet")
        sheet.append([cell(value) for value in row])
    book.save(path)
    return count
