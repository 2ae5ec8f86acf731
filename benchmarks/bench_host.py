"""What Python costs for a token, beside the models: driver and decoder, the pace of speculation, `predict`.

    python benchmarks/bench_host.py --against f3d9da1 --json host.json

The models cost nothing: scripted answers for driver and decoder, a stubbed forward pass for `predict`. Every token is
deferred, so that it takes two queries. Times are process times (all threads), measured in processes of their own, of
this checkout and of another commit in turn; told are medians, and the ratio pair by pair with its interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from commits import environment, sources

CASES = [
    ("driver and decoder", 16, 100),
    ("driver and decoder", 16, 32_000),
    ("predict", 16, 100),
    ("predict", 16, 32_000),
    ("adaptive pace", 1, 100),
    ("fixed pace", 1, 100),
]
TOKENS = 64


def answer(position: int, base: bool) -> Any:
    """Base and assistant write different tokens at one place of seven."""
    token_id = 5 if base or position % 7 else 6
    gate = (-0.4, -1.2) if base else None
    if _new():
        from collm.values import Answer

        return Answer(token_id, -0.1, token_id, -0.1, 0.3, gate)
    from collm.types import Prediction

    return Prediction(_law(), token_id, gate)


def _new() -> bool:
    try:
        import collm.values  # noqa: F401
    except ImportError:
        return False
    return True


_laws: list[Any] = []


def _law() -> Any:
    import torch

    if not _laws:
        _laws.append(torch.zeros(8).log_softmax(0))
    return _laws[0]


def free_models() -> list[Any]:
    """A base and an assistant whose answers are there already."""
    if _new():
        from collm.values import LanguageModel

        answers = {base: [answer(p, base) for p in range(7)] for base in (True, False)}

        class Free(LanguageModel):
            name = "free"  # type: ignore[assignment]

            def __init__(self, base: bool) -> None:
                self.answers = answers[base]

            def predict(self, queries: Any) -> Any:
                own = self.answers
                return [[own[(q.length - i) % 7] for i in range(q.num_last, 0, -1)] for q in queries]

        return [Free(True), Free(False)]

    answers = {base: [answer(p, base) for p in range(7)] for base in (True, False)}

    class Old:
        name, eos_token_ids = "free", frozenset[int]()

        def __init__(self, base: bool) -> None:
            self.answers = answers[base]

        def predict(self, queries: Any) -> Any:
            own = self.answers
            return [[own[(len(q.token_ids) - i) % 7] for i in range(q.num_last, 0, -1)] for q in queries]

    return [Old(True), Old(False)]


def write(what: str, batch: int, context: int) -> float:
    """Seconds of process time for a token."""
    from collm.decoding.collaborative import collaborative
    from collm.decoding.experience import Experience, PassCosts
    from collm.decoding.pace import AdaptivePace, FixedPace
    from collm.decoding.policies import Always
    from collm.decoding.speculative import speculative
    from collm.sampling_params import SamplingParams

    drafts = what.endswith("pace")

    class Settled(Experience):
        """What passes cost is known, and stays so."""

        def observe_pass(self, model: int, rows: int, tokens: int, seconds: float) -> None:
            pass

    models, experience = free_models(), Settled() if drafts else Experience()
    eos, prompt = [frozenset[int]()] * 2, tuple(i % 7 for i in range(context))
    make: Callable[..., Any] = speculative if drafts else collaborative
    if drafts:
        # Where a token more costs twice a pass, no draft pays, so both commits go token by token and make their plans
        # from the same figures, not from what the clock says of models that cost nothing.
        for model in (0, 1):
            costs = experience.costs[model] = PassCosts()
            for _ in range(20):
                for tokens in (1, 16):
                    costs.observe(1, tokens, 0.02 * tokens - 0.01)

    def flows() -> Iterator[tuple[Any, Any]]:
        for n in range(batch):
            params = SamplingParams(max_tokens=TOKENS, seed=n)
            pace = FixedPace() if what == "fixed pace" else AdaptivePace(experience)
            more = [pace] if drafts else []
            if _new():
                from collm.views import Text

                text = Text([prompt] * 2)
                yield make(text, params, Always(), eos, *more), text
            else:
                yield make([prompt] * 2, params, Always(), eos, *more), None

    if not _new():
        from collm.decoding.run import run

        began = time.process_time()
        for _ in run([flow for flow, _ in flows()], models, batch, experience=experience):
            pass
        return (time.process_time() - began) / (batch * TOKENS)

    from queue import SimpleQueue

    from collm.engine import Engine

    done: SimpleQueue[Any] = SimpleQueue()
    engine = Engine(models, max_num_seqs=batch, experience=experience)
    own = list(flows())

    def sink(event: Any) -> None:
        if not hasattr(event, "token_id"):
            done.put(event)

    def run_all(some: Any) -> None:
        for flow, text in some:
            engine.submit(flow, text, TOKENS, sink)
        for _ in some:
            done.get()

    # It lives on: a call finds its threads running.
    run_all([next(flows())])
    began = time.process_time()
    run_all(own)
    seconds = time.process_time() - began
    engine.close()
    return seconds / (batch * TOKENS)


def predict(batch: int, context: int) -> float:
    """Seconds of process time for a token in `LocalModel.predict`, the forward pass stubbed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from collm.bench.synthetic import make_tokenizer
    from collm.models.local import LocalModel

    tokenizer = make_tokenizer(64)
    shape: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, max_position_embeddings=context + 2 * TOKENS, **shape
        )
    ).eval()
    model = LocalModel(network, tokenizer, num_slots=batch)
    assert model._cache is not None
    pool: Any = model._cache.pool
    hidden = torch.randn(4096, 16)

    def forward(rows: Any, token_ids: Any, more: Any = None) -> Any:
        states = hidden[: len(token_ids)] if len(token_ids) <= 4096 else hidden[:1].expand(len(token_ids), 16)
        return states if more is None else (states, torch.tensor(list(more), dtype=torch.int64))

    pool.forward = forward
    prompts = [tuple((n + i) % 61 for i in range(context)) for n in range(batch)]
    if _new():
        from collm.values import Query
        from collm.views import Text

        texts = [Text([prompt]) for prompt in prompts]

        def ask() -> None:
            model.predict([Query(0, text.views[0], len(text.views[0])) for text in texts])
            for text in texts:
                text.append(5)
    else:
        from collm.types import Query

        rows = list(prompts)

        def ask() -> None:
            model.predict([Query(0, row) for row in rows])  # type: ignore[arg-type, call-arg]
            rows[:] = [(*row, 5) for row in rows]

    for _ in range(3):
        ask()
    began = time.process_time()
    for _ in range(TOKENS):
        ask()
    return (time.process_time() - began) / (batch * TOKENS)


