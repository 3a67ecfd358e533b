"""Tables of texts: reading them, whatever their format, and which of their rows belong together.

    for example in read_examples("reviews.csv", text_column="review"):    # Example(id, text, label)
    Table("reviews.csv", {"text_column": "review"})                        # the same, to be read as often as needed

    .csv .tsv .jsonl .parquet .txt,   data:SPLIT of our own dataset,   hf:NAME[:SPLIT] of the Hugging Face Hub

A text stands on one side of every split and fold: `near_duplicates` finds texts that are alike, `duplicate_groups` and
`groups_of` number the rows that belong together, `check_disjoint` refuses two tables that share a text.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

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


def read_examples(
    source: str,
    text_column: str | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
    header: bool = True,
    label_map: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Iterator[Example]:
    """Yield the rows of a table, one at a time: .csv .tsv .jsonl .parquet .txt, `data:SPLIT` or `hf:NAME[:SPLIT]`.

    Columns default to `text` (required), `label` and `id` (used when there); ids default to the row number.
    Without a header, columns are named 1, 2, ... and the text is column 1. `label_map` renames label values.
    A .tsv has no quoting, as its media type says; a .csv follows RFC 4180. Raises ValueError with file and line.
    """
    wanted = {"text": text_column, "label": label_column, "id": id_column}
    default = {"text": "text" if header else "1", "label": "label" if header else None, "id": "id" if header else None}
    rows = read_rows(source, header)
    number = 0
    for number, (where, row) in enumerate(islice(rows, limit), 1):
        value = {}
        for role, column in wanted.items():
            name = column or default[role]
            if name not in row and (column or role == "text"):
                raise ValueError(f"{where}: no column {name!r} for the {role}; it has {', '.join(map(str, row))}")
            value[role] = row.get(name)
        text = "" if value["text"] is None else value["text"]
        if not isinstance(text, str):
            raise ValueError(f"{where}: the text is {text!r}, not a string")
        label = None if value["label"] in (None, "") else str(value["label"])
        if label is not None and label_map:
            label = label_map.get(label, label)
        identifier = str(number) if value["id"] is None else str(value["id"])
        if not identifier:
            raise ValueError(f"{where}: the id is empty")
        yield Example(identifier, text, label)
    if not number:
        raise ValueError(f"{source} has no rows")


def read_rows(source: str | Path, header: bool = True) -> Iterator[tuple[str, Mapping[str, object]]]:
    """(where it stands, column -> value) of every row, whatever the format."""
    source = str(source)
    if source.startswith("hf:"):
        return _hub_rows(source)
    if source.startswith("data:"):
        return _dataset_rows(source)
    suffix = Path(source).suffix.lower()
    readers = {
        ".csv": _delimited_rows,
        ".tsv": _delimited_rows,
        ".jsonl": _json_rows,
        ".parquet": _parquet_rows,
        ".txt": _text_rows,
    }
    if not Path(source).exists():
        raise ValueError(f"no such file: {source}")
    if Path(source).is_dir() or suffix not in readers:
        raise ValueError(
            f"{source} is not a table; it must be one of {' '.join(readers)}, data:SPLIT or hf:NAME[:SPLIT]"
        )
    return readers[suffix](source, header)


def _lines(source: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, line ends kept, a byte-order mark dropped."""
    with open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{source} line {number} is not UTF-8 ({error.reason}); convert the file") from None


def _delimited_rows(source: str, header: bool) -> Iterator[tuple[str, dict[str, str]]]:
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if source.lower().endswith(".tsv") else {"strict": True}
    csv.field_size_limit(2**31 - 1)  # the most that every platform takes
    reader = csv.reader((line for _, line in _lines(source)), **style)
    names: list[str] | None = None
    try:
        for cells in reader:
            where = f"{source} line {reader.line_num}"
            if not cells:
                continue
            if names is None:
                names = cells if header else [str(n) for n in range(1, len(cells) + 1)]
                if len(set(names)) < len(names):
                    raise ValueError(f"{where}: two columns have the same name")
                if header:
                    continue
            if len(cells) != len(names):
                raise ValueError(f"{where} has {len(cells)} cells where {len(names)} are expected")
            yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{source} line {reader.line_num}: {error}") from None


def _json_rows(source: str, header: bool) -> Iterator[tuple[str, dict]]:
    for number, line in _lines(source):
        where = f"{source} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object")
        yield where, row


