"""One run: explain picture files and write their overlays, maps, table and gallery into a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lrp_fast.explain import LRP
from lrp_fast.heatmap import heat_quantize, heat_quantize_signed, is_signed, overlay
from lrp_fast.images import ImageError, Picture, load_picture
from lrp_fast.models import LoadedModel

from .folder import SUFFIXES, OutputFolder, Row, brief_names, encode_image, encode_map, output_names, printable
from .gallery import Card, Failure, Gallery, percent, render_gallery

Facts = Callable[[Picture, Tensor, int], Sequence[tuple[str, str]]]
"""Further facts of one picture from its map, float32 [H, W], and the predicted class."""


@dataclass(frozen=True)
class RunOptions:
    """How pictures are explained and drawn.

    ``target``: the class explained, ``None`` for the predicted one; ``levels``: of the heat quantization of overlays
    (of a signed map, on each side of zero), ``None`` for none; ``smoothing``: of overlays, in pixels, ``None`` for the
    default; ``device``: the model's.
    """

    target: int | None = None
    levels: int | None = 8
    smoothing: float | None = None
    batch_size: int = 8
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class Outcome:
    """What a run has done so far: cards and failures in the order of the files, and whether it was interrupted.

    ``begun``: whether anything was written; until then the folder is as it was.
    """

    cards: list[Card] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False
    begun: bool = False

    def summary(self) -> dict[str, str]:
        """The headline numbers of a run, label to text; the leak's magnitude is averaged over what was explained."""
        numbers = {"explained": str(len(self.cards))}
        if self.failures:
            numbers["failed"] = str(len(self.failures))
        if self.cards:
            numbers["mean leak"] = percent(float(np.mean([abs(card.leak) for card in self.cards])))
        return numbers


class RunError(Exception):
    """The explainer refused the pictures as they are; the message says why."""


