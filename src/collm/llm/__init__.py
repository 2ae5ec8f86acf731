"""The facade: a base and its assistants that write one text together.

Its names are imported when they are first used: `collm.llm.deferral` says what a checkpoint's calibration allows, and
needs no torch for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collm.llm.model import CollaborativeLM
    from collm.llm.prompt import Prompt, TokenPrompt
    from collm.llm.sources import AssistantSource
    from collm.llm.writing import Chunk, GenerationFailed

__all__ = ["AssistantSource", "Chunk", "CollaborativeLM", "GenerationFailed", "Prompt", "TokenPrompt"]

_HOME = {
    "AssistantSource": "sources",
    "Prompt": "prompt",
    "TokenPrompt": "prompt",
    "Chunk": "writing",
    "GenerationFailed": "writing",
}
"""Where a name lives; the others are in `model`."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME.get(name, 'model')}"), name)
    globals()[name] = value
    return value
