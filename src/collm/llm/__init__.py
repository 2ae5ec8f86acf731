"""The facade: a base and its assistants that write one text together."""

from collm.llm.assistants import AssistantSource
from collm.llm.model import Chunk, CollaborativeLM, GenerationFailed
from collm.llm.prompt import Prompt, TokenPrompt

__all__ = ["AssistantSource", "Chunk", "CollaborativeLM", "GenerationFailed", "Prompt", "TokenPrompt"]
