"""Checkpoints find their base and assistants from any folder, moved together or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer

from collm.errors import CollmError
from collm.llm import CollaborativeLM
from collm.llm.checking import outline
from collm.models.checkpoint import save_checkpoint
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CheckpointInfo, load_info
from collm.models.specs import adapter_config, place_of, seen_from


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`project/models/{base,helper}` and a gate, `project/runs/pair`, made in `project` with relative paths."""
    root = tmp_path / "project"
    tokenizer = make_tokenizer()
    for seed, name in enumerate(("base", "helper")):
        make_model(seed=seed, vocab_size=len(tokenizer)).save_pretrained(root / "models" / name)
        tokenizer.save_pretrained(root / "models" / name)
    monkeypatch.chdir(root)
    head = DeferralHead(32, 1)
    torch.nn.init.normal_(head.weight)
    info = CheckpointInfo(
        kind="gate", base_model="models/base", assistants=[AssistantInfo(name="helper", spec="models/helper")]
    )
    save_checkpoint(Path("runs/pair"), info, make_model(), head, None)
    return root


def text(path: Path | str) -> str:
    return CollaborativeLM.from_pretrained(path).generate("3 + 10 = ").text


def test_a_pair_is_loaded_from_any_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = text("runs/pair")
    assert outline("runs/pair").info.assistants[0].spec == "models/helper"  # as it was written, where that leads there
    monkeypatch.chdir(project / "runs")
    assert text("pair") == here
    monkeypatch.chdir(project.parent)
    assert text("project/runs/pair") == here
    assert outline("project/runs/pair").base == "project/models/base"


def test_moved_together_they_are_found_and_the_pair_alone_says_what_it_misses(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = text("runs/pair")
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "elsewhere")
    assert text("elsewhere/runs/pair") == here
    shutil.move("elsewhere/runs/pair", "pair")
    with pytest.raises(CollmError, match="'helper' is missing; .*helper=SPEC"):
        outline("pair", base="elsewhere/models/base")


def test_another_folder_of_the_same_name_is_not_taken_for_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "other" / "models" / "helper").mkdir(parents=True)
    monkeypatch.chdir(project / "other")
    assert Path(outline("../runs/pair").info.assistants[0].spec) == project / "models" / "helper"


def test_a_copy_knows_where_they_lie_and_no_file_names_this_machine(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = text("runs/pair")
    CollaborativeLM.from_pretrained("runs/pair").save_pretrained(tmp_path / "copies" / "a" / "pair")
    monkeypatch.chdir(tmp_path)
    assert text("copies/a/pair") == here
    for folder in (project / "runs" / "pair", tmp_path / "copies" / "a" / "pair"):
        assert str(tmp_path) not in (folder / "collm.json").read_text()


def test_an_adapter_that_is_an_assistant_finds_its_base(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = project / "runs" / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/base"}))
    (folder / "collm.json").write_text(
        CheckpointInfo(kind="lora", base_model="models/base", base_place="../../models/base").model_dump_json()
    )
    for here in (project, project.parent):
        monkeypatch.chdir(here)
        config = adapter_config(str(folder))
        assert config is not None and Path(config["base_model_name_or_path"]).resolve() == project / "models" / "base"


def test_places_are_those_of_files_and_folders_alone(project: Path) -> None:
    assert place_of("models/base?dtype=bfloat16", "runs/pair") == "../../models/base"
    assert [place_of(spec, "runs") for spec in ("calculator", "owner/name", "pkg:json/x.gguf", None)] == [None] * 4
    assert seen_from("runs/pair", "../../models/base", "gone?quantization=nf4") == "models/base?quantization=nf4"
    info = load_info("runs/pair")
    assert info is not None and info.base_place == "../../models/base"
    assert info.assistants[0].place == "../../models/helper" and info.base_model == "models/base"
