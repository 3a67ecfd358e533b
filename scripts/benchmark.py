"""How fast Method 1 and fine-tuning run here, beside the usual ways, on the same texts in one run.

    python scripts/benchmark.py                                   # 60 texts of data/sample.csv
    python scripts/benchmark.py --input big.csv --limit 500 --rounds 5
    python scripts/benchmark.py --training                        # fine-tuning, beside Hugging Face's Trainer
    python scripts/benchmark.py --random-weights llama-3.1-8b     # that shape with random weights, on a GPU

The article's way is one `generate` call a text; plain batches are 32 rows at a time, padded, logits at every position.
The three are timed in turn, round after round; a rate is the median of its rounds, a ratio is against the article's
way. The limit is this machine's own matrix-multiply rate, measured on the model's layer shapes at our batch size;
ours is counted on the tokens that no two texts share, attention left out. It prints a table and writes nothing.

--training times whole epochs on the first rows of data:train: transformers' Trainer on padded whole prompts with every
label but the answer's masked, and fine_tune_model.py's steps; the same LoRA, optimizer, rows a step and precision.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import predictions  # noqa: E402
import task as tasks  # noqa: E402
from llama import TOKENS_PER_BATCH, Llama, add_arguments, load_llama, model_arguments  # noqa: E402
from logprobs_confidence import prepare  # noqa: E402

PLAIN_BATCH = 32
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


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    task = tasks.read_task(args.task)
    if args.training:
        compare_training(args, task)
        return
    first = None if args.random_weights else first_answer(args)  # now, for a child's peak begins at its parent's size
    texts = [example.text for example in tasks.examples_from(args)]
    llama = random_llama(args) if args.random_weights else load_from(args)
    scorer = prepare(llama, task)
    rows = [llama.encode(scorer.frame, text) for text in texts]
    ids = [answer.ids[0] for answer in scorer.answers]
    ways = {
        "one generate call a text (the article's way)": generate_each,
        f"plain batches of {PLAIN_BATCH}": plain_batches,
        "ours": ours,
    }
    results, seconds = {}, {name: [] for name in ways}
    for way in ways.values():
        way(llama, rows[:4], ids)  # warm up
    for turn in range(args.rounds):
        for name, way in ways.items():
            results[name], elapsed = timed(lambda way=way: way(llama, rows, ids), llama.device)
            seconds[name].append(elapsed)
            print(f"round {turn + 1}: {name}: {elapsed:.1f} s", file=sys.stderr)

    prefix, _ = llama._shared_prefix(rows)
    own = sum(map(len, rows)) - len(prefix) * len(rows)
    print(f"{llama.name}, {llama.device} {llama.identity['precision']}, {len(rows)} texts of {args.input}")
    print(f"{len(prefix)} shared and {own / len(rows):.1f} own tokens a text, median of {args.rounds} rounds\n")
    print_rates(results, {name: median(s) for name, s in seconds.items()})
    print_limit(llama, own, len(rows), median(seconds["ours"]))
    if llama.device == "cuda":
        import torch

        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if first:
        print(f"first answer of a new process: {first[0]:.1f} s, peak memory {first[1] / 1e9:.2f} GB")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    tasks.add_arguments(parser)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument(
        "--random-weights", metavar="CONFIG", help="llama-3.1-8b or a config.json: that shape, random weights"
    )
    parser.add_argument(
        "--training", action="store_true", help="time fine-tuning (default input: 64 rows of data:train)"
    )
    args = parser.parse_args(argv)
    if args.training and args.input is None:
        args.input, args.limit = "data:train", args.limit or 64
    args.input = args.input or str(ROOT / "data" / "sample.csv")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1")
    return args


def random_llama(args: argparse.Namespace) -> Llama:
    """A model of a given shape with random weights, made on the device; it reads with the embedded tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    small = load_llama(device=args.device, dtype=args.dtype)  # resolves device and dtype, and lends its tokenizer
    given = args.random_weights
    settings = LLAMA_31_8B if given == "llama-3.1-8b" else json.loads(Path(given).read_text(encoding="utf-8"))
    config = AutoConfig.for_model(**settings)
    if config.vocab_size < len(small.tokenizer):
        raise ValueError(f"{given}: vocab_size must be at least {len(small.tokenizer)}, the embedded tokenizer's")
    torch.manual_seed(0)
    with small.model.device:
        model = AutoModelForCausalLM.from_config(config, dtype=small.model.dtype).eval().requires_grad_(False)
    identity = {"weights": "random", "precision": small.identity["precision"]}
    return Llama(model, small.tokenizer, f"random weights, {given}", small.path, identity)