def measure() -> list[float]:
    """One figure for each of `CASES`, in seconds; the first round of each only warms up."""
    import torch

    torch.set_num_threads(1)
    found = []
    for what, batch, context in CASES:

        def once(what: str = what, batch: int = batch, context: int = context) -> float:
            return predict(batch, context) if what == "predict" else write(what, batch, context)

        once()
        found.append(min(once() for _ in range(3)))
    return found


def overlapped() -> tuple[float, float]:
    """Seconds of wall time of two texts together, whose models sleep on devices of their own, and of the longer one."""
    from queue import SimpleQueue

    from collm.decoding.collaborative import single
    from collm.engine import Engine
    from collm.sampling_params import SamplingParams
    from collm.values import LanguageModel
    from collm.views import Text

    class Sleeps(LanguageModel):
        name = "sleeps"  # type: ignore[assignment]

        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        @property
        def device(self) -> int:
            return id(self)

        def predict(self, queries: Any) -> Any:
            time.sleep(self.seconds)
            return [[answer(q.length, True)] for q in queries]

    engine, done = Engine([Sleeps(0.01), Sleeps(0.04)]), SimpleQueue[Any]()

    def write_alone(*asked: tuple[int, int]) -> float:
        began = time.perf_counter()
        for model, tokens in asked:
            text, params = Text([[1], [1]]), SamplingParams(max_tokens=tokens)
            flow = single(model, text, params, [frozenset()] * 2)
            engine.submit(flow, text, tokens, lambda event: None if hasattr(event, "token_id") else done.put(event))
        for _ in asked:
            done.get()
        return time.perf_counter() - began

    write_alone((0, 1), (1, 1))
    larger = max(write_alone((0, 20)), write_alone((1, 5)))
    return write_alone((0, 20), (1, 5)), larger


def in_process(source: Path) -> list[float]:
    command = [sys.executable, __file__, "--measure"]
    out = subprocess.run(command, env=environment(source), capture_output=True, text=True, check=True)
    found: list[float] = json.loads(out.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="measure this commit, too, in turn")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of processes (5)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure()))
        return
    with sources(options.against) as folders:
        rounds = [[in_process(source) for source in folders] for _ in range(options.rounds)]
    rows = []
    for n, (what, batch, context) in enumerate(CASES):
        own = [each[0][n] for each in rounds]
        row: dict[str, Any] = {"figure": what, "batch": batch, "context": context, "us": 1e6 * statistics.median(own)}
        if options.against:
            ratios = sorted(each[0][n] / each[1][n] for each in rounds)
            row |= {
                "us_against": 1e6 * statistics.median(each[1][n] for each in rounds),
                "ratio": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
            }
        rows.append(row)
        told = f"{what}, batch {batch}, context {context}: {row['us']:.0f} us a token"
        if options.against:
            told += f", {row['us_against']:.0f} before; ratio {row['ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(told)
    pairs = sorted(together / larger for together, larger in (overlapped() for _ in range(options.rounds)))
    rows.append({"figure": "two models together / the larger", "ratio": statistics.median(pairs)})
    print(
        f"two models of equal time together / the larger: {rows[-1]['ratio']:.2f} ({pairs[0]:.2f} to {pairs[-1]:.2f})"
    )
    if options.json:
        options.json.write_text(
            json.dumps({"against": options.against, "rounds": options.rounds, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
