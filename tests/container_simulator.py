"""A training container without Docker: what SageMaker and its Hugging Face image do around the user's script.

    Fake(run_training=run_training)          # every CreateTrainingJob then runs its script, here, as a subprocess

A temporary folder stands for `/`; the SM_* variables point into it. Arguments, variables, requirements and failures are
those of sagemaker-training 5.1. Nothing is installed: each requirement must be an exact pin of what this interpreter
has, and a package that neither the requirements nor the image bring cannot be imported. It is stricter than AWS where
that depends on the image or on luck: clean archives, arguments that survive a shell, a region in AWS_REGION only.
`job.plan["seen"]` gets a record a container: its env, argv, output (text) and files (path below `/` -> content).
"""

import atexit
import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import queue
import re
import signal
import site
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from pathlib import Path

from botocore.exceptions import ClientError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

IMAGE = ("torch", "boto3", "numpy", "pip", "setuptools")  # what the image brings, with what these require
GRACE_S = 120  # from SIGTERM to SIGKILL
SOURCE_LIMIT = 10 << 20
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
CAPACITY = "CapacityError: Unable to provision requested ML compute capacity."
CAPACITY += " Please retry using a different ML instance type."
_running: set[int] = set()  # process groups; killed at exit, if a test has ended without its job

# Runs first in every Python process of the container: what pip would not have installed has no module and no version.
HOOK = """
import sys
from importlib.machinery import PathFinder

SITE, MODULES, DISTRIBUTIONS = {site!r}, {modules!r}, {distributions!r}

class Installed:
    invalidate_caches = PathFinder.invalidate_caches

    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or path is not None or name in MODULES:
            return spec
        places = [spec.origin] if spec.origin else list(spec.submodule_search_locations)
        return None if any(place.startswith(SITE) for place in places) else spec

    @staticmethod
    def find_distributions(*context):
        for found in PathFinder.find_distributions(*context):
            if (found.metadata["Name"] or "").lower().replace("_", "-").replace(".", "-") in DISTRIBUTIONS:
                yield found

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""


class JobError(Exception):
    """Ends the job as Failed; its text is the FailureReason."""


def run_training(fake, job):
    """Run one job to its end, whatever happens; nothing of it is left but what it put into S3 and the logs."""
    try:
        if job.plan.get("capacity_error"):
            raise JobError(CAPACITY)
        interruptions = job.plan.get("interruptions", 1) if "interrupt_at" in job.plan else 0
        if interruptions and not job.request.get("EnableManagedSpotTraining"):
            raise JobError("InternalServerError: the test interrupts a job that is not managed spot training")
        for attempt in itertools.count():
            with tempfile.TemporaryDirectory(prefix="sagemaker-", ignore_cleanup_errors=True) as root:
                if not Container(fake, job, Path(root).resolve()).run(attempt < interruptions):
                    break
            job.move("Interrupted", "Training job interrupted")
            job.move("Starting", "Preparing the instances for training")
    except JobError as reason:
        job.end("Failed", "Failed", str(reason)[:1024])
    except Exception as error:
        traceback.print_exc()
        job.end("Failed", "Failed", f"InternalServerError: {type(error).__name__}: {error}"[:1024])


class Container:
    """One instance with one container on it, from its first download to its last upload."""

    def __init__(self, fake, job, root):
        self.fake, self.job, self.request, self.root, self.ml = fake, job, job.request, root, root / "opt" / "ml"
        self.name = self.request["TrainingJobName"]
        self.s3, self.logs = fake.client("s3"), fake.client("logs")
        for folder in ("input/config", "input/data", "model", "output/data", "code"):
            (self.ml / folder).mkdir(parents=True)
        decoded = {key: _decoded(value) for key, value in self.request.get("HyperParameters", {}).items()}
        self.program, self.source = decoded.get("sagemaker_program"), decoded.get("sagemaker_submit_directory")
        self.hyperparameters = {key: value for key, value in decoded.items() if not key.startswith("sagemaker_")}
        self.checkpoints, self.checkpoints_uri = None, None
        if config := self.request.get("CheckpointConfig"):
            self.checkpoints = root / config.get("LocalPath", "/opt/ml/checkpoints").lstrip("/")
            self.checkpoints_uri = config["S3Uri"].rstrip("/") + "/"
        self.stream, self.output, self.env, self.argv = None, [], None, None

    def run(self, interruptible):
        """Whether the job was interrupted and has to go on in another container."""
        job, spot = self.job, self.request.get("EnableManagedSpotTraining")
        try:
            job.move("Downloading", "Downloading input data")
            self._download_channels()
            job.move("Training", "Training image download completed. Training in progress.")
            began = time.time()
            job.training_start = job.training_start or began
            try:
                self._fetch_source()
                self._hide_packages(self._requirements())
                why, code = self._execute(interruptible)
            finally:
                job.training_end = time.time()
                job.training_s = (job.training_s or 0) + math.ceil(job.training_end - began)
                job.billable_s = max(1, int(0.4 * job.training_s)) if spot else job.training_s
                self._save_checkpoints()
            if why == "Interrupted":
                return True
            if why and job.secondary != "Stopping":  # StopTrainingJob says so itself
                job.move("Stopping", "Stopping the training job")
            elif code and not why:
                raise JobError(self._failure(code))
            job.move("Uploading", "Uploading generated training model")
            self._upload()
            job.end("Stopped" if why else "Completed", why or "Completed")
            return False
        finally:
            self._remember()

    # Before the script

    def _download_channels(self):
        try:
            for channel in self.request.get("InputDataConfig", []):
                source, folder = channel["DataSource"]["S3DataSource"], self.ml / "input/data" / channel["ChannelName"]
                folder.mkdir()
                if channel.get("InputMode", "File") != "File" or source["S3DataType"] != "S3Prefix":
                    raise JobError("ClientError: Data download failed: only File mode and S3Prefix are simulated")
                if not self._download(source["S3Uri"], folder):
                    reason = f'ClientError: Data download failed: No S3 objects found under S3 URL "{source["S3Uri"]}"'
                    raise JobError(f"{reason} given in input data source.")
            if self.checkpoints:
                self.checkpoints.mkdir(parents=True)
                self._download(self.checkpoints_uri, self.checkpoints)
        except ClientError as error:
            raise JobError(f"ClientError: Data download failed: {error}") from None

    def _download(self, uri, folder):
        """Copy the objects below an S3 prefix; whether there were any."""
        bucket, prefix = _split(uri)
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        for key in keys:
            below = key.removeprefix(prefix)
            if below and prefix and not prefix.endswith("/") and not below.startswith("/"):
                raise JobError(f"ClientError: Data download failed: {uri} is also the beginning of {key}")
            target = folder / (below.lstrip("/") or key.rpartition("/")[2])
            if not key.endswith("/"):
                target.parent.mkdir(parents=True, exist_ok=True)
                self.s3.download_file(bucket, key, str(target))
        return bool(keys)

    def _fetch_source(self):
        archive = self.root / "sourcedir.tar.gz"
        try:
            self.s3.download_file(*_split(self.source), str(archive))
            with tarfile.open(archive, "r:gz") as tar:
                members = tar.getmembers()
                if bad := [m.name for m in members if m.name.startswith("/") or ".." in Path(m.name).parts]:
                    raise tarfile.TarError(f"Attempted Path Traversal in Tar File: {bad[0]}")
                if bad := [m.name for m in members if not m.isfile() and not m.isdir()]:
                    raise tarfile.TarError(f"{bad[0]} is neither a file nor a folder")
                if (size := sum(m.size for m in members)) > SOURCE_LIMIT:
                    raise tarfile.TarError(f"{size} bytes of source; weights and data go by channels")
                tar.extractall(self.ml / "code", filter="data")
            archive.unlink()
            if (self.ml / "code/setup.py").exists():
                raise tarfile.TarError("the toolkit would install the setup.py at the root, not requirements.txt")
            if "/" in self.program or not (self.ml / "code" / self.program).is_file():
                raise tarfile.TarError(f"{self.program} is not at the root of {self.source}")
        except (ClientError, tarfile.TarError, OSError, EOFError) as error:
            raise JobError(f"AlgorithmError: framework error: {error}, exit code: 1") from None

    def _requirements(self):
        """The distributions that the image and requirements.txt bring, by name; refuses what pip could not install."""
        file = self.ml / "code/requirements.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        pins = [line for line in (line.partition("#")[0].strip() for line in lines) if line]
        for pin in pins:
            if problem := _unmet(pin):
                self._say(problem)
                command = "python -m pip install -r requirements.txt"
                text = f'InstallRequirementsError:\nExitCode 1\nErrorMessage "{problem}"\nCommand "{command}"'
                raise JobError(f"AlgorithmError: {text}, exit code: 1")
        if pins:
            self._say("Successfully installed " + " ".join(pin.replace("==", "-") for pin in pins))
        return _closure([*IMAGE, *(pin.partition("==")[0] for pin in pins)])

    def _hide_packages(self, installed):
        # importlib.metadata.packages_distributions() leaves out a module that is a single extension file.
        modules = {file.parts[0].partition(".")[0] for one in installed.values() for file in one.files or ()}
        (self.root / "hook").mkdir()
        (self.root / "hook/sitecustomize.py").write_text(
            HOOK.format(site=tuple(site.getsitepackages()), modules=modules, distributions=set(installed))
        )

    # The script

    def _arguments(self):
        for key, value in sorted(self.hyperparameters.items()):
            if isinstance(value, dict):
                value = ",".join(f"{k}={v}" for k, v in sorted(value.items()))
            value = "" if value is None else str(value)
            if not re.fullmatch(r"[A-Za-z0-9._/:,=+@%-]+", value):  # toolkits before 5.1.4 join them into a shell line
                raise JobError(f"AlgorithmError: ExecuteUserScriptError: {key}={value!r} does not survive a shell")
            yield from ("--" + key if len(key) > 1 else "-" + key, value)

    def _environment(self, arguments):
        """(all variables, those of the toolkit); writes the files that the toolkit has some of them from."""
        ml, instance = self.ml, self.request["ResourceConfig"].get("InstanceType")
        data = {path.name: path for path in sorted((ml / "input/data").iterdir())}
        mode = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
        resources = {"current_host": "algo-1", "hosts": ["algo-1"], "current_instance_type": instance}
        config = {"hyperparameters": self.request.get("HyperParameters", {}), "resourceconfig": resources}
        for name, content in (config | {"inputdataconfig": dict.fromkeys(data, mode)}).items():
            (ml / f"input/config/{name}.json").write_text(json.dumps(content))
        mine = {"HOSTS": ["algo-1"], "CURRENT_HOST": "algo-1", "CURRENT_INSTANCE_TYPE": instance, "LOG_LEVEL": 20}
        mine |= {"MODEL_DIR": ml / "model", "OUTPUT_DIR": ml / "output", "OUTPUT_DATA_DIR": ml / "output/data"}
        mine |= {"INPUT_DIR": ml / "input", "INPUT_CONFIG_DIR": ml / "input/config", "MODULE_DIR": self.source}
        mine |= {"USER_ENTRY_POINT": self.program, "MODULE_NAME": self.program.removesuffix(".py")}
        mine |= {"CHANNELS": list(data), "HPS": self.hyperparameters, "USER_ARGS": arguments}
        mine |= {"NUM_GPUS": 0, "NUM_CPUS": os.cpu_count()}
        mine["TRAINING_ENV"] = {k.lower(): str(v) if isinstance(v, Path) else v for k, v in mine.items()}
        mine |= {f"CHANNEL_{name.upper()}": path for name, path in data.items()}
        mine |= {f"HP_{key.upper()}": value for key, value in self.hyperparameters.items()}
        mine = {f"SM_{key}": _text(value) for key, value in mine.items()}
        # The role's credentials and the way to AWS.
        role = {k: v for k, v in self.fake.env.items() if k.startswith("AWS_") and k != "AWS_DEFAULT_REGION"}
        home = self.root / "root"
        home.mkdir()
        env = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "PYTHONIOENCODING": "UTF-8"}
        env |= {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"} | role | self.request.get("Environment", {})
        arn = f"arn:aws:sagemaker:{self.fake.region}:{self.fake.account}:training-job/{self.name}"
        env |= mine | {"TRAINING_JOB_NAME": self.name, "TRAINING_JOB_ARN": arn, "AWS_REGION": self.fake.region}
        env["PYTHONPATH"] = f"{self.root / 'hook'}{os.pathsep}{ml / 'code'}"
        return env | self.job.plan.get("env", {}), mine

    def _execute(self, interruptible):
        """Run the script and pass its lines on; (why it was told to stop or None, its exit code)."""
        arguments = list(self._arguments())
        self.argv = [sys.executable, self.program, *arguments]
        self.env, toolkit = self._environment(arguments)
        self._say("Invoking user script", "", "Environment variables:", "", *(f"{k}={v}" for k, v in toolkit.items()))
        self._say("", "Invoking script with the following command:", "", " ".join(self.argv), "")
        plan = {"MaxRuntimeExceeded": self.job.plan.get("stop_at")}
        plan["Interrupted"] = self.job.plan.get("interrupt_at") if interruptible else None
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(self.argv, cwd=self.ml / "code", env=self.env, start_new_session=True, **pipes)
        _running.add(process.pid)
        lines, ended, why, deadline = queue.SimpleQueue(), False, None, math.inf
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        try:
            while not ended or process.poll() is None:
                batch = _take(lines)
                ended = ended or None in batch
                text = [line for line in batch if line is not None]
                if process.poll() is not None or time.monotonic() > deadline:
                    _kill(process.pid)  # what a script leaves behind ends with the container, and its hold on the pipe
                elif not why:
                    hits = (name for name, regex in plan.items() if regex and any(re.search(regex, x) for x in text))
                    if why := next(hits, "Stopped" if self.job.stop.is_set() else None):
                        process.terminate()
                        deadline = time.monotonic() + GRACE_S
                self._say(*text)
        finally:
            _kill(process.pid)
            process.wait()
            _running.discard(process.pid)
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        self._say(f"Reporting training {'FAILURE' if code else 'SUCCESS'}")
        return why, code

    # After the script

    def _failure(self, code):
        file = self.ml / "output/failure"
        if file.exists():
            text = file.read_text(errors="replace")
        elif code == 137:
            text = "OutOfMemory: Process killed by SIGKILL"
        else:
            tail, command = "\n".join(self.output[:-1])[-600:], " ".join(self.argv)
            text = f'ExecuteUserScriptError:\nExitCode {code}\nErrorMessage "{tail}"\nCommand "{command}"'
        return f"AlgorithmError: {text[:1024]}, exit code: {code}"

    def _save_checkpoints(self):
        """Only ever adds: what the script has deleted stays in S3, as on AWS."""
        for path in sorted(self.checkpoints.rglob("*")) if self.checkpoints else ():
            if path.is_file():
                self._put(path, self.checkpoints_uri + path.relative_to(self.checkpoints).as_posix())

    def _upload(self):
        if spoil := self.job.plan.get("spoil_artifact"):
            spoil(self.ml / "model")
        place = f"{self.request['OutputDataConfig']['S3OutputPath'].rstrip('/')}/{self.name}/output"
        for folder, name in ((self.ml / "model", "model.tar.gz"), (self.ml / "output/data", "output.tar.gz")):
            content = [] if self.job.plan.get("no_artifact") else sorted(folder.iterdir())
            if content or name == "model.tar.gz":
                with tempfile.NamedTemporaryFile(suffix=name) as file:
                    with tarfile.open(fileobj=file, mode="w:gz") as tar:
                        for path in content:
                            tar.add(path, path.name)
                    file.flush()
                    self._put(file.name, f"{place}/{name}")

    def _put(self, path, uri):
        try:
            self.s3.upload_file(str(path), *_split(uri))
        except Exception as error:  # boto3's own S3UploadFailedError is no ClientError
            raise JobError(f"ClientError: Artifact upload failed: {error}") from None

    def _say(self, *lines):
        """Send lines to the container's own CloudWatch stream, which its first line makes."""
        self.output += lines
        now = time.time_ns() // 1_000_000
        if not self.stream:
            self.stream = {"logGroupName": LOG_GROUP, "logStreamName": f"{self.name}/algo-1-{now}"}
            with contextlib.suppress(self.logs.exceptions.ResourceAlreadyExistsException):
                self.logs.create_log_group(logGroupName=LOG_GROUP)
            self.logs.create_log_stream(**self.stream)
        events = [{"timestamp": now, "message": line[:200_000] or " "} for line in lines]
        for i in range(0, len(events), 1000):
            self.logs.put_log_events(**self.stream, logEvents=events[i : i + 1000])

    def _remember(self):
        files = {}
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and path.parent.name != "hook":
                with open(path, "rb") as file:
                    files[path.relative_to(self.root).as_posix()] = file.read(1 << 20)
        seen = {"env": self.env, "argv": self.argv, "output": "\n".join(self.output), "files": files}
        self.job.plan.setdefault("seen", []).append(seen)


