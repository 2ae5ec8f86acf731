"""The engine: flows of many texts share the passes of their models, for as long as the models live."""

from collm.engine.engine import Engine
from collm.engine.running import Event, Finished, Sink
from collm.engine.twin import Twin, run

__all__ = ["Engine", "Event", "Finished", "Sink", "Twin", "run"]
