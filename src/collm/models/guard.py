"""What is loaded is what was meant: files that are whole, no tensor without its place and no place without its tensor.

Libraries fill what a file lacks with random numbers, drop what they have no place for, and say so in a log that
nobody reads. Here all of that is an error of one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from collm.errors import CollmError
from collm.models.reach import keep_to_this_machine
from collm.models.whole import one_line, some

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

OLD_BUFFERS = re.compile(
    r"(^|\.)(attn|attention|self_attn|self_attention)\.(bias|masked_bias)$|(^|\.)rotary_emb\.\w+$|(^|\.)position_ids$"
)
"""Constants that older versions of transformers saved among the weights: masks, angles, positions."""
OTHER_SENSES = re.compile(r"(^|[._])(vision|visual|image|video|audio|speech|multi_modal|mm|vit|siglip)([._]|$)")
"""Parts of a multimodal model beside its text model."""


@contextmanager
def guarded(what: str, folder: str | Path | None = None) -> Iterator[None]:
    """Whatever libraries raise about foreign files becomes one line about `what`, with the file where one is known.

    They raise nearly anything (`SafetensorError`, `struct.error`, `RuntimeError`, bare `Exception`). A package that is
    missing stays what it is: it has a message of its own on the command line.

    Args:
        folder: where the files lie, if they do; a JSON file in it that is damaged is named.
    """
    if folder is None or not Path(folder).exists():  # a hub id
        keep_to_this_machine()
    try:
        yield
    except (CollmError, ModuleNotFoundError):
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CollmError(
            f"{what} does not fit into memory; load it in bfloat16 (dtype), on another device, or spread over several"
        ) from error
    except Exception as error:
        damaged = _damaged_json(folder)
        reason = one_line(error) if damaged is None else f"{damaged} is damaged; fetch it again"
        raise CollmError(f"could not load {what}: {reason}") from error


def _damaged_json(folder: str | Path | None) -> Path | None:
    for path in [] if folder is None else sorted(Path(folder).glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return path
    return None


def require_every_tensor(
    model: nn.Module, report: dict[str, Collection[Any]], source: str, *, text_alone: bool = False
) -> None:
    """Refuse what transformers says it made up or dropped.

    Not counted are what transformers itself ignores for an architecture (tied weights among it), and constants that
    are no weights.

    Args:
        report: what `from_pretrained` gives for `output_loading_info`.
        source: what the message names: a file or a folder.
        text_alone: the text model of a multimodal checkpoint was asked for; the rest of that is dropped on purpose.

    Raises:
        CollmError: naming some of the tensors.
    """
    buffers = {name for name, _ in model.named_buffers()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    unexpected = [
        name
        for name in report["unexpected_keys"]
        if not (
            OLD_BUFFERS.search(name)
            or buffers & {name, prefix + name, name.removeprefix(prefix)}
            or (text_alone and OTHER_SENSES.search(name))
        )
    ]
    shapes = {
        str(name): f"{name} {_shape(there)} there, {_shape(here)} here"
        for name, there, here in report["mismatched_keys"]
    }
    missing = set(report["missing_keys"]) - shapes.keys()
    faults = []
    if missing:
        faults.append(f"lacks tensors of the model, which would be made up at random: {some(missing)}")
    if shapes:
        faults.append(f"holds tensors of another shape than config.json says: {some(shapes.values())}")
    if unexpected:
        faults.append(f"holds tensors that the model has no place for: {some(unexpected)}")
    if faults:
        raise CollmError(
            f"{source} {'; it '.join(faults)}. The file is not whole, or config.json belongs to another model: "
            "fetch the folder again"
        )


def gaps(names: Iterable[str]) -> set[str]:
    """Experts' tensors that a file lacks by its own numbering: where layer 0 has `experts.{0,1}.w1`, layer 1 should."""
    kinds: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        kinds.setdefault(NUMBER.sub("{}", name), set()).add(tuple(NUMBER.findall(name)))
    places: dict[str, set[tuple[str, ...]]] = {}
    """What is numbered, and the numbers of all its parts."""
    for kind, numbers in kinds.items():
        if kind.count("{}") > 1:
            places.setdefault(kind.rpartition("{}")[0], set()).update(numbers)
    return {
        kind.format(*outer, last)
        for kind, numbers in kinds.items()
        for every in [places.get(kind.rpartition("{}")[0], set())]
        for outer in {each[:-1] for each in every}
        for last in {each[-1] for each in every}
        if (*outer, last) not in numbers
    }


def _shape(size: Iterable[int]) -> str:
    return "x".join(map(str, size)) or "scalar"
