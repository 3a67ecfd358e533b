"""Write a predictions file as a table: beside your own columns, with the model's, as .csv, .parquet or .xlsx.

    python scripts/export.py predictions.jsonl --output result.csv
    python scripts/export.py predictions.jsonl --table tickets.csv --id-column ticket --output result.xlsx
    python scripts/export.py --merge part-*.jsonl --table tickets.csv --output predictions.jsonl       # of --shard I/N

With --table the rows are those of that table, in its order, with all its columns (labels too); predictions are found by
id. Read it with the flags it was scored with: --text-column, --id-column, ... Columns and cells: exports.py. --merge
joins the outputs of --shard 1/N to N/N into one predictions file, in the table's order.
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
    add("predictions", metavar="PREDICTIONS", nargs="+", help="a predictions file (.jsonl); with --merge all shards")
    add("--output", metavar="FILE", required=True, help="the table to write: .csv, .parquet or .xlsx")
    add("--table", metavar="FILE", help="the table that was scored, for its columns")
    tables.add_column_arguments(parser.add_argument_group("how --table is read"))
    add("--merge", action="store_true", help="join the outputs of --shard into one predictions file (.jsonl)")
    add("--overwrite", action="store_true", help="replace a table that is no export")
    args = parser.parse_args(argv)
    if args.merge:
        if not args.table or Path(args.output).suffix != ".jsonl":
            parser.error("--merge needs --table, whose rows were scored, and an --output that ends in .jsonl")
        return args
    if len(args.predictions) > 1:
        parser.error("several predictions files are joined with --merge")
    if Path(args.output).suffix not in predictions.EXPORTS:
        parser.error(f"--output {args.output} must end in one of {' '.join(predictions.EXPORTS)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    for source in (*args.predictions, args.table):
        predictions.check_output(args.output, source)
    if not args.merge:
        exports.check_replaceable(args.output, args.overwrite)
    table = tables.open_table(args.table, **tables.column_arguments(args)) if args.table else None
    if args.merge:
        predictions.replace(args.output, exports.merged_shards(args.predictions, table))
        count = sum(1 for _ in predictions.iterate(args.output))
    else:
        count = exports.write_export(args.predictions[0], args.output, table)
    print(f"{printable(args.output)}: {count:,} rows")


if __name__ == "__main__":
    command_line.run(main)