@dataclass(frozen=True)
class Run:
    """Explains files into a folder: ``Run(explainer, loaded, options).into(folder, files, ...)``.

    ``facts`` adds to each card, and ``summarize`` gives the headline numbers, label to text.

    Pictures are explained in batches of ``options.batch_size`` files; each has its row in ``results.csv`` on the disk
    as soon as its batch is done. A picture that cannot be read, or whose map is not finite, is a failure and the others
    go on. An interruption (Ctrl-C) ends the run early, with the gallery of what was done. Where nothing was explained, the
    results of an earlier run stay as they were.
    """

    explainer: LRP
    loaded: LoadedModel
    options: RunOptions
    facts: Facts | None = None
    summarize: Callable[[Outcome], Mapping[str, str]] = Outcome.summary

    def into(
        self,
        output: Path,
        files: Sequence[Path],
        settings: Mapping[str, str],
        *,
        title: str = "What the network saw",
        on_failure: Callable[[Failure], None] = lambda failure: None,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> Outcome:
        """Explain ``files`` into the folder ``output`` and write its gallery, headed by ``settings`` and the summary.

        ``on_failure`` hears of every failure and ``on_batch`` of the number of files done. Raises what
        :class:`OutputFolder` raises, ``OSError`` if a file cannot be written, :class:`RunError` if the model cannot.
        """
        names = output_names(files)
        outcome = Outcome()
        with OutputFolder(output, [name + suffix for name in names for suffix in SUFFIXES]) as folder:
            try:
                for start in range(0, len(files), self.options.batch_size):
                    batch = slice(start, start + self.options.batch_size)
                    for result in self._batch(files[batch], names[batch], folder):
                        if isinstance(result, Card):
                            outcome.cards.append(result)
                        else:
                            outcome.failures.append(result)
                            on_failure(result)
                    on_batch(len(files[batch]))
            except KeyboardInterrupt:
                outcome.interrupted = True
            if folder.begun or not outcome.interrupted:
                folder.finish(lambda: render_gallery(self._gallery(outcome, title, settings)).encode("utf-8"))
            outcome.begun = folder.begun
        return outcome

    def _gallery(self, outcome: Outcome, title: str, settings: Mapping[str, str]) -> Gallery:
        """The page's content; files are named by their paths from the innermost folder that holds them all."""
        explained, failed = [card.name for card in outcome.cards], [failure.name for failure in outcome.failures]
        brief = brief_names(explained + failed)
        cards = [replace(card, name=brief[card.name]) for card in outcome.cards]
        failures = [replace(failure, name=brief[failure.name]) for failure in outcome.failures]
        return Gallery(title, settings, cards, failures, self.summarize(outcome), outcome.interrupted)

    def _batch(self, files: Sequence[Path], names: Sequence[str], folder: OutputFolder) -> Iterator[Card | Failure]:
        """Explain the readable ones of some files together; yield each one's card or failure, in order."""
        read = [self._read(path) for path in files]
        pictures = [picture for picture in read if isinstance(picture, Picture)]
        explained = iter(self._explain(pictures))
        for path, name, picture in zip(files, names, read, strict=True):
            if isinstance(picture, Failure):
                yield _failed(folder, picture)
                continue
            result = next(explained)
            if not bool(torch.isfinite(result.heatmap).all()):
                yield _failed(folder, Failure(printable(path), "its map holds values that are NaN or infinite"))
                continue
            yield self._write(folder, name, picture, result)

    def _read(self, path: Path) -> Picture | Failure:
        try:
            return load_picture(path, self.loaded.preprocessing)
        except ImageError as error:
            return Failure(printable(path), str(error))

    def _explain(self, pictures: Sequence[Picture]) -> list[_Explained]:
        if not pictures:
            return []
        inputs = torch.stack([picture.tensor for picture in pictures]).to(self.options.device)
        try:
            result = self.explainer.explain(inputs, target=self.options.target, relevance=False)
        except ValueError as error:
            raise RunError(f"{self.loaded.name}, pictures of {list(inputs.shape[1:])}: {error}") from error
        chosen = result.probability.tolist()
        predicted, leaks, targets = result.output.argmax(1).tolist(), result.leak.tolist(), result.target.tolist()
        heatmaps = result.heatmap.detach().float().cpu()
        return [_Explained(*one) for one in zip(heatmaps, targets, predicted, chosen, leaks, strict=True)]

    def _write(self, folder: OutputFolder, name: str, picture: Picture, result: _Explained) -> Card:
        """Write one picture's files and its row, in this order, so that a row stands for complete files."""
        options, class_name = self.options, self.loaded.classes[result.target]
        shown, signed = result.heatmap, is_signed(result.heatmap)
        if options.levels is not None:
            shown = (heat_quantize_signed if signed else heat_quantize)(shown, options.levels)
        drawn = overlay(shown, picture.image, smoothing=options.smoothing, signed=signed)
        map_name = folder.write(f"{name}.npy", encode_map(result.heatmap))
        overlay_name = folder.write(f"{name}.png", encode_image(drawn, "PNG"))
        picture_name = folder.write(f"{name}.jpg", encode_image(picture.image, "JPEG"))
        file = printable(picture.path)
        folder.add_row(
            Row(file, class_name, result.target, result.probability, result.leak, "", overlay_name, map_name)
        )
        further = list(self.facts(picture, result.heatmap, result.predicted)) if self.facts else []
        if result.predicted != result.target:
            further.insert(0, ("predicted instead", self.loaded.classes[result.predicted]))
        return Card(
            file, picture_name, overlay_name, class_name, result.probability, result.leak, tuple(further), signed
        )


@dataclass(frozen=True)
class _Explained:
    """One picture's part of a batch: its map, float32 [H, W] on the CPU, and its numbers."""

    heatmap: Tensor
    target: int
    predicted: int
    probability: float
    leak: float


def _failed(folder: OutputFolder, failure: Failure) -> Failure:
    folder.add_row(Row(failure.name, reason=failure.reason))
    return failure
