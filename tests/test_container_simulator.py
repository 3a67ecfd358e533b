"""The training container and the LMI container of the test stand are true to what they stand for, and as strict."""

import importlib.metadata
import io
import json
import os
import tarfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import container_simulator
import numpy as np
import pytest
from container_simulator import LOG_GROUP, run_training
from fake_lmi import LMI
from fake_sagemaker import Fake, Resource

from llama import load_llama

BUCKET = "sagemaker-us-east-1-123456789012"
TRAINING_IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/huggingface-pytorch-training:2.9.0-transformers5.3.0"
LMI_IMAGE = "763104351884.dkr.ecr.us-east-1.amazonaws.com/djl-inference:0.36.0-lmi28.0.0-cu130"
ROLE = "arn:aws:iam::123456789012:role/SageMaker"


def pin(*names):
    return "".join(f"{name}=={importlib.metadata.version(name)}\n" for name in names)


@pytest.fixture(scope="module")
def fake():
    with Fake(run_training=run_training, serving=LMI()) as stand:
        stand.quotas["ml.g6e.2xlarge for training job usage"] = 9.0
        stand.bucket(BUCKET)
        for name, text in {"train.jsonl": '{"text": "a"}\n', "deeper/more.jsonl": "{}\n"}.items():
            stand.client("s3").put_object(Bucket=BUCKET, Key=f"data/{name}", Body=text.encode())
        yield stand


