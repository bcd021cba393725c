"""Which of two ways serves a convolution, and with which tiles: a default, or what was measured on this device.

Measured choices are kept as JSON, one file for each device and set of versions, under
:func:`~lrp_fast.environment.cache_folder`.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

import torch
import triton

from lrp_fast.environment import cache_folder
from lrp_fast.kernels.pointwise_conv import Blocks
from lrp_fast.version import VERSION

Way = Literal["fused", "library", "divided", "kept"]
Direction = Literal["forward", "backward", "merge", "gates"]
"""Of a convolution's pass; ``merge``: forward, where its output meets another branch; ``gates``: of a merge that its message
goes to, forward there and backward."""


@dataclass(frozen=True)
class Task:
    """One direction of one convolution, as far as its speed depends on it.

    ``epilogue``: forward, how its output becomes gates, and at a merge the split; backward, what its message is settled
    with. ``beside``: inputs and weight of the linear layer that ends the other branch of a merge, if one does.
    """

    kernel: Literal["pointwise", "spatial"]
    direction: Direction
    batch: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    size: tuple[int, ...]
    groups: int
    stacks: int
    dtype: str
    precision: str
    epilogue: str = ""
    beside: tuple[tuple[int, ...], ...] = ()

    @property
    def key(self) -> str:
        """The task as text."""
        return "-".join(str(value).replace(" ", "") for value in asdict(self).values())


@dataclass(frozen=True)
class Choice:
    """``fused``: a kernel with the pass in its epilogue; ``library``: the library's convolution, the pass behind it.

    Of a merge's gates, ``kept``: written forward and read backward; ``divided``: the denominator multiplied again.
    """

    way: Way
    blocks: Blocks | None = None


@dataclass
class Choices:
    """The choices for one device: :meth:`of` a task what was measured, else the default.

    Without a measurement 1×1 convolutions, where the library has no advantage, are fused, and others are the library's; gates
    of a merge are divided, where they can be.
    """

    path: pathlib.Path | None = None
    measured: dict[str, Choice] = field(default_factory=dict)
    defaults: dict[str, Way] = field(default_factory=lambda: {"pointwise": "fused", "spatial": "library"})

    @classmethod
    def of_device(cls, device: torch.device) -> Choices:
        """With what was measured on this device before."""
        if device.type != "cuda":
            return cls()
        name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
        versions = f"torch{torch.__version__}-triton{triton.__version__}-lrp_fast{VERSION}"
        return cls.read(cache_folder() / f"{name}-{versions}.json")

    @classmethod
    def read(cls, path: pathlib.Path) -> Choices:
        """With what is kept at ``path``, if anything; ``ValueError`` for a file that does not hold choices."""
        choices = cls(path)
        if path.exists():
            try:
                entries = json.loads(path.read_text())
                choices.measured = {key: _choice(entry) for key, entry in entries.items()}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{path} does not hold measured choices ({error}); delete it to measure again"
                ) from error
        return choices

    def of(self, task: Task) -> Choice:
        """The choice for a task."""
        default = "divided" if task.direction == "gates" else self.defaults[task.kernel]
        return self.measured.get(task.key) or Choice(default)

    def keep(self, task: Task, choice: Choice) -> None:
        """Remember a measured choice, on disk too, beside what other processes have put there meanwhile."""
        self.measured[task.key] = choice
        if self.path is None:
            return
        self.measured = Choices.read(self.path).measured | self.measured
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries = {key: asdict(value) for key, value in sorted(self.measured.items())}
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
            json.dump(entries, file, indent=1)
        pathlib.Path(file.name).replace(self.path)


def _choice(entry: dict[str, object]) -> Choice:
    way, blocks = entry["way"], entry["blocks"]
    if way not in get_args(Way):
        raise ValueError(f"unknown way {way!r}")
    return Choice(way, Blocks(**blocks) if isinstance(blocks, dict) else None)  # type: ignore[arg-type]