# The three ways: rows of token ids -> log-probabilities of the answer ids, [rows, answers]


def generate_each(llama: Llama, rows: Sequence[Sequence[int]], ids: Sequence[int]) -> np.ndarray:
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


def plain_batches(llama: Llama, rows: Sequence[Sequence[int]], ids: Sequence[int]) -> np.ndarray:
    import torch

    out = []
    with torch.inference_mode():
        for start in range(0, len(rows), PLAIN_BATCH):
            batch = rows[start : start + PLAIN_BATCH]
            width = max(map(len, batch))
            inputs = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=llama.model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=inputs.device)
            logits = llama.model(input_ids=inputs, attention_mask=mask).logits
            last = logits[torch.arange(len(batch)), mask.sum(1) - 1].double()
            out.append(last.log_softmax(-1)[:, ids].cpu().numpy())
    return np.concatenate(out)


def ours(llama: Llama, rows: Sequence[Sequence[int]], ids: Sequence[int]) -> np.ndarray:
    llama.forget_prefix()  # the shared prefix belongs to the time
    return llama.answer_log_probs(rows, [[i] for i in ids])


# Fine-tuning: both train a fresh adapter for one epoch


def compare_training(args: argparse.Namespace, task: tasks.Task) -> None:
    """Time an epoch of Trainer and of ours in turn, round after round."""
    import torch

    import fine_tune_model as tuning

    llama = random_llama(args) if args.random_weights else load_from(args)
    options = ["--epochs", "1", "--batch-size", str(PLAIN_BATCH), "--device", args.device]
    ways = {"Hugging Face's Trainer": with_trainer, "ours": with_our_steps}
    if args.random_weights:
        del ways["Hugging Face's Trainer"]  # which does not fit whole prompts of that shape
    seconds = {name: [] for name in ways}
    with TemporaryDirectory() as folder:
        settings = tuning.parse_arguments([*options, "--output-dir", str(Path(folder) / "adapter")])
        student = tuning.study(llama, task)
        table = tuning.read_table(student, tuning.read_labelled(args, task, args.input), args.input)
        for turn in range(args.rounds + 1):  # the first warms up
            for name, way in ways.items():
                tuning.add_adapter(llama, settings)
                elapsed = way(student, table, settings, Path(folder))
                llama.model = llama.model.unload().requires_grad_(False)
                if turn:
                    seconds[name].append(elapsed)
                    print(f"round {turn}: {name}: {elapsed:.1f} s", file=sys.stderr)
    rows, steps = len(table.rows), math.ceil(len(table.rows) / PLAIN_BATCH)
    prefix, _ = llama._shared_prefix(table.rows)
    own = sum(map(len, table.rows)) - len(prefix) * rows
    print(
        f"{llama.name}, {llama.device} {llama.identity['precision']}, {rows} rows of {args.input}, {PLAIN_BATCH} a step"
    )
    print(f"{len(prefix)} shared and {own / rows:.1f} own tokens a row, median of {args.rounds} rounds\n")
    slowest = median(next(iter(seconds.values())))
    for name, measured in seconds.items():
        print(f"{name:46}{rows / median(measured):8.2f} rows/s{slowest / median(measured):8.2f}")
    # Forward, and backward to the activations: the weights that are not trained need no gradient.
    print_limit(llama, 2 * (own + steps * len(prefix)), 2 * rows, median(seconds["ours"]))
    if llama.device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def with_our_steps(student: object, table: object, settings: argparse.Namespace, folder: Path) -> float:
    """Seconds of an epoch of fine_tune_model.py's steps."""
    import accelerate

    import fine_tune_model as tuning

    run = tuning.prepare(student, table, table, settings, accelerate.PartialState(cpu=student.llama.device == "cpu"))

    def epoch() -> None:
        while run.step < run.steps:
            run.step += 1
            tuning.take_step(run, False)

    return timed(epoch, student.llama.device)[1]


