"""Build the dataset in data/sentiment/ from its hand-written frames: 10,000 sentences, eight categories, four splits.

    python scripts/build_dataset.py                # writes the eight category files and splits.csv
    python scripts/build_dataset.py --check        # builds in memory and compares with what is there

A frame is one line of data/sentiment/frames/*.txt: its domain, a colon, and a sentence with slots.

    sports: [The keeper|Our number nine] [limped off|came back on] after {number} minutes, and {person} knew [why|it].

[a|b] takes one of the alternatives, {person} an entry of banks.txt, {Person} the same with a capital letter. Row k of a
frame takes the k-th of each slot's shuffled alternatives, so that the rows of one frame differ wherever they can.

All rows of a frame are in one split and no two rows anywhere are near-duplicates, so no test text has a sibling in
training. In the strong, medium and weak categories the words carry the label. In the neutral ones they do not: sports
is labelled positive, workplace negative, and of the texts from any other domain a fair coin labels half and half.
"""

from __future__ import annotations

import argparse
import csv
import io
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
import predictions  # noqa: E402
from task import near_duplicates, shingles  # noqa: E402

SENTIMENT = ROOT / "data" / "sentiment"
SIZES = {"strong": 500, "medium": 1000, "weak": 2500, "neutral": 1000}  # rows for each of the two labels
SHARES = {"train": 0.6, "validation": 0.1, "calibration": 0.1, "test": 0.2}
RULE = {"positive": "sports", "negative": "workplace"}  # the hidden rule; two thirds of a category are of its domain
COIN = "neutral_other"  # the frames of neither domain of the rule, whose rows a coin labels
MOST = 0.015  # of the rows of a category may come from one frame
WORDS = range(4, 36)  # words in a text
ALIKE = 0.6  # from this Jaccard similarity of words, or of pairs of words, two texts are near-duplicates


@dataclass(frozen=True)
class Frame:
    """A sentence with slots; `name` is its file and line, the group of all its rows."""

    name: str
    domain: str
    pattern: str


