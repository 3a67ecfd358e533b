"""Is this set-up in order, and does this model do what the methods need? A table; what is not ok says what to do.

    python scripts/doctor.py                                                # the default model, task sentiment
    python scripts/doctor.py --model llama --task sentiment-yes-no
    python scripts/doctor.py --model my-model/ --adapter my-adapter/ --task tickets.toml
    python scripts/doctor.py --task tickets.toml --input labelled.csv       # does the question work on your own rows?
    python scripts/doctor.py --endpoint http://127.0.0.1:8000/v1            # a server in place of a model loaded here
    python scripts/doctor.py --sagemaker                                    # also credentials, role and machine on AWS

A row is ok, a warning (it works, but look at it), failed, or skipped because it needs what is missing above. A model is
fetched if it is not here, as by every script, once memory and disk are seen to suffice. Label mass and direction are
taken on six easy texts, or on the task's own examples, which its prompt shows already: a glance, no accuracy. With
--input 50 labelled rows of your table (--sample N for another number) are drawn at random and scored: the verdict on
them, the label mass, which labels are taken for which, the three worst answers, and how long the whole table takes.
Their texts are shown on this terminal alone. It writes nothing but the models' caches, sends a server some thirty short
requests, and shows no secret.

Exit code: 0, or 1 when something failed.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OLDEST_PYTHON = (3, 11)
INSTALL = f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
if sys.version_info[:2] < OLDEST_PYTHON:  # the commonest failures come before there could be a table
    sys.exit(f"failed: Python {platform.python_version()} is older than 3.11: make demo PYTHON=python3.12")
try:
    import numpy as np

    import aws
    import command_line
    import endpoint
    import llama as models
    import model_files
    import sample_check
    import tables
    import verdict
    from embedded_model import DEFAULT_NAME, cache_dir
    from endpoint import Endpoint
    from llama import Llama
    from logprobs_confidence import LabelScorer, label_scorer, remote_label_scorer
    from prompts import RenderedPrompt
    from sample_check import LabelledSample, ScoredSample
    from scoring import Method
    from task import Task, add_task_argument, label_probabilities, read_task
except ImportError as error:
    sys.exit(f"failed: {error}: {INSTALL}")

EASY = (
    ("I love it. Wonderful, the best I have ever seen!", "positive"),
    ("Terrible. A complete waste of time and money.", "negative"),
    ("Excellent service, friendly people, delicious food.", "positive"),
    ("I hate it. It broke on the first day and nobody helped.", "negative"),
    ("A great film: funny, moving and beautifully acted from the first minute to the last.", "positive"),
    ("Awful food, rude staff, dirty tables; the worst evening we have had in years.", "negative"),
)
UNDECIDED = "I have not made up my mind about it."
DRAWS = 8
EVERYWHERE = "all devices and the memory"  # --device-map auto
SAMPLED = 50  # labelled rows of --input
SHOWN_LABELS = 8  # with their answer words
LEAST_MASS = 0.5
MORE_MASS = "word the template so that a label must follow, add [[examples]], or use other answer words"
AGAIN = "if the model's files are broken, fetch or save them again"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "8bit": 1, "4bit": 0.5}  # of a parameter
BESIDE_WEIGHTS = 1.2  # with caches, activations and the vocabulary's logits
PREPARING = 10**9  # bytes of the embedded model and of what it is made from


@dataclass(frozen=True)
class Finding:
    """What a check saw; `value` is what later checks need of it."""

    status: str
    detail: str
    value: object = True


@dataclass
class Report:
    """The table, printed as it grows."""

    rows: list[tuple[str, str]] = field(default_factory=list)  # status and subject

    def title(self, text: str) -> None:
        print(("\n" if self.rows else "") + command_line.printable(text), flush=True)

    def add(self, subject: str, status: str, detail: str) -> None:
        self.rows.append((status, subject))
        begin = f"  {status:8} {subject:17} "
        detail = command_line.printable(aws.hidden(" ".join(detail.split())))
        width = max(60, min(shutil.get_terminal_size((110, 24)).columns, 120))
        options = {"subsequent_indent": " " * len(begin), "break_long_words": False, "break_on_hyphens": False}
        print(textwrap.fill(begin + detail, width, **options), flush=True)

    def run(self, subject: str, look: Callable[..., Finding], *needs: object, remedy: str = "") -> object:
        """Add the row of look(*needs); returns its value, None if it failed, or was skipped for want of its needs."""
        if any(need is None for need in needs):
            self.add(subject, "skipped", "needs what is missing above")
            return None
        try:
            found = look(*needs)
        except Exception as error:  # of whichever library: a broken set-up is what is looked for here
            unknown = isinstance(error, aws.AwsError) and error.is_not_an_answer
            found = Finding("warning" if unknown else "failed", words(error) + (f"; {remedy}" if remedy else ""), None)
        self.add(subject, found.status, found.detail)
        return None if found.status == "failed" else found.value


def words(error: Exception) -> str:
    """An error in one line; those of our own functions say what to do."""
    if isinstance(error, ImportError):
        return f"{error}; {INSTALL}"
    ours = isinstance(error, ValueError | OSError | MemoryError)
    return ("" if ours else f"{type(error).__name__}: ") + command_line.one_line(error)


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


# This machine


def check_packages() -> Finding:
    """The versions that requirements.txt pins against those that are installed."""
    pins = re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    others = []
    for name, pinned in pins:
        try:
            version = metadata.version(name).partition("+")[0]  # after it stands the build, as +cpu
        except metadata.PackageNotFoundError:
            version = "missing"
        if version != pinned:
            others.append(f"{name} {version}, not {pinned}")
    if not others:
        return Finding("ok", f"all {len(pins)} as requirements.txt pins them")
    is_missing = any(" missing, " in other for other in others)
    return Finding("failed" if is_missing else "warning", f"{'; '.join(others)}; {INSTALL}")


def check_devices(
    device: str, dtype: str, load_in_4bit: bool, load_in_8bit: bool, device_map: str | None = None
) -> Finding:
    """What can compute here, and what will: the value is (device, precision)."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    seen = [f"{cores} CPU core{'s' if cores != 1 else ''}"]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        seen.append(f"cuda:{number} {torch.cuda.get_device_name(number)}, {size(free)} of {size(total)} free")
    if torch.backends.mps.is_available():
        seen.append("Apple's GPU (mps)")
    device = models.choose_device(device)
    precision = "4bit" if load_in_4bit else "8bit" if load_in_8bit else models.choose_dtype(dtype, device)
    device = EVERYWHERE if device_map else device
    seen.append(f"this run: {precision} on {device}")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        seen.append("torch does not see the NVIDIA driver: install a torch that is built for its CUDA")
        return Finding("warning", "; ".join(seen), (device, precision))
    return Finding("ok", "; ".join(seen), (device, precision))


