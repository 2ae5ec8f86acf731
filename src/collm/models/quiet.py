"""Libraries that keep quiet while they do our work: their bars and hints are not what users asked for."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_depth = 0
_before: tuple[int, bool] = (logging.WARNING, True)
_filters: warnings.catch_warnings[None] | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and peft show neither bars nor warnings; all is as it was afterwards. Downloads keep their bars.

    `TRANSFORMERS_VERBOSITY` (`info`, `debug`; the command line's `--verbose`) lets it speak.
    """
    global _depth, _before, _filters
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as library

    if os.environ.get("TRANSFORMERS_VERBOSITY") in ("info", "debug", "detail"):
        yield
        return
    with _lock:
        _depth += 1
        if _depth == 1:
            _before = library.get_verbosity(), library.is_progress_bar_enabled()
            downloads = not are_progress_bars_disabled()
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|accelerate|huggingface_hub)\b")
            library.set_verbosity_error()
            library.disable_progress_bar()  # Those of downloads, too.
            if downloads:
                enable_progress_bars()
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                assert _filters is not None
                _filters.__exit__(None, None, None)
                library.set_verbosity(_before[0])
                if _before[1]:
                    library.enable_progress_bar()
