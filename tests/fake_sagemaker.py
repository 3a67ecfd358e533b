"""A stand-in for Amazon SageMaker on 127.0.0.1; S3, IAM, STS, logs and secrets are moto's.

    with Fake() as fake:                                      # boto3 finds it through the variables of fake.env
        subprocess.run([...], env=os.environ | fake.env)
        assert fake.calls("CreateTrainingJob")[0]["RoleArn"] == ...

botocore checks little of what it sends, so every request is checked here against its own model of the service: enums,
patterns and lengths too. What a wrong order of requests would do on AWS it does here. What it cannot show: permissions,
image pulls, GPUs, capacity, AWS's wording.
"""

import functools
import json
import logging
import re
import threading
import time
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import boto3
import botocore.session
from botocore import xform_name
from botocore.config import Config
from botocore.stub import Stubber
from botocore.validate import ParamValidator

from aws import Account

ACCOUNT, REGION = "123456789012", "us-east-1"
BUCKET = f"sagemaker-{REGION}-{ACCOUNT}"
MODEL = botocore.session.get_session().get_service_model("sagemaker")
COMPONENT_HEADER = "X-Amzn-SageMaker-Inference-Component"


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
    def __init__(self, message, code="ValidationException", status=400, **extra):
        super().__init__(message)
        self.code, self.status, self.extra = code, status, extra


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

    @property
    def running(self):
        return self.status in ("InProgress", "Stopping")

    def move(self, secondary, message=""):
        self.secondary = secondary
        self.transitions.append({"Status": secondary, "StartTime": time.time(), "StatusMessage": message})

    def end(self, status, secondary, reason=None):
        self.move(secondary, reason or "")
        if reason:
            self.result["FailureReason"] = reason
        self.status = status  # last: whoever polls must see a complete record


@dataclass
class Resource:
    """An endpoint or an inference component on its way to a state; `left` are the looks until it is there."""

    request: dict
    status: str = "Creating"
    left: int = 2
    reason: str | None = None

    @property
    def specification(self):
        return self.request.get("Specification", {})

    @property
    def base(self):
        return self.specification.get("BaseInferenceComponentName")


