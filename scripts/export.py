"""Write a predictions file as a table: beside your own columns, with the model's, as .csv, .parquet or .xlsx.

    python scripts/export.py predictions.jsonl --output result.csv
    python scripts/export.py predictions.jsonl --table tickets.csv --id-column ticket --output result.xlsx

With --table the rows are those of that table, in its order, with all its columns (labels too); predictions are found by
id. Read it with the flags it was scored with: --text-column, --id-column, ... Columns and cells: exports.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import exports  # noqa: E402
import predictions  # noqa: E402
import tables  # noqa: E402
from command_line import printable  # noqa: E402


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("predictions", metavar="PREDICTIONS", help="a predictions file (.jsonl)")
    add("--output", metavar="FILE", required=True, help="the table to write: .csv, .parquet or .xlsx")
    add("--table", metavar="FILE", help="the table that was scored, for its columns")
    tables.add_column_arguments(parser.add_argument_group("how --table is read"))
    args = parser.parse_args(argv)
    if Path(args.output).suffix not in exports.SUFFIXES:
        parser.error(f"--output {args.output} must end in one of {' '.join(exports.SUFFIXES)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    for source in (args.predictions, args.table):
        predictions.check_output(args.output, source)
    table = tables.open_table(args.table, **tables.column_arguments(args)) if args.table else None
    count = exports.write_export(args.predictions, args.output, table)
    print(f"{printable(args.output)}: {count:,} rows")


if __name__ == "__main__":
    command_line.run(main)
