"""How good heatmaps are: Insertion/Deletion, localisation, conservation, sanity checks, and how sure the numbers are.

A metric is a function of tensors that gives one number for each image, float64 on the CPU; :func:`bootstrap` makes of
them a mean and its interval. What needs another kind of argument says so.
"""

from .conservation import Conservation, StepLoss, audit_dataset, step_losses
from .insertion_deletion import InsertionDeletion, insertion_deletion
from .localisation import pointing_game, relevance_mass, relevance_rank
from .randomization import RandomizationCurve, parameter_randomization
from .statistics import Interval, bootstrap, bootstrap_difference

__all__ = [
    "Conservation",
    "InsertionDeletion",
    "Interval",
    "RandomizationCurve",
    "StepLoss",
    "audit_dataset",
    "bootstrap",
    "bootstrap_difference",
    "insertion_deletion",
    "parameter_randomization",
    "pointing_game",
    "relevance_mass",
    "relevance_rank",
    "step_losses",
]
