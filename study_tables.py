"""What the study on public data found: recordings without texts, and every number and table that follows from them.

    study = read_study("airline", path)                   # rows and runs of one data set
    found = measure_study(study)                          # each run at each number of labels, calibrated and guaranteed
    print(study_table(study, found))

A recording is gzipped JSON Lines, made by scripts/public_study.py: a head, the rows (id in the source, hash of the
text, label, near-duplicate group), then a run a line. Of a run it keeps P(label) of the labelled rows that may
calibrate and of the unseen rows, as -250 ln P in whole numbers: of the TOP most probable labels and the true one, the
rest of the probability in equal parts on the others. Every number here is of what is recorded.

Confidences are calibrated on the labelled rows and thresholds chosen on them, as `calibration_demo.py --calibrate-on`
does it; everything that is printed is measured on the unseen rows, which share no near-duplicate with the others.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import calibration_metrics as metrics
import decisions
import plotting
from files import whole_file

if TYPE_CHECKING:
    from calibration import Scores

FORMAT = "public study 1"
TOP = 6  # labels of a row whose probabilities are kept
NATS = 250  # whole numbers a nat: P to one part in 500
OURS = "ours"  # the dataset of this repository, which stands beside the public ones
TARGETS, DELTA = (0.8, 0.9, 0.95), 0.05
SHOWN_TARGET = 0.9  # of the figure
COMMONEST, BAG_OF_WORDS, DRAFT, IMPROVED, PROBE, LORA = METHODS = (
    "commonest label",
    "bag of words",
    "first token, as drafted",
    "first token, improved",
    "probe",
    "LoRA",
)


# Recordings


@dataclass(frozen=True)
class StudyRows:
    """The rows of a data set without their texts, in random order: the labelled ones, then the unseen."""

    labels: tuple[str, ...]
    ids: tuple[str, ...]  # of the row in the source
    text_keys: tuple[str, ...]  # tables.text_key of the text
    truth: np.ndarray  # number of the label [n]
    groups: np.ndarray  # of near-duplicates [n]
    labelled: int

    @property
    def unseen(self) -> np.ndarray:
        """The numbers of the unseen rows."""
        return np.arange(self.labelled, len(self.truth))


@dataclass(frozen=True)
class StudyRun:
    """What a method made of a data set's first `n` labelled rows, and said of rows that it had not learned from.

    `calibrate_on` are the labelled rows with such probabilities; `probabilities` [calibrate_on + unseen, labels] are
    theirs and the unseen rows'. `seconds` are of one processor core, all work included.
    """

    method: str
    n: int
    calibrate_on: np.ndarray
    probabilities: np.ndarray
    label_mass: np.ndarray | None
    seconds: float
    about: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """The recording of one data set."""

    name: str
    title: str
    source: str
    sizes: tuple[int, ...]  # numbers of labels
    rows: StudyRows
    runs: tuple[StudyRun, ...]

    def has(self, method: str, n: int) -> bool:
        return any(run.method == method and run.n == n for run in self.runs)

    def with_run(self, run: StudyRun) -> Study:
        """The study with one run more, or another in the place of the one of its method and size."""
        others = [r for r in self.runs if (r.method, r.n) != (run.method, run.n)]
        return replace(self, runs=tuple(sorted([*others, run], key=lambda r: (METHODS.index(r.method), r.n))))


def write_study(path: str | Path, study: Study) -> None:
    """Write a recording, whole or not at all; of equal studies equal bytes."""
    rows = study.rows
    head = {"format": FORMAT, "set": study.name, "title": study.title, "source": study.source}
    head |= {"sizes": study.sizes, "labelled": rows.labelled, "labels": rows.labels}
    columns = {"id": rows.ids, "text": rows.text_keys, "label": rows.truth.tolist(), "group": rows.groups.tolist()}
    lines = [head, columns, *(run_record(run, rows) for run in study.runs)]
    content = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    with whole_file(path) as scratch:
        scratch.write_bytes(gzip.compress(content.encode(), mtime=0))


def run_record(run: StudyRun, rows: StudyRows) -> dict:
    """A run as a line of a recording."""
    truth = np.concatenate([rows.truth[run.calibrate_on], rows.truth[rows.unseen]])
    record = {"method": run.method, "n": run.n, "seconds": round(run.seconds, 1), "about": dict(run.about)}
    record["calibrate_on"] = run.calibrate_on.tolist()
    record["label_mass"] = None if run.label_mass is None else np.round(1000 * run.label_mass).astype(int).tolist()
    return record | {"nats": [packed(p, t) for p, t in zip(run.probabilities, truth.tolist(), strict=True)]}


def packed(probabilities: np.ndarray, truth: int) -> list[int]:
    """-NATS ln P of all labels of a row; of more than TOP labels those that are kept, each after its number."""
    nats = np.round(-NATS * np.log(np.maximum(probabilities, metrics.EPSILON))).astype(int)
    if len(nats) <= TOP:
        return nats.tolist()
    kept = np.argsort(-probabilities, kind="stable")[:TOP].tolist()
    kept += [] if truth in kept else [truth]
    return [number for label in kept for number in (label, int(nats[label]))]


def unpacked(numbers: Sequence[int], n_labels: int) -> np.ndarray:
    """P(label) [labels] of a row as `packed` has left it; sums to 1."""
    if n_labels <= TOP:
        probabilities = np.exp(-np.array(numbers) / NATS)
    else:
        kept, nats = np.array(numbers).reshape(-1, 2).T
        known = np.exp(-nats / NATS)
        probabilities = np.full(n_labels, max(0.0, 1 - known.sum()) / (n_labels - len(kept)))
        probabilities[kept] = known
    return probabilities / probabilities.sum()


def read_study(path: str | Path) -> Study:
    """Read a recording; ValueError for any other file."""
    try:
        lines = [json.loads(line) for line in gzip.decompress(Path(path).read_bytes()).decode().splitlines()]
        head, columns, *runs = lines
        if head["format"] != FORMAT:
            raise ValueError(f"its format is {head['format']!r}")
        labels = tuple(head["labels"])
        rows = StudyRows(
            labels=labels,
            ids=tuple(columns["id"]),
            text_keys=tuple(columns["text"]),
            truth=np.array(columns["label"], dtype=int),
            groups=np.array(columns["group"], dtype=int),
            labelled=head["labelled"],
        )
        found = [run_from_record(record, len(labels)) for record in runs]
        return Study(head["set"], head["title"], head["source"], tuple(head["sizes"]), rows, tuple(found))
    except (EOFError, gzip.BadGzipFile, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a recording of the study: {error}") from None


def run_from_record(record: Mapping, n_labels: int) -> StudyRun:
    mass = record["label_mass"]
    return StudyRun(
        method=record["method"],
        n=record["n"],
        calibrate_on=np.array(record["calibrate_on"], dtype=int),
        probabilities=np.array([unpacked(numbers, n_labels) for numbers in record["nats"]]),
        label_mass=None if mass is None else np.array(mass) / 1000,
        seconds=record["seconds"],
        about=record["about"],
    )


# Measuring


@dataclass(frozen=True)
class Guarantee:
    """What the labelled rows guarantee at a target, and what became of it on the unseen rows.

    `threshold` is None where nothing is guaranteed. A guarantee is kept where the automated unseen rows are right as
    often as the target says; it is refuted where even the upper end of the exact interval is below the target.
    """

    target: float
    threshold: float | None
    automated: int = 0
    share: float = 0.0
    right: float | None = None
    highest: float | None = None

    @property
    def is_made(self) -> bool:
        return self.threshold is not None

    @property
    def is_broken(self) -> bool:
        return self.right is not None and self.right < self.target

    @property
    def is_refuted(self) -> bool:
        return self.highest is not None and self.highest < self.target


@dataclass(frozen=True)
class MeasuredRun:
    """A method with so many labels on the unseen rows."""

    method: str
    labels: int
    calibration_rows: int
    unseen: int
    accuracy: metrics.Estimate
    log_loss: float  # of the true label, nothing calibrated
    minus_draft: metrics.Estimate | None  # log loss, paired
    label_mass: float | None = None
    calibrator: str = ""
    ece: float | None = None  # of the calibrated confidence
    expected_ece: float | None = None  # of a calibrated model
    guarantees: tuple[Guarantee, ...] = ()
    seconds: float = 0.0

    def at(self, target: float) -> Guarantee:
        return next(guarantee for guarantee in self.guarantees if guarantee.target == target)


def measure_study(study: Study) -> list[MeasuredRun]:
    """Every method at every number of labels that was run, the commonest label first."""
    draft = next((run for run in study.runs if run.method == DRAFT), None)
    sizes = sorted({*study.sizes, *(run.n for run in study.runs)})
    found = [measure_commonest(study.rows, n, draft) for n in sizes]
    for run in study.runs:
        for n in sizes if run.method == DRAFT else [run.n]:
            if n <= run.n:
                found.append(measure_run(study.rows, run, n, draft))
    return sorted(found, key=lambda one: (METHODS.index(one.method), one.labels))


def measured_studies(folder: Path, names: Iterable[str]) -> list[tuple[Study, list[MeasuredRun]]]:
    """What is recorded of these sets in a folder, with the numbers; ValueError where nothing is."""
    found = []
    for path in (folder / f"{name}.jsonl.gz" for name in names):
        if path.exists():
            print(f"measuring {path.name}", file=sys.stderr)
            study = read_study(path)
            found.append((study, measure_study(study)))
    if not found:
        raise ValueError(f"nothing is recorded in {folder}")
    return found


def public_ones(studies: Sequence[tuple[Study, Sequence[MeasuredRun]]]) -> list[tuple[Study, Sequence[MeasuredRun]]]:
    """Without the dataset of this repository."""
    return [(study, found) for study, found in studies if study.name != OURS]


def measure_run(rows: StudyRows, run: StudyRun, n: int, draft: StudyRun | None) -> MeasuredRun:
    """A run on the unseen rows, calibrated on those of its rows that are among the first n labelled ones."""
    unseen, m = rows.unseen, len(run.calibrate_on)
    told = run.probabilities[m:]
    losses, correct = metrics.label_losses(told, rows.truth[unseen]), told.argmax(axis=1) == rows.truth[unseen]
    fit = np.flatnonzero(run.calibrate_on < n)
    calibrated, calibrator, guarantees = guaranteed(rows, run, fit)
    expected = None
    if calibrator:
        expected = float(metrics.consistency_resampling(calibrated).mean())
    return MeasuredRun(
        method=run.method,
        labels=n,
        calibration_rows=len(fit),
        unseen=len(unseen),
        accuracy=metrics.share_estimate(correct, rows.groups[unseen]),
        log_loss=float(losses.mean()),
        minus_draft=None if run.method == DRAFT else minus_draft(rows, losses, draft),
        label_mass=None if run.label_mass is None else float(run.label_mass[m:].mean()),
        calibrator=calibrator,
        ece=metrics.expected_calibration_error(calibrated, correct) if calibrator else None,
        expected_ece=expected,
        guarantees=guarantees,
        seconds=run.seconds * (n + len(unseen)) / (run.n + len(unseen)),
    )


def measure_commonest(rows: StudyRows, n: int, draft: StudyRun | None) -> MeasuredRun:
    """Always answering the commonest of n labels, each label as probable as it is frequent there (plus one row)."""
    shares = (np.bincount(rows.truth[:n], minlength=len(rows.labels)) + 1) / (n + len(rows.labels))
    truth, groups = rows.truth[rows.unseen], rows.groups[rows.unseen]
    losses = -np.log(shares[truth])
    return MeasuredRun(
        method=COMMONEST,
        labels=n,
        calibration_rows=n,
        unseen=len(truth),
        accuracy=metrics.share_estimate(truth == shares.argmax(), groups),
        log_loss=float(losses.mean()),
        minus_draft=minus_draft(rows, losses, draft),
    )


def minus_draft(rows: StudyRows, losses: np.ndarray, draft: StudyRun | None) -> metrics.Estimate | None:
    """Mean loss of the unseen rows minus the draft's on the same rows; the interval resamples whole groups."""
    if draft is None:
        return None
    apart = losses - metrics.label_losses(draft.probabilities[len(draft.calibrate_on) :], rows.truth[rows.unseen])
    return metrics.mean_estimate(apart, rows.groups[rows.unseen])


