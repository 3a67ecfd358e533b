"""Training jobs on Amazon SageMaker: fine_tune_model.py with the same flags and rows, on a rented GPU.

    train(settings, training)       # checks, asks, uploads, starts, follows; the adapter comes back to --output-dir
    attach(settings, "NAME")        # follows a job that runs, or ran, and fetches its adapter
    stop(settings, "NAME")

Rows, task and flags travel in a small archive, and scripts/sagemaker_entry.py runs the training in the container.
`training_request` is pure: what --dry-run prints is what is sent. A job carries no token: weights are staged in S3, or
the container reads a secret by its ARN. Checkpoints lie in S3, so a spot interruption and --resume go on from them.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import re
import shlex
import shutil
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from modulefinder import ModuleFinder
from pathlib import Path

import aws
from aws import Account, AwsError, Check, Weights, checked, explained
from files import read_json
from lora import check_adapter
from model_files import folder_hash, hub_id
from predictions import fingerprint
from tables import Example
from task import Task

IMAGE = ("huggingface-pytorch-training", "2.9.0-transformers5.3.0-gpu-py312-cu130-ubuntu22.04")
# What a job does not install: the image brings torch and boto3, the others are for other scripts.
NOT_IN_A_JOB = {"torch", "datasets", "pyarrow", "relplot", "plotly", "openai", "anthropic", "httpx2"}
NOT_IN_A_JOB |= {"boto3", "botocore"}
VOLUME_GB = 100
SPOT_WAIT_S = 6 * 3600  # for capacity, beyond the running time
MAX_RUNTIME_S = 2 * 3600
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
CONFIG = "training_config.json"
NEEDED = ("adapter_config.json", "adapter_model.safetensors", "training_log.jsonl", CONFIG)
SECRET_ARN = r"arn:aws[a-z-]*:secretsmanager:[a-z0-9-]+:\d{12}:secret:[\w/+=.@-]{1,400}"


@dataclass(frozen=True)
class Settings:
    """What the flags say of a job; see add_arguments."""

    output_dir: str
    overwrite: bool
    resume: bool
    instance_type: str
    spot: bool
    max_runtime: int
    weights: str
    hf_token_secret: str | None
    detach: bool
    role: str
    bucket: str | None
    region: str | None
    image: str | None
    dry_run: bool
    yes: bool
    poll_seconds: float


@dataclass(frozen=True)
class Training:
    """What is to be trained: a model, as --model says it, on labelled rows, with the flags that travel."""

    model: str
    task: str  # its name, or a TOML file
    flags: Mapping[str, object]
    sources: Mapping[str, str]  # "train" and "validation" -> where these rows are from
    training: Sequence[Example]
    validation: Sequence[Example]
    groups: Sequence[object] | None  # of the validation rows, if not by near-duplicates
    hashes: Mapping[str, str]  # "train" and "validation" -> what the adapter must say that it was trained with


@dataclass(frozen=True)
class TrainingJob:
    """What a request for a training job is made of: the flags, and s3:// addresses that follow from what is sent."""

    name: str
    region: str
    role: str
    settings: Settings
    home: str
    source: str
    data: str
    checkpoints: str
    weights: str = ""


@dataclass(frozen=True)
class JobPlan:
    """A job, what was checked, what it costs at most, and what is uploaded before it starts: address -> content."""

    job: TrainingJob
    checks: Sequence[Check]
    cost: str
    uploads: Mapping[str, bytes]
    weights: Weights


# From the start to the adapter


def train(settings: Settings, training: Training) -> None:
    """Start a training job, follow it and fetch its adapter; a dry run only prints what would be sent."""
    check_landing(settings)
    account = aws.connect(settings.region, settings.dry_run)
    plan = plan_job(account, settings, training)
    aws.print_checks(plan.checks)
    if settings.dry_run:
        print(aws.request_text(training_request(plan.job)))
        return
    aws.refuse_failed(plan.checks)
    if not settings.yes:
        aws.ask_to_spend(f"start {plan.job.name} on {settings.instance_type}, {plan.cost}?")
    if settings.bucket is None:
        aws.make_bucket(account, aws.bucket_name(account, None))
    for uri, content in plan.uploads.items():
        aws.upload(account, uri, content)
    aws.upload_weights(account, plan.weights)
    start(account, plan.job)
    print(f"come back to it:  {attach_command(account, settings, plan.job.name)}")
    print(f"end it:           {stop_command(account, plan.job.name)}\n")
    if not settings.detach:
        bring_home(account, settings, plan.job.name, training.hashes)


