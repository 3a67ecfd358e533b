"""Which of many candidates for a task is best, and whether it is better than the draft: a search on labelled rows.

    split_rows           rows that may be examples, rows that choose, and rows that choose nothing (a third)
    Trials               the score of each candidate on the rows asked for so far, from a log that a killed run leaves
    search               all on a few rows, the better ones on twice as many, and again: successive halving
    confirm              draft and winner on the rows that chose nothing, with a paired interval

Candidates are ranked by log loss, -ln P(true label), behind them those whose label mass is below a floor: they are
distributions over words that the model does not say. The winner of many is the luckiest too, so its numbers on the
rows that chose it are too good; only those of `confirm` are not. Successive halving: Jamieson and Talwalkar, "Non-
stochastic best arm identification and hyperparameter optimization", AISTATS 2016.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from calibration_metrics import bootstrap_interval, label_losses
from near_duplicates import duplicate_groups
from tables import Example
from task import Task, debias
from task_candidates import Candidate

FORMAT = "task search 1"
FIRST_ROWS = 30  # on which every candidate is judged; twice as many for the better ones, and so on
FEWEST_ROWS = 60  # labelled rows for a search
KEPT = 3  # of so many one goes on to twice as many rows
SHARES = (0.4, 0.7)  # of the seconds, that templates and examples may take, and with them their variations

Evaluate = Callable[[Task, Sequence[Example]], tuple[np.ndarray, np.ndarray]]


# Rows


@dataclass(frozen=True)
class Rows:
    """Labelled rows with one purpose."""

    examples: tuple[Example, ...]
    truth: np.ndarray  # number of the true label [n]
    groups: np.ndarray  # of near-duplicates [n]

    def __len__(self) -> int:
        return len(self.examples)


def split_rows(examples: Sequence[Example], task: Task, seed: int = 0) -> dict[str, Rows]:
    """Labelled rows as "examples" (may be shown in a prompt), "search" (choose) and "held out" (a third, for the end).

    Near-duplicates stand in one part, and each label is spread evenly. The first rows of "search" are as balanced as
    all of them. Raises ValueError for too few rows.
    """
    from calibration import grouped_folds

    truth = np.array([list(task.labels).index(task.canonical_label(example.label)) for example in examples])
    groups = np.array(duplicate_groups([example.text for example in examples]))
    if len(examples) < FEWEST_ROWS:
        raise ValueError(f"{len(examples)} labelled rows are too few to choose by; a search needs {FEWEST_ROWS}")
    rest, held_out = grouped_folds(truth, truth, groups, n_splits=3, seed=seed)[0]
    places, shown = grouped_folds(truth[rest], truth[rest], groups[rest], n_splits=4, seed=seed)[0]
    order = balanced_order(truth[rest[places]], seed)
    numbers = {"examples": rest[shown], "search": rest[places][order], "held out": held_out}
    return {
        part: Rows(tuple(examples[number] for number in chosen), truth[chosen], groups[chosen])
        for part, chosen in numbers.items()
    }


def balanced_order(truth: np.ndarray, seed: int = 0) -> np.ndarray:
    """Row numbers in an order of which every beginning has about the labels' shares of the whole."""
    order = np.random.default_rng(seed).permutation(len(truth))
    seen: Counter[int] = Counter()
    count = Counter(truth.tolist())
    place = np.empty(len(truth))
    for number in order:
        label = int(truth[number])
        place[number] = (seen[label] + 0.5) / count[label]
        seen[label] += 1
    return order[np.argsort(place[order], kind="stable")]


# Trials


@dataclass(frozen=True)
class Score:
    """What a candidate does on the first `n` rows of a part."""

    losses: np.ndarray  # -ln P(true label) [n]
    correct: np.ndarray  # [n]
    label_mass: float
    seconds_per_row: float

    @property
    def log_loss(self) -> float:
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


