"""What does scoring cost beside bare forward passes of the same model on the same batches?

    python benchmarks/bench_scoring.py [--model SPEC] [--device cuda] [--chunks]

Scoring is the whole of `collm.data.scoring.score`: tokenising, fingerprints, batching, the forward passes, the
journal and the Arrow file. A bare pass is `model(input_ids)` with its logits, on tensors that are ready. The run fails
only if the whole 95 % interval of the ratio of tokens/s lies below 0.9. The stricter ratio, against passes that leave
out the output head as scoring mostly does, is shown, but has no limit. With --chunks it is scored as beside a model
with another tokenizer (closing factors at every cut), and the limit is 0.85.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch
from reporting import report
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from collm.bench.paired import Ratio, interleave
from collm.data.chunks import Reader
from collm.data.encoding import encode_examples
from collm.data.examples import Example
from collm.data.formatting import Formatter
from collm.data.resumable import plan_batches
from collm.data.scoring import BATCH_TOKENS, score
from collm.models.backbone import hidden_states
from collm.models.codec import ByteCodec
from collm.models.loading import load_model, load_tokenizer
from collm.models.pairing import cuts_between

LIMIT, CHUNKS_LIMIT = 0.9, 0.85
NAMES = ("Anna", "Bob", "Chen", "Dora", "Emil")
THINGS = ("apples", "books", "chairs", "tickets", "stamps", "marbles")


def made_up_examples(number: int) -> list[Example]:
    """Word problems with worked answers, of the lengths of real elementary ones (60-150 tokens)."""
    rng = random.Random(0)
    examples = []
    for n in range(number):
        name, thing, a = rng.choice(NAMES), rng.choice(THINGS), rng.randint(10, 999)
        question, answer, total = f"{name} has {a} {thing}.", "", a
        for _ in range(rng.randint(2, 6)):
            more = rng.randint(2, 99)
            question += f" Then {rng.choice(NAMES)} gives {name} {more} more {thing}."
            answer += f"{total} + {more} = {total + more}\n"
            total += more
        question += f" How many {thing} does {name} have now?"
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": f"{answer}#### {total}"})
        examples.append(Example(str(n), messages=turns))
    return examples


def chunks_of(formatter: Formatter, examples: list[Example]) -> Reader:
    """How the model reads chunks beside one whose tokenizer was learnt from the same text, without splitting it."""
    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"[\s\S]{1,400}"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    other.train_from_iterator((m["content"] for e in examples[:20] for m in e.messages or ()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<|end|>")
    cuts = cuts_between([formatter.tokenizer, fast], ["the model", "the other"])
    assert cuts is not None
    return Reader(formatter, ByteCodec(formatter.tokenizer, cuts, formatter.end_ids))


def made_up_model(examples: list[Example]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An untrained small Llama with a vocabulary of 8,192, and a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator((m["content"] for e in examples for m in e.messages or ()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[2])
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=320,
        intermediate_size=960,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), fast


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or GGUF file; else a small untrained Llama")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--chunks", action="store_true", help="as beside a model with another tokenizer")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_scoring.json"))
    options = parser.parse_args()

    examples = made_up_examples(options.examples)
    if options.model:
        model = load_model(options.model, dtype=options.dtype, device=options.device)
        tokenizer = load_tokenizer(options.model)
    else:
        model, tokenizer = made_up_model(examples)
        model = model.to(options.device, getattr(torch, options.dtype)).eval()  # type: ignore[arg-type]
    formatter = Formatter(tokenizer)
    chunks = chunks_of(formatter, examples) if options.chunks else None
    items = encode_examples(examples, formatter).items
    lengths = [len(item) for item in items]
    batches = []
    for indices in plan_batches(lengths, range(len(items)), options.batch_tokens):
        batch = torch.zeros(len(indices), max(lengths[i] for i in indices), dtype=torch.long)
        for row, i in enumerate(indices):
            batch[row, : lengths[i]] = torch.tensor(items[i].token_ids)
        batches.append(batch.to(options.device))

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            model(input_ids=batch, use_cache=False)

    @torch.inference_mode()
    def headless() -> None:
        for batch in batches:
            hidden_states(model, batch, use_cache=False)

    with tempfile.TemporaryDirectory() as folder:

        def scoring() -> None:
            score(
                examples,
                model,
                formatter,
                Path(folder) / "scores",
                batch_tokens=options.batch_tokens,
                chunks=chunks,
                resume=False,
                progress=False,
            )

        runs = {"bare": bare, "scoring": scoring, "headless": headless}
        seconds = interleave(runs, options.rounds, options.device)
    pairs = zip(seconds["scoring"], seconds["bare"], seconds["headless"], strict=True)
    against_bare, against_headless = zip(*((bare / own, less / own) for own, bare, less in pairs), strict=True)
    ratios = {
        "tokens/s of scoring : bare forward passes": Ratio.of(list(against_bare)),
        "tokens/s of scoring : forward passes without output head": Ratio.of(list(against_headless)),
    }
    decisive = ratios["tokens/s of scoring : bare forward passes"]
    limit = CHUNKS_LIMIT if options.chunks else LIMIT
    passed = decisive.high >= limit
    tokens = sum(lengths)
    speeds = {name: tokens / sorted(values)[len(values) // 2] for name, values in seconds.items()}
    result: dict[str, object] = {
        "benchmark": "scoring",
        "model": options.model or "untrained Llama",
        "parameters": model.num_parameters(),
        "device": options.device,
        "dtype": options.dtype,
        "tokens": tokens,
        "rounds": options.rounds,
        "median_tokens_per_second": speeds,
        "limit": limit,
        "passed": passed,
    }
    report(result, ratios, options.out)
    if not passed:
        print(f"FAILED: all of {decisive} lies below {limit}", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
