"""`python -m peft_composition`, the same as the command `peft-composition`."""

from peft_composition_cli import main


if __name__ == "__main__":
    main()
