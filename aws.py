"""Amazon Web Services, as training and serving both need them: an account, its errors in one line, checks, costs, S3.

    account = connect(region)                     # who and where; AWS_PROFILE and the like mean what they always mean
    with explained("read s3://bucket/key"): ...   # whatever boto3 raises becomes an AwsError that says what to do
    checks, role = check_account(account, ...)    # a table of what was looked at before money is spent
    found = checked(checks, "weights", lambda: find_weights(...), otherwise=...)
    refuse_failed(checks)

Nothing that is printed or raised shows a key or a token: `hidden` takes them out.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from command_line import one_line, printable
from model_files import hub_id, locate

Found = TypeVar("Found")

PREFIX = "calibrated-confidence"
INSTANCE = "ml.g6e.2xlarge"
ROLE = "SageMakerExecutionRole"
POLL_S = 10.0
NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
STAGED = {".json", ".safetensors", ".jinja", ".txt", ".model"}  # of a model's folder, what is uploaded

# Whose registry has AWS's images, by region. A region that is not listed is an error: a guess would fail after minutes.
REGISTRY = {
    "af-south-1": "626614931356",
    "ap-east-1": "871362719292",
    "ap-northeast-3": "364406365360",
    "ap-southeast-3": "907027046896",
    "ca-west-1": "204538143572",
    "cn-north-1": "727897471807",
    "cn-northwest-1": "727897471807",
    "eu-south-1": "692866216735",
    "il-central-1": "780543022126",
    "me-central-1": "914824155844",
    "me-south-1": "217643126080",
    "us-gov-east-1": "446045086412",
    "us-gov-west-1": "442386744353",
}
OTHER_REGIONS = "us-east-1 us-east-2 us-west-1 us-west-2 ca-central-1 sa-east-1 eu-central-1 eu-north-1 eu-west-1 "
OTHER_REGIONS += "eu-west-2 eu-west-3 ap-south-1 ap-northeast-1 ap-northeast-2 ap-southeast-1 ap-southeast-2"
REGISTRY |= dict.fromkeys(OTHER_REGIONS.split(), "763104351884")
# USD an hour in us-east-1, the same for training and serving: third-party quotes of AWS's list, read in November 2026.
PRICES = {
    "ml.g5.2xlarge": 1.515,
    "ml.g6.2xlarge": 1.222,
    "ml.g6e.xlarge": 2.61,
    "ml.g6e.2xlarge": 2.80,
    "ml.g6e.4xlarge": 3.76,
    "ml.g6e.8xlarge": 5.66,
    "ml.g6e.12xlarge": 13.12,
    "ml.g7e.2xlarge": 4.20,
}
PRICED = "us-east-1, November 2026"
SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}")
URL_PASSWORD = re.compile(r"(?<=//)[^/\s@]+@")
SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


# Errors


class AwsError(ValueError):
    """What AWS refused, in one line that says what to do; `code` is AWS's or botocore's own name for it."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code

    @property
    def is_gone(self) -> bool:
        """Whether the thing asked for is not there (SageMaker says so with a ValidationException)."""
        codes = ("ResourceNotFound", "ResourceNotFoundException", "NoSuchEntity", "404", "NoSuchBucket", "NoSuchKey")
        absent = re.search("could not find|not found|does not exist", str(self), re.I)
        return self.code in codes or (self.code == "ValidationException" and bool(absent))

    @property
    def is_not_an_answer(self) -> bool:
        """Whether AWS did not say how things are: we may not look, nobody asked, or the request was lost."""
        lost = re.search("AccessDenied|Unauthorized|NoCredentials|Throttl|Connect|Timeout|Unavailable", self.code)
        return bool(lost) or self.code == "403"


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn what boto3 raises into an AwsError that says what to do."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
        return
    except ClientError as error:
        code, said = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
    except (BotoCoreError, Boto3Error) as error:
        code, said = type(error).__name__, one_line(error)
    raise AwsError(f"cannot {doing}: {explanation(code, said)}", code) from None


