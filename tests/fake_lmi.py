"""An LMI container (vLLM 0.26) without vLLM: the endpoint's answers come from the model itself, by llama.py on the CPU.

    Fake(serving=LMI())          # components load what S3 holds, and invoke_endpoint answers first-token probabilities

Checks, layouts and refusals are vLLM's, in its words; what it would only ignore is ignored, and kept in `ignored`.
"""

import contextlib
import functools
import json
import os
import re
import tarfile
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import boto3
import numpy as np
from botocore.exceptions import ClientError

from llama import Llama, load_llama

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
COMPLETION = {"prompt", "logprobs"}
CHAT = {"messages", "logprobs", "top_logprobs", "chat_template_kwargs", "max_completion_tokens"}
BOTH = {"model", "max_tokens", "temperature", "logprob_token_ids", "return_tokens_as_token_ids", "add_special_tokens"}
BOTH |= {"seed", "stop", "top_p", "top_k", "min_p", "repetition_penalty"}  # raw log-probabilities know none of these
# They change an answer, so a test that needs one has to teach it to this file.
ABSENT = {"stream", "n", "echo", "inputs", "structured_outputs", "allowed_token_ids", "logit_bias", "prompt_logprobs"}


@dataclass
class Loaded:
    """A component in service; `folder` holds its files as long as it lives."""

    llama: Llama
    options: dict[str, str]
    folder: tempfile.TemporaryDirectory


