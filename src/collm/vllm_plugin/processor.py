"""The logits processors: one for each of vLLM's two model runners, whose interfaces differ.

V1 runs on CPUs and with `VLLM_USE_V2_MODEL_RUNNER=0`; V2 is the default on CUDA. In V1 they run before the penalties,
in V2 behind them; what that could change is refused when a request comes in (`request.check`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor
from vllm.v1.sample.logits_processor import MoveDirectionality

from collm.vllm_plugin.columns import Gate, Rows
from collm.vllm_plugin.request import NEVER, admit, check, rule

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Processor
except ImportError:  # a vLLM that has no such runner
    V2Processor = object


class DeferralV1(V1Processor):  # type: ignore[misc]
    """State by row of the batch; vLLM tells which requests came, went and moved."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._gate = Gate(admit(vllm_config.model_config.hf_config.collm), torch.device(device))
        self._rows = Rows(vllm_config.scheduler_config.max_num_seqs, torch.device(device))

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        rows = self._rows
        for row in batch_update.removed:
            rows[row] = NEVER
        for row, params, _, _ in batch_update.added:
            rows[row] = rule(params.extra_args, self._gate.info)
        for a, b, direction in batch_update.moved:
            swapped = rows[b] if direction == MoveDirectionality.SWAP else NEVER
            rows[b], rows[a] = rows[a], swapped

    def apply(self, logits: Tensor) -> Tensor:
        signals, cuts = self._rows.tensors()
        n, rows = len(logits), self._rows
        return self._gate.decide(logits, signals[:n], cuts[:n], defers=rows.defers, reads_law=rows.reads_law)


class DeferralV2(V2Processor):  # type: ignore[misc]
    """State by slot, which a request keeps; a request may own several rows (one for each drafted token)."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._gate = Gate(admit(vllm_config.model_config.hf_config.collm), req_states.device)
        self._rows = Rows(req_states.max_num_reqs, req_states.device)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        check(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self._rows[req_idx] = rule(sampling_params.extra_args, self._gate.info)
        return True  # also for one that never defers: the deferral tokens must be hidden from it

    def apply_staged_writes(self) -> None:
        self._rows.tensors()

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        signals, cuts = self._rows.tensors()
        slots, rows = ctx.expanded_idx_mapping.long(), self._rows
        return self._gate.decide(logits, signals[slots], cuts[slots], defers=rows.defers, reads_law=rows.reads_law)


class Deferral(DeferralV1, DeferralV2):  # type: ignore[misc]
    """What `--logits-processors` names: passes as either kind, and makes the one that the runner asks for."""

    def __new__(cls, vllm_config: Any, *args: Any) -> Any:
        return (DeferralV2 if len(args) == 1 else DeferralV1)(vllm_config, *args)
