"""Query, key and value all sharded along the sequence: every strategy, layout and mask, with gradients."""

import dataclasses
import functools
import itertools

import jax
import pytest

import distattn
from tests.cases import KINDS, QUERY_SHARDED, Case, check, runner, shardings

LENGTH = 48
LAYOUTS = ("contiguous", "zigzag", "striped", "random")
STRATEGIES = (*QUERY_SHARDED, "ulysses_ring", "ulysses_gather_kv")
MASKS = {
    "causal": Case(options=(("is_causal", True),)),
    "window": Case(
        sinks=True,
        lengths=True,
        options=(("is_causal", True), ("local_window_size", 9), ("logits_soft_cap", 2.0)),
    ),
    "bias and mask": Case(
        bias=("N", "T", "S"), mask=("B", "T", "S"), query_lengths=True, value_width=10
    ),
    "both sides": Case(kv_heads=1, bias=("N", "S"), options=(("local_window_size", (12, 5)),)),
}


def on_four_devices(strategy, kind):
    """The call of a user with a mesh, and the mesh: of two levels where the strategy has two."""
    one_level = strategy in QUERY_SHARDED
    sizes, axes = ((4,), ("sequence",)) if one_level else ((2, 2), ("host", "chip"))
    mesh = jax.make_mesh(sizes, axes, (KINDS[kind],) * len(sizes), devices=jax.devices()[:4])
    return mesh, functools.partial(
        distattn.dot_product_attention,
        **shardings(mesh, axes, query=axes),
        strategy=strategy,
        return_residual=True,
    )


# Compiled once for each strategy and mask: a layout and its documents are data.
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_layout(strategy, mask):
    kind = list(KINDS)[(STRATEGIES.index(strategy) + list(MASKS).index(mask)) % 2]
    mesh, attention = on_four_devices(strategy, kind)
    run = jax.jit(runner(attention, dict(MASKS[mask].options)))
    with jax.set_mesh(mesh):
        for layout, documents in itertools.product(LAYOUTS, (1, 4)):
            case = dataclasses.replace(
                MASKS[mask],
                queries=LENGTH,
                keys=LENGTH,
                layout=layout,
                documents=documents,
                seed=documents,
            )
            check(case, run=run, what=f"{strategy} {mask} {layout} {documents} {kind}")
