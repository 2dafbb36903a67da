"""Eight devices, keys and values in a random order, against jax.nn on one device, in order.

It shows:

1. How to put keys on a mesh in any order: each slot says which position its key has.
2. Masks compare positions: a causal mask, a window, and empty slots that hold NaN.
3. The devices exchange only softmax states, in as many messages as the strategy has, and nothing of the
   size of the keys and values. This is counted in the compiled program.

    python examples/02_eight_devices_random_order.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn.testing import collective_bytes, collectives, fake_devices

DEVICES = 8
KEYS, SLOTS = 4000, 4096  # 96 slots stay empty
HEADS, KV_HEADS, WIDTH = 8, 2, 64
WINDOW = 3000  # number of keys before it that a query sees
QUERY_POSITIONS = np.array([17, 1000, 3999], np.int32)
BOUND = 1e-5

# All collectives of each strategy in the compiled program.
STRATEGIES = {
    "butterfly": {"collective-permute": 3},  # log2 of 8
    "psum": {"all-reduce": 2},  # the maximum, then both sums in one message
    "all_gather": {"all-gather": 1},
}


def in_order(query: jax.Array, key: np.ndarray, value: np.ndarray) -> jax.Array:
    """Compute attention on one device; `jax.nn` has no positions, so it gets a mask."""
    behind = QUERY_POSITIONS[:, None] - np.arange(KEYS)
    mask = (behind >= 0) & (behind <= WINDOW)
    return jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])


def main() -> None:
    """Compile, run and count each strategy."""
    fake_devices(DEVICES)
    rng = np.random.default_rng(0)
    shape = (1, KEYS, KV_HEADS, WIDTH)
    query = jnp.asarray(rng.normal(size=(1, len(QUERY_POSITIONS), HEADS, WIDTH)), jnp.float32)
    key, value = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    expected = in_order(query, key, value)

    # Slot i holds the key of position positions[i], or nothing if that is -1.
    slots = rng.permutation(SLOTS)[:KEYS]
    positions = np.full(SLOTS, -1, np.int32)
    positions[slots] = np.arange(KEYS)
    scattered = np.full((2, 1, SLOTS, KV_HEADS, WIDTH), np.nan, np.float32)
    scattered[:, :, slots] = key, value

    mesh = jax.make_mesh((DEVICES,), ("kv",), axis_types=(AxisType.Explicit,))
    replicated = NamedSharding(mesh, P())
    query, query_positions = (jax.device_put(x, replicated) for x in (query, QUERY_POSITIONS))
    key, value = (jax.device_put(x, NamedSharding(mesh, P(None, "kv"))) for x in scattered)
    positions = jax.device_put(positions, NamedSharding(mesh, P("kv")))
    arguments = {"query_positions": query_positions, "key_positions": positions}

    print("Positions stored on each device (-1: an empty slot, with NaN in key and value):")
    for shard in positions.addressable_shards:
        print(f"  device {shard.device.id}: positions {np.asarray(shard.data)[:8]} ...")

    print(f"\n{'strategy':<11} {'collectives of the program':<34} bytes  from jax.nn")
    for strategy, counts in STRATEGIES.items():
        attention = functools.partial(
            distattn.dot_product_attention,
            is_causal=True,
            local_window_size=(WINDOW, 0),
            strategy=strategy,
        )
        program = jax.jit(attention).lower(query, key, value, **arguments).compile()
        out = program(query, key, value, **arguments)
        found, moved = collectives(program.as_text()), collective_bytes(program.as_text())
        error = float(np.abs(np.asarray(out) - expected).max() / np.abs(expected).max())
        listed = ", ".join(f"{n} {kind}" for kind, n in found.items())
        print(f"{strategy:<11} {listed:<34} {sum(moved.values()):<6} {error:.1e}")
        assert found == counts
        assert error < BOUND
        assert sum(moved.values()) < (key.nbytes + value.nbytes) / 20
    print(f"\nKeys and values, which stay on their devices: {key.nbytes + value.nbytes} bytes")
    print("Eight devices in random order give the result of one device.")


if __name__ == "__main__":
    main()
