"""Is it the model that was served under this name before? A server is asked three texts, and its answers are kept.

    check_identity(server, task, ask)        # ValueError when another model answers

`--served-as NAME` makes a name the identity of a model, in fingerprints, wherever it is served. What the name stands
for is remembered by the first tokens that the model lists for three texts in a task's own prompt, in a small file of
the cache. The same weights come back within some hundredths, at another precision too; another model does not.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from embedded_model import cache_dir
from endpoint import Endpoint, Prompt
from files import read_json, write_text
from predictions import fingerprint
from task import Task

TEXTS = (
    "The staff were kind and the room was spotless.",
    "It broke after two days and nobody answered my letters.",
    "The meeting has been moved to the second floor.",
)
TOLERANCE = 0.1  # of a probability: four-bit weights of the default model stay within it, a fine-tuned one does not
Answers = list[dict[str, float]]  # of each text: token -> probability


def check_identity(server: Endpoint, task: Task, ask: Callable[[str], Prompt]) -> None:
    """Compare what each server of a name answers with what is remembered of it, or remember it.

    Raises ValueError for another model. A server that lists no tokens cannot be told from another; it is said.
    """
    if not server.served_as:
        return
    path = record_path(server.served_as)
    record = read_record(path, server.served_as)
    key = fingerprint(task=task.settings(), prompt="ids" if server.reader else "text")
    for connection in server.one_at_a_time():
        try:
            answers = [probabilities(server.wait(server.first_token(ask(text))).tokens) for text in TEXTS]
        except ValueError:
            print(f"note: whether {connection.url} serves {server.served_as} cannot be checked", file=sys.stderr)
            continue
        known = record["answers"].setdefault(key, answers)
        if (apart := distance(known, answers)) > TOLERANCE:
            raise ValueError(
                f"{connection.url} serves another model than {server.served_as} was: a probability differs by "
                f"{apart:.2f}; give it a name of its own with --served-as, or delete {path} to begin anew"
            )
    write_text(path, json.dumps(record, indent=1))


def record_path(name: str) -> Path:
    """The file that remembers a name."""
    folder = cache_dir() / "served"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{fingerprint(served_as=name)}.json"


def read_record(path: Path, name: str) -> dict:
    """What is remembered of a name."""
    if not path.exists():
        return {"served_as": name, "answers": {}}
    record = read_json(path)
    if not isinstance(record, dict) or record.get("served_as") != name or not isinstance(record.get("answers"), dict):
        raise ValueError(f"{path} is not what it should be, the record of {name}; delete it to begin anew")
    return record


def probabilities(tokens: tuple[tuple[str, float], ...]) -> dict[str, float]:
    """The listed probability of each text of a token."""
    found: dict[str, float] = {}
    for token, log_prob in tokens:
        found[token] = found.get(token, 0.0) + math.exp(log_prob)
    return found


def distance(known: Answers, answers: Answers) -> float:
    """The largest difference of a probability; of a token that one list lacks, what it must differ at least."""
    apart = 0.0
    for before, now in zip(known, answers, strict=True):
        for one, other in ((before, now), (now, before)):
            most_unlisted = min(min(other.values(), default=0.0), max(0.0, 1 - sum(other.values())))
            for token, p in one.items():
                apart = max(apart, abs(p - other[token]) if token in other else p - most_unlisted)
    return apart
