"""GPU tests, the kernel table and the whole-network table, on this machine's CUDA device, within a time budget.

    python3 bench/gpu_check.py [--minutes 8] [--full] [--resume] [--dry-run] [--output FOLDER] [--no-tests] …

Runs from a raw checkout and needs torch, triton, torchvision and pytest; zennit and captum are compared with where they
can be imported. Writes at most eight files to ``--output``, ``$OUT`` or ``bench/results``, again after every measurement, so
that an interrupted run loses nothing. Exit code 0: all parity checks and GPU tests passed; 1: one did not; 2: there is no
CUDA device; 130: interrupted. Missed targets and whatever time did not suffice for are entries, not failures.

``--full``: every network, batch, precision, composite and compiled column, without a time limit unless ``--minutes`` sets
one; what an earlier run of the same code measured is kept, here and with ``--resume``. ``--dry-run``: everything in
miniature on the CPU, with interpreted kernels.

The check runs in a process of its own, and where that hangs or is killed another one goes on behind what it attempted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import logging
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import heartbeat

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

TESTS = ("-m", "gpu", "-v", "--tb=short", "-W", "default", "tests/test_triton_backend.py", "tests/kernels")
"""Where the GPU tests are: other tests import what a machine with no more than the above does not have. What libraries
warn of on a device is not ours to fail on."""
MOST_TESTERS = 8
"""Processes the tests are spread over, where pytest-xdist is there: most of their time is compiling."""
STAGES = ("tests", "ahead", "kernels", "networks", "tune")
TESTS_SHARE, KERNELS_SHARE, NETWORKS_SHARE = 0.35, 0.5, 0.92
"""The shares of the budget that are spent when the GPU tests, the kernel table and the networks must have ended."""
INTERRUPTED = 130
TIMING = (
    "builders.py", "cases.py", "contenders.py", "eager.py", "kernel_bench.py", "network_bench.py", "peers.py", "settings.py",
    "timing.py",
)  # fmt: skip
"""Beside this file: what is timed, and how."""
PROGRAM = (sys.executable, str(pathlib.Path(__file__).resolve()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, find the device, run the stages; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        # Where it is unset, torch.compile sets it to a folder of its own with the first kernel it makes: from then on nothing
        # that was compiled ahead into another one would be found.
        os.environ.setdefault("TRITON_CACHE_DIR", _temporary("triton"))
    if options.ahead:
        return _run_ahead(options.ahead)
    if not options.dry_run and heartbeat.FILE not in os.environ:
        command = [*PROGRAM, *arguments, "--began", str(options.began)]
        return heartbeat.supervise(command, again(options), options.began + 60 * options.minutes)
    import torch

    from timing import Cuda, Host

    if not options.dry_run and not torch.cuda.is_available():
        print(
            f"gpu_check: there is no CUDA device that torch {torch.__version__} can use; "
            "--dry-run runs everything in miniature on the CPU",
            file=sys.stderr,
        )
        return 2
    return check(options, Host() if options.dry_run else Cuda())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="time budget (default: 8, none with --full)")
    parser.add_argument("--full", action="store_true", help="the full cross product; keeps what is measured already")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run of the same code measured")
    parser.add_argument("--dry-run", action="store_true", help="everything in miniature on the CPU")
    parser.add_argument("--output", type=pathlib.Path, help="folder for the results (default: $OUT or bench/results)")
    for stage in STAGES:
        parser.add_argument(f"--no-{stage}", action="store_true", help=f"leave this out: {stage}")
    # When the run began, on the clock that all processes share, where this one goes on with it and with its results.
    parser.add_argument("--began", type=float, default=time.monotonic(), help=argparse.SUPPRESS)
    parser.add_argument("--ahead", help=argparse.SUPPRESS)  # a job of compile-ahead, in a process of its own
    parser.add_argument("--tests", type=shlex.split, default=TESTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = math.inf if options.full else 8.0
    if options.output is None:
        default = tempfile.mkdtemp(prefix="gpu-check-") if options.dry_run else os.environ.get("OUT")
        options.output = pathlib.Path(default or ROOT / "bench" / "results")
    return options


def check(options: argparse.Namespace, device: Any) -> int:
    """Run the stages one after another; results are on disk after each."""
    import records
    from report import Results
    from timing import Budget, DeviceLostError

    # Imported within a time limit and interrupted there, it would be left half imported.
    importlib.import_module("torch._inductor.compile_fx")
    budget, versions, code = Budget(options.minutes, options.began), records.versions(), code_state()
    # What is measured for choosing kernels belongs to this code alone.
    os.environ.setdefault("LRP_FAST_CACHE", _temporary("lrp_fast"))
    results = Results(options.output, device.name, _short(versions), code, options.began)
    results.load(earlier=options.full or options.resume)
    results.run.update(
        {
            "environment": device.environment() | versions,
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        }
    )
    try:
        with logged(results.log_path("errors")):
            _stages(options, device, results, budget)
    except KeyboardInterrupt:
        results.write()
        print(f"interrupted; what was measured is in {results.table_path}", file=sys.stderr)
        return INTERRUPTED
    except DeviceLostError as error:
        results.run["restarts"] = results.run.get("restarts", 0) + 1
        results.write()
        budget.say(f"the device answers no more: {error}")
        if results.run["restarts"] > heartbeat.MOST_RESTARTS:
            return 1
        heartbeat.beat(heartbeat.STARTING)
        os.execv(sys.executable, again(options))
    results.write()
    print(results.table_path.read_text())
    print(f"{budget.spent():.0f} s; written to {results.folder}")
    return 1 if results.failures() else 0


def _stages(options: argparse.Namespace, device: Any, results: Any, budget: Any) -> None:
    from ahead import CompileAhead, jobs
    from kernel_bench import measure_compiled, measure_kernels
    from network_bench import measure_networks
    from timing import Budget

    budget.say(f"{results.run['environment']}")
    results.write()
    compiling = [] if device.dry or options.no_ahead else jobs()
    with CompileAhead(compiling, results.log_path("ahead")) as ahead:
        if not options.no_tests:
            budget.say("GPU tests")
            results.run["tests"] = {"exit code": 1, "summary": "the process ended", "failed": []}
            results.write()
            results.run["tests"] = run_tests(options.tests, results.log_path("tests"), budget.remaining(TESTS_SHARE))
            budget.say(results.run["tests"]["summary"])
            results.write()
        if compiling:
            results.run["compiled ahead"] = ahead.wait(budget.remaining(TESTS_SHARE))
            budget.say(f"compiled ahead: {results.run['compiled ahead']}")
    tune = not (options.no_tune or device.dry)
    if not options.no_networks:
        with stage("networks, provisionally", results, device, budget):
            measure_networks(results, device, budget, tune=False, full=options.full, first=True)
    if not options.no_kernels:
        with stage("kernels", results, device, budget):
            measure_kernels(results, device, budget, KERNELS_SHARE, options.full)
    if not options.no_networks:
        shorter = Budget(options.minutes * (1.0 if options.no_kernels else NETWORKS_SHARE), options.began)
        with stage("networks", results, device, budget):
            measure_networks(results, device, shorter, tune, options.full)
    if not options.no_kernels:
        with stage("kernels left out for the networks' sake", results, device, budget):
            measure_kernels(results, device, budget, 1.0, options.full)
            measure_compiled(results, device, budget, options.full)


@contextlib.contextmanager
def logged(path: pathlib.Path) -> Iterator[None]:
    """Errors that become entries are whole in a file, if there are any: of compilers the first line says little."""
    logger, handler = logging.getLogger("gpu_check"), logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def stage(name: str, results: Any, device: Any, budget: Any) -> Iterator[None]:
    """An error within is a failure of the check, and the next stage goes on; a lost device ends it all."""
    from kernel_bench import describe
    from timing import DeviceLostError

    budget.say(name)
    results.run.setdefault("stages", {}).pop(name, None)
    try:
        yield
    except DeviceLostError:
        raise
    except Exception as error:
        results.run["stages"][name] = describe(error)
        device.check()
    results.write()


def run_tests(arguments: Sequence[str], log: pathlib.Path, seconds: float) -> dict[str, Any]:
    """pytest in processes of its own, writing to ``log``: its summary line, its exit code and what failed, ended or not.

    What time does not suffice for is no failure.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", *arguments]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(MOST_TESTERS, len(os.sched_getaffinity(0)))), "--dist", "worksteal"]
    heartbeat.beat(seconds)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            code = process.wait(None if math.isinf(seconds) else seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that the tests are spread over
                process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    summary = lines[-1].strip("= ") if lines else "no output"
    if code is None:
        summary = f"incomplete: {sum('PASSED' in line for line in lines)} passed in {seconds:.0f} s"
    found: dict[str, Any] = {"exit code": code, "summary": summary}
    if code != 0:
        found["failed"] = [line for line in lines if re.search(r"\b(FAILED|ERROR)\b", line)][:50]
        print(*lines[-100:], sep="\n", file=sys.stderr)
    return found


def again(options: argparse.Namespace) -> list[str]:
    """The command that goes on from the results, with the same deadline."""
    command = [*PROGRAM, "--no-tests", "--no-ahead", "--output", str(options.output)]
    command += ["--minutes", str(options.minutes), "--began", str(options.began)]
    # Without these, it keeps what began with it alone: the process before may have ended before it removed the rest.
    command += [f"--{name}" for name in ("full", "resume") if getattr(options, name)]
    return command + [f"--no-{stage}" for stage in STAGES[2:] if getattr(options, f"no_{stage}")]


def _run_ahead(job: str) -> int:
    from ahead import run_job

    run_job(job)
    return 0


def _temporary(name: str) -> str:
    """A folder for what is kept between processes and runs of this code."""
    return str(pathlib.Path(tempfile.gettempdir()) / f"{name}-gpu-check-{code_state()}")


def _short(versions: dict[str, str]) -> str:
    """For file names: torch's and triton's versions without what follows a plus sign."""
    return "-".join(f"{name}{versions[name].split('+')[0]}" for name in ("torch", "triton") if name in versions)


def code_state() -> str:
    """A fingerprint of the package, its kernels and of what times them: measurements of other code are not mixed in."""
    digest = hashlib.sha256()
    package = [path for path in (ROOT / "lrp_fast").rglob("*.py") if "kernels" not in path.relative_to(ROOT).parts]
    timing = [ROOT / "bench" / name for name in TIMING]
    for path in sorted([*(ROOT / "kernels").glob("*.py"), *package, *timing]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_supervised() -> NoReturn:
    """End without what runs at exit: torch.compile's pool of processes may wait there for minutes, which looks like a hang."""
    code = 1
    try:
        code = main()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if heartbeat.FILE in os.environ:
        run_supervised()
    sys.exit(main())
