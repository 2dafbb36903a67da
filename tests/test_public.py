"""The public names, as one list: a new one is a reviewed line."""

import doctest
import importlib
import pkgutil

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


def test_public_names():
    assert sorted(distattn.__all__) == PUBLIC
    assert all(getattr(distattn, name).__doc__ for name in PUBLIC)


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(distattn.__path__)])
def test_examples_in_docstrings(name):
    failures, _ = doctest.testmod(importlib.import_module(f"distattn.{name}"))
    assert failures == 0
