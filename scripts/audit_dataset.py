"""Look for what spoils a labelled table: repeats, near-duplicates across splits, labels that a bag of words can guess.

    python scripts/audit_dataset.py                                  # the four splits of our own dataset
    python scripts/audit_dataset.py train.csv test.csv               # yours; each file is a split
    python scripts/audit_dataset.py all.csv --split-column split     # yours, one file
    python scripts/audit_dataset.py --predictions predictions.jsonl  # a model's numbers on the last split beside it

Two texts are near-duplicates when the Jaccard similarity of their word pairs is at least --threshold. Across splits
they leak: what was learned by heart is counted as understood. So does a group that stands in two splits.

The baseline is a logistic regression on a bag of words, trained on the first split and tested on the last (with one
split: cross-validated, near-duplicates kept in one fold). Where it does well, the label needs no understanding.
Without domain words: without those of three rows or more that are at least twice as frequent in one domain as in the
others, among texts of the same label. Intervals of accuracy are exact binomial ones and take the rows as independent.

Prints tables and writes nothing. Exit code: 0 clean, 1 the splits leak, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import predictions  # noqa: E402
import tables  # noqa: E402
import task as tasks  # noqa: E402

if TYPE_CHECKING:
    from scipy.sparse import csr_array

OURS = ["data:train", "data:validation", "data:calibration", "data:test"]
SHOWN = 5  # leaking texts that are printed
FOLDS = 5


@dataclass(frozen=True)
class Row:
    """One text and what the audit needs to know of it."""

    split: str
    id: str
    text: str
    label: str | None
    group: str | None
    domain: str | None
    by: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    answers = predictions.read(args.predictions) if args.predictions else []
    rows = list(read(args))
    likenesses = list(tables.near_duplicates([row.text for row in rows], args.threshold, args.shingle))
    within, elsewhere = partners(rows, likenesses)
    print_splits(rows, within, elsewhere)
    leaks = print_leaks(rows, elsewhere)
    print_baselines(rows, answers)
    sys.exit(1 if leaks else 0)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("files", metavar="FILE", nargs="*", default=OURS, help="tables; each is a split (default: our dataset's four)")
    tables.add_column_arguments(parser)
    add("--split-column", metavar="NAME", help="column that names the split, instead of a file for each")
    add("--group-column", metavar="NAME", help="column of what belongs in one split (default: group, if there)")
    add("--domain-column", metavar="NAME", help="column of the domain (default: domain, if there)")
    add("--by", metavar="NAME", nargs="+", help="columns that divide the baseline (default: difficulty part, if there)")
    add("--threshold", type=float, default=0.6, metavar="J", help="similarity of near-duplicates (default: 0.6)")
    add("--shingle", type=int, default=2, metavar="N", help="words compared together (default: 2)")
    add("--predictions", metavar="FILE", help="a predictions file of the last split: adds the model's numbers")
    args = parser.parse_args(argv)
    if not 0 < args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: a similarity above 0 and at most 1")
    if len(set(args.files)) < len(args.files):
        parser.error("a file is given twice")
    if args.shingle < 1:
        parser.error(f"--shingle {args.shingle}: at least one word")
    return args


def read(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of all files; ids are unique within a split."""
    seen = set()
    wanted = {"split": args.split_column, "group": args.group_column, "domain": args.domain_column}
    for file in args.files:
        table = tables.read_rows(file, not args.no_header)
        for example, (where, columns) in zip(tasks.examples_from(args, file), table, strict=False):  # --limit ends it
            named = [name for name in (*wanted.values(), *(args.by or ())) if name]
            if absent := [name for name in named if name not in columns]:
                raise ValueError(f"{where}: no column {absent[0]!r}; it has {', '.join(map(str, columns))}")
            value = {role: columns.get(name or role) for role, name in wanted.items()}
            split = str(value["split"]) if args.split_column else file
            if (split, example.id) in seen:
                raise ValueError(f"{where}: the id {example.id!r} stands twice; ids must be unique")
            seen.add((split, example.id))
            by = tuple(str(columns[name]) for name in args.by or ("difficulty", "part") if name in columns)
            yield Row(split, example.id, example.text, example.label, value["group"], value["domain"], by)


# Repeats and leaks


