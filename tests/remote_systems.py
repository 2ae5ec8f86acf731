"""Systems whose models are behind servers, and the same in one process."""

from __future__ import annotations

import math
from collections.abc import Callable

from served import Pair

from collm.llm import CollaborativeLM
from collm.types import Generation


def local(pair: Pair) -> CollaborativeLM:
    return CollaborativeLM.from_pretrained(pair.checkpoint, assistants=[str(path) for path in pair.assistants])


def urls(pair: Pair, kind: str = "vllm", more: str = "") -> list[str]:
    return [f"{server.name}={kind}+{server.url}?model={server.name}{more}" for server in pair.others]


def remote_base(pair: Pair, assistants: list[str]) -> CollaborativeLM:
    return CollaborativeLM.from_pretrained(pair.exported, assistants=assistants, base=f"vllm+{pair.base.url}")


SYSTEMS: dict[str, Callable[[Pair], CollaborativeLM]] = {
    "base served": lambda pair: remote_base(pair, [str(path) for path in pair.assistants]),
    "assistants served": lambda pair: CollaborativeLM.from_pretrained(pair.checkpoint, assistants=urls(pair, "openai")),
    "all served": lambda pair: CollaborativeLM.from_pretrained(
        f"vllm+{pair.base.url}?tokenizer={pair.exported}", assistants=urls(pair)
    ),
}


def same(one: Generation, other: Generation) -> None:
    assert one.token_ids == other.token_ids
    assert [step.author for step in one.steps] == [step.author for step in other.steps]
    assert one.finish_reason == other.finish_reason and one.text == other.text
    for a, b in zip(one.steps, other.steps, strict=True):
        assert math.isclose(a.log_prob, b.log_prob, abs_tol=2e-4)
        assert b.base_token_id in (None, a.base_token_id)
        if b.gate and a.gate:
            assert all(math.isclose(x, y, abs_tol=2e-4) for x, y in zip(a.gate, b.gate, strict=True))
