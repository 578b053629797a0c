"""Long prompts with something to find in them, made by seed: cases in the manner of RULER.

The five tasks follow RULER (arXiv 2404.06654); texts and wordings are our own and simple enough
for a model of a hundred million weights.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_redrafter.errors import OptionError

_WORDS = {
    name: words.split()
    for name, words in {
        "who": "baker farmer teacher sailor doctor painter driver singer gardener student",
        "did": "walked ran drove rode hurried went travelled returned wandered cycled",
        "where": "river market station forest harbour bridge school garden castle village",
        "when": "morning evening afternoon night spring summer autumn winter rain snow",
        "key": "Paris London Berlin Madrid Rome Vienna Oslo Dublin Athens Prague Lisbon Warsaw "
        "Cairo Tokyo Delhi Lima Quito Havana Boston Chicago",
        "name": "Anna Peter Maria David Laura James Emma Lucas Sarah Thomas Julia Martin",
        "thing": "apple chair window bottle pencil carpet ladder candle hammer basket blanket "
        "mirror kettle button ribbon feather marble lantern pillow saddle anchor barrel needle",
    }.items()
}


@dataclass(frozen=True)
class Case:
    """One question: the user's turn, how the answer begins, and what has to be in its rest.

    ``depth`` is where in the text the needle is, from 0 to 1; of several the first one.
    """

    task: str
    length: int
    depth: float
    seed: int
    text: str
    opening: str
    expected: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.task} {self.length} at {self.depth:.0%}, seed {self.seed}"

    def right(self, answer: str) -> bool:
        """Is everything that was asked for in the answer, as whole words or numbers?"""
        found = set(re.findall(r"\w+", answer.lower()))
        return all(word.lower() in found for word in self.expected)


@dataclass(frozen=True)
class Task:
    """Needles in their order, places of all but the first, the question, the answer."""

    needles: Sequence[str]
    question: str
    opening: str
    expected: tuple[str, ...]
    spread: bool = False  # the needles after the first lie between it and the end


def _number(rng: random.Random) -> str:
    return str(rng.randint(1000, 9999))


def _fact(key: str, number: str) -> str:
    return f"The magic number for {key} is {number}."


def _asking(key: str) -> tuple[str, str]:
    return f"What is the magic number for {key}?", f"The magic number for {key} is"


def single(rng: random.Random) -> Task:
    """One fact among sentences about something else."""
    key, number = rng.choice(_WORDS["key"]), _number(rng)
    return Task([_fact(key, number)], *_asking(key), (number,))


def multi_key(rng: random.Random) -> Task:
    """The same among four facts about other keys."""
    keys, numbers = rng.sample(_WORDS["key"], 5), [_number(rng) for _ in range(5)]
    facts = [_fact(key, number) for key, number in zip(keys, numbers, strict=True)]
    return Task(facts, *_asking(keys[0]), (numbers[0],))


def multi_value(rng: random.Random) -> Task:
    """Two facts about one key; both are wanted."""
    key, numbers = rng.choice(_WORDS["key"]), [_number(rng) for _ in range(2)]
    needles = [
        f"The first magic number for {key} is {numbers[0]}.",
        f"The second magic number for {key} is {numbers[1]}.",
    ]
    question = f"What are the first and the second magic number for {key}?"
    return Task(needles, question, f"The first magic number for {key} is", tuple(numbers))


def tracking(rng: random.Random) -> Task:
    """A chain: a number is given to one name, and each next name takes over that of the last."""
    names, number = rng.sample(_WORDS["name"], 3), _number(rng)
    needles = [f"{names[0]} has the ticket {number}."]
    needles += [f"{b} has the same ticket as {a}." for a, b in itertools.pairwise(names)]
    question = f"Which ticket does {names[-1]} have?"
    return Task(needles, question, f"{names[-1]} has the ticket", (number,), spread=True)


def common_words(rng: random.Random) -> Task:
    """Two words are said far more often than all others; the whole text has to be counted."""
    common = tuple(rng.sample(_WORDS["thing"], 2))
    question = "Which two words appear most often in the list?"
    return Task(common, question, "The two words that appear most often are", common)


TASKS: dict[str, Callable[[random.Random], Task]] = {
    "single": single,
    "multi-key": multi_key,
    "multi-value": multi_value,
    "tracking": tracking,
    "common words": common_words,
}


def make(task: str, length: int, depth: float, seed: int, count: Callable[[str], int]) -> Case:
    """A case of about ``length`` tokens, never more.

    Args:
        count: tokens of a text.

    Raises:
        OptionError: too short for what has to be in it.
    """
    rng = random.Random(f"{task} {length} {depth} {seed}")
    wanted = TASKS[task](rng)
    words = task == "common words"
    start = "Here is a list of words.\n" if words else "Read this text and remember the numbers.\n"
    frame = f"{start}\n\n\n{wanted.question}{wanted.opening}"
    room = length - count(frame) - sum(count(f" {needle}") for needle in wanted.needles) - 60
    if room < 100:
        raise OptionError(f"a length of {length} tokens is not possible: use 512 or more")
    make_body = _list if words else _text
    body = make_body(rng, room, wanted, depth, count)
    text = f"{start}\n{body}\n\n{wanted.question}"
    return Case(task, length, depth, seed, text, wanted.opening, wanted.expected)


def _text(
    rng: random.Random, room: int, task: Task, depth: float, count: Callable[[str], int]
) -> str:
    """Sentences, the first needle at its depth and the others anywhere, or behind it in order."""
    sentences: list[str] = []
    while True:
        who, did, where, when = (
            rng.choice(_WORDS[part]) for part in ("who", "did", "where", "when")
        )
        sentence = f"The {who} {did} to the {where} in the {when}."
        room -= count(f" {sentence}")
        if room < 0:
            break
        sentences.append(sentence)
    least = depth if task.spread else 0.0
    places = [depth, *(rng.uniform(least, 1) for _ in task.needles[1:])]
    if task.spread:
        places.sort()
    order = sorted(zip(places, task.needles, strict=True), key=lambda pair: -pair[0])
    for place, needle in order:
        sentences.insert(round(place * len(sentences)), needle)
    return " ".join(sentences)


def _list(
    rng: random.Random, room: int, task: Task, depth: float, count: Callable[[str], int]
) -> str:
    """Words in random order; the common ones are said five times as often as the others."""
    words: list[str] = []
    pool = [word for word in _WORDS["thing"] if word not in task.needles] + 5 * list(task.needles)
    while True:
        word = rng.choice(pool)
        room -= count(f" {word}")
        if room < 0:
            return " ".join(words)
        words.append(word)
