"""What is sent and what comes back, for each kind of server: plain JSON values, no network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from collm.remote.address import Kind
from collm.remote.faults import ServerFault


@dataclass(frozen=True, slots=True)
class Sampling:
    """As `SamplingParams`. The noise is the server's own: another text than this process draws, of the same law."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


class Token(NamedTuple):
    """A written token with its log-probability before temperature and truncation.

    NaN where the server does not tell it. `top`: the most probable tokens, best first. `watched`: the log-probabilities
    of `Completion.watch`.
    """

    token_id: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()
    watched: tuple[float, ...] = ()


class End(NamedTuple):
    """`"stop"`: the last token is one that ends a text; `"length"`: there might have been more."""

    reason: Literal["stop", "length"]


class Given(NamedTuple):
    """A token of a given text: its log-probability, and whether it was the most probable one."""

    log_prob: float
    is_top: bool


@dataclass(frozen=True, slots=True)
class Completion:
    """A text to go on with.

    `stop_ids`: tokens that end it, besides the model's own. `num_top`: how many of the most probable tokens are told.
    `watch`: tokens whose log-probability is told at each place, instead. `settings`: for the plugin of collm in a vLLM.
    """

    token_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    num_top: int = 0
    watch: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.token_ids and self.max_tokens >= 1
        assert not (self.num_top and self.watch), "servers tell one or the other"

    def after(self, written: Sequence[int]) -> Completion:
        """What is left of it once some tokens are there. With noise of its own, or it would be drawn twice."""
        sampling = replace(self.sampling, seed=self.sampling.seed + len(written))
        return replace(
            self,
            token_ids=[*self.token_ids, *written],
            max_tokens=self.max_tokens - len(written),
            sampling=sampling,
        )


