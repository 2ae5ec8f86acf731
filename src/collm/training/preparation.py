"""Before training: tokenizers checked, data encoded and scored, the gate initialised."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collm.data.chunks import Reader, chunking_of, usable_in_chunks
from collm.data.encoding import usable
from collm.data.examples import Example
from collm.data.scores import load_info as load_scores_info
from collm.files import write_text
from collm.identity.finding import local_identity
from collm.models.backbone import check_project
from collm.models.devices import best_device, output_device
from collm.models.head import DeferralHead
from collm.models.info import CheckpointInfo
from collm.models.loading import load_model, weights_fingerprint
from collm.models.pairing import tell_chunking
from collm.models.specs import portable
from collm.models.tokenizers import tokenizer_fingerprint
from collm.training import initialisation
from collm.training.dataset import ScoredSet, assemble, joined, load_split
from collm.training.hidden import all_hidden, collect_hidden, sample
from collm.training.lora import check_targets
from collm.training.made_from import confirm, first_day
from collm.training.own_texts import OwnTexts, own_texts
from collm.training.recipe import AFTER_TRAINING, Recipe
from collm.training.writers import SPLITS, assistant_info, make_writer, readers_of, scores_of
from collm.types import Unit

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Prepared:
    """What both ways of training start from."""

    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: ScoredSet
    validation: ScoredSet
    head: DeferralHead | None
    hidden_scale: float
    info: CheckpointInfo
    chunks: Reader | None = None
    """How the base reads examples, where the models share chunks."""


def prepare(recipe: Recipe, state: PartialState, progress: bool) -> Prepared:
    one_file = recipe.data.validation is None
    told: dict[str, Any] = {
        "one_file": one_file,
        "own_texts": recipe.own_texts is not None,
        "day": first_day(recipe.out),
    }
    base = make_writer("base", recipe.base, None, **told)
    assistants = [make_writer(section.name, section, base, **told) for section in recipe.assistants]
    shown = [base.open_formatter, *(w.formatter for w in assistants if w.formatter is not None and w.tool is None)]
    readers = readers_of([base, *assistants])

    def fitting(examples: Sequence[Example], skip_bad: bool) -> list[Example]:
        if readers is None:
            return usable(examples, shown, skip_bad=skip_bad)
        return usable_in_chunks(examples, readers, skip_bad=skip_bad)

    loaded = dict(zip(SPLITS, load_split(recipe.data), strict=True))
    splits = {split: fitting(examples, recipe.data.skip_bad) for split, examples in loaded.items()}
    own = _own_texts(recipe, splits["train"], loaded["validation"], partial(fitting, skip_bad=True), state, progress)
    if own is not None:
        splits["own"] = loaded["own"] = own.examples
        if not own.told["gold"]:
            del splits["train"]
    learnt = [split for split in splits if split != "validation"]
    model = load_model(recipe.base.model, dtype=recipe.base.dtype, device=best_device())
    check_project(model)
    if recipe.tune == "lora":
        check_targets(recipe.lora, model)  # before hours of scoring
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    max_length = min(recipe.data.max_length, context or recipe.data.max_length)
    formatter = base.open_formatter
    # With no assistants nothing is scored: plain fine-tuning needs no scores.
    writers = [base, *assistants] if assistants else []
    reading: Sequence[Reader | None] = readers or [None] * len(writers)
    # One process scores and fits; the others are told where, open no assistant, and find the gate done.
    scores: list[dict[str, Path]] = []
    with state.main_process_first():
        if state.is_main_process:
            scores = [
                scores_of(
                    writer,
                    splits,
                    formatter,
                    max_length,
                    recipe.cache_folder,
                    model if writer is base else None,
                    progress=progress,
                    chunks=reader,
                )
                for writer, reader in zip(writers, reading, strict=True)
            ]
    if state.num_processes > 1:
        [scores] = broadcast_object_list([scores])
    with state.main_process_first():
        fingerprints = {
            writer.name: {split: load_scores_info(path)["fingerprint"] for split, path in paths.items()}
            for writer, paths in zip(writers, scores, strict=True)
        }
        confirm(recipe, loaded, local_identity(model), formatter, fingerprints, write=state.is_main_process)

        def assembled(split: str) -> ScoredSet:
            paths = [paths[split] for paths in scores]
            return assemble(splits[split], formatter, max_length, paths, None if readers is None else readers[0])

        sets = {"train": joined([assembled(split) for split in learnt]), "validation": assembled("validation")}
        unit: Unit = "token" if readers is None else "chunk"
        if readers is not None and state.is_main_process:
            tell_chunking(chunking_of(sets["train"].items), [writer.name for writer in writers], "the training text")
        head, scale, figures = _initial_head(recipe, model, sets["train"], sets["validation"], unit, progress)
    info = CheckpointInfo(
        kind=recipe.tune,
        base_model=portable(recipe.base.model),
        base_fingerprint=weights_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(formatter.tokenizer),
        base_format=formatter.format.to_dict(),
        assistants=[
            assistant_info(writer, paths[learnt[0]]) for writer, paths in zip(assistants, scores[1:], strict=True)
        ],
        cuts=None if readers is None else readers[0].cuts.fingerprint,
        training={
            "recipe": recipe.model_dump(mode="json", exclude={"out", "cache", *AFTER_TRAINING}),
            "initialisation": figures,
            **({} if own is None else {"own_texts": own.told}),
        },
    )
    return Prepared(
        recipe,
        model,
        formatter.tokenizer,
        sets["train"],
        sets["validation"],
        head,
        scale,
        info,
        None if readers is None else readers[0],
    )


def _own_texts(
    recipe: Recipe,
    train: Sequence[Example],
    held_out: Sequence[Example],
    fitting: Callable[[list[Example]], list[Example]],
    state: PartialState,
    progress: bool,
) -> OwnTexts | None:
    """Written before the base is loaded to be trained; one process writes."""
    if recipe.own_texts is None:
        return None
    found: list[OwnTexts | None] = [None]
    with state.main_process_first():
        if state.is_main_process:
            found = [own_texts(recipe, train, held_out, fitting, progress=progress)]
    if state.num_processes > 1:
        found = broadcast_object_list(found)
    return found[0]


def _initial_head(
    recipe: Recipe, model: PreTrainedModel, train: ScoredSet, validation: ScoredSet, unit: Unit, progress: bool
) -> tuple[DeferralHead | None, float, dict[str, Any]]:
    """The gate fitted to pseudo-labels, the scale of the hidden states, and how it fares on held-out tokens.

    Kept in `out/init`, so that a resumed run and other processes use the very same one.
    """
    num_assistants = len(recipe.assistants)
    if num_assistants == 0:
        return None, 1.0, {}
    folder = recipe.out / "init"
    device = output_device(model)
    if (folder / "figures.json").is_file():
        figures = json.loads((folder / "figures.json").read_text())
        return DeferralHead.load(folder).to(device), figures["hidden_scale"], figures

    def hidden_of(scored: ScoredSet, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        if recipe.tune == "gate":  # all of them will be wanted
            hidden = all_hidden(model, scored, recipe.cache_folder, split, progress=progress)
            return sample(hidden, recipe.training.seed)
        return collect_hidden(model, scored, limit=recipe.init.max_tokens, seed=recipe.training.seed, progress=progress)

    hidden, indices = hidden_of(train, "train")
    scale = initialisation.Standardiser.of(hidden).scale
    figures = {"method": recipe.init.method, "tokens": len(indices), "hidden_scale": scale}
    if recipe.init.method == "none":
        head = DeferralHead(hidden.shape[-1], num_assistants)
    else:
        labels = train.pseudo_labels(recipe.init.method)[indices]
        head = initialisation.fit(hidden, labels, num_assistants)
        held_out, where = hidden_of(validation, "validation")
        report = initialisation.report(
            head, held_out, validation.pseudo_labels(recipe.init.method)[where], validation.top1[where], labels
        )
        figures |= dataclasses.asdict(report)
        logger.info(
            "initial gate: pseudo-labels to defer %.1f %% of %ss; held out: precision %.2f, recall %.2f, "
            "the assistant right on %.0f %% of what it would be asked for",
            100 * sum(report.label_share[1:]),
            unit,
            report.precision,
            report.recall,
            100 * report.assistant_right,
        )
        doubt = initialisation.doubts(report)
        if doubt is not None:
            logger.warning("%s", doubt)
    head.save(folder)
    write_text(folder / "figures.json", json.dumps(figures, indent=2))
    return head.to(device), scale, figures
