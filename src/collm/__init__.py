"""collm: language models that learn to write together, token by token."""

__version__ = "0.1.0"
