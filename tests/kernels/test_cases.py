"""The cases of bench/cases.py: kernels equal plain torch on them, and they are what an explanation launches."""

from __future__ import annotations

import pathlib
import sys
from collections import Counter

import pytest
import torch
import torchvision

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench"))

from cases import kernel_cases, small_cases
from kernel_bench import DTYPES, Row
from predict import KERNELS, Recorder, recorded

CPU = torch.device("cpu")


ROWS = [
    Row(case, precision, compiled=False)
    for precision in DTYPES
    for case in small_cases()
    if precision != "tf32" or "_conv." in case.kernel
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run on the GPU here, where `make gpu-check` compares them"
)
def test_a_kernel_equals_plain_torch(row: Row) -> None:
    prepared = row.case.build(CPU, DTYPES[row.precision], 2, row.product)
    got, wanted = list(prepared.run()), list(prepared.eager())
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in wanted]
    for one, other in zip(got, wanted, strict=True):
        error, norm = float((one.double() - other.double()).norm()), float(other.double().norm())
        assert error <= (1e-5 if row.precision == "float32" else row.bound) * norm, (error, norm)


def test_the_cases_are_what_an_explanation_launches() -> None:
    """Of a ResNet-50 in bfloat16: as many launches of each kernel, which move as many bytes and multiply as much."""
    launches, moved, multiplied = Counter[str](), Counter[str](), Counter[str]()
    for one in recorded(torchvision.models.resnet50().eval(), (4, 3, 224, 224)).passes:
        if one.name in KERNELS.values():
            launches[one.name] += 1
            moved[one.name] += one.bytes
            multiplied[one.name] += one.flops
    counted, bytes_moved, flops = Counter[str](), Counter[str](), Counter[str]()
    for case in kernel_cases():
        if case.count:
            prepared = case.build(torch.device("meta"), torch.bfloat16, 4, "ieee")
            counted[case.kernel] += case.count
            bytes_moved[case.kernel] += case.count * prepared.bytes
            flops[case.kernel] += case.count * prepared.flops
    assert counted == launches
    assert flops == multiplied
    assert {name: pytest.approx(moved[name], rel=1e-3) for name in moved} == bytes_moved


def test_an_explanation_holds_little_memory() -> None:
    """At most 60 MB an image in bfloat16, all it keeps for the backward pass, and as much again in float32."""
    model = torchvision.models.resnet50().eval()
    peaks = [recorded(model, (256, 3, 224, 224), dtype).peak / 256 for dtype in (torch.bfloat16, torch.float32)]
    assert 20e6 < peaks[0] < 60e6
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.01)


def test_recorded_memory_is_what_is_held_at_once() -> None:
    with Recorder() as recorder:
        first = torch.empty(1000, dtype=torch.uint8)
        second = first.clone()
        del first
        third = second + 1
        view = third[:10]
        del second, third
        fourth = torch.empty(100, dtype=torch.uint8)
    assert recorder.peak == 2000
    assert sum(recorder.held.values()) == 1100
    del view, fourth
    assert not recorder.held
