"""Tasks of one's own: `MODULE:FUNCTION`, or `FILE.py:FUNCTION`, in the place of a shipped task's name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from collm.errors import CollmError, nearest
from collm.evaluation.task import Task
from collm.evaluation.tasks.ifeval import text_as_it_is

Judging = Callable[[str, str], float]
"""What a text is worth, from 0 to 1 (True and False will do): of the text that was written, and the gold answer."""


def own_task(spec: str) -> Task:
    """The task that a user wrote: a function `(text, gold) -> number from 0 to 1`, or a whole `Task`.

    The gold answer is the field `answer` of an example (lists and mappings as JSON), else its last assistant turn. The
    version is a hash of the module's text: figures of another rule are never compared unawares.

    Raises:
        CollmError: no such module or name, or it is no such function.
    """
    place, _, name = spec.rpartition(":")
    module = _module(place, spec)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = nearest(name, functions, f"it has {', '.join(functions) or 'no functions'}")
        raise CollmError(f"task {spec}: {place} has no {name!r}; {hint}")
    found = getattr(module, name)
    if isinstance(found, Task):
        return found
    try:
        inspect.signature(found).bind("text", "gold")
    except (TypeError, ValueError) as error:
        raise CollmError(
            f"task {spec}: {name} is to be a function of two texts, the one that was written and the gold answer, that "
            f"gives a number from 0 to 1 ({error})"
        ) from error
    source = Path(str(module.__file__)).read_bytes()
    return Task(
        name=spec,
        version=int(hashlib.sha256(source).hexdigest()[:6], 16),
        extract=text_as_it_is,
        read_gold=_gold,
        metrics=(name,),
        judge=_judge(found, spec, name),
        whole=True,
    )


def _module(place: str, spec: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _from_file(Path(place), spec)
        here = str(Path.cwd())
        if here not in sys.path:  # as `python -m` has it; an installed command has not
            sys.path.insert(0, here)
        return importlib.import_module(place)
    except CollmError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise CollmError(f"task {spec}: {place} needs the package {error.name}, which is not installed") from error
        raise CollmError(
            f"task {spec}: there is no module {place!r}; a task of your own is MODULE:FUNCTION or FILE.py:FUNCTION, "
            "the module in this folder or installed"
        ) from error
    except Exception as error:  # whatever a user's module does when it is imported
        raise CollmError(f"task {spec}: {place} cannot be imported ({type(error).__name__}: {error})") from error


def _from_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise CollmError(f"task {spec}: there is no file {path}")
    name = f"_collm_task_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses look themselves up there
    found.loader.exec_module(module)
    return module


def _gold(field: Any) -> str | None:
    return field if isinstance(field, str) else json.dumps(field, ensure_ascii=False)


def _judge(function: Judging, spec: str, name: str) -> Callable[[str | None, str], Mapping[str, float]]:
    def judge(text: str | None, gold: str) -> Mapping[str, float]:
        try:
            value: Any = function(text or "", gold)
        except Exception as error:
            raise CollmError(
                f"task {spec}: {name} raised {type(error).__name__}: {error} (of the text {(text or '')[:60]!r}, gold "
                f"answer {gold[:60]!r})"
            ) from error
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise CollmError(f"task {spec}: {name} is to give a number from 0 to 1, not {value!r}")
        return {name: float(value)}

    return judge
