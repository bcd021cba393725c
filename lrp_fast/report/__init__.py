"""Results for people to look at: an output folder of overlays, maps and a table, and a gallery page over it."""

from .folder import PAGE, ForeignFileError, OutputFolder, Row, output_names
from .gallery import Card, Failure, Gallery, percent, render_gallery
from .run import Outcome, Run, RunError, RunOptions

__all__ = [
    "PAGE",
    "Card",
    "Failure",
    "ForeignFileError",
    "Gallery",
    "Outcome",
    "OutputFolder",
    "Row",
    "Run",
    "RunError",
    "RunOptions",
    "output_names",
    "percent",
    "render_gallery",
]
