"""Requests with constraints that a program can check, to learn instruction following from: not IFEval's own.

    python recipes/instructions/prompts.py --number 1500 --apart-from ifeval.jsonl --out data/instructions

Rows are those of the task `ifeval`: whoever answers them is judged by the same checker (docs/tasks.md). The kinds of
constraints are IFEval's; its wordings and values, but for small counts, are not, and no prompt is written that shares a
run of words with one of --apart-from. A subject belongs to one part, so that no part knows the requests of another.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm.data.prepare import part_of, require_parts
from collm.data.records import records
from collm.errors import CollmError
from collm.files import write_text

RUN = 5
"""Words in a row that no prompt may share with one of another set."""

SUBJECTS = (
    """
a bicycle pump|sourdough bread|the tides|a lighthouse keeper|tomato plants|a lost umbrella|chess openings
night trains|hail|street musicians|a wooden bridge|beekeeping|the invention of paper|cold water swimming
a village library|kettles|mountain goats|a school garden|map making|the smell of rain|a broken zip|winter tyres
origami|the postal service|glass|a roof terrace|sleep|paper aeroplanes|an old piano|compost|the Moon's phases
garden snails|a ferry crossing|salt|hand puppets|typewriters|a flat tyre|mushroom picking|the number zero
public fountains|wool|a snowed-in hut|clocks|house plants|a market stall|the speed of sound|rope knots
cheese making|a shared kitchen|kites|vaccines|soap|a choir rehearsal|bird migration|the first day at work|pottery
railway timetables|a power cut|yoghurt|shadows|bridges|a sewing machine|volcanoes|rock climbing|a moving company
recycling glass|the alphabet|desert foxes|pickled cucumbers|a weather station|crosswords|ink|hedgehogs|a tree house
the water cycle|folding chairs|jam|a night at the observatory
""".replace("\n", "|")
    .strip("|")
    .split("|")
)

FORMS = (
    "Tell a newcomer what is worth knowing about {}.",
    "What would you say to a child who asks about {}?",
    "Draft a notice for a club whose members care about {}.",
    "I have to give a short talk on {}. Prepare it for me.",
    "Give practical advice that has to do with {}.",
    "Make up a small scene in which {} plays a part.",
    "Why do people care about {}? Say what you think.",
    "Compose a few lines for a postcard that mention {}.",
    "Put together a quiz question about {} and explain its answer.",
    "A friend is bored by {}. Change their mind.",
    "Sum up what could go wrong with {}.",
    "Write the opening of a radio programme on {}.",
)

KEYWORDS = """
kettle lantern gravel borrow quiet copper ladder pepper harbour stitch pocket thunder candle ribbon whistle anchor
bucket velvet orchard puddle drawer compass feather mirror engine saddle carpet needle basket timber marble tunnel
shelf lemon
""".split()

STARTS = "today surely often maybe once slowly outside everyone nobody yesterday".split()
ENDINGS = (
    "That is all from my side.",
    "Now it is your turn.",
    "Good night and good luck.",
    "Ask me again tomorrow.",
    "The rest is practice.",
)
LANGUAGES = {"es": "Spanish", "fr": "French", "pl": "Polish"}
SPLITS = ("Part", "Chapter", "Step", "Scene")

Given = dict[str, Any]
Made = tuple[str, Given]
"""A wording and the checker's arguments."""


def _existence(rng: random.Random) -> Made:
    words = rng.sample(KEYWORDS, rng.randint(1, 3))
    listed = " and ".join(f'"{word}"' for word in words)
    ways = [
        f"Work {listed} into the text.",
        f"The text has to use {listed}.",
        f"Make sure that {listed} can be read in it.",
    ]
    return rng.choice(ways), {"keywords": words}


def _frequency(rng: random.Random) -> Made:
    word, times = rng.choice(KEYWORDS), rng.choice([2, 3, 4])
    ways = [f'Say "{word}" {times} times or more.', f'"{word}" must be found {times} or more times in what you write.']
    return rng.choice(ways), {"keyword": word, "frequency": times, "relation": "at least"}


def _forbidden(rng: random.Random) -> Made:
    words = rng.sample(KEYWORDS + ["very", "really", "nice", "stuff", "always", "often"], rng.randint(2, 4))
    listed = ", ".join(words[:-1]) + f" or {words[-1]}"
    return rng.choice([f"Get by without the words {listed}.", f"Not once may you write {listed}."]), {
        "forbidden_words": words
    }


def _letters(rng: random.Random) -> Made:
    letter, times = rng.choice("bdfkmv"), rng.choice([9, 11, 13, 14])
    ways = [f'Use "{letter}" {times} times or more.', f'I want to count {times} or more of the letter "{letter}".']
    return rng.choice(ways), {"letter": letter, "let_frequency": times, "let_relation": "at least"}


def _language(rng: random.Random) -> Made:
    code, name = rng.choice(list(LANGUAGES.items()))
    return rng.choice([f"Reply in {name} alone.", f"I only read {name}, so write in it."]), {"language": code}


