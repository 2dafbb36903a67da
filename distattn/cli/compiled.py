"""One layer of a planned step, compiled by the real compiler of the pod."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distattn.attention.api import dot_product_attention
from distattn.planning.plan import Plan
from distattn.testing.programs import Report, compile_for


def compiled_layer(plan: Plan, dtype: jnp.dtype) -> Report:
    """The attention of one layer, on the mesh and by the strategy of the plan; its gradient in training.

    Args:
      plan: of whose workload lengths are rounded up to multiples of the devices.
      dtype: of query, key and value.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      NotImplementedError: there is none for the chip.
      ValueError: a topology, or a dtype, that it does not take.
    """
    # Nothing runs, and no other device is to be looked for.
    jax.config.update("jax_platforms", "cpu")
    if dtype == jnp.float64:
        jax.config.update("jax_enable_x64", True)
    workload = plan.workload
    devices, heads_devices = (
        math.prod(plan.axes[name] for name in names) for names in (plan.key_axes, plan.heads_axes)
    )

    def shape(length: int, heads: int, width: int, *, sharded: bool) -> jax.ShapeDtypeStruct:
        length += -length % (devices if sharded else 1)
        return jax.ShapeDtypeStruct((workload.batch, length, heads, width), dtype)

    arrays = (
        shape(workload.queries, workload.heads, workload.head_dim, sharded=plan.query_sharded),
        shape(workload.context, workload.kv_heads, workload.head_dim, sharded=True),
        shape(workload.context, workload.kv_heads, workload.values, sharded=True),
    )
    batch, keys, heads = (
        names or None for names in (plan.batch_axes, plan.key_axes, plan.heads_axes)
    )
    query = PartitionSpec(batch, keys if plan.query_sharded else None, heads)
    # Heads of keys that do not divide are repeated by the call.
    along = PartitionSpec(batch, keys, None if workload.kv_heads % heads_devices else heads)
    specs = (query, along, along)
    # One query is the last and sees all keys; of several the mask is compiled, whatever their positions.
    attention = functools.partial(
        dot_product_attention,
        strategy=plan.strategy,
        is_causal=workload.causal and workload.queries > 1,
    )

    def loss(*arrays: jax.Array) -> Any:
        out: Any = attention(*arrays)
        return out.astype(jnp.float32).sum()

    step = jax.grad(loss, argnums=(0, 1, 2)) if workload.training else attention
    return compile_for(step, *arrays, topology=plan.topology, mesh=plan.axes, specs=specs)
