"""The cloud commands from end to end, on a stand-in for AWS whose containers really train and really answer.

fake_sagemaker.py is AWS, container_simulator.py the training container, fake_lmi.py the serving one. The commands run
as a user runs them. What only AWS can show (permissions, images, GPUs, vLLM itself) is not shown here.
"""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from container_simulator import run_training
from fake_lmi import LMI
from fake_sagemaker import Fake
from safetensors.numpy import load_file

import predictions

pytestmark = pytest.mark.sagemaker

ROOT = Path(__file__).parent.parent
SECRET_TOKEN = "hf_" + "InTheSecretAndNowhereElse" + "0123456789"
LOCAL_TOKEN = "hf_" + "OnTheUsersMachineOnly" + "0123456789abcd"
ROWS = ["--limit", "48", "--validation-limit", "30"]
QUICK = ["--epochs", "2", "--batch-size", "8", "--validate-every", "4", "--checkpoint-every", "2"]


@pytest.fixture(scope="module")
def stand():
    with Fake(run_training=run_training, serving=LMI()) as fake:
        fake.role("SageMakerExecutionRole")
        yield fake


@pytest.fixture
def fake(stand):
    stand.plan = {"env": {"OMP_NUM_THREADS": "1"}}
    yield stand
    for job in stand.jobs.values():
        job.stop.set()
        job.thread.join(60)
    assert stand.left_behind() == []


@pytest.fixture
def command(fake, run):
    """Run a command against the stand; everything it printed is kept."""
    said = []

    def run_command(*arguments, code=0):
        env = {**fake.env, "HF_TOKEN": LOCAL_TOKEN, "OMP_NUM_THREADS": "1"}
        done = run(*arguments, env=env, stdin=subprocess.DEVNULL)
        said.append(done.stdout + done.stderr)
        assert done.returncode == code, said[-1]
        ours = [line for line in said[-1].splitlines() if not line.startswith("  |")]  # in a job's log: torchrun's
        assert "Traceback" not in "\n".join(ours)
        return done

    run_command.said = said
    return run_command


@pytest.fixture
def train(command, tiny_folder):
    def run_training_command(folder, *more, code=0):
        flags = ["--model", tiny_folder, *ROWS, *QUICK, "--output-dir", folder, "--poll-seconds", "0.2"]
        return command("fine_tune_model.py", "--sagemaker", "--yes", *flags, *more, code=code)

    return run_training_command


def last_job(fake):
    return list(fake.jobs.values())[-1]


def search(fake, command, folder):
    """Where a token stands that must stand nowhere."""
    places = {f"output {i}": text.encode() for i, text in enumerate(command.said)}
    for i, request in enumerate(fake.requests):
        if request.operation != "CreateSecret":  # the user's own doing
            places[f"request {i} {request.operation}"] = request.body + json.dumps(request.headers).encode()
    for job in fake.jobs.values():
        for i, container in enumerate(job.plan.get("seen", [])):
            places[f"{job.name} output {i}"] = container["output"].encode()
            places |= {f"{job.name} {i} {name}": content for name, content in container["files"].items()}
    places |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(places) > 50
    return [place for place, content in places.items() if re.search(rb"hf_[A-Za-z0-9]{20,}", content)]


