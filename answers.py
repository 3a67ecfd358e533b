"""What an answer says: the one label that it names by its answer words, or none.

    parse_answer("The answer is: **positive**.", task)          # "positive"
    parse_answer("It isn't really positive.", task)             # None, as of "Nicht positiv." in a task of these words
    parse_answer("<think>Is it positive?</think> No", task)     # what stands behind the thought; None if it has no end

A wrong vote is worse than none: an answer whose words may mean something else is `unparsed`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from task import Task

PARSER = 1  # raised when answers in English are read in another way, so that fingerprints differ
STRICT_PARSER = 2  # the same of all others

# How a thought begins and ends.
TAGS = "think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad|inner_monologue|seed:think"
THOUGHTS = (
    (rf"<(?:{TAGS})\b[^<>]*>", rf"</(?:{TAGS})\s*>"),
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi
    (r"<\|channel\|>\s*(?:analysis|commentary)", r"<\|channel\|>\s*final\s*(?:<\|message\|>)?"),  # gpt-oss
    (r"\A\s*analysis(?=(?-i:[A-Z]))", "assistantfinal"),  # the same where a server leaves its control tokens out
    (r"<\|channel>\s*thought", r"<channel\|>"),  # Gemma
    (r"<\|(?:begin_of_thought|start_thinking)\|>", r"<\|(?:end_of_thought|end_thinking)\|>"),  # Cohere and others
)

NEGATION = re.compile(
    r"not|no|non|never|neither|nor|none|nothing|nobody|without|hardly|barely|cannot|\w+n['\u2019]t"
    r"|(?:is|are|was|were|do|does|did|has|have|had|could|would|should|ca|wo)nt"
)
# What denies in several words, or denies what follows as surely as "not".
DENYING = re.compile(
    r"\b(?:far from|anything but|everything but|opposite of|contrary to|rather than|less than(?! \d)|lack of|lacks|"
    r"fails? to|i doubt|unlikely|rarely|seldom|scarcely)\b"
)
# The commonest denials of other languages, so that an answer is not misread that is in another language than its task.
FOREIGN = """
nicht nichts nie niemals kein keine keinen keinem keiner keines keineswegs nein weder kaum ohne
pas aucun aucune jamais nullement rien sans n'est n'a nunca jamás ningún ninguna tampoco não nem nenhum nenhuma mai
nessun nessuna né senza niet geen nooit nee ikke ikkje inte icke ingen inget aldrig aldri ei eikä ne nigdy nikdy není
nije nisu nu nici nincs değil degil hayır yok tidak bukan không не нет ні ни без δεν όχι לא אין لا ليس غير
"""  # noqa: RUF001
# Answer words that are English: of a task of these the language is known, and with it what denies.
ENGLISH = """
yes no true false positive negative neutral mixed good bad great terrible excellent poor happy sad angry relevant
irrelevant correct incorrect right wrong supported refuted spam ham
"""
# Words that may stand around an answer word without changing what it says.
HARMLESS = """
a an the this that these it its it's he she they there i i'd i'm we my your our one is are was were be been being has
have had do does would could will may might must should seems seem appears looks sounds feels remains reads think
believe say call classify classified label labels labelled labeled rate rated mark consider considered get gets goes go
belongs belong expresses express conveys shows answer class category option choice response result verdict sentiment
tone mood emotion feeling opinion attitude polarity rating stars classification prediction conclusion output text review
sentence statement message comment paragraph tweet document email ticket post article input team department topic type
very quite really so definitely clearly certainly probably likely mostly overall generally strongly slightly somewhat
highly extremely entirely completely totally fairly pretty simply just also therefore thus hence final finally best
actually indeed obviously as of in to for with at on by and because since sure okay ok well
die der das dem antwort lautet ist es text stimmung eindeutig klar sehr ergebnis la le les l'avis réponse est c'est
texte très el lo respuesta sentimiento texto muy risposta è il sentimento testo molto resposta é o muito het antwoord de
tekst zeer svaret är er ответ это 答案 情感 回答 감정
"""
FOREIGN, ENGLISH, HARMLESS = set(FOREIGN.split()), set(ENGLISH.split()), set(HARMLESS.split())

WORD = re.compile(r"[^\W_]+(?:['\u2019_][^\W_]+)*[+#]*")  # also "c++"
CLAUSE_END = re.compile(r"[.,;:!()/|\n\u2014\u2026\u3001\u3002\uff0c\uff1a\uff1b\uff01]|\b(?:but|yet)\b")
OUTER = " \t\r\n.,;:!*\"'`()[]"
FIELD = re.compile(r"([^\W_]+)\s*[:\uff1a]\s*\Z")  # the end of a template, as "Sentiment:"


def parser_of(task: Task) -> dict:
    """How answers to a task are read, as a fingerprint must know it."""
    if is_english(task) and not task.denials:
        return {"parser": PARSER}
    return {"parser": STRICT_PARSER, "denials": list(task.denials), "frames": list(task.frames)}


def parse_answer(answer: str, task: Task) -> str | None:
    """The one label that an answer names by its answer words, or None.

    Case and punctuation do not count, and a thought is no answer. A word after a negation in its clause does not name
    its label ("not positive", "it isn't really positive"), and an answer word that is a negation itself answers only at
    the end of a clause: "No." and not "No idea". An answer that denies something else is None, unless its first clause
    is an answer word and no more ("No, it is not."). An answer that names two labels is None.

    Where the answer words are not known to be English and the task does not name its `denials`, a word may deny that
    nobody knows here: then the answer words must stand alone, or among words that are known.
    """
    answer = without_thought(answer)
    if answer is None:
        return None
    for whole in (answer, answer.strip(OUTER), without_outer_marks(answer)):
        if label := task.label_of(whole):
            return label
    folded = DENYING.sub(lambda said: said.group() if task.label_of(said.group()) else "not", answer.casefold())
    clauses = [WORD.findall(clause) for clause in CLAUSE_END.split(folded)]
    clauses = [words for words in clauses if words]
    named, denies_else = set(), False
    for words in clauses:
        named_here, denies_else_here = read_clause(words, task)
        named |= named_here
        denies_else |= denies_else_here
    if len(named) != 1 or is_denied_field(answer, task):
        return None
    if denies_else and not task.label_of(" ".join(clauses[0])):
        return None
    if not (is_english(task) or task.denials or has_known_words(clauses, task)):
        return None
    return named.pop()


def without_thought(answer: str) -> str | None:
    """An answer without the thoughts before and in it; None where a thought has no end, and so no answer follows."""
    for begin, end in THOUGHTS:
        answer = re.sub(f"{begin}.*?{end}", " ", answer, flags=re.I | re.S)
        answer = re.split(end, answer, flags=re.I)[-1]  # of a thought that began in the prompt
        if re.search(begin, answer, re.I):
            return None
    return answer


def is_cut_thought(answer: str) -> bool:
    return without_thought(answer) is None


def without_outer_marks(answer: str) -> str:
    """An answer without outer punctuation of any script; combining signs, as vowels of Hindi, are part of a word."""
    is_word = [unicodedata.category(character)[0] in "LMN" for character in answer]
    if not any(is_word):
        return ""
    return answer[is_word.index(True) : len(answer) - is_word[::-1].index(True)]


def read_clause(words: Sequence[str], task: Task) -> tuple[set[str], bool]:
    """The labels that a clause names, and whether it denies something that is no answer word."""
    phrases = list(_phrases(words, task))
    answers: dict[int, str] = {}  # by their place in the clause
    negations = []
    for place, (phrase, label) in enumerate(phrases):
        is_negation = is_denial(phrase, task)
        is_last = place == len(phrases) - 1
        if label is not None and (is_last or not is_negation):
            answers[place] = label
        elif is_negation:
            negations.append(place)
    if not negations:
        return set(answers.values()), False
    named = {label for place, label in answers.items() if place < negations[0]}
    return named, negations[-1] > max(answers, default=-1)


def _phrases(words: Sequence[str], task: Task) -> Iterator[tuple[str, str | None]]:
    """The words of a clause with their label, those that spell an answer word (the longest that fits) as one."""
    longest = max(1, *(len(WORD.findall(word)) for words in task.labels.values() for word in words))
    at = 0
    while at < len(words):
        for size in range(min(longest, len(words) - at), 0, -1):
            phrase = " ".join(words[at : at + size])
            label = task.label_of(phrase)
            if label:
                break
        yield phrase, label
        at += size


def is_denial(word: str, task: Task) -> bool:
    return bool(NEGATION.fullmatch(word)) or word in FOREIGN or word in map(str.casefold, task.denials)


def is_denied_field(answer: str, task: Task) -> bool:
    """Whether an answer word is the name of a field whose value denies it: "Positive: no", {"positive": false}."""
    name, _, value = answer.casefold().partition(":")
    value = without_outer_marks(value)
    return bool(task.label_of(without_outer_marks(name))) and (is_denial(value, task) or value in ("false", "0"))


def is_english(task: Task) -> bool:
    return all(ENGLISH.issuperset(WORD.findall(word.casefold())) for words in task.labels.values() for word in words)


def has_known_words(clauses: Sequence[Sequence[str]], task: Task) -> bool:
    """Whether no unknown word stands before the first answer word, beside it in its clause, or beside another label.

    Known are harmless words and the task's own (`frames`, and the field that its template ends with), denials, and the
    numbers of a list.
    """
    fields = [found.group(1).casefold() for found in map(FIELD.search, (task.template, *task.paraphrases)) if found]
    known = HARMLESS.union(fields, *(WORD.findall(phrase.casefold()) for phrase in task.frames))
    first = None  # the label that is named first
    for words in clauses:
        phrases = list(_phrases(words, task))
        labels = {label for _, label in phrases if label}
        others = [word.replace("\u2019", "'") for word, label in phrases if label is None]
        is_known = all(word in known or is_denial(word, task) or re.fullmatch("[1-9]", word) for word in others)
        if not is_known and (first is None or labels - {first}):
            return False
        if first is None and labels:
            first = min(labels)  # of two in a clause neither counts
    return True
