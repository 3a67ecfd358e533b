"""What a table costs at a server: how many requests and tokens it will take, and how many it took.

    usage.add(reply)                                     # what the server says that a request took
    print(usage.summary(Prices(0.15, 0.60)))             # "2,000 requests, 181,204 tokens in, 2,000 out, $0.03"
    print(planned(table, how, Prices(0.15, 0.60)))       # the same before anything is sent

Texts that are equal are asked once, so a table costs what its different texts cost.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tables import Example


@dataclass(frozen=True)
class Prices:
    """Dollars that a million tokens cost; None where it was not said."""

    tokens_in: float | None = None
    tokens_out: float | None = None

    def __post_init__(self) -> None:
        for name, price in (("--price-in", self.tokens_in), ("--price-out", self.tokens_out)):
            if price is not None and not 0 <= price < 1e6:
                raise ValueError(f"{name} {price:g}: dollars a million tokens")

    def of(self, tokens_in: float, tokens_out: float) -> float | None:
        """What these tokens cost in dollars; None unless both prices are known."""
        if self.tokens_in is None or self.tokens_out is None:
            return None
        return (tokens_in * self.tokens_in + tokens_out * self.tokens_out) / 1e6


@dataclass
class Usage:
    """What a server said that requests took; `told` of `requests` replies said it."""

    requests: int = 0
    told: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def add(self, reply: Mapping) -> None:
        """Count a reply in OpenAI's or Anthropic's layout."""
        self.requests += 1
        usage = reply.get("usage")
        if not isinstance(usage, Mapping):
            return
        found = [usage.get(names[0], usage.get(names[1])) for names in (TOKENS_IN, TOKENS_OUT)]
        if all(type(count) is int and count >= 0 for count in found):
            self.told += 1
            self.tokens_in += found[0]
            self.tokens_out += found[1]

    def summary(self, prices: Prices) -> str:
        """The sums as one line."""
        line = f"{self.requests:,} requests"
        if not self.told:
            return f"{line}; the server does not say how many tokens they took"
        line += f", {self.tokens_in:,} tokens in, {self.tokens_out:,} out"
        if self.told < self.requests:
            line += f" in the {self.told:,} replies that say so"
        cost = prices.of(self.tokens_in, self.tokens_out)
        return line + ("" if cost is None else f", ${cost:,.2f}")


TOKENS_IN, TOKENS_OUT = ("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")


@dataclass(frozen=True)
class Asking:
    """How a text is asked about: by how many requests, at least and at most, of how many answer tokens at most."""

    requests: tuple[int, int]
    answer_tokens: int
    prompt_tokens: Callable[[str], int] | None = field(default=None, repr=False)  # of all requests / their number


def planned(examples: Iterable[Example], how: Asking, prices: Prices, sample: tuple[int, Usage] | None = None) -> str:
    """What asking about a table takes, as lines; `sample` is of so many texts of it what they took.

    Tokens are counted by `how.prompt_tokens`, else taken from the sample, else not known. Texts that cannot be asked
    about count as rows only.
    """
    rows, hashes, tokens_in = 0, array("q"), 0
    seen: set[int] = set()
    for example in examples:
        rows += 1
        key = text_hash(example.text)
        if key in seen:
            continue
        seen.add(key)
        hashes.append(key)
        if how.prompt_tokens:
            try:
                tokens_in += how.prompt_tokens(example.text)
            except ValueError:  # its row will be an error, and costs nothing
                hashes.pop()
    texts = len(hashes)
    low, high = (texts * count for count in how.requests)
    number = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    lines = [f"{rows:,} rows, {texts:,} different texts: {number} requests, and a few to learn what the server takes"]
    if how.prompt_tokens:
        estimate = [(tokens_in * count, texts * count * how.answer_tokens) for count in how.requests]
        lines += _tokens(estimate, prices, "by the tokenizer; of answers the most that they can have")
    elif sample and sample[1].told:
        asked, usage = sample
        factor = texts / asked
        estimate = [(usage.tokens_in * factor, usage.tokens_out * factor)]
        lines += _tokens(estimate, prices, f"about, by what the server says that {asked:,} texts took")
    elif sample:
        lines.append("tokens: the server does not say what its replies took; --tokenizer MODEL counts them")
    else:
        lines.append(
            "tokens: not known; --tokenizer MODEL counts them, --dry-run N asks about N rows and goes by those"
        )
    return "\n".join(lines)


def _tokens(estimates: Sequence[tuple[float, float]], prices: Prices, how: str) -> Iterator[str]:
    """Tokens and cost as lines, from the least to the most."""
    (low_in, low_out), (high_in, high_out) = estimates[0], estimates[-1]
    shown = [_range(low_in, high_in), _range(low_out, high_out)]
    yield f"tokens: {shown[0]} in, {shown[1]} out ({how})"
    low, high = prices.of(low_in, low_out), prices.of(high_in, high_out)
    if low is None:
        yield "cost: not known; --price-in and --price-out are dollars a million tokens"
    else:
        yield f"cost: {f'${low:,.2f}' if low == high else f'${low:,.2f} to ${high:,.2f}'}"


def _range(low: float, high: float) -> str:
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def text_hash(text: str) -> int:
    """63 bits that tell texts apart."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def drawn_texts(examples: Iterable[Example], count: int, seed: int) -> list[Example]:
    """So many of the rows at random, of different texts."""
    different = {text_hash(example.text): example for example in examples}
    return random.Random(seed).sample(list(different.values()), min(count, len(different)))
