"""Several evaluations on one page: which system is better, at what cost, and what its assistants write."""

from __future__ import annotations

from collm.evaluation.result import EvalResult
from collm.report.systems import SystemRow


def system_row(result: EvalResult, note: str = "") -> SystemRow:
    """The result's line in the table of systems."""
    return SystemRow(
        name=result.name,
        value=result.value,
        ci95=result.ci95,
        kind=_kind(result),
        deferral_rate=result.deferral_rate,
        changed_share=result.changed_share,
        note=note,
        further=result.metrics,
        passes_per_token=result.passes_per_token,
    )


def _kind(result: EvalResult) -> str:
    settings = result.settings
    if settings.get("alone") is not None or len(settings.get("models", ())) == 1:
        return "single"
    return "control" if settings.get("params.deferral") == "random" else "joint"
