"""The rooms of the house: imports go one way, decoders do no I/O, the command line starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "collm"
ORDER = [
    "colours",
    "types",
    "views",
    "errors",
    "cuts",
    "values",
    "noise",
    "sampling_params",
    "signs",
    "files",
    "text",
    "gate",
    "decoding",
    "models",
    "identity",
    "remote",
    "engine",
    "data",
    "llm",
    "vllm_plugin",
    "report",
    "evaluation",
    "training",
    "bench",
    "calibration",
    "serving",
    "workflow",
    "demo",
    "cli",
]
"""Each room may import itself and what stands before it."""
NO_IO = ("transformers", "httpx", "requests", "asyncio", "tokenizers", "datasets", "safetensors")
"""What decoders must not know."""
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "peft", "numpy", "pydantic", "starlette", "uvicorn")


def modules() -> list[Path]:
    """All but the two front doors, which name rooms to open them."""
    return sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or not path.name.startswith("__"))


def imported(path: Path) -> set[str]:
    """Absolute names of all modules a file imports, inside functions too; `from collm.a import b` gives `collm.a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def test_every_module_has_a_room() -> None:
    rooms = {room(path) for path in modules()}
    assert rooms <= set(ORDER), f"say where these stand: {sorted(rooms - set(ORDER))}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    allowed = set(ORDER[: ORDER.index(room(path)) + 1])
    used = {name.split(".")[1] for name in imported(path) if name.startswith("collm.")} - {"__version__"}
    assert used <= allowed, f"{sorted(used - allowed)} stand after {room(path)}"


def test_no_file_imports_itself_by_a_detour() -> None:
    """Nor inside a function, which hides a circle from Python and not from a reader."""
    files = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in modules()}
    packages = {name.removesuffix(".__init__"): name for name in files if name.endswith(".__init__")}

    def file_of(name: str) -> str | None:
        """`collm.a.b.c` may be a file, or a name in the file `collm.a.b`."""
        for found in (name, name.rpartition(".")[0]):
            if found in files or found in packages:
                return packages.get(found, found)
        return None

    graph = {name: {file_of(used) for used in imported(path)} - {None, name} for name, path in files.items()}
    TopologicalSorter(graph).prepare()  # CycleError: it names the circle


@pytest.mark.parametrize("path", sorted((SOURCE / "decoding").rglob("*.py")), ids=lambda path: path.name)
def test_decoders_do_no_io(path: Path) -> None:
    known = imported(path)
    assert not {name for name in known if name.split(".")[0] in NO_IO}
    assert not {name for name in known if name.startswith("torch.nn.Module")}


def test_the_checker_sees_imports_inside_functions(tmp_path: Path) -> None:
    """The two tests above are worth nothing if `imported` misses something."""
    file = tmp_path / "module.py"
    file.write_text("import a.b\ndef f():\n    from collm.cli import app\n    import httpx as h\n")
    assert imported(file) == {"a.b", "collm.cli.app", "httpx"}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["score"], ["sacre"]])
def test_help_and_usage_errors_need_no_torch(arguments: list[str]) -> None:
    loaded = python(
        "import sys\nfrom collm.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    assert loaded.rstrip().endswith("LOADED []")


def test_the_front_door_is_lazy_and_names_what_it_offers() -> None:
    printed = python(
        "import sys, collm\nprint('torch' in sys.modules)\n"
        "from collm import CollaborativeLM, SamplingParams, marginal_nll\n"
        "print(set(collm.__all__) <= set(dir(collm)))"
    )
    assert printed.split() == ["False", "True"]


def test_the_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    """Built offline with the hatchling that is installed; everything in src and recipes goes in, nothing else does."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(ROOT)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("collm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
        [entry_points] = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    sources = {f"collm/{path.relative_to(SOURCE).as_posix()}" for path in SOURCE.rglob("*") if path.is_file()}
    recipes = ROOT / "recipes"
    sources |= {
        f"collm/recipes/{path.relative_to(recipes).as_posix()}" for path in recipes.rglob("*") if path.is_file()
    }
    assert {name for name in names if name.startswith("collm/")} == {
        name for name in sources if "__pycache__" not in name
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "collm = collm.cli:main" in entry_points
