"""The boundary: checks of arguments, which become `AttentionInputs` and `LogitConfig`.

Every check is made here, once, from static shapes and dtypes. An error names the argument, what it got,
what it needs and what to do. ValueError is an invalid call, NotImplementedError a valid call that is not
supported.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from distattn.local.block import LogitConfig
from distattn.local.mask import IndexOrder, Mask

Window = int | tuple[int | None, int | None] | None


def batched(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, quantised: bool, stacked: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return query, key and value with a batch.

    Args:
      query: [B, T, N, H] or [T, N, H].
      key: [B, S, K, H] or [S, K, H].
      value: [B, S, K, V] or [S, K, V].
      quantised: key and value may have any dtype.
      stacked: key and value have a leading dimension of layers.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    if stacked:
        one_key, one_value = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (key, value))
        _check_shapes(query, one_key, one_value, quantised)
        return query, key, value
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim not in (3, 4) or x.ndim != query.ndim:
            raise ValueError(
                f"{name} has {x.ndim} dimensions; query, key and value must all be "
                "[B, T|S, heads, width], or all be without B; reshape or broadcast it; "
                f"got {_shapes(query, key, value)}"
            )
    if query.ndim == 3:
        query, key, value = query[None], key[None], value[None]
    _check_shapes(query, key, value, quantised)
    return query, key, value


def _check_shapes(query: Any, key: Any, value: Any, quantised: bool) -> None:
    shapes = _shapes(query, key, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(x.dtype, jnp.floating) and not (quantised and name != "query"):
            raise ValueError(
                f"{name} has dtype {x.dtype}; it must be floating point, cast it with .astype"
            )
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(
            "query, key and value must have the same batch size B; broadcast them to it; "
            f"got {shapes}"
        )
    if key.shape[1] != value.shape[1]:
        raise ValueError(
            f"key has S={key.shape[1]} and value has S={value.shape[1]}; each key needs one value, "
            "in the same slot (distattn.layouts.align brings separately ordered ones together)"
        )
    if key.shape[2] != value.shape[2]:
        raise ValueError(
            f"key has K={key.shape[2]} heads and value has K={value.shape[2]}; they must be equal"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query has head dimension H={query.shape[3]} and key has H={key.shape[3]}; "
            "they must be equal (value may differ)"
        )
    heads, kv_heads = query.shape[2], key.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query has N={heads} heads and key has K={kv_heads}; N must be a multiple of K, "
            "each key/value head serves N / K query heads, and arrays are [B, T, N, H] and [B, S, K, H]: "
            f"{_shapes(query, key, value)}"
        )


def _shapes(query: Any, key: Any, value: Any) -> str:
    return f"query {query.shape}, key {key.shape}, value {value.shape}"


def broadcastable(name: str, x: Any, full: tuple[int, ...], kind: Any) -> jax.Array | None:
    """Return x with four dimensions, each 1 or the size in `full`; its dtype must be a `kind`."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, kind):
        remedy = (
            "pass mask != 0, and an additive mask as bias"
            if name == "mask"
            else "cast it with .astype; a boolean mask goes to mask"
        )
        raise ValueError(f"{name} has dtype {x.dtype}; it must be {kind.__name__}; {remedy}")
    shape = (1,) * (4 - x.ndim) + x.shape
    if len(shape) != 4 or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
        raise ValueError(
            f"{name} has shape {x.shape}; it must broadcast to [B, N, T, S] = {list(full)}: each of its "
            "last dimensions 1 or that size"
        )
    return x.reshape(shape)


