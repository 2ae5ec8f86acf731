"""What a server counts, under the names that vLLM's dashboards know, with our prefix."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from collm.llm import CollaborativeLM
from collm.types import Generation
from collm.values import StreamingModel

PREFIX = "collm:"
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
PASS_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Timing:
    """When the tokens of one text came, in seconds of `time.perf_counter`."""

    def __init__(self) -> None:
        self.arrived = time.perf_counter()
        self.tokens: list[float] = []

    def token(self) -> None:
        self.tokens.append(time.perf_counter())


class Metrics:
    """The counters of one server. `model`: the name that the pair is served under."""

    def __init__(self, llm: CollaborativeLM, model: str) -> None:
        self.registry = CollectorRegistry()
        self._llm, self._model = llm, model
        self._gauge("num_requests_running", "Texts that are written now.").set_function(self._running)
        self._gauge("num_requests_waiting", "Texts that wait for a place.").set_function(self._waiting)
        self._gauge(
            "kv_cache_usage_perc", "Share of the caches that running texts hold, of the model that has least room."
        ).set_function(self._cache_usage)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, of the base's.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens that were written.")
        self.preemptions = self._counter("num_preemptions", "Texts that gave up their place: none ever does.")
        self._cache_queries = self._labelled(
            "prefix_cache_queries", "Tokens of prompts that each model's caches were searched for.", "of"
        )
        self._cache_hits = self._labelled("prefix_cache_hits", "Those that they had.", "of")
        self._success = self._labelled("request_success", "Texts that were finished.", "finished_reason")
        self._by_author = self._labelled("generation_tokens_by_author", "Tokens that each model wrote.", "author")
        self._passes = self._labelled("forward_passes", "Passes of each model, counted for every text in them.", "of")
        self.deferrals = self._counter("deferred_tokens", "Tokens that an assistant wrote.")
        self.drafted = self._counter("drafted_tokens", "Tokens that were drafted ahead.")
        self.accepted = self._counter("accepted_tokens", "Drafted tokens that stand.")
        self.recovered = self._counter("recovered_tokens", "Drafted tokens in whose place another one stands.")
        iterations = Histogram(
            PREFIX + "iteration_tokens_total",
            "Tokens that a pass of a model reads, prompts and what is written.",
            ["model_name", "of"],
            buckets=PASS_TOKENS,
            registry=self.registry,
        )
        self._iterations = [iterations.labels(model, name) for name in llm.model_names]
        llm.engine.count_passes(lambda number, tokens: self._iterations[number].observe(tokens))
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between two tokens of a text.", SECONDS)
        self.e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", SECONDS)
        self.queue = self._histogram("request_queue_time_seconds", "From arrival to a place.", SECONDS)
        self.inference = self._histogram("request_inference_time_seconds", "From a place to the end.", SECONDS)
        self.prefill = self._histogram("request_prefill_time_seconds", "From a place to the first token.", SECONDS)
        self.decode = self._histogram("request_decode_time_seconds", "From the first token to the end.", SECONDS)
        self.request_prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", "Tokens of a text.", TOKENS)
        self.params_n = self._histogram("request_params_n", "Texts that a request asks for, for each prompt.", TOKENS)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "As a request has it.", TOKENS)
        self.disconnected = self._counter(
            "http_requests_client_disconnected", "Clients that went away before their answer was complete."
        )
        self.refused = self._labelled("http_requests_refused", "Requests that got an error.", "status")

    def _running(self) -> float:
        return self._llm.engine.load.running

    def _waiting(self) -> float:
        return self._llm.engine.load.waiting

    def _cache_usage(self) -> float:
        """Tokens of what runs, over what may be held: the bound of the cache, or so many texts of full length."""
        engine = self._llm.engine
        load, shares = engine.load, [0.0]
        for model, context, tokens in zip(self._llm.models, self._llm.context_lengths, load.tokens, strict=True):
            most = model.max_cache_tokens
            if most is None and context is not None:
                most = context * engine.max_num_seqs
            shares.append(load.running / engine.max_num_seqs if most is None else tokens / most)
        return min(1.0, max(shares))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, ["model_name"], registry=self.registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name"], registry=self.registry).labels(self._model)

    def _labelled(self, name: str, text: str, label: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", label], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self.registry).labels(
            self._model
        )

    def asked(self, n: int, max_tokens: int, prompt_tokens: Sequence[int]) -> None:
        """A request was taken on."""
        self.params_n.observe(n)
        self.params_max_tokens.observe(max_tokens)
        for tokens in prompt_tokens:
            self.prompt_tokens.inc(tokens)
            self.request_prompt.observe(tokens)

    def refuse(self, status: int) -> None:
        self.refused.labels(self._model, str(status)).inc()

    def finished(self, generation: Generation, timing: Timing, prompts: Sequence[Sequence[int]]) -> None:
        """A text has ended. `prompts`: what each model saw."""
        now, usage = time.perf_counter(), generation.usage
        self._success.labels(self._model, generation.finish_reason).inc()
        self.generation_tokens.inc(generation.completion_tokens)
        self.request_generation.observe(generation.completion_tokens)
        for name, tokens in zip(generation.model_names, usage.tokens_by_author, strict=False):
            self._by_author.labels(self._model, name).inc(tokens)
        for name, passes in zip(generation.model_names, usage.forward_passes, strict=False):
            self._passes.labels(self._model, name).inc(passes)
        for z, cached in enumerate(usage.cached_tokens):
            model, name = self._llm.models[z], generation.model_names[z]
            if usage.forward_passes[z] and not (model.instant or isinstance(model, StreamingModel)):
                self._cache_queries.labels(self._model, name).inc(len(prompts[z]))
                self._cache_hits.labels(self._model, name).inc(cached)
        self.deferrals.inc(sum(usage.tokens_by_author[1:]))
        self.drafted.inc(usage.drafted)
        self.accepted.inc(usage.accepted)
        self.recovered.inc(usage.recovered)
        self.e2e.observe(now - timing.arrived)
        self.queue.observe(max(0.0, now - timing.arrived - usage.seconds))
        self.inference.observe(usage.seconds)
        if timing.tokens:
            self.first_token.observe(timing.tokens[0] - timing.arrived)
            self.prefill.observe(usage.first_token_seconds)
            self.decode.observe(max(0.0, usage.seconds - usage.first_token_seconds))
            for before, after in zip(timing.tokens, timing.tokens[1:], strict=False):
                self.inter_token.observe(after - before)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)