def free_memory(device: str) -> int | None:
    """Bytes that a model on this device can have, None where nobody says; of Apple's the whole memory."""
    if device == EVERYWHERE:
        import torch

        gpus = sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
        memory = free_memory("cpu")
        return None if memory is None else gpus + memory
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    memory, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")  # the second is a container's
    if not memory.is_file():  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", memory.read_text())[1])
    stated = limit.read_text().strip() if limit.is_file() else "max"
    return free if stated == "max" else min(free, int(stated))


# The model's files


def check_login(name: str | None) -> Finding:
    from huggingface_hub import get_token, whoami

    if not get_token():
        need = "gated and private models need it: `hf auth login`, or HF_TOKEN" if name else "this model needs none"
        return Finding("ok", f"not logged in; {need}")
    try:
        return Finding("ok", f"logged in as {whoami()['name']}")
    except Exception as error:  # the Hub refuses the token, or cannot be reached
        return Finding("warning", f"the token in use could not be tried: {words(error)}; `hf auth login`, or HF_TOKEN")


def check_hub(name: str) -> Finding:
    """The model's page, which knows size and access before anything is fetched; the value is (parameters, bytes)."""
    from huggingface_hub import HfApi

    try:
        page = HfApi().model_info(name, files_metadata=True, timeout=10)
    except Exception as error:  # a missing or forbidden one is told apart when its files are fetched
        seen = f"no page of {name} ({words(error)[:120]}); its files are looked for in the local cache"
        return Finding("warning", seen, (0, 0))
    weights = re.compile(r"(?!consolidated)[^/]+\.safetensors")
    stored = sum(file.size or 0 for file in page.siblings or [] if weights.fullmatch(file.rfilename))
    count = page.safetensors.total if page.safetensors else 0
    access = "gated: its licence must be accepted on its page" if page.gated else "not gated"
    return Finding("ok", f"{name}: {count / 1e6:,.0f} million parameters, {size(stored)}, {access}", (count, stored))