def explanation(code: str, said: str) -> str:
    """What an error means and what to do about it, in one line: by AWS's code, or botocore's name of its exception."""
    said = hidden(" ".join(said.split()))[:300].rstrip(".")
    if code.startswith("ExpiredToken") or code == "RequestExpired":
        return f"the AWS credentials have expired ({code}); sign in again (`aws sso login`, or new keys)"
    # The text of a wrong signature repeats the signed request, with a session's token in it.
    if "Signature" in code or re.match("UnrecognizedClient|InvalidClientToken|InvalidAccessKey|MissingAuth|Auth", code):
        return f"AWS refuses the credentials ({code}); look at AWS_PROFILE, `aws sts get-caller-identity` and the clock"
    if re.search("Credential|Token|SSO|Login|ProfileNotFound", code):
        return f"no AWS credentials ({said}): run `aws configure` or `aws sso login`, or set AWS_PROFILE"
    if re.search("Connect|Timeout|SSL|HTTPClient", code):
        return f"AWS cannot be reached ({said}); is the region right?"
    if "AccessDenied" in code or code in ("403", "UnauthorizedOperation"):
        return f"AWS denies access ({said or code}); the documentation lists the permissions"
    if code == "ResourceLimitExceeded":
        return f"{said}; ask for more under Service Quotas, which takes up to a day, or take another --instance-type"
    if "Throttl" in code:
        return f"AWS asks for patience ({said}); repeat the command in a minute"
    return said or code


def advice(reason: str) -> str:
    """What to do about the FailureReason of a job, an endpoint or a component; empty if that is not known."""
    if re.search("capacity|unable to provision", reason, re.I):
        return "; AWS has none free: try later, another --instance-type or --region, or without --spot"
    if re.search("out ?of ?memory|SIGKILL|KV cache", reason, re.I):
        return "; a larger --instance-type, or a smaller --micro-batch-size (training) or --max-length (serving)"
    return ""


def hidden(text: str) -> str:
    """A text without this user's keys, a URL's user and password, and what looks like a Hugging Face token."""
    for variable in SECRET_VARIABLES:
        if secret := os.environ.get(variable):
            text = text.replace(secret, "[redacted]")
    return SECRET_VALUE.sub("[redacted]", URL_PASSWORD.sub("[redacted]@", text))


def request_text(request: Mapping) -> str:
    """A request as --dry-run prints it."""
    return hidden(json.dumps(request, indent=1))


def printed(text: str) -> str:
    """What AWS or a container says, for a terminal: one line, without control characters and secrets."""
    return printable(hidden(" ".join(str(text).split())))


# The account


@dataclass(frozen=True)
class Account:
    """A region and an account, and clients for both; `number` is None where there are no credentials."""

    region: str
    number: str | None
    session: object = field(repr=False)
    _clients: dict = field(default_factory=dict, repr=False)

    def client(self, service: str) -> object:
        """A client that tries again for itself what may pass."""
        from botocore.config import Config

        if self.number is None:
            raise AwsError("no AWS credentials", "NoCredentialsError")
        if service not in self._clients:
            retries = {"mode": "standard", "total_max_attempts": 6}
            config = Config(retries=retries, connect_timeout=10, read_timeout=60)
            self._clients[service] = self.session.client(service, region_name=self.region, config=config)
        return self._clients[service]

    @property
    def owner(self) -> str:
        """The account's number; in a dry run without credentials zeros, which are nobody's."""
        return self.number or "0" * 12

    @property
    def is_offline(self) -> bool:
        return self.number is None


def connect(region: str | None = None, dry_run: bool = False) -> Account:
    """Find region and account. A dry run may lack both: us-east-1 and no account stand in then."""
    import boto3

    with explained("read the AWS settings"):
        session = boto3.Session(region_name=region)
    region = session.region_name or os.environ.get("AWS_REGION") or ("us-east-1" if dry_run else None)
    if region is None:
        raise ValueError("no AWS region: give --region, or set AWS_DEFAULT_REGION")
    if region not in REGISTRY:
        raise ValueError(f"no images are known for region {region!r}; those with some: {', '.join(sorted(REGISTRY))}")
    try:
        with explained("ask AWS who you are"):
            number = session.client("sts", region_name=region).get_caller_identity()["Account"]
    except AwsError:
        if not dry_run:
            raise
        number = None
    return Account(region, number, session)