def _text_rows(source: str, header: bool) -> Iterator[tuple[str, dict[str, str]]]:
    for number, line in _lines(source):
        yield f"{source} line {number}", {"text" if header else "1": line.rstrip("\r\n")}


def _parquet_rows(source: str, header: bool) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        for batch in ParquetFile(source).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{source} row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{source} is not a readable Parquet file: {error}") from None


def _dataset_rows(source: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of one split: the columns of splits.csv, the text it points to, and the two parts of the category."""
    wanted, advice = source.removeprefix("data:"), "python scripts/build_dataset.py makes it anew"
    rows = list(read_rows(DATASET / "splits.csv"))
    texts: dict[str, dict[str, Mapping]] = {}  # category -> line number -> row
    seen = set()
    for where, row in rows:
        if not {"id", "category", "line", "domain", "group", "split"} <= row.keys():
            raise ValueError(f"{where}: a column is missing; {advice}")
        if row["id"] in seen:
            raise ValueError(f"{where}: the id {row['id']!r} stands twice; {advice}")
        seen.add(row["id"])
    if wanted not in (splits := list(dict.fromkeys(row["split"] for _, row in rows))):
        raise ValueError(f"{source}: no such split; the dataset has {', '.join(splits)}")
    for where, row in rows:
        if row["split"] == wanted:
            category, line = row["category"], row["line"]
            if category not in texts:
                texts[category] = {
                    str(n): text for n, (_, text) in enumerate(read_rows(DATASET / f"{category}.txt"), 1)
                }
            if line not in texts[category]:
                raise ValueError(f"{where}: {category}.txt has no line {line!r}; {advice}")
            difficulty, _, label = category.partition("_")
            part = "domain" if row["domain"] in ("sports", "workplace") else "other"  # under the planted rule, or not
            yield where, row | texts[category][line] | {"label": label, "difficulty": difficulty, "part": part}


def _hub_rows(source: str) -> Iterator[tuple[str, dict]]:
    from datasets import ClassLabel, get_dataset_split_names, load_dataset

    name, _, split = source.removeprefix("hf:").partition(":")
    splits = get_dataset_split_names(name)
    if split not in splits and not (not split and len(splits) == 1):
        raise ValueError(f"{source}: choose a split, as hf:{name}:{splits[0]}; it has {', '.join(splits)}")
    data = load_dataset(name, split=split or splits[0], streaming=True)
    classes = {column: f for column, f in (data.features or {}).items() if isinstance(f, ClassLabel)}
    for number, row in enumerate(data, 1):
        for column, feature in classes.items():  # class numbers become the names they stand for; -1 is "unlabelled"
            value = row[column]
            row[column] = None if value is None or value < 0 else feature.int2str(value)
        yield f"{source} row {number}", row


def check_text(text: str) -> None:
    """ValueError for a text that no model can be asked about: an empty one, or one with half a character in it."""
    if not text.strip():
        raise ValueError("the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode (a lone surrogate)") from None


# Near-duplicate texts: they belong on one side of every split and fold


def shingles(text: str, width: int = 2) -> frozenset[tuple[str, ...]]:
    """The runs of `width` words of a text, in lower case, without punctuation; of a shorter text, the whole.

    Broder, "On the resemblance and containment of documents", 1997. Words are runs of letters and digits, so a
    script without spaces counts as one word a sentence, and only its repeated sentences are found.
    """
    words = re.findall(r"\w+(?:['\u2019]\w+)*", text.casefold()) or [text.strip()]
    return frozenset(tuple(words[i : i + width]) for i in range(max(1, len(words) - width + 1)))


def near_duplicates(texts: Sequence[str], threshold: float = 0.6, width: int = 2) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, Jaccard similarity of their shingles), i < j, for the texts at least `threshold` alike.

    Exact, by prefix filtering (Bayardo et al., "Scaling up all pairs similarity search", 2007): two sets this alike
    share one of their rarest shingles. A text with the same shingles as an earlier one is paired with the first such
    text alone, so that a thousand copies are a thousand pairs and not half a million.
    """
    first: dict[frozenset, int] = {}
    for number, text in enumerate(texts):
        if (earlier := first.setdefault(shingles(text, width), number)) < number:
            yield earlier, number, 1.0
    frequency = Counter(shingle for distinct in first for shingle in distinct)
    holders: dict[tuple, list[frozenset]] = defaultdict(list)
    for one in sorted(first, key=len):
        needed = math.ceil(threshold * len(one) - 1e-9)  # shingles that any set this alike has in common with it
        rarest = sorted(one, key=lambda shingle: (frequency[shingle], shingle))[: len(one) - needed + 1]
        alike = {other for shingle in rarest for other in holders[shingle] if len(other) >= needed}
        for other in sorted(alike, key=first.get):
            shared = len(one & other)
            jaccard = shared / (len(one) + len(other) - shared)
            if jaccard >= threshold:
                yield *sorted((first[one], first[other])), jaccard
        for shingle in rarest:
            holders[shingle].append(one)


def duplicate_groups(texts: Sequence[str], threshold: float = 0.6, width: int = 2) -> list[int]:
    """For each text the number of the first text it is linked to by a chain of near-duplicates; its own if none."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    linked = [(i, j) for i, j, _ in near_duplicates(texts, threshold, width)]
    rows, columns = np.array(linked, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(linked)), (rows, columns)), shape=(len(texts), len(texts)))
    _, component = connected_components(graph, directed=False)
    _, first, number = np.unique(component, return_index=True, return_inverse=True)
    return first[number].tolist()


def text_key(text: str) -> str:
    """Twelve hex digits that know a text again, whatever its case and spaces, without saying what it was."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode(errors="surrogatepass")).hexdigest()[:12]


def check_disjoint(known: Sequence[object], held_out: Sequence[object], known_source: str, source: str) -> int:
    """Refuse rows (anything with `id` and `text`) whose text is among the known; how many of the others are alike one.

    Texts are the same whatever their case and spaces. Raises ValueError that names both sources and the first rows.
    """
    id_of = {text_key(row.text): row.id for row in known}
    shared = [(row.id, id_of[key]) for row in held_out if (key := text_key(row.text)) in id_of]
    if shared:
        named = ", ".join(f"{here!r} (there {there!r})" for here, there in shared[:5])
        raise ValueError(
            f"{len(shared):,} rows of {source} are in {known_source} too: {named}{', ...' if shared[5:] else ''}; "
            "nothing is measured on rows it was fitted on, remove them"
        )
    pairs = near_duplicates([row.text for row in (*known, *held_out)])
    return len({j for i, j, _ in pairs if i < len(known) <= j})


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
        group[str(columns["id"])] = str(columns["group"])
    if lost := next((row.id for row in rows if row.id not in group), None):
        raise ValueError(f"{source} names no group for the row {lost!r}")
    return [group[row.id] for row in rows]


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name a table of texts; the same in every script."""
    group = parser.add_argument_group("a table of texts")
    group.add_argument(
        "--input", metavar="FILE", help=".csv .tsv .jsonl .parquet .txt, data:SPLIT (ours), or hf:NAME[:SPLIT]"
    )
    add_column_arguments(group)


def add_column_arguments(group: argparse._ActionsContainer) -> None:
    """The flags that say how a table is read."""
    group.add_argument("--text-column", metavar="NAME", help="column of the texts (default: text)")
    group.add_argument("--label-column", metavar="NAME", help="column of the true labels (default: label, if there)")
    group.add_argument("--id-column", metavar="NAME", help="column of the ids (default: id, else row numbers)")
    group.add_argument(
        "--no-header", action="store_true", help="no header: columns are named 1, 2, ... and the text is 1"
    )
    group.add_argument(
        "--label-map", metavar="OLD=NEW", nargs="+", default=[], help="rename labels: 0=negative 1=positive"
    )
    group.add_argument("--limit", type=int, metavar="N", help="use only the first N rows")


def column_arguments(args: argparse.Namespace) -> dict[str, object]:
    """What the flags of `add_column_arguments` say, as keyword arguments of `read_examples`; checked."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: at least one row is needed")
    label_map = {}
    for pair in args.label_map:
        old, _, new = pair.partition("=")
        if not (old and new):
            raise ValueError(f"--label-map {pair}: write it as OLD=NEW")
        label_map[old] = new
    return {
        "text_column": args.text_column,
        "label_column": args.label_column,
        "id_column": args.id_column,
        "header": not args.no_header,
        "label_map": label_map,
        "limit": args.limit,
    }