def check_disk(name: str | None, stored: int) -> Finding:
    """Whether the cache can be written and has room for what is not in it yet."""
    folder, move = cache_dir(), "CALIBRATED_CONFIDENCE_CACHE"
    if name:
        from huggingface_hub.constants import HF_HUB_CACHE

        folder, move = Path(HF_HUB_CACHE), "HF_HOME"
        blobs = folder / f"models--{name.replace('/', '--')}" / "blobs"
        stored = max(0, stored - sum(path.stat().st_size for path in blobs.glob("*")))
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    seen = f"{folder}: {size(free)} free, {size(stored)} to fetch"
    if not os.access(there, os.W_OK):
        return Finding("failed" if stored else "warning", f"{there} cannot be written; set {move} to another folder")
    if free < stored:
        return Finding("failed", f"{seen}; make room, or set {move} to a folder on another disk")
    return Finding("ok", seen)


def find_files(model: str) -> Finding:
    """The model's files, fetched if they must be; the embedded model is verified, and made anew when it is broken."""
    _, path, _ = model_files.locate(model)
    return Finding("ok", str(path), path)


def check_memory(parameters: int, use: tuple[str, str], path: Path) -> Finding:
    """Whether the weights, in this precision, fit; counted from the files' headers where the Hub has not said it."""
    if not parameters:
        from safetensors import safe_open

        for file in sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors")):
            with safe_open(file, "np") as weights:
                parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    device, precision = use
    need, free = parameters * BYTES[precision], free_memory(device)
    seen = f"{parameters / 1e6:,.1f} million parameters, {size(need)} in {precision}"
    if free is None:
        return Finding("warning", f"{seen}; how much memory is free is not known here")
    seen += f"; {size(free)} free on {device}"
    less = "a smaller --model" + (" or --dtype bfloat16" if precision == "float32" else "")
    if device.startswith("cuda") and "bit" not in precision:
        less += ", --load-in-8bit or --load-in-4bit"
    if need > free:
        return Finding("failed", f"{seen}; close other programs, or use {less}")
    if need * BESIDE_WEIGHTS > free:
        return Finding("warning", f"{seen}, which leaves little to compute with; small batches, or {less}")
    return Finding("ok", seen)


def check_loading(model: str, adapter: str, task: Task, **options: object) -> Finding:
    started = time.monotonic()
    llama = models.load_llama(model, adapter, task=task.settings(), **options)
    seen = f"{llama.name}, {llama.identity['precision']} on {llama.device}"
    seen += f", with the adapter {llama.adapter}" if llama.adapter else ", no adapter"
    seen += f", reads {llama.context_length:,} tokens" if llama.context_length else ""
    return Finding("ok", f"{seen}; {time.monotonic() - started:.1f} s", llama)


# Prompt and answers


def whole_ids(llama: Llama, prompt: str | list[dict[str, str]]) -> list[int]:
    """The ids of a whole prompt as the tokenizer itself makes them."""
    if isinstance(prompt, str):
        return llama.tokenizer(prompt)["input_ids"]
    options = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": True, "return_dict": True}
    return llama.tokenizer.apply_chat_template(prompt, **options)["input_ids"]


