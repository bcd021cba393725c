"""What the whole-network table explains: networks, precisions, batches and composites, by importance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from contenders import noise
from kernel_bench import DTYPES
from lrp_fast import list_composites
from report import COLUMNS

BOUNDS = {"bfloat16": 2e-2, "float32": 1e-5, "tf32": 5e-3}
"""The largest relative L2 error of a heatmap against the float64 reference, for composites of positive products."""
POSITIVE = ("otsuki2024", "conserving")
CANCELLING_BOUNDS = {"bfloat16": None, "float32": 1e-3, "tf32": None}
"""The same for rules whose products cancel: they have poles, and where one is hit in low precision nothing is promised."""
BATCHES = (256, 32, 1)


@dataclass(frozen=True)
class Setting:
    """What is explained, and how."""

    network: str
    precision: str
    batch: int
    composite: str = "otsuki2024"

    def __str__(self) -> str:
        return f"{self.key} {self.precision}"

    @property
    def key(self) -> str:
        """The row in its precision's table."""
        return f"{self.network}/{self.composite}/{self.batch}"

    @property
    def bound(self) -> float | None:
        """The largest relative error allowed."""
        return (BOUNDS if self.composite in POSITIVE else CANCELLING_BOUNDS)[self.precision]


HEADLINE, SINGLE = Setting("resnet50", "bfloat16", 256), Setting("resnet50", "bfloat16", 1)
SECOND = Setting("resnet50", "float32", 32)
COMPILED = (HEADLINE, SECOND)
"""Where time is short, only these have compiled columns."""
TUNED = (HEADLINE, SINGLE)
"""Where time is short, only these are tuned."""
FIRST = 2
"""How many settings, of the most important ones, have columns that are measured before all else."""
FIRST_COLUMNS = ("forward", "torch", "triton")


def settings(dry: bool, full: bool) -> list[Setting]:
    """All settings, by importance, so that a cut loses the least."""
    if dry:
        return [Setting("cifar", "float32", 2), Setting("cifar", "tf32", 1)]
    first = [HEADLINE, SINGLE, SECOND]
    first += [Setting(network, "bfloat16", 256) for network in ("resnet18", "resnet101")]
    every = product(("resnet50", "resnet18", "resnet101"), ("bfloat16", "tf32", "float32"), BATCHES)
    rest = sorted(every, key=lambda setting: BATCHES.index(setting[2]) + 1.5 * (setting[0] != "resnet50"))
    found = dict.fromkeys([*first, *(Setting(*setting) for setting in rest)])
    if full:
        others = [name for name in list_composites() if name != "otsuki2024"]
        found |= dict.fromkeys(Setting(*setting, composite) for composite in others for setting in rest)
    return list(found)


def columns_of(setting: Setting, dry: bool, full: bool, first: bool = False) -> list[str]:
    """What is measured in a setting, or of it ``first``. The peers have one composite each, shown beside ours of the method."""
    left_out = set() if full or setting in COMPILED else {"forward compiled", "torch compiled"}
    if setting.composite != "otsuki2024":
        left_out |= {"forward", "forward compiled", "zennit", "captum"}
    if dry:
        left_out |= {"triton tuned", "triton + graph"}
    if first:
        left_out |= {*COLUMNS} - {*FIRST_COLUMNS, *(["triton + graph"] if setting.batch == 1 else [])}
    return [name for name in COLUMNS if name not in left_out]


# Images -----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def images(device: torch.device, precision: str, batch: int, side: int) -> Tensor:
    """Noise in the compute dtype, channels last; the first images are the same in every batch."""
    return noise(batch, side, DTYPES[precision], device).contiguous(memory_format=torch.channels_last)
