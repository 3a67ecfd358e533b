"""Does an endpoint on Amazon SageMaker answer as the model did here? Asks it, and compares with what was recorded.

    python scripts/test_endpoint.py demo --adapter sentiment
    python scripts/test_endpoint.py demo --adapter sentiment --text "Not bad" "A waste of time."
    python scripts/test_endpoint.py demo --recorded data/predictions/base_test.jsonl      # the base model

An adapter of fine_tune_model.py carries the answers that it gave to three texts when it was trained. These are asked
again, and the label probabilities stand side by side; --recorded compares with a predictions file instead. Prompts go
as token ids, and the answers' tokens are asked for by id, so both sides see the same prompt and the same tokens.
Exit code: 0, or 1 when a probability differs by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import endpoint  # noqa: E402
import fine_tune_model  # noqa: E402
import llama  # noqa: E402
import logprobs_confidence  # noqa: E402
import predictions  # noqa: E402
import sagemaker_job as cloud  # noqa: E402
import task as tasks  # noqa: E402
from sagemaker_job import Aws, AwsError  # noqa: E402
from task import Task  # noqa: E402

MAY_DIFFER = (
    "what may differ: precision (the endpoint runs in bfloat16), the base weights, the adapter, or the prompt (--task, "
    "--tokenizer)"
)


@dataclass(frozen=True)
class Question:
    """A text, and what the model answered to it here, if that is known."""

    text: str
    probabilities: Mapping[str, float] | None = None
    label_mass: float | None = None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    aws = cloud.connect(args.region)
    os.environ["AWS_DEFAULT_REGION"] = aws.region  # endpoint.py reads it there
    record, base_model = read_record(aws, args)
    task = task_of(args, record)
    questions, source = choose_questions(args, record, task)
    reader = load_reader(args, record, base_model)
    url = f"sagemaker:{args.endpoint}" + (f"/{args.adapter}" if args.adapter else "")
    differences = []
    with endpoint.connect(url, reader=reader) as server:
        remote = logprobs_confidence.prepare_remote(server, task)
        for number, question in enumerate(questions, 1):
            try:
                answer = logprobs_confidence.explain_remote(question.text, remote)
            except ValueError as error:
                raise ValueError(f"text {number} ({question.text[:40]!r}): {error}") from None
            difference = largest_difference(answer, question)
            differences += [] if difference is None else [difference]
            show(args, url, question, answer, difference)
    verdict(args, url, differences, source)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("endpoint", metavar="ENDPOINT", help="its name, as given to deploy_sagemaker.py")
    add("--adapter", metavar="NAME", help="one of its adapters (default: the base model)")
    add("--text", metavar="TEXT", nargs="+", action="extend", default=[], help="ask these; nothing is compared")
    add("--task", help="a task's name or a TOML file (default: the adapter's, else sentiment)")
    tokenizer = "whose tokenizer makes the ids, as --model; none: send text (default: the model that is served)"
    add("--tokenizer", metavar="MODEL", help=tokenizer)
    add("--recorded", metavar="FILE", help="compare with this predictions file instead of the adapter's record")
    add("--limit", type=command_line.natural, default=20, metavar="N", help="rows of --recorded (default: 20)")
    tolerance = "most that a probability may differ (default: 0.02)"
    add("--tolerance", type=float, default=0.02, metavar="P", help=tolerance)
    add("--json", action="store_true", help="print one JSON object a text; the verdict goes to stderr")
    add("--region", metavar="NAME", help="default: that of your AWS settings")
    args = parser.parse_args(argv)
    cloud.aws_name(args.endpoint)
    cloud.component_name(args.endpoint, args.adapter)
    if args.text and args.recorded:
        parser.error("--text asks, --recorded compares; give one of them")
    if not 0 < args.tolerance < 1:
        parser.error(f"--tolerance {args.tolerance}: between 0 and 1, both excluded")
    if args.limit < 1:
        parser.error(f"--limit {args.limit}: at least one row is needed")
    if number := next((number for number, text in enumerate(args.text, 1) if not text.strip()), None):
        parser.error(f"text {number} is empty")
    return args


def read_record(aws: Aws, args: argparse.Namespace) -> tuple[dict, str]:
    """(the record that lies beside the adapter's archive, the base model's name); empty where there is none."""
    name = cloud.component_name(args.endpoint, args.adapter)
    try:
        found = cloud.look(aws, "inference_component", name)
        if found is None:
            flag = f" --adapter {args.adapter}=FOLDER" if args.adapter else ""
            make = f"python scripts/deploy_sagemaker.py {args.endpoint}{flag}"
            raise ValueError(f"there is no component {name} in {aws.region}; {make} makes it")
        if args.adapter is None:
            model = cloud.look(aws, "model", found.get("Specification", {}).get("ModelName", ""))
            return {}, cloud.tags(aws, model["ModelArn"]).get("base-model", "") if model else ""
        uri = cloud.record_uri(cloud.artifact_of(found) or "")
        content = cloud.read(aws, uri)
    except AwsError as error:
        if not (error.is_denied or error.is_gone):
            raise
        print(f"note: no record of {name} ({error})", file=sys.stderr)
        return {}, ""
    try:
        record = json.loads(content)
        return record, record.get("base_model", "")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{uri} is broken: {error}") from None


def task_of(args: argparse.Namespace, record: Mapping) -> Task:
    if args.task or "task" not in record:
        return tasks.read_task(args.task or "sentiment")
    return Task.from_settings(record["task"])


def choose_questions(args: argparse.Namespace, record: Mapping, task: Task) -> tuple[list[Question], str]:
    """What to ask, and what the answers are compared with, in words; empty words if with nothing."""
    if args.text:
        return [Question(text) for text in args.text], ""
    if args.recorded:
        rows = (row for row in predictions.iterate(args.recorded) if row.error is None)
        rows = list(islice(rows, args.limit))
        if not rows:
            raise ValueError(f"{args.recorded} has no scored row")
        for row in rows:
            if row.task != task.name:
                raise ValueError(f"{args.recorded} was made with task {row.task!r}, this asks {task.name!r}; --task")
            check_labels(f"row {row.id!r} of {args.recorded}", row.probabilities, task)
        return [Question(row.text, row.probabilities, row.label_mass) for row in rows], args.recorded
    if probes := record.get("probes"):
        for one in probes:
            check_labels("a recorded answer", one["probabilities"], task)
        return [Question(one["text"], one["probabilities"], one["label_mass"]) for one in probes], "its record"
    return [Question(text) for text in fine_tune_model.PROBES], ""


def check_labels(what: str, probabilities: Mapping[str, float], task: Task) -> None:
    if set(probabilities) != set(task.labels):
        raise ValueError(f"{what} has the labels {', '.join(probabilities)}, task {task.name!r} other ones; --task")


def load_reader(args: argparse.Namespace, record: Mapping, base_model: str) -> object | None:
    """The tokenizer that turns prompts into ids; None sends text."""
    name = args.tokenizer or base_model
    if not name and not args.tokenizer:
        raise ValueError("it is not known which model is served; --tokenizer names it, --tokenizer none sends text")
    if name == "none":
        return None
    try:
        return llama.load_reader(name)
    except (ValueError, OSError) as error:
        hint = "" if args.tokenizer else "; --tokenizer names the model in another way, --tokenizer none sends text"
        raise ValueError(f"no tokenizer of {name}: {error}{hint}") from None


def largest_difference(answer: Mapping, question: Question) -> float | None:
    if question.probabilities is None:
        return None
    return max(abs(answer["probabilities"][label] - p) for label, p in question.probabilities.items())


def show(args: argparse.Namespace, url: str, question: Question, answer: Mapping, difference: float | None) -> None:
    """One text: what the endpoint says, beside what was recorded."""
    if args.json:
        kept = ("text", "prediction", "confidence", "probabilities", "label_mass", "fingerprint")
        recorded = {"probabilities": question.probabilities, "label_mass": question.label_mass}
        known = question.probabilities is not None
        row = {"endpoint": url} | {key: answer[key] for key in kept}
        print(json.dumps(row | {"recorded": recorded if known else None, "difference": difference}), flush=True)
        return
    print(f"Text: {command_line.printable(question.text)}")
    rows = [("", "endpoint", "recorded", "difference")]
    before = {**(question.probabilities or {}), "label mass": question.label_mass}
    for name, p in {**answer["probabilities"], "label mass": answer["label_mass"]}.items():
        was = before.get(name)
        rows.append(
            (name, f"{p:.4f}", *(("", "") if was is None else (f"{was:.4f}", f"{round(p - was, 4) + 0.0:+.4f}")))
        )
    print(command_line.columns([row[:2] for row in rows] if question.probabilities is None else rows, "  "))
    print(f"  prediction: {answer['prediction']}\n", flush=True)


def verdict(args: argparse.Namespace, url: str, differences: Sequence[float], source: str) -> None:
    """Say whether it answers as recorded; exit code 1 if not."""
    out = sys.stderr if args.json else sys.stdout
    if not differences:
        if not args.text:
            print(f"nothing recorded is at hand for {url}; --recorded FILE compares with a predictions file", file=out)
        return
    worst, count = max(differences), sum(value > args.tolerance for value in differences)
    if count:
        print(
            f"{url} differs from {source} by up to {worst:.4f}, more than {args.tolerance:g} in {count} of "
            f"{len(differences)} texts; {MAY_DIFFER}",
            file=out,
        )
        sys.exit(1)
    print(f"{url} answers as {source}: {len(differences)} texts, largest difference {worst:.4f}", file=out)


if __name__ == "__main__":
    command_line.run(main)
