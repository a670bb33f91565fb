"""How long to train; loads nothing, so that what a scenario will cost can be counted anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass


RECIPE_RATE = 1e-2  # of a fresh head and mixing weights that train together
HELD_OUT = 200  # test examples at most that tell whether an adapter has learned its own task


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    Args:
        learning_rate: of everything but the head; linear decay to zero.
        head_learning_rate: of the head, where it differs.
        epochs: passes over the data.
        max_steps: at most so many steps; -1: no limit.
        batch_size: over all processes.
        seed: of the order of the examples.
        checkpoint_steps: how often to save, so that a killed training goes on; None: never.
    """

    learning_rate: float
    epochs: float
    batch_size: int
    head_learning_rate: float | None = None
    max_steps: int = -1
    seed: int = 0
    checkpoint_steps: int | None = None

    def steps(self, examples: int) -> int:
        """The number of optimizer steps on so many examples."""
        wanted = math.ceil(self.epochs * math.ceil(examples / self.batch_size))
        return wanted if self.max_steps < 0 else min(wanted, self.max_steps)


def recipe_plan(steps: int, batch_size: int, seed: int = 0, checkpoint_steps: int | None = None) -> Plan:
    """Of a fresh head and mixing weights together: so many steps whatever K is, at a rate that is not searched."""
    epochs = float(steps)  # more passes than so many steps can make
    return Plan(RECIPE_RATE, epochs, batch_size, RECIPE_RATE, steps, seed, checkpoint_steps)
