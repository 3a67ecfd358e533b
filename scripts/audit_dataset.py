"""Look for what spoils a labelled table: repeats, near-duplicates across splits, labels that a bag of words can guess.

    python scripts/audit_dataset.py                                  # the four splits of our own dataset
    python scripts/audit_dataset.py train.csv test.csv               # yours; each file is a split
    python scripts/audit_dataset.py all.csv --split-column split     # yours, one file
    python scripts/audit_dataset.py --predictions predictions.jsonl  # a model's numbers on the last split beside it
    python scripts/audit_dataset.py train.csv test.csv --write-clean clean.csv    # test.csv without what leaks

Two texts are near-duplicates when the Jaccard similarity of their word pairs is at least --threshold. Across splits
they leak: what was learned by heart is counted as understood. So does a group that stands in two splits.

The baseline is a logistic regression on a bag of words, trained on the first split and tested on the last (with one
split: cross-validated, near-duplicates kept in one fold). Where it does well, the label needs no understanding.
Without domain words: without those of three rows or more that are at least twice as frequent in one domain as in the
others, among texts of the same label. Intervals of accuracy are exact binomial ones and take the rows as independent.
It learns from at most 50,000 rows and is tested on as many, drawn at random by --seed.

--write-clean writes the last split, with all columns, without the rows that have a near-duplicate in another split or
whose group stands in another one. Repeats within the split stay. Nothing else is written. Exit code: 0 clean, 1 the
splits leak (also where a clean file was written), 2 bad input.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import shutil
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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
from files import whole_file  # noqa: E402
from near_duplicates import duplicate_groups, partners, words_of  # noqa: E402
from tables import Example, Table, open_table  # noqa: E402

if TYPE_CHECKING:
    from scipy.sparse import csr_array

OURS = ["data:train", "data:validation", "data:calibration", "data:test"]
SHOWN = 5  # leaking texts that are printed
FOLDS = 5
LEARNED = 50_000  # the most rows that a baseline learns from, and that it is tested on
MANY_SPLITS = 100


@dataclass(frozen=True, slots=True)
class TableRow:
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
    if args.write_clean:
        for file in args.files:
            predictions.check_output(args.write_clean, file)
    opened = [open_table(file, **tables.column_arguments(args)) for file in args.files]
    wanted = {"split": args.split_column, "group": args.group_column, "domain": args.domain_column}
    rows = list(chain.from_iterable(read_audited(table, wanted, args.by) for table in opened))
    splits = by_split(rows)
    if len(splits) > MANY_SPLITS:
        raise ValueError(f"{len(splits):,} splits, the first {next(iter(splits))!r}: at most {MANY_SPLITS}")
    if args.write_clean and len(splits) < 2:
        raise ValueError("--write-clean leaves out what stands in another split, and there is only one")
    for split, numbers in splits.items():
        predictions.check_ids([rows[number].id for number in numbers], split)
    texts, sides = (row.text for row in rows), [row.split for row in rows]
    within, elsewhere = partners(texts, sides, args.threshold, args.shingle)
    shared = shared_groups(rows)
    print_splits(rows, within, elsewhere)
    print_leaks(rows, elsewhere, shared)
    if args.write_clean:
        write_clean(args.write_clean, opened, rows, elsewhere, shared, args.overwrite)
    print_baselines(rows, answers, args.seed)
    sys.exit(1 if shared or (elsewhere >= 0).any() else 0)


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
    add("--write-clean", metavar="FILE", help="a .csv for the last split without the rows that leak")
    add("--overwrite", action="store_true", help="replace a --write-clean that is there with another content")
    args = parser.parse_args(argv)
    if args.write_clean is not None and not args.write_clean.endswith(".csv"):
        parser.error(f"--write-clean {args.write_clean}: a file that ends in .csv")
    if not 0 < args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: a similarity above 0 and at most 1")
    if len(set(args.files)) < len(args.files):
        parser.error("a file is given twice")
    if args.shingle < 1:
        parser.error(f"--shingle {args.shingle}: at least one word")
    if args.sample is not None:
        parser.error("--sample: an audit reads every row")
    return args


def read_audited(table: Table, wanted: Mapping[str, str | None], by: Sequence[str] | None) -> Iterator[TableRow]:
    """The rows of a table, which is a split of its own unless `wanted` names a column of splits.

    `wanted` names the columns of split, group and domain.
    """
    for example, cells in table.with_columns():
        for name in (*wanted.values(), *(by or ())):
            if name and name not in cells:
                raise ValueError(f"{table.source}: no column {name!r}; it has {', '.join(map(str, cells))}")
        split = sys.intern(str(cells[wanted["split"]])) if wanted["split"] else table.source
        group, domain = (cells.get(wanted[role] or role) or None for role in ("group", "domain"))
        parts = tuple(sys.intern(str(cells[name])) for name in by or ("difficulty", "part") if name in cells)
        yield TableRow(split, example.id, example.text, example.label, group, domain, parts)


def by_split(rows: Sequence[TableRow]) -> dict[str, list[int]]:
    """split -> numbers of its rows, in order."""
    splits = defaultdict(list)
    for number, row in enumerate(rows):
        splits[row.split].append(number)
    return splits


# Within the terminal's width


def width() -> int:
    """How many characters a line may have; 120 where there is no terminal."""
    return shutil.get_terminal_size((120, 24)).columns


def shortened(text: str, length: int) -> str:
    """The text, or as much of its end as is `length` long: of paths that tells more."""
    return text if len(text) <= length else "..." + text[3 - length :]


def wrapped(text: str) -> str:
    """A sentence in as many lines as it needs."""
    return textwrap.fill(printable(text), width(), subsequent_indent="  ", break_on_hyphens=False)


def fits(text: str) -> bool:
    return max(map(len, text.splitlines())) <= width()


def stacked(rows: Sequence[Sequence[str]]) -> str:
    """A table on the terminal; where it is too wide, some of its columns, and the others below."""
    whole = command_line.columns(rows)
    if fits(whole):
        return whole
    first = width() // 3
    rows = [[shortened(row[0], first), *(shortened(cell, width() - first - 2) for cell in row[1:])] for row in rows]
    parts, start = [], 1
    while start < len(rows[0]):
        end = len(rows[0])
        while end > start + 1 and not fits(command_line.columns([[row[0], *row[start:end]] for row in rows])):
            end -= 1
        parts.append(command_line.columns([[row[0], *row[start:end]] for row in rows]))
        start = end
    return "\n\n".join(parts)


# Repeats and leaks


def shared_groups(rows: Iterable[TableRow]) -> set[object]:
    """The groups that stand in more than one split."""
    home: dict[object, str] = {}
    return {row.group for row in rows if row.group is not None and home.setdefault(row.group, row.split) != row.split}


def print_splits(rows: list[TableRow], within: np.ndarray, elsewhere: np.ndarray) -> None:
    """One line a split: rows, labels, words, and how many texts have a repeat or a near-duplicate."""
    heads = ["split", "rows", "labels", "words: min, median, max", "repeated", "alike in it", "alike in others"]
    table, labels_of = [heads], {}
    for split, numbers in by_split(rows).items():
        words = [len(rows[n].text.split()) for n in numbers]
        labels_of[split] = Counter(rows[n].label or "none" for n in numbers)
        listed = ", ".join(f"{n:,} {label}" for label, n in sorted(labels_of[split].items()))
        repeated = len(numbers) - len({" ".join(rows[n].text.casefold().split()) for n in numbers})
        cells = [split, f"{len(numbers):,}", listed, f"{min(words)}, {median(words):g}, {max(words)}", f"{repeated:,}"]
        table.append(cells + [f"{(found[numbers] >= 0).sum():,}" for found in (within, elsewhere)])
    if fits(command_line.columns(table)):
        print(command_line.columns(table))
        return
    for cells, labels in zip(table[1:], labels_of.values(), strict=True):
        cells[2] = f"{len(labels):,}"
    print(stacked(table) + "\n")
    for split, labels in labels_of.items():
        print(wrapped(f"Labels of {split}: {largest_and_smallest(labels)}"))


def largest_and_smallest(labels: Counter) -> str:
    """The three labels with the most rows, and the three with the fewest."""
    ordered = [f"{n:,} {label}" for label, n in labels.most_common()]
    if len(ordered) > 6:
        ordered[3:-3] = [f"... {len(ordered) - 6:,} more ..."]
    return ", ".join(ordered)


def print_leaks(rows: list[TableRow], elsewhere: np.ndarray, groups: Collection[object]) -> None:
    """Say what stands in two splits."""
    leaking = np.flatnonzero(elsewhere >= 0)
    if len(leaking):
        print("\n" + wrapped(f"LEAK: {len(leaking):,} rows have a near-duplicate in another split. The first:"))
    for number in leaking[:SHOWN]:
        for row in (rows[number], rows[elsewhere[number]]):
            line = f"  {row.split} {printable(row.id)}: {printable(row.text[:100])}"
            if len(line) > width():
                line = f"  {shortened(row.split, width() // 3)} {printable(row.id)}: {printable(row.text[:100])}"
            print(line[: width()])
        print()
    if groups:
        first = next(row.group for row in rows if row.group in groups)
        told = f"LEAK: {len(groups):,} groups stand in more than one split, the first is {first!r}"
        print("\n" + wrapped(told))
    if len(by_split(rows)) > 1 and not len(leaking) and not groups:
        has_groups = any(row.group is not None for row in rows)
        end = ", and no group is in two splits." if has_groups else "."
        print("\n" + wrapped(f"No text has a near-duplicate in another split{end}"))


def write_clean(
    path: str,
    opened: Sequence[Table],
    rows: list[TableRow],
    elsewhere: np.ndarray,
    groups: Collection[object],
    overwrite: bool,
) -> None:
    """Write the last split's rows that do not leak, with all columns, and say how many were left out and why.

    ValueError where another table is there, unless `overwrite`.
    """
    last = rows[-1].split
    numbers = by_split(rows)[last]
    alike = {number for number in numbers if elsewhere[number] >= 0}
    of_groups = {number for number in numbers if rows[number].group in groups} - alike
    kept = set(numbers) - alike - of_groups
    if not kept:
        raise ValueError(f"--write-clean: no row of {last} would be left")

    def kept_rows() -> Iterator[Mapping[str, object]]:
        every: Iterator[tuple[Example, Mapping[str, object]]] = chain.from_iterable(t.with_columns() for t in opened)
        return (columns for number, (_, columns) in enumerate(every) if number in kept)

    names: dict[str, None] = {}  # in JSON Lines rows may have different ones
    for columns in kept_rows():
        names |= dict.fromkeys(columns)
    with whole_file(path, replaces=overwrite) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(kept_rows())
    told = f"{path}: {len(kept):,} of {len(numbers):,} rows of {last}. Left out: {len(alike):,} with a near-duplicate"
    told += f" in another split, {len(of_groups):,} more of a group that stands in another."
    print("\n" + wrapped(told))


# Baselines


def print_baselines(rows: list[TableRow], answers: list[predictions.Prediction], seed: int) -> None:
    """Accuracy and AUC of the bags of words, and of a model's predictions, for each part of the last split."""
    splits = list(by_split(rows))
    labelled = {split: [row for row in rows if row.split == split and row.label] for split in (splits[0], splits[-1])}
    train, test = (sampled_rows(labelled[split], seed) for split in (splits[0], splits[-1]))
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
    how = f"trained on {splits[0]}, {told_size(train, labelled[splits[0]])}"
    if len(splits) == 1:
        how = f"{FOLDS}-fold out-of-fold"
    tested = f"tested on {splits[-1]}, {told_size(test, labelled[splits[-1]])}"
    print("\n" + wrapped(f"Bag of words ({how}), {tested}. Accuracy with 95 % interval, and AUC:") + "\n")
    truth = np.array([labels.index(row.label) if row.label in sizes else -1 for row in test])
    table = [["", "rows", *(head for name in probabilities for head in (name, "AUC"))]]
    for part, numbers in easiest_first(test, probabilities["bag of words"].argmax(axis=1) == truth):
        table.append([", ".join(part) or "all", f"{len(numbers):,}"])
        for of_labels in probabilities.values():
            table[-1] += accuracy_and_auc(of_labels[numbers], truth[numbers])
    print(stacked(table))


