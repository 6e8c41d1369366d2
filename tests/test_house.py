"""Rules of the house that a machine can check by reading: who imports whom, how long files are, what nobody writes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
LIMIT = 400  # lines
CODE = (".py", ".c", ".h")

# From the cellar to the roof. A module imports from its own floor and from those below it.
FLOORS = (
    ("fnattn_kernels",),
    ("fnattn._kernels_path", "fnattn._later", "fnattn._autograd", "fnattn._trees", "fnattn._closures", "fnattn.tree", "fnattn.random",
     "fnattn.core", "fnattn.taps"),
    ("fnattn.ops",),
    ("fnattn.attentions",),
    ("fnattn.models",),
    ("fnattn",),
)
# Private names of torch may move with any release; each file that touches them is here: one knows where to look.
PRIVATE = {
    "kernels/contracts.py": "the Autograd-key kernel that every operator rests on",
    "kernels/forward_mode.py": "duals of a level, and the way below it",
    "kernels/mapping.py": "how vmap reaches a rule without taking trees of arguments apart",
    "kernels/watchers.py": "what stands between a call and its backend",
    "kernels/collectives.py": "a group of processes by its name",
    "kernels/sharding.py": "what DTensor remembers a decision by",
    "fnattn/_trees.py": "torch's pytree module",
    "fnattn/tree.py": "remat's forward mode",
    "kernels/higher_order.py": "torch's associative scan has no public name yet",
    "kernels/native/softmax_aten.py": "torch's fused attention for the CPU has no public name",
    "fnattn/_autograd.py": "which transforms and modes are under way",
    "fnattn/_closures.py": "which tensors take part in a derivative",
    "fnattn/_together.py": "many tensors in one call have no public name; forward mode under way",
    "fnattn/core.py": "whether Python may look at a value",
    "fnattn/taps.py": "how many transforms are under way",
    "fnattn/models/reversible.py": "one autograd node that works at every transform level",
    "fnattn/testing": "the checks of derivatives reset and inspect the compiler",
    "fnattn/cli": "the derivative table runs those checks",
}
# The program talks to a person; the library never does.
SPEAKS = ("fnattn/cli/", "fnattn/__main__.py")
GLOBAL_RNG = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "rand_like",
              "randn_like", "randint_like", "manual_seed", "seed", "dropout", "set_rng_state"}
GLOBAL_ROOTS = ("torch", "F", "torch.nn.functional", "np.random", "numpy.random")
RNG_METHODS = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_"}


def sources(*roots: str) -> list[Path]:
    return sorted(path for root in roots for path in (REPO / root).rglob("*.py"))


def label(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def module(path: Path) -> str:
    name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    return re.sub(r"^kernels\b", "fnattn_kernels", name)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=label(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module of this project that a file imports, by its full name, wherever the statement stands."""
    package = module(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    known = {module(p) for p in sources("fnattn", "kernels")}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        yield from ((t, node.lineno) for t in targets if t.split(".")[0] in ("fnattn", "fnattn_kernels"))


def floor(name: str) -> int:
    if name == "fnattn":  # the front door itself
        return len(FLOORS) - 1
    return next(i for i, names in enumerate(FLOORS) if any(name == n or name.startswith(n + ".") for n in names))


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call))


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


# ------------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize("path", sources("fnattn", "kernels"), ids=label)
def test_imports_go_downstairs_only(path):
    here = module(path)
    for target, line in imports(path):
        assert floor(target) <= floor(here), f"{label(path)}:{line}: {here} imports {target} from a floor above"


def test_the_kernels_import_nothing_but_torch_and_what_is_asked_for_by_name():
    for path in sources("kernels"):
        for node in parse(path).body:  # at the top of the file: imported with the module
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for root in (name.split(".")[0] for name in names):
                allowed = root in ("torch", "fnattn_kernels") or root in sys.stdlib_module_names
                assert allowed, f"{label(path)}:{node.lineno} imports {root} when it is imported itself"


