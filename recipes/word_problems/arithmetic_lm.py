"""A small language model that can calculate, with another model's tokenizer: trained from scratch on generated sums.

    python recipes/word_problems/arithmetic_lm.py --tokenizer SPEC --out DIR

A Llama of few layers is trained over the few tokens that sums are made of, and then placed in the whole vocabulary
of SPEC's tokenizer, to be an assistant of models that share it. Sums are in `equations.py`; the second lesson puts
them behind clutter: chat headers and text with numbers in it, of which the model sees nothing but the numbers.

Stopped, the same command goes on where it was. `DIR/test.json` tells how many held-out sums it works out.
"""

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from equations import OPERATORS, solution, test_sums
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from collm.errors import CollmError
from collm.files import replacing, write_text
from collm.models.loading import load_tokenizer

PIECES = ("\n", "####", " ", ".", "-", *"0123456789", *(f" {sign}" for sign in "+-*/="))
PIECE = re.compile(r" [-+*/=]|####|[-\n .0-9]")
OTHER = 0
"""Of the sub-vocabulary: any token that is no piece. All share one row of the embedding, and one of the head."""
PROBE = "12 + 7.5 = 19.5\n-3 * -40 = 120\n6 - 8 = -2\n9 / 2 = 4.5\n#### 4.5"
NOT_LEARNT, HARDLY_LEARNT = 0.0, 0.1
"""Weights of clutter and of operands, which cannot be known and whose noise would drown the lesson."""


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


class SubVocabulary:
    """The tokens that sums are made of, numbered from 1; 0 is every other token of the tokenizer.

    Raises:
        CollmError: the tokenizer does not write digits singly, or has no <|im_start|> and <|im_end|>.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        probe = list(tokenizer.encode(PROBE, add_special_tokens=False))
        vocabulary = tokenizer.get_vocab()
        ids = {piece: tokenizer.encode(piece, add_special_tokens=False) for piece in PIECES}
        single = {piece: found[0] for piece, found in ids.items() if len(found) == 1}
        if len(single) < len(PIECES) or probe != [single[piece] for piece in PIECE.findall(PROBE)]:
            raise CollmError("sums are generated for tokenizers that write each digit by itself, as SmolLM2's does")
        if not {"<|im_start|>", "<|im_end|>"} <= set(vocabulary):
            raise CollmError("the tokenizer has no <|im_start|> and <|im_end|>, around which chats are generated")
        self.token_ids = [*single.values(), vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]]
        self.start, self.end = len(self.token_ids) - 1, len(self.token_ids)
        self.numbers = {piece: number for number, piece in enumerate(single, start=1)}
        self.full_size = len(tokenizer)

    def __len__(self) -> int:
        return 1 + len(self.token_ids)

    def encode(self, text: str) -> list[int]:
        return [self.numbers[piece] for piece in PIECE.findall(text)]

    def of_full(self) -> Tensor:
        """[V] number in the sub-vocabulary of every token of the full one."""
        found = torch.full((self.full_size,), OTHER)
        found[self.token_ids] = torch.arange(1, len(self))
        return found

    def log_probs(self, logits: Tensor) -> Tensor:
        """[..., S] logits to log-probabilities of the classes, such that placing changes none of the pieces':
        the other tokens are many, and each of them has the logit of `OTHER`."""
        many = torch.zeros(len(self))
        many[OTHER] = math.log(self.full_size - len(self.token_ids))
        return (logits.float() + many).log_softmax(-1)


def place(model: LlamaForCausalLM, words: SubVocabulary) -> LlamaForCausalLM:
    """The same model over the full vocabulary: `log_softmax` of its logits at a piece is the `log_probs` of before."""
    rows = words.of_full()
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][rows]
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


Piece = tuple[int, float]
"""A token of the sub-vocabulary, and how much predicting it counts."""


def _clutter(rng: random.Random, words: SubVocabulary, numbers: Sequence[str]) -> list[Piece]:
    """Text as the model sees it: words that are all alike, with numbers and stops between them."""
    found: list[int] = []
    for _ in range(rng.randrange(2, 60)):
        kind = rng.random()
        if kind < 0.1:
            number = (
                rng.choice(numbers)
                if numbers and rng.random() < 0.6
                else str(rng.randrange(10 ** rng.choice((1, 2, 2, 3))))
            )
            found += words.encode(f" {number}")
        else:
            found.append(words.numbers["."] if kind < 0.17 else words.numbers["\n"] if kind < 0.18 else OTHER)
    return [(token, NOT_LEARNT) for token in found]


def document(rng: random.Random, words: SubVocabulary, clutter: bool) -> list[Piece]:
    """One worked problem, with or without a chat, or something else, before it."""
    lines = list(solution(rng))
    found: list[Piece] = []
    for before, after in lines:
        found += [(token, HARDLY_LEARNT) for token in words.encode(before)]
        found += [(token, 1.0) for token in words.encode(after)]
    found += [(words.end, 1.0), (words.numbers["\n"], NOT_LEARNT)]
    if not clutter or rng.random() < 0.2:
        return found
    numbers = re.findall(r"\d[\d.]*", lines[0][0])
    header = [(token, NOT_LEARNT) for token in (words.start, OTHER, words.numbers["\n"])]
    stop = [(words.end, NOT_LEARNT), (words.numbers["\n"], NOT_LEARNT)]
    text = _clutter(rng, words, numbers)
    if rng.random() < 0.3:  # no chat, but text
        return text + found
    system = header + stop if rng.random() < 0.5 else []
    return system + header + text + stop + header + found


def batch(plan: Plan, words: SubVocabulary, step: int) -> tuple[Tensor, Tensor]:
    """[B, T] tokens and how much each counts; the same for the same step."""
    rng = random.Random(f"{plan.seed} {step}")
    clutter = step >= plan.first_lesson * plan.steps
    length = plan.rows[clutter]
    rows = []
    for _ in range(plan.tokens // length):
        row: list[Piece] = [(words.start, NOT_LEARNT)] if rng.random() < 0.5 else []
        while len(row) < length:
            row += document(rng, words, clutter)
        rows.append(row[:length])
    pairs = torch.tensor(rows, dtype=torch.float64)
    return pairs[..., 0].long(), pairs[..., 1].float()


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
def solve(
    model: LlamaForCausalLM, words: SubVocabulary, sums: Sequence[tuple[str, str]], prefix: Sequence[int]
) -> list[bool]:
    """Which results are right behind `prefix`: the most probable tokens, one by one and with the line's end."""
    right = []
    for before, after in sums:
        start, result = [*prefix, *words.encode(before)], words.encode(after + "\n")
        logits = model(torch.tensor([start + result[:-1]]), use_cache=False).logits[0, len(start) - 1 :]
        right.append(words.log_probs(logits).argmax(-1).tolist() == result)
    return right


