"""How answers are found in texts and judged: pure functions, of which `collm.evaluation.shipped` makes the tasks."""
