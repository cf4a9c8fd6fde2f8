"""The losses against their formulas in float64."""

import numpy as np
import pytest
import torch

from micronet import margin_loss, refined_loss


@pytest.fixture
def cosines() -> torch.Tensor:
    return torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("scale", "margin"), [(5.0, 0.0), (30.0, 0.35), (8.0, 0.1)])
def test_additive_margin_softmax(cosines: torch.Tensor, scale: float, margin: float) -> None:
    labels = torch.tensor([0, 3, 9, 2, 2, 5])
    c, losses = cosines.double().numpy(), []
    for row, y in zip(c, labels.tolist()):
        true = np.exp(scale * (row[y] - margin))
        others = sum(np.exp(scale * row[j]) for j in range(10) if j != y)
        losses.append(-np.log(true / (true + others)))
    assert margin_loss(cosines, labels, scale, margin).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_refined_labels(cosines: torch.Tensor) -> None:
    teacher = cosines.flip(1)
    s, t = 5 * cosines.double().numpy(), 5 * teacher.double().numpy()
    p = np.exp(t) / np.exp(t).sum(1, keepdims=True)
    log_q = s - np.log(np.exp(s).sum(1, keepdims=True))
    assert refined_loss(cosines, teacher, 5.0).item() == pytest.approx(-(p * log_q).sum(1).mean(), rel=1e-5)
