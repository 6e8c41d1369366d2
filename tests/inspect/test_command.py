"""`fnattn inspect`: from a checkpoint to a page that a browser shows, and the same numbers as JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import torch

from fnattn import checkpoint, random
from fnattn.attentions import gate_loop, simple_gate_loop, taylor
from fnattn.cli import main
from fnattn.cli.inspect import exactly
from fnattn.models import lm

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
QUICK = ["--samples", "4", "--curvature-samples", "2", "--runs", "2", "--steps", "4"]
TEXT = "The map of a head is what takes its values to its output. " * 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(TEXT + "<script>alert('not me')</script> " * 20)
    return path


@pytest.fixture(scope="module")
def looked_at(corpus, tmp_path_factory):
    """A small training and its report."""
    folder = tmp_path_factory.mktemp("run")
    small = ["--dim", "12", "--depth", "2", "--steps", "6", "--length", "24", "--batch", "2", "--eval-windows", "2", "--eval-every", "3"]
    assert main(["train", "--out", str(folder), "--data", str(corpus), "--attention", "heads=2", "--quiet", *small]) == 0
    assert main(["inspect", str(folder), "--quiet", *QUICK]) == 0
    return folder / "inspect"


def test_the_report_holds_everything_that_was_asked_for(looked_at):
    page = (looked_at / "report.html").read_text()
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings == ["Loss curve", "Gradient by layer", "Gradient by head", "Gradient noise", "Hessian spectrum", "The text looked at",
                        "Attention of blocks.0.attn", "Attention of blocks.1.attn", "Effective context", "Decay",
                        "Samples that stand out", "Samples with the smallest gradients"]
    # A figure never stands without its numbers.
    figures = page.split("<picture>")[1:]
    assert len(figures) == 9 and all("<table>" in part.split("<picture>")[0] for part in figures)


def test_the_page_needs_nothing_but_itself(looked_at):
    page = (looked_at / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.findall(r"""(?:src|srcset|href)=["'](?!data:|#)""", page) and "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "max-width: 600px" in page


def test_the_numbers_are_json_and_those_of_the_library(looked_at):
    found = json.loads((looked_at / "report.json").read_text())
    assert set(found) == {"checkpoint", "step", "parameters", "text", "loss", "gradient", "noise", "hessian", "attention", "character",
                          "outliers"}
    assert found["attention"]["relative_error"] < 1e-5
    saved = checkpoint.load(looked_at.parent / "checkpoint.safetensors")
    params = exactly(saved.params)
    assert params.cfg.attention.frac_gradient_state_transition == 1.0
    assert found["parameters"] == sum(p.numel() for p in params if isinstance(p, torch.Tensor)) + sum(
        p.numel() for block in params.blocks for part in block for p in part if isinstance(p, torch.Tensor)) + params.norm.gamma.numel()
    layer = found["attention"]["layers"]["blocks.0.attn"]
    assert len(layer["maps"]) == 2 and len(layer["maps"][0]) == found["attention"]["positions"] == 64
    assert found["hessian"]["smallest"] < found["hessian"]["largest"]
    assert len(found["outliers"]["norms"]) == 4 and len(found["gradient"]["heads"]["blocks.1.attn"]) == 2


@pytest.mark.parametrize("attention", [taylor.Config(dim=8, heads=2, dim_head=4, causal=True), simple_gate_loop.Config(dim=8),
                                       gate_loop.Config(dim=8)], ids=["taylor", "simple_gate_loop", "one head per channel"])
def test_other_families_and_checkpoints_without_a_training(attention, corpus, tmp_path):
    params = lm.init(random.key(0), lm.Config(attention=attention, depth=1))
    checkpoint.save(tmp_path / "checkpoint.safetensors", params)
    code = main(["inspect", str(tmp_path), "--data", str(corpus), "--length", "16", "--text", "abc def", "--shown", "3", "--quiet", *QUICK,
                 "--out", str(tmp_path / "out")])
    assert code == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "loss" not in found and found["text"] == "abc def"
    assert len(found["attention"]["layers"]["blocks.0.attn"]["maps"]) == (2 if isinstance(attention, taylor.Config) else 3)


def test_a_member_of_an_ensemble(corpus, tmp_path):
    small = ["--dim", "8", "--depth", "1", "--steps", "2", "--length", "16", "--batch", "2", "--eval-windows", "2"]
    assert main(["train", "--out", str(tmp_path), "--data", str(corpus), "--ensemble", "2", "--quiet", *small]) == 0
    assert main(["inspect", str(tmp_path), "--member", "1", "--quiet", *QUICK]) == 0
    assert "member 1 of an ensemble" in (tmp_path / "inspect" / "report.html").read_text()


def test_mistakes_end_in_a_message(looked_at, tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "expected a checkpoint at" in capsys.readouterr().err
    assert main(["inspect", str(looked_at.parent), "--member", "3"]) == 2
    assert "has 1 members; got --member 3" in capsys.readouterr().err
    assert main(["inspect", str(looked_at.parent), "--samples", "1"]) == 2
    assert "--samples must be at least 2; got 1" in capsys.readouterr().err
    assert main(["inspect", str(looked_at.parent), "--text", "a"]) == 2
    assert "--text must have 2 to 1024 bytes; got 1." in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_scrolling_sideways(looked_at, width, tmp_path):
    """A frame of a phone's width: a headless window has a least width of its own."""
    frame = tmp_path / "frame.html"
    report = (looked_at / "report.html").as_uri()
    frame.write_text(f'<body style="margin:0"><iframe id="f" src="{report}" style="width:{width}px;height:900px;border:0"></iframe>'
                     '<pre id="o"></pre><script>onload=()=>setTimeout(()=>{const d=document.getElementById("f").contentDocument;'
                     'const i=[...d.images];document.getElementById("o").textContent=JSON.stringify({'
                     'page:d.documentElement.scrollWidth,images:i.length,drawn:i.filter(x=>x.complete&&x.naturalWidth>0).length,'
                     'widest:Math.max(...i.map(x=>x.getBoundingClientRect().right)),'
                     'font:Math.min(...[...d.querySelectorAll("p,td,th")].map(x=>parseFloat(d.defaultView.getComputedStyle(x).fontSize)))'
                     '})},300)</script>')
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000",
                           "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
                           "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    measured = json.loads(re.search(r'<pre id="o">(\{.*?\})</pre>', done.stdout).group(1))
    assert measured["images"] == measured["drawn"] == 9
    assert measured["page"] <= width and measured["widest"] <= width
    assert measured["font"] >= 13


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_dark_pages_are_dark_and_light_ones_light(looked_at, tmp_path):
    shades = {}
    for name, flags in (("light", []), ("dark", ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"])):
        picture = tmp_path / f"{name}.png"
        subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=800,1200",
                        f"--user-data-dir={tmp_path / name}", *flags, f"--screenshot={picture}", (looked_at / "report.html").as_uri()],
                       capture_output=True, timeout=120, check=True)
        from matplotlib.image import imread
        shades[name] = float(imread(picture)[..., :3].mean())
    assert shades["light"] > 0.8 and shades["dark"] < 0.3