def guaranteed(rows: StudyRows, run: StudyRun, fit: np.ndarray) -> tuple[np.ndarray, str, tuple[Guarantee, ...]]:
    """(confidence of the unseen rows, calibrator, guarantees), from the run's calibration rows at the places `fit`.

    As calibration_demo.py chooses both. Rows that no calibrator can be fitted to, as nearly all of them are right, keep
    the raw confidence; its name is "".
    """
    from calibration import choose

    m, numbers = len(run.calibrate_on), run.calibrate_on[fit]
    known = scores_of(rows, run.probabilities[fit], numbers)
    unseen = scores_of(rows, run.probabilities[m:], rows.unseen)
    groups = metrics.group_numbers(rows.groups[numbers].tolist())
    try:
        recipe, candidates = choose(known, groups)
        name, out_of_fold = str(recipe), candidates[recipe].mean(axis=0)
        confidence = recipe.estimator().fit(*recipe.inputs(known)).predict(recipe.inputs(unseen)[0])
    except ValueError:
        name, out_of_fold, confidence = "", known.confidence, unseen.confidence
    found = []
    for target in TARGETS:
        threshold = decisions.choose_threshold(out_of_fold, known.correct, target, DELTA, groups)
        found.append(tested(target, threshold.value, confidence, unseen.correct))
    return confidence, name, tuple(found)