def sampled_rows(rows: list[TableRow], seed: int) -> list[TableRow]:
    """The rows, or LEARNED of them at random in their order."""
    if len(rows) <= LEARNED:
        return rows
    return [rows[number] for number in sorted(random.Random(seed).sample(range(len(rows)), LEARNED))]


def told_size(sample: Sequence[TableRow], rows: Sequence[TableRow]) -> str:
    """How many rows there are, and of how many they were drawn."""
    return f"n = {len(sample):,}" + (f" of {len(rows):,}, drawn at random" if len(sample) < len(rows) else "")


def easiest_first(test: list[TableRow], right: np.ndarray) -> Iterator[tuple[tuple[str, ...], list[int]]]:
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
    train: list[TableRow], test: list[TableRow], labels: list[str], without_domain_words: bool = False
) -> np.ndarray:
    """Label probabilities [n, labels] of the test rows; out-of-fold ones where the test rows are the training rows."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    folds = [(range(len(train)), range(len(test)))]
    if train[0].split == test[0].split:
        groups = [row.group for row in train]
        if None in groups:
            groups = duplicate_groups(row.text for row in train)
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0).split(train, [r.label for r in train], groups)
    probabilities = np.zeros((len(test), len(labels)))
    for learn, answer in folds:
        lessons = [train[n] for n in learn]
        words = CountVectorizer(analyzer=words_of, binary=True)
        counts = words.fit_transform(row.text for row in lessons)
        used = ~domain_words(counts, lessons) if without_domain_words else np.ones(counts.shape[1], bool)
        model = LogisticRegression(max_iter=1000).fit(counts[:, used], [row.label for row in lessons])
        columns = [labels.index(label) for label in model.classes_]
        asked = words.transform(test[n].text for n in answer)[:, used]
        probabilities[np.ix_(list(answer), columns)] = model.predict_proba(asked)
    return probabilities


def domain_words(counts: csr_array, rows: list[TableRow]) -> np.ndarray:
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


def model_probabilities(answers: list[predictions.Prediction], test: list[TableRow], labels: list[str]) -> np.ndarray:
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
