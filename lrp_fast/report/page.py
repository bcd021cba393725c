"""What all pages share: how their templates are filled in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2


def fill_template(name: str, filters: dict[str, Callable[[Any], Any]], **values: Any) -> str:
    """The HTML of a template; every value is escaped, and one that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lrp_fast.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name).render(**values)
