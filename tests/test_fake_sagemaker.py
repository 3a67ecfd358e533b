"""The test stand for AWS is only worth something if it refuses what AWS refuses: mostly refusals are tested here."""

import copy
import io
import json
import subprocess
import sys
import threading
import time

import pytest
from botocore import xform_name
from botocore.exceptions import ClientError
from fake_sagemaker import Fake, check_reply, compiled, problems, service_model

REGISTRY = "763104351884.dkr.ecr.us-east-1.amazonaws.com"
ROLE = "arn:aws:iam::123456789012:role/SageMakerExecution"
SERVING_TAG = "djl-inference:0.36.0-lmi28.0.0-cu130"
AMI = "al2023-ami-sagemaker-inference-gpu-4-1"

JOB = {
    "TrainingJobName": "job-1",
    "RoleArn": ROLE,
    "AlgorithmSpecification": {
        "TrainingImage": f"{REGISTRY}/huggingface-pytorch-training:2.9.0-transformers5.3.0-gpu-py312-cu130-ubuntu22.04",
        "TrainingInputMode": "File",
    },
    "HyperParameters": {"sagemaker_program": '"sagemaker_entry.py"', "epochs": "3"},
    "InputDataConfig": [
        {
            "ChannelName": "training",
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://sagemaker-bucket/data/"}},
        }
    ],
    "OutputDataConfig": {"S3OutputPath": "s3://sagemaker-bucket/out/"},
    "ResourceConfig": {"InstanceType": "ml.g6e.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 100},
    "StoppingCondition": {"MaxRuntimeInSeconds": 7200},
    "Tags": [{"Key": "project", "Value": "calibrated-confidence"}],
}
SPOT = {
    "EnableManagedSpotTraining": True,
    "StoppingCondition": {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 10800},
}
MODEL = {
    "ModelName": "ep-model",
    "ExecutionRoleArn": ROLE,
    "PrimaryContainer": {
        "Image": f"{REGISTRY}/{SERVING_TAG}",
        "ModelDataSource": {
            "S3DataSource": {"S3Uri": "s3://sagemaker-bucket/m/", "S3DataType": "S3Prefix", "CompressionType": "None"}
        },
        "Environment": {"OPTION_ENABLE_LORA": "true"},
    },
}
CONFIG = {
    "EndpointConfigName": "ep-config",
    "ExecutionRoleArn": ROLE,
    "ProductionVariants": [
        {
            "VariantName": "AllTraffic",
            "InstanceType": "ml.g6e.2xlarge",
            "InitialInstanceCount": 1,
            "InferenceAmiVersion": AMI,
            "ManagedInstanceScaling": {"Status": "ENABLED", "MinInstanceCount": 1, "MaxInstanceCount": 1},
        }
    ],
}
BASE = {
    "InferenceComponentName": "ep-base",
    "EndpointName": "ep",
    "VariantName": "AllTraffic",
    "Specification": {
        "ModelName": "ep-model",
        "StartupParameters": {"ContainerStartupHealthCheckTimeoutInSeconds": 1200},
        "ComputeResourceRequirements": {"NumberOfAcceleratorDevicesRequired": 1, "MinMemoryRequiredInMb": 4096},
    },
    "RuntimeConfig": {"CopyCount": 1},
}


def adapter(name, artifact="s3://sagemaker-bucket/adapters/a.tar.gz", base="ep-base", endpoint="ep"):
    specification = {"BaseInferenceComponentName": base, "Container": {"ArtifactUrl": artifact}}
    return {"InferenceComponentName": f"ep-adapter-{name}", "EndpointName": endpoint, "Specification": specification}


def changed(request, path, value):
    """A deep copy with one member replaced, or removed if the value is None: path "A.B.0.C"."""
    *parents, last = [int(piece) if piece.isdigit() else piece for piece in path.split(".")]
    made = place = copy.deepcopy(request)
    for piece in parents:
        place = place[piece]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return made


@pytest.fixture
def fake():
    with Fake(ticks=1) as fake:
        yield fake


@pytest.fixture
def sagemaker(fake):
    return fake.client("sagemaker")


def refused(call, code, text="", **arguments):
    """The call fails with this error code and a message that has this text; returns the response."""
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    error = caught.value.response["Error"]
    assert error["Code"] == code and text in error["Message"], error
    return caught.value.response


class Serving:
    """A container that knows adapters by name; `bad` in an artifact's name cannot be loaded."""

    def __init__(self):
        self.events = []

    def load(self, fake, component):
        self.events.append(("load", component.name, component.artifact_url))
        if component.artifact_url and "bad" in component.artifact_url:
            raise ValueError("LoRA rank 32 is greater than max_lora_rank 16.")

    def unload(self, name):
        self.events.append(("unload", name))

    def invoke(self, fake, name, body):
        if "prompt" not in body:
            return 400, {"error": "no prompt"}
        return 200, {"component": name, "echo": body["prompt"]}


def endpoint(sagemaker):
    sagemaker.create_model(**MODEL)
    sagemaker.create_endpoint_config(**CONFIG)
    sagemaker.create_endpoint(EndpointName="ep", EndpointConfigName="ep-config")
    assert sagemaker.describe_endpoint(EndpointName="ep")["EndpointStatus"] == "InService"  # ticks=1


def component(sagemaker, request):
    sagemaker.create_inference_component(**request)
    return sagemaker.describe_inference_component(InferenceComponentName=request["InferenceComponentName"])


# Requests that break the model of the service


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("TrainingJobName", "a_b", "regular expression"),
        ("TrainingJobName", "a" * 64, "regular expression"),
        ("RoleArn", "SageMakerExecution-is-no-arn", "regular expression"),
        ("ResourceConfig.InstanceType", "ml.banana", "enum"),
        ("ResourceConfig.InstanceCount", 0, "at least 1"),
        ("ResourceConfig.InstanceType", None, "needs InstanceType"),
        ("ResourceConfig", None, "ResourceConfig is required"),
        ("AlgorithmSpecification", None, "AlgorithmSpecification is required"),
        ("AlgorithmSpecification.TrainingImage", None, "either"),
        ("AlgorithmSpecification.TrainingImage", "ubuntu:22.04", "Invalid image"),
        ("AlgorithmSpecification.TrainingImage", f"{REGISTRY.replace('east', 'west')}/a:1", "not found"),
        ("StoppingCondition", None, "StoppingCondition is required"),
        ("StoppingCondition.MaxWaitTimeInSeconds", 9000, "only when EnableManagedSpotTraining"),
        ("EnableManagedSpotTraining", True, "MaxWaitTimeInSeconds"),
        ("HyperParameters", {str(i): "1" for i in range(101)}, "length less than or equal to 100"),
        ("HyperParameters.epochs", "x" * 2501, "length less than or equal to 2500"),
        ("Environment", {"1 BAD": "x"}, "environment"),
        ("Environment", {"A": "x" * 513}, "length less than or equal to 512"),
        ("Environment", {"HF_TOKEN": "hf_" + "a" * 30}, "Security-sensitive"),
        ("HyperParameters", {"token": '"hf_' + "a" * 30 + '"'}, "Security-sensitive"),
        ("Tags", [{"Key": "a{b", "Value": "x"}], "regular expression"),
        ("InputDataConfig.0.ChannelName", "not a channel", "regular expression"),
        ("InputDataConfig.0.DataSource.S3DataSource.S3Uri", "/local/file", "regular expression"),
        ("InputDataConfig", JOB["InputDataConfig"] * 2, "unique"),
    ],
)
def test_training_requests_that_are_refused(fake_shared, path, value, text):
    refused(
        fake_shared.client("sagemaker").create_training_job, "ValidationException", text, **changed(JOB, path, value)
    )
    assert not fake_shared.jobs


