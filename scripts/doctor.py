"""Is this set-up in order, and does this model do what the methods need? A table; what is not ok says what to do.

    python scripts/doctor.py                                                # the default model, task sentiment
    python scripts/doctor.py --model llama --task sentiment-yes-no
    python scripts/doctor.py --model my-model/ --adapter my-adapter/ --task tickets.toml
    python scripts/doctor.py --endpoint http://127.0.0.1:8000/v1            # a server in place of a model loaded here
    python scripts/doctor.py --sagemaker                                    # also credentials, role and quota on AWS

A row is ok, a warning (it works, but look at it), failed, or skipped because it needs what is missing above. A model is
fetched if it is not here, as by every script, once memory and disk are seen to suffice. Label mass and direction are
taken on six easy texts, or on the task's own examples, which its prompt shows already: a glance, no accuracy. It
writes nothing but the models' caches, sends a server some thirty short requests, and shows no secret.

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
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OLDEST_PYTHON = (3, 11)
INSTALL = f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
if sys.version_info[:2] < OLDEST_PYTHON:  # the commonest failures come before there could be a table
    sys.exit(f"failed: Python {platform.python_version()} is older than 3.11: make demo PYTHON=python3.12")
try:
    import numpy as np

    import consistency_confidence as consistency
    import endpoint
    import llama as models
    import logprobs_confidence as logprobs
    import predictions
    import sagemaker_job as cloud
    import task as tasks
    from endpoint import Endpoint
    from llama import Llama, RenderedPrompt
    from logprobs_confidence import Scorer
    from predictions import Prediction
    from sagemaker_job import Check
    from task import Example, Task
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
LEAST_MASS = 0.5
MEND_MASS = "word the template so that a label must follow, add [[examples]], or use other answer words"
AGAIN = "if the model's files are broken, fetch or save them again"
TOLERANCE = {"float32": 1e-5}  # between two ways to run the same text
TOLERANCE_16_BITS = 0.02
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "8bit": 1, "4bit": 0.5}  # of a parameter
BESIDE_WEIGHTS = 1.2  # with caches, activations and the vocabulary's logits
PREPARING = 10**9  # bytes of the embedded model and of what it is made from
MORE_TOKENS = 200  # asked of a server to see whether it would list more
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
NEUTRAL |= {"no_repeat_ngram_size": 0}


class Finding(NamedTuple):
    """What a check saw; `value` is what later checks need of it."""

    status: str
    detail: str
    value: object = True


@dataclass
class Report:
    """The table, printed as it grows."""

    checks: list[Check] = field(default_factory=list)

    def title(self, text: str) -> None:
        print(("\n" if self.checks else "") + command_line.printable(text), flush=True)

    def add(self, check: Check) -> None:
        self.checks.append(check)
        begin = f"  {check.status:8} {check.subject:17} "
        detail = command_line.printable(cloud.redacted(" ".join(check.detail.split())))
        width = max(60, min(shutil.get_terminal_size((110, 24)).columns, 120))
        options = {"subsequent_indent": " " * len(begin), "break_long_words": False, "break_on_hyphens": False}
        print("\n".join(textwrap.wrap(begin + detail, width, **options)), flush=True)

    def run(self, subject: str, look: Callable, *needs: object, remedy: str = "") -> object:
        """Add the row of look(*needs), which is a Finding, a Check or an ok's detail; its value, None if it has none.

        It is skipped when one of `needs` is None.
        """
        if any(need is None for need in needs):
            self.add(Check("skipped", subject, "needs what is missing above"))
            return None
        try:
            found = look(*needs)
        except Exception as error:  # of whichever library: a broken set-up is what is looked for here
            found = Finding("failed", words(error) + (f"; {remedy}" if remedy else ""))
        found = Finding("ok", found) if isinstance(found, str) else found
        self.add(Check(found.status, subject, found.detail))
        return None if found.status == "failed" else getattr(found, "value", True)


def words(error: Exception) -> str:
    """An error in one line; those of our own functions say what to do."""
    if isinstance(error, ImportError):
        return f"{error}; {INSTALL}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    ours = isinstance(error, ValueError | OSError | MemoryError)
    return ("" if ours else f"{type(error).__name__}: ") + " ".join(str(error).split())[:600]


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


# This machine


def check_packages() -> Finding:
    """The versions that requirements.txt pins against those that are installed."""
    pins = re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    missing, other = [], []
    for name, pinned in pins:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if version.partition("+")[0] != pinned:  # after it stands the build, as +cpu
            other.append(f"{name} {version}, not {pinned}")
    if not missing and not other:
        return Finding("ok", f"all {len(pins)} as requirements.txt pins them")
    seen = ([f"missing: {', '.join(missing)}"] if missing else []) + other
    return Finding("failed" if missing else "warning", f"{'; '.join(seen)}; {INSTALL}")


def check_devices(args: argparse.Namespace) -> Finding:
    """What can compute here, and what will: the value is (device, precision)."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    seen = [f"{cores} CPU core{'s' if cores != 1 else ''}"]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        seen.append(f"cuda:{number} {torch.cuda.get_device_name(number)}, {size(free)} of {size(total)} free")
    seen += ["Apple's GPU (mps)"] if torch.backends.mps.is_available() else []
    device = models.choose_device(args.device)
    bits = "4bit" if args.load_in_4bit else "8bit" if args.load_in_8bit else ""
    use = device, bits or models.choose_dtype(args.dtype, device)
    seen.append(f"this run: {use[1]} on {device}")
    unseen = not torch.cuda.is_available() and shutil.which("nvidia-smi")
    seen += ["torch does not see the NVIDIA driver: install a torch that is built for its CUDA"] if unseen else []
    return Finding("warning" if unseen else "ok", "; ".join(seen), use)


