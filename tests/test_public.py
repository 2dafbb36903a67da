"""The public names, as one list: a new one is a reviewed line; and the examples in docstrings."""

import doctest
import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import distattn

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
    "jax.experimental.pallas",  # the half of a second that it takes is for those who run kernels
}
MODULES = [m.name for m in pkgutil.walk_packages(distattn.__path__, "distattn.")]


def test_public_names():
    assert sorted(distattn.__all__) == PUBLIC
    assert all(getattr(distattn, name).__doc__ for name in PUBLIC)


def test_what_is_optional_is_imported_where_it_is_used():
    """Nor does a module for one framework import another, nor a kernel Pallas before it is called."""
    code = f"""
import sys
import distattn, distattn.integrations, distattn.integrations.jax_nn, distattn.testing
from distattn.kernels import cudnn, pallas_gpu, pallas_tpu, splash
print(*sorted({OPTIONAL} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def callables(holder: Any) -> Iterator[tuple[str, Any]]:
    """A module's public functions and classes, those of its public modules, and KVCache's methods."""
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
    """One that runs above: in the docstring that `help` shows."""
    given = EVERY[name]
    assert any(test.docstring == given.__doc__ for test in doctests(given.__module__))


@pytest.mark.parametrize("name", EVERY)
def test_help_tells_of_every_argument_and_of_the_result(name):
    given = EVERY[name]
    signature, text = inspect.signature(given), inspect.getdoc(given)
    if not (inspect.isclass(given) and issubclass(given, Exception)):  # nobody else makes them
        untold = [x for x in signature.parameters if x != "self" and f"\n  {x}: " not in text]
        assert untold == []
    result = signature.return_annotation
    assert (result in (None, inspect.Signature.empty)) or "Returns:" in text
