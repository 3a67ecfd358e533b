"""Tables of texts as people have them: every format, encoding and delimiter becomes rows of one kind.

    for example in read_examples("reviews.csv", text_column="review"):    # Example(id, text, label)
    table = open_table("reviews.csv", text_column=["title", "body"])       # the same, to be read as often as needed

    .csv .tsv .jsonl .json .parquet .xlsx .txt, each also .gz;  data:SPLIT, our own dataset;  hf:NAME[:SPLIT], the Hub's

Encoding and delimiter are found out (table_formats.py) and may be said. Rows are read one at a time, so memory does not
grow with the table (.json is read whole, and .xlsx held compressed).

A text stands on one side of every split and fold: `groups_of` numbers the rows that belong together, `check_disjoint`
refuses two tables that share a text; near_duplicates.py finds those that are alike.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from command_line import natural
from near_duplicates import duplicate_groups, partners
from table_formats import (
    DELIMITERS,
    SUFFIXES,
    CsvRecords,
    TextFormat,
    lines_of,
    open_bytes,
    suffix_of,
    text_format,
)

DATASET = Path(__file__).resolve().parent / "data" / "sentiment"  # ours; data/README.md tells how it was made


@dataclass(frozen=True)
class Example:
    """One text of a table; `label` is None when unknown."""

    id: str
    text: str
    label: str | None


@dataclass(frozen=True)
class Table:
    """A table to be read as often as needed: iterating yields its examples anew, one at a time."""

    source: str
    columns: Mapping[str, object] = field(default_factory=dict)  # keyword arguments of `read_examples`

    def __iter__(self) -> Iterator[Example]:
        return read_examples(self.source, **self.columns)

    def with_columns(self) -> Iterator[tuple[Example, Mapping[str, object]]]:
        """Each example with the whole row that it was read from."""
        return examples_with_columns(self.source, **self.columns)


def open_table(source: str, **columns: object) -> Table:
    """A table whose encoding and delimiter are found out once, and told on stderr where they are not the usual ones."""
    if suffix_of(source) in (".csv", ".tsv", ".txt", ".jsonl", ".json"):
        written = text_format(source, columns.get("encoding"), columns.get("delimiter"))
        if written.is_unusual and not (columns.get("encoding") or columns.get("delimiter")):
            print(f"reading {source} as {written}", file=sys.stderr)
        columns |= {"encoding": written.encoding, "delimiter": written.delimiter, "quoted": written.quoted}
    return Table(source, columns)


# Examples


def read_examples(source: str, **columns: object) -> Iterator[Example]:
    """Yield the rows of a table, one at a time, in its order; `columns` are those of `examples_with_columns`.

    Raises ValueError with file and line.
    """
    return (example for example, _ in examples_with_columns(source, **columns))


def examples_with_columns(
    source: str,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
    header: bool = True,
    label_map: Mapping[str, str] | None = None,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    encoding: str | None = None,
    delimiter: str | None = None,
    quoted: bool | None = None,
    skip_bad_rows: bool = False,
    text_template: str | None = None,
    where: Mapping[str, str] | None = None,
    shard: tuple[int, int] | None = None,
) -> Iterator[tuple[Example, Mapping[str, object]]]:
    """Yield each row of a table as an example and as it is, one at a time, in the table's order.

    Columns default to `text` (required), `label` and `id` (used when there, in any case); ids default to the row
    number, also for `id_column=""`. Several text columns are joined by a blank line; `text_template` with their names
    in braces puts them together otherwise. Without a header, columns are named 1, 2, ... and the text is column 1.
    `label_map` renames label values. Of the rows whose columns have the values of `where`, `limit` takes the first and
    `sample` so many at random, drawn by `seed`; of these `shard` (i, n) takes every nth, from the ith on. Raises
    ValueError with file and line.
    """
    rows = enumerate(read_rows(source, header, encoding, delimiter, quoted, skip_bad_rows), 1)
    rows = islice((row for row in rows if _has_values(*row[1], where or {})), limit)
    rows = rows if sample is None else sampled(rows, sample, seed)
    rows = rows if shard is None else islice(rows, shard[0] - 1, None, shard[1])
    columns = _Columns(_named_in(text_template) or text_column, label_column, id_column, header, text_template)
    number = 0
    for number, (place, row) in rows:
        example = columns.example(number, place, row)
        if label_map and example.label in label_map:
            example = Example(example.id, example.text, label_map[example.label])
        yield example, row
    if not number:
        asked = ", ".join(f"{column}={value}" for column, value in (where or {}).items())
        of_shard = " for shard {}/{}".format(*shard) if shard else ""
        raise ValueError(f"{source} has no rows" + (f" where {asked}" if asked else "") + of_shard)


def _has_values(place: str, row: Mapping[str, object], wanted: Mapping[str, str]) -> bool:
    """Whether a row's columns have these values; ValueError for a column that is not there."""
    for column, value in wanted.items():
        if column not in row:
            raise ValueError(f"{place}: no column {column!r} for --where; it has {', '.join(map(str, row))}")
        if str("" if row[column] is None else row[column]) != value:
            return False
    return True


