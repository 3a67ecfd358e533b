"""What a worker of scripts/score_on_ray.py does: loads the model once, then scores parts of a table and writes them.

    described = describe_method(work)           # the fingerprint and what else a run is known by, by loading the model
    scorer = PartScorer(work, run, output)      # one in each worker: it holds the model
    scorer(packed)                              # a part in, its file out, how many rows came of it

Whatever a part is scored by is a method of scoring.py, so its windows, batches and numbers are those of the scripts.
Nothing here imports Ray: these are plain functions, which Ray calls on other machines.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import scoring
from command_line import one_line
from llama import load_llama
from logprobs_confidence import label_scorer
from probe_confidence import probe_scorer
from probe_files import load_probe
from ray_parts import Part, RunRecord, RunSource, finished_parts, read_parts, read_run, to_table, write_part
from scoring import Method, SavedRows
from tables import Example
from task import Task

if TYPE_CHECKING:
    from calibration import FittedCalibrator
    from predictions import Prediction

TOLD = (ValueError, OSError, MemoryError)  # what a user can put right; Ray Data would lose its words


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker must know to score rows: how the model is loaded, what is asked, what is added."""

    folder: str  # the driver's
    loading: Mapping[str, object]  # keyword arguments of load_llama
    task: Task
    probe: str | None  # its folder
    truncate: bool
    batch_size: int | None
    calibrator: FittedCalibrator | None
    calibrator_digest: str | None  # of its file
    threshold: float | None


@dataclass(frozen=True)
class Described:
    """What a run is known by: the method's fields, its window, and what loading it said."""

    fingerprint: str
    method: str
    model: str
    window: int
    notes: str


def load_method(work: WorkerSettings) -> Method:
    """The model with its task or probe, as the scripts load them; their errors too."""
    loading = dict(work.loading)
    for name in ("model", "adapter"):
        loading[name] = here(loading[name], work.folder)
    if work.probe:
        record, probe = load_probe(here(work.probe, work.folder))
        llama = load_llama(**loading, task=record.task)
        return probe_scorer(llama, record, probe, work.truncate, work.batch_size)
    llama = load_llama(**loading, task=work.task.settings())
    return label_scorer(llama, work.task, work.truncate, work.batch_size)


def here(name: str, folder: str) -> str:
    """A folder by the driver's relative name: in the copy of the working folder that a job has, else the driver's."""
    path = Path(folder, name)
    return str(path) if not Path(name).exists() and path.exists() else name


def describe_method(work: WorkerSettings) -> Described:
    """Load the model where the workers will, and say what it is; ValueError when the calibrator is not for it."""
    with contextlib.redirect_stderr(io.StringIO()) as notes:
        method = load_method(work)
        if work.calibrator:
            scoring.check_calibrator(work.calibrator, method)
    return Described(method.fingerprint, method.name, method.model_name, method.window, notes.getvalue())


def run_of(
    described: Described,
    work: WorkerSettings,
    sources: list[RunSource],
    own: dict[str, tuple[str, str]],
    columns: dict[str, object],
    part_rows: int,
) -> RunRecord:
    """The record of a run; its parts are whole windows."""
    calibrator = f"{work.calibrator_digest}, threshold {work.threshold}" if work.calibrator else None
    return RunRecord(
        fingerprint=described.fingerprint,
        method=described.method,
        model=described.model,
        task=work.task.name,
        labels=list(work.task.labels),
        part_rows=-(-part_rows // described.window) * described.window,
        sources=sources,
        columns=columns,
        own=own,
        calibrator=calibrator,
    )


@dataclass(frozen=True)
class PartReader:
    """Reads the files of a run: a file's row in, its unfinished parts out, one at a time and packed."""

    run: RunRecord
    output: str

    def __call__(self, batch: Mapping[str, object]) -> Iterator[dict[str, list]]:
        source = self.run.sources[int(batch["number"][0])]
        try:
            finished = finished_parts(self.output)
            for part in read_parts(source, self.run.columns, self.run.schema, self.run.part_rows, finished):
                yield {"part": [pack(part)], "problem": [""]}
        except TOLD as error:
            yield {"part": [b""], "problem": [one_line(error)]}


class PartScorer:
    """One worker: it holds the model, scores parts and writes them."""

    def __init__(self, work: WorkerSettings, run: RunRecord, output: str) -> None:
        self.work, self.run, self.output = work, run, output

    @cached_property
    def method(self) -> Method:
        """The model, loaded with the first part, for an error of __init__ looks like a death."""
        if read_run(self.output) != self.run:
            raise ValueError(
                f"a worker's machine does not see this run in {self.output}; give an address that all machines reach, "
                "or a folder that they share"
            )
        method = load_method(self.work)
        if method.fingerprint != self.run.fingerprint:
            raise ValueError(
                f"a worker's model has the fingerprint {method.fingerprint}, the run's has {self.run.fingerprint}: "
                "have all machines the same model files, devices and precision?"
            )
        return method

    def __call__(self, batch: Mapping[str, object]) -> dict[str, list]:
        problem = batch["problem"][0]
        rows = []
        if not problem:
            try:
                rows = self.score(unpack(batch["part"][0]))
            except TOLD as error:
                problem = one_line(error)
        return {"rows": [len(rows)], "errors": [sum(row.error is not None for row in rows)], "problem": [problem]}

    def score(self, part: Part) -> list[Prediction]:
        """Score a part and write it."""
        rows = list(self.method.score(iter(part.examples), lambda n: None, SavedRows()))
        if self.work.calibrator:
            rows = self.work.calibrator.apply(rows, self.work.threshold)
        write_part(self.output, part.name, to_table(rows, part.own, self.run.schema))
        return rows


def pack(part: Part) -> bytes:
    """A part as bytes: Arrow's stream of its examples and the user's columns."""
    import pyarrow

    columns = {f"own {name}": part.own[name] for name in part.own.column_names}
    for name in ("id", "text", "label"):
        columns[name] = pyarrow.array([getattr(example, name) for example in part.examples], pyarrow.string())
    table = pyarrow.table(columns).replace_schema_metadata({"name": part.name})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def unpack(data: bytes) -> Part:
    """The part of such bytes."""
    import pyarrow

    table = pyarrow.ipc.open_stream(data).read_all()
    columns = [table[name].to_pylist() for name in ("id", "text", "label")]
    own = [name for name in table.column_names if name.startswith("own ")]
    mine = table.select(own).rename_columns([name.removeprefix("own ") for name in own])
    return Part(table.schema.metadata[b"name"].decode(), [Example(*row) for row in zip(*columns, strict=True)], mine)
