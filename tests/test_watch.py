"""What the watch on a model sees, and what it lets pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lrp_fast import LRP
from lrp_fast.trace import trace
from lrp_fast.watch import Watch, parameter_table
from networks import relative_error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.linear = nn.Linear(4, 5)
        self.activation, self.sizes, self.calls = functional.relu, [1, 2], 0
        self.options: dict[str, int] = {}
        self.norm.register_buffer("extra", None)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        x = self.activation(self.norm(self.conv(x)))
        return self.linear(self.body(x).mean((2, 3)))


def _drop_a_setting(model: Any) -> None:
    del model.sizes


def _swap_the_class(model: Any) -> None:
    model.body.__class__ = type("Other", (nn.Sequential,), {})


def _a_step(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Any], object]:
    """A step of an optimizer that is gone afterwards."""

    def step(model: Any) -> None:
        model.requires_grad_(True)
        optimizer = make(model.parameters(), **options)
        with torch.enable_grad():
            model(torch.randn(2, 3, 5, 5)).sum().backward()
        optimizer.step()

    return step


def _see_other_data(model: Any) -> None:
    model.train()
    model(torch.randn(2, 3, 5, 5) * 2 + 1)
    model.eval()


class Foreign(torch.optim.Optimizer):
    """One of those whose own kernels write weights, of which nothing is counted."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(0.5)


def _replace_a_forward(model: Any) -> None:
    model.body.forward = lambda x: x


CHANGES: dict[str, Callable[[Any], object]] = {
    "mode": lambda model: model.norm.train(),
    "stride": lambda model: setattr(model.conv, "stride", (2, 2)),
    "number": lambda model: setattr(model.norm, "eps", 1e-3),
    "function": lambda model: setattr(model, "activation", functional.gelu),
    "list in place": lambda model: model.sizes.append(3),
    "array": lambda model: setattr(model, "calls", np.arange(3)),
    "tensor": lambda model: setattr(model, "calls", torch.arange(3)),
    "setting gone": _drop_a_setting,
    "class": _swap_the_class,
    "forward": _replace_a_forward,
    "module": lambda model: setattr(model, "linear", nn.Linear(4, 5).eval()),
    "module within": lambda model: model.body.append(nn.Identity().eval()),
    "hook": lambda model: model.body.register_forward_hook(lambda *_: None),
    "hook before": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "parameter gone": lambda model: setattr(model.body[1], "bias", None),
    "parameter come": lambda model: setattr(model.conv, "bias", nn.Parameter(torch.ones(4))),
    "buffer come": lambda model: setattr(model.norm, "extra", torch.ones(4)),
    "parametrised": lambda model: nn.utils.parametrizations.weight_norm(model.conv),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    model = Net().eval()
    watch = Watch(model, trace(model))
    assert not watch.changed()
    CHANGES[name](model)
    assert watch.changed()


class Tied(nn.Module):
    """One weight under two names; its forward reads the second, torch.fx records the first."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.rand(4, 3, 3, 3))
        self.other = self.one
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.conv2d(x, self.other).relu().mean((2, 3)))


def test_a_weight_that_is_tied_no_longer_is_seen() -> None:
    model, images = Tied().eval(), torch.rand(2, 3, 6, 6)
    explainer = LRP(model)
    before = explainer.explain(images).heatmap
    model.other = nn.Parameter(torch.rand(4, 3, 3, 3))
    after = explainer.explain(images).heatmap
    assert relative_error(after, LRP(model).explain(images).heatmap) == 0
    assert relative_error(after, before) > 0.01
    with torch.no_grad():
        model.other.mul_(2)
    assert relative_error(explainer.explain(images).output, model(images).detach()) <= 1e-5


PASSED: dict[str, Callable[[Any], object]] = {
    "a call": lambda model: model(torch.randn(1, 3, 5, 5)),
    "its own objects": lambda model: model.options.update(a=1),
    "backward hooks": lambda model: model.conv.register_full_backward_hook(lambda *_: None),
    "gradients": lambda model: model.requires_grad_(False),
    "equal settings": lambda model: (setattr(model.conv, "stride", (1, 1)), setattr(model, "sizes", [1, 2])),
    "to and fro": lambda model: (model.train(), model.eval()),
}


@pytest.mark.parametrize("name", PASSED)
def test_what_no_trace_could_find_is_let_pass(name: str) -> None:
    model = Net().eval()
    watch = Watch(model, trace(model))
    state = watch.state()
    PASSED[name](model)
    assert not watch.changed()
    assert watch.state() == state


WRITES: dict[str, Callable[[Any], object]] = {
    "in place": lambda model: model.conv.weight.mul_(2.0),
    "buffer": lambda model: model.norm.running_mean.add_(1.0),
    "other parameter": lambda model: setattr(model.linear, "bias", nn.Parameter(torch.randn(5))),
    "dtype": lambda model: model.half(),
    "there and back": lambda model: model.half().float(),
    "fewer channels": lambda model: setattr(model.linear.weight, "data", model.linear.weight.data[:3]),
    "state": lambda model: model.load_state_dict(Net().state_dict()),
    "statistics": _see_other_data,
    "step": _a_step(torch.optim.SGD, lr=0.1),
    "fused step": _a_step(torch.optim.SGD, lr=0.1, fused=True),
    "fused step of Adam": _a_step(torch.optim.AdamW, lr=0.1, fused=True),
    "foreign step": _a_step(Foreign, defaults={}),
}


@pytest.mark.parametrize("name", WRITES)
def test_other_weights_are_seen(name: str) -> None:
    model = Net().eval()
    plan = trace(model)
    watch = Watch(model, plan)
    held, state = parameter_table(model, plan), watch.state()
    with torch.no_grad():
        WRITES[name](model)
    assert not watch.changed()
    assert watch.state() != state
    assert list(held) == list(parameter_table(model, plan))


def test_a_step_of_other_weights_is_let_pass() -> None:
    model, other = Net().eval(), Net()
    watch = Watch(model, trace(model))
    state = watch.state()
    _a_step(torch.optim.AdamW, lr=0.1, fused=True)(other)
    assert watch.state() == state


def test_inference_tensors_are_looked_at_without_a_count() -> None:
    with torch.inference_mode():
        model = Net().eval()
    watch = Watch(model, trace(model))
    assert watch.state() == watch.state()


def test_the_table_shares_the_models_memory() -> None:
    model = Net().eval()
    table = parameter_table(model, trace(model))
    assert {path.rpartition(".")[0] for path in table} == {"conv", "norm", "body.1", "linear"}
    state = model.state_dict()
    assert sorted(table) == sorted(path for path in state if not path.endswith("num_batches_tracked"))
    assert all(value.data_ptr() == state[path].data_ptr() for path, value in table.items())
    assert not any(value.requires_grad for value in table.values())