def pack(files):
    """A .tar.gz of names and contents; a TarInfo among the contents goes in as it is."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def start(fake):
    """Start a job that runs a script: `start(script, files, plan, **changes of the request)` -> Job."""

    def start_job(script, files=(), plan=(), hyperparameters=(), **changes):
        name = f"job-{len(fake.jobs)}"
        fake.client("s3").put_object(
            Bucket=BUCKET, Key=f"{name}.tar.gz", Body=pack({"entry.py": script, **dict(files)})
        )
        channel = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/data/"}
        framework = {"sagemaker_program": "entry.py", "sagemaker_submit_directory": f"s3://{BUCKET}/{name}.tar.gz"}
        fake.plan = dict(plan)
        fake.client("sagemaker").create_training_job(
            **{
                "TrainingJobName": name,
                "RoleArn": ROLE,
                "AlgorithmSpecification": {"TrainingImage": TRAINING_IMAGE, "TrainingInputMode": "File"},
                "HyperParameters": {k: json.dumps(v) for k, v in framework.items()} | dict(hyperparameters),
                "InputDataConfig": [{"ChannelName": "training", "DataSource": {"S3DataSource": channel}}],
                "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/out"},
                "ResourceConfig": {"InstanceType": "ml.g6e.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 50},
                "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
            }
            | changes
        )
        return fake.jobs[name]

    return start_job


@pytest.fixture
def train(start):
    """The same, to the end."""

    def train_job(*args, **changes):
        job = start(*args, **changes)
        job.thread.join(60)
        assert not job.running
        return job

    return train_job


SPOT = {
    "EnableManagedSpotTraining": True,
    "StoppingCondition": {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 7200},
}


def logged(fake, job):
    """The messages of each of a job's log streams."""
    logs, found = fake.client("logs"), []
    for stream in logs.describe_log_streams(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{job.name}/")["logStreams"]:
        place = {"logGroupName": LOG_GROUP, "logStreamName": stream["logStreamName"]}
        found.append([e["message"] for e in logs.get_log_events(**place, startFromHead=True)["events"]])
    return found


def artifact(fake, job, name="model.tar.gz"):
    content = fake.client("s3").get_object(Bucket=BUCKET, Key=f"out/{job.name}/output/{name}")["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def secondary(job):
    return [transition["Status"] for transition in job.transitions]


# The training container


def test_the_script_finds_arguments_environment_data_and_leaves_a_model(fake, train, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_HOST", "1")
    script = """
import json, os, sys
from pathlib import Path
Path(os.environ["SM_MODEL_DIR"], "adapter.json").write_text("{}")
Path(os.environ["SM_OUTPUT_DATA_DIR"], "curves.txt").write_text("1")
files = sorted(p.name for p in Path(os.environ["SM_CHANNEL_TRAINING"]).rglob("*") if p.is_file())
print(json.dumps({"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd(), "files": files}))
"""
    given = {"epochs": "3", "flag": "true", "name": '"a"', "raw": "s3://b/c", "x": "1.5", "nested": '{"b": 2, "a": 1}'}
    job = train(
        script, hyperparameters=given, Environment={"TOKENIZERS_PARALLELISM": "false"}, plan={"env": {"A": "b"}}
    )
    assert (job.status, job.secondary, job.failure_reason) == ("Completed", "Completed", None)
    assert secondary(job) == ["Starting", "Downloading", "Training", "Uploading", "Completed"]
    seen = json.loads(next(line for line in logged(fake, job)[0] if line.startswith("{")))
    expected = seen["argv"]
    assert " ".join(expected) == "entry.py --epochs 3 --flag True --name a --nested a=1,b=2 --raw s3://b/c -x 1.5"
    assert expected == job.plan["seen"][0]["argv"][1:]
    env = seen["env"]
    assert not set(env) & {"SECRET_OF_THE_HOST", "AWS_DEFAULT_REGION", "PYTEST_CURRENT_TEST"}
    assert (env["TRAINING_JOB_NAME"], env["AWS_REGION"], env["A"]) == (job.name, "us-east-1", "b")
    assert (env["TOKENIZERS_PARALLELISM"], env["AWS_ENDPOINT_URL"]) == ("false", fake.url)
    assert (env["SM_HP_EPOCHS"], env["SM_HP_FLAG"], env["SM_CHANNELS"]) == ("3", "true", '["training"]')
    assert json.loads(env["SM_HPS"])["nested"] == {"a": 1, "b": 2}
    assert json.loads(env["SM_USER_ARGS"]) == expected[1:]
    root = Path(env["SM_MODEL_DIR"]).parents[2]
    assert (seen["cwd"], env["HOME"]) == (str(root / "opt/ml/code"), str(root / "root"))
    assert seen["files"] == ["more.jsonl", "train.jsonl"]
    assert artifact(fake, job) == {"adapter.json": b"{}"}
    assert artifact(fake, job, "output.tar.gz") == {"curves.txt": b"1"}
    assert {"opt/ml/model/adapter.json", "opt/ml/input/data/training/deeper/more.jsonl"} <= job.plan["seen"][0][
        "files"
    ].keys()
    assert job.billable_s == job.training_s >= 1
    assert not root.exists()


def test_lines_arrive_as_they_were_written(fake, train):
    script = r"""
import os, sys, time
for i in range(3):
    print(i, flush=True)
    print("bar\r done", file=sys.stderr)
print()
print("no newline", end="", flush=True)
os.close(1), os.close(2)
time.sleep(0.3)  # still at work, though it has nothing more to say
open(os.environ["SM_MODEL_DIR"] + "/late", "w").close()
"""
    job = train(script)
    assert artifact(fake, job) == {"late": b""}
    lines = logged(fake, job)[0]
    start = lines.index("0")
    assert lines[start:-1] == ["0", "bar\r done", "1", "bar\r done", "2", "bar\r done", " ", "no newline"]


def test_only_required_packages_can_be_imported(train):
    """One that is here but not required is missing everywhere: lazily, in a child process, for find_spec, metadata."""
    script = """
import importlib.metadata, importlib.util, subprocess, sys
import numpy, torch, boto3, jinja2, markupsafe, ours, six, yaml_free
def missing(name):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        return error.name == name
def unknown(name):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return True
for name in ("pandas", "pytest", "moto", "transformers", "_pytest"):
    assert missing(name) and importlib.util.find_spec(name) is None and unknown(name), name
assert importlib.metadata.version("jinja2") and importlib.metadata.version("typing_extensions")
assert subprocess.run([sys.executable, "-c", "import jinja2"]).returncode == 0
assert subprocess.run([sys.executable, "-c", "import pandas"], stderr=subprocess.DEVNULL).returncode == 1
print("all as it should be")
"""
    files = {"requirements.txt": "# why\n" + pin("jinja2"), "ours.py": "", "yaml_free/__init__.py": ""}
    job = train(script, files)
    assert job.status == "Completed", job.failure_reason
    assert "all as it should be" in job.plan["seen"][0]["output"]


def test_the_real_libraries_work_with_their_closure(train):
    """What transformers and peft look up at run time (versions, optional packages) does not stumble over the hook."""
    script = """
import transformers, peft, safetensors.torch, tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=1, target_modules=["q_proj"]))
assert not transformers.utils.is_pandas_available()
"""
    job = train(script, {"requirements.txt": pin("transformers", "peft")})
    assert job.status == "Completed", job.failure_reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("jinja2==0.1", "Could not find a version that satisfies the requirement jinja2==0.1 (from versions: 3"),
        ("no-such-package==1.0", "(from versions: none)"),
        ("jinja2>=3", "is not an exact pin"),
        ("-r other.txt", "is not an exact pin"),
        ("torch==2.13.0", "the image brings its own build"),
    ],
)
def test_requirements_that_pip_could_not_install(train, line, reason):
    job = train("print('ran')", {"requirements.txt": line})
    assert (job.status, job.secondary) == ("Failed", "Failed")
    assert job.failure_reason.startswith("AlgorithmError: InstallRequirementsError:")
    assert reason in job.failure_reason
    assert "ran" not in job.plan["seen"][0]["output"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "import os, sys; open(os.environ['SM_OUTPUT_DIR'] + '/failure', 'w').write('x' * 2000); sys.exit(3)",
            "AlgorithmError: " + "x" * 1008,
        ),
        ("open(__import__('os').environ['SM_OUTPUT_DIR'] + '/failure', 'w').write('why'); 1 / 0", "why, exit code: 1"),
        ("raise SystemExit('no rows')", 'AlgorithmError: ExecuteUserScriptError:\nExitCode 1\nErrorMessage "'),
        ("raise SystemExit('no rows')", "no rows"),
        ("import os; os.kill(os.getpid(), 9)", "OutOfMemory"),
    ],
)
def test_a_script_that_fails(fake, train, script, reason):
    job = train(script)
    assert (job.status, job.secondary) == ("Failed", "Failed")
    assert reason in job.failure_reason and len(job.failure_reason) <= 1024
    assert secondary(job) == ["Starting", "Downloading", "Training", "Failed"]


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return {name: info}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"setup.py": ""}, "setup.py"),
        ({"../escape.py": ""}, "Path Traversal"),
        ({"/absolute.py": ""}, "Path Traversal"),
        (special("link", tarfile.SYMTYPE), "neither a file nor a folder"),
        ({"weights.bin": bytes(11 << 20)}, "bytes of source"),
    ],
)
def test_unclean_source_archives(train, files, reason):
    job = train("print('ran')", files)
    assert job.status == "Failed" and reason in job.failure_reason


