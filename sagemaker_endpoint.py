"""Endpoints on Amazon SageMaker: a base model and any number of LoRA adapters on one GPU, served by LMI with vLLM.

    plan = plan_start(account, serving, adapters, ...)  # or plan_change: what is checked, and every request
    take(account, plan.steps[0], max_wait_s, poll_s)    # sends one and waits until what it makes serves
    delete_all(account, remaining(account, "demo"), max_wait_s, poll_s)

An endpoint has one inference component for its base model and one for each adapter. All `*_request` functions are pure:
what --dry-run prints is what is sent. An endpoint that is half made is deleted and made again, not repaired.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import aws
from aws import Account, Check, Weights, aws_name, checked, component_name, explained, unless_gone
from files import read_json
from lora import check_adapter, check_base
from model_files import hub_id

IMAGE = ("djl-inference", "0.36.0-lmi28.0.0-cu130")  # vLLM 0.26, the first that lists chosen tokens by id
MAX_LENGTH = 4096  # tokens of a prompt
MAX_RANK = 64  # leaves room for adapters to come; fine_tune_model.py's advice for an 8B model
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's values of max_lora_rank
VARIANT = "AllTraffic"
START_S = {"ModelDataDownloadTimeoutInSeconds": 1200, "ContainerStartupHealthCheckTimeoutInSeconds": 1200}
RECORD = "training_config.json"


@dataclass(frozen=True)
class Serving:
    """What an endpoint is made of. Without a `source` (an s3:// folder) the container fetches `base_model`."""

    endpoint: str
    role: str
    image: str
    instance_type: str
    base_model: str  # as --model says it
    max_rank: int
    max_length: int
    base_weights: str = ""  # their identity
    source: str = ""


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
        digest = aws.short_hash(*(self.files[name] for name in sorted(self.files)), self.record)
        return f"s3://{bucket}/{aws.PREFIX}/adapters/{self.name}-{digest}.tar.gz"


class Step(NamedTuple):
    """One request: AWS's name of the operation, and its body."""

    operation: str
    body: dict


@dataclass(frozen=True)
class EndpointPlan:
    """What was checked, what is uploaded first, and the requests in their order."""

    checks: Sequence[Check]
    steps: Sequence[Step]
    uploads: Sequence[Adapter]
    base_model: str
    hourly: float | None
    weights: Weights | None = None  # of a start; a change costs nothing more than before


# Request bodies


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
        # For those who ask later what is served; the container does not read them.
        "BASE_MODEL": serving.base_model,
        "BASE_WEIGHTS": serving.base_weights,
    }
    container = {"Image": serving.image, "Environment": environment}
    if serving.source:
        source = {"S3Uri": serving.source, "S3DataType": "S3Prefix", "CompressionType": "None"}
        container["ModelDataSource"] = {"S3DataSource": source}
    elif revision := serving.base_weights.partition("@")[2]:
        environment["OPTION_REVISION"] = revision
    body = {"ExecutionRoleArn": serving.role, "PrimaryContainer": container, "Tags": aws.TAGS}
    return {"ModelName": _hashed_name(serving.endpoint, "model", body), **body}


def endpoint_config_request(serving: Serving) -> dict:
    """The body of CreateEndpointConfig. The variant has no model, so the role is required here."""
    variant = {
        "VariantName": VARIANT,
        "InstanceType": serving.instance_type,
        "InitialInstanceCount": 1,
        "InferenceAmiVersion": machine_image(serving.image),
        **START_S,
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
        "ManagedInstanceScaling": {"Status": "ENABLED", "MinInstanceCount": 1, "MaxInstanceCount": 1},
    }
    body = {"ExecutionRoleArn": serving.role, "ProductionVariants": [variant], "Tags": aws.TAGS}
    return {"EndpointConfigName": _hashed_name(serving.endpoint, "config", body), **body}


def endpoint_request(serving: Serving) -> dict:
    config = endpoint_config_request(serving)["EndpointConfigName"]
    return {"EndpointName": serving.endpoint, "EndpointConfigName": config, "Tags": aws.TAGS}


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
        "Tags": aws.TAGS,
    }


def adapter_component_request(endpoint: str, adapter: str, artifact: str) -> dict:
    """The body of CreateInferenceComponent for an adapter, which runs wherever its base does."""
    return {"EndpointName": endpoint, **adapter_update_request(endpoint, adapter, artifact), "Tags": aws.TAGS}


