"""Every law on every family, every example, every implementation that can run here."""

from __future__ import annotations

import functools

import pytest
import stranger
import torch
from fnattn_kernels.contracts import KernelUnavailable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fnattn import attentions, random
from fnattn.testing import laws_options, laws_values, world
from fnattn.testing.laws import COMPILED, LAWS, check_family, compiled_rows

EXAMPLES = [(family, number) for family in attentions.FAMILIES.values() for number in range(len(family.examples))]
KEY = random.key(17)


def name_of(value):
    return getattr(value, "name", str(value))


@functools.cache
def able(name: str, number: int) -> tuple[str, ...]:
    family = attentions.FAMILIES[name]
    found = world.implementations(family, family.examples[number], KEY)
    return tuple(impl for impl, reason in found.items() if reason is None)


def each(family, number, law, **options):
    """The law on every implementation; skipped if it applies to none."""
    reasons = []
    for impl in able(family.name, number):
        try:
            law(family, family.examples[number], KEY, impl, **options)
        except world.NotApplicable as reason:
            reasons.append(str(reason))
        except KernelUnavailable as reason:
            # "gather" must look into a layout, which vmap hides, and has no form for a cache; any other kernel serves under every
            # transform. Linformer drops entries of a matrix that no kernel makes.
            if impl != "gather" and (family.name, law) != ("linformer", LAWS["dropout_laws"]):
                raise
            reasons.append(str(reason))
    if len(reasons) == len(able(family.name, number)):
        pytest.skip(reasons[0])


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("family, number", EXAMPLES, ids=name_of)
def test_law(family, number, law):
    each(family, number, law)


@pytest.mark.parametrize("family", attentions.FAMILIES.values(), ids=name_of)
def test_compiled_and_exported_functions_equal_the_function(family):
    broken = {}
    for number, cfg in enumerate(family.examples):
        impls = able(family.name, number)
        # One process for each implementation; the whole list for the first example, its hardest line for the others and for kernels
        # that are taken only when asked for by name, which test_operators compiles.
        for impl in impls if number == 0 else impls[-1:]:
            rows = compiled_rows(family, cfg, KEY, impl, COMPILED if number == 0 and impl in ("reference", "native") else COMPILED[:1])
            broken.update({(number, impl, name): row for name, row in rows.items() if row.status not in ("ok", "refused")})
    assert not broken


SOME = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("family, number", EXAMPLES, ids=name_of)
def test_any_cuts_of_any_length_equal_one_pass(family, number):
    @SOME
    @given(st.integers(1, 19), st.lists(st.integers(0, 19), max_size=4))
    def check(length, cuts):
        for impl in sorted({*able(family.name, number)} - {"gather"}):  # which has no form for a cache
            laws_values.split_anywhere(family, family.examples[number], KEY, impl, cuts, length)

    try:
        check()
    except world.NotApplicable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("family, number", EXAMPLES, ids=name_of)
def test_any_masked_keys_are_as_good_as_removed(family, number):
    @SOME
    @given(st.lists(st.booleans(), min_size=7, max_size=7))
    def check(keep):
        for impl in able(family.name, number):
            laws_options.masked_keys_are_removed(family, family.examples[number], KEY, impl, keep)

    try:
        check()
    except world.NotApplicable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("family, number", EXAMPLES, ids=name_of)
def test_any_shape_gives_the_rows_of_single_sequences(family, number):
    cfg = family.examples[number]

    @SOME
    @given(st.integers(1, 4), st.integers(1, 11), st.integers(0, 2**32 - 1))
    def check(batch, length, seed):
        params = world.make_params(family, cfg, KEY)
        x = world.make_x(cfg, random.key(seed), batch, length)
        for impl in able(family.name, number):
            out = family.apply(params, x, impl=impl)[0]
            world.equal(out[-1:], family.apply(params, x[-1:], impl=impl)[0], f"{impl}, {list(x.shape)}")

    check()


def test_a_strangers_family_is_checked_without_being_registered():
    report = check_family(stranger.FAMILY)
    report.require()
    assert {row.check.split(" [")[0] for row in report.rows} == {*LAWS, *COMPILED}
    assert stranger.FAMILY.name not in attentions.FAMILIES


@pytest.mark.parametrize("broken, law", [
    (stranger.LEAKY, "causality"), (stranger.LEAKY, "split_anywhere"), (stranger.FORGETFUL, "split_anywhere"),
    (stranger.DETACHED, "jvp_is_the_difference"), (stranger.WRITER, "inputs_are_untouched"), (stranger.SILENT, "refusals"),
    (stranger.MIXING, "batch_invariance")], ids=name_of)
def test_a_broken_family_breaks_its_law(broken, law):
    rows = {row.check.split(" [")[0]: row for row in check_family(broken, compile=False).rows}
    assert rows[law].status == "fail", rows[law]


def test_every_law_has_a_sentence():
    assert all((law.__doc__ or "").strip().splitlines()[0].endswith(".") for law in LAWS.values())


def test_poisoned_memory_is_handed_out_only_inside():
    with world.poisoned_empty():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
    before = torch.empty
    assert before is torch.empty and torch.zeros(2).sum() == 0
