"""Where the demo keeps what."""

from __future__ import annotations

from pathlib import Path

from collm.demo.plan import System

STAGES = "stages"
"""Folder of half-trained models: untrained ones, and the arithmetic expert after its drill."""


def data_file(out: Path, split: str) -> Path:
    return out / "data" / f"{split}.jsonl"


def model_folder(out: Path, name: str) -> Path:
    return out / "models" / name


def trace_file(out: Path, system: System) -> Path:
    return out / "traces" / f"{system.name.replace(',', '').replace(' ', '-')}.jsonl"
