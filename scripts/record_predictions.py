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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import command_line
import pooling
import predictions
from explained_texts import TOUR

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("data", "predictions")
MODELS = {"base": "none", "tuned": "fine_tuned_sentiment_model"}
TOURS = {"base": "tour", "tuned": "tuned_tour"}
ROWS = {"calibration": 1000, "test": 2000}
SECONDS = {"logprobs": 0.1, "consistency": 0.17, "combined": 0.004}  # of a row, on one core of a 2020s server
CLOSE, CLOSE_COMBINED = 1e-4, 1e-9  # other processors round otherwise: a model's sums more than Method 3's
# Rounding moves about one draw in 700 to a neighbouring token, so more of few answers may differ than of none.
MOVED = 0.01
STEADY = ("id", "text", "label", "fingerprint", "logprobs")  # what a moved answer does not change
EXPLAINED = (
    "The canteen is on floor four. Badge on the reader, then pay.",
    "Height one eighty, shoe size seven, blood group on the card.",
)


@dataclass(frozen=True)
class Recording:
    """A file and the arguments of Python that make it; without --output they print it, one JSON object a text."""

    path: Path
    rows: int
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.stem

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
    for model, adapter in MODELS.items():
        of_model = ("--adapter", adapter, "--device", "cpu")
        for split, rows in ROWS.items():
            table = (*of_model, "--input", f"data:{split}")
            one, two, both = (FOLDER / f"{model}{method}_{split}.jsonl" for method in ("", "_consistency", "_combined"))
            joined = ("--logprobs", str(one), "--consistency", str(two))
            found.append(Recording(one, rows, ("logprobs_confidence.py", *table, "--output", str(one))))
            found.append(Recording(two, rows, ("consistency_confidence.py", *table, "--output", str(two))))
            found.append(Recording(both, rows, ("combined_confidence.py", *joined, "--output", str(both))))
        of_model = (*of_model, "--json")
        explained, tour = FOLDER / f"{model}_first_tokens.jsonl", FOLDER / f"{TOURS[model]}.jsonl"
        found.append(Recording(explained, len(EXPLAINED), ("logprobs_confidence.py", *of_model, *EXPLAINED)))
        found.append(Recording(tour, len(TOUR), ("combined_confidence.py", *of_model, *TOUR)))
    found.append(Recording(FOLDER / "ablation.csv", 750, ("scripts/ablation.py", "--run", "FOLDER")))
    return {recording.name: recording for recording in found}


RECORDINGS = recordings()
BY_HAND = "ablation"  # its own script takes too long to be run along


# Making


def make_all(chosen: Sequence[Recording]) -> None:
    """Make each into NAME.part, or go on with the one that is there; then put it into its place."""
    seconds = sum(recording.rows * SECONDS[recording.method] + 5 for recording in chosen)
    print(f"{len(chosen)} recordings, about {math.ceil(seconds / 60)} min of one CPU core")
    for number, recording in enumerate(chosen):
        print(f"\n{recording.command}", flush=True)
        part = Path(f"{ROOT / recording.path}.part")
        try:
            run(recording, part)
        except KeyboardInterrupt:
            names = " ".join(left.name for left in chosen[number:])
            print(f"\nstopped; to go on: python scripts/record_predictions.py {names}", file=sys.stderr)
            sys.exit(130)
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
        rows = [json.loads(line, object_hook=without_model_path) for line in done.stdout.splitlines()]
        of_tour = tour_fields() if recording.method == "combined" else {}
        output.write_text("".join(f"{json.dumps(of_tour | row)}\n" for row in rows), encoding="utf-8")


def without_model_path(row: dict) -> dict:
    """The folder of the weights is one of the machine that happened to run it."""
    return {key: value for key, value in row.items() if key != "model_path"}


def tour_fields() -> dict:
    """What main.py says of the model besides its explanations."""
    from llama import load_reader

    return {"device": "cpu", "precision": "float32", "vocabulary_size": len(load_reader("default").tokenizer)}


