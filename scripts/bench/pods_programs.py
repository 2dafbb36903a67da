"""The programs that `scripts/bench/pods.py` compiles."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import distattn
from distattn.testing import compile_for

HEADS, KV_HEADS, WIDTH, KEYS = 32, 8, 128, 8192  # keys of a chip


def shapes(rows, keys):
    query = jax.ShapeDtypeStruct((1, rows, HEADS, WIDTH), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, keys, KV_HEADS, WIDTH), jnp.bfloat16)
    return query, key, key


def compiled(f, rows, keys, where, *, sharded, kind=AxisType.Explicit):
    """Compile a call whose keys, and with `sharded` queries, are sharded over all axes of the pod."""
    axes = where.axes
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))
    along = P(None, tuple(axes))
    specs = (along if sharded else P(), along, along)
    return compile_for(f, *shapes(rows, keys), topology=where.name, mesh=mesh, specs=specs)


def training(strategy):
    def loss(*arrays):
        out = distattn.dot_product_attention(*arrays, strategy=strategy, is_causal=True)
        return out.astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))


def model_step(where):
    """Compile a training step of the example's transformer: batch over `data`, rows over `sequence`."""
    from flax import nnx

    from byte_model.transformer import Config, Job, train_step

    def attend(query, key, value, positions):
        return distattn.dot_product_attention(
            query, key, value, is_causal=True, query_positions=positions, key_positions=positions
        )

    devices = where.devices
    config = Config(dim=512, layers=4, heads=16, kv_heads=4)
    job = Job(config=config, batch=2, length=512 * devices // 2)
    graphdef, state = nnx.split(nnx.eval_shape(job.create))
    rows = jax.ShapeDtypeStruct((job.batch, job.length), jnp.int32)
    positions = jax.ShapeDtypeStruct((job.length,), jnp.int32)
    batch = {"tokens": rows, "labels": rows, "positions": positions}
    split = P("data", "sequence")
    specs = P(), {"tokens": split, "labels": split, "positions": P("sequence")}
    mesh = {"data": 2, "sequence": devices // 2}
    step = train_step(graphdef, attend)
    return compile_for(step, state, batch, topology=where.name, mesh=mesh, specs=specs)


def published_recipe(axes):
    """Return Tree Attention's three all-reduces of partial results (arXiv 2408.04093, its appendix)."""

    def body(query, key, value):
        state = distattn.partial_attention(query, key, value)
        out, lse = distattn.finalize(state)
        largest = lax.pmax(lse, axes)
        weight = jnp.exp(lse - largest)
        numerator = lax.psum(out.astype(jnp.float32) * weight[..., None], axes)
        return (numerator / lax.psum(weight, axes)[..., None]).astype(query.dtype)

    along = P(None, axes)
    return jax.shard_map(body, in_specs=(P(), along, along), out_specs=P(), check_vma=False)


def contenders(where):
    """Return name to (function, kind of the mesh axes)."""
    axes, attention = tuple(where.axes), distattn.dot_product_attention
    return {
        "butterfly": (functools.partial(attention, strategy="butterfly"), AxisType.Explicit),
        "psum": (functools.partial(attention, strategy="psum"), AxisType.Explicit),
        "published": (published_recipe(axes), AxisType.Auto),
        "xla": (jax.nn.dot_product_attention, AxisType.Auto),
        "ring": (ring_decode(axes), AxisType.Auto),
    }


def ring_decode(axes):
    """Return decoding by a ring: all keys and values pass each device, hop by hop."""

    def body(query, key, value):
        size = lax.axis_size(axes)
        pairs = [(rank, (rank + 1) % size) for rank in range(size)]

        def hop(carry, _):
            state, key, value = carry
            key, value = (lax.ppermute(x, axes, pairs) for x in (key, value))
            more = distattn.partial_attention(query, key, value)
            return (distattn.merge(state, more), key, value), None

        state = distattn.partial_attention(query, key, value)
        (state, *_), _ = lax.scan(hop, (state, key, value), length=size - 1)
        return distattn.finalize(state)[0].astype(query.dtype)

    along = P(None, axes)
    return jax.shard_map(body, in_specs=(P(), along, along), out_specs=P(), check_vma=False)
