"""The program: what it leaves behind, that it continues with the same bits, and every mistake by its message."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_close

from fnattn import checkpoint, tree
from fnattn.cli import COMMANDS, loop, main

TINY = ["--dim", "8", "--depth", "1", "--length", "16", "--batch", "2",
        "--eval-windows", "4", "--eval-every", "8", "--save-every", "5"]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of a book that nobody reads\n" for i in range(99)))
    return path


@pytest.fixture
def run(tmp_path, book, monkeypatch):
    """Trains in tmp_path / out with tiny settings; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    return lambda out, *flags: main(["train", "--out", out, "--quiet", "--data", str(book), *TINY, *flags])


def params(folder):
    return tree.to_flat(checkpoint.load(Path(folder) / loop.CHECKPOINT).params)


def bit_equal(a, b):
    a, b = params(a), params(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / loop.METRICS).read_text().splitlines()]


def without_time(entries):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


# ------------------------------------------------------------------------------------------------ train


@pytest.mark.parametrize("family", ["taylor", "gate_loop", "full"])
def test_training_leaves_a_checkpoint_and_metrics_and_learns(run, family, capsys):
    assert run("out", "--family", family, "--steps", "20", "--learning-rate", "0.02") == 0
    assert "validation loss" in capsys.readouterr().out
    found = checkpoint.load("out/checkpoint.safetensors")
    assert found.step == 20 and type(found.cfg.attention).__module__.endswith(family)
    entries = lines("out")
    assert [entry["step"] for entry in entries] == list(range(1, 21))
    assert entries[0]["loss"] > entries[-1]["loss"] + 0.3
    assert [entry["step"] for entry in entries if "valid_loss" in entry] == [8, 16, 20]


@pytest.mark.parametrize("flags", [
    ["--family", "taylor", "--dropout", "0.25", "--optimizer", "adamw", "--weight-decay", "0.1", "--warmup", "7"],
    ["--family", "gate_loop", "--ensemble", "2", "--learning-rate", "1e-3", "1e-2"],
    ["--family", "full", "--optimizer", "sgd", "--momentum", "0.9", "--clip", "0", "--tied", "--logits-bias", "--seq-len", "16"],
], ids=["taylor", "ensemble", "sgd"])
def test_twenty_steps_are_ten_and_ten_more_bit_for_bit(run, flags):
    assert run("whole", *flags, "--steps", "20") == 0
    assert run("halves", *flags, "--steps", "10") == 0
    assert main(["train", "--out", "halves", "--resume", "--steps", "20", "--quiet"]) == 0
    assert bit_equal("whole", "halves")
    # The first half's last step is also a measurement.
    assert [e["loss"] for e in lines("whole")] == [e["loss"] for e in lines("halves")]


def test_an_interrupted_training_saves_and_continues_with_the_same_bits(run, monkeypatch, capsys):
    assert run("whole", "--steps", "12") == 0
    steps = loop.steps

    def interrupted(*args):
        for state, report in steps(*args):
            if state.step == 7:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            yield state, report

    monkeypatch.setattr(loop, "steps", interrupted)
    assert run("cut", "--steps", "12") == 130
    error = capsys.readouterr().err
    assert "interrupted after step 7; saved cut/checkpoint.safetensors" in error
    assert "Continue with: fnattn train --out cut --resume" in error
    assert checkpoint.load("cut/checkpoint.safetensors").step == 7
    monkeypatch.setattr(loop, "steps", steps)
    assert main(["train", "--out", "cut", "--resume", "--quiet"]) == 0
    assert bit_equal("whole", "cut") and without_time(lines("whole")) == without_time(lines("cut"))


