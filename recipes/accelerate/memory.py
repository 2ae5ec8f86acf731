"""What fits where: memory for training a base and for scoring a large assistant, counted without any weights.

    python recipes/accelerate/memory.py [--base SPEC] [--assistant SPEC] [--batch-size 4] [--length 1024]

Models are built on the `meta` device, so that nothing is allocated. SPEC is a folder or hub id whose config.json is
read; without it, Llama-2's 7B and 70B. GiB; a CUDA context and the allocator's fragments (1 to 3) come on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from collm.models.backbone import LOGITS_AT_ONCE

GIB = 2**30
LLAMA2: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


@dataclass(frozen=True)
class Shape:
    """Parameters of a model: all, in one layer, outside the layers (embeddings, head, last norm)."""

    parameters: int
    layer: int
    layers: int
    hidden: int
    intermediate: int
    linear: int
    """Sum of inputs and outputs of all linear layers inside the layers: r times that is a LoRA of rank r."""

    @property
    def outside(self) -> int:
        return self.parameters - self.layer * self.layers


def shape(spec: str) -> Shape:
    config: Any = (
        AutoConfig.for_model("llama", vocab_size=32_000, **LLAMA2[spec])
        if spec in LLAMA2
        else AutoConfig.from_pretrained(spec).get_text_config()
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers: Any = model.base_model.layers
    linear = sum(
        module.in_features + module.out_features for module in layers.modules() if isinstance(module, torch.nn.Linear)
    )
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        layers=len(layers),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        linear=linear,
    )


def activations(base: Shape, tokens: int) -> float:
    """With gradient checkpointing in bfloat16: each layer's input, one layer's insides, and the logits of one part."""
    inputs = 2 * tokens * base.hidden * base.layers
    inside = 2 * tokens * (12 * base.hidden + 4 * base.intermediate)
    logits = LOGITS_AT_ONCE * (2 + 4 + 4 + 4)
    return inputs + inside + logits


def full(base: Shape, gpus: int, tokens: int) -> float:
    """`tune: full` by FSDP2, float32 weights, bf16: weights, gradients and Adam's two moments are shared by all GPUs; a
    layer that is computed, the one that is fetched, and what lies outside the layers are there whole, in bfloat16."""
    shared = 16 * base.parameters / gpus
    whole = 0 if gpus == 1 else 2 * (2 * base.layer + base.outside) + 2 * (base.layer + base.outside)
    cast = 2 * base.parameters if gpus == 1 else 0  # autocast keeps bfloat16 copies
    training = shared + whole + cast + activations(base, tokens)
    return max(training, 4 * base.parameters)  # each process reads all weights before they are shared


def lora(base: Shape, gpus: int, tokens: int, rank: int = 16) -> float:
    """`tune: lora` on a bfloat16 base, each GPU with all of it (DDP)."""
    return (
        2 * base.parameters + 16 * rank * base.linear + activations(base, tokens) + 4 * rank * base.linear * (gpus > 1)
    )


def gate(base: Shape, tokens: int) -> float:
    """`tune: gate` and scoring of the base, bfloat16, one GPU: the weights, a batch, a part of the hidden states."""
    return 2 * base.parameters + 2 * tokens * (12 * base.hidden + 4 * base.intermediate) + 2 * GIB


def scoring(model: Shape, gpus: int, bytes_each: float) -> float:
    """Scoring or decoding under a model whose layers are spread (`device_map: auto`); the cache comes on top."""
    return bytes_each * model.parameters / gpus + 2 * 4096 * (12 * model.hidden + 4 * model.intermediate)


def rows(base: Shape, assistant: Shape, tokens: int) -> Iterator[tuple[str, list[float]]]:
    counts = (1, 4, 8, 16)
    yield "base, `tune: full`, FSDP2", [full(base, n, tokens) for n in counts]
    yield "base, `tune: lora`", [lora(base, n, tokens) for n in counts]
    yield "base, `tune: gate`", [gate(base, tokens)] * len(counts)
    yield "assistant scored, bfloat16", [scoring(assistant, n, 2) for n in counts]
    yield "assistant scored, int8", [scoring(assistant, n, 1.05) for n in counts]
    yield "assistant scored, nf4", [scoring(assistant, n, 0.57) for n in counts]


def table(base: Shape, assistant: Shape, tokens: int) -> list[str]:
    lines = ["| GiB on each GPU | 1 GPU | 4 GPUs | 8 GPUs | 16 GPUs |", "|---|---|---|---|---|"]
    for name, found in rows(base, assistant, tokens):
        lines.append(f"| {name} | {' | '.join(f'{value / GIB:.0f}' for value in found)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="llama-2-7b")
    parser.add_argument("--assistant", default="llama-2-70b")
    parser.add_argument("--batch-size", type=int, default=4, help="examples at a time on each GPU")
    parser.add_argument("--length", type=int, default=1024, help="tokens of an example")
    options = parser.parse_args()
    print("\n".join(table(shape(options.base), shape(options.assistant), options.batch_size * options.length)))


if __name__ == "__main__":
    main()
