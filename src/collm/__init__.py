"""collm: language models that learn to write together, token by token.

What most users need stands here. The names are imported when they are first used, so that `import collm`, and with it
`collm --help`, costs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collm.errors import CollmError
    from collm.gate import log_gate, log_posterior, marginal_nll
    from collm.llm import CollaborativeLM, GenerationFailed
    from collm.models.tools import Tool
    from collm.sampling_params import SamplingParams
    from collm.types import Generation, Step, Usage
    from collm.values import Answer, Draw, Extend, Fault, LanguageModel, Query, StreamingModel

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "CollaborativeLM",
    "CollmError",
    "Draw",
    "Extend",
    "Fault",
    "Generation",
    "GenerationFailed",
    "LanguageModel",
    "Query",
    "SamplingParams",
    "Step",
    "StreamingModel",
    "Tool",
    "Usage",
    "__version__",
    "log_gate",
    "log_posterior",
    "marginal_nll",
]

_HOME = {
    "CollaborativeLM": "collm.llm",
    "GenerationFailed": "collm.llm",
    "CollmError": "collm.errors",
    "log_gate": "collm.gate",
    "log_posterior": "collm.gate",
    "marginal_nll": "collm.gate",
    "SamplingParams": "collm.sampling_params",
    "Tool": "collm.models.tools",
    **dict.fromkeys(("Answer", "Draw", "Extend", "Fault", "LanguageModel", "Query", "StreamingModel"), "collm.values"),
}
"""Where a name lives; the others in `__all__` are in `collm.types`."""
_HEAVY = ("collm.llm", "collm.gate")


def __getattr__(name: str) -> object:
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME.get(name, "collm.types")
    if home in _HEAVY and "torch" not in sys.modules:
        from collm.signs import sign

        sign("importing torch and transformers takes some seconds")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