def scores_of(rows: StudyRows, probabilities: np.ndarray, numbers: np.ndarray) -> Scores:
    """What calibrators take, of the rows with these numbers and their probabilities [numbers, labels]."""
    from calibration import Scores

    truth, confidence = rows.truth[numbers], probabilities.max(axis=1)
    return Scores(rows.labels, probabilities, truth, confidence, probabilities.argmax(axis=1) == truth)


def tested(target: float, threshold: float | None, confidence: np.ndarray, correct: np.ndarray) -> Guarantee:
    """A guarantee on the unseen rows."""
    if threshold is None:
        return Guarantee(target, None)
    (row,) = decisions.automation(confidence, correct, [threshold])
    return Guarantee(target, threshold, row["automated"], row["share"], row["accuracy"], row["accuracy_high"])


# Tables, in Markdown


def short(value: float | None) -> str:
    """A share to three decimals without its zero, as the pages write it."""
    if value is None:
        return "-"
    return f"{value:.3f}".removeprefix("0")


def with_interval(estimate: metrics.Estimate, sign: str = "") -> str:
    """A number and its interval without leading zeros; with sign="+" all signed."""
    return re.sub(r"\b0\.", ".", estimate.shown(f"{sign}.3f"))


def automated(guarantee: Guarantee) -> str:
    """What a guarantee automates and how much of it is right; a broken one says so."""
    if not guarantee.is_made:
        return "-"
    if guarantee.right is None:
        return "0 %"
    broken = ", broken" if guarantee.is_broken else ""
    return f"{100 * guarantee.share:.0f} %, right {short(guarantee.right)}{broken}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def study_table(study: Study, found: Sequence[MeasuredRun]) -> str:
    """Every number of one data set."""
    head = ["method", "labels", "accuracy", "log loss", "minus the draft's", "label mass", "ECE (expected)"]
    head += [f"at {target:.0%} guaranteed" for target in TARGETS] + ["minutes"]
    lines = []
    for one in found:
        ece = f"{short(one.ece)} ({short(one.expected_ece)})" if one.ece is not None else "-"
        lines.append([one.method, f"{one.labels:,}", with_interval(one.accuracy), f"{one.log_loss:.3f}"])
        lines[-1] += [with_interval(one.minus_draft, "+") if one.minus_draft else "-", short(one.label_mass), ece]
        lines[-1] += [automated(guarantee) for guarantee in one.guarantees] or ["-"] * len(TARGETS)
        lines[-1].append(f"{one.seconds / 60:.1f}" if one.seconds else "-")
    return markdown(head, lines)