class _Columns:
    """Which columns of a row are its text, its label and its id."""

    def __init__(
        self,
        text: str | Sequence[str] | None,
        label: str | None,
        id: str | None,
        header: bool,
        text_template: str | None,
    ) -> None:
        self.header, self.text_template = header, text_template
        self.texts = [text] if isinstance(text, str) else list(text or ["text" if header else "1"])
        self.label = label if label is not None or not header else "label"
        self.id = id if id is not None or not header else "id"
        self.wanted = {"text": bool(text), "label": label is not None, "id": id is not None}
        self.told: set[str] = set()

    def example(self, number: int, where: str, row: Mapping[str, object]) -> Example:
        """The example that a row holds."""
        texts = [self.cell(row, name, "text", where) for name in self.texts]
        if self.text_template:
            text = self.text_template.format_map(dict(zip(self.texts, texts, strict=True)))
        else:
            text = "\n\n".join(texts) if len(texts) == 1 else "\n\n".join(filter(str.strip, texts))
        label = self.cell(row, self.label, "label", where) if self.label else ""
        identifier = self.cell(row, self.id, "id", where, empty=None) if self.id else None
        if identifier == "":
            raise ValueError(f'{where}: the id is empty; --id-column "" numbers the rows')
        return Example(str(number) if identifier is None else identifier, text, label.strip() or None)

    def cell(self, row: Mapping[str, object], name: str, role: str, where: str, empty: str | None = "") -> str | None:
        """The value of a column as it is written, `empty` for null and for a column that need not be there."""
        if name not in row:
            name = self.in_other_case(row, name, role, where)
        value = row[name] if name is not None else None
        if value is None:
            return empty
        if isinstance(value, bool | int | float | str):
            return str(value)
        raise ValueError(f"{where}: the {role} is {str(value)[:60]!r}, not a string")

    def in_other_case(self, row: Mapping[str, object], name: str, role: str, where: str) -> str | None:
        """The one column whose name differs by case only, with a note; None where an optional one is not there."""
        alike = [column for column in row if str(column).strip().casefold() == name.casefold()]
        if len(alike) == 1:
            if name not in self.told:
                self.told.add(name)
                print(f"note: taking column {alike[0]!r} for the {role}", file=sys.stderr)
            return alike[0]
        if role != "text" and not self.wanted[role]:
            return None
        advice = f"name one with --{role}-column"
        if self.header:
            advice += ", or say --no-header if the first line is a row already"
        raise ValueError(f"{where}: no column {name!r} for the {role}; it has {', '.join(map(str, row))}; {advice}")


def _named_in(template: str | None) -> list[str]:
    return list(dict.fromkeys(re.findall(r"\{([^{}]+)\}", template or "")))


def sampled(rows: Iterable[tuple[int, object]], size: int, seed: int = 0) -> list[tuple[int, object]]:
    """`size` of the numbered rows, any set equally likely, in their order (reservoir sampling)."""
    draw = random.Random(seed)
    kept: list[tuple[int, object]] = []
    for count, numbered in enumerate(rows, 1):
        if len(kept) < size:
            kept.append(numbered)
        elif (place := draw.randrange(count)) < size:
            kept[place] = numbered
    return sorted(kept, key=lambda pair: pair[0])


def check_text(text: str) -> None:
    """ValueError for a text that no model can be asked about: an empty one, or one with half a character in it."""
    if not text.strip():
        raise ValueError("the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode (a lone surrogate)") from None


# Rows


