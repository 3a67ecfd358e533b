"""deploy_sagemaker.py, test_endpoint.py and delete_endpoint.py against the stand-in of fake_sagemaker.py."""

import json
import math
import re
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_sagemaker import BUCKET, problems, stubbed
from safetensors.numpy import save_file

import aws
import delete_endpoint as deleting
import deploy_sagemaker as deploying
import predictions
import sagemaker_endpoint
import test_endpoint as asking
from model_files import folder_hash
from task import TASKS

ROOT = Path(__file__).parent.parent
FAST = ("--poll-seconds", "0.001")
COSTS = "costs $2.80 an hour ($67.20 a day); `python scripts/delete_endpoint.py demo --region us-east-1` deletes it"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Sleeping takes no time, and on the clock of those who wait half a minute passes at every look at it."""
    now = iter(range(0, 10**9, 30))
    clock = SimpleNamespace(monotonic=lambda: next(now), sleep=lambda s: None)
    monkeypatch.setattr(sagemaker_endpoint, "time", clock)
    monkeypatch.setattr("botocore.waiter.time", clock)


@pytest.fixture
def command(outcome):
    """Run a script in this process: its exit code, out and err."""

    def run(module, *argv):
        code, out, err = outcome(module.main, *argv)
        if code == 2:
            assert err.count("error: ") == 1 and len(err.strip().splitlines()) == 1 + err.count("note: "), err
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def deploy(command):
    return lambda *argv: command(deploying, "demo", *FAST, *argv)


@pytest.fixture
def delete(command):
    return lambda *argv: command(deleting, "demo", *argv, *FAST)


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model's; nobody computes with it."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path, model):
    """Make a LoRA folder as fine_tune_model.py leaves it: adapter("a", r=8)."""

    def make(name, value=0.0, **config):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4} | config))
        save_file({"lora_A": np.full(3, value, np.float32)}, folder / "adapter_model.safetensors")
        record = {"base_model": str(model), "base_weights": folder_hash(model)}
        (folder / "training_config.json").write_text(json.dumps(record))
        return f"{name}={folder}"

    return make


def changing(fake):
    """The operations that changed something."""
    return [name for name, _ in fake.requests if name.startswith(("Create", "Update", "Delete"))]


# The whole story


def test_deploy_repeat_swap_add_remove_and_delete(fake, deploy, delete, command, model, adapter):
    planned = deploy("--model", model, "--adapter", adapter("a"), "--dry-run")
    assert planned.code == 0 and changing(fake) == [] and fake.objects() == {}
    printed = re.findall(r"^(\w+)\n(\{\n.*?^\})$", planned.out, re.M | re.S)
    assert [problems(operation, json.loads(body)) for operation, body in printed] == [[]] * 5

    done = deploy("--model", model, "--adapter", adapter("a"), adapter("b", value=1.0), "--yes")
    assert done.code == 0, done.err
    assert "the adapters a, b" in done.out and "$2.80 an hour ($67.20 a day)" in done.out
    assert f'--endpoint sagemaker:demo/a --tokenizer {model} "Not bad"' in done.out
    stored = fake.below(f"s3://{BUCKET}/calibrated-confidence/")
    weights = sorted(key.rpartition("/")[2] for key in stored if key.startswith("weights/"))
    assert weights == ["config.json", "model.safetensors"]
    (archive,) = (content for key, content in stored.items() if re.search(r"adapters/a-\w+\.tar\.gz", key))
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        assert sorted(tar.getnames()) == ["adapter_config.json", "adapter_model.safetensors"]
    (record,) = (content for key, content in stored.items() if re.search(r"adapters/a-\w+\.json", key))
    assert json.loads(record)["base_model"] == str(model)

    fake.requests.clear()
    again = deploy("--adapter", adapter("a"), adapter("b", value=1.0))  # no question: it costs nothing more
    assert again.code == 0 and changing(fake) == []
    assert deploy("--adapter", adapter("a", value=2.0)).code == 0
    assert deploy("--adapter", adapter("c"), "--remove", "a", "nobody").code == 0
    assert changing(fake) == [
        *("UpdateInferenceComponent", "DeleteInferenceComponent", "DeleteInferenceComponent"),
        "CreateInferenceComponent",
    ]
    assert sorted(fake.components) == ["demo-adapter-b", "demo-adapter-c", "demo-base"]

    assert command(deploying, "demo-2", "--model", model, "--yes", *FAST).code == 0  # which is not touched
    planned = delete("--dry-run")
    assert planned.code == 0 and planned.out.count("would delete") == 6 and len(fake.left_behind()) == 10
    done = delete()
    assert done.code == 0 and "nothing of demo is left; uploads in S3" in done.out
    assert all(name.startswith("demo-2") for name in fake.left_behind()) and len(fake.left_behind()) == 4
    kinds = re.findall(r"^deleted (.*) demo", done.out, re.M)
    assert kinds == ["inference component"] * 3 + ["endpoint", "endpoint configuration", "model"]
    nothing = delete()
    assert nothing.code == 0 and "there is nothing of demo" in nothing.out


# Refused before anything costs or changes


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--image", "1.dkr.ecr.us-east-1.amazonaws.com/djl-inference:x-cu140"), "machine image: "),
        (("--instance-type", "ml.m5.large"), "instance type: ml.m5.large has no NVIDIA GPU"),
        (("--role", "nobody"), "role: "),
        (("--bucket", "sagemaker-of-nobody"), "bucket: no bucket sagemaker-of-nobody"),
        (("--model", "./nowhere"), r"weights: no such model folder: ./nowhere"),
        (("--max-rank", "1"), "adapter a: its rank 4 is above .* --max-rank 8, or train with --rank 1"),
        (("--adapter", "b"), "write it as NAME=FOLDER"),
        (("--adapter", "b=/nowhere"), "there is no folder /nowhere"),
        (("--remove", "a"), "the adapter a is named twice"),
        (("--remove", "b"), "--remove: no endpoint demo is known"),
    ],
)
def test_what_cannot_work_is_refused_before_the_start(fake, deploy, model, adapter, flags, said):
    done = deploy("--model", model, "--adapter", adapter("a"), "--yes", *flags)
    assert done.code == 2 and re.search(said, done.err), done.err
    assert changing(fake) == []


def test_money_is_spent_only_after_a_yes(fake, deploy, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    done = deploy("--model", model)
    assert done.code == 2 and "add --yes" in done.err and changing(fake) == []
    asked = []
    monkeypatch.setattr(aws, "ask_to_spend", asked.append)
    assert deploy("--model", model).code == 0
    assert asked == ["Start demo for $2.80 an hour ($67.20 a day), until it is deleted?"]


def test_a_running_endpoint_refuses_what_it_was_not_started_for_and_whom_it_is_not_of(
    fake, deploy, delete, model, adapter
):
    assert deploy("--model", model, "--max-rank", "8", "--yes").code == 0
    fake.requests.clear()
    done = deploy("--adapter", adapter("big", r=32))
    assert done.code == 2 and "adapter big: its rank 32 is above the endpoint's --max-rank 8" in done.err
    done = deploy("--adapter", adapter("a"), "--instance-type", "ml.g5.2xlarge")
    assert done.code == 2 and "demo is up, and only its adapters change; --instance-type has no part" in done.err
    fake.there["Endpoint"]["demo"].request["EndpointConfigName"] = "production"  # somebody else's
    for done in (deploy("--model", model, "--yes"), delete()):
        assert done.code == 2 and re.search("was not made (here|by deploy_sagemaker.py)", done.err)
    assert changing(fake) == []


# Failures after something costs


@pytest.mark.parametrize(
    ("stuck", "failing", "said"),
    [
        ("demo", {}, "demo is Creating: no reason is given; .* an AMI that does not fit"),
        ("demo-base", {}, "demo-base is Creating: .*log: aws logs tail /aws/sagemaker/InferenceComponents/demo-base"),
        ("", {"demo": "CapacityError: Unable to provision"}, "demo is Failed: CapacityError.*AWS has none free"),
        ("", {"demo-base": "CUDA out of memory"}, "demo-base is Failed: CUDA out of memory; .*--max-length"),
    ],
)
def test_what_does_not_serve_is_named_with_its_cost_and_is_deleted_not_repaired(
    fake, deploy, delete, model, stuck, failing, said
):
    fake.stuck, fake.failing = {stuck}, failing
    done = deploy("--model", model, "--yes", "--max-wait", "60s", "--poll-seconds", "30")
    assert done.code == 2 and re.search(said, done.err) and COSTS in done.err, done.err
    done = deploy("--model", model, "--yes")
    assert done.code == 2 and "demo is half made" in done.err and "delete it first: python scripts/delete" in done.err
    fake.stuck = set()
    assert 0 in [delete().code for _ in range(3)] and fake.left_behind() == []  # AWS takes what is being made later


def test_an_adapter_that_fails_is_replaced_by_the_next_command(fake, deploy, model, adapter):
    fake.failing["demo-adapter-a"] = "LoRA weights are broken"
    done = deploy("--model", model, "--adapter", adapter("a"), "--yes")
    assert done.code == 2 and "demo-adapter-a is Failed: LoRA weights are broken" in done.err and COSTS in done.err
    fake.failing.clear()
    done = deploy("--adapter", adapter("a", value=1.0))
    assert done.code == 0 and "DeleteInferenceComponent demo-adapter-a" in done.out


@pytest.mark.parametrize(
    ("operation", "exists"),
    [
        ("CreateModel", "there is no endpoint demo, so nothing is billed; `python scripts/delete_endpoint.py demo"),
        ("CreateInferenceComponent", f"the endpoint demo is InService and {COSTS}"),
    ],
)
def test_a_deploy_that_breaks_off_says_what_exists_and_can_be_deleted(fake, deploy, delete, model, operation, exists):
    fake.fail(operation, "AccessDeniedException", "User is not authorized to perform this")
    done = deploy("--model", model, "--yes")
    assert done.code == 2 and "AWS denies access (User is not authorized" in done.err and exists in done.err, done.err
    assert delete().code == 0 and fake.left_behind() == []


def test_ctrl_c_says_what_goes_on_and_costs(fake, deploy, delete, model, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sagemaker_endpoint, "wait_for_component", interrupt)
        done = deploy("--model", model, "--yes")
    assert done.code == 130 and f"the endpoint demo is InService and {COSTS}" in done.err
    with monkeypatch.context() as patch:
        patch.setattr(deleting, "delete_all", interrupt)
        done = delete()
    assert done.code == 130 and "the rest may cost money: repeat `python scripts/delete_endpoint.py" in done.err


def test_where_nobody_can_be_asked_the_endpoint_may_exist_and_cost():
    account, stubber = stubbed()
    with stubber:
        stubber.add_client_error("describe_endpoint", "ExpiredTokenException")
        said = deploying.left(account, "demo", 2.80)
    assert said.startswith("the endpoint demo may exist and cost $2.80 an hour") and "delete_endpoint.py demo" in said


def test_what_may_not_be_deleted_is_named_with_its_cost(fake, deploy, delete, model):
    assert deploy("--model", model, "--yes").code == 0
    fake.fail("DeleteEndpoint", "AccessDeniedException", "not authorized")
    done = delete()
    assert done.code == 1 and "AWS denies access" in done.err and "the endpoint costs money" in done.err
    assert "still there: demo, demo-config-" in done.err and "repeat `python scripts/delete_endpoint.py" in done.err
    fake.fail("DeleteModel", "AccessDeniedException", "not authorized")
    done = delete()
    assert done.code == 1 and re.search(r"still there: demo-model-\w+, none of which costs anything", done.err)
    fake.fail("DeleteModel", "ValidationException", "Could not find model")  # which somebody deleted meanwhile
    assert delete().code == 0


# Asking an endpoint


def answer(component, body):
    """Every text alike; what a model would answer needs no model."""
    listed = {" positive": math.log(2 / 3), " negative": math.log(1 / 3)}
    return {"choices": [{"text": "", "logprobs": {"top_logprobs": [listed]}}]}


def test_an_endpoint_is_asked_and_compared_with_what_was_recorded(
    fake, deploy, command, model, adapter, tmp_path, monkeypatch
):
    def ask(*argv):
        return command(asking, "demo", *argv, "--tokenizer", "none")

    monkeypatch.setattr(fake, "serving", answer)
    named, record = adapter("b"), tmp_path / "b" / "training_config.json"
    probe = {"text": "Not bad", "probabilities": {"negative": 1 / 3, "positive": 2 / 3}, "label_mass": 1.0}
    other = {"text": "Awful.", "probabilities": {"negative": 0.4, "positive": 0.6}, "label_mass": 1.0}
    content = {"probes": [probe, other], "task": TASKS["sentiment"].settings()}
    record.write_text(json.dumps(json.loads(record.read_text()) | content))
    assert deploy("--model", model, "--adapter", adapter("a"), named, "--yes").code == 0

    bare = ask("--adapter", "a", "--json")
    answers = [json.loads(line) for line in bare.out.splitlines()]
    assert bare.code == 0 and len(answers) == 3 and "has no recorded answers" in bare.err
    assert answers[0]["probabilities"] == pytest.approx({"negative": 1 / 3, "positive": 2 / 3})
    assert all(answer["difference"] is answer["recorded"] is None for answer in answers)
    done = ask("--adapter", "b", "--tolerance", "0.1")
    assert done.code == 0 and "sagemaker:demo/b answers as its record: 2 texts, largest difference 0.0667" in done.out
    assert done.out.count("prediction:") == 2 and done.out.count("label mass") == 2 and "recorded" in done.out
    done = ask("--adapter", "b")
    assert done.code == 1 and "by up to 0.0667, more than 0.02 in 1 of 2 texts; what may differ: precision" in done.out
    texts = ask("--adapter", "b", "--text", "Not bad", "Awful.")
    assert texts.code == 0 and texts.out.count("prediction:") == 2 and "recorded" not in texts.out

    file = tmp_path / "recorded.jsonl"
    common = {"method": "logprobs", "model": "tiny", "task": "sentiment", "fingerprint": "0"}
    rows = [predictions.scored(text, text, None, probe["probabilities"], 1.0, **common) for text in ("a", "b", "c")]
    file.write_bytes(b"".join(map(predictions.to_line, rows)))
    same = ask("--recorded", file, "--limit", "2")
    assert same.code == 0 and f"sagemaker:demo answers as {file}: 2 texts" in same.out
    assert "there is no component demo-adapter-nobody" in ask("--adapter", "nobody").err
    assert "was made with task 'sentiment'" in ask("--recorded", file, "--task", "sentiment-yes-no").err
    assert "give one of them" in ask("--recorded", "x", "--text", "y").err


def test_an_endpoint_with_a_longer_name_is_not_touched(fake, deploy, delete, command, model):
    assert deploy("--model", model, "--yes").code == 0
    assert command(deploying, "demo-2", "--model", model, "--yes", *FAST).code == 0
    assert delete().code == 0
    assert all(name.startswith("demo-2") for name in fake.left_behind()) and len(fake.left_behind()) == 4
