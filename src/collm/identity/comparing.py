"""Do two identities agree? Plain values, compared without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

Identity = Mapping[str, Any]
"""JSON values. Of one model: `kind` is "local" (`weights`, `dtype`, `config`), "tool" (`tool`), "remote"
(`remote_identity`) or "own", an object of the user's that is not `Identified`, known by its name alone. So local never
equals remote."""
NAMED = "named"
"""Of an identity, what tells people which system it is: where a model lies decides nothing, and is not compared."""
CONFIG, ENDS, DATE = "config", "ends", "date"
"""Of a model, what its configuration says, the tokens that end its texts, the day that its prompts tell. Compared
where both sides tell it: versions of transformers differ in what they write of the same model, and older files tell
nothing."""
PROBE_TOLERANCE = 0.2
"""Nats by which a server may differ from itself at a token of the probe: in 16 bits, batches change last digits."""


def differing(there: Identity, now: Identity) -> dict[str, tuple[Any, Any]]:
    """Where two identities (or settings with an `identity`) differ: what stands there and what now, by key."""
    a, b = dict(_leaves(_plain(there))), dict(_leaves(_plain(now)))
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if not _same(key, a.get(key), b.get(key))}


def differences(there: Identity, now: Identity) -> str:
    """`differing` in words; empty if they agree."""
    found = differing(there, now)
    told = "; ".join(f"{key}: {_told(a)} there, {_told(b)} now" for key, (a, b) in found.items())
    return told + remedy(found)


def remedy(found: Mapping[str, tuple[Any, Any]]) -> str:
    """What may be done where it is the day that makes the difference, which a chat template tells the model."""
    days = sorted({str(a) for key, (a, _) in found.items() if key.rpartition(".")[2] == DATE})
    return f"; --date {days[0]} is the day of the earlier run" if len(days) == 1 else ""


def _plain(value: Any) -> Any:
    """As it comes back from JSON: with lists for tuples."""
    return json.loads(json.dumps(value))


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if path + key in (NAMED, f"identity.{NAMED}"):
            continue
        if isinstance(inner, dict) and inner:
            yield from _leaves(inner, f"{path}{key}.")
        else:
            yield path + key, inner


def _same(key: str, a: Any, b: Any) -> bool:
    if (a is None or b is None) and {CONFIG, ENDS, DATE} & set(key.split(".")):
        return True
    if key.rpartition(".")[2] != "probe" or not isinstance(a, list) or not isinstance(b, list):
        return bool(a == b)
    if len(a) != len(b):
        return False
    # Where a server told no number, which of two tokens it found likelier may be a matter of rounding.
    told = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    # NaN is equal to nothing.
    return (a == b or bool(told)) and all(math.isclose(x, y, rel_tol=0, abs_tol=PROBE_TOLERANCE) for x, y in told)


def _told(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
