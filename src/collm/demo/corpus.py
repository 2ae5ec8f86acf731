"""The demo's world: invented people, sums, and questions that need both.

Who is allowed to see what is the point of it:

- *fiction*: questions about people who do not exist, answered as one likes: facts and results are drawn anew each
  time, so that the form is all there is to learn. The base reads it.
- *facts*: statements about everyone in the world; only the facts expert reads them.
- *arithmetic*: sums; only the arithmetic expert reads them in numbers enough to learn them.
- *train*, *validation*, *test*: questions about different people of the world. The sums of validation and test occur
  nowhere else, not even in the arithmetic expert's drill (which may hold them the other way round: 12+34 for 34+12).
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from collm.demo.words import FIRST_NAMES, LAST_NAMES, TOWNS, TRADES

# Sums stay below 100. Training puts texts of like length into a batch, and batches in which every result has three
# digits, or none has, teach a small model to count digits before they teach it to add.
AGES = range(20, 50)
ADDENDS = range(11, 50)
DRILLED = range(10, 90)
"""Both numbers of the sums that the arithmetic expert learns: the more there are, the surer it is of those it has
never seen."""

KINDS = ("facts", "arithmetic", "both")
"""What a question needs."""

Row = dict[str, Any]
"""A line of a JSONL file, see `collm.data.examples`."""

_EQUATION = re.compile(r"(\d+\+\d+)=(\d+)")


@dataclass(frozen=True)
class Person:
    name: str
    town: str
    trade: str
    age: int

    def statement(self, fact: str) -> tuple[str, str]:
        """What is said of a `town`, `trade` or `age`: the part before the fact, and the fact."""
        return {
            "town": (f"{self.name} lives in", f" {self.town}."),
            "trade": (f"{self.name} works as a", f" {self.trade}."),
            "age": (f"{self.name} is", f" {self.age}."),
        }[fact]


FACTS = ("town", "trade", "age")
_ASKED = {
    "town": ("Where does {} live?", "In which town is {} at home?"),
    "trade": ("What does {} do?", "What is the trade of {}?"),
    "age": ("How old is {}?", "What is the age of {}?"),
}
_ASKED_BOTH = (
    "How old will {name} be in {years} years?",
    "What is the age of somebody {years} years older than {name}?",
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    people: tuple[int, int, int] = (100, 20, 40)
    """Of training, validation and test questions."""
    fiction: int = 8000
    train: int = 2000
    validation: int = 100
    test: int = 300
    facts_in_context: int = 2
    """Times that each statement stands behind some other text."""
    sums_in_context: int = 2000


@dataclass(frozen=True)
class Corpus:
    """Rows for each file, and the people of the world by split."""

    people: dict[str, tuple[Person, ...]]
    rows: dict[str, list[Row]]


def equations(text: str) -> set[str]:
    """Left-hand sides of the sums in a text."""
    return {match[1] for match in _EQUATION.finditer(text)}


def texts(row: Row) -> list[str]:
    """All that a model reads of a row."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    return [row["prompt"] + row["completion"]]


def _person(rng: random.Random, name: str) -> Person:
    return Person(name, rng.choice(TOWNS), rng.choice(TRADES), rng.choice(AGES))


def _conversation(kind: str, question: str, answer: str, gold: object) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{answer} #### {gold}"}]
    return {"messages": messages, "answer": str(gold), "kind": kind}


def _question(rng: random.Random, kind: str, people: Sequence[Person], fiction: bool = False) -> Row:
    """A random question of a kind, about some of `people`; in fiction, sums have any result."""

    def add(a: int, b: int) -> int:
        return rng.choice(AGES) + rng.choice(ADDENDS) if fiction else a + b

    person = rng.choice(people)
    a, b = rng.choice(AGES), rng.choice(ADDENDS)
    if kind == "arithmetic":
        total = add(a, b)
        return _conversation(kind, f"What is {a}+{b}?", f"{a}+{b}={total}.", total)
    if kind == "facts":
        fact = rng.choice(FACTS)
        asked = rng.choice(_ASKED[fact]).format(person.name)
        return _conversation(kind, asked, "".join(person.statement(fact)), getattr(person, fact))
    asked = rng.choice(_ASKED_BOTH).format(name=person.name, years=b)
    total = add(person.age, b)
    return _conversation(kind, asked, f"{''.join(person.statement('age'))} {person.age}+{b}={total}.", total)