def free_memory(device: str) -> int | None:
    """Bytes that a model on this device can have, None where nobody says; of Apple's the whole memory."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
        limit = Path("/sys/fs/cgroup/memory.max")  # a container's
        stated = limit.read_text().strip() if limit.is_file() else "max"
        return free if stated == "max" else min(free, int(stated))
    except (OSError, TypeError):  # not Linux
        names = getattr(os, "sysconf_names", {})
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else None


# The model's files


def hub_id(model: str) -> str | None:
    """The Hub's name of what --model says; None of the embedded model and of a folder."""
    path = Path(model).expanduser()
    if model == "default" or path.exists() or path.is_absolute() or model.startswith((".", "~")):
        return None
    return model_files.ALIASES.get(model, model)


def check_login(name: str | None) -> Finding:
    from huggingface_hub import errors, get_token, whoami

    if not get_token():
        need = "gated and private models need it: `hf auth login`, or HF_TOKEN" if name else "this model needs none"
        return Finding("ok", f"not logged in; {need}")
    try:
        return Finding("ok", f"logged in as {whoami()['name']}")
    except errors.HfHubHTTPError:
        return Finding("warning", "the Hub refuses the token: `hf auth login`, or another HF_TOKEN")
    except Exception as error:  # the HTTP library's, which has other names in other versions
        return Finding("warning", f"a token is set, but the Hub cannot be reached to try it ({words(error)})")


def check_hub(name: str) -> Finding:
    """The model's page, which knows size and access before anything is fetched; the value is (parameters, bytes)."""
    from huggingface_hub import HfApi

    try:
        page = HfApi().model_info(name, files_metadata=True, timeout=10)
    except Exception as error:  # a missing or forbidden one is told apart when its files are fetched
        seen = f"no page of {name} ({words(error)[:120]}); its files are looked for in the local cache"
        return Finding("warning", seen, (0, 0))
    files = [one for one in page.siblings or [] if re.fullmatch(r"(?!consolidated)[^/]+\.safetensors", one.rfilename)]
    stored, count = sum(one.size or 0 for one in files), page.safetensors.total if page.safetensors else 0
    access = "gated: its licence must be accepted on its page" if page.gated else "not gated"
    return Finding("ok", f"{name}: {count / 1e6:,.0f} million parameters, {size(stored)}, {access}", (count, stored))


