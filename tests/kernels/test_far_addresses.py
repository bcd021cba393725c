"""Kernels on tensors of more than 2³¹ elements: every address of the first and last programs lies inside them.

Offsets in 32 bits would wrap there. No such tensor is ever filled: the system gives memory to a page when it is touched,
and the strict interpreter runs a few programs only.
"""

from __future__ import annotations

import pytest
import torch
from resources import HEAVIEST  # which finds bench/ for the next
from torch import Tensor

import strict_interpreter
from cases import KernelCase, kernel_cases
from eager import Maker
from lrp_fast.kernels import pool
from lrp_fast.kernels.common import Arrival, Denominators, End, interpreted

pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="on a GPU kernels are not interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of what lay in memory before
]

FAR = 2**31
STRIDED = (
    "gate.gate 56² 256, groups of 4",
    "gate.gate 112² 64, stem",
    "pointwise_conv.merged 56² 256→512 stride 2 + 28² 128→512",
    "pointwise_conv.merged 28² 128→512, beside a library's",
    "pointwise_conv.backward 56² 128→256, divided merge of stride 2",
    "spatial_conv.gated 56² 128→128 stride 2",
    "spatial_conv.gated 56² 256, groups of 16",
    "spatial_conv.merged 56² 64→64, projection",
    "spatial_conv.backward 56² 128→128 stride 2",
    "pool.block_backward 112² 64, max-pool",
)
FILLED = {
    "pool.winner_backward 112² 64, two ends",  # whose winners a case finds by pooling
    "pointwise_conv.merged 28² 128→512, γ, beside a library's",  # kept from poles
    "spatial_conv.merged 28² 128→128, γ, projection",
}
"""Cases that are made by work on whole tensors."""
BY_NAME = {case.name: case for case in kernel_cases()}
CASES = {name: BY_NAME[name] for name in sorted({*HEAVIEST, *STRIDED} - FILLED)}


@pytest.fixture(autouse=True)
def unfilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tensors of cases as memory that nobody has touched."""

    def empty(self: Maker, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def stacked(self: Maker, denominators: Denominators, *shape: int) -> Tensor:
        return empty(self, *shape[:-1], denominators.stacks * shape[-1])

    monkeypatch.setattr(Maker, "normal", empty)
    monkeypatch.setattr(Maker, "positive", empty)
    monkeypatch.setattr(Maker, "stacked", stacked)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.empty(shape, device=device))


def largest(case: KernelCase, batch: int) -> int:
    """Elements of the largest tensor of a case, after its first and last programs have run."""
    prepared = case.build(torch.device("cpu"), torch.bfloat16, batch, "ieee")
    with strict_interpreter.only(0, 1, -2, -1) as launches:
        prepared.run()
    return max(region.length for launch in launches for region in launch.regions)


@pytest.mark.parametrize("name", CASES)
def test_no_offset_wraps(name: str) -> None:
    batch = FAR // (largest(CASES[name], 8) // 8) + 2
    assert largest(CASES[name], batch) > FAR


def test_no_offset_of_a_winner_wraps() -> None:
    batch = FAR // (112 * 112 * 64) + 2
    relevance = torch.empty(batch, 56, 56, 64, dtype=torch.bfloat16)
    winner = torch.empty(relevance.shape, dtype=torch.uint8)
    arrival = Arrival((End(torch.empty(batch, 112, 112, 64, dtype=torch.bfloat16)),))
    with strict_interpreter.only(0, 1, -2, -1) as launches:
        pool.winner_backward(
            relevance, winner, arrival, kernel=(3, 3), stride=(2, 2), padding=(1, 1), height=112, width=112
        )
    assert max(region.length for region in launches[0].regions) > FAR