@pytest.mark.parametrize("wait", [7199, None])
def test_spot_needs_a_wait_time_not_below_the_run_time(fake_shared, wait):
    request = changed(JOB | SPOT, "StoppingCondition.MaxWaitTimeInSeconds", wait)
    refused(fake_shared.client("sagemaker").create_training_job, "ValidationException", "MaxWaitTime", **request)


@pytest.mark.parametrize(
    ("operation", "request_", "path", "value", "text"),
    [
        ("create_model", MODEL, "PrimaryContainer", None, "Exactly one"),
        ("create_model", MODEL, "PrimaryContainer.Image", None, "Image is required"),
        ("create_model", MODEL, "ExecutionRoleArn", None, "ExecutionRoleArn"),
        ("create_model", MODEL, "ModelName", "ep_model", "regular expression"),
        (
            "create_model",
            MODEL,
            "PrimaryContainer.ModelDataSource.S3DataSource.S3Uri",
            "s3://sagemaker-bucket/m",
            "slash",
        ),
        ("create_endpoint_config", CONFIG, "ExecutionRoleArn", None, "ExecutionRoleArn is required"),
        ("create_endpoint_config", CONFIG, "ProductionVariants", CONFIG["ProductionVariants"] * 2, "unique"),
        ("create_endpoint_config", CONFIG, "ProductionVariants.0.ModelName", "nope", "Could not find model"),
        ("create_endpoint_config", CONFIG, "ProductionVariants.0.InstanceType", "ml.g99.large", "enum"),
        ("create_endpoint_config", CONFIG, "ProductionVariants.0.InstanceType", None, "InstanceType"),
        ("create_endpoint_config", CONFIG, "ProductionVariants.0.InferenceAmiVersion", "al2023", "enum"),
        ("create_endpoint_config", CONFIG, "ProductionVariants.0.ManagedInstanceScaling.MinInstanceCount", 2, "Min"),
        (
            "create_endpoint",
            {"EndpointName": "ep", "EndpointConfigName": "x"},
            "EndpointConfigName",
            "nope",
            'Could not find endpoint configuration "arn:aws:sagemaker:us-east-1:123456789012:endpoint-config/nope"',
        ),
        ("list_endpoints", {"MaxResults": 1}, "MaxResults", 101, "less than or equal to 100"),
        ("list_endpoints", {"NextToken": ""}, "NextToken", "forged!", "pagination"),
    ],
)
def test_hosting_requests_that_are_refused(fake_shared, operation, request_, path, value, text):
    call = getattr(fake_shared.client("sagemaker"), operation)
    refused(call, "ValidationException", text, **changed(request_, path, value))
    assert not fake_shared.left_behind()


@pytest.fixture(scope="module")
def fake_shared():
    """One stand for the tests that change nothing in it."""
    with Fake() as fake:
        yield fake


