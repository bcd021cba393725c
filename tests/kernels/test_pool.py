"""Pools forward and backward, and the even spread of dead relevance, window by window from the definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_common import BOUND, DEVICE, SMALL, TYPES, agree, agree_all, gpu, normal, poisoned_outputs, settled
from torch import Tensor

from lrp_fast.kernels.common import Arrival, End
from lrp_fast.kernels.pool import (
    Pair,
    block_backward,
    max_pool_average,
    max_pool_gated,
    spread,
    winner_backward,
    winner_pool,
)

__all__ = ["poisoned_outputs"]

MEDIUM = (32, 16)
"""A tile that leaves several, cut ones, of which the interpreter does not tire."""


@dataclass(frozen=True)
class Pool:
    """The geometry of a pool and its input's height and width."""

    kernel: Pair
    stride: Pair
    padding: Pair
    size: Pair
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    @property
    def window(self) -> dict[str, Pair]:
        return {"kernel": self.kernel, "stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def out_size(self) -> Pair:
        probe = torch.empty(1, 1, *self.size)
        shape = F.max_pool2d(probe, **self.torch_window).shape
        return shape[2], shape[3]

    @property
    def torch_window(self) -> dict[str, object]:
        names = {"kernel": "kernel_size"}
        return {names.get(name, name): pair for name, pair in self.window.items()} | {"ceil_mode": self.ceil_mode}

    def axis(self, which: int, out: int) -> list[int]:
        """The inputs inside the image of the window of an output, along one axis."""
        first = out * self.stride[which] - self.padding[which]
        steps = (first + k * self.dilation[which] for k in range(self.kernel[which]))
        return [i for i in steps if 0 <= i < self.size[which]]

    def block(self, which: int, out: int) -> slice:
        return slice(out * self.stride[which], min((out + 1) * self.stride[which], self.size[which]))

    def outputs(self) -> Iterator[Pair]:
        height, width = self.out_size
        return ((y, x) for y in range(height) for x in range(width))


RESNET = Pool((3, 3), (2, 2), (1, 1), (7, 6))
POOLS = {
    "resnet": RESNET,
    "resnet, even": Pool((3, 3), (2, 2), (1, 1), (6, 8)),
    "tiles": Pool((2, 2), (2, 2), (0, 0), (5, 4)),
    "oblong": Pool((3, 2), (1, 2), (1, 0), (4, 6)),
    "apart": Pool((2, 2), (3, 4), (0, 0), (7, 9)),
    "dilated": Pool((3, 2), (2, 1), (1, 1), (7, 5), (2, 3)),
    "ceil": Pool((3, 3), (2, 2), (0, 0), (6, 7), ceil_mode=True),
    "dense": Pool((3, 3), (1, 1), (1, 1), (4, 5)),
    "large": Pool((5, 5), (1, 1), (2, 2), (4, 4)),
}


def defined_maxima(x: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Maxima and the flattened place of each in its plane, N × Ho × Wo × C."""
    maxima, place = F.max_pool2d(x.permute(0, 3, 1, 2).float(), **pool.torch_window, return_indices=True)
    return maxima.permute(0, 2, 3, 1).double(), place.permute(0, 2, 3, 1)


def defined_average(x: Tensor, pool: Pool) -> Tensor:
    """The mean of each output's block."""
    means = [x[:, pool.block(0, y), pool.block(1, w)].double().mean((1, 2)) for y, w in pool.outputs()]
    return torch.stack(means, 1).unflatten(1, pool.out_size)


def has_blocks(pool: Pool) -> bool:
    return all((o - 1) * s < n for o, s, n in zip(pool.out_size, pool.stride, pool.size, strict=True))


# Forward --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of what a mask keeps from being stored
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", [name for name, pool in POOLS.items() if has_blocks(pool)])
def test_maxima_and_the_gates_of_block_averages(name: str, dtype: torch.dtype) -> None:
    pool = POOLS[name]
    x = normal(2, *pool.size, 24, dtype=dtype).abs() + 0.01
    maxima, gate = max_pool_gated(x, **pool.window, out_size=pool.out_size, epsilon=1e-5, block=MEDIUM)
    assert maxima.dtype == gate.dtype == dtype
    assert torch.equal(maxima.double(), defined_maxima(x, pool)[0])
    agree(gate, 1 / (defined_average(x, pool) + 1e-5), BOUND[dtype])


@pytest.mark.parametrize("pool", [max_pool_average, winner_pool])
def test_the_maximum_of_nan_is_nan(pool: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x = normal(2, *RESNET.size, 24)
    x[1, 2, 3, 4] = torch.nan
    maxima, _ = pool(x, **RESNET.window, out_size=RESNET.out_size)
    wanted = F.max_pool2d(x.movedim(-1, 1), **RESNET.torch_window).movedim(1, -1)
    torch.testing.assert_close(maxima, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_signed_stabilizer_follows_the_sign_of_the_average() -> None:
    x = normal(2, *RESNET.size, 24)
    z = defined_average(x, RESNET)
    maxima, gate = max_pool_gated(x, **RESNET.window, out_size=RESNET.out_size, epsilon=0.25, signed=True)
    assert torch.equal(maxima.double(), defined_maxima(x, RESNET)[0])
    agree(gate, 1 / (z + torch.where(z < 0, -0.25, 0.25)), 1e-5)
    _, plain = max_pool_gated(-x.abs() - 1, **RESNET.window, out_size=RESNET.out_size, epsilon=0.25)
    agree(plain, 1 / (defined_average(-x.abs() - 1, RESNET) + 0.25), 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [3, 40])
def test_maxima_and_averages(channels: int, dtype: torch.dtype) -> None:
    x = normal(2, *RESNET.size, channels, dtype=dtype)
    maxima, average = max_pool_average(x, **RESNET.window, out_size=RESNET.out_size, block=SMALL)
    assert (maxima.dtype, average.dtype) == (dtype, torch.float32)
    assert torch.equal(maxima.double(), defined_maxima(x, RESNET)[0])
    agree(average, defined_average(x, RESNET), 1e-6)


def test_padding_never_wins() -> None:
    x = -normal(2, *RESNET.size, 24).abs() - 1
    for maxima, _ in (
        max_pool_gated(x, **RESNET.window, out_size=RESNET.out_size, epsilon=1e-5, block=SMALL),
        winner_pool(x, **RESNET.window, out_size=RESNET.out_size, block=SMALL),
    ):
        assert bool((maxima <= -1).all())


def places_of(winner: Tensor, pool: Pool) -> Tensor:
    """Where in its plane each window's winner lies, from its index in the window."""
    index = winner.long()
    y, x = (
        torch.arange(n, device=DEVICE) * s - p for n, s, p in zip(pool.out_size, pool.stride, pool.padding, strict=True)
    )
    row = y[:, None, None] + index // pool.kernel[1] * pool.dilation[0]
    return row * pool.size[1] + x[:, None] + index % pool.kernel[1] * pool.dilation[1]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_the_first_maximum_of_each_window_wins(name: str, ties: bool) -> None:
    pool = POOLS[name]
    x = normal(2, *pool.size, 24)
    x = x.clamp(min=0).mul(2).round() if ties else x
    maxima, winner = winner_pool(x, **pool.window, out_size=pool.out_size, block=MEDIUM)
    wanted, places = defined_maxima(x, pool)
    assert winner.dtype == torch.uint8
    assert torch.equal(maxima.double(), wanted)
    assert torch.equal(places_of(winner, pool), places)


def test_winners_of_half_precision_and_of_a_large_window() -> None:
    pool = Pool((9, 9), (3, 2), (4, 4), (9, 7))
    x = normal(1, *pool.size, 8, dtype=torch.float16)
    maxima, winner = winner_pool(x, **pool.window, out_size=pool.out_size)
    wanted, places = defined_maxima(x, pool)
    assert torch.equal(maxima.double(), wanted)
    assert torch.equal(places_of(winner, pool), places)


def test_what_a_pool_cannot_do_it_says() -> None:
    x = normal(1, 5, 5, 8)
    big: dict[str, Pair] = {"kernel": (16, 16), "stride": (1, 1), "padding": (8, 8)}
    with pytest.raises(ValueError, match="16 × 16"):
        winner_pool(x, **big, out_size=(6, 6))
    for pool in (max_pool_gated, max_pool_average):
        epsilon = {"epsilon": 1.0} if pool is max_pool_gated else {}
        with pytest.raises(ValueError, match="at most 3"):
            pool(x, kernel=(3, 3), stride=(2, 2), padding=(2, 2), out_size=(4, 4), **epsilon)


# Backward -------------------------------------------------------------------------------------------------------------


def arrivals_at(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Arrival]:
    """Some ways to settle relevance of ``shape`` (2 · N, H, W, C)."""
    images = (shape[0] // 2, *shape[1:])
    pair = normal(*images[:-1], 2 * shape[-1], dtype=dtype)
    return {
        "alone": Arrival((End(),)),
        "gate": Arrival((End(normal(*images, dtype=dtype)),)),
        "everything": Arrival(
            (End(pair, groups=2), End(scale=0.5)), value=normal(*images, dtype=dtype),
            previous=normal(*shape, dtype=dtype), even=normal(*shape[:-1]),
        ),
    }  # fmt: skip


def scattered(relevance: Tensor, places: Tensor, pool: Pool) -> Tensor:
    """Relevance added up at its windows' winners, places being those of each image."""
    maps, channels = relevance.shape[0], relevance.shape[-1]
    index = torch.cat([places] * (maps // places.shape[0])).flatten(1, 2)
    planes = torch.zeros(maps, pool.size[0] * pool.size[1], channels, dtype=torch.float64, device=DEVICE)
    return planes.scatter_add(1, index, relevance.double().flatten(1, 2)).unflatten(1, pool.size)


@pytest.mark.parametrize("name", POOLS)
def test_relevance_goes_to_the_winner(name: str) -> None:
    pool = POOLS[name]
    x = normal(2, *pool.size, 24).clamp(min=0).mul(2).round()  # with ties
    _, winner = winner_pool(x, **pool.window, out_size=pool.out_size)
    relevance = normal(4, *pool.out_size, 24)
    height, width = pool.size
    acc = scattered(relevance, defined_maxima(x, pool)[1], pool)
    for arrival in arrivals_at((4, *pool.size, 24)).values() if name == "resnet" else [Arrival((End(),))]:
        got = winner_backward(relevance, winner, arrival, **pool.window, height=height, width=width, block=MEDIUM)
        agree_all(got, settled(acc, arrival, acc.shape), 1e-5)


def test_relevance_to_winners_is_the_same_every_time() -> None:
    x, relevance = normal(1, *RESNET.size, 24), normal(1, *RESNET.out_size, 24)
    _, winner = winner_pool(x, **RESNET.window, out_size=RESNET.out_size)
    first, second = (
        winner_backward(relevance, winner, Arrival((End(),)), **RESNET.window, height=7, width=6, block=block)[0]
        for block in (MEDIUM, None)
    )
    assert torch.equal(first, second)


def over_blocks(s: Tensor, pool: Pool, divisor: int | None) -> Tensor:
    """Each output's s handed to its block, divided by the block's elements or the divisor."""
    acc = torch.zeros(s.shape[0], *pool.size, s.shape[-1], dtype=torch.float64, device=DEVICE)
    for y, x in pool.outputs():
        block = acc[:, pool.block(0, y), pool.block(1, x)]
        block += s[:, y, x].double()[:, None, None] / (divisor or block.shape[1] * block.shape[2])
    return acc


@pytest.mark.parametrize("divisor", [None, 6], ids=["present", "fixed"])
@pytest.mark.parametrize("name", [name for name, pool in POOLS.items() if has_blocks(pool)])
def test_relevance_goes_to_the_block(name: str, divisor: int | None) -> None:
    pool = POOLS[name]
    s, (height, width) = normal(4, *pool.out_size, 24), pool.size
    acc = over_blocks(s, pool, divisor)
    for arrival in arrivals_at((4, *pool.size, 24)).values() if name == "resnet" else [Arrival((End(),))]:
        got = block_backward(
            s, arrival, stride=pool.stride, height=height, width=width, divisor=divisor or "present", block=MEDIUM
        )
        agree_all(got, settled(acc, arrival, acc.shape), 1e-5)


def test_a_global_average_hands_its_relevance_to_the_whole_plane() -> None:
    s, value = normal(4, 1, 1, 40), normal(2, 3, 5, 40)
    (got,) = block_backward(s, Arrival((End(),), value=value), stride=(3, 5), height=3, width=5)
    agree(got, s.double() / 15 * torch.cat([value.double()] * 2), 1e-5)


def test_inputs_that_no_output_answers_for_get_nothing() -> None:
    s = normal(2, 2, 1, 24)  # of 5 × 3 inputs, those of the last row and column
    (got,) = block_backward(s, Arrival((End(),)), stride=(2, 2), height=5, width=3, divisor=4, block=SMALL)
    assert not got[:, 4].any()
    assert not got[:, :, 2].any()
    agree(got[:, :4, :2], s.double().repeat_interleave(2, 1).repeat_interleave(2, 2) / 4, 1e-5)


def test_pools_answer_in_half_precision() -> None:
    s, arrival = normal(4, *RESNET.out_size, 40, dtype=torch.float16), arrivals_at((4, 7, 6, 40), torch.float16)
    for one in arrival.values():
        got = block_backward(s, one, stride=(2, 2), height=7, width=6)
        agree_all(got, settled(over_blocks(s, RESNET, None), one, (4, 7, 6, 40)), 2e-3)


# Even spread ----------------------------------------------------------------------------------------------------------


def defined_spread(dead: Tensor, pool: Pool, out_size: Pair, channels: int) -> Tensor:
    even = torch.zeros(dead.shape[0], *pool.size, dtype=torch.float64, device=DEVICE)
    for y in range(out_size[0]):
        for x in range(out_size[1]):
            rows, columns = pool.axis(0, y), pool.axis(1, x)
            for row in rows:
                for column in columns:
                    even[:, row, column] += dead[:, y, x].double().sum(-1) / (len(rows) * len(columns) * channels)
    return even


CONVOLUTIONS = {
    **POOLS,
    "stem": Pool((7, 7), (2, 2), (3, 3), (8, 5)),
    "pointwise": Pool((1, 1), (1, 1), (0, 0), (3, 5)),
    "pointwise, strided": Pool((1, 1), (2, 2), (0, 0), (5, 6)),
}


def conv_size(pool: Pool) -> Pair:
    weight = torch.empty(1, 1, *pool.kernel)
    shape = F.conv2d(torch.empty(1, 1, *pool.size), weight, None, pool.stride, pool.padding, pool.dilation).shape
    return shape[2], shape[3]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_dead_relevance_is_spread_evenly(name: str) -> None:
    pool = CONVOLUTIONS[name]
    out_size = conv_size(pool)
    dead = normal(3, *out_size, 24)
    even = spread(dead, **pool.window, height=pool.size[0], width=pool.size[1], channels=5, block=64)
    assert even.dtype == torch.float32
    agree(even, defined_spread(dead, pool, out_size, 5), 1e-5)
    inside = [bool(pool.axis(0, y) and pool.axis(1, x)) for y in range(out_size[0]) for x in range(out_size[1])]
    if all(inside):
        torch.testing.assert_close(even.double().sum() * 5, dead.double().sum(), rtol=1e-4, atol=1e-4)


def test_windows_without_inputs_spread_nothing() -> None:
    pool = Pool((1, 1), (1, 1), (2, 1), (3, 4))
    dead = normal(2, *conv_size(pool), 8)
    even = spread(dead, **pool.window, height=3, width=4, channels=3)
    agree(even, dead[:, 2:5, 1:5].double().sum(-1) / 3, 1e-5)


# On a GPU -------------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(112, 112), (113, 97)])
def test_pools_at_full_size(size: Pair, dtype: torch.dtype) -> None:
    pool = Pool((3, 3), (2, 2), (1, 1), size)
    height, width = size
    x = normal(8, *size, 64, dtype=dtype).abs() + 0.01
    maxima, gate = max_pool_gated(x, **pool.window, out_size=pool.out_size, epsilon=1e-5)
    wanted, places = defined_maxima(x, pool)
    assert torch.equal(maxima.double(), wanted)
    agree(gate, 1 / (defined_average(x, pool) + 1e-5), BOUND[dtype])
    _, winner = winner_pool(x, **pool.window, out_size=pool.out_size)
    assert torch.equal(places_of(winner, pool), places)
    relevance = normal(16, *pool.out_size, 64, dtype=dtype)
    arrival = arrivals_at((16, *size, 64), dtype)["everything"]
    got = winner_backward(relevance, winner, arrival, **pool.window, height=height, width=width)
    agree_all(got, settled(scattered(relevance, places, pool), arrival, (16, *size, 64)), BOUND[dtype])
    got = block_backward(relevance, arrival, stride=(2, 2), height=height, width=width)
    agree_all(got, settled(over_blocks(relevance, pool, None), arrival, (16, *size, 64)), BOUND[dtype])
    even = spread(relevance, **pool.window, height=height, width=width, channels=64)
    agree(even, defined_spread(relevance, pool, pool.out_size, 64), 1e-5)
