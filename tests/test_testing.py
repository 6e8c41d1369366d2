"""The harness itself: it finds what is wrong with operators that are wrong in well-known ways."""

from __future__ import annotations

import os

import pytest
import torch
import wrong_operators as wrong
from versions import OLD

from fnattn.testing import APART, CHECKS, check_operator
from fnattn.testing.apart import run_apart

ARGS = tuple(torch.linspace(*ends, 6, dtype=torch.float64).reshape(2, 3) for ends in ((-1.2, 1.5), (0.4, 2.0)))
EAGER = tuple(name for name in CHECKS if name not in APART)


def status(fn, **options):
    return {row.check: row for row in check_operator(fn, ARGS, reference=wrong.plain, **options).rows}


def failed(fn, **options):
    return {name for name, row in status(fn, **options).items() if row.status == "fail"}


def test_a_right_operator_passes_every_check_and_only_torch_limits_remain():
    rows = status("wrong_operators:looped", dynamic=({0: "b"}, {0: "b"}))
    assert list(rows) == list(CHECKS)
    limits = {"grad(checkpoint(f))"}
    limits |= {"make_fx(hessian)", "compile: jacfwd(f)", "compile: hessian(f)"} if OLD else {"compile: grad(checkpoint(f))"}
    assert {name for name, row in rows.items() if row.status == "torch"} == limits
    assert all(row.status in ("ok", "torch") for row in rows.values())


def test_silently_zero_tangents_of_a_documented_custom_op_are_found():
    rows = status(wrong.documented, compile=False)
    for name in ("jvp(f)", "autograd: forward_ad duals"):
        assert rows[name].status == "fail" and "zero instead of the true value" in rows[name].detail
    for name in ("grad(f)", "vjp(f)", "jacrev(f)"):
        assert rows[name].status == "fail" and "setup_context" in rows[name].detail
    for name in ("f", "vmap(f)", "autograd: backward", "autograd: double backward", "checkpoint, reentrant"):
        assert rows[name].status == "ok"


def test_an_old_style_function_fails_under_torch_func_and_passes_plain_autograd():
    rows = status(wrong.old_style, compile=False)
    assert {name for name in ("grad(f)", "vjp(f)", "jvp(f)", "jacrev(f)", "hessian(f)", "vmap(grad(f))")
            if rows[name].status == "fail"} == {"grad(f)", "vjp(f)", "jvp(f)", "jacrev(f)", "hessian(f)", "vmap(grad(f))"}
    assert rows["autograd: triple backward"].status == "ok"


def test_a_sign_error_in_second_order_is_found_by_second_order_checks_only():
    found = failed(wrong.sign_error, compile=False)
    assert {"grad(grad(f))", "autograd: double backward", "gradgradcheck: reverse over reverse", "jacrev(jacrev(f))"} <= found
    assert not {"f", "grad(f)", "vjp(f)", "jacrev(f)", "vmap(grad(f))", "autograd: backward", "gradcheck: reverse"} & found


def test_one_second_derivative_that_is_slightly_wrong_is_found_by_every_second_order_check():
    found = failed(wrong.one_entry, compile=False)
    assert {"grad(grad(f))", "vjp(grad(f))", "vmap(vjp(grad(f)))", "jacrev(jacrev(f))", "autograd: double backward",
            "gradgradcheck: reverse over reverse"} <= found
    assert not {"f", "grad(f)", "vjp(f)", "jacrev(f)", "vmap(grad(f))", "autograd: backward", "gradcheck: reverse"} & found


def test_a_lost_gradient_is_found_by_every_derivative_check():
    found = failed(wrong.detached, compile=False)
    assert {"grad(f)", "vjp(f)", "jvp(f)", "jacfwd(f)", "hessian(f)", "vmap(grad(f))", "gradcheck: forward"} <= found
    assert not {"f", "vmap(f)", "FakeTensor", "meta device"} & found


def test_compile_checks_find_the_zero_tangent_and_a_failure_spoils_no_later_check():
    names = ["compile: jvp(f)", "compile: grad(f)", "compile: f", "compile: backward", "compile: vmap(f)", "export"]
    rows = status("wrong_operators:documented", only=names)
    assert rows["compile: jvp(f)"].status == rows["compile: grad(f)"].status == "fail"
    assert [rows[n].status for n in ("compile: f", "compile: backward", "compile: vmap(f)", "export")] == ["ok"] * 4


def test_a_zero_expected_value_counts_as_nothing_tested():
    x = torch.zeros(2, 3, dtype=torch.float64)
    rows = check_operator(torch.relu, (x - 1.0,), reference=torch.relu, compile=False, only=["f"]).rows
    assert rows[0].status == "fail" and "nothing tested" in rows[0].detail


def test_the_raising_form_names_the_checks():
    with pytest.raises(AssertionError, match=r"1 of 1 checks failed:\n  jvp\(f\): zero instead"):
        check_operator(wrong.documented, ARGS, reference=wrong.plain, only=["jvp(f)"]).require()


def test_arguments_must_be_float64_and_functions_importable():
    with pytest.raises(ValueError, match="expected float64 arguments"):
        check_operator(wrong.plain, [a.float() for a in ARGS], reference=wrong.plain)
    with pytest.raises(ValueError, match="functions that can be imported"):
        check_operator(lambda x, y: x * y, ARGS, reference=wrong.plain, only=["compile: f"])
    with pytest.raises(ValueError, match=r"names from testing.CHECKS; got \['hesian'\]"):
        check_operator(wrong.plain, ARGS, reference=wrong.plain, only=["hesian"])


def test_a_process_that_dies_in_a_check_is_reported_and_the_others_run():
    answers = dict(run_apart("wrong_workers:worker", None, ["fine", "dies", "raises", "fine too"]))
    assert answers["fine"] is None and answers["fine too"] is None
    assert "died with status" in answers["dies"] and answers["raises"] == "ValueError: no"


def test_one_process_serves_many_calls_until_its_surroundings_change(monkeypatch):
    def parent():
        return dict(run_apart("wrong_workers:parent", None, ["of the checks"]))["of the checks"]

    first = parent()
    assert parent() == first
    assert dict(run_apart("wrong_workers:worker", None, ["slow"], limit_s=0.1))["slow"].startswith("ended without an answer")
    second = parent()  # the one that was too slow was stopped
    monkeypatch.setenv("FNATTN_NATIVE", "0")
    third = parent()
    assert len({first, second, third}) == 3
    for pid in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_fork_leaves_the_process_of_its_parent_alone():
    def parent():
        return dict(run_apart("wrong_workers:parent", None, ["of the checks"]))["of the checks"]

    first, child = parent(), os.fork()
    if child == 0:
        os._exit(0 if parent() != first else 1)
    assert os.waitpid(child, 0)[1] == 0 and parent() == first


def test_a_worker_that_cannot_be_imported_is_named_in_every_answer():
    answers = dict(run_apart("wrong_workers:nobody", None, ["one", "two"]))
    assert all("has no attribute 'nobody'" in answers[name] for name in ("one", "two"))
