"""The models that wrote or might have written the training text, and their scores of it: made here or given."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collm.data.chunks import Reader
from collm.data.examples import Example
from collm.data.formatting import Formatter, PromptFormat
from collm.data.scores import Fingerprint, load_info, load_scores, scores_fingerprint
from collm.data.scoring import score, score_tool
from collm.errors import CollmError
from collm.identity.finding import writer_identity
from collm.identity.known import Opened
from collm.models.codec import ByteCodec
from collm.models.devices import best_device
from collm.models.info import AssistantInfo, same_weights
from collm.models.loading import load_tokenizer
from collm.models.pairing import cuts_between, require_free_tools
from collm.models.specs import is_tool, is_url, portable
from collm.models.tokenizers import tokenizer_fingerprint
from collm.models.tools import Tool, make_tool
from collm.training.checking import not_at_hand
from collm.training.dataset import digest
from collm.training.recipe import ModelSection
from collm.values import LanguageModel, StreamingModel

logger = logging.getLogger(__name__)

SPLITS = {"train": "scores", "validation": "validation_scores"}
"""The splits, and the recipe's key for scores of each."""


@dataclass(frozen=True)
class Writer:
    """One of the models, as far as scoring goes: base or assistant."""

    name: str
    section: ModelSection
    formatter: Formatter | None
    """None: all its scores were made elsewhere, and it is not opened."""
    tool: LanguageModel | None = None
    given: Mapping[str, Path] = field(default_factory=dict)
    """Scores that the user made beforehand, by split."""

    @property
    def open_formatter(self) -> Formatter:
        assert self.formatter is not None, f"{self.name} is not opened"
        return self.formatter


def make_writer(
    name: str,
    section: ModelSection,
    base: Writer | None,
    *,
    one_file: bool,
    own_texts: bool = False,
    day: str | None = None,
) -> Writer:
    """One model's tokenizer and format.

    Args:
        base: None for the base itself.
        one_file: both splits were cut from one file, so its scores cover both.
        own_texts: there are texts to be scored of which nobody has scores yet.
        day: told by templates that ask for it, if the recipe gives none.

    Raises:
        CollmError: an assistant that has to be opened is not there.
    """
    paths = {"train": section.scores, "validation": section.scores if one_file else section.validation_scores}
    given = {split: path for split, path in paths.items() if path is not None}
    if base is not None and is_tool(section.model):
        # A tool reads the base's text as it is.
        formatter = base.open_formatter
        return Writer(name, section, formatter, make_tool(section.model, formatter.tokenizer), given)
    if (
        base is not None
        and not own_texts
        and given.keys() == SPLITS.keys()
        # Of models that share chunks every tokenizer is needed.
        and all("completions" in (told := load_info(p)) and "cuts" not in told["fingerprint"] for p in given.values())
    ):
        return Writer(name, section, None, None, given)
    try:
        tokenizer = _tokenizer_of(section.model, base)
    except CollmError as error:
        if base is None:
            raise
        lacking = [key for split, key in SPLITS.items() if split not in given and not (one_file and split != "train")]
        raise not_at_hand(name, error, None if own_texts else lacking) from error
    return Writer(name, section, formatter_of(tokenizer, section, day), None, given)


def formatter_of(tokenizer: PreTrainedTokenizerBase, section: ModelSection, day: str | None) -> Formatter:
    """How a model is shown its prompts; `day` is told by templates that ask for it, if the recipe gives none."""
    formatter = Formatter(tokenizer, PromptFormat(**section.format.to_dict()))
    if formatter.format.date is not None and section.format.date is None:
        formatter = Formatter(tokenizer, replace(formatter.format, date=day))
    return formatter


def _tokenizer_of(spec: str, base: Writer | None) -> PreTrainedTokenizerBase:
    """A server's model has the tokenizer that its URL names, or the base's; that is found out when it is asked."""
    if base is None or not is_url(spec):
        return load_tokenizer(spec)
    from collm.remote.address import Address

    named = Address.parse(spec).tokenizer
    return base.open_formatter.tokenizer if named is None else load_tokenizer(named)


def readers_of(writers: Sequence[Writer]) -> list[Reader] | None:
    """How the models read examples, base first, where they have different tokenizers and share chunks; None where they
    have one. (A tool reads as the base does.)

    Raises:
        CollmError: a tokenizer does not keep texts as they are; a tool writes what is no chunk.
    """
    opened = [writer for writer in writers if writer.formatter is not None and writer.tool is None]
    cuts = cuts_between([w.open_formatter.tokenizer for w in opened], [w.name for w in opened])
    if cuts is None:
        return None
    if any(writer.formatter is None for writer in writers):
        lacking = next(writer.name for writer in writers if writer.formatter is None)
        raise CollmError(
            f"assistant {lacking!r}: the models of this recipe have different tokenizers, so the tokenizer of each is "
            "needed: give its model where it can be read, beside its scores"
        )
    codecs = {w.name: ByteCodec(w.open_formatter.tokenizer, cuts, name=w.name) for w in opened}
    require_free_tools(cuts, [writer.tool for writer in writers if isinstance(writer.tool, Tool)])
    base = Reader(writers[0].open_formatter, codecs[writers[0].name])
    return [
        base,
        *(base if w.tool is not None else Reader(w.open_formatter, codecs[w.name], base) for w in writers[1:]),
    ]


