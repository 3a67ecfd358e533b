"""The study on public data: seven sets, five ways to classify their rows, and what could be automated of them.

    python scripts/public_study.py --recorded                      # the tables of docs/, from the recordings, no model
    python scripts/public_study.py --recorded --write              # put them into docs/, and images/public_study.png
    python scripts/public_study.py --data FOLDER --work ../work     # run what is not recorded yet: hours of one core
    python scripts/public_study.py trec airline --method probe --data FOLDER --work ../work
    python scripts/public_study.py sms --source sms=hf:NAME:SPLIT,text_column,label_column --work ../work

--data is the folder of the files as they are downloaded (SETS below names them); --source takes a set from another
table, or from the Hub. The texts stay there and in --work; data/predictions/public/ gets recordings without texts. What
is recorded is skipped and what was stopped goes on, so the same command may be repeated at any time.

Whole groups of near-duplicates are drawn at random, 500 unseen rows first, then the labelled ones; each method learns
from the first 100, 300 or 1,000 of these (banking77: 1,500 and 5,000) and is judged on the unseen rows:

    bag of words              baselines.py; the labelled rows out-of-fold
    first token, as drafted   logprobs_confidence.py with data/public_tasks/SET.toml, written as a newcomer would
    first token, improved     scripts/improve_task.py on the first 300; the third that chose nothing calibrates
    probe                     probe_confidence.py's features and fit, in the draft's prompt without examples
    LoRA                      fine_tune_model.py on 200 of the first 300; the other 100 choose its step and calibrate
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import calibration_metrics as metrics  # noqa: E402
import command_line  # noqa: E402
import predictions  # noqa: E402
import study_tables  # noqa: E402
import tables  # noqa: E402
from files import whole_file, write_text  # noqa: E402
from near_duplicates import duplicate_groups  # noqa: E402
from study_tables import BAG_OF_WORDS, DRAFT, IMPROVED, LORA, OURS, PROBE, MeasuredRun, Study, StudyRows, StudyRun  # noqa: E402
from tables import Example, text_key  # noqa: E402
from task import Task, read_task  # noqa: E402

RECORDINGS, TASKS = ROOT / "data" / "predictions" / "public", ROOT / "data" / "public_tasks"
UNSEEN, CHOOSING = 500, 300  # rows to judge by; labelled rows of a search or a training
SEED = 0
OF_OURS = (BAG_OF_WORDS, PROBE)  # a fine-tuned model of these rows is recorded elsewhere
RUN = {"bag-of-words": BAG_OF_WORDS, "probe": PROBE, "draft": DRAFT, "improved": IMPROVED, "lora": LORA}


@dataclass(frozen=True)
class DataSet:
    """Where a set's rows are, how they are read, and with how many labels it is tried."""

    title: str
    files: tuple[str, ...]
    columns: Mapping[str, object] = field(default_factory=dict)  # of tables.read_examples
    sizes: tuple[int, ...] = (100, 300, 1000)
    draft_rows: int = 300  # labelled rows that the draft is asked about
    label_first: bool = False  # each line is a label, perhaps with a subclass, and the text
    cut: int | None = None  # characters of a text that are used
    task: str | None = None  # a built-in one (default: the draft in data/public_tasks/)
    groups: str | None = None  # a table of id and group; the last file is the unseen rows then


