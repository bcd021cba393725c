"""Random networks under random composites: every backend against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from lrp_fast import LRP, Composite, list_composites
from lrp_fast.rules import AlphaBeta, Epsilon, Flat, Gamma, PositiveProducts, Rule, WSquare, ZBox, ZeroGuard, ZPlus
from networks import errors
from random_networks import CLASSES, random_network

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POSITIVE = ("otsuki2024", "conserving")
SPLITS = (None, None, "ratio", "symmetric", "residual-only", "signed")
RULES: tuple[Rule, ...] = (
    Epsilon(),
    AlphaBeta(),
    AlphaBeta(1.5, 0.5),
    ZPlus(),
    Gamma(),
    WSquare(),
    Flat(),
    ZBox(-3.0, 3.0),
    PositiveProducts(),
    PositiveProducts(ZeroGuard(), bias=False),
    PositiveProducts(ZeroGuard(), bias=False, pixels=False),
)


def differences(got: Tensor, expected: Tensor) -> Tensor:
    """The relative L2 error of each map; of a map that is zero, the other's norm."""
    zero = expected.flatten(1).norm(dim=1) == 0
    return torch.where(zero, got.double().flatten(1).norm(dim=1), errors(got, expected))


@pytest.mark.parametrize("number", range(48))
def test_every_backend_is_the_reference(number: int) -> None:
    draw = random.Random(int(torch.randint(2**31, ())))
    positive = number % 3 == 0
    model, images = random_network(draw.randrange(2**31), biased=not positive)
    known = [name for name in list_composites() if images.shape[1] == 3 or name != "epsilon_gamma_box"]
    composite = Composite.named(draw.choice(POSITIVE if positive else known))
    if not positive and draw.random() < 0.5:
        steps = [path for path, one in model.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
        for step in draw.sample(steps, min(len(steps), draw.randint(1, 4))):
            composite = composite.with_rule(step, draw.choice(RULES))
    split = draw.choice(SPLITS[:-1] if positive else SPLITS)
    model, images = model.to(DEVICE), images.to(DEVICE)
    targets = torch.randint(CLASSES, (len(images), 2))

    expected = LRP(model, composite, split, backend="reference").explain(images, targets, start="one")
    for backend, dtype in (("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)):
        explainer = LRP(model, composite, split, backend=backend, dtype=dtype)
        got = explainer.explain(images, targets, start="one")
        assert explainer.backend == backend
        assert got.relevance is not None
        assert expected.relevance is not None
        alone = explainer.explain(images, targets, start="one", relevance=False).heatmap
        for found, right in ((got.relevance, expected.relevance), (alone, expected.heatmap)):
            error = differences(found.flatten(0, 1), right.flatten(0, 1))
            if dtype == torch.float64:
                assert float(error.max()) <= 1e-8
            else:  # in single images rounding decides what fires or wins, or is all that a unit holds
                assert float(error.median()) <= (1e-5 if positive else 1e-3)
