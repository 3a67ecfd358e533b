"""Amazon SageMaker: request bodies, checks before money is spent, training jobs, endpoints with many adapters.

    aws = connect(region)                        # who and where
    request = training_request(job)              # pure, as all *_request: what --dry-run prints is what is sent
    name = launch(aws, args, files, data, weights, rows)       # checks, asks, uploads, starts
    description = follow(aws, name)              # status and log lines until the job ends
    folder = download(aws, description, to, needed)            # the adapter, unpacked and complete

`fine_tune_model.py --sagemaker` trains, `scripts/deploy_sagemaker.py`, `scripts/test_endpoint.py` and
`scripts/delete_endpoint.py` serve. All of it is boto3, so AWS_PROFILE and the other AWS_ variables mean what they
always mean. A job never carries a token: weights are staged in S3, or the container reads a secret by its ARN.

A ValueError is one line that says what to do; AwsError is one that AWS caused, with the code it gave.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PREFIX = "calibrated-confidence"
INSTANCE = "ml.g6e.2xlarge"
TRAINING_IMAGE = ("huggingface-pytorch-training", "2.9.0-transformers5.3.0-gpu-py312-cu130-ubuntu22.04")
SERVING_IMAGE = ("djl-inference", "0.36.0-lmi28.0.0-cu130")  # vLLM 0.26, the first that lists chosen tokens by id
# What a job takes along. The image brings torch; the rest of requirements.txt is for other scripts.
SOURCES = (
    "calibration.py",
    "calibration_metrics.py",
    "fine_tune_model.py",
    "llama.py",
    "plotting.py",
    "predictions.py",
)
SOURCES += ("sagemaker_job.py", "task.py", "scripts/sagemaker_entry.py")
NOT_IN_A_JOB = {"torch", "datasets", "pyarrow", "relplot", "plotly", "openai", "anthropic", "boto3", "botocore"}
STAGED = {".json", ".safetensors", ".jinja", ".txt", ".model"}  # of a model's folder, what is uploaded
VOLUME_GB = 100
SPOT_WAIT_S = 6 * 3600  # for capacity, beyond the running time
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
POLL_S = 10.0
NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")

# Whose registry has the images, by region. A region that is not listed is an error: a guess would fail after minutes.
REGISTRY = {
    region: account
    for account, regions in {
        "763104351884": "us-east-1 us-east-2 us-west-1 us-west-2 ca-central-1 sa-east-1 eu-central-1 eu-north-1 "
        "eu-west-1 eu-west-2 eu-west-3 ap-south-1 ap-northeast-1 ap-northeast-2 ap-southeast-1 ap-southeast-2",
        "626614931356": "af-south-1",
        "871362719292": "ap-east-1",
        "364406365360": "ap-northeast-3",
        "907027046896": "ap-southeast-3",
        "204538143572": "ca-west-1",
        "727897471807": "cn-north-1 cn-northwest-1",
        "692866216735": "eu-south-1",
        "780543022126": "il-central-1",
        "914824155844": "me-central-1",
        "217643126080": "me-south-1",
        "446045086412": "us-gov-east-1",
        "442386744353": "us-gov-west-1",
    }.items()
    for region in regions.split()
}
# USD an hour in us-east-1, where the price list cannot be asked: third-party quotes of it, read in November 2026.
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
WEIGHTS_HELP = "auto: a folder is uploaded, all else fetched by the container; upload: from here; or s3://PREFIX"
# What the validation lines of fine_tune_model.py show, as CloudWatch metrics.
METRICS = [
    {"Name": "train:loss", "Regex": r"\d+ of \d+ +([0-9.]+) +[0-9.]+ +[0-9.]+ +[0-9.]+ \("},
    {"Name": "validation:log_loss", "Regex": r"\d+ of \d+ +[0-9.]+ +([0-9.]+) +[0-9.]+ +[0-9.]+ \("},
    {"Name": "validation:accuracy", "Regex": r"\d+ of \d+ +[0-9.]+ +[0-9.]+ +([0-9.]+) +[0-9.]+ \("},
    {"Name": "validation:ece", "Regex": r"\d+ of \d+ +[0-9.]+ +[0-9.]+ +[0-9.]+ +([0-9.]+) \("},
]
SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|KEY|PASSWORD)S?(_|$)", re.I)
SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{20,}")
GONE = re.compile(r"could not find|not found|does not exist", re.I)


# Talking to AWS


class AwsError(ValueError):
    """What AWS refused, in one line that says what to do; `code` is AWS's own name for it."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code

    @property
    def is_gone(self) -> bool:
        """Whether the thing asked for is not there (SageMaker says so with a ValidationException)."""
        known = {"ResourceNotFound", "ResourceNotFoundException", "NoSuchEntity", "404", "NoSuchBucket", "NoSuchKey"}
        return self.code in known or (self.code == "ValidationException" and bool(GONE.search(str(self))))

    @property
    def is_denied(self) -> bool:
        return "AccessDenied" in self.code or self.code in ("403", "UnauthorizedOperation")

    @property
    def passes(self) -> bool:
        """Whether another try may succeed."""
        known = {"network", "ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded"}
        return self.code in known or self.code in {"ServiceUnavailable", "InternalFailure", "InternalServerException"}


@dataclass(frozen=True)
class Aws:
    """A region and an account, and clients for both. `account` is None where there are no credentials."""

    region: str
    account: str | None
    session: object = field(repr=False)
    _clients: dict = field(default_factory=dict, repr=False)

    def client(self, service: str, region: str | None = None) -> object:
        """A client that tries again for itself what may pass."""
        from botocore.config import Config

        key = (service, region or self.region)
        if key not in self._clients:
            retries = {"mode": "standard", "total_max_attempts": 5}
            config = Config(retries=retries, connect_timeout=10, read_timeout=60)
            self._clients[key] = self.session.client(service, region_name=key[1], config=config)
        return self._clients[key]

    @property
    def partition(self) -> str:
        return self.session.get_partition_for_region(self.region)

    @property
    def owner(self) -> str:
        """The account's number; in a dry run without credentials zeros, which are nobody's."""
        return self.account or "0" * 12


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn what boto3 raises into an AwsError that says what to do."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as aws

    try:
        yield
    except aws.ClientError as error:
        raise _refusal(doing, error) from None
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.ProfileNotFound, aws.TokenRetrievalError) as error:
        message = f"no AWS credentials ({_line(error)}): run `aws configure` or `aws sso login`, or set AWS_PROFILE"
        raise AwsError(message, "credentials") from None
    except (aws.HTTPClientError, aws.EndpointConnectionError) as error:
        raise AwsError(f"cannot {doing}: AWS cannot be reached ({_line(error)})", "network") from None
    except (aws.BotoCoreError, Boto3Error) as error:
        raise AwsError(f"cannot {doing}: {_line(error)}") from None


def _refusal(doing: str, error: object) -> AwsError:
    """A refusal of AWS, with the next step where it is known."""
    code, said = error.response["Error"].get("Code", ""), _line(error.response["Error"].get("Message", ""))
    if code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "UnrecognizedClientException"):
        then = "the AWS credentials have expired or are not valid; sign in again (`aws sso login`, or new keys)"
    elif code in ("InvalidClientTokenId", "SignatureDoesNotMatch", "InvalidAccessKeyId", "AuthFailure"):
        then = "AWS does not know these credentials; look at AWS_PROFILE and `aws sts get-caller-identity`"
    elif code == "ResourceLimitExceeded":
        then = f"{said}; ask for more (README, 'In the cloud'), or take another --instance-type"
    elif "AccessDenied" in code or code == "403":
        then = f"you may not ({said or code}); the README lists the permissions"
    elif "Throttling" in code:
        then = f"AWS asks for patience ({said}); repeat the command in a minute"
    else:
        then = said or code
    return AwsError(f"cannot {doing}: {then}", code)


def _line(value: object) -> str:
    """Text in one line, without control characters and without anything that looks like a token."""
    line = "".join(c if c.isprintable() else " " for c in str(value))
    return SECRET_VALUE.sub("[redacted]", " ".join(line.split()))


