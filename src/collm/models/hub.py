"""Sharing checkpoints: the model card, a copy without the leftovers of training, the upload."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import ModelCard, ModelCardData

from collm.errors import CollmError
from collm.files import refuse_full, write_text
from collm.models.info import CheckpointInfo, load_info, moved, save_info
from collm.models.specs import split_spec
from collm.sampling_params import Signal

CARD = "README.md"
LEFTOVERS = (
    *("cache", "checkpoints", "init", "calibration", "run.json", "log.jsonl", ".lock"),
    "tensorboard",
    "own_texts.jsonl",
    *("evaluation", "base_alone", "report.html"),
)
"""What lies in a run's folder besides the checkpoint."""
CHECKPOINT = (
    *("collm.json", "gate.safetensors", "adapter_config.json", "adapter_model.safetensors"),
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", CARD),
    # Where `collm calibrate` puts them: those of an old gate would pass for the new one's.
    *("curve.*" if signal == "gate" else f"{signal}/curve.*" for signal in get_args(Signal)),
)
"""Files of a checkpoint, of any kind, as patterns: what one kind leaves would be loaded with another."""


def model_card(info: CheckpointInfo) -> str:
    """The checkpoint's README: front matter for the hub, what it is, how to use it, its figures."""
    recipe: dict[str, Any] = info.training.get("recipe", {})
    weights = {a.name: f" (weights {a.weights_fingerprint})" if a.weights_fingerprint else "" for a in info.assistants}
    names = ", ".join(name + of for name, of in weights.items()) or "none"
    lines = ["# A base that writes together with assistants", ""]
    lines += [
        "Trained with collm by maximising the marginal likelihood over who writes each token (Shen et al., ACL 2024, "
        "arXiv 2403.03870): the base writes itself or defers to an assistant.",
        "",
        "| | |",
        "|---|---|",
        f"| base | `{info.base_model}` (weights {info.base_fingerprint}) |",
        f"| assistants | {names} |",
        f"| trained | {info.kind}, objective {recipe.get('objective', 'unknown')} |",
    ]
    own: dict[str, Any] = info.training.get("own_texts", {})
    if own:
        lines.append(
            f"| texts of its own | {own['learnt']}, by {own['writer']}, accepted by {own['task']}; "
            f"{'beside' if own['gold'] else 'instead of'} the gold ones |"
        )
    if info.kind != "full":
        lines += ["", "It holds no base weights: give the base with `base=` or `--base` if it lies elsewhere."]
    given = "".join(f" --assistant {a.name}={a.spec}" for a in info.assistants)
    lines += ["", "## Use", "", "```", f'collm generate PATH{given} "your question"', "```"]
    figures: dict[str, Any] = info.training.get("figures", {})
    last = figures.get("after", figures)
    if last:
        lines += ["", "## Held-out figures, per token", "", "| figure | value |", "|---|---|"]
        lines += [f"| {k.removeprefix('eval_')} | {v:.4f} |" for k, v in last.items() if isinstance(v, float)]
    for table in info.calibration:
        by = "" if table.signal == "gate" else f" by {table.signal.replace('_', ' ')}"
        title = f"Calibration: {table.task}{by} ({table.num_prompts} prompts, seed {table.seed})"
        lines += ["", f"## {title}", "", f"| target rate | achieved rate | {table.metric} |", "|---|---|---|"]
        lines += [f"| {r.wanted} | {r.achieved_rate:.3f} | {r.metric_value:.3f} |" for r in table.rows]
    return str(ModelCard(f"---\n{_card_data(info).to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def _card_data(info: CheckpointInfo) -> ModelCardData:
    """The front matter that the hub reads."""
    name, _ = split_spec(info.base_model or "")
    on_the_hub = name.count("/") == 1 and ":" not in name and not Path(name).exists()
    return ModelCardData(
        base_model=name if on_the_hub else None,
        library_name="collm",
        pipeline_tag="text-generation",
        tags=["collm", "collaborative-decoding"],
    )


def write_card(folder: str | Path) -> None:
    """Write or renew a checkpoint's card, after training and after each calibration."""
    info = load_info(folder)
    assert info is not None
    write_text(Path(folder) / CARD, model_card(info))


def copy_checkpoint(source: str | Path, target: str | Path) -> None:
    """Copy a checkpoint without what only training needed.

    Raises:
        CollmError: the source is no checkpoint, the target is not empty, or the disk is full.
    """
    info = load_info(source)
    if info is None:
        raise CollmError(f"{source} is not a collm checkpoint; it has no collm.json")
    refuse_full(Path(target))
    try:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFTOVERS), dirs_exist_ok=True)
        save_info(target, moved(info, source, target))
    except (OSError, shutil.Error) as error:
        raise CollmError(f"could not copy {source} to {target}: {error}") from None


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload a checkpoint with its card, in the place of one that the repository holds, and return its address.

    Raises:
        CollmError: no checkpoint, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if load_info(folder) is None:
        raise CollmError(f"{folder} is not a collm checkpoint; it has no collm.json")
    write_card(folder)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        ignored = [pattern for name in LEFTOVERS for pattern in (name, f"{name}/*")]
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            ignore_patterns=ignored,
            delete_patterns=list(CHECKPOINT),  # those that are not uploaded now
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise CollmError(f"could not upload {folder} to {repo_id}: {error}") from error
    return str(commit)
