"""Before training: tokenizers checked, data encoded and scored, the gate initialised."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from collm.data.formatting import Formatter, PromptFormat
from collm.files import write_text
from collm.models.backbone import check_project
from collm.models.checkpoint import AssistantInfo, CheckpointInfo
from collm.models.head import DeferralHead
from collm.models.loading import is_tool, load_model, load_tokenizer, weights_fingerprint
from collm.models.tokenizers import require_same_tokenizer, tokenizer_fingerprint
from collm.models.tools import make_tool
from collm.training import initialisation
from collm.training.dataset import ScoredSet, Writer, best_device, load_split, scored_sets
from collm.training.hidden import all_hidden, collect_hidden
from collm.training.recipe import ModelSection, Recipe

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Prepared:
    """What both ways of training start from."""

    recipe: Recipe
    model: PreTrainedModel
    base: Writer
    train: ScoredSet
    validation: ScoredSet
    head: DeferralHead | None
    hidden_scale: float
    info: CheckpointInfo


def _writer(name: str, section: ModelSection, base: Writer | None) -> Writer:
    """One model's tokenizer and format; an assistant's must fit the base's."""
    format = PromptFormat(**section.format.model_dump())
    if base is not None and is_tool(section.model):
        # A tool reads the base's text as it is.
        tool = make_tool(section.model, base.formatter.tokenizer)
        return Writer(name, section.model, section.dtype, base.formatter, tool, section.scores)
    tokenizer = load_tokenizer(section.model)
    if base is not None:
        require_same_tokenizer(base.formatter.tokenizer, tokenizer, ("the base", f"assistant {name!r}"))
    return Writer(name, section.model, section.dtype, Formatter(tokenizer, format), None, section.scores)


def prepare(recipe: Recipe, state: PartialState, progress: bool) -> Prepared:
    base = _writer("base", recipe.base, None)
    assistants = [_writer(section.name, section, base) for section in recipe.assistants]
    train_examples, validation_examples = load_split(recipe.data)
    model = load_model(recipe.base.model, dtype=recipe.base.dtype, device=best_device())
    check_project(model)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    max_length = min(recipe.data.max_length, context or recipe.data.max_length)
    # One process scores and fits; the others then find it done.
    with state.main_process_first():
        sets = scored_sets(
            {"train": train_examples, "validation": validation_examples},
            base,
            assistants,
            max_length,
            recipe.cache_folder,
            base_model=model,
            one_file=recipe.data.validation is None,
            progress=progress and state.is_main_process,
        )
        head, scale, figures = _initial_head(recipe, model, sets["train"], sets["validation"], progress)
    info = CheckpointInfo(
        kind=recipe.tune,
        base_model=recipe.base.model,
        base_fingerprint=weights_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(base.formatter.tokenizer),
        base_format=recipe.base.format.model_dump(exclude_none=True),
        assistants=[
            AssistantInfo(
                name=writer.name,
                spec=writer.spec,
                tokenizer_fingerprint=None if writer.tool else tokenizer_fingerprint(writer.formatter.tokenizer),
                format=section.format.model_dump(exclude_none=True),
            )
            for writer, section in zip(assistants, recipe.assistants, strict=True)
        ],
        training={"recipe": recipe.model_dump(mode="json", exclude={"out", "cache"}), "initialisation": figures},
    )
    return Prepared(recipe, model, base, sets["train"], sets["validation"], head, scale, info)


def _initial_head(
    recipe: Recipe, model: PreTrainedModel, train: ScoredSet, validation: ScoredSet, progress: bool
) -> tuple[DeferralHead | None, float, dict[str, Any]]:
    """The gate fitted to pseudo-labels, the scale of the hidden states, and how it fares on held-out tokens.

    Kept in `out/init`, so that a resumed run and other processes use the very same one.
    """
    num_assistants = len(recipe.assistants)
    if num_assistants == 0:
        return None, 1.0, {}
    folder = recipe.out / "init"
    device = next(model.parameters()).device
    if (folder / "figures.json").is_file():
        figures = json.loads((folder / "figures.json").read_text())
        return DeferralHead.load(folder).to(device), figures["hidden_scale"], figures

    def hidden_of(scored: ScoredSet, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        if recipe.tune == "gate":  # all of them will be wanted
            return all_hidden(model, scored, recipe.cache_folder, split, progress=progress), torch.arange(scored.count)
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
            "initial gate: pseudo-labels to defer %.1f %% of tokens; held out: precision %.2f, recall %.2f, "
            "the assistant right on %.0f %% of what it would be handed",
            100 * sum(report.label_share[1:]),
            report.precision,
            report.recall,
            100 * report.assistant_right,
        )
        if not bool((labels > 0).any()):
            logger.warning("no token is labelled to be deferred: no assistant is right where the base is wrong")
    head.save(folder)
    write_text(folder / "figures.json", json.dumps(figures, indent=2))
    return head.to(device), scale, figures
