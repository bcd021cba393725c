"""Explaining a model: the package's front door."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrp_fast import reference
from lrp_fast.attribution import Attribution, assembled, joined
from lrp_fast.audit import Audit, audit_rows
from lrp_fast.backends.passes import Passes
from lrp_fast.backends.torch import LinearOperation
from lrp_fast.composites import Assignment, Composite, as_composite
from lrp_fast.engine import Program, bind_linears
from lrp_fast.layers import Shape
from lrp_fast.memory import is_out_of_memory, keep_freed_memory
from lrp_fast.plan import TraceError, Unit
from lrp_fast.runners import RecordedRunner, Runner, keep_latest
from lrp_fast.scopes import current_device, float32_precision
from lrp_fast.splits import Split, Splits, is_known, list_splits
from lrp_fast.starts import Start, StartArgument, Target, Targets
from lrp_fast.trace import restored, trace
from lrp_fast.watch import Watch, hooked, parameter_table

logger = logging.getLogger("lrp_fast")

BACKENDS = ("auto", "reference", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LOGITS_ERROR = {torch.float64: 0.05, torch.float32: 0.05, torch.bfloat16: 0.25, torch.float16: 0.05}
"""How far logits may be from the model's, relative L2, before something else than rounding (TF32's too) must be at work."""
PROGRAMS_KEPT = 4
"""How many input shapes (with their layers and number of maps) stay bound at once: on a CPU each has its own packed weights."""

LARGEST_TENSOR = 32 * 2**20
"""Bytes of a tensor that glibc may keep for the next one (its largest threshold for mapping memory directly)."""


class LRP:
    """Layer-wise relevance propagation for a model (Otsuki et al., ECCV 2024, and the rules of the field).

    From the start relevance at the logits back to the pixels, each linear layer hands its relevance R on to its input x,
    and each merge h = F + S to its branches. By ``otsuki2024``, with ``A`` the layer's linear map and ``Aᵀ`` its transpose::

        convolution   r = x⁺ · Aᵀ(R / (z + 1e-5), W⁺),   z = A(x⁺, W⁺) + b      (the first one sees ones for x)
        merge         R_F = R · |F| / (|F| + |S|),   R_S = R − R_F               (one half each where both are 0)

    The other rules and splits: :mod:`lrp_fast.rules`, :mod:`lrp_fast.splits`.

    Parameters
    ----------
    model
        A convolutional classifier in eval mode, taking one tensor N×C×H×W (or 1-D, 3-D) and returning logits N × classes.
        It is traced once and never changed.
    composite
        A name from :func:`lrp_fast.list_composites`, or a :class:`~lrp_fast.composites.Composite`.
    split
        Replaces the composite's splits at merges: a name (``"ratio"``, ``"symmetric"``, ``"residual-only"``,
        ``"signed"``), a :class:`~lrp_fast.splits.Split`, or ``Splits(identity=..., projection=...)``.
    backend
        ``"triton"`` (fused kernels, on a CUDA device; what they do not serve the torch backend runs, see
        :meth:`describe`), ``"torch"``, ``"reference"`` (float64 equations, slow), or ``"auto"``: triton where its kernels
        can run, else torch.
    dtype
        The dtype of the computation: float32, bfloat16 or float64; by default the model's own (float32 if its weights mix
        several). The reference takes float64 only.
    compile
        Run the two passes through ``torch.compile`` (the first call with a shape takes a minute).
    tf32
        Let a GPU use TF32 for float32 convolutions; off by default, whatever the global setting.
    cuda_graph
        On a GPU, record each of the two passes once for an input shape and replay it from then on, which saves a small
        batch the time of launching kernels. A recording keeps its memory. Not with ``compile``.
    keep_memory
        On a CPU, have the C library (glibc) keep what an explanation frees for the next one, which saves 10 to 40 % of its
        time. It is a setting of the process, taken back when the last such explainer is gone: see
        :func:`lrp_fast.memory.keep_freed_memory`.

    Raises
    ------
    TraceError (a ``ValueError``)
        The model is in training mode, cannot be traced, or holds something without a relevance rule. From the first
        explanation, which calls the model once with one of the images: the traced plan gives other logits than the model.
    ValueError, TypeError
        An argument is not one of the known ones (the text names those), the weights lie on several devices, the backend
        cannot run there, or a composite does not fit the model.
    ImportError
        ``backend="triton"`` without triton.
    """

    def __init__(
        self,
        model: nn.Module,
        composite: str | Composite = "otsuki2024",
        split: str | Split | Splits | None = None,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        compile: bool = False,
        *,
        tf32: bool = False,
        cuda_graph: bool = False,
        keep_memory: bool = True,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
        self.composite = as_composite(composite, split)
        self.model = model
        self.compile = compile
        self.tf32 = tf32
        self.cuda_graph = cuda_graph
        self.keep_memory, self._keeps_memory = keep_memory, False
        self._backend, self._dtype = backend, dtype  # as asked for
        self.backend = backend
        if compile and backend == "reference":
            raise ValueError("compile=True is for the torch and triton backends, got backend 'reference'")
        self._one_at_a_time: AbstractContextManager[object] = threading.RLock() if cuda_graph else nullcontext()
        self.refresh()
        self._settle()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as what it was made of, the model with it; made again where it arrives."""
        make = partial(
            type(self), backend=self._backend, dtype=self._dtype, compile=self.compile, tf32=self.tf32,
            cuda_graph=self.cuda_graph, keep_memory=self.keep_memory,
        )  # fmt: skip
        return make, (self.model, self.composite)

    # What users call.

    def attribute(
        self,
        inputs: Tensor,
        target: Target = None,
        additional_forward_args: None = None,
        return_convergence_delta: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The relevance of every input element, shaped like ``inputs`` (N×K×… for N×K targets); captum's signature.

        With ``return_convergence_delta`` also ``start − Σ relevance`` of each map, N (N×K). The model takes one tensor, so
        ``additional_forward_args`` are refused (``TypeError``). Other arguments and errors as in :meth:`explain`.
        """
        if additional_forward_args is not None:
            raise TypeError(
                f"expected a model of one tensor, got additional_forward_args of {type(additional_forward_args).__name__}"
            )
        result = self.explain(inputs, target)
        assert result.relevance is not None
        if not return_convergence_delta:
            return result.relevance
        axes = tuple(range(result.start.ndim, result.relevance.ndim))
        return result.relevance, result.start - result.relevance.sum(axes, dtype=torch.float64).to(result.start.dtype)

    def explain(
        self,
        inputs: Tensor,
        target: Target = None,
        start: StartArgument = None,
        layers: Sequence[str] = (),
        relevance: bool = True,
    ) -> Attribution:
        """Explain a batch; returns an :class:`Attribution`.

        Parameters
        ----------
        inputs
            N×C×H×W (N×C×L, N×C×D×H×W, N × features), floating, finite, on the model's device.
        target
            None (the predicted class), one class for all, N classes, or N×K classes for K maps from one forward pass.
        start
            ``"probability"`` (softmax), ``"logit"`` or ``"one"`` of the target class; or, without a target, the relevance of
            all classes as a tensor N × classes (N × K × classes), or a function of the logits that gives it. By default the
            composite's.
        layers
            Names of modules whose outputs' relevance is wanted too, in a list or tuple.
        relevance
            False for the heatmap alone, which can be cheaper.

        Raises
        ------
        TraceError (a ``ValueError``)
            At the first call and after a change of the model, as :class:`LRP` says.
        ValueError, TypeError
            For inputs or arguments that do not fit; the text says what was got and what is expected.
        """
        with torch.inference_mode(False), torch.no_grad():
            parameters = self._refresh_if_changed()
            self._check_inputs(inputs, parameters)
            observed = self._observed(layers)
            targets = Targets.of(target, inputs.shape[0])
            start = self.composite.start if start is None else start
            explain = self._explain_reference if self.backend == "reference" else self._explain_torch
            check_finite = _finite_check(inputs)
            try:
                with self._one_at_a_time, self._running():
                    return explain(inputs, targets, start, observed, relevance)
            finally:
                check_finite()

    def audit(self, inputs: Tensor, target: Target = None, start: StartArgument = None) -> Audit:
        """Where relevance is lost, step by step, by the float64 equations: ``Σ_j R_j (b_j + ε_j) / stab(z_j)`` at a layer.

        Arguments as in :meth:`explain`, one target for each image. Returns an :class:`~lrp_fast.audit.Audit`, whose ``print``
        is a table: what was lost to biases, to stabilizers, at outputs that no input contributed to, and at constants.
        Raises what :meth:`explain` raises, and ``ValueError`` for several targets of an image.
        """
        with torch.inference_mode(False), torch.no_grad():
            parameters = self._refresh_if_changed()
            self._check_inputs(inputs, parameters)
            _finite_check(inputs)()
            targets = Targets.of(target, inputs.shape[0])
            start = self.composite.start if start is None else start
            self.plan.shapes(tuple(inputs.shape), parameters)
            double = _double(parameters)
            with self._running():
                values = reference.forward(self.plan, double, inputs.double())
                self._check_output(inputs, values[self.plan.output])
                begin = Start.of(values[self.plan.output], targets, start)
                if not begin.single:
                    raise ValueError(f"an audit takes one target or start for each image, got {begin.maps}")
                relevance = begin.relevance[0] * begin.scale[0, :, None]
                result = self._reference_backward(double, values, relevance)
            return audit_rows(self.plan, self._assignments, result, relevance)

    def describe(self, shape: Sequence[int] | None = None) -> str:
        """A table of the plan: every step, how relevance leaves it, what runs it, and why where no kernel does.

        The triton backend chooses by input shape N×C×H×W: ``shape`` if given, else that of the latest explanation.
        Raises ``ValueError`` for a shape that the model does not take, ``TypeError`` for what is none.
        """
        parameters = self._refresh_if_changed()
        if shape is not None:
            if not isinstance(shape, Sequence):
                raise TypeError(f"expected a shape N x C x H x W, got {shape!r}")
            self.plan.check_input(tuple(shape), parameters)
        serving = self._serving(shape)
        rows = [("step", "operation", "relevance leaves by", "backend")]
        for index, (step, assignment) in enumerate(zip(self.plan.steps, self._assignments, strict=True)):
            chosen = assignment.rule or assignment.pool or (assignment.split and f"{assignment.split.name} split")
            kind = getattr(step.layer, "kind", "") if assignment.split else ""
            rows.append((step.name, f"{step.operation} {kind}".strip(), str(chosen or "passing"), serving[index]))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        title = (
            f"{type(self.model).__name__}: {self.composite.name}, {self.composite.splits}, {self.dtype}, {self.device}"
        )
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([title, *lines])

    def _serving(self, shape: Sequence[int] | None) -> list[str]:
        """What runs each step."""
        if self.backend != "triton":
            return [self.backend] * len(self.plan.steps)
        if shape is not None:
            with self._running():
                program = self._program(torch.empty(tuple(shape), device=self.device), frozenset(), False).program
        elif self._programs:
            program = next(reversed(self._programs.values())).program
        else:
            return ["triton, chosen for an input shape: describe((N, C, H, W))"] * len(self.plan.steps)
        return program.serving()

    def tune(self, inputs: Tensor) -> str:
        """Measure, for batches like ``inputs``, which kernels and tiles serve best on this GPU, and remember it on disk.

        Takes a minute or more, once for a device, network and shape; returns a table of what was chosen. Later explainers
        find the choices by themselves. Raises ``ValueError`` unless the backend is triton on a CUDA device.
        """
        with torch.inference_mode(False), torch.no_grad():
            parameters = self._refresh_if_changed()
            if self.backend != "triton" or self.device.type != "cuda":
                raise ValueError(
                    f"tune() measures the triton backend on a CUDA device, got {self.backend!r} on {self.device}"
                )
            self._check_inputs(inputs, parameters)
            with self._running():
                program = self._program(inputs, frozenset(), False).program
                report: str = _triton().tune(program.units, program.passes, inputs.shape[0], self._choices())
        self._programs.clear()
        return report

    def refresh(self) -> None:
        """Read the model again, as if the explainer were new.

        Needed only after changes that leave no trace: writes through ``.data`` or under ``torch.inference_mode``, and
        settings that are objects of the model's own. New weights, by any optimizer too, statistics of norms, modules, hooks
        and plain settings (a stride) are noticed.
        """
        self._trace()
        self._forget()

    # Binding.

    def _trace(self) -> None:
        plan = trace(self.model)
        assignments: tuple[Assignment, ...] = self.composite.assign(plan)
        self.plan, self._assignments, self._watch = plan, assignments, Watch(self.model, plan)

    def _forget(self) -> None:
        """The weights and what was made of them."""
        self._parameters: Mapping[str, Tensor] = parameter_table(self.model, self.plan)
        self._state: object = None  # of these parameters, once they are placed
        self._linears: dict[int, LinearOperation] | None = None
        self._checked = False
        self._programs: dict[object, Runner] = {}
        self._largest: dict[Shape, int] = {}  # elements of the largest tensor, for an image's shape

    def _settle(self) -> None:
        """Where and in what to compute, and by which backend: where the model is now."""
        self.device, self.dtype = self._place(self._parameters)
        if self._backend == "auto":
            before, (self.backend, why) = self.backend, _choose_backend(self.device, self.dtype)
            if self.backend != before:
                logger.info("backend: %s (%s, %s)%s", self.backend, self.device, self.dtype, why)
        elif self._backend == "triton":
            _triton().check_device(self.device, self.dtype)
        if self.cuda_graph and (self.device.type != "cuda" or self.compile or self.backend == "reference"):
            raise ValueError(
                f"cuda_graph=True needs the torch or triton backend on a CUDA device, without compile=True; got backend "
                f"{self.backend!r} on {self.device} with compile={self.compile}"
            )
        if self.keep_memory and self.device.type == "cpu" and not self._keeps_memory:
            keep_freed_memory(self)
            self._keeps_memory = True

    def _place(self, parameters: Mapping[str, Tensor]) -> tuple[torch.device, torch.dtype]:
        devices = {value.device for value in parameters.values()} or {torch.device("cpu")}
        if len(devices) > 1:
            raise ValueError(
                f"the model's weights lie on several devices ({', '.join(map(str, devices))}); expected one"
            )
        found = {value.dtype for value in parameters.values()}
        device = devices.pop()
        if self._backend == "reference":
            if self._dtype not in (None, torch.float64):
                raise ValueError(f"the reference computes in float64, got dtype={self._dtype}; leave it out")
            return device, torch.float64
        dtype = self._dtype or (next(iter(found)) if len(found) == 1 else torch.float32)
        if dtype not in DTYPES:
            known = ", ".join(str(known) for known in DTYPES)
            raise ValueError(f"relevance cannot be computed in {dtype}; give dtype= one of {known}")
        return device, dtype

    def _refresh_if_changed(self) -> Mapping[str, Tensor]:
        if self._watch.changed():
            plan = self.plan
            self._trace()
            self._checked = False
            if self.plan != plan:
                self._state = None
        state = self._watch.state()
        if state != self._state:
            self._forget()
            self._settle()
            self._state = state
        return self._parameters

    def _program(self, inputs: Tensor, observed: frozenset[int], heatmap: bool, maps: int = 1) -> Runner:
        shape = tuple(inputs.shape)
        maps = maps if self.device.type == "cpu" else 1
        key = (shape, observed, heatmap, maps)
        runner = self._programs.pop(key, None)
        if runner is None:
            if self._linears is None:
                fold = self.composite.batch_norm == "fold"
                self._linears = bind_linears(self.plan, self._assignments, fold, self._parameters, self.dtype)
            shapes = self.plan.shapes(shape, self._parameters)
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            serve = self._serve if self.backend == "triton" else None
            program = Program(self.plan, self._assignments, self._linears, shapes, like, observed, heatmap, serve, maps)
            runner = RecordedRunner(program) if self.cuda_graph else Runner(program, self.compile)
        keep_latest(self._programs, key, runner, PROGRAMS_KEPT)
        return runner

    def _serve(
        self, units: Sequence[Unit], operations: Sequence[object], shapes: Sequence[Shape]
    ) -> Sequence[Passes | str]:
        precision = "tf32" if self.tf32 and self.dtype == torch.float32 else "ieee"
        served: Sequence[Passes | str] = _triton().serve(
            units, operations, shapes, self.dtype, precision, self._choices()
        )
        return served

    def _choices(self) -> Any:
        return _triton().Choices.of_device(self.device)

    # Running.

    @contextmanager
    def _running(self) -> Iterator[None]:
        """What an explanation needs of the process: its own device and precision, and no autocast."""
        no_autocast = torch.autocast(self.device.type, enabled=False)
        tf32 = self.tf32 and self.device.type == "cuda"
        with current_device(self.device), no_autocast, float32_precision(tf32):
            yield

    def _explain_torch(
        self, inputs: Tensor, targets: Targets, start: StartArgument, observed: dict[str, int], relevance: bool
    ) -> Attribution:
        whole = self.device.type != "cpu" or self.backend != "torch" or self.compile
        if whole or not isinstance(start, str):  # a given start belongs to the whole batch
            return self._explain_piece(inputs, targets, start, observed, relevance)
        count = self._piece(inputs, targets)
        pieces = zip(inputs.split(count), targets.split(count, len(inputs)), strict=True)
        return joined([self._explain_piece(*piece, start, observed, relevance) for piece in pieces])

    def _piece(self, inputs: Tensor, targets: Targets) -> int:
        """How many images a CPU explains at once: of a larger tensor glibc gives the memory back at once, every time.

        Pieces of a batch are as equal as can be.
        """
        size = tuple(inputs.shape[1:])
        if size not in self._largest:
            shapes = self.plan.shapes(tuple(inputs.shape), self._parameters)
            self._largest[size] = max(math.prod(shape[1:]) for shape in shapes)
        largest = self._largest[size] * self.dtype.itemsize * targets.maps
        pieces = -(-len(inputs) // max(1, LARGEST_TENSOR // largest))
        return -(-len(inputs) // pieces)

    def _explain_piece(
        self, inputs: Tensor, targets: Targets, start: StartArgument, observed: dict[str, int], relevance: bool
    ) -> Attribution:
        given = start.shape[1] if isinstance(start, Tensor) and start.ndim == 3 else targets.maps
        runner = self._program(inputs, frozenset(observed.values()), not relevance, given)
        output, tape = runner.forward(inputs)
        self._check_output(inputs, output)
        begin = Start.of(output, targets, start)
        r, at = runner.backward(tape, begin.relevance.flatten(0, 1))
        if self.backend == "triton" and not relevance and r.ndim == 4 and r.shape[1] > 1:
            r = _triton().channel_sum(r).unsqueeze(1)
        found = {name: at[index].unflatten(0, (begin.maps, -1)) for name, index in observed.items()}
        return assembled(r.unflatten(0, (begin.maps, -1)), found, output, begin, relevance)

    def _explain_reference(
        self, inputs: Tensor, targets: Targets, start: StartArgument, observed: dict[str, int], relevance: bool
    ) -> Attribution:
        self.plan.shapes(tuple(inputs.shape), self._parameters)
        double = _double(self._parameters)
        values = reference.forward(self.plan, double, inputs.double())
        output = values[self.plan.output]
        self._check_output(inputs, output)
        begin = Start.of(output, targets, start)
        results = [self._reference_backward(double, values, one).relevance for one in begin.relevance]
        found = {name: torch.stack([at[index] for at in results]) for name, index in observed.items()}
        return assembled(torch.stack([at[0] for at in results]), found, output, begin, relevance)

    def _reference_backward(
        self, double: Mapping[str, Tensor], values: Sequence[Tensor], start: Tensor
    ) -> reference.ReferenceResult:
        for assignment in self._assignments:
            split = assignment.split
            if split is not None and split.name in list_splits() and not is_known(split):
                raise ValueError(f"the reference has an equation for the split {split.name!r}, but this is another of that name")
        fold = self.composite.batch_norm
        return reference.backward(self.plan, double, self._assignments, fold, values, start)

    def _observed(self, layers: Sequence[str]) -> dict[str, int]:
        if isinstance(layers, str) or not isinstance(layers, Collection) or any(not isinstance(x, str) for x in layers):
            raise TypeError(f"expected layers as names in a list or tuple, got {layers!r}")
        return {name: self.plan.find(name) for name in layers}

    def _check_inputs(self, inputs: Tensor, parameters: Mapping[str, Tensor]) -> None:
        if not isinstance(inputs, Tensor):
            raise TypeError(f"expected inputs as a tensor N x C x H x W, got {type(inputs).__name__}")
        if inputs.dtype not in (*DTYPES, torch.float16):
            raise TypeError(f"expected floating-point inputs (normalised as in training), got {inputs.dtype}")
        if inputs.layout != torch.strided or inputs.is_nested:
            raise TypeError(f"expected dense inputs, got {'a nested tensor' if inputs.is_nested else inputs.layout}")
        if inputs.device != self.device:
            raise ValueError(f"the inputs are on {inputs.device} but the model is on {self.device}")
        if inputs.is_meta:
            raise ValueError("the model and the inputs are on the meta device, which holds no values")
        self.plan.check_input(tuple(inputs.shape), parameters)
        if inputs.ndim < 2 or inputs.numel() == 0:
            raise ValueError(f"expected inputs N x C x H x W, no dimension zero, got shape {tuple(inputs.shape)}")

    def _check_output(self, inputs: Tensor, output: Tensor) -> None:
        """Raise ``TraceError`` unless an image's logits are the model's own; once, until the model changes.

        What was traced could be something else than what the model computes. With hooks it may be, as a warning says. The
        image is the first whose logits are finite.
        """
        self._checked = self._checked or bool(hooked(self.model))
        if self._checked:
            return
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), inputs.dtype)
        place = int(output.isfinite().all(1).int().argmax())
        # Of a batch two: a squeeze() takes the dimension of a single image away.
        images = torch.cat([inputs[place : place + 1].to(dtype)] * min(2, len(inputs)))
        expected = self._own_output(images)[0].double()
        got, finite = output[place].double(), expected.isfinite()
        error = float((got - expected)[finite].norm() / expected[finite].norm().clamp(min=1e-6))
        bound = max(LOGITS_ERROR[self.dtype], LOGITS_ERROR.get(dtype, 0.0))
        same = error <= bound and torch.equal(got.isfinite(), finite)
        self._checked = same and bool(finite.all())
        if self._checked:
            return
        broken = [path for path, value in self._parameters.items() if not bool(value.isfinite().all())]
        if broken:
            raise TraceError(f"weights are not finite (NaN or infinity): {', '.join(broken[:5])}")
        if not same and not bool(finite.all()):
            raise TraceError(f"the model's own logits are not finite (NaN or infinity) on image {place}")
        if not same:
            coarse = ""
            if self.dtype == torch.bfloat16:
                coarse = ", or bfloat16 is too coarse for it (then give dtype=torch.float32)"
            raise TraceError(
                f"the logits of what was traced are not the model's: off by {error:.1%} on image {place}. Either its forward "
                "decides by what a trace cannot see (types, values or gradients), or an object that it reads has changed "
                f"since (then call refresh()){coarse}"
            )

    def _own_output(self, images: Tensor) -> Tensor:
        """The model's logits of images, which it may write to."""
        count = f"{len(images)} image{'s' if len(images) > 1 else ''}"
        try:
            with restored(self.model), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the model warns of, its user has seen
                output: Tensor = self.model(images)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise TraceError(f"{type(self.model).__name__} itself fails on {count}: {error}") from error
        if output.ndim != 2 or len(output) != len(images):
            name, shape = type(self.model).__name__, tuple(output.shape)
            raise TraceError(f"{name} gives logits of shape {shape} for {count}, expected N x classes")
        return output


def _finite_check(inputs: Tensor) -> Callable[[], None]:
    """What raises ``ValueError`` for inputs that are not finite.

    On a CPU it does so at once. Waiting for a GPU would keep it idle, so the question is put now and the answer read once
    all of its work is queued.
    """
    finite, asked = inputs.abs().amax(tuple(range(1, inputs.ndim))) < math.inf, None  # NaN is not
    if inputs.device.type == "cuda":
        finite = finite.to("cpu", non_blocking=True)
        asked = torch.cuda.current_stream(inputs.device).record_event()

    def check() -> None:
        if asked is not None:
            asked.synchronize()
        if not bool(finite.all()):
            samples = ", ".join(map(str, (~finite).nonzero().flatten().tolist()[:10]))
            raise ValueError(f"the inputs are not finite (NaN or infinity) in sample {samples}")

    if asked is None:
        check()
    return check


def _triton() -> Any:
    """The triton backend, imported only when it is used."""
    try:
        import lrp_fast.backends.triton as backend
    except ImportError as error:
        raise ImportError(f"the triton backend needs triton ({error}); install it, or use backend='torch'") from error
    return backend


def _choose_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What ``"auto"`` means here, and why not triton."""
    if device.type != "cuda":
        return "torch", ""
    try:
        _triton().check_device(device, dtype)
    except (ImportError, ValueError) as error:
        return "torch", f": {error}"
    return "triton", ""


def _double(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: value.double() for path, value in parameters.items()}