def attach(settings: Settings, name: str) -> None:
    """Follow a job that runs, or ran, and fetch its adapter."""
    check_landing(settings)
    bring_home(aws.connect(settings.region), settings, name, {})


def stop(settings: Settings, name: str) -> None:
    """End a training job and say what it cost; its checkpoint stays."""
    from botocore.exceptions import WaiterError

    account = aws.connect(settings.region)
    client = account.client("sagemaker")
    if describe_job(account, name)["TrainingJobStatus"] == "InProgress":
        with explained(f"stop the training job {name}"):
            client.stop_training_job(TrainingJobName=name)
    waiter, pause = client.get_waiter("training_job_completed_or_stopped"), {"Delay": settings.poll_seconds}
    with contextlib.suppress(WaiterError):  # a job that failed has ended too
        waiter.wait(TrainingJobName=name, WaiterConfig=pause)
    print(billed(account, describe_job(account, name)))


def start(account: Account, job: TrainingJob) -> None:
    """Start a job; where it is not known whether it started, say how to end it."""
    print(f"starting {job.name}", flush=True)
    end = f"if it started all the same, `{stop_command(account, job.name)}` ends it"
    try:
        with explained(f"start the training job {job.name}"):
            account.client("sagemaker").create_training_job(**training_request(job))
    except AwsError as error:
        raise ValueError(f"{error}; {end}") from None
    except KeyboardInterrupt:
        print(f"\nstopped while {job.name} was being started; {end}", file=sys.stderr)
        sys.exit(130)


def bring_home(account: Account, settings: Settings, name: str, hashes: Mapping[str, str]) -> None:
    """Follow a job to its end and bring its adapter to the output folder."""
    back, end = attach_command(account, settings, name), stop_command(account, name)
    with said_if_left(f"{name} goes on and is billed: `{back}` comes back to it, `{end}` ends it"):
        description = follow(account, name, settings.poll_seconds)
    print(billed(account, description))
    if why := ended_badly(account, description):
        raise ValueError(why)
    folder = Path(settings.output_dir).resolve()
    with said_if_left(f"{name} is done and paid for: `{back}` fetches its adapter"):
        part = download_adapter(account, description, folder)
    try:
        check_trained(part, hashes)
        check_landing(settings)  # again, hours later
    except ValueError as error:
        raise ValueError(f"the adapter of {name} is refused, its files stay in {part}: {error}") from None
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    print(f"Written to {settings.output_dir}; `--adapter {settings.output_dir}` uses it.")


