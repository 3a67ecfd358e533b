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
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import command_line
import predictions
import tables
import task as tasks

RECORDING = Path(__file__).resolve().parent.parent / "data" / "predictions" / "ablation.csv"
LOSSES = ("cross-entropy", "brier", "focal", "label-smoothing", "mmce")
SEEDS = (0, 1, 2)
ROWS = {"train": 256, "validation": 250, "test": 500}
EPOCHS, LEARNING_RATE, RANK = 2, 2e-3, 4
PASSES, DROPOUT_ROWS = 10, 150  # stochastic passes cost ten times a plain one, so they get fewer rows
NAMES = ("accuracy", "log_loss", "brier", "ece", "auroc")


# Running


def train_and_score(llama: object, loss: str, seed: int, folder: Path) -> dict[str, list[float]]:
    """Train one variant; P(positive) of the validation and test rows, and for cross-entropy head and dropout too."""
    import accelerate

    import fine_tune_model as tuning

    flags = ["--loss", loss, "--seed", seed, "--epochs", EPOCHS, "--learning-rate", LEARNING_RATE, "--rank", RANK]
    args = tuning.parse_arguments([*map(str, flags), "--output-dir", str(folder / f"{loss}-{seed}")])
    tuning.add_adapter(llama, args)
    student = tuning.study(llama, tasks.TASKS[args.task])
    tables = {name: tuning.read_table(student, examples(name), f"data:{name}") for name in ROWS}
    run = tuning.prepare(student, tables["train"], tables["validation"], args, accelerate.PartialState(cpu=True))
    with command_line.progress(run.steps, 0, "steps") as advance:
        while run.step < run.steps:
            run.step += 1
            tuning.take_step(run, False)
            advance(1)
    found, hidden, confidence, correct = {}, {}, {}, {}
    for name in ("validation", "test"):
        hidden[name] = np.empty((ROWS[name], llama.hidden_size), np.float32)
        log_probs, _ = tuning.measure(student, tables[name], run.world, hidden[name])
        found[name] = np.exp(log_probs[:, 1]).tolist()
        confidence[name] = np.exp(log_probs.max(axis=1))
        correct[name] = log_probs.argmax(axis=1) == tables[name].targets
    if loss == "cross-entropy":
        from confidence_head import fit_head

        groups = tables.duplicate_groups([example.text for example in tables["validation"].examples])
        head = fit_head(hidden["validation"], confidence["validation"], correct["validation"], groups, "ablation")
        found["head"] = head.predict(hidden["test"], confidence["test"]).tolist()
        some = tuning.read_table(student, examples("test")[:DROPOUT_ROWS], "data:test")
        total = np.zeros(DROPOUT_ROWS)
        for number in range(PASSES):
            with llama.dropping_out([seed, number, 1]):
                log_probs = llama.answer_log_probs(some.rows, student.ids)
            total += tasks.label_probabilities(log_probs, student.answers, list(student.task.labels))[0][:, 1]
        found["dropout"] = (total / PASSES).tolist()
    llama.model = llama.model.unload()
    return found


def examples(split: str) -> list[tables.Example]:
    return list(islice(tables.read_examples(f"data:{split}"), ROWS[split]))


def run_all(folder: Path, only: Sequence[str]) -> bool:
    """Train what the folder lacks, then write the recording if nothing is missing; whether it was written."""
    from llama import load_llama

    llama = None
    folder.mkdir(parents=True, exist_ok=True)
    variants = [(loss, seed) for loss in LOSSES for seed in SEEDS]
    for loss, seed in variants:
        path = folder / f"{loss}-{seed}.json"
        if loss in only and not path.exists():
            print(f"{loss}, seed {seed}", file=sys.stderr)
            llama = llama or load_llama("default")
            found = train_and_score(llama, loss, seed, folder)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(found), encoding="utf-8")
            part.replace(path)
    paths = {f"{loss}/{seed}": folder / f"{loss}-{seed}.json" for loss, seed in variants}
    if missing := [name for name, path in paths.items() if not path.exists()]:
        print(f"still to run: {', '.join(missing)}")
        return False
    write_recording({name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()})
    return True


def write_recording(runs: dict[str, dict]) -> None:
    """One line a text, one column a run, so that it can be read and compared with any tool."""
    kinds = [(name, kind) for name, run in runs.items() for kind in ("", "head", "dropout") if not kind or kind in run]
    with open(RECORDING, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["id", "split", "label", *(name.replace("cross-entropy", kind or "cross-entropy") for name, kind in kinds)]
        )
        for split in ("validation", "test"):
            for number, example in enumerate(examples(split)):
                columns = [runs[name][kind or split] if split == "test" or not kind else [] for name, kind in kinds]
                cells = [f"{column[number]:.5f}" if number < len(column) else "" for column in columns]
                writer.writerow([example.id, split, example.label, *cells])


