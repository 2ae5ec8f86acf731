"""What an exported folder says about itself, in `config.json` under `collm`: all that a server's plugin needs.

A server knows a model by its `config.json`, wherever the folder lies, so the description stands there and not in a
file beside it.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from collm.errors import CollmError
from collm.models.info import AssistantInfo, CalibrationTable


class ServedInfo(BaseModel):
    """How a gate is read from a model's logits.

    The score of assistant k is `scale * logits[defer_token_ids[k - 1]] + bias[k - 1]`. The base's law is that of
    columns `0 .. vocab_size - 1` alone. All further columns but the deferral ids' are exactly 0 (`zero_columns` of
    them, `zero_token_id` among them), so that a client that is told log-probabilities instead of logits can find
    both: the logit is `lp[defer] - lp[zero]`, and the share of the columns to leave out is
    `sum_k exp(lp[defer_k]) + zero_columns * exp(lp[zero])`.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    format_version: Literal[1] = 1
    defer_token_ids: list[int] = Field(min_length=1)
    zero_token_id: int
    zero_columns: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    scale: float = Field(gt=0)
    bias: list[float]
    assistants: list[AssistantInfo]
    base_format: dict[str, Any] = Field(default_factory=dict)
    base_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    calibration: list[CalibrationTable] = Field(default_factory=list)

    @property
    def num_assistants(self) -> int:
        return len(self.defer_token_ids)

    def to_config(self) -> dict[str, Any]:
        """Plain JSON values; infinite thresholds are texts."""
        values: dict[str, Any] = json.loads(self.model_dump_json())
        return values

    @classmethod
    def from_config(cls, values: Any, where: str = "config.json") -> ServedInfo:
        """Reads what `to_config` gave.

        Raises:
            CollmError: nothing there, or not of this version.
        """
        if values is None:
            raise CollmError(f"{where} says nothing about a gate: it is no export of a collm checkpoint (collm export)")
        try:
            info = cls.model_validate(values)
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, fault["loc"]))
            raise CollmError(
                f"{where} holds an export that this collm cannot read ({place}: {fault['msg']}); export the checkpoint "
                "again, or use the version of collm that wrote it"
            ) from None
        if not len(info.bias) == len(info.assistants) == info.num_assistants:
            raise CollmError(f"{where} holds a damaged export: each deferral id needs a bias and an assistant")
        return info
