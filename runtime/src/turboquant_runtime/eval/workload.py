"""What every engine of one evaluation is given: texts, questions for planted codes, prompts. No vLLM.

All of it is token ids, made once, so that every engine sees the same.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import count
from pathlib import Path

CHUNK_TOKENS = 128
"""Tokens of a prompt that an engine computes in one step (`max_num_batched_tokens`). What a query reads from
before its own chunk was stored in pages and is read back."""

MIN_TEXT_TOKENS = 256
"""Shortest text: a first chunk that only stores, and a second that is scored."""

GREEDY_TOKENS = 32
CODES = 12
PROMPTS = (
    "The ferry to the island leaves at",
    "My grandfather kept bees because",
    "To change the tyre of a bicycle, first",
    "The main difference between a virus and a bacterium is",
    "def is_prime(n):",
    "SELECT name, price FROM products WHERE",
    "In the year 1969, two astronauts",
    "The recipe calls for two eggs, a cup of flour and",
    "A theorem is a statement that",
    "Dear Sir or Madam, I am writing to",
)
"""Short prompts whose greedy continuations are compared; the first half of each text is one more."""

_OWNERS = (
    "heron", "badger", "otter", "falcon", "beaver", "lizard",
    "walrus", "donkey", "spider", "salmon", "turtle", "weasel",
)  # fmt: skip
_NOUNS = ("gardener", "teacher", "baker", "driver", "neighbour", "doctor", "farmer", "painter", "sailor")
_VERBS = ("carried", "repaired", "painted", "described", "sold", "borrowed", "cleaned", "forgot", "measured")
_OBJECTS = ("a ladder", "the old boat", "a basket", "the kitchen clock", "a map", "the bicycle", "a lamp")
_TIMES = ("in the morning", "before lunch", "on a rainy day", "late in the evening", "after the market")

Encode = Callable[[str], Sequence[int]]
"""A tokenizer: text to token ids, special tokens of a prompt's beginning included."""


@dataclass(frozen=True)
class Text:
    """A text on which next-token distributions are compared."""

    name: str
    tokens: list[int]

    @property
    def scored(self) -> range:
        """Positions whose next-token distribution counts: at least `CHUNK_TOKENS` stored ones lie before."""
        return range(CHUNK_TOKENS, len(self.tokens) - 1)


@dataclass(frozen=True)
class Code:
    """A prompt that asks for one of the planted codes, and the code."""

    prompt: list[int]
    answer: str


@dataclass(frozen=True)
class Workload:
    """Everything that one engine computes."""

    texts: tuple[Text, ...]
    codes: tuple[Code, ...]
    prompts: tuple[list[int], ...]
    """Continued greedily by `GREEDY_TOKENS` tokens."""

    @property
    def longest_tokens(self) -> int:
        """The longest prompt, with room for what is generated after it."""
        prompts = (
            *(text.tokens for text in self.texts),
            *(code.prompt for code in self.codes),
            *self.prompts,
        )
        return max(map(len, prompts)) + GREEDY_TOKENS


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """The files' texts by their names; the package's own texts where no file is named.

    Raises ValueError for a file that is no text and for two files of one name, OSError for one that cannot
    be read.
    """
    if not paths:
        shipped = sorted(files("turboquant_runtime.eval").joinpath("texts").iterdir(), key=lambda p: p.name)
        return {path.name: path.read_text(encoding="utf-8") for path in shipped}
    texts: dict[str, str] = {}
    for path in paths:
        if path.name in texts:
            raise ValueError(f"{path}: a text named {path.name!r} is there already; rename one of the two")
        try:
            texts[path.name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}); convert the file first") from error
    return texts


def make(texts: dict[str, str], encode: Encode, tokens: int) -> Workload:
    """The workload of `texts`, of each its first `tokens` tokens, and of a code context of as many.

    Raises ValueError for a text shorter than `MIN_TEXT_TOKENS`.
    """
    cut = tuple(_cut(name, encode(text), tokens) for name, text in texts.items())
    prompts = [list(encode(prompt)) for prompt in PROMPTS]
    prompts += [text.tokens[: len(text.tokens) // 2] for text in cut]
    return Workload(cut, plant_codes(encode, tokens), tuple(prompts))


def _cut(name: str, found: Sequence[int], tokens: int) -> Text:
    """A multiple of 64 tokens, half a chunk: a chunk of one token would yield a single row of logits, which
    could not be told from the row that vLLM samples from."""
    if len(found) < MIN_TEXT_TOKENS:
        raise ValueError(
            f"{name}: {len(found)} tokens found, {MIN_TEXT_TOKENS} needed; name a longer file with --text, "
            "or join short ones"
        )
    return Text(name, list(found[: min(len(found), tokens) // 64 * 64]))


def plant_codes(encode: Encode, tokens: int) -> tuple[Code, ...]:
    """One prompt for each of `CODES` codes, all with one context of about `tokens` tokens as their beginning.

    The context is filler with sentences such as "The code of the heron is 4821." at even distances. It is
    equal on every machine.
    """
    chosen = random.Random(0)
    codes = dict(zip(_OWNERS, map(str, chosen.sample(range(1000, 10000), CODES)), strict=True))
    planted = [f"The code of the {owner} is {code}." for owner, code in codes.items()]
    empty = len(encode(""))
    room = tokens - sum(len(encode(" " + sentence)) - empty for sentence in (*planted, planted[0]))
    filler: list[str] = []
    while room > 0:
        words = (chosen.choice(kind) for kind in (_NOUNS, _VERBS, _OBJECTS, _TIMES))
        filler.append("The {} {} {} {}.".format(*words))
        room -= len(encode(" " + filler[-1])) - empty
    sentences = filler[:]
    for index, sentence in zip(count(), planted):
        sentences.insert(len(filler) * index // CODES + index, sentence)
    context = " ".join(sentences)
    return tuple(
        Code(list(encode(f"{context} The code of the {owner} is")), code) for owner, code in codes.items()
    )
