"""The artifact: a Hugging Face folder plus `gate.safetensors` and `collm.json`.

Three kinds to load, by what was trained: `full` holds the whole model and loads with `AutoModelForCausalLM` as a plain
one; `lora` holds a PEFT adapter; `gate` holds the gate alone. The last two name the base model they belong to and a
fingerprint of its weights. A fourth, `export`, is for servers (`models.export`) and is refused here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collm.errors import CollmError
from collm.models.attaching import attach
from collm.models.backbone import causal_lm
from collm.models.devices import is_quantized, output_device
from collm.models.guard import guarded
from collm.models.head import DeferralHead
from collm.models.info import (
    FILE,
    GATE_FILE,
    CheckpointInfo,
    base_spec,
    found,
    load_info,
    placed,
    same_weights,
    save_info,
)
from collm.models.loading import load_tokenizer, place_model, weights_fingerprint
from collm.models.placement import Placement


def warn_of_other_weights(found: Callable[[], str], trained: str | None, what: str) -> None:
    """Warn if the weights' fingerprint, which takes a while to find, is not that of training (None: unknown)."""
    if trained is not None and not same_weights(found(), trained):
        warnings.warn(
            f"{what} (another quantisation or version?); deferral rates and quality may differ: "
            "run collm calibrate again",
            stacklevel=2,
        )


def save_checkpoint(
    folder: Path,
    info: CheckpointInfo,
    model: nn.Module,
    head: DeferralHead | None,
    tokenizer: PreTrainedTokenizerBase | None,
    state_dict: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint; `collm.json` comes last, so that a folder that has one is whole.

    Args:
        model: the transformers model, or the PEFT model around it for kind `lora`; not read for kind `gate`.
        state_dict: its gathered weights where the model itself is sharded (FSDP, ZeRO).
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if info.kind != "gate":
            options = {} if state_dict is None else {"state_dict": state_dict}
            if info.kind == "lora":
                options["save_embedding_layers"] = False  # type: ignore[assignment]
                for adapter in model.peft_config.values():  # type: ignore[operator]
                    # Else PEFT names the place where the base lay on this machine.
                    adapter.base_model_name_or_path = info.base_model
            model.save_pretrained(folder, **options)  # type: ignore[operator]
        if tokenizer is not None and info.kind == "full":
            tokenizer.save_pretrained(folder)
        if head is not None:
            head.save(folder)
        save_info(folder, placed(info, folder))
    except OSError as error:
        raise CollmError(f"could not write the checkpoint to {folder}: {error}") from None


def load_base(
    path: str | Path, *, base: str | None = None, dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, DeferralHead | None, PreTrainedTokenizerBase, CheckpointInfo]:
    """The base model of a checkpoint ready for inference (adapters merged), its gate, tokenizer and description.

    Args:
        path: a checkpoint, or any model spec; a plain model has no gate and can only decode alone.
        base: another place where the base model of a `lora` or `gate` checkpoint lies.

    Raises:
        CollmError: missing files, a newer format, a gate of another width than the base.

    Warns:
        UserWarning: the base's weights are not those the checkpoint was trained on.
    """
    path, placement = Placement(dtype, device).of(str(path))
    info = load_info(path)
    spec = base_spec(path, info, base)
    if info is None:
        return place_model(spec, placement), None, load_tokenizer(spec), CheckpointInfo()
    info = found(info, path)
    model = place_model(spec, placement)
    tokenizer = load_tokenizer(spec)
    warn_of_other_weights(
        partial(weights_fingerprint, model),
        info.base_fingerprint,
        f"{spec} does not hold the weights that {path} was trained with",
    )
    if info.kind == "lora":
        adapted = attach(model, path, upcast=True)
        # Merged into quantised weights it would be rounded away.
        with guarded(f"the adapter {path}", path):
            model = causal_lm(adapted) if is_quantized(model) else adapted.merge_and_unload().eval()
    head = None
    if (Path(path) / GATE_FILE).is_file():
        head = DeferralHead.load(Path(path)).to(output_device(causal_lm(model)))
        if head.num_assistants != len(info.assistants):
            raise CollmError(
                f"{Path(path) / GATE_FILE} is for {head.num_assistants} assistants, but {FILE} names "
                f"{len(info.assistants)}: the two are of different checkpoints"
            )
        width = causal_lm(model).config.get_text_config().hidden_size
        if head.weight.shape[1] != width:
            raise CollmError(
                f"{Path(path) / GATE_FILE} is for hidden states of width {head.weight.shape[1]}, "
                f"but {spec} has {width}: give the base model it was trained on"
            )
    return model, head, tokenizer, info