def test_ctrl_c_ends_the_real_program_cleanly(tmp_path, book):
    command = [sys.executable, "-m", "fnattn", "train", "--out", str(tmp_path / "out"), "--data", str(book), *TINY,
               "--steps", "1000000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / loop.METRICS
    for _ in range(600):
        if metrics.is_file() and metrics.read_text().count("\n") >= 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted after step" in error and "Traceback" not in error
    assert checkpoint.load(tmp_path / "out" / loop.CHECKPOINT).step == lines(tmp_path / "out")[-1]["step"]


def test_metrics_beyond_the_checkpoint_are_dropped_when_it_continues(run):
    assert run("out", "--steps", "5") == 0
    with open("out/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    assert main(["train", "--out", "out", "--resume", "--steps", "8", "--quiet"]) == 0
    assert [entry["step"] for entry in lines("out")] == list(range(1, 9))


def test_nothing_is_left_to_do_when_the_last_step_was_made(run, capsys):
    assert run("out", "--steps", "5") == 0
    assert main(["train", "--out", "out", "--resume"]) == 0
    assert "nothing to do: out/checkpoint.safetensors is of step 5" in capsys.readouterr().out


def test_a_member_of_an_ensemble_is_the_training_with_its_seed(run):
    assert run("many", "--family", "taylor", "--ensemble", "3", "--seed", "5", "--steps", "10", "--dropout", "0.25") == 0
    assert run("one", "--family", "taylor", "--seed", "6", "--steps", "10", "--dropout", "0.25") == 0
    many, one = params("many"), params("one")
    for name in one:
        assert_close(many[name][1], one[name])
    assert lines("many")[-1]["valid_loss"][1] == pytest.approx(lines("one")[-1]["valid_loss"], rel=1e-4)


def test_settings_come_from_toml_and_flags_win(run, tmp_path):
    (tmp_path / "settings.toml").write_text(
        '[model]\nfamily = "taylor"\n[attention]\nheads = 3\ndim_head = 4\n[optimizer]\nlearning_rate = 0.01\nbetas = [0.8, 0.9]\n'
        "[train]\nsteps = 99\nseed = 3\n")
    assert run("out", "--config", "settings.toml", "--steps", "3", "--attention", "dim_head=2", "prenorm=true") == 0
    found = checkpoint.load("out/checkpoint.safetensors")
    assert found.step == 3 and found.extra["settings"]["betas"] == [0.8, 0.9]
    attention = found.cfg.attention
    assert (attention.heads, attention.dim_head, attention.prenorm, attention.causal) == (3, 2, True, True)


def test_an_older_checkpoint_survives_until_a_new_one_is_whole(run, capsys):
    assert run("out", "--steps", "3") == 0
    before = Path("out/checkpoint.safetensors").read_bytes()
    assert run("out", "--steps", "3") == 2
    assert "train: out holds a checkpoint already.\n  Continue it with --resume" in capsys.readouterr().err
    assert run("out", "--overwrite", "--steps", "3", "--learning-rate", "1e30", "--clip", "0", "--optimizer", "sgd") == 2
    assert "no longer a number.\n  Use a smaller --learning-rate" in capsys.readouterr().err
    assert run("out", "--overwrite", "--family", "nothing") == 2
    assert Path("out/checkpoint.safetensors").read_bytes() == before
    assert run("out", "--overwrite", "--steps", "4") == 0
    assert checkpoint.load("out/checkpoint.safetensors").step == 4


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("flags, message", [
    (["--family", "nothing"], "fnattn: expected a family; got 'nothing'.\n  Choose one of: "),
    (["--data", "missing.txt"], "data.load: expected a file or folder; got missing.txt, where there is nothing."),
    (["--data", "empty.txt"], "data.load: expected text in empty.txt; got an empty file."),
    (["--data", "short.txt"], "train: the validation text of short.txt must have at least 17 bytes, one window; got 10."),
    (["--attention", "colour=red"], "settings: gate_loop has no option 'colour'; it has heads, "),
    (["--attention", "heads"], "train: --attention must be NAME=VALUE; got heads."),
    (["--attention", "heads=many"], "settings: gate_loop: heads must be int | None; got 'many'."),
    (["--attention", "heads=3"], "gate_loop.Config: "),
    (["--family", "linformer"], "lm.Config: attention must be causal; got "),
    (["--family", "taylor", "--attention", "causal=false"], "lm.Config: attention must be causal; got "),
    (["--norm", "batch"], "lm.Config: norm must be one of 'rms', 'layer'"),
    (["--steps", "0"], "settings: steps must be at least 1; got 0."),
    (["--optimizer", "lion"], "settings: optimizer must be one of adam, adamw, sgd; got 'lion'."),
    (["--schedule", "linear"], "settings: schedule must be one of constant, cosine, cooldown; got 'linear'."),
    (["--weight-decay", "0.1"], "settings: weight_decay belongs to adamw; got 0.1 with adam."),
    (["--momentum", "0.9"], "settings: momentum belongs to sgd; got 0.9 with adam."),
    (["--learning-rate", "1", "2"], "settings: learning_rate must be one number or one per member (0); got 2."),
    (["--learning-rate", "-1"], "settings: learning_rate must be a number of at least 0; got -1.0."),
    (["--config", "missing.toml"], "settings: expected a TOML file at missing.toml; got no such file."),
    (["--config", "broken.toml"], "settings: expected TOML in broken.toml; got an error: "),
    (["--config", "table.toml"],
     "settings: expected tables [model], [attention], [optimizer], [train] in table.toml; got 'colour'."),
    (["--config", "name.toml"], "settings: [train] in name.toml has no setting 'stepz'; it has steps, "),
    (["--config", "type.toml"], "settings: steps must be int; got 'many'."),
    (["--resume"], "train: --resume expects a checkpoint at out/checkpoint.safetensors; got no such file."),
    (["--impl", "magic"], "gate_loop: impl must be one of 'auto', 'reference', 'native'"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_in_train_is_one_message_and_exit_code_two(run, tmp_path, flags, message, capsys):
    for name, text in {"empty.txt": "", "short.txt": "x" * 100, "broken.toml": "[train", "table.toml": "colour = 1",
                       "name.toml": "[train]\nstepz = 1", "type.toml": "[train]\nsteps = 'many'"}.items():
        (tmp_path / name).write_text(text)
    assert run("out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fnattn: error: {message}"), error
    assert "\n  " in error and "Traceback" not in error
    assert not (tmp_path / "out" / loop.CHECKPOINT).exists()


@pytest.mark.parametrize("flags, message", [
    (["--dim", "6"], "is a checkpoint of another config: dim was 8 and is now 6."),
    (["--family", "taylor"], "is a checkpoint of another config: family was 'gate_loop' and is now 'taylor'."),
    (["--attention", "heads=2"], "is a checkpoint of another config: attention was {} and is now {'heads': 2}."),
    (["--learning-rate", "0.1"], "is a checkpoint of another config: learning_rate was 0.001 and is now 0.1."),
    (["--data", "other.txt"], "is a checkpoint of another config: data was "),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_training_does_not_continue_with_other_settings(run, tmp_path, flags, message, capsys):
    (tmp_path / "other.txt").write_text("another book\n" * 99)
    assert run("out", "--steps", "3") == 0
    before = Path("out/checkpoint.safetensors").read_bytes()
    assert main(["train", "--out", "out", "--resume", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fnattn: error: train: out/checkpoint.safetensors ") and message in error
    assert Path("out/checkpoint.safetensors").read_bytes() == before


def test_a_training_does_not_continue_on_a_changed_text_or_schedule(run, book, capsys):
    assert run("out", "--steps", "3", "--schedule", "cosine") == 0
    assert main(["train", "--out", "out", "--resume", "--steps", "9"]) == 2
    assert "train: a cosine schedule was made for 3 steps; got 9." in capsys.readouterr().err
    book.write_text(book.read_text() + "the end")
    assert main(["train", "--out", "out", "--resume"]) == 2
    assert "was trained on another text than" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_named_and_left_alone(run, capsys):
    assert run("out", "--steps", "3") == 0
    path = Path("out/checkpoint.safetensors")
    half = path.read_bytes()[:2000]
    path.write_bytes(half)
    for command in (["train", "--out", "out", "--resume"], ["generate", "out"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "expected a whole safetensors file at out/checkpoint.safetensors; got a damaged or truncated one" in error
    assert path.read_bytes() == half


def test_an_unwritable_folder_is_a_message(run, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert run("file/out", "--steps", "2") == 2
    assert "fnattn: error: Not a directory: file/out" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ generate


def test_text_depends_on_the_seed_alone_and_fewer_tokens_are_its_beginning(run, capsys):
    assert run("out", "--steps", "3") == 0
    capsys.readouterr()

    def text(*flags):
        assert main(["generate", "out", "--prompt", "ab", *flags]) == 0
        return capsys.readouterr().out

    long = text("--tokens", "30", "--top-k", "26", "--temperature", "0.5")
    assert long == text("--tokens", "30", "--top-k", "26", "--temperature", "0.5") and long.startswith("ab")
    assert long != text("--tokens", "30", "--top-k", "26", "--temperature", "0.5", "--seed", "1")
    assert text("--tokens", "0") == "ab\n" and text("--tokens", "0", "--no-echo") == "\n"
    assert text("--tokens", "5", "--temperature", "0", "--top-p", "0.9") == text("--tokens", "5", "--temperature", "0")


def test_a_member_of_an_ensemble_and_the_file_itself_can_be_named(run, capsys, monkeypatch):
    assert run("out", "--steps", "3", "--ensemble", "2", "--family", "full") == 0
    capsys.readouterr()
    texts = []
    for member in ("0", "1"):
        assert main(["generate", "out/checkpoint.safetensors", "--member", member, "--tokens", "9"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


@pytest.mark.parametrize("flags, message", [
    (["missing"], "checkpoint.load: expected a checkpoint at missing; got no such file."),
    (["out", "--capacity", "7", "--tokens", "9"], "generate.stream: the state must have room for 9 tokens, 1 of the prompt and 8 "
                                                  "new ones; got capacity=7."),
    (["out", "--temperature", "-1"], "generate.stream: temperature must be at least 0; got -1.0."),
    (["out", "--top-p", "0"], "generate.stream: top_p must lie in (0, 1]; got 0.0."),
    (["out", "--top-k", "-3"], "generate.stream: top_k must be at least 0; got -3."),
    (["out", "--tokens", "-3"], "generate.stream: steps must be at least 0; got -3."),
    (["out", "--prompt", ""], "generate: expected a prompt; got none."),
    (["out", "--member", "1"], "generate: out has 1 members; got --member 1."),
    (["positions", "--tokens", "99"], "lm.init_state: capacity must be at most the 16 learned positions (cfg.seq_len); got 99."),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_in_generate_is_one_message_and_exit_code_two(run, flags, message, capsys):
    assert run("out", "--steps", "2") == 0
    assert run("positions", "--steps", "2", "--seq-len", "16") == 0
    capsys.readouterr()
    assert main(["generate", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fnattn: error: {message}") and "\n  " in error, error


# ------------------------------------------------------------------------------------------------ the others


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_is_there(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: fnattn {command}") and "\n  -h, --help" in out
    assert f"fnattn {command}" in out.partition("options:")[0].partition("\n\n")[2], "an example"


def test_the_program_lists_its_commands_and_version(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"    {name}" in out for name in COMMANDS)
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("fnattn 0.")
    assert main([]) == 2
    assert main(["fly"]) == 2 and "invalid choice: 'fly'" in capsys.readouterr().err


def test_list_names_every_family_and_explains_every_option(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "taylor" in out and "gate_loop" in out and "full" in out
    assert main(["list", "--json"]) == 0
    for family in json.loads(capsys.readouterr().out):
        assert family["about"] and family["source"], family["name"]
        unexplained = [option["name"] for option in family["options"] if not option["about"]]
        assert not unexplained, (family["name"], unexplained)
    assert main(["list", "taylor"]) == 0
    assert "gate_value_heads" in capsys.readouterr().out
    assert main(["list", "nothing"]) == 2 and "expected a family; got 'nothing'" in capsys.readouterr().err


def test_report_names_one_choice_per_operator_and_device(capsys):
    assert main(["report", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    places = {(a["operator"], a["device"], a["dtype"]) for a in answers}
    assert len(places) == sum(a["chosen"] for a in answers) >= 5
    assert all(a["reason"] is None for a in answers if a["chosen"])
    assert main(["report"]) == 0
    assert "softmax_attention" in capsys.readouterr().out


def test_report_knows_every_operator_that_has_kernels():
    from fnattn import ops
    from fnattn.ops.report import CASES
    folder = Path(ops.__file__).parent
    found = {str(path.relative_to(folder).with_suffix("")).replace(os.sep, ".").removesuffix(".__init__")
             for path in folder.rglob("*.py") if re.search(r"^KERNELS\b", path.read_text(), re.MULTILINE)}
    assert found == {case.module for case in CASES.values()}


def test_bench_times_after_checking_and_writes_json(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    assert main(["bench", "--op", "scan", "causal_dot", "--n", "7", "--h", "2", "--d", "4", "--repeats", "1",
                 "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {row["operator"] for row in found["results"]} == {"scan", "causal_dot"}
    assert all("forward_ms" in row or "unavailable" in row for row in found["results"]) and found["machine"]["torch"]
    for flags, message in ((["--op", "magic"], "bench: expected an operator; got 'magic'."),
                           (["--op", "scan", "--n", "0"], "bench: --n must be at least 1"),
                           (["--op", "rotary", "--d", "3"], "bench: --d must be even"),
                           (["--device", "abacus"], "bench: this machine has cpu")):
        assert main(["bench", *flags]) == 2
        assert message in capsys.readouterr().err


def test_bench_refuses_to_time_what_is_wrong(monkeypatch, capsys):
    from fnattn.bench import implementations as bench
    true = bench.function

    def worse(name, impl, sizes):
        factor = 1.0 if impl == "reference" else 1.01
        return lambda *args: true(name, impl, sizes)(*args) * factor

    monkeypatch.setattr(bench, "function", worse)
    code = main(["bench", "--op", "scan", "--n", "7", "--repeats", "1"])
    out = capsys.readouterr().out
    if "WRONG" not in out:
        pytest.skip("no kernel for scan on this machine")
    assert code == 1 and "differs from the reference" in out


def test_the_demo_leaves_everything_in_one_folder(tmp_path, book, capsys):
    out = tmp_path / "demo"
    command = ["demo", "--out", str(out), "--data", str(book), *TINY, "--steps", "9"]
    assert main(command) == 0 and main(command) == 0  # a second demo replaces the first
    names = {"checkpoint.safetensors", "checkpoint.json", "metrics.jsonl", "loss.png", "sample.txt", "report.html"}
    assert {p.name for p in out.iterdir()} == names
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and (out / "sample.txt").read_text().startswith("def ")
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "prefers-color-scheme: dark" in page and "gate_loop" in page
    assert "http" not in page and "<script" not in page and "src=\"/" not in page
