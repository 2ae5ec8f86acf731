"""Says what a benchmark measured, and where."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from collm.bench.paired import Ratio
from collm.files import write_text


def report(result: dict[str, object], ratios: dict[str, Ratio], out: Path) -> None:
    """Print what was measured, where, and write it as JSON."""
    result = {
        **result,
        "ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
        "command": " ".join(["python", *sys.argv]),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
        },
    }
    print(json.dumps(result, indent=2))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio}")
    write_text(out, json.dumps(result, indent=2) + "\n")