def unless_gone(doing: str, ask: Callable[[], Found]) -> Found | None:
    """The answer to a question about one thing; None if there is no such thing."""
    try:
        with explained(doing):
            return ask()
    except AwsError as error:
        if error.is_gone:
            return None
        raise


def aws_name(name: str) -> str:
    """The name, if AWS takes it; ValueError if not."""
    if not NAME.fullmatch(name) or len(name) > 63:
        raise ValueError(f"{name!r} is no name on AWS: letters, digits and inner hyphens, 63 at most")
    return name


def component_name(endpoint: str, adapter: str | None = None) -> str:
    """The inference component of an endpoint's base model, or of one of its adapters."""
    if adapter is None:
        return aws_name(f"{endpoint}-base")
    return aws_name(f"{endpoint}-adapter-{aws_name(adapter)}")


def image_uri(region: str, repository: str, tag: str) -> str:
    """The address of one of AWS's own container images in a region."""
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"{REGISTRY[region]}.dkr.ecr.{region}.{domain}/{repository}:{tag}"


TAGS = [{"Key": "project", "Value": PREFIX}]


# Checks before money is spent


class Check(NamedTuple):
    """One line of the table before a start: ok, warning or failed; of what; and what was seen or is to be done."""

    status: str
    subject: str
    detail: str


def checked(checks: list[Check], subject: str, look: Callable[[], Found], otherwise: Found) -> Found:
    """What look() finds, and a line about it; `otherwise` where it cannot be looked at, or is not as it should be."""
    try:
        found = look()
    except AwsError as error:
        why = f"not checked: {otherwise}" if error.code == "NoCredentialsError" else f"not checked: {error}"
        failed = Check("failed", subject, str(error))
        checks.append(Check("warning", subject, why) if error.is_not_an_answer else failed)
        return otherwise
    except ValueError as error:
        checks.append(Check("failed", subject, str(error)))
        return otherwise
    checks.append(Check("ok", subject, str(found)))
    return found


def print_checks(checks: Sequence[Check]) -> None:
    width = max(len(one.subject) for one in checks)
    for one in checks:
        print(f"  {one.status:8} {one.subject:{width}}  {printed(one.detail)}")


def refuse_failed(checks: Sequence[Check]) -> None:
    """ValueError that says which checks failed, and why."""
    if failed := [f"{one.subject}: {one.detail}" for one in checks if one.status == "failed"]:
        raise ValueError(f"nothing is started, changed or billed: {'; '.join(failed)}")


def check_account(account: Account, role: str, bucket: str | None, instance_type: str) -> tuple[list[Check], str]:
    """The checks that every start begins with, and the role's ARN."""
    where, name = f"region {account.region}", bucket_name(account, bucket)
    checks = [Check("ok", "identity", f"account {account.number}, {where}")]
    if account.is_offline:
        checks = [Check("warning", "identity", f"no credentials, so nothing on AWS is checked; {where}")]
    partition = account.session.get_partition_for_region(account.region)
    assumed = role if role.startswith("arn:") else f"arn:{partition}:iam::{account.owner}:role/{role}"
    arn = checked(checks, "role", lambda: find_role(account, role), assumed)
    checked(checks, "bucket", lambda: check_bucket(account, name, bucket is None), name)
    checked(checks, "instance type", lambda: check_instance(instance_type), instance_type)
    return checks, arn


def check_instance(instance_type: str) -> str:
    """The type, if it has an NVIDIA GPU, which the images need; AWS itself refuses a type that it does not have."""
    if not re.match(r"ml\.[gp]\d", instance_type):
        raise ValueError(f"{instance_type} has no NVIDIA GPU; as {INSTANCE}")
    return instance_type


def find_role(account: Account, role: str) -> str:
    """The ARN of the role that a container runs as, given as a name or an ARN.

    AWS itself refuses, before anything is billed, a role that it may not use.
    """
    if role.startswith("arn:"):
        return role
    with explained(f"look at the role {role} (--role names another)"):
        return account.client("iam").get_role(RoleName=role)["Role"]["Arn"]


