"""How fast Method 1 and fine-tuning run here, beside the usual ways, on the same texts in one run.

    python scripts/benchmark.py                                   # 60 texts of data/sample.csv
    python scripts/benchmark.py --input big.csv --limit 500 --rounds 5
    python scripts/benchmark.py --training                        # fine-tuning, beside Hugging Face's Trainer
    python scripts/benchmark.py --many-labels                     # whole answers of 2, 8 and 77 labels
    python scripts/benchmark.py --growth 1000 10000 100000        # time and memory of tables of so many rows
    python scripts/benchmark.py --random-weights gemma-3-270m     # that shape with random weights; or llama-3.1-8b

The article's way is one `generate` call a text; plain batches are 32 rows at a time, padded, logits at every position.
"Padded" is what families run that cannot be packed: sorted, padded batches behind the shared beginning's cache.
Where they are installed, two more: `lm-eval`, lm-evaluation-harness's log-likelihood of each answer after each prompt,
32 at a time (an environment of its own: it brings 60 packages), and `xllamacpp`, llama.cpp's server, which keeps the
beginning that a prompt shares with the one before; it reads the default model's own file, 4 bits, or --gguf FILE.
All are timed in turn, round after round; a rate is the median of its rounds, a ratio is against the first way named.
The limit is this machine's own matrix-multiply rate, measured on the model's layer shapes at our batch size; ours is
counted on the tokens that no two texts share, attention left out. It prints a table and writes nothing.

--training times whole epochs on the first rows of data:train: transformers' Trainer on padded whole prompts with every
label but the answer's masked, and fine_tune_model.py's steps; the same LoRA, optimizer, rows a step and precision.
--many-labels makes labels of the first words of texts; --growth runs the command on a table of copies with numbers.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import embedded_model  # noqa: E402
import task as tasks  # noqa: E402
import training  # noqa: E402
from fine_tune_model import read_labelled  # noqa: E402
from llama import TOKENS_PER_BATCH, Llama, add_arguments, load_llama, model_arguments  # noqa: E402
from logprobs_confidence import label_scorer  # noqa: E402
from tables import Example, Table, add_table_arguments, column_arguments  # noqa: E402

PLAIN_BATCH = 32
REQUESTS = 4  # to llama.cpp's server at a time
TRAINER_BATCH = 8  # rows of a step that Trainer runs together; more do not fit into 24 GB of memory
LLAMA_31_8B = {  # the published configuration of meta-llama/Llama-3.1-8B
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
GEMMA_3_270M = {  # the published configuration of google/gemma-3-270m
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "query_pre_attn_scalar": 256,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
}
SHAPES = {"llama-3.1-8b": LLAMA_31_8B, "gemma-3-270m": GEMMA_3_270M}
LABEL_COUNTS = (2, 8, 77)
Rows = Sequence[Sequence[int]]  # prompts as token ids


# Scoring: rows of token ids -> log-probabilities of the answer ids, [rows, answers]


def generate_each(llama: Llama, rows: Rows, ids: Sequence[int]) -> np.ndarray:
    import torch

    out = []
    for row in rows:
        inputs = torch.tensor([row], device=llama.model.device)
        step = llama.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        out.append(step.logits[0][0].double().log_softmax(-1)[ids].cpu().numpy())
    return np.stack(out)


def plain_batches(llama: Llama, rows: Rows, ids: Sequence[int]) -> np.ndarray:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    out = []
    with torch.inference_mode():
        for start in range(0, len(rows), PLAIN_BATCH):
            batch = [torch.tensor(row) for row in rows[start : start + PLAIN_BATCH]]
            inputs = pad_sequence(batch, batch_first=True).to(llama.model.device)
            mask = pad_sequence([torch.ones_like(row) for row in batch], batch_first=True).to(inputs.device)
            logits = llama.model(input_ids=inputs, attention_mask=mask).logits
            last = logits[torch.arange(len(batch)), mask.sum(1) - 1].double()
            out.append(last.log_softmax(-1)[:, ids].cpu().numpy())
    return np.concatenate(out)


def log_likelihoods(harness: object, llama: Llama, rows: Rows, ids: Sequence[int]) -> np.ndarray:
    """By lm-evaluation-harness, which takes texts and runs a prompt once for all answers of one token."""
    from lm_eval.api.instance import Instance

    prompts, answers = ([llama.tokenizer.decode(each) for each in given] for given in (rows, ids))
    pairs = [Instance("loglikelihood", {}, (prompt, answer), 0) for prompt in prompts for answer in answers]
    found = harness.loglikelihood(pairs, disable_tqdm=True)
    return np.array([value for value, _ in found]).reshape(len(rows), len(ids))


def served(server: object, _: Llama, rows: Rows, ids: Sequence[int]) -> np.ndarray:
    """By llama.cpp's server, which lists the 100 most probable tokens; -inf where an answer is not among them."""

    def ask(row: Sequence[int]) -> list[float]:
        body = json.dumps({"prompt": row, "n_predict": 1, "n_probs": 100, "temperature": 0}).encode()
        request = urllib.request.Request(f"{server.listening_address}/completion", body)
        with urllib.request.urlopen(request, timeout=600) as reply:
            (token,) = json.load(reply)["completion_probabilities"]
        listed = {other["id"]: other["logprob"] for other in token["top_logprobs"]}
        return [listed.get(i, -math.inf) for i in ids]

    with ThreadPoolExecutor(REQUESTS) as pool:
        return np.array([*pool.map(ask, rows)])


