"""The prompt around a text, rendered once: its place marked by SLOT, a chat's by the model's own template."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from command_line import one_line

SLOT = "\N{OBJECT REPLACEMENT CHARACTER}text\N{OBJECT REPLACEMENT CHARACTER}"  # stands where a text goes in a prompt


# A chat template that writes today's date would make another prompt, and another score, every day. This is the day that
# Llama 3.1's template names where it knows no other, put in the place of the function that says what day it is.
DATE_PARTS = {"%d": "26", "%m": "07", "%Y": "2024", "%y": "24", "%b": "Jul", "%B": "July", "%a": "Fri", "%A": "Friday"}
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace({part!r}, {value!r})" for part, value in DATE_PARTS.items())
    + " }}{%- endmacro -%}"
)
TEMPLATE_SECONDS = 20.0
ORDINARY = (TypeError, ValueError, AttributeError, RecursionError, MemoryError)  # what a template's program may raise


@dataclass(frozen=True)
class RenderedPrompt:
    """A rendered prompt around the place of its text; `start` are the ids a tokenizer puts before a plain string."""

    before: str
    after: str
    start: tuple[int, ...]

    def render(self, text: str) -> str:
        return self.before + text.strip() + self.after


def rendered_chat(tokenizer: object, messages: list[dict[str, str]], name: str) -> str:
    """The messages by the model's chat template, on a fixed day.

    The template is a program of the model's makers: it may fail in any way, and has TEMPLATE_SECONDS to end.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(f'{name} has no chat template; use a task with format = "completion"')
    template = tokenizer.get_chat_template()
    done: list[str] = []
    failed: list[Exception] = []

    def render() -> None:
        try:
            # enable_thinking is read by the templates of thinking models and ignored by all others.
            rendered = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
                chat_template=FIXED_DATE + template if "strftime_now" in template else template,
            )
            done.append(rendered)
        except (TemplateError, ArithmeticError, LookupError, *ORDINARY) as error:
            failed.append(error)

    thread = threading.Thread(target=render, daemon=True)  # one that never ends does not keep the program alive
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if done:
        return done[0]
    reason = one_line(failed[0]) if failed else f"it has not ended after {TEMPLATE_SECONDS:.0f} s"
    raise ValueError(f"the chat template of {name} fails: {reason}")
