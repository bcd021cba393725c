"""The whole-network table: heatmaps a second of ResNets beside the forward pass, zennit and captum, parity first."""

from __future__ import annotations

import copy
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from contenders import network
from kernel_bench import DTYPES, describe
from lrp_fast import LRP, Attribution
from lrp_fast.memory import is_out_of_memory
from lrp_fast.scopes import float32_precision
from peers import captum_explainer, zennit_explainer
from report import ENDED, HAVE_CHOICES, NO_TIME, OURS, PEERS, Cell, Results
from settings import FIRST, TUNED, Setting, columns_of, images, settings
from timing import Budget, Device, OutOfTimeError, Run, time_limit

SPEARMAN = 0.999
REFERENCED = 4
"""How many images of a batch are compared with the reference."""
SAMPLE_SECONDS, ROUNDS_SECONDS = 0.03, 6.0
BRIEF_SECONDS = 0.5
"""For the provisional time of a column that is ready before the others of its setting."""
PEER_CALLS = 2
"""How often other programs are called for their time: many times slower, they would take the rounds of the rest."""
TUNING_SECONDS = 90.0
"""The most that tuning a setting may take."""
FIRST_CALLS_SECONDS, COMPLETE_CALLS_SECONDS = 90.0, 900.0
"""The most that a column's first calls, with what they compile, may take when time is short, and when it is not."""
FEWEST_SECONDS = 8.0
"""A setting is not begun with less."""
PROFILED = 15
ALONE = ("triton + graph", *PEERS)
"""Not timed in turn with the others. A recorded graph, whose memory others may need, runs beside its own backend alone."""

# Runs -------------------------------------------------------------------------------------------------------------------


def forward_pass(model: nn.Module, setting: Setting, x: Tensor, compiled: bool) -> Run:
    """The model alone, in the compute dtype, channels last."""
    plain = copy.deepcopy(model).to(x.dtype).to(memory_format=torch.channels_last)
    run: Callable[[Tensor], Tensor] = torch.compile(plain, dynamic=False) if compiled else plain
    return torch.no_grad()(lambda: run(x))


def explainer_of(model: nn.Module, setting: Setting, **options: Any) -> LRP:
    """Our explainer, in the setting's composite and precision."""
    return LRP(model, setting.composite, dtype=DTYPES[setting.precision], tf32=setting.precision == "tf32", **options)


def ours(model: nn.Module, setting: Setting, x: Tensor, **options: Any) -> Run:
    """Our heatmaps of the predicted classes."""
    explainer = explainer_of(model, setting, **options)
    return lambda: explainer.explain(x, relevance=False)


def peer(explainer: Callable[[nn.Module], Callable[[Tensor], Tensor]], model: nn.Module, x: Tensor) -> Run:
    """Another program's heatmaps."""
    explain = explainer(copy.deepcopy(model).to(x.dtype))
    return lambda: explain(x).sum(1)


def run_of(column: str, setting: Setting, model: nn.Module, x: Tensor) -> Run:
    """What a column times."""
    makers: dict[str, Callable[[], Run]] = {
        "forward": lambda: forward_pass(model, setting, x, False),
        "forward compiled": lambda: forward_pass(model, setting, x, True),
        "torch": lambda: ours(model, setting, x, backend="torch"),
        "torch compiled": lambda: ours(model, setting, x, backend="torch", compile=True),
        "triton": lambda: ours(model, setting, x, backend="triton"),
        "triton tuned": lambda: ours(model, setting, x, backend="triton"),
        "triton + graph": lambda: ours(model, setting, x, backend="triton", cuda_graph=True),
        "zennit": lambda: peer(zennit_explainer, model, x),
        "captum": lambda: peer(captum_explainer, model, x),
    }
    return makers[column]()


