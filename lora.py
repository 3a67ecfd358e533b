"""LoRA adapters: which one to use, loading, making and saving one, its dropout, and gradients for training it.

adapter = choose_adapter("auto", weights, task.settings())     # the shipped folder, if it fits model and task
network = with_adapter(network, adapter)
add_adapter(llama, rank=4, alpha=8, dropout=0.05)              # a fresh one, which changes nothing yet
with dropping_out(llama, seed): ...                            # one draw of the adapter's dropout
add_gradients(llama, rows, answers, loss)                      # the common beginning of the rows runs once
save_adapter(llama, folder)                                    # as peft, vLLM and LMI load it
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from files import read_json, whole_file, write_text
from model_files import DEFAULT_HUB_ID, DEFAULT_WEIGHTS, is_hub_name, loading
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
        trained = _read_object(config)
    except ValueError as error:
        raise ValueError(f"{error}; remove the folder or use --adapter none") from None
    if (trained.get("base_weights"), trained.get("task")) != (weights, task):
        return None
    check_adapter(ADAPTER_FOLDER)
    print(f"using the fine-tuned adapter {ADAPTER_FOLDER.name}/ (--adapter none: the base model)", file=sys.stderr)
    return ADAPTER_FOLDER


def check_adapter(path: Path) -> None:
    """ValueError unless the folder holds a LoRA adapter as safetensors."""
    if not path.is_dir():
        raise ValueError(f"no such adapter folder: {path}")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a LoRA adapter: it has no {name}")
    kind = _read_object(path / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} is not a LoRA adapter: its peft_type is {kind}")


def _read_object(path: Path) -> dict:
    """What a JSON file says; ValueError in one line if it is broken."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def check_base(adapter: Path, weights: str) -> None:
    """Refuse an adapter that says it was trained from other weights; of the same shape, it would load and be wrong.

    Ours say so by the weights' identity; of others adapter_config.json has the name of a model or of a folder.
    """
    try:
        trained = str(_read_object(adapter / "training_config.json").get("base_weights", ""))
    except (OSError, ValueError):
        _check_base_name(adapter, weights)
        return
    (trained_name, trained_at, _), (name, at, _) = trained.partition("@"), weights.partition("@")
    # A model of the Hub is owner/name@commit: another commit of the same model may pass, a folder's hash may not.
    if trained and trained_at == at and trained_name != name:
        raise ValueError(f"the adapter in {adapter} was trained from other weights ({trained}) than these ({weights})")


