"""What training tells: progress in a pipe and on a terminal, warnings, TensorBoard and W&B, the table at the end."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from rich.console import Console

from collm.errors import CollmError
from collm.gate import log_gate
from collm.models.info import load_info
from collm.training import progress
from collm.training.progress import Teller
from collm.training.rates import TokenTable, at_rates
from collm.training.recipe import parse_recipe
from collm.training.summary import summary
from collm.training.train import train
from collm.training.watch import Watch


def test_in_a_pipe_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Teller("step", console=Console(file=out, width=200)) as teller:
        teller.begin(1000)
        for step in range(1, 1001):
            now[0] += 0.2
            teller.step(step, f"loss {1 / step:.4f}, [bold]x[/bold]" if step % 10 == 0 else None)
        teller.say("held out [after]")
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 10 of 1000: loss 0.1000, [bold]x[/bold]; 3 min left"
    assert len(lines) == 1 + 6 + 1, "200 s, one in 30 s, and what is said"
    assert lines[-2].endswith("less than a minute left") and lines[-1] == "held out [after]"


def test_on_a_terminal_a_bar_with_figures() -> None:
    out = io.StringIO()
    with Teller("step", console=Console(file=out, width=150, force_terminal=True)) as teller:
        teller.begin(50, 10)
        teller.step(30, "loss 0.1234; mean gate: large 0.300")
        teller.say("held out after step 30: loss 0.2")
        teller._bar.refresh()
    found = out.getvalue()
    assert "step 30 of 50" in found and "mean gate: large 0.300" in found
    assert "held out after step 30: loss 0.2\n" in found and "of 50:" not in found
    silent = io.StringIO()
    with Teller("step", enabled=False, console=Console(file=silent, force_terminal=True)) as teller:
        teller.begin(5)
        teller.step(1, "loss")
        teller.say("x")
    assert silent.getvalue() == ""


@pytest.mark.parametrize(
    ("watch", "looks", "expected"),
    [
        (Watch(2.0), [(0.95, 1.9), (0.99, 1.9)], ["nearly everything.*target_rate"]),
        (Watch(2.0, target=0.3), [(0.95, 1.9)], ["price for a target_rate of 0.3 is still rising"]),
        (Watch(2.0, label_share=0.3), [(0.04, 1.9)], ["hardly defer.*Lower the price"]),
        (Watch(2.0, label_share=0.06), [(0.04, 1.9)], []),  # a tool for few tokens
        (Watch(2.0), [(0.5, 2.01), (0.5, 2.1), (0.5, 2.2)], ["become worse.*2.100 nats.*2.000.*set target_rate"]),
        (Watch(2.0), [(None, 2.1)], ["become worse.*lower learning_rate, or train for fewer epochs"]),
        (Watch(None), [(0.5, 9.0)], []),
        (Watch(2.0), [(0.5, 1.0)], []),
    ],
)
def test_warnings_name_the_remedy_once(
    caplog: pytest.LogCaptureFixture, watch: Watch, looks: list[Any], expected: list[str]
) -> None:
    import re

    with caplog.at_level(logging.WARNING, logger="collm"):
        for deferred, base_nll in looks:
            watch.look(deferred, base_nll)
    assert len(caplog.messages) == len(expected)
    for message, pattern in zip(caplog.messages, expected, strict=True):
        assert re.search(pattern, message), message


def test_rates_take_the_largest_gates() -> None:
    """Ten tokens: the gate falls from the first to the last; a tool abstains on the second."""
    odds = torch.linspace(2, -2, 10)
    tool = torch.full((10,), -0.1)
    tool[1] = -torch.inf
    table = TokenTable(
        base_log_probs=torch.full((10,), -2.0),
        base_right=torch.tensor([False] * 5 + [True] * 5),
        log_gate=log_gate(torch.stack([odds, odds - 9], dim=1)),
        log_probs=torch.stack([tool, torch.full((10,), -50.0)], dim=1),
        right=torch.stack([tool > -1, torch.zeros(10, dtype=torch.bool)], dim=1),
    )
    none, two, all_of_them = at_rates(table, (0.0, 0.2, 1.0))
    assert (none.rate, none.accuracy, none.nll) == pytest.approx((0, 0.5, 2.0))
    assert (two.rate, two.accuracy, two.nll) == pytest.approx((0.2, 0.7, (8 * 2.0 + 2 * 0.1) / 10))
    [over_chunks] = at_rates(table, (0.2,), labelled=20)
    assert (over_chunks.rate, over_chunks.nll) == pytest.approx((0.2, two.nll / 2)), "nats of chunks, by their tokens"
    assert (all_of_them.rate, all_of_them.accuracy) == pytest.approx((0.9, 0.9))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("telling")
    tokenizer = make_tokenizer()
    for name, seed in (("base", 0), ("assistant", 1)):
        make_model(seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b} is it"} for a in range(5) for b in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(workplace: Path, out: str, **changes: Any) -> Path:
    values = {
        "out": str(workplace / out),
        "cache": str(workplace / "cache"),
        "base": {"model": str(workplace / "base")},
        "assistants": [{"name": "other", "model": str(workplace / "assistant")}],
        "data": {"train": str(workplace / "train.jsonl"), "validation_share": 0.2},
        "init": {"max_tokens": 100},
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "evaluations": 2},
        **changes,
    }
    return train(parse_recipe(values), progress=False)


@pytest.mark.parametrize("tune", ["full", "gate"])
def test_the_table_at_the_end(workplace: Path, tune: str) -> None:
    out = run(workplace, f"table-{tune}", tune=tune)
    info = load_info(out)
    assert info is not None
    lines = dict(summary(out))
    base = "base after, alone" if tune == "full" else "base alone"
    figures = info.training["figures"]
    after = figures.get("after", figures)
    assert lines[base].endswith(f"of the tokens right, {after['eval_base_nll']:.4f} nats a token")
    assert ("base before training" in lines) is (tune == "full")
    assert sum(name.startswith("pair, ") and name.endswith("% deferred") for name in lines) == 3
    assert lines["next"].startswith("collm calibrate ")
    [rate] = [rate for rate in figures["rates"] if 0.05 < rate["rate"] < 0.15]
    assert 0 <= rate["accuracy"] <= 1 and rate["nll"] > 0


@pytest.mark.parametrize("tune", ["full", "gate"])
def test_tensorboard(workplace: Path, tune: str) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(workplace, f"board-{tune}", tune=tune, trainer={"report_to": "tensorboard"})
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    # transformers calls them so: held-out figures under eval/, the others under train/.
    assert {"train/loss", "eval/loss", "eval/nll"} <= tags
    assert len(events.Scalars("eval/loss")) >= 2


def test_weights_and_biases_without_a_network(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate alone, whose logs are ours to give (once: W&B keeps the settings of a process)."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(workplace, "wandb", tune="gate", trainer={"report_to": "wandb", "run_name": "pair"})
    assert wandb.run is not None and wandb.run.name == "pair"
    folder = Path(wandb.run.dir).parent
    wandb.finish()
    [path] = folder.glob("*.wandb")
    logged = path.read_bytes()
    for name in (b"train/loss", b"eval/loss", b"eval/nll"):
        assert name in logged


@pytest.mark.parametrize("tune", ["full", "gate"])
def test_a_logger_that_is_not_there_is_told_before_anything_is_read(workplace: Path, tune: str) -> None:
    with pytest.raises(CollmError, match="trainer.report_to: transformers reports to no 'nothing'; there are none"):
        run(workplace, f"lacking-{tune}", tune=tune, trainer={"report_to": "nothing"}, base={"model": "no/where"})


def test_a_missing_package_is_named(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(CollmError, match="report_to tensorboard: .*Install the package"):
        run(workplace, "packageless", trainer={"report_to": "tensorboard"}, base={"model": "no/where"})