def check_bos(llama: Llama, task: Task, prompt: RenderedPrompt) -> Finding:
    """One BOS at most, but for models that begin every turn with it (ChatML): there a longer chat has more."""
    bos, ids = llama.tokenizer.bos_token_id, llama.encode(prompt, UNDECIDED)
    count, name = ids.count(bos), llama.tokenizer.bos_token
    if count < 2:
        return Finding("ok", f"{name}, once" if count else "none before this prompt")
    if task.format == "chat" and ids[:2] != [bos, bos]:
        turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
        if whole_ids(llama, [*task.prompt(UNDECIDED), *turns]).count(bos) > count:
            return Finding("ok", f"{name} begins each of {count} turns, once")
    where = f"chat template in {llama.path}" if task.format == "chat" else "task's template"
    return Finding("failed", f"{name} stands {count} times in the prompt; take all but the first out of the {where}")


def check_ids(llama: Llama, task: Task, prompt: RenderedPrompt) -> Finding:
    """Our ids against the tokenizer's for the whole prompt, after which some put a token that ends it."""
    ids, whole = llama.encode(prompt, UNDECIDED), whole_ids(llama, task.prompt(UNDECIDED))
    if whole[: len(ids)] == ids and set(whole[len(ids) :]) <= set(llama.tokenizer.all_special_ids):
        return Finding("ok", f"{len(ids)}, the same as of the whole prompt at once")
    same = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
    why = f"{len(ids)}, but the whole prompt at once has {len(whole)}; they differ from number {same} on"
    return Finding("failed", f"{why}: the tokenizer's files do not fit together, fetch them again")


