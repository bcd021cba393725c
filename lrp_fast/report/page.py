"""What all pages share: how their templates, which extend ``templates/page.html``, are filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2

from lrp_fast.heatmap import color_scale


def fill_template(
    name: str,
    settings: Mapping[str, str],
    signs: Iterable[bool],
    filters: Mapping[str, Callable[[Any], Any]],
    **values: Any,
) -> str:
    """The HTML of a template; every value is escaped, and one that is missing is an error.

    ``settings``: the page's header, label to text; ``signs``: which colour scales it explains, signed or not.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lrp_fast.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    scales = {signed: ", ".join(color_scale(signed)) for signed in sorted(set(signs))}
    return environment.get_template(name).render(settings=settings, scales=scales, **values)
