"""Evaluating methods: the same pictures explained by each, measured by insertion and deletion, localisation, leak and time.

A method's numbers are on the disk as soon as it is done, so the same evaluation goes on where it was stopped. The
pictures of the sample are held in memory as bytes: 150 kB each at 224 pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import platform
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from lrp_fast.explain import Attribution
from lrp_fast.images import ImageError, decode_image
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
    RandomizationCurve,
    insertion_deletion,
    parameter_randomization,
    pointing_game,
    relevance_mass,
    relevance_rank,
)
from lrp_fast.metrics.insertion_deletion import check_step
from lrp_fast.models import LoadedModel
from lrp_fast.pipeline import weights_hash
from lrp_fast.report.evaluation import EvaluationReport, Shown, write_report
from lrp_fast.report.folder import ForeignFileError, printable, write_whole
from lrp_fast.report.gallery import Failure, percent
from lrp_fast.report.scores import METRICS, PROTOCOLS, Entry, Floats, MethodScores, Row, file_name, sanity_failures
from lrp_fast.store import check_settings, differences
from lrp_fast.version import VERSION

logger = logging.getLogger("lrp_fast")

FORMAT, FORMAT_VERSION = "lrp-fast evaluation", 1
SETTINGS = "settings.json"
RESULTS = "results"
TARGETS = ("predicted", "label")
PUBLISHED_SHARE = 500 / 224**2
"""The published step, 500 patches of one pixel at 224 x 224, as a share of all patches."""
PERTURBED_FACTOR = 4
"""Perturbed pictures go through the network in batches this much larger than explained ones, which need more memory."""

RANDOM_CONTROLS = ("random", "random-two-level")
"""The controls that no table is without."""
_CONTROLS = (RandomMap, RandomTwoLevels, Edges)


class EvaluationError(Exception):
    """Something that keeps an evaluation from being made; the message says what and what is expected."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured, and on which pictures.

    ``metrics``, ``protocols``: some of ``METRICS`` and ``PROTOCOLS``; localisation is left out without masks if all metrics
    are asked for, and else an error; ``target``: the class explained, ``"predicted"`` or ``"label"``; ``limit``: pictures
    drawn with ``seed``, ``None`` for all; ``per_class``: the same number of each class;
    ``batch_size``: pictures explained at a time; ``patch``, ``step``, ``baseline``: as of
    :func:`lrp_fast.metrics.insertion_deletion`, ``step=None`` for the published share (1 % of the patches);
    ``sanity``: pictures for the parameter randomization, 0 for none; ``shown``: pictures shown with every map.
    Raises ``ValueError`` for a name that is not known or a number below 1.
    """

    metrics: tuple[str, ...] = METRICS
    protocols: tuple[str, ...] = PROTOCOLS
    target: str = "predicted"
    limit: int | None = 1000
    per_class: bool = False
    seed: int = 0
    batch_size: int = 8
    patch: int = 1
    step: int | None = None
    baseline: str = "black"
    sanity: int = 0
    shown: int = 6

    def __post_init__(self) -> None:
        for what, given, known in (
            ("metrics", self.metrics, METRICS),
            ("protocols", self.protocols, PROTOCOLS),
            ("target", (self.target,), TARGETS),
        ):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise ValueError(f"{what}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
        numbers = {"limit": self.limit, "batch_size": self.batch_size, "patch": self.patch, "step": self.step}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")

    def step_for(self, size: int) -> int:
        """The step in patches for pictures of ``size`` x ``size`` pixels."""
        if self.step is not None:
            return self.step
        return max(1, round(PUBLISHED_SHARE * (-(-size // self.patch)) ** 2))

    def check_size(self, size: int) -> None:
        """Raise ``ValueError`` if a single step shows all of a picture of ``size`` x ``size`` pixels."""
        for protocol in sorted(self.protocols, reverse=True) if "insertion-deletion" in self.metrics else ():
            check_step(size, size, self.patch, self.step_for(size), protocol)


def draw_sample(source: Source, options: EvaluationOptions) -> list[int]:
    """The indices of the pictures that are evaluated, rising; the same for the same source, limit and seed.

    With ``per_class`` of every class as many as the limit allows for all of them, at most what the smallest one has.
    Raises :class:`EvaluationError` if classes cannot be told apart, or are more than the limit.
    """
    limit = len(source) if options.limit is None else min(options.limit, len(source))
    order = np.random.default_rng(options.seed).permutation(len(source))
    if not options.per_class:
        return sorted(order[:limit].tolist())
    if (source.labels < 0).any():
        raise EvaluationError("the same number of each class needs a label for every picture, which this source lacks")
    classes, counts = np.unique(source.labels, return_counts=True)
    each = min(limit // len(classes), int(counts.min()))
    if each == 0:
        raise EvaluationError(
            f"{limit} pictures cannot hold the same number of each of the {len(classes)} classes: raise the limit, "
            "or go without (--no-per-class)"
        )
    chosen = [order[source.labels[order] == label][:each] for label in classes]
    return sorted(np.concatenate(chosen).tolist())


def match_labels(source: Source, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """The model's class of each sample, int64 [N], -1 where the source has no label.

    The source's class names are looked up among the model's and must be written alike; labels that are numbers are used
    as they are. Raises :class:`EvaluationError` naming what does not fit.
    """
    labels = source.labels
    if not source.classes or source.classes == tuple(classes):
        beyond = np.unique(labels[labels >= len(classes)])
        if len(beyond):
            raise EvaluationError(f"label {beyond[0]} is not among the model's {len(classes)} classes")
        return labels
    used = np.unique(labels[labels >= 0])
    numbers = np.full(len(source.classes), -1, dtype=np.int64)
    places: dict[str, list[int]] = {}
    for place, name in enumerate(classes):
        places.setdefault(name, []).append(place)
    missing = [source.classes[label] for label in used if source.classes[label] not in places]
    if missing:
        raise EvaluationError(
            f"the model has no class named {_some(missing)}; the source's classes: {_some(source.classes)}; "
            f"the model's: {_some(classes)}"
        )
    for label in used:
        found = places[source.classes[label]]
        if len(found) > 1:
            raise EvaluationError(
                f"{source.classes[label]!r} is the name of {len(found)} classes of the model ({found}); "
                "give labels as numbers, in a manifest"
            )
        numbers[label] = found[0]
    return np.where(labels < 0, -1, numbers[labels])


def _some(names: Sequence[str], most: int = 6) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


@dataclass(frozen=True, eq=False)
class Sample:
    """The pictures that are evaluated, N of them.

    ``keys``: their names; ``pixels``: uint8 [N, H, W, 3]; ``masks``: bool [N, H, W], all false where the object is not
    known; ``predicted``, ``labels`` and ``targets``: int64 [N], what the network says, the class whose probability is
    measured, and the one explained; ``labelled``: whether ``labels`` are the source's, and not the predicted classes;
    ``skipped``: what could not be read.
    """

    keys: Sequence[str]
    pixels: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.bool_]
    predicted: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    labelled: bool
    skipped: Sequence[Failure]

    def __len__(self) -> int:
        return len(self.pixels)

    def digest(self) -> str:
        """A SHA-256 of everything that is measured on."""
        arrays = (self.pixels, np.packbits(self.masks), self.labels, self.targets)
        digest = hashlib.sha256("\n".join(map(printable, self.keys)).encode())
        for array in arrays:
            digest.update(array.tobytes())
        return digest.hexdigest()


def load_sample(source: Source, loaded: LoadedModel, options: EvaluationOptions) -> Sample:
    """Read, decode and classify the pictures of the sample, on the model's device.

    A picture that cannot be read, or whose mask cannot, is skipped. Raises :class:`EvaluationError` if all are, if labels
    do not fit, or if localisation was asked for without masks.
    """
    indices = draw_sample(source, options)
    labels = match_labels(source, loaded.classes)[indices]
    labelled = bool((labels >= 0).all())
    if not labelled and (labels >= 0).any():
        raise EvaluationError(f"{(labels < 0).sum()} of {len(labels)} pictures have no label; expected all or none")
    if options.target == "label" and not labelled:
        raise EvaluationError("target 'label' needs a source with labels; this one has none")
    kept, pixels, masks, skipped = [], [], [], []
    for place, index in enumerate(indices):
        try:
            image = decode_image(source.read(index))
            mask = source.mask(index, image.size) if "localisation" in options.metrics else None
        except ImageError as error:
            skipped.append(Failure(printable(source.keys[index]), str(error)))
            continue
        kept.append(place)
        pixels.append(np.asarray(loaded.preprocessing.frame(image)))
        shape = pixels[-1].shape[:2]
        masks.append(np.zeros(shape, bool) if mask is None else np.asarray(loaded.preprocessing.frame(mask)) >= 128)
    if not kept:
        raise EvaluationError(f"none of the {len(indices)} pictures can be read; the first: {skipped[0].reason}")
    named = "localisation" in options.metrics and set(options.metrics) != set(METRICS)
    if named and not np.any(masks):
        raise EvaluationError(
            f"metric 'localisation' needs a source with masks; none of the {len(kept)} pictures has one (--masks gives a "
            "folder's)"
        )
    known, shown = labels[kept], np.stack(pixels)
    predicted = _classify(loaded, shown, options.batch_size)
    measured = known if labelled else predicted
    targets = predicted if options.target == "predicted" else known
    keys = [printable(source.keys[indices[place]]) for place in kept]
    return Sample(keys, shown, np.stack(masks), predicted, measured, targets, labelled, skipped)


def _classify(loaded: LoadedModel, pixels: npt.NDArray[np.uint8], batch_size: int) -> npt.NDArray[np.int64]:
    with torch.inference_mode():
        batches = (_inputs(pixels[part], loaded) for part in _batches(len(pixels), batch_size))
        return torch.cat([loaded.model(batch).argmax(1) for batch in batches]).cpu().numpy()


def _inputs(pixels: npt.NDArray[np.uint8], loaded: LoadedModel) -> Tensor:
    """Some pictures uint8 [n, H, W, 3] as the network's input, float32 [n, 3, H, W]; new memory at every call."""
    device = next(loaded.model.parameters()).device
    return torch.stack([loaded.preprocessing.normalize(Image.fromarray(each)) for each in pixels]).to(device)


