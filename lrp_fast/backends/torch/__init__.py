"""The torch backend: stacked weights and gates.

A linear layer's forward pass runs one convolution with the weights its rule needs stacked on top of its own, and turns
the denominators into *gates* at once: ``gate_g = numerator · mask_g / stab(z_g)``. Its backward pass multiplies what
comes in by the gates and runs one transposed convolution. Relevance travels between layers as two tensors,
``R = x · acc + dense``: whoever multiplies by its input hands over ``acc`` alone, and if nobody else reads x, the product
with x is in the gate of the layer that made x, so that R itself is never formed.

Every operation is bound once to its weights, dtype, device and input shape. On a CPU the maps of a convolution are not stacked but
packed one by one for oneDNN (:mod:`lrp_fast.backends.torch.packed`). Tensors keep the channels last in memory.
Where several maps are wanted of one image, they lie in front of the batch: a relevance tensor has (maps · N) rows where
its gate has N.
"""

from lrp_fast.backends.torch.gates import Gates, Message, channels_last
from lrp_fast.backends.torch.linear import LinearOperation, Term, transposed_convolution
from lrp_fast.backends.torch.merges import MergeOperation, move_back
from lrp_fast.backends.torch.pools import AverageMap, BlockMap, ProportionalPool, WinnerPool

__all__ = [
    "AverageMap",
    "BlockMap",
    "Gates",
    "LinearOperation",
    "MergeOperation",
    "Message",
    "ProportionalPool",
    "Term",
    "WinnerPool",
    "channels_last",
    "move_back",
    "transposed_convolution",
]
