"""Whether a model still is what was read of it.

Asked before every explanation, so through the tables of modules, which take a tenth of the time of their attributes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from lrp_fast.plan import Plan

_CONSTANTS = (bool, int, float, str, type(None), type, FunctionType, BuiltinFunctionType, MethodType)
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}
"""What torch keeps in every module: tensors, children and hooks, which are looked at by themselves."""
Place = tuple[dict[str, Any], str]
"""A module's table of parameters or buffers, and a name in it."""

_steps = WeakTensorKeyDictionary()
"""How many steps of optimizers that torch does not count as writes a tensor has taken."""


class Watch:
    """A model as it was traced: its modules, their mode, settings and forward hooks, and the tensors that a plan names.

    Settings are attributes that are numbers, text, functions or classes, or tuples or lists of these: a stride, say.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        _count_steps()
        self._modules = [_Module.of(module) for module in model.modules()]
        tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
        self._absent = [(table, name) for table in tables for name, value in table.items() if value is None]
        self._places = _places(model, plan) + _counters(model, plan)
        self._tied = _tied(tables)

    def changed(self) -> bool:
        """Whether a trace might find something else than it did."""
        try:
            for module, kind, read, settings, children, hooked, replaced in self._modules:
                own = vars(module)
                if (
                    type(module) is not kind
                    or read(own) != settings
                    or own["_modules"] != children
                    or _is_hooked(own) is not hooked
                    or ("forward" in own) is not replaced
                ):
                    return True
        except (KeyError, RuntimeError, ValueError):  # a setting is gone, or an array now, which is not compared as a whole
            return True
        come = any(table.get(name) is not None for table, name in self._absent)
        apart = any(table.get(name) is not other.get(its) for (table, name), (other, its) in self._tied)
        return come or apart or any(table.get(name) is None for _, table, name in self._places)

    def state(self) -> list[tuple[int, int, torch.Size]]:
        """Where each tensor lies, how often it was written to, which inference tensors do not count, and its shape.

        As long as :func:`parameter_table` is held, so that no others can be where they were, equal for equal values.
        """
        tensors = [table[name] for _, table, name in self._places]
        steps = _steps if len(_steps) else {}
        return [(x.data_ptr(), 0 if x.is_inference() else x._version + steps.get(x, 0), x.shape) for x in tensors]


def parameter_table(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The tensors a plan's layers name, by path, detached; they share the model's memory."""
    return {path: table[name].detach() for path, table, name in _places(model, plan)}


def hooked(model: nn.Module) -> list[str]:
    """Which modules have forward hooks."""
    return [name or "the model" for name, module in model.named_modules() if _is_hooked(vars(module))]


class _Module(NamedTuple):
    """A module and what it was: its class, settings (and how to read them again), children, and forwards of its own."""

    module: nn.Module
    kind: type
    read: Callable[[dict[str, Any]], object]
    settings: tuple[object, ...]
    children: dict[str, nn.Module | None]
    hooked: bool
    replaced: bool

    @staticmethod
    def of(module: nn.Module) -> _Module:
        own = vars(module)
        # "training" twice: of one name an itemgetter gives no tuple.
        read = itemgetter("training", *(name for name, value in own.items() if _is_setting(name, value)))
        settings = tuple([*value] if isinstance(value, list) else value for value in read(own))
        hooked, replaced = _is_hooked(own), "forward" in own
        return _Module(module, type(module), read, settings, dict(own["_modules"]), hooked, replaced)


def _is_setting(name: str, value: object) -> bool:
    held = value if isinstance(value, list) else [value]
    return name not in _TORCHS_OWN and all(map(_is_constant, held))


def _is_constant(value: object) -> bool:
    return isinstance(value, _CONSTANTS) or (isinstance(value, tuple) and all(map(_is_constant, value)))


def _is_hooked(own: dict[str, Any]) -> bool:
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


def _places(model: nn.Module, plan: Plan) -> list[tuple[str, dict[str, Any], str]]:
    """Each tensor's path, the table of its module that holds it, and its name there."""
    places = []
    for path, names in plan.parameters.items():
        module = model.get_submodule(path)
        for name in names:
            table = module._parameters if module._parameters.get(name) is not None else module._buffers
            places.append((f"{path}.{name}" if path else name, table, name))
    return places


def _tied(tables: Sequence[dict[str, Any]]) -> list[tuple[Place, Place]]:
    """Pairs of places that hold one tensor: a plan names it once, whichever of them the forward reads."""
    first: dict[int, Place] = {}
    tied = []
    for place in ((table, name) for table in tables for name, value in table.items() if value is not None):
        table, name = place
        before = first.setdefault(id(table[name]), place)
        if before is not place:
            tied.append((before, place))
    return tied


def _counters(model: nn.Module, plan: Plan) -> list[tuple[str, dict[str, Any], str]]:
    """How many batches each norm has seen: torch counts no write where a norm in training updates its statistics."""
    name = "num_batches_tracked"
    modules = [(path, model.get_submodule(path)) for path in plan.parameters]
    return [(f"{path}.{name}", one._buffers, name) for path, one in modules if one._buffers.get(name) is not None]


@functools.cache
def _count_steps() -> None:
    """Count the steps of all optimizers of the process whose writes torch does not: its fused ones, and others' kernels."""

    def count(optimizer: Optimizer, args: object, kwargs: object) -> None:
        known = type(optimizer).__module__.startswith("torch.optim.")
        for group in optimizer.param_groups:
            if not known or group.get("fused"):
                for parameter in group["params"]:
                    _steps[parameter] = _steps.get(parameter, 0) + 1

    register_optimizer_step_post_hook(count)