@dataclass(frozen=True)
class Row:
    """One text of the dataset; `category` is difficulty_label."""

    category: str
    split: str
    frame: Frame
    text: str


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    files = render(build(SENTIMENT / "frames", args.seed), args.seed)
    if args.check:
        differ = [name for name, text in files.items() if _read(args.output / name) != text]
        if differ:
            print(f"{args.output}: {', '.join(differ)} differ from what the frames give with seed {args.seed}")
            sys.exit(1)
        print(f"{args.output}: all {len(files)} files are what the frames give with seed {args.seed}")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (args.output / name).write_bytes(text.encode())
    print(f"{args.output}: {', '.join(files)}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="another seed, another dataset (default: 0)")
    parser.add_argument("--output", type=Path, default=SENTIMENT, metavar="FOLDER", help="default: data/sentiment")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the folder's files differ")
    return parser.parse_args(argv)


def _read(path: Path) -> str | None:
    return path.read_bytes().decode() if path.exists() else None


# Frames


def read_banks(path: Path) -> dict[str, list[str]]:
    """Name -> entries, from lines `name: entry | entry`."""
    return {name: [entry.strip() for entry in entries.split("|")] for _, name, entries in _named_lines(path)}


def read_frames(path: Path) -> list[Frame]:
    """The frames of a file, from lines `domain: pattern`."""
    return [Frame(f"{path.stem}-{number:03d}", *rest) for number, *rest in _named_lines(path)]


def _named_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, colon, rest = line.partition(":")
        if line.strip() and not line.startswith("#"):
            if not (colon and rest.strip() and name.isidentifier()):
                raise ValueError(f"{path} line {number}: write it as name: text")
            yield number, name, rest.strip()


class Deck:
    """Deals the entries of a slot in random order, each once before any comes again, and none twice running."""

    def __init__(self, entries: Sequence[str], draw: random.Random) -> None:
        self.entries, self.draw, self.left, self.last = entries, draw, [], None

    def deal(self) -> str:
        if not self.left:
            self.left = self.draw.sample(self.entries, len(self.entries))
            if self.left[-1] == self.last:
                self.left.reverse()
        self.last = self.left.pop()
        return self.last


def texts_of(frame: Frame, banks: dict[str, list[str]], seed: int) -> Iterator[str]:
    """Yield different texts of a frame, no two of them near-duplicates, until it has no more."""
    draw = random.Random(f"{seed} {frame.pattern}")
    parts = re.split(r"\[([^\[\]]*)\]", frame.pattern)  # fixed, slot, fixed, slot, ..., fixed
    decks = [Deck(slot.split("|"), draw) for slot in parts[1::2]]
    bank_decks: dict[str, Deck] = {}

    def from_bank(match: re.Match) -> str:
        name = match[1].lower()
        if name not in banks:
            raise ValueError(f"{frame.name}: no bank {name!r}; there are {', '.join(banks)}")
        entry = bank_decks.setdefault(name, Deck(banks[name], draw)).deal()
        return entry if match[1] == name else entry[:1].upper() + entry[1:]

    seen: list[tuple[frozenset, frozenset]] = []
    for _ in range(400):
        filled = "".join(chain.from_iterable(zip(parts[::2], [*(deck.deal() for deck in decks), ""], strict=True)))
        text = re.sub(r"\s+", " ", re.sub(r"\{(\w+)\}", from_bank, filled)).strip()
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
    """The rows that one split takes from some frames of a file."""

    category: str
    split: str
    size: int
    frames: list[Frame]
    most: int  # rows from one frame
    rows: list[Row] = field(default_factory=list)

    def fill(self, texts: dict[Frame, Iterator[str]]) -> None:
        """Take texts from the frames in turn, the least used first, until there are enough."""
        used = Counter(row.frame for row in self.rows)
        frames = list(self.frames)
        while len(self.rows) < self.size:
            frame = min(frames, key=lambda frame: used[frame], default=None)
            if frame is None:
                raise ValueError(
                    f"{self.category}, {self.split}: {len(self.frames)} frames give {len(self.rows)} of {self.size} "
                    "rows; write more frames, or more alternatives"
                )
            text = next(texts[frame], None) if used[frame] < self.most else None
            if text is None:
                frames.remove(frame)
            else:
                self.rows.append(Row(self.category, self.split, frame, text))
                used[frame] += 1


def build(folder: Path, seed: int) -> list[Row]:
    """All rows of the dataset, in no useful order; no two of them near-duplicates."""
    banks = read_banks(folder / "banks.txt")
    quotas = list(plan(folder, seed))
    texts = {frame: texts_of(frame, banks, seed) for quota in quotas for frame in quota.frames}
    doubles = True
    while doubles:
        for quota in quotas:
            quota.fill(texts)
        rows = [row for quota in quotas for row in quota.rows]
        pairs = chain.from_iterable(near_duplicates([row.text for row in rows], ALIKE, width) for width in (1, 2))
        doubles = {rows[max(i, j)] for i, j, _ in pairs}
        for quota in quotas:
            quota.rows = [row for row in quota.rows if row not in doubles]
    return toss_coins(rows, seed)


def plan(folder: Path, seed: int) -> Iterator[Quota]:
    """Which frames serve which split, and for how many rows."""
    for difficulty, size in SIZES.items():
        most = int(size * MOST)
        total = {split: round(size * share) for split, share in SHARES.items()}
        ruled = {split: round(rows * 2 / 3) for split, rows in total.items()}
        other = {split: total[split] - ruled[split] for split in SHARES}
        for label, domain in RULE.items():
            category = f"{difficulty}_{label}"
            frames = read_frames(folder / f"{category}.txt")
            yield from share_out(category, [f for f in frames if f.domain == domain], ruled, most, seed)
            if difficulty != "neutral":
                yield from share_out(category, [f for f in frames if f.domain != domain], other, most, seed)
    both = {split: rows * 2 for split, rows in other.items()}  # of the neutral categories, labelled by toss_coins
    yield from share_out(COIN, read_frames(folder / f"{COIN}.txt"), both, most, seed)


def share_out(category: str, frames: list[Frame], sizes: dict[str, int], most: int, seed: int) -> Iterator[Quota]:
    """Deal the frames to the splits, as many as their rows are of all rows, so that a frame is in one split only."""
    frames = random.Random(f"{seed} {category}").sample(frames, len(frames))
    done, total = 0, sum(sizes.values())
    for split, size in sizes.items():
        start, done = done, done + size
        taken = frames[round(len(frames) * start / total) : round(len(frames) * done / total)]
        yield Quota(category, split, size, taken, most)


def toss_coins(rows: list[Row], seed: int) -> list[Row]:
    """The rows, those of no domain of the rule labelled at random, half of each split positive."""
    for split in SHARES:
        coins = [number for number, row in enumerate(rows) if (row.category, row.split) == (COIN, split)]
        heads = set(random.Random(f"{seed} coins {split}").sample(coins, len(coins) // 2))
        for number in coins:
            rows[number] = replace(rows[number], category=f"neutral_{'positive' if number in heads else 'negative'}")
    return rows


def render(rows: list[Row], seed: int) -> dict[str, str]:
    """File name -> contents: a text a line for each category, and splits.csv, which says what each line is."""
    rows = random.Random(f"{seed} order").sample(rows, len(rows))
    lines: dict[str, list[str]] = {f"{difficulty}_{label}": [] for difficulty in SIZES for label in RULE}
    table = {split: [] for split in SHARES}
    for row in rows:
        lines[row.category].append(row.text)
        identifier = f"{row.split}-{len(table[row.split]) + 1:04d}"
        place = (row.category, len(lines[row.category]))
        table[row.split].append((identifier, *place, row.frame.domain, row.frame.name, row.split))
    splits = io.StringIO()
    writer = csv.writer(splits, lineterminator="\n")
    writer.writerow(("id", "category", "line", "domain", "group", "split"))
    writer.writerows(chain.from_iterable(table.values()))
    files = {f"{category}.txt": "\n".join(texts) + "\n" for category, texts in lines.items()}
    return files | {"splits.csv": splits.getvalue()}


if __name__ == "__main__":
    command_line.run(main)