def test_what_is_not_there(fake, train):
    def channel(uri):
        source = {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": uri}}
        return [{"ChannelName": "training", "DataSource": source}]

    for uri, reason in (
        (f"s3://{BUCKET}/nothing/", "No S3 objects found"),
        ("s3://no-such-bucket/data/", "NoSuchBucket"),
        (f"s3://{BUCKET}/dat", "is also the beginning of data/"),
    ):
        job = train("", InputDataConfig=channel(uri))
        assert job.failure_reason.startswith("ClientError: Data download failed: ") and reason in job.failure_reason
    for name, value, reason in (
        ("sagemaker_program", '"scripts/entry.py"', "not at the root"),
        ("sagemaker_submit_directory", f'"s3://{BUCKET}/no.tar.gz"', "Not Found"),
        ("text", '"two words"', "does not survive a shell"),
        ("empty", '""', "does not survive a shell"),
    ):
        assert reason in train("", hyperparameters={name: value}).failure_reason
    job = train("", OutputDataConfig={"S3OutputPath": "s3://no-such-bucket/out"})
    assert job.failure_reason.startswith("ClientError: Artifact upload failed")


STEPS = """
import os, signal, sys, time
from pathlib import Path
folder = Path(os.environ["SM_MODEL_DIR"]).parent / "checkpoints"
state = folder / "deep" / "step"
step = int(state.read_text()) if state.exists() else 0
print("from", step, "old" if (folder / "old").exists() else "")
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
while step < 6 and not stopping:
    step += 1
    print("step", step)
    time.sleep(0.02)
    while step == 3 and not stopping:
        time.sleep(0.01)
(folder / "old").unlink(missing_ok=True) if step > 3 else (folder / "old").touch()
state.parent.mkdir(exist_ok=True)
state.write_text(str(step))
Path(os.environ["SM_MODEL_DIR"], "step").write_text(str(step))
print("stopped" if stopping else "finished")
"""


def test_spot_interruption_and_going_on(fake, train):
    checkpoints = {"S3Uri": f"s3://{BUCKET}/checkpoints/spot", "LocalPath": "/opt/ml/checkpoints"}
    job = train(STEPS, plan={"interrupt_at": "^step 3$"}, CheckpointConfig=checkpoints, **SPOT)
    assert job.status == "Completed", job.failure_reason
    begun = ["Starting", "Downloading", "Training"]
    assert secondary(job) == [*begun, "Interrupted", *begun, "Uploading", "Completed"]
    first, second = job.plan["seen"]
    assert "from 0" in first["output"] and "stopped" in first["output"]
    assert "from 3 old" in second["output"] and "finished" in second["output"]
    assert first["env"]["SM_MODEL_DIR"] != second["env"]["SM_MODEL_DIR"]
    assert len(logged(fake, job)) == 2
    assert artifact(fake, job) == {"step": b"6"}
    kept = fake.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="checkpoints/spot/")["Contents"]
    assert [entry["Key"][17:] for entry in kept] == ["deep/step", "old"]
    assert 1 <= job.billable_s < job.training_s


