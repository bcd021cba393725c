"""The data set and network that come with the package: drawn pictures of textured shapes, and a small ResNet.

``drawing`` draws, ``pictures`` lists the committed dozen, ``network`` holds the network, and ``training`` (imported
only when run, as ``python -m lrp_fast.embedded.training``) makes the committed weights.
"""

from .drawing import CLASSES, Picture, draw, draw_batch
from .network import MEAN, STD, embedded_network, network_input
from .pictures import EmbeddedPicture, embedded_pictures

__all__ = [
    "CLASSES",
    "MEAN",
    "STD",
    "EmbeddedPicture",
    "Picture",
    "draw",
    "draw_batch",
    "embedded_network",
    "embedded_pictures",
    "network_input",
]