def _sentences(rng: random.Random) -> Made:
    count = rng.choice([2, 3, 6, 7, 9, 11])
    if rng.random() < 0.5:
        return f"Stay below {count + 1} sentences.", {"num_sentences": count + 1, "relation": "less than"}
    return f"It takes {count} sentences or more.", {"num_sentences": count, "relation": "at least"}


def _words(rng: random.Random) -> Made:
    if rng.random() < 0.5:
        count = rng.choice([35, 45, 65, 85, 95, 115])
        ways = [f"Keep it shorter than {count} words.", f"Less than {count} words, please."]
        return rng.choice(ways), {"num_words": count, "relation": "less than"}
    count = rng.choice([55, 75, 105, 135, 165, 185])
    return rng.choice([f"Write {count} words or more.", f"No fewer than {count} words."]), {
        "num_words": count,
        "relation": "at least",
    }


def _paragraphs(rng: random.Random) -> Made:
    count = rng.randint(2, 4)
    ways = [
        f"Divide it into {count} pieces by lines that hold *** and nothing else.",
        f"Give {count} blocks of text, *** between each two.",
    ]
    return rng.choice(ways), {"num_paragraphs": count}


def _first_word(rng: random.Random) -> Made:
    count, word = rng.randint(2, 4), rng.choice(STARTS)
    which = rng.randint(1, count)
    wording = f'Write {count} paragraphs with an empty line between them, number {which} of which opens with "{word}".'
    return wording, {"num_paragraphs": count, "nth_paragraph": which, "first_word": word}


def _placeholders(rng: random.Random) -> Made:
    count = rng.choice([2, 4, 5])
    ways = [
        f"Leave {count} or more blanks in square brackets, like [date].",
        f"{count} or more gaps in brackets, as [city], are for me to fill in.",
    ]
    return rng.choice(ways), {"num_placeholders": count}


def _postscript(rng: random.Random) -> Made:
    return rng.choice(["Add an afterthought that begins with P.S.", "Close with a line behind P.S."]), {
        "postscript_marker": "P.S."
    }


def _bullets(rng: random.Random) -> Made:
    count = rng.choice([2, 3, 4, 6, 7])
    ways = [
        f'List {count} points, not more and not fewer, on lines that begin with "* ".',
        f'Have {count} lines begin with "* ", no more and no less.',
    ]
    return rng.choice(ways), {"num_bullets": count}


def _highlights(rng: random.Random) -> Made:
    count = rng.choice([2, 4, 5])
    ways = [
        f"Set {count} or more phrases *between asterisks*.",
        f"Mark what matters, {count} places or more, *like this*.",
    ]
    return rng.choice(ways), {"num_highlights": count}


def _sections(rng: random.Random) -> Made:
    count, word = rng.randint(2, 4), rng.choice(SPLITS)
    wording = f'Build it from {count} parts, headed "{word} 1", "{word} 2" and so on.'
    return wording, {"section_spliter": word, "num_sections": count}


def _end(rng: random.Random) -> Made:
    phrase = rng.choice(ENDINGS)
    return rng.choice([f'Your last words are: "{phrase}"', f'Stop right after saying "{phrase}"']), {
        "end_phrase": phrase
    }


def _capitals(rng: random.Random) -> Made:
    count = rng.choice([2, 3, 4, 6])
    return f"Shout {count} or more words, in capitals such as NOW.", {
        "capital_frequency": count,
        "capital_relation": "at least",
    }


def _fixed(*ways: str) -> Callable[[random.Random], Made]:
    return lambda rng: (rng.choice(ways), {})


@dataclass(frozen=True)
class Kind:
    """A kind of constraint, by the checker's name. Two of one group, or of groups that exclude each other, do not go
    together; `lone` ones go with none."""

    name: str
    make: Callable[[random.Random], Made]
    group: str
    excludes: frozenset[str] = frozenset()
    lone: bool = False


