"""Writes docs/cli.md from the help pages (`make docs`); with --check, says whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import click

from collm.cli import main

TARGET = Path(__file__).with_name("cli.md")
INTRODUCTION = """\
# The commands

Written from the help pages by `make docs`; a test keeps it true. Results go to standard output, progress and errors to
standard error. Exit codes: 0 done; 1 something you can put right, told in one line (`--debug` shows the traceback);
2 usage; 130 stopped by Ctrl-C. `collm run`, `score`, `train`, `eval --out`, `answer`, `bench --out` and `demo` go on
where they were stopped when they are run again.

**Shell completion** of commands, options and files, for good:

```
echo 'eval "$(_COLLM_COMPLETE=bash_source collm)"' >> ~/.bashrc
echo 'eval "$(_COLLM_COMPLETE=zsh_source collm)"' >> ~/.zshrc
_COLLM_COMPLETE=fish_source collm > ~/.config/fish/completions/collm.fish
```
"""


def page() -> str:
    """All help pages at a fixed width, whatever the terminal."""
    group = click.Context(main, info_name="collm", terminal_width=100, **main.context_settings)
    parts = [INTRODUCTION, f"```\n{main.get_help(group)}\n```\n"]
    for name, command in main.commands.items():
        context = click.Context(command, group, info_name=name, terminal_width=100)
        parts.append(f"## collm {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        TARGET.write_text(page())
    elif TARGET.read_text() != page():
        sys.exit(f"{TARGET.name} is out of date: run `make docs`")
