"""--endpoint against vLLM's own server, with the embedded model and the shipped adapter, on 127.0.0.1.

`make test-vllm` installs a CPU build of it where the processor has AVX-512, and runs this file.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from install_vllm import missing

import predictions
from embedded_model import embedded_model
from endpoint import connect
from llama import load_llama, load_reader
from logprobs_confidence import label_scorer, remote_label_scorer
from tables import read_examples
from task import TASKS

ROOT = Path(__file__).parent.parent
SERVER = ROOT / ".venv-vllm" / "bin" / "vllm"
ADAPTER = ROOT / "fine_tuned_sentiment_model"
TASK = TASKS["sentiment"]
REASON = missing() or f"{SERVER} is not there; make test-vllm installs it"
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not SERVER.exists() or bool(missing()), reason=REASON)]
START_S = 300


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(log: Path, port: int):
    """vLLM with both models, "base" and "fine-tuned", in float32; yields the URL of its API."""
    command = [SERVER, "serve", embedded_model(), "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    command += ["--max-model-len", 2048, "--served-model-name", "base", "--enforce-eager", "--max-logprobs", 128]
    command += ["--enable-lora", "--lora-modules", f"fine-tuned={ADAPTER}"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment |= {"KMP_BLOCKTIME": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [*map(str, command)], stdout=file, stderr=file, env=os.environ | environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        wait_for(f"{url}/models", process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the server did not answer")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server") / "log", free_port()) as url:
        yield url


@pytest.fixture(scope="module")
def examples():
    return list(read_examples(str(ROOT / "data" / "sample.csv")))[:40]


def scored(server, examples):
    return list(remote_label_scorer(server, TASK).score(iter(examples), lambda n: None, None))


@pytest.mark.parametrize(("model", "adapter"), [("base", None), ("fine-tuned", str(ADAPTER))])
def test_with_ids_it_says_what_the_model_loaded_here_says(url, examples, model, adapter):
    local = label_scorer(load_llama(adapter=adapter, device="cpu"), TASK).score_together(examples)
    with connect(url, model=model, reader=load_reader("default")) as server:
        remote = scored(server, examples)
        assert server.by_id and server.usage.told == server.usage.requests == len(examples) + 1
    for ours, theirs in zip(local, remote, strict=True):
        assert theirs.probabilities == pytest.approx(ours.probabilities, abs=1e-4)
        assert theirs.label_mass == pytest.approx(ours.label_mass, abs=1e-4)
    # As text, what is listed and what may be beyond it enclose the true mass.
    with connect(url, model=model) as server:
        listed = [row for row in scored(server, examples) if row.error is None]
        assert server.top_tokens == 20
    assert len(listed) > len(examples) / 2
    mass = {row.id: row.label_mass for row in local}
    low = np.array([row.label_mass for row in listed])
    high = np.array([row.extras["label_mass_high"] for row in listed])
    true = np.array([mass[row.id] for row in listed])
    assert (low - 1e-3 < true).all() and (true < high + 1e-3).all()


def test_a_run_whose_server_is_killed_goes_on_with_another(url, tmp_path):
    output = tmp_path / "p.jsonl"
    cache = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "logprobs_confidence.py", "--input", "data:test", "--limit", "80", "--model", "base"]
    command += ["--tokenizer", "default", "--served-as", f"vllm test {os.getpid()}", "--output", str(output)]
    with running(tmp_path / "log", free_port()) as second:
        begin = [*command, "--endpoint", second, "--concurrency", "2"]
        process = subprocess.Popen(begin, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | cache)
        deadline = time.monotonic() + START_S
        while (not output.exists() or output.read_bytes().count(b"\n") < 20) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
    _, err = process.communicate(timeout=120)  # its server is gone
    assert process.returncode == 2 and "repeat the command to continue" in err, err
    before = output.read_bytes()
    done = subprocess.run([*command, "--endpoint", url], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = predictions.read(output)
    assert len(rows) == 80 and not any(row.error for row in rows) and output.read_bytes().startswith(before[:2000])
