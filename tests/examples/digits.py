"""A scenario of the study that is as small as can be: digits in pairs, and a vision transformer."""

from __future__ import annotations


def digits(layers: int = 2, steps: int = 4, of_round: str = "") -> str:
    """What a scenario says of its model, data and tasks; methods and settings of training follow.

    Args:
        layers: of the model.
        steps: of its pretraining.
        of_round: what its round has besides.
    """
    return f"""
title: Digits
scale: offline
shift: label
model:
  kind: image
  target_modules: [q_proj, v_proj]
  pretraining:
    data: digits
    classes: [6-9]
    hidden_size: 16
    layers: {layers}
    heads: 2
    patch_size: 7
    steps: {steps}
    batch_size: 8
data:
  digits: {{source: mnist, variant: digits}}
tasks:
  low: {{data: digits, classes: [0-1]}}
  middle: {{data: digits, classes: [2-3]}}
  new: {{data: digits, classes: [4-5]}}
rounds:
  - {{target: new, upstream: [low, middle]{of_round}}}
"""
