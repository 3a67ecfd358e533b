"""Start here: how a language model's next token becomes a classification with a confidence, in five steps.

    python main.py                       # the embedded model; fetched and converted on first use
    python main.py --model llama         # the same tour with Llama 3.1 8B Instruct

It writes nothing. Each step calls the function that the scripts use on whole tables of texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import combined_confidence as combined
import consistency_confidence as consistency
import logprobs_confidence as logprobs
import predictions
from llama import add_arguments, load_from
from logprobs_confidence import print_answer_sums, print_token_table
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
    parser.set_defaults(adapter="none")  # the tour shows the model as it was published
    args = parser.parse_args(argv)
    task = TASKS["sentiment"]
    llama = load_from(args, task.settings())
    print(f"The model is {llama.name}, on {llama.device} in {llama.identity['precision']}.\n")
    scorer = logprobs.prepare(llama, task)
    sampler = consistency.prepare(llama, task, consistency.Sampling(samples=10))
    asked = [combined.explain(text, scorer, sampler) for text in TEXTS]  # each method's own explanation, and both's
    rows = [row["logprobs"] for row in asked]

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

    print(
        "\n5. Three methods. A model that hides its probabilities can be asked ten times; how far its answers agree is"
    )
    print("   a confidence too (Method 2), and both can be combined (Method 3):\n")
    print_methods(asked)
    print(
        "\n   To one question, agreement is a rough measurement of the probability. It is for models that hide theirs."
    )

    print("\nAll these numbers still have to be held against labels: is 70 % right 70 times in 100? Score some:\n")
    print("   python logprobs_confidence.py --input data/sample.csv --output predictions.jsonl")
    print("   python calibration_demo.py predictions.jsonl")


def print_verdicts(rows: Sequence[dict]) -> None:
    lines = [["text", "prediction", "confidence", "label mass"]]
    for row in rows:
        shares = (f"{100 * row[key]:.1f} %" for key in ("confidence", "label_mass"))
        lines.append([row["text"], row["prediction"], *shares])
    print(predictions.table(lines, "   "))


def print_methods(rows: Sequence[dict]) -> None:
    lines = [["text", "1 first token", "2 ten answers", "3 both"]]
    for row in rows:
        one, two = row["logprobs"], row["consistency"]
        of = (one, one["confidence"]), (two, two["agreement"]), (row, row["confidence"])
        lines.append([row["text"], *(f"{found['prediction']} {100 * share:.0f} %" for found, share in of)])
    print(predictions.table(lines, "   "))


if __name__ == "__main__":
    predictions.run(main)