def check_disk(name: str | None, stored: int) -> Finding:
    """Whether the cache can be written and has room for what is not in it yet."""
    folder, move, needed = embedded_model.cache_dir(), "CALIBRATED_CONFIDENCE_CACHE", stored
    if name:
        from huggingface_hub.constants import HF_HUB_CACHE

        folder, move = Path(HF_HUB_CACHE), "HF_HOME"
        have = (folder / f"models--{name.replace('/', '--')}" / "blobs").glob("*")
        needed = max(0, stored - sum(path.stat().st_size for path in have))
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    seen = f"{folder}: {size(free)} free" + (f", {size(needed)} to fetch" if needed else "")
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return Finding("failed" if needed else "warning", f"{there} cannot be written; set {move} to another folder")
    if free < needed:
        return Finding("failed", f"{seen}; make room, or set {move} to a folder on another disk")
    return Finding("ok", seen)


def made_at() -> int:
    """When the embedded model was made, 0 if it is not there."""
    manifest = embedded_model.cache_dir() / embedded_model.DEFAULT_NAME / "manifest.json"
    return manifest.stat().st_mtime_ns if manifest.is_file() else 0


def check_files(model: str) -> Finding:
    """Find the model's files, or fetch them; the embedded model is verified, and made anew when it is broken."""
    before = made_at()
    _, path, weights = model_files.locate(model)
    if model == "default":
        weights = "intact" if made_at() == before else "it was broken and is made anew" if before else "made now"
    return Finding("ok", f"{path} ({weights})", path)


def check_memory(parameters: int, use: tuple[str, str], path: Path) -> Finding:
    """Whether the weights, in this precision, fit; counted from the files' headers where the Hub has not said it."""
    if not parameters:
        from safetensors import safe_open

        for file in sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors")):
            with safe_open(file, "np") as weights:
                names = weights.keys()
                parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    device, precision = use
    need, free = parameters * BYTES[precision], free_memory(device)
    seen = f"{parameters / 1e6:,.1f} million parameters, {size(need)} in {precision}"
    if free is None:
        return Finding("warning", f"{seen}; how much memory is free is not known here")
    seen += f"; {size(free)} free on {device}"
    less = "a smaller --model" + (" or --dtype bfloat16" if precision == "float32" else "")
    less += ", --load-in-8bit or --load-in-4bit" if device.startswith("cuda") and "bit" not in precision else ""
    if need > free:
        return Finding("failed", f"{seen}; close other programs, or use {less}")
    if need * BESIDE_WEIGHTS > free:
        return Finding("warning", f"{seen}, which leaves little to compute with; small batches, or {less}")
    return Finding("ok", seen)


def load(args: argparse.Namespace, task: Task) -> Finding:
    started = time.monotonic()
    llama = models.load_from(args, task.settings())
    seen = f"{llama.name}, {llama.identity['precision']} on {llama.device}"
    seen += f", with the adapter {llama.adapter}" if llama.adapter else ", no adapter"
    seen += f", reads {llama.context_length:,} tokens" if llama.context_length else ""
    return Finding("ok", f"{seen}; {time.monotonic() - started:.1f} s", llama)


# Prompt and answers


def check_template(llama: Llama, task: Task) -> Finding:
    """Render the task's prompt. A completion does not depend on the chat template, which then is worth a warning."""
    frame, not_used = llama.task_prompt(task), 'this task (format = "completion") does not use it'
    if task.format == "chat":
        return Finding("ok", "shows a text once", frame)
    if not llama.tokenizer.chat_template:
        return Finding("ok", f"there is no chat template; {not_used}", frame)
    try:
        llama.task_prompt(tasks.TASKS["sentiment-yes-no"])
    except Exception as error:
        return Finding("warning", f"{words(error)}; {not_used}", frame)
    return Finding("ok", f"shows a text once; {not_used}", frame)


