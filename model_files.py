"""Which files `--model` means: the default model, a folder, or a model of the Hugging Face Hub, found or fetched.

    name, folder, weights = locate("llama")      # ("meta-llama/Llama-3.1-8B-Instruct", its snapshot, name@commit)

`weights` identifies what was loaded, for fingerprints. Weights are safetensors only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from command_line import one_line
from embedded_model import CONVERSION, DEFAULT_NAME, GGUF_SHA256, cache_dir, embedded_model, sha256
from files import read_json, write_text

DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the default model is called there
DEFAULT_WEIGHTS = f"{GGUF_SHA256[:16]}/{CONVERSION}"  # its identity in fingerprints
ALIASES = {"llama": "meta-llama/Llama-3.1-8B-Instruct"}


def hub_id(model: str) -> str | None:
    """The Hub's id of what `--model` names, None for the default model and for a folder."""
    if model == "default" or Path(model).expanduser().exists() or Path(model).is_absolute() or model[:1] in (".", "~"):
        return None
    return ALIASES.get(model, model)


def is_hub_name(name: str) -> bool:
    """Whether a name has the form owner/name of the Hub's models."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def locate(model: str) -> tuple[str, Path, str]:
    """(name, folder, identity of the weights) of what `--model` says, fetched if it must be."""
    if model == "default":
        return DEFAULT_NAME, embedded_model(), DEFAULT_WEIGHTS
    if name := hub_id(model):
        path = download(name)
        check_weights(path)
        return name, path, f"{name}@{path.name}"  # a snapshot's folder is named by its commit
    path = Path(model).expanduser()
    if not path.exists():
        raise ValueError(f"no such model folder: {model}")
    check_weights(path)
    return path.resolve().name, path, folder_hash(path)


def check_weights(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is a file; a model is a folder with config.json and .safetensors weights")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a model folder: it has no config.json")
    if not list(path.glob("*.safetensors")):
        raise ValueError(f"{path} has no .safetensors weights (others, as pickled .bin files, are not loaded)")


def download(model: str) -> Path:
    """Fetch a model of the Hub, or find it in the Hub's cache; every failure is one line that says what to do."""
    from huggingface_hub import errors, get_token, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        unwanted = ["original/*", "consolidated*"]  # the same weights again, in their makers' own format
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=unwanted))
    except errors.GatedRepoError:
        login = "" if get_token() else "; then log in: `hf auth login`, or set HF_TOKEN"
        raise ValueError(f"{model} is gated: ask for access on its page on the Hub{login}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"no folder {model} here and no such model on the Hub; check the name, or log in if it is private "
            "(`hf auth login`, or set HF_TOKEN)"
        ) from None
    except errors.HFValidationError:
        raise ValueError(f"{model!r} is neither a folder nor a model id as owner/name") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        raise ValueError(
            f"the Hub cannot be reached and {model} is not in its local cache; go online once, or pass a folder"
        ) from None
    except (errors.HTTPError, errors.EntryNotFoundError) as error:
        raise ValueError(f"the Hub did not give {model}: {one_line(error)}") from None


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what the libraries raise over a broken or foreign folder into one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    broken = (ValueError, OSError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError)
    try:
        yield
    except (*broken, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"cannot load {what}: {one_line(error)}") from error


def folder_hash(folder: Path) -> str:
    """Sixteen hex digits over all that decides a local model's or adapter's output: weights, configuration, tokenizer.

    Large files are hashed once and remembered in the cache folder by path, size and time.
    """
    patterns = ["*.safetensors", "config.json", "adapter_config.json", "*.jinja", "*.model"]
    patterns += ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    memory = cache_dir() / "hashes.json"
    try:
        known = dict(read_json(memory))
    except (OSError, ValueError, TypeError):  # absent or broken: the hashes are only remembered there
        known = {}
    digest, before = hashlib.sha256(), len(known)
    for path in files:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        value = known.get(key)
        if not (isinstance(value, str) and len(value) == 64):
            value = sha256(path)
        if stat.st_size > 64 << 20:
            known[key] = value
        digest.update(f"{path.name} {value}\n".encode())
    if len(known) > before:
        with contextlib.suppress(OSError):  # a read-only cache costs time, not correctness
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_text(memory, json.dumps(known))
    return digest.hexdigest()[:16]