# Reading


def read_recording() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(column -> values [n], NaN where it has none; whether positive [n]; whether a test row [n]) of the recording."""
    with open(RECORDING, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if "/" in name]
    values = {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns}
    return (
        values,
        np.array([row["label"] == "positive" for row in rows]),
        np.array([row["split"] == "test" for row in rows]),
    )


def variants(values: dict[str, np.ndarray], positive: np.ndarray, test: np.ndarray) -> dict[str, list[tuple]]:
    """Variant -> for each seed (confidence, correct) of the test rows; rows without a value are NaN."""
    from calibration import TemperatureScalingCalibrator

    found: dict[str, list[tuple]] = {}
    for name, column in values.items():
        variant, _, seed = name.partition("/")
        confidence, correct = np.maximum(column, 1 - column), (column > 0.5) == positive
        if variant == "head":
            plain = values[f"cross-entropy/{seed}"]
            confidence, correct = column, (plain > 0.5) == positive
        found.setdefault(variant, []).append((confidence[test], correct[test]))
        if variant in LOSSES:
            cooled = TemperatureScalingCalibrator().fit(confidence[~test], correct[~test])
            found.setdefault(f"{variant}, temperature", []).append((cooled.predict(confidence[test]), correct[test]))
    some = ~np.isnan(found["dropout"][0][0])
    found["cross-entropy, same rows"] = [(c[some], right[some]) for c, right in found["cross-entropy"]]
    found["dropout"] = [(c[some], right[some]) for c, right in found["dropout"]]
    return found


def measure(confidence: np.ndarray, correct: np.ndarray) -> list[float]:
    from calibration_metrics import auroc, brier_score, expected_calibration_error, log_loss

    scores = [log_loss(confidence, correct), brier_score(confidence, correct)]
    return [correct.mean(), *scores, expected_calibration_error(confidence, correct), auroc(confidence, correct)]


def compare(found: dict[str, list[tuple]], groups: Sequence[str]) -> dict[str, dict]:
    """Variant -> its numbers, mean over seeds, and the gain in log loss over its baseline with its interval."""
    from calibration_metrics import bootstrap_interval

    report = {}
    for name, seeds in found.items():
        each = np.array([measure(*seed) for seed in seeds])
        n = len(seeds[0][0])
        baseline = found["cross-entropy, same rows" if name == "dropout" else "cross-entropy"]
        entry = {"n": n, **dict(zip(NAMES, each.mean(axis=0).tolist(), strict=True))}
        entry["log_loss_of_seeds"] = each[:, 1].tolist()
        if n == len(baseline[0][0]):
            gain = np.mean([losses(*b) - losses(*s) for b, s in zip(baseline, seeds, strict=True)], axis=0)
            low, high = bootstrap_interval(lambda rows, gain=gain: [gain[rows].mean()], groups[:n])[0]
            entry["gain"] = [float(gain.mean()), float(low), float(high)]
        report[name] = entry
    return report


def losses(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """The log loss of each row [n], in nats."""
    clipped = np.clip(confidence, 1e-6, 1 - 1e-6)
    return -np.where(correct, np.log(clipped), np.log1p(-clipped))


def render(report: dict[str, dict]) -> str:
    lines = [["", "n", "accuracy", "log loss", "of three seeds", "Brier", "ECE", "AUROC", "gain in log loss [95 %]"]]
    order = [name for loss in LOSSES for name in (loss, f"{loss}, temperature")]
    for name in [*order, "head", "dropout", "cross-entropy, same rows"]:
        entry = report[name]
        spread = f"{min(entry['log_loss_of_seeds']):.3f} to {max(entry['log_loss_of_seeds']):.3f}"
        gain = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*entry["gain"]) if "gain" in entry else "-"
        cells = [f"{entry[key]:.3f}" for key in NAMES]
        lines.append(
            [name, f"{entry['n']:,}", *cells[:2], spread, *cells[2:], "-" if name == "cross-entropy" else gain]
        )
    head = (
        f"Trained on {ROWS['train']} rows of data:train, {EPOCHS} epochs, rank {RANK}, mean of {len(SEEDS)} seeds.\n"
        f"Temperature and head are fitted on {ROWS['validation']} rows of data:validation; all numbers are held-out,\n"
        f"on rows of data:test. Dropout is the mean of {PASSES} passes. Gain: how much less log loss than\n"
        "cross-entropy without a temperature on the same rows; 95 % cluster bootstrap over frames.\n\n"
    )
    return head + command_line.columns(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.run and not run_all(Path(args.run), args.only):
        return
    group = {row["id"]: row["group"] for _, row in tables.read_rows("data:test")}
    values, positive, test = read_recording()
    print(render(compare(variants(values, positive, test), [group[e.id] for e in examples("test")])))


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
