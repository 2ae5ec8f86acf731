"""What does a marginal-likelihood step cost beside a plain fine-tuning step of the same model on the same batch?

    python benchmarks/bench_training.py [--model SPEC] [--device cuda] [--bf16]

Both are forward, backward and AdamW step. Plain is `model(input_ids, labels=labels).loss`, as transformers computes
it; lean is our own step with objective sft (logits at labelled positions only), which isolates the cost of the gate
and the mixture. With --chunks the question is what a step over chunks, as models with different tokenizers have it,
costs beside one over tokens: nothing else is measured. Time: interleaved paired runs, medians with 95 % intervals.
Memory: the peak beyond what model and optimizer hold, each in a process of its own on the CPU. The run fails only if a
whole interval lies beyond its limit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from reporting import report
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from collm.bench.paired import Ratio, interleave
from collm.cuts import START, Cuts
from collm.data.collate import IGNORED
from collm.models.head import DeferralHead
from collm.models.loading import load_model
from collm.models.openings import Openings
from collm.training.model import BaseWithGate, LossConfig, Objective

TIME_LIMIT, MEMORY_LIMIT, CHUNKS_LIMIT = 1.05, 1.02, 1.15
OPENING = 0.8
"""Share of labelled tokens that open a chunk, as in code; in sums it is larger."""
LABELLED_SHARE = 0.25
"""Of the tokens, as in short questions with shorter answers."""
VARIANTS = ("plain", "lean", "marginal")


def build(spec: str | None, device: str) -> PreTrainedModel:
    if spec is not None:
        return load_model(spec, device=device)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device)


def step_of(variant: str, model: PreTrainedModel, args: argparse.Namespace) -> Callable[[], object]:
    """One training step on a fixed batch, with an optimizer of its own."""
    generator = torch.Generator().manual_seed(1)
    shape = (args.batch_size, args.length)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(args.device)
    labels = ids.clone()
    labels[:, : int(args.length * (1 - LABELLED_SHARE))] = IGNORED
    mask = torch.ones_like(ids)
    log_probs = -5 * torch.rand(*shape, 1, generator=generator).to(args.device)
    gated = variant in ("marginal", "chunks")
    objective: Objective = "marginal" if gated else "sft"
    head = DeferralHead(model.config.hidden_size, 1).to(args.device) if gated else None
    opens, openings = None, None
    if variant == "chunks":
        # Of random tokens and cuts: what it costs does not depend on which tokens may open.
        rng = np.random.default_rng(1)
        cuts = Cuts(rng.random((257, 257)) < OPENING)
        openings = Openings.of(cuts, rng.integers(0, 256, model.config.vocab_size).tolist(), model.config.vocab_size)
        last = rng.integers(0, 256, shape)
        begin = int(args.length * (1 - LABELLED_SHARE))
        last = np.where(rng.random(shape) < OPENING, last, -1)
        last[:, :begin], last[:, begin] = -1, START
        opens = torch.from_numpy(last).to(args.device)
        openings = openings.to(args.device)
    ours = BaseWithGate(model, head, LossConfig(objective), openings=openings)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-6)
    model.train()

    def step() -> float:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            if variant == "plain":
                loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            elif variant == "lean":
                loss = ours(ids, mask, labels)["loss"]
            else:
                loss = ours(ids, mask, labels, log_probs, opens=opens)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def peak_memory(variant: str, args: argparse.Namespace) -> float:
    """Bytes beyond model and optimizer at the peak of three steps."""
    model = build(args.model, args.device)
    step = step_of(variant, model, args)
    if args.device.startswith("cuda"):
        step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return float(torch.cuda.max_memory_allocated() - before)
    step()  # from here on gradients' and moments' memory is allocated
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Bytes resident now (`VmRSS`) or at the peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measured_in_own_process(variant: str, rounds: int) -> list[float]:
    command = [sys.executable, *sys.argv, "--memory-of", variant]
    return [
        float(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[-1])
        for _ in range(rounds)
    ]


def compare_chunks(args: argparse.Namespace) -> None:
    steps = {name: step_of(name, build(args.model, args.device), args) for name in ("marginal", "chunks")}
    seconds = interleave(steps, args.rounds, args.device)
    ratio = Ratio.of([a / b for a, b in zip(seconds["chunks"], seconds["marginal"], strict=True)])
    result = {
        "model": args.model or "random Llama",
        "dtype": "bf16 autocast" if args.bf16 else "float32",
        "batch": [args.batch_size, args.length],
        "opening_share": OPENING,
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in seconds.items()},
    }
    report(result, {f"time, chunks / tokens (at most {CHUNKS_LIMIT})": ratio}, args.out)
    if ratio.low > CHUNKS_LIMIT:
        sys.exit("beyond the limit: time, chunks / tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model spec; default: a random Llama of 13M parameters")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--memory-rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--chunks", action="store_true", help="a step over chunks beside one over tokens")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/training.json"))
    args = parser.parse_args()
    if args.memory_of:
        print(peak_memory(args.memory_of, args))
        return
    if args.chunks:
        compare_chunks(args)
        return
    models = {variant: build(args.model, args.device) for variant in VARIANTS}
    steps = {variant: step_of(variant, model, args) for variant, model in models.items()}
    seconds = interleave(steps, args.rounds, args.device)
    memory = {variant: measured_in_own_process(variant, args.memory_rounds) for variant in VARIANTS}

    def ratio(of: dict[str, list[float]], to: str) -> Ratio:
        return Ratio.of([a / b for a, b in zip(of["marginal"], of[to], strict=True)])

    ratios = {
        f"time, marginal / plain (at most {TIME_LIMIT})": ratio(seconds, "plain"),
        "time, marginal / lean (no limit)": ratio(seconds, "lean"),
        f"memory, marginal / plain (at most {MEMORY_LIMIT})": ratio(memory, "plain"),
        "memory, marginal / lean (no limit)": ratio(memory, "lean"),
    }
    parameters = sum(p.numel() for p in models["plain"].parameters())
    result = {
        "model": args.model or "random Llama",
        "parameters": parameters,
        "dtype": "bf16 autocast" if args.bf16 else "float32",
        "batch": [args.batch_size, args.length],
        "labelled_share": LABELLED_SHARE,
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in seconds.items()},
        "peak_mebibytes": {name: sorted(values)[len(values) // 2] / 2**20 for name, values in memory.items()},
    }
    report(result, ratios, args.out)
    over = [
        name
        for (name, value), limit in zip(ratios.items(), (TIME_LIMIT, None, MEMORY_LIMIT, None), strict=True)
        if limit is not None and value.low > limit
    ]
    if over:
        sys.exit(f"beyond the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
