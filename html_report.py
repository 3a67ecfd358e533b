"""report.html: one page with a threshold to move, which needs no network, from the numbers of a calibration report.

    write_page("report.html", page_data(report, rows, calibrated))

Everything is computed here, so that the page only looks numbers up. Its template is scripts/report_template.html.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from calibration_metrics import reliability_bins
from decisions import dollars_a_day, priced_automation
from predictions import Prediction, confidence_and_correct

TEMPLATE = Path(__file__).resolve().parent / "scripts" / "report_template.html"
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
    thresholds = page_thresholds(report, calibrated)
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


def page_thresholds(report: Mapping, calibrated: np.ndarray) -> list[float]:
    """Every half percent from below the least confidence on, and every threshold that the report names."""
    first = int(200 * min(0.5, calibrated.min()))
    thresholds = {step / 200 for step in range(first, 201)}
    thresholds |= {gate["threshold"] for gate in report["gates"]["calibrated"]}
    thresholds.add(report["cost_optimal_threshold"])
    for guarantee in report["guarantees"]:
        for rung in guarantee["ladder"]:
            thresholds |= {rung["threshold"][key] for key in ("value", "naive_value")}
    return sorted(thresholds - {None})


def table_rows(rows: Sequence[Prediction], raw: np.ndarray, calibrated: np.ndarray, numbers: np.ndarray) -> list[dict]:
    """The first of the rows with these numbers, with their texts."""
    found = []
    for number in numbers[:SHOWN].tolist():
        row = rows[number]
        text = row.text if len(row.text) <= LENGTH else row.text[:LENGTH] + " [...]"
        cells = {"id": row.id, "text": text, "label": row.label, "prediction": row.prediction}
        found.append(cells | {"confidence": float(raw[number]), "calibrated_confidence": calibrated[number]})
    return found


def write_page(path: Path, data: Mapping) -> None:
    """The template with plotly.js and the data in it: one file that asks no network for anything."""
    from plotly.offline import get_plotlyjs

    # Without a "<" no text can end the element it stands in; JSON has its escape for it.
    text = json.dumps(data, allow_nan=False, default=float).replace("<", "\\u003c")
    # The page's policy runs only scripts that carry this word, which nobody can write into a text: it is the data's.
    nonce = hashlib.sha256(text.encode()).hexdigest()
    parts = {"plotly": get_plotlyjs(), "data": text, "nonce": nonce}
    # In one pass, so that nothing is put into what a text or plotly.js happens to hold.
    page = re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], TEMPLATE.read_text(encoding="utf-8"))
    path.write_text(page, encoding="utf-8", newline="\n")