def same_adapter(one, other):
    names = ("adapter_config.json", "adapter_model.safetensors")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_from_training_to_deletion(fake, command, train, run, tiny_folder, tmp_path):
    # Two adapters, one over an interruption, one with a token in a secret.
    fake.plan["interrupt_at"] = r" 8 of 12 "
    done = train(tmp_path / "one", "--spot")
    assert "Interrupted" in done.stdout and "saved by spot" in done.stdout
    first, second = last_job(fake).plan["seen"]
    assert "4 of 12" in first["output"] and "0 of 12" not in second["output"]  # it went on, not began anew
    arn = fake.client("secretsmanager").create_secret(Name="hf", SecretString=SECRET_TOKEN)["ARN"]
    del fake.plan["interrupt_at"]
    train(tmp_path / "two", "--seed", "5", "--confidence-head", "--hf-token-secret", arn)
    assert last_job(fake).request["Environment"]["HF_TOKEN_SECRET_ARN"] == arn

    # They are the ones that training here makes, byte for byte, and say the same of themselves.
    for name, more in (("one", []), ("two", ["--seed", "5", "--confidence-head"])):
        here = tmp_path / f"{name}-here"
        command("fine_tune_model.py", "--model", tiny_folder, *ROWS, *QUICK, "--output-dir", here, *more)
        assert same_adapter(tmp_path / name, here)
        configs = [json.loads((folder / "training_config.json").read_text()) for folder in (tmp_path / name, here)]
        assert configs[0].pop("sagemaker_job") in fake.jobs and configs[0] == configs[1]
    heads = [tmp_path / name / "confidence_head.json" for name in ("two", "two-here")]
    assert heads[0].read_bytes() == heads[1].read_bytes()

    # Served beside each other, they answer as they do here.
    adapters = [f"one={tmp_path / 'one'}", f"two={tmp_path / 'two'}"]
    deploy = ["scripts/deploy_sagemaker.py", "texts", "--model", tiny_folder, "--yes", "--poll-seconds", "0.05"]
    command(*deploy, "--adapter", adapters[0], "--adapter", adapters[1], "--max-length", "512")
    assert len(fake.components) == 3
    probes = [probe["text"] for probe in configs[0]["probes"]]
    answers = {}
    for name in ("one", "two"):
        command(
            "scripts/test_endpoint.py", "texts", "--adapter", name, "--tolerance", "1e-5", "--tokenizer", tiny_folder
        )
        local = ["--model", tiny_folder, "--adapter", tmp_path / name]
        remote = ["--endpoint", f"sagemaker:texts/{name}", "--tokenizer", tiny_folder]
        rows = [
            [
                json.loads(line)
                for line in command("logprobs_confidence.py", "--json", *way, *probes).stdout.splitlines()
            ]
            for way in (local, remote)
        ]
        for here, there in zip(*rows, strict=True):
            assert there["probabilities"] == pytest.approx(here["probabilities"], abs=1e-5)
        answers[name] = rows[1][0]["probabilities"]
        table = ["--input", ROOT / "data" / "sample.csv", "--limit", "12"]
        for i, way in enumerate((local, remote)):
            command("logprobs_confidence.py", *way, *table, "--output", tmp_path / f"{name}-{i}.jsonl")
        tables = [predictions.read(tmp_path / f"{name}-{i}.jsonl") for i in (0, 1)]
        for here, there in zip(*tables, strict=True):
            assert there.id == here.id and there.probabilities == pytest.approx(here.probabilities, abs=1e-5)
    assert answers["one"] != pytest.approx(answers["two"], abs=1e-3)

    # A swap changes the answer, a removal takes one away, a deletion everything; again is no error.
    command(*deploy, "--adapter", f"one={tmp_path / 'two'}")
    swapped = command("scripts/test_endpoint.py", "texts", "--adapter", "one", "--json", "--tokenizer", tiny_folder)
    assert json.loads(swapped.stdout.splitlines()[0])["probabilities"] == pytest.approx(answers["two"], abs=1e-5)
    command(*deploy, "--remove", "two")
    assert len(fake.components) == 2
    command("scripts/test_endpoint.py", "texts", "--adapter", "two", code=2)
    command("scripts/delete_endpoint.py", "texts", "--poll-seconds", "0.05")
    assert fake.left_behind() == []
    command("scripts/delete_endpoint.py", "texts", "--poll-seconds", "0.05")
    assert search(fake, command, tmp_path) == []


def test_the_default_model_trains_there_as_it_does_here(fake, command, tmp_path):
    from embedded_model import cache_dir

    fake.plan["env"]["CALIBRATED_CONFIDENCE_CACHE"] = str(cache_dir())  # in place of fetching it through pip
    flags = ["--limit", "32", "--validation-limit", "30", "--epochs", "1", "--batch-size", "16"]
    command("fine_tune_model.py", "--sagemaker", "--yes", *flags, "--output-dir", tmp_path / "there")
    command("fine_tune_model.py", *flags, "--output-dir", tmp_path / "here")
    assert same_adapter(tmp_path / "there", tmp_path / "here")


def test_a_stop_at_the_time_limit_is_gone_on_from_in_two_processes_too(fake, command, train, tiny_folder, tmp_path):
    fake.plan["env"]["SM_NUM_GPUS"] = "2"  # which has the entry start two; there is no GPU, so on the processor
    fake.plan["stop_at"] = r" 4 of 12 "
    done = train(tmp_path / "out", "--task", "sentiment", code=2)
    assert "it reached --max-runtime; the command that started it goes on" in done.stderr
    assert not (tmp_path / "out").exists()
    del fake.plan["stop_at"]
    train(tmp_path / "out", "--resume")
    assert "0 of 12" not in last_job(fake).plan["seen"][0]["output"]
    assert json.loads((tmp_path / "out" / "training_config.json").read_text())["processes"] == 2
    command("fine_tune_model.py", "--model", tiny_folder, *ROWS, *QUICK, "--output-dir", tmp_path / "here")
    here, there = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("here", "out"))
    assert all(value == pytest.approx(there[name], abs=1e-5) for name, value in here.items())
    done = train(tmp_path / "other", "--resume", "--seed", "9", code=2)
    assert "no checkpoint of a job with these rows and flags" in done.stderr


