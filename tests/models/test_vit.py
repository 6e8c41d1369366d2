"""The Taylor vision transformer against upstream."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from upstream import upstream

from fnattn import convert, random, tree
from fnattn.models import vit

CFG = vit.Config(image_size=12, patch_size=4, num_classes=5, dim=16, depth=2, heads=3, dim_head=4, channels=2)


def images(dtype=torch.float64):
    return random.normal(random.key(3), (2, 2, 12, 12), dtype)


def test_it_equals_upstream_in_value_and_gradient():
    fields = {n: getattr(CFG, n) for n in CFG.__dataclass_fields__}
    module = upstream("taylor_series_linear_attention.vit").ViT(**fields).double().eval()
    params, x = convert.load(CFG, module.state_dict()), images()
    theirs = module(x)
    # Upstream's table of positions is float32.
    assert_close(vit.apply(params, x), theirs, torch.float32)
    theirs.pow(2).sum().backward()
    grads = convert.dump(tree.grad(lambda p: vit.apply(p, x).pow(2).sum())(params))
    for name, p in module.named_parameters():
        assert_close(grads[name], p.grad, torch.float32)
        assert p.grad.abs().max() > 0


def test_it_learns_to_tell_rows_from_columns():
    cfg = vit.Config(image_size=8, patch_size=2, num_classes=2, dim=8, depth=1, heads=2, dim_head=4, channels=1)
    params = vit.init(random.key(0), cfg)
    x = random.uniform(random.key(1), (16, 1, 8, 8))
    labels = torch.arange(16) % 2
    stripes = (torch.arange(8) % 2).float()
    x = x + torch.where(labels[:, None, None, None] == 1, stripes[:, None], stripes)
    loss = lambda p: torch.nn.functional.cross_entropy(vit.apply(p, x), labels)  # noqa: E731
    first = loss(params)
    for _ in range(40):
        value, grads = tree.value_and_grad(loss)(params)
        params = tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert first > 0.5 and value < 0.2


def test_dropout_needs_a_key_and_repeats_with_it():
    params = vit.init(random.key(0), vit.Config(image_size=8, patch_size=4, num_classes=3, dim=8, depth=1, channels=1,
                                                dropout=0.3, emb_dropout=0.2))
    x = random.normal(random.key(1), (2, 1, 8, 8))
    quiet, again = vit.apply(params, x), vit.apply(params, x)
    dropped = [vit.apply(params, x, dropout_key=random.key(i)) for i in (5, 5, 6)]
    assert torch.equal(quiet, again) and torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2]) and not torch.equal(dropped[0], quiet)


@pytest.mark.parametrize("wrong, text", [
    (lambda: vit.Config(image_size=9, patch_size=4, num_classes=2, dim=8, depth=1), r"patch_size must divide image_size=9; got 4"),
    (lambda: vit.Config(image_size=8, patch_size=4, num_classes=2, dim=6, depth=1), r"dim must be a multiple of 4"),
    (lambda: vit.apply(vit.init(random.key(0), CFG), images()[:, :1]), r"images must be \[batch, 2, 12, 12\]; got \[2, 1, 12, 12\]"),
])
def test_bad_input_is_named(wrong, text):
    with pytest.raises(ValueError, match=text):
        wrong()
