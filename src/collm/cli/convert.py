"""`collm convert`: a GGUF file as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import click

from collm.cli.console import Command
from collm.cli.options import DTYPES
from collm.cli.param_types import OUTPUT_FOLDER
from collm.errors import CollmError


@click.command(cls=Command, short_help="Turn a GGUF file into a Hugging Face folder.")
@click.argument("gguf_file", metavar="GGUF")
@click.argument("folder", metavar="[DIR]", required=False, type=OUTPUT_FOLDER)
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of the weights that are written."
)
def convert(gguf_file: str, folder: Path | None, dtype: str) -> None:
    """Dequantise GGUF (FILE.gguf or pkg:PACKAGE/FILE.gguf) and write it to DIR: safetensors, configuration, tokenizer.

    Without DIR it goes to the cache ($COLLM_CACHE, else collm in the user's folder for caches), out of which every
    command reads it from then on. They would convert it themselves, at their first run.
    """
    from collm.files import refuse_full
    from collm.models.gguf.header import read_header
    from collm.models.specs import locate

    path = locate(gguf_file)
    if isinstance(path, str):
        raise CollmError(f"{gguf_file} is no .gguf file; only those are converted")
    if folder is not None:
        refuse_full(folder)
    read_header(path)
    click.echo(f"converting {path.name}", err=True)

    from collm.models.gguf import conversion as gguf
    from collm.models.loading import DTYPES
    from collm.models.quiet import quiet

    with quiet():
        if folder is not None:
            gguf.convert(path, folder, DTYPES[dtype])
            where: Path | None = folder
        else:
            where = gguf.fill_cache(path, DTYPES[dtype])
    if where is None:
        raise CollmError(f"{path.name} cannot be kept in the cache; give a folder: collm convert {gguf_file} DIR")
    click.echo(f"{gguf_file} is in {where}")