def rows_line(study: Study) -> str:
    """Which rows a table is of."""
    rows = study.rows
    groups = len(np.unique(rows.groups[rows.unseen]))
    return (
        f"{study.source}; {len(rows.labels)} labels, {rows.labelled:,} labelled rows, {len(rows.unseen):,} unseen rows "
        f"in {groups:,} groups"
    )


def by_run(found: Sequence[MeasuredRun]) -> dict[tuple[str, int], MeasuredRun]:
    return {(one.method, one.labels): one for one in found}


def probe_table(studies: Sequence[tuple[Study, Sequence[MeasuredRun]]]) -> str:
    """The probe beside the commonest label, the first token and the bag of words: accuracy, and what 90 % automates."""
    head = ["set", "labels", "commonest", "first token", "bag of words", "probe", "its ECE (expected)"]
    head += ["bag of words at 90 %", "probe at 80 %", "at 90 %", "at 95 %"]
    lines = []
    for study, found in studies:
        known = by_run(found)
        drafted = next((one for one in found if one.method == DRAFT), None)  # its answers hang on no labels
        for n in study.sizes:
            if not (probe := known.get((PROBE, n))):
                continue
            words = known.get((BAG_OF_WORDS, n))
            others = [known.get((COMMONEST, n)), drafted, words]
            lines.append([study.title, f"{n:,}", *(short(one.accuracy.value) if one else "-" for one in others)])
            lines[-1] += [short(probe.accuracy.value), f"{short(probe.ece)} ({short(probe.expected_ece)})"]
            lines[-1].append(automated(words.at(0.9)) if words else "-")
            lines[-1] += [automated(guarantee) for guarantee in probe.guarantees]
    return markdown(head, lines)


