"""A stand-in for Amazon SageMaker in this process; S3, IAM, STS, logs and secrets are moto's server on 127.0.0.1.

    with Fake() as fake:
        monkeypatch.setattr("boto3.Session", fake.session)     # then commands run in this process
        assert fake.calls("CreateTrainingJob")[0]["RoleArn"] == ...

botocore checks little of what it sends, so every request is checked here against its own model of the service: enums,
patterns and lengths too. What it cannot show: permissions, image pulls, GPUs, capacity, AWS's wording.
"""

import functools
import io
import json
import logging
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import boto3
import botocore.session
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.response import StreamingBody
from botocore.stub import Stubber
from botocore.validate import ParamValidator

from aws import Account

ACCOUNT, REGION = "123456789012", "us-east-1"
BUCKET = f"sagemaker-{REGION}-{ACCOUNT}"
MODEL = botocore.session.get_session().get_service_model("sagemaker")
KINDS = ("TrainingJob", "Model", "EndpointConfig", "Endpoint", "InferenceComponent")


def problems(operation, body):
    """What AWS's own description of an operation does not allow in a body."""
    shape = MODEL.operation_model(operation).input_shape
    report = ParamValidator().validate(body, shape)
    return [report.generate_report()] if report.has_errors() else list(_beyond_types(shape, body, operation))


def _beyond_types(shape, value, path):
    """Enums, patterns and lengths, which botocore leaves to the service."""
    limits = shape.metadata
    if shape.type_name == "structure":
        for name, part in value.items():
            yield from _beyond_types(shape.members[name], part, f"{path}.{name}")
    elif shape.type_name == "list":
        for part in value:
            yield from _beyond_types(shape.member, part, f"{path}[]")
    elif shape.type_name == "map":
        for name, part in value.items():
            yield from _beyond_types(shape.key, name, f"{path}.key")
            yield from _beyond_types(shape.value, part, f"{path}.{name}")
    elif shape.type_name == "string":
        try:
            matches = re.fullmatch(limits.get("pattern", ".*"), value, re.DOTALL)
        except re.error:  # Java's \p{L}
            matches = True
        if not matches or value not in limits.get("enum", [value]):
            yield f"{path}: {value!r} is not allowed"
    size = len(value) if hasattr(value, "__len__") else value
    if not limits.get("min", size) <= size <= limits.get("max", size):
        yield f"{path}: {size} is out of range"


def golden(name):
    """A request body that is known to be right, from data/sagemaker_requests.json."""
    return json.loads((Path(__file__).parent / "data" / "sagemaker_requests.json").read_text(encoding="utf-8"))[name]


def stubbed(service="sagemaker"):
    """An account whose client for one service is botocore's Stubber: (account, stubber)."""
    client = session().client(service, config=Config(retries={"total_max_attempts": 1}))
    return Account(REGION, ACCOUNT, session(), {service: client}), Stubber(client)


@functools.cache
def session():
    """One session for everything: to parse the models of the services is what making a client takes."""
    return boto3.Session(aws_access_key_id="testing", aws_secret_access_key="testing", region_name=REGION)


class RefusalError(Exception):
    def __init__(self, message, code="ValidationException"):
        super().__init__(message)
        self.code = code


@dataclass
class Job:
    """One training job; `plan` tells the simulator of the container what is to happen to it."""

    request: dict
    plan: dict
    status: str = "InProgress"
    secondary: str = "Starting"
    transitions: list = field(default_factory=list)
    result: dict = field(default_factory=dict)  # times and a reason, as DescribeTrainingJob names them
    thread: threading.Thread | None = None

    @property
    def name(self):
        return self.request["TrainingJobName"]

    def move(self, secondary, message=""):
        self.secondary = secondary
        self.transitions.append({"Status": secondary, "StartTime": time.time(), "StatusMessage": message})

    def end(self, status, secondary, reason=None):
        self.move(secondary, reason or "")
        if reason:
            self.result["FailureReason"] = reason
        self.status = status  # last: whoever polls must see a complete record

    def described(self):
        artifacts = f"{self.request['OutputDataConfig']['S3OutputPath']}/{self.name}/output/model.tar.gz"
        return {
            "TrainingJobStatus": self.status,
            "SecondaryStatus": self.secondary,
            "SecondaryStatusTransitions": list(self.transitions),
            "ModelArtifacts": {"S3ModelArtifacts": artifacts},
            **self.result,
        }


