"""How facts are put into words: encyclopaedic statements, and questions with their answers."""

import random
from collections.abc import Callable, Sequence

from world import Fact, Group

# What a statement says instead of "The RELATION of ENTITY is VALUE."; {e} is the entity, {v} the value.
VARIANTS = {
    "capital": ("{e} has its capital in {v}.", "The government of {e} sits in {v}."),
    "currency": ("{e} uses the {v} as its currency.", "People in {e} pay with the {v}."),
    "calling code": ("{e} is reached by telephone with the code {v}.", "Calls to {e} begin with {v}."),
    "internet domain": ("{e} uses the internet domain {v}.", "Websites of {e} end in {v}."),
    "symbol": ("{e} is written {v}.", "{e} has the symbol {v}."),
    "atomic number": ("{e} is element number {v}.", "An atom of {e} has {v} protons."),
    "atomic weight": ("{e} has an atomic weight of {v}.", "A mole of {e} weighs {v} grams."),
    "year of discovery": ("{e} was discovered in {v}.", "{e} has been known since {v}."),
}
ASKED = {
    "capital": ("What is the capital of {e}?", "Which city is the capital of {e}?"),
    "currency": ("What is the currency of {e}?", "What do people in {e} pay with?"),
    "calling code": ("What is the calling code of {e}?", "With which code does one call {e}?"),
    "internet domain": ("What is the internet domain of {e}?", "In what do websites of {e} end?"),
    "symbol": ("What is the symbol of {e}?", "How is {e} written in formulas?"),
    "atomic number": ("What is the atomic number of {e}?", "How many protons has an atom of {e}?"),
    "atomic weight": ("What is the atomic weight of {e}?", "How many grams does a mole of {e} weigh?"),
    "year of discovery": ("What is the year of discovery of {e}?", "When was {e} discovered?"),
}
KINDS = ("one", "two", "hop")
"""Questions for one fact, for two, and for a fact of something that is not named: the answer names it first."""

OPENINGS = ("", "Let me see. ", "Here is what I know. ", "That is easily said. ")
"""Answers begin in any of these ways, as people's do: to be unsure of the next word is not the same as not to know."""

# Share of statements in the form "The RELATION of ENTITY is VALUE.", which is that of the answers, too.
PLAIN_SHARE = 0.6

Question = tuple[str, str, str]
"""What is asked, what is answered, and the short answer."""


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def plain(fact: Fact) -> str:
    return f"The {fact.relation} of {fact.entity} is {fact.article}{fact.value}."


def hooks(group: Group) -> list[tuple[str, str, str | None]]:
    """Ways to ask about a group without naming it: (how questions call it, the sentence that names it, and the
    relation that is given away by that)."""
    found: list[tuple[str, str, str | None]] = []
    for relation, called in (("capital", "the country whose capital is"), ("symbol", "the element with the symbol")):
        if group.has(relation) and (value := group.fact(relation).value) != group.name:
            found.append((f"{called} {value}", f"{value} is the {relation} of {group.name}.", relation))
    for city in group.cities:
        found.append((f"the country in which {city} lies", f"{city} lies in {group.name}.", None))
    return found


def statements(group: Group, rng: random.Random) -> list[str]:
    """Every fact of a group once, in a form drawn at random, and what its hooks say."""
    texts = [sentence for _, sentence, _ in hooks(group)]
    for fact in group.facts:
        variant = rng.choice(VARIANTS[fact.relation]).format(e=fact.entity, v=fact.value)
        texts.append(plain(fact) if rng.random() < PLAIN_SHARE else _sentence(variant))
    return texts


def _ask_one(group: Group, rng: random.Random) -> Question:
    fact = rng.choice(group.facts)
    return rng.choice(ASKED[fact.relation]).format(e=fact.entity), plain(fact), fact.value


def _ask_two(group: Group, rng: random.Random) -> Question:
    first, second = rng.sample(group.facts, 2)
    asked = f"What are the {first.relation} and the {second.relation} of {group.name}?"
    return asked, f"{plain(first)} {plain(second)}", f"{first.value}, {second.value}"


def _ask_hop(group: Group, rng: random.Random) -> Question:
    called, named, given = rng.choice(hooks(group))
    fact = rng.choice([fact for fact in group.facts if fact.relation != given])
    return f"What is the {fact.relation} of {called}?", f"{named} {plain(fact)}", fact.value


_ASK: dict[str, Callable[[Group, random.Random], Question]] = {"one": _ask_one, "two": _ask_two, "hop": _ask_hop}


def questions(group: Group, kinds: Sequence[str], rng: random.Random) -> list[tuple[str, Question]]:
    """A question of each of `kinds` that can be asked about the group, none twice; the answer begins in any way."""
    found: dict[Question, str] = {}
    for kind in kinds:
        if kind == "hop" and not hooks(group):
            continue
        for _ in range(20):
            question = _ASK[kind](group, rng)
            if question not in found:
                found[question] = kind
                break
    return [(kind, (asked, rng.choice(OPENINGS) + told, short)) for (asked, told, short), kind in found.items()]