def test_stopping(fake, start):
    job = start(STEPS, CheckpointConfig={"S3Uri": f"s3://{BUCKET}/checkpoints/stop"})
    deadline = time.monotonic() + 30
    while job.secondary != "Training" or not any("step 3" in lines for lines in logged(fake, job)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    fake.client("sagemaker").stop_training_job(TrainingJobName=job.name)
    job.thread.join(30)
    assert (job.status, job.secondary) == ("Stopped", "Stopped")
    assert secondary(job)[2:] == ["Training", "Stopping", "Uploading", "Stopped"]
    assert artifact(fake, job) == {"step": b"3"}


def test_too_long_and_deaf_to_sigterm(fake, train, monkeypatch):
    monkeypatch.setattr(container_simulator, "GRACE_S", 0.3)
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(600)"
    job = train(script, plan={"stop_at": "deaf"})
    assert (job.status, job.secondary) == ("Stopped", "MaxRuntimeExceeded")
    assert artifact(fake, job) == {}


def test_nothing_outlives_the_container(train):
    """Not even a child that holds the output open, which a plain read to its end would wait for."""
    script = """
import subprocess, sys
print("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
"""
    began = time.monotonic()
    job = train(script)
    assert job.status == "Completed" and time.monotonic() - began < 20
    child = int(job.plan["seen"][0]["output"].partition("child ")[2].split()[0])
    for _ in range(100):  # the kernel may take a moment, and nobody may have reaped it
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or ") Z " in stat.read_text():
            break
        time.sleep(0.02)
    else:
        os.kill(child, 9)
        pytest.fail("the child lives")
    assert not container_simulator._running


def test_what_a_test_can_plan(fake, train):
    script = "import os; open(os.environ['SM_MODEL_DIR'] + '/adapter_config.json', 'w').write('{}')"
    job = train(script, plan={"capacity_error": True})
    assert job.failure_reason.startswith("CapacityError: ") and secondary(job) == ["Starting", "Failed"]
    assert artifact(fake, train(script, plan={"no_artifact": True})) == {}
    spoiled = train(script, plan={"spoil_artifact": lambda folder: (folder / "adapter_config.json").unlink()})
    assert artifact(fake, spoiled) == {}


# LMI

OPTIONS = {
    "HF_MODEL_ID": "/opt/ml/model",
    "OPTION_ENABLE_LORA": "true",
    "OPTION_MAX_LORAS": "2",
    "OPTION_MAX_CPU_LORAS": "2",
    "OPTION_MAX_LORA_RANK": "16",
    "OPTION_MAX_LOGPROBS": "50",
}


@pytest.fixture(scope="module")
def adapter_files(tiny_folder, tmp_path_factory):
    """A LoRA adapter for the tiny model, far from doing nothing: name -> content."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    with warnings.catch_warnings():  # of a name that transformers will change
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(load_llama(str(tiny_folder), device="cpu").model, config).save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


@pytest.fixture(scope="module")
def truth(tiny_folder, adapter_files, tmp_path_factory):
    """The tiny model without and with the adapter, loaded by our own loader."""
    folder = tmp_path_factory.mktemp("truth")
    for name, content in adapter_files.items():
        (folder / name).write_bytes(content)
    options = {"device": "cpu", "dtype": "float32"}
    return load_llama(str(tiny_folder), **options), load_llama(str(tiny_folder), str(folder), **options)


def base(fake, name="base", image=LMI_IMAGE, prefix="weights/", **options):
    """A base component's record; the model that it names is put into the stand."""
    source = {"S3Uri": f"s3://{BUCKET}/{prefix}", "S3DataType": "S3Prefix", "CompressionType": "None"}
    container = {"Image": image, "Environment": {k: v for k, v in (OPTIONS | options).items() if v is not None}}
    container |= {"ModelDataSource": {"S3DataSource": source}} if prefix is not None else {}
    fake.models[name] = Resource("model", name, {"ModelName": name, "PrimaryContainer": container})
    return Resource("inference-component", name, {"Specification": {"ModelName": name}})


def adapter(fake, files, name="adapter", base="base"):
    key = f"adapters/{name}.tar.gz"
    fake.client("s3").put_object(Bucket=BUCKET, Key=key, Body=files if isinstance(files, bytes) else pack(files))
    container = {"ArtifactUrl": f"s3://{BUCKET}/{key}"}
    specification = {"BaseInferenceComponentName": base, "Container": container}
    return Resource("inference-component", name, {"Specification": specification})


@pytest.fixture(scope="module")
def lmi(fake, tiny_folder, adapter_files):
    """LMI with components `base` and `adapter`."""
    for path in tiny_folder.iterdir():
        fake.client("s3").upload_file(str(path), BUCKET, f"weights/{path.name}")
    fake.serving.load(fake, base(fake))
    fake.serving.load(fake, adapter(fake, adapter_files))
    return fake.serving


@pytest.fixture
def ask(fake, lmi):
    def invoke(component="base", **body):
        return lmi.invoke(fake, component, {"max_tokens": 1, "temperature": 0} | body)

    return invoke


def test_ids_and_texts_get_the_models_own_probabilities(ask, truth):
    text = "The staff were rude.\nSentiment:"
    for component, llama in zip(("base", "adapter"), truth, strict=True):
        ids = llama.tokenizer(text).input_ids
        expected = llama.next_token_log_probs(ids)
        order = np.argsort(-expected)[:20].tolist()
        for prompt in (ids, text, [text], [ids]):
            status, reply = ask(component, prompt=prompt, logprobs=20, return_tokens_as_token_ids=True)
            assert status == 200
            (choice,) = reply["choices"]
            (top,) = choice["logprobs"]["top_logprobs"]
            assert list(top) == [f"token_id:{i}" for i in order]
            np.testing.assert_allclose(list(top.values()), expected[order], atol=1e-5)
            assert choice["text"] == llama.tokenizer.decode([order[0]])
            assert choice["logprobs"]["tokens"] == [f"token_id:{order[0]}"]
            assert reply["usage"]["prompt_tokens"] == len(ids)
    with_and_without = [llama.next_token_log_probs(ids) for llama in truth]
    assert np.abs(np.subtract(*with_and_without)).max() > 0.1


def test_listed_tokens_are_answered_whatever_their_rank(ask, truth):
    ids, expected = [5, 6, 7], truth[0].next_token_log_probs([5, 6, 7])
    listed = np.argsort(expected)[:128].tolist()
    body = {"logprob_token_ids": listed, "return_tokens_as_token_ids": True}
    status, reply = ask(prompt=ids, logprobs=1, **body)
    top = reply["choices"][0]["logprobs"]["top_logprobs"][0]
    best = int(np.argmax(expected))  # vLLM adds the token that it chose
    assert status == 200 and list(top) == [f"token_id:{i}" for i in [best, *listed]]
    np.testing.assert_allclose(list(top.values())[1:], expected[listed], atol=1e-5)
    assert ask(prompt=ids, **body)[0] == 424  # logprobs is missing
    assert ask(prompt=ids, logprobs=1, logprob_token_ids=[*listed, 0])[0] == 400
    assert ask(prompt=ids, logprobs=1, logprob_token_ids=[10**6])[0] == 400


def test_a_sampled_token_is_listed_beside_the_likeliest(ask, truth):
    replies = [ask(prompt=[5, 6, 7], logprobs=2, temperature=1.0)[1]["choices"][0] for _ in range(20)]
    tops = [choice["logprobs"]["top_logprobs"][0] for choice in replies]
    best = truth[0].tokenizer.decode([int(np.argmax(truth[0].next_token_log_probs([5, 6, 7])))])
    assert {3} <= {len(top) for top in tops} <= {2, 3} and all(best in top for top in tops)
    assert all(next(iter(top)) == choice["text"] for top, choice in zip(tops, replies, strict=True))


def test_chat(ask, truth):
    messages = [{"role": "user", "content": "Good?"}]
    text = truth[0].tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = truth[0].next_token_log_probs(truth[0].tokenizer(text, add_special_tokens=False).input_ids)
    status, reply = ask(messages=messages, logprobs=True, top_logprobs=3)
    (content,) = reply["choices"][0]["logprobs"]["content"]
    order = np.argsort(-expected)[:3].tolist()
    assert status == 200 and reply["object"] == "chat.completion"
    assert [entry["token"] for entry in content["top_logprobs"]] == [truth[0].tokenizer.decode([i]) for i in order]
    np.testing.assert_allclose([entry["logprob"] for entry in content["top_logprobs"]], expected[order], atol=1e-5)
    assert bytes(content["bytes"]).decode() == content["token"] == reply["choices"][0]["message"]["content"]
    listed = ask(messages=messages, logprobs=True, logprob_token_ids=[9, 8], return_tokens_as_token_ids=True)[1]
    top = listed["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert [entry["token"] for entry in top] == [f"token_id:{i}" for i in (order[0], 9, 8)]
    assert ask(messages=messages)[1]["choices"][0]["logprobs"] is None
    assert ask(messages=messages, top_logprobs=3)[0] == 424
    assert ask(messages="hello")[0] == 400


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 424, "must contain prompt, inputs, or messages"),
        ({"inputs": "a"}, 424, "must contain prompt, inputs, or messages"),
        (
            {"prompt": "a", "logprobs": 51},
            400,
            "Requested sample logprobs of 51, which is greater than max allowed: 50",
        ),
        ({"prompt": "a", "logprobs": True}, 424, "must be an integer"),
        ({"prompt": "a", "model": "llama"}, 404, "The model `llama` does not exist."),
        ({"prompt": [1] * 512}, 400, "This model's maximum context length is 512 tokens."),
        ({"prompt": [10**6]}, 400, "out of vocabulary"),
        ({"prompt": [[1], "a", 2]}, 424, "prompt"),
        ({"prompt": ""}, 400, "cannot be empty"),
        ({"prompt": "a", "max_tokens": 16}, 501, "one token"),
        ({"prompt": "a", "stream": True}, 501, "stream"),
    ],
)
def test_refused_requests(ask, body, status, words):
    answered, reply = ask(**body)
    assert (answered, reply["code"]) == (status, status)
    assert words in reply["error"]


