"""What can be found wrong with a recipe before torch is imported or a weight is read."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

from collm.data.examples import JSON_SUFFIXES, hold_out, load_examples
from collm.errors import CollmError, nearest
from collm.evaluation.shipped import get_task
from collm.files import require_place
from collm.llm.checking import check_request, outline
from collm.models.info import load_info
from collm.models.placement import Placement
from collm.models.reach import require_model
from collm.models.specs import adapter_config, is_tool, is_url, split_spec
from collm.sampling_params import SamplingParams
from collm.training.recipe import ModelSection, OwnTextsSection, Recipe

LOGGERS = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub", "mlflow"),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": ("kubeflow",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""What `report_to` may name, and the packages that it needs."""
OTHERWISE = {"tensorboard": "tensorboardX"}
"""A package that does instead."""


def check_recipe(recipe: Recipe) -> None:
    """Are the models, data, scores, packages and output places of a recipe there?

    Raises:
        CollmError: the first that is not, by its key in the recipe.
    """
    require_packages(("accelerate", "peft") if recipe.tune == "lora" else ("accelerate",))
    check_trainer(recipe)
    one_file = recipe.data.validation is None
    _check_scores("base", recipe.base)
    try:
        _check_model(recipe.base)
    except CollmError as error:
        raise CollmError(f"base: {error}") from None
    _check_placement(recipe)
    for assistant in recipe.assistants:
        keys = ("scores",) if one_file else ("scores", "validation_scores")
        lacking = [key for key in keys if getattr(assistant, key) is None]
        _check_scores(f"assistant {assistant.name!r}", assistant)
        if not lacking and recipe.own_texts is None:
            continue  # it is not opened, and may lie on another machine
        try:
            _check_assistant(assistant)
        except CollmError as error:
            raise not_at_hand(assistant.name, error, None if recipe.own_texts else lacking) from error
    for key in ("train", "validation"):
        source = getattr(recipe.data, key)
        if source is not None and Path(source).suffix in JSON_SUFFIXES:
            try:
                examples = load_examples(source, skip_bad=recipe.data.skip_bad)
                if one_file:
                    hold_out(examples, recipe.data.validation_share)
            except CollmError as error:
                raise CollmError(f"data.{key}: {error}") from None
    if recipe.own_texts is not None:
        try:
            _check_own_texts(recipe, recipe.own_texts)
        except CollmError as error:
            raise CollmError(f"own_texts: {error}") from None
    require_place(recipe.out, folder=True)
    require_place(recipe.cache_folder, folder=True)


def _check_own_texts(recipe: Recipe, section: OwnTextsSection) -> None:
    task = get_task(section.task)
    task.require()
    if task.shots:
        raise CollmError(
            f"task {task.name!r} asks behind solved examples, which the texts that are learnt do not have: take one "
            "that asks as they do"
        )
    if section.checkpoint is not None:
        if Path(split_spec(section.checkpoint)[0]).resolve() == recipe.out.resolve():
            raise CollmError(
                f"checkpoint {section.checkpoint} is out itself, where the new pair is written in its place: choose "
                "another out"
            )
        system = outline(section.checkpoint, placed_assistants(recipe, section.checkpoint), dtype=section.dtype)
        pair = section.writer == "pair"
        if pair and not system.has_gate:
            raise CollmError(
                f"{section.checkpoint} has no gate, so that nothing says who of a pair writes: give a pair that collm "
                "train has made, or a writer that writes alone (base)"
            )
        check_request(system, SamplingParams(deferral="sampled" if pair else None), None if pair else section.writer)
        tool = section.writer in system.tools
    else:
        tool = is_tool(recipe.writer(section.writer).model)
    if tool:
        raise CollmError(f"{section.writer} is a tool, which writes no texts by itself")
    source = section.data or recipe.data.train
    if Path(source).suffix in JSON_SUFFIXES:
        for example in load_examples(source, skip_bad=recipe.data.skip_bad):
            task.gold(example)


def placed_assistants(recipe: Recipe, checkpoint: str) -> list[str]:
    """Where the assistants of a checkpoint lie: those of the recipe that bear their names."""
    info = load_info(split_spec(checkpoint)[0])
    names = set() if info is None else {assistant.name for assistant in info.assistants}
    return [f"{a.name}={a.model}" for a in recipe.assistants if a.name in names]


def require_packages(packages: tuple[str, ...]) -> None:
    """Raises:
    CollmError: one of them is not installed.
    """
    for package in packages:
        if find_spec(package) is None:
            raise CollmError(f"training needs the package {package}; pip install 'collm[train]'")


