"""A stand-in for AWS on 127.0.0.1 that is as strict as AWS, for the tests of everything SageMaker.

    with Fake() as fake:      # one at a time: what moto keeps is the process's
        subprocess.run([...], env=os.environ | fake.env)      # every AWS call of the command ends here
        assert fake.calls("CreateTrainingJob")[0]["RoleArn"] == ...

It answers sagemaker, sagemaker-runtime, service-quotas, pricing and ecr itself and passes s3, logs, sts, iam and
secretsmanager on to a moto server. botocore checks little of what it sends (no pattern, enum or maximum), so here every
request is checked against botocore's own model of the service, and every reply too: a wrong reply is a mistake of this
file, is kept in `fake.broken`, and fails the test at the end of the `with` block.

What it cannot show: IAM permissions, image pulls, GPUs, capacity, and whatever else only AWS knows.
"""

import base64
import functools
import hashlib
import http.client
import json
import logging
import re
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import boto3
import botocore.session
from botocore import xform_name
from botocore.config import Config

PROXIED = {"s3", "logs", "sts", "iam", "secretsmanager"}
INVALID = {  # the code with which each service refuses a malformed request
    "sagemaker": "ValidationException",
    "sagemaker-runtime": "ValidationError",
    "service-quotas": "IllegalArgumentException",
    "pricing": "InvalidParameterException",
    "ecr": "InvalidParameterException",
}
PRICING_REGIONS = {"us-east-1", "eu-central-1", "ap-south-1"}
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "expect"}
QUOTA_CODES = {  # the real ones; the others are made up, as codes are not to be relied upon
    "ml.g6e.2xlarge for training job usage": "L-D1AFBF6F",
    "ml.g6e.2xlarge for spot training job usage": "L-29512C0F",
    "ml.g6e.2xlarge for endpoint usage": "L-F8D7F460",
}


class AwsError(Exception):
    """An error answer of a service; `extra` are further members of its body."""

    def __init__(self, code, message, status=400, **extra):
        super().__init__(message)
        self.code, self.message, self.status, self.extra = code, message, status, extra


@dataclass
class Recorded:
    """One request as it arrived. `params` is the parsed body of a service answered here; `status` the answer's."""

    service: str
    operation: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    params: dict = field(default_factory=dict)
    status: int = 0


@dataclass
class Job:
    """One training job; the simulator of the container moves it on."""

    request: dict
    status: str = "InProgress"
    secondary: str = "Starting"
    transitions: list = field(default_factory=list)
    failure_reason: str | None = None
    training_start: float | None = None
    training_end: float | None = None
    billable_s: int | None = None
    training_s: int | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    plan: dict = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    left: int = 2
    thread: threading.Thread | None = None

    def __post_init__(self):
        self.move("Starting", "Starting the training job")

    @property
    def name(self):
        return self.request["TrainingJobName"]

    @property
    def running(self):
        return self.status in ("InProgress", "Stopping")

    def move(self, secondary, message=""):
        """Enter a secondary status, closing the transition before it."""
        now = time.time()
        if self.transitions:
            self.transitions[-1].setdefault("EndTime", now)
        self.secondary = secondary
        self.transitions.append({"Status": secondary, "StartTime": now, "StatusMessage": message})
        if secondary == "Training" and self.training_start is None:
            self.training_start = now

    def end(self, status, secondary, failure_reason=None):
        """Finish; the times that the simulator did not set itself follow from the clock."""
        self.failure_reason = failure_reason
        self.move(secondary, failure_reason or f"Training job {status.lower()}")
        now = self.transitions[-1]["EndTime"] = time.time()
        if self.training_start is not None:
            self.training_end = self.training_end or now
            seconds = max(1, round(self.training_end - self.training_start))
            self.training_s = self.training_s or seconds
            self.billable_s = self.billable_s or self.training_s
        self.status = status  # last: whoever polls must see a complete record


@dataclass
class Resource:
    """A model, endpoint-config, endpoint or inference-component; `request` is the body that made it (or updated it)."""

    kind: str
    name: str
    request: dict
    status: str = ""
    left: int = 0  # Describes until the status moves on
    failure_reason: str | None = None
    created: float = field(default_factory=time.time)
    modified: float = field(default_factory=time.time)
    config: dict = field(default_factory=dict)  # of an endpoint: its configuration, which may be deleted under it

    @property
    def specification(self):
        return self.request.get("Specification", {})

    @property
    def base(self):
        """Name of the base component if this one is an adapter, else None."""
        return self.specification.get("BaseInferenceComponentName")

    @property
    def artifact_url(self):
        return self.specification.get("Container", {}).get("ArtifactUrl")

    def enter(self, status, ticks):
        self.status, self.left, self.modified = status, ticks, time.time()


@functools.cache
def session():
    """One session for everything: it caches the service models, whose parsing is the slow part of making a client."""
    core = botocore.session.get_session()
    return core, boto3.Session(botocore_session=core)


@functools.cache
def service_model(service):
    return session()[0].get_service_model(service)


@functools.cache
def unicode_class(category):
    """The characters of a general category (`L`) or of a Java class (`Alnum`), as the inside of a [...]."""
    java = {"ASCII": r"\x00-\x7f", "Print": r"\x20-\x7e", "Alnum": "a-zA-Z0-9", "Alpha": "a-zA-Z", "Digit": "0-9"}
    if category in java:
        return java[category]
    ranges, start = [], None
    for code in range(sys.maxunicode + 2):
        inside = code <= sys.maxunicode and unicodedata.category(chr(code)).startswith(category)
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            ranges.append(f"\\U{start:08x}-\\U{code - 1:08x}")
            start = None
    return "".join(ranges)


@functools.cache
def compiled(pattern):
    """A pattern of the model, written for Java, in Python's words; None for the few that are no regular expression."""
    out, in_class, rest = "", False, pattern
    while rest:
        token = re.match(r"\\p\{\w+\}|\\.|.", rest, re.DOTALL)[0]
        rest = rest[len(token) :]
        if token.startswith("\\p"):
            members = unicode_class(token[3:-1])
            token = members if in_class else f"[{members}]"
        elif token == r"\z":
            token = r"\Z"
        elif token in "[]":
            in_class = token == "[" or (in_class and out.endswith("["))
        out += token
    try:
        return re.compile(out, re.ASCII)
    except re.error:
        return None


WIRE_TYPES = {
    "structure": dict,
    "map": dict,
    "list": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "long": int,
    "float": (int, float),
    "double": (int, float),
    "timestamp": (int, float),
    "blob": (str, bytes),
}


