"""Splits by class, and heads on cached features against heads that are trained one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_composition.comparing.heads import Budget, batches, predict, train_heads
from peft_composition.comparing.splits import cross_fit, draw_per_class


def test_each_class_is_spread_evenly_over_the_folds() -> None:
    labels = torch.tensor([0] * 7 + [1] * 11 + [2] * 5)
    first, second = cross_fit(labels, 5, 2, seed=3)
    for folds in (first, second):
        table = torch.stack([torch.bincount(folds[labels == each], minlength=5) for each in range(3)])
        assert int((table.amax(1) - table.amin(1)).max()) <= 1
        assert int(table.sum(0).max() - table.sum(0).min()) <= 1
    assert not torch.equal(first, second)
    assert torch.equal(first, cross_fit(labels, 5, 1, seed=3)[0])


def test_no_more_folds_than_the_smallest_class_has_examples() -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    (folds,) = cross_fit(labels, 5, 1, seed=0)
    assert sorted(folds[labels == 1].tolist()) == [0, 1]
    with pytest.raises(ValueError, match="class 4 has 1 example; give"):
        cross_fit(torch.tensor([0, 0, 4]), 5, 1, seed=0)


def test_draws_of_a_seed_are_nested() -> None:
    labels = torch.arange(60) % 3
    small, large = draw_per_class(labels, 2, 1), draw_per_class(labels, 5, 1)
    assert torch.bincount(labels[large]).tolist() == [5, 5, 5]
    assert set(small.tolist()) < set(large.tolist())
    assert not torch.equal(small, draw_per_class(labels, 2, 2))
    with pytest.raises(ValueError, match="k=21, but class 0 has only 20"):
        draw_per_class(labels, 21, 0)


def test_heads_of_all_splits_are_those_trained_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 3
    features = torch.randn(2, 1, 12, 4, generator=generator) * 3
    trained_on = [torch.arange(9), torch.arange(3, 12)]
    budget = Budget(steps=7, batch_size=4, learning_rate=0.1)
    heads = train_heads(features, labels, trained_on, 3, budget, seed=5)
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(5)) * 0.02
    for method in range(2):
        for split in range(2):
            head = torch.nn.Linear(4, 3)
            head.weight.data, head.bias.data = start.T.clone(), torch.zeros(3)
            optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.0)
            for step, rows in enumerate(batches(trained_on, budget, seed=5)[:, split]):
                for group in optimizer.param_groups:
                    group["lr"] = 0.1 * (1 - step / 7)
                optimizer.zero_grad()
                F.cross_entropy(head(features[method, 0, rows]), labels[rows]).backward()
                torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
                optimizer.step()
            expected = head(features[method, 0])
            own = predict([part[method : method + 1, split : split + 1] for part in heads], features[method][None])
            assert torch.allclose(own[0, 0], expected, atol=1e-4)


def test_batches_see_every_example_of_their_split_alone() -> None:
    trained_on = [torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5, 7])]
    rows = batches(trained_on, Budget(steps=8, batch_size=16), seed=0)
    assert rows.shape == (8, 2, 3)
    assert torch.bincount(rows[:, 0].flatten()).tolist() == [8, 0, 8, 0, 8]
    assert set(rows[:, 1].flatten().tolist()) == {1, 3, 5, 7}


def test_a_budget_is_positive() -> None:
    with pytest.raises(ValueError, match="steps must be more than 0, got 0"):
        Budget(steps=0)
