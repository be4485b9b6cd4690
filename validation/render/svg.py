"""Elements of an inline SVG. ElementTree escapes every string by construction; colours are CSS classes of the page."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from validation.render.wording import clean


def picture(width: int, height: int, key: str, title: str, description: str) -> ET.Element:
    """An empty chart of the given px, with a title and a description for who can't see it; ``key`` is unique on the page."""
    attributes = {"class": "chart", "viewBox": f"0 0 {width} {height}", "role": "img", "aria-labelledby": f"{key}-title {key}-desc"}
    root = ET.Element("svg", attributes)
    ET.SubElement(root, "title", id=f"{key}-title").text = clean(title)
    ET.SubElement(root, "desc", id=f"{key}-desc").text = clean(description)
    return root


def icon(style: str, width: int, height: int) -> ET.Element:
    """An empty drawing beside a number that says the same: hidden from screen readers."""
    return ET.Element("svg", {"class": style, "viewBox": f"0 0 {width} {height}", "preserveAspectRatio": "xMinYMid meet", "aria-hidden": "true"})


def add(parent: ET.Element, tag: str, style: str, **attributes: float | str) -> ET.Element:
    """Add a shape; numbers are px."""
    written = {key: value if isinstance(value, str) else _coordinate(value) for key, value in attributes.items()}
    return ET.SubElement(parent, tag, {"class": style, **written})


def write(parent: ET.Element, text: str, x: float, y: float, style: str, anchor: str) -> None:
    """Add a line of text; ``anchor`` is start, middle or end."""
    label = add(parent, "text", style, x=x, y=y)
    label.set("text-anchor", anchor)
    label.text = clean(text)


def _coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def text_of(root: ET.Element) -> str:
    """The drawing as markup."""
    return ET.tostring(root, encoding="unicode")
