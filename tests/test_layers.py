"""The house rules that a machine can check, read off the syntax trees of the files."""

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "distattn"

# A module imports only from those before it. A package stands here for all of its files.
LAYERS = (
    "extras",
    "_compat",
    "_manual",
    "elementary",
    "state",
    "mask",
    "visits",
    "block_sizes",
    "block",
    "checks",
    "operands",
    "tiles",
    "gauge",
    "words",
    "fixed_point",
    "sums",
    "step",
    "units",
    "by_key",
    "reproducible",
    "link",
    "chips",
    "kernels",
    "derivatives",
    "local",
    "partial",
    "amounts",
    "merge_trees",
    "schedule",
    "wiring",
    "cost",
    "traffic",
    "planner",
    "pods",
    "workload",
    "division",
    "roofline",
    "memory",
    "remedies",
    "backward_traffic",
    "plan",
    "monoid",
    "axes",
    "fused",
    "collectives",
    "scatter",
    "ring",
    "ulysses",
    "totals",
    "placement",
    "read_placement",
    "pair_exchange",
    "alignment",
    "layouts",
    "streaming",
    "movement",
    "completion",
    "work",
    "call",
    "across",
    "within",
    "sharded",
    "attention",
    "distributed",
    "cache",
    "integrations",
    "reference",
    "hlo",
    "report",
    "compilers",
    "testing",
    "checkup",
    "tuning",
    "cli",
    "__init__",
    "__main__",
)
# The same for the files of a package. KVCache comes last: the functions before it are its methods.
INSIDE = {
    "cache": (
        "arguments",
        "storage",
        "layout",
        "slots",
        "replicas",
        "capacity",
        "moving",
        "edits",
        "forking",
        "reserving",
        "writing",
        "reading",
        "recovery",
        "manifest",
        "steps",
        "checkpoint",
        "kv_cache",
        "__init__",
    )
}
# A method's own class, which stands above it, is there for type checkers: nothing is imported when it runs.
ANNOTATED = {"cache": ("distattn", "cache", "kv_cache", "KVCache")}
MAX_LINES = 300
PURE = {  # run, and tested, without jax
    *(
        "amounts",
        "block_sizes",
        "merge_trees",
        "schedule",
        "link",
        "chips",
        "wiring",
        "cost",
        "traffic",
        "planner",
    ),
    *("pods", "workload", "division", "roofline", "memory", "remedies", "backward_traffic", "plan"),
}
DRAWERS = {"utils", "helpers", "common", "misc", "base"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer(path: Path) -> str:
    return path.relative_to(LIBRARY).with_suffix("").parts[0]


every_module = pytest.mark.parametrize("path", python_files("distattn"), ids=name)


def imports(tree: ast.AST, package: tuple[str, ...] = ("distattn",)) -> Iterator[tuple[str, ...]]:
    """All that the tree imports, as dotted names in parts; `package` is where the file lies."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = start + tuple(node.module.split(".") if node.module else ())
            yield from ((*module, alias.name) for alias in node.names)


def layers_imported(tree: ast.AST, package: tuple[str, ...] = ("distattn",)) -> set[str]:
    """The layers that a file imports; a name that is no module comes from `__init__`."""
    parts = [parts for parts in imports(tree, package) if parts[0] == "distattn"]
    return {p[1] if len(p) > 1 and p[1] in LAYERS else "__init__" for p in parts}


def package_of(path: Path) -> tuple[str, ...]:
    return path.parent.relative_to(ROOT).parts


@every_module
def test_every_module_has_a_layer(path):
    assert layer(path) in LAYERS, "a new module is a new line in LAYERS, at its height"


@every_module
def test_imports_point_down(path):
    own = layer(path)
    below = LAYERS[: LAYERS.index(own)]
    inside_package = {own} if path.parent != LIBRARY else set()
    assert layers_imported(parse(path), package_of(path)) <= {*below, *inside_package}


def without_annotations(tree: ast.AST) -> tuple[ast.Module, ast.Module]:
    """What is imported when the file runs, and what only a type checker imports."""
    checking = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and names(node.test) == {"TYPE_CHECKING"}
    ]
    hidden = {inner for node in checking for inner in ast.walk(node)}
    shown = [node for node in ast.walk(tree) if node not in hidden and is_import(node)]
    return ast.Module(shown, []), ast.Module([x for node in checking for x in node.body], [])


def is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


@pytest.mark.parametrize("package", INSIDE)
def test_imports_inside_a_package_point_down(package):
    order = INSIDE[package]
    files = python_files(f"distattn/{package}")
    assert sorted(path.stem for path in files) == sorted(order)
    for path in files:
        run, annotations = (
            [x for x in imports(tree, package_of(path)) if x[:2] == ("distattn", package)]
            for tree in without_annotations(parse(path))
        )
        below = order[: order.index(path.stem)]
        assert {x[2] for x in run} <= {*below}, path.stem
        assert {*annotations} <= {ANNOTATED[package]}, path.stem


def test_what_is_imported_for_type_checkers_is_told_from_the_rest():
    source = """
from distattn.cache.layout import Layout
if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache
class A:
    from distattn.cache.edits import reset
def f():
    from distattn.cache import kv_cache
"""
    run, annotations = without_annotations(ast.parse(source))
    assert {x[2] for x in imports(run)} == {"layout", "edits", "kv_cache"}
    assert [*imports(annotations)] == [ANNOTATED["cache"]]


# `distattn check` compares the user's own devices with the oracle: that is what it is for.
COMPARES = "distattn/checkup/correctness.py"


@every_module
def test_reference_is_imported_by_no_module(path):
    imported = "reference" in layers_imported(parse(path), package_of(path))
    assert imported == (name(path) == COMPARES)


@pytest.mark.parametrize("module", sorted(PURE))
def test_plans_do_not_know_jax(module):
    path = LIBRARY / f"{module}.py"
    trees = [parse(path)] if path.exists() else []
    for tree in trees:
        assert not {"jax", "jaxlib"} & {parts[0] for parts in imports(tree)}
        assert layers_imported(tree) <= PURE


def test_imports_are_seen_however_they_are_written():
    source = """
import distattn.state
from distattn import mask, SoftmaxState
from .local import partial_attention
def f():
    from .. import cost
    from ..schedule import Schedule
"""
    in_package = layers_imported(ast.parse(source), ("distattn", "kernels"))
    assert in_package == {"state", "mask", "__init__", "kernels", "cost", "schedule"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Something that stands only in some files."""

    name: str
    finds: Callable[[ast.AST], bool]  # of one node
    folders: tuple[str, ...]
    offenders: tuple[str, ...]  # each a piece of code that it must find
    innocents: tuple[str, ...]  # and must not
    allowed: frozenset[str] = frozenset()  # files, and folders with a slash at their end

    def lines(self, tree: ast.AST) -> list[int]:
        return [node.lineno for node in ast.walk(tree) if self.finds(node)]


def names(node: ast.AST) -> set[str]:
    """The last part of what the node names: x for `x`, `a.x` and `from a import x`."""
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
    """A relative tolerance spelt out in digits; 0 loosens nothing."""
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
            for file in ("elementary", "state", "gauge", "reproducible", "reference")
        ),
    ),
    Rule(
        "one file splits a computation over devices",
        lambda node: "shard_map" in names(node),
        ("distattn",),
        ("jax.shard_map(f)", "from jax import shard_map", "import jax.experimental.shard_map"),
        ("'shard_map'", "shard_maps(f)"),
        frozenset({"distattn/_manual.py"}),
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


@every_module
def test_files_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, "two rooms in one?"


def test_no_file_is_a_drawer():
    files = python_files("distattn", "examples", "scripts", "tests")
    words = {name(path): set(re.split(r"[_/.]+", name(path))) for path in files}
    assert {file for file, parts in words.items() if parts & DRAWERS} == set()
