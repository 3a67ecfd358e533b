"""The tables of a large run: files, folders, patterns and remote addresses, found and checked before any model.

    sources = list_sources(["tickets/", "more/*.csv", "s3://bucket/tickets"])
    facts, id_hashes = examine(sources[0], task, columns)        # rows, columns, ids
    check_sources([facts, ...], [id_hashes, ...])                # the same columns, no id twice

Addresses are folders and files here, or whatever pyarrow.fs reads: s3://, gs://, hdfs://. A remote table is copied to
this machine while it is read, so all formats of tables.py are read everywhere.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from table_formats import SUFFIXES
from tables import Example, Table, open_table
from task import Task, check_examples

# Addresses


def file_system(address: str) -> tuple[object, str]:
    """(file system, path in it) of an address; ValueError where it is of no known kind."""
    import pyarrow
    from pyarrow import fs

    if "://" not in address:
        return fs.LocalFileSystem(), str(Path(address).absolute())
    try:
        return fs.FileSystem.from_uri(address)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{address}: {error}") from None


def inside(folder: str, *names: str) -> str:
    """The address of something in a folder; a query at its end, as of an s3:// address, stays there."""
    address, mark, query = folder.partition("?") if "://" in folder else (folder, "", "")
    return "/".join([address.rstrip("/"), *names]) + mark + query


def list_sources(addresses: Sequence[str]) -> list[str]:
    """The tables that these files, folders and patterns name, each once: those of a folder in their names' order.

    Names that begin with a dot or an underscore are left out of folders, as other programs write them beside tables.
    """
    sources = [source for address in addresses for source in _listed(absolute(address))]
    if twice := next((source for source in sources if sources.count(source) > 1), None):
        raise ValueError(f"--input names {twice} twice")
    return sources


def absolute(address: str) -> str:
    """A folder or file here by its whole path, which workers know it by; others as they are."""
    if "://" in address or address.startswith(("data:", "hf:")):
        return address
    return str(Path(address).absolute())


def _listed(address: str) -> list[str]:
    """The tables that an absolute address names."""
    from pyarrow.fs import FileSelector, FileType

    if address.startswith(("data:", "hf:")):
        return [address]
    plain, mark, query = address.partition("?") if "://" in address else (address, "", "")
    base, pattern = plain, ""
    if wild := re.search(r"[*?\[]", plain):
        base = plain[: wild.start()].rpartition("/")[0]
        pattern = plain[len(base) + 1 :]
    system, path = file_system(base + mark + query)
    found = system.get_file_info(path)
    if found.type == FileType.File:
        return [address]
    if found.type == FileType.NotFound:
        raise ValueError(f"no such file or folder: {address}")
    within = [entry.path for entry in system.get_file_info(FileSelector(path, recursive=True)) if entry.is_file]
    names = sorted(name.removeprefix(path.rstrip("/") + "/") for name in within)
    if pattern:
        depth = pattern.count("/")
        names = [name for name in names if name.count("/") == depth and fnmatch.fnmatchcase(name, pattern)]
    names = [name for name in names if _is_table(name)]
    if not names:
        raise ValueError(f"{address} holds no table: {' '.join(SUFFIXES)}, also with .gz")
    return [inside(base + mark + query, name) for name in names]


def _is_table(name: str) -> bool:
    if any(part.startswith((".", "_")) for part in name.split("/")):
        return False
    return PurePosixPath(name.lower().removesuffix(".gz")).suffix in SUFFIXES


@contextmanager
def local_copy(source: str) -> Iterator[str]:
    """A table as a file of this machine."""
    if "://" not in source:
        yield source
        return
    system, path = file_system(source)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, PurePosixPath(path).name)
        with system.open_input_stream(path, compression=None) as remote, open(copy, "wb") as file:
            shutil.copyfileobj(remote, file, 1 << 20)
        yield str(copy)


# What a file holds


@dataclass(frozen=True)
class SourceFacts:
    """A table as it was found: its rows, whether its ids are row numbers, the user's columns with their types."""

    source: str
    bytes: int | None
    rows: int
    is_numbered: bool
    columns: Mapping[str, str]  # name -> Arrow's type as text


def examine(source: str, task: Task, columns: Mapping[str, object]) -> tuple[SourceFacts, np.ndarray]:
    """Read a table once, before any model is loaded: its facts, and a hash of each id int64 [rows].

    `columns` are those of `tables.read_examples`. Raises ValueError for a double id and a label that the task does not
    know.
    """
    with local_copy(source) as path:
        table = IdReader(open_table(path, **columns))
        count = check_examples(table, task, source)
        _, row = next(table.table.with_columns())
        is_numbered = not any(str(name).strip().casefold() == "id" for name in row)
        if columns.get("id_column") is not None:
            is_numbered = columns["id_column"] == ""
        types = _types_of(path, row)
    return SourceFacts(source, size_of(source), count, is_numbered, types), np.array(table.hashes, dtype=np.int64)


class IdReader:
    """A table that can be read again and again, with a hash of each id: the same on every machine."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.hashes = array("q")

    def __iter__(self) -> Iterator[Example]:
        self.hashes = array("q")
        for example in self.table:
            digest = hashlib.blake2b(example.id.encode(errors="surrogatepass"), digest_size=8).digest()
            self.hashes.append(int.from_bytes(digest, "big", signed=True))
            yield example


def size_of(source: str) -> int | None:
    """Bytes of a file; None for what is no file."""
    if source.startswith(("data:", "hf:")):
        return None
    system, path = file_system(source)
    return system.get_file_info(path).size


def _types_of(path: str, row: Mapping[str, object]) -> dict[str, str]:
    """The user's columns with the types that they are kept in: a Parquet file's own, else text."""
    if not path.lower().endswith(".parquet"):
        return dict.fromkeys(map(str, row), "string")
    from pyarrow.parquet import read_schema

    schema = read_schema(path)
    simple = re.compile(r"(u?int\d+|float|double|bool|string|large_string|date\d+(\[\w+\])?|timestamp\[\w+\])")
    return {f.name: str(f.type) if simple.fullmatch(str(f.type)) else "string" for f in schema}


def check_sources(facts: Sequence[SourceFacts], hashes: Sequence[np.ndarray]) -> None:
    """ValueError when the files have different columns, or when an id stands in two of them."""
    for other in facts[1:]:
        if different := set(facts[0].columns.items()) ^ set(other.columns.items()):
            name = min(different)[0]
            raise ValueError(
                f"{other.source} and {facts[0].source} have different columns, as {name!r}; score them in runs of "
                "their own"
            )
    own = [ids for file, ids in zip(facts, hashes, strict=True) if not file.is_numbered]
    _, counts = np.unique(np.concatenate([*own, np.empty(0, np.int64)]), return_counts=True)
    if len(own) > 1 and (double := int((counts > 1).sum())):
        raise ValueError(
            f"{double:,} ids stand in more than one file of --input, so they name no row; --id-column names another "
            'column, --id-column "" numbers the rows of each file'
        )