@contextmanager
def untuned() -> Iterator[None]:
    """Explainers bound here find no measured choices."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"LRP_FAST_CACHE": folder}):
        yield


def model_and_images(setting: Setting, device: Device) -> tuple[nn.Module, Tensor]:
    """What a setting explains."""
    x = images(device.torch_device, setting.precision, setting.batch, 16 if device.dry else 224)
    return network(setting.network, device.torch_device), x


# One setting ------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Everything a setting's measurement needs."""

    setting: Setting
    device: Device
    results: Results
    budget: Budget
    provisional: bool = False
    """Whether all of it is to be measured again."""

    def __post_init__(self) -> None:
        self.cells = self.results.columns(self.setting.precision, self.setting.key)
        self.model, self.x = model_and_images(self.setting, self.device)
        self.tuned = False
        self.references: dict[tuple[int, ...], Tensor] = {}

    def measure(self, columns: Sequence[str]) -> None:
        """Columns that are not there to stay: first alone, for parity and memory, then in turn, for speed."""
        self.tuned = self._has_choices() or ("triton tuned" in columns and self._tuned())
        if not self.tuned:
            columns = [name for name in columns if name != "triton tuned"]
        # What takes long to compile comes last.
        group = sorted((name for name in columns if name not in ALONE), key=lambda name: "compiled" in name)
        if any("compiled" in name for name in group):
            torch.compiler.reset()  # past a number of recompilations, functions would silently stay uncompiled
        self._measure_group(group)
        self.device.free()
        if "triton + graph" in columns:
            self._measure_group(["triton tuned" if self.tuned else "triton", "triton + graph"])
            self.device.free()
        self._measure_group([name for name in columns if name in PEERS])

    def _has_choices(self) -> bool:
        return self.results.tuning(str(self.setting)) in HAVE_CHOICES

    def _tuned(self) -> bool:
        """Measure the choices of this setting, once and within a limit; True if there are any."""
        tried, name = self.results.run.setdefault("tuned", {}), str(self.setting)
        if name not in tried:
            tried[name] = "crashed"
            self.results.write()
            begin = self.budget.spent()
            try:
                with time_limit(min(TUNING_SECONDS, self.budget.remaining() / 3)):
                    explainer_of(self.model, self.setting, backend="triton").tune(self.x)
                tried[name] = "complete"
            except OutOfTimeError:
                tried[name] = "cut short"
                self.results.leave_out(f"tuning {name}", "in part: no time left")
            except KeyboardInterrupt:
                del tried[name]
                raise
            except Exception as error:
                tried[name] = str(self._entry("triton tuned", error)["entry"])
            self.budget.say(f"tuning {name}: {tried[name]}, {self.budget.spent() - begin:.0f} s")
            self.device.check()
            self.device.free()
        if not self._has_choices():
            self.results.leave_out(f"{name} triton tuned", f"tuning: {tried[name]}")
        return self._has_choices()

    def _measure_group(self, names: Sequence[str]) -> None:
        runs: dict[str, Run] = {}
        found: dict[str, Cell] = {}
        with float32_precision(self.setting.precision == "tf32"):
            for name in names:
                with self.results.attempting(self.cells, name):
                    found[name], run = self._prepare(name)
                if run is not None:
                    runs[name] = run
                    if name not in self.cells:
                        self._keep(name, found[name])
                    continue
                self._keep(name, found[name])
                self.device.check()
                self.device.free()
            with ExitStack() as attempts:
                for name in runs:
                    attempts.enter_context(self.results.attempting(self.cells, name))
                medians = self._interleaved(runs)
            for name, taken in medians.items():
                self._keep(name, self._timed(found[name], taken, self.provisional))

    def _keep(self, name: str, cell: Cell) -> None:
        """Put a cell into the table, where a column's first measurement stays that is not provisional.

        One without content was left out; what goes wrong later is told beside the speed there is.
        """
        where, earlier = f"{self.setting} {name}", self.cells.get(name, {})
        if not cell:
            self.results.leave_out(where, "in turn with the others: no time left" if earlier else "no time left")
        elif not earlier or earlier.get("provisional"):
            beside = earlier if "seconds" in earlier else {"provisional": self.provisional}
            self.cells[name] = cell if "provisional" in cell else beside | cell
        if cell:
            self.results.take_in(where)
        self.results.write()

    def _timed(self, cell: Cell, seconds: float, provisional: bool) -> Cell:
        """A cell with its speed; maps that failed parity have none, only the time they took."""
        speed = {"seconds": seconds, "images per second": self.setting.batch / seconds}
        return cell | ({"unchecked seconds": seconds} if "failed" in cell else speed) | {"provisional": provisional}

    def _prepare(self, name: str) -> tuple[Cell, Run | None]:
        """A column's first calls: parity, memory at the peak and a provisional time; no cell if there was no time.

        With a run if it is to be timed in turn with others. Peers and what failed parity are not: the first time stays.
        """
        compiled, remaining = "compiled" in name, self.budget.remaining()
        most = FIRST_CALLS_SECONDS if remaining < math.inf else COMPLETE_CALLS_SECONDS
        limit = min(remaining / 3 if compiled else remaining, most)
        try:
            default = name == "triton" or (name == "triton + graph" and not self.tuned)
            with time_limit(limit), untuned() if default else nullcontext():
                run = run_of(name, self.setting, self.model, self.x)
                result, peak = self.device.peak(run)
                cell = parity(result, self._reference(result.target), self.setting) if name in OURS else {}
                del result
                # Of a graph, and of the peers, which bind nothing, the first call counts.
                if name in OURS and name != "triton + graph":
                    peak = self.device.peak(run)[1]
                seconds = self.device.wall(run, PEER_CALLS) if name in PEERS else self._briefly(run)
            if name == "triton + graph":
                cell["tuned"] = self.tuned
            cell["peak bytes per image"] = peak and peak / self.setting.batch
            stays = name in PEERS or "failed" in cell
            return self._timed(cell, seconds, not stays), None if stays else run
        except OutOfTimeError:
            return {"entry": f"not within {most:.0f} s"} if limit == most else {}, None
        except Exception as error:
            return self._entry(name, error), None

    def _reference(self, targets: Tensor) -> Tensor:
        """Heatmaps of the first images in float64."""
        targets = targets[:REFERENCED]
        key = tuple(targets.tolist())
        if key not in self.references:
            explainer = LRP(self.model, self.setting.composite, backend="reference")
            self.references[key] = explainer.explain(self.x[:REFERENCED], targets, relevance=False).heatmap
        return self.references[key]

    def _briefly(self, run: Run) -> float:
        """Seconds of a call, by as many as fit into a moment, and one at least."""
        once = self.device.wall(run, 1)
        calls = 0 if self.device.dry else int(BRIEF_SECONDS / once)
        return self.device.wall(run, calls) if calls else once

    def _interleaved(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """Median seconds of a call of each run, taken in turn; what goes wrong becomes an entry."""
        taken: dict[str, list[float]] = {name: [] for name in runs}
        calls = dict.fromkeys(runs, 1)
        self._round(runs, calls, taken)  # it says how often each is called in a sample, and how many rounds there are
        once = {name: times.pop() for name, times in taken.items()}
        calls = {name: 1 if self.device.dry else min(max(int(SAMPLE_SECONDS / once[name]), 1), 50) for name in once}
        round_seconds = sum(once[name] * (calls[name] + 1) for name in once)
        rounds = self.device.rounds(ROUNDS_SECONDS, round_seconds or 1.0, fewest=3)
        for number in range(rounds):
            if number == 0 or self.budget.remaining():
                self._round(runs, calls, taken)
        return {name: statistics.median(times or [once[name]]) for name, times in taken.items()}

    def _round(self, runs: Mapping[str, Run], calls: Mapping[str, int], taken: dict[str, list[float]]) -> None:
        for name in list(taken):
            try:
                if not self.device.dry:
                    runs[name]()  # it may have to ask for memory that another had to give back
                taken[name].append(self.device.wall(runs[name], calls[name]))
            except Exception as error:
                del taken[name]
                self._keep(name, self._entry(name, error))
                self.device.check()

    @staticmethod
    def _entry(name: str, error: Exception) -> Cell:
        """A cell that says what went wrong; with our own explainers, that is a failure."""
        # Where a recording breaks off for want of memory, ending it can raise an error of its own.
        if is_out_of_memory(error) or is_out_of_memory(error.__context__):
            return {"entry": "out of memory", "failed": False}
        text = f"not installed: {error.name}" if isinstance(error, ImportError) else describe(error)
        return {"entry": text, "failed": name in OURS}


def parity(result: Attribution, expected: Tensor, setting: Setting) -> Cell:
    """The first heatmaps against the reference's: the largest relative L2 error and the lowest rank correlation."""
    got = result.heatmap[: len(expected)].double()
    norms = (expected.flatten(1).norm(dim=1), (got - expected).flatten(1).norm(dim=1))
    return parity_cell(float((norms[1] / norms[0]).max()), spearman(got, expected), setting)


def parity_cell(error: float, ranks: float, setting: Setting) -> Cell:
    """What was found, and whether it suffices."""
    cell: Cell = {"relative error": error, "bound": setting.bound, "spearman": ranks}
    if setting.bound is not None and not (error <= setting.bound and ranks >= SPEARMAN):
        what = f"relative error {error:.1e} (bound {setting.bound:.0e}), Spearman {ranks:.5f} (bound {SPEARMAN})"
        cell |= {"entry": f"FAILED: {what}", "failed": True}
    return cell


def spearman(got: Tensor, expected: Tensor) -> float:
    """The lowest rank correlation of any pair of maps N × H × W; of equal values the first counts as smaller."""
    first, second = (maps.flatten(1).argsort(dim=1, stable=True).argsort(dim=1).double() for maps in (got, expected))
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(first, second, strict=True)]
    return float(torch.stack(correlations).min())


