"""What calibration_demo.py prints, from the numbers of report.json: what to act on first, everything with `verbose`.

    print(report_text(report, verbose=True))

A screen or two: what is automated at which guarantee, how true the confidences are, what a row costs.
"""

from __future__ import annotations

from collections.abc import Mapping

import calibration_metrics as metrics
from command_line import columns, filled, printable
from confusions import WORST, label_errors_text
from decisions import (
    AVERAGE,
    CERTAINTIES,
    FEW_ROWS,
    average_words,
    certainty_words,
    floor,
    lacking_words,
    rests_on_few,
    rung_name,
    rung_words,
)
from relabelling import effect_text
from verdict import text as verdict_text

SUMMARY = (
    metrics.Line("accuracy", "accuracy", 3),
    metrics.Line("log loss (nats)", "log_loss", 3),
    metrics.Line("  its calibration part, a paired gain", "calibration_part", 3),
    metrics.Line("  its refinement, which takes a better model", "refinement", 3),
    metrics.Line("ECE (expected if calibrated: the noise floor)", "ece", 3, "ece_noise_floor"),
    metrics.Line("smooth ECE", "ece_smooth", 3),
    metrics.Line("AUROC of confidence for correctness", "auroc", 3),
)
LABEL_NOISE = (
    "Wrong labels count as errors of the model: with 3 % of them at random a target of 95 % takes a true 97.9 %, and "
    "98 % is out of reach; labels that were filled in by the model and then checked err the other way."
)
WIDTH = 100
SHOWN = 10  # labels in a short table


def report_text(report: Mapping, verbose: bool = False) -> str:
    """What a person acts on: what is automated at which guarantee, how good the confidences are, what that costs."""
    settings, where = report["settings"], report["where"]
    prices = f"${settings['review_cost']:g} a review and ${settings['error_cost']:g} an error"
    per_row = ", ".join(f"{name} ${cost:.2f}" for name, cost in report["cost_per_row"].items())
    sections = [
        verdict_text(report["verdict"]) + "\n\n" + verdict(report),
        provenance(report),
        f"{where}; brackets are 95 % intervals:\n{summary(report)}",
        guarantee_section(report),
    ]
    if report["by_label"]:
        sections.append(label_section(report))
    sections.append(
        f"Cost-optimal threshold {report['cost_optimal_threshold']:.2f} for {prices}. A row costs there:\n  {per_row}"
    )
    if report["cost_matrix"]:
        sections.append(cost_section(report))
    changes = report["relabelling"]
    if changes["done"] or changes["helps"] or verbose:
        sections.insert(2, effect_text(changes, changes["done"]))
    if report["shortlists"]:
        sections.append(shortlist_section(report["shortlists"], verbose))
    if not verbose:
        sections.append("--verbose adds every calibrator, predicted label, confidence band and threshold.")
        return "\n\n".join(sections)
    sections += [
        f"The evidence of each guarantee, cross-fitted:\n{evidence(report)}",
        f"Candidates by log loss on the calibration rows, out-of-fold, {seed_words(report)}:\n{candidates(report)}",
        f"{where}, lowest log loss first; brackets are 95 % intervals:\n{measurements(report)}",
        f"By predicted label, {where}:\n{predicted_labels(report)}",
        f"By true label, {where}, intervals as of independent rows:\n{label_errors_text(report['label_errors'])}",
        f"Confidence bands, {where}:\n{confidence_bands(report)}",
        f"A day of {settings['volume']:,} predictions at {prices}, {where}:\n{gates(report)}",
    ]
    return "\n\n".join(sections)


def verdict(report: Mapping) -> str:
    """What can be automated at the target that was asked for."""
    threshold, target = report["threshold"], report["threshold"]["target_accuracy"]
    certainty = certainty_words(threshold)
    if threshold["value"] is None:
        return f"Nothing can be guaranteed to be {target:.1%} right {certainty}: {lacking_words(threshold)}."
    measured = chosen_rung(report, target)["measured"]
    guarantee = f"from calibrated confidence {floor(threshold['value'], 3)} on, at least {target:.1%} are right"
    measurement = f"{right_share(measured)} of them right, {report['threshold_measured_protocol']}"
    kind = "Without a guarantee for this threshold, " if threshold["kind"] == AVERAGE else "Guaranteed "
    return (
        f"{kind}{certainty}: {guarantee}.\n"
        f"That automates {measured['share']:.1%} of the rows (coverage), {measurement}."
    )


