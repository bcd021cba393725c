"""Measuring methods one after another on a sample."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lrp_fast.composites import as_composite
from lrp_fast.data import Source
from lrp_fast.evaluation.files import ResultFiles
from lrp_fast.evaluation.options import EvaluationError, EvaluationOptions
from lrp_fast.evaluation.sample import batches_of, inputs_of, load_sample
from lrp_fast.explain import Attribution
from lrp_fast.memory import is_out_of_memory
from lrp_fast.methods import (
    Edges,
    LRPMethod,
    Method,
    PreparedMethod,
    RandomMap,
    RandomTwoLevels,
    checked_heatmaps,
    find_method,
)
from lrp_fast.metrics import (
    insertion_deletion,
    parameter_randomization,
    pointing_game,
    relevance_mass,
    relevance_rank,
)
from lrp_fast.models import LoadedModel
from lrp_fast.pipeline import weights_hash
from lrp_fast.report.evaluation import EvaluationReport, Shown, write_report
from lrp_fast.report.gallery import Failure, percent
from lrp_fast.report.scores import Entry, Floats, MethodScores, Row, sanity_failures
from lrp_fast.version import VERSION

logger = logging.getLogger("lrp_fast")

PERTURBED_FACTOR = 4
"""Perturbed pictures go through the network in batches this much larger than explained ones, which need more memory."""

RANDOM_CONTROLS = ("random", "random-two-level")
"""The controls that no table is without."""
_CONTROLS = (RandomMap, RandomTwoLevels, Edges)


@dataclass
class EvaluationOutcome:
    """What an evaluation has: its methods in order, measured or failed, the rows of its table, and what was left out."""

    entries: list[Entry]
    rows: list[Row]
    skipped: Sequence[Failure]
    interrupted: bool = False

    def failures(self) -> list[Failure]:
        """The methods that failed, and those whose parameter randomization did."""
        return [entry for entry in self.entries if isinstance(entry, Failure)] + sanity_failures(self.entries)


class Evaluation:
    """Measures methods on a sample of a source: ``Evaluation(loaded, source, options, device).into(folder, methods)``.

    Raises :class:`EvaluationError` for labels, classes, masks or pictures that do not fit, ``ValueError`` for a step
    that shows a whole picture at once.
    """

    def __init__(
        self, loaded: LoadedModel, source: Source, options: EvaluationOptions, device: torch.device | None = None
    ) -> None:
        options.check_size(loaded.preprocessing.crop)
        self.options = options
        self._device = device or torch.device("cpu")
        self._loaded, self._source, self._model = loaded, source, loaded.model.to(self._device)
        self.sample = load_sample(source, loaded, options)
        self._shown = np.unique(np.linspace(0, len(self.sample) - 1, min(options.shown, len(self.sample))).astype(int))

    def into(
        self,
        output: Path,
        methods: Mapping[str, Method],
        *,
        on_method: Callable[[str], None] = lambda name: None,
        on_batch: Callable[[int], None] = lambda count: None,
        on_failure: Callable[[Failure], None] = lambda failure: None,
    ) -> EvaluationOutcome:
        """Measure what the folder does not hold yet, and write its report.

        ``methods``: name → method; ``random`` and ``random-two-level`` are added where absent. A method that raises is
        a failure and the others go on; it is tried again by the next run. Ctrl-C ends the run early, with all finished
        methods kept and reported, those of earlier runs too. ``on_method`` hears every method's name as its turn comes,
        ``on_batch`` how many more pictures it has done, ``on_failure`` of those that fail. Raises ``SettingsError`` if the
        folder was begun with other settings, :class:`EvaluationError` if with another composite of the same name,
        ``ForeignFileError`` if it holds something else, ``OSError`` if it cannot be written.
        """
        wanted = with_controls(methods)
        record = self.settings()
        files = ResultFiles(output, record)
        entries: list[Entry] = []
        interrupted = False
        try:
            for name, method in wanted.items():
                on_method(name)
                entry = self._obtain(files, name, method, on_batch)
                if isinstance(entry, Failure):
                    on_failure(entry)
                elif self.options.sanity:
                    entry = self._with_sanity(files, entry, method)
                    for failure in sanity_failures([entry]):
                        on_failure(failure)
                entries.append(entry)
        except KeyboardInterrupt:
            interrupted = True
            done = {entry.name for entry in entries}
            entries += self._kept(files, {name: method for name, method in wanted.items() if name not in done})
        controls = [name for name, method in wanted.items() if isinstance(method, _CONTROLS)]
        rows = write_report(self._report(entries, controls, record, interrupted), output)
        return EvaluationOutcome(entries, rows, self.sample.skipped, interrupted)

    def _kept(self, files: ResultFiles, methods: Mapping[str, Method]) -> list[MethodScores]:
        """What the folder holds of methods whose turn did not come; what cannot be read is said when it does."""
        found = []
        for name, method in methods.items():
            with contextlib.suppress(EvaluationError):
                if (scores := files.load(name, _about(method))) is not None:
                    count = min(self.options.sanity, len(self.sample))
                    curve = files.load_sanity(name, count, _about(method)) if count else None
                    found.append(replace(scores, sanity=curve))
        return found

    def settings(self) -> dict[str, Any]:
        """Everything that decides the numbers, beside the machine and the methods."""
        options, preprocessing = self.options, self._loaded.preprocessing
        return {
            "model": self._loaded.name,
            "weights_sha256": weights_hash(self._model),
            "preprocessing": asdict(preprocessing),
            "source": {"kind": self._source.kind, "fingerprint": self._source.fingerprint()},
            "pictures": len(self.sample),
            "pictures_sha256": self.sample.digest(),
            "limit": options.limit,
            "per_class": options.per_class,
            "seed": options.seed,
            "target": options.target,
            "metrics": sorted(options.metrics),
            "protocols": sorted(options.protocols),
            "patch": options.patch,
            "step": options.step_for(preprocessing.crop),
            "baseline": options.baseline,
            "shown": len(self._shown),
            "device": self._device.type,
            "versions": {"lrp_fast": VERSION, "torch": str(torch.__version__)},
        }

    def _obtain(
        self, files: ResultFiles, name: str, method: Method, on_batch: Callable[[int], None]
    ) -> MethodScores | Failure:
        """A method's numbers: from the folder, or measured and put there."""
        about = _about(method)
        scores = files.load(name, about)
        if scores is not None:
            on_batch(len(self.sample))
            return scores
        try:
            scores = self._measure(name, method, on_batch)
        except Exception as error:  # whatever one method does, the others go on
            logger.info("method %s failed", name, exc_info=True)
            return Failure(name, _reason(error))
        finally:
            if isinstance(method, PreparedMethod):
                method.forget()
        files.save(scores, about)
        return scores

    def _with_sanity(self, files: ResultFiles, scores: MethodScores, method: Method) -> MethodScores:
        """The same with its parameter randomization: from the folder, or made and put there."""
        count, about = min(self.options.sanity, len(self.sample)), _about(method)
        curve = files.load_sanity(scores.name, count, about)
        if curve is None:
            inputs, targets = self._inputs_and(self.sample.targets, slice(count))
            try:
                curve = parameter_randomization(self._model, inputs, targets, method, seed=self.options.seed)
            except Exception as error:  # as in _obtain
                logger.info("parameter randomization of %s failed", scores.name, exc_info=True)
                return replace(scores, sanity_reason=_reason(error))
            files.save_sanity(scores.name, count, curve, about)
        return replace(scores, sanity=curve)

    def _measure(self, name: str, method: Method, on_batch: Callable[[int], None]) -> MethodScores:
        batches = list(batches_of(len(self.sample), self.options.batch_size))
        self._explain(method, batches[0])  # what is done once for a network does not count as time
        finite, conserved, measured, seconds = [], [], [], []
        fractions: dict[str, Floats] = {}
        maps = np.full((len(self._shown), *self.sample.masks.shape[1:]), np.nan, dtype=np.float32)
        for part in batches:
            heatmaps, accounts, took = self._explain(method, part)
            known = heatmaps.isfinite().flatten(1).all(1)
            finite.append(known.cpu().numpy())
            conserved.append(accounts)
            if bool(known.any()):
                values, fractions = self._score(part, known, heatmaps[known])
                measured.append(values)
            if part.stop - part.start == batches[0].stop:  # a smaller batch takes longer per image
                seconds.append(took / len(heatmaps))
            for place in np.flatnonzero((self._shown >= part.start) & (self._shown < part.stop)):
                maps[place] = heatmaps[self._shown[place] - part.start].cpu().numpy()
            on_batch(len(heatmaps))
        if not measured:
            raise ValueError(f"none of its {len(self.sample)} maps is finite")
        scores = {key: _spread(array, np.concatenate(finite)) for key, array in _joined(measured).items()}
        timed = {"seconds": np.array(seconds)} if "time" in self.options.metrics else {}
        return MethodScores(
            name=name,
            values={key: array for key, array in scores.items() if array.ndim == 1} | _joined(conserved) | timed,
            curves={key.removesuffix("_curve"): array for key, array in scores.items() if array.ndim == 2},
            fractions=fractions,
            maps=maps,
            machine=f"{machine(self._device)}, {self.options.batch_size} pictures at a time",
        )

    def _explain(self, method: Method, part: slice) -> tuple[Tensor, dict[str, Floats], float]:
        """The maps [n, H, W] of some pictures, what conservation says of them, and the seconds it took."""
        inputs, targets = self._inputs_and(self.sample.targets, part)
        accounts: dict[str, Floats] = {}
        self._synchronize()
        begin = time.perf_counter()
        if isinstance(method, LRPMethod):
            attribution = method.explain(self._model, inputs, targets)
            heatmaps = method.finish(attribution.heatmap)
            self._synchronize()
            took = time.perf_counter() - begin
            if "leak" in self.options.metrics:
                accounts = _accounts(attribution)
        else:
            heatmaps = method(self._model, inputs, targets)
            self._synchronize()
            took = time.perf_counter() - begin
        return checked_heatmaps(heatmaps, inputs), accounts, took

    def _inputs_and(self, classes: npt.NDArray[np.int64], part: slice) -> tuple[Tensor, Tensor]:
        """Some pictures as the network's input, and their ``classes`` beside them."""
        return inputs_of(self.sample.pixels[part], self._loaded), torch.from_numpy(classes[part]).to(self._device)

    def _score(self, part: slice, finite: Tensor, heatmaps: Tensor) -> tuple[dict[str, Floats], dict[str, Floats]]:
        """Every metric of the finite ones among some pictures' maps, [n] or [n, points]; and the curves' fractions."""
        measured: dict[str, Floats] = {}
        fractions: dict[str, Floats] = {}
        if "insertion-deletion" in self.options.metrics:
            measured, fractions = self._perturb(part, finite, heatmaps)
        if "localisation" in self.options.metrics and self.sample.masks.any():
            masks = torch.from_numpy(self.sample.masks[part]).to(finite.device)[finite]
            for metric in (pointing_game, relevance_mass, relevance_rank):
                measured[metric.__name__] = metric(heatmaps, masks).numpy()
        return measured, fractions

    def _perturb(self, part: slice, finite: Tensor, heatmaps: Tensor) -> tuple[dict[str, Floats], dict[str, Floats]]:
        """Insertion, deletion and ID by every protocol, and the fractions of their curves."""
        measured, fractions = {}, {}
        options, preprocessing = self.options, self._loaded.preprocessing
        images, labels = self._inputs_and(self.sample.labels, part)
        images, labels = images[finite], labels[finite]
        if images.device.type == "cpu":
            images = images.to(memory_format=torch.channels_last)  # in which CPU convolutions are faster
        for protocol in options.protocols:
            result = insertion_deletion(
                self._model,
                images,
                heatmaps,
                labels,
                patch=options.patch,
                step=options.step_for(preprocessing.crop),
                order=protocol,
                baseline=options.baseline,
                mean=preprocessing.mean,
                std=preprocessing.std,
                seed=options.seed,
                batch_size=PERTURBED_FACTOR * options.batch_size,
            )
            fractions[protocol] = result.fractions.numpy()
            for key, curve, area in (
                ("insertion", result.insertion_curve, result.insertion),
                ("deletion", result.deletion_curve, result.deletion),
            ):
                measured[f"{protocol}_{key}_curve"], measured[f"{protocol}_{key}"] = curve.numpy(), area.numpy()
            measured[f"{protocol}_id"] = result.id.numpy()
        return measured, fractions

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _report(
        self, entries: Sequence[Entry], controls: Collection[str], record: Mapping[str, Any], interrupted: bool
    ) -> EvaluationReport:
        sample, classes = self.sample, self._loaded.classes
        shown = [
            Shown(sample.keys[index], Image.fromarray(sample.pixels[index]), classes[sample.targets[index]])
            for index in self._shown
        ]
        settings = self._described(entries)
        return EvaluationReport(entries, controls, len(sample), shown, sample.skipped, settings, record, interrupted)

    def _described(self, entries: Sequence[Entry]) -> dict[str, str]:
        """The header of the report, label to text."""
        options, loaded, sample = self.options, self._loaded, self.sample
        drawn = f", drawn with seed {options.seed}" if len(sample) + len(sample.skipped) < len(self._source) else ""
        drawn += ", the same number of each class" if options.per_class else ""
        right = sample.labels == sample.predicted
        scored = "its label" if sample.labelled else "the predicted class (the source has no labels)"
        machines = dict.fromkeys(entry.machine for entry in entries if isinstance(entry, MethodScores))
        timed = "time" in options.metrics and machines
        perturbed = {
            "class whose probability is measured": scored,
            "patch": f"{options.patch} px",
            "step": f"{options.step_for(loaded.preprocessing.crop)} patches",
            "baseline": options.baseline,
        }
        return {
            "model": loaded.name,
            "weights": loaded.source,
            "pictures": f"{len(sample)} of {len(self._source)} ({self._source.kind}{drawn})",
            "size": f"{loaded.preprocessing.crop} px",
            **({"predicted right": percent(float(right.mean()))} if sample.labelled else {}),
            "class explained": options.target,
            **(perturbed if "insertion-deletion" in options.metrics else {}),
            **({"seconds measured on": "; ".join(machines)} if timed else {}),
            "lrp-fast": VERSION,
        }


