"""What calibration_demo.py prints, from the numbers of report.json: what to act on first, everything with `verbose`.

    print(report_text(report, verbose=True))

A screen or two: what is automated at which guarantee, how true the confidences are, what a row costs.
"""

from __future__ import annotations

from collections.abc import Mapping

import calibration_metrics as metrics
from command_line import columns, printable
from decisions import lacking_words

SUMMARY = (
    metrics.Line("accuracy", "accuracy", 3),
    metrics.Line("log loss (nats)", "log_loss", 3),
    metrics.Line("  its calibration part, a paired gain", "calibration_part", 3),
    metrics.Line("ECE (expected if calibrated: the noise floor)", "ece", 3, "ece_noise_floor"),
    metrics.Line("AUROC of confidence for correctness", "auroc", 3),
)


def report_text(report: Mapping, verbose: bool = False) -> str:
    """What a person acts on: what is automated at which guarantee, how good the confidences are, what that costs."""
    settings, where = report["settings"], report["where"]
    certainty = f"{100 * (1 - settings['delta']):g}% certainty"
    prices = f"${settings['review_cost']:g} a review and ${settings['error_cost']:g} an error"
    per_row = ", ".join(f"{name} ${cost:.2f}" for name, cost in report["cost_per_row"].items())
    sections = [
        verdict(report, certainty),
        provenance(report),
        f"{where}; brackets are 95 % intervals:\n{summary(report)}",
        f"Guarantees with {certainty}, cross-fitted:\n"
        + guarantees(report, verbose),
        f"Cost-optimal threshold {report['cost_optimal_threshold']:.2f} for {prices}. A row costs there:\n  {per_row}",
    ]
    if not verbose:
        sections.append("--verbose adds every calibrator, predicted label, confidence band and threshold.")
        return "\n\n".join(sections)
    sections += [
        f"Candidates by log loss on the calibration rows, out-of-fold, mean and sd of 5 seeds:\n{candidates(report)}",
        f"{where}, lowest log loss first; brackets are 95 % intervals:\n{measurements(report)}",
        f"By predicted label, {where}:\n{predicted_labels(report)}",
        f"Confidence bands, {where}:\n{confidence_bands(report)}",
        f"A day of {settings['volume']:,} predictions at {prices}, {where}:\n{gates(report)}",
    ]
    return "\n\n".join(sections)


def verdict(report: Mapping, certainty: str) -> str:
    """What can be automated at the target that was asked for."""
    threshold, target = report["threshold"], report["threshold"]["target_accuracy"]
    if threshold["value"] is None:
        return f"Nothing can be guaranteed to be {target:.1%} right with {certainty}: {lacking(threshold)}."
    measured = next(g["measured"] for g in report["guarantees"] if g["threshold"]["target_accuracy"] == target)
    guarantee = f"from calibrated confidence {threshold['value']:.3f} on, at least {target:.1%} are right"
    measurement = f"{right_share(measured)} of them right, {report['threshold_measured_protocol']}"
    return (
        f"Guaranteed with {certainty}: {guarantee}.\n"
        f"That automates {measured['share']:.1%} of the rows (coverage), {measurement}."
    )


def lacking(threshold: Mapping) -> str:
    return lacking_words(threshold)


def right_share(measured: Mapping) -> str:
    """The accuracy of automated rows, with its interval."""
    if not measured["automated"]:
        return "none"
    return f"{measured['accuracy']:.3f} [{measured['accuracy_low']:.3f}, {measured['accuracy_high']:.3f}]"


def provenance(report: Mapping) -> str:
    """Which model, the rows that it was calibrated and measured on, and what flatters the numbers."""
    is_held_out, raw = report["protocol"] == "held-out", report["metrics"]["raw"]
    fitted = f"{report['calibration_rows']:,} rows in {report['calibration_groups']:,} groups"
    tested = "the same rows, each by a calibrator that did not see its group"
    if is_held_out:
        tested = f"{report['tested_on']}: {report['where']}"
    lines = [
        f"{report['model']}, task {report['task']}, fingerprint {report['fingerprint']}",
        f"calibrated on {report['calibrated_on']}: {fitted}",
        f"measured on {tested}",
    ]
    if report["unscored"]:
        lines.append(f"{report['unscored']:,} rows had no score")
    if related := report["near_duplicates_of_calibration_rows"]:
        lines.append(f"{related:,} test rows have a near-duplicate among the calibration rows")
    if not is_held_out:
        lines.append("the calibrator was chosen by these very losses, so its own are a little too good")
    if raw["groups"] < raw["n"]:
        lines.append("expected ECEs and exact intervals take rows for independent; rows of a group are not")
    return "\n".join(map(printable, lines))