def _read(pipe, lines):
    with pipe:
        for line in pipe:  # bytes: reading as text would break a progress bar's carriage returns into lines
            lines.put(line.decode(errors="replace").rstrip("\n"))
    lines.put(None)


def _take(lines):
    """What is there by now, after at most a moment's wait for a first line; None is the end."""
    batch = []
    with contextlib.suppress(queue.Empty):
        batch.append(lines.get(timeout=0.1))
        while True:
            batch.append(lines.get_nowait())
    return batch


def _kill(group):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


@atexit.register
def _kill_all():
    for group in list(_running):
        _kill(group)


def _split(uri):
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _decoded(value):
    try:
        return json.loads(value)
    except ValueError:
        return value


def _text(value):
    if value is None or isinstance(value, str | Path):
        return "" if value is None else str(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _unmet(line):
    """What pip would say of a line of requirements.txt that it could not install; None if it could."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_]+)", line)
    if not match:
        return f"ERROR: Invalid requirement: {line!r} is not an exact pin"
    if canonicalize_name(match[1]) == "torch":
        return "ERROR: torch must not be required: the image brings its own build"
    try:
        found = importlib.metadata.version(match[1])
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != match[2]:
        return f"ERROR: Could not find a version that satisfies the requirement {line} (from versions: {found})"
    return None


def _closure(names):
    """Name -> distribution of all that installing these brings, as far as this machine has it."""
    found, todo = {}, [(canonicalize_name(name), frozenset()) for name in names]
    done = set(todo)
    for name, extras in todo:  # grows on the way
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.distribution(name)
            for requirement in map(Requirement, found[name].requires or ()):
                marker = requirement.marker
                if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                    entry = canonicalize_name(requirement.name), frozenset(requirement.extras)
                    todo += [entry] if entry not in done else []
                    done.add(entry)
    return found
