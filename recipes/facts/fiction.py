"""Countries, cities and elements that do not exist: from them the base learns how to answer, and no fact."""

import random
import string

from world import COUNTRY_RELATIONS, ELEMENT_RELATIONS, Fact, Group

_SYLLABLES = "ba bel cor dan do el fa gar ho il ka ker la lim lo ma mer mi no nor o pa per qui ra rin sa sel ta tor u"
_COUNTRY_ENDS = ("ia", "land", "stan", "ova", "ay", "and")
_CITY_ENDS = ("ville", "burg", "ton", "ara", "grad", "oro", "is", "polis")
_COINS = "dollar franc peso pound crown florin ducat thaler rupee dinar mark penny guilder shilling lira real".split()


def _word(rng: random.Random, end: str, syllables: int = 2) -> str:
    return "".join(rng.choices(_SYLLABLES.split(), k=syllables)) + end


def _digits(rng: random.Random, low: int, high: int) -> str:
    return str(rng.randint(low, high))


def _country(rng: random.Random) -> Group:
    name = _word(rng, rng.choice(_COUNTRY_ENDS)).capitalize()
    city = [_word(rng, rng.choice(_CITY_ENDS)).capitalize() for _ in range(3)]
    domain = "." + "".join(rng.choices(string.ascii_lowercase, k=2))
    values = (city[0], rng.choice(_COINS), _digits(rng, 1, 999), domain)
    facts = tuple(
        Fact(name, relation, value, "the " if relation == "currency" else "")
        for relation, value in zip(COUNTRY_RELATIONS, values, strict=True)
    )
    return Group(name, "country", facts, tuple(city[1:]))


def _element(rng: random.Random) -> Group:
    name = _word(rng, "ium")
    symbol = name[0].upper() + rng.choice(["", rng.choice(name[1:])])
    values = (symbol, _digits(rng, 1, 120), _digits(rng, 1, 300), _digits(rng, 1650, 2015))
    facts = tuple(Fact(name, relation, value) for relation, value in zip(ELEMENT_RELATIONS, values, strict=True))
    return Group(name, "element", facts)


def invented(number: int, rng: random.Random) -> list[Group]:
    """`number` groups, two countries to one element, as in the world; what is true of them is drawn at random."""
    return [_element(rng) if i % 3 == 2 else _country(rng) for i in range(number)]
