"""Builds the site: pages from docs/*.md, the reference from the docstrings, the gallery from the notebooks' own outputs.

    python docs/build.py [FOLDER]          default: site/

Needs pdoc (pip install -e '.[docs]'). Nothing is run but the imports; the pages open from the disk, without a server.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import pkgutil
import re
import shutil
import sys
import warnings
from html import escape
from pathlib import Path
from types import ModuleType

import pdoc
import pdoc.docstrings
import pygments
from markupsafe import Markup
from pdoc import render, render_helpers
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

DOCS = Path(__file__).resolve().parent
REPO = DOCS.parent
sys.path.insert(0, str(REPO))  # a checkout documents itself, installed or not

LINKS = (("index", "fnattn"), ("which_attention", "Which attention?"), ("jax", "Coming from JAX"), ("gallery", "Notebooks"),
         ("readme", "README"), ("api/index", "Reference"))
PARTS = ("fnattn", "fnattn.core", "fnattn.tree", "fnattn.random", "fnattn.taps", "fnattn.ops", "fnattn.ops.layouts",
         "fnattn.attentions", "fnattn.models", "fnattn.inspect", "fnattn.ensemble", "fnattn.optim", "fnattn.checkpoint",
         "fnattn.data", "fnattn.convert", "fnattn.distributed", "fnattn.testing")
WITH_MODULES = ("fnattn.attentions", "fnattn.models", "fnattn.distributed")  # each file inside has a page


def build(site: Path) -> None:
    """Writes the whole site into a folder, which is emptied first if a build made it.

    Raises:
        ValueError: the folder holds something else.
    """
    mark = site / ".made-by-docs-build"
    if site.exists() and any(site.iterdir()):
        if not mark.exists():
            raise ValueError(f"docs/build.py: expected an empty folder or an earlier site; got {site}.\n  Name another folder.")
        shutil.rmtree(site)
    site.mkdir(parents=True, exist_ok=True)
    mark.touch()
    configure()
    for source in sorted(DOCS.glob("*.md")):
        write(site / f"{source.stem}.html", source.read_text())
    write(site / "readme.html", (REPO / "README.md").read_text())
    write(site / "gallery.html", gallery(site))
    reference(site / "api")


def configure() -> None:
    """pdoc's settings, and our docstrings' format: sections as Google's, and `name:  text` lines as lists."""
    # A NamedTuple's own __init__ has annotations that pdoc cannot look up; it then shows them as they are written.
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    render.configure(docformat="markdown", template_directory=DOCS / "template", footer_text="fnattn")
    render.env.globals["site_links"] = LINKS
    render.env.globals["dark_code"] = Markup(HtmlFormatter(style="github-dark").get_style_defs(".pdoc-code"))
    render.env.filters["to_markdown"] = lambda doc: pdoc.docstrings.google(named_lines(doc))


def named_lines(doc: str) -> str:
    """`dim:  width of x.` at the start of a line, with what is indented below it, as one item of a list."""
    item = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*):[ ]+(\S.*(?:\n[ ]{8,}\S.*)*)", re.M)
    doc = item.sub(lambda m: f"- **{m[1]}**: " + re.sub(r"\n +", " ", m[2]), doc)
    return re.sub(r"^(?!- )(\S.*)\n(?=- \*\*)", r"\1\n\n", doc, flags=re.M)


# ------------------------------------------------------------------------------------------------ pages


def write(path: Path, markdown: str, body: str = "") -> None:
    """One page with the site's frame; links to .md and .ipynb sources lead to the pages made from them."""
    html = render_helpers.to_html(markdown)
    text = re.sub(r'href="(?!https?:)([^"#]+)\.(?:md|ipynb)(#[^"]*)?"', r'href="\1.html\2"', str(html)) + body
    title, toc = re.search(r"^# (.+)$", markdown, re.M), html.toc_html or ""
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render.env.get_template("page.html.jinja2")
    path.write_text(page.render(
        title=title[1].replace("`", "") if title else path.stem, content=Markup(text), here=path.stem,
        contents=Markup(toc if toc.count("<li") > 1 else ""), root="../" if path.parent.name == "notebooks" else ""))