def adapter_update_request(endpoint: str, adapter: str, artifact: str) -> dict:
    """The body of UpdateInferenceComponent that swaps an adapter in place."""
    specification = {"BaseInferenceComponentName": component_name(endpoint), "Container": {"ArtifactUrl": artifact}}
    return {"InferenceComponentName": component_name(endpoint, adapter), "Specification": specification}


def machine_image(image: str) -> str:
    """The machine image whose driver fits the CUDA of a container; a wrong one hangs in Creating, without any log."""
    cuda = re.search(r"[-_.]cu(\d{3})\b", image.rpartition(":")[2])
    if cuda and cuda[1].startswith("12"):
        return "al2-ami-sagemaker-inference-gpu-3-1"
    if cuda and cuda[1] == "130":
        return "al2023-ami-sagemaker-inference-gpu-4-1"
    raise ValueError(f"{image}: its tag names no CUDA version that is known here (cu12x or cu130), so no AMI is known")


def endpoint_name(name: str) -> str:
    """The name, if it leaves room for those that are made of it; ValueError if not."""
    if not aws.NAME.fullmatch(name) or len(name) > 39:
        raise ValueError(f"{name!r} is no name for an endpoint: letters, digits and inner hyphens, 39 at most")
    return name


def _hashed_name(endpoint: str, kind: str, body: dict) -> str:
    """A name for what does not change: another body has another name, the same body the same."""
    return aws_name(f"{endpoint}-{kind}-{aws.short_hash(json.dumps(body, sort_keys=True).encode())}")


def is_ours(endpoint: str, name: str, kind: str = "config") -> bool:
    """Whether a model or configuration was made here for this endpoint (and not for one with a longer name)."""
    return bool(re.fullmatch(rf"{re.escape(endpoint)}-{kind}-[0-9a-f]{{16}}", name))


# Adapters


def read_adapter(endpoint: str, text: str) -> Adapter:
    """The adapter that NAME=FOLDER names; ValueError if the folder holds none."""
    name, _, folder = text.partition("=")
    if not (name and folder):
        raise ValueError(f"--adapter {text}: write it as NAME=FOLDER")
    component_name(endpoint, name)
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"--adapter {text}: there is no folder {folder}")
    check_adapter(path)
    files = {one: (path / one).read_bytes() for one in ("adapter_config.json", "adapter_model.safetensors")}
    record = b""
    if (path / RECORD).is_file():
        record = (path / RECORD).read_bytes()
        read_json(path / RECORD)
    return Adapter(name, path, json.loads(files["adapter_config.json"]), files, record)


def lora_rank(config: Mapping) -> int:
    """The largest rank in an adapter_config.json."""
    return max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])


def served_rank(rank: int) -> int:
    """The least value of max_lora_rank that has room for a rank."""
    for allowed in RANKS:
        if allowed >= rank:
            return allowed
    raise ValueError(f"rank {rank} is above {RANKS[-1]}, the most that vLLM serves; train with a smaller --rank")


def endpoint_rank(wanted: int | None, adapters: Sequence[Adapter]) -> int:
    """The max_lora_rank of an endpoint: what is wanted, or room for these adapters and for some to come."""
    rank = wanted or max([MAX_RANK, *(lora_rank(one.config) for one in adapters)])
    return served_rank(min(rank, RANKS[-1]))  # an adapter above it is refused by its own check


def check_servable(config: Mapping) -> None:
    """ValueError if vLLM refuses, or would wrongly serve, an adapter with this adapter_config.json."""
    for name in ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "alora_invocation_tokens"):
        if config.get(name):
            raise ValueError(f"vLLM serves no adapter with {name}; train a plain LoRA")
    if config.get("bias", "none") != "none":
        raise ValueError(f"vLLM serves no adapter with bias {config['bias']!r}; train a plain LoRA")
    # Any other start takes from the base's weights what it gives the adapter, so the plain base is the wrong one.
    start = config.get("init_lora_weights", True)
    if start not in (True, False, None, "gaussian", "orthogonal"):
        raise ValueError(f"vLLM serves no adapter with init_lora_weights {start!r}; train a plain LoRA")
    served_rank(lora_rank(config))


