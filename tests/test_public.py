"""The public names as one list, in which a new name is a reviewed line; and examples in docstrings."""

import doctest
import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import pytest

import distattn
from distattn._compat import needed

PUBLIC = [
    "KVCache",
    "PairJoin",
    "ScatterSchedule",
    "Schedule",
    "SoftmaxState",
    "all_reduce",
    "distributed",
    "dot_product_attention",
    "finalize",
    "from_lse",
    "identity",
    "layouts",
    "merge",
    "partial_attention",
    "reduce_scatter",
    "reproducible_sum",
    "sharded_attention",
]
OPTIONAL = {
    *("equinox", "flax", "gguf", "hypothesis", "matplotlib", "optax", "orbax", "tokenizers"),
    "jax.experimental.pallas",  # it takes half a second, which only users of kernels pay
}
MODULES = [m.name for m in pkgutil.walk_packages(distattn.__path__, "distattn.")]


def test_public_names():
    assert sorted(distattn.__all__) == dir(distattn) == PUBLIC
    assert all(getattr(distattn, name).__doc__ for name in PUBLIC)


def test_what_is_optional_is_imported_where_it_is_used():
    """Nor does a module for one framework import another, nor a kernel Pallas before it is called."""
    code = f"""
import sys
import distattn, distattn.integrations, distattn.integrations.jax_nn, distattn.testing
from distattn.local.kernels import cudnn
from distattn.local.kernels.gpu import support
from distattn.local.kernels.tpu import support
print(*sorted({OPTIONAL} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", ["flax", "equinox"])
def test_a_package_that_is_not_there_is_named_with_what_brings_it(package):
    """Orbax has its test in tests/cache/test_cache_moves.py."""
    code = f"import sys; sys.modules[{package!r}] = None; import distattn.integrations.{package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"ModuleNotFoundError: distattn.integrations.{package} needs {package}, which is not installed: "
        f"pip install -e '.[{package}]' in a clone of distattn"
    )


def test_what_an_optional_package_itself_lacks_is_said_as_it_is():
    with (
        pytest.raises(ModuleNotFoundError, match="No module named 'of_nobody'"),
        needed("flax", by="x", extra="flax"),
    ):
        import of_nobody  # noqa: F401


def callables(holder: Any) -> Iterator[tuple[str, Any]]:
    """Yield functions and classes of a module and its public modules, and KVCache's methods."""
    for name in holder.__all__:
        given = getattr(holder, name)
        if isinstance(given, ModuleType):
            yield from ((f"{name}.{inner}", x) for inner, x in callables(given))
        else:
            yield name, given
    if holder is distattn:
        methods = inspect.getmembers(distattn.KVCache, inspect.isroutine)
        yield from ((f"KVCache.{name}", x) for name, x in methods if not name.startswith("_"))


EVERY = dict(callables(distattn))


@functools.cache
def doctests(module: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder().find(importlib.import_module(module))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module):
    runner = doctest.DocTestRunner()
    for test in doctests(module):
        runner.run(test, clear_globs=False)
    assert runner.summarize().failed == 0


@pytest.mark.parametrize("name", EVERY)
def test_every_public_name_has_an_example(name):
    given = EVERY[name]
    assert any(test.docstring == given.__doc__ for test in doctests(given.__module__))


@pytest.mark.parametrize("name", EVERY)
def test_help_tells_of_every_argument_and_of_the_result(name):
    given = EVERY[name]
    signature, text = inspect.signature(given), inspect.getdoc(given)
    if not (inspect.isclass(given) and issubclass(given, Exception)):  # users do not make them
        untold = [x for x in signature.parameters if x != "self" and f"\n  {x}: " not in text]
        assert untold == []
    result = signature.return_annotation
    assert (result in (None, "None", inspect.Signature.empty)) or "Returns:" in text


# Public modules that `distattn` does not name.
BESIDE = (
    *("algebra.fixed_point", "planning.cost", "local.streaming", "testing.hlo", "testing.programs"),
    *(f"integrations.{name}" for name in ("equinox", "flax", "jax_nn")),
)


def defined(module: str) -> Iterator[tuple[str, Any]]:
    """Yield the public functions and classes of a module, and the methods of its classes."""
    for name, given in vars(importlib.import_module(f"distattn.{module}")).items():
        if name.startswith("_") or getattr(given, "__module__", None) != f"distattn.{module}":
            continue
        yield f"{module}.{name}", given
        methods = vars(given).items() if inspect.isclass(given) else ()
        yield from (
            (f"{module}.{name}.{method}", x)
            for method, x in methods
            if inspect.isfunction(x) and not method.startswith("_")
        )


SHOWN = {
    name: given
    for name, given in (*EVERY.items(), *(x for module in BESIDE for x in defined(module)))
    if callable(given)
    and (inspect.isfunction(given) or inspect.ismethod(given) or inspect.isclass(given))
}


@pytest.mark.parametrize("name", SHOWN)
def test_help_shows_types_by_their_names(name):
    """`ArrayLike` is shown by name: its union would take half a screen."""
    signature = str(inspect.signature(SHOWN[name]))
    assert "Union[" not in signature
    assert "jaxlib" not in signature
    assert "_src" not in signature


@pytest.mark.parametrize("name", SHOWN)
def test_types_that_are_shown_by_name_are_there(name):
    given = SHOWN[name]
    called = given.__init__ if inspect.isclass(given) else given
    hints = typing.get_type_hints(called)
    assert not any(isinstance(hint, str | typing.ForwardRef) for hint in hints.values())
    if name.endswith("dot_product_attention"):
        assert hints["query"] == typing.get_type_hints(distattn.partial_attention)["query"]
        assert jax.Array in typing.get_args(hints["query"])
