"""What the README shows is true: its code runs, its tables name what there is, its figures come from files in the repository."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fnattn import attentions
from fnattn.cli import COMMANDS

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, header first."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [table[0], *table[2:]]


def run(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_example_runs_and_has_twenty_lines():
    code = BLOCKS[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 22
    run(code + "\nassert hvp.abs().max() > 0 and slope.abs() > 0 and each.to_q.shape[0] == 2 and outs.shape == (5, 2, 100, 32)\n"
               "assert grads.to_q.abs().max() > 0")


def test_two_processes_train_as_one_does(tmp_path):
    code = next(block for block in BLOCKS if "torchrun" in block)
    (tmp_path / "spread.py").write_text(code + "if distributed.rank() == 0:\n    print(loss.item())\ndist.destroy_process_group()\n")
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    losses = []
    for processes in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "spread.py"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        losses.append(float(done.stdout))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0] > 1


def test_the_family_in_one_file_obeys_every_law_and_trains():
    code = next(block for block in BLOCKS if "class Config" in block)
    # A file of its own: compiled checks find the family by its module.
    out = run("import sys, tempfile, pathlib\nfolder = tempfile.mkdtemp()\n"
              f"pathlib.Path(folder, 'mean_family.py').write_text({code!r})\n"
              "sys.path.insert(0, folder)\n"
              "import mean_family\nfrom fnattn import random, tree\nfrom fnattn.models import lm\n"
              "from fnattn.testing import check_family\n"
              "check_family(mean_family.FAMILY, compile=False).require()\n"
              "cfg = lm.Config(attention=mean_family.Config(dim=8), depth=1, num_tokens=7)\n"
              "params = lm.init(random.key(0), cfg)\n"
              "grads = tree.grad(lm.loss)(params, random.bits(random.key(1), (2, 9)) % 7)\n"
              "assert grads.blocks[0].attn.weight.abs().max() > 0\nprint('fine')\n")
    assert out.strip() == "fine"


def test_the_family_table_is_what_there_is():
    table = {row[0].strip("`"): row[1:] for row in rows("Families")[1:]}
    assert set(table) == set(attentions.FAMILIES)
    for name, family in attentions.FAMILIES.items():
        _, state, mask, context, combine = table[name]
        assert (not state.startswith("–")) == family.streams, name
        assert [cell == "yes" for cell in (mask, context, combine)] == [family.masks, family.contexts, family.combine is not None], name


def test_the_derivative_table_covers_every_family_and_holds_no_failure():
    table = rows("Derivatives")
    assert set(table[0][1:]) == set(attentions.FAMILIES) or {row[0].strip("`") for row in table[1:]} >= set(attentions.FAMILIES)
    assert not re.search(r"\b(WRONG|wrong|zero)\b", "\n".join(map(str, table)))


@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?:python -m )?fnattn ([a-z][a-z-]+)\b", README)) - {"import"}))
def test_commands_in_the_readme_exist(command):
    assert command in COMMANDS


def test_make_targets_in_the_readme_exist():
    makefile = (REPO / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_figures_name_a_file_that_is_there():
    for path in re.findall(r"`(benchmarks/results/[^`]+)`", README):
        assert (REPO / path).exists(), path


def test_ratios_are_those_of_the_kept_runs():
    """One thread, and two: in the order in which the README names their files."""
    kept, threads = [], []
    for path in dict.fromkeys(re.findall(r"`(benchmarks/results/[^`]+\.json)`", README)):
        run = json.loads((REPO / path).read_text())
        threads.append(run["machine"]["threads"])
        kept.append({(r["case"], r["shape"], r["pass"]): r["ratio"] for r in run["results"] if r.get("ratio") is not None})
    assert threads == [1, 2]
    section = README.split("| against upstream, times as fast |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert len(section) >= 20
    for line in section:
        case, shape, *shown = [cell.strip() for cell in line.strip("|").split("|")]
        passes = [(ratios, name) for ratios in kept for name in ("forward", "forward+backward")]
        for (ratios, name), cell in zip(passes, shown, strict=True):
            ratio = ratios.get((case, shape, name))
            assert cell == ("–" if ratio is None else f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"), (case, name)


def test_every_table_of_figures_is_made_from_the_kept_runs():
    spec = importlib.util.spec_from_file_location("figures", REPO / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    assert all(len(rows) >= 5 for rows in figures.tables(*figures.runs_of(README)).values())
    assert figures.fill_readme(README) == README
