"""Draw every image of the README again, from the recorded predictions alone: no model, no torch, about a minute.

    python scripts/make_figures.py                             # all of them, into images/
    python scripts/make_figures.py reliability cost            # some
    python scripts/make_figures.py demo_visualizations         # the fine-tuning set
    python scripts/make_figures.py --check                     # are the images those that the recordings give?
    python scripts/make_figures.py --list                      # their names, files and recordings

It draws nothing of its own but one figure: the others are those of calibration_demo.py, compare_base_vs_finetuned.py,
consistency_confidence.py and fine_tune_model.py, with their default settings. The same recordings give the same bytes
on one machine.

--check draws into a temporary folder and compares bytes. Another machine may round a pixel otherwise, and another
matplotlib or freetype sets text otherwise; then pixels are compared with a tolerance, small or, with other versions,
rough; it says which. Exit code: 0, or 1 when an image differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import plotting  # noqa: E402
import predictions  # noqa: E402
import task as tasks  # noqa: E402

RECORDED = "data/predictions/"
ADAPTER = "fine_tuned_sentiment_model"
DRAWS, ROWS = (10, 100, 1000), 1000  # of the agreement figure: answers to each text, texts
MADE_WITH = ("3.11.2", "2.14.3")  # matplotlib and freetype of the images in this repository
# (side, limit): the mean red, green and blue of a square of so many pixels may differ by so much of 255. With the same
# tools a lone pixel may differ, and a changed digit is seen. Others set every letter elsewhere: these numbers let all
# images pass that matplotlib 3.10.8 with freetype 2.6.1 draws, and see only what is grossly wrong.
SAME_TOOLS, OTHER_TOOLS = (4, 20), (32, 45)


# What draws them: each function fills a folder, and is called once


def calibration(folder: Path) -> None:
    """The figures of calibration_demo.py, and all calibrators beside each other."""
    import calibration_demo as demo

    args = demo.parse_arguments([])
    study = demo.prepare(args)
    report = demo.measure(study, args)
    demo.draw(study, report, args, folder)
    tested, fitted = Path(args.test_on).name, Path(args.calibrate_on).name
    where = f"{study.where} ({tested}, fitted on {len(study.fit_rows):,} rows of {fitted})"
    draw_methods(report, where, folder / "methods.png")


def draw_methods(report: dict, where: str, path: Path) -> None:
    """Log loss and ECE of every calibrator and of the raw confidence, the best on top."""
    found = sorted(report["metrics"].items(), key=lambda item: item[1]["log_loss"])
    names, y = [name for name, _ in found], np.arange(len(found))
    caption = (
        f"Each calibrator, {where}; raw: nothing fitted. Lower is better. Bars of the log loss: 95 %, 1,000 bootstrap "
        f"samples of whole groups (seed {report['settings']['seed']}). Grey: 95 % of the ECEs (20 equal bins) that "
        f"true confidences show on so many independent rows, with their mean. '{report['chosen']}' was chosen by its "
        "log loss on the calibration rows, out-of-fold."
    )
    with plotting.figure(path, caption, columns=2, height=3.4, sharey=True) as axes:
        left, right = axes[0]
        for place, (name, row) in enumerate(found):
            color, marker = (plotting.RED, "s") if name == "raw" else (plotting.BLUE, "o")
            loss, ece = row["log_loss"], row["ece"]
            ends = [[loss - row["log_loss_low"]], [row["log_loss_high"] - loss]]
            left.errorbar(loss, place, xerr=ends, fmt=marker, color=color, capsize=2)
            left.annotate(f"{loss:.3f}", (loss, place), (0, 6), textcoords="offset points", ha="center", fontsize=9)
            right.barh(place, row["ece_noise_95"], 0.36, color="#d5d9e0")
            right.vlines(row["ece_noise_floor"], place - 0.18, place + 0.18, color=plotting.GREY, linewidth=2)
            right.plot(ece, place, marker, color=color)
            right.annotate(f"{ece:.3f}", (ece, place), (0, 6), textcoords="offset points", ha="center", fontsize=9)
        left.set_yticks(y, [f"{name}\n(chosen)" if name == report["chosen"] else name for name in names])
        left.set(title="Log loss", xlabel="nats", ylim=(len(found) - 0.4, -0.7))
        right.set(title="Expected calibration error", xlabel="ECE; grey: if the confidence were true", xlim=(0, None))


def fine_tuning(folder: Path) -> None:
    """The figures of compare_base_vs_finetuned.py."""
    import compare_base_vs_finetuned as compare

    args = compare.parse_arguments([])
    study = compare.prepare(args)
    compare.draw(study, compare.measure(study, args), folder)


def training(folder: Path) -> None:
    """The curves that fine_tune_model.py drew at the end of the training, from the log that it left."""
    import fine_tune_model

    lines = (ROOT / ADAPTER / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    config = json.loads((ROOT / ADAPTER / "training_config.json").read_text(encoding="utf-8"))
    model = next(predictions.iterate(ROOT / RECORDED / "base_test.jsonl")).model
    log = [json.loads(line) for line in lines]
    run = SimpleNamespace(  # what fine_tune_model.draw reads of a Run, which itself needs the model
        log=log,
        validations=[entry for entry in log if "log_loss" in entry],
        best_validation=config["best"],
        student=SimpleNamespace(llama=SimpleNamespace(name=model), task=SimpleNamespace(name=config["task"]["name"])),
        training=SimpleNamespace(rows=range(config["train"]["rows"])),
        validation=SimpleNamespace(rows=range(config["validation"]["rows"])),
    )
    fine_tune_model.draw(run, folder / "training_curves.png")


def agreement(folder: Path) -> None:
    """What consistency_confidence.py --first-token draws, from the recorded probabilities of the first token.

    The draws are its own: they hang on a row's id and text and on the seed, 0, and on nothing else.
    """
    import consistency_confidence as consistency

    sampler = consistency.Sampler(None, None, consistency.Sampling(), (), (), {}, "")  # for the seeds of its rows
    found: dict[int, list] = {size: [] for size in DRAWS}
    for _, row in zip(range(ROWS), predictions.iterate(ROOT / RECORDED / "base_test.jsonl"), strict=False):
        by_label = [row.probabilities[label] * row.label_mass for label in tasks.read_task(row.task).labels]
        shares = consistency.agreement_by_draws(by_label, sampler.seed(row, 0), DRAWS)
        for size, share in shares.items():
            found[size].append((max(by_label), share))
    pairs = {size: np.array(values) for size, values in found.items()}
    consistency.draw_convergence(folder / "agreement.png", pairs, f"{row.model} on the first texts of data:test")


# Which there are


@dataclass(frozen=True)
class Figure:
    """One image: where it is, what draws it and how it calls it, what it is made of."""

    file: str
    draw: Callable[[Path], None]
    drawn: str
    source: str


BASE = f"{RECORDED}base_calibration.jsonl, base_test.jsonl"
BOTH = f"{RECORDED}base_*.jsonl, tuned_*.jsonl"
OF_CALIBRATION = {  # name -> what calibration() calls it
    "raw_confidence_histogram": "raw_confidence_histogram",
    "reliability": "reliability_by_method",
    "calibration_method_comparison": "methods",
    "business_reliability": "business_reliability",
    "calibration_progression": "business_progression",
    "accuracy_threshold_tradeoff": "accuracy_threshold",
    "sample_size_panels": "sample_size",
    "cost": "cost_curve",
    "risk_coverage": "risk_coverage",
}
OF_FINE_TUNING = (
    "accuracy_comparison",
    "calibration_error_comparison",
    "confidence_distributions",
    "reliability_raw",
    "reliability_platt",
    "reliability_isotonic",
)
FIGURES = {
    name: Figure(f"images/{name}.png", calibration, f"{drawn}.png", BASE) for name, drawn in OF_CALIBRATION.items()
}
FIGURES["agreement_converges"] = Figure(
    "images/agreement_converges.png", agreement, "agreement.png", f"{RECORDED}base_test.jsonl"
)
FIGURES |= {
    f"fine_tuning/{name}": Figure(f"images/fine_tuning/{name}.png", fine_tuning, f"{name}.png", BOTH)
    for name in OF_FINE_TUNING
}
FIGURES["training_curves"] = Figure(
    f"{ADAPTER}/training_curves.png", training, "training_curves.png", f"{ADAPTER}/training_log.jsonl"
)
GROUPS = {"demo_visualizations": [name for name in FIGURES if name.startswith(("fine_tuning/", "training"))]}


def build(names: Iterable[str], folder: Path) -> None:
    """Draw these figures into a folder, each under its file's path."""
    wanted = [FIGURES[name] for name in names]
    for draw in dict.fromkeys(figure.draw for figure in wanted):
        with TemporaryDirectory() as part:
            draw(Path(part))
            for figure in wanted:
                if figure.draw is draw:
                    target = folder / figure.file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    copyfile(Path(part) / figure.drawn, target)