# All settings -----------------------------------------------------------------------------------------------------------


def measure_networks(
    results: Results, device: Device, budget: Budget, tune: bool, full: bool = False, first: bool = False
) -> None:
    """Measure the settings, the most important first, until the budget is spent; what is there already stays.

    ``first``: only some columns of the most important ones, for the case that nothing else comes of it. They are provisional:
    ratios are of times taken in turn, so they are measured again with the others where time suffices.
    """
    every = settings(device.dry, full)
    for setting in every[:FIRST]:
        _measure_setting(setting, results, device, budget, tune, full, first)
    if first:
        return
    profile(every[0], results, device, budget)
    for setting in every[FIRST:]:
        _measure_setting(setting, results, device, budget, tune, full)


def _measure_setting(
    setting: Setting, results: Results, device: Device, budget: Budget, tune: bool, full: bool, first: bool = False
) -> None:
    wanted = columns_of(setting, device.dry, full, first)
    if "triton tuned" in wanted and not _to_be_tuned(setting, results, budget, tune, full):
        wanted.remove("triton tuned")
    columns = _missing(setting, results, wanted, first)
    if columns and budget.remaining() < FEWEST_SECONDS:
        results.leave_out(str(setting))
    elif columns:
        if not first and any(name not in ALONE for name in columns):
            # Ratios are of times that one process took in turn: what is missing is not measured without the others.
            results.measure_again(setting.precision, setting.key, [name for name in wanted if name not in ALONE])
            columns = _missing(setting, results, wanted, first)
        budget.say(f"{setting}: {', '.join(columns)}")
        Bench(setting, device, results, budget, first).measure(columns)
        results.take_in(str(setting))
        device.free()
    results.write()


