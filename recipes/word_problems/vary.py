"""A recipe with some of its settings changed: what ablations are made of.

python recipes/word_problems/vary.py RECIPE.yaml KEY=VALUE... --out VARIED.yaml     (init.method=b deferral_cost=0.1)
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from collm.errors import CollmError
from collm.files import write_text
from collm.training.recipe import load_recipe, parse_recipe


def vary(recipe: Path, changes: list[str]) -> dict[str, Any]:
    """The recipe's values with each `KEY=VALUE` put in; dots lead into sections, values are YAML.

    Raises:
        CollmError: a change that is none, or that leaves no valid recipe.
    """
    load_recipe(recipe)
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise CollmError(f"a change is KEY=VALUE, as in init.method=b, not {change!r}")
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = yaml.safe_load(value)
    parse_recipe(values, f"{recipe} with {' '.join(changes)}")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    text = yaml.safe_dump(vary(args.recipe, args.changes), sort_keys=False)
    write_text(args.out, f"# {args.recipe} with {' '.join(args.changes) or 'no change'}\n{text}")


if __name__ == "__main__":
    try:
        main()
    except CollmError as error:
        sys.exit(f"Error: {error}")
