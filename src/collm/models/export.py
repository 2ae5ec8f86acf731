"""A checkpoint as a plain Hugging Face folder whose logits carry the gate, for servers that know nothing else.

The gate is linear in the last hidden state, and so is every logit: each assistant becomes one more row of the output
head, `<|defer|>`. Its score is then read from the logits (`ServedInfo`), and whoever writes that token has deferred.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from collm.errors import CollmError
from collm.files import refuse_full, whole_folder, write_text
from collm.gate import log_gate
from collm.models.backbone import check_project, hidden_states
from collm.models.checkpoint import load_base
from collm.models.head import DeferralHead
from collm.models.info import CheckpointInfo, load_info, save_info
from collm.models.loading import DTYPES, eos_ids
from collm.models.served import ServedInfo
from collm.models.tokenizers import PROBES, shared_vocab_size

ZERO_TOKEN = "<|defer_zero|>"
TRANSFORMS = {
    "logit_scale": "multiplies its logits",
    "logits_scaling": "divides its logits",
    "final_logit_softcapping": "caps its logits",
}
"""Settings by which architectures change their logits after the output head."""
EXACT, ROUGH = 1e-3, 0.25
"""Nats by which laws (and gates) may be off in float32, and laws in 16 bits: more is a fault, not rounding."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how far it is from the original on some texts: `gate_error` of the gate's
    log-probabilities, `law_error` of the base's, both the largest difference in nats."""

    info: ServedInfo
    dtype: str
    gate_error: float
    law_error: float


def defer_tokens(num_assistants: int) -> list[str]:
    """`<|defer|>`, `<|defer_2|>`, ..."""
    return ["<|defer|>", *(f"<|defer_{k}|>" for k in range(2, num_assistants + 1))]