def scores_of(
    writer: Writer,
    splits: Mapping[str, Sequence[Example]],
    base: Formatter,
    max_length: int,
    folder: Path,
    model: PreTrainedModel | None = None,
    *,
    progress: bool = True,
    chunks: Reader | None = None,
) -> dict[str, Path]:
    """Where each split's scores are: those given, checked, or made (or resumed) in `folder`.

    Args:
        model: the writer's, if it is loaded already.
        chunks: how it reads examples, where the models share chunks.

    Raises:
        CollmError: given scores were made from something else.
    """
    if writer.formatter is None:
        _check_unopened(writer, base, max_length)
        return dict(writer.given)
    formatter, tool = writer.formatter, writer.tool
    options: dict[str, Any] = {"completions_from": None if formatter is base else base, "max_length": max_length}
    if is_url(writer.section.model):
        from collm.remote.connecting import connect

        tool = connect(writer.section.model, formatter.tokenizer, name=writer.name)
    opened = Opened(writer.section.model, dtype=writer.section.dtype, device=best_device(), model=model)
    who = opened.identity if tool is None else writer_identity(tool)
    weights = opened.fingerprint if tool is None else None
    paths: dict[str, Path] = {}
    for split, examples in splits.items():
        cuts = None if chunks is None else chunks.cuts.fingerprint
        fingerprint = scores_fingerprint(examples, who, formatter, **options, cuts=cuts)
        if split in writer.given:
            _check_given(writer.given[split], fingerprint, writer.name, weights)
            paths[split] = writer.given[split]
            continue
        made: dict[str, Any] = {
            "progress": progress and f"{writer.name}, {split}",
            "wait": True,
        }  # recipes share a cache
        # Named by what it depends on, so that recipes can share a folder.
        paths[split] = folder / f"{writer.name}-{split}-{digest(fingerprint)}"
        if isinstance(tool, StreamingModel):
            from collm.data.served import score_served
            from collm.remote.model import RemoteModel

            assert isinstance(tool, RemoteModel)
            score_served(examples, tool, formatter, paths[split], **made, **options, chunks=chunks)
        elif tool is not None:
            score_tool(examples, tool, formatter, paths[split], **made, **options, chunks=chunks)
        else:
            score(examples, opened, formatter, paths[split], **made, **options, chunks=chunks)
    return paths


def _check_given(path: Path, fingerprint: Fingerprint, name: str, weights: str | None) -> None:
    """Do scores that the user made fit? Some of the scored file may have been held out since, so data are matched by
    id, by `assemble`; and scoring in another dtype is the user's choice, which is told."""
    info = load_info(path)
    expect = {key: value for key, value in fingerprint.items() if key != "data"}
    there, here = info["fingerprint"]["model"], fingerprint["model"]
    kept = info.get("weights_fingerprint")
    if weights and kept and same_weights(weights, kept) and there["dtype"] != here["dtype"]:
        logger.warning("%s was scored in %s, and the recipe has %s in %s", path, there["dtype"], name, here["dtype"])
        del expect["model"]
    load_scores(path, expect=expect)


def _check_unopened(writer: Writer, base: Formatter, max_length: int) -> None:
    """Do scores made elsewhere fit the base, the recipe and one another? Their own metadata tell."""
    expect: Fingerprint = {"tokenizer": tokenizer_fingerprint(base.tokenizer), "max_length": max_length}
    wanted_format = writer.section.format.to_dict()
    for path in writer.given.values():
        load_scores(path, expect=expect)
        info = load_info(path)
        if info["completions"] != base.completions_fingerprint():
            raise CollmError(
                f"{path} is stale: the tokens scored are not those the base learns (another chat template, other "
                "template_kwargs or another EOS); score again with --base"
            )
        day = {key: value for key, value in info["prompt_format"].items() if key == "date"}
        if wanted_format and {**day, **wanted_format} != info["prompt_format"]:
            raise CollmError(
                f"{path} is stale: its prompts were shown with {info['prompt_format']}, and the recipe's format of "
                f"{writer.name!r} is {wanted_format}; score again, or leave the format to the scores"
            )
        # The second split's must be of the very model that the first one's are of.
        expect |= {key: info["fingerprint"][key] for key in ("model", "format")}


def assistant_info(writer: Writer, scores: Path) -> AssistantInfo:
    """What the checkpoint keeps of an assistant, from its scores of the training text."""
    info = load_info(scores)
    # Of a formatter rather than of the recipe: it holds the day that its template tells.
    format = info["prompt_format"] if writer.formatter is None else writer.formatter.format.to_dict()
    return AssistantInfo(
        name=writer.name,
        spec=portable(writer.section.model),
        tokenizer_fingerprint=None if writer.tool else info["fingerprint"]["tokenizer"],
        weights_fingerprint=info.get("weights_fingerprint"),
        format={} if writer.tool else format,
    )
