"""A large table in parts: rows that are scored and written together, as Parquet files of predictions.

    for part in read_parts(source, schema, columns, part_rows=1024):
        write_part(output, part.name, to_table(rows, part.own, schema))      # rows/00000-000000000000.parquet
    collect(output, "predictions.jsonl", sample=10_000)                      # the usual file, in the input's order

A part is written whole or not at all and its name says which rows it holds: file number and first row. So the parts
that are there are the checkpoint of a run, whoever wrote them, and their names in order are the input's order. run.json
beside them says which run they are of.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import predictions
from files import validated, whole_file
from predictions import Prediction
from ray_sources import SourceFacts, file_system, inside, local_copy
from tables import Example, open_table

if TYPE_CHECKING:
    import pyarrow

FORMAT = "calibrated-confidence run on many workers, version 1"
RUN, ROWS = "run.json", "rows"
PART_ROWS = 1024  # at least: what a worker that dies loses
TEXT_FIELDS = ("id", "text", "label")
OTHERS = "extras"  # all other extras of a row, as JSON
FLAGS = ("truncated", "trained_on", "fitted_on")  # extras that are true or not there


# The output's columns


@dataclass(frozen=True)
class OutputSchema:
    """The columns of an output: the user's own by the name that they get, then the predictions' fields."""

    own: Mapping[str, tuple[str, str]]  # name in the output -> (name in the input, type)
    labels: Sequence[str]
    is_calibrated: bool

    @cached_property
    def arrow(self) -> pyarrow.Schema:
        import pyarrow

        fields = [(name, _arrow_type(kind)) for name, (_, kind) in self.own.items()]
        text, number = pyarrow.string(), pyarrow.float64()
        fields += [(name, text) for name in (*TEXT_FIELDS, "prediction")]
        fields += [(name, number) for name in ("confidence", "label_mass", *(f"p_{label}" for label in self.labels))]
        if self.is_calibrated:
            fields += [("calibrated_confidence", number), ("decision", text), ("shortlist", pyarrow.list_(text))]
        fields += [(name, pyarrow.bool_()) for name in FLAGS]
        fields += [(name, text) for name in ("method", "model", "task", "fingerprint", "error", OTHERS)]
        return pyarrow.schema(fields)


def _arrow_type(name: str) -> pyarrow.DataType:
    import pyarrow

    if unit := re.fullmatch(r"timestamp\[(\w+)\]", name):
        return pyarrow.timestamp(unit.group(1))
    return pyarrow.type_for_alias(re.sub(r"\[\w+\]", "", name))


def own_names(
    user_columns: Mapping[str, str], read_as: Mapping[str, str], labels: Sequence[str], is_calibrated: bool
) -> dict[str, tuple[str, str]]:
    """The user's columns by the name that they get in an output: (name in the input, type).

    One whose name is one of ours is called own_NAME, but for one that is read as the field of its name, which is not
    kept twice: `read_as` says which column is the text, the label and the id.
    """
    ours = OutputSchema({}, labels, is_calibrated).arrow.names
    own = {}
    for name, kind in user_columns.items():
        if name in TEXT_FIELDS and read_as.get(name) == name:
            continue
        own[f"own_{name}" if name in ours else name] = (name, kind)
    return own


def to_table(rows: Sequence[Prediction], own: pyarrow.Table, schema: OutputSchema) -> pyarrow.Table:
    """Predictions as columns, beside the user's own of the same rows."""
    import pyarrow

    columns = {name: own[name] for name in schema.own}
    for name in ("id", "text", "label", "prediction", "confidence", "label_mass", *predictions.FIELDS[-4:], "error"):
        columns[name] = [getattr(row, name) for row in rows]
    for label in schema.labels:
        columns[f"p_{label}"] = [None if row.error else row.probabilities[label] for row in rows]
    for name in schema.arrow.names:
        if name not in columns and name != OTHERS:
            columns[name] = [row.extras.get(name) for row in rows]
    others = [{name: value for name, value in row.extras.items() if name not in columns} for row in rows]
    columns[OTHERS] = [json.dumps(extras) if extras else None for extras in others]
    return pyarrow.table({name: columns[name] for name in schema.arrow.names}, schema=schema.arrow)