def integers(name: str, x: ArrayLike) -> jax.Array:
    """Return x as int32, of any shape."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {x.dtype}; it must be int32, use .astype(jnp.int32)")
    return x.astype(jnp.int32)


def index(name: str, x: ArrayLike | None, letter: str, batch: int, size: int) -> jax.Array | None:
    """Return int32[B|1, T] or int32[B|1, S], by the letter."""
    if x is None:
        return None
    x = integers(name, x)
    if x.shape not in ((size,), (batch, size)):
        of = "query row" if letter == "T" else "key"
        raise ValueError(
            f"{name} has shape {x.shape} for B={batch}, {letter}={size}; it must be "
            f"int32[{letter}] or int32[B, {letter}]: one number for each {of}"
        )
    return x[None] if x.ndim == 1 else x


def lengths(name: str, x: ArrayLike | None, batch: int) -> jax.Array | None:
    """Return int32[B, 1] from int32[B]."""
    if x is None:
        return None
    x = integers(name, x)
    if x.shape != (batch,) and not (batch == 1 and x.shape == ()):
        raise ValueError(
            f"{name} has shape {x.shape}; it must be int32[B] = [{batch}]: one length for each "
            "sequence"
        )
    return x.reshape(batch, 1)


def window_sides(window: Window) -> tuple[int | None, int | None]:
    """Return (left, right); None is unbounded."""
    pair = window if isinstance(window, tuple | list) else (window, window)
    sides = [None if side is None or side == -1 else side for side in pair]
    if len(sides) != 2 or any(
        side is not None and (not isinstance(side, int | np.integer) or side < 0) for side in sides
    ):
        raise ValueError(
            f"local_window_size is {window!r}; it must be an int or a pair (left, right) of ints >= 0; "
            "-1 or None leaves a side unbounded"
        )
    left, right = (None if side is None else int(side) for side in sides)
    return left, right


def sink_logits(sinks: ArrayLike | None, heads: int) -> jax.Array | None:
    """Return float[N], one logit per head."""
    if sinks is None:
        return None
    sinks = jnp.asarray(sinks)
    if sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"sinks is {sinks.dtype}{list(sinks.shape)}; it must be float32[N] = [{heads}]: one logit for "
            "each query head"
        )
    return sinks


KERNEL_NAMES = ("pallas_tpu", "pallas_gpu", "cudnn")  # `KERNELS` in `distattn.local.dispatch`
IMPLEMENTATIONS = ("xla", "dense", *KERNEL_NAMES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """Arrays of a call.

    Key and value may hold all layers of a model, `layer` being the one to use. They may be quantised;
    then their values are the items times the scale. Blocks select the layer and apply the scale as they
    are read.
    """

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H], with a layer [L, B, S, K, H]
    value: jax.Array  # [B, S, K, V], with a layer [L, B, S, K, V]
    bias: jax.Array | None  # [B|1, N|1, T|1, S|1]
    sinks: jax.Array | None  # [N]
    mask: Mask
    key_scale: jax.Array | None = None  # f32[B, S, K], with a layer [L, B, S, K]
    value_scale: jax.Array | None = None  # f32[B, S, K], with a layer [L, B, S, K]
    layer: jax.Array | None = None  # int32[]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a call."""

    batch: int  # B
    queries: int  # T
    keys: int  # S
    heads: int  # N
    kv_heads: int  # K
    width: int  # H
    value_width: int  # V

    @classmethod
    def of(cls, inputs: "AttentionInputs") -> "Sizes":
        """Return the sizes of the inputs."""
        batch, queries, heads, width = inputs.query.shape
        keys, kv_heads, value_width = inputs.value.shape[-3:]
        return cls(batch, queries, keys, heads, kv_heads, width, value_width)

    @property
    def groups(self) -> int:
        """Query heads per KV head, G."""
        return self.heads // self.kv_heads


# Letters of each array's dimensions, the last ones if it has fewer; '.' is a width.
DIMENSIONS = {
    "query": "BTN.",
    "key": "LBSK.",
    "value": "LBSK.",
    "key_scale": "LBSK",
    "value_scale": "LBSK",
    "layer": "",
    "bias": "BNTS",
    "sinks": "N",
    "query_positions": "BT",
    "key_positions": "BS",
    "query_valid": "BT",
    "query_segment_ids": "BT",
    "key_segment_ids": "BS",
    "dense": "BNTS",
}


