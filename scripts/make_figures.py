"""Draw every image of the README again, from the recorded predictions alone: no model, no torch, some minutes.

    python scripts/make_figures.py                             # all of them, into images/
    python scripts/make_figures.py reliability cost            # some
    python scripts/make_figures.py demo_visualizations         # the fine-tuning set
    python scripts/make_figures.py --check                     # are the images those that the recordings give?
    python scripts/make_figures.py --list                      # their names, files and recordings

The figures are those of plotting.py, of what the scripts measure with their default settings.

--check draws into a temporary folder and compares bytes: the same recordings give the same on one machine. Another
machine may round a pixel otherwise, and another matplotlib or freetype sets text otherwise; then pixels are compared
with a tolerance, small or, with other versions, rough; it says which. Exit code: 0, or 1 when an image differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import plotting  # noqa: E402
import predictions  # noqa: E402
import voting  # noqa: E402
from task import read_task  # noqa: E402

RECORDED, SPLITS, ADAPTER = "data/predictions", "data/sentiment/splits.csv", "fine_tuned_sentiment_model"
DRAWS, ROWS = (10, 100, 1000), 1000  # of the vote shares: answers to each text, texts
MADE_WITH = ("3.11.2", "2.14.3")  # matplotlib and freetype of the images in this repository
# (side, limit): the mean red, green and blue of a square of so many pixels may differ by so much of 255. With the same
# tools a lone pixel may differ, and a changed digit is seen. Others set every letter elsewhere: these numbers let all
# images pass that matplotlib 3.10.8 with freetype 2.6.1 draws, and see only what is grossly wrong.
SAME_TOOLS, OTHER_TOOLS = (4, 20), (32, 45)


# What draws them: each function fills a folder, and is called once


def draw_calibration(folder: Path) -> None:
    """The figures of calibration_demo.py, and all calibrators beside each other."""
    import calibration_demo as demo
    import calibration_figures

    names = ("base_calibration.jsonl", "base_test.jsonl")
    fit, test = (demo.labelled_rows(ROOT / RECORDED / name, str(ROOT / SPLITS)) for name in names)
    study = demo.calibration_study(fit, test)
    report = demo.study_report(study)
    calibration_figures.draw_figures(study, report, folder)
    common = {"chosen": report["chosen"], "where": calibration_figures.caption_words(study), "seed": study.seed}
    plotting.calibration_method_comparison(folder / "methods.png", report["metrics"], **common)


def draw_fine_tuning(folder: Path) -> None:
    """The figures of compare_base_vs_finetuned.py."""
    import compare_base_vs_finetuned as compare

    comparison = compare.read_comparison(**compare.recorded_files())
    compare.draw_figures(comparison, compare.comparison_report(comparison), folder)


def draw_training(folder: Path) -> None:
    """The curves that fine_tune_model.py drew at the end of the training, from the log that it left."""
    lines = (ROOT / ADAPTER / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    config = json.loads((ROOT / ADAPTER / "training_config.json").read_text(encoding="utf-8"))
    plotting.training_curves(
        folder / "training_curves.png",
        [json.loads(line) for line in lines],
        best_step=config["best"]["step"],
        model=first_recorded_rows(1)[0].model,
        task=config["task"]["name"],
        training_rows=config["train"]["rows"],
        validation_rows=config["validation"]["rows"],
    )


def draw_public_study(folder: Path) -> None:
    """The figure of scripts/public_study.py."""
    import study_tables

    public = ROOT / RECORDED / "public"
    names = {path.name.partition(".")[0] for path in public.glob("*.jsonl.gz")} - {study_tables.OURS}
    studies = study_tables.measured_studies(public, names)
    study_tables.draw_coverage(folder / "public_study.png", studies)


def draw_vote_shares(folder: Path) -> None:
    """What consistency_confidence.py --first-token draws, from the recorded probabilities of the first token."""
    about = f"{first_recorded_rows(1)[0].model} on the first texts of data:test"
    plotting.agreement_convergence(folder / "agreement.png", recorded_convergence(), about=about)


def recorded_convergence() -> dict[int, np.ndarray]:
    """`voting.converge` of the recorded rows: the draws depend on a row's id and text and on the seed, 0, alone."""
    rows = first_recorded_rows(ROWS)
    labels = read_task(rows[0].task).labels
    by_label = np.array([[row.probabilities[label] * row.label_mass for label in labels] for row in rows])
    return voting.converge(by_label, [voting.answer_seed(0, row.id, row.text, 0) for row in rows], DRAWS)


def first_recorded_rows(n: int) -> list[predictions.Prediction]:
    return list(islice(predictions.iterate(ROOT / RECORDED / "base_test.jsonl"), n))


# Which there are


@dataclass(frozen=True)
class Figure:
    """One image: where it is, what draws it and how it calls it, what it is made of."""

    file: str
    draw: Callable[[Path], None]
    drawn: str
    source: str


OF_CALIBRATION = {  # name -> what calibration_demo.py calls it
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
OF_VOTE_SHARES = {"agreement_converges": "agreement"}
OF_FINE_TUNING = {
    "fine_tuning/accuracy_comparison": "accuracy_comparison",
    "fine_tuning/calibration_error_comparison": "calibration_error_comparison",
    "fine_tuning/confidence_distributions": "confidence_distributions",
    "fine_tuning/reliability_raw": "reliability_raw",
    "fine_tuning/reliability_platt": "reliability_platt",
    "fine_tuning/reliability_isotonic": "reliability_isotonic",
}


def images(names: Mapping[str, str], draw: Callable[[Path], None], source: str) -> dict[str, Figure]:
    return {name: Figure(f"images/{name}.png", draw, f"{drawn}.png", source) for name, drawn in names.items()}


FIGURES = images(OF_CALIBRATION, draw_calibration, f"{RECORDED}/base_calibration.jsonl, base_test.jsonl")
FIGURES |= images(OF_VOTE_SHARES, draw_vote_shares, f"{RECORDED}/base_test.jsonl")
FIGURES |= images(OF_FINE_TUNING, draw_fine_tuning, f"{RECORDED}/base_*.jsonl, tuned_*.jsonl")
FIGURES |= images({"public_study": "public_study"}, draw_public_study, f"{RECORDED}/public/")
FIGURES["training_curves"] = Figure(
    f"{ADAPTER}/training_curves.png", draw_training, "training_curves.png", f"{ADAPTER}/training_log.jsonl"
)
GROUPS = {"demo_visualizations": [name for name in FIGURES if name.startswith(("fine_tuning/", "training"))]}


def build(names: Iterable[str], folder: Path) -> None:
    """Draw these figures into a folder, each under its file's path."""
    wanted = [FIGURES[name] for name in names]
    for draw in {figure.draw: None for figure in wanted}:
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
    lines, different = [], []
    with TemporaryDirectory() as folder:
        build(names, Path(folder))
        for name in names:
            file = FIGURES[name].file
            words, is_another = difference(ROOT / file, Path(folder) / file)
            lines.append([file, words])
            different += [name] if is_another else []
    print(command_line.columns(lines))
    if tools() != MADE_WITH:
        ours, theirs = ("matplotlib {} and freetype {}".format(*versions) for versions in (tools(), MADE_WITH))
        print(f"the images were made with {theirs}, here are {ours}: a rough comparison")
    return different


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
