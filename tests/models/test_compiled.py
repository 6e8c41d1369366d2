"""Models and layers in one compiled program, at the smallest sizes: what the parts' own tests of compilation do not meet."""

from __future__ import annotations

import shutil

import pytest
import torch

from fnattn import random, tree
from fnattn.attentions import full
from fnattn.models import dalle, linformer_lm

KEY = random.key(0)
IDS = torch.arange(10).view(2, 5) % 7
# float32, compiled in another order of operations, on results of size 1.
NEAR = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def forget_compiled_programs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiles_to_itself(fn, *args, backend):
    """The compiled function's result, which is the function's own."""
    found, expected = torch.compile(fn, fullgraph=True, backend=backend)(*args), fn(*args)
    assert any(t.any() for t in tree.leaves(expected))
    torch.testing.assert_close(tree.leaves(found), tree.leaves(expected), **NEAR)


def dalle_params(**options):
    return dalle.init(KEY, dalle.Config(dim=6, depth=1, num_image_tokens=5, image_fmap_size=2, num_text_tokens=7, text_seq_len=3,
                                        heads=1, dim_head=6, shift_tokens=False, **options))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler, which torch's backend calls")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # on importing torch's backend
def test_dalle_compiles_with_torchs_own_backend():
    params = dalle_params(rotary_emb=False)  # with tables of positions: bools and indices made of positions alone
    compiles_to_itself(lambda p: dalle.loss(p, IDS[:, :3], IDS[:, :4] % 5), params, backend="inductor")


def test_the_gradient_of_a_reversible_dalle_compiles():
    params = dalle_params(reversible=True)
    compiles_to_itself(tree.grad(lambda p: dalle.loss(p, IDS[:, :3], IDS[:, :4] % 5)), params, backend="aot_eager")


@pytest.mark.parametrize("given", [{}, {"mask": torch.arange(5).expand(2, 5) < 3}, {"dropout_key": KEY}], ids=["", "mask", "dropout"])
def test_a_reversible_linformer_compiles(given):
    cfg = linformer_lm.Config(num_tokens=7, dim=4, seq_len=5, depth=2, k=3, heads=2, reversible=True, dropout=0.25)
    compiles_to_itself(lambda p: linformer_lm.apply(p, IDS, **given)[0], linformer_lm.init(KEY, cfg), backend="eager")


def striped(length, shift):
    """Attention under a mask of stripes."""
    rows = tuple("".join("01"[(i - j) % 3 != shift] for j in range(length)) for i in range(length))
    return full.init(random.key(shift), full.Config(dim=5, seq_len=length, heads=2, dim_head=3, static_mask=rows))


@pytest.mark.parametrize("second", [(67, 1), (67, 2), (7, 2)], ids=["the same", "another", "another size"])
def test_a_program_may_hold_several_static_masks(second):
    x = random.normal(KEY, (2, 7, 5))
    # Wide enough that a row takes more than one word of the program.
    compiles_to_itself(lambda p, q, x: full.apply(q, full.apply(p, x)[0])[0], striped(67, 1), striped(*second), x, backend="aot_eager")


def test_a_compiled_function_sees_that_the_static_mask_is_another():
    x, layer = random.normal(KEY, (2, 7, 5)), torch.compile(lambda p, x: full.apply(p, x)[0], fullgraph=True, backend="eager")
    for shift in (0, 1, 2, 1):
        params = striped(7, shift)
        torch.testing.assert_close(layer(params, x), full.apply(params, x)[0], **NEAR)


def test_the_words_of_a_compiled_program_are_the_rows():
    rows = striped(131, 1).cfg.static_mask
    words = torch.tensor(full._words(rows)).view(131, -1)
    entries = torch.stack([words >> i & 1 for i in range(full.WORD)], -1).flatten(1)[:, :131]
    assert ["".join(map(str, row)) for row in entries.tolist()] == list(rows)
