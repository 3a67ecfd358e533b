"""What confidence-aware training buys: losses, a confidence head and dropout, beside a plain temperature.

    python scripts/ablation.py                 # the recorded runs, from data/predictions/ablation.csv; no torch
    python scripts/ablation.py --run FOLDER    # train them again (about an hour of one CPU core), then print
    python scripts/ablation.py --run FOLDER --only brier     # in another process, at the same time

Every variant trains the default model on the same rows of data:train with each of three seeds (of the adapter's first
weights, the order of rows and the dropout masks), with no choice of step. Temperature and head are fitted on rows of
data:validation, all numbers are measured on rows of data:test (held-out). --run continues where it was: a finished
run is a file of the folder. When all are there it writes the recording anew.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import command_line
import tables
from calibration_metrics import auroc, bootstrap_interval, brier_score, expected_calibration_error, log_loss
from files import read_json, whole_file, write_text
from task import TASKS

if TYPE_CHECKING:
    from llama import Llama

TASK = TASKS["sentiment"]
RECORDING = Path(__file__).resolve().parent.parent / "data" / "predictions" / "ablation.csv"
LOSSES = ("cross-entropy", "brier", "focal", "label-smoothing", "mmce")
SEEDS = (0, 1, 2)
ROWS = {"train": 256, "validation": 250, "test": 500}
EPOCHS, LEARNING_RATE, RANK = 2, 2e-3, 4
PASSES, DROPOUT_ROWS = 10, 150  # stochastic passes cost ten times a plain one, so they get fewer rows
SAME_ROWS = "cross-entropy, same rows"  # the baseline of dropout
CLIP = 1e-6  # of confidences in the gain's log losses


# Running


def train_and_answer(llama: Llama, loss: str, seed: int, folder: Path) -> dict[str, list[float]]:
    """Train one variant; P(positive) of the validation and test rows, and for cross-entropy head and dropout too."""
    import training

    rows = {split: training.LabelledRows(f"data:{split}", examples(split)) for split in ROWS}
    settings = training.TrainingSettings(loss, RANK, 2.0 * RANK, learning_rate=LEARNING_RATE, epochs=EPOCHS, seed=seed)
    run = training.begin_training(llama, TASK, rows["train"], rows["validation"], folder, settings)
    with command_line.progress(run.steps, 0, "steps") as advance:
        while run.step < run.steps:
            training.take_step(run)
            advance(1)
    encoded = {"validation": run.validation, "test": training.encode_rows(run.scorer, rows["test"])}
    found, hidden, log_probs = {}, {}, {}
    for split in ("validation", "test"):
        hidden[split] = np.empty((ROWS[split], llama.hidden_size), np.float32)
        log_probs[split] = training.answer_rows(run.scorer, encoded[split], hidden=hidden[split]).log_probs
        found[split] = np.exp(log_probs[split][:, 1]).tolist()
    if loss == "cross-entropy":
        from confidence_head import fit_head
        from mc_dropout_confidence import dropout_scorer

        confidence = {split: np.exp(log_probs[split].max(axis=1)) for split in log_probs}
        correct = log_probs["validation"].argmax(axis=1) == run.validation.targets
        groups = tables.groups_of(rows["validation"].examples)
        head = fit_head(hidden["validation"], confidence["validation"], correct, groups, "ablation")
        found["head"] = head.predict(hidden["test"], confidence["test"]).tolist()
        dropout = dropout_scorer(llama, TASK, PASSES, seed)
        found["dropout"] = dropout.run_passes(encoded["test"].prompts[:DROPOUT_ROWS])[0].mean(axis=0)[:, 1].tolist()
    llama.model = llama.model.unload()
    return found


def examples(split: str) -> list[tables.Example]:
    return list(islice(tables.read_examples(f"data:{split}"), ROWS[split]))


def run_all(folder: Path, only: Sequence[str]) -> bool:
    """Train what the folder lacks, then write the recording if nothing is missing; whether it was written."""
    from llama import load_llama

    llama = None
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{loss}/{seed}": folder / f"{loss}-{seed}.json" for loss in LOSSES for seed in SEEDS}
    for name, path in files.items():
        loss, _, seed = name.partition("/")
        if loss in only and not path.exists():
            print(f"{loss}, seed {seed}", file=sys.stderr)
            llama = llama or load_llama("default")
            found = train_and_answer(llama, loss, int(seed), path.with_suffix(""))
            write_text(path, json.dumps(found))
    if missing := [name for name, path in files.items() if not path.exists()]:
        print(f"still to run: {', '.join(missing)}")
        return False
    write_recording({name: read_json(path) for name, path in files.items()})
    return True


def write_recording(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """One line a text, one column a run, so that it can be read and compared with any tool.

    A run of cross-entropy is followed by its head and its dropout, which answer (the first) test rows only.
    """
    columns: dict[str, dict[str, Sequence[float]]] = {}  # name -> split -> values
    for name, run in runs.items():
        columns[name] = {"validation": run["validation"], "test": run["test"]}
        for extra in ("head", "dropout"):
            if extra in run:
                columns[name.replace("cross-entropy", extra)] = {"validation": [], "test": run[extra]}
    with whole_file(RECORDING) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "split", "label", *columns])
        for split in ("validation", "test"):
            for number, example in enumerate(examples(split)):
                values = [column[split] for column in columns.values()]
                cells = [f"{of[number]:.5f}" if number < len(of) else "" for of in values]
                writer.writerow([example.id, split, example.label, *cells])


# Reading


@dataclass(frozen=True)
class Recording:
    """Columns of values [n], NaN where a run has none; whether a row is positive [n]; whether it is a test row [n]."""

    columns: dict[str, np.ndarray]
    positive: np.ndarray
    is_test: np.ndarray


@dataclass(frozen=True)
class SeedResult:
    """What a variant with one seed says of the test rows that it answers."""

    confidence: np.ndarray
    correct: np.ndarray


def read_recording() -> Recording:
    rows = [row for _, row in tables.read_rows(RECORDING)]
    names = [name for name in rows[0] if "/" in name]
    columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    positive = np.array([row["label"] == "positive" for row in rows])
    return Recording(columns, positive, np.array([row["split"] == "test" for row in rows]))


def variants(recording: Recording) -> dict[str, list[SeedResult]]:
    """Variant -> its result with each seed, with a temperature fitted on validation rows as a variant of its own."""
    from calibration import TemperatureScalingCalibrator

    test, found = recording.is_test, {}
    for name, column in recording.columns.items():
        variant, _, seed = name.partition("/")
        answer = recording.columns[f"cross-entropy/{seed}"] if variant == "head" else column
        correct = (answer > 0.5) == recording.positive
        confidence = column if variant == "head" else np.maximum(column, 1 - column)
        answered = test & ~np.isnan(column)
        found.setdefault(variant, []).append(SeedResult(confidence[answered], correct[answered]))
        if variant in LOSSES:
            temperature = TemperatureScalingCalibrator().fit(confidence[~test], correct[~test])
            result = SeedResult(temperature.predict(confidence[test]), correct[test])
            found.setdefault(f"{variant}, temperature", []).append(result)
    n = len(found["dropout"][0].correct)  # the first of the test rows
    found[SAME_ROWS] = [SeedResult(of.confidence[:n], of.correct[:n]) for of in found["cross-entropy"]]
    return found


def measures(result: SeedResult) -> dict[str, float]:
    confidence, correct = result.confidence, result.correct
    return {
        "accuracy": correct.mean(),
        "log_loss": log_loss(confidence, correct),
        "brier": brier_score(confidence, correct),
        "ece": expected_calibration_error(confidence, correct),
        "auroc": auroc(confidence, correct),
    }


def summarize(found: Mapping[str, Sequence[SeedResult]], groups: Sequence[str]) -> dict[str, dict]:
    """Variant -> its numbers, mean over seeds, and the gain in log loss over its baseline with its interval."""
    report = {}
    for name, seeds in found.items():
        of_seeds = [measures(seed) for seed in seeds]
        entry = {key: float(np.mean([of_seed[key] for of_seed in of_seeds])) for key in of_seeds[0]}
        entry |= {"n": len(seeds[0].correct), "log_loss_of_seeds": [of_seed["log_loss"] for of_seed in of_seeds]}
        baseline = found[SAME_ROWS if name == "dropout" else "cross-entropy"]
        if entry["n"] == len(baseline[0].correct):
            entry["gain"] = gain_in_log_loss(baseline, seeds, groups[: entry["n"]])
        report[name] = entry
    return report


def gain_in_log_loss(
    baseline: Sequence[SeedResult], seeds: Sequence[SeedResult], groups: Sequence[str]
) -> tuple[float, float, float]:
    """How much less log loss than the baseline, mean over seeds, in nats; and its 95 % interval, low and high."""

    def mean_loss(results: Sequence[SeedResult], rows: np.ndarray) -> float:
        return np.mean([log_loss(result.confidence[rows], result.correct[rows], CLIP) for result in results])

    def gain(rows: np.ndarray) -> list[float]:
        return [mean_loss(baseline, rows) - mean_loss(seeds, rows)]

    (interval,) = bootstrap_interval(gain, groups).tolist()
    return (float(gain(np.arange(len(groups)))[0]), *interval)


def report_text(report: Mapping[str, Mapping]) -> str:
    lines = [["", "n", "accuracy", "log loss", "of three seeds", "Brier", "ECE", "AUROC", "gain in log loss [95 %]"]]
    names = [name for loss in LOSSES for name in (loss, f"{loss}, temperature")]
    for name in [*names, "head", "dropout", SAME_ROWS]:
        entry = report[name]
        shown = {key: f"{entry[key]:.3f}" for key in ("accuracy", "log_loss", "brier", "ece", "auroc")}
        spread = f"{min(entry['log_loss_of_seeds']):.3f} to {max(entry['log_loss_of_seeds']):.3f}"
        gain = "-"
        if "gain" in entry and name != "cross-entropy":
            gain = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*entry["gain"])
        cells = [f"{entry['n']:,}", shown["accuracy"], shown["log_loss"], spread]
        lines.append([name, *cells, shown["brier"], shown["ece"], shown["auroc"], gain])
    head = (
        f"Trained on {ROWS['train']} rows of data:train, {EPOCHS} epochs, rank {RANK}, mean of {len(SEEDS)} seeds.\n"
        f"Temperature and head are fitted on {ROWS['validation']} rows of data:validation; all numbers are held-out,\n"
        f"on rows of data:test. Dropout is the mean of {PASSES} passes. Gain: how much less log loss than\n"
        "cross-entropy without a temperature on the same rows; 95 % cluster bootstrap over templates.\n\n"
    )
    return head + command_line.columns(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.run and not run_all(Path(args.run), args.only):
        return
    group_of = {row["id"]: row["group"] for _, row in tables.read_rows("data:test")}
    groups = [group_of[example.id] for example in examples("test")]
    print(report_text(summarize(variants(read_recording()), groups)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    parser.add_argument("--run", metavar="FOLDER", help="train the variants again; finished runs are kept here")
    parser.add_argument("--only", nargs="+", choices=LOSSES, default=LOSSES, metavar="LOSS", help="train these alone")
    args = parser.parse_args(argv)
    if args.only != LOSSES and not args.run:
        parser.error("--only says what to train and needs --run")
    return args


if __name__ == "__main__":
    command_line.run(main, resumes=True)
