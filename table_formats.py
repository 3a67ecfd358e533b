"""How a text file of a table is written: its lines, its encoding, its delimiter, found out or said.

    written = text_format("reviews.csv")        # TextFormat(encoding, delimiter, quoted)

What cannot be told for sure is a ValueError that names --encoding and --delimiter.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx", ".txt")
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
SAMPLE_BYTES = 1 << 18  # of which a delimiter is told


@dataclass(frozen=True)
class TextFormat:
    """How a text file is written. `delimiter` is None where a line is a text; `quoted`: cells may stand in quotes."""

    encoding: str
    delimiter: str | None
    quoted: bool
    is_unusual: bool  # not UTF-8, or not the delimiter of the file's suffix

    def __str__(self) -> str:
        if self.delimiter is None:
            return self.encoding
        names = {character: name for name, character in DELIMITERS.items()}
        quotes = "" if self.quoted else ", quotes being part of a cell"
        return f"{self.encoding} with the delimiter {names.get(self.delimiter, repr(self.delimiter))}{quotes}"

    @property
    def csv_options(self) -> dict[str, object]:
        """For csv.reader."""
        if self.quoted:
            return {"delimiter": self.delimiter, "strict": True}
        return {"delimiter": self.delimiter, "quoting": csv.QUOTE_NONE}


def text_format(
    source: str, encoding: str | None = None, delimiter: str | None = None, quoted: bool | None = None
) -> TextFormat:
    """How a text file is written, found out where it is not said; ValueError where it cannot be told."""
    suffix = suffix_of(source)
    encoding = check_encoding(encoding) if encoding else detect_encoding(source)
    if suffix in (".json", ".jsonl"):
        return TextFormat(encoding, None, False, not encoding.startswith("utf-8"))
    usual = {".csv": ",", ".tsv": "\t"}.get(suffix)
    if delimiter is None:
        if suffix == ".txt":
            _refuse_tabs(source, encoding)
        else:
            delimiter = detect_delimiter(source, encoding, usual)
    if delimiter is None:
        quoted = False
    elif quoted is None:
        quoted = _quotes_hold(source, encoding, delimiter) if delimiter == "\t" else True
    return TextFormat(encoding, delimiter, quoted, not encoding.startswith("utf-8") or delimiter != usual)


def check_encoding(name: str) -> str:
    """Python's name of a text encoding; ValueError for what is none."""
    try:
        if codecs.lookup(name)._is_text_encoding:
            return "utf-8-sig" if codecs.lookup(name).name == "utf-8" else name
    except LookupError:
        pass
    raise ValueError(f"--encoding {name}: no such encoding; it is something as utf-8, utf-16, windows-1252, latin-1")


BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def detect_encoding(source: str) -> str:
    """UTF-8 if all of the file is, UTF-16 or -32 by its mark or its zeros, Windows-1252 if it reads as Western text.

    Raises ValueError, with the guesses of charset-normalizer, for any other.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_bytes(source) as file:
        head = block = file.read(SAMPLE_BYTES)
        for mark, name in BYTE_ORDER_MARKS.items():
            if head.startswith(mark):
                return name
        if b"\0" in head:
            even, odd = head[::2].count(0), head[1::2].count(0)
            if min(even, odd) * 20 > max(even, odd):  # UTF-16 has its zeros on one side of its pairs
                raise ValueError(f"{source} is no text file: it holds bytes of value 0")
            return "utf-16-be" if even > odd else "utf-16-le"
        try:
            while block:
                decoder.decode(block)
                block = file.read(1 << 20)
            decoder.decode(b"", final=True)
            return "utf-8"
        except UnicodeDecodeError:
            file.seek(0)
            odd_lines = (line for line in file if not line.isascii())
            foreign = b"".join(islice(odd_lines, 2000))
    if reads_as_western(foreign):
        return "windows-1252"
    from charset_normalizer import from_bytes

    guesses = list(dict.fromkeys(match.encoding for match in from_bytes(foreign)))[:3]
    raise ValueError(
        f"{source} is not UTF-8, and its encoding cannot be told for sure"
        + (f" ({', '.join(guesses)}?)" if guesses else "")
        + "; say --encoding NAME, and --delimiter if its cells are not parted by commas"
    )


def reads_as_western(content: bytes) -> bool:
    """Whether bytes make sense as Windows-1252: single accented letters in words, other signs between words.

    In the code pages of other scripts the same bytes are whole words, or letters where Windows-1252 has signs.
    """
    try:
        text = content.decode("windows-1252")
    except UnicodeDecodeError:
        return False
    if re.search(r"[^\x00-\x7f\W]{4}", text):  # a word of another script
        return False
    within_words = "[\u00a1-\u00ac\u00ae-\u00b3\u00b5\u00b6\u00b8-\u00bf\u00d7\u00f7]"  # what no word has: a sign
    return not re.search(rf"[^\W\d_]{within_words}[^\W\d_]", text)


def detect_delimiter(source: str, encoding: str, usual: str) -> str:
    """The one delimiter that parts all rows at the file's beginning alike; `usual` for a table of one column."""
    with open_bytes(source) as raw:
        head = raw.read(SAMPLE_BYTES)
        is_whole = not raw.read(1)
    text = codecs.getincrementaldecoder(encoding)().decode(head).removeprefix("\ufeff")
    lines = io.StringIO(text, newline="\n").readlines()
    fitting = []
    for delimiter in DELIMITERS.values():
        for quoted in (True, False) if delimiter == "\t" else (True,):
            written = TextFormat(encoding, delimiter, quoted, False)
            if _parts_alike(lines, written, is_whole) and delimiter not in fitting:
                fitting.append(delimiter)
    if len(fitting) > 1:
        names = [name for name, character in DELIMITERS.items() if character in fitting]
        raise ValueError(
            f"{source}: its cells may be parted by {' or '.join(names)}; say which with --delimiter (and --encoding "
            f"if it is not {encoding})"
        )
    return fitting[0] if fitting else usual


