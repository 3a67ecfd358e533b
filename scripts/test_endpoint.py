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
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aws  # noqa: E402
import command_line  # noqa: E402
import endpoint  # noqa: E402
import llama  # noqa: E402
import predictions  # noqa: E402
from aws import Account, AwsError  # noqa: E402
from files import validated  # noqa: E402
from fine_tune_model import PROBES  # noqa: E402
from logprobs_confidence import remote_label_scorer  # noqa: E402
from sagemaker_endpoint import artifact_of, describe_component, record_uri, running  # noqa: E402
from task import Task, read_task  # noqa: E402

MAY_DIFFER = "precision (the endpoint runs in bfloat16), the base weights, the adapter, or the prompt (--task, "
MAY_DIFFER += "--tokenizer)"


@dataclass(frozen=True)
class Question:
    """A text, and what the model answered to it here, if that is known."""

    text: str
    probabilities: dict[str, float] | None = None
    label_mass: float | None = None

    def difference(self, answer: Mapping) -> float | None:
        """The largest of the label probabilities' differences."""
        if self.probabilities is None:
            return None
        return max(abs(answer["probabilities"][label] - p) for label, p in self.probabilities.items())


@dataclass(frozen=True)
class AdapterRecord:
    """What is used of the training_config.json that lies beside an adapter's archive."""

    task: dict | None = None
    probes: list[Question] = ()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    account = aws.connect(args.region)
    os.environ["AWS_DEFAULT_REGION"] = account.region  # endpoint.py reads it there
    record = adapter_record(account, args.endpoint, args.adapter)
    task = Task.from_settings(record.task) if record.task and not args.task else read_task(args.task or "sentiment")
    source = args.recorded or "its record"
    if args.text:
        questions = [Question(text) for text in args.text]
    elif args.recorded:
        questions = recorded_questions(args.recorded, args.limit, task)
    else:
        questions = list(record.probes) or [Question(text) for text in PROBES]
    check_labels(questions, task, source)
    url = f"sagemaker:{args.endpoint}" + (f"/{args.adapter}" if args.adapter else "")
    differences = []
    with endpoint.connect(url, reader=reader_of(account, args.endpoint, args.tokenizer)) as server:
        scorer = remote_label_scorer(server, task)
        for number, question in enumerate(questions, 1):
            try:
                answer = scorer.explain(question.text)
            except ValueError as error:
                raise ValueError(f"text {number} ({question.text[:40]!r}): {error}") from None
            if args.json:
                print_json(url, question, answer)
            else:
                print_beside(question, answer)
            if question.probabilities is not None:
                differences.append(question.difference(answer))
    say = comparison(differences, args.tolerance, source)
    if not args.text:
        print(f"{url} {say}", file=sys.stderr if args.json else sys.stdout)
    if any(value > args.tolerance for value in differences):
        sys.exit(1)


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
    aws.component_name(args.endpoint, args.adapter)
    if args.text and args.recorded:
        parser.error("--text asks, --recorded compares; give one of them")
    if not 0 < args.tolerance < 1:
        parser.error(f"--tolerance {args.tolerance}: between 0 and 1, both excluded")
    return args


def adapter_record(account: Account, name: str, adapter: str | None) -> AdapterRecord:
    """What lies beside the adapter's archive, if anything; ValueError if the component is not there."""
    component = aws.component_name(name, adapter)
    found = describe_component(account, component)
    if found is None:
        flag = f" --adapter {adapter}=FOLDER" if adapter else ""
        make = f"python scripts/deploy_sagemaker.py {name}{flag}"
        raise ValueError(f"there is no component {component} in {account.region}; {make} makes it")
    if adapter is None:
        return AdapterRecord()
    uri = record_uri(artifact_of(found))
    try:
        return validated(AdapterRecord, json.loads(aws.read_object(account, uri)), uri)
    except AwsError as error:
        print(f"note: no record of {component} ({error})", file=sys.stderr)
        return AdapterRecord()


def recorded_questions(file: str, limit: int, task: Task) -> list[Question]:
    """The first scored rows of a predictions file, which must be of this task."""
    rows = list(islice((row for row in predictions.iterate(file) if row.error is None), limit))
    if not rows:
        raise ValueError(f"{file} has no scored row")
    if rows[0].task != task.name:
        raise ValueError(f"{file} was made with task {rows[0].task!r}, this asks {task.name!r}; --task")
    return [Question(row.text, row.probabilities, row.label_mass) for row in rows]


def check_labels(questions: Sequence[Question], task: Task, source: str) -> None:
    for question in questions:
        if question.probabilities is not None and set(question.probabilities) != set(task.labels):
            raise ValueError(f"{source} has the labels {', '.join(question.probabilities)}, task {task.name!r} others")


def reader_of(account: Account, name: str, tokenizer: str | None) -> object | None:
    """The tokenizer that turns prompts into ids, by default that of the served model; None sends text."""
    if tokenizer == "none":
        return None
    model = tokenizer or running(account, name).base_model
    try:
        return llama.load_reader(model)
    except (ValueError, OSError) as error:
        hint = "--tokenizer names the model in another way, --tokenizer none sends text"
        raise ValueError(f"no tokenizer of {model}: {error}; {hint}") from None


def print_json(url: str, question: Question, answer: Mapping) -> None:
    row = {"endpoint": url}
    for name in ("text", "prediction", "confidence", "probabilities", "label_mass", "fingerprint"):
        row[name] = answer[name]
    row |= {"recorded": asdict(question) if question.probabilities else None, "difference": question.difference(answer)}
    print(json.dumps(row), flush=True)


def print_beside(question: Question, answer: Mapping) -> None:
    """What the endpoint says of one text, beside what was recorded."""
    print(f"Text: {command_line.printable(question.text)}")
    rows = [["", "endpoint"], *([label, f"{p:.4f}"] for label, p in answer["probabilities"].items())]
    rows.append(["label mass", f"{answer['label_mass']:.4f}"])
    if question.probabilities is not None:
        was = [question.probabilities[label] for label in answer["probabilities"]] + [question.label_mass]
        now = [*answer["probabilities"].values(), answer["label_mass"]]
        rows[0] += ["recorded", "difference"]
        for row, before, after in zip(rows[1:], was, now, strict=True):
            row += [f"{before:.4f}", f"{round(after - before, 4) + 0.0:+.4f}"]
    print(command_line.columns(rows, "  "))
    print(f"  prediction: {answer['prediction']}\n", flush=True)


def comparison(differences: Sequence[float], tolerance: float, source: str) -> str:
    """Whether it answers as recorded."""
    if not differences:
        return "has no recorded answers to compare with; --recorded FILE names some"
    worst, count = max(differences), sum(value > tolerance for value in differences)
    if not count:
        return f"answers as {source}: {len(differences)} texts, largest difference {worst:.4f}"
    beyond = f"more than {tolerance:g} in {count} of {len(differences)} texts"
    return f"differs from {source} by up to {worst:.4f}, {beyond}; what may differ: {MAY_DIFFER}"


if __name__ == "__main__":
    command_line.run(main)