def read_rows(
    source: str | Path,
    header: bool = True,
    encoding: str | None = None,
    delimiter: str | None = None,
    quoted: bool | None = None,
    skip_bad_rows: bool = False,
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """(where it stands, column -> value) of every row, whatever the format."""
    source = str(source)
    if source.startswith("hf:"):
        return _hub_rows(source)
    if source.startswith("data:"):
        return _dataset_rows(source)
    suffix = suffix_of(source)
    if suffix == ".parquet":
        return _parquet_rows(source)
    if suffix == ".xlsx":
        return _sheet_rows(source, header)
    written = text_format(source, encoding, delimiter, quoted)
    if suffix == ".json":
        return _json_list_rows(source, written)
    if suffix == ".jsonl":
        return _json_rows(source, written)
    if written.delimiter is None:
        return _text_rows(source, written, header)
    return _delimited_rows(source, written, header, skip_bad_rows)


def _delimited_rows(
    source: str, written: TextFormat, header: bool, skip_bad_rows: bool
) -> Iterator[tuple[str, dict[str, str]]]:
    names: list[str] | None = None
    skipped: list[int] = []
    records = CsvRecords(source, written)
    for line, cells, problem in records:
        where = f"{source} line {line}"
        if names is None and not problem:
            if not cells:
                continue
            names = cells if header else _numbered(cells, where)
            if header:
                _check_names(names, where)
                continue
        if not cells and not problem:
            if len(names) > 1:
                continue
            cells = [""]  # a blank line of a one-column table is an empty text
        if not problem and len(cells) != len(names):
            problem = f"{len(cells)} cells where {len(names)} are expected"
        if not problem:
            yield where, dict(zip(names, cells, strict=True))
        elif skip_bad_rows and names is not None:
            skipped.append(line)
            records.skip_one_line()
        else:
            raise ValueError(
                f"{where}: {problem} (read as {written}); --delimiter and --encoding say otherwise, --skip-bad-rows "
                "leaves such rows out"
            )
    if skipped:
        first = ", ".join(map(str, skipped[:5])) + (", ..." if skipped[5:] else "")
        print(f"note: {len(skipped):,} bad rows of {source} left out, at line {first}", file=sys.stderr)


def _check_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{where}: two columns have the name {twice!r}; if this line is a row already, say --no-header"
        )


def _numbered(cells: Sequence[str], where: str) -> list[str]:
    """The names of columns that no header names: 1, 2, ...

    Tables made here of such a table (split_table.py, label_next.py and others) have these names in a header, and with
    --no-header that line would be taken for a row.
    """
    names = [str(n) for n in range(1, len(cells) + 1)]
    own = [cell for cell in cells if cell != "purpose"]  # which label_next.py adds
    if len(own) > 1 and own == names[: len(own)]:
        raise ValueError(f"{where}: this line names the columns {', '.join(own)}; leave --no-header out")
    return names


def _json_rows(source: str, written: TextFormat) -> Iterator[tuple[str, dict]]:
    for number, line in lines_of(source, written.encoding):
        where = f"{source} line {number}"
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from None
            yield where, _json_object(row, where)


def _json_list_rows(source: str, written: TextFormat) -> Iterator[tuple[str, dict]]:
    try:
        rows = json.loads("".join(line for _, line in lines_of(source, written.encoding)))
    except RecursionError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    except ValueError as error:
        advice = "; one object a line is .jsonl" if "Extra data" in str(error) else ""
        raise ValueError(f"{source} is not JSON: {error}{advice}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{source} is not a list of JSON objects")
    for number, row in enumerate(rows, 1):
        where = f"{source} row {number}"
        yield where, _json_object(row, where)


def _json_object(row: object, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object")
    # Booleans as they are written there.
    return {name: str(value).lower() if isinstance(value, bool) else value for name, value in row.items()}


def _text_rows(source: str, written: TextFormat, header: bool) -> Iterator[tuple[str, dict[str, str]]]:
    for number, line in lines_of(source, written.encoding):
        yield f"{source} line {number}", {"text" if header else "1": line.rstrip("\r\n")}


def _parquet_rows(source: str) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        if source.lower().endswith(".gz"):
            with open_bytes(source) as raw:
                file = ParquetFile(io.BytesIO(raw.read()))
        else:
            file = ParquetFile(source, pre_buffer=False, buffer_size=1 << 16)  # else it holds a whole row group
        number = 0
        for batch in file.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield f"{source} row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{source} is not a readable Parquet file: {error}") from None