@dataclass
class Scored:
    """The rows of a part that a task has been asked about so far."""

    probabilities: list[list[float]] = field(default_factory=list)  # [rows][labels]
    label_mass: list[float] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None  # of a task that does not work with this model, or with these rows


class Trials:
    """What has been tried: asks the model about rows that are not in the log yet, and writes them there.

    `evaluate(task, examples)` gives probabilities [rows, labels] and label masses [rows], or raises ValueError. What
    the log holds is taken from it with the seconds that it took, so a run that goes on decides as one without a break.
    """

    def __init__(self, parts: Mapping[str, Rows], evaluate: Evaluate, file: BinaryIO, header: Mapping) -> None:
        self.parts, self.evaluate, self.file = parts, evaluate, file
        self.seconds = 0.0  # of the model's, spent on what has been asked for
        self.known: dict[tuple[str, str, int], dict] = {}
        self.remembered: dict[str, dict] = {}
        self.counted: set[str] = set()  # of these, whose seconds are among `seconds`
        self.scored: dict[tuple[str, str], Scored] = defaultdict(Scored)
        self._read_log(dict(header))

    def _read_log(self, header: dict) -> None:
        """Take over a log of the same search, without a torn last line; begin an empty one."""
        self.file.seek(0)
        end = 0
        for number, line in enumerate(self.file, 1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                record = json.loads(line)
                if number == 1:
                    known_header = record
                elif "remembered" in record:
                    self.remembered[record["remembered"]] = record
                else:
                    self.known[record["key"], record["part"], record["from"]] = record
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.file.name} line {number} is not of a task search") from None
        if end and known_header != json.loads(json.dumps(header)):
            raise ValueError(
                f"{self.file.name} is of another search (table, draft, model or seed); use --overwrite to replace it, "
                "or another --output"
            )
        self.file.truncate(end)
        if not end:
            self._write(header)

    def _write(self, record: Mapping) -> None:
        self.file.seek(0, os.SEEK_END)
        self.file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.file.flush()

    def remember(self, name: str, compute: Callable[[], object]) -> object:
        """A value of JSON that the model is asked for once and that is kept in the log."""
        if name not in self.remembered:
            started = time.monotonic()
            value = compute()
            record = {"remembered": name, "value": value, "seconds": time.monotonic() - started}
            self._write(record)
            self.remembered[name] = record
        if name not in self.counted:
            self.counted.add(name)
            self.seconds += self.remembered[name]["seconds"]
        return self.remembered[name]["value"]

    def score(self, candidate: Candidate, part: str, n: int | None = None) -> Score | None:
        """The candidate's score on the first n rows of a part (by default all); None if it does not work there."""
        rows = self.parts[part]
        n = len(rows) if n is None else min(n, len(rows))
        scored = self.scored[candidate.key, part]
        while scored.error is None and len(scored.probabilities) < n:
            self._ask(candidate, part, n, scored)
        if scored.error is not None:
            return None
        probabilities = np.array(scored.probabilities[:n])
        if candidate.debias:
            probabilities = debias(probabilities, probabilities.mean(axis=0))
        return Score(
            losses=label_losses(probabilities, rows.truth[:n]),
            correct=probabilities.argmax(axis=1) == rows.truth[:n],
            label_mass=float(np.mean(scored.label_mass[:n])),
            seconds_per_row=scored.seconds / len(scored.probabilities),
        )

    def margins(self, candidate: Candidate, part: str) -> np.ndarray:
        """P(true label) minus that of the next best label [n], of all rows of a part; NaN where it does not work."""
        rows = self.parts[part]
        if self.score(candidate, part) is None:
            return np.full(len(rows), np.nan)
        probabilities = np.array(self.scored[candidate.key, part].probabilities)
        of_truth = probabilities[np.arange(len(rows)), rows.truth]
        probabilities[np.arange(len(rows)), rows.truth] = -1
        return of_truth - probabilities.max(axis=1)

    def _ask(self, candidate: Candidate, part: str, n: int, scored: Scored) -> None:
        """Add the rows from where `scored` ends: those that the log has from there, or those up to n from the model."""
        start = len(scored.probabilities)
        record = self.known.get((candidate.key, part, start))
        if record is None:
            record = {"key": candidate.key, "part": part, "from": start, "what": candidate.what}
            started = time.monotonic()
            try:
                probabilities, label_mass = self.evaluate(candidate.task, self.parts[part].examples[start:n])
                record |= {"probabilities": probabilities.tolist(), "label_mass": label_mass.tolist(), "error": None}
            except ValueError as error:
                record |= {"probabilities": [], "label_mass": [], "error": str(error)}
            record["seconds"] = time.monotonic() - started
            self._write(record)
            self.known[candidate.key, part, start] = record
        scored.probabilities += record["probabilities"]
        scored.label_mass += record["label_mass"]
        scored.seconds += record["seconds"]
        scored.error = record["error"]
        self.seconds += record["seconds"]