def problems(shape, value, path=""):
    """Yield what is wrong with a value as it stands on the wire, in the words of the real services."""

    def bad(rule):
        return f"Value {value!r} at '{path}' failed to satisfy constraint: Member must {rule}"

    kind, limits = shape.type_name, shape.metadata
    if not isinstance(value, WIRE_TYPES[kind]) or isinstance(value, bool) != (kind == "boolean"):
        yield bad(f"be a {kind}")
        return
    if kind == "structure":
        yield from structure_problems(shape, value, path)
    elif kind == "list":
        for i, item in enumerate(value, 1):
            yield from problems(shape.member, item, f"{path}.{i}.member")
    elif kind == "map":
        for key, item in value.items():
            yield from problems(shape.key, key, f"{path}.key")
            yield from problems(shape.value, item, f"{path}.{key}.value")
    number = kind in ("integer", "long", "float", "double")
    size = value if number else len(value) if kind in ("string", "list", "map", "blob") else None
    if size is not None and size > limits.get("max", size):
        yield bad(f"have {'value' if number else 'length'} less than or equal to {limits['max']}")
    if size is not None and size < limits.get("min", size):
        yield bad(f"have {'value' if number else 'length'} greater than or equal to {limits['min']}")
    if kind == "string" and limits.get("enum") and value not in limits["enum"]:
        yield bad(f"satisfy enum value set: [{', '.join(limits['enum'])}]")
    if kind == "string" and "pattern" in limits:
        pattern = compiled(limits["pattern"])
        if pattern and not pattern.fullmatch(value):
            yield bad(f"satisfy regular expression pattern: {limits['pattern']}")


def structure_problems(shape, value, path):
    def below(name):
        return f"{path}.{name}".lstrip(".") if path else name[0].lower() + name[1:]

    for name in shape.required_members:
        if name not in value:
            yield f"Value null at '{below(name)}' failed to satisfy constraint: Member must not be null"
    if getattr(shape, "is_tagged_union", False) and len(value) != 1:
        yield f"Value {value!r} at '{path}' failed to satisfy constraint: Member must have exactly one of its members"
    for name, item in value.items():
        if name in shape.members:
            yield from problems(shape.members[name], item, below(name))
        else:
            yield f"Value {item!r} at '{below(name)}' failed to satisfy constraint: Member is unknown"


def check_request(service, operation, params):
    shape = service_model(service).operation_model(operation).input_shape
    found = list(problems(shape, params)) if shape else []
    if found:
        heading = f"{len(found)} validation error{'s' * (len(found) > 1)} detected: "
        raise AwsError(INVALID[service], heading + "; ".join(found))


def check_reply(service, operation, reply):
    shape = service_model(service).operation_model(operation).output_shape
    found = list(problems(shape, reply)) if shape else [f"{operation} has no reply"] if reply else []
    assert not found, f"reply of {operation}: {'; '.join(found)}"


OPERATIONS: dict[tuple[str, str], Callable] = {}  # (service, method name) -> function(fake, params) -> reply


def serves(service):
    """Register a function as the operation of its name (`create_model` answers CreateModel)."""

    def register(function):
        OPERATIONS[service, function.__name__] = function
        return function

    return register