def _missing(setting: Setting, results: Results, wanted: Sequence[str], provisional: bool) -> list[str]:
    return [name for name in wanted if not results.has(setting.precision, setting.key, name, provisional)]


def _to_be_tuned(setting: Setting, results: Results, budget: Budget, tune: bool, full: bool) -> bool:
    """Whether there are choices to use, or there is time to measure them; says so where there would have to be."""
    found, column = results.tuning(str(setting)), f"{setting} triton tuned"
    if found is not None:
        if found not in HAVE_CHOICES:
            results.leave_out(column, f"tuning: {found}")
        return found in HAVE_CHOICES
    if not tune or (setting not in TUNED and not full):
        return False
    if full or budget.remaining() >= TUNING_SECONDS:
        return True
    results.leave_out(column)
    return False


def profile(setting: Setting, results: Results, device: Device, budget: Budget) -> None:
    """The longest kernels of one explanation, if there was one.

    Tried once: a profiler may end or hang the process, which would then happen again at every restart.
    """
    cells = results.files[setting.precision]["cells"].get(setting.key, {})
    timed = [name for name in ("triton tuned", "triton") if "seconds" in cells.get(name, {})]
    if not timed or "profile" in results.run or results.run.get("left out", {}).get("profile", NO_TIME) != NO_TIME:
        return
    if budget.remaining() < FEWEST_SECONDS:
        results.leave_out("profile")
        return
    budget.say("profile")
    results.leave_out("profile", ENDED)
    results.write()
    try:
        results.run["profile"] = _profiled(setting, timed[0], device)
        results.take_in("profile")
    except Exception as error:
        results.leave_out("profile", describe(error))
        device.check()
    finally:
        if results.run["left out"].get("profile") == ENDED:
            results.take_in("profile")  # it was interrupted from outside
    results.write()
    device.free()


def _profiled(setting: Setting, column: str, device: Device) -> Cell:
    model, x = model_and_images(setting, device)
    with untuned() if column == "triton" else nullcontext():
        run = run_of(column, setting, model, x)
        run()
    rows, seconds = device.profiled(run)
    busy = sum(taken for *_, taken in rows)
    longest = [
        {"kernel": name, "calls": calls, "seconds": taken, "share": taken / busy}
        for name, calls, taken in rows[:PROFILED]
    ]
    return {
        "what": f"one heatmap call, {column}, {setting}",
        "seconds": seconds, "busy seconds": busy, "kernels": len(rows), "rows": longest,
    }  # fmt: skip