# Comparing


def difference(old: Path, new: Path) -> tuple[str, bool]:
    """(how the image at `old` differs from `new` in words, whether that is another picture)."""
    if not old.is_file():
        return "is missing", True
    if old.read_bytes() == new.read_bytes():
        return "same bytes", False
    from matplotlib.image import imread

    try:
        pictures = [np.asarray(imread(path))[..., :3] for path in (old, new)]
    except (OSError, SyntaxError, IndexError):  # Pillow's words for a broken PNG
        return "is no picture", True
    if pictures[0].shape != pictures[1].shape:
        sizes = [f"{width} x {height}" for height, width, *_ in (picture.shape for picture in pictures)]
        return f"is {sizes[0]} pixels, not {sizes[1]}", True
    side, limit = SAME_TOOLS if tools() == MADE_WITH else OTHER_TOOLS
    far = round(255 * float(np.abs(squares(pictures[0], side) - squares(pictures[1], side)).max()))
    return f"other bytes; squares of {side} pixels differ by up to {far} of 255, {limit} are allowed", far > limit


def squares(picture: np.ndarray, side: int) -> np.ndarray:
    """The mean colours [rows, columns, 3] of squares of a picture [height, width, 3], white beyond its edges."""
    height, width = (-(-length // side) for length in picture.shape[:2])
    whole = np.ones((height * side, width * side, 3))
    whole[: picture.shape[0], : picture.shape[1]] = picture
    return whole.reshape(height, side, width, side, 3).mean(axis=(1, 3))


def tools() -> tuple[str, str]:
    """The versions of what puts lines and letters on a picture."""
    import matplotlib
    from matplotlib import ft2font

    return matplotlib.__version__, ft2font.__freetype_version__


def check(names: Sequence[str]) -> list[str]:
    """Print of each figure whether it is what the recordings give; the names of those that are not."""
    with TemporaryDirectory() as folder:
        build(names, Path(folder))
        found = {
            name: difference(ROOT / file, Path(folder) / file) for name, file in ((n, FIGURES[n].file) for n in names)
        }
    print(command_line.columns([[FIGURES[name].file, words] for name, (words, _) in found.items()]))
    if tools() != MADE_WITH:
        ours, theirs = ("matplotlib {} and freetype {}".format(*versions) for versions in (tools(), MADE_WITH))
        print(f"the images were made with {theirs}, here are {ours}: a rough comparison")
    return [name for name, (_, other) in found.items() if other]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    chosen = {name for asked in args.names or FIGURES for name in GROUPS.get(asked, [asked])}
    names = [name for name in FIGURES if name in chosen]
    if args.list:
        for name in names:
            print(f"{name}\n    {FIGURES[name].file}, from {FIGURES[name].source}")
        for group, members in GROUPS.items():
            print(f"{group}\n    these: {', '.join(members)}")
    elif args.check:
        if different := check(names):
            print(f"error: not what the recordings give: {', '.join(different)}", file=sys.stderr)
            sys.exit(1)
        print(f"{len(names)} figures are what the recordings give")
    else:
        build(names, ROOT)
        print("\n".join(FIGURES[name].file for name in names))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help="a figure or a group of --list (default: all)")
    add("--check", action="store_true", help="write nothing; exit 1 when an image is not what the recordings give")
    add("--list", action="store_true", help="print the names and end")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in FIGURES and name not in GROUPS]:
        parser.error(f"no figure is called {unknown[0]!r}; --list prints the names")
    return args


if __name__ == "__main__":
    command_line.run(main)
