"""Split a labelled table into parts that share no near-duplicate and no group, with the labels' shares of the whole.

    python scripts/split_table.py tickets.csv --parts train=.6 calibration=.2 test=.2
    python scripts/split_table.py tickets.csv --label-column team --groups customers.csv --output-dir parts

Writes tickets.train.csv, tickets.calibration.csv, ... with all columns, in the table's order, and prints the balance.
Texts that are alike (near_duplicates.py), and rows of one group, go to one part as a whole, so parts differ a
little from what was asked. The same --seed gives the same parts.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import predictions  # noqa: E402
import tables  # noqa: E402
from command_line import printable  # noqa: E402
from files import whole_file  # noqa: E402
from near_duplicates import duplicate_groups  # noqa: E402


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("table", metavar="TABLE", help="the labelled table")
    add(
        "--parts",
        metavar="NAME=SHARE",
        nargs="+",
        default=["train=.6", "calibration=.2", "test=.2"],
        help="default: %(default)s",
    )
    add("--output-dir", metavar="DIR", help="where the parts go (default: beside the table)")
    add("--overwrite", action="store_true", help="replace parts that are there with another content")
    tables.add_groups_argument(parser)
    tables.add_column_arguments(parser.add_argument_group("how the table is read"))
    return parser.parse_args(argv)


def shares_of(parts: Sequence[str]) -> dict[str, float]:
    """The parts' shares of the rows, scaled to sum to 1; ValueError for what is none."""
    shares = {}
    for part in parts:
        name, _, share = part.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise ValueError(f"--parts {part}: write it as NAME=SHARE, as train=.6") from None
        if not name.isidentifier() or not shares[name] > 0:
            raise ValueError(f"--parts {part}: a name of letters and a share above 0")
    if len(shares) < len(parts) or len(shares) < 2:
        raise ValueError("--parts needs two parts or more, each named once")
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def split(labels: Sequence[str | None], groups: Sequence[object], shares: Mapping[str, float], seed: int) -> list[str]:
    """The part of each row: whole groups, largest first, each to the part that lacks most of the group's labels.

    What a part lacks is told label by label against its share of the label's rows, so parts have the whole's balance.
    """
    members = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)
    order = list(members)
    np.random.default_rng(seed).shuffle(order)
    order.sort(key=lambda group: -len(members[group]))  # a stable sort: groups of one size stay shuffled
    total = Counter(labels)
    filled = {part: Counter() for part in shares}
    part_of = [""] * len(labels)
    for group in order:
        own = Counter(labels[number] for number in members[group])

        def lacking(part: str, own: Counter = own) -> float:
            """How far below its share a part is, in the labels of the group, weighed by their rows in it."""
            return sum(n * (shares[part] - filled[part][label] / total[label]) for label, n in own.items())

        chosen = max(shares, key=lacking)
        filled[chosen].update(own)
        for number in members[group]:
            part_of[number] = chosen
    return part_of


def write_parts(table: tables.Table, part_of: Sequence[str], paths: Mapping[str, Path], overwrite: bool) -> None:
    """Write each row, with all its columns, to its part; ValueError for a part that is there with another content."""
    for part, path in paths.items():
        with whole_file(path, replaces=overwrite) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
            writer = None
            for (_, columns), chosen in zip(table.with_columns(), part_of, strict=True):
                if chosen == part:
                    if writer is None:
                        writer = csv.writer(file)
                        writer.writerow(columns)
                    writer.writerow("" if value is None else value for value in columns.values())


def balance(
    labels: Sequence[str | None], part_of: Sequence[str], groups: Sequence[object], parts: Sequence[str]
) -> str:
    """Rows, groups and labels of each part; of many labels the commonest ten."""
    common = [label for label, _ in Counter(labels).most_common(10)]
    rows = [["part", "rows", "groups", *("no label" if label is None else label for label in common)]]
    for part in parts:
        own = [number for number, chosen in enumerate(part_of) if chosen == part]
        counts = Counter(labels[number] for number in own)
        shares = [f"{counts[label]} ({counts[label] / max(len(own), 1):.1%})" for label in common]
        rows.append([part, f"{len(own):,}", f"{len({groups[number] for number in own}):,}", *shares])
    lines = [command_line.columns(list(zip(*rows, strict=True)))]
    if len(set(labels)) > len(common):
        lines.append(f"... and {len(set(labels)) - len(common)} more labels")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    shares = shares_of(args.parts)
    source = Path(args.table)
    table = tables.open_table(args.table, **tables.column_arguments(args))
    examples = list(table)
    labels = [example.label for example in examples]
    groups = tables.groups_of(examples, args.groups)
    if args.groups:  # and what is alike across groups still belongs together
        groups = tables.joined_groups(groups, duplicate_groups(example.text for example in examples))
    part_of = split(labels, groups, shares, args.seed)
    folder = Path(args.output_dir) if args.output_dir else source.parent
    folder.mkdir(parents=True, exist_ok=True)
    stem = source.name.split(".")[0].replace(":", "_")  # of data:train, data_train
    paths = {part: folder / f"{stem}.{part}.csv" for part in shares}
    for path in paths.values():
        predictions.check_output(path, args.table)
    write_parts(table, part_of, paths, args.overwrite)
    if not any(labels):
        print("note: no row has a label to balance the parts by; --label-column names its column", file=sys.stderr)
    print(balance(labels, part_of, groups, list(shares)))
    print(*(printable(str(path)) for path in paths.values()), sep="\n")


if __name__ == "__main__":
    command_line.run(main)