SETS = {
    "sst2": DataSet(
        title="SST-2, dev part",
        files=("sst2_dev.tsv",),
        columns={
            "header": False,
            "text_column": "1",
            "label_column": "2",
            "label_map": {"0": "negative", "1": "positive"},
        },
        sizes=(100, 300),
    ),
    "sms": DataSet(
        title="SMS spam",
        files=("spam.csv",),
        columns={"header": False, "text_column": "2", "label_column": "1", "skip_bad_rows": True},
    ),
    "airline": DataSet(
        title="airline tweets",
        files=("airline.csv",),
        columns={"label_column": "airline_sentiment", "id_column": ""},
    ),
    "trec": DataSet(
        title="TREC questions",
        files=("trec_train.txt",),
        columns={"encoding": "latin-1"},
        label_first=True,
        draft_rows=1000,
    ),
    "agnews": DataSet(
        title="AG News, test part",
        files=("agnews_test.csv",),
        columns={
            "header": False,
            "text_column": ["2", "3"],
            "label_column": "1",
            "label_map": {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"},
        },
    ),
    "tickets": DataSet(
        title="complaints in Portuguese",
        files=("tickets_pt.csv",),
        columns={"text_column": "descricao_reclamacao", "label_column": "categoria", "id_column": ""},
        sizes=(100, 300),
        cut=400,
    ),
    "banking77": DataSet(
        title="banking77",
        files=("banking77_train.csv", "banking77_test.csv"),
        columns={"label_column": "category"},
        sizes=(1500, 5000),
    ),
    OURS: DataSet(
        title="this repository's sentences",
        files=("data:train", "data:test"),
        sizes=(200, 1000, 6000),
        task="sentiment",
        groups=str(ROOT / "data" / "sentiment" / "splits.csv"),
    ),
}


# Rows


def read_set(chosen: DataSet, folder: Path | None, source: str | None) -> tuple[str, list[Example]]:
    """(what was read, all rows with a text and a label); ValueError where there is no table.

    Ids are row numbers, through all files, but where a table of groups knows the rows by their own.
    """
    if source is not None:
        table, *named = source.split(",")
        found = [(table, dict(zip(("text_column", "label_column"), named, strict=False)) | {"id_column": ""})]
    elif folder is not None or chosen.groups:
        places = [name if name.startswith("data:") else str(folder / name) for name in chosen.files]
        if missing := [place for place in places if not place.startswith("data:") and not Path(place).is_file()]:
            raise ValueError(f"no such file: {missing[0]}, of {chosen.title}; --source takes a set from another table")
        found = [(place, dict(chosen.columns)) for place in places]
    else:
        raise ValueError(f"{chosen.title}: --data FOLDER with {' and '.join(chosen.files)}, or --source")
    examples = [example for table, columns in found for example in tables.read_examples(table, **columns)]
    if chosen.label_first and source is None:
        examples = [with_label_first(example) for example in examples]
    if chosen.cut:
        examples = [Example(e.id, e.text[: chosen.cut], e.label) for e in examples]
    if not chosen.groups:
        examples = [Example(str(number), e.text, e.label) for number, e in enumerate(examples, 1)]
    return " + ".join(Path(table).name for table, _ in found), [e for e in examples if e.text.strip() and e.label]


def with_label_first(example: Example) -> Example:
    """A line "LABEL:subclass text" as text and label."""
    label, _, text = example.text.partition(" ")
    return Example(example.id, text, label.partition(":")[0])


def draw_rows(examples: Sequence[Example], labelled: int, seed: int = SEED) -> tuple[list[Example], list[int]]:
    """(labelled rows, then UNSEEN ones; the group of each): whole groups of near-duplicates in random order.

    Where the last group of a part has too many rows, the others are left out. ValueError for too few rows.
    """
    members: dict[int, list[int]] = {}
    for number, group in enumerate(duplicate_groups([example.text for example in examples])):
        members.setdefault(group, []).append(number)
    groups = np.random.default_rng(seed).permutation(list(members)).tolist()
    parts = []
    for wanted in (UNSEEN, labelled):
        part: list[tuple[int, int]] = []
        while groups and len(part) < wanted:
            group = groups.pop()
            part += [(number, group) for number in members[group]]
        if len(part) < wanted:
            raise ValueError(f"{len(examples):,} rows are too few for {labelled:,} labelled and {UNSEEN} unseen ones")
        parts.append(part[:wanted])
    drawn = [*parts[1], *parts[0]]
    return [examples[number] for number, _ in drawn], [group for _, group in drawn]


def in_their_split(
    examples: Sequence[Example], labelled: int, groups: str, seed: int = SEED
) -> tuple[list[Example], list[object]]:
    """The first `labelled` rows in random order, then the others: the parts of a table that is split already."""
    order = [*np.random.default_rng(seed).permutation(labelled).tolist(), *range(labelled, len(examples))]
    drawn = [examples[number] for number in order]
    return drawn, list(metrics.group_numbers(tables.groups_of(drawn, groups)))


def rows_of(examples: Sequence[Example], groups: Sequence[int], labels: Sequence[str], labelled: int) -> StudyRows:
    """What a recording says of the rows."""
    number = {label: n for n, label in enumerate(labels)}
    return StudyRows(
        labels=tuple(labels),
        ids=tuple(example.id for example in examples),
        text_keys=tuple(text_key(example.text) for example in examples),
        truth=np.array([number[example.label] for example in examples]),
        groups=np.array(groups),
        labelled=labelled,
    )


def task_of(name: str) -> str:
    """The task that a set is asked with: a file, or the name of a built-in one."""
    return SETS[name].task or str(TASKS / f"{name}.toml")


# A place to work in


@dataclass(frozen=True)
class Work:
    """One data set that is being run: its drawn rows with their texts, its draft, and a folder for what is made."""

    name: str
    task: Task
    examples: Sequence[Example]
    rows: StudyRows
    folder: Path

    @property
    def task_file(self) -> str:
        return task_of(self.name)

    def table(self, name: str, numbers: np.ndarray) -> Path:
        """A table of some of the rows."""
        path = self.folder / f"{name}.csv"
        with whole_file(path) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text", "label"])
            writer.writerows((e.id, e.text, e.label) for e in (self.examples[n] for n in numbers.tolist()))
        return path

    def run(self, stage: str, *arguments: object) -> None:
        """Run one of the project's commands as a user would, and add its processor seconds to the stage's."""
        command = [sys.executable, *map(str, arguments)]
        print(f"\n{self.name}: python {' '.join(map(str, arguments))}", file=sys.stderr, flush=True)
        before = seconds_of_commands()
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        finally:  # also when stopped, as what is done by then is not done again
            self.add_seconds(stage, seconds_of_commands() - before)
        if done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode:
            raise ValueError(f"{self.name}: the command above ended with exit code {done.returncode}")

    def add_seconds(self, stage: str, seconds: float) -> None:
        with open(self.folder / "seconds.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "seconds": seconds}) + "\n")

    def seconds(self, *stages: str) -> float:
        """Processor seconds of some stages so far."""
        path = self.folder / "seconds.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return sum(line["seconds"] for line in map(json.loads, lines) if line["stage"] in stages)

    def chosen_thirds(self) -> tuple[np.ndarray, np.ndarray]:
        """(row numbers that choose or are learned from, the third that does not), of the first CHOOSING labelled rows.

        The parts that scripts/improve_task.py makes of the same table.
        """
        from task_search import split_rows

        parts = split_rows(self.examples[:CHOOSING], self.task)
        number = {example.id: n for n, example in enumerate(self.examples)}
        held_out = np.sort([number[example.id] for example in parts["held out"].examples])
        return np.setdiff1d(np.arange(CHOOSING), held_out), held_out


def seconds_of_commands() -> float:
    """Processor seconds of all commands that were run so far."""
    used = os.times()
    return used.children_user + used.children_system


# The methods: each makes the runs of its sizes, one after the other


def run_bag_of_words(work: Work, sizes: Sequence[int]) -> Iterator[StudyRun]:
    """A bag of words of each size."""
    from baselines import LENGTH, bag_of_words, one_against_rest
    from probe import weighted_counts, word_counts, word_weights

    rows, texts = work.rows, [example.text[:LENGTH] for example in work.examples]
    for n in sizes:
        started = time.process_time()
        known = bag_of_words(texts[:n], rows.truth[:n], len(rows.labels), rows.groups[:n], SEED)
        counts = word_counts(texts)
        weights = word_weights(counts[:n])
        learned, unseen = (weighted_counts(counts[some], *weights) for some in (np.arange(n), rows.unseen))
        seen, found = one_against_rest(learned, rows.truth[:n], unseen)
        told = np.zeros((len(rows.unseen), len(rows.labels)))
        told[:, seen] = found
        seconds = time.process_time() - started
        yield StudyRun(BAG_OF_WORDS, n, np.arange(n), np.vstack([known, told]), None, seconds)


def run_probe(work: Work, sizes: Sequence[int]) -> Iterator[StudyRun]:
    """A probe of each size, on hidden states that are read once."""
    from dataclasses import replace

    import scoring
    from hidden_features import feature_reader, written_features
    from llama import load_llama
    from probe import FIRST_TOKEN, WORDS, fit_probe, word_counts
    from probe_training import hash_of

    task, rows, most = replace(work.task, examples=()), work.rows, max(sizes)
    examples = [*work.examples[:most], *work.examples[rows.labelled :]]
    texts, labels = [e.text for e in examples], [e.label for e in examples]
    llama = load_llama("default", adapter="none", task=task.settings())
    reader = feature_reader(llama, task)
    encoded, errors = scoring.encode_all(examples, reader.encode)
    if errors:
        raise ValueError(f"{work.name}: {len(errors):,} rows cannot be read, as {next(iter(errors.values()))}")
    key = predictions.fingerprint(**llama.identity, task=task.settings(), layers=reader.layers, texts=hash_of(texts))
    started = time.process_time()
    with command_line.progress(len(texts), 0) as advance:
        features = written_features(reader, list(encoded.values()), work.folder / f"features_{most}.f32", key, advance)
    stage = f"features {most}"
    work.add_seconds(stage, time.process_time() - started)
    first_token = features.pop(FIRST_TOKEN, None)
    unseen = {name: states[most:] for name, states in features.items()} | {WORDS: word_counts(texts[most:])}
    unseen |= {} if first_token is None else {FIRST_TOKEN: first_token[most:]}
    for n in sizes:
        started = time.process_time()
        fitted = fit_probe(
            {name: np.asarray(states[:n]) for name, states in features.items()},
            labels[:n],
            rows.groups[:n].tolist(),
            labels=list(rows.labels),
            first_token=None if first_token is None else np.asarray(first_token[:n]),
            texts=texts[:n],
            seed=SEED,
        )
        told = fitted.probe.probabilities(unseen)
        reading = work.seconds(stage) * (n + len(rows.unseen)) / len(texts)
        about = {"chosen": fitted.chosen.name, "out_of_fold_log_loss": fitted.chosen.log_loss, **llama.identity}
        seconds = reading + time.process_time() - started
        yield StudyRun(PROBE, n, np.arange(n), np.vstack([fitted.out_of_fold, told]), None, seconds, about)


def run_draft(work: Work, sizes: Sequence[int]) -> Iterator[StudyRun]:
    """The first token by the draft."""
    (n,) = sizes
    yield scored_run(work, DRAFT, n, np.arange(n), work.task_file, "none", "draft")


def run_improved(work: Work, sizes: Sequence[int], minutes: float) -> Iterator[StudyRun]:
    """The first token by the task that a search makes of the draft."""
    (n,) = sizes
    better, chosen_by = work.folder / "better.toml", work.table("labelled", np.arange(n))
    search = ("scripts/improve_task.py", "--task", work.task_file, "--input", chosen_by, "--output", better)
    work.run("search", *search, "--minutes", minutes, "--trials", 200)
    _, held_out = work.chosen_thirds()
    comments = [line for line in better.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    about = {"winner": comments[0][2:] if comments else "the draft", "minutes": minutes}
    yield scored_run(work, IMPROVED, n, held_out, better, "none", "better", "search", about=about)


def run_lora(work: Work, sizes: Sequence[int]) -> Iterator[StudyRun]:
    """The first token after fine-tuning with the draft's prompt."""
    (n,) = sizes
    learned, watched = work.chosen_thirds()
    adapter, training = work.folder / "adapter", work.table("training", learned)
    validation = work.table("validation", watched)
    more = ["--resume"] if adapter.exists() else []
    command = ("fine_tune_model.py", "--task", work.task_file, "--train", training, "--validation", validation)
    work.run("training", *command, "--epochs", 3, "--validate-every", 5, "--output-dir", adapter, *more)
    yield scored_run(work, LORA, n, watched, work.task_file, adapter, "tuned", "training", about={"epochs": 3})


def scored_run(
    work: Work,
    method: str,
    n: int,
    calibrate_on: np.ndarray,
    task_file: Path,
    adapter: object,
    name: str,
    *stages: str,
    about: Mapping | None = None,
) -> StudyRun:
    """The run of what Method 1 says, by a task and an adapter, of the rows to calibrate on and of the unseen ones."""
    path = work.folder / f"{name}.jsonl"
    table = work.table(f"{name}_rows", np.concatenate([calibrate_on, work.rows.unseen]))
    command = ("logprobs_confidence.py", "--task", task_file, "--adapter", adapter, "--input", table, "--output", path)
    work.run(name, *command)
    told = predictions.read(path)
    if failed := next((row for row in told if row.error is not None), None):
        raise ValueError(f"{path}: row {failed.id!r}: {failed.error}")
    probabilities = np.array([[row.probabilities[label] for label in work.rows.labels] for row in told])
    mass, seconds = np.array([row.label_mass for row in told]), work.seconds(name, *stages)
    about = {"fingerprint": told[0].fingerprint, "model": told[0].model, **(about or {})}
    return StudyRun(method, n, calibrate_on, probabilities, mass, seconds, about)


# The study


@dataclass(frozen=True)
class Wanted:
    """What is to be run: methods, with which numbers of labels (None: all), and how long a search may take."""

    methods: Sequence[str]
    labels: Sequence[int] | None
    minutes: float

    def sizes(self, chosen: DataSet, method: str) -> list[int]:
        """With how many labels a method is to be run on a set; one run of the draft serves all."""
        if method == DRAFT:
            return [chosen.draft_rows]
        sizes = (CHOOSING,) if method in (IMPROVED, LORA) else chosen.sizes
        return [n for n in sizes if self.labels is None or n in self.labels]


def run_set(name: str, work_folder: Path, data: Path | None, source: str | None, wanted: Wanted) -> None:
    """Run what is not recorded yet of a data set, and record each run when it is finished."""
    chosen, path = SETS[name], RECORDINGS / f"{name}.jsonl.gz"
    study = study_tables.read_study(path) if path.exists() else None
    missing = {}
    for method in wanted.methods:
        if name == OURS and method not in OF_OURS:
            continue
        missing[method] = [n for n in wanted.sizes(chosen, method) if not (study and study.has(method, n))]
    if not any(missing.values()):
        print(f"{name}: all recorded", file=sys.stderr)
        return
    work, read = prepare(name, work_folder, data, source)
    if study is None:
        study = Study(name, chosen.title, read, chosen.sizes, work.rows, ())
    if study.rows.text_keys != work.rows.text_keys:
        raise ValueError(f"{path} was recorded on other rows than these; move it away to record anew")
    for method, sizes in missing.items():
        if not sizes:
            continue
        for run in runs_of(method, work, sizes, wanted.minutes):
            study = study.with_run(run)
            path.parent.mkdir(parents=True, exist_ok=True)
            study_tables.write_study(path, study)
            print(f"{name}: {method}, {run.n:,} labels, recorded", file=sys.stderr, flush=True)


def runs_of(method: str, work: Work, sizes: Sequence[int], minutes: float) -> Iterator[StudyRun]:
    """The runs of a method, one after the other."""
    if method == IMPROVED:
        return run_improved(work, sizes, minutes)
    makers = {BAG_OF_WORDS: run_bag_of_words, PROBE: run_probe, DRAFT: run_draft, LORA: run_lora}
    return makers[method](work, sizes)


def prepare(name: str, work_folder: Path, data: Path | None, source: str | None) -> tuple[Work, str]:
    """Draw a set's rows: (the place to work in, what was read); ValueError where the draft does not know a label."""
    chosen, task = SETS[name], read_task(task_of(name))
    read, examples = read_set(chosen, data, source)
    labelled = max(chosen.sizes)
    if chosen.groups:
        drawn, groups = in_their_split(examples, labelled, chosen.groups)
    else:
        drawn, groups = draw_rows(examples, labelled)
    drawn = [Example(*task.identify(example)) for example in drawn]
    if unknown := {example.label for example in drawn} - set(task.labels):
        raise ValueError(f"{name}: {task_of(name)} has no label {sorted(map(str, unknown))[0]!r}")
    folder = work_folder / name
    folder.mkdir(parents=True, exist_ok=True)
    return Work(name, task, drawn, rows_of(drawn, groups, list(task.labels), labelled), folder), read


# Tables


def all_tables(studies: Sequence[tuple[Study, Sequence[MeasuredRun]]]) -> dict[str, str]:
    """Name of a block in docs/ -> what stands in it."""
    by_set = {
        f"study {study.name}": f"**{study.title}** ({study_tables.rows_line(study)})\n\n"
        f"{study_tables.study_table(study, found)}"
        for study, found in studies
    }
    public = study_tables.public_ones(studies)
    return by_set | {
        "study first page": study_tables.first_page_table(public),
        "study probe": study_tables.probe_table(public),
        "study improving": study_tables.improving_table(public),
        "study guarantees": study_tables.guarantees_table(public),
    }


def with_blocks(page: str, blocks: Mapping[str, str]) -> str:
    """A page with each block that it has room for: what stands between <!-- NAME --> and <!-- end -->."""
    for name, content in blocks.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = page.partition(start)
        if found:
            _, _, after = rest.partition(end)
            page = f"{before}{start}\n{content}\n\n{end}{after}"
    return page


def write_pages(studies: Sequence[tuple[Study, Sequence[MeasuredRun]]]) -> None:
    """Bring the tables of README.md and docs/, and the figure, up to what is recorded."""
    blocks = all_tables(studies)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        page = path.read_text(encoding="utf-8")
        if (after := with_blocks(page, blocks)) != page:
            write_text(path, after)
            print(f"{path.relative_to(ROOT)}: tables written")
    study_tables.draw_coverage(ROOT / "images" / "public_study.png", studies)
    print("images/public_study.png: drawn")


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("sets", metavar="SET", nargs="*", help=f"of {', '.join(SETS)} (default: all)")
    add("--recorded", action="store_true", help="print the tables of what is recorded; no model, no data")
    add("--write", action="store_true", help="with --recorded: put the tables into the pages and draw the figure")
    add("--data", metavar="FOLDER", help="the folder with the files of the data sets")
    add("--source", metavar="SET=TABLE", action="append", default=[], help="a set from a table, hf:NAME:SPLIT too")
    add("--work", metavar="FOLDER", help="where texts, features and adapters are kept meanwhile, outside the project")
    add("--method", choices=RUN, action="append", help="run only this (repeatable; default: all)")
    add("--labels", type=command_line.natural, metavar="N", action="append", help="run only so many (repeatable)")
    add("--minutes", type=float, default=4.0, metavar="M", help="of a search for a better prompt (default: 4)")
    args = parser.parse_args(argv)
    for name in [*args.sets, *(pair.partition("=")[0] for pair in args.source)]:
        if name not in SETS:
            parser.error(f"no set {name!r}; there are {', '.join(SETS)}")
    if args.recorded == bool(args.work) or (args.write and not args.recorded):
        parser.error("either --recorded (perhaps with --write), or --work FOLDER with --data or --source to run")
    if args.work and Path(args.work).resolve().is_relative_to(ROOT):
        parser.error("--work holds the texts of the data sets; name a folder outside the project")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    names = args.sets or list(SETS)
    if args.recorded:
        studies = study_tables.measured_studies(RECORDINGS, names)
        for name, content in all_tables(studies).items():
            print(f"\n{name}\n\n{content}")
        if args.write:
            write_pages(studies)
        return
    data, work_folder = Path(args.data) if args.data else None, Path(args.work).resolve()
    sources = dict(pair.split("=", 1) for pair in args.source)
    wanted = Wanted([RUN[method] for method in args.method or RUN], args.labels, args.minutes)
    for name in names:
        run_set(name, work_folder, data, sources.get(name), wanted)


if __name__ == "__main__":
    command_line.run(main, resumes=True)
