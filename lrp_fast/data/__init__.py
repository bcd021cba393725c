"""Data sets as ordered, fingerprinted lists of samples whose bytes are read one at a time, in any process.

A kind of source is one file here and its row in ``KINDS`` of ``kinds.py``. Nothing that comes from outside is
unpickled but torch's own tensors and plain containers, and no key or class name is ever used as a path.
"""

from .kinds import KINDS, open_source
from .source import FileSource, Source, SourceError

__all__ = ["KINDS", "FileSource", "Source", "SourceError", "open_source"]
