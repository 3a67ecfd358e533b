"""Endpoints on SageMaker, from request body to deletion, against the stand-in for AWS in fake_sagemaker.py."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from io import BytesIO
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import boto3
import botocore.endpoint
import botocore.loaders
import botocore.session
import numpy as np
import pytest
from fake_sagemaker import Fake, problems, service_model
from safetensors.numpy import save_file

import command_line
import model_files
import predictions
import sagemaker_job as cloud

ROOT = Path(__file__).parent.parent
FAST = ("--poll-seconds", "0.001")
EXPIRED = ("ExpiredTokenException", "The security token included in the request is expired")
LOADER = botocore.loaders.create_loader()


def script(name):
    """A script as a module, by path: tests/test_endpoint.py has the name of one of them."""
    specification = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


deploying, deleting, asking = map(script, ("deploy_sagemaker", "delete_endpoint", "test_endpoint"))


@pytest.fixture
def fake(monkeypatch):
    """AWS, with a role, and this process's boto3 pointed at it; retries do not sleep."""
    real = boto3.Session

    def quick_session():  # parsing the models of the services is most of what a new session costs
        session = botocore.session.Session()
        session.register_component("data_loader", LOADER)
        return session

    monkeypatch.setattr(botocore.session, "get_session", quick_session)
    monkeypatch.setattr(boto3, "Session", lambda **options: real(botocore_session=quick_session(), **options))
    monkeypatch.setattr(botocore.endpoint, "time", SimpleNamespace(sleep=lambda s: None, time=time.time))
    with Fake(ticks=1) as fake:
        for name, value in fake.env.items():
            monkeypatch.setenv(name, value)
        fake.role("SageMakerExecutionRole")
        yield fake


@pytest.fixture
def command(capsys):
    """Run a script in this process -> what a shell would see."""

    def run(module, *argv):
        capsys.readouterr()
        code = 0
        try:
            command_line.run(lambda: module.main([*map(str, argv)]))
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        if code == 2:  # an error is one line, and nothing in it is a traceback
            assert err.count("error: ") == 1 and len(err.strip().splitlines()) == 1 + err.count("note: "), err
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def deploy(command):
    return lambda *argv: command(deploying, *argv, *FAST)


