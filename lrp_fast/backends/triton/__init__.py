"""The triton backend: fused kernels for what they serve, with a reason for what they do not."""

from lrp_fast.backends.triton.binding import check_device, serve
from lrp_fast.backends.triton.choice import Choices
from lrp_fast.backends.triton.passes import channel_sum, quantize
from lrp_fast.backends.triton.tune import tune

__all__ = ["Choices", "channel_sum", "check_device", "quantize", "serve", "tune"]
