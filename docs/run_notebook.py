"""Execute the notebook from the repository's root, with the packages of .venv: `python docs/run_notebook.py [--write]`.

Run by `make site` in the environment of the website. `--write` keeps what came out, which the website shows.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"


def main() -> None:
    packages = next((ROOT / ".venv").glob("lib/python*/site-packages"), None)
    paths = [ROOT / "src", *([] if packages is None else [packages])]
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    begin = time.monotonic()
    try:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    except CellExecutionError as error:
        sys.exit(f"Error: {NOTEBOOK.relative_to(ROOT)}: a cell failed (does `make weights` come first?)\n{error}")
    print(f"{NOTEBOOK.name}: {len(notebook.cells)} cells in {time.monotonic() - begin:.0f} s")
    if "--write" in sys.argv[1:]:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of this run
            if cell.cell_type == "code":
                cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]  # may name paths
        nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