def from_record(record: Mapping[str, object], labels: Sequence[str]) -> Prediction:
    """A row of an output as the prediction that it was."""
    probabilities = None
    if record["error"] is None:
        probabilities = {label: record[f"p_{label}"] for label in labels}
    added = ("calibrated_confidence", "decision", "shortlist", *FLAGS)
    extras = {name: record[name] for name in added if record.get(name) is not None}
    extras |= json.loads(record[OTHERS] or "{}")
    fields = {name: record[name] for name in predictions.FIELDS if name != "probabilities"}
    return Prediction(**fields, probabilities=probabilities, error=record["error"], extras=extras)


# Parts


@dataclass(frozen=True)
class Part:
    """Rows that are scored and written together: their name in the output, the examples, the user's columns."""

    name: str
    examples: list[Example]
    own: pyarrow.Table


@dataclass(frozen=True)
class RunSource:
    """A file of a run: its place among them, and what goes before its row numbers where they are its ids."""

    number: int
    source: str
    id_prefix: str
    rows: int
    bytes: int | None

    def part_names(self, part_rows: int) -> dict[str, int]:
        """The rows of each part, by its name, in order."""
        firsts = range(0, self.rows, part_rows)
        return {self.part_name(first): min(part_rows, self.rows - first) for first in firsts}

    def part_name(self, first: int) -> str:
        return f"{self.number:05}-{first:012}.parquet"


def numbered_sources(facts: Sequence[SourceFacts]) -> list[RunSource]:
    """The files of a run; row numbers of several files get the file's name before them, so that they name one row."""
    names = [file.source.partition("?")[0] if "://" in file.source else file.source for file in facts]
    shared = ""
    if len(names) > 1:
        starts = [name.rpartition("/")[0].split("/") for name in names]
        alike = next((i for i, parts in enumerate(zip(*starts, strict=False)) if len(set(parts)) > 1), None)
        parts = starts[0][:alike] if alike is not None else min(starts, key=len)
        shared = "/".join(parts) + "/" if parts != [""] else ""
    sources = []
    for number, file in enumerate(facts):
        prefix = f"{names[number].removeprefix(shared)}:" if file.is_numbered and len(facts) > 1 else ""
        sources.append(RunSource(number, file.source, prefix, file.rows, file.bytes))
    return sources


def read_parts(
    source: RunSource,
    columns: Mapping[str, object],
    schema: OutputSchema,
    part_rows: int,
    finished: frozenset[str] = frozenset(),
) -> Iterator[Part]:
    """The parts of a file that are not finished, one at a time."""
    with local_copy(source.source) as path:
        rows = open_table(path, **columns).with_columns()
        first = 0
        while together := list(islice(rows, part_rows)):
            if (name := source.part_name(first)) not in finished:
                examples = [
                    Example(source.id_prefix + example.id, example.text, example.label) for example, _ in together
                ]
                yield Part(name, examples, own_columns([row for _, row in together], schema))
            first += len(together)


def own_columns(rows: Sequence[Mapping[str, object]], schema: OutputSchema) -> pyarrow.Table:
    """The user's columns of some rows, under their names in the output."""
    import pyarrow

    arrays, names = [], []
    for name, (here, kind) in schema.own.items():
        values = [row.get(here) for row in rows]
        if kind == "string":
            values = [value if value is None or isinstance(value, str) else _as_text(value) for value in values]
        arrays.append(pyarrow.array(values, _arrow_type(kind)))
        names.append(name)
    return pyarrow.table(arrays, names=names)


def _as_text(value: object) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)


def write_bytes(address: str, data: bytes) -> None:
    """Write a file whole or not at all, its folder too."""
    system, path = file_system(address)
    if "://" not in address:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as scratch:
            scratch.write_bytes(data)
        return
    with system.open_output_stream(path, compression=None) as file:  # an object is there when it is closed
        file.write(data)


def write_part(output: str, name: str, table: pyarrow.Table) -> None:
    """Write the rows of a part, whole or not at all."""
    import pyarrow
    from pyarrow.parquet import write_table

    sink = pyarrow.BufferOutputStream()
    write_table(table, sink)
    write_bytes(inside(output, ROWS, name), sink.getvalue().to_pybytes())


def finished_parts(output: str) -> frozenset[str]:
    """The names of the parts that are written."""
    from pyarrow.fs import FileSelector

    system, path = file_system(inside(output, ROWS))
    entries = system.get_file_info(FileSelector(path, allow_not_found=True))
    return frozenset(entry.base_name for entry in entries if re.fullmatch(r"\d{5}-\d{12}\.parquet", entry.base_name))


# The record of a run


