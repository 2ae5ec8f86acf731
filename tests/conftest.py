"""Settings and fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Set before torch is imported: the tests share few cores, and tiny models lose time to threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads it when it is imported. Without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Under `make test` a make that a test starts would tell which folder it enters, among what it prints.
os.environ.pop("MAKELEVEL", None)
os.environ.pop("MAKEFLAGS", None)

from collections.abc import Callable

import pytest
from hypothesis import settings
from tiny import CHAT_TEMPLATE as CHAT_TEMPLATE
from tiny import make_model as make_model
from tiny import make_tokenizer as make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Where a change lands or not, it should not depend on the draw; at the desk, new examples find new faults.
# No deadline: how long an example takes says more about the machine's other work.
settings.register_profile("desk", deadline=None)
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests convert does not stay in the cache of who runs them."""
    os.environ["COLLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model(kind="llama", seed=0, vocab_size=320, **config)` builds a fresh model."""
    return make_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder called `tiny` with the model and the tokenizer."""
    folder = tmp_path_factory.mktemp("folder") / "tiny"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