class Fake:
    """All of AWS for one test; see the module's docstring."""

    def __init__(self, run_training=None, serving=None, region="us-east-1", ticks=2):
        self.region, self.account, self.ticks = region, "123456789012", ticks
        self.run_training: Callable[[Fake, Job], None] | None = run_training
        self.serving = serving
        self.plan: dict = {}
        kinds = ("training job usage", "spot training job usage", "endpoint usage")
        types = ("ml.g6e.2xlarge", "ml.g5.2xlarge")
        self.quotas = {f"{instance} for {kind}": 1.0 for instance in types for kind in kinds}
        self.default_quotas = dict.fromkeys(self.quotas, 0.0)
        hourly = dict(zip(types, (2.80, 1.515), strict=True))
        self.prices = {(instance, use): hourly[instance] for instance in types for use in ("Training", "Hosting")}
        self.images: set[str] | None = None
        self.stuck: set[str] = set()
        self.failing: dict[str, str] = {}  # names of endpoints or components that become Failed -> FailureReason
        self.allow_tokens = False
        self.page_size = 100  # no list reply has more entries, whatever MaxResults asks
        self.requests: list[Recorded] = []
        self.broken: list[str] = []
        self.jobs: dict[str, Job] = {}
        self.models: dict[str, Resource] = {}
        self.configs: dict[str, Resource] = {}
        self.endpoints: dict[str, Resource] = {}
        self.components: dict[str, Resource] = {}
        self.tags: dict[str, dict[str, str]] = {}  # by ARN
        self.lock = threading.RLock()  # held during a control operation, never while a model answers
        self._injected: list[dict] = []
        self._clients = threading.Lock()

    # -- life

    def __enter__(self):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else it reports every request
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self._moto_address = self._moto.get_host_and_port()
        self._moto_request("POST", "/moto-api/reset", {}, b"")  # moto keeps its state per process, not per server
        self._server = FrontServer(("127.0.0.1", 0), Front)
        self._server.fake = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace):
        for job in self.jobs.values():
            if job.thread:
                job.stop.set()
                job.thread.join(30)
        self._server.shutdown()
        self._server.server_close()
        threading.Thread(target=self._moto.stop).start()  # takes half a second, which nobody needs to wait for
        if kind is None:
            assert not self.broken, "\n".join(self.broken)

    # -- what tests use

    @property
    def env(self):
        """The environment variables a command needs, on top of os.environ."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",  # nothing of the developer's own account takes part
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "NO_PROXY": "127.0.0.1",
        }

    def client(self, service, region=None, **config):
        """A boto3 client against the front; it does not retry unless `retries` says so."""
        config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 50} | config
        with self._clients:  # making clients is not thread-safe
            return session()[1].client(
                service,
                region_name=region or self.region,
                endpoint_url=self.url,
                aws_access_key_id="testing",
                aws_secret_access_key="testing",
                config=Config(**config),
            )

    def fail(self, operation, code, message, times=1, status=400, service=None):
        """The next `times` calls of the operation ("*": any) answer with this error."""
        error = {"operation": operation, "code": code, "message": message, "status": status, "service": service}
        self._injected.append(error | {"times": times})

    def calls(self, operation):
        """Parsed bodies of every request for one operation of the services answered here, the refused ones included."""
        return [r.params for r in self.requests if r.operation == operation and r.service not in PROXIED]

    def left_behind(self):
        """Names of everything that still exists or runs."""
        tables = (self.endpoints, self.configs, self.models, self.components)
        return [name for table in tables for name in table] + [job.name for job in self.jobs.values() if job.running]

    def role(self, name, trusts="sagemaker.amazonaws.com"):
        """Make an IAM role that the service may assume; returns its ARN."""
        statement = {"Effect": "Allow", "Principal": {"Service": trusts}, "Action": "sts:AssumeRole"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        made = self.client("iam").create_role(RoleName=name, AssumeRolePolicyDocument=policy)
        return made["Role"]["Arn"]

    def bucket(self, name, region=None):
        """Make a bucket; returns its name."""
        region = region or self.region
        where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        self.client("s3", region=region).create_bucket(Bucket=name, **where)
        return name

    # -- what the operations use

    def arn(self, kind, name):
        return f"arn:aws:sagemaker:{self.region}:{self.account}:{kind}/{name}"

    def table(self, kind):
        return {
            "model": self.models,
            "endpoint-config": self.configs,
            "endpoint": self.endpoints,
            "inference-component": self.components,
        }[kind]

    def find(self, kind, name):
        found = self.table(kind).get(name)
        if found is None:
            raise invalid(f'Could not find {words(kind)} "{self.arn(kind, name)}".')
        return found

    def add(self, kind, name, request, status="", **more):
        if name in self.table(kind):
            raise invalid(f'Cannot create already existing {words(kind)} "{self.arn(kind, name)}".')
        self.table(kind)[name] = made = Resource(kind, name, request, status, self.ticks, **more)
        self.tag(self.arn(kind, name), request.get("Tags", []))
        return made

    def remove(self, resource):
        del self.table(resource.kind)[resource.name]
        self.tags.pop(self.arn(resource.kind, resource.name), None)

    def tag(self, arn, tags):
        self.tags.setdefault(arn, {}).update({tag["Key"]: tag["Value"] for tag in tags})

    def settle(self, resource):
        """One Describe passes: count down, and enter the state that follows Creating, Updating or Deleting."""
        if resource.status not in ("Creating", "Updating", "Deleting") or self.hangs(resource):
            return
        resource.left -= 1
        if resource.left > 0:
            return
        if resource.status == "Deleting":
            self.remove(resource)
            return
        resource.failure_reason = self.failing.get(resource.name) or self.load(resource)
        resource.enter("Failed" if resource.failure_reason else "InService", 0)

    def hangs(self, resource):
        """Stuck by order of the test, or, as on AWS, because the image's CUDA is newer than the AMI's driver."""
        if resource.status != "Creating":
            return False
        if resource.name in self.stuck:
            return True
        if resource.kind != "inference-component" or resource.base:
            return False
        image = self.image(resource) or ""
        ami = variant_of(self.endpoints[resource.request["EndpointName"]], resource).get("InferenceAmiVersion", "")
        return "cu13" in image and "gpu-4-1" not in ami

    def image(self, component):
        """The container image of a base component, whether its own or its model's."""
        model = self.models.get(component.specification.get("ModelName"))
        container = model.request.get("PrimaryContainer", {}) if model else component.specification.get("Container", {})
        return container.get("Image")

    def load(self, resource):
        """Let the serving side load a component; returns a FailureReason or None."""
        if resource.kind != "inference-component" or self.serving is None:
            return None
        try:
            self.serving.load(self, resource)
        except ValueError as error:
            return str(error)[:1024]
        except Exception:
            self.broken.append(traceback.format_exc())
            return "InternalServerError"
        return None

    def check_quota(self, name, used, wanted):
        limit = self.quotas.get(name, self.default_quotas.get(name, 0))
        if used + wanted > limit:
            raise AwsError(
                "ResourceLimitExceeded",
                f"The account-level service limit '{name}' is {limit:g} Instances, with current utilization of {used} "
                f"Instances and a request delta of {wanted} Instances. Please use AWS Service Quotas to request an "
                "increase for this quota. If AWS Service Quotas is not available, contact AWS support to request an "
                "increase for this quota.",
            )

    def check_image(self, uri):
        registry = re.fullmatch(r"\d{12}\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/([^:@]+:[^:@]+)", uri)
        if not registry:
            raise invalid(f"Invalid image URI {uri}. Please provide a valid Amazon Elastic Container Registry path.")
        if registry[1] != self.region or (self.images is not None and registry[2] not in self.images):
            raise invalid(f"Requested image {uri} not found.")

    # -- requests

    def answer(self, method, path, headers, body):
        """One HTTP request -> (status, headers, body)."""
        service, region = scope(path, headers)
        recorded = Recorded(service, "unknown", method, path, headers, body)
        self.requests.append(recorded)
        try:
            operation, params = understand(service, method, path, headers, body)
            recorded.operation, recorded.params = operation, params
            self.inject(service, operation)
            if service in PROXIED:
                reply = self._moto_request(method, path, headers, body)
                if reply[0] >= 500:
                    self.broken.append(f"moto answered {reply[0]} to {service} {operation}: {reply[2][:500]}")
            else:
                reply = self.perform(service, region, operation, params)
        except AwsError as error:
            reply = error_reply(service, error)
        except Exception:
            self.broken.append(traceback.format_exc())
            reply = error_reply(service, AwsError("InternalFailure", "the test stand is broken; see fake.broken", 500))
        recorded.status = reply[0]
        return reply

    def inject(self, service, operation):
        with self.lock:
            for error in self._injected:
                if error["operation"] in (operation, "*") and error["service"] in (None, service) and error["times"]:
                    error["times"] -= 1
                    code, message, status = error["code"], error["message"], error["status"]
                    if code == "ModelError":  # then the status is the container's
                        raise AwsError(code, message, 424, OriginalStatusCode=status, OriginalMessage=message)
                    raise AwsError(code, message, status)

    def perform(self, service, region, operation, params):
        if service not in INVALID:
            self.broken.append(f"a request for a service the stand does not have: {service} {operation}")
            raise AwsError("UnknownService", f"the test stand has no {service}")
        if region not in (PRICING_REGIONS if service == "pricing" else {self.region}):
            raise AwsError("UnknownEndpoint", f"the test stand has no {service} in {region}")
        function = OPERATIONS.get((service, xform_name(operation)))
        if function is None:
            self.broken.append(f"an operation the stand does not have: {service} {operation}")
            raise AwsError("UnknownOperationException", f"the test stand has no {operation}")
        check_request(service, operation, params)
        if service == "sagemaker-runtime":
            return function(self, params)
        with self.lock:
            reply = function(self, params) or {}
            check_reply(service, operation, reply)
            return 200, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(reply).encode()

    def _moto_request(self, method, path, headers, body):
        connection = http.client.HTTPConnection(*self._moto_address, timeout=120)
        kept = {k: v for k, v in headers.items() if k.lower() not in HOP_BY_HOP | {"content-length"}}
        connection.request(method, path, body or None, kept | {"Content-Length": str(len(body))})
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, {k: v for k, v in reply.getheaders() if k.lower() not in HOP_BY_HOP}, content