def _sheet_rows(source: str, header: bool) -> Iterator[tuple[str, dict]]:
    """The rows of the first sheet. A formula is the value saved with it, or, without one, the text it is written as."""
    from zipfile import BadZipFile

    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    with open_bytes(source) as raw:
        content = raw.read()
    try:
        sheets = [
            load_workbook(io.BytesIO(content), read_only=True, data_only=values)
            .worksheets[0]
            .iter_rows(values_only=True)
            for values in (True, False)
        ]
    except (BadZipFile, InvalidFileException, KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{source} is not a readable .xlsx file: {error}") from None
    names: list[str] | None = None
    for number, (values, formulas) in enumerate(zip(*sheets, strict=True), 1):
        where = f"{source} row {number}"
        cells = [formula if value is None else value for value, formula in zip(values, formulas, strict=True)]
        if names is None:
            names = ["" if cell is None else str(cell) for cell in cells]
            if header:
                _check_names([name for name in names if name], where)
                continue
            names = _numbered(names, where)
        if any(cell is not None for cell in cells):
            cells += [None] * (len(names) - len(cells))
            yield where, {name: cell for name, cell in zip(names, cells, strict=False) if name}


def _dataset_rows(source: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of one split: the columns of splits.csv, the text it points to, and the two parts of the category."""
    wanted = source.removeprefix("data:")
    rows = list(read_rows(DATASET / "splits.csv"))
    texts: dict[str, dict[str, Mapping]] = {}  # category -> line number -> row
    if wanted not in (splits := list(dict.fromkeys(row["split"] for _, row in rows))):
        raise ValueError(f"{source}: no such split; the dataset has {', '.join(splits)}")
    for where, row in rows:
        if row["split"] == wanted:
            category, line = row["category"], row["line"]
            if category not in texts:
                lines = enumerate(read_rows(DATASET / f"{category}.txt"), 1)
                texts[category] = {str(n): text for n, (_, text) in lines}
            if line not in texts[category]:
                raise ValueError(
                    f"{where}: {category}.txt has no line {line!r}; scripts/build_dataset.py makes it anew"
                )
            difficulty, _, label = category.partition("_")
            part = "domain" if row["domain"] in ("sports", "workplace") else "other"  # under the planted rule, or not
            yield where, row | texts[category][line] | {"label": label, "difficulty": difficulty, "part": part}


def _hub_rows(source: str) -> Iterator[tuple[str, dict]]:
    from datasets import ClassLabel, get_dataset_split_names, load_dataset

    name, _, split = source.removeprefix("hf:").partition(":")
    try:
        splits = get_dataset_split_names(name)
    except ConnectionError:
        raise ValueError(
            f"{source}: the Hub cannot be reached; go online, or name a file that holds the rows"
        ) from None
    if split not in splits and not (not split and len(splits) == 1):
        raise ValueError(f"{source}: choose a split, as hf:{name}:{splits[0]}; it has {', '.join(splits)}")
    data = load_dataset(name, split=split or splits[0], streaming=True)
    classes = {column: f for column, f in (data.features or {}).items() if isinstance(f, ClassLabel)}
    for number, row in enumerate(data, 1):
        for column, feature in classes.items():  # class numbers become the names they stand for; -1 is "unlabelled"
            value = row[column]
            row[column] = None if value is None or value < 0 else feature.int2str(value)
        yield f"{source} row {number}", row


# Texts that belong together: they belong on one side of every split and fold


def joined_groups(*groupings: Sequence[object]) -> list[int]:
    """Numbers of groups that join all these groupings of the same rows: two that share a group of any are in one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(groupings[0])
    ends = []
    for grouping in groupings:
        first: dict[object, int] = {}
        ends += [(number, first.setdefault(group, number)) for number, group in enumerate(grouping)]
    rows, columns = np.array(ends, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(ends)), (rows, columns)), shape=(n, n))
    return connected_components(graph, directed=False)[1].tolist()


def text_key(text: str) -> str:
    """Twelve hex digits that know a text again, whatever its case and spaces, without saying what it was."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode(errors="surrogatepass")).hexdigest()[:12]


def check_disjoint(
    known: Sequence[object], held_out: Sequence[object], known_source: str, source: str, groups: str | None = None
) -> int:
    """Refuse rows (anything with `id` and `text`) whose text is among the known; how many of the others are alike one.

    Texts are the same whatever their case and spaces. No group of the table `groups` may stand on both sides.
    Raises ValueError that names both sources and the first rows.
    """
    id_of = {text_key(row.text): row.id for row in known}
    shared = [(row.id, id_of[key]) for row in held_out if (key := text_key(row.text)) in id_of]
    if shared:
        named = ", ".join(f"{here!r} (there {there!r})" for here, there in shared[:5])
        raise ValueError(
            f"{len(shared):,} rows of {source} are in {known_source} too: {named}{', ...' if shared[5:] else ''}; "
            "nothing is measured on rows it was fitted on, remove them"
        )
    if groups is not None:
        known_groups = set(groups_of(known, groups))
        inside = [
            row.id for row, group in zip(held_out, groups_of(held_out, groups), strict=True) if group in known_groups
        ]
        if inside:
            raise ValueError(
                f"{len(inside):,} rows of {source} are of groups that {known_source} has rows of, the first is "
                f"{inside[0]!r} ({groups}); keep whole groups on one side"
            )
    is_known = [True] * len(known) + [False] * len(held_out)
    _, elsewhere = partners((row.text for row in (*known, *held_out)), is_known)
    return int((elsewhere[len(known) :] >= 0).sum())


def add_groups_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that says which rows belong together."""
    parser.add_argument(
        "--groups",
        metavar="FILE",
        help="a table of id and group: rows that belong in one fold (default: near-duplicate texts, found here)",
    )