@contextlib.contextmanager
def said_if_left(what: str) -> Iterator[None]:
    """Say how a job stands when Ctrl-C or AWS ends what we do with it."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nleft, but {what}", file=sys.stderr)
        sys.exit(130)
    except AwsError as error:
        raise ValueError(f"{error}; {what}") from None


def attach_command(account: Account, settings: Settings, name: str) -> str:
    folder = shlex.quote(settings.output_dir) + (" --overwrite" if settings.overwrite else "")
    return f"python fine_tune_model.py --region {account.region} --attach {name} --output-dir {folder}"


def stop_command(account: Account, name: str) -> str:
    return f"python fine_tune_model.py --region {account.region} --stop {name}"


def check_landing(settings: Settings) -> None:
    """ValueError if an adapter that lands there whole would replace something that --overwrite does not give up."""
    folder = Path(settings.output_dir)
    if not settings.overwrite and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; --output-dir names another folder, --overwrite replaces a training")


# What is sent


def plan_job(account: Account, settings: Settings, training: Training) -> JobPlan:
    """The job that the flags describe, and everything that can be checked before it is billed."""
    checks, role = aws.check_account(account, settings.role, settings.bucket, settings.instance_type)
    home = f"s3://{aws.bucket_name(account, settings.bucket)}/{aws.PREFIX}"
    weights = Weights(training.model, "", f"the container fetches {training.model}")  # the default one through pip
    if training.model != "default":
        way = {"place": settings.weights, "home": home, "dry_run": settings.dry_run}
        way["has_token"] = bool(settings.hf_token_secret)
        weights = checked(checks, "weights", lambda: aws.find_weights(training.model, **way), weights)
    else:
        checks.append(Check("ok", "weights", weights.detail))
    if arn := settings.hf_token_secret:
        checked(checks, "token", lambda: check_secret(account, arn), arn)
    cost = most_it_costs(account.region, settings)
    checks += [Check("ok", "rows", rows_line(training)), Check("ok", "cost", cost)]

    rows, files = row_files(training), source_files(Path(__file__).parent, training, weights)
    packed = aws.archive(files)
    source, data = f"{home}/source/{aws.short_hash(packed)}", f"{home}/data/{aws.short_hash(*rows.values())}"
    # Another folder of checkpoints for other rows, flags or weights, and in it one for each job.
    decisive = [data.encode(), weights.prefix.encode(), files["arguments.json"], files.get("task.toml", b"")]
    alike = f"{home}/checkpoints/{aws.short_hash(*decisive)}"
    name, resumes = job_name(), settings.resume and not account.is_offline
    job = TrainingJob(
        name=name,
        region=account.region,
        role=role,
        settings=settings,
        home=home,
        source=f"{source}/sourcedir.tar.gz",
        data=f"{data}/",
        checkpoints=earlier_checkpoints(account, alike) if resumes else f"{alike}/{name}",
        weights=weights.prefix,
    )
    uploads = {f"{job.data}{one}": content for one, content in rows.items()} | {job.source: packed}
    return JobPlan(job, checks, cost, uploads, weights)


def training_request(job: TrainingJob) -> dict:
    """The body of CreateTrainingJob. Hyperparameters are JSON strings, as the container's toolkit decodes them."""
    settings = job.settings
    entry = {
        "sagemaker_program": "sagemaker_entry.py",
        "sagemaker_submit_directory": job.source,
        "sagemaker_region": job.region,
        "sagemaker_job_name": job.name,
        "sagemaker_container_log_level": 20,
    }
    image = settings.image or aws.image_uri(job.region, *IMAGE)
    request = {
        "TrainingJobName": job.name,
        "RoleArn": job.role,
        "AlgorithmSpecification": {"TrainingImage": image, "TrainingInputMode": "File"},
        "HyperParameters": {name: json.dumps(value) for name, value in entry.items()},
        "InputDataConfig": [_channel("training", job.data)],
        "OutputDataConfig": {"S3OutputPath": f"{job.home}/output", "CompressionType": "GZIP"},
        "ResourceConfig": {"InstanceType": settings.instance_type, "InstanceCount": 1, "VolumeSizeInGB": VOLUME_GB},
        "StoppingCondition": {"MaxRuntimeInSeconds": settings.max_runtime},
        "CheckpointConfig": {"S3Uri": job.checkpoints, "LocalPath": "/opt/ml/checkpoints"},
        "Environment": {"TOKENIZERS_PARALLELISM": "false"},
        "Tags": aws.TAGS,
    }
    if job.weights:
        request["InputDataConfig"].append(_channel("model", job.weights))
    if settings.hf_token_secret:
        request["Environment"]["HF_TOKEN_SECRET_ARN"] = settings.hf_token_secret
    if settings.spot:
        request["EnableManagedSpotTraining"] = True
        request["StoppingCondition"]["MaxWaitTimeInSeconds"] = settings.max_runtime + SPOT_WAIT_S
    return request


def _channel(name: str, uri: str) -> dict:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "File"}


def job_name() -> str:
    """A name that no other job has."""
    now = time.time()
    return f"{aws.PREFIX}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{int(now * 1e6) % 0x10000:04x}"


def most_it_costs(region: str, settings: Settings) -> str:
    """The most that a job can cost; storage and transfer are cents beside it."""
    hours, hourly = settings.max_runtime / 3600, aws.price(region, settings.instance_type)
    if hourly is None:
        return f"at most {hours:g} h at a price that is not known here; see AWS's price list"
    spot = "; a spot job usually costs less than half of it" if settings.spot else ""
    return f"at most ${hourly * hours:.2f} = ${hourly:.2f} an hour x {hours:g} h ({aws.PRICED}){spot}"


