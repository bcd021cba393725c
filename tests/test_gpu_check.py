"""The GPU check, in miniature on the CPU: what it writes, what it calls a failure, and what it does not measure twice."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pathlib
import re
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("torchvision", reason="explains its networks")
pytest.importorskip("triton", reason="times its kernels")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))
import ahead
import gpu_check
import heartbeat
import kernel_bench
import lrp_fast.kernels.common
import network_bench
import report
import timing
from lrp_fast import LRP
from lrp_fast.scopes import float32_precision
from report import Results, markdown, targets
from settings import COMPILED, HEADLINE, SECOND, SINGLE, TUNED, Setting, columns_of, settings
from timing import Budget, Cuda, DeviceLostError, Host, OutOfTimeError, time_limit

code_state = gpu_check.code_state
PASSING = "import sys; print('3 passed in 0.01s')"
FAILING = "import sys; print('FAILED tests/test_it.py::test_it'); print('1 failed, 2 passed in 0.01s'); sys.exit(1)"

pytestmark = pytest.mark.skipif(
    not lrp_fast.kernels.common.interpreted(), reason="a dry run needs interpreted kernels, which a GPU machine has not"
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Nothing of the surroundings is changed, and no pytest runs within pytest."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("LRP_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(gpu_check, "code_state", lambda: "abc")
    instead_of_pytest(monkeypatch, PASSING)


def instead_of_pytest(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """What stands in for pytest."""
    start = gpu_check.subprocess.Popen

    def instead(command: list[str], **options: Any) -> Any:
        return start([sys.executable, "-c", program] if "pytest" in command else command, **options)

    monkeypatch.setattr(gpu_check.subprocess, "Popen", instead)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cheap rows and one cheap setting."""
    cases = [case for case in kernel_bench.small_cases() if case.kernel in ("gate.image_maximum", "heatmap.quantize")]
    monkeypatch.setattr(kernel_bench, "small_cases", lambda: cases)
    monkeypatch.setattr(network_bench, "settings", lambda dry, full: [Setting("cifar", "float32", 1)])


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Callable[[], float]:
    """Makes this a process that is supervised; says for how many more seconds its supervisor waits."""
    file = tmp_path / "heartbeat"
    file.touch()
    monkeypatch.setenv(heartbeat.FILE, str(file))
    return lambda: file.stat().st_mtime - time.monotonic()


def dry_run(folder: pathlib.Path, *arguments: str) -> int:
    return gpu_check.main(["--dry-run", "--output", str(folder), *arguments])


