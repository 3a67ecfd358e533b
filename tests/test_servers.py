"""--endpoint against a real server: llama.cpp's, with the embedded model's own GGUF file, on 127.0.0.1.

With these weights in 4 bits it quantizes the activations too, which moves probabilities by some hundredths; given the
same weights in 32 bits it agrees to a thousandth. `make test-servers` installs the server and runs this file.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
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


@contextmanager
def running(log: Path, gguf: Path):
    """A server process; yields the URL of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "tests" / "llama_cpp_server.py"), str(gguf), str(port), "4"]
    url = f"http://127.0.0.1:{port}/v1"
    with open(log, "ab") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            wait_for(f"{url}/models", process)
            yield url
        finally:
            process.kill()


def kill_server(url: str) -> None:
    """The process that listens there."""
    port = int(url.rpartition(":")[2].partition("/")[0])
    (owner,) = {c.pid for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN"}
    psutil.Process(owner).kill()


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, "the server did not start"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the server did not answer")


@pytest.fixture(scope="module")
def gguf():
    """The embedded model's own GGUF file."""
    embedded_model.embedded_model()  # fetches it where it is not there yet
    return embedded_model.cache_dir() / embedded_model.GGUF


@pytest.fixture(scope="module")
def url(tmp_path_factory, gguf):
    with running(tmp_path_factory.mktemp("server") / "log", gguf) as url:
        yield url


def sample_examples():
    return list(read_examples(str(ROOT / "data" / "sample.csv")))


def differences(run, url: str, llama, folder: Path) -> np.ndarray:
    """P(positive) and label mass, by the server less by the model loaded here, absolute [texts, 2]."""
    output = folder / "remote.jsonl"
    listed = ("--timeout", 300, "--top-tokens", 200)  # with 20, what is not listed could change more predictions
    done = run("logprobs_confidence.py", "--endpoint", url, "--input", "data/sample.csv", "--output", output, *listed)
    assert done.returncode == 0, done.stderr
    remote, local = predictions.read(output), label_scorer(llama, TASK).score_together(sample_examples())
    assert [row.id for row in remote] == [row.id for row in local]
    # Two labels nearer than what is not listed make no prediction; which texts these are depends on 4-bit arithmetic.
    near = [row.error for row in remote if row.error]
    assert len(near) <= 3 and all("not listed could be either's" in error for error in near), near
    local, remote = zip(*[pair for pair in zip(local, remote, strict=True) if not pair[1].error], strict=True)
    listed = [listed_share(row.probabilities, row.label_mass, row.extras["label_mass_high"]) for row in remote]
    mass = np.array([[row.label_mass for row in rows] for rows in (remote, local)])
    # The true mass lies between what is listed and that with the rest, but for the arithmetic; the confidence is the
    # least that the whole distribution can give.
    high = np.array([row.extras["label_mass_high"] for row in remote])
    assert (mass[0] - 0.05 < mass[1]).all() and (mass[1] < high + 0.05).all()
    for ours, theirs in zip(local, remote, strict=True):
        assert theirs.confidence < ours.probabilities[theirs.prediction] + 0.15
    shares = np.array([listed, [row.probabilities["positive"] for row in local]])
    return np.abs(np.stack([shares[0] - shares[1], mass[0] - mass[1]], axis=1))


def listed_share(probabilities: dict, label_mass: float, label_mass_high: float) -> float:
    """P(positive) among what is listed of the two labels, without what counts against the prediction."""
    prediction = max(probabilities, key=probabilities.get)
    share = probabilities[prediction] * label_mass_high / label_mass
    return share if prediction == "positive" else 1 - share


def test_method_1_through_the_server_agrees_with_the_model_loaded_here(run, url, embedded, tmp_path):
    apart = differences(run, url, embedded, tmp_path)
    assert (apart > 0).any() and (apart.mean(axis=0) < 0.06).all() and apart.max() < 0.15


def test_what_differs_is_the_servers_four_bit_arithmetic(run, gguf, embedded, tmp_path):
    with running(tmp_path / "log", in_32_bits(gguf, tmp_path / "float32.gguf")) as url:
        apart = differences(run, url, embedded, tmp_path)
    assert (apart.mean(axis=0) < 0.003).all() and apart[:, 0].max() < 0.01


def in_32_bits(gguf: Path, path: Path, spoiled: bool = False) -> Path:
    """The embedded model's GGUF file with its weights dequantized; `spoiled`: half of its layers pay no attention."""
    source = GGUFReader(gguf)
    writer = GGUFWriter(path, source.fields["general.architecture"].contents())
    for name, value in source.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, *inner = value.types
            writer.add_key_value(name, value.contents(), kind, inner[-1] if kind == GGUFValueType.ARRAY else None)
    writer.add_file_type(0)
    for tensor in source.tensors:
        weights = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32, order="C")
        if spoiled and re.fullmatch(r"blk\.[12]\d\.attn_output\.weight", tensor.name):
            weights[:] = 0
        writer.add_tensor(tensor.name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_server_reads_the_very_tokens_that_the_loaded_model_reads(url, embedded):
    text = sample_examples()[0].text
    body = json.dumps({"prompt": TASK.prompt(text), "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        counted = json.load(reply)["usage"]["prompt_tokens"]
    assert counted == len(embedded.encode(embedded.task_prompt(TASK), text))


def test_a_chat_task_agrees_as_well(url, embedded):
    task, apart = TASKS["sentiment-yes-no"], []
    local = label_scorer(embedded, task)
    with connect(url, top_tokens=1000) as connected:  # a tenth of this model's answers is not among the first 20
        remote = remote_label_scorer(connected, task)
        for example in sample_examples()[:8]:
            ours, theirs = (scorer.explain(example.text) for scorer in (local, remote))
            listed = listed_share(theirs["probabilities"], theirs["label_mass"], theirs["label_mass_high"])
            apart.append(abs(ours["probabilities"]["positive"] - listed))
    assert np.mean(apart) < 0.06 and max(apart) < 0.15


def test_sampled_answers_vary_and_agree_as_often_as_the_first_token_says(url, embedded):
    scorer = label_scorer(embedded, TASK)
    votes, expected = 0, 0.0
    with connect(url) as connected:
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


# Several servers of one model


def test_a_run_over_two_servers_of_which_one_is_killed_loses_nothing(gguf, url, tmp_path):
    name = ["--served-as", "smollm2-q4"]
    where = {"CALIBRATED_CONFIDENCE_CACHE": str(linked_cache(tmp_path)), "PYTHONPATH": str(ROOT)}
    table = ["--input", "data:test", "--limit", "150", "--output", str(tmp_path / "two.jsonl"), *name]
    with running(tmp_path / "log", gguf) as other:
        command = [sys.executable, "logprobs_confidence.py", *table, "--endpoint", url, "--endpoint", other]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | where)
        wait_for_rows(tmp_path / "two.jsonl", 30, process)
        kill_server(other)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert err.count(f"note: no server answers at {other} any more; it is left out") == 1
    rows = predictions.read(tmp_path / "two.jsonl")
    assert len(rows) == 150 and not any(row.extras.get("retry") for row in rows)
    # The same from one of them alone, to the arithmetic of batches of another size.
    with connect(url, served_as="smollm2-q4") as connected:
        scorer = remote_label_scorer(connected, TASK)
        assert scorer.fingerprint == rows[0].fingerprint
        alone = list(scorer.score(iter(list(read_examples("data:test"))[:60]), lambda n: None, None))
    both = [(one, two) for one, two in zip(alone, rows, strict=False) if one.error is None and two.error is None]
    apart = [abs(one.probabilities["positive"] - two.probabilities["positive"]) for one, two in both]
    assert len(both) > 40 and np.mean(apart) < 0.06 and max(apart) < 0.15


def linked_cache(folder: Path) -> Path:
    """A cache of the test's own that has the embedded model."""
    cache = folder / "cache"
    cache.mkdir()
    for path in embedded_model.cache_dir().iterdir():
        if path.name != "served":
            (cache / path.name).symlink_to(path)
    return cache


def wait_for_rows(path: Path, count: int, process: subprocess.Popen) -> None:
    for _ in range(4000):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    pytest.fail("no rows came")


def test_another_model_under_the_same_name_is_refused(gguf, url, tmp_path, monkeypatch):
    monkeypatch.setattr("served_identity.cache_dir", lambda: tmp_path)
    with connect(url, served_as="smollm2") as connected:
        remote_label_scorer(connected, TASK)
    # The same weights in 32 bits are the same model; with less attention it is another.
    for spoiled in (False, True):
        weights = in_32_bits(gguf, tmp_path / "float32.gguf", spoiled)
        with running(tmp_path / "log", weights) as there, connect(there, served_as="smollm2") as connected:
            if not spoiled:
                remote_label_scorer(connected, TASK)
                continue
            with pytest.raises(ValueError, match="another model than smollm2 was"):
                remote_label_scorer(connected, TASK)


def test_what_the_server_used_is_counted(run, url, tmp_path):
    done = run(
        "logprobs_confidence.py",
        "--input",
        "data/sample.csv",
        "--limit",
        6,
        "--output",
        tmp_path / "p.jsonl",
        "--endpoint",
        url,
    )
    assert done.returncode == 0 and re.search(r"\n  7 requests, [\d,]+ tokens in, 7 out\n", done.stdout), done