def not_at_hand(name: str, error: CollmError, lacking: list[str] | None) -> CollmError:
    """An assistant that cannot be opened need not be: `lacking` are the keys of the scores that would do instead; None
    where none would."""
    if lacking is None:
        return CollmError(f"assistant {name!r}: {error}. With own_texts it must be at hand: it scores what is written")
    return CollmError(
        f"assistant {name!r}: {error}. To train without it at hand, score the data where it lies (collm score) and "
        f"give the scores as {' and '.join(lacking) or 'now (these are of an older collm, and tell too little)'}"
    )


def _check_scores(whose: str, section: ModelSection) -> None:
    for name in ("scores", "validation_scores"):
        path = getattr(section, name)
        if path is not None and not path.is_dir():
            raise CollmError(f"{whose}: {name}: there is no folder {path}; collm score makes it")


def _check_assistant(section: ModelSection) -> None:
    if not is_url(section.model):
        _check_model(section)
        return
    from collm.remote.address import Address

    Address.parse(section.model).key()


def _check_model(section: ModelSection) -> None:
    if is_tool(section.model):
        return
    adapter = adapter_config(section.model)
    Placement(section.dtype).of(section.model)
    require_model(section.model)
    if adapter is not None:
        require_model(adapter["base_model_name_or_path"])


def _check_placement(recipe: Recipe) -> None:
    """A base that is trained is laid over devices by its launcher, and needs weights that can move."""
    _, settings = split_spec(recipe.base.model)
    for name in ("device_map", "quantization"):
        if recipe.tune != "gate" and name in settings:
            raise CollmError(
                f"base.model: {name} is for models that stay as they are (assistants, and the base of tune: gate); to "
                "train a large base, spread it by accelerate launch with FSDP or DeepSpeed"
            )
    if recipe.tune != "gate" and adapter_config(recipe.base.model) is not None:
        raise CollmError(
            f"base.model: {recipe.base.model} is an adapter, which tune: {recipe.tune} would not keep: merge it into "
            "its base first (AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW), "
            "and the tokenizer beside it), or take tune: gate"
        )


def check_trainer(recipe: Recipe) -> None:
    """Does transformers know what its `TrainingArguments` shall be given?

    Read from its source: importing it takes seconds, and torch.

    Raises:
        CollmError: an argument, schedule or logger that it does not have.
    """
    declared = [n.target for n in _body_of("training_args", "TrainingArguments") if isinstance(n, ast.AnnAssign)]
    fields = {target.id for target in declared if isinstance(target, ast.Name)}
    for key in recipe.trainer:
        if fields and key not in fields:
            hint = nearest(key, fields)
            raise CollmError(f"trainer.{key} is not one of transformers' TrainingArguments{hint and '; '}{hint}")
    values = [n.value for n in _body_of("trainer_utils", "SchedulerType") if isinstance(n, ast.Assign)]
    schedules = [str(value.value) for value in values if isinstance(value, ast.Constant)]
    if schedules and recipe.training.schedule not in schedules:
        hint = nearest(recipe.training.schedule, schedules, f"there are {', '.join(schedules)}")
        raise CollmError(f"training.schedule: transformers has no {recipe.training.schedule!r}; {hint}")
    _check_loggers(recipe.trainer.get("report_to"))


def _body_of(module: str, name: str) -> list[ast.stmt]:
    """What stands in a class of transformers; nothing where its source is not to be read."""
    spec = find_spec("transformers")
    places = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    for place in places:
        try:
            tree = ast.parse((Path(place) / f"{module}.py").read_text(encoding="utf-8"))
        except (OSError, SyntaxError):
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node.body
    return []


def _check_loggers(asked: object) -> None:
    """transformers finds out after everything has been loaded and scored, with a traceback."""
    names = [asked] if isinstance(asked, str) else asked if isinstance(asked, list) else []
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in LOGGERS:
            hint = nearest(str(name), LOGGERS, f"there are none, all, {', '.join(LOGGERS)}")
            raise CollmError(f"trainer.report_to: transformers reports to no {name!r}; {hint}")
        missing = [package for package in LOGGERS[name] if find_spec(package) is None]
        instead = OTHERWISE.get(name)
        if missing and (instead is None or find_spec(instead) is None):
            raise CollmError(f"trainer.report_to: {name} needs the package {missing[0]}; pip install {missing[0]}")
