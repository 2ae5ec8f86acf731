"""From training text to token ids with labels, and scores of gold tokens under each model."""
