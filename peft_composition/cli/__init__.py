"""What the commands of `peft-composition` do and print, a file each; `peft_composition_cli` has their arguments."""
