"""Exact attention in JAX whose keys and values are sharded over devices in any order.

`distattn.testing`, `distattn.integrations.flax`, `.equinox` and `.jax_nn`, `distattn.planning.plan`,
`.cost`, `.pods` and `.chips`, and `distattn.algebra.fixed_point` are public too: import them by name.

Letters of shapes, everywhere (those of `jax.nn.dot_product_attention`): B batch, T query length, S key
length, N query heads, K key/value heads (N % K == 0), G = N // K, H head dimension of query and key, V
head dimension of value, D devices on the axis.
"""

from distattn import distributed, layouts
from distattn.algebra.softmax_state import SoftmaxState, finalize, from_lse, identity, merge
from distattn.attention.api import dot_product_attention
from distattn.attention.sharded import sharded_attention
from distattn.cache import KVCache
from distattn.collectives.all_reduce import all_reduce
from distattn.collectives.reduce_scatter import reduce_scatter
from distattn.collectives.reproducible_sum import reproducible_sum
from distattn.local.partial import partial_attention
from distattn.local.streaming import PairJoin
from distattn.planning.schedule import ScatterSchedule, Schedule

__version__ = "0.1.0"

__all__ = [
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


def __dir__() -> list[str]:
    """Name what is public: other packages are attributes as soon as they are imported."""
    return __all__
