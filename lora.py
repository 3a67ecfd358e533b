"""LoRA adapters: which one to use, loading it, its dropout, and gradients for training it.

adapter = choose_adapter("auto", weights, task.settings())     # the shipped folder, if it fits model and task
network = with_adapter(network, adapter)
with dropping_out(llama, seed): ...                            # one draw of the adapter's dropout
add_gradients(llama, rows, answers, loss)                      # the common beginning of the rows runs once
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from files import read_json
from model_files import loading
from tensors import map_cache, out_of_memory_advice

if TYPE_CHECKING:
    from llama import Llama

ADAPTER_FOLDER = Path(__file__).parent / "fine_tuned_sentiment_model"
HEAD = "confidence_head.json"  # beside an adapter, if it was trained with one


def choose_adapter(adapter: str | None, weights: str, task: dict | None) -> Path | None:
    """The folder that `--adapter` means for these weights and a task's settings; None for no adapter."""
    if adapter in (None, "none"):
        return None
    if adapter != "auto":
        return Path(adapter)
    config = ADAPTER_FOLDER / "training_config.json"
    if task is None or not config.is_file():
        return None
    try:
        trained = dict(read_json(config))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config} is broken ({error}); remove the folder or use --adapter none") from None
    if (trained.get("base_weights"), trained.get("task")) != (weights, task):
        return None
    check_adapter(ADAPTER_FOLDER)
    print(f"using the fine-tuned adapter {ADAPTER_FOLDER.name}/ (--adapter none: the base model)", file=sys.stderr)
    return ADAPTER_FOLDER


def check_adapter(path: Path) -> None:
    """ValueError unless the folder holds a LoRA adapter as safetensors."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a LoRA adapter: it has no {name}")
    try:
        kind = dict(read_json(path / "adapter_config.json")).get("peft_type")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / 'adapter_config.json'} is broken: {error}") from None
    if kind != "LORA":
        raise ValueError(f"{path} is not a LoRA adapter: its peft_type is {kind}")


def check_base(adapter: Path, weights: str) -> None:
    """Refuse an adapter that says it was trained from other weights; of the same shape, it would load and be wrong."""
    try:
        trained = str(dict(read_json(adapter / "training_config.json")).get("base_weights", ""))
    except (OSError, ValueError, TypeError):
        return  # not one of ours: peft's own files do not say
    (trained_name, trained_at, _), (name, at, _) = trained.partition("@"), weights.partition("@")
    # A model of the Hub is owner/name@commit: another commit of the same model may pass, a folder's hash may not.
    if trained and trained_at == at and trained_name != name:
        raise ValueError(f"the adapter in {adapter} was trained from other weights ({trained}) than these ({weights})")


def with_adapter(network: object, path: Path) -> object:
    """The network with the adapter's layers in it; ValueError when they are not this network's."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with loading(f"the adapter in {path} (is it for another base model?)"):
        with warnings.catch_warnings():  # of a name that transformers will change
            warnings.simplefilter("ignore", FutureWarning)
            tuned = PeftModel.from_pretrained(network, path)
        with safe_open(path / "adapter_model.safetensors", "np") as file:
            # Without this peft would only warn and go on; its own look at the base's embeddings would ask the Hub.
            if set(file.keys()) != set(get_peft_model_state_dict(tuned, save_embedding_layers=False)):
                raise ValueError("its layers are not this model's")
    return tuned


@contextlib.contextmanager
def dropping_out(llama: Llama, seed: Sequence[int]) -> Iterator[None]:
    """The adapter with one draw of its dropout: an input of a LoRA layer is dropped, or grows by 1 / (1 - p).

    A mask belongs to the layer's weights and not to a token (Gal and Ghahramani, "A theoretically grounded
    application of dropout in recurrent neural networks", 2016): the seed decides all masks, every token of every
    row sees the same, so a prefix can be shared and a row does not depend on its batch. An adapter that was saved
    with p = 0 has nothing to draw. The model's own dropout is as it was: off, unless the model is in train mode.
    """
    import torch

    draw = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
    layers = [m for m in llama.model.modules() if isinstance(getattr(m, "lora_dropout", None), torch.nn.ModuleDict)]
    hooks = []
    for layer in layers:
        for dropout in layer.lora_dropout.values():
            if probability := getattr(dropout, "p", 0.0):  # without one it is an Identity
                kept = torch.rand(layer.in_features, generator=draw) >= probability
                mask = (kept / (1 - probability)).to(llama.model.device)
                hooks.append(dropout.register_forward_hook(lambda _, given, out, mask=mask: given[0] * mask))
    llama.forget_prefix()
    try:
        yield
    finally:
        llama.forget_prefix()
        for hook in hooks:
            hook.remove()


def add_gradients(
    llama: Llama,
    rows: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    loss: Callable[[object, list[int]], object],
    batch_size: int | None = None,
    share_prefix: bool = True,
) -> None:
    """Add to the trainable weights' gradients those of the sum over batches of `loss(log_probs, row_numbers)`.

    `log_probs` is a float32 tensor [batch, answers] as of `answer_log_probs`, of the rows with those numbers. The
    rows' common beginning runs once: every batch leaves its gradient on copies of the cached keys and values, and
    the sum of these goes back through the prefix at the end. By the chain rule that is the gradient of running
    whole rows, in the memory of a batch.
    """
    import torch

    if share_prefix and llama.shares_prefix is None:  # tried without dropout, or two passes would differ
        with llama.evaluating():
            llama.shared_prefix(rows)
    llama.forget_prefix()
    with out_of_memory_advice("a smaller --micro-batch-size, --gradient-checkpointing or --load-in-4bit"):
        prefix, cache = llama.shared_prefix(rows) if share_prefix else ((), None)
        llama.forget_prefix()
        made = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)] if prefix else []
        # Where batches leave their gradient; in float32, or sums lose digits where the model runs in 16 bits.
        leaves = [tensor.detach().float().requires_grad_() for tensor in made]
        continues = share_prefix and llama.shares_prefix is True
        lengths = [len(row) - len(prefix) for row in rows]
        for batch in llama.batches(lengths, batch_size, llama.needs_one_length(answers)):
            if prefix:
                copies = [leaf.to(tensor.dtype) for leaf, tensor in zip(leaves, made, strict=True)]
                cache = _with_tensors(cache, copies)
            tails = [list(rows[i][len(prefix) :]) for i in batch]
            loss(llama.answers_after(tails, cache, answers, continues), batch).backward()
        reached = [(tensor, leaf) for tensor, leaf in zip(made, leaves, strict=True) if tensor.requires_grad]
        if reached:
            gradients = [leaf.grad.to(tensor.dtype) for tensor, leaf in reached]
            torch.autograd.backward([tensor for tensor, _ in reached], gradients)


def _with_tensors(cache: object, tensors: Sequence[object]) -> object:
    """A cache like this one that holds these keys and values: of the first layer, then of the second, ..."""
    place = {}
    for layer, keys, values in zip(cache.layers, tensors[::2], tensors[1::2], strict=True):
        place[id(layer.keys)], place[id(layer.values)] = keys, values
    return map_cache(cache, lambda tensor: place[id(tensor)])