# Costs


def price(region: str, instance_type: str) -> float | None:
    """USD an hour, None where it is not known."""
    return PRICES.get(instance_type) if region == "us-east-1" else None


def seconds_of(text: str) -> int:
    """A duration in seconds: 7200, 90m, 2h or 1.5h. For argparse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    value = round(float(found[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[found[2]]) if found else 0
    if not 60 <= value <= 28 * 86400:
        raise ValueError  # argparse has words for it
    return value


def ask_to_spend(question: str) -> None:
    """Ask before money is spent; ValueError for anything but yes, and where nobody can be asked."""
    if not sys.stdin or not sys.stdin.isatty():
        raise ValueError("nothing is started without a yes: add --yes, or --dry-run to look only")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("not started, nothing is billed")


# S3


def bucket_and_key(uri: str) -> tuple[str, str]:
    """(bucket, key) of an s3:// address."""
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.*)", uri)
    if not found:
        raise ValueError(f"{uri!r} is not an S3 address; s3://BUCKET/PREFIX")
    return found[1], found[2]


def bucket_name(account: Account, bucket: str | None) -> str:
    """The bucket given, or the one that SageMaker's own tools use by default."""
    return (bucket or f"sagemaker-{account.region}-{account.owner}").removeprefix("s3://").rstrip("/")


def find_bucket(account: Account, bucket: str) -> dict | None:
    """What S3 says of a bucket of this account, None if there is none; AwsError for somebody else's."""
    client = account.client("s3")
    doing = f"see the bucket {bucket} (it may be somebody else's)"
    return unless_gone(doing, lambda: client.head_bucket(Bucket=bucket, ExpectedBucketOwner=account.number))


def check_bucket(account: Account, bucket: str, is_default: bool) -> str:
    """What is to be said of the bucket, if it is there and in this region; the default one may be absent."""
    seen = find_bucket(account, bucket)
    if seen is None and is_default:
        return f"{bucket} is not there yet and will be made"
    if seen is None:
        raise ValueError(f"no bucket {bucket}: aws s3 mb s3://{bucket} --region {account.region}")
    where = seen.get("BucketRegion", account.region)
    if where != account.region:
        raise ValueError(f"{bucket} is in {where}, not in {account.region}; another --bucket or --region")
    if "sagemaker" not in bucket.lower():
        return f"{bucket} (the role needs a policy for it: AmazonSageMakerFullAccess opens buckets named *sagemaker*)"
    return bucket


def make_bucket(account: Account, bucket: str) -> None:
    """Make the default bucket where it is not there, closed to the public as new buckets are."""
    if find_bucket(account, bucket) is None:
        place = {"CreateBucketConfiguration": {"LocationConstraint": account.region}}
        with explained(f"make the bucket {bucket}"):
            account.client("s3").create_bucket(Bucket=bucket, **({} if account.region == "us-east-1" else place))


def is_there(account: Account, uri: str, size: int) -> bool:
    """Whether an object of this size lies at an address that names its content."""
    bucket, key = bucket_and_key(uri)
    try:
        with explained(f"look at {uri}"):
            found = account.client("s3").head_object(Bucket=bucket, Key=key, ExpectedBucketOwner=account.number)
    except AwsError as error:
        if error.is_gone or error.code == "403":  # who may not list a bucket is denied what is not there
            return False
        raise
    return found["ContentLength"] == size


def upload(account: Account, uri: str, content: bytes) -> None:
    """Put bytes to an address that names its content, unless they are there."""
    if not is_there(account, uri, len(content)):
        bucket, key = bucket_and_key(uri)
        with explained(f"upload {uri}"):
            account.client("s3").put_object(Bucket=bucket, Key=key, Body=content, ExpectedBucketOwner=account.number)


def read_object(account: Account, uri: str) -> bytes:
    bucket, key = bucket_and_key(uri)
    with explained(f"read {uri}"):
        return account.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()


