"""The gate's parameters: one linear score for each assistant on the base's last hidden state."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from collm.errors import CollmError
from collm.files import replacing

FILE = "gate.safetensors"


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
        """Scores `[..., K]` float32 of hidden states `[..., H]` of any dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), self.bias.float())

    def save(self, folder: Path) -> None:
        with replacing(folder / FILE) as temporary:
            save_file({"weight": self.weight.detach().cpu(), "bias": self.bias.detach().cpu()}, temporary)

    @classmethod
    def load(cls, folder: Path) -> DeferralHead:
        path = folder / FILE
        if not path.is_file():
            raise CollmError(f"{folder} has no {FILE}: it is not a collm checkpoint, or it was only partly written")
        tensors = load_file(path)
        head = cls(tensors["weight"].shape[1], tensors["weight"].shape[0])
        head.load_state_dict(tensors)
        return head