class RefusalError(Exception):
    """An answer other than 200."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class LMI:
    """The `serving` object of a Fake."""

    def __init__(self):
        self.loaded: dict[str, Loaded] = {}
        self.ignored: list[tuple[str, list[str]]] = []  # (component, fields of a request that vLLM does not know)
        self._lock = threading.Lock()
        self._random = np.random.default_rng(0)

    def load(self, fake, component):
        """Bring a component into service; ValueError gives the reason why it Failed."""
        made = self._adapter(fake, component) if component.base else self._base(fake, component)
        with self._lock:
            self.loaded[component.name] = made

    def unload(self, name):
        with self._lock:
            self.loaded.pop(name, None)

    def invoke(self, fake, name, body):
        """(status, reply) of one request to a component."""
        with self._lock:
            try:
                if name not in self.loaded:
                    raise RefusalError(424, f"LoRA adapter {name} not found in registry")
                return 200, self._answer(self.loaded[name], name, body)
            except RefusalError as refusal:
                return refusal.status, {"code": refusal.status, "error": str(refusal)}

    # Loading

    def _base(self, fake, component):
        model = component.specification.get("ModelName")  # not by DescribeModel: the stand is inside a Describe
        container = fake.models[model].request["PrimaryContainer"] if model else component.specification["Container"]
        environment = container.get("Environment", {})
        options = {key.removeprefix("OPTION_"): v for key, v in environment.items() if key.startswith("OPTION_")}
        release = re.search(r"/djl-inference:.*-lmi(\d+)", container["Image"])
        if not release or int(release[1]) < 13:
            raise ValueError(f"{container['Image']} has no adapter inference components; djl-inference since lmi13 has")
        model_id = environment.get("HF_MODEL_ID")
        if "ModelDataSource" not in container:
            raise ValueError(f"HF_MODEL_ID is {model_id}, and the Hugging Face Hub cannot be reached from here")
        if model_id != "/opt/ml/model":
            raise ValueError(f"HF_MODEL_ID is {model_id}, but ModelDataSource puts the model into /opt/ml/model")
        _check_options(options)
        folder = tempfile.TemporaryDirectory(prefix="lmi-")
        _download(fake, container["ModelDataSource"]["S3DataSource"], Path(folder.name))
        llama = load_llama(folder.name, device="cpu", dtype="float32")
        longest, wanted = llama.context_length, int(options.get("MAX_MODEL_LEN", llama.context_length))
        if wanted > longest:
            derived = f"the derived max_model_len (max_position_embeddings={longest} in model's config.json)"
            raise ValueError(f"User-specified max_model_len ({wanted}) is greater than {derived}.")
        return Loaded(llama, options | {"MAX_MODEL_LEN": wanted, "release": int(release[1])}, folder)

    def _adapter(self, fake, component):
        if component.base not in self.loaded:
            raise ValueError(f"base inference component {component.base} is not loaded")
        base, url = self.loaded[component.base], component.artifact_url
        folder = tempfile.TemporaryDirectory(prefix="lmi-")
        archive = Path(folder.name) / "adapter.tar.gz"
        try:
            _s3(fake._moto_address).download_file(*_split(url), str(archive))
            with tarfile.open(archive, "r:gz") as tar:
                files = {os.path.normpath(member.name): member for member in tar.getmembers() if member.isfile()}
                for name in ("adapter_config.json", "adapter_model.safetensors"):  # vLLM reads no other
                    if name not in files:
                        raise ValueError(f"{component.name}: adapter config missing: no {name} at the root of {url}")
                    (Path(folder.name) / name).write_bytes(tar.extractfile(files[name]).read())
        except (ClientError, tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{component.name}: cannot read {url}: {error}") from None
        _check_adapter(Path(folder.name) / "adapter_config.json", int(base.options.get("MAX_LORA_RANK", 16)))
        llama = load_llama(base.folder.name, folder.name, device="cpu", dtype="float32")
        return Loaded(llama, base.options, folder)

    # Answering

    def _answer(self, loaded, name, body):
        if not isinstance(body, dict) or not {"prompt", "messages"} & body.keys():
            raise RefusalError(424, "Input parsing failed: invalid payload. must contain prompt, inputs, or messages")
        chat = "prompt" not in body
        if absent := sorted(
            field for field in ABSENT & body.keys() if body[field] and (field, body[field]) != ("n", 1)
        ):
            raise RefusalError(501, f"the stand-in for LMI has no {', '.join(absent)}")
        known = BOTH | (CHAT if chat else COMPLETION)
        if loaded.options["release"] < 28:  # a vLLM before 0.26
            known -= {"logprob_token_ids"}
        if ignored := sorted(body.keys() - known - ABSENT):
            self.ignored.append((name, ignored))
        body = {key: value for key, value in body.items() if key in known}
        count, listed = _wanted(body, chat)
        if body.get("model") not in (None, "lmi", name):
            raise RefusalError(404, f"The model `{body['model']}` does not exist.")
        _check_limits(loaded, body, count, listed)
        prompts = [_chat_ids(loaded.llama, body)] if chat else _prompt_ids(loaded.llama, body)
        choices = [self._choice(loaded, body, ids, chat, count, listed) | {"index": i} for i, ids in enumerate(prompts)]
        used = sum(map(len, prompts))
        usage = {"prompt_tokens": used, "completion_tokens": len(choices), "total_tokens": used + len(choices)}
        kind = "chat.completion" if chat else "text_completion"
        return {"id": "lmi-0", "object": kind, "model": body.get("model") or "lmi", "choices": choices, "usage": usage}

    def _choice(self, loaded, body, ids, chat, count, listed):
        llama, longest = loaded.llama, loaded.options["MAX_MODEL_LEN"]
        if not ids:
            raise RefusalError(400, "The decoder prompt cannot be empty")
        if len(ids) + 1 > longest:
            raise RefusalError(
                400,
                f"This model's maximum context length is {longest} tokens. However, you requested 1 output tokens and "
                f"your prompt contains {len(ids)} input tokens, for a total of {len(ids) + 1} tokens.",
            )
        log_probs = llama.next_token_log_probs(ids)
        temperature = body.get("temperature", 1.0)
        noise = self._random.gumbel(size=len(log_probs)) * temperature if temperature else 0.0
        sampled = int(np.argmax(log_probs + noise))
        best = np.argsort(-log_probs, kind="stable")[: count or 0].tolist()
        shown = {i: max(float(log_probs[i]), -9999.0) for i in [sampled, *(listed or best)]}
        text = _decoded(llama, sampled)

        def token(i):
            return f"token_id:{i}" if body.get("return_tokens_as_token_ids") else _decoded(llama, i)

        def entry(i):
            return {"token": token(i), "logprob": shown[i], "bytes": list(token(i).encode())}

        if chat:
            first = list(shown) if listed else list(shown)[:count]
            content = [entry(sampled) | {"bytes": list(text.encode()), "top_logprobs": [entry(i) for i in first]}]
            logprobs = None if count is None else {"content": content}
            answer = {"message": {"role": "assistant", "content": text}}
        else:
            first = {token(i): value for i, value in shown.items()}  # two ids of one text are one entry, as in vLLM
            logprobs = {"tokens": [token(sampled)], "token_logprobs": [shown[sampled]], "top_logprobs": [first]}
            logprobs = None if count is None else logprobs | {"text_offset": [0]}
            answer = {"text": text}
        return answer | {"logprobs": logprobs, "finish_reason": "length"}


def _check_options(options):
    """The engine's own checks of its arguments."""
    loras, rank = int(options.get("MAX_LORAS", 1)), int(options.get("MAX_LORA_RANK", 16))
    if options.get("ENABLE_LORA") != "true":
        raise ValueError("OPTION_ENABLE_LORA is not true, so adapters cannot be loaded")
    if rank not in RANKS:
        raise ValueError(f"max_lora_rank ({rank}) must be one of {RANKS}.")
    if int(options.get("MAX_CPU_LORAS", loras)) < loras:
        raise ValueError(f"max_cpu_loras ({options['MAX_CPU_LORAS']}) must be >= max_loras ({loras})")


