"""A system behind HTTP: the OpenAI API for the clients people have, and a page to try it on."""

from collm.serving.app import make_app
from collm.serving.limits import Limits

__all__ = ["Limits", "make_app"]
