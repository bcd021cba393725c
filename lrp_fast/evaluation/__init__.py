"""Evaluating methods: the same pictures explained by each, measured by insertion and deletion, localisation, leak and time.

A method's numbers are on the disk as soon as it is done, so the same evaluation goes on where it was stopped. The
pictures of the sample are held in memory as bytes: 150 kB each at 224 pixels.
"""

from lrp_fast.evaluation.measuring import Evaluation, EvaluationOutcome, with_controls
from lrp_fast.evaluation.options import TARGETS, EvaluationError, EvaluationOptions
from lrp_fast.evaluation.sample import Sample, draw_sample, load_sample, match_labels

__all__ = [
    "TARGETS",
    "Evaluation",
    "EvaluationError",
    "EvaluationOptions",
    "EvaluationOutcome",
    "Sample",
    "draw_sample",
    "load_sample",
    "match_labels",
    "with_controls",
]