def chosen_rung(report: Mapping, target: float) -> Mapping:
    """What was found for a target at the certainty that was asked for."""
    certainty = report["settings"]["certainty"]
    (ladder,) = (found["ladder"] for found in report["guarantees"] if found["target_accuracy"] == target)
    return next(rung for rung in ladder if rung["certainty"] == certainty)


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
    part["refinement"] = report["refinement"]["refinement"]
    chosen = report["metrics"][report["chosen"]]
    numbers = {"raw": report["metrics"]["raw"] | part, report["chosen"]: chosen | dict.fromkeys(part)}
    compared = "is below" if low > 0 else "is ABOVE" if high < 0 else "cannot be told from"
    within = "within" if chosen["ece"] <= chosen["ece_noise_95"] else "NOT within"
    return (
        f"{metrics.metrics_table(numbers, SUMMARY)}\n"
        f"The calibrated log loss {compared} the raw one (paired).\n"
        f"The calibrated ECE is {within} what true confidences show on so many rows (95 % point "
        f"{chosen['ece_noise_95']:.3f})."
    )


def guarantee_words(target: float, certainty: float | str, threshold: Mapping) -> list[str]:
    """What the rungs of the ladder mean, how they were found, and what can make them wrong; a sentence or two each.

    `threshold` is the record of any guarantee on the same labelled rows.
    """
    numbers = [number for number in dict.fromkeys([certainty, *CERTAINTIES]) if number != AVERAGE]
    broken = (f"{100 * (1 - number):.10g} at {100 * number:.10g} %" for number in sorted(numbers, reverse=True))
    words = [
        f"Of 100 labelled sets like yours at most {' and '.join(broken)} lead to a broken guarantee.",
        average_words(target),
    ]
    if threshold["groups"] < threshold["n"]:
        words.append(
            f"Approximate, by effective rows: {threshold['n']:,} rows in {threshold['groups']:,} groups whose errors "
            f"are alike (correlation {threshold['rho']:.2f}). Thresholds on average take rows for independent: a "
            "little low."
        )
    return [*words, LABEL_NOISE]


def guarantee_section(report: Mapping) -> str:
    """The ladder of certainty with what its rungs mean."""
    protocol = report["threshold_measured_protocol"]
    what = f"Guarantees: coverage, from which confidence on, and how many of these are right ({protocol}):"
    notes = [few_rows(report), *report["guarantee_words"]]
    return "\n".join([what, ladder(report), *(filled(note, WIDTH) for note in notes if note)])


def ladder(report: Mapping) -> str:
    """A line a target, a column a certainty."""
    heads = [rung["certainty"] for rung in report["guarantees"][0]["ladder"]]
    rows = [["target", *map(rung_name, heads)]]
    for found in report["guarantees"]:
        rows.append([f"{found['target_accuracy']:.1%}", *map(rung_words, found["ladder"])])
    return columns(rows, "  ")


def few_rows(report: Mapping) -> str:
    """A warning where a guarantee rests on few rows, else ""."""
    weak = []
    for found in report["guarantees"]:
        for rung in found["ladder"]:
            threshold = rung["threshold"]
            if rests_on_few(threshold):
                which = f"{threshold['target_accuracy']:.1%} {certainty_words(threshold)}"
                weak.append(f"{which} on {threshold['effective']:.0f}")
    if not weak:
        return ""
    return (
        f"Warning: fewer than {FEW_ROWS} effective rows carry {', '.join(weak)}: in hard cases like these most of the "
        "guarantees that do get made can be broken ones."
    )


def evidence(report: Mapping) -> str:
    """A line a target and certainty: what the guarantee rests on.

    Beside it the empirical threshold, the lowest that met the target on the calibration rows, and what raw confidences
    would guarantee at the certainty that was asked for.
    """
    heads = ["target", "certainty", "right", "evidence", "effective", "tested from", "empirical", "raw"]
    rows = [heads]
    for found in report["guarantees"]:
        for rung in found["ladder"]:
            threshold = rung["threshold"]
            certainty = threshold["kind"] if threshold["delta"] is None else f"{100 * (1 - threshold['delta']):.10g} %"
            cells = [f"{found['target_accuracy']:.1%}", certainty, "-", rung_words(rung), "-"]
            if threshold["value"] is not None:
                wrong = f"{threshold['errors']:,} wrong of {threshold['accepted']:,} labels"
                cells[2:] = [right_share(rung["measured"]), wrong, f"{threshold['effective']:,.0f}"]
            cells.append("-" if threshold["start"] is None else f"{threshold['start']:,} rows")
            raw = found["raw"]["value"] if rung["certainty"] == report["settings"]["certainty"] else None
            cells += ["-" if value is None else f"{value:.3f}" for value in (threshold["naive_value"], raw)]
            rows.append(cells)
    return columns(rows, "  ")


