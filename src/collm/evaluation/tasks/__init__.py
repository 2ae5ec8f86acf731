"""How answers are found in texts and judged: pure functions, from which `collm.evaluation.task` makes the tasks."""
