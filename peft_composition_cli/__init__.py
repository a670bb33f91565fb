"""The command line: arguments and help texts, a file for each command. What they do is in `peft_composition/cli/`.

It is outside the package, because importing the package loads torch and PEFT: help, completion and errors about
arguments are fast.
"""

# isort: off
from .application import app, main
from . import search  # help lists the commands in this order
from . import select
from . import inspect
from . import compose
from . import compare
from . import explain
from . import prune
from . import export
from . import weights
from . import merge
# isort: on


__all__ = [
    "app",
    "compare",
    "compose",
    "explain",
    "export",
    "inspect",
    "main",
    "merge",
    "prune",
    "search",
    "select",
    "weights",
]