def adapter_line(adapter: Adapter, weights: str, max_rank: int) -> str:
    """What is to be said of an adapter that can be served on this base, with this largest rank."""
    check_servable(adapter.config)
    rank = lora_rank(adapter.config)
    if rank > max_rank:
        raise ValueError(
            f"its rank {rank} is above the endpoint's --max-rank {max_rank}; deploy an endpoint with --max-rank "
            f"{served_rank(rank)}, or train with --rank {max_rank}"
        )
    if weights:
        check_base(adapter.folder, weights)
    trained = json.loads(adapter.record).get("base_model") if adapter.record else None
    return f"rank {rank}, " + (f"trained from {trained}" if trained else f"without {RECORD}, so its base is not known")


def record_uri(artifact: str) -> str:
    """Where the training_config.json of a deployed adapter lies: beside its archive."""
    return artifact.removesuffix(".tar.gz") + ".json"


def upload_adapter(account: Account, adapter: Adapter, uri: str) -> None:
    aws.upload(account, uri, aws.archive(adapter.files))
    if adapter.record:
        aws.upload(account, record_uri(uri), adapter.record)
    print(f"uploaded the adapter {adapter.name} to {uri}", flush=True)


# What is there


def describe_endpoint(account: Account, name: str) -> dict | None:
    client = account.client("sagemaker")
    return unless_gone(f"look at the endpoint {name}", lambda: client.describe_endpoint(EndpointName=name))


def describe_component(account: Account, name: str) -> dict | None:
    client = account.client("sagemaker")
    return unless_gone(f"look at {name}", lambda: client.describe_inference_component(InferenceComponentName=name))


def component_names(account: Account, endpoint: str) -> list[str]:
    pages = account.client("sagemaker").get_paginator("list_inference_components").paginate(EndpointNameEquals=endpoint)
    doing = f"list the inference components of {endpoint}"
    found = unless_gone(doing, lambda: [one for page in pages for one in page["InferenceComponents"]]) or []
    return sorted(one["InferenceComponentName"] for one in found)


def artifact_of(component: Mapping) -> str:
    """The archive that an adapter's component serves, by its description or a request; empty for another thing."""
    return component.get("Specification", {}).get("Container", {}).get("ArtifactUrl", "")


def running(account: Account, endpoint: str) -> Serving | None:
    """What an endpoint serves; None if there is no such endpoint. ValueError for one that is not ours or not whole."""
    client, found = account.client("sagemaker"), describe_endpoint(account, endpoint)
    if found is None:
        return None
    if not is_ours(endpoint, found.get("EndpointConfigName", "")):
        raise ValueError(f"there is an endpoint {endpoint} that was not made here; choose another name")
    component = describe_component(account, component_name(endpoint))
    status = component["InferenceComponentStatus"] if component else "not there"
    if status not in ("InService", "Updating"):
        raise ValueError(
            f"{endpoint} is half made: it is {found['EndpointStatus']}, its base model is {status}; wait for the "
            f"command that makes it, or delete it first: {deletion(account, endpoint)}"
        )
    with explained(f"look at the model of {endpoint}"):
        config = client.describe_endpoint_config(EndpointConfigName=found["EndpointConfigName"])
        model = client.describe_model(ModelName=component["Specification"]["ModelName"])
    environment = model["PrimaryContainer"]["Environment"]
    return Serving(
        endpoint=endpoint,
        role=model["ExecutionRoleArn"],
        image=model["PrimaryContainer"]["Image"],
        instance_type=config["ProductionVariants"][0]["InstanceType"],
        base_model=environment["BASE_MODEL"],
        base_weights=environment["BASE_WEIGHTS"],
        max_rank=int(environment["OPTION_MAX_LORA_RANK"]),
        max_length=int(environment["OPTION_MAX_MODEL_LEN"]),
    )


def deletion(account: Account, endpoint: str) -> str:
    return f"python scripts/delete_endpoint.py {endpoint} --region {account.region}"


# What is to be done


def plan_start(
    account: Account, wanted: Serving, adapters: Sequence[Adapter], bucket: str | None, weights: str, dry_run: bool
) -> EndpointPlan:
    """Make an endpoint, from the first step on. The role of `wanted` may be a name; its weights are found here."""
    checks, role = aws.check_account(account, wanted.role, bucket, wanted.instance_type)
    name = aws.bucket_name(account, bucket)
    home = f"s3://{name}/{aws.PREFIX}"
    checked(checks, "machine image", lambda: machine_image(wanted.image), "")
    model = hub_id(wanted.base_model) or wanted.base_model
    newest = Weights(model, f"{model}@main", model)  # where the Hub cannot be asked
    found = checked(checks, "weights", lambda: aws.find_weights(model, weights, home, dry_run), newest)
    check_adapters(checks, adapters, found.identity, wanted.max_rank)
    hourly = aws.price(account.region, wanted.instance_type)
    until = f"from the start until `{deletion(account, wanted.endpoint)}`"
    checks.append(Check("ok" if hourly else "warning", "cost", f"{rate(hourly)}, {until} ({aws.PRICED})"))
    steps = []
    if all(one.status != "failed" for one in checks):
        base = {"base_model": found.model, "base_weights": found.identity, "source": found.prefix}
        steps = start_steps(replace(wanted, role=role, **base), adapters, name)
    return EndpointPlan(checks, steps, adapters, found.model, hourly, found)