def _check_adapter(file, limit):
    """What vLLM checks before it reads an adapter's weights."""
    try:
        config = dict(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(f"adapter_config.json is broken: {error}") from None
    rank = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()])
    wrong = {
        "vLLM only supports modules_to_save being None.": config.get("modules_to_save"),
        "vLLM does not yet support DoRA.": config.get("use_dora"),
        f"LoRA rank {rank} is greater than max_lora_rank {limit}.": rank > limit,
        "Adapter bias is not supported.": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "layer_replication is not supported.": config.get("layer_replication"),
    }
    if reasons := [text for text, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(" ".join(reasons))


def _wanted(body, chat):
    """(how many of the likeliest tokens, ids listed by name) that a request asks for; None without logprobs."""
    asked, listed = body.get("logprobs"), body.get("logprob_token_ids") or []
    number = body.get("top_logprobs", 0) if chat else asked
    count = number if (asked if chat else asked is not None) else None
    for wrong, text in (
        (chat and not isinstance(asked, bool | None), "logprobs: Input should be a valid boolean"),
        (isinstance(number, bool) or not isinstance(number, int | None), "`logprobs` must be an integer."),
        (chat and number and not asked, "when using `top_logprobs`, `logprobs` must be set to true."),
        (listed and count is None, "when using `logprob_token_ids`, `logprobs` must be set."),
        (not _is_ids(listed), "logprob_token_ids: Input should be a valid list of integers"),
    ):
        if wrong:
            raise RefusalError(424, f"Input parsing failed: {text}")
    return count, listed


def _check_limits(loaded, body, count, listed):
    limit, size = int(loaded.options.get("MAX_LOGPROBS", 20)), len(loaded.llama.tokenizer)
    if body.get("max_completion_tokens", body.get("max_tokens")) != 1:
        raise RefusalError(501, "the stand-in for LMI answers one token; max_tokens must be 1")
    if count is not None and (count < 0 or 0 <= limit < count):
        raise RefusalError(400, f"Requested sample logprobs of {count}, which is greater than max allowed: {limit}")
    if len(listed) > 128:
        raise RefusalError(400, f"logprob_token_ids has {len(listed)} ids, which is greater than max allowed: 128")
    if bad := [i for i in listed if not 0 <= i < size]:
        raise RefusalError(400, f"logprob_token_ids: {bad[0]} is out of vocabulary ({size})")


def _prompt_ids(llama, body):
    """One list of ids for each prompt of a completion; a text gets the tokenizer's special tokens, as in vLLM."""
    prompt = body["prompt"]
    prompts = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    special = body.get("add_special_tokens", True)
    rows = [llama.tokenizer(p, add_special_tokens=special).input_ids if isinstance(p, str) else p for p in prompts]
    if not all(map(_is_ids, rows)):
        raise RefusalError(424, "Input parsing failed: prompt: Input should be a valid string or list of ids")
    if bad := [i for row in rows for i in row if not 0 <= i < len(llama.tokenizer)]:
        raise RefusalError(400, f"Token id {bad[0]} is out of vocabulary")
    return rows


def _chat_ids(llama, body):
    options = body.get("chat_template_kwargs") or {}
    try:
        text = llama.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True, **options
        )
    except Exception as error:  # a template may raise anything
        raise RefusalError(400, f"{type(error).__name__}: {error}") from None
    return llama.tokenizer(text, add_special_tokens=body.get("add_special_tokens", False)).input_ids


def _is_ids(value):
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _decoded(llama, token):
    return llama.tokenizer.decode([token])


@functools.cache
def _s3(address):
    """A client past the stand's front, which answers nothing else while the Describe that loads is under way."""
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    return boto3.Session().client("s3", endpoint_url="http://{}:{}".format(*address), **keys)


def _split(uri):
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _download(fake, source, folder):
    """Copy a model's S3 prefix."""
    uri = source["S3Uri"]
    if source["S3DataType"] != "S3Prefix" or source["CompressionType"] != "None" or not uri.endswith("/"):
        raise ValueError(f"the model must be an uncompressed S3Prefix that ends with a slash, not {uri}")
    bucket, prefix = _split(uri)
    s3, keys = _s3(fake._moto_address), []
    with contextlib.suppress(ClientError):  # no such bucket
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ()) if entry["Key"][-1] != "/"]
    if not keys:
        raise ValueError(f"Failed to download model data for container: could not find model data at {uri}")
    for key in keys:
        target = folder / key.removeprefix(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, key, str(target))
