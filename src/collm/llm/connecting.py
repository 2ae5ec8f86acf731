"""Bases and assistants behind servers: found to be what they should be, with the tokenizers that show them prompts."""

from __future__ import annotations

import warnings
from pathlib import Path

from collm.data.formatting import Formatter, PromptFormat
from collm.llm.servers import find_base
from collm.models.info import AssistantInfo, CheckpointInfo
from collm.models.loading import load_tokenizer
from collm.models.specs import is_tool, is_url, locate
from collm.models.tokenizers import difference, shared_vocab_size
from collm.models.whole import told_ends
from collm.remote.address import Address
from collm.remote.connecting import connect
from collm.remote.model import RemoteModel


def connect_base(path: str, base: str | None) -> tuple[RemoteModel, Formatter, CheckpointInfo]:
    """Raises:
    CollmError: as `find_base` and `connect`.
    """
    found = find_base(path, base)
    tokenizer = load_tokenizer(found.folder)
    deferrals = frozenset(() if found.gate is None else found.gate.defer_token_ids)
    model = connect(
        found.url, tokenizer, name="base", served=found.gate, eos_token_ids=told_ends(Path(found.folder)) - deferrals
    )
    return model, Formatter(tokenizer, PromptFormat(**found.info.base_format)), found.info


def connect_assistant(url: str, info: AssistantInfo, base: Formatter, vocab_size: int) -> tuple[RemoteModel, Formatter]:
    """An assistant, shown its prompts by the tokenizer that its URL names, or that of the model it was trained with
    where that is here; else by the base's.

    Raises:
        CollmError: as `connect`.

    Warns:
        UserWarning: it was trained with a model whose chat template is not here.
    """
    spec = Address.parse(url).tokenizer
    if spec is None and info.spec and not is_tool(info.spec) and not is_url(info.spec):
        if Path(locate(info.spec)).exists():
            spec = info.spec
        elif not info.format.get("chat_template"):
            warnings.warn(
                f"{info.name} is shown prompts by the base's chat template, for {info.spec}, with which the gate was "
                "trained, is not here; name a folder with its tokenizer, if it has a template of its own "
                "(tokenizer=FOLDER)",
                stacklevel=2,
            )
    tokenizer = base.tokenizer
    if spec is not None:
        tokenizer = load_tokenizer(spec)
        if difference(base.tokenizer, tokenizer) is not None:  # they share chunks
            vocab_size = shared_vocab_size(tokenizer)
    # A server heeds its generation config, too.
    ends = frozenset[int]() if spec is None else told_ends(Path(spec))
    model = connect(url, tokenizer, name=info.name, eos_token_ids=ends, vocab_size=vocab_size)
    return model, Formatter(tokenizer, PromptFormat(**info.format))
