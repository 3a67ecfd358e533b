"""Everything in data/predictions/: the command that makes each file, made again, or checked against what is there.

    python scripts/record_predictions.py --list                       # each file and its command
    python scripts/record_predictions.py                              # all but ablation.csv, half an hour
    python scripts/record_predictions.py base_test base_combined_test # only these
    python scripts/record_predictions.py --check                      # is it still what the code gives? (3 minutes)

The files are the default model's answers, as it was downloaded (base) and with the shipped adapter (tuned): by the
three methods on data:calibration and data:test, and to single texts, explained. Of explanations `model_path` is left
out, a folder of the machine that ran them; those of main.py's texts also say device, precision and vocabulary size. A
file is replaced when its new version is complete; until then that stands beside it as *.part, where a stopped run goes
on.

--check runs the commands on the first rows and compares predictions, probabilities and fingerprints with the
recording (1e-4), does Method 3 again completely, byte for byte, and ends with exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import combined_confidence as combined
import command_line
import predictions

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("data", "predictions")
MODELS = {"base": "none", "tuned": "fine_tuned_sentiment_model"}
ROWS = {"calibration": 1000, "test": 2000}
SECONDS = {"logprobs": 0.1, "consistency": 0.17, "combined": 0.004}  # of a row, on one core of a 2020s server
CLOSE = 1e-4
# Rounding moves about one draw in 700 to a neighbouring token, so more of few answers may differ than of none.
MOVED = 0.01
EXPLAINED = (
    "The canteen is on floor four. Badge on the reader, then pay.",
    "Height one eighty, shoe size seven, blood group on the card.",
)
TOUR = (
    "I absolutely love this amazing movie!",
    "This film is terrible and boring",
    "The acting is superb, the story is dull",
    "Not bad",
    "Best worst thing ever",
    "The train leaves at noon",
)


@dataclass(frozen=True)
class Recording:
    """A file and the arguments of Python that make it; without --output they print it, one JSON object a text."""

    name: str
    rows: int
    arguments: tuple[str, ...]
    by_hand: bool = False  # made by a script of its own, which takes too long to be run along

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}{'.csv' if self.by_hand else '.jsonl'}"

    @property
    def method(self) -> str:
        return Path(self.arguments[0]).stem.removesuffix("_confidence")

    @property
    def prints(self) -> bool:
        return "--json" in self.arguments

    @property
    def command(self) -> str:
        return shlex.join(["python", *self.arguments]) + (f" > {self.path}" if self.prints else "")


def recordings() -> dict[str, Recording]:
    """Every file of the folder by its name, in an order in which they can be made."""
    found = []
    for method, suffix in (("logprobs", ""), ("consistency", "_consistency"), ("combined", "_combined")):
        for model, adapter in MODELS.items():
            for split, rows in ROWS.items():
                name = f"{model}{suffix}_{split}"
                of_model = ("--adapter", adapter, "--device", "cpu", "--input", f"data:{split}")
                members = (
                    *("--logprobs", f"{FOLDER / f'{model}_{split}.jsonl'}"),
                    *("--consistency", f"{FOLDER / f'{model}_consistency_{split}.jsonl'}"),
                )
                arguments = members if method == "combined" else of_model
                output = ("--output", f"{FOLDER / name}.jsonl")
                found.append(Recording(name, rows, (f"{method}_confidence.py", *arguments, *output)))
    for model, adapter in MODELS.items():
        of_model = ("--adapter", adapter, "--device", "cpu", "--json")
        found.append(
            Recording(f"{model}_first_tokens", len(EXPLAINED), ("logprobs_confidence.py", *of_model, *EXPLAINED))
        )
        name = "tour" if model == "base" else f"{model}_tour"
        found.append(Recording(name, len(TOUR), ("combined_confidence.py", *of_model, *TOUR)))
    found.append(Recording("ablation", 750, ("scripts/ablation.py", "--run", "FOLDER"), by_hand=True))
    return {recording.name: recording for recording in found}


RECORDINGS = recordings()


# Making


def make(recording: Recording) -> None:
    """Run the command into NAME.part, or go on with the one that is there; then put it into its place."""
    part = Path(f"{ROOT / recording.path}.part")
    print(f"\n{recording.command}", flush=True)
    run(recording, part)
    part.replace(ROOT / recording.path)


def run(recording: Recording, output: Path, *more: str, quiet: bool = False) -> None:
    """Run the command as a user would, its output elsewhere; ValueError when it fails."""
    arguments = [*recording.arguments, *more]
    if not recording.prints:
        arguments[arguments.index("--output") + 1] = str(output)
        arguments.append("--overwrite")  # a part made by older code begins again, one that fits goes on
    pipe = subprocess.PIPE if quiet or recording.prints else None
    errors = subprocess.PIPE if quiet else None
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=pipe, stderr=errors, encoding="utf-8")
    if done.returncode:
        said = f": {done.stderr.strip().splitlines()[-1]}" if quiet and done.stderr.strip() else ""
        raise ValueError(f"{recording.name}: its command ended with exit code {done.returncode}{said}")
    if recording.prints:
        rows = [portable(json.loads(line)) for line in done.stdout.splitlines()]
        if recording.method == "combined":
            rows = [{**of_tour(), **row} for row in rows]
        output.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def portable(value: object) -> object:
    """An explanation without `model_path`, the folder of the weights on the machine that happened to run it."""
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items() if key != "model_path"}
    return value


def of_tour() -> dict:
    """What main.py says of the model besides its explanations."""
    from llama import load_reader

    return {"device": "cpu", "precision": "float32", "vocabulary_size": len(load_reader("default").tokenizer)}


# Checking


def check(recording: Recording, limit: int, folder: Path) -> tuple[str, list[str]]:
    """(what was compared, what differs) between the recording and what the code gives today."""
    path = ROOT / recording.path
    if not path.is_file():
        return "", ["the file is missing"]
    if recording.method == "combined" and not recording.prints:
        return check_combined(recording)
    fresh = folder / path.name
    run(recording, fresh, *(() if recording.prints else ("--limit", str(limit))), quiet=True)
    new, old = (read_objects(p, None if recording.prints else limit) for p in (fresh, path))
    if len(new) != len(old):
        return "", [f"{len(old)} rows are recorded where there are {len(new)} now"]
    differences, answers, moved = [], 0, 0
    for number, (a, b) in enumerate(zip(new, old, strict=True), 1):
        said, before = answers_of(a), answers_of(b)
        answers += len(said)
        if changed := sum(x != y for x, y in zip(said, before, strict=False)) + abs(len(said) - len(before)):
            moved += changed
            a, b = ({key: row.get(key) for key in STEADY} for row in (a, b))
        differences += [f"row {number}: {difference}" for difference in unlike(a, b)]
    if moved > math.ceil(MOVED * answers):
        differences.append(f"{moved} of {answers} sampled answers are others")
    compared = f"{len(new)} rows" + (f", {answers} answers ({moved} moved by rounding)" if answers else "")
    return compared, differences


STEADY = ("id", "text", "label", "fingerprint", "logprobs")  # what a sampled answer does not change


def read_objects(path: Path, limit: int | None) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, limit)]


def answers_of(row: dict) -> list[str]:
    """The sampled answers of a predictions row of Method 2 or of an explanation by both."""
    answers = row.get("answers") or row.get("consistency", {}).get("answers", [])
    return [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]


def unlike(new: object, old: object, close: float = CLOSE, where: str = "") -> Iterator[str]:
    """Where two JSON values differ by more than `close`, and how."""
    if isinstance(new, dict) and isinstance(old, dict) and [*new] == [*old]:
        for key in new:
            yield from unlike(new[key], old[key], close, f"{where}.{key}".lstrip("."))
    elif isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        for number, pair in enumerate(zip(new, old, strict=True)):
            yield from unlike(*pair, close, f"{where}[{number}]")
    elif isinstance(new, float) and isinstance(old, float):
        if not abs(new - old) <= close:
            yield f"{where} is {new:.6g}, recorded as {old:.6g}"
    elif new != old:
        shown = (command_line.printable(json.dumps(value))[:60] for value in (new, old))
        yield "{} is {}, recorded as {}".format(where, *shown)


def check_combined(recording: Recording) -> tuple[str, list[str]]:
    """Join the two recorded methods anew, all rows; other processors may round the last digit otherwise."""
    one, two = (
        ROOT / recording.arguments[recording.arguments.index(flag) + 1] for flag in ("--logprobs", "--consistency")
    )
    pairs = combined.read_pairs(str(one), str(two))
    row, other = combined.scored(pairs)[0]
    pool = combined.pool_for((row.fingerprint, other.fingerprint), len(row.probabilities))
    new = b"".join(map(predictions.to_line, combined.combine(pairs, pool)))
    old = (ROOT / recording.path).read_bytes()
    if new == old:
        return f"all {len(pairs):,} rows, byte for byte", []
    lines = [[*map(json.loads, made.splitlines())] for made in (new, old)]
    differences = [f"row {k}: {d}" for k, pair in enumerate(zip(*lines, strict=False), 1) for d in unlike(*pair, 1e-9)]
    if len(lines[0]) != len(lines[1]):
        differences.append(f"{len(lines[1])} rows are recorded where there are {len(lines[0])} now")
    return f"all {len(pairs):,} rows, to 1e-9", differences


def check_all(chosen: Sequence[Recording], limit: int) -> bool:
    """Check and print a table; whether all are as recorded."""
    table, details = [["file", "result", "compared"]], []
    with TemporaryDirectory() as folder:
        for number, recording in enumerate(chosen, 1):
            print(f"{number} of {len(chosen)}: {recording.name}", file=sys.stderr)
            compared, differences = check(recording, limit, Path(folder))
            table.append([recording.path.name, "DIFFERS" if differences else "same", compared])
            details += [f"{recording.path.name}: {difference}" for difference in differences[:3]]
            if len(differences) > 3:
                details.append(f"{recording.path.name}: and {len(differences) - 3:,} more differences")
    print(command_line.columns(table))
    if details:
        print("\n" + "\n".join(details))
    return not details


# Command line


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    chosen = [recording for name, recording in RECORDINGS.items() if not args.name or name in args.name]
    if args.list:
        for recording in chosen:
            print(f"{recording.path} ({recording.rows:,} rows)\n  {recording.command}")
        return
    chosen = [recording for recording in chosen if not recording.by_hand]
    if args.check:
        if not check_all(chosen, args.limit or 24):
            sys.exit(1)
        return
    make_all(chosen)


def make_all(chosen: list[Recording]) -> None:
    seconds = sum(recording.rows * SECONDS[recording.method] + 5 for recording in chosen)
    print(f"{len(chosen)} recordings, about {math.ceil(seconds / 60)} min of one CPU core")
    left = list(chosen)
    try:
        while left:
            make(left[0])
            left.pop(0)
    except KeyboardInterrupt:
        names = " ".join(recording.name for recording in left)
        print(f"\nstopped; to go on: python scripts/record_predictions.py {names}", file=sys.stderr)
        sys.exit(130)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("name", metavar="NAME", nargs="*", help="files of data/predictions/, without their ending (default: all)")
    add("--check", action="store_true", help="compare with the recordings instead of replacing them")
    add("--list", action="store_true", help="print each file and the command that makes it")
    add("--limit", type=command_line.natural, metavar="N", help="with --check: rows of a table to run (default: 24)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.name if name not in RECORDINGS]:
        parser.error(f"no recording {unknown[0]!r}; there are {', '.join(RECORDINGS)}")
    if by_hand := [one for name, one in RECORDINGS.items() if name in args.name and one.by_hand and not args.list]:
        made = by_hand[0].command
        parser.error(f"{by_hand[0].name} is made by {made}, an hour of one core, and has tests of its own")
    if args.limit is not None and not (args.check and args.limit):
        parser.error(f"--limit {args.limit}: at least 1, with --check")
    return args


if __name__ == "__main__":
    command_line.run(main)
