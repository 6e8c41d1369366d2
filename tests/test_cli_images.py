"""train-images and generate-images on a tiny model, and their mistakes by message."""

from __future__ import annotations

import json

import pytest
import torch

from fnattn import checkpoint
from fnattn.cli import digits, loop, main, train_images
from fnattn.models import dalle

pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
SMALL = ["--dim", "8", "--depth", "2", "--heads", "1", "--dim-head", "6", "--batch", "4", "--attn-types", "full", "conv_like"]


def trained(folder, steps=3, *more):
    return main(["train-images", "--out", str(folder), "--steps", str(steps), *SMALL, *more])


def test_a_training_leaves_checkpoint_metrics_grid_and_report(tmp_path, capsys):
    assert trained(tmp_path) == 0
    assert "of the digits drawn are the ones asked for" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.safetensors", "checkpoint.json", "metrics.jsonl", "grid.png",
                                                    "report.html", "figures.json"}
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["pictures judged"] == 100 and "control, trained without text" in figures
    assert float(figures["classifier on held-out real digits"].rstrip("%")) > 90
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4 and "http" not in page.split("</style>")[1]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]

    grid = tmp_path / "again" / "grid.png"
    command = ["generate-images", "--checkpoint", str(tmp_path), "--text", "three", "7", "--count", "2", "--out", str(grid)]
    assert main(command) == 0
    first = grid.read_bytes()
    assert first.startswith(b"\x89PNG") and main(command) == 0 and grid.read_bytes() == first
    assert main([*command, "--seed", "1"]) == 0 and grid.read_bytes() != first


def test_a_training_that_was_cut_continues_with_the_same_bits(tmp_path):
    args = train_images.argparse.Namespace(out=tmp_path, steps=4, batch=4, learning_rate=2e-3, dim=8, depth=1, heads=1, dim_head=6,
                                           attn_types=["full"], reversible=False, seed=0)
    chosen, cfg = train_images.settings(args), train_images.config(args)
    data = digits.load()
    whole = train_images.train(train_images.begin(cfg, chosen, 0), chosen, *data, None, lambda: False, label="whole")
    count = iter(range(10))
    half = train_images.train(train_images.begin(cfg, chosen, 0), chosen, *data, None, lambda: next(count) >= 2, label="half")
    assert half.step == 2
    train_images.save(tmp_path / loop.CHECKPOINT, half, chosen)
    back = train_images._resume(tmp_path / loop.CHECKPOINT, chosen)
    end = train_images.train(back, chosen, *data, None, lambda: False, label="rest")
    flat = [checkpoint.tree.to_flat(r.params) for r in (whole, end)]
    assert all(torch.equal(flat[0][name], flat[1][name]) for name in flat[0])


def test_the_loss_of_the_digits_falls(tmp_path):
    train_set, held_out = digits.load()
    cfg = dalle.Config(dim=16, depth=1, heads=2, dim_head=8, num_image_tokens=17, image_fmap_size=8, num_text_tokens=27,
                       text_seq_len=5)
    chosen = {"steps": 30, "batch": 8, "learning_rate": 1e-2, "seed": 0}
    entries = []
    train_images.train(train_images.begin(cfg, chosen, 0), chosen, train_set, held_out, entries.append, lambda: False, label="x")
    assert entries[0]["loss"] > 2.8 and entries[-1]["valid_loss"] < 2.2


def test_names_become_letters_and_pictures_a_grid():
    assert digits.encode(["three", "one", "7"]).tolist() == [[20, 8, 18, 5, 5], [15, 14, 5, 0, 0], [19, 5, 22, 5, 14]]
    train_set, held_out = digits.load()
    assert train_set.images.shape == (1500, 64) and held_out.images.max() == 16
    assert digits.judge(train_set, held_out).accuracy > 0.9


@pytest.mark.parametrize("command, text", [
    (["generate-images", "--text", "eleven", "--checkpoint", "{}"], "digits: expected the name of a digit; got 'eleven'."),
    (["generate-images", "--text", "one", "--checkpoint", "{}/none"], "expected a checkpoint at"),
    (["generate-images", "--text", "one", "--count", "0"], "--count must be at least 1; got 0"),
    (["train-images", "--out", "{}", "--steps", "0"], "--steps and --batch must be at least 1; got 0 and 32"),
    (["train-images", "--out", "{}", "--attn-types", "dense"], "attn_types must be among 'full', 'axial_row'"),
    (["train-images", "--out", "{}", "--resume"], "expected a checkpoint at"),
])
def test_mistakes_end_in_one_message_and_code_two(tmp_path, capsys, command, text):
    assert main([word.format(tmp_path) for word in command]) == 2
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err


def test_an_older_training_is_not_overwritten_unasked(tmp_path, capsys):
    assert trained(tmp_path, 2, "--no-control") == 0
    before = (tmp_path / loop.CHECKPOINT).read_bytes()
    assert trained(tmp_path, 2) == 2 and "holds a checkpoint already" in capsys.readouterr().err
    assert trained(tmp_path, 5, "--resume") == 2 and "was trained with" in capsys.readouterr().err
    assert (tmp_path / loop.CHECKPOINT).read_bytes() == before