def connect(region: str | None = None, dry_run: bool = False) -> Aws:
    """Find region and account. A dry run may lack both: us-east-1 and no account stand in then."""
    import boto3

    with explained("read the AWS settings"):
        session = boto3.Session(region_name=region)
        region = session.region_name or os.environ.get("AWS_REGION") or ("us-east-1" if dry_run else None)
    if region is None:
        raise ValueError("no AWS region: give --region, or set AWS_DEFAULT_REGION")
    if region not in REGISTRY:
        raise ValueError(f"no images are known for region {region!r}; those with some: {', '.join(sorted(REGISTRY))}")
    aws, account = Aws(region, None, session), None
    try:
        with explained("ask AWS who you are"):
            account = aws.client("sts").get_caller_identity()["Account"]
    except AwsError:
        if not dry_run:
            raise
    return Aws(region, account, session)


# Request bodies


def image_uri(region: str, image: tuple[str, str]) -> str:
    """The address of a (repository, tag) of the AWS deep learning containers in a region."""
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"{REGISTRY[region]}.dkr.ecr.{region}.{domain}/{image[0]}:{image[1]}"


@dataclass(frozen=True)
class TrainingJob:
    """What a training job is made of. Addresses are s3://, times seconds."""

    name: str
    role: str
    image: str
    instance_type: str
    region: str
    source: str
    data: str
    output: str
    checkpoints: str
    max_runtime_s: int
    weights: str | None = None
    spot: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def training_request(job: TrainingJob) -> dict:
    """The body of CreateTrainingJob. Hyperparameters are JSON strings, as the container's toolkit decodes them."""
    entry = {
        "sagemaker_program": "sagemaker_entry.py",
        "sagemaker_submit_directory": job.source,
        "sagemaker_region": job.region,
        "sagemaker_job_name": job.name,
        "sagemaker_container_log_level": 20,
    }
    channels = {"training": job.data} | ({"model": job.weights} if job.weights else {})
    stopping = {"MaxRuntimeInSeconds": job.max_runtime_s}
    if job.spot:
        stopping["MaxWaitTimeInSeconds"] = job.max_runtime_s + SPOT_WAIT_S
    request = {
        "TrainingJobName": job.name,
        "RoleArn": job.role,
        "AlgorithmSpecification": {
            "TrainingImage": job.image,
            "TrainingInputMode": "File",
            "EnableSageMakerMetricsTimeSeries": True,
            "MetricDefinitions": METRICS,
        },
        "HyperParameters": {name: json.dumps(value) for name, value in entry.items()},
        "InputDataConfig": [_channel(name, uri) for name, uri in channels.items()],
        "OutputDataConfig": {"S3OutputPath": job.output, "CompressionType": "GZIP"},
        "ResourceConfig": {"InstanceType": job.instance_type, "InstanceCount": 1, "VolumeSizeInGB": VOLUME_GB},
        "StoppingCondition": stopping,
        "CheckpointConfig": {"S3Uri": job.checkpoints, "LocalPath": "/opt/ml/checkpoints"},
        "Environment": {"TOKENIZERS_PARALLELISM": "false", **job.environment},
        "Tags": _tags(),
    }
    return request | ({"EnableManagedSpotTraining": True} if job.spot else {})


def _channel(name: str, uri: str) -> dict:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "File"}


def _tags(**more: str) -> list[dict]:
    return [{"Key": key.replace("_", "-"), "Value": value} for key, value in ({"project": PREFIX} | more).items()]


def redacted(value: object) -> object:
    """A request without secrets: tokens anywhere, and values whose name says that they are one (an ARN is none)."""
    if isinstance(value, Mapping):
        return {key: _hidden(key, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(part) for part in value]
    return SECRET_VALUE.sub("[redacted]", value) if isinstance(value, str) else value


def _hidden(name: str, value: object) -> object:
    names_a_secret = isinstance(value, str) and SECRET_NAME.search(name) and not value.startswith("arn:")
    # A tag's name is under "Key".
    return "[redacted]" if names_a_secret and name != "Key" else redacted(value)


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


def source_files(root: Path, arguments: dict, quantized: bool) -> dict[str, bytes]:
    """What the source archive holds, flat: our files, the flags, and the pins of requirements.txt that a job needs."""
    files = {Path(name).name: (root / name).read_bytes() for name in SOURCES}
    text = (root / "requirements.txt").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if re.split("==|#", line)[0] not in {*NOT_IN_A_JOB, ""}]
    if quantized:
        pins += re.findall(r"bitsandbytes==\S+", text)
    files["requirements.txt"] = ("\n".join(pins) + "\n").encode()
    files["arguments.json"] = (json.dumps(arguments, indent=1, sort_keys=True) + "\n").encode()
    return files


# Checks before money is spent


class Check(NamedTuple):
    """One line of the table before the start: ok, warning or failed; of what; and what was seen or is to be done."""

    status: str
    subject: str
    detail: str


def check(subject: str, look: Callable[[], str | Check]) -> Check:
    """Run one check. What may not be looked at is a warning, because it may be in order all the same."""
    try:
        found = look()
    except AwsError as error:
        if error.is_denied:
            return Check("warning", subject, f"not checked: {error}")
        return Check("warning" if error.passes else "failed", subject, str(error))
    except ValueError as error:
        return Check("failed", subject, str(error))
    return found if isinstance(found, Check) else Check("ok", subject, found)


def print_checks(checks: Sequence[Check]) -> None:
    width = max(len(one.subject) for one in checks)
    for one in checks:
        print(f"  {one.status:8} {one.subject:{width}}  {one.detail}")


def refuse_failed(checks: Sequence[Check]) -> None:
    """ValueError that names the failed checks."""
    if failed := [one.subject for one in checks if one.status == "failed"]:
        raise ValueError(f"not started, nothing is billed: {', '.join(failed)} failed; see the table above")


def check_identity(aws: Aws) -> Check:
    if aws.account is None:
        where = f"no credentials, so nothing on AWS is checked; region {aws.region}"
        return Check("warning", "identity", where)
    return Check("ok", "identity", f"account {aws.account}, region {aws.region}")


def check_instance(instance_type: str, serving: bool = False) -> Check:
    """Whether AWS has this type for training or serving, and whether it has an NVIDIA GPU, which the images need."""
    import botocore.session

    model = botocore.session.get_session().get_service_model("sagemaker")
    known = model.shape_for("ProductionVariantInstanceType" if serving else "TrainingInstanceType").enum
    with_gpu = [name for name in known if re.match(r"ml\.(g\d|p\d)", name)]
    if instance_type not in known:
        alike = [name for name in with_gpu if name.startswith(instance_type.rpartition(".")[0] + ".")]
        return Check("failed", "instance type", f"no {instance_type}; as {', '.join((alike or with_gpu)[:6])}")
    if instance_type not in with_gpu:
        return Check("failed", "instance type", f"{instance_type} has no NVIDIA GPU; as {INSTANCE}")
    return Check("ok", "instance type", instance_type)


def find_role(aws: Aws, role: str | None) -> tuple[str, Check]:
    """The ARN of the role that the container runs as: the one given (a name or an ARN), or the only one that fits."""
    arn = f"arn:{aws.partition}:iam::{aws.owner}:role/{role or 'SageMakerExecutionRole'}"
    arn = role if role and role.startswith("arn:") else arn
    if aws.account is None:
        return arn, Check("warning", "role", f"not checked: {arn}")
    found = [arn]

    def look() -> str:
        iam = aws.client("iam")
        if role:
            name = role.rpartition("/")[2]
            with explained(f"look at the role {name}"):
                described = iam.get_role(RoleName=name)["Role"]
            if not _trusts_sagemaker(described):
                raise ValueError(
                    f"{name} does not let SageMaker use it: its trust policy needs sagemaker.amazonaws.com"
                )
        else:
            with explained("list the roles (give --role)"):
                pages = iam.get_paginator("list_roles").paginate()
                fit = [one for page in pages for one in page["Roles"] if _trusts_sagemaker(one)]
            if len(fit) != 1:
                names = ", ".join(sorted(one["RoleName"] for one in fit)[:8])
                seen = f"{len(fit)} roles let SageMaker use them ({names}); choose one with --role" if fit else ""
                raise ValueError(seen or "no role lets SageMaker use it; the README says how to make one")
            described = fit[0]
        found[0] = described["Arn"]
        return f"{described['Arn']}, trusts SageMaker"

    result = check("role", look)
    if result.status == "warning" and not (role and role.startswith("arn:")):  # a path may belong to the ARN
        result = Check("failed", "role", f"give --role as an ARN: {result.detail}")
    return found[0], result


