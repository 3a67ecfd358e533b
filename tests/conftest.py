"""What tests share: the embedded model and tiny random ones that read with its tokenizer, tables, scripts that run.

Whatever is computed, here and in the processes that tests start, is computed on one thread: tiny models are faster so,
and sums come out the same everywhere.
"""

import csv
import functools
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports numpy or torch

import command_line

signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background, where a shell has it ignored

ROOT = Path(__file__).parent.parent
WORDS = ("a", "film", "that", "is", "not", "good", "bad", "long", "funny", "dull", "and", "never", "quite", "warm")


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from embedded_model import embedded_model

    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="session")
def embedded():
    """The real default model, in float32 wherever the tests run."""
    from llama import load_llama

    return load_llama(device="cpu")


def tiny(kind, tokenizer, **settings):
    """A random model of two small layers in float32; weights large enough that its distribution is far from uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llama import Llama

    sizes = {
        "llama": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
        "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "intermediate_size": 64},
    }
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2, **(sizes[kind] | settings)
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    identity = {"weights": f"tiny {kind}", "precision": "float32"}
    return Llama(model.requires_grad_(False), tokenizer, f"tiny-{kind}", Path("nowhere"), identity)


@pytest.fixture(scope="session")
def tiny_llama(tokenizer):
    return tiny("llama", tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, tmp_path_factory):
    """A tiny Llama saved as a model folder, for the command lines."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama", tokenizer).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def counted():
    """A tiny Llama that knows it can share, with what went through it: tokens read, and shapes of the head's output."""
    from small_models import SIZES, TABLES, random_model

    llama = random_model("llama", "llama", SIZES)
    llama.answer_log_probs(TABLES["a shared beginning"], [[7]])
    read, heads = [], []
    llama.model.get_input_embeddings().register_forward_hook(lambda module, ids, output: read.append(ids[0].numel()))
    llama.model.lm_head.register_forward_hook(lambda module, states, output: heads.append(tuple(output.shape)))
    return llama, read, heads


# Tables


def texts(n, seed=0):
    """n labelled rows of one to twenty words."""
    draw = random.Random(seed)
    return [
        (f"r{i}", " ".join(draw.choices(WORDS, k=draw.randint(1, 20))), draw.choice(["positive", "negative"]))
        for i in range(n)
    ]


def write_csv(path, rows, header=("id", "text", "label")):
    """Write rows, tuples or examples; -> the path."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *(row if isinstance(row, tuple) else astuple(row) for row in rows)])
    return path


def records(path):
    """The JSON objects of a file, one a line."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def stamp(path):
    """What changes whenever a file is written."""
    return Path(path).read_bytes(), Path(path).stat().st_mtime_ns, Path(path).stat().st_ino


# Scripts


@pytest.fixture(scope="module")
def one_tokenizer():
    """The tokenizer, and its vocabulary with it, is read once."""
    from transformers import AutoTokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", functools.cache(AutoTokenizer.from_pretrained))
        yield


def exit_code_of(main, *arguments):
    """Run a script's main as its guard does."""
    try:
        command_line.run(lambda: main([*map(str, arguments)]))
    except SystemExit as stopped:
        return stopped.code or 0
    return 0


@pytest.fixture
def outcome(capsys):
    """Run a script's main in this process: `outcome(main, "text")` -> exit code, stdout, stderr."""

    def run_main(main, *arguments):
        capsys.readouterr()
        return exit_code_of(main, *arguments), *capsys.readouterr()

    return run_main


def assert_one_error(result, *words):
    """Whether an outcome is exit code 2 and one line with these words."""
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: "), result
    assert all(word in err for word in words), err


@pytest.fixture
def no_credentials(monkeypatch):
    """Neither credentials nor a region of AWS."""
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def aws_stand():
    from fake_sagemaker import Fake

    with Fake() as fake:
        yield fake


@pytest.fixture
def fake(aws_stand, monkeypatch):
    """A stand-in for Amazon Web Services with nothing in it, for commands that run in this process."""
    aws_stand.clear()
    for name, value in aws_stand.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("boto3.Session", aws_stand.session)
    return aws_stand


@pytest.fixture
def run():
    """Run one of our scripts as a user does: `run("logprobs_confidence.py", "text")` -> CompletedProcess."""

    def run_script(*arguments, **options):
        options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300} | options
        options["env"] = os.environ | options.pop("env", {})
        return subprocess.run([sys.executable, *map(str, arguments)], **options)

    return run_script
