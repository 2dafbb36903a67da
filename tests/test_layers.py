"""The house rules that a machine can check, in the syntax trees of the files."""

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "distattn"

# Each package may import only from these, beside `_compat`.
ARROWS = {
    "algebra": set(),
    "planning": set(),
    "local": {"algebra", "planning"},
    "collectives": {"algebra", "planning", "experimental"},
    "attention": {"local", "collectives", "algebra", "planning", "experimental"},
    "experimental": {"local", "collectives", "algebra", "planning"},
    "distributed": {"collectives"},
    "cache": {"attention", "local", "collectives", "distributed"},
    "integrations": {"attention", "local"},
    "testing": {"planning", "collectives"},
    "layouts": {"attention", "collectives"},
}
TOPS = {"cli", "__init__", "__main__"}  # import what they like
DRAWERS = {"utils", "helpers", "common", "misc", "base"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, package: tuple[str, ...] = ("distattn",)) -> Iterator[tuple[str, ...]]:
    """Yield everything that the tree imports, as dotted names in parts, from a file in `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = start + tuple(node.module.split(".") if node.module else ())
            yield from ((*module, alias.name) for alias in node.names)


def graph() -> dict[str, set[str]]:
    """Return the modules of the library that each module imports, for type checkers too."""
    modules = {dotted(path): path for path in python_files("distattn")}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = {".".join(p[:n]) for p in imports(parse(path)) for n in (len(p), len(p) - 1)}
        edges[module] = {x for x in found & {*modules} if x not in (module, "distattn")}
    return edges


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_arrows_point_down():
    wrong = [
        f"{module} -> {imported}"
        for module, found in graph().items()
        if package_of(module) not in TOPS
        for imported in found
        if package_of(imported)
        not in {package_of(module), "_compat", *ARROWS.get(package_of(module), ())}
    ]
    assert wrong == []


def test_no_circle_of_imports():
    edges = graph()
    while edges:  # take away what imports nothing that is left
        leaves = {module for module, found in edges.items() if not found & {*edges}}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {module: found for module, found in edges.items() if module not in leaves}


def test_planning_does_not_know_jax():
    for path in python_files("distattn/planning"):
        assert not {"jax", "jaxlib"} & {parts[0] for parts in imports(parse(path))}, path


def test_reference_is_imported_by_the_check_command_alone():
    users = {module for module, found in graph().items() if "distattn.testing.reference" in found}
    assert all(package_of(module) in ("cli", "testing") for module in users), users


@dataclasses.dataclass(frozen=True)
class Rule:
    """A construct that only some files may have."""

    name: str
    finds: Callable[[ast.AST], bool]  # takes one node
    folders: tuple[str, ...]
    offenders: tuple[str, ...]  # each a piece of code that it must find
    innocents: tuple[str, ...]  # and must not
    allowed: frozenset[str] = frozenset()  # files, and folders with a slash at their end

    def lines(self, tree: ast.AST) -> list[int]:
        return [node.lineno for node in ast.walk(tree) if self.finds(node)]


def names(node: ast.AST) -> set[str]:
    """Return the last part of the name of a node: x for `x`, `a.x` and `from a import x`."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return {name}
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return {alias.name.rpartition(".")[2] for alias in aliases}
    return set()


def is_exponential(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and bool(names(node.func) & {"exp", "exp2"})


def is_private_jax(node: ast.AST) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        found = imports(ast.Module([node], []))
        return any(p[0] in {"jax", "jaxlib"} and any(x[0] == "_" for x in p) for p in found)
    return isinstance(node, ast.Attribute) and node.attr == "_src"


def is_tolerance(node: ast.AST) -> bool:
    """Return True for a relative tolerance in digits, other than 0."""
    match node:
        case ast.keyword(arg="rtol", value=value):
            given = value
        case ast.Call(args=[_, _, given, *_]) if names(node.func) & {"allclose", "assert_allclose"}:
            pass
        case _:
            return False
    parts = list(ast.walk(given))
    computed = any(isinstance(part, ast.Name | ast.Call) for part in parts)
    return not computed and any(isinstance(p, ast.Constant) and p.value for p in parts)


def is_public_with_kwargs(node: ast.AST) -> bool:
    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return function and not node.name.startswith("_") and node.args.kwarg is not None


SKIPS = {"skip", "skipif", "skipIf", "skipUnless", "skipTest", "SkipTest", "importorskip"}
RULES = (
    Rule(
        "the merge is written once: exp stands where states are made",
        is_exponential,
        ("distattn",),
        ("jnp.exp(x)", "exp2(x)"),
        ("jnp.expm1(x)", "f(exp=x)"),
        frozenset(
            f"distattn/{file}.py"
            for file in (
                "algebra/deterministic_math",
                "algebra/softmax_state",
                "algebra/fixed_point",
                "local/reproducible",
                "testing/reference",
            )
        ),
    ),
    Rule(
        "one file splits a computation over devices",
        lambda node: "shard_map" in names(node),
        ("distattn",),
        ("jax.shard_map(f)", "from jax import shard_map", "import jax.experimental.shard_map"),
        ("'shard_map'", "shard_maps(f)"),
        frozenset({"distattn/collectives/mesh.py"}),
    ),
    Rule(
        "nothing private to jax",
        is_private_jax,
        ("distattn", "examples", "scripts", "tests"),
        ("import jax._src.core", "from jax._src import core", "from jax import _src", "jax._src.x"),
        ("import jax", "from jax.sharding import Mesh", "from distattn._compat import vary"),
        frozenset({"distattn/_compat.py"}),
    ),
    Rule(
        "public functions name their parameters",
        is_public_with_kwargs,
        ("distattn",),
        ("def f(**kwargs): pass", "class A:\n  def f(self, *, a, **rest): pass"),
        ("def _f(**kwargs): pass", "def f(*, a): pass", "f(**kwargs)"),
    ),
    Rule(
        "one tolerance table",
        is_tolerance,
        ("distattn", "tests"),
        ("f(a, b, rtol=1e-5)", "f(rtol=2 * 1e-5)", "np.testing.assert_allclose(a, b, 1e-5)"),
        ("f(a, b, rtol=tolerance(dtype, 8))", "f(rtol=0, atol=bound)", "f(rtol=3 * bound)"),
        frozenset({"tests/tolerance.py"}),
    ),
    Rule(
        "no test is skipped",
        lambda node: bool(SKIPS & names(node)),
        ("tests",),
        (
            "pytest.skip()",
            "@pytest.mark.skipif(x)\ndef f(): pass",
            "from pytest import importorskip",
        ),
        ("skipped = 1", "'skip'"),
    ),
)
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


@every_rule
def test_rule(rule):
    offences = [
        f"{name(path)}:{line}"
        for path in python_files(*rule.folders)
        if name(path) not in rule.allowed
        for line in rule.lines(parse(path))
    ]
    assert offences == []


@every_rule
def test_rule_knows_offenders_from_innocents(rule):
    assert all(rule.lines(ast.parse(code)) for code in rule.offenders)
    assert not any(rule.lines(ast.parse(code)) for code in rule.innocents)


def test_vma_checks_are_off_in_one_place():
    places = [
        f"{name(path)}:{node.lineno}"
        for path in python_files("distattn")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.keyword) and node.arg == "check_vma"
        if not (isinstance(node.value, ast.Constant) and node.value.value)
    ]
    assert len(places) == 1, places


def test_no_file_is_a_drawer():
    files = python_files("distattn", "examples", "scripts", "tests")
    words = {name(path): set(re.split(r"[_/.]+", name(path))) for path in files}
    assert {file for file, parts in words.items() if parts & DRAWERS} == set()