class Fake:
    """All of AWS for one test; see the module's docstring."""

    def __init__(self, run_training=None, serving=None):
        self.run_training, self.serving = run_training, serving
        self.plan = {}  # of the next jobs
        self.failing, self.stuck = {}, set()  # names that become Failed, with their reason; that stay in Creating
        self.requests, self.broken, self.injected = [], [], []
        self.jobs, self.models, self.configs, self.endpoints, self.components = {}, {}, {}, {}, {}
        self.lock = threading.RLock()

    def __enter__(self):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else it reports every request
        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.moto.start()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        moto = "http://{}:{}".format(*self.moto.get_host_and_port())
        urlopen(f"{moto}/moto-api/reset", data=b"").close()  # what moto keeps is the process's, not the server's
        self.env = {
            "AWS_ENDPOINT_URL": moto,
            "AWS_ENDPOINT_URL_SAGEMAKER": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret-key",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",  # nothing of the developer's own account takes part
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "NO_PROXY": "127.0.0.1",
        }
        return self

    def __exit__(self, kind, error, trace):
        for job in self.jobs.values():
            if job.thread:
                job.thread.join(30)
        self.server.shutdown()
        self.server.server_close()
        threading.Thread(target=self.moto.stop).start()  # takes half a second, which nobody needs to wait for
        if kind is None:
            assert not self.broken, "\n".join(self.broken)

    # What tests use

    def client(self, service):
        url = self.env.get(f"AWS_ENDPOINT_URL_{service.upper()}", self.env["AWS_ENDPOINT_URL"])
        with self.lock:  # making clients is not safe for threads
            return session().client(service, endpoint_url=url)

    def role(self, name="SageMakerExecutionRole"):
        self.client("iam").create_role(RoleName=name, AssumeRolePolicyDocument='{"Version": "2012-10-17"}')

    def objects(self):
        """Everything in S3: (bucket, key) -> content."""
        s3 = self.client("s3")
        found = {}
        for bucket in (one["Name"] for one in s3.list_buckets()["Buckets"]):
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
            for key in (one["Key"] for page in pages for one in page.get("Contents", ())):
                found[bucket, key] = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        return found

    def fail(self, operation, code, message="", times=1):
        """The next `times` calls of the operation answer with this error."""
        self.injected += [(operation, code, message)] * times

    def calls(self, operation):
        return [body for name, body in self.requests if name == operation]

    def left_behind(self):
        tables = (self.endpoints, self.configs, self.models, self.components)
        return [name for table in tables for name in table] + [job.name for job in self.jobs.values() if job.running]

    # Requests

    def answer(self, operation, body):
        self.requests.append((operation, body))
        for injected in self.injected:
            if injected[0] == operation:
                self.injected.remove(injected)
                raise RefusalError(injected[2], injected[1])
        if found := problems(operation, body):
            raise RefusalError("; ".join(found))
        with self.lock:
            return getattr(self, xform_name(operation))(body) or {}

    def add(self, table, name, value):
        if name in table:
            raise RefusalError(f'Cannot create already existing resource "{name}".')
        table[name] = value

    def find(self, table, name):
        self.settle(table, name)
        if name not in table:
            raise RefusalError(f'Could not find "arn:aws:sagemaker:{REGION}:{ACCOUNT}:{name}".')
        return table[name]

    def settle(self, table, name):
        """One look passes: count down, and enter the state that follows Creating, Updating or Deleting."""
        found = table.get(name)
        if not isinstance(found, Resource) or found.status in ("InService", "Failed"):
            return
        if found.status == "Creating" and name in self.stuck:
            return
        found.left -= 1
        if found.left > 0:
            return
        if found.status == "Deleting":
            del table[name]
            return
        found.reason = self.failing.get(name) or (self.load(name, found) if table is self.components else None)
        found.status = "Failed" if found.reason else "InService"

    def load(self, name, component):
        """Let the serving side load a component; a FailureReason or None."""
        try:
            if self.serving:
                self.serving.load(self, name, component)
        except ValueError as error:
            return str(error)[:1024]

    def start_deleting(self, resource):
        if resource.status in ("Creating", "Updating"):
            raise RefusalError("Cannot update in-progress resource.")
        if resource.status != "Deleting":
            resource.status, resource.left = "Deleting", 2

    # Training jobs

    def create_training_job(self, body):
        text = json.dumps([body["HyperParameters"], body["Environment"]])
        if re.search(r"hf_[A-Za-z0-9]{20,}", text):
            raise RefusalError("Security-sensitive credentials were detected.")
        limits = body["StoppingCondition"]
        if body.get("EnableManagedSpotTraining") != ("MaxWaitTimeInSeconds" in limits or None):
            raise RefusalError("MaxWaitTimeInSeconds goes with EnableManagedSpotTraining")
        job = Job(body, dict(self.plan))
        self.add(self.jobs, job.name, job)
        job.move("Starting", "Starting the training job")
        if self.run_training:
            job.thread = threading.Thread(target=self.run_training, args=(self, job), daemon=True)
            job.thread.start()
        return {"TrainingJobArn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{job.name}"}

    def describe_training_job(self, body):
        job = self.find(self.jobs, body["TrainingJobName"])
        output = job.request["OutputDataConfig"]["S3OutputPath"]
        kept = ("TrainingJobName", "ResourceConfig", "CheckpointConfig", "EnableManagedSpotTraining")
        return {
            **{name: job.request[name] for name in kept if name in job.request},
            "TrainingJobStatus": job.status,
            "SecondaryStatus": job.secondary,
            "SecondaryStatusTransitions": list(job.transitions),
            "ModelArtifacts": {"S3ModelArtifacts": f"{output}/{job.name}/output/model.tar.gz"},
            **job.result,
        }

    def stop_training_job(self, body):
        job = self.find(self.jobs, body["TrainingJobName"])
        if job.status != "InProgress":
            raise RefusalError(f"The request was rejected because the training job is in status {job.status}.")
        job.end("Stopped", "Stopped")

    def list_training_jobs(self, body):
        newest = list(self.jobs)[::-1]
        return {"TrainingJobSummaries": [{"TrainingJobName": name} for name in newest if body["NameContains"] in name]}

    # Models, configurations, endpoints, components

    def create_model(self, body):
        source = body["PrimaryContainer"].get("ModelDataSource", {}).get("S3DataSource", {})
        if source and not source["S3Uri"].endswith("/"):
            raise RefusalError("S3Uri must end with a forward slash when S3DataType is S3Prefix")
        self.add(self.models, body["ModelName"], body)

    def describe_model(self, body):
        return self.find(self.models, body["ModelName"])

    def list_models(self, body):
        return {"Models": [{"ModelName": name} for name in self.models if body["NameContains"] in name]}

    def delete_model(self, body):
        del self.models[self.find(self.models, body["ModelName"])["ModelName"]]

    def create_endpoint_config(self, body):
        if "ExecutionRoleArn" not in body:
            raise RefusalError("ExecutionRoleArn is required when a production variant has no ModelName")
        self.add(self.configs, body["EndpointConfigName"], body)

    def describe_endpoint_config(self, body):
        return self.find(self.configs, body["EndpointConfigName"])

    def list_endpoint_configs(self, body):
        names = [name for name in self.configs if body["NameContains"] in name]
        return {"EndpointConfigs": [{"EndpointConfigName": name} for name in names]}

    def delete_endpoint_config(self, body):
        del self.configs[self.find(self.configs, body["EndpointConfigName"])["EndpointConfigName"]]

    def create_endpoint(self, body):
        self.find(self.configs, body["EndpointConfigName"])
        self.add(self.endpoints, body["EndpointName"], Resource(body))

    def describe_endpoint(self, body):
        found = self.find(self.endpoints, body["EndpointName"])
        reply = {"EndpointStatus": found.status, "EndpointConfigName": found.request["EndpointConfigName"]}
        return reply | ({"FailureReason": found.reason} if found.reason else {})

    def delete_endpoint(self, body):
        found = self.find(self.endpoints, body["EndpointName"])
        if any(one.request["EndpointName"] == body["EndpointName"] for one in self.components.values()):
            raise RefusalError("Cannot delete endpoint with inference component associated.")
        self.start_deleting(found)

    def create_inference_component(self, body):
        endpoint = self.find(self.endpoints, body["EndpointName"])
        if endpoint.status != "InService":
            raise RefusalError(f"Endpoint {body['EndpointName']} is not InService but {endpoint.status}")
        made = Resource(body)
        if made.base:
            if self.find(self.components, made.base).status != "InService":
                raise RefusalError(f"Base inference component {made.base} is not InService")
            if body.keys() & {"VariantName", "RuntimeConfig"} or "ComputeResourceRequirements" in made.specification:
                raise RefusalError("an adapter has no variant, copies or resources of its own")
        else:
            self.find(self.models, made.specification["ModelName"])
        self.add(self.components, body["InferenceComponentName"], made)

    def update_inference_component(self, body):
        found = self.find(self.components, body["InferenceComponentName"])
        if found.status != "InService" or body["Specification"]["BaseInferenceComponentName"] != found.base:
            raise RefusalError(f"{body['InferenceComponentName']} cannot be updated so")
        found.request, found.status, found.left = found.request | body, "Updating", 2

    def describe_inference_component(self, body):
        found = self.find(self.components, body["InferenceComponentName"])
        reply = {
            "InferenceComponentName": body["InferenceComponentName"],
            "EndpointName": found.request["EndpointName"],
            "InferenceComponentStatus": found.status,
            "Specification": found.specification,
        }
        return reply | ({"FailureReason": found.reason} if found.reason else {})

    def list_inference_components(self, body):
        names = [n for n, one in self.components.items() if one.request["EndpointName"] == body["EndpointNameEquals"]]
        return {"InferenceComponents": [{"InferenceComponentName": name} for name in names]}

    def delete_inference_component(self, body):
        name = body["InferenceComponentName"]
        found = self.find(self.components, name)
        if adapters := [other for other, one in self.components.items() if one.base == name]:
            raise RefusalError(f"Cannot delete inference component {name}: it has adapters {', '.join(adapters)}")
        self.start_deleting(found)

    # Asking

    def invoke(self, endpoint, component, content):
        """(status, reply) of InvokeEndpoint; a failure inside the container is a ModelError."""
        if endpoint not in self.endpoints or self.endpoints[endpoint].status != "InService":
            raise RefusalError(f"Endpoint {endpoint} of account {ACCOUNT} not found.", "ValidationError")
        if component not in self.components or self.components[component].status != "InService":
            raise RefusalError(f"Inference Component {component} of endpoint {endpoint} not found.", "ValidationError")
        status, reply = self.serving.invoke(component, json.loads(content))
        if status != 200:
            extra = {"OriginalStatusCode": status, "OriginalMessage": json.dumps(reply)}
            raise RefusalError("Received error from primary", "ModelError", 424, **extra)
        return reply


def handler(fake):
    class Front(BaseHTTPRequestHandler):
        """Reads one request, lets the stand-in answer, writes the answer."""

        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers = 200, {"Content-Type": "application/x-amz-json-1.1"}
            try:
                if "X-Amz-Target" in self.headers:
                    reply = fake.answer(self.headers["X-Amz-Target"].rpartition(".")[2], json.loads(body))
                else:
                    endpoint = re.fullmatch(r"/endpoints/([^/]+)/invocations", self.path)[1]
                    reply = fake.invoke(endpoint, self.headers[COMPONENT_HEADER], body)
            except RefusalError as error:
                status, headers["x-amzn-ErrorType"] = error.status, error.code
                reply = {"__type": error.code, "message": str(error), "Message": str(error), **error.extra}
            except Exception:
                fake.broken.append(traceback.format_exc())
                status, reply = 500, {"__type": "InternalFailure", "message": "the stand-in is broken"}
            content = json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    return Front