def letters_of(name: str, x: Any) -> str:
    """Return the letters of the dimensions of an array."""
    return DIMENSIONS[name][-x.ndim :] if x.ndim else ""


def map_named(f: Callable[[str, jax.Array], Any], inputs: AttentionInputs) -> AttentionInputs:
    """Return f(name, array) of each array of the inputs, in their structure."""
    return jax.tree_util.tree_map_with_path(lambda path, x: f(path[-1].name, x), inputs)


def make_inputs(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    *,
    is_causal: bool,
    query_seq_lengths: ArrayLike | None,
    key_value_seq_lengths: ArrayLike | None,
    local_window_size: Window,
    sinks: ArrayLike | None = None,
    query_positions: ArrayLike | None,
    key_positions: ArrayLike | None,
    query_segment_ids: ArrayLike | None,
    key_value_segment_ids: ArrayLike | None,
    query_start: ArrayLike = 0,
    key_start: ArrayLike = 0,
    dense_rows: int | None = None,
    dense_keys: int | None = None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    layer: jax.Array | None = None,
) -> AttentionInputs:
    """Check the arguments of a call, and return them in one form; arguments as in the public functions.

    For one device's shard, `query_start` and `key_start` are the global indices of its first query and
    key, and `dense_rows` and `dense_keys` the sizes T and S of bias and mask. Unbatched arrays get B = 1.
    For scales and layer see `AttentionInputs`.
    """
    query, key, value = batched(query, key, value, key_scale is not None, layer is not None)
    batch, queries, heads, _ = query.shape
    keys = key.shape[-3]
    window = window_sides(local_window_size)
    by_position = is_causal or window != (None, None)
    if by_position and key_positions is not None and query_positions is None:
        raise ValueError(
            "query_positions is None, but is_causal or local_window_size compares positions and "
            f"key_positions is given (shape {np.shape(key_positions)}); pass query_positions "
            "(int32[T] or int32[B, T]), the positions that the queries have among the keys'"
        )
    if (query_segment_ids is None) != (key_value_segment_ids is None):
        given, other = "query_segment_ids", "key_value_segment_ids"
        if query_segment_ids is None:
            given, other = other, given
        raise ValueError(f"{given} is given and {other} is None; segments need both, pass {other}")

    rows, slots = (
        jnp.arange(size, dtype=jnp.int32) + start
        for size, start in ((queries, query_start), (keys, key_start))
    )
    query_index = index("query_positions", query_positions, "T", batch, queries)
    key_index = index("key_positions", key_positions, "S", batch, keys)
    order = None
    if key_index is None and not (by_position and query_index is not None):
        starts = (query_start, key_start)
        aligned = all(isinstance(start, int) and start == 0 for start in starts)
        order = IndexOrder(aligned, full=key_value_seq_lengths is None)
    key_lengths = lengths("key_value_seq_lengths", key_value_seq_lengths, batch)
    query_lengths = lengths("query_seq_lengths", query_seq_lengths, batch)
    if key_index is None and (by_position or key_lengths is not None):
        key_index = slots[None]
    if key_lengths is not None:
        key_index = jnp.where(key_index < key_lengths, key_index, -1)
    if by_position and query_index is None:
        query_index = rows[None]
    dense = (batch, heads, dense_rows or queries, dense_keys or keys)
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        bias=broadcastable("bias", bias, dense, jnp.floating),
        sinks=sink_logits(sinks, heads),
        mask=Mask(
            query_positions=query_index if by_position else None,
            key_positions=key_index,
            query_valid=None if query_lengths is None else rows[None] < query_lengths,
            query_segment_ids=index("query_segment_ids", query_segment_ids, "T", batch, queries),
            key_segment_ids=index("key_value_segment_ids", key_value_segment_ids, "S", batch, keys),
            dense=broadcastable("mask", mask, dense, jnp.bool_),
            is_causal=bool(is_causal),
            window=window,
            index_order=order,
        ),
        key_scale=key_scale,
        value_scale=value_scale,
        layer=layer,
    )