def earlier_checkpoints(account: Account, alike: str) -> str:
    """Where the last job of these rows and flags left its checkpoint; ValueError if there is none or it still runs.

    Two jobs that write into one folder would bill twice and mix their files.
    """
    client = account.client("sagemaker")
    with explained("look for an earlier job"):
        pages = client.get_paginator("list_training_jobs").paginate(
            NameContains=aws.PREFIX, SortBy="CreationTime", SortOrder="Descending"
        )
        for one in (summary for page in pages for summary in page["TrainingJobSummaries"]):
            found = client.describe_training_job(TrainingJobName=one["TrainingJobName"])
            checkpoints = found.get("CheckpointConfig", {}).get("S3Uri", "")
            if not checkpoints.startswith(f"{alike}/"):
                continue
            if found["TrainingJobStatus"] in ("InProgress", "Stopping"):
                raise ValueError(f"{one['TrainingJobName']} still runs: --attach it, or --stop it first")
            return checkpoints
    raise ValueError("there was no job with these rows and flags; leave out --resume")


# The model, the token, the rows and the sources


def staged_as(weights: Weights) -> str:
    """The folder in which the container must find staged weights, in the Hub's cache for a model of the Hub."""
    if hub_id(weights.model) is None:
        return Path(weights.model).name
    name, _, commit = weights.identity.partition("@")
    return f"models--{name.replace('/', '--')}/snapshots/{commit}"


def check_secret(account: Account, arn: str) -> str:
    """Whether the secret that holds a token is there; its value is not read."""
    with explained(f"find the secret {arn}"):
        account.client("secretsmanager").describe_secret(SecretId=arn)
    return "the container reads the secret; the role needs secretsmanager:GetSecretValue on it"


def rows_line(training: Training) -> str:
    count = Counter(example.label for example in training.training).most_common()
    seen = ", ".join(f"{n:,} {label}" for label, n in count)
    return f"{len(training.training):,} to learn from ({seen}), {len(training.validation):,} for validation"


def row_files(training: Training) -> dict[str, bytes]:
    """The files of the channel `training`: JSON Lines, which read back as they were."""
    rows = {"train.jsonl": [asdict(one) for one in training.training]}
    rows["validation.jsonl"] = [asdict(one) for one in training.validation]
    if training.groups is not None:
        groups = zip(training.validation, training.groups, strict=True)
        rows["groups.jsonl"] = [{"id": example.id, "group": group} for example, group in groups]
    return {name: "".join(json.dumps(row) + "\n" for row in table).encode() for name, table in rows.items()}


def source_files(root: Path, training: Training, weights: Weights) -> dict[str, bytes]:
    """What the source archive holds, flat: our files, the flags, the task, and the pins that a job needs."""
    files = imported_modules(root, "fine_tune_model")
    files["sagemaker_entry.py"] = (root / "scripts" / "sagemaker_entry.py").read_bytes()
    files["requirements.txt"] = job_requirements(root / "requirements.txt", training.flags)
    task = training.task
    if task.endswith(".toml"):
        files["task.toml"] = Path(task).read_bytes()
        task = "task.toml"
    job = {"arguments": ["--task", task, *as_arguments(training.flags)], "model": training.model}
    job |= {"sources": dict(training.sources), "staged": staged_as(weights) if weights.prefix else ""}
    files["arguments.json"] = (json.dumps(job, indent=1, sort_keys=True) + "\n").encode()
    return files


def imported_modules(root: Path, name: str) -> dict[str, bytes]:
    """The file of a module, and of every module of ours that it imports, directly or not."""
    finder = ModuleFinder([str(root)])  # which finds no others
    finder.run_script(str(root / f"{name}.py"))
    files = [Path(module.__file__) for module in finder.modules.values() if module.__file__]  # others are built in
    return {file.name: file.read_bytes() for file in files}


def job_requirements(file: Path, flags: Mapping[str, object]) -> bytes:
    """The lines of requirements.txt that a job installs; the image brings torch."""
    text = file.read_text(encoding="utf-8")
    pins = []
    for line in text.splitlines():
        pin = line.partition("#")[0].strip()
        if pin and pin.partition("==")[0] not in NOT_IN_A_JOB:
            pins.append(pin)
    if flags.get("load_in_4bit") or flags.get("load_in_8bit"):
        pins += re.findall(r"bitsandbytes==[\w.]+", text)
    return ("\n".join(pins) + "\n").encode()


