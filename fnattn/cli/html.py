"""A report as one HTML page with everything inside: no other file, no script, no network; follows the reader's light or dark."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #59636e; --paper: #ffffff; --box: #f6f8fa; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9198a1; --paper: #0d1117; --box: #161b22; --line: #3d444d; }
}
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 48rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .25rem; }
p { margin: .25rem 0 .75rem; color: var(--faint); }
img { width: 100%; height: auto; display: block; }
pre { padding: 1rem; background: var(--box); border: 1px solid var(--line); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--faint); white-space: nowrap; width: 11rem; }
td { overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .85rem; }
"""
# Tables with a header row, wider than a phone: they scroll in themselves, the page does not.
WIDE = """
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
.wide table { width: auto; min-width: 100%; }
.wide th { width: auto; border-bottom: 1px solid var(--line); }
.wide td { overflow-wrap: normal; white-space: nowrap; }
.wide td.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 18rem; }
picture { display: block; margin: .5rem 0; }
nav { margin: 1rem 0 0; font-size: .9rem; }
nav a { margin-right: 1rem; color: var(--ink); }
@media (max-width: 600px) { .wide td:first-child, .wide th { white-space: normal; } }
@media (max-width: 600px) { body { padding: 1.25rem .9rem 3rem; } h1 { font-size: 1.3rem; } }
"""


class Drawing(NamedTuple):
    """One figure in four forms, PNG: for a wide or a narrow page, light or dark."""

    alt: str
    light: bytes
    dark: bytes
    narrow_light: bytes
    narrow_dark: bytes


class Table(NamedTuple):
    """A header and rows of cells; the last column wraps if `text`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text: bool = False


class Section(NamedTuple):
    """One part of a report: a heading, what it shows, and figures and tables in order."""

    heading: str
    caption: str
    parts: Sequence[Drawing | Table | str]  # a str is a text as it is


def report(*, title: str, intro: str, sections: Sequence[Section]) -> str:
    """A page of sections, each figure with its table, readable at any width."""
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(intro)}</p>"]
    links = "".join(f'<a href="#s{i}">{escape(section.heading)}</a> ' for i, section in enumerate(sections))
    parts.append(f"<nav>{links}</nav>")
    for i, section in enumerate(sections):
        parts.append(f'<h2 id="s{i}">{escape(section.heading)}</h2><p>{escape(section.caption)}</p>')
        parts += [_part(part) for part in section.parts]
    return _document(title, STYLE + WIDE, "\n".join(parts))


def _part(part: Drawing | Table | str) -> str:
    if isinstance(part, str):
        return f"<pre>{escape(part)}</pre>"
    if isinstance(part, Drawing):
        dark, narrow = "(prefers-color-scheme: dark)", "(max-width: 600px)"
        return (f'<picture><source media="{narrow} and {dark}" srcset="{_uri(part.narrow_dark)}">'
                f'<source media="{narrow}" srcset="{_uri(part.narrow_light)}">'
                f'<source media="{dark}" srcset="{_uri(part.dark)}">'
                f'<img src="{_uri(part.light)}" alt="{escape(part.alt)}"></picture>')
    head = "".join(f"<th>{escape(column)}</th>" for column in part.columns)
    last = len(part.columns) - 1
    body = "".join("<tr>" + "".join(f'<td class="text">{escape(str(cell))}</td>' if part.text and i == last
                                    else f"<td>{escape(str(cell))}</td>" for i, cell in enumerate(row)) + "</tr>"
                   for row in part.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def page(*, title: str, intro: str, figures: Sequence[tuple[str, str, bytes, bytes]], sample: tuple[str, str],
         tables: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The page.

    Args:
        figures: (heading, caption, PNG for a light page, PNG for a dark one).
        sample: (caption, text).
        tables: (heading, name -> value).
    """
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(intro)}</p>"]
    for heading, caption, light, dark in figures:
        parts.append(f"<h2>{escape(heading)}</h2><p>{escape(caption)}</p><picture>"
                     f'<source media="(prefers-color-scheme: dark)" srcset="{_uri(dark)}">'
                     f'<img src="{_uri(light)}" alt="{escape(heading)}"></picture>')
    parts.append(f"<h2>Sample</h2><p>{escape(sample[0])}</p><pre>{escape(sample[1])}</pre>")
    for heading, rows in tables:
        cells = "".join(f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
        parts.append(f"<h2>{escape(heading)}</h2><table>{cells}</table>")
    return _document(title, STYLE, "\n".join(parts))


def _document(title: str, style: str, body: str) -> str:
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
            f"<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n")


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
