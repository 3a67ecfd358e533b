"""--endpoint against a real server: llama.cpp's, with the embedded model's own GGUF file, on 127.0.0.1.

With these weights in 4 bits it quantizes the activations too, which moves probabilities by some hundredths; given the
same weights in 32 bits it agrees to a thousandth. `make test-servers` compiles the server and runs this file.
"""

import json
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
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize
from scipy.stats import binomtest

import embedded_model
import predictions
from consistency_confidence import Sampling, remote_answer_sampler
from endpoint import connect
from logprobs_confidence import label_scorer, remote_label_scorer
from tables import read_examples
from task import TASKS

pytestmark = pytest.mark.servers
ROOT = Path(__file__).parent.parent
TASK = TASKS["sentiment"]


class Server:
    """A server process that can be stopped and started again on its port."""

    def __init__(self, log: Path, gguf: Path | None = None) -> None:
        embedded_model.embedded_model()  # fetches the GGUF file where it is not there yet
        self.gguf = gguf or embedded_model.cache_dir() / embedded_model.GGUF
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log, self.process = f"http://127.0.0.1:{self.port}/v1", log, None

    def start(self) -> None:
        command = [sys.executable, "-m", "llama_cpp.server", "--model", str(self.gguf)]
        command += ["--logits_all", "true", "--host", "127.0.0.1", "--port", str(self.port)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/models", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        pytest.fail(f"the server did not start: {self.log.read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(log: Path, gguf: Path | None = None):
    server = Server(log, gguf)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server") / "log") as server:
        yield server


def sample_examples():
    return list(read_examples(str(ROOT / "data" / "sample.csv")))


def differences(run, url: str, llama, folder: Path) -> np.ndarray:
    """P(positive) and label mass, by the server less by the model loaded here, absolute [texts, 2]."""
    output = folder / "remote.jsonl"
    done = run("logprobs_confidence.py", "--endpoint", url, "--input", "data/sample.csv", "--output", output)
    assert done.returncode == 0, done.stderr
    remote, local = predictions.read(output), label_scorer(llama, TASK).score_together(sample_examples())
    assert [row.id for row in remote] == [row.id for row in local] and not any(row.error for row in remote)
    both = np.array([[[row.probabilities["positive"], row.label_mass] for row in rows] for rows in (remote, local)])
    # The true mass lies between what is listed and that with the rest, but for the arithmetic.
    high = np.array([row.extras["label_mass_high"] for row in remote])
    assert (both[0, :, 1] - 0.05 < both[1, :, 1]).all() and (both[1, :, 1] < high + 0.05).all()
    return np.abs(both[0] - both[1])


def test_method_1_through_the_server_agrees_with_the_model_loaded_here(run, server, embedded, tmp_path):
    apart = differences(run, server.url, embedded, tmp_path)
    assert (apart > 0).any() and (apart.mean(axis=0) < 0.06).all() and apart.max() < 0.15


def test_what_differs_is_the_servers_four_bit_arithmetic(run, embedded, tmp_path):
    with running(tmp_path / "log", in_32_bits(tmp_path / "float32.gguf")) as server:
        apart = differences(run, server.url, embedded, tmp_path)
    assert (apart.mean(axis=0) < 0.003).all() and apart[:, 0].max() < 0.01


def in_32_bits(path: Path) -> Path:
    """The embedded model's GGUF file with its weights dequantized."""
    source = GGUFReader(embedded_model.cache_dir() / embedded_model.GGUF)
    writer = GGUFWriter(path, source.fields["general.architecture"].contents())
    for name, value in source.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, *inner = value.types
            writer.add_key_value(name, value.contents(), kind, inner[-1] if kind == GGUFValueType.ARRAY else None)
    writer.add_file_type(0)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_server_reads_the_very_tokens_that_the_loaded_model_reads(server, embedded):
    text = sample_examples()[0].text
    body = json.dumps({"prompt": TASK.prompt(text), "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{server.url}/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        counted = json.load(reply)["usage"]["prompt_tokens"]
    assert counted == len(embedded.encode(embedded.task_prompt(TASK), text))


def test_a_chat_task_agrees_as_well(server, embedded):
    task, apart = TASKS["sentiment-yes-no"], []
    local = label_scorer(embedded, task)
    with connect(server.url) as connected:
        remote = remote_label_scorer(connected, task)
        for example in sample_examples()[:8]:
            pair = [scorer.explain(example.text)["probabilities"]["positive"] for scorer in (local, remote)]
            apart.append(abs(pair[0] - pair[1]))
    assert np.mean(apart) < 0.06 and max(apart) < 0.15


def test_sampled_answers_vary_and_agree_as_often_as_the_first_token_says(server, embedded):
    scorer = label_scorer(embedded, TASK)
    votes, expected = 0, 0.0
    with connect(server.url) as connected:
        sampler = remote_answer_sampler(connected, TASK, Sampling(samples=20))
        assert sampler.sent["temperature"] == 1 and sampler.sent["top_k"] == 0 and sampler.sent["top_p"] == 1
        for text in ("Best worst thing ever", "The train leaves at noon", "The acting is superb, the story is dull"):
            row = sampler.explain(text)
            assert row["calls"] == len(row["answers"]) == 20
            assert len({answer["answer"] for answer in row["answers"]}) > 1
            votes += row["votes"]["positive"]
            expected += scorer.explain(text)["probabilities"]["positive"]
    # Greedy answers, or twenty times the same seed, would give 0 or 20 of 20 for each text.
    low, high = binomtest(votes, 60).proportion_ci(0.999, "exact")
    assert low - 0.05 < expected / 3 < high + 0.05


def table(folder: Path, n: int) -> Path:
    """A table long enough that a server can be stopped in the middle of it."""
    path, examples = folder / "table.jsonl", sample_examples()
    rows = [{"id": str(i), "text": f"{examples[i % len(examples)].text} ({i})"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def interrupted(command: list, output: Path, server: Server, rows: int) -> subprocess.Popen:
    """Start a run and stop its server once some rows are written."""
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < rows):
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before the server was stopped"
    server.stop()
    return process


@pytest.mark.parametrize("script", ["logprobs_confidence.py", "consistency_confidence.py"])
def test_a_server_that_is_stopped_and_started_again_costs_no_row(script, tmp_path):
    n = 200 if script.startswith("logprobs") else 40
    source, output = table(tmp_path, n), tmp_path / "p.jsonl"
    with running(tmp_path / "log") as server:
        command = [sys.executable, script, "--endpoint", server.url, "--input", source, "--output", output]
        # Stopped for good: the run ends with one line.
        process = interrupted(command, output, server, n // 8)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.strip().splitlines()[-1].startswith("error: no server answers at")
        assert "repeat the command to continue" in err and "Traceback" not in err
        kept = output.read_bytes()
        assert n // 8 <= kept.count(b"\n") < n and kept.endswith(b"\n")
        # Started again: the same command goes on; stopped for a moment, it waits and goes on by itself.
        server.start()
        process = interrupted(command, output, server, kept.count(b"\n") + n // 8)
        server.start()
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    rows = predictions.read(output)
    assert output.read_bytes().startswith(kept)
    assert [row.id for row in rows] == [str(i) for i in range(n)] and not any(row.error for row in rows)
