"""The global precision settings are what the caller made them, during nobody else's code and after ours."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from test_composites import SmallResNet
from torch import Tensor

from lrp_fast import LRP, scopes
from lrp_fast.scopes import float32_precision, interrupted_between

backends: Any = torch.backends
SETTINGS = {
    "cudnn.conv": backends.cudnn.conv,
    "cudnn.rnn": backends.cudnn.rnn,
    "cuda.matmul": backends.cuda.matmul,
    "mkldnn.conv": backends.mkldnn.conv,
    "mkldnn.rnn": backends.mkldnn.rnn,
    "mkldnn.matmul": backends.mkldnn.matmul,
}
ON_CPU = ("mkldnn.conv", "mkldnn.matmul")
ON_GPU = ("cudnn.conv", "cuda.matmul")
CALLERS_CHOICES = ["nothing", "medium", "high", "generic tf32", "generic ieee", "no cudnn tf32", "one by one"]


def settings() -> dict[str, str]:
    return {name: setting.fp32_precision for name, setting in SETTINGS.items()} | {"generic": backends.fp32_precision}


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    """Whatever a test chooses does not outlive it."""
    before, of_products, of_cudnn = settings(), torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(of_products)
    backends.cudnn.allow_tf32 = of_cudnn
    backends.fp32_precision = before.pop("generic")
    for name, value in before.items():
        SETTINGS[name].fp32_precision = value
    assert backends.cudnn.allow_tf32 is of_cudnn  # which PyTorch does not answer where older and newer settings differ


def choose(choice: str) -> None:
    """What a caller may have set before."""
    if choice in ("medium", "high"):
        torch.set_float32_matmul_precision(choice)
    elif choice.startswith("generic"):
        backends.fp32_precision = choice.split()[1]
    elif choice == "no cudnn tf32":
        backends.cudnn.allow_tf32 = False
    elif choice == "one by one":
        backends.mkldnn.conv.fp32_precision = "bf16"
        backends.cuda.matmul.fp32_precision = "tf32"
        backends.cudnn.conv.fp32_precision = backends.cudnn.rnn.fp32_precision = "ieee"


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("choice", CALLERS_CHOICES)
def test_inside_is_full_precision_and_after_is_as_before(choice: str, tf32: bool) -> None:
    choose(choice)
    before = settings()
    with float32_precision(tf32):
        inside = settings()
    assert settings() == before
    assert all(inside[name] in ("ieee", "none") for name in ON_CPU)
    assert all(inside[name] in (("tf32",) if tf32 else ("ieee", "none")) for name in ON_GPU)


@pytest.mark.parametrize("choice", CALLERS_CHOICES)
def test_after_an_exception_it_is_as_before(choice: str) -> None:
    choose(choice)
    before = settings()
    with pytest.raises(ZeroDivisionError), float32_precision(True):
        _ = 1 / 0
    assert settings() == before


def test_what_was_inherited_stays_inherited() -> None:
    """A setting that followed a wider one follows it again afterwards."""
    for setting in SETTINGS.values():
        setting.fp32_precision = "none"
    backends.fp32_precision = "tf32"
    with float32_precision(False):
        assert backends.mkldnn.matmul.fp32_precision == "ieee"
    backends.fp32_precision = "ieee"
    assert {setting.fp32_precision for setting in SETTINGS.values()} == {"ieee"}


def test_what_was_chosen_stays_chosen() -> None:
    backends.mkldnn.conv.fp32_precision = "bf16"
    with float32_precision(False):
        pass
    backends.fp32_precision = "ieee"
    assert backends.mkldnn.conv.fp32_precision == "bf16"


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("choice", ["nothing", "medium", "high", "generic ieee"])
def test_the_older_settings_answer_inside(choice: str, tf32: bool) -> None:
    """Inductor, for one, asks for them."""
    choose(choice)
    with float32_precision(tf32):
        assert backends.cuda.matmul.allow_tf32 is tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")


def test_what_nobody_chose_still_follows_what_is_chosen_later() -> None:
    """In a process where nothing was set yet: what is read once and written back is chosen for good."""
    program = """