def label_section(report: Mapping) -> str:
    """A guarantee for each predicted label, with the labels that each still needs."""
    found, settings = report["by_label"], report["settings"]
    together = found["together"]
    rows = [["predicted", "labels", "target", "automate from", "of these", "right", "evidence"]]
    for label, row in found["labels"].items():
        threshold, measured = row["threshold"], row["measured"]
        cells = [printable(label), f"{row['rows']:,}", f"{threshold['target_accuracy']:.1%}"]
        if threshold["value"] is None:
            cells += ["nothing", "-", "-", lacking_words(threshold).replace("labels", "with this prediction")]
        else:
            share, right = (f"{measured['share']:.1%}", right_share(measured)) if measured else ("-", "-")
            rests = f"{threshold['errors']:,} wrong of {threshold['accepted']:,}"
            if rests_on_few(threshold):
                rests += f", only {threshold['effective']:.0f} effective"
            cells += [floor(threshold["value"], 3), share, right, rests]
        rows.append(cells)
    how = certainty_words(report["threshold"])
    each = f"Each guarantee by itself {how}"
    if settings["is_split"]:
        each = f"All guarantees together {how}, the risk divided among {len(found['labels']):,} labels"
    right = f"{right_share(together)} right" if together["automated"] else "nothing to measure"
    return (
        f"A target for each predicted label, {report['threshold_measured_protocol']}. {each}:\n{columns(rows, '  ')}\n"
        f"Together they automate {together['share']:.1%} of the rows, {right}; the decision column follows them."
    )


def cost_section(report: Mapping) -> str:
    """Dollars a row where every mistake has its own price."""
    found, rows = report["cost_matrix"], [["", "automated", "dollars a row"]]
    for rule in found["rules"]:
        cost = f"{rule['cost']:.3f} [{rule['low']:.3f}, {rule['high']:.3f}]"
        rows.append([rule["rule"], f"{rule['share']:.1%}", cost])
    price = f"${found['mean_error_price']:.2f}"
    chow = f"Chow's threshold knows one price of an error, the calibration rows' mean: {price}."
    return f"With a price for each mistake, {report['where']}:\n{columns(rows, '  ')}\n{chow}"


def shortlist_section(found: Mapping, verbose: bool) -> str:
    """How often the true label of a row to review is on its shortlist, and of which labels it is not."""
    covered = metrics.exact_share(found["covered"], found["n"]).shown()
    rows = [["true label", "rows", "on the list", ""]]
    by_label = {label: counts for label, counts in found["by_label"].items() if counts["n"]}
    worst = sorted(by_label, key=lambda label: by_label[label]["covered"] / by_label[label]["n"])
    shown = worst[: WORST if verbose else SHOWN]
    for label in shown:
        counts = by_label[label]
        note = "" if counts["own"] else "too few calibration rows to be covered by itself"
        rows.append([label, f"{counts['n']:,}", metrics.exact_share(counts["covered"], counts["n"]).shown(), note])
    more = f"\n  ... and {len(worst) - len(shown)} more" if len(worst) > len(shown) else ""
    return (
        f"Shortlists for the {found['n']:,} rows to review, {found['protocol']}: {found['mean_length']:.1f} of "
        f"{found['labels']} labels on average, the true one among them\n"
        f"in {covered} of the rows ({found['coverage_asked']:.0%} asked for). They help a reviewer; a list of one\n"
        f"label is no reason to automate.\n{columns(rows, '  ')}{more}"
    )


def seed_words(report: Mapping) -> str:
    """Of how many divisions into folds the candidates' numbers are."""
    seeds = max(found["seeds"] for found in report["candidates"].values())
    return f"mean and sd of {seeds} seeds" if seeds > 1 else "of one seed"


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
    by_accuracy = {label: found["right"] / found["n"] for label, found in report["by_predicted_label"].items()}
    shown = list(by_accuracy) if len(by_accuracy) <= WORST else sorted(by_accuracy, key=by_accuracy.get)[:WORST]
    for label in shown:
        found = report["by_predicted_label"][label]
        rows.append([label, f"{found['n']:,}", f"{found['mean_confidence']:.3f}", f"{by_accuracy[label]:.3f}"])
    if len(shown) < len(by_accuracy):
        rows.append([f"and {len(by_accuracy) - len(shown)} labels with a higher accuracy", "", "", ""])
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