def whole_ids(llama: Llama, prompt: str | list[dict[str, str]]) -> list[int]:
    """The ids of a whole prompt as the tokenizer itself makes them."""
    if isinstance(prompt, str):
        return llama.tokenizer(prompt)["input_ids"]
    options = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": True, "return_dict": True}
    return llama.tokenizer.apply_chat_template(prompt, **options)["input_ids"]


def check_bos(llama: Llama, task: Task, frame: RenderedPrompt) -> Finding:
    """One BOS at most, but for models that begin every turn with it (ChatML): there a longer chat has more."""
    bos, ids = llama.tokenizer.bos_token_id, llama.encode(frame, UNDECIDED)
    count, name = ids.count(bos), llama.tokenizer.bos_token
    if count < 2:
        return Finding("ok", f"{name}, once" if count else "none before this prompt")
    if task.format == "chat" and ids[:2] != [bos, bos]:
        turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
        if whole_ids(llama, [*task.prompt(UNDECIDED), *turns]).count(bos) > count:
            return Finding("ok", f"{name} begins each of {count} turns, once")
    where = f"chat template in {llama.path}" if task.format == "chat" else "task's template"
    return Finding("failed", f"{name} stands {count} times in the prompt; take all but the first out of the {where}")


def check_ids(llama: Llama, task: Task, frame: RenderedPrompt) -> Finding:
    """Our ids against the tokenizer's for the whole prompt, after which some put a token that ends it."""
    ids, whole = llama.encode(frame, UNDECIDED), whole_ids(llama, task.prompt(UNDECIDED))
    if whole[: len(ids)] == ids and set(whole[len(ids) :]) <= set(llama.tokenizer.all_special_ids):
        return Finding("ok", f"{len(ids)}, the same as of the whole prompt at once")
    at = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
    why = f"{len(ids)}, but the whole prompt at once has {len(whole)}; they differ from number {at} on"
    return Finding("failed", f"{why}: the tokenizer's files do not fit together, fetch them again")