@pytest.fixture
def delete(command):
    return lambda *argv: command(deleting, *argv, *FAST)


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model's; nobody computes with it."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 2048}')
    save_file({"weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path, model):
    """Make a LoRA folder as fine_tune_model.py leaves it: adapter("a", r=8)."""

    def make(name, base_weights=None, value=0.0, **config):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        plain = {"peft_type": "LORA", "r": 4, "bias": "none", "init_lora_weights": True}
        (folder / "adapter_config.json").write_text(json.dumps(plain | config))
        save_file({"lora_A": np.full(3, value, np.float32)}, folder / "adapter_model.safetensors")
        record = {"base_model": str(model), "base_weights": base_weights or deploying.model_files.folder_hash(model)}
        (folder / "training_config.json").write_text(json.dumps(record))
        return folder

    return make


@pytest.fixture
def impatient(monkeypatch):
    """A clock on which half a minute passes at every look at it."""
    ticks = count(0, 30.0)
    clock = SimpleNamespace(monotonic=lambda: next(ticks), sleep=lambda s: None, time=time.time)
    monkeypatch.setattr(cloud, "time", clock)


class Serving:
    """Loads everything but what `refuses` names -> the reason."""

    def __init__(self, **refuses):
        self.refuses, self.loaded = refuses, []

    def load(self, fake, component):
        if reason := self.refuses.get(component.name.replace("-", "_")):
            raise ValueError(reason)
        self.loaded.append((component.name, component.artifact_url))

    def unload(self, name):
        pass


def bodies(out):
    """[(operation, body)] that a dry run printed."""
    found = re.findall(r"^(\w+)\n(\{\n.*?^\})$", out, re.M | re.S)
    return [(operation, json.loads(body)) for operation, body in found]


def wrong(operation, body):
    """What AWS's own description of an operation does not allow in a body; botocore itself checks little of it."""
    return list(problems(service_model("sagemaker").operation_model(operation).input_shape, body))


# Request bodies


IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/djl-inference:0.36.0-lmi28.0.0-cu130"
SERVING = cloud.Serving(
    endpoint="demo",
    role="arn:aws:iam::123456789012:role/SageMakerExecutionRole",
    image=IMAGE,
    instance_type="ml.g6e.2xlarge",
    base_model="meta-llama/Llama-3.1-8B-Instruct",
    base_weights="meta-llama/Llama-3.1-8B-Instruct@0e9e39f2",
    source="s3://bucket/calibrated-confidence/weights/x/",
    max_rank=64,
    max_length=4096,
)


@pytest.mark.parametrize(
    "serving",
    [
        SERVING,
        replace(SERVING, source=None, endpoint="a" * 39),
        replace(SERVING, base_model="/home/müller/models (old)/tiny, *", base_weights="0123456789abcdef"),
        replace(SERVING, image=IMAGE.replace("cu130", "cu129"), instance_type="ml.g5.2xlarge"),
    ],
)
def test_every_body_is_one_that_aws_accepts(serving):
    assert wrong("CreateModel", cloud.model_request(serving)) == []
    assert wrong("CreateEndpointConfig", cloud.endpoint_config_request(serving)) == []
    assert wrong("CreateEndpoint", cloud.endpoint_request(serving)) == []
    assert wrong("CreateInferenceComponent", cloud.base_component_request(serving)) == []
    uri = "s3://bucket/calibrated-confidence/adapters/x-1.tar.gz"
    assert wrong("CreateInferenceComponent", cloud.adapter_component_request(serving.endpoint, "x", uri)) == []
    assert wrong("UpdateInferenceComponent", cloud.adapter_update_request(serving.endpoint, "x", uri)) == []


def test_a_container_without_weights_fetches_one_commit_from_the_hub():
    environment = cloud.model_request(replace(SERVING, source=None))["PrimaryContainer"]["Environment"]
    assert environment["HF_MODEL_ID"] == SERVING.base_model and environment["OPTION_REVISION"] == "0e9e39f2"
    container = cloud.model_request(SERVING)["PrimaryContainer"]
    assert container["Environment"]["HF_MODEL_ID"] == "/opt/ml/model"
    assert container["ModelDataSource"]["S3DataSource"]["S3Uri"] == SERVING.source
    assert "ModelDataSource" not in cloud.model_request(replace(SERVING, source=None))["PrimaryContainer"]


def test_another_model_has_another_name_and_the_same_one_the_same():
    names = {cloud.model_request(one)["ModelName"] for one in (SERVING, SERVING, replace(SERVING, max_rank=128))}
    assert len(names) == 2 and all(cloud.is_ours("demo", name, "model") for name in names)
    assert not any(cloud.is_ours("dem", name, "model") or cloud.is_ours("demo-2", name, "model") for name in names)
    assert not cloud.is_ours("demo", "demo-2-config-0123456789abcdef")


@pytest.mark.parametrize(
    ("tag", "ami"),
    [
        ("0.36.0-lmi28.0.0-cu130", "al2023-ami-sagemaker-inference-gpu-4-1"),
        ("0.34.0-lmi24.0.0-cu129", "al2-ami-sagemaker-inference-gpu-3-1"),
        ("0.31.0-lmi13.0.0-cu124", "al2-ami-sagemaker-inference-gpu-3-1"),
        ("0.26.0-gpu-py312-cu130-ubuntu22.04-sagemaker", "al2023-ami-sagemaker-inference-gpu-4-1"),
        ("0.99.0-lmi99.0.0-cu140", None),
        ("latest", None),
    ],
)
def test_the_machine_image_follows_from_the_cuda_of_the_container(tag, ami):
    if ami:
        assert cloud.ami(f"1.dkr.ecr.us-east-1.amazonaws.com/djl-inference:{tag}") == ami
    else:
        with pytest.raises(ValueError, match="no CUDA version that is known"):
            cloud.ami(f"1.dkr.ecr.us-east-1.amazonaws.com/djl-inference-cu130:{tag}")


def test_names_are_checked_with_what_is_made_of_them():
    assert cloud.component_name("demo") == "demo-base" and cloud.component_name("demo", "a-1") == "demo-adapter-a-1"
    for endpoint, name in (("demo", "a_b"), ("demo", "-a"), ("demo", ""), ("demo", "a" * 60), ("a b", None)):
        with pytest.raises(ValueError, match="is no name on AWS"):
            cloud.component_name(endpoint, name)
    for name in ("a" * 40, "my_endpoint", "demo-", "über"):
        with pytest.raises(ValueError, match="39 at most"):
            cloud.endpoint_name(name)


# Adapters


def test_the_rank_is_the_largest_and_is_rounded_up_to_one_that_vllm_has():
    assert cloud.lora_rank({"r": 4, "rank_pattern": {"q_proj": 24}}) == 24
    assert [cloud.served_rank(rank) for rank in (1, 2, 8, 9, 33, 257, 512)] == [1, 8, 8, 16, 64, 320, 512]
    with pytest.raises(ValueError, match="rank 513 is above 512"):
        cloud.served_rank(513)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        *(
            ({"init_lora_weights": kind}, kind)
            for kind in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "eva")
        ),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"rank_pattern": {"q_proj": 1024}}, "rank 1024 is above 512"),
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
    ],
)
def test_what_vllm_refuses_is_refused_here(config, named):
    plain = {"peft_type": "LORA", "r": 8}
    cloud.check_servable(plain | {"init_lora_weights": "gaussian", "use_rslora": True})
    with pytest.raises(ValueError, match=re.escape(named)):
        cloud.check_servable(plain | config)


# A dry run


