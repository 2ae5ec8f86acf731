"""Everything that a GPU has to show, in five minutes on a bare machine: torch 2.11 or newer, Triton, transformers, and
this repository's source.

    PYTHONPATH=src python benchmarks/gpu.py OUT [--device cuda] [--seconds 290] [--shape gpu]

Each section is measured by itself, the most telling ones first; what fails is written down and costs the others
nothing. OUT/gpu.json is written anew after each. `--device cpu` tries the script out on tiny models, with the twins of
the kernels. The demands are those of docs/results.md; nothing else may use the card meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
try:
    import pydantic  # noqa: F401
except ImportError:  # it describes checkpoints, of which there are none here
    shim: Any = types.ModuleType("pydantic")
    shim.BaseModel, shim.ValidationError = object, ValueError
    shim.ConfigDict, shim.Field = dict, lambda *_, **__: None
    sys.modules["pydantic"] = shim

import torch

from collm.bench import card

DEMANDS = card.DEMANDS


class Unready(Exception):
    """Nothing that follows would measure what it is to measure."""


class Bench:
    """What the sections share: the pair, what was found, and how much time is left."""

    def __init__(self, out: Path, device: str, shape: str, seconds: float) -> None:
        self.out, self.device, self.shape = out, torch.device(device), shape
        self.cuda = self.device.type == "cuda"
        self.began, self.seconds = time.perf_counter(), seconds
        self.found: dict[str, Any] = {"figures": {}, "ratios": {}, "errors": {}, "took": {}, "warnings": []}
        self.networks: dict[str, Any] = {}
        self.models: dict[str, Any] = {}
        self.bandwidth = 0.0
        self.ready = True
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def note(self, key: str, value: Any) -> None:
        self.found["figures"][key] = value
        print(f"[{time.perf_counter() - self.began:6.1f}] {key}: {json.dumps(value, default=str)[:300]}", flush=True)

    def ratio(self, key: str, value: float) -> None:
        self.found["ratios"][key] = value
        asked = ""
        if key in DEMANDS:
            at_most, limit = DEMANDS[key]
            asked = f" {'<=' if at_most else '>='} {limit} {holds(value, *DEMANDS[key])}"
        print(f"[{time.perf_counter() - self.began:6.1f}] {key} = {value:.3f}{asked}", flush=True)

    def section(self, name: str, work: Callable[[Bench], None], least: float = 3.0) -> None:
        if self.left < least:
            self.found["errors"][name] = "no time left"
            self.save()
            return
        began = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                work(self)
            said = sorted({str(each.message)[:300] for each in told})[:10]
            self.found["warnings"] += said
            for each in said:
                print(f"warning: {each}", flush=True)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.ready &= not isinstance(error, Unready)
            self.found["errors"][name] = "".join(traceback.format_exception(error))[-3000:]
            print(f"!! {name}: {error!r}", flush=True)
        self.found["took"][name] = round(time.perf_counter() - began, 1)
        self.save()

    def save(self) -> None:
        found = self.found["ratios"]
        demands = {
            key: {"limit": f"{'<=' if at_most else '>='} {limit}", "found": found.get(key),
                  "holds": holds(found[key], at_most, limit) if key in found else None}
            for key, (at_most, limit) in DEMANDS.items()
        }  # fmt: skip
        path = self.out / "gpu.json"
        whole = json.dumps({**self.found, "demands": demands}, indent=1, default=str)
        path.with_suffix(".tmp").write_text(whole + "\n")
        path.with_suffix(".tmp").replace(path)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def timed(self, work: Callable[[], Any]) -> float:
        """Milliseconds."""
        return card.timed(work, self.device) * 1e3


def holds(value: float, at_most: bool, limit: float) -> bool:
    return value <= limit if at_most else value >= limit


def machine(bench: Bench) -> None:
    import numpy
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": numpy.__version__,
                "python": platform.python_version()}  # fmt: skip
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    bench.note("versions", versions)
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        bench.note("commit", commit.stdout.strip() or None)
    except (OSError, subprocess.SubprocessError):
        bench.note("commit", None)
    if bench.cuda:
        found = torch.cuda.get_device_properties(bench.device)
        bench.note("card", {"name": found.name, "memory_gb": found.total_memory / 1e9, "cuda": torch.version.cuda})
        try:
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            bench.note("driver", subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip())
        except (OSError, subprocess.SubprocessError):
            bench.note("driver", None)
    bench.bandwidth = card.copy_bandwidth(bench.device, card.COPIED if bench.cuda else 2**25)
    bench.note("copy_bytes_per_second", bench.bandwidth)


def build(bench: Bench) -> None:
    """The pair of `collm bench --shape gpu`: its dial is the one that gave agreement 0.9 on the probe."""
    from collm.bench.synthetic import SHAPES, Dial, Shape, make_model

    shape = SHAPES[bench.shape] if bench.shape != "tiny" else Shape(64, 96, 1, 4, 2, 320)
    dtype = "bfloat16" if bench.cuda else "float32"
    layers = {"base": 0, "assistant": 28 if bench.shape == "gpu" else 2}
    for name, extra in layers.items():
        bench.networks[name] = make_model(shape, extra, dtype=dtype, device=str(bench.device))
    Dial(bench.networks["assistant"], shape.num_layers).set(0.078125)
    bench.wait()
    sizes = {name: network.num_parameters() for name, network in bench.networks.items()}
    bench.note("parameters", sizes)


def own_machinery(bench: Bench, **changed: Any) -> Any:
    """None leaves it to the package; on a CPU the twins, captured by the fake."""
    from collm.models.paged.machinery import Machinery, machinery_for

    if bench.cuda:
        found = machinery_for(bench.networks["base"], "bench")
        if found is None:
            raise RuntimeError("the package finds no kernels or graphs for this card; see the warnings")
    else:
        from collm.models.paged.capture import FakeCapture
        from collm.models.paged.dense import TorchDense
        from collm.models.paged.ops import TorchOps
        from collm.models.paged.telling import TorchTelling

        found = Machinery(TorchOps(), TorchTelling(), FakeCapture(), TorchDense())
    values = {"ops": found.ops, "telling": found.telling, "capture": found.capture, "dense": found.dense, **changed}
    return Machinery(**values)


def loaded(
    bench: Bench, name: str, *, tokens: int = 16 * 1024, slots: int = 16, network: Any = None, cache: bool = True,
    compiled: bool = False, **changed: Any,
) -> Any:  # fmt: skip
    """A model of the pair, or another `network` in its place; without `cache` its plain twin."""
    from collm.bench.synthetic import make_tokenizer
    from collm.models.head import DeferralHead
    from collm.models.local import LocalModel

    network = bench.networks[name] if network is None else network
    head = None
    if name == "base":
        head = DeferralHead(network.config.hidden_size, 1).to(bench.device)

    class Endless(LocalModel):
        @property
        def eos_token_ids(self) -> frozenset[int]:
            return frozenset()

    tokenizer = make_tokenizer(network.config.vocab_size)
    return Endless(network, tokenizer, head, name=name, num_slots=slots, max_cache_tokens=tokens, cache=cache,
                   machinery=own_machinery(bench, **changed), **({"compiled": True} if compiled else {}))  # fmt: skip


def ready(bench: Bench) -> None:
    """From loaded networks to all graphs; kernels are compiled afresh where Triton's cache is empty."""
    total = 0.0
    for name in ("base", "assistant"):
        began = time.perf_counter()
        bench.models[name] = loaded(bench, name)
        tried = time.perf_counter() - began
        captured = bench.models[name].warm_up()
        total += tried + captured
        stepper, cache = bench.models[name].graphs
        bench.note(f"ready.{name}", {"trial_s": tried, "graphs_s": captured, "graphs": list(stepper.buckets),
                                     "graphs_gb": stepper.graph_bytes / 1e9,
                                     "body": type(cache.paged.body).__name__})  # fmt: skip
    bench.ratio("ready_seconds", total)
    steppers = [model.graphs[0] for model in bench.models.values()]
    if not all(stepper and stepper.buckets for stepper in steppers):
        raise Unready("there are no graphs; the warnings say why")
    if bench.cuda:
        bench.note("memory_gb", torch.cuda.memory_reserved(bench.device) / 1e9)