def as_arguments(flags: Mapping[str, object]) -> list[str]:
    """Flags as a command line says them: a switch that is off, or a value that is not set, is left out."""
    arguments = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        arguments.append(f"--{name.replace('_', '-')}")
        if value is not True:
            arguments.append(str(value))
    return arguments


# A job that runs, and what comes of it


def describe_job(account: Account, name: str) -> dict:
    def ask() -> dict:
        return account.client("sagemaker").describe_training_job(TrainingJobName=aws.aws_name(name))

    found = aws.unless_gone(f"look at the training job {name}", ask)
    if found is None:
        raise ValueError(f"there is no training job {name} in {account.region}; --region names another")
    return found


def follow(account: Account, name: str, poll_s: float) -> dict:
    """Print every change of status and every log line until the job ends; its description.

    boto3's waiter would wait as well, but in silence.
    """
    shown, seen = 0, set()
    while True:
        description = describe_job(account, name)
        changes = description.get("SecondaryStatusTransitions", [])
        for change in changes[shown:]:
            print(f"{change['Status']}: {aws.printed(change.get('StatusMessage', ''))}".rstrip(": "), flush=True)
        shown = max(shown, len(changes))
        has_ended = description["TrainingJobStatus"] not in ("InProgress", "Stopping")
        if has_ended:
            time.sleep(min(poll_s, 2.0))  # the last lines arrive a little after the end
        print_logs(account, name, seen)
        if has_ended:
            return description
        time.sleep(poll_s)