@pytest.fixture(scope="module")
def fake_hosting():
    """An endpoint with a base, for the tests that only try to add something wrong."""
    with Fake(ticks=1) as fake:
        sagemaker = fake.client("sagemaker")
        endpoint(sagemaker)
        assert component(sagemaker, BASE)["InferenceComponentStatus"] == "InService"
        yield fake


NEW_BASE = BASE | {"InferenceComponentName": "ep-base-2"}


@pytest.mark.parametrize(
    ("request_", "path", "value", "text"),
    [
        (NEW_BASE, "VariantName", None, "VariantName"),
        (NEW_BASE, "VariantName", "Other", "variant"),
        (NEW_BASE, "RuntimeConfig", None, "RuntimeConfig"),
        (NEW_BASE, "RuntimeConfig.CopyCount", 0, "CopyCount"),
        (NEW_BASE, "Specification", None, "Specification"),
        (NEW_BASE, "Specification.ComputeResourceRequirements", None, "ComputeResourceRequirements"),
        (NEW_BASE, "Specification.ModelName", "nope", "Could not find model"),
        (NEW_BASE, "Specification.ModelName", None, "ModelName"),
        (NEW_BASE, "EndpointName", "nope", "Could not find endpoint"),
        (BASE, "EndpointName", "ep", "already existing inference component"),
        (adapter("a"), "Specification.BaseInferenceComponentName", "nope", "Could not find inference component"),
        (adapter("a"), "Specification.Container", None, "ArtifactUrl"),
        (adapter("a"), "Specification.Container.ArtifactUrl", "s3://bucket/folder/", ".tar.gz"),
        (adapter("a"), "Specification.Container.Image", f"{REGISTRY}/{SERVING_TAG}", "nothing else"),
        (adapter("a"), "Specification.ModelName", "ep-model", "ModelName must be omitted"),
        (
            adapter("a"),
            "Specification.ComputeResourceRequirements",
            {"MinMemoryRequiredInMb": 1024},
            "ComputeResourceRequirements must be omitted",
        ),
        (adapter("a"), "VariantName", "AllTraffic", "VariantName must be omitted"),
        (adapter("a"), "RuntimeConfig", {"CopyCount": 1}, "RuntimeConfig must be omitted"),
        (adapter("a"), "InferenceComponentName", "ep-adapter-a_b", "regular expression"),
    ],
)
def test_components_that_are_refused(fake_hosting, request_, path, value, text):
    request = changed(request_, path, value)
    refused(fake_hosting.client("sagemaker").create_inference_component, "ValidationException", text, **request)
    assert list(fake_hosting.components) == ["ep-base"]


def test_a_component_needs_an_endpoint_in_service_and_an_adapter_a_base_in_service(fake, sagemaker):
    sagemaker.create_model(**MODEL)
    sagemaker.create_endpoint_config(**CONFIG)
    sagemaker.create_endpoint(EndpointName="ep", EndpointConfigName="ep-config")
    refused(sagemaker.create_inference_component, "ValidationException", "Creating", **BASE)
    sagemaker.describe_endpoint(EndpointName="ep")
    sagemaker.create_inference_component(**BASE)
    refused(sagemaker.create_inference_component, "ValidationException", "not InService", **adapter("a"))
    refused(sagemaker.delete_inference_component, "ValidationException", "progress", InferenceComponentName="ep-base")
    sagemaker.describe_inference_component(InferenceComponentName="ep-base")
    component(sagemaker, adapter("a"))
    on_adapter = adapter("b", base="ep-adapter-a")
    refused(sagemaker.create_inference_component, "ValidationException", "not a base", **on_adapter)


def test_a_variant_with_a_model_takes_no_components(fake, sagemaker):
    sagemaker.create_model(**MODEL)
    sagemaker.create_endpoint_config(**changed(CONFIG, "ProductionVariants.0.ModelName", "ep-model"))
    sagemaker.create_endpoint(EndpointName="ep", EndpointConfigName="ep-config")
    sagemaker.describe_endpoint(EndpointName="ep")
    refused(sagemaker.create_inference_component, "ValidationException", "model of its own", **BASE)


def test_an_unknown_member_is_refused(fake_shared):
    """boto3 would not send it; a request that another client made is refused all the same."""
    shape = service_model("sagemaker").operation_model("DescribeEndpoint").input_shape
    assert list(problems(shape, {"EndpointName": "ep"})) == []
    (found,) = problems(shape, {"EndpointName": "ep", "Colour": "blue"})
    assert "colour" in found
    assert "Member must be a string" in next(problems(shape, {"EndpointName": 1}))
    assert "must not be null" in next(problems(shape, {}))


def test_every_pattern_but_the_malformed_is_translated():
    """Java's classes included; six patterns of services' models are no regular expressions at all."""
    names = ("sagemaker", "sagemaker-runtime", "service-quotas", "pricing", "ecr")
    shapes = [model.shape_for(n) for model in map(service_model, names) for n in model.shape_names]
    patterns = [(shape.name, shape.metadata["pattern"]) for shape in shapes if "pattern" in shape.metadata]
    broken = {name for name, pattern in patterns if compiled(pattern) is None}
    assert len(patterns) > 500
    assert broken == {
        "AthenaCatalog",
        "Catalog",
        "Database",
        "TableName",
        "CustomerMetadataKey",
        "CustomerMetadataValue",
    }
    tag = compiled(service_model("sagemaker").shape_for("TagKey").metadata["pattern"])
    assert tag.fullmatch("Kosten ä") and not tag.fullmatch("a{b")