def start(environment, *argv):
    """A script in a process of its own."""
    command = [sys.executable, *map(str, argv)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_dry_run_needs_no_credentials_and_prints_bodies_that_aws_accepts(model, adapter, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    environment |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    arguments = ("demo", "--model", model, "--adapter", f"a={adapter('a')}", "--dry-run")
    process = start(environment, "scripts/deploy_sagemaker.py", *arguments)
    done = SimpleNamespace(**dict(zip(("stdout", "stderr"), process.communicate(), strict=True)))
    assert (process.returncode, done.stderr) == (0, "")
    assert "no credentials, so nothing on AWS is checked" in done.stdout
    printed = bodies(done.stdout)
    assert [operation for operation, _ in printed] == [
        *("CreateModel", "CreateEndpointConfig", "CreateEndpoint"),
        *("CreateInferenceComponent", "CreateInferenceComponent"),
    ]
    assert [wrong(*one) for one in printed] == [[]] * 5
    assert "$2.80 an hour ($67.20 a day)" in done.stdout and "python scripts/delete_endpoint.py demo" in done.stdout


def test_a_dry_run_with_credentials_changes_nothing(fake, deploy, model, adapter):
    done = deploy("demo", "--model", model, "--adapter", f"a={adapter('a')}", "--dry-run")
    assert done.code == 0 and [wrong(*one) for one in bodies(done.out)] == [[]] * 5
    changing = ("Create", "Put", "Update", "Delete")
    assert [r.operation for r in fake.requests if r.operation.startswith(changing)] == ["CreateRole"]


# The whole story


def test_deploy_repeat_swap_add_remove_and_delete(fake, deploy, delete, model, adapter):
    fake.serving = Serving()
    flags = ("demo", "--model", model, "--yes")
    two = ("--adapter", f"a={adapter('a')}", f"b={adapter('b', value=1.0)}")
    done = deploy(*flags, *two)
    assert done.code == 0, done.err
    steps = re.findall(r"^(?:model|endpoint|inference)[^:\n]*: .* \(\d+ s\)$", done.out, re.M)
    assert len(steps) == 6  # one line a step
    assert "the adapters a, b" in done.out and "$2.80 an hour ($67.20 a day)" in done.out
    assert f'--endpoint sagemaker:demo/a --tokenizer {model} "Not bad"' in done.out
    assert [name for name, _ in fake.serving.loaded] == ["demo-base", "demo-adapter-a", "demo-adapter-b"]

    s3 = fake.client("s3")
    bucket = f"sagemaker-{fake.region}-{fake.account}"
    keys = [one["Key"] for one in s3.list_objects_v2(Bucket=bucket)["Contents"]]
    weights = re.sub(r"^s3://[^/]+/", "", model_source(fake))
    assert sorted(key.removeprefix(weights) for key in keys if key.startswith(weights)) == [
        *("config.json", "model.safetensors")
    ]
    _, artifact = fake.serving.loaded[1]
    key = artifact.removeprefix(f"s3://{bucket}/")
    with tarfile.open(fileobj=BytesIO(s3.get_object(Bucket=bucket, Key=key)["Body"].read())) as tar:
        assert sorted(tar.getnames()) == ["adapter_config.json", "adapter_model.safetensors"]
    record = s3.get_object(Bucket=bucket, Key=key.replace(".tar.gz", ".json"))["Body"].read()
    assert json.loads(record)["base_model"] == str(model)

    made = len(fake.requests)
    again = deploy(*flags, *two)
    assert again.code == 0 and "nothing to do" in again.out
    changing = ("Create", "Put", "Update", "Delete")
    assert not [r.operation for r in fake.requests[made:] if r.operation.startswith(changing)]

    adapter("a", value=2.0)
    swapped = deploy("demo", "--adapter", f"a={adapter('a', value=2.0)}")  # no question: it costs nothing more
    assert swapped.code == 0 and "demo-adapter-a: swapped" in swapped.out
    assert fake.serving.loaded[-1][0] == "demo-adapter-a" and fake.serving.loaded[-1][1] != artifact
    assert len(fake.calls("UpdateInferenceComponent")) == 1

    planned = deploy("demo", "--adapter", f"c={adapter('c')}", "--remove", "a", "--dry-run")
    assert [operation for operation, _ in bodies(planned.out)] == [
        *("DeleteInferenceComponent", "CreateInferenceComponent")
    ]
    changed = deploy("demo", "--adapter", f"c={adapter('c')}", "--remove", "a", "nobody")
    assert changed.code == 0 and "note: demo has no adapter nobody" in changed.err
    assert sorted(fake.components) == ["demo-adapter-b", "demo-adapter-c", "demo-base"]

    planned = delete("demo", "--dry-run")
    assert planned.code == 0 and planned.out.count("would delete") == 6 and len(fake.left_behind()) == 6
    done = delete("demo")
    assert done.code == 0 and f"nothing of demo is left; uploads in s3://{bucket}/" in done.out
    assert fake.left_behind() == []
    order = [r.params for r in fake.requests if r.operation.startswith("Delete")][1:]
    assert [next(iter(body.values())).partition("-config-")[0].partition("-model-")[0] for body in order] == [
        *("demo-adapter-b", "demo-adapter-c", "demo-base", "demo", "demo", "demo")
    ]
    nothing = delete("demo")
    assert nothing.code == 0 and "there is nothing of demo" in nothing.out


def model_source(fake):
    return next(iter(fake.models.values())).request["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"]


def test_an_endpoint_with_a_longer_name_is_not_touched(fake, deploy, delete, model, adapter):
    fake.quotas = {"ml.g6e.2xlarge for endpoint usage": 2.0}
    for name in ("demo", "demo-2"):
        assert deploy(name, "--model", model, "--adapter", f"a={adapter('a')}", "--yes").code == 0
    assert delete("demo").code == 0
    assert all(name.startswith("demo-2") for name in fake.left_behind()) and len(fake.left_behind()) == 5
    assert delete("demo-2").code == 0 and fake.left_behind() == []


def test_pages_of_lists_are_read_to_their_end(fake, deploy, delete, model, adapter):
    fake.page_size = 1
    named = [f"{name}={adapter(name, value=i)}" for i, name in enumerate(("a", "b", "c"))]
    assert "adapters a, b, c" in deploy("demo", "--model", model, "--adapter", *named, "--yes").out
    assert delete("demo").code == 0 and fake.left_behind() == []


# Refused before anything costs or changes


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        ({"quotas": {}}, (), r"quota: 'ml.g6e.2xlarge for endpoint usage' is 0"),
        ({"images": {"djl-inference:old-cu124"}}, (), "image: "),
        ({}, ("--image", f"{IMAGE[:-5]}cu140"), "machine image: "),
        ({}, ("--instance-type", "ml.m5.large"), "instance type: ml.m5.large has no NVIDIA GPU"),
        ({}, ("--instance-type", "ml.banana"), "instance type: no ml.banana"),
        ({}, ("--role", "nobody"), "role: "),
        ({}, ("--bucket", "sagemaker-of-nobody"), "bucket: no bucket sagemaker-of-nobody"),
        ({}, ("--max-length", "4096"), "length: --max-length 4096 is above the 2048 tokens"),
        ({}, ("--weights", "s3://sagemaker-us-east-1-123456789012/x"), "weights: "),
        ({}, ("--model", "./nowhere"), r"weights: no such model folder: ./nowhere \(and adapter a\)|weights: no such"),
        ({}, ("--max-rank", "1"), "adapter a: its rank 4 is above 1, .* --max-rank 8, or train with --rank 1"),
    ],
)
def test_what_can_not_work_is_refused_before_the_start(fake, deploy, model, adapter, change, flags, said):
    for name, value in change.items():
        setattr(fake, name, value)
    done = deploy("demo", "--model", model, "--adapter", f"a={adapter('a')}", "--yes", *flags)
    assert done.code == 2 and re.search(f"nothing is started or changed: ({said})", done.err), done.err
    assert fake.left_behind() == [] and not fake.calls("CreateModel")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "adapter a: vLLM serves no adapter with DoRA"),
        ({"r": 1024}, "adapter a: rank 1024 is above 512"),
        ({"base_weights": "0123456789abcdef"}, r"adapter a: the adapter in \S+ was trained from other weights"),
    ],
)
def test_an_adapter_that_can_not_be_served_is_refused(fake, deploy, model, adapter, config, said):
    done = deploy("demo", "--model", model, "--adapter", f"a={adapter('a', **config)}", "--yes")
    assert done.code == 2 and re.search(said, done.err) and fake.left_behind() == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("my_endpoint",), "is no name for an endpoint"),
        (("demo", "--adapter", "a"), "write it as NAME=FOLDER"),
        (("demo", "--adapter", "a=/nowhere"), "there is no folder /nowhere"),
        (("demo", "--adapter", "a_b=."), "'a_b' is no name on AWS"),
        (("demo", "--adapter", f"a={ROOT / 'scripts'}"), "is not a LoRA adapter"),
        (("demo", "--adapter", "a=x", "--remove", "a"), "the adapter a is named twice"),
        (("demo", "--weights", "http://x"), "auto, upload, or an s3:// address"),
        (("demo", "--max-wait", "soon"), "--max-wait"),
        (("demo", "--max-rank", "0"), "at least 1"),
        (("demo", "--poll-seconds", "0"), "--poll-seconds"),
        (("demo", "--region", "mars-1"), "no images are known for region 'mars-1'"),
    ],
)
def test_bad_flags_are_one_line(command, argv, said):
    done = command(deploying, *argv)
    assert done.code == 2 and said in done.err