def _trusts_sagemaker(role: dict) -> bool:
    """Whether SageMaker may run a container as this role; not the roles that AWS keeps for its own services."""
    if role["Path"].startswith("/aws-service-role/"):
        return False
    statements = role.get("AssumeRolePolicyDocument", {}).get("Statement", [])
    for statement in [statements] if isinstance(statements, dict) else statements:
        principal = statement.get("Principal", {})
        services = principal.get("Service", []) if isinstance(principal, dict) else []
        services = [services] if isinstance(services, str) else services
        if statement.get("Effect") == "Allow" and any(name.startswith("sagemaker.") for name in services):
            return True
    return False


def bucket_name(aws: Aws, bucket: str | None) -> str:
    """The bucket given, or the one that SageMaker's own tools use by default."""
    return (bucket or f"sagemaker-{aws.region}-{aws.owner}").removeprefix("s3://").rstrip("/")


def check_bucket(aws: Aws, bucket: str, is_default: bool) -> Check:
    """Whether the bucket is there, this account's, and in this region."""
    if aws.account is None:
        return Check("warning", "bucket", f"not checked: {bucket}")

    def look() -> str | Check:
        try:
            with explained(f"see the bucket {bucket} (it may be somebody else's)"):
                seen = aws.client("s3").head_bucket(Bucket=bucket, ExpectedBucketOwner=aws.account)
        except AwsError as error:
            if not error.is_gone:
                raise
            if is_default:
                return Check("warning", "bucket", f"{bucket} is not there yet and will be made")
            raise ValueError(f"no bucket {bucket}: aws s3 mb s3://{bucket} --region {aws.region}") from None
        where = seen.get("BucketRegion") or seen["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        if where and where != aws.region:
            raise ValueError(f"{bucket} is in {where}, the job in {aws.region}; another --bucket or --region")
        if "sagemaker" not in bucket.lower():
            return Check(
                "warning", "bucket", f"{bucket}: AmazonSageMakerFullAccess opens only buckets with 'sagemaker' in the "
                "name; see that the role may read and write it"
            )  # fmt: skip
        return bucket

    return check("bucket", look)


def check_quota(aws: Aws, instance_type: str, use: str) -> Check:
    """Whether the account may run one more of these. `use` is "training job", "spot training job" or "endpoint"."""
    name = f"{instance_type} for {use} usage"
    if aws.account is None:
        return Check("warning", "quota", f"not checked: '{name}'")

    def look() -> str | Check:
        quota = _quota(aws, name)
        if quota is None:
            return Check("warning", "quota", f"AWS lists no '{name}', so nobody knows before the start")
        allowed, used = int(quota["Value"]), 0
        if allowed and use != "endpoint":
            used = _running(aws, instance_type, use.startswith("spot"))
        if allowed > used:
            return f"{allowed} {name}, {used} in use" if use != "endpoint" else f"{allowed} {name}"
        ask = f"aws service-quotas request-service-quota-increase --service-code sagemaker --region {aws.region} "
        ask += f"--quota-code {quota['QuotaCode']} --desired-value {used + 1}"
        raise ValueError(f"'{name}' is {allowed}, {used} in use; ask for more (it takes up to a day): {ask}")

    return check("quota", look)


def _quota(aws: Aws, name: str) -> dict | None:
    """The quota of this name: the account's own where it was ever changed, else AWS's default."""
    client = aws.client("service-quotas")
    for operation in ("list_service_quotas", "list_aws_default_service_quotas"):
        with explained("read the quotas"):
            for page in client.get_paginator(operation).paginate(ServiceCode="sagemaker"):
                if found := [one for one in page["Quotas"] if one["QuotaName"] == name]:
                    return found[0]
    return None


def _running(aws: Aws, instance_type: str, spot: bool) -> int:
    """How many training jobs run on this type now."""
    client = aws.client("sagemaker")
    with explained("list the training jobs"):
        jobs = client.list_training_jobs(StatusEquals="InProgress", MaxResults=50)["TrainingJobSummaries"]
        described = [client.describe_training_job(TrainingJobName=job["TrainingJobName"]) for job in jobs]
    return sum(
        one["ResourceConfig"].get("InstanceType") == instance_type
        and one.get("EnableManagedSpotTraining", False) == spot
        for one in described
    )


def check_hub(model: str, has_token: bool) -> Check:
    """Whether a container may fetch a model of the Hub by itself, with a token or without."""
    from huggingface_hub import errors, model_info

    try:
        found = model_info(model, timeout=10)
        closed = bool(found.gated or found.private)
    except errors.GatedRepoError:
        closed = True
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return Check("failed", "weights", f"no model {model} on the Hub that you can see; check the name, or log in")
    except (errors.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        return Check("warning", "weights", f"the Hub cannot be asked whether {model} is gated ({_line(error)})")
    if closed and not has_token:
        ways = "stage its weights with --weights upload, or name a secret with a token with --hf-token-secret"
        return Check("failed", "weights", f"{model} is gated or private: {ways}")
    return Check(
        "ok", "weights", f"the container fetches {model} from the Hub" + (" with your token" if closed else "")
    )


def check_staged(aws: Aws, uri: str) -> Check:
    """Whether weights lie below an address in S3."""
    if aws.account is None:
        return Check("warning", "weights", f"not checked: {uri}")

    def look() -> str:
        if is_empty(aws, uri):
            raise ValueError(f"nothing is in {uri}; --weights upload puts the weights there")
        return f"staged in {uri}"

    return check("weights", look)


def check_token(aws: Aws, args: argparse.Namespace) -> list[Check]:
    """Whether the secret that holds a token is there; its value is not read."""
    if args.unsafe_pass_hf_token_in_env:
        return [
            Check("warning", "token", "HF_TOKEN goes into the job as plain text; --hf-token-secret does not show it")
        ]
    if not args.hf_token_secret:
        return []
    if aws.account is None:
        return [Check("warning", "token", f"not checked: {args.hf_token_secret}")]

    def look() -> str:
        with explained(f"find the secret {args.hf_token_secret}"):
            region = args.hf_token_secret.split(":")[3]
            aws.client("secretsmanager", region).describe_secret(SecretId=args.hf_token_secret)
        return "the container reads the secret; the role needs secretsmanager:GetSecretValue on it"

    return [check("token", look)]


def token_environment(args: argparse.Namespace) -> dict[str, str]:
    """What a job's environment says of a Hugging Face token: where it is, or (unsafe, asked for) what it is."""
    if args.hf_token_secret:
        return {"HF_TOKEN_SECRET_ARN": args.hf_token_secret}
    if not args.unsafe_pass_hf_token_in_env:
        return {}
    from huggingface_hub import get_token

    if not (token := get_token()):
        raise ValueError("--unsafe-pass-hf-token-in-env: there is no token; set HF_TOKEN or run `hf auth login`")
    return {"HF_TOKEN": token}


def check_image(aws: Aws, uri: str) -> Check:
    """Whether the image is in its registry."""
    if aws.account is None:
        return Check("warning", "image", f"not checked: {uri}")
    parts = re.fullmatch(r"(\d{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/([^:@]+):([\w.-]+)", uri)
    if not parts:
        return Check("failed", "image", f"{uri} is not ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG")
    account, region, repository, tag = parts.groups()
    if region != aws.region:
        return Check("failed", "image", f"{uri} is in {region}, the job in {aws.region}")

    def look() -> str:
        with explained(f"find the image {repository}:{tag} (--image names another)"):
            asked = {"registryId": account, "repositoryName": repository, "imageIds": [{"imageTag": tag}]}
            aws.client("ecr").describe_images(**asked)
        return f"{repository}:{tag}"

    return check("image", look)


# Costs


def price(aws: Aws, instance_type: str, use: str) -> tuple[float | None, str]:
    """USD an hour of a type for "Training" or "Hosting", None if nobody knows; and where the number is from."""
    if aws.account is not None:
        wanted = {"regionCode": aws.region, "instanceName": instance_type, "platoinstancetype": use}
        filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
        try:
            with explained("ask for the price"):
                client = aws.client("pricing", "us-east-1")  # the price list of all regions is there
                found = client.get_products(ServiceCode="AmazonSageMaker", Filters=filters)["PriceList"]
            prices = [
                float(dimension["pricePerUnit"]["USD"])
                for product in map(json.loads, found)
                for term in product["terms"]["OnDemand"].values()
                for dimension in term["priceDimensions"].values()
            ]
            if prices and max(prices) > 0:
                return max(prices), f"the AWS price list, {aws.region}"
        except (AwsError, KeyError, TypeError, ValueError):
            pass  # the table below, or none; either is said
    known = PRICES.get(instance_type) if aws.region == "us-east-1" else None
    return known, "a table of November 2026 for us-east-1" if known else "not known here; see the AWS price list"


def cost(usd_per_hour: float | None, seconds: float) -> str:
    return "an unknown sum" if usd_per_hour is None else f"${usd_per_hour * seconds / 3600:.2f}"


def check_cost(aws: Aws, instance_type: str, max_runtime_s: int, spot: bool) -> Check:
    """The most that a training job can cost; storage and transfer are cents beside it."""
    hourly, source = price(aws, instance_type, "Training")
    each = "?" if hourly is None else f"${hourly:.2f}"
    most = f"at most {cost(hourly, max_runtime_s)} = {each} an hour x {max_runtime_s / 3600:g} h ({source})"
    most += "; a spot job usually costs less than half of it" if spot else ""
    return Check("warning" if hourly is None else "ok", "cost", most)


def seconds(text: str) -> int:
    """A duration: seconds as 7200, or 90m, 2h, 1.5h. For argparse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    value = round(float(found[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[found[2]]) if found else 0
    if not 60 <= value <= 28 * 86400:
        raise ValueError  # argparse has words for it
    return value


def confirm(question: str) -> None:
    """Ask before money is spent; ValueError for anything but yes, and where nobody can be asked."""
    if not sys.stdin or not sys.stdin.isatty():
        raise ValueError("nothing is started without a yes: add --yes, or --dry-run to look only")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("not started, nothing is billed")


# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of training on SageMaker."""
    add = parser.add_argument_group("on Amazon SageMaker").add_argument
    add("--sagemaker", action="store_true", help="train there; the adapter comes back to --output-dir")
    add("--attach", metavar="JOB", help="follow a job that runs, or ran, and fetch its adapter")
    add("--stop", metavar="JOB", help="end a job; its checkpoint stays")
    add("--instance-type", default=INSTANCE, metavar="TYPE", help=f"the machine (default: {INSTANCE})")
    add("--spot", action="store_true", help="spare capacity: cheaper, may be interrupted, goes on by itself")
    most = "end the job after this, as 90m, 2h or 7200 (default: 2h)"
    add("--max-runtime", type=seconds, default=7200, metavar="TIME", help=most)
    add("--weights", default="auto", metavar="WHERE", help=WEIGHTS_HELP)
    add("--hf-token-secret", metavar="ARN", help="a secret in Secrets Manager that holds a Hugging Face token")
    unsafe = "send your HF_TOKEN as plain text, which everybody who may look at the job can read"
    add("--unsafe-pass-hf-token-in-env", action="store_true", help=unsafe)
    add("--detach", action="store_true", help="start the job and do not wait for it")
    add_account_arguments(add)


def add_account_arguments(add: Callable) -> None:
    """The flags that training and deploying share."""
    add("--role", help="the IAM role, a name or ARN, that the container runs as (default: the only one that fits)")
    add("--bucket", metavar="NAME", help="for data and results (default: sagemaker-REGION-ACCOUNT)")
    add("--region", metavar="NAME", help="default: that of your AWS settings")
    add("--image", metavar="URI", help="another container image (default: AWS's own, for the region)")
    add("--dry-run", action="store_true", help="check and print what would be sent; starts and bills nothing")
    add("--yes", action="store_true", help="do not ask before money is spent")
    add("--poll-seconds", type=float, default=POLL_S, metavar="S", help=f"between two looks (default: {POLL_S:g})")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse cloud flags without --sagemaker, and what cannot be meant together."""
    ways = [name for name in ("sagemaker", "attach", "stop") if getattr(args, name)]
    if len(ways) > 1:
        parser.error("--sagemaker, --attach and --stop are three things to do; give one of them")
    only = {"spot": False, "max_runtime": 7200, "weights": "auto", "hf_token_secret": None, "detach": False}
    only |= {"unsafe_pass_hf_token_in_env": False, "instance_type": INSTANCE, "role": None, "bucket": None}
    only |= {"image": None, "dry_run": False, "yes": False}
    either = {"region": None, "poll_seconds": POLL_S}
    for name, default in {**({} if args.sagemaker else only), **({} if ways else either)}.items():
        if getattr(args, name) != default:
            parser.error(f"--{name.replace('_', '-')} needs --sagemaker")
    if not 0 < args.poll_seconds <= 600:
        parser.error(f"--poll-seconds {args.poll_seconds:g}: above 0, 600 at most")
    if not re.fullmatch(r"auto|upload|s3://.+", args.weights):
        parser.error(f"--weights {args.weights}: auto, upload, or an s3:// address")
    arn = r"arn:aws[a-z-]*:secretsmanager:[a-z0-9-]+:\d{12}:secret:[\w/+=.@-]{1,400}"
    if args.hf_token_secret and not re.fullmatch(arn, args.hf_token_secret):
        parser.error("--hf-token-secret: the ARN of a secret, as arn:aws:secretsmanager:REGION:ACCOUNT:secret:NAME")
    if args.hf_token_secret and args.unsafe_pass_hf_token_in_env:
        parser.error("--hf-token-secret makes --unsafe-pass-hf-token-in-env needless; leave it out")


# S3


def split(uri: str) -> tuple[str, str]:
    """(bucket, key) of an s3:// address."""
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.*)", uri)
    if not found:
        raise ValueError(f"{uri!r} is not an S3 address; s3://BUCKET/PREFIX")
    return found[1], found[2]


def make_bucket(aws: Aws, bucket: str) -> None:
    """Make the default bucket where it is not there, closed to the public as new buckets are."""
    client = aws.client("s3")
    try:
        with explained(f"see the bucket {bucket}"):
            client.head_bucket(Bucket=bucket, ExpectedBucketOwner=aws.account)
    except AwsError as error:
        if not error.is_gone:
            raise
        place = {"CreateBucketConfiguration": {"LocationConstraint": aws.region}}
        with explained(f"make the bucket {bucket}"):
            client.create_bucket(Bucket=bucket, **({} if aws.region == "us-east-1" else place))


def is_there(aws: Aws, uri: str, size: int) -> bool:
    """Whether an object of this size lies at an address that names its content."""
    bucket, key = split(uri)
    try:
        with explained(f"look at {uri}"):
            found = aws.client("s3").head_object(Bucket=bucket, Key=key, ExpectedBucketOwner=aws.account)
    except AwsError as error:
        if error.is_gone or error.is_denied:  # who may not list a bucket is denied what is not there
            return False
        raise
    return found["ContentLength"] == size


def upload(aws: Aws, uri: str, content: bytes) -> None:
    """Put bytes to an address that names its content, unless they are there."""
    if not is_there(aws, uri, len(content)):
        bucket, key = split(uri)
        with explained(f"upload {uri}"):
            aws.client("s3").put_object(Bucket=bucket, Key=key, Body=content, ExpectedBucketOwner=aws.account)


def upload_folder(aws: Aws, uri: str, files: Mapping[str, Path]) -> None:
    """Upload the files that are not there yet below an address, by relative name; says so, for weights take a while."""
    missing = {one: path for one, path in files.items() if not is_there(aws, uri + one, path.stat().st_size)}
    if missing:
        total = sum(path.stat().st_size for path in missing.values())
        print(f"uploading {total / 1e6:,.0f} MB of weights to {uri}", flush=True)
    for one, path in sorted(missing.items()):
        bucket, key = split(uri + one)
        with explained(f"upload {uri}{one}"):
            extra = {"ExpectedBucketOwner": aws.account}
            aws.client("s3").upload_file(str(path), bucket, key, ExtraArgs=extra)


def staged_name(name: str, identity: str) -> str:
    """The folder in S3 of a model's weights; another for other weights of the same name."""
    return f"{re.sub('[^A-Za-z0-9.-]+', '-', name.rpartition('/')[2])}-{short_hash(identity.encode())}"


def staged_files(name: str, folder: Path, identity: str) -> tuple[dict[str, Path], str]:
    """The files of a model by relative name, laid out as the loader finds them again, and the subfolder of the weights.

    A model of the Hub (`identity` is its name@commit) has the layout of the Hub's cache, any other that of a folder.
    """
    files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in STAGED and path.is_file()}
    if identity == f"{name}@{folder.name}":
        top = f"models--{name.replace('/', '--')}"
        subfolder = f"{top}/snapshots/{folder.name}"
        reference = {f"{top}/refs/main": folder.parent.parent / "refs" / "main"}
    else:
        subfolder, reference = folder.resolve().name, {}
    return {**reference, **{f"{subfolder}/{one}": path for one, path in files.items()}}, subfolder


