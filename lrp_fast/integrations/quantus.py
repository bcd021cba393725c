"""Quantus: any of our methods as its ``explain_func``.

import quantus
from lrp_fast.integrations.quantus import explain

metric = quantus.Sparseness()
metric(model=model, x_batch=x, y_batch=y, explain_func=explain, explain_func_kwargs={"method": "otsuki2024"})

Quantus itself is not imported here. What its metrics need is said in ``examples/quantus_metrics.py``.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lrp_fast.methods import Method, checked_heatmaps, find_method


def explain(
    model: nn.Module,
    inputs: npt.NDArray[np.floating],
    targets: npt.NDArray[np.integer],
    *,
    method: str | Method = "otsuki2024",
    device: str | torch.device | None = None,
) -> npt.NDArray[np.float32]:
    """Heatmaps float32 N×1×H×W of ``inputs`` N×C×H×W, normalised, for the classes ``targets`` [N].

    ``method``: a name of :func:`lrp_fast.methods.list_methods`, or any :class:`~lrp_fast.methods.Method`.
    ``device``: where to compute; Quantus fills it in if its metric was given one. The model must be there already; by
    default it is where the model is. ``quantus.evaluate`` passes its own names of methods on, so they must be ours.

    Raises ``ValueError`` for an unknown method, a model on another device, inputs or targets of another shape, and maps
    that are not finite; ``TypeError`` for a keyword that is not one of these, targets that are no integers, or a model
    that is none of PyTorch's.
    """
    chosen = _named(method) if isinstance(method, str) else method
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    weight = next(model.parameters(), torch.empty(0))
    place = weight.device if device is None else _device(device, weight.device)
    labels = np.asarray(targets)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"expected targets as integers, one class for each input, got {labels.dtype}")
    images = torch.as_tensor(np.asarray(inputs), dtype=weight.dtype, device=place)
    target = torch.as_tensor(labels, dtype=torch.int64, device=place)
    heatmaps = checked_heatmaps(chosen(model, images, target), images)
    finite = heatmaps.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"the heatmap of input {int((~finite).nonzero()[0])} holds values that are NaN or infinite")
    return heatmaps[:, None].cpu().numpy()


@functools.lru_cache(maxsize=4)
def _named(name: str) -> Method:
    """A metric calls for every batch: a method kept from call to call traces the model once."""
    return find_method(name)


def _device(device: str | torch.device, found: torch.device) -> torch.device:
    """``device``, checked to be where the model is."""
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"expected a device such as 'cpu' or 'cuda:0', got {device!r}") from error
    if wanted.type != found.type or wanted.index not in (None, found.index):
        raise ValueError(f"the model is on {found}, but the device asked for is {wanted}; move the model there first")
    return found
