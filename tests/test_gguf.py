"""GGUF files: converted once and kept, bit for bit; split as they say; damaged ones refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from click.testing import CliRunner
from conftest import CHAT_TEMPLATE, make_model, make_tokenizer
from gguf_files import write_gguf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.ggml import _gguf_parse_value

from collm.cli import main
from collm.errors import CollmError
from collm.models.gguf import cache, conversion
from collm.models.gguf.fields import Fields
from collm.models.gguf.header import read_header
from collm.models.gguf.splitting import SPLITS, split_as
from collm.models.loading import load_context_length, load_model, load_tokenizer
from collm.models.tokenizers import PROBES

TEXTS = (*PROBES, "x =    5", "if a:\n    12 apples\n\t 7", "2024-01-31, 12:45", "don't  1 000 000", "½ ² Ⅳ १२")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """As SmolLM2's: digits stand alone; its merges know indented numbers."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = own("smollm")
    learnt.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    learnt.train_from_iterator([*TEXTS, "if a:\n    1\n        22\n    return  3"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=learnt, bos_token=special[0], eos_token=special[2], pad_token=special[0]
    )
    fast.add_special_tokens({"additional_special_tokens": [special[1]]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="module")
def file(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(vocab_size=300, tie_word_embeddings=True)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("COLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def dequantised(file: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    return model


def same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_what_transformers_dequantises(file: Path, fresh: Path, dtype: str) -> None:
    wanted = dequantised(file, getattr(torch, dtype))
    for _ in range(2):
        model = load_model(str(file), dtype=dtype)
        assert same(model, wanted)
        assert model.config._name_or_path == str(file)
        assert model.generation_config is not None and wanted.generation_config is not None
        assert model.generation_config.eos_token_id == wanted.generation_config.eos_token_id == 2
    assert load_context_length(str(file)) == 256
    assert sorted(path.name for path in next((fresh / "gguf").glob("[!h]*")).glob("[!.]*")) == sorted([dtype, "text"])


def test_a_second_start_reads_no_gguf(file: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = load_model(str(file))
    ids = load_tokenizer(str(file))(list(TEXTS)).input_ids

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the file was read again")

    monkeypatch.setattr(conversion, "_reading", read)
    assert same(load_model(str(file)), wanted)
    assert load_tokenizer(str(file))(list(TEXTS)).input_ids == ids
    assert load_context_length(str(file)) == 256
    # Weights that are there in full serve other dtypes, too; and a copy of the file is the same file.
    copy = Path(shutil.copy(file, file.with_name("copy.gguf")))
    assert same(load_model(str(copy), dtype="bfloat16"), wanted.bfloat16())
    # Another file of the same name is not.
    write_gguf(copy, make_model(seed=1), make_tokenizer())
    with pytest.raises(AssertionError, match="read again"):
        load_model(str(copy))


def test_another_file_of_the_same_size_and_time_is_another(
    tokenizer: PreTrainedTokenizerFast, fresh: Path, tmp_path: Path
) -> None:
    """`cp -p`, rsync and tar keep times; the old file's weights were loaded."""
    one, two = (
        write_gguf(tmp_path / f"{seed}.gguf", make_model(vocab_size=300, seed=seed), tokenizer) for seed in (1, 2)
    )
    assert one.stat().st_size == two.stat().st_size
    os.utime(two, ns=(0, 10**18))
    os.utime(one, ns=(0, 10**18))
    load_model(str(one))
    shutil.copy2(two, one)
    assert same(load_model(str(one)), load_model(str(two)))


def test_metadata_are_read_at_one_blow(file: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gguf's reader makes some thirty calls for each entry of each array: minutes for Gemma's vocabulary of 262,144."""
    theirs = gguf.GGUFReader(file)
    calls = Counter[str]()
    sys.setprofile(lambda _frame, event, _: calls.update([event]))
    ours = Fields(file)
    sys.setprofile(None)

    def values(field: Any) -> list[Any]:
        return [_gguf_parse_value(field.parts[place], field.types) for place in field.data]

    assert {name: values(field) for name, field in ours.fields.items()} == {
        name: values(field) for name, field in theirs.fields.items() if not name.startswith("GGUF.")
    }
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    entries = sum(len(field.data) for field in ours.fields.values())
    assert entries > 600 and calls["call"] + calls["c_call"] < 4 * entries + 2_000

    monkeypatch.setattr(gguf, "GGUFReader", None)  # where no weights are read, it is not made
    assert len(load_tokenizer(str(file))) == 300
    assert load_context_length(str(file)) == 256


def test_what_was_damaged_or_made_otherwise_is_made_anew(
    file: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = dequantised(file, torch.float32)
    load_model(str(file))
    [weights] = fresh.rglob("model.safetensors")
    os.truncate(weights, 1000)
    assert same(load_model(str(file)), wanted)
    made = weights.stat().st_mtime_ns
    monkeypatch.setattr(cache, "_makers", lambda: {"transformers": "99"})
    assert same(load_model(str(file)), wanted)
    assert weights.stat().st_mtime_ns != made
    assert not list(fresh.rglob(".making-*"))


def test_two_at_once_convert_once(file: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real: Callable[..., PreTrainedModel] = conversion._dequantised

    def counted(*args: Any) -> PreTrainedModel:
        calls.append("")
        return real(*args)

    monkeypatch.setattr(conversion, "_dequantised", counted)
    threads = [threading.Thread(target=load_model, args=(str(file),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


@pytest.mark.parametrize("reason", ["no folder", "no room"])
def test_without_a_cache_the_file_is_read_and_that_is_told(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    monkeypatch.setenv("COLLM_CACHE", str(tmp_path / "cache"))
    if reason == "no folder":
        (tmp_path / "cache").write_text("a file")
    else:
        monkeypatch.setattr(cache, "SPARE", 2**80)
    assert same(load_model(str(file)), dequantised(file, torch.float32))
    assert load_tokenizer(str(file))("12").input_ids
    assert "cannot be kept for later starts" in caplog.text and "COLLM_CACHE" in caplog.text


def test_nothing_of_the_libraries_reaches_the_terminal(file: Path, tmp_path: Path) -> None:
    loads = "load_tokenizer(file), load_model(file), load_model(file)"
    code = f"from collm.models.loading import load_model, load_tokenizer; file = {str(file)!r}; {loads}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# How it splits


def own(kind: str) -> pre_tokenizers.PreTokenizer:
    """The pretokenizers of published models, as their tokenizer.json have them."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in ("gpt-2", "phi-2", "olmo", "mpt"):
        return byte_level
    if kind in ("smollm", "starcoder", "command-r", "refact"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    patterns = [GGUF_PRE_TOKENIZER_SPLITS[kind]] if kind in GGUF_PRE_TOKENIZER_SPLITS else OWN[kind]
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(one), "isolated") for one in patterns), last])


OWN = {
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ),
    "stablelm2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    ),
}
KINDS = (
    *("gpt-2", "phi-2", "olmo", "mpt", "smollm", "starcoder", "command-r", "refact", "deepseek-v3", "stablelm2"),
    *("llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "llama4", "deepseek-r1-qwen", "falcon3", "dbrx"),
)


def cuts(pre_tokenizer: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_splits_as_the_published_tokenizer_does(kind: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    assert split_as(tokenizer, kind)
    for text in TEXTS:
        assert cuts(tokenizer.pre_tokenizer, text) == cuts(own(kind), text)


@given(st.text(alphabet=st.sampled_from("a Z1²5\n\t\r'.s!é你0 ,"), max_size=30))
def test_the_ways_differ_only_where_they_should(text: str) -> None:
    """Every way cuts and none loses anything; SmolLM2's digits stand alone, Llama 3's in threes at most."""
    for kind in SPLITS:
        tokenizer = Tokenizer(models.BPE())
        split_as(tokenizer, kind)
        spans = [span for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert "".join(text[begin:end] for begin, end in spans) == text
        pieces = [text[begin:end] for begin, end in spans]
        if kind in ("smollm", "qwen2"):
            assert all(len(piece) == 1 for piece in pieces if any(map(str.isdigit, piece)))
        if kind == "llama-bpe":
            assert all(len(piece) <= 3 for piece in pieces if piece.isdigit())


def test_ids_are_those_of_the_models_own_tokenizer(
    file: Path, tokenizer: PreTrainedTokenizerFast, fresh: Path, tmp_path: Path
) -> None:
    texts = [*TEXTS, tokenizer.apply_chat_template([{"role": "user", "content": "a  1"}], tokenize=False)]
    wanted = tokenizer(texts).input_ids
    for _ in range(2):
        assert load_tokenizer(str(file))(texts).input_ids == wanted
    # transformers' own reading of the same file has others.
    assert AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(texts).input_ids != wanted
    loaded = load_tokenizer(str(file))
    assert loaded.chat_template == tokenizer.chat_template and loaded.eos_token_id == tokenizer.eos_token_id


def test_llama3_takes_words_of_the_vocabulary_whole_and_begins_with_bos(
    tokenizer: PreTrainedTokenizerFast, fresh: Path, tmp_path: Path
) -> None:
    said = write_gguf(tmp_path / "said.gguf", make_model(vocab_size=300), tokenizer, pre="llama-bpe")
    for _ in range(2):
        loaded = load_tokenizer(str(said))
        assert loaded("12").input_ids[0] == tokenizer.bos_token_id
        assert json.loads(loaded.backend_tokenizer.to_str())["model"]["ignore_merges"] is True


@pytest.mark.parametrize(("pre", "says"), [("new-one", "splits text as 'new-one' does"), (None, "does not say how")])
def test_an_unknown_way_is_told_each_time(
    tokenizer: PreTrainedTokenizerFast, fresh: Path, tmp_path: Path, pre: str | None, says: str
) -> None:
    odd = write_gguf(tmp_path / "odd.gguf", make_model(vocab_size=300), tokenizer, pre=pre)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"odd.gguf: its tokenizer {says}"):
            load_tokenizer(str(odd))


def test_a_known_way_is_no_reason_to_warn(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_tokenizer(str(file))


# What is no whole file


@given(st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_refused_wherever_it_ends(file: Path, share: float) -> None:
    whole = file.read_bytes()
    cut = file.with_name("cut.gguf")
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CollmError, match=r"cut\.gguf (is cut off|is no GGUF file)"):
        read_header(cut)


@given(st.integers(4, 3000), st.integers(0, 255))
def test_a_damaged_head_is_refused_or_read_but_nothing_else(file: Path, at: int, value: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] = value
    bad = file.with_name("bad.gguf")
    bad.write_bytes(data)
    try:
        read_header(bad)
    except CollmError as error:
        assert "bad.gguf" in str(error) and "\n" not in str(error)


def test_other_things_are_told_apart(file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "lfs.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "empty.gguf").write_text("")
    part = write_gguf(tmp_path / "part.gguf", make_model(vocab_size=300), tokenizer, split__count=3)
    for name, says in {
        "lfs": "Git LFS pointer.*git lfs pull",
        "text": "no GGUF file",
        "empty": "no GGUF file",
        "absent": "no such GGUF file",
        part.stem: "one part of 3; join them",
    }.items():
        for load in (load_model, load_tokenizer, load_context_length):
            with pytest.raises(CollmError, match=says):
                load(str(tmp_path / f"{name}.gguf"))


def test_an_architecture_that_transformers_cannot_read_is_told(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, fresh: Path
) -> None:
    odd = write_gguf(tmp_path / "odd.gguf", make_model(vocab_size=300), tokenizer)
    odd.write_bytes(odd.read_bytes().replace(b"llama", b"lxmma"))
    with pytest.raises(CollmError, match=r"odd\.gguf: transformers cannot read it: .*lxmma"):
        load_model(str(odd))


# The command


def test_convert_writes_a_folder_for_everyone(file: Path, fresh: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["convert", str(file), str(out)])
    assert done.exit_code == 0, done.output
    assert same(AutoModelForCausalLM.from_pretrained(out), dequantised(file, torch.float32))
    assert AutoTokenizer.from_pretrained(out)(list(TEXTS)).input_ids == load_tokenizer(str(file))(list(TEXTS)).input_ids
    again = CliRunner().invoke(main, ["convert", str(file), str(out)])
    assert again.exit_code == 1 and "is not empty" in again.stderr
    half = CliRunner().invoke(main, ["convert", str(file), str(tmp_path / "half"), "--dtype", "bfloat16"])
    assert half.exit_code == 0 and AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_convert_without_a_folder_fills_the_cache(file: Path, fresh: Path) -> None:
    done = CliRunner().invoke(main, ["convert", str(file)])
    assert done.exit_code == 0 and str(fresh) in done.stdout
    assert Path(done.stdout.split(" is in ")[1].strip()).joinpath("model.safetensors").is_file()
    other = CliRunner().invoke(main, ["convert", str(fresh)])
    assert other.exit_code == 1 and "no .gguf file" in other.stderr