def test(model: LlamaForCausalLM, words: SubVocabulary, count: int) -> dict[str, Any]:
    """Shares of held-out sums that are right: all, per operator, and behind a chat."""
    sums = test_sums(count)
    rng = random.Random("clutter")
    chat = [token for token, _ in document(rng, words, True)]
    while words.start not in chat:
        chat = [token for token, _ in document(rng, words, True)]
    prefix = chat[: len(chat) - chat[::-1].index(words.start) - 1]
    header = [words.start, OTHER, words.numbers["\n"]]
    model.eval()
    right = solve(model, words, sums, [words.start])
    behind = solve(model, words, sums, [*prefix, *header])
    signs = [before.split()[1] for before, _ in sums]
    shares = {
        sign: sum(r for r, s in zip(right, signs, strict=True) if s == sign) / signs.count(sign) for sign in OPERATORS
    }
    wrong = [before for (before, _), r in zip(sums, right, strict=True) if not r]
    return {"sums": count, "right": sum(right) / count, "behind a chat": sum(behind) / count, **shares, "wrong": wrong}


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
            print(f"  held out: { ({k: v for k, v in test(model, words, 200).items() if k != 'wrong'}) }", flush=True)
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
    figures = {"plan": asdict(plan), **test(model, words, 2000)}
    place(model, words).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    write_text(args.out / "test.json", json.dumps(figures, indent=1))
    (args.out / "stopped.pt").unlink(missing_ok=True)
    print(json.dumps({name: value for name, value in figures.items() if name != "wrong"}))


if __name__ == "__main__":
    try:
        main()
    except CollmError as error:
        sys.exit(f"Error: {error}")