def llama_cpp_server(gguf: Path) -> object:
    """llama.cpp's own server in this process, as many threads as torch has."""
    import torch
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.verbosity = str(gguf), -1
    parameters.hostnames, parameters.port, parameters.n_parallel = ["127.0.0.1"], 0, REQUESTS
    parameters.n_ctx = 2048 * REQUESTS  # which they share
    parameters.cache_ram_mib = 0  # or it would know the texts of the round before
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        return xllamacpp.Server(parameters)
    except RuntimeError:
        raise ValueError(f"--gguf {gguf}: llama.cpp cannot load it; see whether it is a GGUF file") from None


def installed_ways(llama: Llama, gguf: Path | None) -> dict[str, Callable]:
    """The ways of packages that need not be there; on each that is not, a note."""
    ways = {}
    try:
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(pretrained=llama.model, tokenizer=llama.tokenizer, batch_size=PLAIN_BATCH)
        ways[f"lm-evaluation-harness, batches of {PLAIN_BATCH}"] = partial(log_likelihoods, harness)
    except ImportError:
        print("note: no lm-evaluation-harness; `pip install lm-eval==0.4.13` adds it", file=sys.stderr)
    try:
        if gguf:
            ways[f"llama.cpp's server, {gguf.stem.rpartition('.')[2]:.20}"] = partial(served, llama_cpp_server(gguf))
    except ImportError:
        print("note: no llama.cpp; `pip install -r tests/requirements-servers.txt` adds it", file=sys.stderr)
    return ways


def ours(llama: Llama, rows: Rows, ids: Sequence[int]) -> np.ndarray:
    return whole_answers(llama, rows, [[i] for i in ids])


def whole_answers(llama: Llama, rows: Rows, answers: Rows) -> np.ndarray:
    llama.forget_prefix()  # the shared prefix belongs to the time
    return llama.answer_log_probs(rows, answers)


def padded_twin(llama: Llama) -> Llama:
    """The same model as families run that cannot be packed."""
    return replace(llama, packs=False, shares_prefix=None)


def compare_scoring(
    llama: Llama, task: tasks.Task, examples: Sequence[Example], source: str, rounds: int, gguf: Path | None = None
) -> None:
    """Time the ways in turn, round after round, and print rates and differences."""
    scorer = label_scorer(llama, task)
    rows = [llama.encode(scorer.prompt, example.text) for example in examples]
    ids = [answer.ids[0] for answer in scorer.answers]
    ways = {
        "one generate call a text (the article's way)": generate_each,
        f"plain batches of {PLAIN_BATCH}": plain_batches,
        **installed_ways(llama, gguf),
        "padded behind a shared cache": lambda _, *given: ours(padded, *given),
        "ours": ours,
    }
    padded = padded_twin(llama)
    for way in ways.values():
        way(llama, rows[:4], ids)  # warm up
    timed_ways = {name: partial(way, llama, rows, ids) for name, way in ways.items()}
    results, seconds = in_turn(timed_ways, rounds, llama.device)
    own = print_head(llama, rows, "text", source, rounds)
    print_rates(results, seconds, len(rows))
    print_limit(llama, own, len(rows), median(seconds["ours"]))


