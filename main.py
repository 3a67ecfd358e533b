"""Start here: how a language model's next token becomes a classification with a confidence, in four steps.

    python main.py                       # the embedded model; fetched and converted on first use
    python main.py --model llama         # the same tour with Llama 3.1 8B Instruct

It writes nothing. Each step calls the function that the scripts use on whole tables of texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import predictions
from llama import add_arguments, load_from
from logprobs_confidence import explain, prepare, print_answer_sums, print_token_table
from task import TASKS

CLEAR = "I absolutely love this amazing movie!"
TEXTS = (
    CLEAR,
    "This film is terrible and boring",
    "The acting is superb, the story is dull",
    "Not bad",
    "Best worst thing ever",
    "The train leaves at noon",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = predictions.ArgumentParser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    task = TASKS["sentiment"]
    llama = load_from(args, task.settings())
    print(f"The model is {llama.name}, on {llama.device} in {llama.identity['precision']}.\n")
    scorer = prepare(llama, task)
    rows = [explain(text, scorer) for text in TEXTS]

    print("1. The prompt. A language model continues a text, so we write one whose continuation is the answer:\n")
    print("\n".join(f"   | {line}" for line in rows[0]["prompt"].splitlines()))

    print(f"\n2. The next token. Of {len(llama.tokenizer):,} possible ones, the model finds these the most probable:\n")
    print_token_table(rows[0]["top_tokens"], rows=8)

    print("\n3. The sums. A label gets the probability of every token that spells it:\n")
    print_answer_sums(rows[0])

    print(
        "\n4. The prediction is the label with the larger sum, its confidence the share of that sum in the label mass."
    )
    print("   Clear texts get more than mixed ones. The last has no sentiment at all, and yet no 50 %:\n")
    print_verdicts(rows)

    print("\nSo this number still has to be held against labels: is 70 % right 70 times in 100? Score some:\n")
    print("   python logprobs_confidence.py --input data/sample.csv --output predictions.jsonl")


def print_verdicts(rows: Sequence[dict]) -> None:
    print(f"   {'text':42} {'prediction':11} {'confidence':>10}  {'label mass':>10}")
    for row in rows:
        confidence, mass = f"{100 * row['confidence']:.1f} %", f"{100 * row['label_mass']:.1f} %"
        print(f"   {row['text']:42} {row['prediction']:11} {confidence:>10}  {mass:>10}")


if __name__ == "__main__":
    predictions.run(main)