def _check_base_name(adapter: Path, weights: str) -> None:
    """The same by the name in peft's own file: two models of the Hub must be one; of a folder there is only a note."""
    trained = str(_read_object(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    name = DEFAULT_HUB_ID if weights == DEFAULT_WEIGHTS else weights.partition("@")[0]
    if is_hub_name(trained) and is_hub_name(name):
        if trained.casefold() != name.casefold():
            raise ValueError(f"the adapter in {adapter} was trained from {trained}, not from {name}")
    elif trained and trained.casefold() not in (name.casefold(), name.rpartition("/")[2].casefold()):
        print(
            f"note: the adapter in {adapter} says it was trained from {trained}; see that it is this model",
            file=sys.stderr,
        )


def with_adapter(network: object, path: Path) -> object:
    """The network with the adapter's layers in it; ValueError when they are not this network's."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with loading(f"the adapter in {path} (is it for another base model?)"):
        with warnings.catch_warnings():  # of a name that transformers will change
            warnings.simplefilter("ignore", FutureWarning)
            adapted = PeftModel.from_pretrained(network, path)
        with safe_open(path / "adapter_model.safetensors", "np") as file:
            if any(".lora_embedding_" in key or ".embed_tokens." in key for key in file.keys()):  # noqa: SIM118
                raise ValueError("it adapts the token embeddings, which is not supported here")
            # Without this peft would only warn and go on; its own look at the base's embeddings would ask the Hub.
            if set(file.keys()) != set(get_peft_model_state_dict(adapted, save_embedding_layers=False)):
                raise ValueError("its layers are not this model's")
    return adapted


def add_adapter(
    llama: Llama, rank: int, alpha: float, dropout: float, seed: int = 0, gradient_checkpointing: bool = False
) -> None:
    """Put a fresh adapter, which changes nothing yet, on every linear layer but the vocabulary head."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(seed)
    if llama.identity["precision"] in ("4bit", "8bit"):
        llama.model = prepare_model_for_kbit_training(llama.model, use_gradient_checkpointing=False)
    if gradient_checkpointing:
        llama.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    config = LoraConfig(**settings, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # of a name that transformers will change, and of GPT-2's transposed layers
        warnings.simplefilter("ignore")
        try:
            llama.model = get_peft_model(llama.model, config).eval()  # in float32, whatever the model's weights are
        except ValueError as error:  # Mamba's layers, or dropout on experts
            raise ValueError(f"peft cannot adapt {llama.name} with --dropout {dropout}: {error}") from None
    llama.model.peft_config["default"].base_model_name_or_path = llama.name  # not the folder on this machine


def save_adapter(llama: Llama, folder: Path) -> None:
    """Write the adapter as peft does, without its model card, so that a reader never sees half a file."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = llama.model.peft_config["default"].to_dict() | {"inference_mode": True}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    write_text(folder / "adapter_config.json", json.dumps(config, indent=1, sort_keys=True) + "\n")
    tensors = get_peft_model_state_dict(llama.model, save_embedding_layers=False)
    tensors = {name: value.detach().cpu().contiguous() for name, value in sorted(tensors.items())}
    with whole_file(folder / "adapter_model.safetensors") as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})
        scratch.chmod(0o644)  # safetensors writes for its owner alone, and a server is often somebody else


def load_weights(llama: Llama, folder: Path) -> None:
    """Put the weights that `save_adapter` wrote into the model's adapter, in the place of those it has now."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(llama.model, load_file(folder / "adapter_model.safetensors"))


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
            probability = getattr(dropout, "p", 0.0)  # an adapter saved without dropout has an Identity here
            if probability > 0:
                kept = torch.rand(layer.in_features, generator=draw) >= probability
                mask = (kept / (1 - probability)).to(llama.model.device)
                hooks.append(dropout.register_forward_hook(_input_times(mask)))
    llama.forget_prefix()
    try:
        yield
    finally:
        llama.forget_prefix()
        for hook in hooks:
            hook.remove()


def _input_times(mask: object) -> Callable:
    """A hook that makes a module's output its input, element by element times the mask."""
    return lambda module, given, output: given[0] * mask


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
    if share_prefix and llama.packs is None:  # tried without dropout, or two passes would differ
        with llama.evaluating():
            llama.try_packing(rows)
    llama.forget_prefix()  # it was computed with other weights, and without a graph
    with out_of_memory_advice("a smaller --micro-batch-size, --gradient-checkpointing or --load-in-4bit"):
        prefix, cache = llama.shared_prefix(rows) if share_prefix else ((), None)
        llama.forget_prefix()
        copies = _copies_of(cache) if prefix else {}
        tails = [list(row[len(prefix) :]) for row in rows]
        # A layer that is checkpointed runs again on the way back, so the attention of packed rows stays until then.
        with llama.packing() if llama.packs else contextlib.nullcontext():
            for batch in llama.run_together(tails, answers, batch_size):
                copied = map_cache(cache, lambda tensor: copies[id(tensor)].to(tensor.dtype)) if prefix else None
                loss(llama.answers_after([tails[i] for i in batch], copied, answers), batch).backward()
        if prefix:
            _back_through(cache, copies)


def _copies_of(cache: object) -> dict[int, object]:
    """id of each of the cache's tensors -> a copy without its graph, in which gradients gather.

    In float32, or sums over many batches would lose digits where the model runs in 16 bits.
    """
    return {id(tensor): tensor.detach().float().requires_grad_() for tensor in _tensors_of(cache)}


def _back_through(cache: object, copies: dict[int, object]) -> None:
    """Send the gradients that have gathered on the copies back through the pass that made the cache."""
    import torch

    reached = [tensor for tensor in _tensors_of(cache) if tensor.requires_grad]  # by trainable weights
    if reached:
        torch.autograd.backward(reached, [copies[id(tensor)].grad.to(tensor.dtype) for tensor in reached])


def _tensors_of(cache: object) -> list[object]:
    """The keys and values of every layer, in order."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
