"""`--model_args` of the harness: the options of `collm eval` by their names, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collm.errors import CollmError, nearest
from collm.llm import CollaborativeLM
from collm.sampling_params import SamplingParams

LOADING = ("base", "dtype", "device", "max_cache_tokens", "compiled")
WRITING = ("deferral", "deferral_rate", "threshold", "speculative", "on_assistant_error", "seed", "max_tokens")
OTHER = ("pretrained", "assistants", "calibration_task", "alone", "batch_size", "max_batch_size", "out")
SEPARATOR = ";"


def from_arguments(arguments: Mapping[str, Any]) -> tuple[CollaborativeLM, dict[str, Any]]:
    """The pair, and the settings of `CollaborativeHarnessLM`.

    `pretrained`: the checkpoint. `assistants`: a list, or one string with `;` between them. `calibration_task`:
    whose table `deferral_rate` is looked up in. The others are named as in `CollaborativeLM.from_pretrained` and
    `SamplingParams`.

    Raises:
        CollmError: an unknown name, a value that cannot be, no checkpoint.
    """
    known = [*LOADING, *WRITING, *OTHER]
    for name in arguments:
        if name not in known:
            hint = nearest(name, known, f"there are {', '.join(sorted(known))}")
            raise CollmError(f"model_args: {name!r} is not known; {hint}")
    if "pretrained" not in arguments:
        raise CollmError("model_args: give the checkpoint as pretrained=PATH")
    assistants = arguments.get("assistants") or []
    if isinstance(assistants, str):
        assistants = assistants.split(SEPARATOR)
    try:
        size = int(arguments.get("batch_size", 8))
        writing = {name: arguments[name] for name in WRITING if name in arguments}
        params = SamplingParams(task=arguments.get("calibration_task"), **writing)
    except (TypeError, ValueError) as error:
        raise CollmError(f"model_args: {error}; batch_size is a number, not auto") from None
    if size < 1:
        raise CollmError(f"model_args: batch_size must be at least 1, not {size}")
    llm = CollaborativeLM.from_pretrained(
        str(arguments["pretrained"]), assistants, **{name: arguments[name] for name in LOADING if name in arguments}
    )
    return llm, {"params": params, "alone": arguments.get("alone"), "batch_size": size, "out": arguments.get("out")}
