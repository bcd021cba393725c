"""How a bound program's two passes are run: as they are, compiled, or as recorded CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from lrp_fast.backends.torch import channels_last
from lrp_fast.engine import Program

MAPS_KEPT = 2
"""How many numbers of maps a recorded program keeps a backward pass for: each holds its results."""


class Runner:
    """A program's two passes, compiled or not."""

    def __init__(self, program: Program, compile_passes: bool) -> None:
        self.program = program
        self._passes: tuple[Callable[..., Any], Callable[..., Any]] = (program.forward, program.backward)
        if compile_passes:
            self._passes = (
                _compiled(program, Program.forward, "inputs"), _compiled(program, Program.backward, "start")
            )  # fmt: skip

    def forward(self, inputs: Tensor) -> tuple[Tensor, Any]:
        """Logits N × classes, and what the backward pass needs."""
        found: tuple[Tensor, Any] = self._passes[0](inputs)
        return found

    def backward(self, tape: Any, start: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The relevance of the inputs and of what is observed, from ``start`` (maps · N) × classes."""
        found: tuple[Tensor, dict[int, Tensor]] = self._passes[1](tape, start)
        return found


def _compiled(program: Program, function: Any, argument: str) -> Callable[..., Any]:
    """A method of a program, compiled for it alone; ``argument``: what may differ from call to call in shape or strides.

    All else is bound: to guard it again at every call takes torch longer than the arithmetic of a small picture. What is
    compiled belongs to a code object, so each program has its own, and must be one graph: behind a break torch goes on in
    another code object, whose guards tell one step of the program from the next.
    """
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    only: Any = {"guard_filter_fn": lambda guards: [guard.name == argument for guard in guards]}
    return torch.compile(MethodType(own, program), fullgraph=True, dynamic=False, options=only)


class RecordedRunner(Runner):
    """A program's two passes as CUDA graphs, recorded at the first call with their shapes.

    Both graphs take their memory from one pool and are replayed in turn, so that what the forward pass saves lies where
    the backward pass reads it. Results are copied out.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program, False)
        self._stream = torch.cuda.Stream()  # of this device: torch's own for recordings is of the first that recorded
        self._done = torch.cuda.Event()  # the latest results are copied
        self._onward: _Recording | None = None
        self._back: dict[int, _Recording] = {}

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        if self._onward is None:
            self._onward = self._record_forward(inputs)
        torch.cuda.current_stream().wait_event(self._done)  # which another stream may be at
        output = self._onward.replayed(inputs)[0].clone()
        self._done.record()
        return output, None

    def backward(self, tape: None, start: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        maps = start.shape[0]
        recording = self._back.pop(maps, None) or self._record_backward(start)
        keep_latest(self._back, maps, recording, MAPS_KEPT)
        relevance, at = recording.replayed(start)
        result = relevance.clone(), {step: found.clone() for step, found in at.items()}
        self._done.record()
        return result

    def _record_forward(self, inputs: Tensor) -> _Recording:
        given = channels_last(inputs.to(self.program.dtype, copy=True))
        with _aside(self._stream):
            for _ in range(2):  # kernels are compiled and libraries choose their algorithms before the recording
                output, tape = self.program.forward(given)
                self.program.backward(tape, torch.zeros_like(output))
        del output, tape
        return _Recording.of(lambda: self.program.forward(given), given, self._stream)

    def _record_backward(self, start: Tensor) -> _Recording:
        assert self._onward is not None
        given, (_, tape) = start.clone(), self._onward.result
        with _aside(self._stream):
            self.program.backward(list(tape), given)
        pool = self._onward.graph.pool()
        return _Recording.of(lambda: self.program.backward(list(tape), given), given, self._stream, pool)


@dataclass(frozen=True)
class _Recording:
    """A CUDA graph, the tensor it reads, and what it leaves."""

    graph: torch.cuda.CUDAGraph
    given: Tensor
    result: Any

    @staticmethod
    def of(work: Callable[[], Any], given: Tensor, stream: torch.cuda.Stream, pool: Any = None) -> _Recording:
        """``work`` as a graph. Other threads, such as those that pin memory, may go on using the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # cuBLAS's workspace belongs to the stream, and goes when one of its graphs does; a graph's own is taken while it records.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
            # The outer block is for where ending the recording fails: torch's then leaves its stream in place.
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                result = work()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        return _Recording(graph, given, result)

    def replayed(self, values: Tensor) -> Any:
        """The result for other values of what it reads; the next replay overwrites it."""
        self.given.copy_(values)
        self.graph.replay()
        return self.result


@contextmanager
def _aside(stream: torch.cuda.Stream) -> Iterator[None]:
    """On another stream, after what was begun on this one and before what follows."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def keep_latest(kept: dict[Any, Any], key: object, value: object, most: int) -> None:
    """Put a value that was taken out, or is new, behind all others, and drop the first beyond ``most``: the longest unused."""
    kept[key] = value
    while len(kept) > most:
        del kept[next(iter(kept))]
