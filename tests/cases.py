"""The named calls of which every implementation, strategy and mesh must give the oracle's result."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distattn import KVCache, layouts
from distattn.cache.replicas import replica_source, token_letters
from distattn.testing import reference
from tests.tolerance import assert_close

DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
ALL_REDUCES = ("butterfly", "psum", "all_gather")
QUERY_SHARDED = ("reduce_scatter", "gather_kv", "ring", "ulysses")
# XLA's defaults; see conftest.py.
FULLY_OPTIMIZED: dict[str, Any] = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    FULLY_OPTIMIZED["xla_cpu_use_fusion_emitters"] = True
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `dot_product_attention`: float64 arrays of one seed, and what is not an array."""

    batch: int = 2
    queries: int = 6
    keys: int = 24
    heads: int = 4
    kv_heads: int = 2
    width: int = 8
    value_width: int = 8
    bias: tuple[str, ...] | None = None  # the dimensions it has: of B, N, T, S
    mask: tuple[str, ...] | None = None
    sinks: bool = False
    permuted: bool = False  # keys in a random order, a different one for each row of the batch
    empty_slots: int = 0
    segments: int = 0
    layout: str | None = None  # layout of queries and keys, over four devices; "random": any order
    documents: int = 0  # packed one after the other, in the order of positions
    lengths: bool = False
    query_lengths: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments, with NaN in every slot of key and value that is empty."""
        rng = np.random.default_rng(self.seed)
        sizes = {"B": self.batch, "N": self.heads, "T": self.queries, "S": self.keys}
        full = tuple(sizes)
        args: dict[str, Any] = {
            "query": rng.normal(size=(self.batch, self.queries, self.heads, self.width)),
            "key": rng.normal(size=(self.batch, self.keys, self.kv_heads, self.width)),
            "value": rng.normal(size=(self.batch, self.keys, self.kv_heads, self.value_width)),
        }
        if self.bias is not None:
            args["bias"] = rng.normal(size=[sizes[d] if d in self.bias else 1 for d in full])
        if self.mask is not None:
            args["mask"] = rng.random([sizes[d] if d in self.mask else 1 for d in full]) < 0.7
        if self.sinks:
            args["sinks"] = rng.normal(size=self.heads)
        if self.permuted:
            rows = [rng.permutation(self.keys) for _ in range(self.batch)]
            args["key_positions"] = np.stack(rows).astype(np.int32)
            start = rng.integers(0, self.keys, size=(self.batch, 1))
            args["query_positions"] = (start + np.arange(self.queries)).astype(np.int32)
        if self.layout is not None:
            positions = (
                rng.permutation(self.keys)
                if self.layout == "random"
                else getattr(layouts, self.layout)(self.keys, 4)
            )
            args["query_positions"] = args["key_positions"] = positions
        if self.documents:
            ends = np.sort(rng.choice(self.keys, self.documents - 1, replace=False))
            positions = args.get("key_positions", np.arange(self.keys))
            ids = np.searchsorted(ends, positions, side="right")
            args["query_segment_ids"] = args["key_value_segment_ids"] = ids
        if self.empty_slots:
            for row in range(self.batch):
                slots = rng.choice(self.keys, self.empty_slots, replace=False)
                args["key_positions"][row, slots] = -1
                args["key"][row, slots] = np.nan
                args["value"][row, slots] = np.inf
        if self.segments:
            args["query_segment_ids"] = rng.integers(0, self.segments, (self.batch, self.queries))
            args["key_value_segment_ids"] = rng.integers(0, self.segments, (self.batch, self.keys))
        if self.lengths:
            args["key_value_seq_lengths"] = rng.integers(1, self.keys, self.batch)
        if self.query_lengths:
            args["query_seq_lengths"] = rng.integers(0, self.queries, self.batch)
        for name, x in args.items():
            if np.issubdtype(np.asarray(x).dtype, np.integer):
                args[name] = np.asarray(x, np.int32)
        return args | dict(self.options)

    def cotangents(self) -> tuple[np.ndarray, np.ndarray]:
        """Return cotangents of out and lse."""
        rng = np.random.default_rng(self.seed + 1)
        rows = (self.batch, self.queries, self.heads)
        return rng.normal(size=(*rows, self.value_width)), rng.normal(size=rows)


CASES = {
    "plain": Case(),
    "mha_wide_values": Case(kv_heads=4, value_width=12, queries=5),
    "mqa_one_query": Case(kv_heads=1, queries=1),
    "one_query": Case(queries=1, batch=3, heads=6, kv_heads=3),
    "many_heads_few_queries": Case(
        queries=2,
        heads=12,
        kv_heads=6,
        permuted=True,
        empty_slots=3,
        bias=("N", "S"),
        options=(("is_causal", True),),
    ),
    "causal": Case(queries=24, options=(("is_causal", True),)),
    "causal_top_left": Case(queries=10, options=(("is_causal", True),)),
    "causal_permuted": Case(permuted=True, empty_slots=5, options=(("is_causal", True),)),
    "window_pair": Case(permuted=True, options=(("local_window_size", (3, 2)),)),
    "window_left": Case(queries=24, options=(("local_window_size", (4, -1)),)),
    "window_right": Case(queries=24, options=(("local_window_size", (None, 2)),)),
    "window_causal_sinks": Case(
        permuted=True,
        sinks=True,
        empty_slots=3,
        options=(("is_causal", True), ("local_window_size", 5)),
    ),
    "lengths": Case(lengths=True, query_lengths=True, sinks=True),
    "lengths_permuted": Case(permuted=True, empty_slots=4, lengths=True),
    "segments": Case(segments=3, permuted=True, options=(("is_causal", True),)),
    "bias_full": Case(bias=("B", "N", "T", "S")),
    "bias_heads": Case(bias=("N",), options=(("logits_soft_cap", 2.0),)),
    "bias_keys_mask_rows": Case(bias=("B", "S"), mask=("T",)),
    "bias_rows": Case(bias=("T",), mask=("N", "S")),
    "bias_scalar_cap": Case(bias=(), options=(("logits_soft_cap", 1.5), ("scale", 0.7))),
    "mask_full": Case(mask=("B", "N", "T", "S"), sinks=True),
    "mask_batch": Case(mask=("B", "T", "S"), bias=("N", "T", "S")),
    "everything": Case(
        bias=("N", "T", "S"),
        mask=("B", "S"),
        sinks=True,
        permuted=True,
        empty_slots=4,
        segments=2,
        lengths=True,
        query_lengths=True,
        value_width=10,
        options=(
            ("is_causal", True),
            ("local_window_size", (15, 3)),
            ("logits_soft_cap", 3.0),
            ("scale", 0.5),
        ),
    ),
}


def as_float32(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with their float64 arrays in float32."""
    return {
        name: jnp.asarray(x, jnp.float32) if getattr(x, "dtype", None) == np.float64 else x
        for name, x in arguments.items()
    }