def test_a_wrong_reply_is_noticed():
    check_reply("sagemaker", "CreateModel", {"ModelArn": "arn:aws:sagemaker:us-east-1:123456789012:model/m"})
    for wrong in ({}, {"ModelArn": "m"}, {"ModelArn": 1}):
        with pytest.raises(AssertionError, match="CreateModel"):
            check_reply("sagemaker", "CreateModel", wrong)
    with pytest.raises(AssertionError, match="no reply"):
        check_reply("sagemaker", "DeleteModel", {"Done": True})


def test_a_broken_stand_fails_the_test_at_its_end():
    with pytest.raises(AssertionError, match="secondaryStatus"), Fake() as fake:
        sagemaker = fake.client("sagemaker")
        sagemaker.create_training_job(**JOB)
        fake.jobs["job-1"].secondary = "Daydreaming"
        with pytest.raises(ClientError, match="InternalFailure"):
            sagemaker.describe_training_job(TrainingJobName="job-1")
    with pytest.raises(AssertionError, match="ListClusters"), Fake() as fake, pytest.raises(ClientError):
        fake.client("sagemaker").list_clusters()
    with pytest.raises(AssertionError, match="dynamodb"), Fake() as fake, pytest.raises(ClientError):
        fake.client("dynamodb").list_tables()


# Training


def test_training_without_a_simulator(fake, sagemaker):
    fake.ticks = 2
    arn = sagemaker.create_training_job(**JOB)["TrainingJobArn"]
    first = sagemaker.describe_training_job(TrainingJobName="job-1")
    assert (first["TrainingJobStatus"], first["SecondaryStatus"]) == ("InProgress", "Training")
    assert fake.left_behind() == ["job-1"]
    last = sagemaker.describe_training_job(TrainingJobName="job-1")
    assert (last["TrainingJobStatus"], last["SecondaryStatus"]) == ("Completed", "Completed")
    assert [t["Status"] for t in last["SecondaryStatusTransitions"]] == ["Starting", "Training", "Completed"]
    assert last["ModelArtifacts"]["S3ModelArtifacts"] == "s3://sagemaker-bucket/out/job-1/output/model.tar.gz"
    assert last["HyperParameters"] == JOB["HyperParameters"] and last["BillableTimeInSeconds"] == 1
    assert sagemaker.list_tags(ResourceArn=arn)["Tags"] == JOB["Tags"]
    (listed,) = sagemaker.list_training_jobs(NameContains="job", StatusEquals="Completed")["TrainingJobSummaries"]
    assert listed["TrainingJobName"] == "job-1"
    assert not fake.left_behind()
    refused(sagemaker.create_training_job, "ResourceInUse", "unique", **JOB)
    refused(sagemaker.stop_training_job, "ValidationException", "Completed", TrainingJobName="job-1")
    refused(sagemaker.stop_training_job, "ResourceNotFound", TrainingJobName="nope")
    refused(sagemaker.describe_training_job, "ValidationException", "Requested resource", TrainingJobName="nope")


def test_a_job_is_stopped(fake, sagemaker):
    sagemaker.create_training_job(**JOB)
    sagemaker.stop_training_job(TrainingJobName="job-1")
    assert fake.jobs["job-1"].stop.is_set() and fake.jobs["job-1"].status == "Stopping"
    refused(sagemaker.stop_training_job, "ValidationException", "in status Stopping", TrainingJobName="job-1")
    assert sagemaker.describe_training_job(TrainingJobName="job-1")["SecondaryStatus"] == "Stopped"


def test_a_simulator_moves_the_job_in_its_own_thread():
    def run_training(fake, job):
        assert job.plan == {"no_artifact": True}
        job.move("Training", "started")
        job.stop.wait(10)
        job.end("Failed", "Failed", "AlgorithmError: ExitCode 1")

    with Fake(run_training) as fake:
        fake.plan = {"no_artifact": True}
        sagemaker = fake.client("sagemaker")
        sagemaker.create_training_job(**JOB)
        sagemaker.stop_training_job(TrainingJobName="job-1")
        fake.jobs["job-1"].thread.join(10)
        described = sagemaker.describe_training_job(TrainingJobName="job-1")
        assert described["FailureReason"] == "AlgorithmError: ExitCode 1"
    with pytest.raises(AssertionError, match="InProgress"), Fake(lambda fake, job: None) as fake:  # never ends the job
        fake.client("sagemaker").create_training_job(**JOB)


