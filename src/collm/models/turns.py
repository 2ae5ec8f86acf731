"""One transformers model in memory, and the lock of its passes."""

from __future__ import annotations

from collections.abc import Hashable
from threading import RLock
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from collm.models.paged.ways import Ways


class Network:
    """Passes of one network, LoRA variants included, take turns. There is one of these for each transformers model."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.serves: dict[Hashable, Ways] = {}
        """By what runs it, and has been tried and found to be right: how its passes can be recorded."""

    @staticmethod
    def of(model: PreTrainedModel) -> Network:
        with _making:
            return _networks.setdefault(model, Network())


_making = RLock()
_networks: WeakKeyDictionary[PreTrainedModel, Network] = WeakKeyDictionary()
