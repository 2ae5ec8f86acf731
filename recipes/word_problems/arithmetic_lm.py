"""A small language model that can calculate, with another model's tokenizer: trained from scratch on generated sums.

    python recipes/word_problems/arithmetic_lm.py --tokenizer SPEC --out DIR

A Llama of few layers is trained over the few tokens that sums are made of, and then placed in the whole vocabulary
of SPEC's tokenizer, to be an assistant of models that share it. Sums are in `equations.py`; the second lesson puts
them behind clutter (`lessons.py`): chat headers and text, of which the model sees nothing but the numbers.

Stopped, the same command goes on where it was. `DIR/test.json` tells how many held-out sums it works out.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from equations import OPERATORS, test_sums
from lessons import SubVocabulary, chat, rows
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from collm.errors import CollmError
from collm.files import replacing, write_text
from collm.models.loading import load_tokenizer


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long; a stopped run is only continued with the same."""

    hidden_size: int = 192
    layers: int = 3
    heads: int = 6
    steps: int = 2200
    first_lesson: float = 0.7
    """Share of the steps spent on sums alone, in short rows, before there is clutter."""
    rows: tuple[int, int] = (64, 256)
    """Tokens of a row in the first and in the second lesson."""
    tokens: int = 3072
    """Tokens of a step."""
    learning_rate: float = 3e-3
    seed: int = 0


def place(model: LlamaForCausalLM, words: SubVocabulary) -> LlamaForCausalLM:
    """The same model over the full vocabulary: `log_softmax` of its logits at a piece is the `log_probs` of before."""
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][words.of_full()]
    ends = {"bos_token_id": words.token_ids[words.start - 1], "eos_token_id": words.token_ids[words.end - 1]}
    config = LlamaConfig(**{**model.config.to_dict(), "vocab_size": words.full_size, **ends})
    config.pad_token_id = config.eos_token_id
    placed = LlamaForCausalLM(config)
    placed.load_state_dict(state)
    return placed.eval()


def fresh_model(plan: Plan, words: SubVocabulary) -> LlamaForCausalLM:
    torch.manual_seed(plan.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=plan.hidden_size,
            intermediate_size=3 * plan.hidden_size,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            max_position_embeddings=8192,
            initializer_range=0.06,  # narrow layers start late from the usual 0.02
            tie_word_embeddings=False,
            bos_token_id=words.start,
            eos_token_id=words.end,
        )
    )


def batch(plan: Plan, words: SubVocabulary, step: int) -> tuple[Tensor, Tensor]:
    """The rows of a step; the same for the same step."""
    second = step >= plan.first_lesson * plan.steps
    length = plan.rows[second]
    return rows(random.Random(f"{plan.seed} {step}"), words, plan.tokens // length, length, second)


def loss_of(model: LlamaForCausalLM, words: SubVocabulary, tokens: Tensor, weights: Tensor, bf16: bool) -> Tensor:
    """Weighted mean of the negative log-likelihood of `tokens` [B, T]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(tokens[:, :-1], use_cache=False).logits
    losses = -words.log_probs(logits).gather(-1, tokens[:, 1:, None])[..., 0]
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def learning_rate(plan: Plan, step: int) -> float:
    """Share of the full one: warm-up, then a cosine to nearly nothing."""
    warm = min(1.0, (step + 1) / 50)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / plan.steps)))


@torch.inference_mode()
def solve(model: LlamaForCausalLM, words: SubVocabulary, before: Sequence[int], after: str) -> bool:
    """Is `after`, with the line's end, what the model finds most probable at each token behind `before`?"""
    result = words.encode(after + "\n")
    logits = model(torch.tensor([[*before, *result[:-1]]]), use_cache=False).logits[0, len(before) - 1 :]
    return words.log_probs(logits).argmax(-1).tolist() == result


def test(model: LlamaForCausalLM, words: SubVocabulary, count: int) -> dict[str, Any]:
    """Shares of `count` held-out sums that are right: by themselves, behind a chat, and by operator."""
    sums = test_sums(count)
    rng = random.Random("chat")
    model.eval()
    right = [solve(model, words, [words.start, *words.encode(before)], after) for before, after in sums]
    behind = [solve(model, words, [*chat(rng, words), *words.encode(before)], after) for before, after in sums]
    shares = {"right": sum(right) / count, "right behind a chat": sum(behind) / count}
    for sign in OPERATORS:
        of_sign = [r for r, (before, _) in zip(right, sums, strict=True) if f" {sign} " in before]
        shares[f"right {sign}"] = sum(of_sign) / max(1, len(of_sign))
    return {**shares, "wrong": [before for r, (before, _) in zip(right, sums, strict=True) if not r]}


def told(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in figures.items() if name.startswith("right"))


def train(plan: Plan, words: SubVocabulary, out: Path, bf16: bool, save_every: int = 200) -> LlamaForCausalLM:
    """From scratch, or from where a stopped run left off."""
    model = fresh_model(plan, words)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=plan.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    saved, first = out / "stopped.pt", 0
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        if state["plan"] != json.dumps(asdict(plan)):
            raise CollmError(f"{saved} is of a run with other settings; go on with those, or take another --out")
        model.load_state_dict(state["model"])
        for optimizer, old in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        first = state["step"]
    for step in range(first, plan.steps):
        model.train()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * learning_rate(plan, step)
        loss = loss_of(model, words, *batch(plan, words, step), bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}/{plan.steps}  loss {loss.item():.4f}", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == plan.steps:
            print("  held out:", told(test(model, words, 200)), flush=True)
            state = {
                "plan": json.dumps(asdict(plan)),
                "step": step + 1,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            with replacing(saved) as path:
                torch.save(state, path)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="the model whose tokenizer it is to have")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--hidden-size", type=int, default=Plan.hidden_size)
    parser.add_argument("--layers", type=int, default=Plan.layers)
    parser.add_argument("--learning-rate", type=float, default=Plan.learning_rate)
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16 (quicker where the processor can)")
    args = parser.parse_args()
    plan = Plan(args.hidden_size, args.layers, steps=args.steps, seed=args.seed, learning_rate=args.learning_rate)
    if (args.out / "test.json").is_file():
        print(f"{args.out} is there already")
        return
    tokenizer = load_tokenizer(args.tokenizer)
    words = SubVocabulary(tokenizer)
    model = train(plan, words, args.out, args.bf16)
    figures = {"plan": asdict(plan), "sums": 2000, **test(model, words, 2000)}
    place(model, words).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    write_text(args.out / "test.json", json.dumps(figures, indent=1))
    (args.out / "stopped.pt").unlink(missing_ok=True)
    print(told(figures))


if __name__ == "__main__":
    try:
        main()
    except CollmError as error:
        sys.exit(f"Error: {error}")
