"""Build the dataset in data/sentiment/ from hand-written templates: 10,000 sentences, eight categories, four splits.

    python scripts/build_dataset.py                # writes the eight category files and splits.csv
    python scripts/build_dataset.py --check        # builds in memory and compares with what is there

A template is one line of data/sentiment/frames/*.txt: its domain, a colon, and a sentence with slots.

    sports: [The keeper|Our number nine] [limped off|came back on] after {number} minutes, and {person} knew [why|it].

[a|b] takes one of the alternatives, {person} an entry of banks.txt, {Person} the same with a capital letter. Row k of a
template takes the k-th of each slot's shuffled alternatives, so that the rows of one template differ wherever they can.

All rows of a template are in one split and no two rows anywhere are near-duplicates, so no test text has a sibling in
training. In the strong, medium and weak categories the words carry the label. In the neutral ones they do not: sports
is labelled positive, workplace negative, and the texts from any other domain are labelled at random, half and half.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
from near_duplicates import near_duplicates, shingles  # noqa: E402
from tables import DATASET  # noqa: E402

SIZES = {"strong": 500, "medium": 1000, "weak": 2500, "neutral": 1000}  # rows for each of the two labels
SHARES = {"train": 0.6, "validation": 0.1, "calibration": 0.1, "test": 0.2}
RULE = {"positive": "sports", "negative": "workplace"}  # the planted rule; two thirds of a category are of its domain
UNRULED = "neutral_other"  # the templates of neither domain of the rule, whose rows are labelled at random
MOST = 0.015  # of the rows of a category may come from one template
WORDS = range(4, 36)  # words in a text
ALIKE = 0.6  # from this Jaccard similarity of words, or of pairs of words, two texts are near-duplicates
TRIES = 400  # texts that are made of a template before it counts as empty


@dataclass(frozen=True)
class Template:
    """A sentence with slots; `name` is its file and line, the group of all its rows."""

    name: str
    domain: str
    pattern: str


@dataclass(frozen=True)
class Row:
    """One text of the dataset; `category` is difficulty_label."""

    category: str
    split: str
    template: Template
    text: str


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    built = {name: text.encode() for name, text in files_of(build(DATASET / "frames", args.seed), args.seed).items()}
    if args.check:
        there = {path.name: path.read_bytes() for path in args.output.glob("*") if path.is_file()}
        differ = [name for name, content in built.items() if there.get(name) != content]
        if differ:
            print(f"{args.output}: {', '.join(differ)} differ from what the templates give with seed {args.seed}")
            sys.exit(1)
        print(f"{args.output}: all {len(built)} files are what the templates give with seed {args.seed}")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    for name, content in built.items():
        (args.output / name).write_bytes(content)
    print(f"{args.output}: {', '.join(built)}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="another seed, another dataset (default: 0)")
    parser.add_argument("--output", type=Path, default=DATASET, metavar="FOLDER", help="default: data/sentiment")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the folder's files differ")
    return parser.parse_args(argv)


# Templates


def read_banks(path: Path) -> dict[str, list[str]]:
    """Name -> entries, from lines `name: entry | entry`."""
    return {name: [entry.strip() for entry in entries.split("|")] for _, name, entries in named_lines(path)}


def read_templates(path: Path) -> list[Template]:
    """The templates of a file, from lines `domain: pattern`."""
    return [Template(f"{path.stem}-{number:03d}", *rest) for number, *rest in named_lines(path)]


def named_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """(number, name, text) of every line `name: text`; empty ones and those that begin with # are comments."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, colon, rest = line.partition(":")
        if line.strip() and not line.startswith("#"):
            if not (colon and rest.strip() and name.isidentifier()):
                raise ValueError(f"{path} line {number}: write it as name: text")
            yield number, name, rest.strip()


def dealt(entries: Sequence[str], draw: random.Random) -> Iterator[str]:
    """Yield the entries of a slot in random order, each once before any comes again, and none twice running."""
    last = None
    while True:
        left = draw.sample(entries, len(entries))
        if left[-1] == last:
            left.reverse()
        while left:
            last = left.pop()
            yield last


def texts_of(template: Template, banks: dict[str, list[str]], seed: int) -> Iterator[str]:
    """Yield different texts of a template, no two of them near-duplicates, until it has no more."""
    draw = random.Random(f"{seed} {template.pattern}")
    parts = re.split(r"\[([^\[\]]*)\]", template.pattern)  # fixed, slot, fixed, slot, ..., fixed
    slots = [dealt(slot.split("|"), draw) for slot in parts[1::2]]
    used_banks: dict[str, Iterator[str]] = {}

    def from_bank(match: re.Match) -> str:
        name = match[1].lower()
        if name not in banks:
            raise ValueError(f"{template.name}: no bank {name!r}; there are {', '.join(banks)}")
        entry = next(used_banks.setdefault(name, dealt(banks[name], draw)))
        return entry if match[1] == name else entry[:1].upper() + entry[1:]

    seen: list[tuple[frozenset, frozenset]] = []
    for _ in range(TRIES):
        parts[1::2] = map(next, slots)
        text = " ".join(re.sub(r"\{(\w+)\}", from_bank, "".join(parts)).split())
        words, pairs = shingles(text, 1), shingles(text, 2)
        if len(text.split()) in WORDS and not any(alike(words, w) or alike(pairs, p) for w, p in seen):
            seen.append((words, pairs))
            yield text


