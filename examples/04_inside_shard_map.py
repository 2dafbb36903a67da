"""Attention inside your own `jax.shard_map`, where each device sees only its own keys.

It shows:

1. `distattn.sharded_attention` takes this device's keys and values, and exchanges states with the other
   devices. Any code can be around it: here, the projections of a layer.
2. The query is replicated, or sharded too (`query_sharded=True`).
3. Results and gradients are right with `check_vma=True` (JAX checks what is equal on all devices) and
   False.

    python examples/04_inside_shard_map.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import distattn
from distattn.testing import fake_devices

DEVICES = 8
TOKENS, MODEL = 256, 24
HEADS, KV_HEADS, WIDTH = 4, 2, 16
LAST = np.array([254, 255], np.int32)  # tokens whose queries are replicated
BOUND = 1e-5

Weights = dict[str, jax.Array]  # each [M, heads, width]


def project(tokens: jax.Array, weights: Weights, name: str) -> jax.Array:
    """Project tokens [S, M] to [1, S, heads, width]."""
    return jnp.einsum("sm,mnh->snh", tokens, weights[name])[None]


def decode(weights: Weights, tokens: jax.Array, positions: jax.Array, last: jax.Array) -> jax.Array:
    """Attend from the replicated last tokens to the tokens of all devices, in any order."""
    return distattn.sharded_attention(
        project(last, weights, "query"),
        project(tokens, weights, "key"),
        project(tokens, weights, "value"),
        axis_name="seq",
        is_causal=True,
        query_positions=LAST,
        key_positions=positions,
    )


def self_attention(weights: Weights, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Attend from each of this device's tokens to the tokens before it, on any device."""
    return distattn.sharded_attention(
        project(tokens, weights, "query"),
        project(tokens, weights, "key"),
        project(tokens, weights, "value"),
        axis_name="seq",
        query_sharded=True,
        is_causal=True,
        query_positions=positions,
        key_positions=positions,
    )


def expected_decode(weights: Weights, tokens: jax.Array) -> jax.Array:
    """Compute `decode` on one device, tokens in order."""
    query = project(tokens[LAST], weights, "query")
    key, value = (project(tokens, weights, name) for name in ("key", "value"))
    mask = np.arange(TOKENS) <= LAST[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])


def expected_self_attention(weights: Weights, tokens: jax.Array) -> jax.Array:
    """Compute `self_attention` on one device, tokens in order."""
    arrays = [project(tokens, weights, name) for name in ("query", "key", "value")]
    return jax.nn.dot_product_attention(*arrays, is_causal=True)


def difference(actual: dict | jax.Array, expected: dict | jax.Array) -> float:
    """Return the largest error of any array, relative to its largest expected value."""

    def one(a: jax.Array, b: jax.Array) -> float:
        return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max())

    return max(jax.tree.leaves(jax.tree.map(one, actual, expected)))


def run(mesh: Mesh, check_vma: bool, weights: Weights, tokens: jax.Array) -> None:
    """Compare both functions and their gradients in a shard_map of this kind."""
    order = np.random.default_rng(1).permutation(TOKENS).astype(np.int32)
    shard_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    decoded = shard_map(decode, in_specs=(P(), P("seq"), P("seq"), P()), out_specs=P())
    attended = shard_map(
        self_attention, in_specs=(P(), P("seq"), P("seq")), out_specs=P(None, "seq")
    )
    shuffled = tokens[order]
    for name, sharded, one_device in (
        (
            "replicated query",
            lambda weights: decoded(weights, shuffled, order, tokens[LAST]),
            lambda weights: expected_decode(weights, tokens),
        ),
        (
            "sharded query",
            lambda weights: attended(weights, shuffled, order),
            lambda weights: expected_self_attention(weights, tokens)[:, order],
        ),
    ):

        def loss(weights: Weights, f=sharded) -> tuple[jax.Array, jax.Array]:
            out = f(weights)
            return (out**3).mean(), out

        gradients, out = jax.jit(jax.grad(loss, has_aux=True))(weights)
        expected_gradients, expected = jax.grad(
            functools.partial(loss, f=one_device), has_aux=True
        )(weights)
        errors = difference(out, expected), difference(gradients, expected_gradients)
        print(f"  {name:<24} out {errors[0]:.1e}  gradients of the weights {errors[1]:.1e}")
        assert max(errors) < BOUND


def main() -> None:
    """Run both kinds of shard_map."""
    fake_devices(DEVICES)
    mesh = jax.make_mesh((DEVICES,), ("seq",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    weights = {
        "query": normal(MODEL, HEADS, WIDTH) / MODEL**0.5,
        "key": normal(MODEL, KV_HEADS, WIDTH) / MODEL**0.5,
        "value": normal(MODEL, KV_HEADS, WIDTH) / MODEL**0.5,
    }
    tokens = normal(TOKENS, MODEL)
    for check_vma in (True, False):
        print(f"jax.shard_map(..., check_vma={check_vma}), largest differences from jax.nn:")
        run(mesh, check_vma, weights, tokens)
    print("Inside your own shard_map attention is the same, forward and backward.")


if __name__ == "__main__":
    main()
