"""Small files, safely: written whole or not at all, and read as records whose every field is checked.

write_text("calibrator.json", text)
validated(Record, read_json("calibrator.json"), "calibrator.json")
"""

from __future__ import annotations

import filecmp
import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Record = TypeVar("Record")


@contextmanager
def whole_file(path: str | os.PathLike, replaces: bool = True) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends well: a reader sees all of it or nothing.

    A link is written through. The content is on the disk before the old file is given up. Unless it `replaces`, a file
    with another content is kept, with a ValueError.
    """
    path = Path(os.path.realpath(path))
    # Of this block alone, on any machine, and hidden from who reads the folder, if a kill leaves it behind.
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        yield scratch
        if not replaces and path.exists() and not filecmp.cmp(scratch, path, shallow=False):
            raise ValueError(f"{path} is there already, with another content; use --overwrite to replace it")
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike) -> object:
    """The value of a JSON file, every number in it finite; ValueError in one line for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"it holds {text}")
    return value


def validated(kind: type[Record], value: object, where: str) -> Record:
    """`value` as a record of the dataclass or pydantic model `kind`; ValueError names `where` and the field."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {field}: {message}" if field else f"{where}: {message}") from None
