"""From a matplotlib figure to an element of a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree as ET  # parses only what matplotlib wrote a moment ago

import matplotlib as mpl
from matplotlib.figure import Figure

from edge_ll.cli.demo.wording import clean

INK, MUTED, RULE = "#1f2328", "#57606a", "#c9ced6"
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's own defaults and these few changes, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "axes.edgecolor": RULE,
                "axes.linewidth": 1.0,
                "axes.spines.right": False,
                "axes.spines.top": False,
                "font.size": 10.0,
                "hatch.linewidth": 0.6,
                "svg.fonttype": "none",
                "svg.hashsalt": "edge_ll",
                "text.color": INK,
                "text.parse_math": False,  # a device may be called "$x$"
                "xtick.color": RULE,
                "xtick.labelcolor": MUTED,
                "ytick.color": RULE,
                "ytick.labelcolor": MUTED,
            }
        )
        yield


def to_svg(figure: Figure, *, prefix: str, title: str) -> str:
    """A figure as an element for a page: accessible, free of namespaces, all ids its own.

    Args:
        figure: What to draw, at 72 dots per inch.
        prefix: Put before each id, unique on the page: matplotlib's ids repeat between figures.
        title: What the figure shows, for those who cannot see it.
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The browser draws the text, with fonts that may hold what matplotlib's lack.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(file.getvalue())  # noqa: S314
    for child in list(root):
        # Its licence note, and a style sheet that would apply to the whole page.
        if child.tag == f"{_SVG}metadata" or child.find(f"{_SVG}style") is not None:
            root.remove(child)
    used = set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", ET.tostring(root, encoding="unicode")))
    for element in root.iter():
        _tidy(element, used, prefix)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    name = clean(title)
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": name})
    heading = ET.Element("title")
    heading.text = name
    root.insert(0, heading)
    return ET.tostring(root, encoding="unicode")


def _tidy(element: ET.Element, used: set[str], prefix: str) -> None:
    """Shorten one element and make its ids and references its figure's own."""
    element.tag = element.tag.removeprefix(_SVG)
    if element.tail is not None:
        element.tail = element.tail.strip()
    if element.tag != "text" and element.text is not None:
        element.text = element.text.strip()
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        if key == "id":
            if value in used:
                element.attrib["id"] = prefix + value
        elif key == f"{_XLINK}href":
            element.attrib["href"] = value.replace("#", f"#{prefix}", 1)
        elif key == "style":
            # The page's own font, which is the reader's system font.
            style = re.sub(r"font-family:[^;]*;?\s*", "", value)
            element.attrib[key] = style.replace("url(#", f"url(#{prefix}")
        elif key == "d":
            element.attrib[key] = " ".join(value.split())
        elif not (key == "transform" and value.startswith("rotate(-0 ")):
            element.attrib[key] = value.replace("url(#", f"url(#{prefix}")