# Checking


def check(recording: Recording, limit: int, folder: Path) -> tuple[str, list[str]]:
    """(what was compared, what differs) between the recording and what the code gives today."""
    path, fresh = ROOT / recording.path, folder / recording.path.name
    if not path.is_file():
        return "", ["the file is missing"]
    if "--logprobs" in recording.arguments:  # made of two recordings without a model, so of all rows
        one, two = (ROOT / recording.arguments[number] for number in (2, 4))
        pairs = pooling.read_pairs(one, two)
        predictions.replace(fresh, pooling.combine(pairs, pooling.combination_of(pairs)))
        if fresh.read_bytes() == path.read_bytes():
            return f"all {recording.rows:,} rows, byte for byte", []
        return compare(read_objects(fresh), read_objects(path), CLOSE_COMBINED)
    run(recording, fresh, *(() if recording.prints else ("--limit", str(limit))), quiet=True)
    return compare(read_objects(fresh), read_objects(path, None if recording.prints else limit), CLOSE)


def read_objects(path: Path, limit: int | None = None) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, limit)]


def compare(new: Sequence[dict], old: Sequence[dict], close: float) -> tuple[str, list[str]]:
    """(what was compared, what differs); a sampled answer that rounding moved is counted, and few are forgiven."""
    if len(new) != len(old):
        return "", [f"{len(old):,} rows are recorded where there are {len(new):,} now"]
    differences, answers, moved = [], 0, 0
    for number, (row, before) in enumerate(zip(new, old, strict=True), 1):
        said, said_before = answers_of(row), answers_of(before)
        answers += len(said)
        if said != said_before:
            moved += sum(a != b for a, b in zip_longest(said, said_before))
            row, before = ({key: of_row.get(key) for key in STEADY} for of_row in (row, before))
        differences += [f"row {number}: {difference}" for difference in unlike(row, before, close)]
    if moved > math.ceil(MOVED * answers):
        differences.append(f"{moved} of {answers} sampled answers are others")
    return f"{len(new)} rows" + (f", {answers} answers ({moved} moved by rounding)" if answers else ""), differences


def answers_of(row: Mapping) -> list[str]:
    """The sampled answers of a predictions row of Method 2 or of an explanation by both."""
    answers = row.get("answers") or row.get("consistency", {}).get("answers", [])
    return [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]


def unlike(new: object, old: object, close: float, where: str = "") -> Iterator[str]:
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
        shown, recorded = (command_line.printable(json.dumps(value))[:60] for value in (new, old))
        yield f"{where} is {shown}, recorded as {recorded}"


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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("name", metavar="NAME", nargs="*", help="files of data/predictions/, without their ending (default: all)")
    add("--check", action="store_true", help="compare with the recordings instead of replacing them")
    add("--list", action="store_true", help="print each file and the command that makes it")
    add("--limit", type=command_line.natural, metavar="N", help="with --check: rows of a table to run (default: 24)")
    args = parser.parse_args(argv)
    for name in args.name:
        if name not in RECORDINGS:
            parser.error(f"no recording {name!r}; there are {', '.join(RECORDINGS)}")
        if name == BY_HAND and not args.list:
            made = RECORDINGS[name].command
            parser.error(f"{name} is made by {made}, an hour of one core, and has tests of its own")
    if args.limit is not None and not (args.check and args.limit):
        parser.error(f"--limit {args.limit}: at least 1, with --check")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    chosen = [RECORDINGS[name] for name in RECORDINGS if not args.name or name in args.name]
    if args.list:
        for recording in chosen:
            print(f"{recording.path} ({recording.rows:,} rows)\n  {recording.command}")
        return
    chosen = [recording for recording in chosen if recording.name != BY_HAND]
    if not args.check:
        make_all(chosen)
    elif not check_all(chosen, args.limit or 24):
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