def check_control(llama: Llama, frame: RenderedPrompt) -> Finding:
    """Whether a text that spells a control token is read as characters; of very many tokens some fifty are tried."""
    named = {i: str(token) for i, token in llama.tokenizer.added_tokens_decoder.items() if str(token).strip()}
    named |= dict(zip(llama.tokenizer.all_special_ids, llama.tokenizer.all_special_tokens, strict=True))

    def seen(text: str) -> int:
        return sum(i in named for i in llama.encode(frame, text))

    tried = sorted(set(named.values()))[:: max(1, len(named) // 50)]
    if obeyed := [token for token in tried if seen(f"before {token} after") > seen("before after")]:
        return Finding("failed", f"a text that spells {obeyed[0]} would be obeyed; take such strings out of the texts")
    return Finding("ok", f"{len(tried)} of {len(named)} tried: in a text they are characters")


def check_answers(llama: Llama, task: Task, _: RenderedPrompt) -> Finding:
    """Each label's own tokens; `prepare` refuses a label without one and two that share one."""
    scorer, seen = logprobs.prepare(llama, task), []
    for label in task.labels:
        spelled = [repr(answer.text) for answer in scorer.answers if answer.label == label]
        seen.append(f"{label}: {', '.join(spelled[:3])}" + (f" and {len(spelled) - 3} more" if spelled[3:] else ""))
    return Finding("ok", "; ".join(seen), scorer)


# What the model says


def easy_examples(task: Task) -> tuple[list[Example], str]:
    """Texts whose label is beyond doubt, and what they are; of a task with other labels those of its own examples."""
    has_easy = {label for _, label in EASY} == set(task.labels)
    pairs, kind = (EASY, "easy texts") if has_easy else (task.examples, "of the task's own examples")
    if not pairs:
        raise ValueError("no texts to try: the task has no [[examples]]")
    return [Example(str(number), text, label) for number, (text, label) in enumerate(pairs)], kind


def check_mass(score: Callable, explain: Callable[[str], dict], task: Task) -> Finding:
    """How much of the distribution names a label at all; the value is the rows that were scored, and what they are."""
    examples, kind = easy_examples(task)
    every = list(score(examples))
    if not (rows := [row for row in every if row.error is None]):
        raise ValueError(every[0].error)
    mass = sum(row.label_mass for row in rows) / len(rows)
    seen = f"mean {mass:.3f} over {len(rows)} {kind}"
    if mass >= LEAST_MASS:
        return Finding("ok", seen, (rows, kind))
    worst = min(rows, key=lambda row: row.label_mass)
    first = explain(worst.text)["top_tokens"][0]
    seen += f"; after {worst.text[:30]!r}... the likeliest is {first['token']!r} ({math.exp(first['logprob']):.0%})"
    return Finding("warning", f"{seen}; {MEND_MASS}", (rows, kind))


def check_direction(seen: tuple[list[Prediction], str]) -> Finding:
    """Whether each label is more probable on its own texts than on all."""
    rows, kind = seen
    right = sum(row.prediction == row.label for row in rows)
    said = f"{right} of {len(rows)} {kind} get their label"
    if right == len(rows):
        return Finding("ok", said)
    gains = []
    for label in {row.label for row in rows}:
        of_all = np.array([row.probabilities[label] for row in rows])
        gains.append(of_all[[row.label == label for row in rows]].mean() - of_all.mean())
    if np.mean(gains) <= 0:
        why = "a label is no more probable on its own texts than on the others"
        return Finding("failed", f"{said}; {why}: are answer words swapped? Else another model, or words for the task")
    lean = Counter(row.prediction for row in rows).most_common(1)[0][0]
    mend = "--debias batch, another wording, [[examples]] or fine_tune_model.py can mend that"
    return Finding("warning", f"{said}; each label is likelier on its own texts, but it leans to {lean!r}: {mend}")


def check_batches(llama: Llama, scorer: Scorer) -> Finding:
    """The same texts alone, padded in a batch, and after the shared prefix: the largest difference of a probability."""
    rows, answers = [llama.encode(scorer.frame, t) for t, _ in EASY[-4:]], [answer.ids for answer in scorer.answers]
    plain = replace(llama, shares_prefix=False)
    alone, padded, shared = (
        tasks.label_probabilities(log_probs, scorer.answers, list(scorer.task.labels))[0]
        for log_probs in (
            np.concatenate([plain.answer_log_probs([row], answers) for row in rows]),
            plain.answer_log_probs(rows, answers, len(rows)),
            llama.answer_log_probs(rows, answers, len(rows)),
        )
    )
    gaps = [float(np.max(np.abs(values - alone))) for values in (padded, shared)]
    seen = f"a text alone or in a batch differs by {gaps[0]:.1g}, with the shared prefix by {gaps[1]:.1g}"
    precision = llama.identity["precision"]
    if max(gaps) <= TOLERANCE.get(precision, TOLERANCE_16_BITS):
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


def check_sampling(llama: Llama, scorer: Scorer) -> Finding:
    ids = llama.encode(scorer.frame, UNDECIDED)
    return varied(*(llama.sample([ids], [range(DRAWS)], max_tokens=8, stop="")[0] for _ in range(2)), is_exact=True)


def check_generation(llama: Llama) -> str:
    """The model's own sampling settings; informational, because nothing here uses them."""
    settings = getattr(llama.model, "generation_config", None)
    values = {name: getattr(settings, name, None) for name in NEUTRAL}
    bent = [f"{name} {value}" for name, value in values.items() if value not in (None, NEUTRAL[name])]
    if not bent:
        return "its own settings would not bend a `generate` call"
    return f"its own {', '.join(bent)} would bend a `generate` call; no method here uses them"


def examine_model(report: Report, args: argparse.Namespace, task: Task) -> None:
    """Every check of a model that is loaded here."""
    run, name = report.run, hub_id(args.model)
    use = run("devices", partial(check_devices, args), remedy="--device auto takes what is there")
    report.title(f"Model {args.model}")
    run("Hub login", partial(check_login, name))
    parameters, stored = run("Hub page", partial(check_hub, name)) if name else (0, 0)
    if args.model == "default" and not made_at():
        stored = PREPARING
    room, fits, adapter = run("disk", partial(check_disk, name, stored)), True, True
    weigh = partial(check_memory, parameters)
    if parameters:  # so that no gigabytes are fetched in vain
        fits = run("memory", weigh, use, Path())
    remedy = "--model takes default, a name on the Hub, or a folder with safetensors weights"
    path = run("files", lambda *_: check_files(args.model), room, fits, remedy=remedy)
    if not parameters:
        fits = run("memory", weigh, use, path, remedy=AGAIN)
    if args.adapter not in ("auto", "none"):
        remedy = "fine_tune_model.py makes one; or --adapter none"
        adapter = run("adapter", lambda: lora.check_adapter(Path(args.adapter)) or args.adapter, remedy=remedy)
    llama = run("loads", lambda *_: load(args, task), path, fits, adapter, remedy=AGAIN)

    report.title(f"Prompt and answers of task {task.name}")
    remedy = f"or mend the chat template in {path}" if task.format == "chat" else ""
    frame = run("template", lambda llama: check_template(llama, task), llama, remedy=remedy)
    run("BOS", check_bos, llama, task, frame)
    run("token ids", check_ids, llama, task, frame)
    run("control tokens", check_control, llama, frame)
    remedy = "choose other answer words" if task.scoring == "sequence" else ""
    scorer = run("answers", check_answers, llama, task, frame, remedy=remedy)

    report.title("What the model says")
    score, explain = (lambda rows: logprobs.score(rows, scorer)), (lambda text: logprobs.explain(text, scorer))
    rows = run("label mass", lambda _: check_mass(score, explain, task), scorer, remedy=MEND_MASS)
    run("direction", check_direction, rows)
    run("batches", check_batches, llama, scorer)
    run("sampling", check_sampling, llama, scorer)
    run("generation", check_generation, llama)


# A model behind a server


def connect(stack: ExitStack, args: argparse.Namespace) -> Finding:
    reader = models.load_reader(args.tokenizer) if args.tokenizer else None
    try:
        server = stack.enter_context(endpoint.connect_from(args, reader))
    except OSError as error:
        raise OSError(f"{error}; is it running, and is this its URL?") from None
    return Finding("ok", f"{server.name} at {server.url}", server)


def check_logprobs(server: Endpoint, task: Task) -> Finding:
    """Whether it gives log-probabilities and how many; a refusal is no failure, for Method 2 needs none."""
    try:
        remote = logprobs.prepare_remote(server, task)
    except ValueError as error:
        if "Method 2" not in str(error):
            raise
        return Finding("warning", str(error), None)
    listed, asked = server.wait(remote.listing(UNDECIDED)), server.top_tokens
    if listed.complete:
        return Finding("ok", f"lists all {len(remote.ids)} answer tokens by id", remote)
    seen = f"lists {len(listed.tokens)} of {asked} asked for" + ("" if server.reader else ", not by id (--tokenizer)")
    server.top_tokens = MORE_TOKENS
    try:
        seen += f", {len(server.wait(remote.listing(UNDECIDED)).tokens)} of {MORE_TOKENS} (--top-tokens)"
    except ValueError as error:
        seen += f"; {MORE_TOKENS} are too many: {error}"
    finally:
        server.top_tokens = asked
    return Finding("ok", seen, remote)


def check_remote_sampling(server: Endpoint, task: Task) -> Finding:
    sampler = consistency.prepare_remote(server, task, consistency.Sampling())
    prompt = sampler.questions[0](UNDECIDED)
    twice = (server.wait(endpoint.all_of([server.sample(prompt, seed) for seed in range(DRAWS)])) for _ in range(2))
    return varied(*twice, is_exact=False)


def check_parameters(server: Endpoint, _: object) -> str:
    """What its API did not take in the requests before."""
    return f"left out, as it rejects them: {', '.join(sorted(server.rejected))}" if server.rejected else "all are taken"


def examine_server(report: Report, args: argparse.Namespace, task: Task) -> None:
    """Every check of a model behind a server."""
    report.title(f"Server {args.endpoint}, task {task.name}")
    run, remedy = report.run, "the server's own log may say more"
    with ExitStack() as stack:
        server = run("server", partial(connect, stack, args))
        remote = run("log-probabilities", check_logprobs, server, task, remedy=remedy)
        score = lambda rows: logprobs.score_remote(iter(rows), lambda n: None, remote)  # noqa: E731
        explain = partial(logprobs.explain_remote, remote=remote)
        rows = run("label mass", lambda _: check_mass(score, explain, task), remote, remedy=MEND_MASS)
        run("direction", check_direction, rows)
        sampled = run("sampling", check_remote_sampling, server, task, remedy=remedy)
        run("parameters", check_parameters, server, sampled)


# SageMaker


def find_aws(args: argparse.Namespace) -> Finding:
    """Credentials and region; having none is no failure, having wrong ones is."""
    try:
        aws = cloud.connect(args.region)
    except cloud.AwsError as error:
        return Finding("warning" if error.code == "credentials" or error.passes else "failed", str(error), None)
    except ValueError as error:  # no region, which does not matter where there are no credentials either
        has_account = cloud.connect(args.region, dry_run=True).account is not None
        return Finding("failed" if has_account else "warning", str(error), None)
    return Finding("ok", cloud.check_identity(aws).detail, aws)


def examine_sagemaker(report: Report, args: argparse.Namespace) -> None:
    report.title("Amazon SageMaker")
    aws = report.run("identity", partial(find_aws, args))
    report.run("role", lambda aws: cloud.find_role(aws, args.role)[1], aws)
    for subject, use in (("training quota", "training job"), ("serving quota", "endpoint")):
        report.run(subject, partial(cloud.check_quota, instance_type=args.instance_type, use=use), aws)


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    parser.add_argument("--task", default="sentiment", help="a task's name or a TOML file (default: sentiment)")
    models.add_arguments(parser)
    endpoint.add_arguments(parser)
    add = parser.add_argument_group("on Amazon SageMaker").add_argument
    add("--sagemaker", action="store_true", help="check the credentials, the role and the quota, too; bills nothing")
    add("--region", metavar="NAME", help="default: that of your AWS settings")
    add("--role", help="the IAM role, a name or ARN, that the container runs as (default: the only one that fits)")
    usual = cloud.INSTANCE
    add("--instance-type", default=usual, metavar="TYPE", help=f"the machine of the quota (default: {usual})")
    args = parser.parse_args(argv)
    endpoint.check_arguments(parser, args)
    if not args.sagemaker and (args.region or args.role or args.instance_type != usual):
        parser.error("--region, --role and --instance-type need --sagemaker")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    task, report = tasks.read_task(args.task), Report()
    report.title("This machine")
    report.run("Python", lambda: f"{platform.python_version()}, {platform.system()} on {platform.machine()}")
    report.run("packages", check_packages)
    (examine_server if args.endpoint else examine_model)(report, args, task)
    if args.sagemaker:
        examine_sagemaker(report, args)
    counts = Counter(check.status for check in report.checks)
    seen = ", ".join(f"{counts[status]} {status}" for status in ("ok", "warning", "failed", "skipped"))
    failed = next((check.subject for check in report.checks if check.status == "failed"), None)
    then = f"mend first: {failed}" if failed else "look at the warnings" if counts["warning"] else "all is in order"
    print(f"\n{seen}: {then}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    command_line.run(main)
