"""From ``nn.Module`` to :class:`~lrp_fast.plan.Plan`, by torch.fx.

The graph is read node by node, in execution order, by one handler for each operation that has a relevance rule;
anything else is a :class:`~lrp_fast.plan.TraceError`. Changes in place are followed: whoever reads a tensor after it
was changed reads the changed value, as in the model, and a view of changed memory cannot be read.
"""

from lrp_fast.trace.tracing import check_eval, restored, trace

__all__ = ["check_eval", "restored", "trace"]