def start_steps(serving: Serving, adapters: Sequence[Adapter], bucket: str) -> list[Step]:
    steps = [
        Step("CreateModel", model_request(serving)),
        Step("CreateEndpointConfig", endpoint_config_request(serving)),
        Step("CreateEndpoint", endpoint_request(serving)),
        Step("CreateInferenceComponent", base_component_request(serving)),
    ]
    for adapter in adapters:
        body = adapter_component_request(serving.endpoint, adapter.name, adapter.uri(bucket))
        steps.append(Step("CreateInferenceComponent", body))
    return steps


def plan_change(
    account: Account, now: Serving, adapters: Sequence[Adapter], removed: Sequence[str], bucket: str
) -> EndpointPlan:
    """Add, swap and remove adapters of an endpoint that serves."""
    endpoint, hourly = now.endpoint, aws.price(account.region, now.instance_type)
    checks = [Check("ok", "base", f"{now.base_model} serves on {endpoint} for {rate(hourly)}, as before")]
    check_adapters(checks, adapters, now.base_weights, now.max_rank)
    steps, uploads = [], []
    for name in removed:
        steps.append(Step("DeleteInferenceComponent", {"InferenceComponentName": component_name(endpoint, name)}))
    for adapter in adapters:
        if needed := adapter_steps(account, endpoint, adapter.name, adapter.uri(bucket)):
            steps += needed
            uploads.append(adapter)
    return EndpointPlan(checks, steps, uploads, now.base_model, hourly)


def adapter_steps(account: Account, endpoint: str, adapter: str, uri: str) -> list[Step]:
    """What makes a running endpoint serve this archive as an adapter; nothing where it does already."""
    name = component_name(endpoint, adapter)
    found = describe_component(account, name)
    create = Step("CreateInferenceComponent", adapter_component_request(endpoint, adapter, uri))
    if found is None:
        return [create]
    if found["EndpointName"] != endpoint:
        raise ValueError(f"{name} belongs to the endpoint {found['EndpointName']}; choose another adapter name")
    if found["InferenceComponentStatus"] == "Failed":
        return [Step("DeleteInferenceComponent", {"InferenceComponentName": name}), create]
    if found["InferenceComponentStatus"] != "InService":
        raise ValueError(f"{name} is {found['InferenceComponentStatus']}; wait some minutes and repeat the command")
    if artifact_of(found) == uri:
        return []
    return [Step("UpdateInferenceComponent", adapter_update_request(endpoint, adapter, uri))]


def check_adapters(checks: list[Check], adapters: Sequence[Adapter], weights: str, max_rank: int) -> None:
    for one in adapters:
        checked(checks, f"adapter {one.name}", lambda one=one: adapter_line(one, weights, max_rank), "")


def rate(hourly: float | None) -> str:
    if hourly is None:
        return "a price an hour that is not known here"
    return f"${hourly:.2f} an hour (${24 * hourly:.2f} a day)"


# Doing it


def take(account: Account, step: Step, max_wait_s: float, poll_s: float) -> None:
    """Send one request and wait until what it makes serves, or what it deletes is gone."""
    client, body = account.client("sagemaker"), step.body
    name = body.get("InferenceComponentName") or next(iter(body.values()))
    if step.operation == "DeleteInferenceComponent":
        delete_component(account, name, max_wait_s, poll_s)
        return
    with explained(f"make {name}"):
        if step.operation == "CreateModel":
            client.create_model(**body)
        elif step.operation == "CreateEndpointConfig":
            client.create_endpoint_config(**body)
        elif step.operation == "CreateEndpoint":
            client.create_endpoint(**body)
        elif step.operation == "CreateInferenceComponent":
            client.create_inference_component(**body)
        else:
            client.update_inference_component(**body)
    if step.operation == "CreateEndpoint":
        wait_for_endpoint(account, name, max_wait_s, poll_s)
    elif "InferenceComponentName" in body:
        wait_for_component(account, name, max_wait_s, poll_s)