def test_quotas_limit_jobs_and_endpoints(fake, sagemaker):
    sagemaker.create_training_job(**JOB)
    second = JOB | {"TrainingJobName": "job-2"}
    message = (
        "The account-level service limit 'ml.g6e.2xlarge for training job usage' is 1 Instances, with current "
        "utilization of 1 Instances and a request delta of 1 Instances."
    )
    refused(sagemaker.create_training_job, "ResourceLimitExceeded", message, **second)
    sagemaker.create_training_job(**second | SPOT)  # spot has a quota of its own
    third = second | SPOT | {"TrainingJobName": "job-3"}
    refused(sagemaker.create_training_job, "ResourceLimitExceeded", "spot training job usage' is 1 ", **third)
    sagemaker.describe_training_job(TrainingJobName="job-1")  # done: its instance is free again
    sagemaker.create_training_job(**third | {"EnableManagedSpotTraining": False} | {"StoppingCondition": {}})
    fake.quotas.clear()
    other = changed(JOB | {"TrainingJobName": "job-4"}, "ResourceConfig.InstanceType", "ml.m5.large")
    refused(
        sagemaker.create_training_job, "ResourceLimitExceeded", "'ml.m5.large for training job usage' is 0", **other
    )
    sagemaker.create_endpoint_config(**CONFIG)
    names = {"EndpointName": "ep", "EndpointConfigName": "ep-config"}
    refused(sagemaker.create_endpoint, "ResourceLimitExceeded", "'ml.g6e.2xlarge for endpoint usage' is 0", **names)
    fake.quotas["ml.g6e.2xlarge for endpoint usage"] = 1
    sagemaker.create_endpoint(**names)
    names["EndpointName"] = "ep-2"
    refused(sagemaker.create_endpoint, "ResourceLimitExceeded", "current utilization of 1", **names)


def test_images_must_exist(fake, sagemaker):
    fake.images = {"djl-inference:0.36.0-lmi28.0.0-cu130"}
    refused(sagemaker.create_training_job, "ValidationException", "not found", **JOB)
    sagemaker.create_model(**MODEL)
    ecr = fake.client("ecr")
    asked = {"registryId": "763104351884", "repositoryName": "djl-inference"}
    tags = [{"imageTag": "0.36.0-lmi28.0.0-cu130"}]
    assert ecr.describe_images(**asked, imageIds=tags)["imageDetails"][0]["imageTags"] == ["0.36.0-lmi28.0.0-cu130"]
    refused(ecr.describe_images, "ImageNotFoundException", **asked, imageIds=[{"imageTag": "1"}])
    refused(ecr.describe_images, "RepositoryNotFoundException", **asked | {"repositoryName": "vllm"}, imageIds=tags)
    refused(ecr.describe_images, "RepositoryNotFoundException", repositoryName="djl-inference", imageIds=tags)
    refused(ecr.describe_images, "InvalidParameterException", **asked | {"registryId": "7"}, imageIds=tags)


# Hosting


def test_two_adapters_from_creation_to_deletion(fake, sagemaker):
    fake.serving = Serving()
    runtime = fake.client("sagemaker-runtime")

    def invoke(name, body=b'{"prompt": "hello"}', content="application/json", **more):
        more |= {"InferenceComponentName": name} if name else {}
        return runtime.invoke_endpoint(EndpointName="ep", ContentType=content, Body=body, **more)

    endpoint(sagemaker)
    described = component(sagemaker, BASE)
    assert described["Specification"]["ModelName"] == "ep-model"
    assert described["Specification"]["ComputeResourceRequirements"]["MinMemoryRequiredInMb"] == 4096
    assert described["RuntimeConfig"] == {"DesiredCopyCount": 1, "CurrentCopyCount": 1}
    good = component(sagemaker, adapter("good"))
    assert good["InferenceComponentStatus"] == "InService" and good["VariantName"] == "AllTraffic"
    assert good["Specification"] == adapter("good")["Specification"] and "RuntimeConfig" not in good
    bad = component(sagemaker, adapter("bad", "s3://sagemaker-bucket/bad.tar.gz"))
    assert bad["InferenceComponentStatus"] == "Failed" and "max_lora_rank" in bad["FailureReason"]

    reply = invoke("ep-adapter-good")
    assert json.load(reply["Body"]) == {"component": "ep-adapter-good", "echo": "hello"}
    assert reply["InvokedProductionVariant"] == "AllTraffic"
    refused(invoke, "ValidationError", "header is required", name=None)
    refused(invoke, "ValidationError", "not found", name="ep-adapter-nope")
    refused(invoke, "ValidationError", "has failed", name="ep-adapter-bad")
    refused(invoke, "ValidationError", "less than or equal", name="ep-base", body=b" " * (6 * 1024 * 1024 + 1))
    refused(invoke, "ValidationError", "regular expression", name="ep_base")
    response = refused(invoke, "ModelError", "no prompt", name="ep-base", body=b"{}")
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert (response["OriginalStatusCode"], response["OriginalMessage"]) == (400, '{"error": "no prompt"}')
    refused(invoke, "ModelError", "not JSON", name="ep-base", body=b"{")
    refused(invoke, "ModelError", "content type", name="ep-base", content="text/plain")

    for name in ("ep-base", "ep-adapter-good", "ep-adapter-bad"):
        if name == "ep-base":
            refused(
                sagemaker.delete_inference_component, "ValidationException", "adapters", InferenceComponentName=name
            )
            continue
        sagemaker.delete_inference_component(InferenceComponentName=name)
        refused(
            sagemaker.describe_inference_component, "ValidationException", "Could not find", InferenceComponentName=name
        )
    refused(sagemaker.delete_endpoint, "ValidationException", "inference component associated", EndpointName="ep")
    sagemaker.delete_inference_component(InferenceComponentName="ep-base")
    refused(sagemaker.delete_endpoint, "ValidationException", "inference component associated", EndpointName="ep")
    assert sagemaker.list_inference_components(EndpointNameEquals="ep")["InferenceComponents"] == []
    sagemaker.delete_endpoint_config(EndpointConfigName="ep-config")  # allowed while in use, as on AWS
    sagemaker.delete_endpoint(EndpointName="ep")
    refused(sagemaker.delete_endpoint, "ValidationException", "in-progress", EndpointName="ep")
    refused(sagemaker.describe_endpoint, "ValidationException", "Could not find endpoint", EndpointName="ep")
    assert fake.left_behind() == ["ep-model"]
    sagemaker.delete_model(ModelName="ep-model")
    refused(sagemaker.delete_model, "ValidationException", "Could not find model", ModelName="ep-model")
    assert not fake.left_behind()
    loads = [event[1] for event in fake.serving.events if event[0] == "load"]
    assert loads == ["ep-base", "ep-adapter-good", "ep-adapter-bad"]
    assert ("unload", "ep-base") in fake.serving.events