def test_names_and_unknown_fields(ask, lmi):
    assert [ask("adapter", prompt="a", model=name)[0] for name in ("lmi", "adapter", "base")] == [200, 200, 404]
    assert ask("nothing", prompt="a") == (424, {"code": 424, "error": "LoRA adapter nothing not found in registry"})
    assert ask(prompt="a", logprobs=1, top_p=1.0, guided_choice=["a"])[0] == 200
    assert lmi.ignored[-1] == ("base", ["guided_choice"])


def test_many_at_once(ask, truth):
    rows = [[i, i + 1, i + 2] for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda row: ask(prompt=row, logprobs=1)[1], rows))
    for row, reply in zip(rows, replies, strict=True):
        expected = truth[0].next_token_log_probs(row).max()
        assert reply["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prefix": "nothing/"}, "could not find model data"),
        ({"prefix": "weights"}, "ends with a slash"),
        ({"prefix": None}, "cannot be reached"),
        ({"HF_MODEL_ID": "meta-llama/Llama-3.1-8B-Instruct"}, "puts the model into /opt/ml/model"),
        ({"OPTION_ENABLE_LORA": None}, "OPTION_ENABLE_LORA"),
        ({"OPTION_MAX_LORA_RANK": "24"}, "max_lora_rank (24) must be one of"),
        ({"OPTION_MAX_CPU_LORAS": "1"}, "max_cpu_loras (1) must be >= max_loras (2)"),
        ({"OPTION_MAX_MODEL_LEN": "8192"}, "is greater than the derived max_model_len (max_position_embeddings=512"),
        ({"image": LMI_IMAGE.replace("lmi28", "lmi12")}, "no adapter inference components"),
    ],
)
def test_bases_that_do_not_start(fake, lmi, changes, reason):
    with pytest.raises(ValueError) as error:
        lmi.load(fake, base(fake, "other", **changes))
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 32}, "LoRA rank 32 is greater than max_lora_rank 16."),
        ({"rank_pattern": {"q_proj": 64}}, "LoRA rank 64 is greater than max_lora_rank 16."),
        ({"use_dora": True}, "vLLM does not yet support DoRA."),
        ({"bias": "all"}, "Adapter bias is not supported."),
        ({"modules_to_save": ["lm_head"]}, "vLLM only supports modules_to_save being None."),
        ({"r": 4}, "cannot load the adapter"),  # the weights have another rank
    ],
)
def test_adapters_that_vllm_refuses(fake, lmi, adapter_files, changes, reason):
    config = json.loads(adapter_files["adapter_config.json"]) | changes
    with pytest.raises(ValueError) as error:
        lmi.load(fake, adapter(fake, adapter_files | {"adapter_config.json": json.dumps(config)}, "other"))
    assert reason in str(error.value)
    assert "other" not in lmi.loaded