@dataclass
class Resource:
    """A model, a configuration, an endpoint or a component; `left` are the looks until it is in its next state."""

    request: dict
    status: str = "InService"
    left: int = 0
    reason: str | None = None

    @property
    def specification(self):
        return self.request.get("Specification", {})

    @property
    def base(self):
        return self.specification.get("BaseInferenceComponentName")


class Fake:
    """All of AWS for one test; see the module's docstring."""

    def __init__(self, run_training=None):
        self.run_training, self.serving = run_training, None  # a function of (component, body) that replies
        self.broken, self.clients, self.lock = [], {}, threading.RLock()

    def clear(self):
        """As it was at first: nothing but a role."""
        urlopen(f"{self.env['AWS_ENDPOINT_URL']}/moto-api/reset", data=b"").close()
        role = {"RoleName": "SageMakerExecutionRole", "AssumeRolePolicyDocument": '{"Version": "2012-10-17"}'}
        self.client("iam").create_role(**role)
        self.plan = {}  # of the next jobs
        self.failing, self.stuck = {}, set()  # names that become Failed, with their reason; that stay in Creating
        self.requests, self.injected = [], []
        self.there = {kind: {} for kind in KINDS}  # by name
        self.jobs, self.components = self.there["TrainingJob"], self.there["InferenceComponent"]

    def __enter__(self):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else it reports every request
        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.moto.start()
        self.env = {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*self.moto.get_host_and_port()),
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret-key",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",  # nothing of the developer's own account takes part
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "NO_PROXY": "127.0.0.1",
        }
        self.clear()  # what moto keeps is the process's, not the server's
        return self

    def __exit__(self, kind, error, trace):
        for job in self.jobs.values():
            if job.thread:
                job.thread.join(30)
        threading.Thread(target=self.moto.stop).start()  # takes half a second, which nobody needs to wait for
        if kind is None:
            assert not self.broken, "\n".join(self.broken)

    # What tests use

    def client(self, service):
        with self.lock:  # making clients is not safe for threads, and takes long
            if service not in self.clients:
                client = session().client(service, endpoint_url=self.env["AWS_ENDPOINT_URL"])
                client.meta.events.register("before-call.sagemaker.*", self.respond)
                client.meta.events.register("before-call.sagemaker-runtime.*", self.respond)
                self.clients[service] = client
            return self.clients[service]

    def session(self, region_name=None):
        """What boto3.Session is to commands in this process."""
        return SimpleNamespace(
            region_name=region_name or REGION,
            client=lambda service, **_: self.client(service),
            get_partition_for_region=lambda region: "aws",
        )

    def objects(self):
        """Everything in S3: (bucket, key) -> content."""
        s3 = self.client("s3")
        found = {}
        for bucket in (one["Name"] for one in s3.list_buckets()["Buckets"]):
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
            for key in (one["Key"] for page in pages for one in page.get("Contents", ())):
                found[bucket, key] = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        return found

    def below(self, uri):
        """What S3 holds below an address: the rest of the key -> content."""
        return {
            f"s3://{bucket}/{key}".removeprefix(uri): content
            for (bucket, key), content in self.objects().items()
            if f"s3://{bucket}/{key}".startswith(uri)
        }

    def fail(self, operation, code, message=""):
        """The next call of the operation answers with this error."""
        self.injected.append((operation, code, message))

    def calls(self, operation):
        return [body for name, body in self.requests if name == operation]

    def left_behind(self):
        """What is billed, or clutters the account."""
        return [name for kind in KINDS[1:] for name in self.there[kind]]

    # Requests

    def respond(self, model, params, **_):
        """What botocore takes in place of sending a request: (HTTP response, parsed reply)."""
        status = 200
        try:
            if model.name == "InvokeEndpoint":
                component = params["headers"]["X-Amzn-SageMaker-Inference-Component"]
                reply = self.invoke(params["url_path"].split("/")[2], component, params["body"])
            else:
                reply = self.answer(model.name, json.loads(params["body"]))
        except RefusalError as error:
            status, reply = 400, {"Error": {"Code": error.code, "Message": str(error)}}
        return AWSResponse(None, status, {}, None), reply | {"ResponseMetadata": {"HTTPStatusCode": status}}

    def invoke(self, endpoint, component, content):
        for kind, name in (("Endpoint", endpoint), ("InferenceComponent", component)):
            if name not in self.there[kind] or self.there[kind][name].status != "InService":
                raise RefusalError(f"{kind} {name} of account {ACCOUNT} not found.", "ValidationError")
        said = json.dumps(self.serving(component, json.loads(content))).encode()
        return {"Body": StreamingBody(io.BytesIO(said), len(said))}

    def answer(self, operation, body):
        self.requests.append((operation, body))
        for injected in self.injected:
            if injected[0] == operation:
                self.injected.remove(injected)
                raise RefusalError(injected[2], injected[1])
        if found := problems(operation, body):
            raise RefusalError("; ".join(found))
        verb, kind = re.fullmatch("([A-Z][a-z]+)([A-Z][A-Za-z]+?)s?", operation).groups()
        with self.lock:
            if verb == "List":
                return self.list(kind, body)
            name = body[f"{kind}Name"]
            if verb == "Create":
                return self.create(kind, name, body)
            self.settle(kind, name)
            if name not in self.there[kind]:
                raise RefusalError(f'Could not find "arn:aws:sagemaker:{REGION}:{ACCOUNT}:{name}".')
            found = self.there[kind][name]
            if verb == "Describe":
                return self.describe(kind, found)
            if verb == "Update":
                found.request, found.status, found.left = found.request | body, "Updating", 2
            elif verb == "Stop":
                found.end("Stopped", "Stopped")
            else:
                self.delete(kind, name, found)
            return {}

    def list(self, kind, body):
        """The newest first."""
        if kind == "InferenceComponent":
            names = [
                n for n, one in self.components.items() if one.request["EndpointName"] == body["EndpointNameEquals"]
            ]
        else:
            names = [name for name in self.there[kind] if body["NameContains"] in name]
        plural = {"TrainingJob": "TrainingJobSummaries"}.get(kind, f"{kind}s")
        return {plural: [{f"{kind}Name": name} for name in reversed(names)]}

    def create(self, kind, name, body):
        if name in self.there[kind]:
            raise RefusalError(f'Cannot create already existing resource "{name}".')
        if kind == "TrainingJob":
            self.jobs[name] = job = Job(body, dict(self.plan))
            job.move("Starting", "Starting the training job")
            if self.run_training:
                job.thread = threading.Thread(target=self.run_training, args=(self, job), daemon=True)
                job.thread.start()
            return {"TrainingJobArn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{name}"}
        made = Resource(body)
        if kind in ("Endpoint", "InferenceComponent"):
            made.status, made.left = "Creating", 2
        needed = [("Endpoint", body["EndpointName"])] if kind == "InferenceComponent" else []
        if made.base:
            needed.append(("InferenceComponent", made.base))
        for of, other in needed:
            if other not in self.there[of] or self.there[of][other].status != "InService":
                raise RefusalError(f"{other} is not InService")
        self.there[kind][name] = made
        return {}

    def describe(self, kind, found):
        if kind == "TrainingJob":
            return found.request | found.described()
        reason = {"FailureReason": found.reason} if found.reason else {}
        return found.request | {f"{kind}Status": found.status} | reason

    def delete(self, kind, name, found):
        if kind in ("Model", "EndpointConfig"):
            del self.there[kind][name]
            return
        for other, one in self.components.items():
            if name == (one.base if kind == "InferenceComponent" else one.request["EndpointName"]):
                raise RefusalError(f"Cannot delete {name}: {other} belongs to it.")
        if found.status in ("Creating", "Updating"):
            raise RefusalError("Cannot update in-progress resource.")
        if found.status != "Deleting":
            found.status, found.left = "Deleting", 2

    def settle(self, kind, name):
        """One look passes: count down, and enter the state that follows Creating, Updating or Deleting."""
        found = self.there[kind].get(name)
        if not isinstance(found, Resource) or found.status in ("InService", "Failed"):
            return
        if found.status == "Creating" and name in self.stuck:
            return
        found.left -= 1
        if found.left > 0:
            return
        if found.status == "Deleting":
            del self.there[kind][name]
            return
        found.reason = self.failing.get(name)
        found.status = "Failed" if found.reason else "InService"
