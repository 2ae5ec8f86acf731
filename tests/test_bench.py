"""The benchmark: its arithmetic against hand-computed values, its pairs and passes against plain ones, its counts."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from chunk_toys import byte_level
from click.testing import CliRunner, Result
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm.bench import card, ceilings, pairs
from collm.bench.ceilings import Ceilings, PassCosts
from collm.bench.cells import ASSISTANT_ALONE, BASE_ALONE, PLAIN, SAMPLED, SPECULATIVE, growth_cell, pair_cell
from collm.bench.figures import SAME, beyond_passes, facts, figures, of_ceiling
from collm.bench.paired import Ratio, in_turn
from collm.bench.pairs import Pair, synthetic, synthetic_name
from collm.bench.passes import BarePasses
from collm.bench.result import BenchResult, Cell, Run
from collm.bench.run import Plan, bench
from collm.bench.synthetic import Dial, Shape, find_dial, make_model, make_tokenizer, top_tokens
from collm.bench.systems import Effort
from collm.bench.table import tables
from collm.cli import main
from collm.errors import CollmError
from collm.models.paged.capture import FakeCapture
from collm.models.paged.dense import TorchDense
from collm.models.paged.machinery import Machinery
from collm.models.paged.ops import TorchOps
from collm.models.paged.telling import TorchTelling

TINY = Shape(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, num_kv_heads=2, vocab_size=200)
EFFORT = Effort(rounds=2, tokens=12, prompt_tokens=5)


# -- statistics of paired runs


def test_ratio_is_a_median_with_its_interval() -> None:
    ratio = Ratio.of([1.0, 2.0, 9.0])
    assert ratio.median == 2 and ratio.low == 1 and ratio.high == 9
    assert Ratio.of([3.0]) == Ratio(3, 3, 3)


def test_runs_take_turns_and_the_first_round_is_thrown_away() -> None:
    order: list[tuple[str, int]] = []

    def run(name: str, number: int) -> int:
        order.append((name, number))
        return number

    assert in_turn({name: partial(run, name) for name in "abc"}, 2) == {name: [1, 2] for name in "abc"}
    assert "".join(name for name, _ in order) == "abcbcacab"


# -- ceilings


def constant(seconds: float) -> PassCosts:
    return PassCosts({(1, 1): seconds})


BASE, ASSISTANT = constant(1.0), constant(8.0)


def test_pass_costs_are_linear_between_and_beyond_what_was_measured() -> None:
    costs = PassCosts({(1, 1): 1.0, (1, 4): 4.0, (1, 8): 6.0, (4, 1): 2.0, (4, 4): 8.0, (4, 8): 12.0})
    assert costs(1) == 1 and costs(4) == 4 and costs(2.5) == 2.5 and costs(16) == 10
    assert costs(1, rows=4) == 2 and costs(1, rows=2.5) == 1.5 and costs(2.5, rows=4) == 5
    assert constant(3.0)(100, rows=7) == 3


def test_ceilings_of_constant_costs_by_hand() -> None:
    """One assistant pass (8) in four tokens of the base (1 each); half or all of the drafts stand."""
    assert ceilings.plain(BASE, ASSISTANT, 0.25) == pytest.approx(3.0)
    assert ceilings.drafting(BASE, ASSISTANT, 0.25, 0.5, 1) == pytest.approx(3.0)
    assert ceilings.drafting(BASE, ASSISTANT, 0.25, 0.5, 2) == pytest.approx((2 * 4 + 8) / (1.5 * 4))
    assert ceilings.drafting(BASE, ASSISTANT, 0.25, 0.5, 3) == pytest.approx((3 * 4 + 8) / (1.75 * 4))
    assert ceilings.drafting(BASE, ASSISTANT, 0.25, 1.0, 32) == pytest.approx((32 * 4 + 8) / (32 * 4))
    assert ceilings.oracle(BASE, ASSISTANT, 0.25, 0.5) == pytest.approx(1 + 8 / 8)
    assert ceilings.oracle(BASE, ASSISTANT, 0.25, 1.0) == 1
    # Runs of two on average, drafted two at a time: 2 * 8 + 1 seconds settle 1.5 of them.
    assert ceilings.running(BASE, ASSISTANT, 0.25, 0.5, 0) == pytest.approx(0.75 + 0.25 * 9)
    assert ceilings.running(BASE, ASSISTANT, 0.25, 0.5, 1) == pytest.approx(0.75 + 0.25 * 17 / 1.5)


def test_drafting_costs_what_a_simulation_costs() -> None:
    """Cycle by cycle: the base writes through three deferrals, a disagreement throws away what stands behind it."""
    rng, rate, agreement, pending = random.Random(0), 0.25, 0.7, 3
    seconds = tokens = 0
    for _ in range(20_000):
        gaps = [next(n for n in count(1) if rng.random() < rate) for _ in range(pending)]
        seconds += sum(gaps) + 8
        kept = next((i + 1 for i in range(pending) if rng.random() > agreement), pending)
        tokens += sum(gaps[:kept])
    assert ceilings.drafting(BASE, ASSISTANT, rate, agreement, pending) == pytest.approx(seconds / tokens, rel=0.02)


def test_running_costs_what_a_simulation_costs() -> None:
    """Token by token: after a deferral the assistant writes three, and the base says how many were deferred, too."""
    rng, again, first, drafted = random.Random(0), 0.6, 0.2, 2
    seconds, tokens, deferrals, follows = 0, 0, 0, False
    while tokens < 100_000:
        if not follows and rng.random() > first:
            seconds, tokens = seconds + 1, tokens + 1
            continue
        kept = 1 + next((i for i in range(drafted) if rng.random() > again), drafted)
        seconds, tokens, deferrals = seconds + 8 * (drafted + 1) + 1, tokens + kept, deferrals + kept
        follows = kept == drafted + 1 and rng.random() < again
        if not follows:  # the gate behind the run is known already: that token is the base's
            seconds, tokens = seconds + 1, tokens + 1
    found = ceilings.running(BASE, ASSISTANT, deferrals / tokens, again, drafted)
    assert found == pytest.approx(seconds / tokens, rel=0.02)


def test_an_assistant_reads_what_it_missed() -> None:
    growing = PassCosts({(1, 1): 8.0, (1, 2): 9.0})
    assert ceilings.plain(BASE, growing, 0.25) == pytest.approx(1 + (8 + 3) / 4)
    assert ceilings.drafting(BASE, growing, 0.25, 0.5, 2) == pytest.approx((8 + 8 + 7) / 6)
    assert ceilings.running(BASE, growing, 0.25, 0.25, 0) == pytest.approx(ceilings.plain(BASE, growing, 0.25))


def test_rows_that_defer_share_a_pass() -> None:
    """Of two rows none, one or both defer; a pass of both costs as much as of one."""
    shared = PassCosts({(1, 1): 8.0, (2, 1): 8.0})
    assert ceilings.plain(PassCosts({(1, 1): 1.0, (2, 1): 1.0}), shared, 0.5, rows=2) == pytest.approx(1 + 0.75 * 8)


@pytest.mark.parametrize(("agreement", "again"), [(0.0, 0.0), (0.9, 0.0), (0.3, 0.9), (1.0, 1.0)])
def test_the_best_of_all_is_never_worse_than_plain_nor_better_than_the_oracle(agreement: float, again: float) -> None:
    found = Ceilings.of(BASE, ASSISTANT, 0.3, agreement, again)
    assert found.speculative <= found.plain
    assert found.plain == pytest.approx(1 + 0.3 * 8)
    if not again:  # the oracle takes a base step for every token, which checking a run at once does not
        assert found.oracle <= found.speculative + 1e-12
    assert (found.speculative < found.plain - 1e-12) == bool(agreement or again)
    assert Ceilings.of(BASE, ASSISTANT, 0.0, 1.0, 0.0) == Ceilings(1, 1, 1)


# -- pairs


def test_extra_layers_follow_the_parameters() -> None:
    base, assistant = (make_model(TINY, n, dtype="float32", device="cpu") for n in (0, TINY.extra_layers(8)))
    embedding = TINY.vocab_size * TINY.hidden_size
    assert (assistant.num_parameters() - embedding) / (base.num_parameters() - embedding) == pytest.approx(8, rel=0.1)


def test_the_dial() -> None:
    base, assistant = (make_model(TINY, n, dtype="float32", device="cpu") for n in (0, 3))
    dial = Dial(assistant, TINY.num_layers)
    assert find_dial(base, dial, 1.0) == 1.0 and dial.value == 0
    ids = torch.randint(0, TINY.vocab_size, (8, 100), generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_tokens(base, ids), top_tokens(assistant, ids))
    assert find_dial(base, dial, 0.6) == pytest.approx(0.6, abs=0.03)
    apart = float((top_tokens(base, ids) == top_tokens(assistant, ids)).float().mean())
    assert apart == pytest.approx(0.6, abs=0.15)


def test_bare_passes_are_real_ones(tiny_model: Callable[..., PreTrainedModel]) -> None:
    network = tiny_model()
    bare = BarePasses(network, rows=2, context=0, widest=6)
    for width in (6, 1, 3):  # in any order: each pass starts from the same context
        ids = torch.arange(12).view(2, 6)[:, :width]
        with torch.inference_mode():
            assert bare.run(width) == network(ids).logits.argmax(dim=-1).flatten().tolist()
    assert BarePasses(network, rows=2, context=7, widest=6).seconds(3) > 0


@pytest.fixture(scope="module")
def pair() -> Pair:
    return synthetic(TINY, cost_ratio=4, agreement=0.6)


def test_prompts_differ_between_rounds_and_rows(pair: Pair) -> None:
    prompts = pair.prompts(2, 7, seed=0) + pair.prompts(2, 7, seed=1)
    assert len(set(prompts)) == 4 and {len(prompt) for prompt in prompts} == {7}
    assert pair.prompts(2, 7, seed=0) == prompts[:2]


# -- counts, exactly


@pytest.mark.parametrize("batch", [1, 3])
def test_plain_decoding_asks_once_a_token_and_once_a_deferral(pair: Pair, batch: int) -> None:
    cell = pair_cell(pair, EFFORT, batch, 0.5)
    assert cell.texts == cell.same_texts == EFFORT.rounds * batch
    for run in cell.runs[PLAIN]:
        assert run.tokens == batch * EFFORT.tokens and 0 < run.deferred < run.tokens
        assert run.queries == (run.tokens, run.deferred)
        # Every token but the last goes through the base once, prompts included: no cache outlives its round.
        through_base = sum(tokens * count for _, tokens, count, _ in run.issued[0])
        assert through_base == batch * (EFFORT.prompt_tokens + EFFORT.tokens - 1)
        assert sum(rows * count for rows, _, count, _ in run.issued[1]) == run.deferred
        assert 0 < run.pass_seconds < run.seconds
    assert {run.queries for run in cell.runs[BASE_ALONE]} == {(batch * EFFORT.tokens, 0)}
    assert {run.queries for run in cell.runs[ASSISTANT_ALONE]} == {(0, batch * EFFORT.tokens)}
    assert [len(models) for models in cell.passes] == [2] * EFFORT.rounds
    known = facts(cell)
    assert 0 < known.agreement < 1 and 0.2 < known.rate < 0.8 and 0 < known.distinct <= 1
    assert of_ceiling(cell, PLAIN, lambda best: best.plain).median > 0


def test_nothing_is_deferred_at_rate_0(pair: Pair) -> None:
    cell = pair_cell(pair, Effort(rounds=1, tokens=4, prompt_tokens=3), 1, 0.0)
    [plain], [fast] = cell.runs[PLAIN], cell.runs[SPECULATIVE]
    assert plain.queries == fast.queries == (4, 0) and plain.deferred == 0
    assert facts(cell).agreement == 1


# -- figures


def cell(**runs: tuple[float, int]) -> Cell:
    """A pair cell of two rounds; of each system, seconds of its 100 tokens and passes of the base."""
    found = {
        name.replace("_", " "): [
            Run(seconds=s, tokens=100, deferred=20, changed=2, queries=(n, 20), issued=([(1, n, n, s / 2)], []))
            for s in (seconds, seconds * 1.01)
        ]
        for name, (seconds, n) in runs.items()
    }
    names = {"plain": PLAIN, "speculative": SPECULATIVE}
    measured = ([(1, 1, 1.0)], [(1, 1, 8.0)])
    return Cell(
        kind="pair",
        pair="p",
        rate=0.2,
        context=1,
        tokens=100,
        runs={names.get(name, name): own for name, own in found.items()},
        passes=[measured, measured],
        texts=2,
        same_texts=2,
    )


def test_figures_and_their_verdicts() -> None:
    """Plain 260 s at best, speculation about 170: a run of 400 s misses its ceiling, one of 180 s does not."""
    verdicts = {}
    for seconds in (180.0, 400.0):
        made = cell(base_alone=(110.0, 100), assistant_alone=(810.0, 0), plain=(265.0, 100), speculative=(seconds, 120))
        found = figures(BenchResult(settings={}, machine={}, cells=[made]))
        verdicts[seconds] = {f"{f.demand}, {f.where}": f.holds for f in found}
        assert facts(made).cost_ratio == 8 and facts(made).agreement == pytest.approx(0.9)
        assert of_ceiling(made, PLAIN, lambda best: best.plain).high == pytest.approx(260 / 265)
    assert all(v for k, v in verdicts[180.0].items() if not k.startswith("measured"))
    failed = [name.partition(",")[0] for name, holds in verdicts[400.0].items() if not holds]
    assert [name for name in failed if not name.startswith("measured")] == [
        "speculative : its ceiling",
        "speculative : plain",
        "speculative : plain",
    ]
    # Passes take half of the time here: twice is more than 1.1 times.
    outside = beyond_passes(made.runs[SPECULATIVE])
    assert outside is not None and outside.median == pytest.approx(2)
    assert not any(v for k, v in verdicts[180.0].items() if k.startswith("measured"))


def test_a_pass_too_many_is_a_failure() -> None:
    made = cell(base_alone=(110.0, 100), plain=(265.0, 101), speculative=(180.0, 120))
    found = figures(BenchResult(settings={}, machine={}, cells=[made]))
    assert [f.holds for f in found if f.demand.startswith("plain: one base pass")] == [False]


def test_texts_must_be_equal_in_float32() -> None:
    made = cell(base_alone=(110.0, 100), plain=(265.0, 100), speculative=(180.0, 120)).model_copy(
        update={"same_texts": 1}
    )
    for dtype, verdicts in (("float32", [False]), ("bfloat16", [])):
        found = figures(BenchResult(settings={"dtype": dtype}, machine={}, cells=[made]))
        assert [f.holds for f in found if f.demand == SAME] == verdicts


def test_a_figure_fails_only_if_its_whole_interval_lies_beyond() -> None:
    wide = cell(base_alone=(110.0, 100), plain=(265.0, 100), speculative=(270.0, 120))
    wide.runs[SPECULATIVE][1] = wide.runs[SPECULATIVE][1].model_copy(update={"seconds": 200.0})
    [gain] = [f for f in figures(BenchResult(settings={}, machine={}, cells=[wide])) if "never a loss" in f.demand]
    assert gain.ratio.low < 1 < gain.ratio.high and gain.holds


# -- the whole, resumed


def plan(pair: Pair, **more: Any) -> Plan:
    tiny = Effort(rounds=1, tokens=3, prompt_tokens=3)
    settings = {"batches": (1, 2), "rates": (0.5,), "contexts": (8, 16), "effort": tiny, **more}
    return Plan({pair.name: lambda: pair}, **settings)


def test_a_stopped_benchmark_goes_on(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def stop(*args: Any, **kwargs: Any) -> Cell:
            raise KeyboardInterrupt

        patch.setattr("collm.bench.run.engine_cell", stop)
        with pytest.raises(KeyboardInterrupt):
            bench(plan(pair), tmp_path, progress=False)
    kept = BenchResult.load(tmp_path / "bench.json", "figures")
    assert [c.kind for c in kept.cells] == ["pair", "pair"]
    whole = bench(plan(pair), tmp_path, progress=False)
    assert [c.kind for c in whole.cells] == ["pair", "pair", "engine", "engine", "batch", "growth", "growth"]
    assert whole.cells[:2] == kept.cells
    # All is there: no pair is built for nothing.
    done = Plan({pair.name: stop}, **{k: v for k, v in vars(plan(pair)).items() if k != "pairs"})
    assert bench(done, tmp_path, progress=False) == whole
    row = json.loads((tmp_path / "bench.json").read_text())
    assert row["pairs"][pair.name]["assistant_parameters"] > row["pairs"][pair.name]["base_parameters"]
    assert {"commit", "versions", "threads", "command"} <= set(row["machine"])
    assert all(math.isfinite(figure["ratio"]["median"]) for figure in row["figures"])
    growth = [figure for figure in row["figures"] if "growth" in figure["demand"]]
    assert [figure["where"].rpartition(", ")[2] for figure in growth] == ["8 to 16 tokens"] * 2


def test_a_benchmark_is_of_one_machine(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, and gone on with more threads, it told cells of both as one, and their growth as a ratio."""

    def stop(*args: Any, **kwargs: Any) -> Cell:
        raise KeyboardInterrupt

    settings = plan(pair, kinds=("growth",))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "collm.bench.run.growth_cell", lambda *a, **k: stop() if k["context"] == 16 else growth_cell(*a, **k)
        )
        bench(settings, tmp_path, progress=False)
    before = (tmp_path / "bench.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 99)
        with pytest.raises(CollmError, match=r"another machine \(threads: \d+ there, 99 now"):
            bench(settings, tmp_path, progress=False)
        assert (tmp_path / "bench.json").read_bytes() == before
    whole = bench(settings, tmp_path, progress=False)
    assert len(whole.cells) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert bench(settings, tmp_path, progress=False) == whole  # nothing is measured: it is told anywhere


def test_another_benchmark_is_refused(pair: Pair, tmp_path: Path) -> None:
    small = {"batches": (1,), "contexts": (), "kinds": ("engine",)}
    bench(plan(pair, **small), tmp_path, progress=False)
    with pytest.raises(CollmError, match="rates.*another folder"):
        bench(plan(pair, **{**small, "rates": (0.1,)}), tmp_path, progress=False)
    (tmp_path / "bench.json").write_text('{"cells": 3}')
    with pytest.raises(CollmError, match="not the result of a benchmark"):
        bench(plan(pair, **small), tmp_path, progress=False)


# -- the command line


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Iterator[Path]:
    """Where `base` and `helper` lie."""
    root, here = tmp_path_factory.mktemp("bench"), Path.cwd()
    for name, seed in (("base", 0), ("helper", 1)):
        tiny_model(seed=seed).save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    os.chdir(root)
    yield root
    os.chdir(here)


FEW = "--batch 1 --rate 0,0.5 --context 8 --rounds 1 --tokens 4 --prompt-tokens 4".split()


def collm(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["bench", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize(
    "which",
    [
        "--pair models --base base --assistant helper",
        "--pair models --base base --assistant tiny --only pair",
        "--pair models --base base --assistant calculator",
        "--pair truncated --base base --layers 1 --only pair",
    ],
)
def test_bench_on_the_command_line(folder: Path, which: str) -> None:
    name = "-".join(which.split()[3::2])
    result = collm(*which.split(), *FEW, "--json", f"{name}.json", "--plot", f"{name}.png", "--out", name)
    assert result.exit_code == 0, result.output
    assert "What is asked for" in result.stdout and "one base pass a token" in result.stdout
    row = json.loads(Path(f"{name}.json").read_text())
    counted = [figure for figure in row["figures"] if figure["demand"].startswith("plain: one base pass")]
    assert len(counted) == 2 and all(figure["holds"] for figure in counted)
    assert Path(f"{name}.png").read_bytes().startswith(b"\x89PNG")
    again = collm(*which.split(), *FEW, "--out", name)
    assert again.stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--pair models --base base", "--assistant"),
        ("--pair truncated", "--base"),
        ("--assistant helper", "takes no --assistant"),
        ("--rate 0.1,1.5", "1.5"),
        ("--batch one", "one"),
    ],
)
def test_usage_errors(arguments: str, words: str) -> None:
    result = collm(*arguments.split())
    assert result.exit_code == 2 and words in result.stderr


def test_bad_input_is_told_in_one_line(folder: Path) -> None:
    result = collm("--pair", "truncated", "--base", "base", "--layers", "9", *FEW)
    assert result.exit_code == 1 and "2 layers" in result.stderr
    # Before anything is measured: the pair it names is not there.
    result = collm("--pair", "truncated", "--base", "nowhere", "--plot", "picture.xyz")
    assert result.exit_code == 1 and ".svg" in result.stderr


def test_quick_changes_defaults_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Plan] = []

    def noted(plan: Plan, out: Path | None) -> BenchResult:
        asked.append(plan)
        return BenchResult(settings={}, machine={})

    monkeypatch.setattr("collm.bench.run.bench", noted)
    assert collm("--quick", "--rate", "0.4", "--agreement", "0.5,0.9").exit_code == 0
    [plan] = asked
    assert plan.rates == (0.4,) and plan.effort.rounds < Effort().rounds and plan.settings["shape"] == "small"
    assert list(plan.pairs) == [pairs.synthetic_name(8, agreement) for agreement in (0.5, 0.9)]