def is_empty(aws: Aws, uri: str) -> bool:
    """Whether nothing lies below an address."""
    bucket, key = split(uri)
    with explained(f"look at {uri}"):
        found = aws.client("s3").list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1, ExpectedBucketOwner=aws.account)
    return not found.get("KeyCount")


def last_folder(aws: Aws, uri: str) -> str | None:
    """The last, by name, of the folders below an address; our names begin with the time."""
    bucket, key = split(uri)
    asked = {"Bucket": bucket, "Prefix": key.rstrip("/") + "/", "Delimiter": "/"}
    try:
        with explained(f"look at {uri}"):
            pages = aws.client("s3").get_paginator("list_objects_v2").paginate(**asked)
            names = [one["Prefix"] for page in pages for one in page.get("CommonPrefixes", [])]
    except AwsError as error:
        if not error.is_gone:  # the bucket
            raise
        return None
    return f"s3://{bucket}/{max(names)}" if names else None


def read(aws: Aws, uri: str) -> bytes:
    bucket, key = split(uri)
    with explained(f"read {uri}"):
        return aws.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()


# A training job


def job_name() -> str:
    """A name that no other job has, and that sorts by time."""
    now = time.time()
    return f"{PREFIX}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{int(now * 1e6) % 0x10000:04x}"


