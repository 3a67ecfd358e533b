"""Serve a base model and its adapters on Amazon SageMaker: one endpoint on one GPU, any number of LoRA adapters.

    python scripts/deploy_sagemaker.py demo --adapter sentiment=fine_tuned_sentiment_model --dry-run
    python scripts/deploy_sagemaker.py demo --adapter sentiment=fine_tuned_sentiment_model
    python scripts/deploy_sagemaker.py demo --adapter tickets=tickets_model --remove sentiment      # the endpoint stays
    python scripts/deploy_sagemaker.py big --model llama --weights upload --adapter sentiment=llama_sentiment

Checks everything that can be checked before anything is billed, prints what it found and what it costs, and asks. Then
it uploads weights and adapters to S3 and makes a model, an endpoint, an inference component for the base model and one
for each adapter. The same command goes on where an earlier one stopped, adds adapters that are missing, swaps those
whose files changed, and leaves equal ones alone. An endpoint costs money every hour until it is deleted, whether it is
asked anything or not:

    python scripts/delete_endpoint.py demo
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import llama  # noqa: E402
import lora  # noqa: E402
import model_files  # noqa: E402
import predictions  # noqa: E402
import sagemaker_job as cloud  # noqa: E402
from sagemaker_job import Aws, AwsError, Check, Serving  # noqa: E402

MAX_LENGTH = 4096  # tokens of a prompt
MAX_RANK = 64  # leaves room for adapters to come; fine_tune_model.py's advice for an 8B model
RECORD = "training_config.json"
DONE = {"CreateInferenceComponent": "serves", "CreateEndpoint": "is up", "UpdateInferenceComponent": "swapped"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA folder and the name it is served under; `record` is its training_config.json, empty if it has none."""

    name: str
    folder: Path
    config: Mapping
    files: Mapping[str, bytes]
    record: bytes

    def uri(self, bucket: str) -> str:
        """Where its archive lies: another address for other files."""
        digest = cloud.short_hash(*(self.files[name] for name in sorted(self.files)), self.record)
        return f"s3://{bucket}/{cloud.PREFIX}/adapters/{self.name}-{digest}.tar.gz"

    def recorded(self, key: str) -> str | None:
        value = json.loads(self.record).get(key) if self.record else None
        return value if isinstance(value, str) else None


@dataclass(frozen=True)
class Base:
    """The model to serve: its weights' folder in S3, or None for a container that fetches them; what is uploaded."""

    name: str  # as --model says it
    weights: str  # their identity
    check: Check
    source: str | None = None
    prefix: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)
    context: int | None = None  # tokens that the model reads


@dataclass(frozen=True)
class Plan:
    """What is to be done, as (operation, body) in order, and what was checked."""

    checks: Sequence[Check]
    steps: Sequence[tuple[str, dict]]
    uploads: Sequence[Adapter]
    hourly: float | None
    model: str  # whose tokenizer makes the prompts
    base: Base | None = None  # whose files are uploaded first
    starts: bool = False  # something that costs more than before


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    adapters = [read_adapter(args.endpoint, text) for text in args.adapter]
    aws = cloud.connect(args.region, args.dry_run)
    args.region = aws.region  # for the commands that are printed
    bucket = cloud.bucket_name(aws, args.bucket)
    endpoint = find_endpoint(aws, args) if aws.account else None
    base = running_base(aws, args.endpoint) if aws.account else None
    base = base if endpoint else None
    if base:
        plan = plan_change(aws, args, adapters, bucket, endpoint, base)
    else:
        plan = plan_start(aws, args, adapters, bucket, endpoint)
    cloud.print_checks(plan.checks)
    refuse(plan, "" if base or not endpoint else left(aws, args, plan.hourly))
    if args.dry_run:
        print_requests(plan.steps)
        return
    if not plan.steps:
        print(f"{args.endpoint} is as it should be: nothing to do")
    elif plan.starts and not args.yes:
        cloud.confirm(f"Start {args.endpoint} for {rate(plan.hourly)}, until it is deleted?")
    carry_out(aws, args, plan, bucket)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("endpoint", metavar="ENDPOINT", help="its name: letters, digits and inner hyphens, 39 at most")
    many = {"nargs": "+", "action": "extend", "default": []}
    add("--adapter", metavar="NAME=FOLDER", **many, help="serve the LoRA adapter in FOLDER as NAME")
    add("--remove", metavar="NAME", **many, help="no longer serve the adapter NAME")
    add("--model", help="the base: default (embedded), llama, a Hub id or a folder (default: default)")
    where = "auto: a model of the Hub is fetched by the container, all else uploaded; upload: from here; or s3://PREFIX"
    add("--weights", default="auto", metavar="WHERE", help=where)
    add("--instance-type", metavar="TYPE", help=f"the machine (default: {cloud.INSTANCE})")
    rank = f"largest LoRA rank, for all adapters to come (default: {MAX_RANK}, or what these need)"
    add("--max-rank", type=command_line.natural, metavar="N", help=rank)
    length = f"tokens of the longest prompt (default: {MAX_LENGTH}, or what the model reads)"
    add("--max-length", type=command_line.natural, metavar="N", help=length)
    wait = "give up on what is not ready after this, as 30m or 1800 (default: 30m)"
    add("--max-wait", type=cloud.seconds, default="30m", metavar="TIME", help=wait)
    cloud.add_account_arguments(add)
    args = parser.parse_args(argv)
    if not re.fullmatch(r"auto|upload|s3://.+", args.weights):
        parser.error(f"--weights {args.weights}: auto, upload, or an s3:// address")
    if not 0 < args.poll_seconds <= 600:
        parser.error(f"--poll-seconds {args.poll_seconds:g}: above 0, 600 at most")
    if args.max_rank == 0 or args.max_length == 0:
        parser.error("--max-rank and --max-length: at least 1")
    cloud.endpoint_name(args.endpoint)
    names = [text.partition("=")[0] for text in args.adapter] + args.remove
    if twice := [name for name in names if names.count(name) > 1]:
        parser.error(f"the adapter {twice[0]} is named twice")
    for name in args.remove:
        cloud.component_name(args.endpoint, name)
    return args


