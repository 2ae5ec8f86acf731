"""The gate's parameters: one linear score for each assistant on the base's last hidden state."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from collm.errors import CollmError
from collm.files import replacing
from collm.models.guard import guarded
from collm.models.info import GATE_FILE
from collm.models.whole import require_whole


class DeferralHead(nn.Module):
    """`<theta_k, h> + b_k` for k = 1..K. Starts at theta = 0; kept and computed in float32 whatever the base's dtype.

    The paper has no bias; ours holds what is left when the standardisation of h is folded into theta.
    """

    def __init__(self, hidden_size: int, num_assistants: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_assistants, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_assistants))

    @property
    def num_assistants(self) -> int:
        return self.weight.shape[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores `[..., K]` float32 of hidden states `[..., H]` of any dtype and device, on the gate's own."""
        hidden = hidden.to(self.weight.device)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), self.bias.float())

    def save(self, folder: Path) -> None:
        with replacing(folder / GATE_FILE) as temporary:
            save_file({"weight": self.weight.detach().cpu(), "bias": self.bias.detach().cpu()}, temporary)

    @classmethod
    def load(cls, folder: Path) -> DeferralHead:
        """The gate of a checkpoint's folder.

        Raises:
            CollmError: it is missing or damaged, or the file holds something else.
        """
        path = folder / GATE_FILE
        if not path.is_file():
            raise CollmError(f"{folder} has no {GATE_FILE}: it is no collm checkpoint, or it was only partly written")
        require_whole(path)
        with guarded(str(path), folder):
            tensors = load_file(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        weight = shapes.get("weight", ())
        if len(weight) != 2 or shapes != {"weight": weight, "bias": weight[:1]}:
            found = (
                ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items())) or "nothing"
            )
            raise CollmError(f"{path} is no gate: it should hold weight KxH and bias K, and holds {found}")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise CollmError(f"{path} is damaged: it holds numbers that are none (NaN or infinite)")
        head = cls(weight[1], weight[0])
        head.load_state_dict(tensors)
        return head