def bound(bench: Bench, name: str, keys: int = 0, tokens: int = 1) -> float:
    """Milliseconds of reading once what a pass over some tokens needs, and so many positions of keys and values."""
    return card.bytes_read(bench.networks[name], keys, tokens) / bench.bandwidth * 1e3


def passes(bench: Bench) -> None:
    """Pass time by number of tokens, context 100: replays alone, and with the work of the host."""
    for name, model in bench.models.items():
        for count in (1, 2, 4, 8, 16, 32, 64, 128, 192, 256):
            limit = bound(bench, name, tokens=count)
            rows = min(count, 16)
            bucket, whole = card.filled(model, [card.CONTEXT] * rows, [count // rows] * rows)
            with torch.inference_mode():
                replayed, with_host = bench.timed(bucket.replay), bench.timed(whole)
            bench.note(f"pass_ms.{name}.T{count}", {"replay": replayed, "with_host": with_host, "bound": limit})
            bench.ratio(f"pass.{name}.T{count}", replayed / limit)


def counts(bench: Bench) -> None:
    """Launches, copies and waits of the CUDA runtime in a pass, by the profiler."""
    _, whole = card.filled(bench.models["base"], [card.CONTEXT] * 16, [1] * 16)
    if bench.cuda:
        calls = card.runtime_calls(whole)
        bench.note("runtime_calls_a_pass", calls)
        launches, waits = card.launches_and_waits(calls)
        bench.ratio("launches_a_pass", launches)
        bench.ratio("waits_a_pass", waits)


Written = tuple[list[list[int]], float, float]


def write(
    bench: Bench, engine: Any, batch: int, limit: int, how: str, seed: int, rate: float = 0.3, watched: Any = ()
) -> Written:
    """Texts, the seconds that they took, and those spent in passes; `watched` begin anew."""
    from queue import SimpleQueue

    from collm.decoding.collaborative import collaborative, single
    from collm.decoding.pace import AdaptivePace
    from collm.decoding.policies import Random
    from collm.decoding.speculative import speculative
    from collm.engine import Finished
    from collm.sampling_params import SamplingParams
    from collm.views import Text

    vocab = engine.models[0].model.config.vocab_size
    done: SimpleQueue[Any] = SimpleQueue()
    eos = [frozenset[int]()] * len(engine.models)
    spent = [0.0]

    def counted(one: Any) -> None:
        spent[0] += one.seconds

    for model in engine.models:
        model.on_pass = counted
        card.emptied(model)
    for model, each in zip(engine.models, watched, strict=False):
        model.on_pass = lambda done, each=each: each.add(done.tokens, done.seconds)
        each.anew()
    texts = []
    began = time.perf_counter()
    for n in range(batch):
        rng = random.Random(f"{seed} {n}")
        prompt = [rng.randrange(vocab) for _ in range(64)]
        text = Text([prompt] * len(engine.models))
        own = {"temperature": 1.0, "top_p": 0.9} if how == "sampled" else {}
        params = SamplingParams(max_tokens=limit, seed=seed * 1000 + n, **own)
        if how in ("alone", "sampled", "base"):
            flow = single(0 if how == "base" else 1, text, params, eos)
        elif how == "speculative":
            flow = speculative(text, params, Random(rate, 1), eos, AdaptivePace(engine.experience))
        else:
            flow = collaborative(text, params, Random(rate, 1), eos)
        texts.append(text)

        def sink(event: Any) -> None:
            if isinstance(event, Finished):
                done.put(event)

        engine.submit(flow, text, limit, sink)
    for _ in range(batch):
        event = done.get(timeout=max(5.0, bench.left))
        if event.error is not None:
            raise RuntimeError(event.error)
    seconds = time.perf_counter() - began
    return [text.views[0].token_ids[64:] for text in texts], seconds, spent[0]


def decoding(bench: Bench, batches: Sequence[int] = (1, 16), overlapped: bool = False) -> None:
    """Tokens a second of the whole engine: each alone, the pair plain and speculative."""
    from collm.engine import Engine

    limit, rounds = (256, 3) if bench.cuda else (6, 1)
    models = [bench.models["base"], bench.models["assistant"]]
    if overlapped:
        for model in models:
            model.overlap()
    speeds: dict[str, float] = {}
    mark = ".two_streams" if overlapped else ""
    for batch in batches:
        engine = Engine(models, max_num_seqs=batch)
        try:
            plain: list[list[int]] = []
            for how in ("base", "alone", "plain", "speculative", "sampled"):
                write(bench, engine, batch, max(4, limit // 4), how, 99)
                best, share, same = 0.0, [], None
                for seed in range(rounds):
                    texts, seconds, spent = write(bench, engine, batch, limit, how, seed)
                    best = max(best, sum(map(len, texts)) / seconds)
                    share.append(seconds / spent if spent else 0.0)
                    if how == "plain":
                        plain += texts
                    elif how == "speculative":
                        same = [a == b for a, b in zip(texts, plain[seed * batch :], strict=False)]
                speeds[f"{how}.b{batch}"] = best
                equal = None if same is None else sum(same) / len(same)
                told = {"tok_s": best, "wall_over_passes": min(share), "equal_to_plain": equal}
                bench.note(f"tok_s.{how}.b{batch}{mark}", told)
            for how in ("plain", "speculative"):
                key = f"{how}.b{batch} : alone.b{batch}{mark}"
                bench.ratio(key, speeds[f"{how}.b{batch}"] / speeds[f"alone.b{batch}"])
            if batch == max(batches):
                key = f"sampled.b{batch} : greedy.b{batch}{mark}"
                bench.ratio(key, speeds[f"sampled.b{batch}"] / speeds[f"alone.b{batch}"])
        finally:
            engine.close()
    bench.found.setdefault("speeds", {}).update({key + mark: value for key, value in speeds.items()})


def overhead(bench: Bench) -> None:
    """Wall time over the times of the replays of the very passes that were run, for the pair with its policy: the
    median of some runs, since hosts hiccup."""
    from collm.engine import Engine

    limit, runs = (256, 5) if bench.cuda else (6, 2)
    models = [bench.models["base"], bench.models["assistant"]]
    spent = [card.Spent(model, 64 + limit // 2) for model in models]
    for batch in (1, 16):
        engine = Engine(models, max_num_seqs=batch)
        try:
            write(bench, engine, batch, limit, "plain", 7)
            found = []
            for seed in range(8, 8 + runs):
                _, seconds, _ = write(bench, engine, batch, limit, "plain", seed, watched=spent)
                graphs = [each.seconds for each in spent]
                found.append((seconds / sum(graphs), seconds, graphs, [each.passes for each in spent]))
            found.sort(key=lambda run: run[0])
            ratio, wall, graphs, passes = found[len(found) // 2]
            told = {"wall": wall, "graphs": graphs, "passes": passes, "all": [run[0] for run in found]}
            bench.note(f"overhead_s.b{batch}", told)
            bench.ratio(f"overhead.b{batch}", ratio)
        finally:
            engine.close()


def idle(bench: Bench) -> None:
    """Where the card waits for the host: from a pass's answers being read to the launch of the next one, by the models
    of both, plain and speculative; microseconds, median and 90th of a hundred, and how often."""
    from collm.engine import Engine
    from collm.models.paged.stepping import Stepper

    models = [bench.models["base"], bench.models["assistant"]]
    names = {id(model.graphs[0]): name for model, name in zip(models, ("base", "assistant"), strict=True)}
    own: Any = Stepper._replay, Stepper.told
    log: list[tuple[str, str, float, float]] = []

    def timed(kind: str, step: Any) -> Any:
        def work(self: Any, *arguments: Any) -> Any:
            began = time.perf_counter()
            found = step(self, *arguments)
            log.append((kind, names[id(self)], began, time.perf_counter()))
            return found

        return work

    for how in ("plain", "speculative"):
        for batch in (1, 16):
            engine = Engine(models, max_num_seqs=batch)
            try:
                write(bench, engine, batch, 64 if bench.cuda else 4, how, 99)
                log.clear()
                Stepper._replay, Stepper.told = timed("launch", own[0]), timed("read", own[1])
                seconds = write(bench, engine, batch, 256 if bench.cuda else 6, how, 1)[1]
            finally:
                Stepper._replay, Stepper.told = own
                engine.close()
            under_way, since, spent = 0, ("", 0.0), dict[str, list[float]]()
            for kind, name, began, ended in log:
                if kind == "read":
                    under_way, since = under_way - 1, (name, ended)
                    continue
                if under_way <= 0 and since[0]:
                    spent.setdefault(f"{since[0]} to {name}", []).append(began - since[1])
                spent.setdefault(f"launch of {name}", []).append(ended - began)
                under_way = max(under_way, 0) + 1
            told: dict[str, Any] = {"wall_s": seconds}
            for what, each in spent.items():
                each.sort()
                told[what] = [round(each[len(each) * n // 10] * 1e6) for n in (5, 9)] + [len(each)]
            bench.note(f"idle_us.{how}.b{batch}", told)


@torch.inference_mode()
def launching(bench: Bench) -> None:
    """Microseconds of the host to launch a pass, and until it has ended, if each is waited for: with the copies of plan
    and answers inside its graph, and of kernels alone, which newer drivers are said to launch in one go."""
    for name, model in bench.models.items():
        stepper, _ = card.graphs_of(model)
        for count in (1, 16):
            bucket, _ = card.filled(model, [100] * count, [1] * count)

            def work(stepper: Any = stepper, plan: Any = bucket.plan) -> None:
                stepper.work(plan)

            bare = stepper._capture.record(work)
            for what, replay in (("as it is", bucket.replay), ("kernels alone", bare)):
                launched, ended = list[float](), list[float]()
                for _ in range(50):
                    bench.wait()
                    began = time.perf_counter()
                    replay()
                    launched.append(time.perf_counter() - began)
                    bench.wait()
                    ended.append(time.perf_counter() - began)
                told = [round(statistics.median(each) * 1e6) for each in (launched, ended)]
                bench.note(f"launch_us.{name}.T{count}.{what}", told)


def generate(bench: Bench) -> None:
    """transformers' own `generate`, batch 1."""
    network = bench.networks["assistant"]
    ids = torch.randint(0, 300, (1, 64), device=bench.device)
    limit = 48 if bench.cuda else 4

    def once() -> None:
        network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=0
        )

    with torch.inference_mode():
        once()
        bench.wait()
        began = time.perf_counter()
        once()
        bench.wait()
    speed = limit / (time.perf_counter() - began)
    bench.note("tok_s.generate.b1", speed)
    alone = bench.found.get("speeds", {}).get("alone.b1")
    if alone:
        bench.ratio("alone.b1 : generate.b1", alone / speed)


def long_texts(bench: Bench) -> None:
    length = card.LONG if bench.cuda else 600
    model = loaded(bench, "assistant", tokens=card.room_for_long(length))
    for key, seconds, limit in card.long_passes(model, bench.bandwidth, length):
        bench.note(f"long_ms.{key}", {"replay": seconds * 1e3, "bound": limit * 1e3})
        bench.ratio(f"long.assistant.{key}", seconds / limit)
    model.forget()


def readings(bench: Bench) -> None:
    """What other ways to read keys and to cut them into chunks bring: passes and long texts, over their bounds."""
    if not bench.cuda:
        return
    from collm.models.paged import plan as planned
    from collm.models.paged.triton_ops import TritonOps

    usual = planned.CHUNK, planned.MORE_ITEMS
    for name, chunk, more, how in (
        ("as it is", *usual, {}),
        ("loops alone", *usual, {"wide": 0}),
        ("more programs", *usual, {"programs": 396}),
        ("more items", usual[0], 256, {}),
        ("fewer items", usual[0], 64, {}),
        ("chunks of 512", 512, usual[1], {}),
        ("as it is, again", *usual, {}),
    ):
        planned.CHUNK, planned.MORE_ITEMS = chunk, more
        planned._empty.cache_clear()
        try:
            model = loaded(bench, "assistant", tokens=card.room_for_long(card.LONG), ops=TritonOps(**how))
            found = {f"T{n}": card.pass_seconds(model, n) * 1e3 / bound(bench, "assistant", tokens=n)
                     for n in (1, 16, 64, 128)}  # fmt: skip
            for key, seconds, limit in card.long_passes(model, bench.bandwidth, card.LONG):
                found[key] = seconds / limit
            bench.note(f"readings.{name}", found)
            model.forget()
        finally:
            planned.CHUNK, planned.MORE_ITEMS = usual
            planned._empty.cache_clear()


def by_modules(bench: Bench) -> None:
    """The way of every architecture that has no pass of its own: its modules under a graph, our attention."""
    model = loaded(bench, "base", tokens=8192, dense=None)
    for count in (1, 16):
        bench.ratio(f"modules.base.T{count}", card.pass_seconds(model, count) * 1e3 / bound(bench, "base"))
    model.forget()


def exact(bench: Bench) -> None:
    """Log-probabilities in this precision against the modules' without a cache."""
    from collm.values import Query

    vocab = bench.networks["base"].config.vocab_size
    ids = [random.Random(5).randrange(vocab) for _ in range(96)]
    for name, model in bench.models.items():
        network = bench.networks[name]
        with torch.inference_mode():
            logits = network(torch.tensor([ids], device=bench.device), use_cache=False).logits[0].float()
        laws = logits.log_softmax(-1)
        [found] = model.predict([Query.of(ids, 90)])
        tops = torch.tensor([a.top_log_prob for a in found], device=bench.device)
        same = [a.top_token_id == int(t) for a, t in zip(found, laws[-90:].argmax(-1), strict=True)]
        off = (tops - laws[-90:].max(-1).values).abs()
        entropies = torch.special.entr(laws[-90:].exp()).sum(-1).tolist()
        off_entropy = max(abs(a.entropy - e) for a, e in zip(found, entropies, strict=True))
        told = {"top_log_prob_off": float(off.max()), "same_top": sum(same) / len(same), "entropy_off": off_entropy}
        bench.note(f"exact.{name}", told)


def texts(bench: Bench) -> None:
    """Small models in float32: what graphs and kernels write, against the twin that recomputes every token."""
    from collm.bench.synthetic import Shape, make_model
    from collm.engine import Engine

    shape, limit = Shape(256, 512, 2, 8, 2, 1000), 32 if bench.cuda else 6
    networks = {
        name: make_model(shape, extra, dtype="float32", device=str(bench.device))
        for name, extra in (("base", 0), ("assistant", 2))
    }
    written = {}
    for cache in (True, False):
        models = [loaded(bench, name, network=network, cache=cache) for name, network in networks.items()]
        engine = Engine(models, max_num_seqs=16)
        try:
            for how in ("plain", "speculative", "sampled"):
                for batch in (1, 16):
                    written[how, batch, cache] = write(bench, engine, batch, limit, how, 3)[0]
        finally:
            engine.close()
    for how in ("plain", "speculative", "sampled"):
        for batch in (1, 16):
            twin = written["plain" if how == "speculative" else how, batch, False]
            same = [a == b for a, b in zip(written[how, batch, True], twin, strict=True)]
            bench.note(f"float32_texts_like_the_twin.{how}.b{batch}", sum(same) / len(same))


def devices(bench: Bench) -> None:
    """Networks whose layers lie on the host and on the card: gate, caches and logits lie where their layers do, passes
    run without graphs, and texts are those of the whole network. Small models in float32, by accelerate."""
    try:
        from accelerate import dispatch_model
    except ImportError:
        bench.note("devices", "accelerate is not installed: nothing lays a network over devices")
        return
    from collm.bench.synthetic import Shape, make_model, make_tokenizer
    from collm.engine import Engine
    from collm.models.devices import layer_devices, output_device
    from collm.models.head import DeferralHead
    from collm.models.local import LocalModel

    shape, limit, written = Shape(256, 512, 2, 8, 2, 1000), 32 if bench.cuda else 6, {}
    for spread in (True, False):
        models = []
        for name, extra in (("base", 0), ("assistant", 2)):
            # Made on the host: a card draws other weights from the same seed.
            network = make_model(shape, extra, dtype="float32", device="cpu")
            if not spread:
                network.to(bench.device)
            else:
                first = {"model.embed_tokens": "cpu", "model.layers.0": "cpu"}
                rest = {f"model.layers.{n}": str(bench.device) for n in range(1, shape.num_layers + extra)}
                others = ("model.norm", "model.rotary_emb", "lm_head")
                network = dispatch_model(network, {**first, **rest, **dict.fromkeys(others, str(bench.device))})
            places = [str(place) for place in (*layer_devices(network), output_device(network))]
            head = DeferralHead(256, 1).to(output_device(network)) if name == "base" else None
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                tokenizer = make_tokenizer(shape.vocab_size)
                models.append(LocalModel(network, tokenizer, head, name=name, cache=spread))
            if spread:
                said = [str(each.message) for each in told if "without graphs" in str(each.message)]
                bench.note(f"devices.{name}", {"layers and head": places, "told": said})
        engine = Engine(models, max_num_seqs=16)
        try:
            written[spread] = [write(bench, engine, 16, limit, how, 3)[0] for how in ("plain", "speculative")]
        finally:
            engine.close()
    for how, sharded in zip(("plain", "speculative"), written[True], strict=True):
        same = [a == b for a, b in zip(sharded, written[False][0], strict=True)]
        bench.note(f"devices.texts_like_the_whole.{how}", sum(same) / len(same))


def kernels(bench: Bench) -> None:
    """Where a pass's time goes: microseconds of each kernel in a replay."""
    if not bench.cuda:
        return
    from torch.profiler import ProfilerActivity, profile

    for name, model in bench.models.items():
        for count in (1, 16, 128):
            rows = min(count, 16)
            bucket, _ = card.filled(model, [100] * rows, [count // rows] * rows)
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(3):
                    bucket.replay()
                bench.wait()
            spent = {
                e.key[:90]: [round(e.self_device_time_total / 3, 1), e.count // 3]
                for e in sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:16]
                if e.self_device_time_total
            }
            bench.found["figures"][f"kernels_us.{name}.T{count}"] = spent
            print(f"kernels_us.{name}.T{count}", flush=True)
            for key, (us, number) in spent.items():
                print(f"   {us:9.1f} us {number:4d} x {key}", flush=True)


def attention(bench: Bench) -> None:
    """The kernels against their twins on this device, float32, ragged rows, several chunks, windows, soft-caps."""
    import numpy as np

    from collm.models.attention import Row
    from collm.models.paged import plan as planned
    from collm.models.paged.blocks import Blocks
    from collm.models.paged.ops import TorchOps
    from collm.models.paged.plan import Plan, fill

    ops, worst = own_machinery(bench).ops, dict[str, float]()
    if os.environ.get("TRITON_INTERPRET") == "1":
        from collm.models.paged.triton_ops import TritonOps

        ops = TritonOps(programs=1)
    rows = [Row(0, 700, 3), Row(1, 5, 1), Row(2, 255, 2), Row(3, 0, 9)]
    shapes = ((32, 8, 128), (8, 2, 64), (8, 1, 96), (4, 4, 128)) if bench.cuda else ((4, 2, 24),)
    for heads, kv, dim in shapes:
        for window, cap in ((0, None), (100, 20.0)):
            torch.manual_seed(0)
            blocks = Blocks(16, 4, 8)
            for row in rows:
                blocks.write(row.slot, 0, row.end)
            count, tile = sum(row.width for row in rows), max(16, 1 << (heads // kv - 1).bit_length())
            numbers = np.zeros(planned.size(16), dtype=np.int32)
            items = fill(numbers, rows, [0] * count, blocks, tile // (heads // kv))
            plan = Plan(torch.from_numpy(numbers).to(bench.device), 16, tile, items)
            table = torch.zeros(5, 8, dtype=torch.int32, device=bench.device)
            table[:4] = torch.from_numpy(blocks.table)
            keys, values = (torch.randn(17, kv, 256, dim, device=bench.device) for _ in range(2))
            query = torch.randn(16, heads, dim, device=bench.device)
            ways = [each.attend(query, keys, values, plan, table, dim**-0.5, window, cap) for each in (ops, TorchOps())]
            both = [way[:count] for way in ways]
            worst[f"{heads}:{kv}x{dim} window {window} cap {cap}"] = float((both[0] - both[1]).abs().max())
    bench.note("attention_off", worst)


def drawing(bench: Bench) -> None:
    """Tokens drawn by the kernel against its twin, on this device; they differ where float32 rounds otherwise."""
    import struct

    from collm.models.paged import plan as planned
    from collm.models.paged.plan import DRAW, HEAD, LINES, Plan
    from collm.models.paged.telling import TorchTelling

    telling, count = own_machinery(bench).telling, 64
    import numpy as np

    numbers = np.zeros(planned.size(count), dtype=np.int32)
    for n in range(count):
        how = [(1.0, 1.0, 0), (1.0, 0.9, 0), (0.7, 1.0, 40), (1.3, 0.5, 1000)][n % 4]
        floats = struct.unpack("ii", struct.pack("ff", *how[:2]))
        numbers[HEAD:].reshape(LINES, -1)[DRAW:, n] = (n, 1, 0, n, how[2], *floats)
    plan = Plan(torch.from_numpy(numbers).to(bench.device), count, 16, count)
    torch.manual_seed(0)
    vocab = bench.networks["base"].config.vocab_size
    logits, hidden = torch.randn(count, vocab, device=bench.device) * 3, torch.randn(count, 64, device=bench.device)
    ways = [way.tell(logits, hidden, None, plan, vocab) for way in (telling, TorchTelling())]
    same = (ways[0][:, 4] == ways[1][:, 4]).view(-1, 4).float().mean(0).tolist()
    bench.note(
        "drawn_like_the_twin",
        {
            "plain, top-p, top-k, both": same,
            "off": float(
                (ways[0][:, 1:3].contiguous().view(torch.float32) - ways[1][:, 1:3].contiguous().view(torch.float32))
                .abs()
                .max()
            ),
        },
    )
    took = bench.timed(lambda: telling.tell(logits[:16], hidden[:16], None, plan, vocab))
    bench.note("tell_ms_16_drawn", took)


def two_streams(bench: Bench) -> None:
    """Last of those that decode: the models do not go back."""
    decoding(bench, batches=(16,), overlapped=True)


def compiled(bench: Bench) -> None:
    """The modules compiled, under a graph."""
    if not bench.cuda:
        return
    began = time.perf_counter()
    model = loaded(bench, "base", tokens=8192, compiled=True, dense=None)
    seconds = card.pass_seconds(model, 16)
    bench.note("compile_s", time.perf_counter() - began)
    bench.ratio("compiled.base.T16", seconds * 1e3 / bound(bench, "base"))
    model.forget()


SECTIONS: list[tuple[str, Callable[[Bench], None], float]] = [
    ("machine", machine, 0),
    ("build", build, 0),
    ("ready", ready, 0),
    ("attention", attention, 5),
    ("drawing", drawing, 5),
    ("exact", exact, 5),
    ("texts", texts, 5),
    ("devices", devices, 5),
    ("passes", passes, 5),
    ("decoding", decoding, 10),
    ("overhead", overhead, 5),
    ("idle", idle, 10),
    ("launching", launching, 5),
    ("generate", generate, 5),
    ("counts", counts, 5),
    ("kernels", kernels, 5),
    ("long texts", long_texts, 10),
    ("readings", readings, 30),
    ("modules", by_modules, 10),
    ("two streams", two_streams, 10),
    ("compiled", compiled, 30),
]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default=None, help="gpu, or tiny for a trial (the default on a CPU)")
    parser.add_argument("--seconds", type=float, default=290.0)
    parser.add_argument("--only", nargs="*", help="sections, besides machine, build and ready")
    given = parser.parse_args(arguments)
    shape = given.shape or ("gpu" if given.device.startswith("cuda") else "tiny")
    bench = Bench(given.out, given.device, shape, given.seconds)
    for name, work, least in SECTIONS:
        if bench.ready and (given.only is None or name in given.only or name in ("machine", "build", "ready")):
            bench.section(name, work, least)
    print(f"{bench.out / 'gpu.json'} after {time.perf_counter() - bench.began:.0f} s", flush=True)
    return 1 if bench.found["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