def first_page_table(studies: Sequence[tuple[Study, Sequence[MeasuredRun]]]) -> str:
    """Accuracy, and what SHOWN_TARGET automates, of each set with the most labels that a probe was given."""
    methods, lines = (DRAFT, BAG_OF_WORDS, PROBE), []
    for study, found in studies:
        known = by_run(found)
        n = max((n for n in study.sizes if (PROBE, n) in known), default=None)
        if n is None:
            continue
        drafted = [one for one in found if one.method == DRAFT]  # with the most labels that calibrated it
        of_method = {DRAFT: drafted[-1] if drafted else None, BAG_OF_WORDS: known.get((BAG_OF_WORDS, n))}
        of_method[PROBE] = known[PROBE, n]
        cells = []
        for method in methods:
            one = of_method[method]
            guarantee = one.at(SHOWN_TARGET) if one else None
            cells.append(f"{short(one.accuracy.value)}; {automated(guarantee)}" if one else "not run")
        lines.append([study.title, f"{n:,}", short(known[COMMONEST, n].accuracy.value), *cells])
    return markdown(["set", "labels", COMMONEST, *methods], lines)


def improving_table(studies: Sequence[tuple[Study, Sequence[MeasuredRun]]]) -> str:
    """The draft, the improved task, the commonest label and the bag of words of the sets that were improved."""
    head = ["set", "", "accuracy", "log loss", "minus the draft's", "label mass", "minutes"]
    lines = []
    for study, found in studies:
        for improved in (one for one in found if one.method == IMPROVED):
            known = by_run(found)
            for method in (COMMONEST, DRAFT, IMPROVED, BAG_OF_WORDS, PROBE):
                if not (one := known.get((method, improved.labels))):
                    continue
                apart = with_interval(one.minus_draft, "+") if one.minus_draft else "-"
                lines.append([study.title, method, with_interval(one.accuracy), f"{one.log_loss:.3f}", apart])
                lines[-1] += [short(one.label_mass), f"{one.seconds / 60:.1f}" if one.seconds else "-"]
    return markdown(head, lines)


def guarantees_table(studies: Sequence[tuple[Study, Sequence[MeasuredRun]]]) -> str:
    """How many guarantees each method made, kept and broke, and how many are refuted beyond chance, by target."""
    head = ["method", "target", "asked for", "made", "kept", "broken", "of these beyond the 95 % interval"]
    lines = []
    for method in METHODS[1:]:
        for target in TARGETS:
            asked = [one.at(target) for _, found in studies for one in found if one.method == method]
            made, broken = sum(g.is_made for g in asked), sum(g.is_broken for g in asked)
            numbers = (len(asked), made, made - broken, broken, sum(g.is_refuted for g in asked))
            if asked:
                lines.append([method, f"{target:.0%}", *map(str, numbers)])
    return markdown(head, lines)


def coverage(
    studies: Sequence[tuple[Study, Sequence[MeasuredRun]]], target: float, most: bool
) -> dict[str, plotting.SetCoverage]:
    """What is automated of each set at a target: with the fewest labels from 300 on, or with more than these."""
    found = {}
    for study, measured in studies:
        sizes = sorted(n for n in study.sizes if n >= 300)
        if most and len(sizes) < 2:
            continue
        n = sizes[-1] if most else sizes[0]
        of_size = [one for one in measured if one.labels == n and one.guarantees]
        automated = {one.method: (one.at(target).share, one.at(target).is_broken) for one in of_size}
        if automated:
            found[study.title] = plotting.SetCoverage(n, automated)
    return found


def draw_coverage(path: str | Path, studies: Sequence[tuple[Study, Sequence[MeasuredRun]]]) -> None:
    """The figure: what each method automates of each public set at SHOWN_TARGET, with few labels and with more."""
    studies = sorted(public_ones(studies), key=lambda pair: pair[0].title.casefold())
    panels = {
        title: coverage(studies, SHOWN_TARGET, most) for title, most in (("few labels", False), ("more labels", True))
    }
    shown = {method for sets in panels.values() for of_set in sets.values() for method in of_set.methods}
    methods = [method for method in METHODS if method in shown]
    unseen = len(studies[0][0].rows.unseen)
    plotting.guaranteed_coverage(path, panels, methods=methods, target=SHOWN_TARGET, unseen=unseen)
