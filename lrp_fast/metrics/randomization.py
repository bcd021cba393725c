"""Sanity check by model-parameter randomisation (Adebayo et al. 2018, *Sanity Checks for Saliency Maps*, §3).

A method that explains the model gives other maps when the model's weights are replaced by random ones. Layer after layer
is initialised afresh, the one nearest the output first, and the maps are compared with the trained model's.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lrp_fast.metrics.checks import Progress, check_count, check_heatmaps
from lrp_fast.trace import check_eval

_LAYERS = (_ConvNd, nn.Linear)
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class RandomizationCurve:
    """How similar each image's map remains to the trained model's; float64 on the CPU, stages × N.

    - ``stages``: the layer initialised afresh at each stage, from the output to the input
    - ``spearman``: rank correlation of the maps' values (ties share their mean rank)
    - ``spearman_magnitude``: the same of absolute values, which does not see a change of sign
    - ``cosine``: the cosine between the maps

    NaN where one of the maps is constant (for the cosine: zero), since nothing can be compared then.
    """

    stages: tuple[str, ...]
    spearman: Tensor
    spearman_magnitude: Tensor
    cosine: Tensor


def parameter_randomization(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    method: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    cascading: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> RandomizationCurve:
    """Compare a method's maps of a model with those of the same model with random weights, layer after layer.

    Parameters
    ----------
    model
        In eval mode. A deep copy is randomised; the model itself is never changed.
    images, target
        N×C×H×W on the model's device and N int64: what is explained at every stage, so also a class that the random
        network does not predict.
    method
        Any function ``(model, images, target) → heatmaps N×H×W``.
    cascading
        Whether layers stay random while those before them become so; if not, one layer is random at a time.
    seed
        Of the weights. A layer draws the same ones whatever the device and whether cascading or not.
    progress
        Called after each stage with the stages done and their number.

    A stage is a convolution or linear layer, in the order in which the model runs them, with the normalisation layers
    that run between it and the next. They get PyTorch's own initialisation. That of a batch norm includes its statistics:
    those of the trained weights would not fit a random layer and could leave nothing but zeros behind the next ReLU.
    What has no parameters (a frozen batch norm too) stays as it is.

    Raises
    ------
    ValueError, TypeError
        A model in training mode or with parameters in other kinds of layers; maps of another shape than N×H×W or not finite.
    """
    check_eval(model)
    check_count("seed", seed, 0)
    original = _maps(method, model, images, target, "the trained model")
    network = copy.deepcopy(model)
    stages = _stages(network, images[:1])
    similarities = []
    for number, names in enumerate(stages, 1):
        if not cascading:
            network.load_state_dict(model.state_dict())
        _randomize(network, names, seed)
        maps = _maps(method, network, images, target, f"the model randomised at {names[0]}", original.shape)
        similarities.append([_spearman(original, maps), _spearman(original.abs(), maps.abs()), _cosine(original, maps)])
        if progress is not None:
            progress(number, len(stages))
    spearman, magnitude, cosine = (torch.stack(each) for each in zip(*similarities, strict=True))
    return RandomizationCurve(tuple(names[0] for names in stages), spearman, magnitude, cosine)


def _stages(network: nn.Module, image: Tensor) -> list[list[str]]:
    """The names of the modules of each stage, the layer first, from the output to the input."""
    kinds = (*_LAYERS, *_NORMS)
    modules = dict(network.named_modules())
    strange = [
        f"{name or 'the model'} ({type(module).__name__})"
        for name, module in modules.items()
        if not isinstance(module, kinds) and next(module.parameters(recurse=False), None) is not None
    ]
    if strange:
        raise ValueError(
            f"no known initialisation of {', '.join(strange[:5])}: expected parameters only in convolutions, linear layers "
            "and normalisations"
        )
    run: dict[str, None] = {}

    def note(name: str) -> None:
        run.pop(name, None)  # a layer that runs twice has the place of its last run
        run[name] = None

    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: note(name))
        for name, module in modules.items()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        network(image)
    for handle in handles:
        handle.remove()
    stages: list[list[str]] = []
    for name in run:
        if isinstance(modules[name], _LAYERS) or not stages:
            stages.append([name])
        else:
            stages[-1].append(name)
    if not stages:
        raise ValueError("the model has no layer with weights: there is nothing to randomise")
    return stages[::-1]


def _randomize(network: nn.Module, names: list[str], seed: int) -> None:
    """Give these modules the weights of new ones, drawn on the CPU from the seed and the module's name."""
    for name in names:
        module = network.get_submodule(name)
        fresh = copy.deepcopy(module).cpu()
        assert isinstance(fresh, (*_LAYERS, *_NORMS))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            fresh.reset_parameters()
        module.load_state_dict(fresh.state_dict())


def _maps(
    method: Callable[[nn.Module, Tensor, Tensor], Tensor],
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    of: str,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """The method's maps, float64 N×H×W, checked (and to be of ``shape``, where given)."""
    maps = method(model, images, target)
    try:
        check_heatmaps(maps)
    except (TypeError, ValueError) as error:
        raise type(error)(f"of {of}: {error}") from error
    expected = list(shape or (len(images), *maps.shape[1:]))
    if list(maps.shape) != expected:
        raise ValueError(f"of {of}: expected heatmaps of shape {expected}, got {list(maps.shape)}")
    return maps.detach().double()


# Similarity of maps N×H×W, for each image.


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    return _cosine(_centred_ranks(a), _centred_ranks(b))


def _centred_ranks(values: Tensor) -> Tensor:
    """Ranks [N, pixels] less their mean, ties at their mean rank: multiples of ½, so that a constant map is exactly 0."""
    values = values.flatten(1)
    ordered = values.sort(dim=1).values
    below, upto = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + upto - values.shape[1]).double() / 2


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1), b.flatten(1)
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).cpu()
