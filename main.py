"""Start here: how a language model's next token becomes a decision with a confidence, in seven steps.

    python main.py                              # the embedded model; fetched and converted on first use
    python main.py --text "Not bad" "It is ok"  # your own texts
    python main.py --adapter auto               # the same model, fine-tuned
    python main.py --model llama                # the same tour with Llama 3.1 8B Instruct
    python main.py --replay                     # as the embedded model answered when it was recorded; loads no model

It writes nothing. Each step calls the function that the scripts use on whole tables of texts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import command_line
import predictions
from llama import add_arguments, model_arguments
from logprobs_confidence import print_answer_sums, print_token_table
from task import TASKS

DATA = Path(__file__).parent / "data"
TEXTS = (
    "I absolutely love this amazing movie!",
    "This film is terrible and boring",
    "The acting is superb, the story is dull",
    "Not bad",
    "Best worst thing ever",
    "The train leaves at noon",
)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    model, asked = replay() if args.replay else ask(args)
    rows = [row["logprobs"] for row in asked]
    print(f"The model is {model}.")

    step(1, "The prompt. A language model continues a text, so we write one whose continuation is the answer:")
    print("\n".join(f"   | {command_line.printable(line)}" for line in rows[0]["prompt"].splitlines()))

    step(2, "The next token. Of all the tokens it knows, the model finds these the most probable:")
    print_token_table(rows[0]["top_tokens"], rows=8)

    step(3, "The sums. A label gets the probability of every token that spells it; the confidence is its share:")
    print_answer_sums(rows[0])
    print()
    print_verdicts(rows)
    print("\n   Clear texts get more than mixed ones. But nobody has checked yet whether 90 % means 90 %.")

    step(
        4, "Ten answers (Method 2). A model that hides its probabilities is asked ten times; agreement is a confidence:"
    )
    print_votes([row["consistency"] for row in asked])

    step(5, "Both (Method 3), where both can be had:")
    print_methods(asked)

    step(6, "Calibration. How often this answer, at this confidence, was right on 1,000 labelled texts:")
    calibrated = calibrate(rows)
    if not calibrated:
        return
    step(7, "The decision. The sure answers are automated, the others go to a person:")
    print_decisions(*calibrated)

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
    usual = {action.dest: action.default for action in parser._actions} | {"adapter": "none"}
    if args.replay and any(value != usual[name] for name, value in vars(args).items() if name != "replay"):
        parser.error("--replay shows what was recorded; it takes no other flag")
    return args


def ask(args: argparse.Namespace) -> tuple[str, list[dict]]:
    """The model in words, and all three methods' explanations of each text."""
    import combined_confidence as combined
    import consistency_confidence as consistency
    import logprobs_confidence as logprobs

    task = TASKS["sentiment"]
    llama = load_from(args, task.settings())
    scorer = logprobs.prepare(llama, task)
    sampler = consistency.prepare(llama, task, consistency.Sampling(samples=10))
    model = f"{llama.name}, on {llama.device} in {llama.identity['precision']}"
    return model, [combined.explain(text, scorer, sampler) for text in args.text or TEXTS]


