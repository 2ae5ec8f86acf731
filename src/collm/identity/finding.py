"""What decides an answer, as plain values: what a run that goes on, a cache and a comparison must agree in.

Everything that keeps answers (scores, answers, readings, training runs) writes what these functions give and compares
it by `differences`. Weights are hashed to the last bit, as they are in memory: xxh3 reads some 7 GB/s, which beside
loading them is nothing. (`weights_fingerprint` in checkpoints is another matter: it looks at samples, rounded, so that
it agrees across dtypes, and only warns.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from collm.identity.comparing import CONFIG, DATE, ENDS, Identity
from collm.models.contents import computation
from collm.models.devices import stored
from collm.models.head import DeferralHead
from collm.models.local import LocalModel
from collm.models.tokenizers import PROBES, tokenizer_fingerprint
from collm.models.tools import Calculator
from collm.types import Message

RULES: Mapping[str, int] = MappingProxyType({"prompts": 2, "scores": 2, "decoding": 2, "tools": 1})
"""Versions of the rules that lead from weights to answers. One rises when the same models answer otherwise after a
change: how texts become tokens, how gold tokens are scored, who writes and what is drawn, what tools say."""
PROBE = "\n".join(PROBES)
"""The text whose log-probabilities tell remote models apart."""
CHUNK = 1 << 28
"""Bytes that are copied from a device at a time."""
_CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "What is 7 * 8?"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "  What is 7 * 8?\n"}),
    (
        {"role": "user", "content": "What is 7 * 8?"},
        {"role": "assistant", "content": "7 * 8 = 56"},
        {"role": "user", "content": "And 8 * 8?"},
    ),
)


class Named(Protocol):
    """Whatever writes."""

    @property
    def name(self) -> str: ...


@runtime_checkable
class Identified(Protocol):
    """A model that says itself what decides its answers (with a `kind`, see `Identity`)."""

    def identity(self) -> Identity: ...


class Shown(Protocol):
    """What is asked of a formatter."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def day(self) -> str | None: ...

    def fingerprint(self) -> str: ...

    def prompt(self, question: Sequence[Message] | str) -> Sequence[int]: ...


def digest(*values: Any) -> str:
    """16 hex digits of JSON values."""
    return xxhash.xxh3_64_hexdigest(
        json.dumps(values, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    )


def weights_identity(model: nn.Module) -> str:
    """A hash of every bit of a model's parameters and kept buffers, on whatever device they lie."""
    total = xxhash.xxh3_128()
    for name, tensor in _tensors(model):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for part in flat.split(CHUNK):
            total.update(part.cpu().numpy())
    return total.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each storage once: tied weights have several names."""
    seen: set[tuple[int, int, torch.device]] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, Tensor):
            continue
        # An offloaded tensor has no storage, and is told by itself.
        place = (id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.numel(), tensor.device)
        if tensor.numel() and place not in seen:
            seen.add(place)
            yield name, stored(model, name, tensor)


def dtype_name(model: nn.Module) -> str:
    """Of the model's weights; of a quantised one, what it computes in."""
    return str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")


def local_identity(model: nn.Module) -> Identity:
    """Of a model in this process: its weights, and what its configuration says of computing with them."""
    told = {"kind": "local", "weights": weights_identity(model), "dtype": dtype_name(model)}
    config = getattr(model, "config", None)
    return told if config is None else {**told, CONFIG: computation(config.to_dict())}


def remote_identity(name: str, version: str, tokenizer: PreTrainedTokenizerBase, probe: Sequence[float]) -> Identity:
    """Of a model on a server, whose weights nobody here can read.

    Args:
        name, version: as the server tells them.
        tokenizer: that the server uses.
        probe: its log-probabilities of the tokens of `PROBE`, the first left out; NaN (None in what is kept): untold.
    """
    told = {"name": name, "version": version, "vocabulary": tokenizer_fingerprint(tokenizer)}
    return {"kind": "remote", **told, "probe": [None if math.isnan(value) else round(value, 4) for value in probe]}


def writer_identity(model: Named) -> Identity:
    """Of anything that answers queries: a transformers model, a tool, a server, a class of the user's own."""
    if isinstance(model, Identified):
        return dict(model.identity())
    if isinstance(model, LocalModel):
        return local_identity(model.model)
    if isinstance(model, Calculator):
        return {"kind": "tool", "tool": "calculator", "version": RULES["tools"]}
    return {"kind": "own", "name": model.name}


def prompts_identity(formatter: Shown) -> str:
    """A hash of how a model is shown its prompts: the settings, and the tokens of a few conversations and texts."""

    def shown(question: Sequence[Message] | str) -> list[int] | str:
        try:
            return list(formatter.prompt(question))
        except ValueError as error:  # a refusal is a rule as well
            return str(error)

    return digest(formatter.fingerprint(), *map(shown, _CONVERSATIONS), *map(shown, PROBES))


def gate_identity(head: DeferralHead) -> str:
    """A hash of the gate's parameters."""
    return weights_identity(head)


def system_identity(models: Sequence[Named], formatters: Sequence[Shown]) -> dict[str, Any]:
    """Of models that write together, base first: each with its prompts, the gate, and the versions of the rules."""
    vocabularies = {id(formatter.tokenizer): formatter.tokenizer for formatter in formatters}
    tokenizers = {key: tokenizer_fingerprint(tokenizer) for key, tokenizer in vocabularies.items()}
    told = {
        model.name: {
            **writer_identity(model),
            **({ENDS: sorted(model.eos_token_ids)} if isinstance(model, LocalModel) else {}),
            **({} if formatter.day is None else {DATE: formatter.day}),
            "tokenizer": tokenizers[id(formatter.tokenizer)],
            "prompts": prompts_identity(formatter),
        }
        for model, formatter in zip(models, formatters, strict=True)
    }
    head = next((model.head for model in models if isinstance(model, LocalModel) and model.head is not None), None)
    return {"models": told, "gate": None if head is None else gate_identity(head), "rules": dict(RULES)}


def without_addresses(text: str) -> str:
    """The text of a Python object without what changes from start to start."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)
