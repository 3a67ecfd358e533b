"""sagemaker_endpoint.py: request bodies, adapters and plans, against botocore's own model of the service."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from fake_sagemaker import golden, problems

import sagemaker_endpoint
from aws import Account
from sagemaker_endpoint import (
    Adapter,
    Serving,
    check_servable,
    endpoint_rank,
    machine_image,
    plan_change,
    start_steps,
)

IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/djl-inference:0.36.0-lmi28.0.0-cu130"
SERVING = Serving(
    endpoint="demo",
    role="arn:aws:iam::123456789012:role/SageMakerExecutionRole",
    image=IMAGE,
    instance_type="ml.g6e.2xlarge",
    base_model="meta-llama/Llama-3.1-8B-Instruct",
    base_weights="meta-llama/Llama-3.1-8B-Instruct@0e9e39f2",
    source="s3://sagemaker-us-east-1-123456789012/calibrated-confidence/weights/x/",
    max_rank=64,
    max_length=4096,
)
PLAIN = {"peft_type": "LORA", "r": 4}
ADAPTER = Adapter("sentiment", Path("nowhere"), PLAIN, {"adapter_config.json": b"1"}, b"")


# Request bodies


def test_the_steps_of_a_start_are_the_golden_ones():
    steps = start_steps(SERVING, [ADAPTER], "sagemaker-us-east-1-123456789012")
    assert [{"operation": step.operation, "body": step.body} for step in steps] == golden("start of an endpoint")


@pytest.mark.parametrize(
    "serving",
    [
        SERVING,
        replace(SERVING, source="", endpoint="a" * 39),
        replace(SERVING, base_model="/home/müller/models (old)/tiny, *", base_weights="0123456789abcdef"),
    ],
)
def test_every_body_is_one_that_the_service_s_own_model_allows(serving):
    for step in start_steps(serving, [ADAPTER], "bucket"):
        assert problems(step.operation, step.body) == []
    swap = sagemaker_endpoint.adapter_update_request(serving.endpoint, "x", "s3://bucket/x-1.tar.gz")
    assert problems("UpdateInferenceComponent", swap) == []


def test_a_container_without_weights_fetches_one_commit_from_the_hub():
    container = sagemaker_endpoint.model_request(replace(SERVING, source=""))["PrimaryContainer"]
    assert container["Environment"]["HF_MODEL_ID"] == SERVING.base_model and "ModelDataSource" not in container
    assert container["Environment"]["OPTION_REVISION"] == "0e9e39f2"


def test_another_model_has_another_name_and_the_same_one_the_same():
    alike = (SERVING, SERVING, replace(SERVING, max_rank=128))
    names = {sagemaker_endpoint.model_request(one)["ModelName"] for one in alike}
    is_ours = sagemaker_endpoint.is_ours
    assert len(names) == 2 and all(is_ours("demo", name, "model") for name in names)
    assert not any(is_ours("dem", name, "model") or is_ours("demo-2", name, "model") for name in names)
    assert not is_ours("demo", "demo-2-config-0123456789abcdef")


def test_the_machine_image_follows_from_the_cuda_of_the_container():
    repository = "1.dkr.ecr.us-east-1.amazonaws.com/djl-inference"
    assert machine_image(f"{repository}:0.36.0-lmi28.0.0-cu130") == "al2023-ami-sagemaker-inference-gpu-4-1"
    assert machine_image(f"{repository}:0.31.0-lmi13.0.0-cu124") == "al2-ami-sagemaker-inference-gpu-3-1"
    with pytest.raises(ValueError, match="no CUDA version that is known"):
        machine_image(f"{repository}-cu130:latest")


# Adapters


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"rank_pattern": {"q_proj": 1024}}, "rank 1024 is above 512"),
    ],
)
def test_what_vllm_refuses_is_refused_here(config, named):
    check_servable(PLAIN | {"init_lora_weights": "gaussian", "use_rslora": True})
    with pytest.raises(ValueError, match=re.escape(named)):
        check_servable(PLAIN | config)


def test_an_adapter_s_address_follows_its_files_and_its_record():
    alike = [ADAPTER, replace(ADAPTER, record=b"{}"), replace(ADAPTER, files={"adapter_config.json": b"2"})]
    assert len({one.uri("bucket") for one in alike}) == 3
    assert sagemaker_endpoint.record_uri("s3://b/a-1.tar.gz") == "s3://b/a-1.json"


def test_an_adapter_of_another_base_or_rank_is_a_failed_check(tmp_path, monkeypatch):
    monkeypatch.setattr(sagemaker_endpoint, "describe_component", lambda *_: None)
    (tmp_path / "training_config.json").write_text(json.dumps({"base_weights": "0123456789abcdef"}))
    now = replace(SERVING, base_model="tiny", base_weights="fedcba9876543210", max_rank=8)
    other = replace(ADAPTER, folder=tmp_path)
    large = replace(ADAPTER, name="large", config=PLAIN | {"r": 32})
    plan = plan_change(Account("us-east-1", None, None), now, [other, large], [], "bucket")
    failed = {check.subject: check.detail for check in plan.checks if check.status == "failed"}
    assert "was trained from other weights (0123456789abcdef)" in failed["adapter sentiment"]
    assert "its rank 32 is above the endpoint's --max-rank 8" in failed["adapter large"]


def test_a_new_endpoint_has_room_for_the_largest_rank_of_its_adapters():
    for rank, wanted, room in ((4, None, 64), (100, None, 128), (9, 9, 16), (4, 600, 512), (1024, None, 512)):
        assert endpoint_rank(wanted, [replace(ADAPTER, config=PLAIN | {"rank_pattern": {"q_proj": rank}})]) == room


# What is there, and what is sent


@pytest.mark.parametrize(("endpoint", "status"), [("other", "InService"), ("demo", "Creating")])
def test_a_component_of_another_endpoint_or_on_its_way_is_not_touched(monkeypatch, endpoint, status):
    described = {"EndpointName": endpoint, "InferenceComponentStatus": status}
    monkeypatch.setattr(sagemaker_endpoint, "describe_component", lambda *_: described)
    with pytest.raises(ValueError, match=r"belongs to the endpoint other|is Creating; wait"):
        sagemaker_endpoint.adapter_steps(None, "demo", "a", "s3://b/new.tar.gz")
