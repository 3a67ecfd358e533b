"""Search a better prompt for a task on labelled rows: examples, their order, templates, answer words; then confirm it.

    python scripts/improve_task.py --draft labelled.csv --output draft.toml
    python scripts/improve_task.py --task draft.toml --input labelled.csv --output better.toml --minutes 10

The first writes a task from nothing but the table's labels. The second tries what a person would try, on the model of
--model: 0, 1 or 2 examples a label, the draft's template, its paraphrases and common patterns, labels' names and the
model's own words as answers. Two thirds of the labelled rows choose, by log loss; a third chooses nothing and says at
the end whether the winner is better than the draft. If it is not, the draft is written unchanged.

Every trial is kept in better.trials.jsonl: the same command continues a run that was killed, and with more --minutes or
--trials it goes on searching. Rows and examples stay on this machine; the examples of the winner stand in better.toml.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import llama as loader  # noqa: E402
import predictions  # noqa: E402
import tables  # noqa: E402
import task_candidates  # noqa: E402
import task_search  # noqa: E402
from command_line import natural, printable  # noqa: E402
from files import write_text  # noqa: E402
from llama import Llama  # noqa: E402
from logprobs_confidence import check_answers, label_scorer  # noqa: E402
from tables import Example  # noqa: E402
from task import Task, check_examples, read_task, to_toml  # noqa: E402
from task_candidates import Candidate  # noqa: E402
from task_search import Budget, Confirmation, Ranked, Score, Trials  # noqa: E402

SHOWN = 10  # candidates in the table


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--task", help="the draft: a task's name or a TOML file (default: a first task from the table's labels)")
    add("--output", metavar="FILE", help="the task file to write (.toml)")
    add("--draft", metavar="TABLE", help="only write a first task from this labelled table, to --output or the screen")
    add("--minutes", type=float, default=5.0, metavar="M", help="of the model's time (default: %(default)g)")
    add("--trials", type=natural, default=60, metavar="N", help="the most candidates to try (default: %(default)s)")
    add(
        "--floor",
        type=float,
        default=0.2,
        metavar="MASS",
        help="a candidate whose mean label mass is below this ranks behind all others (default: %(default)s)",
    )
    add("--debias", choices=["batch"], help="judge the best after batch calibration too; for balanced labels only")
    add("--overwrite", action="store_true", help="replace an output that another search, or a person, has made")
    tables.add_table_arguments(parser)
    loader.add_arguments(parser)
    parser.set_defaults(adapter="none")  # one trained for a task is the wrong judge of its other wordings
    args = parser.parse_args(argv)
    if bool(args.draft) == bool(args.input):
        parser.error("give either a draft and labelled rows (--input FILE --output FILE), or --draft TABLE")
    if args.input and not args.output:
        parser.error("--input and --output go together")
    if args.output and not args.output.endswith(".toml"):
        parser.error(f"--output {args.output}: a task file ends in .toml")
    if not args.minutes > 0 or not 0 <= args.floor < 1 or args.trials < 2:
        parser.error("--minutes is above 0, --floor a label mass below 1, --trials at least 2")
    return args


# A first task


def draft_from_table(table: tables.Table, label_column: str | None, tokenizer: object) -> Task:
    """A first task from a table's labels, named like its file, the labels' noun like their column."""
    name = Path(table.source.removeprefix("hf:").removeprefix("data:")).name.partition(".")[0] or "task"
    noun = (label_column or "").replace("_", " ").strip()
    if not noun or noun.isdecimal() or noun.casefold() in ("label", "labels", "class", "target", "y"):
        noun = "Category"
    return task_candidates.first_task(name, table, noun[:1].upper() + noun[1:], tokenizer)


# The model, asked


def evaluate(llama: Llama, task: Task, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [rows, labels] and label masses [rows]; ValueError where a row or the task does not work."""
    rows = label_scorer(llama, task).score_together(examples)
    for row in rows:
        if row.error is not None:
            raise ValueError(f"row {row.id!r}: {row.error}")
    return np.array([[*row.probabilities.values()] for row in rows]), np.array([row.label_mass for row in rows])