class Dialect(ABC):
    """How one kind of server is asked.

    `streams`: tokens can be had one by one. `block`: how many are asked for at a time where they cannot.
    """

    streams: bool
    block: int = 0
    path: str
    tokenize_path: str
    version_path: str | None = None
    scores: bool = True
    """Whether log-probabilities of given tokens are told."""
    plugin: bool = False
    """Whether the server may run collm's plugin."""

    @abstractmethod
    def body(self, completion: Completion, model: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def parse(self, answer: Mapping[str, Any], completion: Completion) -> tuple[list[Token], End | None]:
        """The tokens of an answer, or of a piece of one, and whether it ends there.

        Raises:
            KeyError, TypeError, ValueError: it is not what such a server answers.
            ServerFault: it says that something went wrong, or lacks what is needed.
        """

    @abstractmethod
    def score_body(self, token_ids: Sequence[int], model: str | None) -> dict[str, Any]:
        """Raises:
        ServerFault: such a server does not score given tokens.
        """

    @abstractmethod
    def parse_score(self, answer: Mapping[str, Any], token_ids: Sequence[int]) -> list[Given]:
        """For each token but the first."""

    @abstractmethod
    def tokenize_body(self, text: str, model: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def context_length(self, card: Mapping[str, Any]) -> int | None:
        """From an entry of `/v1/models`."""

    def parse_version(self, answer: Mapping[str, Any]) -> str:
        """From the answer of `version_path`."""
        return str(answer["version"])

    def parse_tokens(self, answer: Mapping[str, Any]) -> list[int]:
        return [int(number) for number in answer["tokens"]]


NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}
"""Said in each request, for a vLLM takes some of them from the model's generation config where a request does not say:
Qwen's sets a repetition penalty, by which even the most probable token is another."""


class VLLM(Dialect):
    streams = True
    path = "/v1/completions"
    tokenize_path = "/tokenize"
    version_path: str | None = "/version"
    plugin = True

    def body(self, completion: Completion, model: str | None) -> dict[str, Any]:
        sampling = completion.sampling
        body: dict[str, Any] = {
            "prompt": list(completion.token_ids),
            "max_tokens": completion.max_tokens,
            "temperature": sampling.temperature,
            **NEUTRAL,
            "stream": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "logprobs": max(1, completion.num_top) if completion.watch else completion.num_top,
        }
        if model is not None:
            body["model"] = model
        if sampling.temperature > 0:
            body |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "seed": sampling.seed}
        if completion.stop_ids:
            body["stop_token_ids"] = list(completion.stop_ids)
        if completion.watch:
            body["logprob_token_ids"] = list(completion.watch)
        if completion.settings:
            body["vllm_xargs"] = dict(completion.settings)
        return body

    def parse(self, answer: Mapping[str, Any], completion: Completion) -> tuple[list[Token], End | None]:
        _raise_error(answer)
        if not answer["choices"]:
            return [], None
        choice = answer["choices"][0]
        ids, told = choice.get("token_ids"), choice.get("logprobs")
        if ids is None and choice.get("text"):
            raise ServerFault("the server gives no token ids (return_token_ids), so its texts cannot be used")
        ids = ids or []
        if ids and told is None:
            raise ServerFault("the server gives no log-probabilities (logprobs)")
        tokens = []
        for i, number in enumerate(ids):
            listed = (told["top_logprobs"][i] if told["top_logprobs"] else None) or {}
            top = {_token_id(name): float(value) for name, value in listed.items()}
            best = sorted(top.items(), key=lambda pair: -pair[1])[: completion.num_top]
            watched = tuple(top[watch] for watch in completion.watch)
            tokens.append(Token(int(number), float(told["token_logprobs"][i]), tuple(best), watched))
        reason = choice.get("finish_reason")
        if reason is None:
            return tokens, None
        if reason not in ("stop", "length"):
            raise ServerFault(f"the server ended the text with {reason!r}", repeatable=True)
        return tokens, End(reason)

    def score_body(self, token_ids: Sequence[int], model: str | None) -> dict[str, Any]:
        body = {"prompt": list(token_ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        return body if model is None else body | {"model": model}

    def parse_score(self, answer: Mapping[str, Any], token_ids: Sequence[int]) -> list[Given]:
        _raise_error(answer)
        told = answer["choices"][0].get("prompt_logprobs")
        if told is None:
            raise ServerFault("the server gives no log-probabilities of given tokens (prompt_logprobs)")
        if len(told) != len(token_ids):
            raise ValueError(f"{len(told)} log-probabilities for {len(token_ids)} tokens")
        entries = [told[i][str(token_ids[i])] for i in range(1, len(token_ids))]
        return [Given(float(entry["logprob"]), entry["rank"] == 1) for entry in entries]

    def tokenize_body(self, text: str, model: str | None) -> dict[str, Any]:
        body = {"prompt": text, "add_special_tokens": False}
        return body if model is None else body | {"model": model}

    def context_length(self, card: Mapping[str, Any]) -> int | None:
        return card.get("max_model_len")


class OpenAI(VLLM):
    """Whatever takes token ids and gives them back, as vLLM does, but is not known to run collm's plugin."""

    version_path = None
    plugin = False


RANDOM_SEED = 2**32 - 1
"""For which a llama.cpp takes any seed that it likes."""


class LlamaCpp(Dialect):
    """llama.cpp's own endpoint. Streamed, it keeps tokens back that end inside a character; so it is asked for blocks,
    which costs little, for it keeps the prefix."""

    streams = False
    block = 16
    path = "/completion"
    tokenize_path = "/tokenize"
    version_path = "/props"
    scores = False

    def body(self, completion: Completion, model: str | None) -> dict[str, Any]:
        sampling = completion.sampling
        return {
            "prompt": list(completion.token_ids),
            "n_predict": min(self.block, completion.max_tokens),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            "samplers": ["temperature", "top_k", "top_p"],
            "mirostat": 0,
            "dynatemp_range": 0.0,
            "seed": sampling.seed % RANDOM_SEED,
            "n_probs": max(1, completion.num_top),
            "return_tokens": True,
            "cache_prompt": True,
            "stream": False,
        }

    def parse(self, answer: Mapping[str, Any], completion: Completion) -> tuple[list[Token], End | None]:
        _raise_error(answer)
        if completion.watch or completion.settings:
            raise ServerFault("llama.cpp cannot hold the base of a pair: it tells no score of a gate")
        # Where all its tokens end inside a character, there is none to tell, and no such key.
        ids, told = answer["tokens"], answer.get("completion_probabilities", [])
        entries: dict[int, list[Mapping[str, Any]]] = {}
        for entry in told:
            entries.setdefault(int(entry["id"]), []).append(entry)
        if not set(entries) <= set(ids):
            raise ValueError(f"log-probabilities of other tokens than {ids}")
        # It tells none of tokens that end inside a character. Those are other ids than the ones that complete it, but
        # where they are not, nobody can say whose the number is.
        known = {number: iter(found) for number, found in entries.items() if len(found) == ids.count(number)}
        tokens = [_llama_token(int(n), next(known[n]) if n in known else None, completion.num_top) for n in ids]
        for i, token in enumerate(tokens):
            if token.token_id in completion.stop_ids:
                return tokens[: i + 1], End("stop")
        if answer["stop_type"] == "eos":
            return tokens, End("stop")
        # Fewer than were asked for, and no end of a text: its context is full.
        asked = min(self.block, completion.max_tokens)
        return tokens, End("length") if len(tokens) < asked or asked == completion.max_tokens else None

    def score_body(self, token_ids: Sequence[int], model: str | None) -> dict[str, Any]:
        raise ServerFault(
            "llama.cpp's server tells no log-probabilities of given tokens: score with the GGUF file in this process, "
            "or with a vLLM"
        )

    def parse_score(self, answer: Mapping[str, Any], token_ids: Sequence[int]) -> list[Given]:
        raise AssertionError("not asked")

    def parse_version(self, answer: Mapping[str, Any]) -> str:
        return str(answer["build_info"])

    def tokenize_body(self, text: str, model: str | None) -> dict[str, Any]:
        return {"content": text, "add_special": False}

    def context_length(self, card: Mapping[str, Any]) -> int | None:
        return (card.get("meta") or {}).get("n_ctx")


DIALECTS: Mapping[Kind, Dialect] = {"vllm": VLLM(), "llamacpp": LlamaCpp(), "openai": OpenAI()}


def _llama_token(number: int, entry: Mapping[str, Any] | None, num_top: int) -> Token:
    if entry is None:
        return Token(number, math.nan)
    top = tuple((int(one["id"]), float(one["logprob"])) for one in entry["top_logprobs"])
    return Token(number, float(entry["logprob"]), top[:num_top])


def _token_id(name: str) -> int:
    if not name.startswith("token_id:"):
        raise ServerFault(
            "the server names tokens by their texts (return_tokens_as_token_ids), which several may share"
        )
    return int(name.removeprefix("token_id:"))


def _raise_error(answer: Mapping[str, Any]) -> None:
    """An error in the body of a good status: how a stream that has begun tells one."""
    error = answer.get("error")
    if error:
        message = error.get("message", error) if isinstance(error, Mapping) else error
        raise ServerFault(f"the server gave up: {str(message)[:300]}", repeatable=True)
