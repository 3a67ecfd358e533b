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
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import calibration_metrics as metrics  # noqa: E402
import command_line  # noqa: E402
import predictions  # noqa: E402
import tables  # noqa: E402
from command_line import printable  # noqa: E402

if TYPE_CHECKING:
    from scipy.sparse import csr_array

OURS = ["data:train", "data:validation", "data:calibration", "data:test"]
SHOWN = 5  # leaking texts that are printed
FOLDS = 5


@dataclass(frozen=True)
class AuditedRow:
    """One text and what the audit needs to know of it."""

    split: str
    id: str
    text: str
    label: str | None = None
    group: str | None = None
    domain: str | None = None
    by: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    answers = predictions.read(args.predictions) if args.predictions else []
    wanted = {"split": args.split_column, "group": args.group_column, "domain": args.domain_column}
    columns, rows = tables.column_arguments(args), []
    for file in args.files:
        rows += read_audited(file, columns, wanted, args.by)
    for split in by_split(rows):
        predictions.check_ids([row.id for row in rows if row.split == split], split)
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
    if args.sample is not None:
        parser.error("--sample: an audit reads every row")
    return args


def read_audited(
    file: str, columns: Mapping[str, object], wanted: Mapping[str, str | None], by: Sequence[str] | None
) -> Iterator[AuditedRow]:
    """The rows of a file, which is a split of its own unless `wanted` names a column of splits.

    `columns` are as `tables.read_examples` takes them; `wanted` names the columns of split, group and domain.
    """
    written = {name: columns[name] for name in ("header", "encoding", "delimiter", "skip_bad_rows")}
    examples = tables.read_examples(file, **columns)
    for example, (where, cells) in zip(examples, tables.read_rows(file, **written), strict=False):  # --limit ends it
        for name in (*wanted.values(), *(by or ())):
            if name and name not in cells:
                raise ValueError(f"{where}: no column {name!r}; it has {', '.join(map(str, cells))}")
        split = str(cells[wanted["split"]]) if wanted["split"] else file
        group, domain = (cells.get(wanted[role] or role) for role in ("group", "domain"))
        parts = tuple(str(cells[name]) for name in by or ("difficulty", "part") if name in cells)
        yield AuditedRow(split, example.id, example.text, example.label, group, domain, parts)


def by_split(rows: Sequence[AuditedRow]) -> dict[str, list[int]]:
    """split -> numbers of its rows, in order."""
    splits = defaultdict(list)
    for number, row in enumerate(rows):
        splits[row.split].append(number)
    return splits


# Repeats and leaks


def partners(rows: list[AuditedRow], likenesses: list[tuple[int, int, float]]) -> tuple[dict[int, int], dict[int, int]]:
    """For each row that has one, a near-duplicate in its own split, and one in another split."""
    same = {j: i for i, j, jaccard in likenesses if jaccard == 1}  # near_duplicates pairs equals with the first alone
    first = [same.get(number, number) for number in range(len(rows))]
    members = defaultdict(list)  # (first of its equals, split) -> two of its rows there: one has another as its partner
    for number, row in enumerate(rows):
        if len(members[first[number], row.split]) < 2:
            members[first[number], row.split].append(number)
    alike = defaultdict(set)  # first of its equals -> those of its near-duplicates
    for i, j, _ in likenesses:
        alike[first[i]].add(first[j])
        alike[first[j]].add(first[i])
    within, elsewhere, splits = {}, {}, list(by_split(rows))
    for number, row in enumerate(rows):
        for other in sorted({first[number]} | alike[first[number]]):
            for split in splits:
                found = within if split == row.split else elsewhere
                for partner in members.get((other, split), ()):
                    if partner != number:
                        found.setdefault(number, partner)
    return within, elsewhere