def archive(files: Mapping[str, bytes]) -> bytes:
    """A .tar.gz of these files, at its root; the same files give the same bytes, whenever and whoever packs them."""
    packed = io.BytesIO()
    # Not compressed by the tarfile module, which would write the time and the file's name.
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(files[name]), 0o644
            tar.addfile(entry, io.BytesIO(files[name]))
    return gzip.compress(packed.getvalue(), compresslevel=9, mtime=0)


def short_hash(*parts: bytes) -> str:
    """Sixteen hex digits over byte strings."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


# A model's weights


@dataclass(frozen=True)
class Weights:
    """Where a container has a model from: it fetches it (`prefix` empty), or SageMaker brings it from an S3 prefix.

    `files` are to be uploaded there, by name; `identity` is what `model_files.locate` says of the weights.
    """

    model: str
    identity: str
    detail: str  # for the table of checks
    prefix: str = ""
    files: Mapping[str, Path] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.detail


def find_weights(model: str, place: str, home: str, dry_run: bool, has_token: bool = False) -> Weights:
    """The weights that --model and --weights mean; uploads lie below `home`, an s3:// address."""
    name = hub_id(model)
    if name and place == "auto":
        return Weights(name, f"{name}@{hub_commit(name, has_token)}", f"the container fetches {name} from the Hub")
    if name and dry_run:  # gigabytes are not fetched to see where they would go
        identity, files = f"{name}@{hub_commit(name, has_token=True)}", {}
    else:
        _, folder, identity = locate(model)
        files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in STAGED and path.is_file()}
        name = name or (model if model == "default" else str(folder.resolve()))
    plain = re.sub("[^A-Za-z0-9.-]+", "-", identity.partition("@")[0])
    prefix = f"{home}/weights/{plain}-{short_hash(identity.encode())}/"  # another for other weights
    size = sum(path.stat().st_size for path in files.values())
    amount = f"{size / 1e6:,.0f} MB" if files else "they"
    return Weights(name, identity, f"{amount} are uploaded once, to {prefix}", prefix, files)


def hub_commit(name: str, has_token: bool) -> str:
    """The commit of a model of the Hub that a container may fetch by itself, with a token or without."""
    from huggingface_hub import errors, model_info

    try:
        found = model_info(name, timeout=10)
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:  # a gated one is among these
        raise ValueError(f"the Hub shows no {name} to you ({one_line(error)}); check the name, or log in") from None
    except (errors.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise AwsError(f"the Hub cannot be asked for {name} ({one_line(error)})", "Unavailable") from None
    if (found.gated or found.private) and not has_token:
        raise ValueError(f"{name} is gated or private: --weights upload stages it in S3, without a token")
    return found.sha


def upload_weights(account: Account, weights: Weights) -> None:
    """Upload the files that are not there yet; says so, for weights take a while."""
    for name, path in weights.files.items():
        uri, size = weights.prefix + name, path.stat().st_size
        if not is_there(account, uri, size):
            print(f"uploading {size / 1e6:,.0f} MB to {uri}", flush=True)
            with explained(f"upload {uri}"):
                extra = {"ExpectedBucketOwner": account.number}
                account.client("s3").upload_file(str(path), *bucket_and_key(uri), ExtraArgs=extra)


# Command line


def add_arguments(add: Callable) -> None:
    """The flags that training and deploying share."""
    where = "auto: a folder is uploaded, all else fetched by the container; upload: from here, without a token"
    add("--weights", choices=["auto", "upload"], default="auto", help=where)
    add("--role", default=ROLE, help=f"the IAM role, a name or ARN, that the container runs as (default: {ROLE})")
    add("--bucket", metavar="NAME", help="for data and results (default: sagemaker-REGION-ACCOUNT)")
    add("--region", metavar="NAME", help="default: that of your AWS settings")
    add("--image", metavar="URI", help="another container image (default: AWS's own, for the region)")
    add("--dry-run", action="store_true", help="check and print what would be sent; starts and bills nothing")
    add("--yes", action="store_true", help="do not ask before money is spent")
    add("--poll-seconds", type=float, default=POLL_S, metavar="S", help=f"between two looks (default: {POLL_S:g})")