def partners(rows: list[Row], likenesses: list[tuple[int, int, float]]) -> tuple[dict[int, int], dict[int, int]]:
    """For each row that has one, a near-duplicate in its own split, and one in another split."""
    same = {j: i for i, j, jaccard in likenesses if jaccard == 1}  # near_duplicates pairs equals with the first alone
    alike = defaultdict(set)
    for i, j, _ in likenesses:
        alike[same.get(i, i)].add(same.get(j, j))
        alike[same.get(j, j)].add(same.get(i, i))
    members = defaultdict(dict)  # first of its equals -> split -> its rows there
    for number, row in enumerate(rows):
        members[same.get(number, number)].setdefault(row.split, []).append(number)
    within, elsewhere = {}, {}
    for number, row in enumerate(rows):
        first = same.get(number, number)
        for other in sorted({first} | alike[first]):
            for split, numbers in members[other].items():
                found = within if split == row.split else elsewhere
                for partner in numbers[:2]:
                    if partner != number:
                        found.setdefault(number, partner)
    return within, elsewhere


def print_splits(rows: list[Row], within: dict[int, int], elsewhere: dict[int, int]) -> None:
    """One line a split: rows, labels, words, and how many texts have a repeat or a near-duplicate."""
    splits = defaultdict(list)
    for number, row in enumerate(rows):
        splits[row.split].append(number)
    heads = ["split", "rows", "labels", "words: min, median, max", "repeated", "alike in it", "alike in others"]
    table = []
    for split, numbers in splits.items():
        words = [len(rows[n].text.split()) for n in numbers]
        labels = Counter(rows[n].label or "none" for n in numbers)
        repeated = len(numbers) - len({" ".join(rows[n].text.casefold().split()) for n in numbers})
        cells = [split, f"{len(numbers):,}", ", ".join(f"{n:,} {label}" for label, n in sorted(labels.items()))]
        cells += [f"{min(words)}, {median(words):g}, {max(words)}", f"{repeated:,}"]
        table.append(cells + [f"{sum(n in found for n in numbers):,}" for found in (within, elsewhere)])
    print(command_line.columns([heads, *table]))


def print_leaks(rows: list[Row], elsewhere: dict[int, int]) -> bool:
    """Say what stands in two splits, and whether anything does."""
    homes = defaultdict(set)
    for row in rows:
        if row.group is not None:
            homes[row.group].add(row.split)
    groups = [group for group, splits in homes.items() if len(splits) > 1]
    if elsewhere:
        print(f"\nLEAK: {len(elsewhere):,} rows have a near-duplicate in another split. The first:")
    for number in list(elsewhere)[:SHOWN]:
        for row in (rows[number], rows[elsewhere[number]]):
            print(f"  {row.split} {command_line.printable(row.id)}: {command_line.printable(row.text[:100])}")
        print()
    if groups:
        print(f"\nLEAK: {len(groups):,} groups stand in more than one split, the first is {groups[0]!r}")
    if len({row.split for row in rows}) > 1 and not elsewhere and not groups:
        print(
            "\nNo text has a near-duplicate in another split" + (", and no group is in two splits." if homes else ".")
        )
    return bool(elsewhere or groups)


# Baselines


def print_baselines(rows: list[Row], answers: list[predictions.Prediction]) -> None:
    """Accuracy and AUC of the bags of words, and of a model's predictions, for each part of the last split."""
    splits = list(dict.fromkeys(row.split for row in rows))
    train, test = ([row for row in rows if row.split == split and row.label] for split in (splits[0], splits[-1]))
    sizes = Counter(row.label for row in train)
    if len(sizes) < 2 or min(sizes.values()) < FOLDS or not test:
        print(f"\nNo baseline: it learns from at least two labels with {FOLDS} rows each.")
        return
    labels = sorted(sizes)
    probabilities = {"bag of words": bag_of_words(train, test, labels)}
    if len({row.domain for row in train}) > 1:
        probabilities["without domain words"] = bag_of_words(train, test, labels, without_domain_words=True)
    if answers:
        probabilities[answers[0].model] = model_probabilities(answers, test, labels)
    how = f"trained on {splits[0]}, n = {len(train):,}" if len(splits) > 1 else f"{FOLDS}-fold out-of-fold"
    print(f"\nBag of words ({how}), tested on {splits[-1]}, n = {len(test):,}. Accuracy with 95 % interval, and AUC:\n")
    right = {name: correct(p, test, labels) for name, p in probabilities.items()}
    members = defaultdict(list)
    for number, row in enumerate(test):
        for depth in range(len(row.by) + 1):
            members[row.by[:depth]].append(number)
    rank = {part: (-np.mean(right["bag of words"][numbers]), part) for part, numbers in members.items()}
    table = []
    for part in sorted(members, key=lambda part: [rank[part[: depth + 1]] for depth in range(len(part))]):
        numbers = np.array(members[part])
        table.append([", ".join(part) or "all", f"{len(numbers):,}"])
        for name, p in probabilities.items():
            table[-1] += [accuracy(right[name][numbers]), auc(p[numbers], [test[n].label for n in numbers], labels)]
    heads = ["", "rows", *(head for name in probabilities for head in (name, "AUC"))]
    print(command_line.columns([heads, *table]))