def test_what_ends_a_job_is_one_line_with_the_next_step_and_leaves_nothing_behind(fake, train, tmp_path):
    fake.plan["capacity_error"] = True
    assert "AWS has none free" in train(tmp_path / "out", code=2).stderr
    del fake.plan["capacity_error"]
    fake.plan["no_artifact"] = True
    assert "completed without adapter_config.json" in train(tmp_path / "out", code=2).stderr

    def spoil(folder):
        path = next(Path(folder).rglob("adapter_model.safetensors"))
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\x80\x3f")

    del fake.plan["no_artifact"]
    fake.plan["spoil_artifact"] = spoil
    done = train(tmp_path / "out", code=2)
    assert "is refused" in done.stderr and "not those that were trained" in done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.part").is_dir()
    del fake.plan["spoil_artifact"]
    done = train(tmp_path / "out", "--learning-rate", "1e30", code=2)
    assert re.search(r"failed: AlgorithmError: error: the gradient of step \d+ is not finite", done.stderr)
    assert all(line.count("error: ") <= 2 for line in done.stderr.splitlines()) and not (tmp_path / "out").exists()


def test_a_task_groups_and_columns_of_one_s_own_travel(fake, command, tiny_folder, tmp_path):
    task = 'name = "mood"\ntemplate = "{text}\\nMood:"\n[labels]\nglad = ["happy", "glad"]\nsad = ["sad"]\n'
    (tmp_path / "mood.toml").write_text(task, encoding="utf-8")
    rows = [f"{i},a {'fine' if i % 2 else 'grey'} day number {i},{'G' if i % 2 else 'S'}" for i in range(40)]
    for name, part in (("t.csv", rows[:24]), ("v.csv", rows[24:])):
        (tmp_path / name).write_text("\n".join(["key,body,mood", *part]) + "\n", encoding="utf-8")
    groups = "\n".join(["id,group", *(f"{i},{i % 5}" for i in range(24, 40))]) + "\n"
    (tmp_path / "g.csv").write_text(groups, encoding="utf-8")
    flags = ["--model", tiny_folder, "--task", tmp_path / "mood.toml", "--train", tmp_path / "t.csv"]
    flags += [
        "--validation",
        tmp_path / "v.csv",
        "--text-column",
        "body",
        "--label-column",
        "mood",
        "--id-column",
        "key",
    ]
    flags += ["--label-map", "G=glad", "S=sad", "--groups", tmp_path / "g.csv", *QUICK]
    command("fine_tune_model.py", "--sagemaker", "--yes", "--output-dir", tmp_path / "there", *flags)
    command("fine_tune_model.py", "--output-dir", tmp_path / "here", *flags)
    assert same_adapter(tmp_path / "there", tmp_path / "here")
    configs = [json.loads((tmp_path / where / "training_config.json").read_text()) for where in ("there", "here")]
    assert configs[0].pop("sagemaker_job") and configs[0] == configs[1]


class Gate(BaseHTTPRequestHandler):
    """A Hub whose models are all gated."""

    def do_GET(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


def test_a_gated_model_is_stopped_before_the_start_or_named_after_it(fake, command, run, tmp_path):
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{hub.server_port}"
    flags = [
        "fine_tune_model.py",
        "--sagemaker",
        "--yes",
        "--model",
        "owner/gated",
        *ROWS,
        "--output-dir",
        tmp_path / "out",
    ]
    done = run(*flags, env={**fake.env, "HF_ENDPOINT": url}, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "weights failed" in done.stderr and "--weights upload" in done.stdout
    fake.plan["env"]["HF_ENDPOINT"] = url  # the Hub is not reached from here, but from the container
    done = command(*flags, "--poll-seconds", "0.2", code=2)
    assert "owner/gated is gated" in done.stderr and "--hf-token-secret" in done.stderr
    hub.shutdown()
    hub.server_close()


def test_a_job_that_was_left_is_come_back_to_or_stopped(fake, command, train, tiny_folder, tmp_path):
    train(tmp_path / "out", "--detach")
    name = last_job(fake).name
    assert not (tmp_path / "out").exists()
    command("fine_tune_model.py", "--attach", name, "--output-dir", tmp_path / "out", "--poll-seconds", "0.2")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    command("fine_tune_model.py", "--attach", name, "--output-dir", tmp_path / "again", "--poll-seconds", "0.2")
    assert same_adapter(tmp_path / "out", tmp_path / "again")

    arguments = ["fine_tune_model.py", "--sagemaker", "--yes", "--model", tiny_folder, *ROWS, *QUICK, "--seed", "3"]
    arguments += ["--epochs", "40", "--patience", "0", "--output-dir", tmp_path / "left", "--poll-seconds", "0.2"]
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**fake.env, "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if " 4 of 240 " in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    job = last_job(fake)
    assert process.returncode == 130 and f"{job.name} goes on and is billed" in err and job.running
    done = command("fine_tune_model.py", "--stop", job.name, "--poll-seconds", "0.2")
    assert job.status == "Stopped" and "billed" in done.stdout
    time.sleep(0.1)
    assert "stopped at step" in job.plan["seen"][0]["output"]  # with a checkpoint written
