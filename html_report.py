"""report.html and comparison.html: pages with a threshold to move, which need no network, from the numbers of a report.

    write_page("report.html", page_data(report, rows, calibrated, by_label))
    write_page("comparison.html", comparison_data(report, models, by_label), "comparison")

Everything is computed here, so that a page only looks numbers up. Its template stands in scripts/.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import comparison_text
from calibration_metrics import reliability_bins
from decisions import dollars_a_day, priced_automation
from predictions import Prediction, confidence_and_correct

if TYPE_CHECKING:
    from compare_base_vs_finetuned import ComparedModel

TEMPLATES = Path(__file__).resolve().parent / "scripts"
SHARED = {"head": "page_head.html", "scripts": "page_scripts.html"}  # what all templates include
LABEL_TARGETS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99)  # to choose from for each label
SHOWN, LENGTH = 50, 500  # rows in a table, characters of a text in it


def page_data(
    report: Mapping,
    rows: Sequence[Prediction],
    calibrated: np.ndarray,
    by_label: Mapping[str, Sequence[Mapping]],
    before: Sequence[Prediction] | None = None,
) -> dict:
    """What the page shows: the report of calibration_demo.py, and what it needs of these rows at every threshold.

    `by_label` are the thresholds of each predicted label's targets, of `calibration_demo.targets_by_label`; `before`
    the rows as the model predicted them, where calibration has changed that.
    """
    correct, (raw, raw_correct) = confidence_and_correct(rows)[1], confidence_and_correct(before or rows)
    prices = {name: report["settings"][name] for name in ("volume", "review_cost", "error_cost")}
    thresholds = page_thresholds(calibrated.min(), named_thresholds(report))
    guaranteed = report["threshold"]["value"]
    rising, falling = np.argsort(calibrated, kind="stable"), np.argsort(-calibrated, kind="stable")
    return {
        "report": report,
        "method": rows[0].method,
        "steps": priced_automation(calibrated, correct, thresholds, **prices),
        "start": thresholds.index(report["cost_optimal_threshold"] if guaranteed is None else guaranteed),
        "review_everything": dollars_a_day(0, None, **prices)["dollars"],
        "reliability": {
            "raw": reliability_bins(raw, raw_correct),
            "calibrated": reliability_bins(calibrated, correct),
        },
        "by_label": by_label,
        "errors": table_rows(rows, raw, calibrated, falling[~correct[falling]]),
        "least_certain": table_rows(rows, raw, calibrated, rising),
    }


def named_thresholds(report: Mapping) -> set[float]:
    """Every threshold that a calibration report names."""
    named = {gate["threshold"] for gate in report["gates"]["calibrated"]} | {report["cost_optimal_threshold"]}
    for guarantee in report["guarantees"]:
        for rung in guarantee["ladder"]:
            named |= {rung["threshold"][key] for key in ("value", "naive_value")}
    return named - {None}


def page_thresholds(least: float, named: set[float]) -> list[float]:
    """Every half percent from below the least confidence on, and the named ones."""
    return sorted({step / 200 for step in range(int(200 * min(0.5, least)), 201)} | named)


def comparison_data(report: Mapping, models: Mapping[str, ComparedModel], by_label: Mapping[str, Mapping]) -> dict:
    """What comparison.html shows: the report of compare_base_vs_finetuned.py, and both models at every threshold.

    `by_label` is how both fare on the rows of each true label, like the report's parts; the tables are as printed.
    """
    money = report["money"]
    prices = {name: report["settings"][name] for name in ("volume", "review_cost", "error_cost")}
    calibrated = {name: model.confidence["calibrated"] for name, model in models.items()}
    guaranteed = {}
    for name in models:
        rungs = [rung["threshold"] for found in report["guarantees"] for rung in found[name]["ladder"]]
        guaranteed[name] = [threshold for threshold in rungs if threshold["value"] is not None]
    named = {threshold["value"] for found in guaranteed.values() for threshold in found} | {money["threshold"]}
    thresholds = page_thresholds(min(scores.min() for scores in calibrated.values()), named)
    steps = {}
    for name, model in models.items():
        steps[name] = priced_automation(calibrated[name], model.scores.correct, thresholds, **prices)
    pairs = enumerate(zip(*(model.rows for model in models.values()), strict=True))
    differing = np.array([i for i, (one, other) in pairs if one.prediction != other.prediction], dtype=np.int64)
    most_sure = differing[np.argsort(-sum(calibrated.values())[differing], kind="stable")]
    shown = {n: table_rows(m.rows, m.confidence["raw"], calibrated[n], most_sure) for n, m in models.items()}
    return {
        "report": report,
        "verdict": [*comparison_text.verdicts(report)],
        "where": comparison_text.where(report),
        "compared": [*comparison_text.what_was_compared(report)],
        "tables": comparison_text.page_tables(report, by_label),
        "guaranteed": guaranteed,
        "steps": steps,
        "start": thresholds.index(money["threshold"]),
        "review_everything": money["review_everything"],
        "differing": len(differing),
        "rows": shown,
    }


def table_rows(rows: Sequence[Prediction], raw: np.ndarray, calibrated: np.ndarray, numbers: np.ndarray) -> list[dict]:
    """The first of the rows with these numbers, with their texts."""
    found = []
    for number in numbers[:SHOWN].tolist():
        row = rows[number]
        text = row.text if len(row.text) <= LENGTH else row.text[:LENGTH] + " [...]"
        cells = {"id": row.id, "text": text, "label": row.label, "prediction": row.prediction}
        found.append(cells | {"confidence": float(raw[number]), "calibrated_confidence": calibrated[number]})
    return found


def write_page(path: Path, data: Mapping, template: str = "report") -> None:
    """A template with plotly.js and the data in it: one file that asks no network for anything."""
    from plotly.offline import get_plotlyjs

    # Without a "<" no text can end the element it stands in; JSON has its escape for it.
    text = json.dumps(data, allow_nan=False, default=float).replace("<", "\\u003c")
    # The page's policy runs only scripts that carry this word, which nobody can write into a text: it is the data's.
    nonce = hashlib.sha256(text.encode()).hexdigest()
    page = (TEMPLATES / f"{template}_template.html").read_text(encoding="utf-8")
    for name, file in SHARED.items():
        page = page.replace("{{" + name + "}}", (TEMPLATES / file).read_text(encoding="utf-8"))
    # In one pass, so that nothing is put into what a text or plotly.js happens to hold.
    parts = {"plotly": get_plotlyjs(), "data": text, "nonce": nonce}
    page = re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], page)
    path.write_text(page, encoding="utf-8", newline="\n")