def bag_of_words(
    train: list[Row], test: list[Row], labels: list[str], without_domain_words: bool = False
) -> np.ndarray:
    """Label probabilities [n, labels] of the test rows; out-of-fold ones where the test rows are the training rows."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    folds = [(range(len(train)), range(len(test)))]
    if train[0].split == test[0].split:
        groups = [row.group for row in train]
        if None in groups:
            groups = tables.duplicate_groups([row.text for row in train])
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0).split(train, [r.label for r in train], groups)
    probabilities = np.zeros((len(test), len(labels)))
    for learn, answer in folds:
        lessons = [train[n] for n in learn]
        words = CountVectorizer(analyzer=lambda text: tables.shingles(text, 1), binary=True)
        counts = words.fit_transform(row.text for row in lessons)
        used = ~domain_words(counts, lessons) if without_domain_words else np.ones(counts.shape[1], bool)
        model = LogisticRegression(max_iter=1000).fit(counts[:, used], [row.label for row in lessons])
        columns = [labels.index(label) for label in model.classes_]
        asked = words.transform(test[n].text for n in answer)[:, used]
        probabilities[np.ix_(list(answer), columns)] = model.predict_proba(asked)
    return probabilities


def domain_words(counts: csr_array, rows: list[Row]) -> np.ndarray:
    """Which columns of counts [rows, words] are domain words, [words] bool.

    Compared among rows of one label, so that a word is not taken for a domain's because the domain's label is its own.
    """
    labels, domains = np.array([str(row.label) for row in rows]), np.array([str(row.domain) for row in rows])
    found = np.zeros(counts.shape[1], bool)
    for label in np.unique(labels):
        for domain in np.unique(domains[labels == label]):
            inside, outside = (labels == label) & (domains == domain), (labels == label) & (domains != domain)
            here, elsewhere = (np.asarray(counts[rows].sum(axis=0)).ravel() for rows in (inside, outside))
            found |= (here >= 3) & (here * outside.sum() >= 2 * elsewhere * inside.sum())
    return found


def model_probabilities(answers: list[predictions.Prediction], test: list[Row], labels: list[str]) -> np.ndarray:
    """[n, labels] of the test rows, found by id; NaN where the model gave none."""
    found = {answer.id: answer for answer in answers}
    probabilities = np.full((len(test), len(labels)), np.nan)
    for number, row in enumerate(test):
        prediction = found.get(row.id)
        if prediction is None or prediction.text != row.text:
            raise ValueError(f"--predictions: none of {row.id!r} as it stands; make them with --input {row.split}")
        if prediction.error is None:
            if foreign := sorted(set(prediction.probabilities) ^ set(labels)):
                raise ValueError(f"--predictions: the table's labels and theirs differ, {foreign[0]!r} is not in both")
            probabilities[number] = [prediction.probabilities[label] for label in labels]
    return probabilities


def correct(probabilities: np.ndarray, test: list[Row], labels: list[str]) -> np.ndarray:
    """[n]: 1 where the most probable label is the true one, else 0; NaN where there are no probabilities."""
    right = np.array([labels[k] == row.label for k, row in zip(probabilities.argmax(axis=1), test, strict=True)], float)
    return np.where(np.isnan(probabilities[:, 0]), np.nan, right)


def accuracy(right: np.ndarray) -> str:
    """The share of 1 with its exact binomial 95 % interval, and how many rows had no answer."""
    from scipy.stats import binomtest

    answered = right[~np.isnan(right)]
    if not len(answered):
        return "no answers"
    low, high = binomtest(int(answered.sum()), len(answered)).proportion_ci(0.95, "exact")
    none = f", {len(right) - len(answered)} without" if len(answered) < len(right) else ""
    return f"{answered.mean():.3f} [{low:.3f}, {high:.3f}]{none}"


def auc(probabilities: np.ndarray, truth: list[str], labels: list[str]) -> str:
    """AUC of the second of two labels, "-" for more labels or where only one occurs."""
    from sklearn.metrics import roc_auc_score

    answered = ~np.isnan(probabilities[:, 0])
    is_second = np.array([label == labels[-1] for label in truth])[answered]
    if len(labels) != 2 or is_second.all() or not is_second.any():
        return "-"
    return f"{roc_auc_score(is_second, probabilities[answered, 1]):.3f}"


if __name__ == "__main__":
    command_line.run(main)