def print_splits(rows: list[AuditedRow], within: dict[int, int], elsewhere: dict[int, int]) -> None:
    """One line a split: rows, labels, words, and how many texts have a repeat or a near-duplicate."""
    heads = ["split", "rows", "labels", "words: min, median, max", "repeated", "alike in it", "alike in others"]
    table = []
    for split, numbers in by_split(rows).items():
        words = [len(rows[n].text.split()) for n in numbers]
        labels = Counter(rows[n].label or "none" for n in numbers)
        repeated = len(numbers) - len({" ".join(rows[n].text.casefold().split()) for n in numbers})
        cells = [split, f"{len(numbers):,}", ", ".join(f"{n:,} {label}" for label, n in sorted(labels.items()))]
        cells += [f"{min(words)}, {median(words):g}, {max(words)}", f"{repeated:,}"]
        table.append(cells + [f"{sum(n in found for n in numbers):,}" for found in (within, elsewhere)])
    print(command_line.columns([heads, *table]))


def print_leaks(rows: list[AuditedRow], elsewhere: dict[int, int]) -> bool:
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
            print(f"  {row.split} {printable(row.id)}: {printable(row.text[:100])}")
        print()
    if groups:
        print(f"\nLEAK: {len(groups):,} groups stand in more than one split, the first is {groups[0]!r}")
    if len(by_split(rows)) > 1 and not elsewhere and not groups:
        end = ", and no group is in two splits." if homes else "."
        print(f"\nNo text has a near-duplicate in another split{end}")
    return bool(elsewhere or groups)


# Baselines


def print_baselines(rows: list[AuditedRow], answers: list[predictions.Prediction]) -> None:
    """Accuracy and AUC of the bags of words, and of a model's predictions, for each part of the last split."""
    splits = list(by_split(rows))
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
    truth = np.array([labels.index(row.label) if row.label in sizes else -1 for row in test])
    table = [["", "rows", *(head for name in probabilities for head in (name, "AUC"))]]
    for part, numbers in easiest_first(test, probabilities["bag of words"].argmax(axis=1) == truth):
        table.append([", ".join(part) or "all", f"{len(numbers):,}"])
        for of_labels in probabilities.values():
            table[-1] += accuracy_and_auc(of_labels[numbers], truth[numbers])
    print(command_line.columns(table))


def easiest_first(test: list[AuditedRow], right: np.ndarray) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """The parts of the rows and the numbers of their rows: all, then each part before its own parts."""
    members = defaultdict(list)
    for number, row in enumerate(test):
        for depth in range(len(row.by) + 1):
            members[row.by[:depth]].append(number)
    rank = {part: (-right[numbers].mean(), part) for part, numbers in members.items()}
    for part in sorted(members, key=lambda part: [rank[part[: depth + 1]] for depth in range(len(part))]):
        yield part, members[part]


def accuracy_and_auc(probabilities: np.ndarray, truth: np.ndarray) -> tuple[str, str]:
    """Accuracy with its exact 95 % interval and how many rows had no answer; AUC of the second of two labels, or "-".

    `probabilities` [n, labels] are NaN in rows without an answer, `truth` [n] are numbers of labels.
    """
    answered = ~np.isnan(probabilities[:, 0])
    lost, probabilities, truth = int((~answered).sum()), probabilities[answered], truth[answered]
    if not len(truth):
        return "no answers", "-"
    right = int((probabilities.argmax(axis=1) == truth).sum())
    low, high = metrics.exact_interval(right, len(truth))
    accuracy = f"{right / len(truth):.3f} [{low:.3f}, {high:.3f}]" + (f", {lost} without" if lost else "")
    auc = metrics.auroc(probabilities[:, 1], truth == 1) if probabilities.shape[1] == 2 else math.nan
    return accuracy, "-" if math.isnan(auc) else f"{auc:.3f}"


def bag_of_words(
    train: list[AuditedRow], test: list[AuditedRow], labels: list[str], without_domain_words: bool = False
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


def domain_words(counts: csr_array, rows: list[AuditedRow]) -> np.ndarray:
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


def model_probabilities(answers: list[predictions.Prediction], test: list[AuditedRow], labels: list[str]) -> np.ndarray:
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


if __name__ == "__main__":
    command_line.run(main)
