"""What every command line here shares: flags, one-line errors, exit codes, progress, tables on a terminal.

0 done     1 a check failed, or the reader of our output went away     2 bad input, in one line     130 Ctrl-C

if __name__ == "__main__":
    command_line.run(main)
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

SHOW_AFTER_S = 5.0  # of what mostly takes less
EVERY_S = 10.0  # between plain lines of progress
LENGTH_AROUND = 40  # characters that the end of a prompt adds to the work that a text makes

# Flags


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with the module docstring as help and errors in our one-line form."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> None:
        print(f"error: {printable(' '.join(message.split()))} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def natural(text: str) -> int:
    """A whole number that is not negative, for argparse."""
    if (number := int(text)) < 0:
        raise ValueError
    return number


def allow_only_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: Collection[str], why: str
) -> None:
    """Refuse every flag or text that was given and is not among `names`, rather than ignore it."""
    for name, value in vars(args).items():
        is_given = value and value != parser.get_default(name)
        if is_given and name not in names:
            what = "a text" if name == "text" else f"--{name.replace('_', '-')}"
            parser.error(f"{why}; {what} has no part in it")


# Running


def run(main: Callable[[], None], resumes: bool = False) -> None:
    """Run a script: bad input is one line and exit code 2, Ctrl-C is 130, a closed pipe is no error.

    Our functions raise ValueError or OSError for what a user can put right, and Python its own errors for what is too
    deep or too large; anything else is a bug and keeps its traceback. Whatever is printed is made safe for a terminal.
    """
    os.environ.pop("MPLBACKEND", None)  # inherited from a notebook it would end every script; figures need no backend
    with redirect_stdout(PrintableStream(sys.stdout, "\n\t")), redirect_stderr(PrintableStream(sys.stderr, "\n\t\r")):
        try:
            try:
                main()
            finally:  # also when main ends with an exit code of its own
                sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit complains again
            sys.exit(1)
        except (ValueError, OSError, MemoryError, RecursionError, OverflowError, ImportError) as error:
            is_missing = isinstance(error, ModuleNotFoundError) and error.name
            if isinstance(error, ImportError) and not is_missing and "SOCKS" not in str(error):
                raise
            print("error: " + printable(_message(error)), file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            then = "to continue where it was" if resumes else "to begin again"
            print(f"\nstopped; repeat the same command {then}", file=sys.stderr)
            sys.exit(130)


def _message(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return (
            f"{sys.executable} lacks the package {package}: activate the environment that has it "
            "(. .venv/bin/activate), or pip install -r requirements.txt"
        )
    if isinstance(error, ImportError):
        return proxy_problem(needs_package=True)
    if getattr(error, "filename", None) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def proxy_problem(needs_package: bool) -> str:
    """What is wrong with the proxies that the environment names, whose URLs may hold a password."""
    proxies = {name: value for name, value in os.environ.items() if re.fullmatch("(all|https?)_proxy", name, re.I)}
    names = [name for name, value in proxies.items() if value.startswith("socks") or not needs_package]
    variables = f"the environment variable {' or '.join(names)}"
    if needs_package:
        return f"{variables} names a SOCKS proxy, for which the package socksio is missing: pip install socksio"
    return f"{variables} names no proxy that can be used, as http://proxy.example:8080 would"


class Progress:
    """How far long work is, and how long the rest takes, from the throughput after the first report.

    Called with the number of rows that are finished, and where rows differ with what these are worth in rows of average
    length: long rows come first, and a rate of rows alone would say three times too long. Rows worth 0 were there
    already. The first report has the start of the work in it and is left out of the rate.
    """

    def __init__(self, total: int, done: int, unit: str, show: Callable[[Progress, float], None]) -> None:
        self.total, self.done, self.unit, self.show = total, done, unit, show
        self.left = float(total - done)  # in rows of average length
        self.first: tuple[float, float] | None = None  # when the first report came, and what was left then
        self.now = 0.0

    def __call__(self, n: int, worth: float | None = None) -> None:
        self.done += n
        self.left -= worth if worth else n
        self.now = time.monotonic()
        if self.first is None and n and worth != 0:
            self.first = self.now, self.left
        self.show(self, n)

    @property
    def rate(self) -> float | None:
        """Rows of average length a second; None while nothing is known."""
        if self.first is None or self.now <= self.first[0] or self.left >= self.first[1]:
            return None
        return (self.first[1] - self.left) / (self.now - self.first[0])

    def estimate(self) -> str:
        """The rate and what is left, in words; empty while nothing is known."""
        rate = self.rate
        return f"{pace(rate, self.unit)}, {duration(max(0.0, self.left) / rate)} left" if rate else ""


def advance_by(advance: Callable[[int], None], n: int, worth: float) -> None:
    """Report n rows that are worth so many of average length, where `advance` is our progress and can use that."""
    if isinstance(advance, Progress):
        advance(n, worth)
    else:
        advance(n)


def worth(texts: Collection[str], among: Collection[str]) -> float:
    """How many rows of average length some of the texts are worth, by their characters and what stands around them."""
    part, whole = (sum(len(text) + LENGTH_AROUND for text in of) for of in (texts, among))
    return len(among) * part / max(1, whole)


def pace(rate: float, unit: str = "rows") -> str:
    """A rate in words: so many a second, or where that is less than a tenth, the seconds of one."""
    return f"{rate:.1f} a second" if rate >= 0.1 else f"{1 / rate:.0f} s a {unit.partition(' ')[0].removesuffix('s')}"


def duration(seconds: float) -> str:
    """Seconds, and in place of many minutes or hours."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(total: int, done: int, unit: str = "rows", after_s: float = 0.0) -> Iterator[Progress]:
    """Yield `advance(n)`: a bar on a terminal, a plain line at most every EVERY_S seconds elsewhere (both stderr).

    On a terminal nothing is shown of work that takes less than `after_s` seconds, and the bar of such goes at the end.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}{postfix}]"
        how = {"dynamic_ncols": True, "bar_format": layout, "delay": after_s, "leave": not after_s}
        with tqdm(total=total, initial=done, unit=f" {unit}", **how) as bar:

            def draw(progress: Progress, n: float) -> None:
                bar.set_postfix_str(progress.estimate(), refresh=False)
                bar.update(n)

            yield Progress(total, done, unit, draw)
        return
    last = time.monotonic()

    def print_line(progress: Progress, _: float) -> None:
        nonlocal last
        if progress.now - last >= EVERY_S:
            last, estimate = progress.now, progress.estimate()
            said = f"{progress.done:,} of {total:,} {unit}"
            print(f"{said}, {estimate}" if estimate else said, file=sys.stderr)

    yield Progress(total, done, unit, print_line)


# On a terminal


def printable(text: str) -> str:
    """Text for a terminal: whatever could move the cursor or change colours is shown as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class PrintableStream:
    """A text stream that shows as its escape whatever could command a terminal, but for the characters `kept`."""

    def __init__(self, stream: TextIO, kept: str) -> None:
        # One that was wrapped already, by a `run` in the same process, is not wrapped twice.
        self.stream = stream.stream if isinstance(stream, PrintableStream) else stream
        self.kept = kept

    def write(self, text: str) -> int:
        if not text.isprintable():
            text = "".join(c if c.isprintable() or c in self.kept else printable(c) for c in text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def filled(text: str, width: int, indent: str = "") -> str:
    """A text in lines of at most so many characters, broken between words; all but the first are indented."""
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def one_line(error: BaseException) -> str:
    """What a library's exception says, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows of cells in columns as wide as they need be, the first to the left, the others to the right; printable."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(indent + "  ".join(cells).rstrip())
    return "\n".join(lines)
