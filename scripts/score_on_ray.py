"""Score a table with many workers, GPUs or machines by Ray: the same rows and numbers as the scripts, only sooner.

    python scripts/score_on_ray.py --input reviews/ --output scored --workers 4
    python scripts/score_on_ray.py --input 's3://bucket/tickets/*.parquet' --output s3://bucket/scored --workers 8 \
        --gpus-per-worker 1 --model llama --task tickets.toml --calibrator calibrator.json
    python scripts/score_on_ray.py --input reviews/ --output scored --workers 4 --probe probe
    python scripts/score_on_ray.py --output scored --collect predictions.jsonl               # the usual file
    python scripts/score_on_ray.py --output scored --collect sample.jsonl --sample 10000     # some rows, for reports

Without a cluster Ray starts on this machine. On one, where RAY_ADDRESS says it is, or as a job of it:

    ray job submit --working-dir . -- python scripts/score_on_ray.py --input s3://... --output s3://... --workers 64

The output is a folder: run.json, which says what was asked of which files, and rows/*.parquet: id, text, label,
prediction, confidence, label_mass, p_LABEL ..., error, with --calibrator calibrated_confidence and decision, and your
own columns. A part of it is written whole or not at all, so the same command continues a run whose driver, workers or
machines died. A row that cannot be scored carries its error. docs/scale.md tells how to run it on Kubernetes.

Ray is optional: pip install -r requirements-ray.txt
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import predictions  # noqa: E402
import ray_parts  # noqa: E402
import scoring  # noqa: E402
import tables  # noqa: E402
from command_line import natural, printable, progress  # noqa: E402
from embedded_model import sha256  # noqa: E402
from llama import add_arguments as add_model_arguments  # noqa: E402
from llama import model_arguments  # noqa: E402
from probe_files import load_probe  # noqa: E402
from ray_parts import PART_ROWS, RunRecord, begin_run, finished_parts, numbered_sources, own_names, read_run  # noqa: E402
from ray_sources import SourceFacts, absolute, check_sources, examine, list_sources, size_of  # noqa: E402
from ray_worker import PartReader, PartScorer, WorkerSettings, describe_method, run_of  # noqa: E402
from task import Task, add_task_argument, read_task  # noqa: E402

RESTARTS = 3  # of a worker that dies, and tries of its part
READERS = 2  # files read at a time; they wait for the workers
OBJECT_STORE_BYTES = 512 << 20  # of a Ray that is started here: parts on their way to the workers
INSTALL = "Ray is not installed: pip install -r requirements-ray.txt"
OF_COLLECTING = {"output", "collect", "sample", "seed"}
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set for the command of `ray job submit`


# Flags


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--input", metavar="FILE", nargs="+", default=[], help="files, folders, patterns or s3:// addresses of tables")
    add("--output", metavar="FOLDER", required=True, help="folder or s3:// address to write or continue")
    add("--overwrite", action="store_true", help="replace an output of another run")
    add("--workers", type=natural, default=1, metavar="N", help="models that are loaded (default: 1)")
    add("--gpus-per-worker", type=float, metavar="G", help="GPUs of each (default: 1 if there are any)")
    help_part = f"rows of a part, whole windows of the device (default: {PART_ROWS:,} or a window)"
    add("--part-rows", type=natural, default=PART_ROWS, metavar="N", help=help_part)
    add("--collect", metavar="FILE", help="write the predictions file (.jsonl) of a finished output")
    add_task_argument(parser)
    add("--probe", metavar="DIR", help="score by a probe of probe_confidence.py, which knows its own task")
    add("--truncate", action="store_true", help="shorten a text too long for the model, instead of failing its row")
    add("--calibrator", metavar="FILE", help="add calibrated confidence and decision")
    add("--threshold", type=float, metavar="P", help="automate from this calibrated confidence on")
    add("--batch-size", type=natural, metavar="N", help="rows run together (default: by length and device)")
    tables.add_column_arguments(parser.add_argument_group("how the tables are read"))
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what never goes together."""
    for flag, address in (("--output", args.output), ("--collect", args.collect)):
        if os.environ.get(IN_A_JOB) and address and "://" not in address and not Path(address).is_absolute():
            parser.error(
                f"{flag} {address} would be in the job's own folder, a copy that Ray deletes or one that no other "
                "machine sees; give the whole path of a folder that all share, or for --output an s3:// address"
            )
    if bool(args.input) == bool(args.collect):
        parser.error("give --input to score tables, or --collect FILE to collect a finished output")
    if args.collect:
        command_line.allow_only_arguments(parser, args, OF_COLLECTING, "--collect reads a finished output")
        if Path(args.collect).suffix != ".jsonl":
            parser.error(f"--collect {args.collect} must end in .jsonl")
        return
    if args.sample is not None or args.seed:
        parser.error("--sample and --seed go with --collect; all rows are scored")
    if args.limit is not None and len(args.input) > 1:
        parser.error("--limit is of one file; --input names several")
    for name in ("workers", "part_rows", "batch_size"):
        if getattr(args, name) == 0:
            parser.error(f"--{name.replace('_', '-')} 0: at least 1")
    if args.gpus_per_worker is not None and not 0 <= args.gpus_per_worker < 1e3:
        parser.error(f"--gpus-per-worker {args.gpus_per_worker:g}: 0 or more")
    if args.probe and args.task != parser.get_default("task"):
        parser.error("--task does not go with --probe; the probe knows its own")
    scoring.check_calibrator_arguments(parser, args)