def test_an_adapter_is_swapped(fake, sagemaker):
    fake.serving = Serving()
    endpoint(sagemaker)
    component(sagemaker, BASE)
    component(sagemaker, adapter("a"))
    fake.ticks = 2
    swap = {key: value for key, value in adapter("a", "s3://b/new.tar.gz").items() if key != "EndpointName"}
    sagemaker.update_inference_component(**swap)
    refused(sagemaker.update_inference_component, "ValidationException", "Updating", **swap)
    states = [
        sagemaker.describe_inference_component(InferenceComponentName="ep-adapter-a")["InferenceComponentStatus"]
        for _ in range(2)
    ]
    assert states == ["Updating", "InService"]
    assert fake.serving.events[-1] == ("load", "ep-adapter-a", "s3://b/new.tar.gz")
    other_base = changed(swap, "Specification.BaseInferenceComponentName", "other")
    refused(sagemaker.update_inference_component, "ValidationException", "cannot be changed", **other_base)
    archive = changed(swap, "Specification.Container.ArtifactUrl", "s3://b/new.zip")
    refused(sagemaker.update_inference_component, "ValidationException", ".tar.gz", **archive)
    bad = changed(swap, "Specification.Container.ArtifactUrl", "s3://b/bad.tar.gz")
    sagemaker.update_inference_component(**bad)
    sagemaker.describe_inference_component(InferenceComponentName="ep-adapter-a")
    described = sagemaker.describe_inference_component(InferenceComponentName="ep-adapter-a")
    assert described["InferenceComponentStatus"] == "Failed" and "max_lora_rank" in described["FailureReason"]
    refused(sagemaker.update_inference_component, "ValidationException", "Could not", InferenceComponentName="x")


def test_states_that_do_not_end_well(fake, sagemaker):
    fake.stuck, fake.failing = {"ep-2"}, {"ep-1": "CapacityError: Unable to provision requested ML compute capacity"}
    fake.quotas["ml.g6e.2xlarge for endpoint usage"] = 3
    sagemaker.create_endpoint_config(**CONFIG)
    for name in ("ep-1", "ep-2"):
        sagemaker.create_endpoint(EndpointName=name, EndpointConfigName="ep-config")
    failed = sagemaker.describe_endpoint(EndpointName="ep-1")
    assert failed["EndpointStatus"] == "Failed" and failed["FailureReason"].startswith("CapacityError")
    sagemaker.delete_endpoint(EndpointName="ep-1")
    for _ in range(3):
        assert sagemaker.describe_endpoint(EndpointName="ep-2")["EndpointStatus"] == "Creating"
    refused(sagemaker.delete_endpoint, "ValidationException", "in-progress", EndpointName="ep-2")


def test_an_image_newer_than_the_driver_never_starts(fake, sagemaker):
    sagemaker.create_model(**MODEL)
    old = changed(CONFIG, "ProductionVariants.0.InferenceAmiVersion", "al2-ami-sagemaker-inference-gpu-3-1")
    sagemaker.create_endpoint_config(**old)
    sagemaker.create_endpoint(EndpointName="ep", EndpointConfigName="ep-config")
    sagemaker.describe_endpoint(EndpointName="ep")
    sagemaker.create_inference_component(**BASE)
    for _ in range(3):
        described = sagemaker.describe_inference_component(InferenceComponentName="ep-base")
    assert described["InferenceComponentStatus"] == "Creating"


def test_invoking_too_early(fake, sagemaker):
    fake.serving = Serving()
    runtime = fake.client("sagemaker-runtime")
    arguments = {"EndpointName": "ep", "InferenceComponentName": "ep-base", "ContentType": "application/json"}
    refused(runtime.invoke_endpoint, "ValidationError", "Endpoint ep of account", **arguments, Body=b"{}")
    sagemaker.create_model(**MODEL)
    sagemaker.create_endpoint_config(**CONFIG)
    sagemaker.create_endpoint(EndpointName="ep", EndpointConfigName="ep-config")
    refused(runtime.invoke_endpoint, "ValidationError", "Endpoint ep of account", **arguments, Body=b"{}")
    sagemaker.describe_endpoint(EndpointName="ep")
    sagemaker.create_inference_component(**BASE)
    response = refused(runtime.invoke_endpoint, "ModelNotReadyException", **arguments, Body=b"{}")
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 429
    fake.serving = None
    sagemaker.describe_inference_component(InferenceComponentName="ep-base")
    refused(runtime.invoke_endpoint, "ModelError", "no model", **arguments, Body=b"{}")


