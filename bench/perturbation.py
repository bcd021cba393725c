"""What insertion and deletion cost beside the forward passes they need.

In turn, several times in one process: the metric on some pictures, and plain forward passes of as many pictures in the same
batches. ``python bench/perturbation.py`` prints the ratio of medians and writes ``results/perturbation-<device>-....json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import get_model

import records
from lrp_fast.metrics import insertion_deletion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50", help="of torchvision, with random weights")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--step", type=int, default=3136)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.images, arguments.step, arguments.batch_size, arguments.rounds)
    print(json.dumps(result, indent=2))
    records.save(f"perturbation-{arguments.model}-cpu-{platform.machine()}", result)


def measure(name: str, images: int, step: int, batch_size: int, rounds: int) -> dict[str, object]:
    """Seconds of both by turns, as ratios, for each protocol."""
    torch.manual_seed(0)
    model = get_model(name).eval()
    pictures = torch.randn(images, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    heatmaps, labels = torch.randn(images, 224, 224), torch.randint(1000, (images,))
    ratios: dict[str, float] = {}
    passes: dict[str, int] = {}
    for order in ("rank", "threshold"):

        def metric(order: str = order) -> int:
            result = insertion_deletion(
                model, pictures, heatmaps, labels, step=step, order=order, batch_size=batch_size
            )
            return result.forward_passes

        passes[order] = metric()
        plain = _plain(model, pictures, passes[order], batch_size)
        plain()
        times = [(_seconds(metric), _seconds(plain)) for _ in range(rounds)]
        ratios[order] = statistics.median(a for a, _ in times) / statistics.median(b for _, b in times)
    return {
        "model": name,
        "images": images,
        "step": step,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "forward_passes": passes,
        "metric_over_forward": {order: round(ratio, 4) for order, ratio in ratios.items()},
    }


def _plain(model: nn.Module, pictures: Tensor, passes: int, batch_size: int) -> Callable[[], None]:
    """So many pictures through the model in batches, which are formed beforehand."""
    batch = pictures[:1].expand(batch_size, -1, -1, -1).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.inference_mode():
            for first in range(0, passes, batch_size):
                model(batch[: passes - first])

    return run


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
