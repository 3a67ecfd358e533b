"""Delete an endpoint on Amazon SageMaker with all that belongs to it, so that nothing of it costs anything any more.

    python scripts/delete_endpoint.py demo
    python scripts/delete_endpoint.py demo --dry-run     # what would be deleted

In the order that AWS wants: adapters, base, endpoint, configuration, model. What is gone already is no error, and what
a half-made endpoint left is found too, so the same command can be repeated until nothing is left. Uploads in S3 stay:
the next endpoint needs them again. Exit code: 0, or 1 when something that costs money, or may, is still there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import predictions  # noqa: E402
import sagemaker_job as cloud  # noqa: E402
from sagemaker_job import Aws, AwsError  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    name, aws = args.endpoint, cloud.connect(args.region)
    args.region = aws.region  # for the command that is printed
    endpoint = cloud.look(aws, "endpoint", name)
    if endpoint and not cloud.is_ours(name, endpoint.get("EndpointConfigName", "")):
        raise ValueError(
            f"the endpoint {name} was not made by deploy_sagemaker.py and is left as it is; if it is to go: "
            f"aws sagemaker delete-endpoint --endpoint-name {name} --region {aws.region}"
        )
    found = cloud.remaining(aws, name)
    if args.dry_run or not found:
        for kind, one in found:
            print(f"would delete {kind.replace('_', ' ')} {one}")
        if not found:
            print(f"there is nothing of {name} in {aws.region}; nothing to do")
        return
    hourly, bucket = hourly_cost(aws, endpoint), bucket_of(aws, found)
    try:
        problem = cloud.delete_all(aws, name, args.max_wait, args.poll_seconds)
        still = cloud.remaining(aws, name) if problem else []
    except AwsError as error:
        problem, still = str(error), found
    except KeyboardInterrupt:
        print(
            f"\nstopped; what AWS was asked to delete goes on, the rest may cost {hourly}: {again(args)}",
            file=sys.stderr,
        )
        sys.exit(130)
    if problem:
        names = ", ".join(one for _, one in still)
        costs = f"which costs {hourly}" if ("endpoint", name) in still else "none of which costs anything"
        line = f"{problem}; may still be there: {names}, {costs}: {again(args)}"
        print(f"error: {command_line.printable(line)}", file=sys.stderr)
        sys.exit(1)
    print(f"nothing of {name} is left; uploads in s3://{bucket}/{cloud.PREFIX}/ remain (cents a month)")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("endpoint", metavar="ENDPOINT", help="its name, as given to deploy_sagemaker.py")
    add("--region", metavar="NAME", help="default: that of your AWS settings")
    wait = "give up on what is not gone after this, as 30m or 1800 (default: 30m)"
    add("--max-wait", type=cloud.seconds, default="30m", metavar="TIME", help=wait)
    pause = f"between two looks (default: {cloud.POLL_S:g})"
    add("--poll-seconds", type=float, default=cloud.POLL_S, metavar="S", help=pause)
    add("--dry-run", action="store_true", help="print what would be deleted; deletes nothing")
    args = parser.parse_args(argv)
    cloud.endpoint_name(args.endpoint)
    if not 0 < args.poll_seconds <= 600:
        parser.error(f"--poll-seconds {args.poll_seconds:g}: above 0, 600 at most")
    return args


def again(args: argparse.Namespace) -> str:
    return f"repeat `python scripts/delete_endpoint.py {args.endpoint} --region {args.region}`"


def hourly_cost(aws: Aws, endpoint: dict | None) -> str:
    """What the endpoint costs, in words."""
    if not endpoint:
        return "nothing"
    hourly, _ = cloud.endpoint_price(aws, endpoint)
    return "an unknown sum an hour" if hourly is None else f"${hourly:.2f} an hour"


def bucket_of(aws: Aws, found: Sequence[tuple[str, str]]) -> str:
    """The bucket that the endpoint's weights or adapters lie in; the default one if nothing says so."""
    for kind, name in found:
        if kind in ("model", "inference_component"):
            description = cloud.look(aws, kind, name) or {}
            container = description.get("PrimaryContainer", {})
            source = container.get("ModelDataSource", {}).get("S3DataSource", {}).get("S3Uri")
            if uri := cloud.artifact_of(description) or source:
                return cloud.split(uri)[0]
    return cloud.bucket_name(aws, None)


if __name__ == "__main__":
    command_line.run(main)
