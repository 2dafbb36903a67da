"""A gradient through attention over eight devices, keys and values in a random order.

It shows:

1. `jax.grad` differentiates it like `jax.nn.dot_product_attention`.
2. The gradients of key and value have the sharding and the order of the keys.
3. The backward pass moves only the gradient of the query, in one all-reduce.

    python examples/03_gradient.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn import layouts
from distattn.testing import collectives, fake_devices

DEVICES = 8
QUERIES, KEYS = 16, 1024
HEADS, KV_HEADS, WIDTH = 4, 2, 32
BOUND = 1e-5


def main() -> None:
    """Compare the gradients, then count collectives."""
    fake_devices(DEVICES)
    rng = np.random.default_rng(0)
    shapes = [(QUERIES, HEADS), (KEYS, KV_HEADS), (KEYS, KV_HEADS)]
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, *shape, WIDTH)), jnp.float32) for shape in shapes
    )
    target = jnp.asarray(rng.normal(size=query.shape), jnp.float32)
    query_positions = np.sort(rng.choice(KEYS, QUERIES, replace=False)).astype(np.int32)
    order = rng.permutation(KEYS).astype(np.int32)

    def expected_loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        mask = np.arange(KEYS) <= query_positions[:, None]
        out = jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])
        return ((out - target) ** 2).mean()

    # Inside jit an array with Auto axes does not tell how it is sharded, so the call does.
    mesh = jax.make_mesh((DEVICES,), ("kv",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, P())
    by_keys = NamedSharding(mesh, P(None, "kv"))

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        out = distattn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            query_positions=query_positions,
            key_positions=order,
            query_sharding=replicated,
            key_value_sharding=by_keys,
            strategy="butterfly",
        )
        return ((out - target) ** 2).mean()

    expected, expected_gradients = jax.value_and_grad(expected_loss, (0, 1, 2))(query, key, value)
    scattered = (
        jax.device_put(query, replicated),
        jax.device_put(layouts.reorder(key, order), by_keys),
        jax.device_put(layouts.reorder(value, order), by_keys),
    )
    forward = jax.jit(loss).lower(*scattered).compile()
    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*scattered).compile()
    loss_value, gradients = both(*scattered)
    print(f"loss           {float(loss_value):.7f}, by jax.nn {float(expected):.7f}")
    assert abs(float(loss_value) - float(expected)) < BOUND

    print(f"{'gradient of':<14} {'stored':<28} from jax.nn")
    names = ("query", "key", "value")
    for name, x, by_jax in zip(names, gradients, expected_gradients, strict=True):
        in_order = x if name == "query" else layouts.restore(x, order)
        error = float(np.abs(np.asarray(in_order) - by_jax).max() / np.abs(by_jax).max())
        stored = "on every device" if x.sharding.is_fully_replicated else "with its keys"
        print(f"{name:<14} {stored:<28} {error:.1e}")
        assert x.sharding.is_equivalent_to(replicated if name == "query" else by_keys, x.ndim)
        assert error < BOUND

    of_forward, of_both = collectives(forward.as_text()), collectives(both.as_text())
    of_backward = of_both - of_forward
    print(f"\nforward moves  {dict(of_forward)}")
    print(f"backward moves {dict(of_backward)}: the gradient of the query")
    assert of_forward == {"collective-permute": 3}
    assert of_backward == {"all-reduce": 1}
    assert of_both == of_forward + of_backward
    print("The gradients are those of jax.nn, and no key, value or gradient of them moved.")


if __name__ == "__main__":
    main()