@dataclass(frozen=True)
class Weights:
    """Where a job's weights come from: nowhere (`uri` None, the container fetches them), or a prefix in S3.

    `files` are to be uploaded below it, by relative name; empty where they are there already.
    """

    uri: str | None
    files: Mapping[str, Path]
    check: Check


def home(aws: Aws, args: argparse.Namespace) -> str:
    """Where all of ours lies."""
    return f"s3://{bucket_name(aws, args.bucket)}/{PREFIX}"


def launch(
    aws: Aws,
    args: argparse.Namespace,
    files: Mapping[str, bytes],
    data: Mapping[str, bytes],
    weights: Weights,
    rows: Check,
) -> str | None:
    """Check, ask, upload and start a training job; its name. None after a dry run.

    `files` are the source archive's, `data` those of the channel `training`; `rows` is what was seen of the data.
    """
    packed = archive(files)
    job, checks = plan(aws, args, packed, data, weights, rows)
    print_checks(checks)
    if args.dry_run:
        print(json.dumps(redacted(training_request(job)), indent=1))
        return None
    refuse_failed(checks)
    if not args.yes:
        confirm(f"start {job.name} on {job.instance_type}, {checks[-1].detail}?")
    if args.bucket is None:
        make_bucket(aws, bucket_name(aws, None))
    for one, content in data.items():
        upload(aws, f"{job.data}{one}", content)
    if weights.files:
        upload_folder(aws, weights.uri, weights.files)
    upload(aws, job.source, packed)
    start(aws, job)
    return job.name


def plan(
    aws: Aws, args: argparse.Namespace, packed: bytes, data: Mapping[str, bytes], weights: Weights, rows: Check
) -> tuple[TrainingJob, list[Check]]:
    """The job that the flags describe, and everything that can be checked before it is billed; the last is its cost."""
    name, at = job_name(), home(aws, args)
    role, role_check = find_role(aws, args.role)
    image = args.image or image_uri(aws.region, TRAINING_IMAGE)
    source, rows_hash = short_hash(packed), short_hash(*(data[one] for one in sorted(data)))
    # By what is trained, then by job: --resume finds an earlier job's.
    alike = f"{at}/checkpoints/{short_hash(source.encode(), rows_hash.encode(), str(weights.uri).encode())}"
    is_resumed = args.resume and aws.account
    job = TrainingJob(
        name=name,
        role=role,
        image=image,
        instance_type=args.instance_type,
        region=aws.region,
        source=f"{at}/source/{source}/sourcedir.tar.gz",
        data=f"{at}/data/{rows_hash}/",
        output=f"{at}/output",
        checkpoints=earlier_checkpoints(aws, alike) if is_resumed else f"{alike}/{name}",
        max_runtime_s=args.max_runtime,
        weights=weights.uri,
        spot=args.spot,
        environment=token_environment(args),
    )
    return job, [
        check_identity(aws),
        role_check,
        check_bucket(aws, bucket_name(aws, args.bucket), args.bucket is None),
        check_instance(args.instance_type),
        check_quota(aws, args.instance_type, "spot training job" if args.spot else "training job"),
        check_image(aws, image),
        weights.check,
        *check_token(aws, args),
        rows,
        check_cost(aws, args.instance_type, args.max_runtime, args.spot),
    ]


def start(aws: Aws, job: TrainingJob) -> None:
    """Start a job; where nobody can say whether it started, say how to end it."""
    print(f"starting {job.name}", flush=True)
    end = f"if it started all the same, --stop {job.name} ends it"
    try:
        with explained(f"start the training job {job.name}"):
            aws.client("sagemaker").create_training_job(**training_request(job))
    except AwsError as error:
        if error.passes:
            raise ValueError(f"{error}; {end}") from None
        if error.code != "ResourceInUse":  # nobody else has this name: the answer to an earlier try was lost
            raise
    except KeyboardInterrupt:
        print(f"\nstopped while {job.name} was being started; {end}", file=sys.stderr)
        sys.exit(130)


def earlier_checkpoints(aws: Aws, alike: str) -> str:
    """Where the last job of these rows and flags left its checkpoint; ValueError if there is none or it still runs.

    Two jobs that write into one folder would bill twice and mix their files.
    """
    found = last_folder(aws, alike)
    if not found:
        raise ValueError(f"no checkpoint of a job with these rows and flags is in {alike}; leave out --resume")
    found, client = found.rstrip("/"), aws.client("sagemaker")
    with explained("see whether an earlier job still runs"):
        for status in ("InProgress", "Stopping"):
            listed = client.list_training_jobs(StatusEquals=status, NameContains=PREFIX, MaxResults=100)
            for one in listed["TrainingJobSummaries"]:
                running = client.describe_training_job(TrainingJobName=one["TrainingJobName"])
                if running.get("CheckpointConfig", {}).get("S3Uri") == found:
                    raise ValueError(f"{one['TrainingJobName']} still runs: --attach it, or --stop it first")
    return found