@dataclass(frozen=True)
class RunRecord:
    """What an output is of: run.json, written before the first row."""

    fingerprint: str
    method: str
    model: str
    task: str
    labels: list[str]
    part_rows: int
    sources: list[RunSource]
    columns: dict[str, object]  # how the files are read
    own: dict[str, tuple[str, str]]
    calibrator: str | None  # hash of the calibrator and its threshold
    format: str = field(default=FORMAT)

    @property
    def total(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def schema(self) -> OutputSchema:
        return OutputSchema(self.own, self.labels, self.calibrator is not None)

    def part_names(self) -> dict[str, int]:
        """The rows of each part, by its name, in the input's order."""
        names: dict[str, int] = {}
        for source in self.sources:
            names |= source.part_names(self.part_rows)
        return names

    def rows_in(self, parts: frozenset[str]) -> int:
        """The rows of these of its parts."""
        return sum(rows for name, rows in self.part_names().items() if name in parts)


def read_run(output: str) -> RunRecord | None:
    """What an output says it is of; None where there is none yet. ValueError for a folder of something else."""
    from pyarrow.fs import FileSelector, FileType

    system, path = file_system(inside(output, RUN))
    if system.get_file_info(path).type == FileType.NotFound:
        folder = file_system(output)[1]
        if system.get_file_info(FileSelector(folder, allow_not_found=True)):
            raise ValueError(f"the folder {output} holds something else; name a new one for --output")
        return None
    with system.open_input_stream(path) as file:
        content = file.read()
    try:
        value = json.loads(content)
    except ValueError:
        raise ValueError(f"{inside(output, RUN)} is not JSON; remove {output} to begin anew") from None
    run = validated(RunRecord, value, inside(output, RUN))
    if run.format != FORMAT:
        raise ValueError(f"{inside(output, RUN)} is of another version: {run.format!r}")
    return run


def begin_run(output: str, run: RunRecord, before: RunRecord | None, overwrite: bool) -> None:
    """Write run.json, or see that what is there is of this run; ValueError if it is not, unless `overwrite`."""
    if before is not None:
        then, now = asdict(before), asdict(run)
        different = [name for name in then if then[name] != now[name]]
        if not different:
            return
        if not overwrite:
            name = different[0]
            shown = f" ({then[name]}, now {now[name]})" if isinstance(then[name], str | int) else ""
            raise ValueError(
                f"{output} was made with other {name.replace('_', ' ')}{shown}; use --overwrite to replace it, or "
                "another --output"
            )
        system, path = file_system(inside(output, ROWS))
        system.delete_dir_contents(path, missing_dir_ok=True)
    write_bytes(inside(output, RUN), json.dumps(asdict(run), indent=1).encode())


# Back to a predictions file


def collect(output: str, path: str | Path, sample: int | None = None, seed: int = 0) -> int:
    """Write the rows of a finished run as a predictions file, in the input's order; returns how many.

    `sample`: so many of them, drawn at random by `seed`, any set equally likely.
    """
    run = read_run(output)
    if run is None:
        raise ValueError(f"{output} holds no run; --input and --output begin one")
    names, finished = run.part_names(), finished_parts(output)
    if missing := [name for name in names if name not in finished]:
        left = sum(names[name] for name in missing)
        raise ValueError(f"{left:,} of {run.total:,} rows of {output} are not scored yet; repeat its command first")
    wanted = None
    if sample is not None:
        wanted = set(random.Random(seed).sample(range(run.total), min(sample, run.total)))
    predictions.replace(path, collected_rows(output, run, wanted))
    return run.total if wanted is None else len(wanted)


def collected_rows(output: str, run: RunRecord, wanted: set[int] | None) -> Iterator[Prediction]:
    """The rows of a run in order, or those whose numbers are wanted."""
    from pyarrow.parquet import ParquetFile

    first = 0
    for name, count in run.part_names().items():
        numbers = range(first, first + count)
        first += count
        chosen = [number - numbers.start for number in numbers if wanted is None or number in wanted]
        if not chosen:
            continue
        system, path = file_system(inside(output, ROWS, name))
        with system.open_input_file(path) as file, ParquetFile(file) as parquet:
            table = parquet.read()
        if len(table) != count:
            raise ValueError(f"{inside(output, ROWS, name)} has {len(table):,} rows, not {count:,}")
        for record in table.take(chosen).to_pylist():
            yield from_record(record, run.labels)
