"""What collm brings to vLLM: deferral decided inside the engine, where the logits are.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`), so nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Any

PROCESSOR = "collm.vllm_plugin.processor:Deferral"
"""As `--logits-processors` names it."""


def register() -> None:
    """Let a vLLM that serves an export (`collm export`) decide about its deferrals, whatever flags it was given.

    Without the logits processor nothing would be decided, and a deferral token could be sampled like any other. A vLLM
    that serves something else is left as it is.
    """
    from vllm.engine.arg_utils import EngineArgs

    create: Any = EngineArgs.create_model_config
    if getattr(create, "_collm", False):  # vLLM may load its plugins more than once
        return

    def create_model_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        if getattr(config.hf_config, "collm", None) is not None:
            from collm.vllm_plugin.request import admit

            admit(config.hf_config.collm)
            named = [*(config.logits_processors or [])]
            if PROCESSOR not in named:
                config.logits_processors = [*named, PROCESSOR]
        return config

    create_model_config._collm = True  # type: ignore[attr-defined]
    EngineArgs.create_model_config = create_model_config