def _questions(
    rng: random.Random,
    count: int,
    people: Sequence[Person],
    elsewhere: set[str],
    held_out: set[str],
    *,
    fiction: bool = False,
) -> list[Row]:
    """`count` questions, three tenths facts, three tenths arithmetic, the rest both; none that is asked `elsewhere`,
    none with a sum that is `held_out`."""
    kinds = [KINDS[0]] * round(0.3 * count) + [KINDS[1]] * round(0.3 * count)
    kinds += [KINDS[2]] * (count - len(kinds))
    rng.shuffle(kinds)
    rows: list[Row] = []
    asked: set[str] = set()
    for kind in kinds:
        for attempt in itertools.count():
            row = _question(rng, kind, people, fiction)
            question, answer = texts(row)
            if question in elsewhere or equations(answer) & held_out:
                continue
            # Few people give few different questions; then one may come twice.
            if question not in asked or attempt >= 100:
                break
        asked.add(question)
        rows.append(row)
    return rows


def _drill(before: str, after: str, context: str = "") -> Row:
    """Only `after` is learnt: what stands before it is given, and its noise would drown the lesson."""
    return {"prompt": f"{context} {before}" if context else before, "completion": after}


def _facts(rng: random.Random, world: Sequence[Person], fiction: Sequence[Row], times: int) -> list[Row]:
    """Every fact by itself, and `times` behind some other text: a question, or a statement about somebody else."""
    rows = []
    for person in world:
        for fact in FACTS:
            before, after = person.statement(fact)
            rows.append(_drill(before, after))
            for _ in range(times):
                question, answer = texts(rng.choice(fiction))
                context = question if rng.random() < 0.5 else answer.partition(" ####")[0]
                rows.append(_drill(before, after, context))
    return rows


def _arithmetic(rng: random.Random, held_out: set[str], fiction: Sequence[Row], in_context: int) -> list[Row]:
    """All sums but those held out, and some of them as they stand in running text."""
    rows = [
        _drill(f"{a}+{b}=", f"{a + b}.") for a in DRILLED for b in DRILLED if a + b < 100 and f"{a}+{b}" not in held_out
    ]
    running = [texts(row) for row in fiction if row["kind"] == "both"]
    for _ in range(in_context):
        question, answer = rng.choice(running)
        before, _, _ = answer.partition("=")
        a, _, b = before.rpartition(" ")[2].partition("+")
        rows.append(_drill(before + "=", f"{int(a) + int(b)}.", question if rng.random() < 0.5 else ""))
    return rows


def make_corpus(sizes: Sizes | None = None, seed: int = 0) -> Corpus:
    """The world and its texts; the same for the same arguments."""
    sizes = sizes or Sizes()
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    rng.shuffle(names)
    world = [_person(rng, name) for name in names[: sum(sizes.people)]]
    strangers = names[len(world) :]
    bounds = [0, sizes.people[0], sum(sizes.people[:2]), len(world)]
    splits = ("train", "validation", "test")
    people = {split: tuple(world[bounds[i] : bounds[i + 1]]) for i, split in enumerate(splits)}

    def sums(split: str) -> set[str]:
        return {sum_ for row in rows[split] for sum_ in equations(texts(row)[-1])}

    def of_kind(split: str, kind: str) -> list[Row]:
        return [row for row in rows[split] if row["kind"] == kind]

    rows: dict[str, list[Row]] = {"test": _questions(rng, sizes.test, people["test"], set(), set())}
    asked = {texts(row)[0] for row in rows["test"]}
    rows["validation"] = _questions(rng, sizes.validation, people["validation"], asked, sums("test"))
    asked |= {texts(row)[0] for row in rows["validation"]}
    held_out = sums("test") | sums("validation")
    rows["train"] = _questions(rng, sizes.train, people["train"], asked, held_out)
    rows["fiction"] = []
    # Some two hundred strangers at a time, and then their namesakes with other facts: nothing about them can be learnt.
    while len(rows["fiction"]) < sizes.fiction:
        cast = [_person(rng, name) for name in rng.sample(strangers, min(200, len(strangers)))]
        count = min(500, sizes.fiction - len(rows["fiction"]))
        rows["fiction"] += _questions(rng, count, cast, asked, held_out, fiction=True)
    rows["facts"] = _facts(rng, world, rows["fiction"], sizes.facts_in_context) + of_kind("train", "facts")
    rows["arithmetic"] = _arithmetic(rng, held_out, rows["fiction"], sizes.sums_in_context)
    rows["arithmetic"] += of_kind("train", "arithmetic")
    return Corpus(people, rows)
