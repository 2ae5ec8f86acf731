"""`collm export`: a checkpoint for servers."""

from __future__ import annotations

from pathlib import Path

import click

from collm.cli.console import Command, waiting
from collm.cli.options import machine_options
from collm.cli.param_types import OUTPUT_FOLDER

COARSE = 0.05
"""A gate that is further off than this, in nats, defers at other places than the one that was calibrated."""


@click.command(cls=Command, short_help="Write a checkpoint that vLLM and transformers load, gate included.")
@click.argument("checkpoint")
@click.argument("folder", type=OUTPUT_FOLDER, metavar="DIR")
@click.option(
    "--base", metavar="SPEC", help="Where the base model lies, for a checkpoint that holds an adapter or a gate."
)
@machine_options
def export(checkpoint: str, folder: Path, base: str | None, dtype: str, device: str) -> None:
    """Write CHECKPOINT to DIR as a plain Hugging Face folder whose vocabulary holds the gate.

    Each assistant becomes one more token, <|defer|>, whose logit is the gate's score; an adapter is merged into the
    base. Stock transformers and vLLM load it; `collm vllm-serve DIR` starts it so that the base stops where it defers.
    """
    from collm.files import refuse_full
    from collm.models.info import base_spec, load_info
    from collm.models.reach import require_model

    refuse_full(folder)
    require_model(base_spec(checkpoint, load_info(checkpoint), base))
    with waiting(f"exporting {checkpoint}"):
        from collm.models.export import export as write

    done = write(checkpoint, folder, base=base, dtype=dtype, device=device)
    names = ", ".join(
        f"{number} is {info.name}" for number, info in zip(done.info.defer_token_ids, done.info.assistants, strict=True)
    )
    click.echo(f"written to {folder}: {done.dtype}, deferral ids: {names}; {len(done.info.calibration)} calibration(s)")
    click.echo(f"off from the original by at most {done.gate_error:.2g} nats (gate), {done.law_error:.2g} (law)")
    if done.gate_error > COARSE:
        click.echo(
            f"warning: in {dtype} the gate is rounded, so calibrated rates are met less exactly; --dtype float32 keeps "
            'it, and vLLM\'s --hf-overrides \'{"head_dtype": "float32"}\' computes it in full',
            err=True,
        )