def mesh_of(devices: int, kind: str) -> Mesh:
    """Return a mesh of one axis, 'kv'."""
    return jax.make_mesh((devices,), ("kv",), (KINDS[kind],), devices=jax.devices()[:devices])


def shardings(
    mesh: Any,
    keys: str | tuple[str, ...] | None = None,
    *,
    query: str | tuple[str, ...] | None = None,
    batch: str | tuple[str, ...] | None = None,
    heads: str | tuple[str, ...] | None = None,
) -> dict[str, NamedSharding | None]:
    """`query_sharding` and `key_value_sharding`, by the axes of S, T, B and heads; query="auto": None."""
    rows = None if query == "auto" else NamedSharding(mesh, P(batch, query, heads))
    return {
        "query_sharding": rows,
        "key_value_sharding": NamedSharding(mesh, P(batch, keys, heads)),
    }


def cache_sharding(
    mesh: Any,
    slots: str | tuple[str, ...] | None = "kv",
    *,
    batch: str | tuple[str, ...] | None = None,
    heads: str | tuple[str, ...] | None = None,
) -> NamedSharding | None:
    """`sharding` of a `KVCache`, by the axes of slots, sequences and heads; without a mesh None."""
    return None if mesh is None else NamedSharding(mesh, P(batch, slots, heads))