def print_logs(account: Account, name: str, seen: set[str]) -> None:
    """Print the log lines whose ids are not in `seen`, and add them. A log that is not there yet is no error."""
    pages = account.client("logs").get_paginator("filter_log_events")
    try:
        with explained("read the log"):
            for page in pages.paginate(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{name}/"):
                new = [event for event in page["events"] if event["eventId"] not in seen]
                seen.update(event["eventId"] for event in new)
                for event in new:
                    message = "".join(c if c.isprintable() else " " for c in event["message"])  # laid out as it was
                    print(f"  | {aws.hidden(message)}".rstrip(), flush=True)
    except AwsError as error:
        if not error.is_gone and "told" not in seen:
            seen.add("told")  # once is enough
            print(f"note: {error}; the status still is read", file=sys.stderr)


def ended_badly(account: Account, description: dict) -> str | None:
    """What to tell about a job that did not complete, with the next step; None for one that did."""
    name, status = description["TrainingJobName"], description["TrainingJobStatus"]
    secondary = description.get("SecondaryStatus", "")
    if status == "Completed":
        return None
    if status == "Stopped":
        why = "it was stopped"
        if secondary == "MaxRuntimeExceeded":
            why = "it reached --max-runtime"
        if secondary == "MaxWaitTimeExceeded":
            why = "no spot capacity came in time (repeat it later or without --spot)"
        then = "the command that started it goes on from its checkpoint with --resume (and without --overwrite)"
        return f"the training job {name} is not finished: {why}; {then}"
    reason = aws.printed(description.get("FailureReason", "")).rstrip(".") or secondary
    return f"the training job {name} failed: {reason}{aws.advice(reason)}; log: {log_command(account, name)}"


def log_command(account: Account, name: str) -> str:
    return f"aws logs tail {LOG_GROUP} --log-stream-name-prefix {name}/ --since 1d --region {account.region}"


def billed(account: Account, description: dict) -> str:
    """What a training job has cost, from its billable seconds and the price."""
    seconds, trained = description.get("BillableTimeInSeconds"), description.get("TrainingTimeInSeconds")
    if seconds is None:
        return "nothing was billed" if "TrainingStartTime" not in description else "no billable time is known yet"
    instance_type = description["ResourceConfig"]["InstanceType"]
    line = f"billed {seconds:,} s of {instance_type}"
    if hourly := aws.price(account.region, instance_type):
        line += f": about ${hourly * seconds / 3600:.2f} ({aws.PRICED})"
    if description.get("EnableManagedSpotTraining") and trained:
        line += f", {1 - seconds / trained:.0%} saved by spot"
    return line


def download_adapter(account: Account, description: dict, folder: Path) -> Path:
    """Fetch a completed job's model.tar.gz and unpack it beside `folder`; the new folder.

    Raises ValueError for a job that completed without an adapter, which a full disk can bring about.
    """
    name, uri = description["TrainingJobName"], description["ModelArtifacts"]["S3ModelArtifacts"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, packed = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.tar.gz")
    shutil.rmtree(part, ignore_errors=True)
    bucket, key = aws.bucket_and_key(uri)
    try:
        with explained(f"download {uri}"):
            account.client("s3").download_file(bucket, key, str(packed))
        with tarfile.open(packed, "r:gz") as tar:
            tar.extractall(part, filter="data")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{uri} is broken: {aws.printed(str(error))}; repeat with --attach {name}") from None
    finally:
        packed.unlink(missing_ok=True)
    if absent := [one for one in NEEDED if not (part / one).is_file()]:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(
            f"the training job {name} completed without {absent[0]}, so there is no adapter in {uri}; "
            f"read its log: {log_command(account, name)}"
        )
    return part


def check_trained(folder: Path, hashes: Mapping[str, str]) -> None:
    """Compare an adapter that was trained elsewhere with what its own record says, and with the rows that were sent."""
    from safetensors import SafetensorError, safe_open

    check_adapter(folder)
    config = read_json(folder / CONFIG)
    try:
        with safe_open(folder / "adapter_model.safetensors", "np") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if not (abs(file.get_tensor(name)) < float("inf")).all():
                    raise ValueError("its weights are not finite")
        tuned = fingerprint(
            weights=config["base_weights"],
            precision=config["precision"],
            adapter=folder_hash(folder),
            task=Task.from_settings(config["task"]).settings(),
            method="logprobs",
            settings={},
        )
        if tuned != config["fingerprint"]:
            raise ValueError(f"its files are not those that were trained ({tuned}, not {config['fingerprint']})")
        for name, sha256 in hashes.items():
            if config[name]["sha256"] != sha256:
                raise ValueError(f"it was trained with other {name} rows")
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is broken: {error}") from None


# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of training on SageMaker."""
    add = parser.add_argument_group("on Amazon SageMaker").add_argument
    add("--sagemaker", action="store_true", help="train there; the adapter comes back to --output-dir")
    add("--attach", metavar="JOB", help="follow a job that runs, or ran, and fetch its adapter")
    add("--stop", metavar="JOB", help="end a job; its checkpoint stays")
    add("--instance-type", default=aws.INSTANCE, metavar="TYPE", help=f"the machine (default: {aws.INSTANCE})")
    add("--spot", action="store_true", help="spare capacity: cheaper, may be interrupted, goes on by itself")
    most = "end the job after this, as 90m, 2h or 7200 (default: 2h)"
    add("--max-runtime", type=aws.seconds_of, default=MAX_RUNTIME_S, metavar="TIME", help=most)
    add("--hf-token-secret", metavar="ARN", help="a secret in Secrets Manager that holds a Hugging Face token")
    add("--detach", action="store_true", help="start the job and do not wait for it")
    aws.add_arguments(add)


ONLY_TO_START = ("instance_type", "spot", "max_runtime", "weights", "hf_token_secret", "detach", "role", "bucket")
ONLY_TO_START += ("image", "dry_run", "yes")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse cloud flags without --sagemaker, and what cannot be meant together."""
    ways = [name for name in ("sagemaker", "attach", "stop") if getattr(args, name)]
    if len(ways) > 1:
        parser.error("--sagemaker, --attach and --stop are three things to do; give one of them")
    refused = () if args.sagemaker else ONLY_TO_START
    if not ways:
        refused += ("region", "poll_seconds")
    for name in refused:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} needs --sagemaker")
    if args.hf_token_secret and not re.fullmatch(SECRET_ARN, args.hf_token_secret):
        parser.error("--hf-token-secret: the ARN of a secret, as arn:aws:secretsmanager:REGION:ACCOUNT:secret:NAME")


def settings_from_arguments(args: argparse.Namespace) -> Settings:
    return Settings(**{one.name: getattr(args, one.name) for one in fields(Settings)})
