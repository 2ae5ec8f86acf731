"""`collm answer`: answers in the files that other judges read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from collm.cli.asking import decoding_options, sampling_params
from collm.cli.console import ResumableCommand
from collm.cli.options import alone_option, batch_size_option
from collm.cli.param_types import EXISTING, OUTPUT_FILE
from collm.cli.system import check_llm, identity, load_llm, model_options
from collm.files import claimed


@click.command(cls=ResumableCommand, short_help="Answer AlpacaEval or MT-bench for their judges.")
@click.argument("checkpoint")
@click.option(
    "--format", "judge", required=True, type=click.Choice(["alpaca_eval", "mt_bench"]), help="Whose questions they are."
)
@click.option("--data", required=True, type=EXISTING, metavar="FILE", help="alpaca_eval.json, or question.jsonl.")
@click.option("--out", required=True, type=OUTPUT_FILE, metavar="FILE", help="For the judge; traces go beside it.")
@click.option("--generator", metavar="NAME", help="What the judge calls the system.  [default: CHECKPOINT's last part]")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N questions.")
@alone_option
@batch_size_option
@decoding_options
@model_options
def answer(
    checkpoint: str,
    judge: str,
    data: Path,
    out: Path,
    generator: str | None,
    limit: int | None,
    **options: Any,
) -> None:
    """Let CHECKPOINT answer the questions of AlpacaEval, or the two turns of MT-bench.

    Where --max-tokens is not given, it is 512 for AlpacaEval and 1024 for MT-bench; where --temperature is not given,
    MT-bench has one for each category, as in FastChat. The judge itself is run with its own package.
    """
    from collm.data.sources import read_source
    from collm.evaluation.answering import answer as run
    from collm.evaluation.answering import require_free, traces_path
    from collm.evaluation.judges import JUDGES

    ctx = click.get_current_context()
    given = {name for name in options if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if "max_tokens" not in given:
        options["max_tokens"] = JUDGES[judge].max_tokens
    params = sampling_params(options)
    require_free(out, [data])
    JUDGES[judge].dialogues(list(read_source(judge, data)))  # bad data shows before the models are loaded
    check_llm(checkpoint, options, params)
    with claimed(traces_path(out)):
        count = run(
            load_llm(checkpoint, options),
            judge,
            data,
            out,
            params,
            generator=generator or Path(checkpoint).name,
            temperature=options["temperature"] if "temperature" in given else None,
            limit=limit,
            alone=options["alone"],
            batch_size=options["batch_size"],
            identity=identity(checkpoint, options),
        )
    click.echo(f"answers to {count} questions are in {out}, who wrote which token in {traces_path(out)}")
