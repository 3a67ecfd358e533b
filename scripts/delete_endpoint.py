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

import aws  # noqa: E402
import command_line  # noqa: E402
from aws import Account, AwsError  # noqa: E402
from sagemaker_endpoint import delete_all, deletion, describe_endpoint, endpoint_name, is_ours, remaining  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    name, account = endpoint_name(args.endpoint), aws.connect(args.region)
    refuse_others(account, name)
    found = remaining(account, name)
    if not found:
        print(f"there is nothing of {name} in {account.region}; nothing to do")
    if args.dry_run:
        for kind, one in found:
            print(f"would delete {kind} {one}")
        return
    again = f"repeat `{deletion(account, name)}`"
    try:
        delete_all(account, found, args.max_wait, args.poll_seconds)
        print(f"nothing of {name} is left; uploads in S3 below {aws.PREFIX}/ stay (cents a month)")
    except KeyboardInterrupt:
        print(f"\nstopped; what AWS was asked to delete goes on, the rest may cost money: {again}", file=sys.stderr)
        sys.exit(130)
    except ValueError as error:
        print(f"error: {command_line.printable(f'{error}; {still_there(account, name)}: {again}')}", file=sys.stderr)
        sys.exit(1)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("endpoint", metavar="ENDPOINT", help="its name, as given to deploy_sagemaker.py")
    add("--region", metavar="NAME", help="default: that of your AWS settings")
    wait = "give up on what is not gone after this, as 30m or 1800 (default: 30m)"
    add("--max-wait", type=aws.seconds_of, default="30m", metavar="TIME", help=wait)
    pause = f"between two looks (default: {aws.POLL_S:g})"
    add("--poll-seconds", type=float, default=aws.POLL_S, metavar="S", help=pause)
    add("--dry-run", action="store_true", help="print what would be deleted; deletes nothing")
    return parser.parse_args(argv)


def refuse_others(account: Account, name: str) -> None:
    """ValueError for an endpoint that deploy_sagemaker.py did not make."""
    endpoint = describe_endpoint(account, name)
    if endpoint and not is_ours(name, endpoint.get("EndpointConfigName", "")):
        raise ValueError(
            f"the endpoint {name} was not made by deploy_sagemaker.py and is left as it is; if it is to go: "
            f"aws sagemaker delete-endpoint --endpoint-name {name} --region {account.region}"
        )


def still_there(account: Account, name: str) -> str:
    try:
        found = remaining(account, name)
    except AwsError:
        return f"the endpoint {name} may still be there and cost money"
    costs = "the endpoint costs money" if ("endpoint", name) in found else "none of which costs anything"
    return f"still there: {', '.join(one for _, one in found)}, {costs}"


if __name__ == "__main__":
    command_line.run(main)
