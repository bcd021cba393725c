"""The gallery page, read by a parser: what it shows, that no name becomes markup, that it needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from lrp_fast.report import Card, Failure, Gallery, percent, render_gallery

NASTY = [
    "<b>.png",
    "<script>alert(1)</script>.png",
    '"><img src=x onerror=alert(1)>.png',
    "' onload='alert(1)",
    "{{ 7 * 7 }}.png",
    "a&amp;b.png",
    "{% raw %}",
]


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def card(name: str = "cat.png", **changes: object) -> Card:
    values: dict[str, object] = {
        "name": name,
        "picture": "cat.jpg",
        "overlay": "cat.png",
        "class_name": "tabby",
        "probability": 0.8349,
        "leak": 0.0123,
    }
    return Card(**{**values, **changes})  # type: ignore[arg-type]


def gallery(*cards: Card, **changes: object) -> Gallery:
    return Gallery("Title", {"model": "resnet18"}, cards, **changes)  # type: ignore[arg-type]


def test_a_card_shows_what_it_was_given() -> None:
    shown = card(facts=[("relevance inside the mask", "83 %")])
    page = Page(render_gallery(gallery(shown, summary={"explained": "1"})))
    assert [image["src"] for image in page.all("img")] == ["cat.jpg", "cat.png"]
    assert [link["href"] for link in page.all("a")] == ["cat.jpg", "cat.png"]
    text = " ".join(" ".join(page.text).split())
    for expected in ("tabby 83.5 %", "leak 1.23 %", "relevance inside the mask 83 %", "cat.png", "explained 1"):
        assert expected in text
    assert "model resnet18" in text
    assert [element["style"] for element in page.all("i")] == ["width: 83.49%"]


@pytest.mark.parametrize("nasty", NASTY)
def test_nothing_in_a_name_becomes_markup(nasty: str) -> None:
    plain = Page(render_gallery(gallery(card(facts=[("f", "t")]), failures=[Failure("f", "r")])))
    everything = card(nasty, class_name=nasty, picture=nasty, overlay=nasty, facts=[(nasty, nasty)])
    settings = {nasty: nasty}
    page = Page(render_gallery(Gallery(nasty, settings, [everything], [Failure(nasty, nasty)], summary={nasty: nasty})))
    extra = ["div", "dt", "dd", "dl"]  # the summary's own
    tags = [tag for tag, _ in page.elements if tag not in extra]
    assert tags == [tag for tag, _ in plain.elements if tag not in extra]
    # Title and heading, summary and settings and fact by label and text, class, name, failure and reason.
    assert sum(nasty in text for text in page.text) == 2 + 2 + 2 + 2 + 2 + 2
    assert [unquote(image["src"] or "") for image in page.all("img")] == [nasty, nasty]
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]


def test_addresses_are_quoted() -> None:
    page = Page(render_gallery(gallery(card(picture="a b#c?d%.jpg", overlay="ü.png"))))
    assert [image["src"] for image in page.all("img")] == ["a%20b%23c%3Fd%25.jpg", "%C3%BC.png"]


def test_the_page_needs_nothing_from_outside() -> None:
    html = render_gallery(gallery(card(), card("b")))
    assert "://" not in html
    page = Page(html)
    assert not page.all("script")
    assert not page.all("link")
    assert "url(" not in html
    assert "@import" not in html


def test_failures_are_listed_with_reasons() -> None:
    html = render_gallery(gallery(failures=[Failure("one.png", "empty"), Failure("two.png", "too large")]))
    text = " ".join(" ".join(Page(html).text).split())
    assert "2 not explained" in text
    assert "one.png empty" in text
    assert "two.png too large" in text
    assert "not explained" not in render_gallery(gallery(card()))


def test_an_interruption_is_said() -> None:
    assert "interrupted" in render_gallery(gallery(card(), interrupted=True))
    assert "interrupted" not in render_gallery(gallery(card()))


def test_the_scales_in_use_are_explained() -> None:
    for signs, classes in (([False], ["positive"]), ([True], ["signed"]), ([True, False], ["positive", "signed"])):
        page = Page(render_gallery(gallery(*[card(signed=signed) for signed in signs])))
        scales = [element["class"] for element in page.all("div") if (element.get("class") or "").startswith("scale")]
        assert scales == [f"scale {name}" for name in classes]


def test_light_and_dark_define_the_same_colors() -> None:
    html = render_gallery(gallery(card()))
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    assert set(re.findall(r"--\w+", light)) == set(re.findall(r"--\w+", dark))


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.00 %"), (1.0, "100 %"), (0.99951, "100 %"), (0.8349, "83.5 %"), (0.0123, "1.23 %"), (-0.05, "−5.00 %"),
     (3e-7, "< 0.01 %"), (-3e-7, "< 0.01 %"), (12.5, "1250 %")],
)  # fmt: skip
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text
