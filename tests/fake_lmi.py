"""An LMI container (vLLM 0.26) without vLLM: the endpoint's answers come from the model itself, by llama.py on the CPU.

    Fake(serving=LMI())          # components load what S3 holds, and invoke_endpoint answers first-token probabilities

Checks, layouts and refusals are vLLM's. It answers completions of one token whose prompt is a list of ids.
"""

import io
import json
import tarfile
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama import Llama, load_llama

SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "repeat_penalty", "seed", "stop"}
KNOWN = {"prompt", "max_tokens", "logprobs", "logprob_token_ids", "return_tokens_as_token_ids"} | SAMPLING


@dataclass
class Loaded:
    """A component in service; `folder` holds its files as long as it lives."""

    llama: Llama
    options: dict[str, str]
    folder: tempfile.TemporaryDirectory


class RefusalError(Exception):
    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class LMI:
    """The `serving` object of a Fake."""

    def __init__(self):
        self.loaded, self.lock = {}, threading.Lock()

    def load(self, fake, name, component):
        """Bring a component into service; ValueError gives the reason why it Failed."""
        self.loaded[name] = self.adapter(fake, component) if component.base else self.base(fake, component)

    def base(self, fake, component):
        container = fake.models[component.specification["ModelName"]]["PrimaryContainer"]
        environment = container["Environment"]
        options = {name: value for name, value in environment.items() if name.startswith("OPTION_")}
        if environment["HF_MODEL_ID"] != "/opt/ml/model" or "ModelDataSource" not in container:
            raise ValueError(f"HF_MODEL_ID is {environment['HF_MODEL_ID']}; the Hub cannot be reached from here")
        if options["OPTION_ENABLE_LORA"] != "true":
            raise ValueError("OPTION_ENABLE_LORA is not true, so adapters cannot be loaded")
        folder = tempfile.TemporaryDirectory(prefix="lmi-")
        bucket, _, prefix = container["ModelDataSource"]["S3DataSource"]["S3Uri"][len("s3://") :].partition("/")
        for (place, key), content in fake.objects().items():
            if place == bucket and key.startswith(prefix):
                (Path(folder.name) / key.removeprefix(prefix)).write_bytes(content)
        llama = load_llama(folder.name, device="cpu", dtype="float32")
        if int(options["OPTION_MAX_MODEL_LEN"]) > llama.context_length:
            raise ValueError(f"User-specified max_model_len is greater than the derived {llama.context_length}.")
        return Loaded(llama, options, folder)

    def adapter(self, fake, component):
        base = self.loaded[component.base]
        bucket, _, key = component.specification["Container"]["ArtifactUrl"][len("s3://") :].partition("/")
        folder = tempfile.TemporaryDirectory(prefix="lmi-")
        with tarfile.open(fileobj=io.BytesIO(fake.objects()[bucket, key])) as tar:
            if sorted(tar.getnames()) != ["adapter_config.json", "adapter_model.safetensors"]:
                raise ValueError(f"adapter files must be at the root of {key}")
            tar.extractall(folder.name, filter="data")
        rank = json.loads((Path(folder.name) / "adapter_config.json").read_text())["r"]
        if rank > int(base.options["OPTION_MAX_LORA_RANK"]):
            raise ValueError(f"LoRA rank {rank} is greater than max_lora_rank {base.options['OPTION_MAX_LORA_RANK']}.")
        return Loaded(load_llama(base.folder.name, folder.name, "cpu", "float32"), base.options, folder)

    def invoke(self, name, body):
        """(status, reply) of one request to a component."""
        with self.lock:
            try:
                return 200, {"choices": [answer(self.loaded[name], body)]}
            except RefusalError as refusal:
                return refusal.status, {"code": refusal.status, "error": str(refusal)}


def answer(loaded, body):
    ids, listed, limit = body["prompt"], body.get("logprob_token_ids", []), int(loaded.options["OPTION_MAX_LOGPROBS"])
    if unknown := body.keys() - KNOWN:
        raise RefusalError(501, f"the stand-in for LMI has no {', '.join(unknown)}")
    if body["max_tokens"] != 1 or not isinstance(ids, list) or not body["return_tokens_as_token_ids"]:
        raise RefusalError(501, "the stand-in for LMI answers prompts of ids with one token, as an id")
    if max(body["logprobs"], len(listed)) > limit:
        raise RefusalError(400, f"Requested sample logprobs of {body['logprobs']}, greater than max allowed: {limit}")
    if len(ids) + 1 > int(loaded.options["OPTION_MAX_MODEL_LEN"]):
        raise RefusalError(
            400, f"This model's maximum context length is {loaded.options['OPTION_MAX_MODEL_LEN']} tokens"
        )
    log_probs = loaded.llama.next_token_log_probs(ids)
    best = np.argsort(-log_probs, kind="stable")[: body["logprobs"]].tolist()
    shown = {f"token_id:{i}": max(float(log_probs[i]), -9999.0) for i in [best[0], *(listed or best)]}
    first = next(iter(shown))
    logprobs = {"tokens": [first], "token_logprobs": [shown[first]], "top_logprobs": [shown], "text_offset": [0]}
    text = loaded.llama.tokenizer.decode([best[0]])
    return {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs}
