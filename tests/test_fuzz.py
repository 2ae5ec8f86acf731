"""Rows, templates and tokenizers at random: an answer or one line that says why not; no traceback, no silent loss.

`COLLM_FUZZ=5000 pytest --hypothesis-seed=N tests/test_fuzz.py` looks longer.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from collm.data.encoding import usable
from collm.data.examples import Example, load_examples
from collm.data.formatting import Formatter, PromptFormat
from collm.data.messages import Conversation, read_conversation
from collm.errors import CollmError

fuzz = settings(
    max_examples=int(os.environ.get("COLLM_FUZZ", "120")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
QWEN = (Path(__file__).parent / "chat_templates" / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
R1 = (Path(__file__).parent / "chat_templates" / "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja").read_text(
    encoding="utf-8"
)
TOKENIZER = make_tokenizer()
MARKS = [
    "<|im_end|>",
    "<|im_start|>",
    "</s>",
    "<think>",
    "</think>",
    "zqsentinelqz",
    "{{",
    "{% raw %}",
    "\u2028",
    "\ufeff",
    "\r",
]
MARKS += ["\ud83d", "\udc80", "\x00", "\u0085", "é", "世", "👋", "#### 1", " ", "\n", "a", "b2", "1,23,456", "\\u0000"]
texts = st.lists(st.sampled_from(MARKS) | st.text(max_size=6), max_size=4).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def one_line(error: Exception) -> None:
    assert "\n" not in str(error) and "Traceback" not in str(error), error


# -- rows

calls = st.lists(
    st.fixed_dictionaries(
        {
            "function": st.fixed_dictionaries(
                {"name": texts, "arguments": texts | st.dictionaries(texts, json_values, max_size=2)}
            )
        },
        optional={"id": texts, "type": st.sampled_from(["function", "custom"])},
    ),
    max_size=2,
)
contents = texts | st.none() | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=2)
messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "robot"]),
        "content": contents | json_values,
    },
    optional={
        "tool_calls": calls | json_values,
        "reasoning_content": texts | json_values,
        "tool_call_id": texts,
        "name": texts,
        "weight": st.integers(0, 1),
        "audio": json_values,
    },
)
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": texts})}), max_size=1
)
rows = (
    st.fixed_dictionaries(
        {"messages": st.lists(messages, max_size=5)},
        optional={"id": json_values, "answer": json_values, "tools": tools | json_values},
    )
    | st.fixed_dictionaries(
        {"prompt": texts, "completion": texts | st.none()}, optional={"id": texts, "x": json_values}
    )
    | st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "id", "tools"]), json_values)
    | json_values
)
lines = rows.map(json.dumps).map(str.encode) | st.binary(max_size=40)


@fuzz
@given(st.lists(lines, max_size=5), st.sampled_from([b"\n", b"\r\n"]), st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_rows(found: list[bytes], newline: bytes, mark: bytes) -> None:
    """Each line becomes an example or is named."""
    data = mark + newline.join(found)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("rows.jsonl", "rows.json"):
            path = Path(folder) / name
            path.write_bytes(data)
            told = _Told()
            logging.getLogger("collm").addHandler(told)
            try:
                examples = load_examples(path, skip_bad=True)
            except CollmError as error:
                one_line(error)
                examples = []
            finally:
                logging.getLogger("collm").removeHandler(told)
            skipped = [line for line in told.lines if line.startswith("skipped: ")]
            assert all(str(path) in line and "\n" not in line for line in skipped)
            if name == "rows.jsonl":
                given_lines = [line for line in data.split(b"\n") if line.strip()]
                assert len(examples) + len(skipped) == len(given_lines)
            if skipped:
                with pytest.raises(CollmError, match=r"rows\.json"):
                    load_examples(path)
            for example in examples:
                shown(example)


class _Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


FORMATTERS = [Formatter(TOKENIZER)] + [
    Formatter(TOKENIZER, PromptFormat(chat_template=template, template_kwargs=kwargs))
    for template, kwargs in ((QWEN, {}), (QWEN, {"enable_thinking": False}), (R1, {}))
]


def shown(example: Example) -> None:
    """Each template shows and teaches all of it, or says what it lacks."""
    for formatter in FORMATTERS:
        learnt(formatter, example)
        asked(formatter, example)


def learnt(formatter: Formatter, example: Example) -> None:
    try:
        encoded = formatter.encode(example)
    except CollmError as error:
        one_line(error)
        assert str(error).startswith(example.label)
        return
    assert encoded.num_labelled and not encoded.labelled[0]
    completions = formatter.completions(example)
    gold = [t for t, flag in zip(encoded.token_ids, encoded.labelled, strict=True) if flag]
    assert gold == [t for completion in completions for t in completion]
    for completion in completions:
        assert completion[-1] in formatter.end_ids and not formatter.end_ids & set(completion[:-1])
    decode = formatter.tokenizer.decode
    if example.messages is None:
        assert squeezed(example.completion or "") == squeezed(decode(completions[0][:-1]))
        return
    turns = [(i, m) for i, m in enumerate(example.messages) if m["role"] == "assistant"]
    for (i, message), completion in zip(turns[-len(completions) :], completions, strict=True):
        text = squeezed(decode(completion))
        own = squeezed(message["content"])
        assert own in text or own.removeprefix("<think>") in text
        assert squeezed(message.get("reasoning_content", "")) in text
        assert all(squeezed(call["function"]["name"]) in text for call in message.get("tool_calls", []))
        if i and (i, message) == turns[-1] and example.messages[i - 1]["role"] != "assistant":
            prompt = formatter.prompt(Conversation(example.messages[:i], example.tools))
            assert encoded.token_ids[: len(prompt)] == prompt
    whole = squeezed(decode(encoded.token_ids))
    before = example.messages[: turns[-1][0]]
    assert all(squeezed(m["content"]) in whole for m in before if m["role"] in ("user", "system", "developer"))


def asked(formatter: Formatter, example: Example) -> None:
    try:
        prompt = formatter.prompt(example.question)
    except CollmError as error:
        one_line(error)
        return
    text = squeezed(formatter.tokenizer.decode(prompt))
    question = (
        [{"role": "user", "content": example.question}] if isinstance(example.question, str) else example.question
    )
    assert all(squeezed(m["content"]) in text for m in question if m["role"] in ("user", "system", "developer"))


def squeezed(text: str) -> str:
    return "".join(text.split())


# -- templates

PIECES = [
    "{{ m.content }}",
    "{{ m['content'] | trim }}",
    "{{ m.content | upper }}",
    "{{ m.content.split('</think>')[-1] }}",
    "{% for p in m.content %}{{ p.text }}{% endfor %}",
    "{{ m.content | tojson }}",
    "{{ m.tool_calls | tojson if m.tool_calls }}",
    "{{ m.reasoning_content }}",
    "{{ m.role }}",
    "<|im_start|>",
    "<|im_end|>",
    "\n",
    " ",
    "<think>\n\n</think>\n\n",
    "{{ raise_exception('no ' + m.role) if m.role == 'system' }}",
    "{{ 1 / (loop.index - 2) }}",
    "{{ m.nothing.nothing }}",
    "{{ m + 1 }}",
    "{{ '\\ud83d' if loop.index > 2 }}",
    "{{ '%c' % 55357 }}",
    "{% if loop.last %}<think>x</think>{% endif %}",
    "{{ messages | length }}",
    "{{ strftime_now('%Y') }}",
]
OUTER = [
    "{{ bos_token }}",
    "{{ eos_token }}",
    "{{ tools }}",
    "{{ messages[0].content }}",
    "{{ 1 / 0 }}",
    "{% if %}",
    "x",
    "\n",
]
ASKING = ["<|im_start|>assistant\n", "<think>\n", "A: ", "", "{{ 1 / (messages | length - 1) }}", "[THINK]"]


@st.composite
def templates(draw: st.DrawFn) -> str:
    inner = "".join(draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6)))
    inner = draw(st.sampled_from(["{{ m.role }}: {{ m.content }}<|im_end|>\n", "{{ m.content }}", ""])) + inner
    before, after = ("".join(draw(st.lists(st.sampled_from(OUTER), max_size=1))) for _ in range(2))
    ask = draw(st.sampled_from(ASKING))
    turns = f"{before}{{% for m in messages %}}{inner}{{% endfor %}}{after}"
    return f"{turns}{{% if add_generation_prompt %}}{ask}{{% endif %}}"


plain = st.lists(st.sampled_from([m for m in MARKS if m.isprintable() or m == "\n"]), max_size=3).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    turns = [{"role": "system", "content": draw(plain)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(plain)}, {"role": "assistant", "content": draw(plain)}]
    return Example("x", messages=tuple(read_conversation(turns)), last_turn=draw(st.booleans()))


@fuzz
@given(templates(), st.lists(conversations(), min_size=1, max_size=3), st.none() | plain)
def test_templates(template: str, examples: list[Example], system: str | None) -> None:
    formatter = Formatter(TOKENIZER, PromptFormat(chat_template=template, system_prompt=system))
    assert TOKENIZER.eos_token_id in formatter.end_ids
    for example in examples:
        learnt_as_asked(formatter, example)
    try:
        kept = usable(examples, [formatter], skip_bad=True)
    except CollmError as error:
        one_line(error)
        kept = []
    for example in kept:
        formatter.encode(example)


def learnt_as_asked(formatter: Formatter, example: Example) -> None:
    """What is learnt stands behind what is asked, and ends, or one line says why not."""
    assert example.messages is not None
    try:
        encoded, completions = formatter.encode(example), formatter.completions(example)
    except CollmError as error:
        one_line(error)
        assert str(error).startswith("example 'x'")
        return
    prompt = formatter.prompt(list(example.messages[:-1]))
    assert encoded.token_ids[: len(prompt)] == prompt
    assert encoded.token_ids[-len(completions[-1]) :] == completions[-1]
    assert not formatter.end_ids & set(completions[-1][:-1])


# -- tokenizers

WORDS = ["user", "assistant", "<|im_start|>", "<|im_end|>", "\n", " ", "a", "b2", "é", "世", "1", ":"]


@st.composite
def tokenizers(draw: st.DrawFn) -> PreTrainedTokenizerFast:
    kind = draw(st.sampled_from(["bytes", "fallback", "words"]))
    marks = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    if kind == "bytes":
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE({s: i for i, s in enumerate([*marks, *symbols])}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=draw(st.booleans()))
        inner.decoder = decoders.ByteLevel()
    elif kind == "fallback":
        symbols = [f"<0x{b:02X}>" for b in range(256)] + ["▁", "a", "▁a"]
        merges = [("▁", "a")]
        vocab = {s: i for i, s in enumerate([*marks, *symbols])}
        inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
        scheme = draw(st.sampled_from(["first", "always", "never"]))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=draw(st.booleans()))
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        words = [*marks, "▁", "▁a", "a", "b2", "1"]
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = decoders.Metaspace()
    normal = draw(st.sampled_from([None, normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]))
    if normal is not None:
        inner.normalizer = normal
    if draw(st.booleans()):
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=draw(st.sampled_from([None, "<s>"])),
        eos_token=draw(st.sampled_from(["</s>", "<|im_end|>"])),
        unk_token="<unk>",
    )
    side: dict[str, Any] = {
        "lstrip": draw(st.booleans()),
        "rstrip": draw(st.booleans()),
        "normalized": draw(st.booleans()),
    }
    fast.add_special_tokens(
        {"additional_special_tokens": [AddedToken(m, **side) for m in ("<|im_start|>", "<|im_end|>")]}
    )
    return fast


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@fuzz
@given(tokenizers(), st.sampled_from([CHATML, QWEN, R1]), st.lists(conversations(), min_size=1, max_size=2), plain)
def test_tokenizers(tokenizer: PreTrainedTokenizerFast, template: str, examples: list[Example], text: str) -> None:
    formatter = Formatter(tokenizer, PromptFormat(chat_template=template))
    for example in examples:
        learnt_as_asked(formatter, example)
    row = Example("x", prompt=text, completion=text)
    try:
        encoded = formatter.encode(row)
    except CollmError as error:
        one_line(error)
    else:
        prompt = formatter.prompt(text)
        assert encoded.token_ids[: len(prompt)] == prompt and encoded.labelled[len(prompt)]