def work_from_arguments(args: argparse.Namespace) -> WorkerSettings:
    """What the flags ask of every worker; the calibrator and the probe are read and checked."""
    calibrator, digest = None, None
    if args.calibrator:
        from calibration import load_calibrator

        calibrator, digest = load_calibrator(args.calibrator), sha256(Path(args.calibrator))[:8]
    task = Task.from_settings(load_probe(args.probe)[0].task) if args.probe else read_task(args.task)
    loading = model_arguments(args)
    return WorkerSettings(
        str(Path.cwd()), loading, task, args.probe, args.truncate, args.batch_size, calibrator, digest, args.threshold
    )


def reading_from_arguments(args: argparse.Namespace, task: Task) -> tuple[dict[str, object], dict[str, str]]:
    """How the tables are read, and which columns are the text, the label and the id."""
    columns = tables.column_arguments(args) | {"text_template": task.text_template}
    del columns["sample"], columns["seed"]
    texts = args.text_column or ["text"]
    read_as = {"label": args.label_column or "label", "id": "id" if args.id_column is None else args.id_column}
    if len(texts) == 1 and not task.text_template:
        read_as["text"] = texts[0]
    return columns, read_as


# Ray


def start_ray(workers: int) -> object:
    """Ray, connected to the cluster that RAY_ADDRESS names, else started on this machine; nothing is sent elsewhere."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong is an error here
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError(INSTALL) from None
    if address := os.environ.get("RAY_ADDRESS"):
        check_address(address)
    options: dict = {"log_to_driver": False, "logging_level": "ERROR"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
    if not address:
        cores = max(workers + 1, os.cpu_count() or 1)
        options |= {"num_cpus": cores, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = "; does it run there, and want a token (RAY_AUTH_MODE=token)?" if address else ""
        raise OSError(f"Ray does not start: {command_line.one_line(error)}{hint}") from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours is in rows
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # byte: a block is one part, so that each goes to the next free worker
    return ray


def check_address(address: str) -> None:
    """OSError where nothing answers at [SCHEME://]HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise OSError(f"no Ray answers at RAY_ADDRESS={printable(address)} ({error})") from None


def raised_there(ray: object, error: BaseException | None) -> BaseException | None:
    """What a worker raised; None where it or its machine died."""
    while isinstance(error, ray.exceptions.RayError):  # some of which are of the cause's class too
        inner = getattr(error, "cause", None) or error.__cause__
        if inner is None and isinstance(error, ray.exceptions.UserCodeException):
            return error  # Ray Data's, which has lost it
        error = inner
    return error


@contextmanager
def plain_errors(ray: object) -> Iterator[None]:
    """What a worker raised, as if it had been raised here; a worker that died too often in one line."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = raised_there(ray, error)
        if isinstance(cause, ValueError | OSError | MemoryError):
            raise cause from None
        if cause is not None and isinstance(error, ray.exceptions.RayTaskError):
            raise
        raise OSError(
            f"a worker died more than {RESTARTS} times ({command_line.one_line(error)}); what is scored is kept, "
            "repeat the command to continue"
        ) from None


def gpus_of_each(ray: object, workers: int, asked: float | None) -> float:
    """GPUs of each worker: as asked, else one if the cluster has any; ValueError where this machine has too few."""
    there = ray.cluster_resources().get("GPU", 0)
    gpus = float(there > 0) if asked is None else asked
    if gpus * workers > there and not os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            f"{workers} workers of {gpus:g} GPUs need {workers * gpus:g}, this machine has {there:g}; fewer --workers, "
            "or a share of a GPU, as --gpus-per-worker 0.5"
        )
    return gpus


def examine_all(ray: object, sources: Sequence[str], task: Task, columns: Mapping[str, object]) -> list[SourceFacts]:
    """The facts of all files, each read once by a worker; ValueErrors of the first that is wrong."""
    examined = ray.remote(num_cpus=1)(examine)
    under_way = [examined.remote(source, task, columns) for source in sources]
    facts, hashes = [], []
    with progress(len(sources), 0, "files checked") as advance:
        for source in under_way:
            found, ids = ray.get(source)
            facts.append(found)
            hashes.append(ids)
            advance(1)
    check_sources(facts, hashes)
    return facts


def still_true(before: RunRecord | None, sources: Sequence[str], columns: Mapping[str, object]) -> bool:
    """Whether a run was begun on these very files, so that they need not be checked again."""
    if before is None or before.columns != columns:
        return False
    return [(s.source, s.bytes) for s in before.sources] == [(source, size_of(source)) for source in sources]


def scored_batches(
    ray: object, work: WorkerSettings, run: RunRecord, output: str, workers: int, gpus: float
) -> Iterator[Mapping[str, np.ndarray]]:
    """Score what is not there yet; yields of each part its rows, those with an error, and what a worker found wrong."""
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    finished = finished_parts(output)
    unfinished = [source for source in run.sources if not finished.issuperset(source.part_names(run.part_rows))]
    starts = [{"number": source.number} for source in unfinished]
    readers = TaskPoolStrategy(size=min(READERS, len(starts)))
    parts = ray.data.from_items(starts, override_num_blocks=len(starts)).map_batches(
        PartReader(run, output), batch_size=1, num_cpus=0, compute=readers
    )
    left = len(run.part_names().keys() - finished)
    scored = parts.map_batches(
        PartScorer,
        fn_constructor_args=(work, run, output),
        batch_size=1,
        num_cpus=1,
        num_gpus=gpus,
        compute=ActorPoolStrategy(size=min(workers, left)),  # no model without a part
        ray_remote_args_fn=lambda: {"max_restarts": RESTARTS, "max_task_retries": RESTARTS},
    )
    yield from scored.iter_batches(batch_size=None, prefetch_batches=0)


def score_parts(ray: object, work: WorkerSettings, run: RunRecord, output: str, workers: int, gpus: float) -> None:
    """Score what is not there yet, with progress in rows; begun again where a machine is lost with its workers."""
    warnings.filterwarnings("ignore", message=".*ray_remote_args_fn", category=DeprecationWarning)  # until Ray 2.64
    done = shown = run.rows_in(finished_parts(output))
    if done == run.total:
        print(f"all {run.total:,} rows of {output} are scored", file=sys.stderr)
        return
    started, errors, lost = time.monotonic(), 0, 0
    with progress(run.total, done) as advance:
        while shown < run.total:
            try:
                for batch in scored_batches(ray, work, run, output, workers, gpus):
                    if problem := next(filter(None, batch["problem"]), None):
                        raise ValueError(f"{problem}; what is scored is kept")
                    rows, errors = int(batch["rows"].sum()), errors + int(batch["errors"].sum())
                    shown += rows
                    advance(rows)
                break
            except ray.exceptions.RayError as error:
                lost += 1
                if lost > RESTARTS or raised_there(ray, error):
                    raise
                print(f"a worker is lost, its parts are scored anew ({command_line.one_line(error)})", file=sys.stderr)
                written = run.rows_in(finished_parts(output))
                advance(written - shown)
                shown = written
    seconds, count = time.monotonic() - started, shown - done
    failed = f"{errors:,}{' or more' if lost else ''} with an error"  # some of a lost worker are not told of
    print(f"scored {count:,} rows in {seconds:.1f} s, {count / seconds:.1f} a second; {failed}")


def print_collected(output: str, path: str, sample: int | None, seed: int) -> None:
    """Collect a finished output into a predictions file, and report on it."""
    predictions.check_output(path)
    print(f"{printable(path)}: {ray_parts.collect(output, path, sample, seed):,} rows")
    print(scoring.report(path))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.collect:
        print_collected(args.output, args.collect, args.sample, args.seed)
        return
    work = work_from_arguments(args)
    columns, read_as = reading_from_arguments(args, work.task)
    output = absolute(args.output)
    names, before = list_sources(args.input), read_run(output)
    ray = start_ray(args.workers)
    try:
        with plain_errors(ray):
            gpus = gpus_of_each(ray, args.workers, args.gpus_per_worker)
            if not gpus and work.loading["device"] == "auto":
                work = replace(work, loading={**work.loading, "device": "cpu"})
            # A process of its own, which ends and gives its memory back to the workers.
            described = ray.get(ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1)(describe_method).remote(work))
            print(described.notes, end="", file=sys.stderr)
            if still_true(before, names, columns):
                sources, own = before.sources, before.own
            else:
                facts = examine_all(ray, names, work.task, columns)
                sources = numbered_sources(facts)
                own = own_names(facts[0].columns, read_as, list(work.task.labels), bool(work.calibrator))
            run = run_of(described, work, sources, own, columns, args.part_rows)
            begin_run(output, run, before, args.overwrite)
            score_parts(ray, work, run, output, args.workers, gpus)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    command_line.run(main, resumes=True)
