"""Shared fixtures: the embedded model, and tiny random ones that read with its tokenizer, built in memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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


@pytest.fixture
def run():
    """Run one of our scripts as a user does: `run("logprobs_confidence.py", "text")` -> CompletedProcess."""

    def run_script(*arguments, **options):
        options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300} | options
        options["env"] = os.environ | options.pop("env", {})
        return subprocess.run([sys.executable, *map(str, arguments)], **options)

    return run_script
