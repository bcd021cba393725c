"""What a store holds, in the forms that other tools open: a ViRelAy project, NumPy, PNG, Parquet.

A format is one file here and its row in ``FORMATS`` of ``formats.py``. A store is read slice by slice; what is written
stands under its name only when it is whole.
"""

from .formats import FORMATS, Exported, export_store
from .selection import ExportError, OptionError

__all__ = ["FORMATS", "ExportError", "Exported", "OptionError", "export_store"]
