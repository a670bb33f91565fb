"""A scenario of the study that is as small as can be: digits in pairs, a vision transformer of two layers."""

from __future__ import annotations


# What a scenario says of its model, data and tasks; methods and settings of training follow.
DIGITS = """
title: Digits
scale: offline
shift: label
model:
  kind: image
  target_modules: [q_proj, v_proj]
  pretraining:
    {data: digits, classes: [6-9], hidden_size: 16, layers: 2, heads: 2, patch_size: 7, steps: 4, batch_size: 8}
data:
  digits: {source: mnist, variant: digits}
tasks:
  low: {data: digits, classes: [0-1]}
  middle: {data: digits, classes: [2-3]}
  new: {data: digits, classes: [4-5]}
rounds:
  - {target: new, upstream: [low, middle]}
"""
