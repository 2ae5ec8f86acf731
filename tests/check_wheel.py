"""For `make check-wheel`, in an environment with the wheel and nothing of its extras: the package, and one text."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for the tiny tokenizer; the package itself is the installed one

import collm
from collm.data.formatting import Formatter
from collm.models.fake import FakeModel
from collm.workflow.presets import shipped


def main() -> None:
    home = Path(collm.__file__).parent
    assert "site-packages" in home.parts, f"{home} is not the wheel's"
    extras = ("peft", "accelerate", "starlette", "gguf", "matplotlib", "lm_eval", "pytest")
    there = [name for name in extras if importlib.util.find_spec(name) is not None]
    assert not there, f"these came without their extras being asked for: {there}"
    from tiny import make_tokenizer

    tokenizer = make_tokenizer()
    base = FakeModel("base", len(tokenizer), num_assistants=1)
    llm = collm.CollaborativeLM([base, FakeModel("expert", len(tokenizer))], [Formatter(tokenizer)] * 2)
    generation = llm.generate("3 + 10 = ", max_tokens=20)
    assert generation.completion_tokens == 20 and 0 < generation.deferral_rate < 1
    assert "word_problems/pair" in shipped() and shipped()["word_problems/pair"].is_relative_to(home)
    collm_command = Path(sys.executable).parent / "collm"
    for arguments, code, words in (
        (["--help"], 0, "init"),
        (["train", str(shipped()["word_problems/pair"])], 1, "pip install 'collm[train]'"),
    ):
        done = subprocess.run([collm_command, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == code and words in done.stdout + done.stderr, done.stderr
    print(f"the wheel of collm {collm.__version__} works without extras: {generation.text!r}")


if __name__ == "__main__":
    main()
