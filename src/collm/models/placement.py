"""How and where a model is loaded: precision, quantisation, one device or several. A spec may say it after a `?`.
Nothing here needs torch until something is loaded."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collm.errors import CollmError, nearest
from collm.models.specs import split_spec
from collm.models.whole import read_object

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of transformers to lay a model over the devices that there are."""
QUANTIZATIONS = ("int8", "nf4")
"""Of bitsandbytes; the weights of linear layers, not of embeddings and the output head."""


def dtype_name(dtype: object) -> str:
    """`torch.bfloat16`, or its name, as its name."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Placement:
    """How and where a model is loaded.

    Args:
        dtype: of the weights; with `quantization` of what is computed with them.
        device: the one that takes the whole model.
        device_map: one of `SPREADS`, or a JSON file that gives each module its device (`{"model.layers.0": 0, ...}`;
            `"disk"` leaves it in its file until it is needed). Then `device` counts for nothing.
        quantization: one of `QUANTIZATIONS`, or none.

    Raises:
        CollmError: one of them is unknown.
    """

    dtype: str = "float32"
    device: str = "cpu"
    device_map: str | None = None
    quantization: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise CollmError(f"dtype is one of {', '.join(DTYPES)}, not {self.dtype!r}")
        for name, value, known in (
            ("device_map", self.device_map, SPREADS),
            ("quantization", self.quantization, QUANTIZATIONS),
        ):
            own_file = name == "device_map" and value is not None and value.endswith(".json")
            if value is not None and value not in known and not own_file:
                hint = nearest(value, known, otherwise="")
                file = " or a .json file" if name == "device_map" else ""
                raise CollmError(f"{name} is one of {', '.join(known)}{file}, not {value!r}{hint and f' ({hint})'}")

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def of(self, spec: str) -> tuple[str, Placement]:
        """A spec's name, and this placement with what the spec asks for behind its `?`."""
        name, asked = split_spec(spec)
        if "device" in asked and "device_map" in asked:
            raise CollmError(f"{spec}: device is one, device_map lays the model over several; give one of the two")
        return name, replace(self, **asked) if asked else self

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`. A model goes straight to its device, never through a second copy.

        Raises:
            ModuleNotFoundError: a package that this needs is not installed.
            CollmError: there is no such device; the file of `device_map` is not there or damaged.
        """
        _check_device(self.device)
        found: dict[str, Any] = {"dtype": self.torch_dtype}
        if self.device_map is not None:
            _need("accelerate")
            own_file = self.device_map.endswith(".json")
            found["device_map"] = _read_map(Path(self.device_map)) if own_file else self.device_map
        elif self.quantization is not None or (self.device != "cpu" and importlib.util.find_spec("accelerate")):
            found["device_map"] = {"": self.device}
        if self.quantization is not None:
            from transformers import BitsAndBytesConfig

            _need("accelerate")
            _need("bitsandbytes")
            # It says at every product of bfloat16 that int8 is computed in float16.
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
            found["quantization_config"] = (
                BitsAndBytesConfig(load_in_8bit=True)
                if self.quantization == "int8"
                else BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.torch_dtype
                )
            )
        return found


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise CollmError(f"there is no kind of device {device!r}; use cpu, cuda, cuda:1, mps, ...") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise CollmError(f"device {device!r} was asked for, but torch sees no CUDA device; use cpu, or a CUDA build")


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def _read_map(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CollmError(f"device_map: there is no file {path}")
    return read_object(path)


DEFAULT = Placement()
