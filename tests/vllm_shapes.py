# ruff: noqa: B027
"""The shape of what vLLM 0.32 offers to logits processors, copied from its interface, for a Python without vLLM.

`install` puts it where `collm.vllm_plugin` imports it from.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum, auto
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


@dataclass
class SamplingParams:
    extra_args: dict[str, Any] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    structured_outputs: Any = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bad_words: list[str] | None = None


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list[int] = field(default_factory=list)
    added: list[tuple[int, SamplingParams, list[int] | None, list[int]]] = field(default_factory=list)
    moved: list[tuple[int, int, MoveDirectionality]] = field(default_factory=list)


class V1LogitsProcessor(ABC):
    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        return None

    @abstractmethod
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None: ...

    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def is_argmax_invariant(self) -> bool: ...

    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None: ...


@dataclass(frozen=True)
class LogitsProcRequestState:
    device: torch.device
    max_num_reqs: int
    vocab_size: int


@dataclass(frozen=True)
class LogitsContext:
    """Row -> slot for all rows; `idx_mapping` has one entry for each request."""

    expanded_idx_mapping: torch.Tensor
    idx_mapping: torch.Tensor
    idx_mapping_np: np.ndarray[Any, Any]
    expanded_local_pos: torch.Tensor

    @classmethod
    def of(cls, slots: list[int], rows_each: list[int] | None = None) -> LogitsContext:
        rows_each = rows_each or [1] * len(slots)
        expanded = [slot for slot, n in zip(slots, rows_each, strict=True) for _ in range(n)]
        local = [i for n in rows_each for i in range(n)]
        mapping = torch.tensor(slots, dtype=torch.int32)
        return cls(torch.tensor(expanded, dtype=torch.int32), mapping, mapping.numpy(), torch.tensor(local))


class V2LogitsProcessor(ABC):
    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None: ...

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None: ...

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return True

    def apply_staged_writes(self) -> None: ...

    @abstractmethod
    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor: ...


class EngineArgs:
    """The one method that the plugin hooks into."""

    def __init__(self, collm: dict[str, Any] | None, logits_processors: list[Any] | None = None) -> None:
        self.collm, self.logits_processors = collm, logits_processors

    def create_model_config(self) -> SimpleNamespace:
        hf_config = SimpleNamespace() if self.collm is None else SimpleNamespace(collm=self.collm)
        return SimpleNamespace(hf_config=hf_config, logits_processors=self.logits_processors)


def config(collm: dict[str, Any], max_num_seqs: int = 8) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(collm=collm)),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.32.0"},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": type("EngineArgs", (EngineArgs,), {})},
        "vllm.v1": {},
        "vllm.v1.sample": {},
        "vllm.v1.sample.logits_processor": {
            "LogitsProcessor": V1LogitsProcessor,
            "MoveDirectionality": MoveDirectionality,
        },
        "vllm.v1.worker": {},
        "vllm.v1.worker.gpu": {},
        "vllm.v1.worker.gpu.sample": {},
        "vllm.v1.worker.gpu.sample.logits_processor": {"LogitsProcessor": V2LogitsProcessor},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "collm.vllm_plugin.processor", raising=False)
