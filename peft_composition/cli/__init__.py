"""What the commands of `peft-composition` do and print, a file each; `peft_composition_cli` has their arguments."""

from .. import plugin  # noqa: F401  (as a program, the package leaves this to the command)
