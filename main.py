"""Start here: how a language model's next token becomes a decision with a confidence, in seven steps.

    python main.py                              # the default model; fetched and converted on first use
    python main.py --text "Not bad" "It is ok"  # your own texts
    python main.py --adapter auto               # the same model, fine-tuned
    python main.py --model llama                # the same tour with Llama 3.1 8B Instruct
    python main.py --replay                     # as the default model answered when it was recorded; loads no model

It writes nothing. Each step calls the function that the scripts use on whole tables of texts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import command_line
import predictions
from explained_texts import TOUR
from llama import add_arguments, model_arguments
from logprobs_confidence import print_answer_sums, print_token_table
from task import TASKS

if TYPE_CHECKING:
    from calibration import FittedCalibrator

DATA = Path(__file__).parent / "data"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    model, explanations = replay() if args.replay else ask(args.text or TOUR, model_arguments(args))
    rows = [row["logprobs"] for row in explanations]
    print(f"The model is {model}.")

    step(1, "The prompt. A language model continues a text, so we write one whose continuation is the answer:")
    print("\n".join(f"   | {command_line.printable(line)}" for line in rows[0]["prompt"].splitlines()))

    step(2, "The next token. Of all the tokens it knows, the model finds these the most probable:")
    print_token_table(rows[0]["top_tokens"], rows=8)

    step(3, "The sums. A label gets the probability of every token that spells it; the confidence is its share:")
    print_answer_sums(rows[0])
    print()
    print_rows(rows, "text", "prediction", "confidence", "label_mass")
    print("\n   Clear texts get more than mixed ones. But nobody has checked yet whether 90 % means 90 %.")

    step(4, "Ten answers (Method 2). A model that hides its probabilities is asked ten times; the answers vote:")
    print_rows([votes(row["consistency"]) for row in explanations], "text", "answers", "vote share")

    step(5, "Both (Method 3), where both can be had:")
    print_rows([by_method(row) for row in explanations], "text", "1 first token", "2 ten answers", "3 both")

    step(6, "Calibration. How often this answer, at this confidence, was right on 1,000 labelled texts:")
    calibrator = shipped_calibrators().get(rows[0]["fingerprint"])
    if calibrator is None:
        print("   No calibrator of this repository is for this model. With labelled texts of yours you make one:\n")
        print("   python logprobs_confidence.py --input mine.csv --output mine.jsonl    # and the flags given here")
        print("   python calibration_demo.py mine.jsonl")
        return
    decided = calibrate(rows, calibrator)
    print_rows(decided, "text", "prediction", "confidence", "calibrated")
    if calibrator.recipe.class_aware:
        print("\n   The model has a class bias: at one confidence, one label is right more often than the other.")

    step(7, "The decision. The sure answers are automated, the others go to a person:")
    value, target, delta = (calibrator.threshold[name] for name in ("value", "target_accuracy", "delta"))
    print(f"   guaranteed: from {value:.1%} on at least {target:.0%} are right (confidence level {1 - delta:.0%})\n")
    print_rows(decided, "text", "calibrated", "decision")

    print("\nWhat it comes to, on 2,000 test texts that nothing was fitted on, as recorded in data/predictions/:\n")
    print_study()
    print("\nThe figures are in images/, all of them made from recordings: python scripts/make_figures.py")
    print("Your own texts: python logprobs_confidence.py --input data/sample.csv --output sample.jsonl")
    print("                python calibration_demo.py sample.jsonl")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    parser.add_argument("--text", metavar="TEXT", nargs="+", help="take these texts through the steps")
    parser.add_argument("--replay", action="store_true", help="show the recorded tour, without loading a model")
    add_arguments(parser)
    parser.set_defaults(adapter="none")  # the tour shows the model as it was published
    args = parser.parse_args(argv)
    if args.replay:
        command_line.allow_only_arguments(parser, args, {"replay"}, "--replay shows what was recorded")
    return args


def ask(texts: Sequence[str], loading: dict[str, object]) -> tuple[str, list[dict]]:
    """The model in words, and its explanation of each text by all three methods; `loading` is for `load_llama`."""
    from combined_confidence import combined_scorer
    from consistency_confidence import Sampling, answer_sampler
    from llama import load_llama
    from logprobs_confidence import label_scorer

    task = TASKS["sentiment"]
    llama = load_llama(**loading, task=task.settings())
    scorer = combined_scorer(label_scorer(llama, task), answer_sampler(llama, task, Sampling(samples=10)))
    model = f"{llama.name}, on {llama.device} in {llama.identity['precision']}"
    return model, [scorer.explain(text) for text in texts]


def replay() -> tuple[str, list[dict]]:
    """The same, as it was recorded."""
    lines = (DATA / "predictions" / "tour.jsonl").read_text(encoding="utf-8").splitlines()
    explanations = [json.loads(line) for line in lines]
    first = explanations[0]
    model = f"{first['logprobs']['model']}, as it answered on {first['device']} in {first['precision']}"
    return model, explanations


def step(number: int, text: str) -> None:
    print(f"\n{number}. {text}\n")


def print_rows(rows: Sequence[Mapping], *columns: str) -> None:
    """A table of these fields of each row; numbers are shares, in percent."""
    lines = [[column.replace("_", " ") for column in columns]]
    for row in rows:
        cells = [row[column] for column in columns]
        lines.append([cell if isinstance(cell, str) else f"{100 * cell:.1f} %" for cell in cells])
    print(command_line.columns(lines, "   "))


def votes(row: Mapping) -> dict[str, str]:
    """The answers to a text, counted."""
    most_first = sorted(row["votes"].items(), key=lambda vote: -vote[1])
    said = [f"{count} {label}" for label, count in [*most_first, ("neither", row["unparsed"])] if count]
    return {"text": row["text"], "answers": ", ".join(said), "vote share": f"{row['agreement']:.0%}"}


def by_method(row: Mapping) -> dict[str, str]:
    """What each method says of a text."""
    one, two = row["logprobs"], row["consistency"]
    return {
        "text": row["text"],
        "1 first token": f"{one['prediction']} {100 * one['confidence']:.0f} %",
        "2 ten answers": f"{two['prediction']} {100 * two['agreement']:.0f} %",
        "3 both": f"{row['prediction']} {100 * row['confidence']:.0f} %",
    }


def shipped_calibrators() -> dict[str, FittedCalibrator]:
    """Those of this repository, for the default model as published and fine-tuned, by the fingerprint they are for."""
    from calibration import load_calibrator

    calibrators = [load_calibrator(DATA / "calibrators" / f"{name}.json") for name in ("base", "tuned")]
    return {calibrator.fingerprint: calibrator for calibrator in calibrators}


def calibrate(rows: Sequence[Mapping], calibrator: FittedCalibrator) -> list[dict]:
    """The rows with what the calibrator makes of their confidence."""
    common = {"method": "logprobs", "model": calibrator.model, "task": calibrator.task}
    common["fingerprint"] = calibrator.fingerprint
    decided = []
    for row in rows:
        record = predictions.scored("", row["text"], None, row["probabilities"], row["label_mass"], **common)
        added = calibrator.apply([record])[0].extras
        decided.append({**row, "calibrated": added["calibrated_confidence"], "decision": added["decision"]})
    return decided


def print_study() -> None:
    """Base and fine-tuned model on the test split: raw scores, and what each one's shipped calibrator automates."""
    from calibration_metrics import consistency_resampling, expected_calibration_error, log_loss

    lines = [["", "accuracy", "log loss", "ECE (expected if calibrated)", "guaranteed", "automated", "of these right"]]
    names = {"base": "as published", "tuned": "fine-tuned"}
    for (name, title), calibrator in zip(names.items(), shipped_calibrators().values(), strict=True):
        rows = calibrator.apply(predictions.read(DATA / "predictions" / f"{name}_test.jsonl"))
        confidence, correct = predictions.confidence_and_correct(rows)
        ece, expected = expected_calibration_error(confidence, correct), consistency_resampling(confidence).mean()
        automated = np.array([row.extras["decision"] == "automate" for row in rows])
        lines.append([title, f"{correct.mean():.3f}", f"{log_loss(confidence, correct):.3f}"])
        lines[-1] += [f"{ece:.3f} ({expected:.3f})", f"{calibrator.threshold['target_accuracy']:.0%}"]
        lines[-1] += [f"{automated.mean():.1%}", f"{correct[automated].mean():.1%}"]
    print(command_line.columns(lines, "   "))


if __name__ == "__main__":
    command_line.run(main)
