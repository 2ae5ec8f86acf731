"""`python -m collm.evaluation.harness run --model collm ...`: the command line of lm_eval, which knows pairs."""

import sys

from lm_eval.__main__ import cli_evaluate

import collm.evaluation.harness  # noqa: F401  (registers the model)
from collm.errors import CollmError

try:
    cli_evaluate()
except CollmError as error:
    sys.exit(f"error: {error}")
