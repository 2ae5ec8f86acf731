"""The one place where weights are loaded: all tensors of a model come from its files, all of which are used."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from collm.errors import CollmError
from collm.models.guard import gaps, guarded, require_every_tensor
from collm.models.quiet import quiet
from collm.models.specs import no_such_model, require_config
from collm.models.whole import one_line, require_whole_folder, some, weight_files

loading = threading.RLock()
"""Held while transformers makes a model: it patches torch and its own classes for that time, so that of two threads one
got a model without its tied head."""


def load_network(name: str, *, dtype: torch.dtype | str, **options: Any) -> PreTrainedModel:
    """The causal language model in a folder or of a hub id, in evaluation mode.

    Args:
        dtype: `"auto"` takes that of the files.
        options: further ones of `from_pretrained` (`Placement.arguments`); without a `device_map` it is on the host.

    Raises:
        CollmError: naming the file and some of the tensors.
    """
    folder = Path(name) if Path(name).is_dir() else None
    if folder is not None:
        require_config(folder)
    names = set() if folder is None else require_whole_folder(folder)
    # A single file is named as such; of several, the folder.
    files = [] if folder is None else weight_files(folder)
    source = str(files[0]) if len(files) == 1 else name
    with loading, quiet(), guarded(repr(name), folder):
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                raise CollmError(f"{name}: transformers does not load a {config.model_type} as a causal language model")
            # Tensors of another shape are let through here, to be told by name.
            found: tuple[PreTrainedModel, Any] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
                name,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        except OSError as error:
            raise not_found(name, error) from error
        except RuntimeError as error:
            lacking = gaps(names)
            if not lacking:
                raise
            raise CollmError(f"{source} lacks tensors of the model: {some(lacking)}; fetch it again") from error
    model, report = found
    require_every_tensor(model, report, source, text_alone=type(config) is not type(model.config))
    model.eval()
    return model


def not_found(spec: str, error: OSError) -> Exception:
    """What an error of transformers means where nothing is there, most often for a mistyped name; else the error."""
    if Path(spec).exists() or spec.startswith("pkg:"):
        return error
    return no_such_model(spec, f"the hub did not give such a model ({one_line(error)})")
