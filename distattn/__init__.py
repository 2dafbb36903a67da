"""Exact attention whose keys and values lie on many devices, in any order.

Letters of shapes, everywhere (those of `jax.nn.dot_product_attention`): B batch, T query length, S key
length, N query heads, K key/value heads (N % K == 0), G = N // K, H head dimension of query and key, V
head dimension of value, D devices on the axis.
"""

from distattn import distributed, layouts
from distattn.attention import dot_product_attention
from distattn.cache import KVCache
from distattn.collectives import all_reduce
from distattn.partial import partial_attention
from distattn.scatter import reduce_scatter
from distattn.schedule import ScatterSchedule, Schedule
from distattn.sharded import sharded_attention
from distattn.state import SoftmaxState, finalize, from_lse, identity, merge
from distattn.streaming import PairJoin
from distattn.totals import reproducible_sum

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