def in_turn(ways: Mapping[str, Callable], rounds: int, device: str) -> tuple[dict[str, object], dict[str, list[float]]]:
    """What each way found, and its seconds [rounds], the ways timed one after the other in every round."""
    results, seconds = {}, {name: [] for name in ways}
    for turn in range(1, rounds + 1):
        for name, way in ways.items():
            results[name], elapsed = timed(way, device)
            seconds[name].append(elapsed)
            print(f"round {turn}: {name}: {elapsed:.1f} s", file=sys.stderr)
    return results, seconds


def print_rates(results: Mapping[str, np.ndarray], seconds: Mapping[str, Sequence[float]], rows: int) -> None:
    """Rates, ratios to the first way, and how far its probabilities are from the others'."""
    reference = np.exp(next(iter(results.values())))
    print(f"{'':46}{'rows/s':>8}{'ratio':>8}   largest difference in probability")
    for name, rate, ratio in rates(seconds, rows):
        print(f"{name:46}{rate:8.2f}{ratio:8.2f}   {np.abs(np.exp(results[name]) - reference).max():.1e}")


def compare_whole_answers(llama: Llama, examples: Sequence[Example], rounds: int) -> None:
    """Time whole answers of several numbers of labels, padded and packed, on few rows; print a table for each."""
    padded = padded_twin(llama)
    for count in LABEL_COUNTS:
        scorer = label_scorer(llama, task_of_beginnings(examples, count))
        rows = [scorer.encode(example.text)[0] for example in examples[: max(4, 64 // count)]]
        answers = [answer.ids for answer in scorer.answers]
        for each in (llama, padded):
            whole_answers(each, rows[:1] * 2, answers[:4])  # warm up
        ways = {
            "padded behind a shared cache": partial(whole_answers, padded, rows, answers),
            "ours": partial(whole_answers, llama, rows, answers),
        }
        results, seconds = in_turn(ways, rounds, llama.device)
        tokens = sum(map(len, answers))
        print(
            f"\n{count} labels, {len(answers)} answers of {tokens} tokens, {len(rows)} rows, median of {rounds} rounds"
        )
        print_rates(results, seconds, len(rows))


def task_of_beginnings(examples: Sequence[Example], count: int) -> tasks.Task:
    """A task whose labels are the first three words of texts, in lower case; ValueError if too few differ."""
    words = (" ".join(example.text.lower().replace(",", "").split()[:3]) for example in examples)
    beginnings = list(dict.fromkeys(words))[:count]
    if len(beginnings) < count:
        raise ValueError(f"{count} labels need as many texts that begin differently: there are {len(beginnings)}")
    labels = {f"label {number}": (beginning,) for number, beginning in enumerate(beginnings)}
    return tasks.Task("beginnings", labels, "Text: {text}\nIt begins:", scoring="sequence")


def print_growth(model: str, examples: Sequence[Example], counts: Sequence[int]) -> None:
    """Time and peak memory of the whole command on tables of so many rows."""
    print(f"{'rows':>8}{'seconds':>10}{'rows/s':>8}{'peak memory':>14}")
    for count in counts:
        with TemporaryDirectory() as folder:
            source = Path(folder) / "rows.csv"
            with open(source, "w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "text"])
                writer.writerows([n, f"{examples[n % len(examples)].text} ({n})"] for n in range(count))
            options = ["--input", source, "--output", Path(folder) / "rows.jsonl", "--model", model]
            seconds, peak = measured_command(options)
        print(f"{count:8,}{seconds:10.1f}{count / seconds:8.1f}{peak / 1e9:11.2f} GB", flush=True)


# Fine-tuning: both train a fresh adapter for one epoch


def take_steps(run: training.TrainingRun) -> None:
    while run.step < run.steps:
        training.take_step(run)


def trainer_for(run: training.TrainingRun, folder: Path) -> object:
    """transformers' Trainer on the run's model and rows; the answer is the label's own token, all else is masked."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Trainer, TrainingArguments

    scorer, settings = run.scorer, run.settings
    first = [next(a.ids[0] for a in scorer.answers if a.label == label) for label in scorer.task.labels]
    answers = [first[target] for target in run.training.targets]

    def collate(batch: list[tuple[list[int], int]]) -> dict:
        whole = [torch.tensor([*row, answer]) for row, answer in batch]
        masked = [torch.tensor([*[-100] * len(row), answer]) for row, answer in batch]
        return {
            "input_ids": pad_sequence(whole, batch_first=True),
            "labels": pad_sequence(masked, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in whole], batch_first=True),
        }

    options = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=TRAINER_BATCH,
        gradient_accumulation_steps=PLAIN_BATCH // TRAINER_BATCH,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        use_cpu=scorer.llama.device == "cpu",
        bf16=scorer.llama.identity["precision"] == "bfloat16",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        seed=settings.seed,
        remove_unused_columns=False,
    )
    data = list(zip(run.training.prompts, answers, strict=True))
    return Trainer(model=scorer.llama.model, args=options, train_dataset=data, data_collator=collate)


def compare_training(llama: Llama, task: tasks.Task, rows: training.LabelledRows, rounds: int, ours_only: bool) -> None:
    """Time an epoch of Trainer and of ours in turn, round after round, and print rates."""
    settings = training.TrainingSettings(epochs=1, batch_size=PLAIN_BATCH)
    names = ["padded behind a shared cache", "ours"]
    seconds = {name: [] for name in (names if ours_only else ["Hugging Face's Trainer", *names])}
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        for turn in range(rounds + 1):  # the first warms up
            for name, of_rounds in seconds.items():
                trained = padded_twin(llama) if name == names[0] else llama
                run = training.begin_training(trained, task, rows, rows, Path(folder), settings)
                epoch = partial(take_steps, run) if name in names else trainer_for(run, Path(folder)).train
                _, elapsed = timed(epoch, llama.device)
                llama.model = trained.model.unload().requires_grad_(False)
                if turn:
                    of_rounds.append(elapsed)
                    print(f"round {turn}: {name}: {elapsed:.1f} s")
    prompts = run.training.prompts
    own = print_head(llama, prompts, "row", rows.source, rounds)
    for name, rate, ratio in rates(seconds, len(prompts)):
        print(f"{name:46}{rate:8.2f} rows/s{ratio:8.2f}")
    # Forward, and backward to the activations: the weights that are not trained need no gradient.
    shared = math.ceil(len(prompts) / PLAIN_BATCH) * shared_tokens(llama, prompts)
    print_limit(llama, 2 * (own + shared), 2 * len(prompts), median(seconds["ours"]))


# Measuring


def timed(function: Callable[[], object], device: str) -> tuple[object, float]:
    """What a call returns and its seconds, the device's queue drained before and after."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else torch.mps.synchronize if device == "mps" else lambda: None
    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return result, time.perf_counter() - start


def rates(seconds: Mapping[str, Sequence[float]], rows: int) -> list[tuple[str, float, float]]:
    """(name of a way, rows a second, ratio to the first way), of the medians of their rounds."""
    slowest = median(next(iter(seconds.values())))
    return [(name, rows / median(of_rounds), slowest / median(of_rounds)) for name, of_rounds in seconds.items()]


def shared_tokens(llama: Llama, rows: Rows) -> int:
    """How many tokens all rows begin with."""
    with llama.evaluating():
        return len(llama.shared_prefix(rows)[0])


def body_layers(llama: Llama) -> list[object]:
    """The linear layers through which every token goes."""
    import torch

    modules = llama.model.named_modules()
    return [m for name, m in modules if isinstance(m, torch.nn.Linear) and not name.endswith("lm_head")]


def matrix_multiply_rate(llama: Llama) -> float:
    """FLOP/s of this machine on the layer shapes of the model, at our batch size; the best of five timings."""
    import torch

    tokens = TOKENS_PER_BATCH[llama.device]
    shapes = [tuple(layer.weight.shape) for layer in body_layers(llama)]
    make = {"device": llama.model.device, "dtype": llama.model.dtype}
    inputs = {k: torch.randn(tokens, k, **make) for _, k in shapes}
    weights = {shape: torch.randn(*shape, **make) for shape in shapes}

    def multiply() -> None:
        for shape in shapes:
            torch.nn.functional.linear(inputs[shape[1]], weights[shape])

    multiply()
    return sum(2 * tokens * n * k for n, k in shapes) / min(timed(multiply, llama.device)[1] for _ in range(5))


def print_head(llama: Llama, rows: Rows, noun: str, source: str, rounds: int) -> int:
    """Say what was timed; returns how many tokens the rows do not share, together."""
    shared = shared_tokens(llama, rows)
    own = sum(map(len, rows)) - shared * len(rows)
    a_step = f", {PLAIN_BATCH} a step" if noun == "row" else ""
    print(f"{llama.name}, {llama.device} {llama.identity['precision']}, {len(rows)} {noun}s of {source}{a_step}")
    print(f"{shared} shared and {own / len(rows):.1f} own tokens a {noun}, median of {rounds} rounds\n")
    return own


def print_limit(llama: Llama, own_tokens: int, rows: int, seconds: float) -> None:
    import torch

    body = sum(layer.weight.numel() for layer in body_layers(llama))
    head = llama.model.get_output_embeddings().weight.numel()
    rate, limit = 2 * (body * own_tokens + head * rows) / seconds, matrix_multiply_rate(llama)
    print(f"\nmatrix multiply: {limit / 1e9:,.0f} GFLOP/s measured here; ours reaches {100 * rate / limit:.0f} % of it")
    if llama.device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def first_answer(model: str, rounds: int) -> tuple[float, float]:
    """(median wall seconds, peak bytes) of the whole command on one text, after a first use."""
    walls, peaks = zip(*(measured_command(["Not bad", "--model", model]) for _ in range(rounds + 1)), strict=True)
    return median(walls[1:]), max(peaks)


def measured_command(options: Sequence[object]) -> tuple[float, float]:
    """(wall seconds, peak bytes) of Method 1, without adapter, in its own process; ChildProcessError if it fails."""
    command = [sys.executable, str(ROOT / "logprobs_confidence.py"), "--adapter", "none", *map(str, options)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ChildProcessError(f"it failed: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def random_llama(shape: str, device: str, dtype: str) -> Llama:
    """A model of a given shape with random weights, made on the device; it reads with the embedded tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    small = load_llama(device=device, dtype=dtype)  # resolves device and dtype, and lends its tokenizer
    settings = SHAPES.get(shape) or json.loads(Path(shape).read_text(encoding="utf-8"))
    config = AutoConfig.for_model(**settings)
    if config.vocab_size < len(small.tokenizer):
        raise ValueError(f"{shape}: vocab_size must be at least {len(small.tokenizer)}, the embedded tokenizer's")
    torch.manual_seed(0)
    with small.model.device:
        model = AutoModelForCausalLM.from_config(config, dtype=small.model.dtype).eval().requires_grad_(False)
    identity = {"weights": "random", "precision": small.identity["precision"]}
    return Llama(model, small.tokenizer, f"random weights, {shape}", small.path, identity)


# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    tasks.add_task_argument(parser)
    add_table_arguments(parser)
    add_arguments(parser)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    shapes = ", ".join(SHAPES)
    add("--random-weights", metavar="CONFIG", help=f"{shapes} or a config.json: that shape, random weights")
    add("--gguf", metavar="FILE", type=Path, help="the model for llama.cpp (default: the default model's own file)")
    add("--many-labels", action="store_true", help="time whole answers (default input: data:test)")
    help_growth = "time and memory of tables of so many rows (default input: data:train)"
    add("--growth", type=command_line.natural, nargs="+", metavar="ROWS", help=help_growth)
    add("--training", action="store_true", help="time fine-tuning (default input: 64 rows of data:train)")
    args = parser.parse_args(argv)
    if args.training and args.input is None:
        args.input, args.limit = "data:train", args.limit or 64
    if args.growth and args.input is None:
        args.input = "data:train"
    if args.many_labels and args.input is None:
        args.input = "data:test"
    args.input = args.input or str(ROOT / "data" / "sample.csv")
    if args.gguf and not args.gguf.is_file():
        parser.error(f"--gguf {args.gguf}: no such file")
    if args.growth and min(args.growth) < 1:
        parser.error("--growth 0: at least 1 row")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    task, table = tasks.read_task(args.task), Table(args.input, column_arguments(args))
    if args.growth:
        print_growth(args.model, list(table), args.growth)
        return
    first = None
    if not args.training and not args.many_labels and not args.random_weights:
        first = first_answer(args.model, args.rounds)  # now, for a child's peak begins at its parent's size
    if args.random_weights:
        llama = random_llama(args.random_weights, args.device, args.dtype)
    else:
        llama = load_llama(**model_arguments(args))  # without a task, auto is no adapter
    if args.training:
        compare_training(llama, task, read_labelled(table, task), args.rounds, ours_only=bool(args.random_weights))
        return
    if args.many_labels:
        compare_whole_answers(llama, list(table), args.rounds)
        return
    is_default = args.model == "default" and not args.random_weights and llama.adapter is None
    gguf = args.gguf or (embedded_model.cache_dir() / embedded_model.GGUF if is_default else None)
    compare_scoring(llama, task, list(table), args.input, args.rounds, gguf)
    if first:
        print(f"first answer of a new process: {first[0]:.1f} s, peak memory {first[1] / 1e9:.2f} GB")


if __name__ == "__main__":
    command_line.run(main)