# Search


@dataclass(frozen=True)
class Budget:
    """How much may be tried: candidates, and seconds of the model's; below `floor` of label mass one ranks behind."""

    trials: int
    seconds: float
    floor: float


@dataclass(frozen=True)
class Ranked:
    """A candidate's place: its score on the most rows that it was judged by."""

    candidate: Candidate
    rows: int
    score: Score


def search(
    trials: Trials,
    draft: Candidate,
    first: Iterable[Candidate],
    vary: Callable[[Sequence[Candidate]], Iterable[Candidate]],
    budget: Budget,
    tell: Callable[[Candidate, int, Score | None], None] = lambda candidate, n, score: None,
) -> list[Ranked]:
    """All candidates that work, best first: those judged by more rows before others. The draft is judged by all.

    `first` are tried on FIRST_ROWS, then `vary(those worth it)`; a third of them goes on to twice as many rows, and so
    on. Raises ValueError when the draft itself does not work.
    """
    n = min(FIRST_ROWS, len(trials.parts["search"]))

    def judge(candidate: Candidate, n: int) -> Ranked | None:
        score = trials.score(candidate, "search", n)
        tell(candidate, n, score)
        return Ranked(candidate, n, score) if score else None

    if not (own := judge(draft, n)):
        raise ValueError(f"the draft does not work: {trials.scored[draft.key, 'search'].error}")
    ranked = [own]
    known = {draft.identity}
    half = budget.trials // 2
    for candidates, most, share in ((first, half, SHARES[0]), (None, budget.trials, SHARES[1])):
        if candidates is None:
            candidates = vary([one.candidate for one in worth_varying(ranked, budget.floor)])
        for candidate in candidates:
            if len(known) >= most or trials.seconds > share * budget.seconds:
                break
            if candidate.identity in known:
                continue
            known.add(candidate.identity)
            if found := judge(candidate, n):
                ranked.append(found)
    survivors, everyone = ranked, list(ranked)
    while n < len(trials.parts["search"]) and trials.seconds <= budget.seconds:
        n = min(2 * n, len(trials.parts["search"]))
        best = in_order(survivors, budget.floor)[: max(KEPT, len(survivors) // KEPT)]
        best = [one.candidate for one in best if one.candidate.identity != draft.identity]
        survivors = []
        for place, candidate in enumerate([*best[:1], draft, *best[1:]]):
            in_time = place < 2 or trials.seconds <= budget.seconds  # who is judged at all is judged beside the draft
            if in_time and (found := judge(candidate, n)):
                survivors.append(found)
        everyone += survivors
    last = {one.candidate.identity: one for one in everyone}  # of each candidate the one with the most rows
    return sorted(in_order(last.values(), budget.floor), key=lambda one: -one.rows)


def worth_varying(ranked: Sequence[Ranked], floor: float) -> list[Ranked]:
    """The best KEPT, and before them the one of least log loss if it is below the floor: other words may name it."""
    best = in_order(ranked, floor)[:KEPT]
    least = min(ranked, key=lambda one: one.score.log_loss)
    return best if least in best else [least, *best]


def in_order(ranked: Iterable[Ranked], floor: float) -> list[Ranked]:
    """By log loss, those with a label mass below the floor behind all others."""
    return sorted(ranked, key=lambda one: (one.score.label_mass < floor, one.score.log_loss))


def difference(one: Score, draft: Score, groups: np.ndarray) -> tuple[float, float, float]:
    """Log loss minus the draft's on the same rows, with its 95 % interval from a bootstrap of whole groups."""
    apart = one.losses - draft.losses[: len(one.losses)]
    (interval,) = bootstrap_interval(lambda rows: [apart[rows].mean()], groups[: len(apart)])
    return float(apart.mean()), float(interval[0]), float(interval[1])


# Confirmation


@dataclass(frozen=True)
class Confirmation:
    """Draft and winner on rows that chose nothing."""

    n: int
    draft: Score
    winner: Score
    difference: tuple[float, float, float]  # winner's log loss minus the draft's, low, high
    commonest: str  # label of the other rows
    commonest_accuracy: float  # of always answering it
    shares_log_loss: float  # of always answering the labels' shares of the other rows
    is_taken: bool  # whether the winner is worth taking instead of the draft

    def verdict(self, floor: float) -> str:
        """What follows, in a sentence."""
        value, low, high = self.difference
        span = f"log loss {value:+.3f} [{low:+.3f}, {high:+.3f}] against the draft on {self.n} rows that chose nothing"
        if self.winner is self.draft:
            return "nothing that was tried is better than the draft, so it is kept"
        if high < 0:
            return f"better than the draft: {span}"
        if self.is_taken:
            return (
                f"the draft names a label with a mass of {self.draft.label_mass:.2f}, the task found with "
                f"{self.winner.label_mass:.2f} (below {floor:g} the model does not answer the question): {span}"
            )
        return f"the draft is as good, so it is kept: {span}"

    def worth(self) -> str:
        """What the task that is kept is worth beside answers without any model, in a sentence."""
        kept = self.winner if self.is_taken else self.draft
        said = f"always answering {self.commonest!r} is right in {self.commonest_accuracy:.3f}"
        if kept.accuracy > self.commonest_accuracy:
            return f"accuracy {kept.accuracy:.3f}; {said}"
        return (
            f"accuracy {kept.accuracy:.3f} is not above always answering {self.commonest!r} "
            f"({self.commonest_accuracy:.3f}): a prompt alone does not make this model answer the question; compare a "
            "probe (probe_confidence.py), fine-tuning (fine_tune_model.py) or a larger model"
        )


def confirm(trials: Trials, draft: Candidate, winner: Candidate, floor: float) -> Confirmation:
    """Judge draft and winner on the held-out rows. The winner is taken if its log loss is lower beyond doubt, or if it
    is not higher and the draft, but not the winner, is below the floor of label mass.
    """
    rows = trials.parts["held out"]
    own = trials.score(draft, "held out")
    if own is None:
        raise ValueError(f"the draft does not work on all rows: {trials.scored[draft.key, 'held out'].error}")
    other = own if winner.identity == draft.identity else trials.score(winner, "held out")
    if other is None:  # a text that is too long for it: what cannot answer all rows does not win
        other = own
    found = difference(other, own, rows.groups)
    names_labels = own.label_mass < floor <= other.label_mass and found[0] <= 0
    known = np.concatenate([trials.parts["search"].truth, trials.parts["examples"].truth])
    labels = list(draft.task.labels)
    shares = (np.bincount(known, minlength=len(labels)) + 1) / (len(known) + len(labels))
    return Confirmation(
        n=len(rows),
        draft=own,
        winner=other,
        difference=found,
        commonest=labels[int(shares.argmax())],
        commonest_accuracy=float((rows.truth == shares.argmax()).mean()),
        shares_log_loss=float(-np.log(shares[rows.truth]).mean()),
        is_taken=found[2] < 0 or names_labels,
    )