def test_money_is_spent_only_after_a_yes(fake, deploy, delete, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    done = deploy("demo", "--model", model)
    assert done.code == 2 and "add --yes" in done.err and fake.left_behind() == []
    asked = []
    monkeypatch.setattr(cloud, "confirm", asked.append)
    assert deploy("demo", "--model", model).code == 0
    assert asked == ["Start demo for $2.80 an hour ($67.20 a day), until it is deleted?"]
    assert delete("demo").code == 0


def test_a_running_endpoint_refuses_what_it_was_not_started_for(fake, deploy, delete, model, adapter, tmp_path):
    assert deploy("demo", "--model", model, "--max-rank", "8", "--yes").code == 0
    before = len(fake.requests)
    done = deploy("demo", "--adapter", f"good={adapter('good')}", f"big={adapter('big', r=32)}")
    assert done.code == 2 and "adapter big: its rank 32 is above 8" in done.err and "--max-rank 32" in done.err
    done = deploy("demo", "--adapter", f"other={adapter('other', base_weights='0123456789abcdef')}")
    assert done.code == 2 and "was trained from other weights (0123456789abcdef)" in done.err
    other = tmp_path / "other-model"
    shutil.copytree(model, other)
    save_file({"weight": np.ones(3, np.float32)}, other / "model.safetensors")
    for flags in (
        ("--model", other),
        ("--model", "llama"),
        ("--instance-type", "ml.g5.2xlarge"),
        ("--max-rank", "64"),
        ("--max-length", "100"),
        ("--role", "Another"),
        ("--image", IMAGE.replace("lmi28", "lmi29")),
    ):
        done = deploy("demo", "--adapter", f"good={adapter('good')}", *flags)
        assert done.code == 2 and f"not with {flags[0]}" in done.err and "delete_endpoint.py demo" in done.err
    changing = ("Create", "Put", "Update", "Delete")
    assert not [r.operation for r in fake.requests[before:] if r.operation.startswith(changing)]
    assert delete("demo").code == 0


def test_an_endpoint_of_somebody_else_is_neither_used_nor_deleted(fake, deploy, delete, model):
    sagemaker = fake.client("sagemaker")
    config = cloud.endpoint_config_request(replace(SERVING, endpoint="demo")) | {"EndpointConfigName": "production"}
    sagemaker.create_endpoint_config(**config)
    sagemaker.create_endpoint(EndpointName="demo", EndpointConfigName="production")
    done = deploy("demo", "--model", model, "--yes")
    assert done.code == 2 and "that was not made here" in done.err
    done = delete("demo")
    assert done.code == 2 and "was not made by deploy_sagemaker.py and is left as it is" in done.err
    assert fake.left_behind() == ["demo", "production"]


# Failures after something costs


def test_an_endpoint_that_hangs_is_named_with_its_cost_and_can_be_deleted_later(
    fake, deploy, delete, model, adapter, impatient
):
    fake.stuck = {"demo"}
    done = deploy("demo", "--model", model, "--yes")
    assert done.code == 2 and "demo is still Creating after 30 minutes (--max-wait)" in done.err
    for words in ("CUDA leaves no log", "no such instance free", "demo is Creating and costs $2.80 an hour"):
        assert words in done.err
    assert done.err.strip().endswith("`python scripts/delete_endpoint.py demo --region us-east-1` deletes it")
    done = delete("demo")  # AWS deletes nothing that is on its way
    assert done.code == 1 and "Cannot update in-progress endpoint" in done.err and "costs $2.80 an hour" in done.err
    assert "demo" in fake.left_behind()
    fake.stuck = set()
    assert delete("demo").code == 0 and fake.left_behind() == []


def test_a_base_that_hangs_says_where_its_log_is(fake, deploy, delete, model, impatient):
    fake.stuck = {"demo-base"}
    done = deploy("demo", "--model", model, "--yes")
    assert done.code == 2 and "demo-base is still Creating" in done.err
    assert "aws logs tail /aws/sagemaker/InferenceComponents/demo-base" in done.err
    assert "demo is InService and costs $2.80 an hour" in done.err
    fake.stuck, fake.components["demo-base"].left = set(), 9
    done = deploy("demo", "--model", model)  # goes on, and asks nothing: the instance runs already
    assert done.code == 0 and "endpoint demo: was there" in done.out
    assert delete("demo").code == 0 and fake.left_behind() == []


@pytest.mark.parametrize(
    ("component", "reason", "advice"),
    [
        ("demo_adapter_a", "LoRA rank 32 is greater than max_lora_rank 16.", "a larger --max-rank"),
        ("demo_base", "torch.OutOfMemoryError: CUDA out of memory.", "a smaller --max-length"),
    ],
)
def test_a_component_that_fails_gives_reason_advice_log_and_cost(
    fake, deploy, delete, model, adapter, component, reason, advice
):
    fake.serving = Serving(**{component: reason})
    flags = ("demo", "--model", model, "--adapter", f"a={adapter('a')}", "--yes")
    done, name = deploy(*flags), component.replace("_", "-")
    assert done.code == 2 and f"{name} is Failed: {reason}; " in done.err and advice in done.err
    assert f"aws logs tail /aws/sagemaker/InferenceComponents/{name} " in done.err
    assert "demo is InService and costs $2.80 an hour" in done.err and "delete_endpoint.py demo" in done.err
    fake.serving = Serving()
    done = deploy(*flags)  # what failed is replaced
    assert done.code == 0 and f"deleted inference component {name}" in done.out
    assert delete("demo").code == 0 and fake.left_behind() == []


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("GatedRepoError: 401 Client Error", "--weights upload"),
        ("User-specified max_model_len (4096) is greater than the derived", "a smaller --max-length"),
        ("AccessDenied when reading s3://bucket/x", "the role may not do that"),
        ("CapacityError: please retry using a different ML instance type", "another --instance-type or --region"),
    ],
)
def test_other_reasons_have_their_advice(monkeypatch, reason, advice):
    failed = {"EndpointStatus": "Failed", "FailureReason": reason}
    monkeypatch.setattr(cloud, "look", lambda *_: failed)
    with pytest.raises(ValueError, match=re.escape(f"demo is Failed: {reason}; ") + ".*" + advice):
        cloud.wait_in_service(cloud.Aws("us-east-1", None, None), "endpoint", "demo", 60, 0.01)


