"""Trains the embedded network on drawn pictures, on the CPU, in minutes: ``python -m lrp_fast.embedded.training``.

Most epochs run at a quarter of the pixels; a few at full size then adapt the network to what it will see. Orientation
and colour mean nothing in this data set, so each batch is turned, flipped and has its channels permuted at random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from .drawing import CLASSES, draw, draw_batch
from .network import MEAN, STD, WEIGHTS_PATH, EmbeddedResNet, network_input, save_weights
from .pictures import PICTURE_SEED, PICTURES_FOLDER, write_embedded_pictures

VALIDATION_SEED = 1_000_003
FULL_SIZE = 224
SMALL_SIZE = 112
BATCH_SIZE = 64


@dataclass(frozen=True)
class TrainingArguments:
    """What decides the trained weights, on one machine and torch version.

    ``pictures`` are drawn at 112 pixels and seen ``epochs`` times; a quarter of them, at 224 pixels, is then seen a
    quarter as often. ``validation_pictures`` are held out, drawn at 224 pixels from ``VALIDATION_SEED``.
    """

    seed: int = 0
    pictures: int = 10_000
    epochs: int = 20
    validation_pictures: int = 400


@dataclass(frozen=True)
class _Phase:
    """Epochs at one resolution under one cycle of the learning rate."""

    size: int
    pictures: int
    epochs: int
    learning_rate: float


def train(arguments: TrainingArguments, output: Path, console: Console | None = None) -> float:
    """Train, validate and write the weights to ``output`` (safetensors); returns the validation accuracy, 0 to 1.

    Raises ValueError if the seed belongs to held-out pictures or fewer than 2 pictures or 1 epoch are asked for.
    """
    if arguments.seed in (VALIDATION_SEED, PICTURE_SEED):
        raise ValueError(f"got seed {arguments.seed}, expected one not held out ({VALIDATION_SEED}, {PICTURE_SEED})")
    if arguments.pictures < 2 or arguments.epochs < 1 or arguments.validation_pictures < 1:
        raise ValueError(f"expected at least 2 pictures, 1 epoch and 1 validation picture, got {arguments}")
    phases = (
        _Phase(SMALL_SIZE, arguments.pictures, arguments.epochs, 4e-3),
        _Phase(FULL_SIZE, max(arguments.pictures // 4, 2), max(arguments.epochs // 4, 1), 1e-3),
    )
    torch.manual_seed(arguments.seed)
    generator = np.random.default_rng(arguments.seed)
    network = EmbeddedResNet().to(memory_format=torch.channels_last)
    text = TextColumn("{task.description}")
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(text, BarColumn(), MofNCompleteColumn(), *times, console=console) as progress:
        for phase in phases:
            images, labels = _draw_with_progress(arguments.seed, phase, progress)
            _train_phase(network, phase, images, labels, generator, progress)
    validated = accuracy(network, VALIDATION_SEED, arguments.validation_pictures)
    metadata: dict[str, object] = {
        "classes": CLASSES,
        "validation_accuracy": validated,
        "validation_seed": VALIDATION_SEED,
        "mean": MEAN,
        "std": STD,
        "size": FULL_SIZE,
        "arguments": asdict(arguments),
        "torch": torch.__version__,
    }
    save_weights(network, output, metadata)
    return validated


def accuracy(network: nn.Module, seed: int, pictures: int) -> float:
    """Share (0 to 1) that the network gets right of pictures 0 .. ``pictures`` - 1 of ``seed``, at 224 pixels.

    The network runs in eval mode and is put back into the mode it was in.
    """
    was_training = network.training
    network.eval()
    right = 0
    for start in range(0, pictures, BATCH_SIZE):
        images, labels = draw_batch(seed, range(start, min(start + BATCH_SIZE, pictures)), FULL_SIZE)
        with torch.inference_mode():
            predicted = network(network_input(images)).argmax(1)
        right += int((predicted == torch.from_numpy(labels)).sum())
    network.train(was_training)
    return right / pictures


def _draw_with_progress(
    seed: int, phase: _Phase, progress: Progress
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    images = np.empty((phase.pictures, phase.size, phase.size, 3), dtype=np.uint8)
    indices = progress.track(range(phase.pictures), description=f"draw at {phase.size}")
    for index in indices:
        images[index] = draw(seed, index, phase.size).image
    return images, np.arange(phase.pictures, dtype=np.int64) % len(CLASSES)


def _train_phase(
    network: nn.Module,
    phase: _Phase,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    generator: np.random.Generator,
    progress: Progress,
) -> None:
    """Train in place: AdamW, one cycle of the learning rate, cross-entropy with smoothed labels."""
    batch_size = min(BATCH_SIZE, phase.pictures)
    steps = phase.epochs * (phase.pictures // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=phase.learning_rate, weight_decay=0.05)
    # OneCycleLR divides by zero if its way up is a single step.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=phase.learning_rate, total_steps=max(steps, 8), pct_start=0.25
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    task = progress.add_task(f"train at {phase.size}", total=steps)
    network.train()
    smooth_loss = float(np.log(len(CLASSES)))
    for rows in _shuffled_batches(phase, batch_size, generator):
        inputs = _augment(network_input(images[rows]), generator).contiguous(memory_format=torch.channels_last)
        loss = criterion(network(inputs), torch.from_numpy(labels[rows]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        smooth_loss += 0.05 * (loss.item() - smooth_loss)
        progress.update(task, advance=1, description=f"train at {phase.size}, loss {smooth_loss:.3f}")


def _shuffled_batches(
    phase: _Phase, batch_size: int, generator: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Rows of each batch, every epoch in a new order; the remainder of an epoch is left out."""
    for _ in range(phase.epochs):
        order = generator.permutation(phase.pictures)
        for start in range(0, phase.pictures - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _augment(inputs: Tensor, generator: np.random.Generator) -> Tensor:
    """Turn, flip and recolour a whole batch [N, 3, S, S] by one random quarter turn, flip and channel permutation."""
    inputs = torch.rot90(inputs, int(generator.integers(4)), (2, 3))
    if generator.random() < 0.5:
        inputs = inputs.flip(3)
    return inputs[:, torch.from_numpy(generator.permutation(3))]


def _parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    defaults = TrainingArguments()
    parser = argparse.ArgumentParser(prog="python -m lrp_fast.embedded.training", description=__doc__)
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the training pictures and initial weights")
    parser.add_argument("--pictures", type=int, default=defaults.pictures, help="training pictures to draw")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="passes at the small size")
    parser.add_argument("--validation-pictures", type=int, default=defaults.validation_pictures)
    parser.add_argument("--output", type=Path, default=WEIGHTS_PATH, help="safetensors file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads for torch")
    parser.add_argument(
        "--pictures-only", action="store_true", help=f"only redraw the committed pictures, in {PICTURES_FOLDER}"
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Command line: train and write the weights, or with ``--pictures-only`` redraw the committed pictures."""
    options = _parse_arguments(words)
    console = Console()
    if options.pictures_only:
        console.print(f"wrote {len(write_embedded_pictures(PICTURES_FOLDER))} pictures to {PICTURES_FOLDER}")
        return
    torch.set_num_threads(options.threads)
    arguments = TrainingArguments(options.seed, options.pictures, options.epochs, options.validation_pictures)
    started = time.perf_counter()
    validated = train(arguments, options.output, console)
    minutes = (time.perf_counter() - started) / 60.0
    console.print(f"validation accuracy {validated:.4f} on {arguments.validation_pictures} pictures")
    console.print(f"wrote {options.output} after {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
