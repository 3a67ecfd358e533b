"""Scoring scripts that are killed and interrupted again and again end with the bytes of an unbroken run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORDS = ["a", "film", "that", "is", "not", "good", "bad", "long", "funny", "dull", "and", "never", "quite", "warm"]
SCRIPTS = {
    "Method 1": ["logprobs_confidence.py"],
    "Method 2": ["consistency_confidence.py", "--samples", "4", "--max-tokens", "3"],
    "dropout": ["mc_dropout_confidence.py", "--passes", "2", "--adapter", "ADAPTER"],
    "both": ["combined_confidence.py", "--samples", "4", "--max-tokens", "3"],
}
KILLS, INTERRUPTS = 8, 4


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("stops") / "t.csv"
    draw = random.Random(0)
    rows = [f"r{n},{' '.join(draw.choices(WORDS, k=draw.randint(1, 20)))},positive" for n in range(600)]
    path.write_text("id,text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """A fresh adapter with dropout for the tiny model."""
    from llama import load_llama
    from lora import add_adapter, save_adapter

    folder = tmp_path_factory.mktemp("adapter")
    llama = load_llama(str(tiny_folder), device="cpu")
    add_adapter(llama, rank=2, alpha=4.0, dropout=0.3)
    save_adapter(llama, folder)
    return folder


def start(script, table, output, model):
    command = [sys.executable, *script, "--model", str(model), "--input", str(table), "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished_rows(folder):
    """How many rows lie in the output and beside it, in whole lines."""
    return sum(path.read_bytes().count(b"\n") for path in folder.iterdir())


@pytest.mark.stops
@pytest.mark.parametrize("name", SCRIPTS)
def test_kills_and_interrupts_lose_no_finished_row(name, table, tiny_folder, adapter, tmp_path):
    script = [str(adapter) if part == "ADAPTER" else part for part in SCRIPTS[name]]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    with start(script, table, whole / "p.jsonl", tiny_folder) as process:
        begun = time.monotonic()
        _, err = process.communicate(timeout=600)
        seconds = time.monotonic() - begun
    assert process.returncode == 0, err
    draw, before = random.Random(1), 0
    signals = [signal.SIGKILL] * KILLS + [signal.SIGINT] * INTERRUPTS
    draw.shuffle(signals)
    for how in signals:
        with start(script, table, stopped / "p.jsonl", tiny_folder) as process:
            time.sleep(draw.uniform(0.3, 1.0) * seconds)
            process.send_signal(how)
            _, err = process.communicate(timeout=120)
        assert process.returncode in (0, -how, 130) and "Traceback" not in err, err
        after = finished_rows(stopped)
        assert after >= before
        before = after
    with start(script, table, stopped / "p.jsonl", tiny_folder) as process:
        _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
