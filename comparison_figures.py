"""The six figures of a comparison of two models, each drawn from its records; no model and no command line.

draw_figures(comparison, report, Path("figures"))    # of compare_base_vs_finetuned.read_comparison and its report
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import calibration_metrics as metrics
import comparison_text
import plotting
from command_line import printable
from comparison_text import NAMES, PLANTED_RULE

if TYPE_CHECKING:
    from compare_base_vs_finetuned import ModelComparison


def draw_figures(comparison: ModelComparison, report: dict, folder: Path) -> None:
    """The six figures."""
    models, scores, seed = comparison.models, report["scores"], report["settings"]["seed"]
    names = printable(" and ".join(Path(model.about["file"]).name for model in models.values()))
    how = "each row by a calibrator that did not see its group"
    if report["calibrated_on"]:
        how = f"calibrators fitted on {report['calibration_rows']:,} other rows"
    unfitted = f"{comparison_text.count(report)} ({names})"
    fitted = f"{comparison_text.where(report)} ({names}; {how})"
    plotting.accuracy_comparison(folder / "accuracy_comparison.png", accuracies(report), where=unfitted, seed=seed)
    of_calibrators = {key: found for key, found in scores.items() if key != "calibrated"}
    plotting.calibration_error_comparison(
        folder / "calibration_error_comparison.png",
        {key: {name: found["paired"]["ECE"][name][0] for name in NAMES} for key, found in of_calibrators.items()},
        {key: {name: found[name]["ece_noise_floor"] for name in NAMES} for key, found in of_calibrators.items()},
        {key: {name: found["paired"]["log loss"][name] for name in NAMES} for key, found in of_calibrators.items()},
        where=fitted,
        seed=seed,
    )
    plotting.confidence_comparison(
        folder / "confidence_distributions.png",
        {score: {name: m.confidence[score] for name, m in models.items()} for score in ("raw", "calibrated")},
        {name: model.scores.correct for name, model in models.items()},
        where=fitted,
        calibrators={name: model.about["calibrator"] for name, model in models.items()},
    )
    for key in ("raw", "platt", "isotonic"):
        what = f"confidence after {key} calibration of P(label)" if key != "raw" else "raw confidence"
        where = fitted if key != "raw" else f"{unfitted}, nothing fitted"
        panels = reliability_panels(comparison, scores, key)
        plotting.reliability_diagrams(folder / f"reliability_{key}.png", panels, what=what, where=where)


def accuracies(report: dict) -> dict[str, dict]:
    """Part of the rows -> model -> (accuracy, low, high): all rows, the first breakdown, and the planted rule."""
    found = {f"all {report['rows']:,}": report["scores"]["raw"]["paired"]["accuracy"]}
    for number, (column, parts) in enumerate(report["parts"].items()):
        if number and column != PLANTED_RULE:
            continue
        for value, part in parts.items():
            title = f"neutral, {value}" if column == PLANTED_RULE else value.replace("_", " ")
            found[printable(f"{title}  {part['n']:,}")] = {name: part[name]["accuracy"] for name in NAMES}
    return {title: {name: of_model[name] for name in NAMES} for title, of_model in found.items()}


def reliability_panels(comparison: ModelComparison, scores: Mapping, key: str) -> list[plotting.ReliabilityPanel]:
    panels = []
    for (name, model), color in zip(comparison.models.items(), plotting.MODEL_COLORS, strict=True):
        title, bins = f"{name}, {key}\ncannot be fitted to both models here", []
        if key in scores:
            loss, ece = (scores[key]["paired"][score][name][0] for score in ("log loss", "ECE"))
            title = f"{name}, {key}\nECE {ece:.3f} ({scores[key][name]['ece_noise_floor']:.3f}), log loss {loss:.3f}"
            bins = metrics.reliability_bins(model.confidence[key], model.scores.correct)
        panels.append(plotting.ReliabilityPanel(title, bins, color))
    return panels