def test_invocations_run_side_by_side(fake, sagemaker):
    both = threading.Barrier(2, timeout=10)

    class Slow(Serving):
        def invoke(self, fake, name, body):
            both.wait()
            return 200, {}

    fake.serving = Slow()
    endpoint(sagemaker)
    component(sagemaker, BASE)
    runtime = fake.client("sagemaker-runtime")
    arguments = {"EndpointName": "ep", "InferenceComponentName": "ep-base", "ContentType": "application/json"}
    threads = [threading.Thread(target=runtime.invoke_endpoint, kwargs=arguments | {"Body": b"{}"}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not both.broken and [r.status for r in fake.requests[-2:]] == [200, 200]


def test_lists_come_in_pages_and_tags_stay(fake, sagemaker):
    for i in range(5):
        sagemaker.create_model(**MODEL | {"ModelName": f"m-{i}", "Tags": [{"Key": "number", "Value": str(i)}]})
    fake.page_size = 2
    pages = list(sagemaker.get_paginator("list_models").paginate(NameContains="m-", SortBy="Name"))
    assert [len(page["Models"]) for page in pages] == [2, 2, 1]
    assert [m["ModelName"] for page in pages for m in page["Models"]] == ["m-4", "m-3", "m-2", "m-1", "m-0"]
    assert len(sagemaker.list_models(MaxResults=1)["Models"]) == 1
    arn = sagemaker.describe_model(ModelName="m-1")["ModelArn"]
    sagemaker.add_tags(ResourceArn=arn, Tags=[{"Key": "number", "Value": "one"}])
    assert sagemaker.list_tags(ResourceArn=arn)["Tags"] == [{"Key": "number", "Value": "one"}]
    sagemaker.delete_model(ModelName="m-1")
    refused(sagemaker.list_tags, "ValidationException", "Could not find", ResourceArn=arn)
    endpoint(sagemaker)
    component(sagemaker, BASE)
    for name in "abc":
        component(sagemaker, adapter(name))
    paginate = sagemaker.get_paginator("list_inference_components").paginate
    assert [len(page["InferenceComponents"]) for page in paginate(EndpointNameEquals="ep")] == [2, 2]
    assert [len(page["InferenceComponents"]) for page in paginate(EndpointNameEquals="other")] == [0]
    assert (
        sagemaker.list_endpoint_configs(NameContains="ep-")["EndpointConfigs"][0]["EndpointConfigName"] == "ep-config"
    )
    assert sagemaker.list_endpoints(StatusEquals="InService")["Endpoints"][0]["EndpointName"] == "ep"
    assert sagemaker.describe_endpoint_config(EndpointConfigName="ep-config")["ProductionVariants"]


# Quotas, prices, and the services of moto


def test_quotas_and_prices(fake):
    quotas = fake.client("service-quotas")
    fake.page_size = 4
    pages = list(quotas.get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker"))
    found = {quota["QuotaName"]: quota for page in pages for quota in page["Quotas"]}
    assert len(pages) == 2 and found.keys() == fake.quotas.keys()
    assert found["ml.g6e.2xlarge for training job usage"]["QuotaCode"] == "L-D1AFBF6F"
    defaults = quotas.list_aws_default_service_quotas(ServiceCode="sagemaker")["Quotas"]
    assert {quota["Value"] for quota in defaults} == {0.0}
    refused(quotas.list_service_quotas, "NoSuchResourceException", ServiceCode="sagemakers")
    refused(quotas.list_service_quotas, "IllegalArgumentException", ServiceCode="sage maker")

    def price(region="us-east-1", client=None, **filters):
        wanted = [{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in filters.items()]
        pricing = client or fake.client("pricing", region=region)
        return pricing.get_products(ServiceCode="AmazonSageMaker", Filters=wanted)["PriceList"]

    (text,) = price(regionCode="us-east-1", instanceName="ml.g6e.2xlarge", platoinstancetype="Training")
    (term,) = json.loads(text)["terms"]["OnDemand"].values()
    (dimension,) = term["priceDimensions"].values()
    assert dimension["unit"] == "Hrs" and float(dimension["pricePerUnit"]["USD"]) == 2.80
    assert price(instanceName="ml.p5.48xlarge") == [] and price(colour="blue") == []
    refused(price, "UnknownEndpoint", region="eu-west-1")  # the real one does not even resolve
    refused(fake.client("pricing").get_products, "InvalidParameterException", ServiceCode="Sagemaker")
    refused(fake.client("sagemaker", region="eu-west-1").list_models, "UnknownEndpoint")


def test_moto_behind_the_front(fake):
    bucket = fake.bucket("sagemaker-us-east-1-123456789012")
    s3 = fake.client("s3")
    s3.upload_fileobj(io.BytesIO(b"x" * 9_000_000), bucket, "calibrated-confidence/big file")  # several parts
    assert s3.head_object(Bucket=bucket, Key="calibrated-confidence/big file")["ContentLength"] == 9_000_000
    s3.put_object(Bucket=bucket, Key="small", Body=b"a secret")
    assert s3.get_object(Bucket=bucket, Key="small")["Body"].read() == b"a secret"
    assert len(s3.list_objects_v2(Bucket=bucket)["Contents"]) == 2
    seen = {request.operation for request in fake.requests}
    assert seen >= {"CreateBucket", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "HeadObject"}
    assert seen >= {"PutObject", "GetObject", "ListObjectsV2"}
    (put,) = [request for request in fake.requests if request.operation == "PutObject"]
    assert (put.service, put.method, put.body, put.status) == ("s3", "PUT", b"a secret", 200)
    refused(s3.head_bucket, "404", Bucket="nope")
    refused(s3.get_object, "NoSuchKey", Bucket=bucket, Key="nope")
    elsewhere = fake.client("s3").head_bucket(Bucket=fake.bucket("in-europe", region="eu-west-1"))
    assert elsewhere["BucketRegion"] == "eu-west-1"
    assert fake.client("sts").get_caller_identity()["Account"] == fake.account
    arn = fake.role("SageMakerExecution")
    role = fake.client("iam").get_role(RoleName="SageMakerExecution")["Role"]
    assert role["Arn"] == arn
    assert role["AssumeRolePolicyDocument"]["Statement"][0]["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    logs = fake.client("logs")
    logs.create_log_group(logGroupName="g")
    logs.create_log_stream(logGroupName="g", logStreamName="job/1")
    event = {"timestamp": int(time.time() * 1000), "message": "step 1"}
    logs.put_log_events(logGroupName="g", logStreamName="job/1", logEvents=[event])
    assert logs.get_log_events(logGroupName="g", logStreamName="job/1")["events"][0]["message"] == "step 1"
    secrets = fake.client("secretsmanager")
    secrets.create_secret(Name="hf", SecretString="s")
    assert secrets.get_secret_value(SecretId="hf")["SecretString"] == "s"


def test_state_does_not_outlive_the_stand(fake):
    assert fake.client("s3").list_buckets()["Buckets"] == []


# Injected errors


@pytest.mark.parametrize(
    ("service", "operation", "arguments", "code"),
    [
        ("sagemaker", "ListModels", {}, "ThrottlingException"),
        ("sagemaker", "CreateTrainingJob", JOB, "AccessDeniedException"),
        ("sagemaker-runtime", "InvokeEndpoint", {"EndpointName": "e", "Body": b"{}"}, "ModelNotReadyException"),
        ("service-quotas", "ListServiceQuotas", {"ServiceCode": "sagemaker"}, "AccessDeniedException"),
        ("pricing", "GetProducts", {"ServiceCode": "AmazonSageMaker"}, "AccessDeniedException"),
        ("ecr", "DescribeImages", {"repositoryName": "vllm"}, "AccessDeniedException"),
        ("s3", "PutObject", {"Bucket": "bucket", "Key": "k", "Body": b"x"}, "ExpiredToken"),
        ("s3", "CreateMultipartUpload", {"Bucket": "bucket", "Key": "k"}, "AccessDenied"),
        ("s3", "ListObjectsV2", {"Bucket": "bucket"}, "AccessDenied"),
        ("s3", "CreateBucket", {"Bucket": "bucket"}, "BucketAlreadyExists"),
        ("sts", "GetCallerIdentity", {}, "ExpiredTokenException"),
        ("iam", "GetRole", {"RoleName": "r"}, "AccessDenied"),
        ("logs", "DescribeLogStreams", {"logGroupName": "g"}, "AccessDeniedException"),
        ("secretsmanager", "GetSecretValue", {"SecretId": "s"}, "AccessDeniedException"),
    ],
)
def test_injected_errors_arrive_in_each_service(fake_shared, service, operation, arguments, code):
    call = getattr(fake_shared.client(service), xform_name(operation))
    fake_shared.fail(operation, code, "because <I> & you", service=service)
    refused(call, code, "because <I> & you", **arguments)
    assert fake_shared.requests[-1].operation == operation and fake_shared.requests[-1].status == 400


def test_injection_counts_and_names_its_service(fake, sagemaker):
    fake.fail("ListModels", "ThrottlingException", "Rate exceeded", times=2)
    retrying = fake.client("sagemaker", retries={"total_max_attempts": 3, "mode": "standard"})
    assert retrying.list_models()["Models"] == [] and len(fake.calls("ListModels")) == 3
    fake.fail("*", "ExpiredTokenException", "expired", service="sagemaker")
    fake.client("sts").get_caller_identity()
    refused(sagemaker.list_endpoints, "ExpiredTokenException", "expired")
    sagemaker.list_endpoints()
    fake.fail("HeadBucket", "403", "", status=403)
    refused(fake.client("s3").head_bucket, "403", Bucket="bucket")
    fake.fail("InvokeEndpoint", "ModelError", "CUDA out of memory", status=500)
    response = refused(fake.client("sagemaker-runtime").invoke_endpoint, "ModelError", EndpointName="e", Body=b"{}")
    assert response["OriginalStatusCode"] == 500 and response["ResponseMetadata"]["HTTPStatusCode"] == 424


def test_a_token_is_let_through_on_request_and_found_in_the_record(fake, sagemaker):
    fake.allow_tokens = True
    token = "hf_" + "a" * 30
    sagemaker.create_training_job(**JOB | {"Environment": {"HF_TOKEN": token}})
    (request,) = [r for r in fake.requests if token.encode() in r.body]
    assert request.operation == "CreateTrainingJob" and "Authorization" in request.headers
    assert fake.calls("CreateTrainingJob")[0]["Environment"] == {"HF_TOKEN": token}


def test_env_is_all_a_command_needs(fake):
    code = "import boto3; print(boto3.client('sts').get_caller_identity()['Account'])"
    done = subprocess.run([sys.executable, "-c", code], env=fake.env, capture_output=True, text=True)
    assert done.stdout.strip() == fake.account, done.stderr