def dequantised(inputs: AttentionInputs) -> AttentionInputs:
    """Return the inputs with key and value [B, S, K, .] of the layer and times the scale, copied."""
    key, value = inputs.key, inputs.value
    scales = inputs.key_scale, inputs.value_scale
    if inputs.layer is not None:
        key, value, *scales = (
            None if x is None else lax.dynamic_index_in_dim(x, inputs.layer, 0, keepdims=False)
            for x in (key, value, *scales)
        )
    key, value = (
        x if scale is None else x.astype(scale.dtype) * scale[..., None]
        for x, scale in zip((key, value), scales, strict=True)
    )
    return dataclasses.replace(
        inputs, key=key, value=value, key_scale=None, value_scale=None, layer=None
    )


def with_repeated_heads(inputs: AttentionInputs, shards: int) -> AttentionInputs:
    """Return the inputs with KV heads repeated until `shards` divides their number."""
    heads, kv_heads = inputs.query.shape[2], inputs.key.shape[-2]
    times = math.lcm(kv_heads, shards) // kv_heads
    if times == 1:
        return inputs
    if heads % (kv_heads * times):
        times = heads // kv_heads
    key, value = (jnp.repeat(x, times, axis=-2) for x in (inputs.key, inputs.value))
    return dataclasses.replace(inputs, key=key, value=value)


def padded(
    inputs: AttentionInputs, more: Mapping[str, int], *, dense: bool = True
) -> AttentionInputs:
    """Return the inputs with padding queries and empty slots at the end.

    Args:
      inputs: inputs without padding.
      more: number of padding queries, "T", and of empty slots, "S".
      dense: pad bias and dense mask too.
    """
    if not any(more.values()):
        return inputs
    mask = inputs.mask
    sizes = {"T": inputs.query.shape[1], "S": inputs.key.shape[-3]}
    if more["S"]:
        mask = mask.with_empty_slots(sizes["S"])
    if more["T"] and mask.query_valid is None:
        mask = dataclasses.replace(mask, query_valid=jnp.ones((1, sizes["T"]), bool))

    def pad(name: str, x: jax.Array) -> jax.Array:
        letters = letters_of(name, x)
        if letters == "BNTS" and not dense:
            return x
        widths = [
            (0, more[letter] if letter in more and size == sizes[letter] else 0)
            for letter, size in zip(letters, x.shape, strict=True)
        ]
        if not any(after for _, after in widths):
            return x
        return jnp.pad(x, widths, constant_values=-1 if name == "key_positions" else 0)

    return map_named(pad, dataclasses.replace(inputs, mask=mask))


def make_logit_config(
    query: ArrayLike,
    scale: float | None,
    logits_soft_cap: float | None,
    precision: jax.lax.PrecisionLike,
) -> LogitConfig:
    """Return the `LogitConfig` of public arguments; the default scale is 1 / sqrt(H)."""
    if scale is None:
        scale = 1.0 / math.sqrt(max(np.shape(query)[-1], 1))
    for name, number in (("scale", scale), ("logits_soft_cap", logits_soft_cap)):
        if isinstance(number, Tracer):
            raise ValueError(
                f"{name} is a traced value; it must be a Python number, a constant of the program. "
                "To learn a scale, multiply query by it and pass scale=1.0"
            )
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number, or None for 1 / sqrt(H)")
    if logits_soft_cap is not None and not 0 < logits_soft_cap < math.inf:
        raise ValueError(
            f"logits_soft_cap is {logits_soft_cap}; it must be positive and finite, or None for no cap"
        )
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    static: Any = tuple(precision) if isinstance(precision, list) else precision
    return LogitConfig(float(scale), cap, static)


def check_implementation(implementation: str | None) -> str:
    """Return a valid name; None becomes 'auto', which is chosen for each device."""
    if implementation is None:
        return "auto"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; it must be None, which selects the best one, or one "
            f"of {IMPLEMENTATIONS} ('xla': in blocks, by XLA's operations)"
        )
    return implementation
