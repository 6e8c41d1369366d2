"""Text: which files, how they are split, and batches that depend on key and step alone."""

from __future__ import annotations

import pytest
import torch

from fnattn import data, random


def test_the_default_text_is_the_standard_library_in_a_fixed_order():
    first, again = data.load(), data.load()
    assert first.files > 100 and len(first.train) > 1_000_000
    assert 0.02 < len(first.valid) / len(first.train) < 0.3
    assert torch.equal(first.train, again.train) and torch.equal(first.valid, again.valid)
    assert "import" in data.decode(first.train[:100_000])


def test_a_folder_is_split_by_file_with_every_tenth_for_validation(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"<{i}>")
    text = data.load(tmp_path)
    assert data.decode(text.valid) == "<9><19>" and text.files == 20
    assert data.decode(text.train) == "".join(f"<{i}>" for i in range(20) if i not in (9, 19))


def test_a_small_folder_holds_out_its_last_file_and_includes_subfolders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    text = data.load(tmp_path)
    assert (data.decode(text.train), data.decode(text.valid)) == ("first", "second")


def test_hidden_empty_and_binary_files_are_left_out(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "picture").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "text").write_text("0123456789" * 3)
    text = data.load(tmp_path)
    assert text.files == 1 and data.decode(text.train) + data.decode(text.valid) == "0123456789" * 3


def test_the_last_tenth_of_a_single_file_is_for_validation(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("a" * 90 + "b" * 10)
    text = data.load(path)
    assert data.decode(text.train) == "a" * 90 and data.decode(text.valid) == "b" * 10


def test_the_same_key_and_step_give_the_same_batch_and_others_another(key):
    text = torch.arange(251, dtype=torch.uint8)
    one = data.batch(text, key, 3, 5, 17)
    assert one.shape == (5, 17) and one.dtype == torch.int64
    assert torch.equal(one, data.batch(text, key, 3, 5, 17))
    assert not torch.equal(one, data.batch(text, key, 4, 5, 17))
    assert not torch.equal(one, data.batch(text, random.fold_in(key, 0), 3, 5, 17))
    assert torch.equal(one[:, 1:], one[:, :-1] + 1)  # windows are whole


def test_every_window_can_come_and_none_reaches_beyond_the_end(key):
    text = torch.arange(7, dtype=torch.uint8)
    starts = data.batch(text, key, 0, 499, 5)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


def test_batches_map_over_the_keys_of_an_ensemble(key):
    text, keys = torch.arange(251, dtype=torch.uint8), random.split(key, 3)
    mapped = torch.vmap(lambda k: data.batch(text, k, 2, 5, 17))(keys)
    assert torch.equal(mapped, torch.stack([data.batch(text, k, 2, 5, 17) for k in keys]))


def test_windows_are_spread_over_the_whole_text():
    text = torch.arange(100, dtype=torch.uint8)
    found = data.windows(text, 10, 4)
    assert found[:, 0].tolist() == [0, 30, 60, 90]
    assert data.windows(text, 10, 999).shape == (10, 10)
    assert data.windows(text, 100, 3).shape == (1, 100)


def test_text_survives_encoding_and_decoding():
    assert data.decode(data.encode("schön ☕")) == "schön ☕"
    assert data.decode(torch.tensor([255, 65])) == "\N{REPLACEMENT CHARACTER}A"


def test_every_error_names_the_file_and_a_remedy(tmp_path, key):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "binary").write_bytes(b"\xff")
    with pytest.raises(FileNotFoundError, match="data.load: expected a file or folder; got .*nothing.txt, where there is nothing"):
        data.load(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="data.load: expected text in .*empty.txt; got an empty file"):
        data.load(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="data.load: expected text in .*folder; got 1 files, none of them text"):
        data.load(tmp_path / "folder")
    for call in (lambda: data.batch(torch.zeros(4, dtype=torch.uint8), key, 0, 2, 5),
                 lambda: data.windows(torch.zeros(4, dtype=torch.uint8), 5, 2)):
        with pytest.raises(ValueError, match="the text must have at least 5 bytes, one window; got 4"):
            call()