def groups_of(rows: Sequence[object], source: str | None = None) -> list[object]:
    """The group of each row (anything with `id` and `text`): from a table's id and group, or its near-duplicates'."""
    if source is None:
        return duplicate_groups([row.text for row in rows])
    group = {}
    for where, columns in read_rows(source):
        if not {"id", "group"} <= columns.keys():
            raise ValueError(f"{where}: --groups needs the columns id and group; it has {', '.join(columns)}")
        if not isinstance(columns["group"], str | int):
            raise ValueError(f"{where}: the group is {columns['group']!r}, not a name")
        name = str(columns["group"]).strip()
        if not name:
            raise ValueError(f"{where}: the group is empty")
        if group.setdefault(str(columns["id"]), name) != name:
            raise ValueError(f"{where}: the id {columns['id']!r} stands twice, with different groups")
    if lost := next((row.id for row in rows if row.id not in group), None):
        raise ValueError(f"{source} names no group for the row {lost!r}")
    return [group[row.id] for row in rows]


# Flags


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name a table of texts; the same in every script."""
    group = parser.add_argument_group("a table of texts")
    group.add_argument(
        "--input",
        metavar="FILE",
        help=" ".join(SUFFIXES) + ", each also .gz, data:SPLIT (ours), or hf:NAME[:SPLIT]",
    )
    add_column_arguments(group)


def add_column_arguments(group: argparse._ActionsContainer) -> None:
    """The flags that say how a table is read."""
    add = group.add_argument
    add(
        "--text-column",
        metavar="NAME",
        action="append",
        help="column of the texts (default: text); given several times, the columns are joined by a blank line",
    )
    add("--label-column", metavar="NAME", help="column of the true labels (default: label, if there)")
    add("--id-column", metavar="NAME", help='column of the ids (default: id, if there, else row numbers; "": those)')
    add("--no-header", action="store_true", help="no header: columns are named 1, 2, ... and the text is 1")
    add("--label-map", metavar="OLD=NEW", nargs="+", default=[], help="rename labels: 0=negative 1=positive")
    add("--delimiter", metavar="D", help="comma, semicolon, tab, pipe or a character (default: found out)")
    add("--encoding", metavar="NAME", help="of a text file, as windows-1252 (default: found out)")
    add("--skip-bad-rows", action="store_true", help="leave out rows that are broken in the file, and say which")
    add("--where", metavar="COLUMN=VALUE", action="append", default=[], help="use only rows with this value")
    add("--limit", type=int, metavar="N", help="use only the first N rows")
    add("--sample", type=natural, metavar="N", help="use N rows drawn at random, by --seed")
    add("--seed", type=natural, default=0, metavar="N", help="of whatever is drawn at random (default: 0)")


def column_arguments(args: argparse.Namespace) -> dict[str, object]:
    """What the flags of `add_column_arguments` say, as keyword arguments of `read_examples`; checked."""
    for name in ("limit", "sample"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: at least one row is needed")
    delimiter = DELIMITERS.get(args.delimiter, args.delimiter)
    if delimiter is not None and len(delimiter) != 1:
        raise ValueError(f"--delimiter {args.delimiter}: {', '.join(DELIMITERS)}, or one character")
    return {
        "text_column": args.text_column,
        "label_column": args.label_column,
        "id_column": args.id_column,
        "header": not args.no_header,
        "label_map": _by_name("--label-map OLD=NEW", args.label_map),
        "limit": args.limit,
        "sample": args.sample,
        "seed": args.seed,
        "delimiter": delimiter,
        "encoding": args.encoding,
        "skip_bad_rows": args.skip_bad_rows,
        "where": _by_name("--where COLUMN=VALUE", args.where, may_be_empty=True),
    }


def _by_name(usage: str, pairs: Sequence[str], may_be_empty: bool = False) -> dict[str, str]:
    """What pairs such as "OLD=NEW" say, of a flag with this usage."""
    flag, form = usage.split()
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and (value or may_be_empty)):
            raise ValueError(f"{flag} {pair}: write it as {form}")
        found[name] = value
    return found
