"""What the commands of `peft-composition` do and print, a file each; `peft_composition_cli` has their arguments."""

from peft_composition_cli import noise

from .. import plugin  # noqa: F401  (as a program, the package leaves this to the command)
from ..progress import say_in_lines


if noise.says_lines:
    say_in_lines()