def with_trainer(student: object, table: object, settings: argparse.Namespace, folder: Path) -> float:
    """Seconds of an epoch of transformers' Trainer; the answer is the label's own token, all else is masked."""
    import torch
    from transformers import Trainer, TrainingArguments

    first = {label: next(a.ids[0] for a in student.answers if a.label == label) for label in student.task.labels}
    answers = [first[label] for label in np.array(list(student.task.labels))[table.targets]]
    data = [(row, answer) for row, answer in zip(table.rows, answers, strict=True)]

    def collate(batch: list[tuple]) -> dict:
        width = max(len(row) for row, _ in batch) + 1
        ids = [[*row, answer, *[0] * (width - len(row) - 1)] for row, answer in batch]
        labels = [[*[-100] * len(row), answer, *[-100] * (width - len(row) - 1)] for row, answer in batch]
        mask = [[1] * (len(row) + 1) + [0] * (width - len(row) - 1) for row, _ in batch]
        return {k: torch.tensor(v) for k, v in (("input_ids", ids), ("labels", labels), ("attention_mask", mask))}

    options = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=TRAINER_BATCH,
        gradient_accumulation_steps=PLAIN_BATCH // TRAINER_BATCH,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        use_cpu=student.llama.device == "cpu",
        bf16=student.llama.identity["precision"] == "bfloat16",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        seed=settings.seed,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=student.llama.model, args=options, train_dataset=data, data_collator=collate)
    with redirect_stdout(sys.stderr):
        return timed(trainer.train, student.llama.device)[1]


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


def matrix_multiply_rate(llama: Llama) -> float:
    """FLOP/s of this machine on the layer shapes of the model, at our batch size; the best of five timings."""
    import torch

    model, tokens = llama.model, TOKENS_PER_BATCH[llama.device]
    shapes = [tuple(m.weight.shape) for name, m in model.named_modules() if is_body_layer(name, m)]
    make = {"device": model.device, "dtype": model.dtype}
    inputs = {k: torch.randn(tokens, k, **make) for _, k in shapes}
    weights = {shape: torch.randn(*shape, **make) for shape in shapes}

    def multiply() -> None:
        for shape in shapes:
            torch.nn.functional.linear(inputs[shape[1]], weights[shape])

    multiply()
    return sum(2 * tokens * n * k for n, k in shapes) / min(timed(multiply, llama.device)[1] for _ in range(5))


def is_body_layer(name: str, module: object) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")


def print_rates(results: dict[str, np.ndarray], seconds: dict[str, float]) -> None:
    names = list(results)
    reference, slowest = np.exp(results[names[0]]), seconds[names[0]]
    print(f"{'':46}{'rows/s':>8}{'ratio':>8}   largest difference in probability")
    for name in names:
        difference = np.abs(np.exp(results[name]) - reference).max()
        rate = len(reference) / seconds[name]
        print(f"{name:46}{rate:8.1f}{slowest / seconds[name]:8.2f}   {difference:.1e}")


def print_limit(llama: Llama, own_tokens: int, rows: int, seconds: float) -> None:
    body = sum(m.weight.numel() for name, m in llama.model.named_modules() if is_body_layer(name, m))
    head = llama.model.get_output_embeddings().weight.numel()
    rate, limit = 2 * (body * own_tokens + head * rows) / seconds, matrix_multiply_rate(llama)
    print(f"\nmatrix multiply: {limit / 1e9:,.0f} GFLOP/s measured here; ours reaches {100 * rate / limit:.0f} % of it")


def first_answer(args: argparse.Namespace) -> tuple[float, float]:
    """(median wall seconds, peak bytes) of the whole command on one text, after a first use."""
    command = [sys.executable, str(ROOT / "logprobs_confidence.py"), "Not bad", "--model", args.model]
    walls, peaks = [], []
    for _ in range(args.rounds + 1):
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, _, usage = os.wait4(process.pid, 0)
        walls.append(time.perf_counter() - start)
        peaks.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return median(walls[1:]), max(peaks)


if __name__ == "__main__":
    command_line.run(main)