def test_without_capacity_the_endpoint_fails_and_the_same_command_tries_again(fake, deploy, delete, model):
    fake.failing = {
        "demo": "Unable to provision requested ML compute capacity due to InsufficientInstanceCapacity error."
    }
    done = deploy("demo", "--model", model, "--yes")
    assert done.code == 2 and "InsufficientInstanceCapacity" in done.err and "AWS has none free" in done.err
    assert "the failed endpoint demo is left and runs nothing" in done.err
    fake.failing = {}
    assert deploy("demo", "--model", model, "--yes").code == 0
    assert delete("demo").code == 0 and fake.left_behind() == []


def test_a_failed_swap_is_told_and_mended(fake, deploy, delete, model, adapter):
    assert deploy("demo", "--model", model, "--adapter", f"a={adapter('a')}", "--yes").code == 0
    fake.serving = Serving(demo_adapter_a="adapter config missing")
    done = deploy("demo", "--adapter", f"a={adapter('a', value=1.0)}")
    assert done.code == 2 and "demo-adapter-a is Failed: adapter config missing" in done.err
    assert "demo is InService and costs" in done.err
    fake.serving = Serving()
    assert deploy("demo", "--adapter", f"a={adapter('a', value=1.0)}").code == 0
    assert delete("demo").code == 0 and fake.left_behind() == []


