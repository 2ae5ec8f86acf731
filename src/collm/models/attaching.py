"""Put a PEFT adapter's weights into a model, all of them, and nowhere a random one in their stead."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from collm.errors import CollmError
from collm.models.devices import is_offloaded
from collm.models.guard import guarded
from collm.models.quiet import quiet
from collm.models.whole import read_object, refuse_pickle, require_whole, some

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OTHER_SIZE = re.compile(r"size mismatch for (\S+): .*?torch\.Size\(\[([\d, ]*)\]\).*?torch\.Size\(\[([\d, ]*)\]\)")


def attach(model: PreTrainedModel, folder: str, name: str = "default", *, upcast: bool = False) -> PeftModel:
    """A model with an adapter in its layers, active and in evaluation mode. The model itself is changed.

    Args:
        upcast: keep the adapter in float32 where the model is of less.

    Raises:
        CollmError: the adapter is damaged, or does not fit this model.
    """
    from peft import PeftConfig, get_peft_model

    _require_files(folder)
    _require_bare(model, folder)
    if is_offloaded(model):
        raise CollmError(
            f"{folder}: an adapter needs its base in memory, and parts of that were left on the disk for want of room; "
            "take more devices, or a quantised base (quantization=nf4)"
        )
    with quiet(), guarded(f"the adapter {folder}", folder), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config = PeftConfig.from_pretrained(folder)
        if config.is_prompt_learning:
            raise CollmError(
                f"{folder} is an adapter of kind {config.peft_type}: it is put before the text, and not into the "
                "layers, which is what can be loaded here (LoRA and its kin)"
            )
        config.inference_mode = True
        named = config.base_model_name_or_path
        peft: Any = get_peft_model(model, config, name, autocast_adapter_dtype=upcast)
        config.base_model_name_or_path = named  # PEFT writes the model's own name over it
    _pass_on(told, folder)
    try:
        insert(peft, folder, name, upcast=upcast)
    except CollmError:
        peft.unload()
        raise
    attached: PeftModel = peft.eval()
    return attached


def insert(peft: PeftModel, folder: str, name: str, *, upcast: bool = False, trainable: bool = False) -> None:
    """Load an adapter's weights under a name; the adapter is added if there is none of this name.

    Raises:
        CollmError: the adapter is damaged, or does not fit this model.
    """
    _require_files(folder)
    path, is_new = Path(folder) / WEIGHTS, name not in peft.peft_config
    with quiet(), guarded(f"the adapter {folder}", folder), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = peft.load_adapter(folder, name, autocast_adapter_dtype=upcast, is_trainable=trainable)
            faults = _faults(found.unexpected_keys, found.missing_keys, name)
        except KeyError as error:  # of a whole module (modules_to_save)
            faults = [f"lacks {error.args[0]}"]
        except RuntimeError as error:
            faults = _other_sizes(str(error), name)
            if not faults:
                raise
        finally:
            _pass_on(told, folder)
    if faults:
        if is_new and name in peft.peft_config:
            peft.delete_adapter(name)
        raise CollmError(
            f"{path} {'; it '.join(faults)}. The adapter does not fit its base: it was trained on another model, or "
            "saved by another library; give the base it was trained on (base_model_name_or_path in its "
            f"{CONFIG})"
        )


def _require_bare(model: PreTrainedModel, folder: str) -> None:
    """Of two adapters in the same layers the second would take the place of the first, as both have one name there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise CollmError(
            f"{folder} is an adapter whose base is an adapter itself; merge that into its own base first "
            "(AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW), and the "
            "tokenizer beside it), and give the new folder as base"
        )


def _faults(unexpected: list[str], missing: list[str], name: str) -> list[str]:
    faults = []
    if unexpected:
        faults.append(f"holds keys that find no place: {some(_bare(key, name) for key in unexpected)}")
    if missing:
        faults.append(f"has nothing for these places: {some(_bare(key, name) for key in missing)}")
    return faults


def _other_sizes(message: str, name: str) -> list[str]:
    sizes = [f"{_bare(key, name)} [{there}] there, [{here}] here" for key, there, here in OTHER_SIZE.findall(message)]
    return [f"holds tensors of another shape than the base's: {some(sizes)}"] if sizes else []


def _require_files(folder: str) -> None:
    if read_object(Path(folder) / CONFIG).get("alora_invocation_tokens"):
        raise CollmError(
            f"{folder} is an activated LoRA (alora_invocation_tokens in its {CONFIG}): it works behind the tokens that "
            "invoke it alone, and elsewhere it is its base; train an ordinary LoRA"
        )
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        refuse_pickle(folder)
        raise CollmError(f"{folder} has no {WEIGHTS}; fetch it, or save the adapter again as safetensors")
    require_whole(path)


def _bare(key: str, name: str) -> str:
    """As the file has it: without the adapter's name."""
    return key.replace(f".{name}.", ".")


def _pass_on(told: list[warnings.WarningMessage], folder: str) -> None:
    """The one of PEFT's warnings that says the answers may not be the adapter's: settings it does not know."""
    for each in told:
        text = " ".join(str(each.message).split())
        if text.startswith("Unexpected keyword arguments"):
            warnings.warn(f"{Path(folder) / CONFIG}: {text}", stacklevel=3)