def replay() -> tuple[str, list[dict]]:
    """The same, as it was recorded."""
    lines = (DATA / "predictions" / "tour.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line) for line in lines]
    first = asked[0]
    model = f"{first['logprobs']['model']}, as it answered on {first['device']} in {first['precision']}"
    return model, asked


def step(number: int, text: str) -> None:
    print(f"\n{number}. {text}" + ("\n" if text.endswith(":") else ""))


def print_verdicts(rows: Sequence[dict]) -> None:
    lines = [["text", "prediction", "confidence", "label mass"]]
    for row in rows:
        shares = (f"{100 * row[key]:.1f} %" for key in ("confidence", "label_mass"))
        lines.append([row["text"], row["prediction"], *shares])
    print(command_line.columns(lines, "   "))


def print_votes(rows: Sequence[dict]) -> None:
    lines = [["text", "answers", "agreement"]]
    for row in rows:
        votes = sorted(row["votes"].items(), key=lambda pair: -pair[1])
        said = ", ".join(f"{count} {label}" for label, count in (*votes, ("neither", row["unparsed"])) if count)
        lines.append([row["text"], said, f"{row['agreement']:.0%}"])
    print(command_line.columns(lines, "   "))


def print_methods(asked: Sequence[dict]) -> None:
    lines = [["text", "1 first token", "2 ten answers", "3 both"]]
    for row in asked:
        one, two = row["logprobs"], row["consistency"]
        of = (one, one["confidence"]), (two, two["agreement"]), (row, row["confidence"])
        shares = [f"{found['prediction']} {100 * share:.0f} %" for found, share in of]
        lines.append([row["text"], *shares])
    print(command_line.columns(lines, "   "))


def calibrate(rows: Sequence[dict]) -> tuple | None:
    """Print raw beside calibrated confidences; (the shipped calibrator, calibrated rows), None if there is none."""
    from calibration import load_calibrator

    calibrators = [load_calibrator(DATA / "calibrators" / f"{name}.json") for name in ("base", "tuned")]
    found = next((one for one in calibrators if one.fingerprint == rows[0]["fingerprint"]), None)
    if found is None:
        print("   No calibrator of this repository is for this model. With labelled texts of yours you make one:\n")
        print("   python logprobs_confidence.py --input mine.csv --output mine.jsonl    # and the flags given here")
        print("   python calibration_demo.py mine.jsonl")
        return None
    common = {"method": "logprobs", "model": found.model, "task": found.task, "fingerprint": found.fingerprint}
    records = [predictions.scored("", r["text"], None, r["probabilities"], r["label_mass"], **common) for r in rows]
    applied = found.apply(records)
    lines = [["text", "prediction", "confidence", "calibrated"]]
    for row in applied:
        shares = (row.confidence, row.extras["calibrated_confidence"])
        lines.append([row.text, row.prediction, *(f"{100 * share:.1f} %" for share in shares)])
    print(command_line.columns(lines, "   "))
    if found.recipe.class_aware:
        print("\n   The model leans: at one confidence, one label is right more often than the other.")
    return found, applied


def print_decisions(calibrator: object, rows: Sequence[predictions.Prediction]) -> None:
    promise = calibrator.threshold
    target, risk = promise["target_accuracy"], promise["delta"]
    print(f"   from {promise['value']:.1%} on at least {target:.0%} are right, with {1 - risk:.0%} certainty\n")
    lines = [["text", "calibrated", "decision"]]
    for row in rows:
        lines.append([row.text, f"{100 * row.extras['calibrated_confidence']:.1f} %"])
        lines[-1].append(row.extras["decision"])
    print(command_line.columns(lines, "   "))


def print_study() -> None:
    """Base and fine-tuned model on the test split: raw scores, and what each one's shipped calibrator automates."""
    from calibration import load_calibrator
    from calibration_metrics import consistency_resampling, expected_calibration_error

    lines = [["", "accuracy", "log loss", "ECE (noise floor)", "promised", "automated", "of these right"]]
    for name, title in (("base", "as published"), ("tuned", "fine-tuned")):
        calibrator = load_calibrator(DATA / "calibrators" / f"{name}.json")
        rows = calibrator.apply(predictions.read(DATA / "predictions" / f"{name}_test.jsonl"))
        confidence, correct = predictions.confidence_and_correct(rows)
        log_loss = -np.mean([np.log(row.probabilities[row.label]) for row in rows])
        floor = consistency_resampling(confidence).mean()
        kept = np.array([row.extras["decision"] == "automate" for row in rows])
        shown = [f"{correct.mean():.3f}", f"{log_loss:.3f}"]
        shown.append(f"{expected_calibration_error(confidence, correct):.3f} ({floor:.3f})")
        shown += [f"{calibrator.threshold['target_accuracy']:.0%}", f"{kept.mean():.1%}", f"{correct[kept].mean():.1%}"]
        lines.append([title, *shown])
    print(command_line.columns(lines, "   "))


if __name__ == "__main__":
    command_line.run(main)