@pytest.mark.parametrize(
    ("operation", "exists"),
    [
        ("CreateModel", "there is no endpoint demo, so nothing is billed"),
        ("CreateEndpoint", "there is no endpoint demo, so nothing is billed"),
        ("CreateInferenceComponent", "the endpoint demo is InService and costs $2.80 an hour"),
        ("ListInferenceComponents", "the endpoint demo is InService and costs $2.80 an hour"),
    ],
)
def test_a_deploy_that_breaks_off_anywhere_is_continued_by_the_same_command(
    fake, deploy, delete, model, adapter, operation, exists
):
    flags = ("demo", "--model", model, "--adapter", f"a={adapter('a')}", "--yes")
    fake.fail(operation, "AccessDeniedException", "User is not authorized to perform this")
    done = deploy(*flags)
    assert done.code == 2 and "you may not" in done.err and exists in done.err, done.err
    assert deploy(*flags).code == 0
    assert delete("demo").code == 0 and fake.left_behind() == []


def test_credentials_that_expire_in_the_middle(fake, deploy, delete, model, monkeypatch):
    real = cloud.wait_in_service

    def expire(aws, kind, name, *waits):
        if kind == "inference_component":
            fake.fail("*", *EXPIRED, times=3)
        return real(aws, kind, name, *waits)

    monkeypatch.setattr(cloud, "wait_in_service", expire)
    done = deploy("demo", "--model", model, "--yes")
    assert done.code == 2 and "have expired" in done.err
    assert "the endpoint demo may exist and cost $2.80 an hour" in done.err and "delete_endpoint.py demo" in done.err
    monkeypatch.undo()
    for name, value in fake.env.items():
        monkeypatch.setenv(name, value)
    fake._injected.clear()
    assert deploy("demo", "--model", model).code == 0
    assert delete("demo").code == 0 and fake.left_behind() == []


def test_throttling_is_waited_out(fake, deploy, delete, model):
    fake.ticks = 3
    fake.fail("DescribeEndpoint", "ThrottlingException", "Rate exceeded", times=3)
    fake.fail("CreateEndpoint", "ThrottlingException", "Rate exceeded", times=2)
    assert deploy("demo", "--model", model, "--yes").code == 0
    fake.fail("DeleteEndpoint", "ThrottlingException", "Rate exceeded", times=7)  # more than boto3 tries by itself
    assert delete("demo").code == 0 and fake.left_behind() == []


def test_ctrl_c_says_what_goes_on_and_costs(fake, deploy, delete, model, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cloud, "wait_in_service", interrupt)
        done = deploy("demo", "--model", model, "--yes")
    assert done.code == 130 and "the endpoint demo is InService and costs $2.80 an hour" in done.err
    assert "`python scripts/delete_endpoint.py demo --region us-east-1` deletes it" in done.err
    with monkeypatch.context() as patch:
        patch.setattr(cloud, "delete_all", interrupt)
        done = delete("demo")
    assert done.code == 130 and "may cost $2.80 an hour" in done.err
    assert delete("demo").code == 0 and fake.left_behind() == []


def test_a_real_ctrl_c_ends_the_process_with_130_and_names_what_costs(fake, delete, model):
    fake.stuck = {"demo"}
    environment = os.environ | fake.env
    process = start(environment, "scripts/deploy_sagemaker.py", "demo", "--model", model, "--yes", *FAST)
    while not fake.calls("CreateEndpoint") and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "the endpoint demo is Creating and costs $2.80 an hour ($67.20 a day); `python scripts/delete_en" in err
    fake.stuck = set()
    assert delete("demo").code == 0 and fake.left_behind() == []