def file(folder: pathlib.Path, name: str) -> dict[str, Any]:
    (path,) = folder.glob(f"dry-run-{name}-*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def table_of(folder: pathlib.Path) -> str:
    (path,) = folder.glob("*.md")
    return path.read_text()


def test_every_gpu_test_is_where_the_check_looks() -> None:
    looked_at = [gpu_check.ROOT / path for path in gpu_check.TESTS if path.startswith("tests/")]
    files = (gpu_check.ROOT / "tests").rglob("test_*.py")
    marked = [path for path in files if re.search(r"^@(pytest\.mark\.)?gpu$", path.read_text(), re.MULTILINE)]
    assert len(marked) > 3
    assert not [path for path in marked if path not in looked_at and not set(path.parents) & set(looked_at)]


def test_a_dry_run_measures_everything(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(tmp_path / "results") == 0
    run = file(tmp_path / "results", "kernels")
    assert run["tests"] == {"exit code": 0, "summary": "3 passed in 0.01s"}
    assert run["environment"]["torch"] == torch.__version__
    assert {cell["kernel"] for cell in run["cells"].values()} == {case.kernel for case in kernel_bench.small_cases()}
    for cell in run["cells"].values():
        assert cell["relative error"] <= cell["bound"]
        assert cell["seconds"] > 0 < cell["eager seconds"]
        assert cell["share"] == pytest.approx(cell["floor seconds"] / cell["seconds"])
    assert "left out" not in run or not run["left out"]
    for precision, setting in (("float32", "cifar/otsuki2024/2"), ("tf32", "cifar/otsuki2024/1")):
        cells = file(tmp_path / "results", precision)["cells"][setting]
        assert {"forward", "torch", "triton", "zennit", "captum"} == set(cells)
        for name in ("torch", "triton"):
            assert cells[name]["relative error"] <= 1e-5
            assert cells[name]["images per second"] == pytest.approx(int(setting[-1]) / cells[name]["seconds"])
        assert not any(cell["provisional"] for cell in cells.values())
        assert cells["forward"]["seconds"] > 0
    assert any(row["kernel"].startswith("lrp_fast::") for row in run["profile"]["rows"])
    assert table_of(tmp_path / "results") in capsys.readouterr().out
    assert len(list((tmp_path / "results").iterdir())) == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small")
def test_failing_gpu_tests_fail_the_check_but_not_the_tables(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_pytest(monkeypatch, FAILING)
    assert dry_run(tmp_path, "--no-networks") == 1
    run = file(tmp_path, "kernels")
    assert run["tests"]["summary"] == "1 failed, 2 passed in 0.01s"
    assert run["tests"]["failed"] == ["FAILED tests/test_it.py::test_it"]
    assert all(cell["seconds"] > 0 for cell in run["cells"].values())
    assert "GPU tests: 1 failed" in table_of(tmp_path)


def test_what_tests_that_do_not_end_found_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    line = "[gw0] [ 10%] FAILED tests/test_it.py::test_it"
    instead_of_pytest(monkeypatch, f"import time; print({line!r}, flush=True); time.sleep(60)")
    found = gpu_check.run_tests((), tmp_path / "new" / "tests.log", 2.0)
    assert found == {"exit code": None, "summary": "incomplete: 0 passed in 2 s", "failed": [line]}
    assert failures_of_tests(found) == ["GPU tests: incomplete: 0 passed in 2 s"]


def failures_of_tests(found: dict[str, Any]) -> list[str]:
    results = Results(pathlib.Path("nowhere"), "device", "versions", "abc")
    results.run["tests"] = found
    return results.failures()


def test_tests_that_time_did_not_suffice_for_are_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    line = "[gw0] [ 10%] PASSED tests/test_it.py::test_it"
    instead_of_pytest(monkeypatch, f"import time; print({line!r}, flush=True); time.sleep(60)")
    found = gpu_check.run_tests((), tmp_path / "tests.log", 2.0)
    assert found == {"exit code": None, "summary": "incomplete: 1 passed in 2 s", "failed": []}
    assert failures_of_tests(found) == []
    assert failures_of_tests({"exit code": -9, "summary": "[gw0]", "failed": []}) == ["GPU tests: [gw0]"]


def test_tests_are_spread_over_what_processors_there_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("xdist")
    monkeypatch.setattr(gpu_check.os, "sched_getaffinity", lambda _: range(16))
    started = mock.Mock(side_effect=gpu_check.subprocess.Popen)
    monkeypatch.setattr(gpu_check.subprocess, "Popen", started)
    gpu_check.run_tests((), tmp_path / "tests.log", 60.0)
    assert started.call_args.args[0][-4:] == ["-n", "8", "--dist", "worksteal"]


def test_what_ends_the_process_is_not_tried_again(tmp_path: pathlib.Path) -> None:
    results = Results(tmp_path, "device", "versions", "abc")
    cells = results.run["cells"]
    with results.attempting(cells, "row", **kernel_bench.plan(dry=True, full=False)[0].known):
        again = Results(tmp_path, "device", "versions", "abc")
        again.load()
        assert again.run["cells"]["row"]["failed"]
        assert any("the process ended" in failure for failure in again.failures())
    assert cells == {}
    columns = results.columns("bfloat16", "setting")
    columns["torch"] = {"seconds": 1.0}
    with results.attempting(columns, "torch"):
        assert columns["torch"] == {"seconds": 1.0}
    with pytest.raises(KeyboardInterrupt), results.attempting(columns, "triton"):
        raise KeyboardInterrupt
    assert list(columns) == ["torch"]


def test_an_attempt_to_replace_a_provisional_cell_keeps_its_numbers(tmp_path: pathlib.Path) -> None:
    results = Results(tmp_path, "device", "versions", "abc")
    columns = results.columns("bfloat16", "setting")
    columns["torch"] = provisional = {"seconds": 1.0, "provisional": True}
    assert not results.has("bfloat16", "setting", "torch")
    assert results.has("bfloat16", "setting", "torch", provisional=True)
    with results.attempting(columns, "torch"):
        again = Results(tmp_path, "device", "versions", "abc")
        again.load()
        assert again.columns("bfloat16", "setting")["torch"]["seconds"] == 1.0
        assert again.has("bfloat16", "setting", "torch")
        assert again.failures() == ["setting bfloat16 torch: the process ended or hung"]
    assert columns == {"torch": provisional}
    with results.attempting(columns, "torch"):
        columns["torch"] = {"seconds": 2.0}
    assert columns == {"torch": {"seconds": 2.0}}


def spoiled(build: Callable[..., Any], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A case whose kernel writes something else."""

    def built(*arguments: Any) -> Any:
        prepared = build(*arguments)
        wrong = lambda: [change(x) for x in prepared.run()]  # noqa: E731
        return kernel_bench.Prepared(wrong, prepared.eager, prepared.bytes, prepared.flops)

    return built


@pytest.mark.parametrize("change", [lambda x: 1.001 * x, lambda x: torch.full_like(x, torch.nan)], ids=["off", "NaN"])
@pytest.mark.usefixtures("small")
def test_a_kernel_that_fails_parity_gets_no_speed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    wrong, right = kernel_bench.small_cases()
    case = kernel_bench.KernelCase(wrong.name, wrong.kernel, wrong.count, spoiled(wrong.build, change))
    monkeypatch.setattr(kernel_bench, "small_cases", lambda: [case, right])
    assert dry_run(tmp_path, "--no-networks") == 1
    cells = file(tmp_path, "kernels")["cells"]
    failed = cells[f"{wrong.name}, float32"]
    assert failed["failed"]
    assert failed["entry"].startswith("FAILED: differs from eager torch by ")
    assert "seconds" not in failed
    assert failed["unchecked seconds"] > 0
    assert cells[f"{right.name}, float32"]["seconds"] > 0
    assert f"kernel {wrong.name}, float32: FAILED" in table_of(tmp_path)


def test_a_nan_in_any_output_is_the_difference() -> None:
    right, wrong = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert math.isnan(kernel_bench.difference([wrong, right], [right, right]))
    assert math.isnan(kernel_bench.difference([right, wrong], [right, right]))
    assert kernel_bench.difference([right, 1.5 * right, right], [right, right, right]) == pytest.approx(0.5)


@pytest.mark.usefixtures("small")
def test_an_error_ends_its_stage_alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(kernel_bench, "plan", mock.Mock(side_effect=RuntimeError("no rows")))
        assert dry_run(tmp_path) == 1
    assert file(tmp_path, "float32")["cells"]["cifar/otsuki2024/1"]["triton"]["seconds"] > 0
    assert file(tmp_path, "kernels")["stages"]["kernels"] == "error: RuntimeError: no rows"
    (errors,) = tmp_path.glob("*-errors-*.log")
    assert "Traceback" in errors.read_text()
    assert errors.read_text().endswith("RuntimeError: no rows\n")
    assert "kernels: error: RuntimeError: no rows" in table_of(tmp_path)
    assert dry_run(tmp_path, "--resume", "--no-tests") == 0
    assert file(tmp_path, "kernels")["stages"] == {}


def test_an_error_is_told_in_short_and_kept_whole(caplog: pytest.LogCaptureFixture) -> None:
    try:
        try:
            raise ValueError("at 31:12:\n    x = tl.dot(a, b)\n        ^\nshapes differ\n")
        except ValueError as error:
            raise RuntimeError("previous error during capture") from error
    except RuntimeError as error:
        told = kernel_bench.describe(error)
        alone = kernel_bench.describe(error.__cause__)  # type: ignore[arg-type]
    behind = "ValueError: at 31:12: … shapes differ"
    assert told == f"error: RuntimeError: previous error during capture (behind {behind})"
    assert alone == f"error: {behind}"
    assert "x = tl.dot(a, b)" in caplog.text
    assert "Traceback" in caplog.text
    assert kernel_bench.describe(AssertionError()) == "error: AssertionError: "


def test_what_is_tuned_when_time_is_short_comes_first() -> None:
    assert settings(dry=False, full=False)[:3] == [HEADLINE, SINGLE, SECOND]
    assert TUNED == (HEADLINE, SINGLE)
    assert columns_of(HEADLINE, dry=False, full=False, first=True) == ["forward", "torch", "triton"]
    assert columns_of(SINGLE, dry=False, full=False, first=True) == ["forward", "torch", "triton", "triton + graph"]


def test_the_headline_comes_before_the_kernels_and_what_compiles_last(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = mock.Mock()
    monkeypatch.setattr(gpu_check, "run_tests", order.run_tests)
    order.run_tests.return_value = {"exit code": 0, "summary": ""}
    for module, names in ((kernel_bench, ("measure_kernels", "measure_compiled")), (network_bench, ("measure_networks",))):
        for name in names:
            monkeypatch.setattr(module, name, getattr(order, name))
    assert dry_run(tmp_path) == 0
    called = [name for name, *_ in order.mock_calls]
    kernels = ["measure_kernels", "measure_networks", "measure_kernels", "measure_compiled"]
    assert called == ["run_tests", "measure_networks", *kernels]
    assert [call.kwargs.get("first", False) for call in order.measure_networks.mock_calls] == [True, False]


@pytest.mark.usefixtures("small")
def test_first_numbers_are_provisional_until_all_columns_are_measured_in_turn(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(kernel_bench, "plan", mock.Mock(side_effect=KeyboardInterrupt))
        assert dry_run(tmp_path) == gpu_check.INTERRUPTED
        first = file(tmp_path, "float32")["cells"]["cifar/otsuki2024/1"]
        assert dry_run(tmp_path, "--resume") == gpu_check.INTERRUPTED
    assert file(tmp_path, "float32")["cells"]["cifar/otsuki2024/1"] == first
    assert list(first) == ["forward", "torch", "triton"]
    assert all(cell["provisional"] and cell["seconds"] > 0 for cell in first.values())
    assert "| ~" in table_of(tmp_path)
    assert dry_run(tmp_path, "--resume", "--no-tests", "--no-kernels", "--minutes", "0") == 0
    assert file(tmp_path, "float32")["cells"]["cifar/otsuki2024/1"] == first
    assert dry_run(tmp_path, "--resume", "--no-tests", "--no-kernels") == 0
    last = file(tmp_path, "float32")["cells"]["cifar/otsuki2024/1"]
    assert {"forward", "torch", "triton", "zennit", "captum"} == set(last)
    assert not any(cell["provisional"] for cell in last.values())
    assert all(last[name]["seconds"] != first[name]["seconds"] for name in first)
    assert "| ~" not in table_of(tmp_path)


def test_a_column_has_a_time_as_soon_as_it_is_ready(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path, "dry-run", "v", "abc")
    bench = network_bench.Bench(Setting("cifar", "float32", 1), Host(), results, Budget(5))
    prepare, seen = bench._prepare, []

    def looked_at(name: str) -> Any:
        seen.append({name: cell["provisional"] for name, cell in written().items() if "seconds" in cell})
        return prepare(name)

    def written() -> dict[str, Any]:
        (path,) = tmp_path.glob("*-float32-*.json")
        found: dict[str, Any] = json.loads(path.read_text())["cells"]["cifar/otsuki2024/1"]
        return found

    monkeypatch.setattr(bench, "_prepare", looked_at)
    with monkeypatch.context() as patched:
        patched.setattr(bench, "_interleaved", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bench.measure(["forward", "torch"])
    assert seen == [{}, {"forward": True}]
    results.write()
    assert {name: cell["provisional"] for name, cell in written().items()} == {"forward": True, "torch": True}
    bench.measure(["forward", "torch"])
    assert {name: cell["provisional"] for name, cell in written().items()} == {"forward": False, "torch": False}


def test_what_goes_wrong_in_turn_is_told_beside_the_provisional_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [torch.zeros(1), torch.zeros(1), torch.cuda.OutOfMemoryError("CUDA out of memory")]
    monkeypatch.setattr(network_bench, "run_of", lambda *_: mock.Mock(side_effect=calls))
    results = Results(tmp_path, "dry-run", "v", "abc")
    bench = network_bench.Bench(Setting("cifar", "float32", 1), Host(), results, Budget(5))
    bench.measure(["forward"])
    cell = bench.cells["forward"]
    assert (cell["entry"], cell["failed"], cell["provisional"]) == ("out of memory", False, True)
    assert cell["seconds"] > 0


def test_peers_are_called_three_times_and_not_in_turn(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = mock.Mock(return_value=torch.zeros(1))
    monkeypatch.setattr(network_bench, "run_of", lambda *_: run)
    device = mock.Mock(wraps=Host(), torch_device=torch.device("cpu"), dry=False)
    results = Results(tmp_path, "dry-run", "v", "abc")
    monkeypatch.setattr(network_bench, "images", lambda *_: torch.zeros(1))
    bench = network_bench.Bench(Setting("cifar", "float32", 1), device, results, Budget(5))
    bench.measure(["zennit"])
    assert run.call_count == 3
    assert device.wall.call_args_list == [mock.call(run, 2)]
    assert not bench.cells["zennit"]["provisional"]
    assert "zennit and captum alone, two calls after a first one" in markdown(results)


@pytest.mark.usefixtures("small")
def test_rows_are_compared_with_compiled_torch_after_all_else(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = mock.Mock(side_effect=lambda eager, dynamic: eager)
    monkeypatch.setattr(torch, "compile", compiled)
    assert sum(row.compiled for row in kernel_bench.plan(dry=False, full=False)) == 2
    first, second = (kernel_bench.Row(row.case, "float32", True) for row in kernel_bench.plan(dry=True, full=False))
    monkeypatch.setattr(kernel_bench, "plan", lambda dry, full: [first, second])
    results, budget = Results(tmp_path, "dry-run", "v", "abc"), Budget(5)
    kernel_bench.measure_kernels(results, Host(), budget, 1.0)
    cells = results.run["cells"]
    assert all("seconds" in cells[row.key] for row in (first, second))
    assert not compiled.called
    kernel_bench.measure_compiled(results, Host(), Budget(0))
    assert set(results.run["left out"]) == {f"kernel {row.key}, compiled torch" for row in (first, second)}
    del cells[second.key]["seconds"]
    kernel_bench.measure_compiled(results, Host(), budget)
    kernel_bench.measure_compiled(results, Host(), budget)
    assert compiled.call_count == 1
    assert cells[first.key]["compiled over kernel"] > 0 < cells[first.key]["compiled seconds"]
    assert "compiled entry" not in cells[first.key]
    assert f"{cells[first.key]['compiled over kernel']:.2f}x" in markdown(results)


@pytest.mark.usefixtures("small")
def test_heatmaps_that_fail_parity_get_no_speed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        network_bench, "parity", lambda *_: network_bench.parity_cell(torch.nan, 1.0, Setting("cifar", "float32", 1))
    )
    assert dry_run(tmp_path, "--no-kernels") == 1
    cells = file(tmp_path, "float32")["cells"]["cifar/otsuki2024/1"]
    for name in ("torch", "triton"):
        assert cells[name]["entry"].startswith("FAILED: relative error nan (bound 1e-05)")
        assert "seconds" not in cells[name]
        assert "images per second" not in cells[name]
        assert cells[name]["unchecked seconds"] > 0
    assert cells["forward"]["seconds"] > 0
    assert "profile" not in file(tmp_path, "kernels")


def test_parity_asks_for_the_order_of_pixels_too() -> None:
    maps = torch.rand(3, 8, 8).double()
    assert network_bench.spearman(maps, 2 * maps + 1) == pytest.approx(1)
    assert network_bench.spearman(maps, -maps) == pytest.approx(-1)
    setting = Setting("resnet50", "bfloat16", 256)
    assert "failed" not in network_bench.parity_cell(1e-2, 0.9995, setting)
    assert "failed" in network_bench.parity_cell(1e-2, 0.99, setting)
    assert "failed" in network_bench.parity_cell(3e-2, 0.9995, setting)


@pytest.mark.usefixtures("small")
def test_what_is_measured_is_not_measured_again_when_resumed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dry_run(tmp_path) == 0
    before = {name: file(tmp_path, name)["cells"] for name in ("kernels", "float32")}
    rows = mock.Mock(return_value={"entry": "measured again"})
    monkeypatch.setattr(kernel_bench, "measure_row", rows)
    monkeypatch.setattr(network_bench, "Bench", mock.Mock(side_effect=AssertionError("measured again")))
    assert dry_run(tmp_path, "--resume", "--no-tests") == 0
    assert {name: file(tmp_path, name)["cells"] for name in ("kernels", "float32")} == before
    assert file(tmp_path, "kernels")["tests"]["summary"] == "3 passed in 0.01s"
    assert not rows.called
    monkeypatch.setattr(gpu_check, "code_state", lambda: "other code")
    assert dry_run(tmp_path, "--resume", "--no-networks") == 0
    assert rows.call_count == 2


@pytest.mark.parametrize("arguments", [("--minutes", "0"), ("--began", f"{time.monotonic() - 500}")], ids=["0", "spent"])
@pytest.mark.usefixtures("small")
def test_what_time_does_not_suffice_for_is_an_entry(tmp_path: pathlib.Path, arguments: tuple[str, str]) -> None:
    assert dry_run(tmp_path, *arguments, "--no-tests") == 0
    run = file(tmp_path, "kernels")
    assert run["cells"] == {}
    names = {f"kernel {case.name}, float32" for case in kernel_bench.small_cases()}
    assert run["left out"] == dict.fromkeys([*names, "cifar/otsuki2024/1 float32"], "no time left")
    assert "| cifar/otsuki2024/1 float32 | no time left |" in table_of(tmp_path)


@pytest.mark.usefixtures("small")
def test_running_out_of_memory_is_an_entry(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of, later = network_bench.run_of, [torch.zeros(1), torch.cuda.OutOfMemoryError("CUDA out of memory")]

    def without_memory(column: str, *arguments: Any) -> Any:
        if column == "torch":
            try:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        return mock.Mock(side_effect=later) if column == "forward" else run_of(column, *arguments)

    monkeypatch.setattr(network_bench, "run_of", without_memory)
    assert dry_run(tmp_path, "--no-kernels", "--no-tests") == 0
    cells = file(tmp_path, "float32")["cells"]["cifar/otsuki2024/1"]
    assert cells["torch"] == cells["forward"] == {"entry": "out of memory", "failed": False, "provisional": False}
    assert cells["triton"]["seconds"] > 0


@pytest.mark.usefixtures("supervised")
def test_no_gpu_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("supervised")
def test_triton_keeps_what_it_compiles_where_torch_compile_does_not_move_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_check.main([])
    assert os.environ["TRITON_CACHE_DIR"].endswith("/triton")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    gpu_check.main([])
    assert os.environ["TRITON_CACHE_DIR"].endswith("/triton-gpu-check-abc")


@pytest.mark.usefixtures("small")
def test_a_lost_device_is_left_for_a_new_process(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReplacedError(BaseException):
        pass

    execute = mock.Mock(side_effect=ReplacedError)
    monkeypatch.setattr(gpu_check.os, "execv", execute)
    monkeypatch.setattr(Host, "check", mock.Mock(side_effect=DeviceLostError("illegal memory access")))
    with pytest.raises(ReplacedError):
        dry_run(tmp_path, "--minutes", "4", "--began", str(time.monotonic() - 60), "--no-networks")
    (_, command), _ = execute.call_args
    assert {"--no-tests", "--no-networks"} <= set(command)
    assert "--resume" not in command
    assert len(file(tmp_path, "kernels")["cells"]) == 1
    options = gpu_check.parse(command[2:])
    assert options.output == tmp_path
    budget = Budget(options.minutes, options.began)
    assert 0 < 60 + 60 - budget.remaining(0.75) < 60
    assert budget.seconds == 240
    assert gpu_check.parse(gpu_check.again(gpu_check.parse(["--full"]))[2:]).minutes == math.inf


@pytest.mark.usefixtures("small")
def test_an_interrupted_run_keeps_what_it_measured(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiled = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(network_bench, "profile", profiled)
    assert dry_run(tmp_path) == 130
    assert "captum" in file(tmp_path, "float32")["cells"]["cifar/otsuki2024/1"]
    assert len(file(tmp_path, "kernels")["cells"]) == 2


def test_tuning_is_tried_once_and_within_a_limit(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = mock.Mock(side_effect=lambda inputs: time.sleep(5))
    monkeypatch.setattr(LRP, "tune", tuned)
    monkeypatch.setattr(network_bench, "TUNING_SECONDS", 0.2)
    results = Results(tmp_path, "dry-run", "v", "abc")
    bench = network_bench.Bench(Setting("cifar", "float32", 1), Host(), results, Budget(5))
    bench.measure(["triton", "triton tuned"])
    assert results.run["tuned"] == {"cifar/otsuki2024/1 float32": "cut short"}
    assert all(bench.cells[name]["seconds"] > 0 for name in ("triton", "triton tuned"))
    assert bench._tuned()
    assert tuned.call_count == 1


def test_a_time_limit_ends_what_catches_every_exception() -> None:
    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                time.sleep(1)

    begin = time.monotonic()
    with pytest.raises(OutOfTimeError), time_limit(0.1):
        stubborn()
    assert time.monotonic() - begin < 1
    with time_limit(60.0):
        pass


def test_the_cache_is_flushed_by_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "FLUSHED_BYTES", 4096)
    event = mock.Mock(return_value=mock.Mock(elapsed_time=lambda stop: 2.0))
    monkeypatch.setattr(torch.cuda, "Event", event)
    device = Cuda.__new__(Cuda)
    device.torch_device, device._flushed, device._sum = torch.device("cpu"), None, None
    assert device.single(lambda: None) == 2e-3
    assert device._flushed is not None
    device._flushed.fill_(1.0)
    version = device._flushed._version
    device.single(lambda: None)
    assert device._flushed._version == version
    assert device._sum == 1024


def test_targets_are_judged() -> None:
    results = Results(pathlib.Path("nowhere"), "H100", "v", "abc")
    assert {met for _, _, met in targets(results)} == {""}
    results.columns("bfloat16", "resnet50/otsuki2024/256").update(
        {
            "triton": {"seconds": 0.05, "peak bytes per image": 70e6},
            "triton tuned": {"seconds": 0.04, "peak bytes per image": 59e6},
            "triton + graph": {"seconds": 0.032},
            "torch compiled": {"seconds": 0.05},
            "forward compiled": {"seconds": 0.011},
            "zennit": {"seconds": 1.0},
        }
    )
    results.columns("bfloat16", "resnet50/otsuki2024/1")["triton + graph"] = {"seconds": 1.6e-3}
    found = [(value, met) for _, value, met in targets(results)]
    assert found == [
        ("8,000 images/s", "yes"), ("1.25x", "no"), ("3.64x", "yes"), ("25.0x", "yes"), ("59.0 MB", "yes"),
        ("1.60 ms", "no"),
    ]  # fmt: skip
    assert "| at least 20x zennit | 25.0x | yes |" in markdown(results)
    assert "Provisional" not in markdown(results)
    results.columns("bfloat16", "resnet50/otsuki2024/256")["triton"]["provisional"] = True
    said = "Provisional, not timed in turn with the others: resnet50/otsuki2024/256 triton."
    assert said in markdown(results)


def test_targets_are_judged_by_final_numbers() -> None:
    results = Results(pathlib.Path("nowhere"), "H100", "v", "abc")
    columns = results.columns("bfloat16", "resnet50/otsuki2024/256")
    columns |= {
        "triton": {"seconds": 0.05, "provisional": True, "peak bytes per image": 70e6},
        "triton tuned": {"seconds": 0.04, "provisional": True, "peak bytes per image": 59e6},
        "triton + graph": {"seconds": 0.032, "provisional": True, "failed": True},
        "torch compiled": {"seconds": 0.05, "provisional": True},
        "zennit": {"seconds": 1.0, "provisional": False},
    }
    results.columns("bfloat16", "resnet50/otsuki2024/1")["triton + graph"] = {"seconds": 1.6e-3}

    def found() -> list[tuple[str, str]]:
        return [(value, met) for _, value, met in targets(results)]

    values = ["6,400 images/s", "1.25x", "25.0x", "59.0 MB"]
    expected = [(value, "provisional") for value in values] + [("1.60 ms", "no")]
    assert found() == [*expected[:2], ("not measured", ""), *expected[2:]]
    columns["triton"]["provisional"] = False
    assert found() == [
        ("5,120 images/s", "no"), ("not measured", ""), ("not measured", ""), ("20.0x", "yes"), ("70.0 MB", "no"),
        ("1.60 ms", "no"),
    ]  # fmt: skip


def test_every_specialization_is_compiled_by_one_process() -> None:
    kernel = mock.Mock(__name__="_kernel", arg_names=["x", "rows", "SIZE"])
    kernel.params = [mock.Mock(is_constexpr=name == "SIZE") for name in kernel.arg_names]
    for parameter, name in zip(kernel.params, kernel.arg_names, strict=True):
        parameter.name = name
    launches = [
        (torch.empty(0, dtype=dtype), rows, size)
        for dtype in (torch.float32, torch.bfloat16) for rows in (16, 17, 32) for size in (64, 128)
    ]  # fmt: skip
    compiled: list[tuple[int, str]] = []
    for index in range(3):
        record = lambda kernel, *args, index=index, **kwargs: compiled.append((index, str(args)))  # noqa: E731
        with mock.patch.object(ahead.JITFunction, "run", record), ahead.only_compiling(index, 3):
            for launch in launches:
                ahead.JITFunction.run(kernel, *launch, grid=(1,), warmup=False, num_warps=4)
    assert sorted(text for _, text in compiled) == sorted(str(launch) for launch in launches)
    first, second = ({index for index, text in compiled if f", {rows}, 64" in text} for rows in (16, 32))
    assert first == second


def test_columns_are_compiled_ahead_under_the_settings_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which torch's cache asks for; what was compiled under others would not be found."""

    def asked() -> tuple[str, str]:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    found = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", mock.Mock())
    for name in ("network", "images"):
        monkeypatch.setattr(ahead, name, mock.Mock())
    monkeypatch.setattr(ahead, "run_of", mock.Mock(return_value=lambda: found.append(asked())))
    for setting, column in ahead.COLUMNS:
        ahead.compile_column(setting, column)
        with float32_precision(setting.precision == "tf32"):
            assert found.pop() == asked()


def test_the_largest_column_may_take_more_memory_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("network", "images", "run_of"):
        monkeypatch.setattr(ahead, name, mock.Mock())
    shares = mock.Mock()
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares)
    for setting, column in ahead.COLUMNS:
        ahead.compile_column(setting, column)
    given = dict(zip(ahead.COLUMNS, (call.args[0] for call in shares.mock_calls), strict=True))
    assert given.pop((HEADLINE, "torch compiled")) == 0.4
    assert set(given) == set(itertools.product(COMPILED, ("torch compiled", "forward compiled"))) - {ahead.LARGEST}
    assert set(given.values()) == {0.2}


def test_compiling_ahead_ends_with_its_block(tmp_path: pathlib.Path) -> None:
    program = "import sys, time; print(sys.argv[1], flush=True); time.sleep(0 if sys.argv[1] == 'quick' else 60)"
    begin = time.monotonic()
    with ahead.CompileAhead(["quick", "slow"], tmp_path / "log", (sys.executable, "-c", program)) as running:
        assert running.wait(3.0) == "1 of 2 jobs complete"
    assert time.monotonic() - begin < 30
    assert all(process.poll() is not None for process in running._processes)
    said = (tmp_path / "log").read_text()
    assert "quick" in said
    assert "slow" in said


# What hangs -------------------------------------------------------------------------------------------------------------

def test_a_supervised_process_runs_nothing_at_exit(
    supervised: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = mock.Mock(side_effect=SystemExit)
    monkeypatch.setattr(os, "_exit", left)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    program = str(gpu_check.ROOT / "bench" / "gpu_check.py")
    with pytest.raises(SystemExit):
        runpy.run_path(program, run_name="__main__")
    left.assert_called_once_with(2)
    monkeypatch.delenv(heartbeat.FILE)
    monkeypatch.setattr(heartbeat, "supervise", lambda *_: 3)
    with pytest.raises(SystemExit, match="3"):
        runpy.run_path(program, run_name="__main__")
    assert left.call_count == 1


def test_helpers_are_of_the_same_session(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    program = "import os; print(os.getsid(0), os.getpgid(0) == os.getpid())"
    instead_of_pytest(monkeypatch, program)
    expected = f"{os.getsid(0)} True"
    assert gpu_check.run_tests((), tmp_path / "tests.log", 20.0)["summary"] == expected
    with ahead.CompileAhead(["job"], tmp_path / "log", (sys.executable, "-c", program)) as running:
        assert running.wait(20.0) == "1 of 1 jobs complete"
    assert (tmp_path / "log").read_text().strip() == expected


def test_the_check_is_supervised_but_for_its_helpers(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    supervised, run_ahead = mock.Mock(return_value=5), mock.Mock(return_value=6)
    monkeypatch.setattr(heartbeat, "supervise", supervised)
    monkeypatch.setattr(gpu_check, "_run_ahead", run_ahead)
    assert gpu_check.main(["--minutes", "3", "--no-tune", "--output", str(tmp_path)]) == 5
    (command, again, deadline), _ = supervised.call_args
    first, later = gpu_check.parse(command[2:]), gpu_check.parse(again[2:])
    assert command[:2] == again[:2] == [sys.executable, str(gpu_check.ROOT / "bench" / "gpu_check.py")]
    assert first.began == later.began == pytest.approx(deadline - 180)
    assert (first.minutes, first.no_tune, first.output) == (later.minutes, later.no_tune, later.output)
    assert (first.resume, first.no_tests, first.no_ahead) == (False, False, False)
    assert (later.resume, later.no_tests, later.no_ahead) == (False, True, True)
    assert gpu_check.parse(gpu_check.again(gpu_check.parse(["--resume"]))[2:]).resume
    assert gpu_check.main(["--ahead", "kernels 0 1"]) == 6
    assert supervised.call_count == 1


def test_everything_that_is_said_or_written_or_limited_is_a_sign_of_life(
    supervised: Callable[[], float], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beaten(by: Callable[[], object]) -> float:
        os.utime(tmp_path / "heartbeat", (0, 0))
        by()
        return supervised()

    assert beaten(lambda: None) < 0
    assert 110 < beaten(lambda: Budget(1).say("here")) <= 120
    assert 110 < beaten(Results(tmp_path, "device", "versions", "abc").write) <= 120
    with time_limit(500.0):
        assert 520 < supervised() <= 530
    assert 110 < supervised() <= 120
    assert 520 < beaten(lambda: ahead.CompileAhead([], tmp_path / "log").wait(500.0)) <= 530
    assert 520 < beaten(lambda: gpu_check.run_tests((), tmp_path / "tests.log", 500.0)) <= 530
    assert beaten(lambda: ahead.CompileAhead([], tmp_path / "log").wait(math.inf)) > 1e5
    monkeypatch.delenv(heartbeat.FILE)
    assert beaten(lambda: Budget(1).say("nobody listens")) < 0


# What a restart goes on from --------------------------------------------------------------------------------------------


def small_run() -> tuple[Results, Setting]:
    """The headline in miniature, with a time."""
    results, setting = Results(pathlib.Path("nowhere"), "dry-run", "v", "abc"), Setting("cifar", "float32", 1)
    results.columns(setting.precision, setting.key)["triton"] = {"seconds": 1.0}
    return results, setting


def test_a_profile_that_ends_the_process_is_not_tried_again(tmp_path: pathlib.Path) -> None:
    results, setting = small_run()
    results.folder = tmp_path
    device, written = mock.Mock(wraps=Host(), torch_device=torch.device("cpu"), dry=True), []

    def profiled(run: Callable[[], Any]) -> Any:
        written.append(Results(tmp_path, "dry-run", "v", "abc"))
        written[-1].load()
        raise OutOfTimeError

    device.profiled.side_effect = profiled
    network_bench.profile(setting, results, device, Budget(0))
    assert results.run["left out"] == {"profile": "no time left"}
    with pytest.raises(OutOfTimeError):
        network_bench.profile(setting, results, device, Budget(5))
    assert results.run["left out"] == {}
    (after,) = written
    assert after.run["left out"] == {"profile": "the process ended or hung"}
    network_bench.profile(setting, after, device, Budget(5))
    assert device.profiled.call_count == 1
    device.profiled.side_effect = RuntimeError("no counters")
    for _ in range(2):
        network_bench.profile(setting, results, device, Budget(5))
    assert device.profiled.call_count == 2
    assert results.run["left out"] == {"profile": "error: RuntimeError: no counters"}
    del results.run["left out"]["profile"]
    device.profiled.side_effect = lambda run: ([("kernel", 1, 2.0)], 3.0)
    network_bench.profile(setting, results, device, Budget(5))
    assert results.run["profile"]["rows"] == [{"kernel": "kernel", "calls": 1, "seconds": 2.0, "share": 1.0}]
    assert results.run["left out"] == {}


def test_the_profile_comes_after_the_settings_that_have_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []
    monkeypatch.setattr(network_bench, "_measure_setting", lambda setting, *_: order.append(setting))
    monkeypatch.setattr(network_bench, "profile", lambda *_: order.append("profile"))
    results = Results(pathlib.Path("nowhere"), "device", "v", "abc")
    network_bench.measure_networks(results, mock.Mock(dry=False), Budget(5), tune=True)
    assert order[:4] == [HEADLINE, SINGLE, "profile", SECOND]
    order.clear()
    network_bench.measure_networks(results, mock.Mock(dry=False), Budget(5), tune=False, first=True)
    assert order == [HEADLINE, SINGLE]


def test_nan_is_null_on_disk_and_nan_in_the_table(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path, "device", "v", "abc")
    cell = {"relative error": math.nan, "bound": 1e-5, "spearman": -math.inf, "entry": "FAILED", "failed": True}
    results.columns("float32", "setting")["torch"] = dict(cell)
    results.run["lists"] = [1.0, math.inf]
    results.write()
    texts = {path: path.read_text() for path in tmp_path.glob("*.json")}
    assert len(texts) == 2
    assert not [text for text in texts.values() if re.search("NaN|Infinity", text)]
    again = Results(tmp_path, "device", "v", "abc")
    again.load()
    assert again.columns("float32", "setting")["torch"] == cell | {"relative error": None, "spearman": None}
    assert again.run["lists"] == [1.0, None]
    assert "| setting | torch | nan | 1e-05 | nan |" in markdown(again)
    monkeypatch.setattr(report, "markdown", mock.Mock(side_effect=TypeError("cannot be formatted")))
    again.columns("float32", "setting")["triton"] = {"seconds": 1.5}
    with pytest.raises(TypeError):
        again.write()
    assert "1.5" in (tmp_path / "device-float32-v.json").read_text()


def test_a_restart_goes_on_from_this_run_alone(tmp_path: pathlib.Path) -> None:
    def results(began: float) -> Results:
        return Results(tmp_path, "dry-run", "v", "abc", began)

    old = results(1.0)
    old.columns("float32", "setting")["torch"] = {"seconds": 1.0}
    old.columns("tf32", "setting")["torch"] = {"seconds": 1.0}
    old.write()
    (tmp_path / "another-tf32-v.json").touch()
    new = results(2.5)
    new.load(earlier=False)
    assert not any(found["cells"] for found in new.files.values())
    assert [path.name for path in tmp_path.glob("*.json")] == ["another-tf32-v.json"]
    new.columns("float32", "setting")["torch"] = {"seconds": 2.0}
    new.write()
    restarted = results(2.5)
    restarted.load(earlier=False)
    assert restarted.files["float32"]["cells"] == new.files["float32"]["cells"]
    resumed = results(3.0)
    resumed.load()
    assert resumed.files["float32"]["cells"] == new.files["float32"]["cells"]


def test_a_check_begins_anew_unless_it_is_resumed(tmp_path: pathlib.Path) -> None:
    nothing = ("--no-tests", "--no-kernels", "--no-networks")
    assert dry_run(tmp_path, *nothing, "--began", "1.5") == 0
    (path,) = tmp_path.glob("*-kernels-*.json")

    def left_out(*arguments: str) -> Any:
        path.write_text(json.dumps({"code": "abc", "began": 1.5, "cells": {}, "left out": {"all": "why"}}))
        assert dry_run(tmp_path, *nothing, *arguments) == 0
        return json.loads(path.read_text()).get("left out")

    assert left_out() is None
    assert left_out("--resume") == left_out("--full") == left_out("--began", "1.5") == {"all": "why"}


def test_measurements_belong_to_what_timed_them(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"network_bench.py", "kernel_bench.py", "timing.py", "cases.py", "builders.py", "eager.py"} <= set(gpu_check.TIMING)
    (tmp_path / "bench").mkdir()
    for name in gpu_check.TIMING:
        (tmp_path / "bench" / name).write_bytes((gpu_check.ROOT / "bench" / name).read_bytes())
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    states = {code_state()}
    for name in gpu_check.TIMING:
        (tmp_path / "bench" / name).write_text("changed")
        states.add(code_state())
    assert len(states) == len(gpu_check.TIMING) + 1


def measured(
    monkeypatch: pytest.MonkeyPatch, results: Results, setting: Setting, seconds: float = 400.0, tune: bool = True
) -> list[str]:
    """The columns that would be measured with so much time left."""
    bench = mock.Mock()
    monkeypatch.setattr(network_bench, "Bench", bench)
    monkeypatch.setattr(results, "write", mock.Mock())
    budget = mock.Mock(**{"remaining.return_value": seconds})
    network_bench._measure_setting(setting, results, mock.Mock(dry=False), budget, tune, full=False)
    return list(bench().measure.call_args.args[0]) if bench().measure.called else []


def test_a_tuned_column_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    results, column = Results(pathlib.Path("nowhere"), "device", "v", "abc"), f"{SINGLE} triton tuned"
    assert "triton tuned" in measured(monkeypatch, results, SINGLE)
    assert "triton tuned" not in measured(monkeypatch, results, SINGLE, tune=False)
    assert results.run.get("left out", {}) == {}
    assert "triton tuned" not in measured(monkeypatch, results, SINGLE, seconds=80.0)
    assert results.run["left out"] == {column: "no time left"}
    results.run["tuned"] = {str(SINGLE): "cut short"}
    assert results.failures() == []
    assert "triton tuned" in measured(monkeypatch, results, SINGLE, seconds=80.0, tune=False)
    results.run["tuned"] = {str(SINGLE): "crashed"}
    assert "triton tuned" not in measured(monkeypatch, results, SINGLE)
    assert results.run["left out"] == {column: "tuning: crashed"}
    assert results.failures() == [f"tuning {SINGLE}: crashed"]
    assert f"tuning {SINGLE}: crashed" in markdown(results)


@pytest.mark.parametrize(
    ("error", "entry", "failures"),
    [(RuntimeError("no"), "error: RuntimeError: no", 1), (torch.cuda.OutOfMemoryError("no"), "out of memory", 0)],
)
def test_tuning_that_fails_is_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: Exception, entry: str, failures: int
) -> None:
    tune = mock.Mock(side_effect=error)
    monkeypatch.setattr(LRP, "tune", tune)
    results = Results(tmp_path, "dry-run", "v", "abc")
    bench = network_bench.Bench(Setting("cifar", "float32", 1), Host(), results, Budget(5))
    assert not bench._tuned()
    assert results.run["left out"] == {"cifar/otsuki2024/1 float32 triton tuned": f"tuning: {entry}"}
    assert len(results.failures()) == failures
    results.run["tuned"].clear()
    tune.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        bench._tuned()
    assert results.run["tuned"] == {}


def test_a_graph_is_recorded_tuned_where_choices_are_there(tmp_path: pathlib.Path) -> None:
    results, setting = Results(tmp_path, "dry-run", "v", "abc"), Setting("cifar", "float32", 1)
    bench = network_bench.Bench(setting, Host(), results, Budget(5))
    with mock.patch.object(bench, "_measure_group") as group:
        bench.measure(["triton + graph"])
        assert mock.call(["triton", "triton + graph"]) in group.call_args_list
        results.run["tuned"] = {str(setting): "complete"}
        bench.measure(["triton + graph"])
        assert mock.call(["triton tuned", "triton + graph"]) in group.call_args_list


def test_what_is_missing_is_measured_with_the_others_again(monkeypatch: pytest.MonkeyPatch) -> None:
    results, setting = Results(pathlib.Path("nowhere"), "device", "v", "abc"), settings(dry=False, full=False)[3]
    group = ["forward", "torch", "triton"]
    assert columns_of(setting, dry=False, full=False) == [*group, "triton tuned", "triton + graph", "zennit", "captum"]
    cells = results.columns(setting.precision, setting.key)
    for name in (*group, "triton + graph", "zennit", "captum"):
        cells[name] = {"seconds": 1.0, "provisional": False}
    assert measured(monkeypatch, results, setting) == []
    del cells["captum"]
    assert measured(monkeypatch, results, setting) == ["captum"]
    del cells["triton"]
    assert measured(monkeypatch, results, setting, seconds=1.0) == []
    assert not any(cell["provisional"] for cell in cells.values())
    cells["torch"] |= {"failed": True}
    assert measured(monkeypatch, results, setting) == ["forward", "triton", "captum"]
    assert [name for name, cell in cells.items() if cell["provisional"]] == ["forward"]
