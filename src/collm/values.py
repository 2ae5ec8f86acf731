"""What travels between decoders and models: a `Query` or an `Extend` goes out, an `Answer` comes back.

An answer is a token first, chosen by the model where its law lies; the law itself travels only for methods that mix
laws. So a transformer in this process, a server and a calculator are the same kind of thing: a `LanguageModel`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar

from collm.errors import CollmError
from collm.views import View

if TYPE_CHECKING:
    from torch import Tensor

    from collm.cuts import Cuts


@dataclass(frozen=True, slots=True)
class Draw:
    """How a model chooses its token. `temperature` 0 is greedy; see `SamplingParams`.

    The noise is a function of (seed, sample, position, token) alone, the position being that of the completion.
    """

    seed: int = 0
    sample: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


GREEDY = Draw()


class WriteOn(NamedTuple):
    """Leave to write on by itself: up to `max_tokens` tokens more, each behind the one that it chose before.

    `until`: where it would defer (a `Policy`) it stops, but for the first `passing` times; None: it never defers.
    """

    max_tokens: int
    until: Any = None
    passing: int = 0


Values = TypeVar("Values", bound=tuple[Any, ...])


def made_of(kind: type[Values], *columns: Iterable[Any]) -> list[Values]:
    """Named tuples by the columns of all their fields, one for each place of the shortest. `kind(...)` takes three to
    five times as long, and there are some for each token."""
    return list(map(tuple.__new__, repeat(kind), zip(*columns, strict=False)))


class Foreseen(NamedTuple):
    """What a model will probably be asked: how it goes on behind `token_id`, which comes behind the first `length`
    tokens of `view`, whatever these are followed by now."""

    view: View
    length: int
    token_id: int
    draw: Draw


Then = Callable[[Sequence[int]], Foreseen | None]
"""See `Query.then`."""


class Query(NamedTuple):
    """One pass of a model: an answer after each of the last `num_last` prefixes of the first `length` tokens of `view`.

    `num_last` 0 reads without an answer (a piece of a long prompt). On request the answers carry the log-probability
    of *given* tokens, `given[i]` being the one behind the i-th of these prefixes, the `num_top` most probable tokens,
    or the whole law.

    With `write_on` a model may give more answers than that (`LanguageModel.write_on`); it need not. `then` says, where
    whoever asks can tell, what the base will be asked next if these tokens are chosen behind the prefixes; it is called
    before the answers are there, and changes none.

    Where models share chunks (`collm.cuts`), `last_bytes` are for each of these prefixes the byte behind which a chunk
    might open, `START` at the beginning of a completion, -1 where nobody asks. Then only text and ends are chosen, with
    `opens` behind the last prefix only what opens a chunk, and the answers' `top_token_id`, `entropy` and `log_close`
    are of what opens one.
    """

    model: int
    view: View
    length: int
    num_last: int = 1
    draw: Draw = GREEDY
    given: Sequence[int] | None = None
    num_top: int = 0
    law: bool = False
    last_bytes: Sequence[int] = ()
    opens: bool = False
    write_on: WriteOn | None = None
    then: Then | None = None

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        num_last: int = 1,
        *,
        model: int = 0,
        given: Sequence[int] | None = None,
        law: bool = False,
    ) -> Query:
        """About a text that nobody writes on: all of it is prompt."""
        return cls(model, View(token_ids), len(token_ids), num_last, given=given, law=law)

    @property
    def ends(self) -> range:
        """The lengths of the prefixes that it asks about."""
        return range(self.length - self.num_last + 1, self.length + 1)


class Extend(NamedTuple):
    """Write on by yourself from the end of `view`: until you would defer, stop, or have written `max_tokens`.

    The answers come as a stream, one for each token, and the flow that asked may stop listening after any of them.
    `until` says where this model would defer (a `Policy`), None where it never does. A model that cannot test it
    itself is asked token by token. `num_top` as in `Query`. `passing`: deferrals that whoever asked would write past; a
    model may stop at any.
    """

    model: int
    view: View
    max_tokens: int
    draw: Draw = GREEDY
    until: Any = None
    num_top: int = 0
    passing: int = 0


NO_TOKEN: Final = -1
"""In place of a token that a model did not choose, for it stopped where it would defer."""
UNKNOWN: Final = math.nan
"""A number that a model does not tell (`LanguageModel.lacks` says so beforehand)."""


class Answer(NamedTuple):
    """The next token of one prefix, and what its law says about it. Log-probabilities are natural logarithms under the
    model's own law, before temperature and truncation.

    `token_id`: the model's choice. `top_token_id`: the most probable token. `entropy`: of the law, in nats.
    `log_gate`: `[1+K]` logs of the gate `P(Z = z | prefix)`, from a base that has one. On request: `given_log_prob`,
    `top` (the most probable tokens with their log-probabilities, best first) and `law`, `[V]` float32 log-probabilities
    over the shared vocabulary, where the model left them. Behind one of `last_bytes`: `log_close`, the logarithm of the
    probability that a chunk opens there (0 where nothing else may come).

    What a model behind a server does not tell is `UNKNOWN`, or None. `defers`: it has tested `Extend.until` itself, and
    stops here to defer (then `token_id` is `NO_TOKEN`) or does not; None: whoever asked is to test it.
    """

    token_id: int
    log_prob: float
    top_token_id: int | None
    top_log_prob: float
    entropy: float
    log_gate: tuple[float, ...] | None = None
    given_log_prob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    law: Tensor | None = None
    defers: bool | None = None
    log_close: float = 0.0


Told = Literal["law", "top", "entropy", "given", "blocks"]
"""What answers may lack: the law, the most probable token with its log-probability, the entropy, log-probabilities of
given tokens, answers after many prefixes for about the price of one."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A model that failed after one prefix (predictions that are not numbers, a server that is gone), and how.

    A fault belongs to one text: what else was asked in the same pass is answered as ever.
    """

    reason: str


Reply = Answer | Fault | None
"""`None`: the model abstains after this prefix (a tool that has nothing to say). The base never does."""
Replies = list[list[Reply]]
"""For each query its answers, oldest prefix first."""


KeepOn = Callable[[int, int], bool]
Tell = Callable[[list[tuple[int, list[Reply]]]], None]
Chosen = Callable[[list[tuple[Query, Sequence[int]]]], None]
"""See `LanguageModel.write_on`."""


class LanguageModel(ABC):
    """Anything that writes the next token of a prefix: a transformer, a server, a calculator.

    What it remembers of earlier queries (a KV cache) is its own affair and never changes an answer. The engine calls
    `predict` from one thread at a time for each `device`.
    """

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text of this model."""
        return frozenset()

    @property
    def context_length(self) -> int | None:
        """Tokens that it can read at most; None: no bound."""
        return None

    @property
    def device(self) -> Hashable:
        """Where its passes run. Models of one device take turns, for each would slow the other down and spoil its
        batches; those of different devices run at the same time."""
        return "cpu"

    @property
    def lacks(self) -> Mapping[Told, str]:
        """What its answers do not tell, each with the reason. What needs it is refused, or does without."""
        return MappingProxyType({})

    @property
    def tests_deferral(self) -> bool:
        """As a base it finds by itself where a threshold is exceeded (`Answer.defers`), and need not tell what it read
        there."""
        return False

    @property
    def closing_told(self) -> bool:
        """Whether `Answer.log_close` is what it says; else closing factors are taken for 1."""
        return True

    @property
    def closing_approximated(self) -> bool:
        """Whether the user has asked for that where it matters: in code."""
        return False

    def share_chunks(self, cuts: Cuts, first_bytes: Sequence[int]) -> None:
        """From now on it answers queries with `last_bytes`; `first_bytes` as in `cuts.Codec`.

        Raises:
            CollmError: it cannot say which of its tokens may open a chunk.
        """
        raise CollmError(
            f"{self.name} cannot say which of its tokens may open a chunk: between models with different tokenizers, "
            "only transformers models in this process, tools and models behind servers can write"
        )

    @property
    def instant(self) -> bool:
        """It answers within microseconds, so that nobody should wait for it, nor it for company."""
        return False

    @property
    def pass_curve(self) -> Sequence[tuple[int, float]]:
        """Seconds of its passes by their tokens, if they have been measured: where more tokens begin to cost."""
        return ()

    @abstractmethod
    def predict(self, queries: Sequence[Query]) -> Replies:
        """The answers of one pass. Those to one query depend on no other query, nor on earlier calls."""

    @property
    def writes_on(self) -> bool:
        """Whether it can write several tokens in one call (`write_on`), for less than as many calls cost."""
        return False

    def write_on(
        self, queries: Sequence[Query], keep_on: KeepOn | None, tell: Tell | None = None, chosen: Chosen | None = None
    ) -> Replies:
        """As `predict`, but behind the last prefix of a query with `Query.write_on` it may write on, and gives the
        answers after those tokens, too: the last one where it stopped, at the end of the text or where it would defer.

        Args:
            keep_on: asked before each further pass whether there shall be one, with how many texts would take part and
                how many have stopped so far. None: there shall be none.
            tell: may be told, while a pass runs, the answers that are there by then, each once and in order, with the
                places of their queries: whoever reads them need not wait for the others. All are returned, too.
            chosen: may be told, without `keep_on`, the tokens that are chosen behind the prefixes of each query, before
                the answers are put together: another model may begin meanwhile (`foresee`). Of a prediction that is
                no number, anything at all.
        """
        return self.predict(queries)

    def foresee(self, coming: Sequence[Foreseen]) -> None:  # noqa: B027 (most models wait until they are asked)
        """It may begin with a pass that answers these. What is asked then answers as ever, begun or not. Called while
        another model of the same `device` answers, in its thread."""

    @property
    def max_cache_tokens(self) -> int | None:
        """Tokens that its caches may hold of all texts together; None: as many as are asked for."""
        return None

    def missing(self, query: Query) -> int:
        """Tokens that a pass for this query has to read: what the caches do not hold."""
        return max(1, query.num_last)

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether texts that grow to these lengths can be held at the same time."""
        return True

    def reused(self, view: View) -> int:
        """Tokens at the beginning of a text that the caches had already when it came. Called from any thread."""
        return 0

    def release(self, view: View) -> None:  # noqa: B027 (most models keep nothing)
        """This text has ended. What the caches hold of it may be given up. Called from any thread."""


class StreamingModel(LanguageModel):
    """A model that serves many requests at the same time and writes on by itself: one behind a server."""

    @abstractmethod
    def start(self, request: Query | Extend, deliver: Callable[[list[Reply] | None], None]) -> Callable[[], None]:
        """Begin to answer, without waiting.

        `deliver` is called from any thread: for a `Query` once, with its answers; for an `Extend` with the answers as
        they come and with None when it has ended. What it returns cancels the request, after which nothing may be
        delivered that matters.
        """