def code(source: str) -> str:
    return pygments.highlight(source, PythonLexer(), HtmlFormatter(cssclass="pdoc-code codehilite"))


def gallery(site: Path) -> str:
    """A page for each notebook, and the page of their first plots."""
    cards = []
    for path in sorted((REPO / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        first = "".join(cells[0]["source"])
        title = re.search(r"^# (.+)$", first, re.M)[1]
        story = re.sub(r"[`*]", "", first.split("\n\n", 2)[1].replace("\n", " "))
        story = re.sub(r"(?<=[.!?]) [^.!?]*:$", "", story)  # a sentence that only leads to what follows it
        story = re.sub(r":$", ".", story)
        pictures = notebook(site, path.stem, first, cells[1:], title)
        cards.append(f'<a class="card" href="notebooks/{path.stem}.html"><img loading="lazy" src="{pictures[0]}" alt="">'
                     f"<strong>{escape(title.replace('`', ''))}</strong><span>{escape(story)}</span></a>")
    return ("# Notebooks\n\nEach tells one story, runs in under a minute on a CPU, and is shown with the outputs of that run. "
            "The sources are in `notebooks/`.\n\n<div class=\"cards\">" + "".join(cards) + "</div>\n")


def notebook(site: Path, stem: str, first: str, cells: list[dict], title: str) -> list[str]:
    """The page of one notebook; returns its pictures, as links from the site's root."""
    html: list[str] = []
    pictures: list[str] = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            html.append(str(render_helpers.to_html(source)))
            continue
        html.append(code(source))
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"pictures/{stem}_{len(pictures)}.png"
                pictures.append(picture)
                (site / "pictures").mkdir(exist_ok=True)
                (site / picture).write_bytes(base64.b64decode("".join(data["image/png"])))
                html.append(f'<img class="plot" loading="lazy" src="../{picture}" alt="plot {len(pictures)} of: {escape(title)}">')
                continue
            text = "".join(output.get("text", data.get("text/plain", ())))
            if text:
                html.append(f'<pre class="output">{escape(text)}</pre>')
    write(site / "notebooks" / f"{stem}.html", first, "\n".join(html))
    return pictures


# ------------------------------------------------------------------------------------------------ reference


def reference(folder: Path) -> None:
    """A page per module, an index of modules, and the search."""
    names = [*PARTS]
    for part in WITH_MODULES:
        inner = pkgutil.iter_modules(importlib.import_module(part).__path__)
        names += [f"{part}.{m.name}" for m in inner if not m.name.startswith("_")]
    modules = {name: importlib.import_module(name) for name in sorted(names)}
    for module in modules.values():
        if hasattr(module, "__path__") and not hasattr(module, "__all__"):
            module.__all__ = offered(module, modules)
    pages = {name: pdoc.doc.Module(module) for name, module in modules.items()}
    for name, page in pages.items():
        path = folder / (name.replace(".", "/") + ".html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render.html_module(page, pages))
    (folder / "search.js").write_text(render.search_index(pages))
    lines = [f"- [`{name}`]({name.replace('.', '/')}.html): {summary(module)}" for name, module in modules.items()]
    index = render.env.get_template("page.html.jinja2").render(
        title="Reference", here="api/index", root="../", contents="",
        content=Markup(render_helpers.to_html("# Reference\n\nMade from the docstrings.\n\n" + "\n".join(lines))))
    (folder / "index.html").write_text(index)


def summary(module: ModuleType) -> str:
    """The first sentence of a module's docstring."""
    return " ".join(inspect.getdoc(module).split("\n\n")[0].split())


def offered(module: ModuleType, modules: dict[str, ModuleType]) -> list[str]:
    """What a package offers under its own name: documented pages, and every public thing of fnattn in its namespace."""
    names = [name for name, value in vars(module).items() if not name.startswith("_")
             and not isinstance(value, ModuleType) and str(getattr(value, "__module__", "")).startswith("fnattn")]
    return names + [full.rpartition(".")[2] for full in modules if full.rpartition(".")[0] == module.__name__]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else REPO / "site"
    build(target)
    print(target / "index.html")
