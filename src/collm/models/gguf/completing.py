"""What a GGUF file says of computing and transformers passes over: angles, biases, caps, tensors without a place.

Of most architectures transformers reads sizes and `rope.freq_base` alone, and drops the rest without a word. Llama 3.2
lost its angles so, which lie in a tensor of their own. The keys, and what they mean, are llama.cpp's
(src/llama-model.cpp, src/llama-hparams.h).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from collm.errors import CollmError
from collm.models.gguf.header import Header, Tensor
from collm.models.whole import some

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ANGLES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors by which the angles of each pair are divided: always, in long texts, and in short ones."""
OF_CONFIG = (ANGLES, LONG, SHORT)
"""Tensors that a configuration tells, and no weights."""
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
BIASES = {"attention_bias": ".attn_q.bias", "mlp_bias": ".ffn_up.bias"}
"""Switches of configurations, and tensors that are there where they are on."""
SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}
"""Architectures and layers of Gemma's 27B: their attention is scaled by the width of all heads together, which the file
does not say; llama.cpp knows them by their layers."""
LOW, HIGH = 1.0, 4.0
"""Of Llama 3's angles; all models of this kind have them so."""


def complete(config: PreTrainedConfig, header: Header) -> None:
    """Put into a configuration what its file says besides; where that is nothing, it stays as it was.

    Raises:
        CollmError: the file's angles are of a kind that transformers does not compute.
    """
    kind = str(header.metadata["general.architecture"])
    told = {key.removeprefix(f"{kind}."): value for key, value in header.metadata.items()}
    tensors = {tensor.name: tensor for tensor in header.tensors}
    where: Any = config
    for name in CAPS:
        if name in told and hasattr(config, name):
            setattr(config, name, told[name])
    for name, suffix in BIASES.items():
        if getattr(config, name, True) is False and any(tensor.endswith(suffix) for tensor in tensors):
            setattr(config, name, True)
    if kind == "phi3" and "attention.sliding_window" in told:
        where.sliding_window = told["attention.sliding_window"] or None
    if (kind, told.get("block_count")) in SCALED_BY_WIDTH:
        where.query_pre_attn_scalar = where.hidden_size // where.num_attention_heads
    rope: Any = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict):
        # Of several kinds of layers it is those that see all of the text whose angles are scaled.
        rope = rope.get("full_attention", rope)
        if rope.get("rope_type", "default") == "default":
            _turn(rope, where, told, tensors, header)


def require_places(model: PreTrainedModel, header: Header) -> None:
    """Refuse what transformers dropped of a file.

    Raises:
        CollmError: naming some of the tensors.
    """
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    kind = str(header.metadata["general.architecture"])
    if hasattr(transformers, "GgufConfig"):
        from transformers.integrations import gguf

        newer: Any = gguf
        if newer.is_gguf_arch_supported(kind):
            return  # read in another way, which reports what it finds no place for
    reading: Any = modeling_gguf_pytorch_utils
    processor = reading.TENSOR_PROCESSORS.get(kind, reading.TensorProcessor)()
    places = reading.get_gguf_hf_weights_map(model, processor)
    # Experts of one layer are one tensor here, whose name has no ending.
    names = {tensor.name for tensor in header.tensors if tensor.name.removesuffix(".weight") not in places}
    lost = names - places.keys() - {*OF_CONFIG, "output.weight"}
    if lost:
        raise CollmError(
            f"{header.path} holds tensors that {type(model).__name__} of transformers has no place for: {some(lost)}. "
            "Without them it would be another model: take the original model's folder, or a server of llama.cpp "
            "(llamacpp+http://HOST:PORT)"
        )


def _turn(rope: dict[str, Any], config: Any, told: dict[str, Any], tensors: dict[str, Tensor], header: Header) -> None:
    """Rotary position embeddings, as the file has them."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = told.get("rope.dimension_count", head_dim)
    if "rope.dimension_count" in told and rope.get("partial_rotary_factor", 1.0) != turned / head_dim:
        rope["partial_rotary_factor"] = turned / head_dim
    if "rope.freq_base" in told:
        rope["rope_theta"] = told["rope.freq_base"]
    scaling = told.get("rope.scaling.type", "linear")
    factor = told.get("rope.scaling.factor") or told.get("rope.scale_linear") or 1.0
    original = told.get("rope.scaling.original_context_length", told.get("context_length"))
    if LONG in tensors and SHORT in tensors:
        rope["rope_type"] = "longrope"
        rope["long_factor"], rope["short_factor"] = (_values(header, tensors[n]).tolist() for n in (LONG, SHORT))
        rope["original_max_position_embeddings"] = original
        if "rope.scaling.attn_factor" in told:
            rope["attention_factor"] = told["rope.scaling.attn_factor"]
    elif ANGLES in tensors and not np.all((divisors := _values(header, tensors[ANGLES])) == 1):
        found = _llama3(divisors, rope["rope_theta"], told.get("rope.scaling.original_context_length"))
        if found is None or factor != 1:
            raise CollmError(
                f"{header.path}: its angles ({ANGLES}) are of a kind that transformers does not compute; take the "
                "original model's folder"
            )
        rope.update(found)
    elif scaling == "none" or factor == 1:
        return
    elif scaling == "linear":
        rope.update(rope_type="linear", factor=factor)
    elif scaling == "yarn":
        rope.update(rope_type="yarn", factor=factor, original_max_position_embeddings=original)
        # Both multiply by this where nothing is said; llama.cpp takes a factor besides.
        if (more := told.get("rope.scaling.attn_factor", 1.0)) != 1:
            rope["attention_factor"] = more * (1 + 0.1 * math.log(factor))
        for name in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{name}" in told:
                rope[name] = told[f"rope.scaling.yarn_{name}"]
    else:
        raise CollmError(f"{header.path}: its angles are scaled by {scaling!r}, which is unknown here")


def _llama3(divisors: NDArray[np.float32], theta: float, original: int | None) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling that divide the angles so, `[D/2]`; None: it is not that scaling.

    Angles that turn often within the original context stay, those that do not turn once are divided by the factor, and
    between them it is interpolated. The converter keeps what comes of it alone.
    """
    factor = float(divisors.max())
    turns = theta ** (-np.arange(len(divisors)) / len(divisors)) / (2 * math.pi)  # a position
    for context in [original] if original else [8192, *(2**n for n in range(10, 21))]:
        smooth = np.clip((context * turns - LOW) / (HIGH - LOW), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-3):
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            return {"rope_type": "llama3", **dict(zip(names, (factor, LOW, HIGH, context), strict=True))}
    return None


def _values(header: Header, tensor: Tensor) -> NDArray[np.float32]:
    """A small tensor, which is never packed."""
    if tensor.type != 0 or len(tensor.shape) != 1:
        raise CollmError(f"{header.path} is damaged: {tensor.name} is no list of float32; fetch it again")
    return np.fromfile(header.path, "<f4", tensor.shape[0], offset=header.begin + tensor.offset)