def wait_for_endpoint(account: Account, name: str, max_wait_s: float, poll_s: float) -> None:
    from botocore.exceptions import WaiterError

    waiter = account.client("sagemaker").get_waiter("endpoint_in_service")
    try:
        waiter.wait(EndpointName=name, WaiterConfig=pause(max_wait_s, poll_s))
    except WaiterError as error:
        hint = "no log and no end mean an AMI that does not fit the image's CUDA, or no instance free"
        status = error.last_response.get("EndpointStatus", error.last_response.get("Error"))
        raise ValueError(not_serving(name, status, error.last_response, hint)) from None


def wait_for_component(account: Account, name: str, max_wait_s: float, poll_s: float) -> None:
    """Wait until a component serves; boto3 has no waiter for it."""
    end = time.monotonic() + max_wait_s
    while True:
        found = describe_component(account, name)
        if found is None:
            raise ValueError(f"{name} is gone; did somebody delete it?")
        status = found["InferenceComponentStatus"]
        if status == "InService":
            return
        if status not in ("Creating", "Updating") or time.monotonic() > end:
            log = f"aws logs tail /aws/sagemaker/InferenceComponents/{name} --since 1h --region {account.region}"
            raise ValueError(not_serving(name, status, found, f"log: {log}"))
        time.sleep(poll_s)


def not_serving(name: str, status: object, description: Mapping, hint: str) -> str:
    reason = aws.printed(description.get("FailureReason", "no reason is given"))
    return f"{name} is {status}: {reason}{aws.advice(reason)}; {hint}"


# Deleting


def remaining(account: Account, endpoint: str) -> list[tuple[str, str]]:
    """(kind, name) of everything that belongs to an endpoint, also to a half-made one, in the order of deletion."""
    client, base = account.client("sagemaker"), component_name(endpoint)
    with explained(f"list what belongs to {endpoint}"):
        pages = client.get_paginator("list_endpoint_configs").paginate(NameContains=f"{endpoint}-config-")
        configs = [one["EndpointConfigName"] for page in pages for one in page["EndpointConfigs"]]
        pages = client.get_paginator("list_models").paginate(NameContains=f"{endpoint}-model-")
        models = [one["ModelName"] for page in pages for one in page["Models"]]
    components = component_names(account, endpoint)
    found = [("inference component", name) for name in components if name != base]
    found += [("inference component", name) for name in components if name == base]
    if describe_endpoint(account, endpoint):
        found.append(("endpoint", endpoint))
    found += [("endpoint configuration", name) for name in configs if is_ours(endpoint, name, "config")]
    found += [("model", name) for name in models if is_ours(endpoint, name, "model")]
    return found


def delete_all(account: Account, things: Sequence[tuple[str, str]], max_wait_s: float, poll_s: float) -> None:
    """Delete what `remaining` found; ValueError for the first thing that cannot be deleted. Gone is fine."""
    client = account.client("sagemaker")
    for kind, name in things:
        doing = f"delete the {kind} {name}"
        if kind == "inference component":
            delete_component(account, name, max_wait_s, poll_s)
        elif kind == "endpoint":
            unless_gone(doing, lambda name=name: client.delete_endpoint(EndpointName=name))
            with explained(doing):
                client.get_waiter("endpoint_deleted").wait(EndpointName=name, WaiterConfig=pause(max_wait_s, poll_s))
        elif kind == "endpoint configuration":
            unless_gone(doing, lambda name=name: client.delete_endpoint_config(EndpointConfigName=name))
        else:
            unless_gone(doing, lambda name=name: client.delete_model(ModelName=name))
        print(f"deleted {kind} {name}", flush=True)


def delete_component(account: Account, name: str, max_wait_s: float, poll_s: float) -> None:
    client, end = account.client("sagemaker"), time.monotonic() + max_wait_s
    unless_gone(f"delete {name}", lambda: client.delete_inference_component(InferenceComponentName=name))
    while found := describe_component(account, name):
        if time.monotonic() > end:
            raise ValueError(f"{name} is still {found['InferenceComponentStatus']} after --max-wait")
        time.sleep(poll_s)


def pause(max_wait_s: float, poll_s: float) -> dict:
    """How long boto3's waiters wait."""
    return {"Delay": poll_s, "MaxAttempts": max(1, round(max_wait_s / poll_s))}