def test_adapter_archives(fake, lmi, adapter_files, ask):
    for name, files, reason in (
        ("a", {f"adapter/{name}": content for name, content in adapter_files.items()}, "adapter config missing"),
        ("b", {"adapter_config.json": adapter_files["adapter_config.json"]}, "no adapter_model.safetensors"),
        ("c", b"not an archive", "cannot read"),
    ):
        with pytest.raises(ValueError) as error:
            lmi.load(fake, adapter(fake, files, name))
        assert reason in str(error.value)
    gone = adapter(fake, adapter_files, "d")
    fake.client("s3").delete_object(Bucket=BUCKET, Key="adapters/d.tar.gz")
    with pytest.raises(ValueError, match="cannot read"):
        lmi.load(fake, gone)
    with pytest.raises(ValueError, match="nobody is not loaded"):
        lmi.load(fake, adapter(fake, adapter_files, "e", base="nobody"))
    # More adapters than MAX_CPU_LORAS are fine.
    for name in "fg":
        lmi.load(fake, adapter(fake, {f"./{file}": content for file, content in adapter_files.items()}, name))
    for name in "fg":
        assert ask(name, prompt="a")[0] == 200
        lmi.unload(name)
        assert ask(name, prompt="a")[0] == 424


def test_before_release_28_listed_tokens_are_ignored(fake, lmi, ask):
    lmi.load(fake, base(fake, "older", image=LMI_IMAGE.replace("lmi28", "lmi27")))
    reply = ask("older", prompt=[5], logprobs=1, logprob_token_ids=[1, 2, 3])[1]
    assert len(reply["choices"][0]["logprobs"]["top_logprobs"][0]) == 1
    assert lmi.ignored[-1] == ("older", ["logprob_token_ids"])


