"""Eight devices, keys and values in a random order, against jax.nn on one device, all in order.

What one learns:

1. How keys are given to a mesh in any order: each slot says which position its key has.
2. That the mask goes by these positions: causal, a window, and empty slots that hold NaN.
3. What moves between the devices, counted in the compiled program: softmax states, in as many
   messages as the strategy has, and nothing of the size of the keys and values.

    python examples/02_eight_devices_random_order.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import distattn
from distattn.testing import collective_bytes, collectives, fake_devices

DEVICES = 8
KEYS, SLOTS = 4000, 4096  # 96 slots stay empty
HEADS, KV_HEADS, WIDTH = 8, 2, 64
WINDOW = 3000  # a query sees so many keys before it
QUERY_POSITIONS = np.array([17, 1000, 3999], np.int32)
BOUND = 1e-5

# What each strategy is in the compiled program, and nothing else is.
STRATEGIES = {
    "butterfly": {"collective-permute": 3},  # log2 of 8
    "psum": {"all-reduce": 2},  # the maximum, then all the rest in one message
    "all_gather": {"all-gather": 1},
}


def in_order(query: jax.Array, key: np.ndarray, value: np.ndarray) -> jax.Array:
    """What everybody uses, on one device. It knows no positions, so it gets a mask."""
    behind = QUERY_POSITIONS[:, None] - np.arange(KEYS)
    mask = (behind >= 0) & (behind <= WINDOW)
    return jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])


def main() -> None:
    """Compiles, runs and counts each strategy."""
    fake_devices(DEVICES)
    rng = np.random.default_rng(0)
    shape = (1, KEYS, KV_HEADS, WIDTH)
    query = jnp.asarray(rng.normal(size=(1, len(QUERY_POSITIONS), HEADS, WIDTH)), jnp.float32)
    key, value = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    expected = in_order(query, key, value)

    # Slot i holds the key of position positions[i], or nothing where that is -1.
    slots = rng.permutation(SLOTS)[:KEYS]
    positions = np.full(SLOTS, -1, np.int32)
    positions[slots] = np.arange(KEYS)
    scattered = np.full((2, 1, SLOTS, KV_HEADS, WIDTH), np.nan, np.float32)
    scattered[:, :, slots] = key, value

    mesh = jax.make_mesh((DEVICES,), ("kv",), axis_types=(AxisType.Explicit,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    query, query_positions = (jax.device_put(x, everywhere) for x in (query, QUERY_POSITIONS))
    by_keys = NamedSharding(mesh, PartitionSpec(None, "kv"))
    key, value = (jax.device_put(x, by_keys) for x in scattered)
    positions = jax.device_put(positions, NamedSharding(mesh, PartitionSpec("kv")))
    arguments = {"query_positions": query_positions, "key_positions": positions}

    print("Whose keys lie where (-1: an empty slot, NaN in key and value):")
    for shard in positions.addressable_shards:
        print(f"  device {shard.device.id}: positions {np.asarray(shard.data)[:8]} ...")

    print(f"\n{'strategy':<11} {'what moves, counted in the program':<34} bytes  from jax.nn")
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
    print(f"\nKeys and values, which stay where they are: {key.nbytes + value.nbytes} bytes")
    print("Eight devices in random order say what one device says.")


if __name__ == "__main__":
    main()