def _batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


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
        files = _Files(output, record)
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

    def _kept(self, files: _Files, methods: Mapping[str, Method]) -> list[MethodScores]:
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
        self, files: _Files, name: str, method: Method, on_batch: Callable[[int], None]
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

    def _with_sanity(self, files: _Files, scores: MethodScores, method: Method) -> MethodScores:
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
        batches = list(_batches(len(self.sample), self.options.batch_size))
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
        return _inputs(self.sample.pixels[part], self._loaded), torch.from_numpy(classes[part]).to(self._device)

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
        drawn = f", drawn with seed {options.seed}" if len(sample) < len(self._source) else ""
        drawn += ", the same number of each class" if options.per_class else ""
        right = sample.labels == sample.predicted
        scored = "its label" if sample.labelled else "the predicted class (the source has no labels)"
        machines = dict.fromkeys(entry.machine for entry in entries if isinstance(entry, MethodScores))
        timed = "time" in options.metrics and machines
        return {
            "model": loaded.name,
            "weights": loaded.source,
            "pictures": f"{len(sample)} of {len(self._source)} ({self._source.kind}{drawn})",
            "size": f"{loaded.preprocessing.crop} px",
            **({"predicted right": percent(float(right.mean()))} if sample.labelled else {}),
            "class explained": options.target,
            "class whose probability is measured": scored,
            "patch": f"{options.patch} px",
            "step": f"{options.step_for(loaded.preprocessing.crop)} patches",
            "baseline": options.baseline,
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


class _Files:
    """The folder of an evaluation: its settings, and a file for each finished method.

    Raises ``SettingsError`` if it was begun with other settings, naming each with both values, and ``ForeignFileError``
    if it holds files but no evaluation.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        self._results = folder / RESULTS
        record = json.loads(json.dumps(record))
        self._fingerprint = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        about = folder / SETTINGS
        if not about.exists():
            if folder.is_dir() and any(folder.iterdir()):
                raise ForeignFileError(f"{folder} holds files, but not those of an evaluation; results need their own")
            self._results.mkdir(parents=True)
            content = {"format": FORMAT, "version": FORMAT_VERSION, "settings": record}
            write_whole(about, (json.dumps(content, indent=2) + "\n").encode())
        _check_settings(about, record)
        self._results.mkdir(exist_ok=True)

    def load(self, name: str, about: Mapping[str, Any]) -> MethodScores | None:
        """What was measured of a method; ``None`` if that was not done yet."""
        found = self._load(name, "", about)
        if found is None:
            return None
        parts: dict[str, dict[str, Any]] = {"value": {}, "curve": {}, "fraction": {}, "": {}}
        for key, array in found.items():
            kind, _, rest = key.rpartition(".")
            parts[kind][rest] = array
        plain = parts[""]
        return MethodScores(
            name, parts["value"], parts["curve"], parts["fraction"], plain["maps"], str(plain["machine"])
        )

    def save(self, scores: MethodScores, about: Mapping[str, Any]) -> None:
        arrays: dict[str, Any] = {"maps": scores.maps, "machine": np.array(scores.machine)}
        for kind, each in (("value", scores.values), ("curve", scores.curves), ("fraction", scores.fractions)):
            arrays |= {f"{kind}.{key}": array for key, array in each.items()}
        self._save(scores.name, "", arrays, about)

    def load_sanity(self, name: str, count: int, about: Mapping[str, Any]) -> RandomizationCurve | None:
        """A method's parameter randomization on so many pictures; ``None`` if that was not done yet."""
        found = self._load(name, f"-sanity-{count}", about)
        if found is None:
            return None
        stages = tuple(map(str, found["stages"]))
        tensors = (torch.from_numpy(found[key]) for key in ("spearman", "spearman_magnitude", "cosine"))
        return RandomizationCurve(stages, *tensors)

    def save_sanity(self, name: str, count: int, curve: RandomizationCurve, about: Mapping[str, Any]) -> None:
        tensors = {"spearman": curve.spearman, "spearman_magnitude": curve.spearman_magnitude, "cosine": curve.cosine}
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        self._save(name, f"-sanity-{count}", {"stages": np.array(curve.stages), **arrays}, about)

    def _file(self, name: str, suffix: str) -> Path:
        return self._results / f"{file_name(name)}{suffix}.npz"

    def _load(self, name: str, suffix: str, about: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]] | None:
        file = self._file(name, suffix)
        if not file.exists():
            return None
        try:
            with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                found = {key: arrays[key] for key in arrays.files}
            stamp = (str(found.pop("method")), str(found.pop("fingerprint")))
            before = json.loads(str(found.pop("about", "{}")))
        except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError) as error:
            raise EvaluationError(f"{file} is damaged ({error}); delete it to measure {name} again") from error
        if stamp != (name, self._fingerprint):
            raise EvaluationError(f"{file} is not of {name} with these settings; delete it to measure {name} again")
        if differing := differences(before, about):
            raise EvaluationError(f"{file} is of another {name}; delete it to measure {name} again: {differing}")
        return found

    def _save(
        self, name: str, suffix: str, arrays: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]
    ) -> None:
        buffer = io.BytesIO()
        stamp = {"method": name, "fingerprint": self._fingerprint, "about": json.dumps(about)}
        texts = {key: np.array(text) for key, text in stamp.items()}
        np.savez_compressed(buffer, allow_pickle=False, **texts, **arrays)
        write_whole(self._file(name, suffix), buffer.getvalue())


def _check_settings(about: Path, wanted: Mapping[str, Any]) -> None:
    try:
        content = json.loads(about.read_text(encoding="utf-8"))
        form, found = (content["format"], content["version"]), content["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ForeignFileError(f"{about} is not the settings of an evaluation: {error}") from error
    if form != (FORMAT, FORMAT_VERSION):
        raise ForeignFileError(f"{about} is of {form[0]!r} version {form[1]}, expected {FORMAT!r} {FORMAT_VERSION}")
    check_settings(about.parent, found, wanted)