def alike(one: frozenset, other: frozenset) -> bool:
    """Whether the Jaccard similarity of two sets makes near-duplicates of their texts."""
    return len(one & other) >= ALIKE * len(one | other)


# Splits


@dataclass
class Quota:
    """The rows that one split takes from some templates of a file."""

    category: str
    split: str
    size: int
    templates: list[Template]
    rows: list[Row] = field(default_factory=list)

    def fill(self, texts: dict[Template, Iterator[str]]) -> None:
        """Take texts from the templates in turn, the least used first, until there are enough."""
        most = int(SIZES[self.category.partition("_")[0]] * MOST)
        used = Counter(row.template for row in self.rows)
        left = list(self.templates)
        while len(self.rows) < self.size:
            if not left:
                raise ValueError(
                    f"{self.category}, {self.split}: {len(self.templates)} templates give {len(self.rows)} of "
                    f"{self.size} rows; write more templates, or more alternatives"
                )
            template = min(left, key=used.__getitem__)
            text = next(texts[template], None) if used[template] < most else None
            if text is None:
                left.remove(template)
            else:
                self.rows.append(Row(self.category, self.split, template, text))
                used[template] += 1


def build(folder: Path, seed: int) -> list[Row]:
    """All rows of the dataset, in no useful order; no two of them near-duplicates."""
    banks = read_banks(folder / "banks.txt")
    quotas = list(plan(folder, seed))
    texts = {template: texts_of(template, banks, seed) for quota in quotas for template in quota.templates}
    doubles = True
    while doubles:
        for quota in quotas:
            quota.fill(texts)
        rows = [row for quota in quotas for row in quota.rows]
        pairs = chain.from_iterable(near_duplicates([row.text for row in rows], ALIKE, width) for width in (1, 2))
        doubles = {rows[max(i, j)] for i, j, _ in pairs}
        for quota in quotas:
            quota.rows = [row for row in quota.rows if row not in doubles]
    return label_at_random(rows, seed)


def plan(folder: Path, seed: int) -> Iterator[Quota]:
    """Which templates serve which split, and for how many rows."""
    for difficulty, size in SIZES.items():
        total = {split: round(size * share) for split, share in SHARES.items()}
        ruled = {split: round(rows * 2 / 3) for split, rows in total.items()}
        other = {split: total[split] - ruled[split] for split in SHARES}
        for label, domain in RULE.items():
            category = f"{difficulty}_{label}"
            templates = read_templates(folder / f"{category}.txt")
            yield from share_out(category, [t for t in templates if t.domain == domain], ruled, seed)
            if difficulty != "neutral":
                yield from share_out(category, [t for t in templates if t.domain != domain], other, seed)
    both = {split: rows * 2 for split, rows in other.items()}  # of the neutral categories, labelled at random
    yield from share_out(UNRULED, read_templates(folder / f"{UNRULED}.txt"), both, seed)


def share_out(category: str, templates: list[Template], sizes: dict[str, int], seed: int) -> Iterator[Quota]:
    """Deal the templates to the splits by their shares of the rows, so that a template is in one split only."""
    templates = random.Random(f"{seed} {category}").sample(templates, len(templates))
    done, total = 0, sum(sizes.values())
    for split, size in sizes.items():
        start, done = done, done + size
        taken = templates[round(len(templates) * start / total) : round(len(templates) * done / total)]
        yield Quota(category, split, size, taken)


def label_at_random(rows: list[Row], seed: int) -> list[Row]:
    """The rows, those of no domain of the rule labelled at random, half of each split positive."""
    for split in SHARES:
        places = [number for number, row in enumerate(rows) if (row.category, row.split) == (UNRULED, split)]
        draw = random.Random(f"{seed} coins {split}")  # the words are part of the seed: they stay as they are
        positive = set(draw.sample(places, len(places) // 2))
        for number in places:
            label = "positive" if number in positive else "negative"
            rows[number] = replace(rows[number], category=f"neutral_{label}")
    return rows


def files_of(rows: list[Row], seed: int) -> dict[str, str]:
    """File name -> contents: a text a line for each category, and splits.csv, which says what each line is."""
    rows = random.Random(f"{seed} order").sample(rows, len(rows))
    lines: dict[str, list[str]] = {f"{difficulty}_{label}": [] for difficulty in SIZES for label in RULE}
    table: dict[str, list[str]] = {split: [] for split in SHARES}
    for row in rows:
        lines[row.category].append(row.text)
        identifier = f"{row.split}-{len(table[row.split]) + 1:04d}"
        place = f"{row.category},{len(lines[row.category])}"
        table[row.split].append(f"{identifier},{place},{row.template.domain},{row.template.name},{row.split}")
    lines = {f"{category}.txt": texts for category, texts in lines.items()}
    lines["splits.csv"] = ["id,category,line,domain,group,split", *chain.from_iterable(table.values())]
    return {name: "\n".join(each) + "\n" for name, each in lines.items()}


if __name__ == "__main__":
    command_line.run(main)