def read_adapter(endpoint: str, text: str) -> Adapter:
    """The adapter that NAME=FOLDER names; ValueError if the folder holds none."""
    name, _, folder = text.partition("=")
    if not (name and folder):
        raise ValueError(f"--adapter {text}: write it as NAME=FOLDER")
    cloud.component_name(endpoint, name)
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"--adapter {text}: there is no folder {folder}")
    lora.check_adapter(path)
    files = {one: (path / one).read_bytes() for one in ("adapter_config.json", "adapter_model.safetensors")}
    record = (path / RECORD).read_bytes() if (path / RECORD).is_file() else b""
    try:
        if record and not isinstance(json.loads(record), dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise ValueError(f"{path / RECORD} is broken: {error}") from None
    return Adapter(name, path, json.loads(files["adapter_config.json"]), files, record)


# What is there


def find_endpoint(aws: Aws, args: argparse.Namespace) -> dict | None:
    """The endpoint of this name; ValueError for one that was not made here or cannot be gone on with."""
    found = cloud.look(aws, "endpoint", args.endpoint)
    if found is None:
        return None
    if not cloud.is_ours(args.endpoint, found.get("EndpointConfigName", "")):
        raise ValueError(f"there is an endpoint {args.endpoint} that was not made here; choose another name")
    if found["EndpointStatus"] == "Failed" and cloud.components(aws, args.endpoint):
        reason = found.get("FailureReason", "no reason is given")
        raise ValueError(f"{args.endpoint} has failed ({reason}); delete it first: {deletion(args)}")
    return found


def running_base(aws: Aws, endpoint: str) -> dict | None:
    """The description of the model that the endpoint's base component serves, its tags as `tags`; None if none does."""
    component = cloud.look(aws, "inference_component", cloud.component_name(endpoint))
    if component and component["EndpointName"] != endpoint:
        raise ValueError(f"{component['InferenceComponentName']} belongs to the endpoint {component['EndpointName']}")
    if not component or component["InferenceComponentStatus"] not in ("InService", "Updating"):
        return None
    name = component.get("Specification", {}).get("ModelName", "")
    model = cloud.look(aws, "model", name) if name else None
    if not model:
        raise ValueError(
            f"{component['InferenceComponentName']} was not made here; choose another name than {endpoint}"
        )
    return model | {"tags": cloud.tags(aws, model["ModelArn"])}


# What is to be done


def plan_start(aws: Aws, args: argparse.Namespace, adapters: list[Adapter], bucket: str, found: dict | None) -> Plan:
    """Make what is missing of an endpoint, from the first step on."""
    instance_type = args.instance_type or cloud.INSTANCE
    image = args.image or cloud.image_uri(aws.region, cloud.SERVING_IMAGE)
    role, role_check = cloud.find_role(aws, args.role)
    base = find_base(aws, args, bucket)
    fitting = [cloud.lora_rank(one.config) for one in adapters if cloud.lora_rank(one.config) <= cloud.RANKS[-1]]
    max_rank = cloud.served_rank(min(args.max_rank or max([MAX_RANK, *fitting]), cloud.RANKS[-1]))
    hourly, source = cloud.price(aws, instance_type, "Hosting")
    then = f"from the start until `{deletion(args)}` ({source})"
    checks = [
        cloud.check_identity(aws),
        role_check,
        cloud.check_bucket(aws, bucket, args.bucket is None),
        cloud.check_instance(instance_type, serving=True),
        cloud.check_quota(aws, instance_type, "endpoint"),
        cloud.check_image(aws, image),
        cloud.check("machine image", lambda: cloud.ami(image)),
        base.check,
        check_length(args, base),
        *(check_adapter(one, base.weights, max_rank, f"--max-rank {max_rank}") for one in adapters),
        Check("warning" if hourly is None else "ok", "cost", f"{rate(hourly)}, {then}"),
    ]
    steps, starts = [], not found or found["EndpointStatus"] in ("Failed", "Deleting")
    if all(one.status != "failed" for one in checks):
        length = args.max_length or min(MAX_LENGTH, base.context or MAX_LENGTH)
        parts = (args.endpoint, role, image, instance_type, base.name, base.weights, base.source, max_rank, length)
        serving = Serving(*parts)
        config, endpoint = cloud.endpoint_config_request(serving), cloud.endpoint_request(serving)
        component = cloud.base_component_request(serving)
        if not starts and was_begun_otherwise(aws, found, config, component):
            raise ValueError(
                f"{args.endpoint} was begun with other flags; repeat it with the same ones, or delete it first: "
                f"{deletion(args)}; {left(aws, args, hourly)}"
            )
        steps = [("CreateModel", cloud.model_request(serving)), ("CreateEndpointConfig", config)]
        steps += [("CreateEndpoint", endpoint), ("CreateInferenceComponent", component)]
        steps += adapter_steps(aws, args, adapters, bucket)
    return Plan(checks, steps, adapters, hourly, base.name, base, starts)


def was_begun_otherwise(aws: Aws, endpoint: dict, config: dict, component: dict) -> bool:
    """Whether a half-made endpoint has another machine, or a base on its way that is another model."""
    if endpoint["EndpointConfigName"] != config["EndpointConfigName"]:
        return True
    begun = cloud.look(aws, "inference_component", component["InferenceComponentName"])
    is_pending = begun and begun["InferenceComponentStatus"] in cloud.PENDING
    return bool(is_pending and begun["Specification"].get("ModelName") != component["Specification"]["ModelName"])


def plan_change(
    aws: Aws, args: argparse.Namespace, adapters: list[Adapter], bucket: str, found: dict, base: dict
) -> Plan:
    """Add, swap and remove adapters of an endpoint that serves; nothing of this costs more than before."""
    config = cloud.look(aws, "endpoint_config", found["EndpointConfigName"])
    instance_type = config["ProductionVariants"][0]["InstanceType"] if config else ""
    environment = base["PrimaryContainer"].get("Environment", {})
    max_rank, weights = int(environment.get("OPTION_MAX_LORA_RANK", 16)), base["tags"].get("base-weights", "")
    refuse_other_settings(args, base, environment, instance_type, weights)
    started = f"{args.endpoint}, which was started with --max-rank {max_rank}"
    steps = adapter_steps(aws, args, adapters, bucket)
    changed = [cloud.artifact_of(body) for _, body in steps]
    uploads = [one for one in adapters if one.uri(bucket) in changed]
    hourly, source = cloud.endpoint_price(aws, found)
    checks = [
        cloud.check_identity(aws),
        cloud.check_bucket(aws, bucket, args.bucket is None),
        Check("ok", "base", f"{base['tags'].get('base-model') or base['ModelName']} serves on {args.endpoint}"),
        *(check_adapter(one, weights, max_rank, started) for one in adapters),
        Check("ok", "cost", f"{rate(hourly)}, as before ({source})"),
    ]
    return Plan(checks, steps, uploads, hourly, base["tags"].get("base-model", ""))


def refuse_other_settings(
    args: argparse.Namespace, base: dict, environment: Mapping, instance_type: str, weights: str
) -> None:
    """ValueError for flags that name another base than the one that runs: they would have no effect."""
    runs = {
        "instance_type": (args.instance_type, instance_type),
        "image": (args.image, base["PrimaryContainer"].get("Image")),
        "max_rank": (
            args.max_rank and cloud.served_rank(args.max_rank),
            int(environment.get("OPTION_MAX_LORA_RANK", 16)),
        ),
        "max_length": (args.max_length, int(environment.get("OPTION_MAX_MODEL_LEN", 0))),
        "role": (args.role and args.role.rpartition("/")[2], base["ExecutionRoleArn"].rpartition("/")[2]),
    }
    if args.model:
        is_hub, model = on_hub(args.model), model_files.ALIASES.get(args.model, args.model)
        runs["model"] = (model, weights.partition("@")[0]) if is_hub else (model_files.locate(model)[2], weights)
    for flag, (wanted, running) in runs.items():
        if wanted and wanted != running:
            raise ValueError(
                f"{args.endpoint} runs with {running}, not with --{flag.replace('_', '-')} {getattr(args, flag)}; "
                f"give the other one another name, or delete this first: {deletion(args)}"
            )


def adapter_steps(
    aws: Aws, args: argparse.Namespace, adapters: Sequence[Adapter], bucket: str
) -> list[tuple[str, dict]]:
    """Remove, swap and add; nothing for an adapter that serves these very files."""
    steps = []
    for name in args.remove:
        component = cloud.component_name(args.endpoint, name)
        if aws.account and cloud.look(aws, "inference_component", component) is None:
            print(f"note: {args.endpoint} has no adapter {name}", file=sys.stderr)
            continue
        steps.append(("DeleteInferenceComponent", {"InferenceComponentName": component}))
    for adapter in adapters:
        uri, component = adapter.uri(bucket), cloud.component_name(args.endpoint, adapter.name)
        found = cloud.look(aws, "inference_component", component) if aws.account else None
        if found and found["EndpointName"] != args.endpoint:
            raise ValueError(
                f"{component} belongs to the endpoint {found['EndpointName']}; choose another adapter name"
            )
        status = found["InferenceComponentStatus"] if found else ""
        if status in ("InService", *cloud.PENDING) and cloud.artifact_of(found) != uri:
            request = cloud.adapter_update_request(args.endpoint, adapter.name, uri)
            steps.append(("UpdateInferenceComponent", request))
        elif status != "InService":
            request = cloud.adapter_component_request(args.endpoint, adapter.name, uri)
            steps.append(("CreateInferenceComponent", request))
    return steps


# The base model


def on_hub(model: str) -> bool:
    """Whether --model names a model of the Hub, as `model_files.locate` understands it."""
    path = Path(model).expanduser()
    return not (model == "default" or path.exists() or path.is_absolute() or model.startswith((".", "~")))


def find_base(aws: Aws, args: argparse.Namespace, bucket: str) -> Base:
    """The weights of --model, and where the container gets them from; what is wrong with them is in its `check`."""
    model = model_files.ALIASES.get(args.model or "default", args.model or "default")
    found = []

    def look() -> Check:
        if args.weights.startswith("s3://"):
            base = staged_base(aws, args, model)
        elif on_hub(model) and (args.weights == "auto" or args.dry_run):  # nothing is fetched to see what it would be
            base = hub_base(args, model, bucket)
        else:
            base = local_base(model, bucket)
        found.append(base)
        return base.check

    result = cloud.check("weights", look)
    return found[0] if found else Base(model, "", result)


def local_base(model: str, bucket: str) -> Base:
    """Weights that are here, or are fetched, to be uploaded."""
    name, folder, identity = model_files.locate(model)
    files, subfolder = cloud.staged_files(name, folder, identity)
    prefix = staged_prefix(bucket, name, identity)
    size = sum(path.stat().st_size for path in files.values())
    check = Check("ok", "weights", f"{name}, {size / 1e6:,.0f} MB are uploaded once, to {prefix}")
    label = model if on_hub(model) or model == "default" else str(Path(model).expanduser().resolve())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Base(label, identity, check, f"{prefix}{subfolder}/", prefix, files, context_of(config))


def hub_base(args: argparse.Namespace, model: str, bucket: str) -> Base:
    """A model of the Hub of which only the configuration is fetched, for its commit and its context."""
    from huggingface_hub import errors, snapshot_download

    check, commit, context = cloud.check_hub(model, has_token=args.weights == "upload"), "main", None
    check = check._replace(detail=check.detail.partition(", or name a secret")[0])  # an endpoint is given no token
    try:
        folder = Path(snapshot_download(model, allow_patterns=["config.json"]))
        context = context_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        commit = folder.name
    except (errors.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        said = " ".join(str(error).split())[:200]
        if not args.dry_run:
            raise ValueError(f"the Hub cannot be asked for {model}: {said}") from None
        check = (
            Check("warning", "weights", f"{check.detail}; its commit is not known here")
            if check.status == "ok"
            else check
        )
    identity = f"{model}@{commit}"
    if args.weights == "auto":
        return Base(model, identity, check, context=context)
    prefix = staged_prefix(bucket, model, identity)
    check = (
        check if check.status == "failed" else Check("warning", "weights", f"would be fetched and uploaded to {prefix}")
    )
    return Base(model, identity, check, prefix + hub_folder(model, commit), prefix, context=context)


def staged_base(aws: Aws, args: argparse.Namespace, model: str) -> Base:
    """Weights that an earlier --weights upload, here or of fine_tune_model.py, has put below a prefix in S3."""
    prefix = args.weights.rstrip("/") + "/"
    cloud.split(prefix)
    if not on_hub(model):
        base = local_base(model, "none")  # for the names; nothing is uploaded
        folder, identity, label, context = base.source.removeprefix(base.prefix), base.weights, base.name, base.context
    elif aws.account is None:
        folder, identity, label, context = hub_folder(model, "main"), f"{model}@main", model, None
    else:
        main = f"{prefix}models--{model.replace('/', '--')}/refs/main"
        try:
            commit = cloud.read(aws, main).decode().strip()
        except AwsError as error:
            raise ValueError(f"{error}; --weights upload puts {model} there") if error.is_gone else error from None
        folder, identity, label = hub_folder(model, commit), f"{model}@{commit}", model
        context = context_of(json.loads(cloud.read(aws, f"{prefix}{folder}config.json")))
    return Base(label, identity, cloud.check_staged(aws, prefix + folder), prefix + folder, context=context)


def staged_prefix(bucket: str, name: str, identity: str) -> str:
    return f"s3://{bucket}/{cloud.PREFIX}/weights/{cloud.staged_name(name, identity)}/"


def hub_folder(model: str, commit: str) -> str:
    return f"models--{model.replace('/', '--')}/snapshots/{commit}/"


def context_of(config: Mapping) -> int | None:
    """The most tokens that a model reads, by its config.json."""
    return config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")


# Checks


def check_length(args: argparse.Namespace, base: Base) -> Check:
    if args.max_length and base.context and args.max_length > base.context:
        return Check("failed", "length", f"--max-length {args.max_length} is above the {base.context} tokens it reads")
    return Check("ok", "length", f"{args.max_length or min(MAX_LENGTH, base.context or MAX_LENGTH):,} tokens at most")


def check_adapter(adapter: Adapter, weights: str, max_rank: int, limit: str) -> Check:
    """Whether vLLM can serve it, on this base and with this largest rank."""

    def look() -> str:
        cloud.check_servable(adapter.config)
        rank = cloud.lora_rank(adapter.config)
        if rank > max_rank:
            raise ValueError(
                f"its rank {rank} is above {max_rank}, the most of {limit}; deploy an endpoint with --max-rank "
                f"{cloud.served_rank(rank)}, or train with --rank {max_rank}"
            )
        if weights:
            lora.check_base(adapter.folder, weights)
        trained = adapter.recorded("base_model")
        return f"rank {rank}, " + (
            f"trained from {trained}" if trained else f"without {RECORD}, so its base is not known"
        )

    return cloud.check(f"adapter {adapter.name}", look)


def refuse(plan: Plan, exists: str) -> None:
    """ValueError that names every failed check and the first one's reason, and what `exists` already."""
    if failed := [one for one in plan.checks if one.status == "failed"]:
        more = f" (and {', '.join(one.subject for one in failed[1:])})" if failed[1:] else ""
        said = f"nothing is started or changed: {failed[0].subject}: {failed[0].detail}{more}"
        raise ValueError(f"{said}; {exists}" if exists else said)


# Doing it


def print_requests(steps: Sequence[tuple[str, dict]]) -> None:
    for operation, body in steps:
        print(f"\n{operation}\n{json.dumps(cloud.redacted(body), indent=1)}")
    print("\na dry run: nothing was started or changed" if steps else "\na dry run: nothing is to be done")


def carry_out(aws: Aws, args: argparse.Namespace, plan: Plan, bucket: str) -> None:
    """Upload, then every step; whatever stops it is followed by what exists, what that costs, and how to end it."""
    try:
        if plan.steps and args.bucket is None:
            cloud.make_bucket(aws, bucket)
        if plan.base and plan.base.files:
            cloud.upload_folder(aws, plan.base.prefix, plan.base.files)
        for adapter in plan.uploads:
            uri = adapter.uri(bucket)
            cloud.upload(aws, uri, cloud.archive(adapter.files))
            if adapter.record:
                cloud.upload(aws, cloud.record_uri(uri), adapter.record)
            print(f"uploaded the adapter {adapter.name} to {uri}", flush=True)
        for operation, body in plan.steps:
            take(aws, args, operation, body)
        print_end(aws, args, plan)
    except KeyboardInterrupt:
        print(f"\nstopped here, not at AWS: {left(aws, args, plan.hourly)}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; {left(aws, args, plan.hourly)}") from None


def take(aws: Aws, args: argparse.Namespace, operation: str, body: dict) -> None:
    """One step and its line: what, and how long it took."""
    started, waits = time.monotonic(), (args.max_wait, args.poll_seconds)
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", re.sub("^(Create|Update|Delete)", "", operation)).lower()
    name, done = body[cloud.KEYS[kind]], DONE.get(operation, "made")
    if operation == "DeleteInferenceComponent":
        if problem := cloud.delete(aws, kind, [name], *waits):
            raise ValueError(problem)
        return
    print(f"{kind.replace('_', ' ')} {name}", end="", flush=True)
    try:
        if operation == "UpdateInferenceComponent":
            cloud.swap(aws, body, *waits)
        elif not cloud.make(aws, kind, body, *waits):
            done = "was there"
    except BaseException:
        print(flush=True)  # the line is not left half done
        raise
    print(f": {done} ({time.monotonic() - started:,.0f} s)", flush=True)


def left(aws: Aws, args: argparse.Namespace, hourly: float | None) -> str:
    """What exists after a failure, what it costs, and how to delete it."""
    delete = f"`{deletion(args)}` deletes it"
    try:
        found = cloud.look(aws, "endpoint", args.endpoint)
        if found:
            hourly, _ = cloud.endpoint_price(aws, found)
    except AwsError:
        return f"the endpoint {args.endpoint} may exist and cost {rate(hourly)}; {delete}"
    if found is None:
        return f"there is no endpoint {args.endpoint}, so nothing is billed; repeat the command to go on"
    status = found["EndpointStatus"]
    if status == "Failed":
        return (
            f"the failed endpoint {args.endpoint} is left and runs nothing; repeat the command to replace it; {delete}"
        )
    return f"the endpoint {args.endpoint} is {status} and costs {rate(hourly)}; {delete}"


def rate(hourly: float | None) -> str:
    return "an unknown sum an hour" if hourly is None else f"${hourly:.2f} an hour (${24 * hourly:.2f} a day)"


def deletion(args: argparse.Namespace) -> str:
    return f"python scripts/delete_endpoint.py {args.endpoint} --region {args.region}"


def print_end(aws: Aws, args: argparse.Namespace, plan: Plan) -> None:
    """What serves now, what it costs, and what to do next."""
    start = f"{args.endpoint}-adapter-"
    names = [one.removeprefix(start) for one in cloud.components(aws, args.endpoint) if one.startswith(start)]
    print(f"\n{args.endpoint} serves its base model" + (f" and the adapters {', '.join(names)}" if names else ""))
    print(f"it costs {rate(plan.hourly)}, until it is deleted\n")
    adapter, served = (f" --adapter {names[0]}", f"/{names[0]}") if names else ("", "")
    print(f"  python scripts/test_endpoint.py {args.endpoint}{adapter} --region {args.region}")
    tokenizer = f" --tokenizer {plan.model}" if plan.model else ""
    where = f"--endpoint sagemaker:{args.endpoint}{served}{tokenizer}"
    print(f'  AWS_DEFAULT_REGION={args.region} python logprobs_confidence.py {where} "Not bad"')
    print(f"  {deletion(args)}")


if __name__ == "__main__":
    command_line.run(main)