def words_of_model(llama: Llama, task: Task, rows: task_search.Rows) -> dict[str, list[str]]:
    """For each label the words that the model says more in its rows than in others', asked as the task asks."""
    prompt, special = llama.task_prompt(task), set(llama.tokenizer.all_special_ids)
    texts = {i: llama.tokenizer.decode([i]) for i in range(len(llama.tokenizer)) if i not in special}
    texts = {i: text for i, text in texts.items() if text.strip().isalpha()}
    ids = [llama.encode_within(prompt, example.text)[0] for example in rows.examples]
    mass = np.exp(llama.answer_log_probs(ids, [[i] for i in texts]))
    words = task_candidates.distinct_words(mass, list(texts.values()), rows.truth, len(task.labels))
    return dict(zip(task.labels, words, strict=True))


def readable_rows(llama: Llama, task: Task, examples: Sequence[Example]) -> list[Example]:
    """The labelled rows that the draft can be asked about; how many are left out is said."""
    scorer, kept = label_scorer(llama, task), []
    for example in examples:
        with suppress(ValueError):
            scorer.encode(example.text)
            kept.append(example)
    if len(kept) < len(examples):
        left = len(examples) - len(kept)
        print(f"note: {left:,} rows left out, empty or too long for the model", file=sys.stderr)
    return kept


# The search


def improve(
    llama: Llama, draft: Task, examples: Sequence[Example], log: Path, budget: Budget, seed: int, with_debias: bool
) -> tuple[list[Ranked], Confirmation, Trials]:
    """The candidates, best first, and what the rows that chose nothing say of the best; continued from its log."""
    parts = task_search.split_rows(readable_rows(llama, draft, examples), draft, seed)
    pool, own = parts["examples"].examples, Candidate(draft, "the draft")
    table = hashlib.sha256(repr([(example.text, example.label) for example in examples]).encode(errors="replace"))
    header = {"format": task_search.FORMAT, "table": table.hexdigest()[:16], "draft": draft.settings(), "seed": seed}
    with predictions.open_output(log) as file:
        trials = Trials(parts, partial(evaluate, llama), file, header | {"model": llama.identity})
        last = 2 * len(parts["held out"])  # rows that the end needs, in time that the search must leave

        def tell(candidate: Candidate, n: int, score: Score | None) -> None:
            result = "does not work"
            if score:
                result = f"log loss {score.log_loss:.3f}, label mass {score.label_mass:.2f}"
            print(f"{trials.seconds:4.0f} s  {n:4} rows  {result}  {candidate.what}", file=sys.stderr)

        def words(task: Task) -> dict[str, list[str]]:
            name = f"words {Candidate(task, '').key}"
            return trials.remember(name, lambda: words_of_model(llama, task, parts["examples"]))

        def vary(best: Sequence[Candidate]) -> Iterator[Candidate]:
            doubt = -np.abs(trials.margins(own, "examples"))
            return task_candidates.variations(best, pool, doubt.tolist(), words, seed, with_debias)

        first_score = trials.score(own, "search", task_search.FIRST_ROWS)
        reserved = min(last * first_score.seconds_per_row, budget.seconds / 2) if first_score else 0.0
        for_search = Budget(budget.trials, budget.seconds - reserved, budget.floor)
        first = task_candidates.first_candidates(draft, pool, seed)
        ranked = task_search.search(trials, own, first, vary, for_search, tell)
        return ranked, task_search.confirm(trials, own, ranked[0].candidate, budget.floor), trials


# What is said and written


def candidates_table(ranked: Sequence[Ranked], groups: np.ndarray) -> str:
    """The best candidates and the draft, on the rows that chose them."""
    draft = next(one for one in ranked if one.candidate.what == "the draft")
    rows = [
        ["on rows that chose (so too good)", "rows", "log loss", "minus the draft's", "accuracy", "label mass", "ms"]
    ]
    for one in [*ranked[:SHOWN], *([draft] if draft not in ranked[:SHOWN] else [])]:
        score, apart = one.score, "-"
        if one is not draft:
            value, low, high = task_search.difference(score, draft.score, groups)
            apart = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        cells = [f"{score.log_loss:.3f}", apart, f"{score.accuracy:.3f}", f"{score.label_mass:.2f}"]
        rows.append([f"  {one.candidate.what}", str(one.rows), *cells, f"{1000 * score.seconds_per_row:.0f}"])
    return command_line.columns(rows)


