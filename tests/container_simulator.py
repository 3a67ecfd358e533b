"""A training container without Docker: what SageMaker and its Hugging Face image do around the user's script.

    Fake(run_training)                       # every CreateTrainingJob then runs its script, here, as a subprocess

A temporary folder stands for `/`; the SM_* variables point into it, as sagemaker-training 5.1 sets them. Nothing is
installed: each requirement must be an exact pin of what this interpreter has, and what a job does not install cannot be
imported. `job.plan` tells what happens: `interrupt_at` and `stop_at` are patterns of a line that the script prints.
`job.plan["seen"]` gets the output and the files of each container.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
# Runs first in every Python process of the container.
ABSENT = ["datasets", "pyarrow", "relplot", "plotly", "openai", "anthropic"]
HOOK = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"


class JobError(Exception):
    """Ends the job as Failed; its text is the FailureReason."""


def run_training(fake, job):
    """Run one job to its end, whatever happens; nothing of it is left but what it put into S3 and the logs."""
    try:
        interruptible = "interrupt_at" in job.plan
        while True:
            with tempfile.TemporaryDirectory(prefix="sagemaker-", ignore_cleanup_errors=True) as root:
                ended = Container(fake, job, Path(root).resolve()).run(interruptible)
            if ended:
                job.end("Stopped" if ended == "MaxRuntimeExceeded" else "Completed", ended)
                return
            job.move("Interrupted", "Training job interrupted")
            interruptible = False
    except JobError as reason:
        job.end("Failed", "Failed", str(reason)[:1024])
    except Exception as error:
        fake.broken.append(traceback.format_exc())
        job.end("Failed", "Failed", f"InternalServerError: {error}")


class Container:
    """One instance with one container on it, from its first download to its last upload."""

    def __init__(self, fake, job, root):
        self.fake, self.job, self.request, self.ml, self.root = fake, job, job.request, root / "opt" / "ml", root
        self.s3, self.logs, self.output = fake.client("s3"), fake.client("logs"), []
        for folder in ("model", "output/data", "code", "checkpoints", "input/data"):
            (self.ml / folder).mkdir(parents=True)
        values = {name: json.loads(value) for name, value in self.request["HyperParameters"].items()}
        self.program, self.source = values["sagemaker_program"], values["sagemaker_submit_directory"]
        self.stream = {"logGroupName": LOG_GROUP, "logStreamName": f"{job.name}/algo-1-{time.time_ns()}"}

    def run(self, interruptible):
        """The secondary status in which the job has ended; None if it was interrupted and goes on elsewhere."""
        self.job.move("Downloading", "Downloading input data")
        for channel in self.request["InputDataConfig"]:
            folder = self.ml / "input/data" / channel["ChannelName"]
            if not download(self.fake, channel["DataSource"]["S3DataSource"]["S3Uri"], folder):
                raise JobError("ClientError: Data download failed: no S3 objects found")
        download(self.fake, self.request["CheckpointConfig"]["S3Uri"] + "/", self.ml / "checkpoints")
        self.fetch_source()
        self.job.move("Training", "Training image download completed. Training in progress.")
        result, began = self.job.result, time.time()
        result.setdefault("TrainingStartTime", began)
        why, code = self.execute(interruptible)
        result["TrainingTimeInSeconds"] = result.get("TrainingTimeInSeconds", 0) + 10 + round(time.time() - began)
        is_spot = self.request.get("EnableManagedSpotTraining")
        result["BillableTimeInSeconds"] = int(result["TrainingTimeInSeconds"] * (0.4 if is_spot else 1))
        self.upload_folder(self.ml / "checkpoints", self.request["CheckpointConfig"]["S3Uri"])  # only ever adds
        files = {str(path): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}
        self.job.plan.setdefault("seen", []).append({"output": "\n".join(self.output), "files": files})
        if why == "Interrupted":
            return None
        if code and not why:
            failure = self.ml / "output/failure"
            said = failure.read_text() if failure.exists() else "ExecuteUserScriptError"
            raise JobError(f"AlgorithmError: {said[:1024]}, exit code: {code}")
        self.job.move("Uploading", "Uploading generated training model")
        self.upload_model()
        return why or "Completed"

    def upload_folder(self, folder, uri):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        for path in (one for one in folder.rglob("*") if one.is_file()):
            self.s3.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")

    def upload_model(self):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for path in sorted((self.ml / "model").iterdir()):
                tar.add(path, path.name)
        bucket, _, prefix = self.request["OutputDataConfig"]["S3OutputPath"].removeprefix("s3://").partition("/")
        key = f"{prefix}/{self.job.name}/output/model.tar.gz"
        self.s3.put_object(Bucket=bucket, Key=key, Body=packed.getvalue())

    def fetch_source(self):
        with tarfile.open(fileobj=io.BytesIO(self.fake.below(self.source)[""])) as tar:
            tar.extractall(self.ml / "code", filter="data")
        for line in (self.ml / "code/requirements.txt").read_text().splitlines():
            name, _, version = line.partition("==")
            if importlib.metadata.version(name) != version or name == "torch":
                raise JobError(f"AlgorithmError: ERROR: Could not find a version that satisfies {line}")
        (self.root / "hook").mkdir()
        (self.root / "hook/sitecustomize.py").write_text(HOOK)

    def environment(self):
        ml = self.ml
        # The role's credentials, not the user's region or token.
        role = {
            name: v for name, v in self.fake.env.items() if name.startswith("AWS_") and name != "AWS_DEFAULT_REGION"
        }
        channels = {f"SM_CHANNEL_{one.name.upper()}": str(one) for one in (ml / "input/data").iterdir()}
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": f"{self.root / 'hook'}{os.pathsep}{ml / 'code'}",
            "SM_MODEL_DIR": str(ml / "model"),
            "SM_OUTPUT_DIR": str(ml / "output"),
            "SM_NUM_GPUS": "0",
            "TRAINING_JOB_NAME": self.job.name,
            **channels,
            **role,
            **self.request["Environment"],
            **self.job.plan.get("env", {}),
        }

    def execute(self, interruptible):
        """Run the script and pass its lines on; (why it was told to stop or None, its exit code)."""
        patterns = {"MaxRuntimeExceeded": self.job.plan.get("stop_at")}
        patterns["Interrupted"] = self.job.plan.get("interrupt_at") if interruptible else None
        process = subprocess.Popen(
            [sys.executable, self.program],
            cwd=self.ml / "code",
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        why = None
        for line in process.stdout:
            self.say(line.rstrip("\n"))
            hit = next((name for name, pattern in patterns.items() if pattern and re.search(pattern, line)), None)
            if hit and not why:
                why = hit
                process.terminate()
        return why, process.wait()

    def say(self, line):
        """Send a line to the container's own CloudWatch stream, which its first line makes."""
        if not self.output:
            with contextlib.suppress(self.logs.exceptions.ResourceAlreadyExistsException):
                self.logs.create_log_group(logGroupName=LOG_GROUP)
            self.logs.create_log_stream(**self.stream)
        self.output.append(line)
        event = {"timestamp": time.time_ns() // 1_000_000, "message": line or " "}
        self.logs.put_log_events(**self.stream, logEvents=[event])


def download(fake, uri, folder):
    """Copy the objects below an S3 prefix; whether there were any."""
    found = fake.below(uri)
    for name, content in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return bool(found)
