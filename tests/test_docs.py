"""The pages under docs/ are true, and the site that is made from them is whole: code runs, figures are kept ones, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted((REPO / "docs").glob("*.md"))
WHICH = (REPO / "docs" / "which_attention.md").read_text()
RUN = re.search(r"benchmarks/results/[\w.-]+", WHICH)[0]
ENV = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def python(*args: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", *args], env=ENV, cwd=REPO, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def program(text: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))


def table(head: str) -> list[list[str]]:
    """The body of the table whose header line starts so."""
    lines = WHICH[WHICH.index(f"\n| {head}") + 1:].split("\n\n", 1)[0].splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[2:]]


# ------------------------------------------------------------------------------------------------ code


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_block_of_code_on_a_page_runs_in_order(page):
    python("-c", program(page.read_text()))


def test_keys_are_jaxs_own_as_the_page_says():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    del jax
    code = program((REPO / "docs" / "jax.md").read_text().split("## init and apply", 1)[0])
    python("-c", code + "\nimport jax, numpy as np\n"
                        "theirs = jax.random.uniform(jax.random.fold_in(jax.random.key(7), 3), (4,))\n"
                        "assert np.array_equal(np.asarray(theirs), drawn.numpy())\n")


# ------------------------------------------------------------------------------------------------ figures


@pytest.fixture(scope="module")
def kept() -> dict[tuple[str, str], dict]:
    return {(row["case"], row["pass"]): row for row in json.loads((REPO / RUN).read_text())["results"]}


def test_the_page_names_the_run_that_its_figures_come_from():
    assert f"`{RUN}`" in WHICH and re.findall(r"benchmarks/results/[\w.-]+", WHICH) == [RUN]


def test_costs_per_token_are_those_of_the_kept_run(kept):
    rows = table("case | 1k")
    assert {row[0] for row in rows} == {case for case, _ in kept if case.startswith("scaling")}
    for case, *shown, growth in rows:
        row = kept[case, "forward"]
        assert shown == [f"{cost:.0f}" for cost in row["ns_per_token"]], case
        assert growth == f"{row['growth']:.1f}", case


def test_times_of_operators_layers_and_steps_are_those_of_the_kept_run(kept):
    heads = list(re.finditer(r"\n\| (case \| (?:forward|shape)[^\n]*)", WHICH))
    rows = [line for m in heads for line in WHICH[m.end():].split("\n\n", 1)[0].splitlines()[2:]]
    assert len(rows) == 16
    for line in rows:
        case, first, second = (cell.strip(" `") for cell in line.strip("|").split("|"))
        if case.startswith("decode"):
            assert first == kept[case, "forward"]["shape"], case
            assert second == f"{kept[case, 'forward']['ours_ms']:.2f}", case
            continue
        for shown, name in ((first, "forward"), (second, "forward+backward")):
            time = kept[case, name]["ours_ms"]
            assert shown == (f"{time:.1f}" if time < 100 else f"{time:.0f}"), (case, name)


def test_sizes_of_states_are_those_that_the_code_counts():
    sizes = json.loads(python("-c", program(WHICH) + "\nimport json\nprint(json.dumps(sizes))"))
    assert {row[0]: [int(n.replace(",", "")) for n in row[1:3]] for row in table("state of")} == sizes


def test_every_family_has_its_limits_on_the_page():
    from fnattn import attentions

    rows = table("family | it cannot")
    assert {name for row in rows for name in re.findall(r"\w+", row[0])} == set(attentions.FAMILIES)
    assert all(len(row) == 2 and len(row[1].split()) > 3 for row in rows)


# ------------------------------------------------------------------------------------------------ the site


class Page(HTMLParser):
    """The links of a page, the names that a link can lead to, and pictures without a description."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.names |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]
        assert tag != "img" or "alt" in attrs


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if importlib.util.find_spec("pdoc") is None:
        pytest.skip("pdoc is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    python("docs/build.py", str(folder))
    return folder


def test_every_internal_link_of_the_site_resolves(site):
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    lost = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            file, _, name = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            if not target.is_file() or name and target in pages and name not in pages[target].names:
                lost.append(f"{path.relative_to(site)} -> {link}")
    assert not lost, lost[:20]


def test_nothing_on_the_site_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not re.search(r"<(?:script|img|link)[^>]+(?:src|href)=[\"']https?:", path.read_text()), path.relative_to(site)


@pytest.mark.parametrize("part", ["fnattn", "ops", "attentions", "models", "inspect", "ensemble", "testing", "convert", "random", "tree",
                                  "taps"])
def test_the_reference_has_a_page_for_each_part_with_its_functions(site, part):
    text = (site / "api" / ("fnattn.html" if part == "fnattn" else f"fnattn/{part}.html")).read_text()
    one = {"fnattn": "init_state", "ops": "gate_loop", "attentions": "register", "models": "lm", "inspect": "hvp", "ensemble": "train_step",
           "testing": "check_family", "convert": "load", "random": "fold_in", "tree": "remat", "taps": "harvest"}[part]
    assert f'id="{one}"' in text or f"{part}/{one}.html" in text


def test_the_gallery_shows_the_first_plot_of_every_notebook(site):
    text = (site / "gallery.html").read_text()
    for path in (REPO / "notebooks").glob("*.ipynb"):
        assert f'href="notebooks/{path.stem}.html"' in text and f'src="pictures/{path.stem}_0.png"' in text
        assert (site / "pictures" / f"{path.stem}_0.png").stat().st_size > 1000


def test_a_folder_with_other_things_in_it_is_left_alone(site, tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(AssertionError, match="expected an empty folder or an earlier site"):
        python("docs/build.py", str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "all of it"