def summary(report: Mapping) -> str:
    """The numbers of the raw and of the chosen confidence, and what they say in words, good or bad."""
    gain, low, high = report["log_loss_gain"]  # what calibration takes off the log loss of rows that it did not see
    part = {"calibration_part": gain, "calibration_part_low": low, "calibration_part_high": high}
    chosen = report["metrics"][report["chosen"]]
    numbers = {"raw": report["metrics"]["raw"] | part, report["chosen"]: chosen | {"calibration_part": None}}
    better = "below" if gain > 0 else "NOT below"
    within = "within" if chosen["ece"] <= chosen["ece_noise_95"] else "NOT within"
    return (
        f"{metrics.metrics_table(numbers, SUMMARY)}\n"
        f"The calibrated log loss is {better} the raw one (paired).\n"
        f"The calibrated ECE is {within} what true confidences show on so many rows (95 % point "
        f"{chosen['ece_noise_95']:.3f})."
    )


def guarantees(report: Mapping, verbose: bool) -> str:
    """For each target what can be guaranteed, and how it fared on the test rows.

    Verbose, also the empirical threshold, the lowest that met the target on the calibration rows, and what raw
    confidences can guarantee.
    """
    heads = ["target", "automate from", "coverage", f"right, {report['threshold_measured_protocol']}", "evidence"]
    rows = [[*heads, "empirical threshold", "raw confidence"]]
    for guarantee in report["guarantees"]:
        threshold, measured = guarantee["threshold"], guarantee["measured"]
        cells = [f"{threshold['target_accuracy']:.1%}", "nothing", "-", "-", lacking(threshold)]
        if threshold["value"] is not None:
            evidence = f"{threshold['errors']:,} wrong of {threshold['accepted']:,} labels"
            cells[1:] = [f"{threshold['value']:.3f}", f"{measured['share']:.1%}", right_share(measured), evidence]
        for value in (threshold["naive_value"], guarantee["raw"]["value"]):
            cells.append("nothing" if value is None else f"from {value:.3f}")
        rows.append(cells)
    return columns(rows if verbose else [cells[: len(heads)] for cells in rows], "  ")


def candidates(report: Mapping) -> str:
    """The calibrators that were tried, the best first."""
    rows = []
    for name, found in sorted(report["candidates"].items(), key=lambda item: item[1]["log_loss"]):
        mark = "chosen" if name == report["chosen"] else ""
        rows.append([name, f"{found['log_loss']:.4f}", f"{found['sd_over_seeds']:.4f}", mark])
    return columns(rows, "  ")


def measurements(report: Mapping) -> str:
    """Raw and calibrated beside each other; ranked by log loss, because ECE rewards predicting the base rate."""
    names = ("brier", "ece", "ece_noise_floor", "ece_p_value", "mce_30", "auroc", "aurc", "mean_confidence")
    rows = [["", "log loss", "", "Brier", "ECE", "expected", "p", "MCE30", "AUROC", "AURC", "mean", ""]]
    for name, row in sorted(report["metrics"].items(), key=lambda item: item[1]["log_loss"]):
        numbers = ["-" if row[key] is None else f"{row[key]:.3f}" for key in names]
        interval = f"[{row['log_loss_low']:.3f}, {row['log_loss_high']:.3f}]"
        rows.append([name, f"{row['log_loss']:.3f}", interval, *numbers, "chosen" if name == report["chosen"] else ""])
    return columns(rows, "  ")


def predicted_labels(report: Mapping) -> str:
    """A class bias, which does not show in the overall numbers."""
    rows = [["", "rows", "raw mean confidence", "accuracy"]]
    for label, found in report["by_predicted_label"].items():
        accuracy = found["right"] / found["n"]
        rows.append([label, f"{found['n']:,}", f"{found['mean_confidence']:.3f}", f"{accuracy:.3f}"])
    return columns(rows, "  ")


def confidence_bands(report: Mapping) -> str:
    """The four confidence bands, raw and calibrated."""
    rows, upper = [["", "", "raw", "right", "calibrated", "right"]], " or more"
    for pair in zip(*report["buckets"].values(), strict=True):
        cells = [pair[0]["bucket"], f"{pair[0]['from']:.0%}{upper}"]
        for band in pair:
            cells += [f"{band['n']:,}", f"{band['accuracy']:.1%}" if band["n"] else "-"]
        rows.append(cells)
        upper = f" to {pair[0]['from']:.0%}"
    return columns(rows, "  ")


def gates(report: Mapping) -> str:
    """What each confidence threshold automates, raw and calibrated, and what a day costs."""
    heads = ["right", "reviews", "with errors"]
    rows = [["from", "raw: automated", *heads, "calibrated: automated", *heads]]
    for pair in zip(*report["gates"].values(), strict=True):
        cells = [f"{pair[0]['threshold']:.0%}"]
        for row in pair:
            accuracy = f"{row['accuracy']:.1%}" if row["automated"] else "-"
            cells += [f"{row['share']:.1%}", accuracy, f"${row['review_dollars']:,.0f}", f"${row['dollars']:,.0f}"]
        rows.append(cells)
    return columns(rows, "  ")