def test_no_synthetic_text_can_end() -> None:
    tokenizer = make_tokenizer(50)
    assert tokenizer.eos_token_id == 50 and tokenizer.decode([3, 4]) == "t3 t4"


def test_models_of_different_tokenizers_are_refused_with_what_to_run_instead(folder: Path) -> None:
    tokenizer = byte_level("llama3", 460, seed=1)
    tiny.make_model(vocab_size=len(tokenizer)).save_pretrained(folder / "stranger")
    tokenizer.save_pretrained(folder / "stranger")
    result = collm(*"--pair models --base base --assistant stranger".split(), *FEW)
    assert result.exit_code == 1 and "collm eval" in result.output and "collm pair-info" in result.output


def test_a_card_is_measured_against_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here a CPU with the twins of the kernels, whose graphs a fake replays; what only CUDA counts is given."""
    own = Machinery(TorchOps(), TorchTelling(), FakeCapture(), TorchDense(), block=16)
    for module in ("models.caching", "bench.card"):
        monkeypatch.setattr(f"collm.{module}.machinery_for", lambda *_: own)
    monkeypatch.setattr(card.copy_bandwidth, "__defaults__", (2**20,))
    monkeypatch.setattr(card.timed, "__defaults__", (1, 1))
    for module in ("stepping", "graphs"):
        monkeypatch.setattr(f"collm.models.paged.{module}.BUCKETS", (16, 128, 256))
    monkeypatch.setattr("collm.bench.card.BUCKETS", (16, 128, 256))
    monkeypatch.setattr(
        "collm.bench.card.runtime_calls", lambda work: {"cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}
    )
    monkeypatch.setattr(pairs, "Endless", partial(pairs.Endless, max_cache_tokens=16 * 256))
    monkeypatch.setattr(card, "LONG", 300)
    long: list[tuple[str, float, float]] = []
    passes = card.long_passes
    monkeypatch.setattr(card, "long_passes", lambda *what: long.extend(passes(*what)) or iter(long))
    monkeypatch.setattr(torch, "compile", lambda body, **how: body)
    plan = Plan({synthetic_name(2, 0.9): partial(synthetic, TINY, 2, 0.9)}, kinds=["card"], effort=EFFORT)
    [cell] = bench(plan, tmp_path, progress=False).cells
    assert BenchResult.load(tmp_path / "bench.json", "figures").cells == [cell]
    assert cell.card["launches_a_pass"] == cell.card["waits_a_pass"] == 1
    sizes = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 3 * 32 + 32 * 200)
    found = cell.card["pass_seconds.base.T16"] * cell.card["copy_bytes_per_second"] / sizes
    assert cell.card["pass.base.T16"] == pytest.approx(found)
    # Speculation is off: a base pass a token, and all sixteen texts share one; those of the assistant come on top.
    assert 1 <= cell.card["launches_a_token.b1"] < 2 and 1 / 16 <= cell.card["launches_a_token.b16"] < 1
    assert all(cell.card[f"waits_a_token.{batch}"] >= cell.card[f"launches_a_token.{batch}"] for batch in ("b1", "b16"))
    # Three layers, keys and values, two heads of 8 floats: for 300 positions, 16 times as many, and 15 short texts.
    read = {key: round(bound * cell.card["copy_bytes_per_second"]) for key, _, bound in long}
    assert read["rows16"] - read["rows1"] == pytest.approx(15 * 300 * 3 * 2 * 16 * 4, abs=2)
    assert read["one_of_16"] - read["rows1"] == pytest.approx(15 * 100 * 3 * 2 * 16 * 4, abs=2)
    assert {f"long.assistant.{key}": seconds / bound for key, seconds, bound in long} == {
        key: ratio for key, ratio in cell.card.items() if key.startswith("long.")
    }
    [[run], _] = [cell.runs[system][:1] for system in (ASSISTANT_ALONE, SAMPLED)]
    assert run.tokens == 16 * EFFORT.tokens
    told = {
        figure.demand.removeprefix("card: ") for figure in figures(BenchResult(settings={}, machine={}, cells=[cell]))
    }
    speeds = {"alone.b1 : generate.b1", "plain.b1 : alone.b1", "speculative.b1 : alone.b1", "plain.b16 : alone.b16",
              "speculative.b16 : alone.b16"}  # fmt: skip
    assert told == card.DEMANDS.keys() - speeds
    [table] = [each for each in tables(BenchResult(settings={}, machine={}, cells=[cell])) if each.caption]
    assert "1 and 1 a pass" in str(table.caption) and "a token, batch 1; " in str(table.caption)


def test_what_a_card_has_no_room_for_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Long texts without memory, and compiling in a hurry; all else is."""
    own = Machinery(TorchOps(), TorchTelling(), FakeCapture(), TorchDense(), block=16)
    for module in ("models.caching", "bench.card"):
        monkeypatch.setattr(f"collm.{module}.machinery_for", lambda *_: own)
    monkeypatch.setattr(card.copy_bandwidth, "__defaults__", (2**20,))
    monkeypatch.setattr(card.timed, "__defaults__", (1, 1))
    for module in ("bench.card", "models.paged.stepping", "models.paged.graphs"):
        monkeypatch.setattr(f"collm.{module}.BUCKETS", (16, 128))
    monkeypatch.setattr("collm.bench.card.runtime_calls", lambda work: {"cudaGraphLaunch": 1})
    monkeypatch.setattr(pairs, "Endless", partial(pairs.Endless, max_cache_tokens=16 * 256))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(card, "long_passes", full)
    made = Plan({synthetic_name(2, 0.9): partial(synthetic, TINY, 2, 0.9)}, ["card"], effort=EFFORT, compiled=False)
    with pytest.warns(UserWarning, match="no memory for 16 texts of 8000 positions .*: these are not measured"):
        [cell] = bench(made, tmp_path, progress=False).cells
    left_out = {"compiled.base.T16", *(f"long.assistant.{key}" for key in ("rows1", "rows16", "one_of_16"))}
    assert {key for key in card.DEMANDS if " : " not in key} - cell.card.keys() == left_out


def test_a_card_is_that_of_a_gpu() -> None:
    result = CliRunner().invoke(main, ["bench", "--only", "card"])
    assert result.exit_code == 2 and "give --device cuda" in result.output


@pytest.mark.parametrize("found", ["cpu", "cuda"])
def test_auto_is_the_device_that_is_measured(found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a GPU has to show is asked of one that nobody has named, too."""
    monkeypatch.setattr("collm.models.devices.best_device", lambda: found)
    planned: list[Plan] = []

    def measured(plan: Plan, out: Path | None) -> BenchResult:
        planned.append(plan)
        return BenchResult(settings=plan.to_dict(), machine={}, cells=[])

    monkeypatch.setattr("collm.bench.run.bench", measured)
    assert collm("--device", "auto", "--quick").exit_code == 0
    [plan] = planned
    assert plan.settings["device"] == found and not plan.compiled
    assert ("card" in plan.kinds) == (found == "cuda") == (plan.settings["shape"] == "gpu")