def runner(attention: Callable[..., tuple[jax.Array, jax.Array]], options: dict[str, Any]) -> Any:
    """run(cast, more, d_out, d_lse) -> out, lse and gradients; `options` are constants of the program."""

    def run(cast: dict, more: dict, d_out: jax.Array, d_lse: jax.Array):
        def paired(cast: dict):
            out, lse = attention(**cast, **more, **options)
            rows = (out.astype(lse.dtype) * d_out.astype(lse.dtype)).sum()
            return rows + (lse * d_lse.astype(lse.dtype)).sum(), (out, lse)

        grads, (out, lse) = jax.grad(paired, has_aux=True)(cast)
        return out, lse, grads

    return run


def check(
    case: Case,
    attention: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
    *,
    run: Any = None,
    dtype: Any = jnp.float32,
    what: str,
    jit: bool = True,
    factor: float = 1.0,
) -> None:
    """Assert that `attention` gives the oracle's out, lse and gradients, within tolerance.

    `attention` takes the arguments of the case and returns (out, lse). Or `run` is what `runner` has made
    of it with the case's options, compiled once for many cases of the same shapes.
    """
    arguments = case.arguments()
    floats = [name for name in DIFFERENTIABLE if name in arguments]
    cast = {name: jnp.asarray(arguments[name], dtype) for name in floats}
    rest = {name: x for name, x in arguments.items() if name not in floats}
    d_out, d_lse = case.cotangents()
    d_out = jnp.asarray(d_out, dtype)
    more = {name: x for name, x in rest.items() if name not in dict(case.options)} if run else {}
    if run is None:
        run = runner(attention, rest)
        run = jax.jit(run) if jit else run
    out, lse, grads = run(
        cast, more, d_out, jnp.asarray(d_lse, jnp.float64 if dtype == jnp.float64 else jnp.float32)
    )
    assert out.dtype == dtype
    assert lse.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    exact = {name: np.asarray(x, np.float64) for name, x in cast.items()}
    expected = reference.dot_product_attention(**exact, **rest)
    assert_close(out, expected[0], dtype, case.keys, factor, what=f"{what}: out")
    assert_close(lse, expected[1], jnp.float32, case.keys, factor, what=f"{what}: lse")
    cotangents = {"dout": np.asarray(d_out, np.float64), "dlse": d_lse}
    expected_grads = reference.attention_gradients(**exact, **rest, **cotangents)
    logits = case.batch * case.queries * case.heads * case.keys
    rows_of_a_key = case.queries * case.heads // case.kv_heads
    for name in floats:
        assert grads[name].dtype == dtype
        # How many terms each gradient sums, beside the keys of a row and the dot product of two vectors:
        # a logit is a sum over H, and its gradient one over V.
        more = {
            "query": 0,
            "key": rows_of_a_key,
            "value": rows_of_a_key,
            "bias": logits // cast[name].size,
            "sinks": case.batch * case.queries,
        }[name]
        assert_close(
            grads[name],
            expected_grads[f"d{name}"],
            dtype,
            case.keys + case.width + case.value_width + more,
            factor,
            what=f"{what}: d{name}",
        )


def check_copies(cache: KVCache) -> None:
    """Assert that each device's replica equals, bit for bit, the slots of its source."""
    if cache.replica is None:
        return
    for name, letters in token_letters(cache.arrays).items():
        axis = letters.index("S")
        stored, copies = (np.asarray(x[name]) for x in (cache.arrays, cache.replica))
        shards = np.split(stored, cache.layout.devices, axis=axis)
        sources = replica_source(cache.layout)
        expected = np.concatenate([shards[source] for source in sources], axis=axis)
        assert copies.dtype == stored.dtype
        assert copies.tobytes() == expected.tobytes(), name