def test_a_request_whose_answer_was_lost_is_not_an_error(fake, monkeypatch):
    aws = cloud.connect()
    assert cloud.make(aws, "model", cloud.model_request(SERVING), 60, 0.001) is True
    assert cloud.make(aws, "model", cloud.model_request(SERVING), 60, 0.001) is False
    monkeypatch.setattr(cloud, "look", lambda *_: None)  # as if it were made between the look and the request
    assert cloud.make(aws, "model", cloud.model_request(SERVING), 60, 0.001) is True


def test_other_flags_in_the_middle_are_refused(fake, deploy, delete, model, impatient):
    fake.stuck = {"demo-base"}
    assert deploy("demo", "--model", model, "--yes").code == 2
    for flags in (("--instance-type", "ml.g5.2xlarge"), ("--max-rank", "128")):
        done = deploy("demo", "--model", model, *flags)
        assert done.code == 2 and "was begun with other flags" in done.err and "costs $2.80" in done.err
    fake.stuck = set()
    assert delete("demo").code == 0 and fake.left_behind() == []


# Deleting


def test_what_a_half_made_endpoint_left_is_found_without_the_endpoint(fake, deploy, delete, model):
    fake.fail("CreateEndpoint", "ValidationException", "no")
    assert deploy("demo", "--model", model, "--yes").code == 2
    assert len(fake.left_behind()) == 2
    assert delete("demo").code == 0 and fake.left_behind() == []


def test_what_is_gone_meanwhile_is_no_error(fake, deploy, delete, model, adapter):
    assert deploy("demo", "--model", model, "--adapter", f"a={adapter('a')}", "--yes").code == 0
    gone = 'Could not find "arn:aws:sagemaker:us-east-1:123456789012:x".'
    for operation in ("DeleteInferenceComponent", "DeleteEndpoint", "DeleteEndpointConfig", "DeleteModel"):
        fake.fail(operation, "ValidationException", gone)
    assert delete("demo").code == 0 and fake.left_behind() == []


def test_what_may_not_be_deleted_is_named_with_its_cost(fake, deploy, delete, model):
    assert deploy("demo", "--model", model, "--yes").code == 0
    fake.fail("DeleteEndpoint", "AccessDeniedException", "not authorized to perform sagemaker:DeleteEndpoint")
    done = delete("demo")
    assert done.code == 1 and "you may not" in done.err and "which costs $2.80 an hour" in done.err
    assert "repeat `python scripts/delete_endpoint.py demo --region us-east-1`" in done.err
    fake.fail("DeleteModel", "AccessDeniedException", "not authorized")
    done = delete("demo")
    assert done.code == 1 and re.search(r"still be there: demo-model-\w+, none of which costs anything", done.err)
    assert delete("demo").code == 0 and fake.left_behind() == []


def test_deleting_with_expired_credentials_says_that_something_may_be_left(fake, deploy, delete, model):
    assert deploy("demo", "--model", model, "--yes").code == 0
    fake.fail("DeleteInferenceComponent", *EXPIRED)
    fake.fail("ListEndpointConfigs", *EXPIRED, times=1)
    done = delete("demo")
    assert done.code in (1, 2) and "have expired" in done.err
    fake._injected.clear()
    assert delete("demo").code == 0 and fake.left_behind() == []