import torch
from lrp_fast.scopes import float32_precision, interrupted_between
{}
torch.backends.fp32_precision = "ieee"
print(torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
"""
    said = [
        subprocess.run([sys.executable, "-c", program.format(used)], capture_output=True, text=True, check=True).stdout
        for used in ("", "with float32_precision(False): pass", "with float32_precision(True): pass")
    ]
    assert said[0] == said[1] == said[2] != ""


def test_full_precision_wins_between_threads_and_the_last_restores() -> None:
    before = settings()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with float32_precision(False):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with float32_precision(True):
        assert backends.cudnn.conv.fp32_precision == "tf32"
        thread.start()
        assert entered.wait(60)
        assert backends.cudnn.conv.fp32_precision == "ieee"
    assert backends.cudnn.conv.fp32_precision == "ieee"
    leave.set()
    thread.join()
    assert settings() == before


@pytest.mark.parametrize("place", range(12))
def test_an_interruption_in_the_middle_leaves_the_callers_settings(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever Ctrl-C comes while the settings are changed."""
    choose("one by one")
    before, calls = settings() | {"deterministic": str(backends.cudnn.deterministic)}, itertools.count()
    real = {name: getattr(scopes, name) for name in ("_set", "_restore", "_differs")}

    def interrupted(name: str, *arguments: Any) -> Any:
        if next(calls) == place:
            raise KeyboardInterrupt
        return real[name](*arguments)

    with monkeypatch.context() as patched:
        for name in real:
            patched.setattr(scopes, name, partial(interrupted, name))
        with contextlib.suppress(KeyboardInterrupt), float32_precision(False):
            pass
    assert settings() | {"deterministic": str(backends.cudnn.deterministic)} == before
    with float32_precision(True):
        assert backends.cudnn.conv.fp32_precision == "tf32"


def test_scopes_in_one_thread_are_as_precise_as_the_strictest() -> None:
    with float32_precision(False), float32_precision(True):
        assert backends.cuda.matmul.fp32_precision in ("ieee", "none")


def test_algorithms_inside_add_in_the_same_order_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen in (False, True):
        monkeypatch.setattr(backends.cudnn, "deterministic", chosen)
        with float32_precision(False):
            assert backends.cudnn.deterministic
        assert backends.cudnn.deterministic is chosen


@pytest.mark.parametrize("choice", CALLERS_CHOICES)
def test_explaining_changes_no_setting(choice: str) -> None:
    choose(choice)
    before = settings()
    explainer, x = LRP(SmallResNet()), torch.randn(1, 3, 8, 8)
    inside: list[dict[str, str]] = []

    def start(logits: Tensor) -> Tensor:
        inside.append(settings())
        return logits.softmax(1)

    explainer.explain(x, start=start)
    assert settings() == before
    assert all(inside[0][name] in ("ieee", "none") for name in (*ON_CPU, *ON_GPU))

    def broken(logits: Tensor) -> Tensor:
        raise KeyError("the caller's own error")

    with pytest.raises(KeyError, match="the caller's own error"):
        explainer.explain(x, start=broken)
    assert settings() == before


def test_a_callers_low_precision_does_not_reach_the_map() -> None:
    model, x = SmallResNet(), torch.randn(2, 3, 16, 16)
    target = torch.tensor([0, 1])
    explainer = LRP(model, "epsilon_plus")
    before = explainer.explain(x, target)
    torch.set_float32_matmul_precision("medium")
    backends.mkldnn.conv.fp32_precision = "bf16"
    after = explainer.explain(x, target)
    assert torch.equal(before.heatmap, after.heatmap)
    assert torch.equal(before.output, after.output)
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("twice", [False, True])
def test_interruptions_wait_for_a_pause_but_only_one(twice: bool) -> None:
    reached = []

    def work() -> None:
        with interrupted_between() as pause:
            pause()
            signal.raise_signal(signal.SIGINT)
            reached.append("behind the first")
            if twice:
                signal.raise_signal(signal.SIGINT)
                reached.append("behind the second")
            pause()
            reached.append("behind the pause")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["behind the first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