def test_through_the_endpoint(fake, lmi, adapter_files, truth):
    """The whole way of a deployment: model, configuration, endpoint, components, invoke_endpoint."""
    client, runtime = fake.client("sagemaker"), fake.client("sagemaker-runtime")
    container = base(fake, "unused") and fake.models.pop("unused").request["PrimaryContainer"]
    adapter(fake, adapter_files, "deployed")
    client.create_model(ModelName="m", ExecutionRoleArn=ROLE, PrimaryContainer=container)
    variant = {"VariantName": "AllTraffic", "InstanceType": "ml.g6e.2xlarge", "InitialInstanceCount": 1}
    variant["InferenceAmiVersion"] = "al2023-ami-sagemaker-inference-gpu-4-1"
    client.create_endpoint_config(EndpointConfigName="c", ExecutionRoleArn=ROLE, ProductionVariants=[variant])
    client.create_endpoint(EndpointName="e", EndpointConfigName="c")
    client.get_waiter("endpoint_in_service").wait(EndpointName="e", WaiterConfig={"Delay": 0.01})
    needs = {"NumberOfAcceleratorDevicesRequired": 1, "MinMemoryRequiredInMb": 1024}
    artifact = {"ArtifactUrl": f"s3://{BUCKET}/adapters/deployed.tar.gz"}
    for name, specification, more in (
        (
            "e-base",
            {"ModelName": "m", "ComputeResourceRequirements": needs},
            {"VariantName": "AllTraffic", "RuntimeConfig": {"CopyCount": 1}},
        ),
        ("e-adapter-x", {"BaseInferenceComponentName": "e-base", "Container": artifact}, {}),
    ):
        client.create_inference_component(
            InferenceComponentName=name, EndpointName="e", Specification=specification, **more
        )
        status = "Creating"
        while status == "Creating":
            status = client.describe_inference_component(InferenceComponentName=name)["InferenceComponentStatus"]
        assert status == "InService"
    body = json.dumps({"prompt": [5, 6], "max_tokens": 1, "logprobs": 2, "temperature": 0})
    for name, llama in zip(("e-base", "e-adapter-x"), truth, strict=True):
        target = {"EndpointName": "e", "InferenceComponentName": name}
        reply = json.loads(runtime.invoke_endpoint(**target, ContentType="application/json", Body=body)["Body"].read())
        expected = llama.next_token_log_probs([5, 6]).max()
        assert reply["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx([expected], abs=1e-5)
    with pytest.raises(runtime.exceptions.ModelError, match="maximum context length"):
        runtime.invoke_endpoint(
            **target, ContentType="application/json", Body=json.dumps({"prompt": [1] * 600, "max_tokens": 1})
        )
    client.delete_inference_component(InferenceComponentName="e-adapter-x")
    assert "e-adapter-x" not in lmi.loaded
