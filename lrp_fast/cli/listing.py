"""``lrp-fast composites`` and ``lrp-fast models``: what can be chosen."""

from __future__ import annotations

from lrp_fast.composites import list_composites
from lrp_fast.models import list_models

from .common import app, print_table, reporting


@app.command()
@reporting()
def composites() -> None:
    """List the composites: which rules each applies."""
    print_table("composite", list_composites())


@app.command()
@reporting()
def models() -> None:
    """List the networks that are known by name."""
    print_table("model", list_models())
