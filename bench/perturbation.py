"""What insertion and deletion cost beside the forward passes they need.

In turn, in one process: the metric on some pictures, and plain forward passes of as many pictures in the same batches.
``python bench/perturbation.py`` prints the ratio of medians and writes ``results/perturbation-<network>-<device>-<versions>.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import torchvision
import typer
from torch import Tensor, nn

import records
from limits import interleaved
from lrp_fast.metrics import insertion_deletion

ORDERS = ("rank", "threshold")


def measure(
    name: str, images: int, step: int, batch_size: int, seconds: float, device: torch.device
) -> dict[str, object]:
    """The metric's time over that of its forward passes, for each order of pixels."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval().to(device)
    pictures = torch.randn(images, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    heatmaps = torch.randn(images, 224, 224, device=device)
    labels = torch.randint(1000, (images,), device=device)

    def metric(order: str) -> int:
        result = insertion_deletion(model, pictures, heatmaps, labels, step=step, order=order, batch_size=batch_size)
        return result.forward_passes

    passes = {order: metric(order) for order in ORDERS}
    runs: dict[str, Callable[[], object]] = {order: partial(metric, order) for order in ORDERS}
    runs |= {f"forward {order}": _plain(model, pictures, passes[order], batch_size) for order in ORDERS}
    taken = interleaved(runs, device, seconds)
    return {
        "model": name,
        "images": images,
        "step": step,
        "batch_size": batch_size,
        "forward_passes": passes,
        "metric_over_forward": {order: round(taken[order] / taken[f"forward {order}"], 4) for order in ORDERS},
    }


def _plain(model: nn.Module, pictures: Tensor, passes: int, batch_size: int) -> Callable[[], None]:
    """So many pictures through the model in batches, which are formed beforehand."""
    batch = pictures[:1].expand(batch_size, -1, -1, -1).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.inference_mode():
            for first in range(0, passes, batch_size):
                model(batch[: passes - first])

    return run


def main(
    network: Annotated[str, typer.Option(help="of torchvision, with random weights")] = "resnet50",
    images: int = 4,
    step: Annotated[int, typer.Option(help="pixels changed from one forward pass to the next")] = 3136,
    batch_size: int = 32,
    seconds: Annotated[float, typer.Option(help="for the repeats")] = 60.0,
) -> None:
    """Measure, print and write the result."""
    if network not in torchvision.models.list_models():
        raise typer.BadParameter(f"unknown network {network!r}; expected a name of torchvision's")
    result = measure(network, images, step, batch_size, seconds, records.torch_device())
    print(json.dumps(result, indent=2))
    print(records.save(f"perturbation-{network}-{records.device_name()}", records.stamp() | result))


application = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
application.command()(main)

if __name__ == "__main__":
    application()
