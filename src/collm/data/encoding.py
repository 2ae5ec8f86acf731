"""A whole data set as one model sees it, with what was cut away counted and reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from collm.data.examples import Example
from collm.data.formatting import Encoded, Formatter
from collm.errors import CollmError
from collm.types import Message

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedSet:
    """All examples, in their order. A *dropped* one has no labelled token left and is of no use, but keeps its place,
    so that the encodings (and scores) of several models stay aligned."""

    items: tuple[Encoded, ...]

    @property
    def kept(self) -> list[int]:
        """Indices of the examples with at least one labelled token."""
        return [i for i, item in enumerate(self.items) if item.num_labelled]

    @property
    def dropped(self) -> int:
        return len(self.items) - len(self.kept)

    @property
    def truncated(self) -> int:
        """Examples that lost tokens; the dropped ones included."""
        return sum(item.truncated_tokens > 0 for item in self.items)

    @property
    def truncated_tokens(self) -> int:
        return sum(item.truncated_tokens for item in self.items)

    @property
    def labelled_tokens(self) -> int:
        return sum(item.num_labelled for item in self.items)


def usable(
    examples: Sequence[Example],
    formatters: Sequence[Formatter],
    *,
    skip_bad: bool,
    question: Callable[[Example], Sequence[Message] | str] | None = None,
) -> list[Example]:
    """The examples of which every model can be shown all and be taught all.

    Args:
        formatters: the base's first; the completions' tokens are its.
        skip_bad: leave out the others and log how many; False gives the examples as they are: whoever encodes a bad
            one is told.
        question: what is asked of each, where examples are asked, not learnt.

    Raises:
        CollmError: none is left.
    """

    def ask(example: Example) -> None:
        assert question is not None
        for formatter in formatters:
            formatter.prompt(question(example))

    def learn(example: Example) -> None:
        shared = formatters[0].completions(example)
        for formatter in formatters[1:]:
            formatter.encode(example, completions=shared)

    return left_out(examples, [learn if question is None else ask], skip_bad=skip_bad, labelled=question is None)


def left_out(
    examples: Sequence[Example],
    ways: Sequence[Callable[[Example], object]],
    *,
    skip_bad: bool,
    labelled: bool = True,
) -> list[Example]:
    """The examples that none of these `ways` of reading refuses; with `skip_bad` False, all of them.

    Args:
        labelled: what they raise names the example.

    Raises:
        CollmError: none is left.
    """
    if not skip_bad:
        return list(examples)
    kept = []
    for example in examples:
        try:
            for way in ways:
                way(example)
        except CollmError as error:
            place = "" if labelled else f"{example.label}: "
            logger.warning("skipped: %s%s", place, error)
        else:
            kept.append(example)
    if len(kept) < len(examples):
        logger.warning(
            "skipped %d rows of %d that cannot be shown to the models", len(examples) - len(kept), len(examples)
        )
    if not kept:
        raise CollmError("there are no rows that can be shown to the models; see the warnings")
    return kept


def encode_examples(
    examples: Sequence[Example],
    formatter: Formatter,
    *,
    max_length: int | None = None,
    completions_from: Formatter | None = None,
) -> EncodedSet:
    """Encode all examples for one model.

    Args:
        completions_from: the base's formatter, where `formatter` is an assistant's; the completions' tokens are its.
        max_length: tokens of this model's sequence, cut from the right. As its prompt may be longer or shorter than
            the base's, models may keep different numbers of labelled tokens: always the first ones.

    Raises:
        CollmError: an example without an assistant turn, or nothing left after truncation.
    """
    items = tuple(
        formatter.encode(example, max_length, completions_from.completions(example) if completions_from else None)
        for example in examples
    )
    return checked(EncodedSet(items), max_length)


def checked(encoded: EncodedSet, max_length: int | None) -> EncodedSet:
    """Say what was cut away.

    Raises:
        CollmError: nothing is left.
    """
    items = encoded.items
    if not encoded.kept:
        raise CollmError(
            f"none of {len(items)} examples has a labelled token within the first {max_length} tokens: "
            "the prompts alone are longer; raise max_length"
            if items
            else "there are no examples"
        )
    if rewritten := sum(item.rewritten > 0 for item in items):
        logger.warning(
            "the chat template rewrites earlier turns (it drops their thoughts, say): %d of %d conversations are "
            "learnt by their last turn alone; give each of the %d earlier turns a row of its own to learn it as well",
            rewritten,
            len(items),
            sum(item.rewritten for item in items),
        )
    if encoded.truncated:
        logger.warning(
            "max_length %s cut %d tokens off %d of %d examples; %d of them have no labelled token left and are dropped",
            max_length,
            encoded.truncated_tokens,
            encoded.truncated,
            len(items),
            encoded.dropped,
        )
    return encoded