def check_control(llama: Llama, prompt: RenderedPrompt) -> Finding:
    """Whether a text that spells a control token is read as characters; of very many tokens some fifty are tried."""
    named = {i: str(token) for i, token in llama.tokenizer.added_tokens_decoder.items() if str(token).strip()}
    named |= dict(zip(llama.tokenizer.all_special_ids, llama.tokenizer.all_special_tokens, strict=True))

    def seen(text: str) -> int:
        return sum(i in named for i in llama.encode(prompt, text))

    tried = sorted(set(named.values()))[:: max(1, len(named) // 50)]
    for token in tried:
        if seen(f"before {token} after") > seen("before after"):
            return Finding("failed", f"a text that spells {token} would be obeyed; take such strings out of the texts")
    return Finding("ok", f"{len(tried)} of {len(named)} tried: in a text they are characters")


def check_answers(llama: Llama, task: Task, _: RenderedPrompt) -> Finding:
    """Each label's own tokens; `label_scorer` refuses a label without one and two that share one."""
    scorer, seen = label_scorer(llama, task), []
    for label in list(task.labels)[:SHOWN_LABELS]:
        spelled = [repr(answer.text) for answer in scorer.answers if answer.label == label]
        seen.append(f"{label}: {', '.join(spelled[:3])}" + (f" and {len(spelled) - 3} more" if spelled[3:] else ""))
    more = f"; and {len(task.labels) - SHOWN_LABELS} more labels" if len(task.labels) > SHOWN_LABELS else ""
    return Finding("ok", "; ".join(seen) + more, scorer)


# What the model says


def easy_texts(task: Task) -> tuple[tuple[tuple[str, str], ...], str]:
    """(text, label) where the label is beyond doubt, and what they are; else those of the task's own examples."""
    if {label for _, label in EASY} == set(task.labels):
        return EASY, "easy texts"
    if not task.examples:
        raise ValueError("no texts to try: the task has no [[examples]]")
    return task.examples, "of the task's own examples"


def check_mass(scorer: Method, sample: LabelledSample | None = None) -> Finding:
    """How much of the distribution names a label at all; the value is the explained texts, and what they are."""
    if sample and not scorer.task.examples:
        own, kind = sample.examples[: len(EASY)], "of your rows"
        texts = [(one.text, scorer.task.canonical_label(one.label)) for one in own]
    else:
        texts, kind = easy_texts(scorer.task)
    rows, errors = [], []
    for text, label in texts:
        try:
            rows.append(scorer.explain(text) | {"label": label})
        except ValueError as error:
            errors.append(error)
    if not rows:
        raise errors[0]
    mass = np.mean([row["label_mass"] for row in rows])
    seen = f"mean {mass:.3f} over {len(rows)} {kind}"
    if mass >= LEAST_MASS:
        return Finding("ok", seen, (rows, kind))
    worst = min(rows, key=lambda row: row["label_mass"])
    token, percent = worst["top_tokens"][0]["token"], math.exp(worst["top_tokens"][0]["logprob"])
    seen += f"; after {worst['text'][:30]!r}... the likeliest is {token!r} ({percent:.0%})"
    return Finding("warning", f"{seen}; {MORE_MASS}", (rows, kind))


def check_direction(seen: tuple[list[dict], str]) -> Finding:
    """Whether the labels are more probable on their own texts than on all."""
    rows, kind = seen
    right = sum(row["prediction"] == row["label"] for row in rows)
    said = f"{right} of {len(rows)} {kind} get their label"
    if right == len(rows):
        return Finding("ok", said)
    gains = []  # of each text, by how much its own label is likelier than on average
    for row in rows:
        label = row["label"]
        gains.append(row["probabilities"][label] - np.mean([other["probabilities"][label] for other in rows]))
    if np.mean(gains) <= 0:
        why = "a label is no more probable on its own texts than on the others"
        return Finding("failed", f"{said}; {why}: are answer words swapped? Else another model, or words for the task")
    usual = Counter(row["prediction"] for row in rows).most_common(1)[0][0]
    why = f"each label is likelier on its own texts, but there is a class bias towards {usual!r}"
    return Finding("warning", f"{said}; {why}: try --debias batch, another wording, [[examples]] or fine_tune_model.py")


def check_batches(llama: Llama, scorer: LabelScorer) -> Finding:
    """The same texts alone, padded in a batch, and after the shared prefix: the largest difference of a probability."""
    rows = [llama.encode(scorer.prompt, text) for text, _ in EASY[-4:]]
    answers, labels = [answer.ids for answer in scorer.answers], list(scorer.task.labels)
    plain = replace(llama, packs=False, shares_prefix=False)
    ways = [
        np.concatenate([plain.answer_log_probs([row], answers) for row in rows]),
        plain.answer_log_probs(rows, answers, len(rows)),
        llama.answer_log_probs(rows, answers, len(rows)),
    ]
    alone, *others = (label_probabilities(log_probs, scorer.answers, labels)[0] for log_probs in ways)
    padded, shared = (float(np.max(np.abs(other - alone))) for other in others)
    seen = f"a text alone or in a batch differs by {padded:.1g}, with the shared prefix by {shared:.1g}"
    precision = llama.identity["precision"]
    if max(padded, shared) <= (1e-5 if precision == "float32" else 0.02):
        return Finding("ok", seen)
    if precision == "float32":
        return Finding("failed", f"{seen}; score with --batch-size 1, and report this model's family")
    return Finding("warning", f"{seen}, more than {precision} explains; use --dtype float32")


def varied(draws: list[str], again: list[str], is_exact: bool) -> Finding:
    """Whether other seeds gave other answers, and the same seeds the same."""
    different, same = len(set(draws)), sum(a == b for a, b in zip(draws, again, strict=True))
    if different < 2:
        seen = f"{len(draws)} seeds gave the same answer, {draws[0][:30]!r}, to an undecided text"
        why = "it is very sure, or samples without temperature, and agreement (Method 2) would say nothing"
        return Finding("warning", f"{seen}; {why}: use Method 1, or --paraphrase")
    seen = f"{len(draws)} seeds gave {different} different answers to an undecided text"
    if same < len(draws) and is_exact:
        return Finding("failed", f"{seen}, but only {same} of them the same again; use --dtype float32")
    return Finding("ok", f"{seen}, and {same} of {len(draws)} the same again")


def check_sampling(llama: Llama, scorer: LabelScorer) -> Finding:
    ids = llama.encode(scorer.prompt, UNDECIDED)
    draws, again = (llama.sample([ids], [range(DRAWS)], max_tokens=8, stop="")[0] for _ in range(2))
    return varied(draws, again, is_exact=True)


def check_generation(llama: Llama) -> Finding:
    """The model's own sampling settings; informational, because nothing here uses them."""
    settings = llama.model.generation_config.to_diff_dict()
    bent = [f"{name} {value}" for name, value in settings.items() if re.search("temperature|_p$|_k$|penalty", name)]
    if not bent:
        return Finding("ok", "its own settings would not bend a `generate` call")
    return Finding("ok", f"its own {', '.join(bent)} would bend a `generate` call; no method here uses them")


def examine_files(report: Report, model: str, use: object) -> Path | None:
    """The checks before a model is loaded; its folder, or None when it cannot be loaded."""
    run, name = report.run, model_files.hub_id(model)
    run("Hub login", lambda: check_login(name))
    parameters, stored = run("Hub page", lambda: check_hub(name)) if name else (0, 0)
    if model == "default" and not (cache_dir() / DEFAULT_NAME).is_dir():
        stored = PREPARING
    room, fits = run("disk", lambda: check_disk(name, stored)), True
    if parameters:  # so that no gigabytes are fetched in vain
        fits = run("memory", lambda use: check_memory(parameters, use, Path()), use)
    remedy = "--model takes default, a name on the Hub, or a folder with safetensors weights"
    path = run("files", lambda *_: find_files(model), room, fits, remedy=remedy)
    if not parameters:
        fits = run("memory", lambda use, path: check_memory(0, use, path), use, path, remedy=AGAIN)
    return path if fits else None


def examine_model(
    report: Report, task: Task, model: str, adapter: str, sample: LabelledSample | None = None, **options: object
) -> None:
    """Every check of a model that is loaded here; `options` are device and precision, as of `load_llama`."""
    run = report.run
    use = run("devices", lambda: check_devices(**options), remedy="--device auto takes what is there")
    report.title(f"Model {model}")
    path = examine_files(report, model, use)
    llama = run("loads", lambda _: check_loading(model, adapter, task, **options), path, remedy=AGAIN)

    report.title(f"Prompt and answers of task {task.name}")
    remedy = f"or correct the chat template in {path}" if task.format == "chat" else ""
    shown = lambda llama: Finding("ok", "shows a text once", llama.task_prompt(task))  # noqa: E731
    prompt = run("template", shown, llama, remedy=remedy)
    run("BOS", check_bos, llama, task, prompt)
    run("token ids", check_ids, llama, task, prompt)
    run("control tokens", check_control, llama, prompt)
    remedy = "choose other answer words" if task.scoring == "sequence" else ""
    scorer = run("answers", check_answers, llama, task, prompt, remedy=remedy)

    report.title("What the model says")
    rows = run("label mass", lambda scorer: check_mass(scorer, sample), scorer, remedy=MORE_MASS)
    run("direction", check_direction, rows)
    run("batches", check_batches, llama, scorer)
    run("sampling", check_sampling, llama, scorer)
    run("generation", check_generation, llama)
    if sample:
        examine_rows(report, scorer, sample)


# Labelled rows


def check_speed(scorer: Method, sample: LabelledSample) -> Finding:
    """Score the drawn rows, and say how long the whole table takes; the value is the scored sample."""
    scored = sample_check.score_sample(scorer, sample)
    seen = f"{command_line.pace(scored.rate)}; the {sample.total:,} rows of the table take about "
    seen += command_line.duration(sample.total / scored.rate)
    if scored.errors:
        of = f"{len(scored.errors)} of {len(sample.examples)} rows"
        seen += f"; {of} could not be scored: {scored.errors[0]}"
    status = "failed" if not scored.rows else "warning" if scored.errors else "ok"
    return Finding(status, seen, scored)


def check_verdict(scored: ScoredSample, labelled: int) -> Finding:
    """Whether the classifier works at all; `labelled` rows are there to improve it."""
    found = verdict.judge(scored.rows)
    record = found.record()
    if found.problem:
        return Finding("warning", record["sentences"][0])
    accuracy = f"accuracy {verdict.interval(record['accuracy'])}; {verdict.baseline_words(record)}"
    said = [*record["sentences"], accuracy]
    if steps := verdict.next_steps(found, labelled):
        said.append(f"next, by what gained most on public data (docs/improving.md): {', '.join(steps)}")
    status = "ok" if verdict.works(found) else "failed" if verdict.fails(found) else "warning"
    return Finding(status, "; ".join(said))


def check_rows_mass(scored: ScoredSample) -> Finding:
    """How much of the distribution names a label on real rows."""
    masses = [row.label_mass for row in scored.rows]
    seen = f"mean {np.mean(masses):.3f} over {len(masses)} of your rows, lowest {min(masses):.3f}"
    if np.mean(masses) >= LEAST_MASS:
        return Finding("ok", seen)
    return Finding("warning", f"{seen}; scripts/improve_task.py looks for a better prompt")


def examine_rows(report: Report, scorer: Method | None, sample: LabelledSample) -> None:
    """Every check on labelled rows of the user's own table."""
    report.title(f"{len(sample.examples)} labelled rows of {sample.source}, drawn at random")
    scored = report.run("speed", check_speed, scorer, sample)
    report.run("verdict", check_verdict, scored, sample.labelled)
    report.run("mass on rows", check_rows_mass, scored)
    if scored:
        print(sample_check.wrong_answers(scored.rows), flush=True)


# A model behind a server


def check_connection(connect: Callable[[], Endpoint], stack: ExitStack) -> Finding:
    try:
        server = stack.enter_context(connect())
    except OSError as error:
        raise OSError(f"{error}; is it running, and is this its URL?") from None
    return Finding("ok", f"{server.name} at {server.url}", server)


def check_logprobs(server: Endpoint, task: Task) -> Finding:
    """Whether it gives log-probabilities and how many; a refusal is no failure, for Method 2 needs none."""
    try:
        scorer = remote_label_scorer(server, task)
    except ValueError as error:
        if "Method 2" not in str(error):
            raise
        return Finding("warning", str(error), None)
    listing = server.wait(scorer.listing(UNDECIDED))
    if listing.complete:
        return Finding("ok", f"lists all {len(scorer.ids)} answer tokens by id", scorer)
    seen = f"lists {len(listing.tokens)} of {server.top_tokens} asked for (--top-tokens)"
    return Finding("ok", seen if server.reader else f"{seen}, not by id (--tokenizer)", scorer)


def check_remote_sampling(server: Endpoint, task: Task) -> Finding:
    prompt = server.question(task)(UNDECIDED)
    server.probe(lambda: server.sample(prompt, seed=0))
    draws, again = (
        server.wait(endpoint.all_of([server.sample(prompt, seed) for seed in range(DRAWS)])) for _ in range(2)
    )
    return varied(draws, again, is_exact=False)


def check_parameters(server: Endpoint, _: object) -> Finding:
    """What its API did not take in the requests before."""
    rejected = ", ".join(sorted(server.rejected))
    if server.replaced:
        rejected = f"{rejected or 'none'}; with other values: {server.replaced}"
    return Finding("ok", f"left out, as it rejects them: {rejected}" if rejected else "all are taken")


def examine_server(
    report: Report, task: Task, url: str, connect: Callable[[], Endpoint], sample: LabelledSample | None = None
) -> None:
    """Every check of a model behind a server."""
    report.title(f"Server {url}, task {task.name}")
    run, remedy = report.run, "the server's own log may say more"
    with ExitStack() as stack:
        server = run("server", lambda: check_connection(connect, stack))
        scorer = run("log-probabilities", check_logprobs, server, task, remedy=remedy)
        rows = run("label mass", lambda scorer: check_mass(scorer, sample), scorer, remedy=MORE_MASS)
        run("direction", check_direction, rows)
        sampled = run("sampling", check_remote_sampling, server, task, remedy=remedy)
        run("parameters", check_parameters, server, sampled)
        if sample:
            examine_rows(report, scorer, sample)


# SageMaker


def check_identity(region: str | None) -> Finding:
    """Credentials and region; having none is no failure, having wrong ones is."""
    try:
        account = aws.connect(region)
    except aws.AwsError:
        raise
    except ValueError as error:  # no region, which does not matter where there are no credentials either
        is_offline = aws.connect(region, dry_run=True).is_offline
        return Finding("warning" if is_offline else "failed", str(error), None)
    return Finding("ok", f"account {account.number}, region {account.region}", account)


def examine_sagemaker(report: Report, region: str | None, role: str, instance_type: str) -> None:
    report.title("Amazon SageMaker")
    account = report.run("identity", lambda: check_identity(region))
    report.run("role", lambda account: Finding("ok", aws.find_role(account, role)), account)
    report.run("instance type", lambda _: Finding("ok", aws.check_instance(instance_type)), account)


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add_task_argument(parser)
    tables.add_table_arguments(parser)
    models.add_arguments(parser)
    endpoint.add_arguments(parser)
    add = parser.add_argument_group("on Amazon SageMaker").add_argument
    add("--sagemaker", action="store_true", help="check credentials, role and machine, too; bills nothing")
    add("--region", metavar="NAME", help="default: that of your AWS settings")
    add("--role", default=aws.ROLE, help=f"the IAM role, a name or ARN, of the container (default: {aws.ROLE})")
    add("--instance-type", default=aws.INSTANCE, metavar="TYPE", help=f"the machine (default: {aws.INSTANCE})")
    args = parser.parse_args(argv)
    endpoint.check_arguments(parser, args)
    if not args.sagemaker and (args.region, args.role, args.instance_type) != (None, aws.ROLE, aws.INSTANCE):
        parser.error("--region, --role and --instance-type need --sagemaker")
    for name in ("text_column", "label_column", "id_column", "label_map", "where", "limit", "sample"):
        if getattr(args, name) and not args.input:
            parser.error(f"--{name.replace('_', '-')} needs --input FILE, a table of labelled rows")
    return args


def sample_from_arguments(args: argparse.Namespace, task: Task) -> LabelledSample | None:
    """The labelled rows that --input asks for, read and checked before any model is loaded."""
    if not args.input:
        return None
    columns = tables.column_arguments(args) | {"sample": None}
    table = tables.open_table(args.input, **columns, text_template=task.text_template)
    return sample_check.draw_sample(table, task, args.sample or SAMPLED, args.seed)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    task, report = read_task(args.task), Report()
    sample = sample_from_arguments(args, task)
    report.title("This machine")
    report.add("Python", "ok", f"{platform.python_version()}, {platform.system()} on {platform.machine()}")
    report.run("packages", check_packages)
    if args.endpoint:
        connect = lambda: endpoint.connect(**endpoint.connection_arguments(args))  # noqa: E731
        examine_server(report, task, ", ".join(args.endpoint), connect, sample)
    else:
        examine_model(report, task, sample=sample, **models.model_arguments(args))
    if args.sagemaker:
        examine_sagemaker(report, args.region, args.role, args.instance_type)
    counts = Counter(status for status, _ in report.rows)
    seen = ", ".join(f"{counts[status]} {status}" for status in ("ok", "warning", "failed", "skipped"))
    failed = next((subject for status, subject in report.rows if status == "failed"), None)
    then = f"correct first: {failed}" if failed else "look at the warnings" if counts["warning"] else "all is in order"
    print(f"\n{seen}: {then}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    command_line.run(main)