def confirmation_table(found: Confirmation) -> str:
    """Draft and winner on the rows that chose nothing, beside answers without a model."""
    rows = [[f"on {found.n} rows that chose nothing", "log loss", "accuracy", "label mass"]]
    for name, score in (("draft", found.draft), ("winner", found.winner)):
        rows.append([f"  {name}", f"{score.log_loss:.3f}", f"{score.accuracy:.3f}", f"{score.label_mass:.2f}"])
    without = [f"{found.shares_log_loss:.3f}", f"{found.commonest_accuracy:.3f}", "-"]
    return command_line.columns([*rows, [f"  always {found.commonest}, as often as it is", *without]])


def task_file(ranked: Sequence[Ranked], found: Confirmation, draft: Task, source: str | None, floor: float) -> str:
    """The content of the task file: the winner with what is known of it, or the draft as it is."""
    if not found.is_taken:
        is_file = source is not None and source.endswith(".toml")
        return Path(source).read_text(encoding="utf-8-sig") if is_file else to_toml(draft)
    winner = ranked[0].candidate
    comment = f"# {winner.what}\n# {found.verdict(floor)}\n"
    if winner.debias:
        comment += "# to be scored with --debias batch\n"
    return comment + to_toml(winner.task)


def check_output(output: Path, log: Path, sources: Sequence[str | None], overwrite: bool) -> None:
    """Refuse to write over what no search has made."""
    for source in sources:
        predictions.check_output(output, source)
    predictions.check_output(log)
    if output.exists() and not log.exists() and not overwrite:
        raise ValueError(f"{output} is there already, and not by a search; use --overwrite to replace it")


def write_first_task(
    table: tables.Table, label_column: str | None, model: str, output: str | None, overwrite: bool
) -> None:
    """Write a first task to a file, or show it."""
    content = to_toml(draft_from_table(table, label_column, loader.load_reader(model).tokenizer))
    if output is None:
        print(content, end="")
        return
    if Path(output).exists() and not overwrite:
        raise ValueError(f"{output} is there already; use --overwrite to replace it")
    predictions.check_output(output, table.source)
    write_text(output, content)
    print(f"{printable(output)}: a first task; read it, then search a better one with --task {printable(output)}")


def print_outcome(ranked: Sequence[Ranked], found: Confirmation, trials: Trials, output: Path, floor: float) -> None:
    """What was found, the verdict first."""
    print(f"{found.verdict(floor)}\n{found.worth()}")
    least = min(ranked, key=lambda one: one.score.log_loss)
    if least.score.label_mass < floor and least is not ranked[0]:
        print(
            f"note: {least.candidate.what!r} has a log loss of {least.score.log_loss:.3f} on {least.rows} rows that "
            f"chose, but a label mass of {least.score.label_mass:.2f}; --floor 0 lets it win"
        )
    print()
    print(confirmation_table(found), candidates_table(ranked, trials.parts["search"].groups), sep="\n\n")
    kept = ranked[0].candidate.what if found.is_taken else "the draft, unchanged"
    debias = "; score with --debias batch" if found.is_taken and ranked[0].candidate.debias else ""
    minutes = f"{len(ranked)} candidates in {trials.seconds / 60:.1f} minutes of the model's time"
    print(f"\n{printable(str(output))}: {kept}{debias} ({minutes}, kept in {printable(trials.file.name)})")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    columns = tables.column_arguments(args)
    if args.draft:
        table = tables.open_table(args.draft, **columns)
        write_first_task(table, args.label_column, args.model, args.output, args.overwrite)
        return
    output = Path(args.output)
    log = output.with_suffix(".trials.jsonl")
    check_output(output, log, [args.input, args.task], args.overwrite)
    if args.task:
        draft = read_task(args.task)
        table = tables.open_table(args.input, **columns, text_template=draft.text_template)
    else:
        table = tables.open_table(args.input, **columns)
        draft = draft_from_table(table, args.label_column, loader.load_reader(args.model).tokenizer)
    check_examples(table, draft, args.input)
    examples = [example for example in table if example.label is not None]
    llama = loader.load_llama(
        **loader.model_arguments(args), task=draft.settings(), check=partial(check_answers, draft)
    )
    if args.overwrite:
        log.unlink(missing_ok=True)
    budget = Budget(args.trials, 60 * args.minutes, args.floor)
    ranked, found, trials = improve(llama, draft, examples, log, budget, args.seed, args.debias is not None)
    write_text(output, task_file(ranked, found, draft, args.task, args.floor))
    print_outcome(ranked, found, trials, output, args.floor)


if __name__ == "__main__":
    command_line.run(main, resumes=True)
