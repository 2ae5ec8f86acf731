"""Pairs under EleutherAI's lm-evaluation-harness (extra `eval`). Importing it registers the model `collm`."""

from collm.evaluation.harness.model import CollaborativeHarnessLM
from collm.evaluation.harness.run import run_tasks

__all__ = ["CollaborativeHarnessLM", "run_tasks"]
