"""Layer-wise relevance propagation for residual networks, fast and checked against a float64 reference.

from lrp_fast import LRP, heat_quantize
result = LRP(model).explain(images)          # the method of Otsuki et al., ECCV 2024
heat_quantize(result.heatmap, levels=8)      # N x H x W
"""

from typing import TYPE_CHECKING, Any

from lrp_fast.composites import Composite, list_composites, register_composite
from lrp_fast.explain import LRP, Attribution
from lrp_fast.heatmap import heat_quantize
from lrp_fast.plan import TraceError
from lrp_fast.splits import Splits
from lrp_fast.version import VERSION as __version__

if TYPE_CHECKING:
    from lrp_fast.store import open_store

__all__ = [
    "LRP",
    "Attribution",
    "Composite",
    "Splits",
    "TraceError",
    "__version__",
    "heat_quantize",
    "list_composites",
    "open_store",
    "register_composite",
]


def __getattr__(name: str) -> Any:
    """What only data sets need is imported when it is asked for."""
    if name == "open_store":
        from lrp_fast.store import open_store

        return open_store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
