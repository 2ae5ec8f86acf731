"""The same prompt again is another sample: numbers for the texts of one call."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from collm.sampling_params import SamplingParams


def numbered(asked: Sequence[tuple[Hashable, SamplingParams]]) -> list[SamplingParams]:
    """The settings of each text (prompt, settings), so that no two of one prompt and seed are one text by mistake.

    The first of each keeps the `sample` it was given; a repeat takes the next number that none of this call has.
    """
    keys = [(prompt, replace(params, sample=0)) for prompt, params in asked]
    given: dict[Hashable, set[int]] = {}
    for key, (_, params) in zip(keys, asked, strict=True):
        given.setdefault(key, set()).add(params.sample)
    seen: set[Hashable] = set()
    numbers: dict[Hashable, int] = {}
    found = []
    for key, (_, params) in zip(keys, asked, strict=True):
        own: Hashable = (key, params.sample)
        if own in seen:
            number = numbers.get(own, params.sample) + 1
            while number in given[key]:
                number += 1
            given[key].add(number)
            numbers[own] = number
            params = replace(params, sample=number)
        seen.add(own)
        found.append(params)
    return found