def with_controls(methods: Mapping[str, Method]) -> dict[str, Method]:
    """The methods and, after them, the random controls that they lack."""
    return {**methods, **{name: find_method(name) for name in RANDOM_CONTROLS if name not in methods}}


def _about(method: Method) -> dict[str, Any]:
    """What decides the maps of a method of ours beside its name, which a user may choose; others are known by that alone."""
    if not isinstance(method, LRPMethod):
        return {}
    return {**as_composite(method.composite, method.split).record(), "levels": method.levels}


def machine(device: torch.device) -> str:
    """What seconds were measured on: a GPU's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8", errors="replace").splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _joined(batches: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def _spread(values: Floats, known: npt.NDArray[np.bool_]) -> Floats:
    """The values of known images [k, ...] among all [N, ...], NaN elsewhere."""
    spread = np.full((len(known), *values.shape[1:]), np.nan)
    spread[known] = values
    return spread


def _accounts(attribution: Attribution) -> dict[str, Floats]:
    """Each image's leak in magnitude, its start relevance, and the relevance that arrived."""
    start, leak = attribution.start.double(), attribution.leak.double()
    numbers = {"leak": leak.abs(), "start": start, "relevance": start * (1 - leak)}
    return {key: torch.where(x.isfinite(), x, torch.nan).cpu().numpy() for key, x in numbers.items()}


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return f"out of memory, try a smaller batch size: {error}"
    return f"{type(error).__name__}: {error}" if not isinstance(error, ImportError) else str(error)