def describe(aws: Aws, name: str) -> dict:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a training job: letters, digits and inner hyphens, 63 at most")
    try:
        with explained(f"look at the training job {name}"):
            return aws.client("sagemaker").describe_training_job(TrainingJobName=name)
    except AwsError as error:
        if error.is_gone:
            raise ValueError(f"there is no training job {name} in {aws.region}; --region names another") from None
        raise


def stop(aws: Aws, name: str) -> None:
    """Ask a training job to stop; one that has ended already is left as it is."""
    if describe(aws, name)["TrainingJobStatus"] == "InProgress":
        with explained(f"stop the training job {name}"):
            aws.client("sagemaker").stop_training_job(TrainingJobName=name)


def follow(aws: Aws, name: str, poll_s: float = POLL_S) -> dict:
    """Print every change of status and every log line until the job ends; its description.

    A failure that may pass is waited out. An AwsError leaves the job as it is, which the caller must say.
    """
    shown, tokens, failures = 0, {}, 0
    while True:
        try:
            description = describe(aws, name)
            failures = 0
        except AwsError as error:
            failures += 1
            if not error.passes or failures > 30:
                raise
            print(f"note: {error}; still trying", file=sys.stderr)
            time.sleep(poll_s)
            continue
        changes = description.get("SecondaryStatusTransitions", [])
        for change in changes[shown:]:
            print(f"{change['Status']}: {_line(change.get('StatusMessage', ''))}".rstrip(": "), flush=True)
        shown = max(shown, len(changes))
        ended = description["TrainingJobStatus"] not in ("InProgress", "Stopping")
        print_logs(aws, name, tokens)
        if ended:
            time.sleep(min(poll_s, 2.0))  # the last lines arrive a little after the end
            print_logs(aws, name, tokens)
            return description
        time.sleep(poll_s)


