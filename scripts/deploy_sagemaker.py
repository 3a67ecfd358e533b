"""Serve a base model and its adapters on Amazon SageMaker: one endpoint on one GPU, any number of LoRA adapters.

    python scripts/deploy_sagemaker.py demo --adapter sentiment=fine_tuned_sentiment_model --dry-run
    python scripts/deploy_sagemaker.py demo --adapter sentiment=fine_tuned_sentiment_model
    python scripts/deploy_sagemaker.py demo --adapter tickets=tickets_model --remove sentiment      # the endpoint stays
    python scripts/deploy_sagemaker.py big --model llama --weights upload --adapter sentiment=llama_sentiment

Checks everything that can be checked before anything is billed, prints what it found and what it costs, and asks. Then
it uploads weights and adapters to S3 and makes a model, an endpoint, an inference component for the base model and one
for each adapter. On an endpoint that is up, the command adds adapters that are missing, swaps those whose files
changed, and leaves equal ones alone. An endpoint costs money every hour until it is deleted, whether it is asked
anything or not:

    python scripts/delete_endpoint.py demo
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aws  # noqa: E402
import command_line  # noqa: E402
import sagemaker_endpoint  # noqa: E402
from aws import Account, AwsError  # noqa: E402
from sagemaker_endpoint import MAX_LENGTH, MAX_RANK, EndpointPlan, Serving, deletion, rate  # noqa: E402

ANY_TIME = ("endpoint", "adapter", "remove", "bucket", "region", "dry_run", "yes", "max_wait", "poll_seconds")


def main(argv: Sequence[str] | None = None) -> None:
    parser, args = parse_arguments(argv)
    adapters = [sagemaker_endpoint.read_adapter(args.endpoint, text) for text in args.adapter]
    account = aws.connect(args.region, args.dry_run)
    bucket = aws.bucket_name(account, args.bucket)
    now = None if account.is_offline else sagemaker_endpoint.running(account, args.endpoint)
    if now is None and args.remove:
        raise ValueError(f"--remove: no endpoint {args.endpoint} is known here")
    if now is None:
        wanted = Serving(
            endpoint=args.endpoint,
            role=args.role,
            image=args.image or aws.image_uri(account.region, *sagemaker_endpoint.IMAGE),
            instance_type=args.instance_type,
            base_model=args.model,
            max_rank=sagemaker_endpoint.endpoint_rank(args.max_rank, adapters),
            max_length=args.max_length,
        )
        plan = sagemaker_endpoint.plan_start(account, wanted, adapters, args.bucket, args.weights, args.dry_run)
    else:
        why = f"{args.endpoint} is up, and only its adapters change"
        command_line.allow_only_arguments(parser, args, ANY_TIME, why)
        plan = sagemaker_endpoint.plan_change(account, now, adapters, args.remove, bucket)
    aws.print_checks(plan.checks)
    aws.refuse_failed(plan.checks)
    if args.dry_run:
        print_requests(plan)
        return
    if plan.weights and not args.yes:
        aws.ask_to_spend(f"Start {args.endpoint} for {rate(plan.hourly)}, until it is deleted?")
    try:
        if args.bucket is None and plan.steps:
            aws.make_bucket(account, bucket)
        carry_out(account, plan, bucket, args.max_wait, args.poll_seconds)
    except KeyboardInterrupt:
        print(f"\nstopped here, not at AWS: {left(account, args.endpoint, plan.hourly)}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {left(account, args.endpoint, plan.hourly)}") from None
    print_end(account, args.endpoint, plan)


def parse_arguments(argv: Sequence[str] | None) -> tuple[command_line.ArgumentParser, argparse.Namespace]:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("endpoint", metavar="ENDPOINT", help="its name: letters, digits and inner hyphens, 39 at most")
    many = {"nargs": "+", "action": "extend", "default": []}
    add("--adapter", metavar="NAME=FOLDER", **many, help="serve the LoRA adapter in FOLDER as NAME")
    add("--remove", metavar="NAME", **many, help="no longer serve the adapter NAME")
    model = "the base: default (embedded), llama, a Hub id or a folder (default: default)"
    add("--model", default="default", help=model)
    add("--instance-type", default=aws.INSTANCE, metavar="TYPE", help=f"the machine (default: {aws.INSTANCE})")
    rank = f"largest LoRA rank, for all adapters to come (default: {MAX_RANK}, or what these need)"
    add("--max-rank", type=command_line.natural, metavar="N", help=rank)
    length = f"tokens of the longest prompt (default: {MAX_LENGTH})"
    add("--max-length", type=command_line.natural, default=MAX_LENGTH, metavar="N", help=length)
    wait = "give up on what is not ready after this, as 30m or 1800 (default: 30m)"
    add("--max-wait", type=aws.seconds_of, default="30m", metavar="TIME", help=wait)
    aws.add_arguments(add)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return parser, args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.max_rank == 0 or args.max_length == 0:
        parser.error("--max-rank and --max-length: at least 1")
    sagemaker_endpoint.endpoint_name(args.endpoint)
    names = [text.partition("=")[0] for text in args.adapter] + args.remove
    for name in names:
        aws.component_name(args.endpoint, name)
        if names.count(name) > 1:
            parser.error(f"the adapter {name} is named twice")


def print_requests(plan: EndpointPlan) -> None:
    for step in plan.steps:
        print(f"\n{step.operation}\n{aws.request_text(step.body)}")
    print("\na dry run: nothing was started or changed" if plan.steps else "\na dry run: nothing is to be done")


def carry_out(account: Account, plan: EndpointPlan, bucket: str, max_wait_s: float, poll_s: float) -> None:
    if plan.weights:
        aws.upload_weights(account, plan.weights)
    for adapter in plan.uploads:
        sagemaker_endpoint.upload_adapter(account, adapter, adapter.uri(bucket))
    for step in plan.steps:
        name = next(iter(step.body.values()))
        print(f"{step.operation} {name}", flush=True)
        sagemaker_endpoint.take(account, step, max_wait_s, poll_s)


def left(account: Account, endpoint: str, hourly: float | None) -> str:
    """What exists after a failure, what it costs, and how to delete it."""
    delete = f"`{deletion(account, endpoint)}` deletes it"
    try:
        found = sagemaker_endpoint.describe_endpoint(account, endpoint)
    except AwsError:
        return f"the endpoint {endpoint} may exist and cost {rate(hourly)}; {delete}"
    if found is None:
        return f"there is no endpoint {endpoint}, so nothing is billed; `{deletion(account, endpoint)}` clears the rest"
    return f"the endpoint {endpoint} is {found['EndpointStatus']} and costs {rate(hourly)}; {delete}"


def print_end(account: Account, endpoint: str, plan: EndpointPlan) -> None:
    """What serves now, what it costs, and what to do next."""
    start = f"{endpoint}-adapter-"
    names = [name.removeprefix(start) for name in sagemaker_endpoint.component_names(account, endpoint)]
    names.remove(f"{endpoint}-base")
    print(f"\n{endpoint} serves its base model" + (f" and the adapters {', '.join(names)}" if names else ""))
    print(f"it costs {rate(plan.hourly)}, until it is deleted\n")
    adapter, served = (f" --adapter {names[0]}", f"/{names[0]}") if names else ("", "")
    print(f"  python scripts/test_endpoint.py {endpoint}{adapter} --region {account.region}")
    where = f"--endpoint sagemaker:{endpoint}{served} --tokenizer {plan.base_model}"
    print(f'  AWS_DEFAULT_REGION={account.region} python logprobs_confidence.py {where} "Not bad"')
    print(f"  {deletion(account, endpoint)}")


if __name__ == "__main__":
    command_line.run(main)