# Weights of the Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A model of the Hub in its cache, gated or not."""
    import huggingface_hub

    folder = tmp_path / "hub" / "models--acme--small" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 1024}')
    save_file({"weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    refs = folder.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("c0ffee")
    state = SimpleNamespace(gated=False, folder=folder)
    monkeypatch.setattr(
        huggingface_hub, "model_info", lambda model, **_: SimpleNamespace(gated=state.gated, private=False)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, **_: str(folder))
    return state


def test_a_free_model_is_fetched_by_the_container_and_a_gated_one_must_be_staged(fake, deploy, delete, hub):
    assert deploy("demo", "--model", "acme/small", "--yes").code == 0
    (model,) = fake.calls("CreateModel")
    container = model["PrimaryContainer"]
    assert "ModelDataSource" not in container and container["Environment"]["HF_MODEL_ID"] == "acme/small"
    assert container["Environment"]["OPTION_REVISION"] == "c0ffee"
    assert container["Environment"]["OPTION_MAX_MODEL_LEN"] == "1024"
    assert {"Key": "base-weights", "Value": "acme/small@c0ffee"} in model["Tags"]
    assert delete("demo").code == 0
    hub.gated = "manual"
    done = deploy("demo", "--model", "acme/small", "--yes")
    assert done.code == 2 and "acme/small is gated or private: stage its weights with --weights upload" in done.err
    assert "secret" not in done.err


def test_staged_weights_keep_the_layout_of_the_hub_and_are_used_again(fake, deploy, delete, hub):
    hub.gated = "manual"
    planned = deploy("demo", "--model", "acme/small", "--weights", "upload", "--dry-run")
    assert planned.code == 0, planned.err
    assert deploy("demo", "--model", "acme/small", "--weights", "upload", "--yes").code == 0
    source = model_source(fake)
    assert source.endswith("/models--acme--small/snapshots/c0ffee/")
    printed = dict(bodies(planned.out))["CreateModel"]["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"]
    assert printed == source
    keys = [one["Key"] for one in fake.client("s3").list_objects_v2(Bucket=source.split("/")[2])["Contents"]]
    assert sum("/models--acme--small/" in key for key in keys) == 3  # with refs/main
    assert delete("demo").code == 0
    prefix = source.partition("models--")[0]
    assert deploy("demo", "--model", "acme/small", "--weights", prefix, "--yes").code == 0
    assert model_source(fake) == source and delete("demo").code == 0
    done = deploy("demo", "--model", "acme/small", "--weights", prefix + "elsewhere", "--yes")
    assert done.code == 2 and "--weights upload puts acme/small there" in done.err


def test_without_the_hub_only_a_dry_run_goes_on(fake, deploy, hub, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "model_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    done = deploy("demo", "--model", "acme/small", "--dry-run")
    assert done.code == 0 and dict(bodies(done.out))["CreateModel"]["ModelName"].startswith("demo-model-")
    assert re.search("warning +weights +the Hub cannot be asked", done.out)
    done = deploy("demo", "--model", "acme/small", "--yes")
    assert done.code == 2 and "weights: the Hub cannot be asked for acme/small" in done.err


# Asking an endpoint


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """Two adapters of the tiny model, each with the answers that it gives here."""
    import peft
    import torch

    import logprobs_confidence
    from fine_tune_model import PROBES
    from llama import load_llama
    from task import TASKS

    task, folders = TASKS["sentiment"], {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("adapters") / name
        base = load_llama(str(tiny_folder), device="cpu", dtype="float32")
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        peft.get_peft_model(base.model, settings).save_pretrained(folder)
        scorer = logprobs_confidence.prepare(load_llama(str(tiny_folder), str(folder), "cpu", "float32"), task)
        answers = [logprobs_confidence.explain(text, scorer) for text in PROBES]
        record = {"base_model": str(tiny_folder), "base_weights": base.identity["weights"], "task": task.settings()}
        record["probes"] = [{key: a[key] for key in ("text", "probabilities", "label_mass")} for a in answers]
        (folder / "training_config.json").write_text(json.dumps(record))
        folders[name] = folder
    return folders


def test_an_endpoint_answers_as_the_adapter_did_here(fake, deploy, delete, command, trained, tiny_folder, tmp_path):
    from fake_lmi import LMI

    fake.serving = LMI()
    named = [f"{name}={folder}" for name, folder in trained.items()]
    done = deploy("demo", "--model", tiny_folder, "--adapter", *named, "--yes")
    assert done.code == 0, done.err

    done = command(asking, "demo", "--adapter", "one")
    assert done.code == 0 and "sagemaker:demo/one answers as its record: 3 texts" in done.out, done.out + done.err
    assert done.out.count("prediction:") == 3 and done.out.count("label mass") == 3 and "recorded" in done.out

    rows = command(asking, "demo", "--adapter", "two", "--json")
    answers = [json.loads(line) for line in rows.out.splitlines()]
    assert rows.code == 0 and len(answers) == 3 and "answers as its record" in rows.err
    assert all(answer["difference"] < 1e-3 and answer["endpoint"] == "sagemaker:demo/two" for answer in answers)

    texts = command(asking, "demo", "--adapter", "one", "--text", "Not bad", "Awful.")
    assert texts.code == 0 and texts.out.count("prediction:") == 2 and "recorded" not in texts.out

    base = command(asking, "demo")
    assert base.code == 0 and base.out.count("prediction:") == 3
    assert "nothing recorded is at hand for sagemaker:demo" in base.out

    file = tmp_path / "recorded.jsonl"
    common = {"method": "logprobs", "model": "tiny", "task": "sentiment", "fingerprint": "0"}
    write = [
        predictions.scored(str(i), a["text"], None, a["probabilities"], 1.0, **common) for i, a in enumerate(answers)
    ]
    file.write_bytes(b"".join(map(predictions.to_line, write)))
    same = command(asking, "demo", "--adapter", "two", "--recorded", file, "--limit", "2")
    assert same.code == 0 and f"answers as {file}: 2 texts" in same.out
    other = command(asking, "demo", "--adapter", "one", "--recorded", file)
    assert other.code == 1 and "differs from" in other.out and "precision" in other.out

    missing = command(asking, "demo", "--adapter", "nobody")
    assert missing.code == 2 and "there is no component demo-adapter-nobody" in missing.err
    wrong_labels = command(asking, "demo", "--recorded", file, "--task", tickets(tmp_path))
    assert wrong_labels.code == 2 and "was made with task 'sentiment', this asks 'tickets'" in wrong_labels.err
    assert delete("demo").code == 0 and fake.left_behind() == []


def tickets(folder):
    path = folder / "tickets.toml"
    path.write_text('name = "tickets"\ntemplate = "{text}\\nTeam:"\n[labels]\nbilling = ["money"]\nother = ["other"]\n')
    return path


def test_asking_without_an_endpoint_or_a_record(fake, command, tmp_path):
    done = command(asking, "demo")
    assert done.code == 2 and "deploy_sagemaker.py demo makes it" in done.err
    done = command(asking, "demo", "--text", " ")
    assert done.code == 2 and "text 1 is empty" in done.err
    done = command(asking, "demo", "--recorded", "x", "--text", "y")
    assert done.code == 2 and "give one of them" in done.err