class FrontServer(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a command that was killed is no news
            super().handle_error(request, client_address)


class Front(BaseHTTPRequestHandler):
    """Reads one request, lets the stand answer, writes the answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(parts)

    def respond(self):
        status, headers, content = self.server.fake.answer(
            self.command, self.path, dict(self.headers.items()), self.body()
        )
        if self.command != "HEAD":  # a HEAD reply keeps the length of the body that it leaves out
            headers = {k: v for k, v in headers.items() if k.lower() != "content-length"}
            headers["Content-Length"] = str(len(content))
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = respond  # noqa: N815


def scope(path, headers):
    """(service, region) of a request, from its signature."""
    credential = re.search(r"Credential=([^,\s]+)", headers.get("Authorization", ""))
    presigned = parse_qs(urlsplit(path).query).get("X-Amz-Credential")
    if not credential and not presigned:
        return "unsigned", ""
    _, _, region, service, _ = (credential[1] if credential else presigned[0]).split("/")
    if service == "sagemaker" and "X-Amz-Target" not in headers:
        service = "sagemaker-runtime"
    return {"servicequotas": "service-quotas"}.get(service, service), region


def understand(service, method, path, headers, body):
    """(operation, parsed body) of a request."""
    if service == "s3":
        return s3_operation(method, path, headers), {}
    if service == "sagemaker-runtime":
        return invocation(method, path, headers, body)
    if "X-Amz-Target" in headers:
        params = {}
        if service in INVALID:
            try:
                params = json.loads(body)
            except ValueError:
                raise AwsError("SerializationException", "the body is not JSON") from None
        return headers["X-Amz-Target"].rpartition(".")[2], params
    form = parse_qs(body.decode("utf-8", "replace"))
    return form.get("Action", ["unknown"])[0], {}


def s3_operation(method, path, headers):
    parts = urlsplit(path)
    query = parse_qs(parts.query, keep_blank_values=True)
    level = sum(bool(piece) for piece in parts.path.lstrip("/").split("/", 1))  # 0 service, 1 bucket, 2 object
    if level == 0:
        return "ListBuckets"
    special = {
        ("PUT", 2, "partNumber"): "UploadPart",
        ("POST", 2, "uploads"): "CreateMultipartUpload",
        ("POST", 2, "uploadId"): "CompleteMultipartUpload",
        ("DELETE", 2, "uploadId"): "AbortMultipartUpload",
        ("GET", 1, "list-type"): "ListObjectsV2",
        ("GET", 1, "location"): "GetBucketLocation",
        ("POST", 1, "delete"): "DeleteObjects",
    }
    for (verb, depth, word), operation in special.items():
        if verb == method and depth == level and word in query:
            return operation
    if method == "PUT" and any(name.lower() == "x-amz-copy-source" for name in headers):
        return "CopyObject"
    settings = {"policy", "tagging", "publicAccessBlock", "encryption", "versioning", "acl", "cors", "lifecycle"}
    for word in settings & query.keys():
        return f"{method.title()}{'Bucket' if level == 1 else 'Object'}{word[0].upper()}{word[1:]}"
    plain = {
        1: {"PUT": "CreateBucket", "GET": "ListObjects", "HEAD": "HeadBucket", "DELETE": "DeleteBucket"},
        2: {"PUT": "PutObject", "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"},
    }
    return plain[level].get(method, "unknown")


def invocation(method, path, headers, body):
    """The members of InvokeEndpoint from URI, headers and body, as the rest-json protocol spreads them."""
    shape = service_model("sagemaker-runtime").operation_model("InvokeEndpoint").input_shape
    target = re.fullmatch(r"/endpoints/([^/]+)/invocations", urlsplit(path).path)
    if method != "POST" or not target:
        return "unknown", {}
    params = {"EndpointName": unquote(target[1]), "Body": body}
    names = {m.serialization["name"].lower(): name for name, m in shape.members.items() if "name" in m.serialization}
    for header, value in headers.items():
        if header.lower() in names or header.lower().startswith("x-amzn-sagemaker-"):
            params[names.get(header.lower(), header)] = value
    return "InvokeEndpoint", params


def error_reply(service, error):
    if service in ("s3", "sts", "iam"):
        text = f"<Error><Code>{escape(error.code)}</Code><Message>{escape(error.message)}</Message></Error>"
        if service != "s3":
            text = f"<ErrorResponse>{text}<RequestId>0</RequestId></ErrorResponse>"
        return error.status, {"Content-Type": "text/xml"}, text.encode()
    if service == "sagemaker-runtime":
        headers = {"Content-Type": "application/json", "x-amzn-ErrorType": error.code}
        return error.status, headers, json.dumps({"Message": error.message} | error.extra).encode()
    content = {"__type": error.code, "message": error.message} | error.extra
    return error.status, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(content).encode()


def invalid(message):
    return AwsError("ValidationException", message)


def words(kind):
    return {"endpoint-config": "endpoint configuration"}.get(kind, kind.replace("-", " "))


def page(fake, items, params, code="ValidationException", more="NextToken", limit="MaxResults"):
    """One page of a list, and the members that point to the next one."""
    start = 0
    if more in params:
        try:
            start = int(base64.b64decode(params[more], validate=True))
        except ValueError:
            raise AwsError(code, "Invalid pagination token") from None
    end = start + min(params.get(limit, fake.page_size), fake.page_size)
    token = {more: base64.b64encode(str(end).encode()).decode()} if end < len(items) else {}
    return items[start:end], token


def listing(fake, summaries, params, name_key, status_key=None):
    """Filter, sort and page the summaries of a List operation; a filter that is not known here is refused."""
    filters = {"NameContains": name_key, "StatusEquals": status_key}
    filters |= {"EndpointNameEquals": "EndpointName", "VariantNameEquals": "VariantName"}
    unknown = params.keys() - filters.keys() - {"NextToken", "MaxResults", "SortBy", "SortOrder"}
    if unknown:
        raise NotImplementedError(f"the test stand does not filter by {', '.join(unknown)}")
    for word, key in filters.items():
        if word in params:
            wanted = params[word]
            summaries = [s for s in summaries if (wanted in s[key] if word == "NameContains" else wanted == s[key])]
    by = {"Name": name_key, "Status": status_key}.get(params.get("SortBy"), "CreationTime")
    summaries.sort(key=lambda summary: summary[by], reverse=params.get("SortOrder", "Descending") == "Descending")
    return page(fake, summaries, params)


@serves("sagemaker")
def create_training_job(fake, params):
    name = params["TrainingJobName"]
    for member in ("AlgorithmSpecification", "ResourceConfig", "StoppingCondition"):
        if member not in params:
            raise invalid(f"{member} is required")
    algorithm, resources = params["AlgorithmSpecification"], params["ResourceConfig"]
    if ("TrainingImage" in algorithm) == ("AlgorithmName" in algorithm):
        raise invalid("You must specify either AlgorithmName or TrainingImage, but not both")
    if not {"InstanceType", "InstanceCount", "VolumeSizeInGB"} <= resources.keys():
        raise invalid("ResourceConfig needs InstanceType, InstanceCount and VolumeSizeInGB")
    if resources["InstanceCount"] < 1:
        raise invalid("InstanceCount must be at least 1")
    check_spot(params)
    channels = [channel["ChannelName"] for channel in params.get("InputDataConfig", [])]
    if len(set(channels)) < len(channels):
        raise invalid("Channel names must be unique")
    for member in ("HyperParameters", "Environment"):
        text = json.dumps(params.get(member, {}))
        if TOKEN.search(text) and not fake.allow_tokens:
            raise invalid(f"Security-sensitive credentials were detected in {member}. Remove them and try again.")
    if name in fake.jobs:
        raise AwsError(
            "ResourceInUse",
            "Training job names must be unique within an AWS account and region, and a training job with this name "
            f"already exists ({fake.arn('training-job', name)})",
        )
    if "TrainingImage" in algorithm:
        fake.check_image(algorithm["TrainingImage"])
    quota = f"{resources['InstanceType']} for {'spot ' * is_spot(params)}training job usage"
    alike = [job.request for job in fake.jobs.values() if job.running]
    alike = [r["ResourceConfig"] for r in alike if is_spot(r) == is_spot(params)]
    used = sum(r["InstanceCount"] for r in alike if r["InstanceType"] == resources["InstanceType"])
    fake.check_quota(quota, used, resources["InstanceCount"])
    job = fake.jobs[name] = Job(params, plan=dict(fake.plan), left=fake.ticks)
    fake.tag(fake.arn("training-job", name), params.get("Tags", []))
    if fake.run_training:
        job.thread = threading.Thread(target=train, args=(fake, job), daemon=True)
        job.thread.start()
    return {"TrainingJobArn": fake.arn("training-job", name)}


def is_spot(request):
    return request.get("EnableManagedSpotTraining", False)


def check_spot(params):
    limits = params["StoppingCondition"]
    wait, run = limits.get("MaxWaitTimeInSeconds"), limits.get("MaxRuntimeInSeconds", 86400)
    if not is_spot(params) and wait is not None:
        raise invalid("MaxWaitTimeInSeconds can be set only when EnableManagedSpotTraining is true")
    if is_spot(params) and (wait is None or wait < run):
        raise invalid(
            f"Invalid MaxWaitTimeInSeconds. It must be present, greater than or equal to MaxRuntimeInSeconds ({run})"
        )


def train(fake, job):
    try:
        fake.run_training(fake, job)
        assert not job.running, f"run_training left {job.name} {job.status}"
    except Exception:
        fake.broken.append(traceback.format_exc())
        job.end("Failed", "Failed", "InternalServerError: the test stand is broken")


def find_job(fake, name, code="ValidationException"):
    if name not in fake.jobs:
        raise AwsError(code, "Requested resource not found.")
    return fake.jobs[name]


@serves("sagemaker")
def describe_training_job(fake, params):
    job = find_job(fake, params["TrainingJobName"])
    if job.thread is None and job.running:
        job.left -= 1
        if job.left <= 0 and job.status == "Stopping":
            job.end("Stopped", "Stopped")
        elif job.left <= 0:
            job.end("Completed", "Completed")
        elif job.status == "InProgress" and job.secondary == "Starting":
            job.move("Training", "Training image download completed. Training in progress.")
    reply_members = service_model("sagemaker").operation_model("DescribeTrainingJob").output_shape.members
    output = job.request["OutputDataConfig"]["S3OutputPath"].rstrip("/")
    optional = {
        "FailureReason": job.failure_reason,
        "TrainingStartTime": job.training_start,
        "TrainingEndTime": job.training_end,
        "TrainingTimeInSeconds": job.training_s,
        "BillableTimeInSeconds": job.billable_s,
    }
    return {
        **{name: value for name, value in job.request.items() if name in reply_members},
        "TrainingJobArn": fake.arn("training-job", job.name),
        "ModelArtifacts": {"S3ModelArtifacts": f"{output}/{job.name}/output/model.tar.gz"},
        "TrainingJobStatus": job.status,
        "SecondaryStatus": job.secondary,
        "SecondaryStatusTransitions": [dict(transition) for transition in job.transitions],
        "EnableManagedSpotTraining": is_spot(job.request),
        "CreationTime": job.created,
        "LastModifiedTime": job.transitions[-1]["StartTime"],
        **{name: value for name, value in optional.items() if value is not None},
    }


@serves("sagemaker")
def stop_training_job(fake, params):
    job = find_job(fake, params["TrainingJobName"], "ResourceNotFound")
    if job.status != "InProgress":
        raise invalid(f"The request was rejected because the training job is in status {job.status}.")
    job.status, job.left = "Stopping", fake.ticks
    job.move("Stopping", "Stopping the training job")
    job.stop.set()


@serves("sagemaker")
def list_training_jobs(fake, params):
    summaries = [
        {
            "TrainingJobName": job.name,
            "TrainingJobArn": fake.arn("training-job", job.name),
            "CreationTime": job.created,
            "TrainingJobStatus": job.status,
            "SecondaryStatus": job.secondary,
        }
        for job in fake.jobs.values()
    ]
    found, token = listing(fake, summaries, params, "TrainingJobName", "TrainingJobStatus")
    return {"TrainingJobSummaries": found} | token


def summary(fake, resource, prefix, status=False):
    found = {
        f"{prefix}Name": resource.name,
        f"{prefix}Arn": fake.arn(resource.kind, resource.name),
        "CreationTime": resource.created,
    }
    return found | ({"LastModifiedTime": resource.modified, f"{prefix}Status": resource.status} if status else {})


@serves("sagemaker")
def create_model(fake, params):
    if ("PrimaryContainer" in params) == ("Containers" in params):
        raise invalid("Exactly one of PrimaryContainer and Containers must be provided")
    if "ExecutionRoleArn" not in params:
        raise invalid("ExecutionRoleArn is required")
    for container in params.get("Containers", [params.get("PrimaryContainer")]):
        if "Image" not in container:
            raise invalid("Image is required in a container definition")
        fake.check_image(container["Image"])
        source = container.get("ModelDataSource", {}).get("S3DataSource", {})
        if source.get("S3DataType") == "S3Prefix" and not source["S3Uri"].endswith("/"):
            raise invalid(f"S3Uri {source['S3Uri']} must end with a forward slash when S3DataType is S3Prefix")
    fake.add("model", params["ModelName"], params)
    return {"ModelArn": fake.arn("model", params["ModelName"])}


@serves("sagemaker")
def describe_model(fake, params):
    model = fake.find("model", params["ModelName"])
    kept = {name: value for name, value in model.request.items() if name != "Tags"}
    return kept | summary(fake, model, "Model")


@serves("sagemaker")
def delete_model(fake, params):
    fake.remove(fake.find("model", params["ModelName"]))


@serves("sagemaker")
def list_models(fake, params):
    found, token = listing(fake, [summary(fake, m, "Model") for m in fake.models.values()], params, "ModelName")
    return {"Models": found} | token


@serves("sagemaker")
def create_endpoint_config(fake, params):
    variants = params["ProductionVariants"]
    if len({variant["VariantName"] for variant in variants}) < len(variants):
        raise invalid("Production variant names must be unique")
    for variant in variants:
        if "ModelName" in variant:
            fake.find("model", variant["ModelName"])
        elif "ExecutionRoleArn" not in params:
            raise invalid("ExecutionRoleArn is required when a production variant has no ModelName")
        if not {"InstanceType", "InitialInstanceCount"} <= variant.keys():
            raise invalid("InstanceType and InitialInstanceCount are required in a production variant")
        scaling = variant.get("ManagedInstanceScaling", {})
        if scaling.get("MinInstanceCount", 0) > scaling.get("MaxInstanceCount", sys.maxsize):
            raise invalid("MinInstanceCount must not be greater than MaxInstanceCount")
    fake.add("endpoint-config", params["EndpointConfigName"], params)
    return {"EndpointConfigArn": fake.arn("endpoint-config", params["EndpointConfigName"])}


@serves("sagemaker")
def describe_endpoint_config(fake, params):
    config = fake.find("endpoint-config", params["EndpointConfigName"])
    kept = {name: value for name, value in config.request.items() if name != "Tags"}
    return kept | summary(fake, config, "EndpointConfig")


@serves("sagemaker")
def delete_endpoint_config(fake, params):
    fake.remove(fake.find("endpoint-config", params["EndpointConfigName"]))


@serves("sagemaker")
def list_endpoint_configs(fake, params):
    summaries = [summary(fake, config, "EndpointConfig") for config in fake.configs.values()]
    found, token = listing(fake, summaries, params, "EndpointConfigName")
    return {"EndpointConfigs": found} | token


def variant_of(endpoint, component):
    """The production variant that a component (an adapter: its base) runs on."""
    name = component.request.get("VariantName")
    return next(v for v in endpoint.config["ProductionVariants"] if v["VariantName"] == name)


def refuse_busy(fake, resource):
    """AWS neither changes nor deletes what is on its way to another state."""
    if resource.status in ("Creating", "Updating", "Deleting"):
        arn = fake.arn(resource.kind, resource.name)
        raise invalid(f'Cannot update in-progress {words(resource.kind)} "{arn}".')


@serves("sagemaker")
def create_endpoint(fake, params):
    config = fake.find("endpoint-config", params["EndpointConfigName"]).request
    if params["EndpointName"] not in fake.endpoints:
        living = [e.config["ProductionVariants"] for e in fake.endpoints.values() if e.status != "Failed"]
        held = [variant for variants in living for variant in variants]
        for variant in config["ProductionVariants"]:
            instance = variant["InstanceType"]
            used = sum(v["InitialInstanceCount"] for v in held if v["InstanceType"] == instance)
            fake.check_quota(f"{instance} for endpoint usage", used, variant["InitialInstanceCount"])
            held.append(variant)
    fake.add("endpoint", params["EndpointName"], params, "Creating", config=config)
    return {"EndpointArn": fake.arn("endpoint", params["EndpointName"])}


@serves("sagemaker")
def describe_endpoint(fake, params):
    fake.settle(fake.find("endpoint", params["EndpointName"]))
    endpoint = fake.find("endpoint", params["EndpointName"])  # once more: it may be gone now
    reply = summary(fake, endpoint, "Endpoint", status=True)
    reply["EndpointConfigName"] = endpoint.request["EndpointConfigName"]
    if endpoint.failure_reason:
        reply["FailureReason"] = endpoint.failure_reason
    if endpoint.status == "InService":
        reply["ProductionVariants"] = [
            {
                "VariantName": variant["VariantName"],
                "CurrentInstanceCount": variant["InitialInstanceCount"],
                "DesiredInstanceCount": variant["InitialInstanceCount"],
            }
            for variant in endpoint.config["ProductionVariants"]
        ]
    return reply


@serves("sagemaker")
def delete_endpoint(fake, params):
    endpoint = fake.find("endpoint", params["EndpointName"])
    refuse_busy(fake, endpoint)
    if any(component.request["EndpointName"] == endpoint.name for component in fake.components.values()):
        raise invalid(
            "Cannot delete endpoint with inference component associated. Please delete inference component and try it "
            "again."
        )
    endpoint.enter("Deleting", fake.ticks)


@serves("sagemaker")
def list_endpoints(fake, params):
    for endpoint in [e for e in fake.endpoints.values() if e.status == "Deleting"]:
        fake.settle(endpoint)  # so that polling the list until it is empty works too
    summaries = [summary(fake, endpoint, "Endpoint", status=True) for endpoint in fake.endpoints.values()]
    found, token = listing(fake, summaries, params, "EndpointName", "EndpointStatus")
    return {"Endpoints": found} | token


def check_component(fake, request):
    """The rules of a component's request that span more than one member."""
    endpoint = fake.find("endpoint", request["EndpointName"])
    specification = request.get("Specification")
    if specification is None:
        raise invalid("Specification is required")
    if "BaseInferenceComponentName" in specification:
        check_adapter(fake, request, specification, endpoint)
        return
    if not {"VariantName", "RuntimeConfig"} <= request.keys() or "ComputeResourceRequirements" not in specification:
        raise invalid("VariantName, RuntimeConfig and ComputeResourceRequirements are required for this component")
    if request["RuntimeConfig"]["CopyCount"] < 1:
        raise invalid("CopyCount must be at least 1")
    variants = {v["VariantName"]: v for v in endpoint.config["ProductionVariants"]}
    if request["VariantName"] not in variants:
        raise invalid(f"Could not find variant {request['VariantName']} of endpoint {endpoint.name}")
    if "ModelName" in variants[request["VariantName"]]:
        raise invalid("Inference components cannot run on a production variant that has a model of its own")
    if ("ModelName" in specification) == ("Container" in specification):
        raise invalid("Exactly one of ModelName and Container must be provided")
    if "ModelName" in specification:
        fake.find("model", specification["ModelName"])
    else:
        fake.check_image(specification["Container"].get("Image", ""))


def check_adapter(fake, request, specification, endpoint):
    for place, members in ((request, ("VariantName", "RuntimeConfig")), (specification, specification.keys())):
        for member in members:
            if member in place and member not in ("BaseInferenceComponentName", "Container"):
                raise invalid(f"{member} must be omitted for an adapter inference component")
    base = fake.find("inference-component", specification["BaseInferenceComponentName"])
    if base.base or base.request["EndpointName"] != endpoint.name:
        raise invalid(f"{base.name} is not a base inference component of endpoint {endpoint.name}")
    if base.status != "InService":
        raise invalid(f"Base inference component {base.name} is not InService but {base.status}")
    container = specification.get("Container", {})
    if container.keys() != {"ArtifactUrl"}:
        raise invalid("An adapter inference component needs a Container with an ArtifactUrl and nothing else")
    if not re.fullmatch(r"s3://[^/]+/.+\.tar\.gz", container["ArtifactUrl"]):
        raise invalid(f"ArtifactUrl {container['ArtifactUrl']} must be the S3 URI of a .tar.gz archive")


@serves("sagemaker")
def create_inference_component(fake, params):
    endpoint = fake.find("endpoint", params["EndpointName"])
    if endpoint.status != "InService":
        raise invalid(f"Endpoint {endpoint.name} is not InService but {endpoint.status}")
    check_component(fake, params)
    fake.add("inference-component", params["InferenceComponentName"], params, "Creating")
    return {"InferenceComponentArn": fake.arn("inference-component", params["InferenceComponentName"])}


@serves("sagemaker")
def update_inference_component(fake, params):
    component = fake.find("inference-component", params["InferenceComponentName"])
    if component.status != "InService":
        raise invalid(f"Inference component {component.name} cannot be updated: it is {component.status}")
    request = component.request | params
    if not params.keys() & {"Specification", "RuntimeConfig"}:
        raise invalid("Specification or RuntimeConfig is required")
    if "Specification" in params and params["Specification"].get("BaseInferenceComponentName") != component.base:
        raise invalid("BaseInferenceComponentName cannot be changed")
    check_component(fake, request)
    component.request = request
    component.enter("Updating", fake.ticks)
    return {"InferenceComponentArn": fake.arn("inference-component", component.name)}


def component_summary(fake, component):
    """A component's reply members; an adapter has its base's variant."""
    base = fake.components.get(component.base, component)
    endpoint = component.request["EndpointName"]
    return summary(fake, component, "InferenceComponent", status=True) | {
        "EndpointName": endpoint,
        "EndpointArn": fake.arn("endpoint", endpoint),
        "VariantName": base.request["VariantName"],
    }


@serves("sagemaker")
def describe_inference_component(fake, params):
    fake.settle(fake.find("inference-component", params["InferenceComponentName"]))
    component = fake.find("inference-component", params["InferenceComponentName"])
    reply = component_summary(fake, component)
    specification = dict(component.specification)
    if "Container" in specification:
        container = dict(specification["Container"])
        if "Image" in container:
            container["DeployedImage"] = {"SpecifiedImage": container.pop("Image")}
        specification["Container"] = container
    reply["Specification"] = specification
    if "RuntimeConfig" in component.request:
        copies = component.request["RuntimeConfig"]["CopyCount"]
        current = copies if component.status in ("InService", "Updating") else 0
        reply["RuntimeConfig"] = {"DesiredCopyCount": copies, "CurrentCopyCount": current}
    if component.failure_reason:
        reply["FailureReason"] = component.failure_reason
    return reply


@serves("sagemaker")
def delete_inference_component(fake, params):
    component = fake.find("inference-component", params["InferenceComponentName"])
    refuse_busy(fake, component)
    adapters = [other.name for other in fake.components.values() if other.base == component.name]
    if adapters:
        raise invalid(f"Cannot delete inference component {component.name}: it has adapters {', '.join(adapters)}")
    component.enter("Deleting", fake.ticks)
    if fake.serving is not None:
        fake.serving.unload(component.name)


@serves("sagemaker")
def list_inference_components(fake, params):
    for component in [c for c in fake.components.values() if c.status == "Deleting"]:
        fake.settle(component)
    summaries = [component_summary(fake, component) for component in fake.components.values()]
    found, token = listing(fake, summaries, params, "InferenceComponentName", "InferenceComponentStatus")
    return {"InferenceComponents": found} | token


@serves("sagemaker")
def add_tags(fake, params):
    if params["ResourceArn"] not in fake.tags:
        raise invalid(f'Could not find resource "{params["ResourceArn"]}".')
    fake.tag(params["ResourceArn"], params["Tags"])
    return {"Tags": params["Tags"]}


@serves("sagemaker")
def list_tags(fake, params):
    if params["ResourceArn"] not in fake.tags:
        raise invalid(f'Could not find resource "{params["ResourceArn"]}".')
    tags = [{"Key": key, "Value": value} for key, value in fake.tags[params["ResourceArn"]].items()]
    found, token = page(fake, tags, params)
    return {"Tags": found} | token


def model_error(fake, endpoint, status, message):
    group = (
        f"https://{fake.region}.console.aws.amazon.com/cloudwatch/home#logEventViewer:group=/aws/sagemaker/Endpoints"
    )
    kind = "client" if status < 500 else "server"
    return AwsError(
        "ModelError",
        f'Received {kind} error ({status}) from primary with message "{message}". '
        f"See {group}/{endpoint} in account {fake.account} for more information.",
        424,
        OriginalStatusCode=status,
        OriginalMessage=message,
        LogStreamArn=f"arn:aws:logs:{fake.region}:{fake.account}:log-group:/aws/sagemaker/Endpoints/{endpoint}",
    )


@serves("sagemaker-runtime")
def invoke_endpoint(fake, params):
    name, endpoint_name = params.get("InferenceComponentName"), params["EndpointName"]
    with fake.lock:
        endpoint = fake.endpoints.get(endpoint_name)
        if endpoint is None or endpoint.status != "InService":
            raise AwsError("ValidationError", f"Endpoint {endpoint_name} of account {fake.account} not found.")
        if name is None:
            raise AwsError(
                "ValidationError",
                "Inference Component Name header is required for endpoints to which you plan to deploy inference "
                "components. Please include Inference Component Name header or consider using SageMaker models.",
            )
        component = fake.components.get(name)
        if not component or component.request["EndpointName"] != endpoint_name or component.status == "Deleting":
            raise AwsError("ValidationError", f"Inference Component {name} of endpoint {endpoint_name} not found.")
        if component.status == "Creating":
            raise AwsError("ModelNotReadyException", f"Inference Component {name} is not ready.", 429)
        if component.status == "Failed":
            raise AwsError("ValidationError", f"Inference Component {name} has failed.")
    if fake.serving is None:
        raise model_error(fake, endpoint_name, 500, "no model is loaded: fake.serving is None")
    if params.get("ContentType") != "application/json":
        raise model_error(fake, endpoint_name, 415, f"unsupported content type {params.get('ContentType')}")
    try:
        body = json.loads(params["Body"])
    except ValueError:
        raise model_error(fake, endpoint_name, 400, "the body is not JSON") from None
    status, reply = fake.serving.invoke(fake, name, body)
    if status != 200:
        raise model_error(fake, endpoint_name, status, json.dumps(reply))
    content, variant = json.dumps(reply).encode(), component_summary(fake, component)["VariantName"]
    output = {"Body": content, "ContentType": "application/json", "InvokedProductionVariant": variant}
    check_reply("sagemaker-runtime", "InvokeEndpoint", output)
    return 200, {"Content-Type": "application/json", "x-Amzn-Invoked-Production-Variant": variant}, content


def quota_list(fake, values, params):
    if params["ServiceCode"] != "sagemaker":
        raise AwsError(
            "NoSuchResourceException", f"The request failed because service {params['ServiceCode']} is unknown"
        )
    quotas = []
    for name, value in values.items():
        code = QUOTA_CODES.get(name, "L-" + hashlib.sha256(name.encode()).hexdigest()[:8].upper())
        quotas.append(
            {
                "ServiceCode": "sagemaker",
                "ServiceName": "Amazon SageMaker",
                "QuotaArn": f"arn:aws:servicequotas:{fake.region}:{fake.account}:sagemaker/{code}",
                "QuotaCode": code,
                "QuotaName": name,
                "Value": float(value),
                "Unit": "None",
                "Adjustable": True,
                "GlobalQuota": False,
            }
        )
    quotas = [quota for quota in quotas if params.get("QuotaCode") in (None, quota["QuotaCode"])]
    found, token = page(fake, quotas, params, "InvalidPaginationTokenException")
    return {"Quotas": found} | token


@serves("service-quotas")
def list_service_quotas(fake, params):
    """Only quotas that were ever adjusted, as on AWS."""
    return quota_list(fake, fake.quotas, params)


@serves("service-quotas")
def list_aws_default_service_quotas(fake, params):
    return quota_list(fake, fake.default_quotas, params)


@serves("pricing")
def get_products(fake, params):
    if params["ServiceCode"] != "AmazonSageMaker":
        raise AwsError("InvalidParameterException", f"The service code {params['ServiceCode']} is unknown")
    products = []
    for (instance, use), price in fake.prices.items():
        attributes = {
            "servicecode": "AmazonSageMaker",
            "regionCode": fake.region,
            "instanceName": instance,
            "platoinstancetype": use,
            "platoinstancename": instance,
        }
        for wanted in params.get("Filters", []):
            if wanted["Type"] != "TERM_MATCH":
                raise NotImplementedError(f"the test stand does not filter by {wanted['Type']}")
        if all(attributes.get(wanted["Field"]) == wanted["Value"] for wanted in params.get("Filters", [])):
            products.append(product(attributes, price))
    found, token = page(fake, products, params, "InvalidNextTokenException")
    return {"FormatVersion": "aws_v1", "PriceList": found} | token


def product(attributes, price):
    sku = hashlib.sha256(json.dumps(attributes).encode()).hexdigest()[:16].upper()
    term, rate = f"{sku}.JRTCKXETXF", f"{sku}.JRTCKXETXF.6YS6EN2CT7"
    text = f"${price} per Hour for {attributes['instanceName']} {attributes['platoinstancetype']}"
    dimension = {"rateCode": rate, "unit": "Hrs", "beginRange": "0", "endRange": "Inf", "description": text}
    dimension |= {"appliesTo": [], "pricePerUnit": {"USD": f"{price:.10f}"}}
    offer = {"sku": sku, "offerTermCode": "JRTCKXETXF", "termAttributes": {}, "priceDimensions": {rate: dimension}}
    return json.dumps(
        {
            "product": {"productFamily": "ML Instance", "attributes": attributes, "sku": sku},
            "serviceCode": "AmazonSageMaker",
            "terms": {"OnDemand": {term: offer}},
            "version": "20261101000000",
            "publicationDate": "2026-11-01T00:00:00Z",
        }
    )


@serves("ecr")
def describe_images(fake, params):
    repository, registry = params["repositoryName"], params.get("registryId", fake.account)
    known = fake.images is None or any(image.startswith(f"{repository}:") for image in fake.images)
    if registry == fake.account or not known:  # the AWS images are never in one's own registry
        raise AwsError(
            "RepositoryNotFoundException",
            f"The repository with name '{repository}' does not exist in the registry with id '{registry}'",
        )
    details = []
    for identity in params.get("imageIds", []):
        tag = identity.get("imageTag", "")
        if fake.images is not None and f"{repository}:{tag}" not in fake.images:
            found = f"{{imageDigest:'null', imageTag:'{tag}'}}"
            raise AwsError(
                "ImageNotFoundException",
                f"The image with imageId {found} does not exist within the repository with name '{repository}' in the "
                f"registry with id '{registry}'",
            )
        digest = "sha256:" + hashlib.sha256(f"{repository}:{tag}".encode()).hexdigest()
        detail = {"registryId": registry, "repositoryName": repository, "imageDigest": digest, "imageTags": [tag]}
        details.append(detail | {"imageSizeInBytes": 9_000_000_000, "imagePushedAt": 1.79e9})
    return {"imageDetails": details}