def print_logs(aws: Aws, name: str, tokens: dict[str, str]) -> None:
    """Print the log lines that are new since `tokens`. A log that is not there, or may not be read, is no error."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = aws.client("logs")
    try:
        asked = {"logGroupName": LOG_GROUP, "logStreamNamePrefix": f"{name}/"}
        pages = client.get_paginator("describe_log_streams").paginate(**asked)
        for stream in sorted(one["logStreamName"] for page in pages for one in page["logStreams"]):
            while True:
                at = {"nextToken": tokens[stream]} if stream in tokens else {}
                asked = {"logGroupName": LOG_GROUP, "logStreamName": stream, "startFromHead": True}
                page = client.get_log_events(**asked, **at)
                for event in page["events"]:
                    print(f"  | {_log_line(event['message'])}".rstrip(), flush=True)
                if tokens.get(stream) == page["nextForwardToken"]:
                    break
                tokens[stream] = page["nextForwardToken"]
    except (ClientError, BotoCoreError) as error:
        if "denied" not in tokens and "AccessDenied" in str(error):
            tokens["denied"] = ""
            print(f"note: the log may not be read ({_line(error)}); the status still is", file=sys.stderr)


def _log_line(message: str) -> str:
    """A log line as it was laid out, without control characters and tokens."""
    return SECRET_VALUE.sub("[redacted]", "".join(c if c.isprintable() else " " for c in message))


# Words in a FailureReason or status, and what to do about it.
ADVICE = (
    (r"CapacityError|InsufficientInstanceCapacity|Unable to provision", "AWS has none free: try later, another "
     "--instance-type or --region, or leave out --spot"),
    (r"[Gg]ated|401 Client|403 Client|awaiting a review", "the model wants its licence accepted and a token: stage the "
     "weights with --weights upload, or name a secret with --hf-token-secret"),
    (r"OutOfMemory|out of memory|SIGKILL|exit code: 137", "a smaller --micro-batch-size, --gradient-checkpointing, "
     "--load-in-4bit, or a larger --instance-type"),
    (r"No space left", "the disk is full; a larger --instance-type has a larger one"),
    (r"AccessDenied|not authorized|403 Forbidden", "the role may not do that; the README lists what it needs"),
    (r"Could not find a version|No matching distribution", "the container could not install requirements.txt; does "
     "the network of the job reach PyPI?"),
)  # fmt: skip


def ended_badly(aws: Aws, description: dict) -> str | None:
    """What to tell about a job that did not complete, with the next step; None for one that did."""
    name, status = description["TrainingJobName"], description["TrainingJobStatus"]
    if status == "Completed":
        return None
    reason = _line(description.get("FailureReason", "")).rstrip(".") or description.get("SecondaryStatus", "")
    if status == "Stopped":
        over = {
            "MaxRuntimeExceeded": "it reached --max-runtime",
            "MaxWaitTimeExceeded": "no spot capacity came in time; repeat it later or without --spot",
        }
        why = over.get(description.get("SecondaryStatus", ""), "it was stopped")
        then = "the command that started it goes on from its checkpoint with --resume (and without --overwrite)"
        return f"the training job {name} is not finished: {why}; {then}"
    advice = next((then for pattern, then in ADVICE if re.search(pattern, reason)), "")
    log = f"log: aws logs tail {LOG_GROUP} --log-stream-name-prefix {name}/ --since 1d --region {aws.region}"
    return "; ".join(part for part in (f"the training job {name} failed: {reason}", advice, log) if part)


def billed(aws: Aws, description: dict) -> str:
    """What a training job has cost, from its billable seconds and the price."""
    billable, trained = description.get("BillableTimeInSeconds"), description.get("TrainingTimeInSeconds")
    if billable is None:
        return "nothing was billed" if "TrainingStartTime" not in description else "no billable time is known yet"
    instance_type = description["ResourceConfig"]["InstanceType"]
    hourly, source = price(aws, instance_type, "Training")
    line = f"billed {billable:,} s of {instance_type}: about {cost(hourly, billable)} ({source})"
    if description.get("EnableManagedSpotTraining") and trained:
        line += f", {1 - billable / trained:.0%} saved by spot"
    return line


def download(aws: Aws, description: dict, folder: Path, needed: Sequence[str]) -> Path:
    """Fetch a completed job's model.tar.gz and unpack it beside `folder`; the new folder, with all that is `needed`.

    Raises ValueError for a job that completed without them, which a full disk can bring about.
    """
    name, uri = description["TrainingJobName"], description["ModelArtifacts"]["S3ModelArtifacts"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, packed = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.tar.gz")
    shutil.rmtree(part, ignore_errors=True)
    bucket, key = split(uri)
    try:
        with explained(f"download {uri}"):
            aws.client("s3").download_file(bucket, key, str(packed))
        with tarfile.open(packed, "r:gz") as tar:
            tar.extractall(part, filter="data")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{uri} is broken: {_line(error)}; repeat with --attach {name}") from None
    finally:
        packed.unlink(missing_ok=True)
    if absent := [one for one in needed if not (part / one).is_file()]:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(
            f"the training job {name} completed without {absent[0]}, so there is no adapter in {uri}; "
            f"read its log: aws logs tail {LOG_GROUP} --log-stream-name-prefix {name}/ --region {aws.region}"
        )
    return part


# Endpoints

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's values of max_lora_rank
VARIANT = "AllTraffic"
COMPONENT_LOGS = "/aws/sagemaker/InferenceComponents"
START_S = {"ModelDataDownloadTimeoutInSeconds": 1200, "ContainerStartupHealthCheckTimeoutInSeconds": 1200}
KEYS = {"model": "ModelName", "endpoint_config": "EndpointConfigName", "endpoint": "EndpointName"}
KEYS |= {"inference_component": "InferenceComponentName"}
STATUS = {"endpoint": "EndpointStatus", "inference_component": "InferenceComponentStatus"}
PENDING = ("Creating", "Updating", "SystemUpdating", "RollingBack")
BUSY = re.compile(r"in-progress|in progress|inference component associated", re.I)

# Words in a FailureReason of an endpoint or a component, and what to do about it.
SERVING_ADVICE = (
    (r"lora.?rank", "delete the endpoint and deploy it with a larger --max-rank, or train with a smaller --rank"),
    (r"OutOfMemory|out of memory|KV cache|SIGKILL", "a smaller --max-length, or a larger --instance-type"),
    (r"max_model_len|max_position_embeddings", "a smaller --max-length"),
    (r"gated|401 Client|403 Client|awaiting a review", "--weights upload stages the weights in S3, without a token"),
    (r"Capacity|Unable to provision", "AWS has none free: try later, or another --instance-type or --region"),
    (r"AccessDenied|not authorized|Access Denied", "the role may not do that; the README lists what it needs"),
)  # fmt: skip


@dataclass(frozen=True)
class Serving:
    """What an endpoint is made of. Without a `source` (an s3:// folder) the container fetches `base_model`."""

    endpoint: str
    role: str
    image: str
    instance_type: str
    base_model: str
    base_weights: str  # their identity, as model_files.locate tells it
    source: str | None
    max_rank: int
    max_length: int


def model_request(serving: Serving) -> dict:
    """The body of CreateModel: LMI with vLLM, adapters on, and log-probabilities as the model gives them."""
    environment = {
        "HF_MODEL_ID": "/opt/ml/model" if serving.source else serving.base_model,
        "SERVING_FAIL_FAST": "true",
        "OPTION_ASYNC_MODE": "true",
        "OPTION_ROLLING_BATCH": "disable",
        "OPTION_ENTRYPOINT": "djl_python.lmi_vllm.vllm_async_service",
        "OPTION_TENSOR_PARALLEL_DEGREE": "1",
        "OPTION_DTYPE": "bf16",
        "OPTION_MAX_MODEL_LEN": str(serving.max_length),
        "OPTION_ENABLE_LORA": "true",
        "OPTION_MAX_LORAS": "4",  # in one batch
        "OPTION_MAX_CPU_LORAS": "32",
        "OPTION_MAX_LORA_RANK": str(serving.max_rank),
        "OPTION_MAX_LOGPROBS": "128",
        "OPTION_LOGPROBS_MODE": "raw_logprobs",
    }
    container = {"Image": serving.image, "Environment": environment}
    if serving.source:
        source = {"S3Uri": serving.source, "S3DataType": "S3Prefix", "CompressionType": "None"}
        container["ModelDataSource"] = {"S3DataSource": source}
    elif revision := serving.base_weights.partition("@")[2]:
        environment["OPTION_REVISION"] = revision
    body = {"ExecutionRoleArn": serving.role, "PrimaryContainer": container}
    # A tag takes not every character that a folder's name may have.
    named = serving.base_model if re.fullmatch(r"[\w .:/=+@-]{1,256}", serving.base_model) else ""
    body["Tags"] = _tags(base_model=named, base_weights=serving.base_weights)
    return {"ModelName": _hashed_name(serving.endpoint, "model", body), **body}


def endpoint_config_request(serving: Serving) -> dict:
    """The body of CreateEndpointConfig. The variant has no model, so the role is required here."""
    variant = {
        "VariantName": VARIANT,
        "InstanceType": serving.instance_type,
        "InitialInstanceCount": 1,
        "InferenceAmiVersion": ami(serving.image),
        **START_S,
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
        "ManagedInstanceScaling": {"Status": "ENABLED", "MinInstanceCount": 1, "MaxInstanceCount": 1},
    }
    body = {"ExecutionRoleArn": serving.role, "ProductionVariants": [variant], "Tags": _tags()}
    return {"EndpointConfigName": _hashed_name(serving.endpoint, "config", body), **body}


def endpoint_request(serving: Serving) -> dict:
    name = endpoint_config_request(serving)["EndpointConfigName"]
    return {"EndpointName": serving.endpoint, "EndpointConfigName": name, "Tags": _tags()}


def base_component_request(serving: Serving) -> dict:
    """The body of CreateInferenceComponent for the base model, on one GPU."""
    specification = {
        "ModelName": model_request(serving)["ModelName"],
        "StartupParameters": START_S,
        "ComputeResourceRequirements": {"NumberOfAcceleratorDevicesRequired": 1, "MinMemoryRequiredInMb": 4096},
    }
    return {
        "InferenceComponentName": component_name(serving.endpoint),
        "EndpointName": serving.endpoint,
        "VariantName": VARIANT,
        "Specification": specification,
        "RuntimeConfig": {"CopyCount": 1},
        "Tags": _tags(),
    }


def adapter_component_request(endpoint: str, adapter: str, artifact: str) -> dict:
    """The body of CreateInferenceComponent for an adapter, which runs wherever its base does."""
    return {"EndpointName": endpoint, **adapter_update_request(endpoint, adapter, artifact), "Tags": _tags()}


def adapter_update_request(endpoint: str, adapter: str, artifact: str) -> dict:
    """The body of UpdateInferenceComponent that swaps an adapter in place."""
    specification = {"BaseInferenceComponentName": component_name(endpoint), "Container": {"ArtifactUrl": artifact}}
    return {"InferenceComponentName": component_name(endpoint, adapter), "Specification": specification}


def ami(image: str) -> str:
    """The machine image whose driver fits the CUDA of a container; a wrong one hangs in Creating, without any log."""
    cuda = re.search(r"[-_.]cu(\d{3})\b", image.rpartition(":")[2])
    version = cuda[1] if cuda else ""
    if version.startswith("12"):
        return "al2-ami-sagemaker-inference-gpu-3-1"
    if version == "130":
        return "al2023-ami-sagemaker-inference-gpu-4-1"
    raise ValueError(f"{image}: its tag names no CUDA version that is known here (cu12x or cu130), so no AMI is known")


def component_name(endpoint: str, adapter: str | None = None) -> str:
    """The inference component of an endpoint's base model, or of one of its adapters."""
    if adapter is None:
        return aws_name(f"{endpoint}-base")
    return aws_name(f"{endpoint}-adapter-{aws_name(adapter)}")


def endpoint_name(name: str) -> str:
    """The name, if it leaves room for those that are made of it; ValueError if not."""
    if not NAME.fullmatch(name) or len(name) > 39:
        raise ValueError(f"{name!r} is no name for an endpoint: letters, digits and inner hyphens, 39 at most")
    return name


def aws_name(name: str) -> str:
    """The name, if AWS takes it; ValueError if not."""
    if not NAME.fullmatch(name) or len(name) > 63:
        raise ValueError(f"{name!r} is no name on AWS: letters, digits and inner hyphens, 63 at most")
    return name


def _hashed_name(endpoint: str, kind: str, body: dict) -> str:
    """A name for what does not change: another body has another name, the same body the same."""
    return aws_name(f"{endpoint}-{kind}-{short_hash(json.dumps(body, sort_keys=True).encode())}")


def is_ours(endpoint: str, name: str, kind: str = "config") -> bool:
    """Whether a model or configuration was made here for this endpoint (and not for one with a longer name)."""
    return bool(re.fullmatch(rf"{re.escape(endpoint)}-{kind}-[0-9a-f]{{16}}", name))


# Adapters


def lora_rank(config: Mapping) -> int:
    """The largest rank in an adapter_config.json."""
    return max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])


def served_rank(rank: int) -> int:
    """The least value of max_lora_rank that has room for a rank."""
    if rank > RANKS[-1]:
        raise ValueError(f"rank {rank} is above {RANKS[-1]}, the most that vLLM serves; train with a smaller --rank")
    return next(allowed for allowed in RANKS if allowed >= rank)


def check_servable(config: Mapping) -> None:
    """ValueError if vLLM refuses, or would wrongly serve, an adapter with this adapter_config.json."""
    start = config.get("init_lora_weights", True)
    refused = {
        f"peft_type {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "DoRA (use_dora)": config.get("use_dora"),
        "lora_bias": config.get("lora_bias"),
        f"bias {config.get('bias')!r}": config.get("bias", "none") != "none",
        "modules_to_save": config.get("modules_to_save"),
        # Such a start takes from the base's weights what it gives the adapter, so the plain base is the wrong one.
        f"init_lora_weights {start!r}": start not in (True, False, None, "gaussian", "orthogonal"),
        "layer_replication": config.get("layer_replication"),
        "aLoRA (alora_invocation_tokens)": config.get("alora_invocation_tokens"),
    }
    if found := [what for what, present in refused.items() if present]:
        raise ValueError(f"vLLM serves no adapter with {' and '.join(found)}; train a plain LoRA")
    served_rank(lora_rank(config))


