"""What is printed of two compared models: first what to act on, then every other table.

    print(summary(report))        # of compare_base_vs_finetuned.comparison_report, or json.load of its report.json
    print(details(report))

A table is made of records: name of the line -> heading -> number, interval or words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import calibration_metrics as metrics
import command_line
import decisions
import explained_texts
from command_line import printable
from verdict import text_of_several

NAMES = ("base", "fine-tuned")
PLANTED_RULE = "planted rule of the neutral texts"
RANDOMLY_LABELLED = "randomly labelled"


def cell(value: object, sign: str = "") -> str:
    """A number, or a list of a number and the ends of its interval, as text; "-" where it is undefined."""
    if isinstance(value, list):
        point, *ends = (cell(number, sign) for number in value)
        return point if "-" in ends else f"{point} [{', '.join(ends)}]"
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:{sign}z,.0f}" if abs(value) >= 100 else f"{value:{sign}z.3f}"


def p_value(value: float) -> str:
    """A p-value as text; one too small for a float is not zero."""
    return f"{value:.2g}" if value else "below 1e-300"


def table_cells(records: Mapping[str, Mapping[str, object]], sign: str = "") -> list[list[str]]:
    """A line a record and a column a heading, under their names; differences have a sign, with sign="+" all numbers."""
    headings = list(next(iter(records.values())))
    rows = [["", *headings]]
    for name, record in records.items():
        rows.append([name])
        for heading in headings:
            value = record.get(heading, "")
            text = p_value(value) if heading == "p" else cell(value, "+" if heading == "difference" else sign)
            rows[-1].append(text)
    return rows


def records_table(title: str, records: Mapping[str, Mapping[str, object]], sign: str = "") -> str:
    return f"{title}:\n{command_line.columns(table_cells(records, sign), '  ')}"


# What to act on


def summary(report: dict) -> str:
    """Did it help, what can be automated at which guarantee, is the confidence true, what does it cost."""
    guarantees, *others = (records_table(title, records) for title, records in chief_tables(report).items())
    return "\n\n".join(
        [
            text_of_several(report["verdicts"]) + "\n\n" + "\n".join(verdicts(report)),
            f"{guarantees}\n{certainty_line(report)}",
            *others,
            *([all_models_table(report)] if report.get("all_models") else []),
            "\n".join(map(printable, what_was_compared(report))),
        ]
    )


def chief_tables(report: dict) -> dict[str, dict[str, dict]]:
    """The records of each table to act on, by its title."""
    settings = report["settings"]
    source = "the calibration rows" if report["calibrated_on"] else "these very rows, so in-sample"
    guaranteed = f"Coverage, from which confidence on, and how much of it is right; thresholds from {source}"
    day = (
        f"A day of {settings['volume']:,} predictions, ${settings['review_cost']:g} a review, "
        f"${settings['error_cost']:g} an error, automated from {report['money']['threshold']:.2f} on, in dollars"
    )
    truth = "Is the confidence true? In parentheses the expected ECE if calibrated (the noise floor)"
    return {
        guaranteed: ladder_records(report),
        truth: score_records(report),
        day: dollar_records(report["money"]),
    }


def page_tables(report: dict, by_label: Mapping[str, Mapping]) -> list[dict]:
    """The tables of comparison.html: those to act on, the steps of the log loss, all models, and the parts of the rows.

    `by_label` is a part of the rows for each true label, like those of the report.
    """
    tables = [("Measure", title, records, "") for title, records in chief_tables(report).items()]
    tables.append(("Step", steps_title(report), step_records(report), "+"))
    if report["all_models"]:
        tables.append(("Measure", all_models_title(report), all_models_records(report), ""))
    for column, parts in ({"true label": by_label} | report["parts"]).items():
        records = {value: part_record(part) for value, part in parts.items()}
        tables.append((column, parts_title(report, column), records, ""))
    found = []
    for corner, title, records, sign in tables:
        (_, *headings), *rows = table_cells(records, sign)
        found.append({"title": title, "cells": [[corner, *headings], *rows]})
    return found


def all_models_table(report: dict) -> str:
    """Names of files are in it."""
    text = records_table(all_models_title(report), all_models_records(report))
    return "\n".join(map(printable, text.split("\n")))


def all_models_title(report: dict) -> str:
    source = "" if report["calibrated_on"] else ", in-sample where these rows chose the threshold"
    return f"All models, {where(report)}; scores raw, differences paired; automated: measured on these rows{source}"


def all_models_records(report: dict) -> dict[str, dict]:
    """The two models and the further files beside each other: a column each."""
    models, records = report["all_models"], {}
    for score in next(iter(models.values()))["scores"]:
        records[score] = {name: found["scores"][score] for name, found in models.items()}
        records[f"  {score}, minus base"] = {
            name: cell(found["minus base"][score], "+") for name, found in models.items() if name != "base"
        }
    for found in models.values():
        for row in found["guarantees"]:
            records.setdefault(f"automated at {row['target']:.0%} guaranteed", {})
    for name, found in models.items():
        for row in found["guarantees"]:
            records[f"automated at {row['target']:.0%} guaranteed"][name] = automated_share(row["measured"])
        records.setdefault("calibrator", {})[name] = found["about"]["calibrator"]
    return records


def automated_share(measured: Mapping | None) -> str:
    """How much of the rows a threshold automates and how much of it is right."""
    if measured is None:
        return "nothing"
    right = f", right {measured['accuracy']:.3f}" if measured["automated"] else ""
    return f"{measured['share']:.1%}{right}"


def verdicts(report: dict) -> Iterator[str]:
    """In words whether fine-tuning helped or a temperature was needed."""
    names = {"temperature": "a temperature", "calibrated": "its own calibrator"}
    for key, steps in report["steps"].items():
        base, tuning, fine_tuned, _ = (direction(span) for span in steps.values())
        said = {-1: "helped", 0: "adds nothing that these rows can show", 1: "did harm"}[tuning]
        needs = {-1: " The base model needed it.", 0: "", 1: " It harms the base model."}[base]
        needs += {-1: " It harms the fine-tuned model.", 0: "", 1: " The fine-tuned model needs it."}[fine_tuned]
        yield f"With {names[key]} for each model, fine-tuning {said}.{needs}"
    found = report["right"]["all rows"]
    alone = f"{found['only fine-tuned']:,} by the fine-tuned model alone, {found['only base']:,} by the base alone"
    yield f"Rows that are right: {alone} (exact McNemar p {p_value(found['p'])})."
    yield f"Measured on {where(report)}; brackets are 95 % intervals, of differences paired."


def direction(change: list[float]) -> int:
    """-1 or 1 where the whole interval of a change is below or above 0, as far as it is printed; else 0."""
    _, low, high = change
    return int(round(low, 4) > 0) - int(round(high, 4) < 0)


def ladder_records(report: dict) -> dict[str, dict]:
    """A line a target and model, a column a certainty."""
    records = {}
    for row in report["guarantees"]:
        for name in NAMES:
            rungs = {decisions.rung_name(rung["certainty"]): decisions.rung_words(rung) for rung in row[name]["ladder"]}
            records[f"{row['target']:.0%} right, {name}"] = rungs
        change = cell(row["share"]["difference"], "+")
        records[f"{row['target']:.0%} right, difference"] = dict.fromkeys(rungs, "") | {next(iter(rungs)): change}
    return records


def certainty_line(report: dict) -> str:
    """What the certainties mean, in a line or two."""
    threshold = report["guarantees"][0]["base"]["threshold"]
    said = "  of 100 labelled sets at most 5 or 20 lead to a broken guarantee; on average is none for a threshold"
    if threshold["kind"] == "approximate":
        labels = f"{threshold['n']:,} labels in {threshold['groups']:,} groups"
        said += f"\n  approximate, as the errors of a group are alike: {labels}"
    return said


def guarantee_records(report: dict) -> dict[str, dict]:
    """The first rung with its intervals."""
    records = {}
    for row in report["guarantees"]:
        for name in NAMES:
            threshold, measured = row[name]["threshold"], row[name]["measured"]
            if measured:
                right = [measured["accuracy"], measured["accuracy_low"], measured["accuracy_high"]]
                record = {"coverage": measured["share"], "from": decisions.floor(threshold["value"], 3), "right": right}
            else:
                right = decisions.lacking_words(threshold)
                record = {"coverage": "nothing", "from": "", "right": right}
            records[f"{row['target']:.0%} right, {name}"] = record
        records[f"{row['target']:.0%} right, difference"] = {"coverage": cell(row["share"]["difference"], "+")}
    return records


def score_records(report: dict) -> dict[str, dict]:
    raw, calibrated = report["scores"]["raw"], report["scores"]["calibrated"]
    return {
        "accuracy": raw["paired"]["accuracy"],
        "log loss, raw": raw["paired"]["log loss"],
        "  its calibration part": calibrated["paired"]["calibration part"],
        "log loss, calibrated": calibrated["paired"]["log loss"],
        "ECE, raw": ece_beside_expected(raw),
        "ECE, calibrated": ece_beside_expected(calibrated),
        "AUROC, raw": raw["paired"]["AUROC"],
        "AUROC, calibrated": calibrated["paired"]["AUROC"],
    }


def ece_beside_expected(scores: Mapping) -> dict[str, str]:
    return {n: f"{scores['paired']['ECE'][n][0]:.3f} ({scores[n]['ece_noise_floor']:.3f})" for n in NAMES}


def dollar_records(money: Mapping) -> dict[str, dict]:
    records = {}
    for name in NAMES:
        row = money[name]
        records[name] = {"automated": row["share"], "right": row["accuracy"], "reviews": row["review_dollars"]}
        records[name] |= {"errors": row["error_dollars"], "together": money["dollars"][name]}
        records[name]["automate all"] = row["automate_everything"]
    records["difference"] = {"together": cell(money["dollars"]["difference"], "+")}
    records["review all"] = {"together": money["review_everything"]}
    return records


def what_was_compared(report: dict) -> Iterator[str]:
    for name, about in report["models"].items():
        yield f"{name:10}  {about['model']}, fingerprint {about['fingerprint']}, {Path(about['file']).name}"
        yield f"{'':10}  calibrator: {about['calibrator']}; fitted temperature {about['temperature']:.2f}"
    how = "cross-fitted, each row by calibrators that did not see its group"
    if report["calibrated_on"]:
        how = f"fitted on {report['calibration_rows']:,} other rows in {report['calibration_groups']:,} groups"
    yield f"calibrators {how}"
    yield "differences are fine-tuned - base on the same rows, their intervals by resampling whole groups"
    if report["left_out"]:
        yield f"{report['left_out']:,} rows left out, as a model could not score them"
    if related := report["near_duplicates_of_calibration_rows"]:
        yield f"{related:,} test rows have a near-duplicate among the calibration rows"


def count(report: dict) -> str:
    """How many rows, and groups if rows belong together."""
    n, groups = report["rows"], report["groups"]
    return f"n = {n:,}" + (f" in {groups:,} groups" if groups < n else "")


def where(report: dict) -> str:
    """The same with the protocol of what is fitted."""
    return f"{count(report)}, {report['protocol']}"


# Everything else


def details(report: dict) -> str:
    """Every other table, each with its n and protocol."""
    scores, here = report["scores"], where(report)
    by_calibrator, sure = {}, {}
    for score in ("log loss", "Brier", "ECE"):
        for key, found in scores.items():
            by_calibrator[f"{score}, {key}"] = ece_beside_expected(found) if score == "ECE" else found["paired"][score]
    for score, of_model in report["sure"].items():
        for name, rows in of_model.items():
            sure |= {f"{score}, {row['threshold']:.0%} or more, {name}": row for row in rows}
    own = {f"{name}, {key}": scores[key][name] for key in ("raw", "calibrated") for name in NAMES}
    fitted_on = " and ".join(report["calibrated_on"] or ["these rows"])
    tables = [
        printable(f"calibrators fitted on {fitted_on}"),
        printable(f"task {report['task']}, the same ids, texts and labels; the prompt is {report['prompt']}"),
        records_table(f"Right answers, {count(report)}, nothing fitted", report["right"]),
        records_table(f"Raw, {count(report)}, nothing fitted", scores["raw"]["paired"]),
        records_table(f"Each by its calibrator, {here}", scores["calibrated"]["paired"]),
        f"Each model by itself, {here}; raw: nothing fitted:\n" + metrics.metrics_table(own, metrics.MORE_LINES),
        records_table(f"Before and after each calibrator of P(label), {here}", by_calibrator),
        records_table(steps_title(report), step_records(report), "+"),
        records_table(f"Sure answers, {here}; intervals exact, as of independent rows", sure),
        records_table(f"Guaranteed with 95 % certainty, {here}, with such intervals", guarantee_records(report)),
    ]
    for column, parts in report["parts"].items():
        title = parts_title(report, printable(column))
        tables.append(records_table(title, {value: part_record(part) for value, part in parts.items()}))
        if RANDOMLY_LABELLED in parts:
            tables[-1] += "\n" + "\n".join(about_randomly_labelled(parts[RANDOMLY_LABELLED]))
    return "\n\n".join(tables + [explained_texts.side_by_side(found, NAMES) for found in report["first_tokens"]])


def steps_title(report: dict) -> str:
    return f"Changes in log loss, {where(report)}; the first three add up to the last"


def step_records(report: dict) -> dict[str, dict]:
    steps = report["steps"]
    return {step: {f"by {key}": steps[key][step] for key in steps} for step in steps["calibrated"]}


def parts_title(report: dict, column: str) -> str:
    return f"By {column}, {where(report)}; accuracies exact, as of independent rows; means of raw, calibrated"


def part_record(part: Mapping) -> dict[str, object]:
    record = {"n": part["n"]} | {f"{name} right": part[name]["accuracy"] for name in NAMES}
    record |= {key: part[key] for key in ("difference", "only base", "only fine-tuned", "p")}
    for name in NAMES:
        record[f"{name} mean"] = f"{part[name]['raw']:.2f}, {part[name]['calibrated']:.2f}"
    return record


def about_randomly_labelled(part: Mapping) -> Iterator[str]:
    """Whether they are guessed half of the time, as they must be, and whether the confidence says so."""
    yield f"  Of {part['n']:,} randomly labelled rows no honest model can have more than half right, but by chance."
    for name in NAMES:
        share, low, high = part[name]["accuracy"]
        half = "50 % is inside" if low <= 0.5 <= high else "50 % is NOT inside, by a leak or by chance"
        yield (
            f"  {name}: right {share:.1%} [{low:.1%}, {high:.1%}], {half}; its mean confidence is "
            f"{part[name]['raw']:.1%} raw and {part[name]['calibrated']:.1%} calibrated"
        )