def test_one_family_does_not_import_another():
    for path in sources("fnattn/attentions"):
        if path.name.startswith("_"):
            continue
        for target, line in imports(path):
            if target.startswith("fnattn.attentions."):
                assert target.split(".")[2].startswith("_"), f"{label(path)}:{line} imports the family {target}"


# ------------------------------------------------------------------------------------------------ files


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [REPO / name for name in done.stdout.split("\0") if name and (REPO / name).is_file()]


def test_no_file_is_longer_than_a_person_can_hold():
    files = [p for root in ("fnattn", "kernels", "tests") for p in (REPO / root).rglob("*.*") if p.suffix in CODE]
    long = {label(p): n for p in files if (n := p.read_text().count("\n")) > LIMIT}
    assert not long


def test_no_file_names_a_folder_of_somebodys_machine():
    pattern = re.compile(r"(?<![\w.~<}])/(root|home|work|farm|Users|opt|mnt)/[A-Za-z]")
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{label(path)}:{i}: {line.strip()[:80]}" for i, line in enumerate(text.splitlines(), 1)
                  if pattern.search(line) and path != Path(__file__).resolve()]
    assert not found


# ------------------------------------------------------------------------------------------------ never written


@pytest.mark.parametrize("path", sources("fnattn", "kernels"), ids=label)
def test_no_randomness_without_a_key(path):
    own_generator = label(path).startswith("fnattn/testing/")  # seeded and passed on: nothing is shared
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            assert "random" not in [alias.name for alias in node.names], f"{label(path)}:{node.lineno} imports random"
    for call in calls(path):
        name = dotted(call.func)
        where = f"{label(path)}:{call.lineno}: {name}"
        if own_generator and (name == "torch.Generator" or any(k.arg == "generator" for k in call.keywords)):
            continue
        root, _, last = name.rpartition(".")
        assert not (root in GLOBAL_ROOTS and last in GLOBAL_RNG), where
        assert last not in RNG_METHODS, where
        assert name != "torch.Generator", where


@pytest.mark.parametrize("path", sources("fnattn", "kernels"), ids=label)
def test_users_mistakes_raise_errors_that_say_what_to_do(path):
    """No assert (python -O removes it), no exit, no print; assertions are what fnattn.testing is for."""
    for node in ast.walk(parse(path)):
        where = f"{label(path)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert) or label(path).startswith("fnattn/testing/"), where
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            speaks = label(path).startswith(SPEAKS)
            assert speaks or name not in ("exit", "quit", "sys.exit", "print"), f"{where} {name}"
        assert not isinstance(node, ast.ExceptHandler) or node.type is not None, f"{where} catches everything"


@pytest.mark.parametrize("path", sources("fnattn", "kernels"), ids=label)
def test_private_names_of_torch_stay_where_they_are_listed(path):
    if any(label(path) == name or label(path).startswith(name + "/") for name in PRIVATE):
        return
    for node in ast.walk(parse(path)):
        names = []
        if isinstance(node, ast.Attribute) and dotted(node).startswith("torch."):
            names = [dotted(node)]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        for name in names:
            private = [part for part in name.split(".")[1:] if part.startswith("_") and not part.startswith("__")]
            assert not private, f"{label(path)}:{node.lineno}: {name}"


def test_the_list_of_files_with_private_names_is_not_out_of_date():
    assert all((REPO / name).exists() for name in PRIVATE)


def test_every_module_says_what_it_is_and_every_public_function_of_the_library_what_it_does():
    silent = []
    helpers = ("fnattn/testing/", "fnattn/cli/", "fnattn/convert/")  # called from inside: names are enough
    for path in sources("fnattn", "kernels"):
        file = parse(path)
        if not ast.get_docstring(file) and file.body:
            silent.append(label(path))
        silent += [f"{label(path)}:{node.lineno} {node.name}" for node in file.body
                   if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
                   and not ast.get_docstring(node) and not label(path).startswith(helpers)]
    assert not silent