def record_uri(artifact: str) -> str:
    """Where the training_config.json of a deployed adapter lies: beside its archive."""
    return artifact.removesuffix(".tar.gz") + ".json"


# An endpoint, once it is there


def look(aws: Aws, kind: str, name: str) -> dict | None:
    """The description of a thing of one of the KEYS; None if there is none of this name."""
    try:
        with explained(f"look at {name}"):
            return getattr(aws.client("sagemaker"), f"describe_{kind}")(**{KEYS[kind]: name})
    except AwsError as error:
        if error.is_gone:
            return None
        raise


def tags(aws: Aws, arn: str) -> dict[str, str]:
    with explained(f"read the tags of {arn}"):
        pages = aws.client("sagemaker").get_paginator("list_tags").paginate(ResourceArn=arn)
        return {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}


def components(aws: Aws, endpoint: str) -> list[str]:
    """The names of an endpoint's inference components, its base last, as they can be deleted."""
    try:
        with explained(f"list the inference components of {endpoint}"):
            pages = aws.client("sagemaker").get_paginator("list_inference_components")
            found = [one for page in pages.paginate(EndpointNameEquals=endpoint) for one in page["InferenceComponents"]]
    except AwsError as error:
        if error.is_gone:
            return []
        raise
    names = sorted(one["InferenceComponentName"] for one in found if one["EndpointName"] == endpoint)
    return sorted(names, key=f"{endpoint}-base".__eq__)


def endpoint_price(aws: Aws, endpoint: dict) -> tuple[float | None, str]:
    """As `price`, of an endpoint by its description."""
    config = look(aws, "endpoint_config", endpoint["EndpointConfigName"])
    return price(aws, config["ProductionVariants"][0]["InstanceType"], "Hosting") if config else (None, "not known")


def make(aws: Aws, kind: str, request: dict, max_wait_s: float, poll_s: float) -> bool:
    """Make a thing and wait until it serves; False if it was there. What is left of a failed try is replaced."""
    name, description = request[KEYS[kind]], look(aws, kind, request[KEYS[kind]])
    if description and kind in STATUS and description[STATUS[kind]] not in ("InService", *PENDING):
        if problem := delete(aws, kind, [name], max_wait_s, poll_s):
            raise ValueError(problem)
        description = None
    if description is None:
        try:
            with explained(f"make {name}"):
                getattr(aws.client("sagemaker"), f"create_{kind}")(**request)
        except AwsError as error:
            if "already exist" not in str(error):  # made by a request whose answer was lost
                raise
    if kind in STATUS:
        wait_in_service(aws, kind, name, max_wait_s, poll_s)
    return description is None


def swap(aws: Aws, request: dict, max_wait_s: float, poll_s: float) -> None:
    """Update an adapter's component and wait until the new archive serves."""
    name, wanted = request["InferenceComponentName"], request["Specification"]["Container"]["ArtifactUrl"]
    wait_in_service(aws, "inference_component", name, max_wait_s, poll_s)
    with explained(f"update {name}"):
        aws.client("sagemaker").update_inference_component(**request)
    description = wait_in_service(aws, "inference_component", name, max_wait_s, poll_s)
    if (serves := artifact_of(description)) != wanted:
        why = _line(description.get("FailureReason", "")) or "no reason is given"
        raise ValueError(f"{name} was not updated and still serves {serves}: {why}")


def artifact_of(description: dict) -> str | None:
    """The archive that an adapter's component serves."""
    return description.get("Specification", {}).get("Container", {}).get("ArtifactUrl")


def wait_in_service(aws: Aws, kind: str, name: str, max_wait_s: float, poll_s: float) -> dict:
    """Wait for an endpoint or a component to serve; its description. ValueError when it fails or takes too long.

    A failure of the connection that may pass is waited out.
    """
    end = time.monotonic() + max_wait_s
    while True:
        try:
            description = look(aws, kind, name)
            if description is None:
                raise ValueError(f"{name} is gone; did somebody delete it?")
            status = description[STATUS[kind]]
            if status == "InService":
                return description
            if status not in PENDING or time.monotonic() > end:
                raise ValueError(_not_serving(aws, kind, name, description, max_wait_s))
        except AwsError as error:
            if not error.passes or time.monotonic() > end:
                raise
        time.sleep(poll_s)


def _not_serving(aws: Aws, kind: str, name: str, description: dict, waited_s: float) -> str:
    status, reason = description[STATUS[kind]], _line(description.get("FailureReason", ""))
    parts = [f"{name} is {status}: {reason or 'no reason is given'}"]
    if status in PENDING:
        parts = [f"{name} is still {status} after {waited_s / 60:g} minutes (--max-wait)"]
        parts.append("an AMI that does not fit the image's CUDA leaves no log; else AWS may have no such instance free")
    parts += [then for pattern, then in SERVING_ADVICE if re.search(pattern, reason, re.I)][:1]
    if kind == "inference_component":
        parts.append(f"log: aws logs tail {COMPONENT_LOGS}/{name} --since 1h --region {aws.region}")
    return "; ".join(parts)


def remaining(aws: Aws, endpoint: str) -> list[tuple[str, str]]:
    """(kind, name) of everything that belongs to an endpoint, in the order in which it can be deleted."""
    found = [("inference_component", name) for name in components(aws, endpoint)]
    found += [("endpoint", endpoint)] if look(aws, "endpoint", endpoint) else []
    for kind, short in (("endpoint_config", "config"), ("model", "model")):
        with explained(f"list what belongs to {endpoint}"):
            pages = aws.client("sagemaker").get_paginator(f"list_{kind}s").paginate(NameContains=f"{endpoint}-{short}-")
            listed = [one[KEYS[kind]] for page in pages for one in page[f"{KEYS[kind].removesuffix('Name')}s"]]
        found += [(kind, name) for name in listed if is_ours(endpoint, name, short)]
    return found


def delete_all(aws: Aws, endpoint: str, max_wait_s: float, poll_s: float) -> str | None:
    """Delete everything of an endpoint: adapters, base, endpoint, configuration, model. Why not, if something stays."""
    end, everything = time.monotonic() + max_wait_s, remaining(aws, endpoint)
    base = f"{endpoint}-base"
    groups = dict.fromkeys((kind, name == base) for kind, name in everything)
    for kind, is_base in groups:
        names = [name for other, name in everything if (other, name == base) == (kind, is_base)]
        if problem := delete(aws, kind, names, end - time.monotonic(), poll_s):
            return problem  # what comes after needs these gone
    return None


def delete(aws: Aws, kind: str, names: Sequence[str], max_wait_s: float, poll_s: float) -> str | None:
    """Delete things of one kind and wait until they are gone; the first reason why not, if some stay. Gone is fine."""
    end, reasons, left = time.monotonic() + max_wait_s, {}, list(names)
    while left:
        for name in list(left):
            try:
                description = look(aws, kind, name)
                if description and description.get(STATUS.get(kind)) != "Deleting":
                    reasons[name] = f"{name} is {description.get(STATUS.get(kind), 'there')}"
                    with explained(f"delete {name}"):
                        getattr(aws.client("sagemaker"), f"delete_{kind}")(**{KEYS[kind]: name})
                    description = description if kind in STATUS else None
                if description is None:
                    left.remove(name)
                    print(f"deleted {kind.replace('_', ' ')} {name}", flush=True)
            except AwsError as error:
                reasons[name] = str(error)
                if not (error.is_gone or error.passes or BUSY.search(str(error))):
                    return reasons[name]
        if left and time.monotonic() > end:
            why = reasons.get(left[0], f"{left[0]} is being deleted")
            return f"after {max_wait_s / 60:.0f} minutes (--max-wait) still: {why}"
        if left:
            time.sleep(poll_s)
    return None