_SHAPES = frozenset({"paragraphs", "bullets", "sections", "highlights"})
KINDS = (
    Kind("keywords:existence", _existence, "words in"),
    Kind("keywords:frequency", _frequency, "words in"),
    Kind("keywords:forbidden_words", _forbidden, "words out", frozenset({"words in"})),
    Kind("keywords:letter_frequency", _letters, "letters"),
    Kind("language:response_language", _language, "language", lone=True),
    Kind("length_constraints:number_sentences", _sentences, "length", frozenset({"bullets"})),
    Kind("length_constraints:number_words", _words, "length"),
    Kind("length_constraints:number_paragraphs", _paragraphs, "paragraphs", _SHAPES),
    Kind("length_constraints:nth_paragraph_first_word", _first_word, "paragraphs", _SHAPES | {"title", "quotes"}),
    Kind("detectable_content:number_placeholders", _placeholders, "gaps"),
    Kind("detectable_content:postscript", _postscript, "end"),
    Kind("detectable_format:number_bullet_lists", _bullets, "bullets", _SHAPES),
    Kind("detectable_format:number_highlighted_sections", _highlights, "highlights", _SHAPES),
    Kind("detectable_format:multiple_sections", _sections, "sections", _SHAPES | {"case"}),
    Kind(
        "detectable_format:json_format",
        _fixed("What you send is one JSON object and nothing around it.", "I feed it to a parser: valid JSON only."),
        "json",
        lone=True,
    ),
    Kind(
        "detectable_format:title",
        _fixed("Head it with a title written <<so>>.", "Above it stands a heading in << and >>."),
        "title",
        frozenset({"quotes"}),
    ),
    Kind(
        "combination:two_responses",
        _fixed(
            "I want to choose: two versions, with ****** on a line between them.",
            "Offer two variants and put ****** between the one and the other.",
        ),
        "two",
        lone=True,
    ),
    Kind("startend:end_checker", _end, "end", frozenset({"quotes"})),
    Kind(
        "startend:quotation",
        _fixed(
            'Begin and finish with ", as if all of it were spoken.', 'Everything stands between one pair of " marks.'
        ),
        "quotes",
    ),
    Kind("change_case:capital_word_frequency", _capitals, "case"),
    Kind(
        "change_case:english_capital",
        _fixed("CAPITALS throughout, in English.", "No small letters at all; English, please."),
        "case",
        frozenset({"gaps", "json"}),
    ),
    Kind(
        "change_case:english_lowercase",
        _fixed("Small letters throughout, in English.", "Not one capital, and stay with English."),
        "case",
        frozenset({"gaps", "json"}),
    ),
    Kind(
        "punctuation:no_comma",
        _fixed("Commas are out of bounds.", "Manage without a single comma."),
        "commas",
        frozenset({"words out"}),
    ),
)


def together(chosen: Sequence[Kind], new: Kind) -> bool:
    """Whether a text could follow `new` besides those chosen."""
    if chosen and (new.lone or any(kind.lone for kind in chosen)):
        return False
    return all(
        kind.group != new.group and new.group not in kind.excludes and kind.group not in new.excludes for kind in chosen
    )


def choose(rng: random.Random, at_most: int = 3) -> list[Kind]:
    """One kind to `at_most`, few as often as many."""
    chosen: list[Kind] = []
    wanted = rng.randint(1, at_most)
    for kind in rng.sample(KINDS, len(KINDS)):
        if len(chosen) < wanted and together(chosen, kind):
            chosen.append(kind)
    return chosen


def request(rng: random.Random, subject: str) -> dict[str, Any]:
    """A row without an id: a request and the constraints it comes with, in one of several layouts."""
    asked = rng.choice(FORMS).format(subject)
    kinds = choose(rng)
    made = [kind.make(rng) for kind in kinds]
    rules = [wording for wording, _ in made]
    layout = rng.randrange(3)
    if layout == 0:
        prompt = " ".join([asked, *rules])
    elif layout == 1:
        prompt = "\n".join([asked, "", *(f"- {rule}" for rule in rules)])
    else:
        prompt = "\n\n".join([" ".join(rules), asked])
    return {
        "messages": [{"role": "user", "content": prompt}],
        "answer": {
            "prompt": prompt,
            "instruction_id_list": [kind.name for kind in kinds],
            "kwargs": [given for _, given in made],
        },
        "group": subject,
    }


def runs(prompt: str, length: int = RUN) -> set[tuple[str, ...]]:
    """All runs of `length` words in a prompt, in lower case and without signs."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def rows(number: int, seed: int, others: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Different prompts, none of which shares a run of `RUN` words with one of `others`.

    Raises:
        CollmError: there are not so many.
    """
    rng = random.Random(seed)
    taken = set().union(*(runs(prompt) for prompt in others))
    seen: set[str] = set()
    for _ in range(20 * number):
        if len(seen) == number:
            return
        row = request(rng, rng.choice(SUBJECTS))
        prompt = row["messages"][0]["content"]
        if prompt not in seen and not runs(prompt) & taken:
            seen.add(prompt)
            yield {"id": f"instructions-{len(seen)}", **row}
    if len(seen) < number:
        raise CollmError(f"only {len(seen)} different prompts were found, not {number}: ask for fewer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--apart-from", type=Path, help="IFEval, whose field `prompt` no prompt may be near")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for train.jsonl, calibration.jsonl, held_out.jsonl"
    )
    args = parser.parse_args()
    others = [record["prompt"] for _, record in records(args.apart_from)] if args.apart_from else []
    parts = {"train": 0.8, "calibration": 0.1, "held_out": 0.1}
    require_parts(parts)
    texts: dict[str, list[str]] = {part: [] for part in parts}
    counts: Counter[str] = Counter()
    for row in rows(args.number, args.seed, others):
        texts[part_of(row["group"], parts)].append(json.dumps(row, ensure_ascii=False) + "\n")
        counts.update(row["answer"]["instruction_id_list"])
    for part, lines in texts.items():
        write_text(args.out / f"{part}.jsonl", "".join(lines))
        print(f"{args.out / part}.jsonl: {len(lines)} prompts")
    print("; ".join(f"{name} {count}" for name, count in counts.most_common()))


if __name__ == "__main__":
    try:
        main()
    except CollmError as error:
        sys.exit(f"Error: {error}")
