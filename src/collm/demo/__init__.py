"""The whole method in minutes, without downloads: `collm demo`."""

from collm.demo.run import run_demo

__all__ = ["run_demo"]