def _parts_alike(lines: Sequence[str], written: TextFormat, is_whole: bool) -> bool:
    """Whether all rows have the same number of cells, more than one; the last may be cut off in a sample."""
    widths = []
    try:
        for cells in csv.reader(lines, **written.csv_options):
            if cells:
                widths.append(len(cells))
    except csv.Error:
        return False
    if not is_whole:
        widths = widths[:-1]
    return bool(widths) and widths[0] > 1 and len(set(widths)) == 1


def _quotes_hold(source: str, encoding: str, delimiter: str) -> bool:
    """Whether all of a tab-separated file can be read with quoted cells, as pandas and Excel write them."""
    written = TextFormat(encoding, delimiter, True, False)
    widths = set()
    try:
        for cells in csv.reader((line for _, line in lines_of(source, encoding)), **written.csv_options):
            if cells:
                widths.add(len(cells))
            if len(widths) > 1:
                return False
    except csv.Error:
        return False
    return True


def _refuse_tabs(source: str, encoding: str) -> None:
    """ValueError for a .txt file of which every line has the same number of tabs: it is a table."""
    counts = {line.count("\t") for _, line in islice(lines_of(source, encoding), 1000)}
    if len(counts) == 1 and 0 not in counts:
        raise ValueError(
            f"every line of {source} has {counts.pop()} tabs, so it seems to be a table and not one text a line; say "
            "--delimiter tab to read it so (with --no-header if it has none)"
        )


# Reading


def suffix_of(source: str) -> str:
    """The suffix of a table's file, without .gz; "" for data: and hf:. ValueError for what is no table."""
    if source.startswith(("hf:", "data:")):
        return ""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"no such file: {source}")
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    if path.is_dir() or suffix not in SUFFIXES:
        raise ValueError(
            f"{source} is not a table; it must be one of {' '.join(SUFFIXES)}, also with .gz, data:SPLIT or "
            "hf:NAME[:SPLIT]"
        )
    if not path.is_file():
        raise ValueError(
            f"{source} is not a regular file, and a table is read more than once; write it to a file first"
        )
    return suffix


@contextmanager
def open_bytes(source: str) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, uncompressed; ValueError where it is not the .gz that its name says."""
    try:
        with gzip.open(source) if source.lower().endswith(".gz") else open(source, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{source} is not a whole gzip file: {error}") from None


def lines_of(source: str, encoding: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, line ends kept, a byte-order mark dropped."""
    number = 0
    try:
        with open_bytes(source) as raw, io.TextIOWrapper(raw, encoding, newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"{source} line {number + 1} or later is not {encoding} ({reason}); --encoding says what it is"
        ) from None


class CsvRecords:
    """The records of a delimited file, one at a time, with the line where each begins and what is wrong with it.

    After a broken record, `skip_one_line` takes up the reading on the line after the one where it began: a quote that
    is never closed would swallow all that follows.
    """

    def __init__(self, source: str, written: TextFormat) -> None:
        csv.field_size_limit(2**31 - 1)  # the most that every platform takes
        self.lines = lines_of(source, written.encoding)
        self.options = written.csv_options
        self.again: deque[tuple[int, str]] = deque()  # lines to be read once more
        self.used: list[tuple[int, str]] = []  # lines of the record in hand
        self.reader = csv.reader(self._feed(), **self.options)

    def _feed(self) -> Iterator[str]:
        while True:
            numbered = self.again.popleft() if self.again else next(self.lines, None)
            if numbered is None:
                return
            self.used.append(numbered)
            yield numbered[1]

    def __iter__(self) -> Iterator[tuple[int, list[str], str]]:
        """(line where it begins, cells, what is wrong or "") of every record."""
        while True:
            self.used.clear()
            try:
                cells, error = next(self.reader), ""
            except StopIteration:
                return
            except csv.Error as broken:
                cells, error = [], str(broken)
            yield self.used[0][0] if self.used else 0, cells, error

    def skip_one_line(self) -> None:
        """Go on with the line after the one where the last record began."""
        self.again.extendleft(reversed(self.used[1:]))
        self.reader = csv.reader(self._feed(), **self.options)