def export(
    checkpoint: str | Path, folder: str | Path, *, base: str | None = None, dtype: str = "float32", device: str = "cpu"
) -> Exported:
    """Write `checkpoint` as a folder that stock vLLM and transformers load; LoRA is merged into the base.

    Args:
        base: another place where the base model of a `lora` or `gate` checkpoint lies.
        dtype: of the weights written; a gate in 16 bits is off by what `Exported.gate_error` says.

    Raises:
        CollmError: no gate, logits that are not linear in the hidden state, a folder that is not empty.
    """
    info = load_info(checkpoint)
    if info is None:
        raise CollmError(f"{checkpoint} is not a collm checkpoint; it has no collm.json, and servers load it as it is")
    if info.cuts is not None:
        raise CollmError(
            f"{checkpoint} was trained with assistants of other tokenizers, which take turns between chunks; servers "
            "hand over at tokens only: it runs with collm generate and collm serve"
        )
    target = Path(folder)
    refuse_full(target)
    # An adapter is added in full precision and rounded once.
    loaded = "float32" if info.kind == "lora" and dtype in DTYPES else dtype
    model, head, tokenizer, info = load_base(checkpoint, base=base, dtype=loaded, device=device)
    if head is None:
        raise CollmError(f"{checkpoint} has no gate to export: it is a plain model, which servers load as it is")
    refuse_transformed(model)
    model.to(DTYPES[dtype])  # type: ignore[arg-type]
    probe = _probe(tokenizer, model)
    before = _law_and_gate(model, head, probe, _vocab_size(model, tokenizer))
    served = append_gate(model, head, tokenizer, info, probe)
    gate_error, law_error = _check(model, served, probe, before)
    with whole_folder(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", _card(served))
        save_info(temporary, info.model_copy(update={"kind": "export"}))
    return Exported(served, dtype, gate_error, law_error)


def refuse_transformed(model: PreTrainedModel) -> None:
    """Refuse an architecture whose logits are not what its output head gives.

    Raises:
        CollmError: naming it and what it does.
    """
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise CollmError(f"{type(model).__name__} has no linear output head that a gate could be put into")
    check_project(model)
    config: Any = model.config.get_text_config()
    for name, does in TRANSFORMS.items():
        value = getattr(config, name, None)
        if value is not None and value != 1:
            raise CollmError(
                f"{type(model).__name__} {does} ({name}={value:g}), so a gate among them would not be the gate that "
                "was trained; such a pair runs in this process only (collm generate, collm eval)"
            )


@torch.no_grad()
def append_gate(
    model: PreTrainedModel, head: DeferralHead, tokenizer: PreTrainedTokenizerBase, info: CheckpointInfo, probe: Tensor
) -> ServedInfo:
    """Put the gate's rows into the model's vocabulary and the deferral tokens into the tokenizer, both in place.

    Rows that only pad the vocabulary are used before new ones are added; what is left of them becomes zero. So all
    logits beyond the base's own vocabulary are known, whatever stood there.

    The rows are divided by a power of two, which changes no digit, until the logits are about 1 at most: they shall not
    be what a softmax over all columns is made of (`ServedInfo` tells why).

    Args:
        probe: `[T]` token ids, on which the size of the logits is measured.

    Raises:
        CollmError: the tokenizer has deferral tokens already, or gives them ids that are taken.
    """
    vocab_size, first_free = _vocab_size(model, tokenizer), shared_vocab_size(tokenizer)
    tokens = [*defer_tokens(head.num_assistants), ZERO_TOKEN]
    taken = sorted(set(tokens) & set(tokenizer.get_vocab()))
    if taken:
        raise CollmError(f"the tokenizer has a token {taken[0]} already; was this model exported before?")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    ids = [int(number) for number in tokenizer.convert_tokens_to_ids(tokens)]  # type: ignore[union-attr]
    if min(ids) < first_free or len(set(ids)) < len(ids):
        raise CollmError(f"the tokenizer gives {tokens[0]} an id that is taken ({ids[0]}); please report the model")
    scores = head(hidden_states(model, probe[None], use_cache=False)[0]) - head.bias.detach()
    scale = 2.0 ** math.ceil(math.log2(max(1.0, float(scores.abs().max()))))
    if max(ids) >= _rows(model):
        # Else the new rows would be drawn around the mean of the others, which takes minutes for large vocabularies.
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    output: Any = model.get_output_embeddings()
    inputs: Any = model.get_input_embeddings()
    for parameter in (inputs.weight, output.weight, output.bias):  # the first two may be one
        if parameter is not None:
            parameter[vocab_size:] = 0
    output.weight[ids[:-1]] = (head.weight / scale).to(output.weight)

    defer_ids, zero_id = ids[:-1], ids[-1]
    served = ServedInfo(
        defer_token_ids=defer_ids,
        zero_token_id=zero_id,
        zero_columns=_rows(model) - vocab_size - len(defer_ids),
        vocab_size=vocab_size,
        scale=scale,
        bias=head.bias.tolist(),
        assistants=info.assistants,
        base_format=info.base_format,
        base_fingerprint=info.base_fingerprint,
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        calibration=info.calibration,
    )
    config: Any = model.config
    config.collm = served.to_config()
    # A server then ends a text where the base defers, whether the request names the ids or not.
    ends = sorted(eos_ids(model, tokenizer))
    if model.generation_config is None:
        model.generation_config = GenerationConfig()
    model.generation_config.eos_token_id = [*ends, *defer_ids]
    return served


def _rows(model: PreTrainedModel) -> int:
    """Of the output head."""
    return int(model.get_output_embeddings().weight.shape[0])


def _vocab_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many logits belong to tokens: neither padding of the matrix, nor tokens that it has no rows for."""
    return min(shared_vocab_size(tokenizer), _rows(model))


def _probe(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tensor:
    """`[T]` token ids of all sorts of text, not too many for a short context."""
    ids = [number for text in PROBES for number in tokenizer.encode(text, add_special_tokens=False)]
    config: Any = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or len(ids)
    return torch.tensor(ids[: min(longest, 512)], device=model.device).clamp(max=_rows(model) - 1)


@torch.inference_mode()
def _law_and_gate(model: PreTrainedModel, head: DeferralHead, probe: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """`[T, V]` and `[T, 1+K]`: log-probabilities as this package finds them."""
    logits = model(input_ids=probe[None], use_cache=False).logits[0, :, :vocab_size].float()
    return torch.log_softmax(logits, dim=-1), log_gate(head(hidden_states(model, probe[None], use_cache=False)[0]))


@torch.inference_mode()
def read_logits(logits: Tensor, served: ServedInfo) -> tuple[Tensor, Tensor]:
    """The base's law `[..., vocab_size]` and the gate `[..., 1+K]`, both as logarithms, from an export's logits."""
    logits = logits.float()
    scores = logits[..., served.defer_token_ids] * served.scale + torch.tensor(served.bias, device=logits.device)
    return torch.log_softmax(logits[..., : served.vocab_size], dim=-1), log_gate(scores)


def _check(
    model: PreTrainedModel, served: ServedInfo, probe: Tensor, before: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """The largest differences of gate and law from the original's.

    Raises:
        CollmError: they are more than rounding, so that the architecture does something with its logits.
    """
    logits = model(input_ids=probe[None], use_cache=False).logits[0]
    law, gate = read_logits(logits, served)
    law_error, gate_error = (float((a - b).abs().max()) for a, b in zip((law, gate), before, strict=True))
    exact = model.dtype == torch.float32
    if not (law_error <= (EXACT if exact else ROUGH) and gate_error < (EXACT if exact else math.inf)):
        raise CollmError(
            f"{type(model).__name__} computes its logits in a way that the export does not know (the gate is off by "
            f"{gate_error:.2g} nats, the law by {law_error:.2g}); please report the architecture"
        )
    return gate_error, law_error


def _card(served: ServedInfo) -> str:
    ids = ", ".join(
        f"{number} ({info.name})" for number, info in zip(served.defer_token_ids, served.assistants, strict=True)
    )
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [collm, collaborative-decoding]",
            "---",
            "",
            "# A base with its gate among its logits",
            "",
            "Written by `collm export`. A plain model for transformers and vLLM, with one more token for each "
            f"assistant: {ids}. Their logits are the gate's scores (`collm` in `config.json` says how to read them).",
            "",
            "Start it with `collm vllm-serve FOLDER`. A server without collm's logits processor does not decide "
            "anything and might even write such a token.",
            "",
            "```json",
            json.dumps(served.to_config() | {"calibration": len(served.calibration)}, indent=2),
            "```",
            "",
        ]
    )
