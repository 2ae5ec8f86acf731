"""Text that is not clean, at the command line and in files: told in one line, never lost, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import CHAT_TEMPLATE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm.cli import main
from collm.errors import CollmError
from collm.text import decoded, read_text, require_text
from collm.training.recipe import load_recipe


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("text") / "base"
    tiny_model(seed=0).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def collm(*arguments: object, stdin: str | bytes | None = None, charset: str = "utf-8") -> Result:
    result = CliRunner(charset=charset).invoke(main, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line, line


GENERATE = ("--deferral", "never", "--max-tokens", 4)


def test_input_that_is_not_utf8(base: Path) -> None:
    refused(
        collm("generate", base, "-", *GENERATE, stdin=b"caf\xe9"), "standard input: not UTF-8 (byte 0xe9 at position 3)"
    )
    refused(
        collm("generate", base, "caf\udce9", *GENERATE), "the prompt: character 3", "half a surrogate pair (U+DCE9)"
    )
    refused(collm("generate", base, "a", "--system", "\udce9", *GENERATE), "the system prompt: character 0")
    stopped = collm("generate", base, "a", "--stop", "\udce9", *GENERATE)
    assert stopped.exit_code == 2 and "half a surrogate pair" in stopped.stderr


def test_input_in_utf8_whatever_the_locale(base: Path) -> None:
    told = [
        json.loads(collm("generate", base, "-", "--raw", "--json", *GENERATE, stdin=data, charset=charset).stdout)
        for data, charset in (
            ("grün\n".encode(), "utf-8"),
            ("\ufeffgrün\r\n".encode(), "utf-8"),
            ("grün\n".encode(), "latin-1"),
        )
    ]
    steps = [[step["token_id"] for step in each["steps"]] for each in told]
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize("charset", ["cp1252", "ascii"])
def test_output_that_lacks_a_character(base: Path, charset: str, tmp_path: Path) -> None:
    """A template that makes the model write behind characters that the output has not got."""
    model = str(base)
    shown = collm("generate", model, "👋 世", "--raw", "--json", *GENERATE, charset=charset)
    whole = collm("generate", model, "👋 世", "--raw", "--json", *GENERATE)
    assert shown.exit_code == 0 and shown.stdout_bytes.isascii()
    assert json.loads(shown.stdout_bytes)["text"] == json.loads(whole.stdout_bytes)["text"]
    trace = tmp_path / "t.jsonl"
    assert collm("generate", model, "👋 世", "--raw", "--trace", trace, *GENERATE, charset=charset).exit_code == 0
    for command in (("generate", model, "👋 世", "--raw", "--plain", *GENERATE), ("trace", trace)):
        assert collm(*command, charset=charset).exit_code == 0


def test_files_that_are_not_utf8(base: Path, tmp_path: Path) -> None:
    data, template, recipe = (tmp_path / name for name in ("d.jsonl", "t.jinja", "r.yaml"))
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    template.write_bytes(CHAT_TEMPLATE.encode() + "é".encode("latin-1"))
    recipe.write_bytes("out: café".encode("latin-1"))
    score = ("score", data, "--model", base, "--out", tmp_path / "s", "--chat-template", template)
    refused(collm(*score), "t.jinja: not UTF-8 (byte 0xe9")
    refused(collm("train", recipe), "r.yaml: not UTF-8 (byte 0xe9")
    template.write_text("\ufeff" + CHAT_TEMPLATE + "é", encoding="utf-8")
    assert read_text(template) == CHAT_TEMPLATE + "é"
    assert collm(*score).exit_code == 0
    recipe.write_text("[" * 5000)
    with pytest.raises(CollmError, match="not valid YAML"):
        load_recipe(recipe)


def test_rows_that_a_template_refuses_are_skipped_like_unreadable_ones(base: Path, tmp_path: Path) -> None:
    data, template = tmp_path / "d.jsonl", tmp_path / "t.jinja"
    template.write_text("{{ 1 / (messages | length - 3) }}" + CHAT_TEMPLATE)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": turns},
        {"messages": [*turns, {"role": "user", "content": "c"}, turns[1]]},
        {"messages": [turns[0], {"role": "assistant", "content": "ends <|im_end|> here"}]},
        {"messages": turns[:1]},
        {"prompt": "\ud83d"},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = ("score", data, "--model", base, "--chat-template", template, "--out", tmp_path / "s")
    refused(collm(*score), "line 5: prompt: character 0")
    done = collm(*score, "--skip-bad")
    assert done.exit_code == 0 and "1 examples" in done.stdout, done.output
    for number, told in ((2, "ZeroDivisionError"), (3, "'<|im_end|>' stands within"), (4, "no assistant turn")):
        assert any(f"line {number}" in line and told in line for line in done.stderr.splitlines()), done.stderr
    assert "skipped 3 rows of 4" in done.stderr and "skipped 1 bad rows of 5" in done.stderr


def test_one_check_of_text() -> None:
    assert require_text("👋 世", "x") == "👋 世" and decoded(b"\xef\xbb\xbfa", "x") == "a"
    with pytest.raises(CollmError, match=r"x: character 1 is half a surrogate pair \(U\+DC80\)"):
        require_text("a\udc80", "x")
