"""Pairs of random models in which the ratio of their costs and how often they agree are dials.

The assistant is the base with further layers on top. What those add to the residual stream is scaled: at 0 they are
the identity, so that the assistant always agrees while it costs what its layers cost; the larger the dial, the more
often it differs. How often is measured, and the dial set by bisection.

Random models write random text. Their embeddings are made large beside what layers add, so that the next token is
mostly a random function of the last one and little of the context: otherwise attention averages the context to a
constant and greedy texts say one token for ever. How much a text repeats itself is reported all the same.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from collm.models.backbone import hidden_states, project
from collm.models.loading import DTYPES

MAX_POSITIONS = 32_768
EMBEDDING_STD = 1.0
SIZE_OF_PROBE = (4, 96)
"""Rows and tokens of the text on which agreement is measured for the dial."""
BISECTIONS = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's shape; `num_layers` are the base's."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @property
    def layer_parameters(self) -> int:
        kv = self.hidden_size * self.num_kv_heads // self.num_heads
        return 2 * self.hidden_size * (self.hidden_size + kv) + 3 * self.hidden_size * self.intermediate_size

    def extra_layers(self, cost_ratio: float) -> int:
        """How many layers more make a pass cost about `cost_ratio` times the base's, by parameters multiplied with."""
        head = self.hidden_size * self.vocab_size
        return round((cost_ratio - 1) * (head + self.num_layers * self.layer_parameters) / self.layer_parameters)


SHAPES = {
    "small": Shape(256, 704, 1, 4, 4, 1024),
    "cpu": Shape(512, 1408, 4, 8, 4, 4096),
    "gpu": Shape(4096, 14_336, 4, 32, 8, 32_000),
}
"""`gpu`: the layers and head of an 8B Llama; 4 of its layers make a base of 1B."""


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word per token, `t0 t1 ...`; the EOS token is the last one, which no synthetic model knows."""
    words = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="<eos>")


def make_model(shape: Shape, extra_layers: int = 0, *, dtype: str, device: str, seed: int = 0) -> PreTrainedModel:
    """The first `num_layers` layers, embeddings and head do not depend on `extra_layers`."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers + extra_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            continue  # the norms, which are 1
        # A stream of random numbers for each matrix: the base's do not depend on how many layers follow.
        stream = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        std = EMBEDDING_STD if "embed" in name else 0.5 * parameter.shape[1] ** -0.5
        parameter.data.normal_(0.0, std, generator=stream)
    model.eval()
    return model


@dataclass
class Dial:
    """Scales what the layers from `first_layer` on add to the residual stream."""

    model: PreTrainedModel
    first_layer: int
    value: float = 1.0
    _outputs: list[tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        backbone: Any = self.model.base_model
        layers = backbone.layers[self.first_layer :]
        weights = [w for layer in layers for w in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)]
        self._outputs = [(weight.data, weight.data.clone()) for weight in weights]

    def set(self, value: float) -> None:
        for weight, unit in self._outputs:
            torch.mul(unit, value, out=weight)
        self.value = value


@torch.inference_mode()
def top_tokens(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The most probable next token `[row, position]` after every prefix of `ids`."""
    return project(model, hidden_states(model, ids, use_cache=False)[:, 1:].flatten(0, 1)).argmax(dim=-1)


def find_dial(base: PreTrainedModel, dial: Dial, wanted: float, seed: int = 0) -> float:
    """Set the dial so that the assistant agrees with the base on `wanted` of the tokens; returns the share it reached.

    Measured on random text, teacher-forced: each position follows a token that it has not seen.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, base.config.vocab_size, SIZE_OF_PROBE, generator=generator).to(base.device)
    expected = top_tokens(base, ids)
    seen: dict[float, float] = {}

    def agreement(value: float) -> float:
        dial.set(value)
        seen[value] = float((top_tokens(dial.model, ids) == expected).float().mean())
        return seen[value]

    if wanted >= 1:
        return agreement(0.0)
    low, high = 0.0, 1 / 16
    while agreement(high) > wanted and high < 1e4:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if agreement(middle) > wanted else (low, middle)
    best = min(seen, key=lambda value: abs(seen[value] - wanted))
    return agreement(best)
