"""`KVCache`: keys and values of the tokens so far, on many devices, in any order."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from distattn.attention.global_call import attend
from distattn.attention.sharding import Sharding, bring
from distattn.attention.strategy import (
    QUERY_SHARDED,
    Call,
    StrategyLike,
    check_strategy,
    choose_strategy,
)
from distattn.cache.arguments import (
    INT32,
    LOCAL,
    attended_layer,
    check_new,
    check_not_traced,
    check_path,
    check_room,
    check_sizes,
    known,
    layer_index,
    new_positions,
    on_host,
    owners_of,
    per_sequence,
    per_token,
    sequence_indices,
    sequence_mask,
    token_tree,
    up_to_lengths,
)
from distattn.cache.checkpoint import check_processes, open_step, read_arrays, save_step
from distattn.cache.layout import (
    COUNTERS,
    LETTERS,
    Arrays,
    Layout,
    empty,
    letters_in,
    letters_of,
    query_placement,
    read_layout,
    sharded_along,
)
from distattn.cache.quantise import as_stored, is_quantised
from distattn.cache.replicas import (
    check_replicas,
    lost_positions,
    recovered,
    replica_layout,
    replicas_fit,
    replicated,
    shards_left,
    token_letters,
)
from distattn.cache.resize import check_fit, counted, resized, with_slots
from distattn.cache.slots import (
    PLACEMENTS,
    Edit,
    Slots,
    below,
    clear,
    copy_sequences,
    in_window,
    mask_of_tree,
    on_path,
    retag,
    take_slots,
    tally,
    write_tokens,
)
from distattn.collectives.mesh import check_mesh
from distattn.local.inputs import Window, check_implementation, make_inputs, make_logit_config
from distattn.local.reproducible import reproducible_blocks_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, in slots on many devices; a slot is tagged with a position.

    A pytree of static shapes: donate it to `jax.jit`, and every step writes in place and compiles once;
    carry it through `jax.lax.scan`. Every method returns a new cache. Create one with `create`. S is the
    capacity of a sequence, over all devices, and L the number of layers, a dimension that a cache may lack.

    Attributes:
      key: [L, B, S, K, H].
      value: [L, B, S, K, V].
      key_scale: f32[L, B, S, K] if the dtype has 8 bits; else None.
      value_scale: f32[L, B, S, K] or None, as key_scale.
      positions: int32[B, S], the position of the token in a slot, in all layers; -1: the slot is free.
      counts: int32[B, D], occupied slots of each sequence on each device.
      next_position: int32[B], one past the newest position of the sequence.
      appended: int32[B], tokens that the last append added.
      placed: int32[B], tokens that were ever appended to the sequence.
      overflow: bool[B], True if the last append was refused and the sequence left unchanged.
      refused: int32[B], tokens that all appends refused since `create` or the last `reset` of the sequence.
        Read it once, after a loop under jit.
      replica: for each device a second copy of the slots of another one, by name; or None.
      layout: axes of the mesh that shard sequences, slots and heads.
      placement: how a new token is placed, as in `create`.

    Examples:
      >>> import jax, jax.numpy as jnp, distattn
      >>> sharding = jax.NamedSharding(jax.make_mesh((jax.device_count(),), ("x",)), jax.P(None, "x"))
      >>> cache = distattn.KVCache.create(1, 16, 2, 4, dtype=jnp.float32, sharding=sharding)  # B, S, K, H
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
      >>> cache = cache.append(key, value)
      >>> wanted = jax.nn.dot_product_attention(query, key, value, is_causal=True)
      >>> bool(jnp.allclose(cache.attend(query), wanted, atol=1e-5)), cache.next_position.tolist()
      (True, [8])
    """

    key: jax.Array  # [L, B, S, K, H]
    value: jax.Array  # [L, B, S, K, V]
    key_scale: jax.Array | None  # f32[L, B, S, K]
    value_scale: jax.Array | None
    positions: jax.Array  # int32[B, S]
    counts: jax.Array  # int32[B, D]
    next_position: jax.Array  # int32[B]
    appended: jax.Array  # int32[B]
    placed: jax.Array  # int32[B]
    overflow: jax.Array  # bool[B]
    refused: jax.Array  # int32[B]
    replica: Arrays | None
    layout: Layout = dataclasses.field(metadata={"static": True})
    placement: str = dataclasses.field(metadata={"static": True})

    @staticmethod
    def create(
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        layers: int | None = None,
        dtype: Any,
        sharding: Sharding = None,
        placement: str = "least_loaded",
        replicas: int = 1,
    ) -> KVCache:
        """Create an empty cache.

        Args:
          batch: number of sequences, B.
          capacity: tokens of a sequence, S; rounded up to a multiple of the devices (`cache.capacity`).
          num_kv_heads: K.
          head_dim: H.
          value_dim: V; None: H.
          layers: L, for all layers of a model under one set of tags; None: one layer, without a dimension.
          dtype: of stored keys and values. int8 and the 8-bit floating-point dtypes are quantised, with a
            float32 scale for each slot and head (`distattn.cache.quantise.quantise` states the error).
          sharding: `jax.NamedSharding` of keys [B, slots, K, H], or `jax.P` over the mesh of
            `jax.set_mesh`; None: one device. The axes of a dimension are used in the order of the mesh.
          placement: the device of a new token. 'least_loaded': the one with the fewest tokens of the
            sequence; 'round_robin': each in turn, refused if that one is full; 'block': the first device
            until it is full, then the next.
          replicas: 2: each token is on two devices of different hosts, so that `recover` loses no token
            with a host. The cache takes twice the memory; nothing more is sent, except for owner='local'.
            In a program of one process the first axis of the slots stands for hosts.

        Returns:
          KVCache.

        Raises:
          ValueError: an invalid size, dtype or sharding.

        Examples:
          >>> import jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(
          ...     batch=2, capacity=16, num_kv_heads=2, head_dim=4, layers=3, dtype=jnp.int8
          ... )
          >>> cache.key.shape, cache.key_scale.dtype, cache.capacity, cache.counts.tolist()
          ((3, 2, 16, 2, 4), dtype('float32'), 16, [[0], [0]])
        """
        sizes = {"batch": batch, "capacity": capacity, "num_kv_heads": num_kv_heads}
        sizes |= {"head_dim": head_dim, "value_dim": head_dim if value_dim is None else value_dim}
        check_sizes(sizes | {"layers": 1 if layers is None else layers})
        if placement not in PLACEMENTS:
            raise ValueError(f"placement is {placement!r}; it must be one of {PLACEMENTS}")
        dtype = jnp.dtype(dtype)
        quantised = is_quantised(dtype)
        if not quantised and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"dtype is {dtype}; it must be floating point, or int8, which is quantised"
            )
        layout = read_layout(sharding)
        layout.check_divides("batch", batch, layout.batch)
        layout.check_divides("num_kv_heads", num_kv_heads, layout.heads)
        check_replicas(replicas, layout)
        size = dict(zip("BSKHV", sizes.values(), strict=True))
        size |= {"S": layout.rounded(capacity), "L": layers, "d": layout.devices}
        names = [name for name in LETTERS if quantised or "scale" not in name]
        letters = letters_of(names, layers is not None)
        arrays = empty(layout, letters, size, dtype)
        replica = empty(layout, token_letters(arrays), size, dtype) if replicas == 2 else None
        absent = dict.fromkeys(LETTERS)  # None for the scales
        return KVCache(**absent | arrays, replica=replica, layout=layout, placement=placement)

    @property
    def capacity(self) -> int:
        """S, the tokens that a sequence has room for, over all devices."""
        return self.positions.shape[1]

    @property
    def layers(self) -> int | None:
        """L, or None."""
        return self.key.shape[0] if self.key.ndim == 5 else None

    @property
    def replicas(self) -> int:
        """The number of devices that store each token."""
        return 1 if self.replica is None else 2

    @property
    def arrays(self) -> Arrays:
        """All arrays of the cache by name, without the replica."""
        arrays = {name: getattr(self, name) for name in LETTERS}
        return {name: x for name, x in arrays.items() if x is not None}

    def append(
        self,
        key: jax.Array,
        value: jax.Array,
        positions: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        owner: ArrayLike | str | None = None,
    ) -> KVCache:
        """Append tokens to every sequence: `reserve` and `write`.

        Args:
          key: [B, T, K, H]; in a cache with layers [L, B, T, K, H].
          value: [B, T, K, V] or [L, B, T, K, V].
          positions: as in `reserve`.
          lengths: as in `reserve`.
          owner: as in `reserve`; 'local' by default if key is seen to be sharded along T over the axes of
            the slots.

        Returns:
          The cache. If a sequence has no room for its new tokens, none are written; its `overflow` is set,
          and `refused` counts them. Outside of jit that is an error, and nothing is written at all.

        Raises:
          ValueError: a wrong shape or dtype, or an error of `reserve`.

        Examples:
          >>> import jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(2, 8, 1, 4, dtype=jnp.float32)
          >>> new = jnp.ones((2, 3, 1, 4))
          >>> cache = cache.append(new, new, lengths=jnp.array([3, 1]))
          >>> cache.positions.tolist()
          [[0, 1, 2, -1, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1, -1, -1]]
        """
        key, value = jnp.asarray(key), jnp.asarray(value)
        tokens = key.shape[-3] if key.ndim > 2 else 0
        check_new({"key": key, "value": value}, self.arrays, tokens, all_layers=True)
        if owner is None and sharded_along(key, key.ndim - 3, self.layout):
            owner = LOCAL
        cache, reserved = self.reserve(tokens, positions=positions, lengths=lengths, owner=owner)
        return cache.write(key, value, reserved)

    def reserve(
        self,
        tokens: int,
        *,
        positions: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        owner: ArrayLike | str | None = None,
    ) -> tuple[KVCache, Slots]:
        """Reserve slots for new tokens in every sequence, tagged with their positions.

        Then call `write` for each layer before you attend to the cache. Nothing is sent between devices.

        Args:
          tokens: T, the most that a sequence gets.
          positions: int32[T] or int32[B, T]; None: the next ones of the sequence. Negative: no token. Two
            tokens of a sequence may have one position; both are attended to.
          lengths: int32[B] or one for all, 0 .. T: sequence b gets its first lengths[b] tokens; None: T.
            The values of a tracer can't be checked, and count as the nearest in 0 .. T.
          owner: int32[T] or int32[B, T], the device of each token, counted along the axes of the slots;
            'local': the device that has the token already, if keys and values are sharded along T over
            these axes; None: by the cache's placement. A device that doesn't exist, in a tracer, has no
            room.

        Returns:
          The cache with its tags, and the `Slots`. If a sequence has no room for its new tokens, it gets no
          slots; its `overflow` is set, and `refused` counts them.

        Raises:
          ValueError: a wrong shape, or a value out of range, also in arrays on devices: outside of jit the
            call waits for them anyway. Outside of jit also a sequence without room. Arrays on other hosts
            can't be read, and are treated as under jit.

        Examples:
          >>> import jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(2, 8, 1, 4, dtype=jnp.float32)
          >>> cache, slots = cache.reserve(3, lengths=jnp.array([3, 1]))
          >>> slots.positions.tolist(), cache.next_position.tolist()
          ([[0, 1, 2], [0, -1, -1]], [3, 1])
        """
        batch, devices = self.counts.shape
        new = new_positions(tokens, positions, lengths, self.next_position)
        owners, local = owners_of(owner, batch, tokens, devices)

        def take(layout: Layout, tags: jax.Array) -> tuple[jax.Array, ...]:
            return layout.run(
                take_slots,
                ("BS", "Bd", "B", "B.", None if owners is None else "B."),
                ("BS", "Bd", "DB.", "B.", "B"),
                *(tags, self.counts, self.placed, new, owners),
                static=(self.placement, local),
            )

        tags, counts, index, taken, overflow = take(self.layout, self.positions)
        check_room(new, overflow, self.counts, self.capacity // devices, self.placement)
        replica, replica_index = self.replica, None
        if replica is not None:
            copies, _, replica_index, _, _ = take(replica_layout(self.layout), replica["positions"])
            replica = replica | {"positions": copies}
        tallied = self.layout.run(
            tally,
            ("B.", "B.", "B", "B", "B"),
            ("B",) * 4,
            *(new, taken, self.next_position, self.placed, self.refused),
        )
        names = ("next_position", "appended", "placed", "refused")
        counters = dict(zip(names, tallied, strict=True)) | {"counts": counts, "overflow": overflow}
        cache = dataclasses.replace(self, positions=tags, replica=replica, **counters)
        return cache, Slots(index, taken, overflow, replica_index, local)

    def write(
        self, key: jax.Array, value: jax.Array, slots: Slots, *, layer: ArrayLike | None = None
    ) -> KVCache:
        """Write keys and values to the slots that `reserve` returned. Only owners write; nothing is sent.

        In a scan over layers carry the cache and write one layer at a time: that is done in place.

        Args:
          key: [B, T, K, H]; for all layers at once [L, B, T, K, H].
          value: [B, T, K, V] or [L, B, T, K, V].
          slots: from `reserve`.
          layer: int32[], the layer to write; None: all. Python's and numpy's numbers are checked; if a
            tracer or an array on a device is out of range, nothing is written.

        Returns:
          The cache.

        Raises:
          ValueError: keys or values of another shape than the slots, or not floating point; a layer that
            doesn't exist.

        Examples:
          >>> import jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(1, 8, 1, 4, layers=2, dtype=jnp.float32)
          >>> cache, slots = cache.reserve(3)
          >>> for layer in range(2):
          ...     new = jnp.full((1, 3, 1, 4), 1.0 + layer)
          ...     cache = cache.write(new, new, slots, layer=layer)
          >>> cache.key[:, 0, :4, 0, 0].tolist()
          [[1.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 0.0]]
        """
        key, value = jnp.asarray(key), jnp.asarray(value)
        index = layer_index(layer, self.layers)
        tokens = slots.positions.shape[1]
        check_new({"key": key, "value": value}, self.arrays, tokens, all_layers=layer is None)
        new = as_stored(key, value, self.key.dtype)
        letters = letters_of(new, self.layers is not None)
        arriving = [dims.replace("S", "D" if slots.local else "T") for dims in letters.values()]
        if layer is not None:
            arriving = [dims.removeprefix("L") for dims in arriving]

        def put(layout: Layout, arrays: Arrays) -> Arrays:
            written = layout.run(
                write_tokens,
                ("DB.", None if layer is None else "", *letters.values(), *arriving),
                (*letters.values(),),
                slots.replica_index if layout.replica_source else slots.index,
                *(index, *(arrays[name] for name in new), *new.values()),
                static=(self.layers is not None, slots.local),
            )
            return dict(zip(new, written, strict=True))

        return self._changed(put)

    def attend(
        self,
        query: ArrayLike,
        bias: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        *,
        layer: ArrayLike | None = None,
        query_positions: ArrayLike | None = None,
        is_causal: bool = True,
        tree_mask: ArrayLike | None = None,
        scale: float | None = None,
        query_seq_lengths: ArrayLike | None = None,
        key_value_seq_lengths: ArrayLike | None = None,
        local_window_size: Window = None,
        implementation: str | None = None,
        return_residual: bool = False,
        logits_soft_cap: float | None = None,
        sinks: ArrayLike | None = None,
        precision: jax.lax.PrecisionLike = None,
        query_segment_ids: ArrayLike | None = None,
        key_value_segment_ids: ArrayLike | None = None,
        query_sharding: Sharding = None,
        strategy: StrategyLike = "auto",
        reproducible: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Return attention of queries to the cache; `distattn.dot_product_attention` documents more.

        Append the queries' own keys first. No key and no value is moved or copied.

        Args:
          query: [B, T, N, H]; K divides N.
          bias: float, broadcasts to [B, N, T, S]; S are the slots, whose positions are `cache.positions`.
          mask: bool, broadcasts to [B, N, T, S].
          layer: int32[], in a cache with layers. A tracer or an array on a device that is out of range
            counts as the nearest layer; other values are checked.
          query_positions: int32[T] or int32[B, T]; None: those of the last append, or of its last T tokens:
            next_position - min(appended, T) + 0, 1, ... Pass them if you appended at other positions.
          is_causal: attend if key position <= query position. True by default, unlike in
            `dot_product_attention`: a cache may contain what comes after a query.
          tree_mask: bool[T, T] or bool[B, T, T], if the queries are the last append and the nodes of a
            token tree, each after its parent: [t, u] is True if u is t or an ancestor of t. All nodes
            attend to all earlier tokens. Append nodes at the next positions, and rotate by start + depth;
            see `accept`.
          scale: Python number; None: 1 / sqrt(H).
          query_seq_lengths: int32[B]; queries from this index on give 0.
          key_value_seq_lengths: int32[B]; attend if key position < length.
          local_window_size: int or (left, right), inclusive, in positions.
          implementation: as in `dot_product_attention`.
          return_residual: also return the log-sum-exp.
          logits_soft_cap: c in c * tanh(logit / c).
          sinks: f32[N], one more logit per head with value 0.
          precision: of matmuls.
          query_segment_ids: int32[T] or int32[B, T].
          key_value_segment_ids: int32[S] or int32[B, S], of the slots.
          query_sharding: `jax.NamedSharding`, or `jax.P` over the cache's mesh, of query; T may be sharded
            over the axes of the slots or others. None: read from query if possible, else replicated.
          strategy: 'auto', 'butterfly', 'psum', 'all_gather', 'fused' or a `Schedule`; 'reduce_scatter' for
            a query sharded along T over the axes of the slots. 'gather_kv' would gather the cache: an
            error.
          reproducible: give bitwise equal results on any number of devices, for any order of tokens, as in
            `dot_product_attention`, but in blocks of one key, since slots fill up one by one: 4 times the
            time for one query, 11 for eight. Bits change where the capacity passes 486, 7782 or 124518.

        Returns:
          out [B, T, N, V] in query's dtype; with `return_residual` also lse f32[B, T, N]. A query without
          keys gives 0 and -inf.

        Raises:
          ValueError: an invalid argument or combination; the message says what to pass.
          NotImplementedError: as `dot_product_attention`.

        Examples:
          >>> import jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
          >>> new = jnp.ones((1, 3, 1, 4))
          >>> cache = cache.append(new, jnp.arange(3.0).reshape(1, 3, 1, 1) * new)
          >>> cache.attend(new)[0, :, 0, 0].tolist()  # keys of equal weight, values 0, 1, 2: causal
          [0.0, 0.5, 1.0]
        """
        self.layout.check_outside()
        implementation = check_implementation(implementation)
        check_strategy(strategy)
        if strategy in QUERY_SHARDED and strategy != "reduce_scatter":
            raise ValueError(
                f"strategy={strategy!r} moves keys and values, and those of a cache are never moved; use "
                "'auto', 'butterfly', 'psum', 'all_gather', 'fused', or 'reduce_scatter' for a query that "
                "is sharded along T"
            )
        query = jnp.asarray(query)
        if query.ndim != 4:
            raise ValueError(f"query has shape {query.shape}; a cache needs [B, T, N, H]")
        tokens = query.shape[1]
        start = self.next_position - jnp.minimum(self.appended, tokens)
        if query_positions is None and (is_causal or local_window_size is not None):
            query_positions = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
        if tree_mask is not None:
            tree = token_tree(tree_mask, self.positions.shape[0], tokens)
            arrays = (self.positions, start, tree)
            (in_tree,) = self.layout.run(mask_of_tree, ("BS", "B", "B.."), ("B..S",), *arrays)
            mask = in_tree if mask is None else in_tree & jnp.asarray(mask)
        placement = query_placement(self.layout, query, self.key, self.value, query_sharding)
        inputs = make_inputs(
            query if query_sharding is None else bring(placement, "BTN.", query),
            self.key,
            self.value,
            bias,
            mask,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            sinks=sinks,
            query_positions=query_positions,
            key_positions=self.positions,
            query_segment_ids=query_segment_ids,
            key_value_segment_ids=key_value_segment_ids,
            key_scale=self.key_scale,
            value_scale=self.value_scale,
            layer=attended_layer(layer, self.layers),
        )
        along = bool(set(placement.query) & set(placement.key))
        if strategy == "auto" and along and placement.size(placement.key) > 1:
            strategy = "reduce_scatter"
        blocks = reproducible_blocks_of(inputs, implementation, keys=1) if reproducible else None
        logit_config = make_logit_config(query, scale, logits_soft_cap, precision)
        placement, chosen = choose_strategy(placement, inputs, strategy, blocks)
        call = Call(placement, chosen, logit_config, implementation, blocks)
        out, lse = attend(call, inputs)
        return (out, lse) if return_residual else out

    def reset(self, sequences: ArrayLike) -> KVCache:
        """Empty sequences: the next requests take their place while the others go on.

        Args:
          sequences: an index, int32[n], or bool[B]. Under jit an index out of range is ignored.

        Returns:
          The cache, with these sequences as in a new one.

        Raises:
          ValueError: an index out of range, or a mask of another length.

        Examples:
          >>> import jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(2, 8, 1, 4, dtype=jnp.float32)
          >>> new = jnp.ones((2, 3, 1, 4))
          >>> cache = cache.append(new, new).reset(0)
          >>> cache.next_position.tolist(), cache.counts.tolist()
          ([0, 3], [[0], [3]])
        """
        gone = sequence_mask("sequences", sequences, self.positions.shape[0])

        def cleared(layout: Layout, arrays: Arrays) -> Arrays:
            names = ("positions", "counts", *COUNTERS)
            letters = {name: LETTERS[name] for name in names if name in arrays}
            return layout.update(clear, arrays, letters, gone, argument_letters="B")

        return self._changed(cleared)

    def rewind(self, lengths: ArrayLike) -> KVCache:
        """Free all positions from a length on: those of a rejected draft, for example.

        Args:
          lengths: int32[B], or one for all sequences; positions below stay. Python's and numpy's numbers
            are checked, for which a call outside of jit waits until `next_position` is known. Tracers and
            arrays on devices are not: a length beyond the next position changes nothing, one below 0 is 0.

        Returns:
          The cache, whose next positions are at most the lengths.

        Raises:
          ValueError: a wrong shape or dtype; a length below 0 or, outside of jit, past the next position.

        Examples:
          >>> import jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
          >>> new = jnp.ones((1, 4, 1, 4))
          >>> cache = cache.append(new, new).rewind(lengths=2)  # the last two were a draft
          >>> cache.positions.tolist(), cache.next_position.tolist()
          ([[0, 1, -1, -1, -1, -1, -1, -1]], [2])
        """
        ends = None if on_host(lengths) is None else known(self.next_position)
        lengths = per_sequence(
            "lengths",
            lengths,
            self.positions.shape[0],
            high=INT32.max if ends is None else ends,
            remedy="a sequence is never made longer; pass cache.next_position to keep all of it, 0 to "
            "empty it",
        )
        lengths = jnp.maximum(lengths, 0)
        next_position = jnp.minimum(self.next_position, lengths)
        appended = jnp.maximum(self.appended - (self.next_position - next_position), 0)
        cache = self._retagged(below, lengths)
        return dataclasses.replace(cache, next_position=next_position, appended=appended)

    def evict(self, window: ArrayLike, *, keep_first: ArrayLike = 0) -> KVCache:
        """Free old positions: the last `window` of a sequence stay, and the first `keep_first`.

        The first ones are the attention sinks of Xiao et al., arXiv 2309.17453, section 3. Positions do not
        move up: rotate keys by their positions, or by their rank, before you append them.

        Args:
          window: int32[B], or one for all sequences: positions p >= next_position - window stay. Only
            Python's and numpy's numbers are checked; others count as 0 if they are negative.
          keep_first: int32[B], or one for all sequences: positions p < keep_first stay; checked as window.

        Returns:
          The cache.

        Raises:
          ValueError: a wrong shape or dtype, or a negative number.

        Examples:
          >>> import jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
          >>> new = jnp.ones((1, 4, 1, 4))
          >>> cache = cache.append(new, new).evict(window=2, keep_first=1)
          >>> cache.positions.tolist()
          [[0, -1, 2, 3, -1, -1, -1, -1]]
        """
        batch = self.positions.shape[0]
        remedy = "it is how many positions stay; cache.reset empties a sequence"
        window = per_sequence("window", window, batch, remedy=remedy)
        keep_first = per_sequence("keep_first", keep_first, batch, remedy=remedy)
        first = self.next_position - jnp.maximum(window, 0)
        return self._retagged(in_window, first, keep_first)

    def accept(self, nodes: ArrayLike, lengths: ArrayLike | None = None) -> KVCache:
        """Keep one path of the last append, a token tree, and free its other nodes.

        The nodes of the path get the positions start, start + 1, ..., where start is the position of the
        first node; see `tree_mask` of `attend`. Keys stay as they were rotated.

        Args:
          nodes: int32[P] or int32[B, P], indices into the tokens of the last append, from the root on, each
            once; negative: no node. If the last append added nothing to a sequence, it keeps no node. In a
            tracer, or an array on a device, a node that doesn't exist is no node; one that comes twice
            keeps its first place, and the second position is empty. Other values are checked, for which a
            call outside of jit waits until `appended` is known.
          lengths: int32[B], how many of the P nodes each sequence keeps; None: P. Checked as nodes;
            unchecked values count as the nearest in 0 .. P.

        Returns:
          The cache, whose next position is one past the path.

        Raises:
          ValueError: a wrong shape or dtype, a node that comes twice, or a value out of range.

        Examples:
          >>> import jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
          >>> new = jnp.ones((1, 4, 1, 4))
          >>> cache = cache.append(new, new)  # a root, two children, a grandchild
          >>> cache = cache.accept(jnp.array([0, 2, 3]))  # the root, its second child, the child of that
          >>> cache.positions.tolist(), cache.next_position.tolist()
          ([[0, -1, 1, 2, -1, -1, -1, -1]], [3])
        """
        batch, size = self.positions.shape[0], np.shape(nodes)[-1] if np.ndim(nodes) else 0
        paths, kept = on_host(nodes), size if lengths is None else on_host(lengths)
        nodes = per_token("nodes", nodes, batch, size)
        if lengths is not None:
            remedy = f"the first ones of the P={size} nodes; 0 for a sequence that keeps none"
            lengths = per_sequence("lengths", lengths, batch, high=size, remedy=remedy)
        if paths is not None and kept is not None:
            paths, kept = np.broadcast_to(paths, (batch, size)), np.broadcast_to(kept, batch)
            check_path([p[:n] for p, n in zip(paths, kept, strict=True)], known(self.appended))
        nodes = up_to_lengths(nodes, lengths)
        nodes = jnp.where(nodes < self.appended[:, None], nodes, -1)  # none of a refused append
        start = self.next_position - self.appended
        appended = (nodes >= 0).sum(axis=1, dtype=jnp.int32)
        cache = self._retagged(on_path, start, nodes)
        return dataclasses.replace(cache, next_position=start + appended, appended=appended)

    def fork(self, source: ArrayLike, target: ArrayLike) -> KVCache:
        """Copy sequences over others, keys and values included: for beams.

        Slots stay on their devices. If sequences are sharded, a copied one is sent to all of those devices.

        Args:
          source: the index of a sequence, or int32[n].
          target: the sequence, or sequences, that become copies; each one once. Under jit a pair with an
            index out of range is ignored, and the last of several pairs with one target counts.

        Returns:
          The cache. A copy has all counters of its source, `refused` too.

        Raises:
          ValueError: an index out of range, a target that comes twice, or not as many sources as targets.

        Examples:
          >>> import jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(2, 8, 1, 4, dtype=jnp.float32)
          >>> new = jnp.ones((2, 3, 1, 4))
          >>> cache = cache.append(new, new, lengths=jnp.array([3, 0]))
          >>> cache = cache.fork(source=0, target=1)
          >>> cache.next_position.tolist()
          [3, 3]
        """
        batch = self.positions.shape[0]
        sources = sequence_indices("source", source, batch)
        targets = sequence_indices("target", target, batch)
        if sources.shape != targets.shape:
            raise ValueError(
                f"source has {sources.shape[0]} sequences and target {targets.shape[0]}; pass one source "
                "for each target"
            )
        values = known(target)
        if values is not None and len(np.unique(values)) < values.size:
            raise ValueError(
                f"target is {values.tolist()}; a sequence becomes a copy of one other: pass each target "
                "once"
            )

        def copied(layout: Layout, arrays: Arrays) -> Arrays:
            letters = letters_in(arrays)
            static, pair = ((*letters.values(),),), (sources, targets)
            return layout.update(
                copy_sequences, arrays, letters, *pair, argument_letters="..", static=static
            )

        return self._changed(copied)

    def resize(
        self,
        capacity: int | None = None,
        *,
        sharding: Sharding | str = "keep",
        placement: str | None = None,
        replicas: int | None = None,
    ) -> KVCache:
        """Return the same tokens with another capacity, another sharding, or both. Not under jit.

        With the same sharding no key and no value leaves its device, unless the cache shrinks and a device
        has more tokens of a sequence than it will have slots. Then only those tokens move, to the devices
        with the fewest; meanwhile a device needs twice the memory of its shards of the old and the new
        cache. Between meshes each device gets its shard of the slots, and never all of them.

        Args:
          capacity: tokens of a sequence, S, rounded up to a multiple of the new devices; None: as before.
          sharding: as in `create`, None being one device; `jax.P` is over the mesh of `jax.set_mesh`, or
            else that of the cache. 'keep': as before.
          placement: for new tokens from now on; None: as before.
          replicas: as in `create`; None: as before. They are made anew: each device sends its slots once.

        Returns:
          The cache. Positions, next positions and counters are unchanged.

        Raises:
          ValueError: a sequence with more tokens than the new capacity, or an error of `create`.

        Examples:
          >>> import jax, jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
          >>> cache = cache.append(jnp.ones((1, 3, 1, 4)), jnp.ones((1, 3, 1, 4)))
          >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
          >>> cache = cache.resize(16, sharding=jax.NamedSharding(mesh, jax.P(None, "x")))
          >>> cache.capacity, cache.layout.mesh == mesh, int(cache.counts.sum())
          (16, True, 3)
        """
        check_not_traced("resize", self.positions)
        layout = self.layout
        if sharding != "keep":
            layout = read_layout(sharding, self.layout.mesh)
        replicas = self.replicas if replicas is None else replicas
        check_replicas(replicas, layout)
        changes = {"capacity": capacity, "placement": placement}
        changes = {name: x for name, x in changes.items() if x is not None}
        like = empty_like(layout, self._sizes() | changes)
        check_fit(self.layout.fetch(self.counts), like.capacity)
        arrays = resized(self.arrays, self.layout, layout, like.capacity)
        return dataclasses.replace(like, **arrays)._with_replicas(replicas)

    def save(self, directory: str | os.PathLike[str], step: int | None = None) -> int:
        """Write the cache to disk as a new step; return when it is complete.

        Args:
          directory: of all steps, on a file system that all processes share; it is made if it doesn't
            exist. Steps are directories in it; you may delete them.
          step: a new number; None: one more than the largest, or 0.

        Returns:
          The step. Until it is complete it is named `<step>.unfinished`, which `restore` ignores: an
          interrupted save changes no earlier step.

        Raises:
          ValueError: a step that exists; a directory that only some processes see.
          ModuleNotFoundError: Orbax is not installed.
          NotImplementedError: a cache that is not on all processes of the program.
          TimeoutError, RuntimeError: a process that does not come, as `distattn.distributed.barrier`.

        Examples:
          >>> import tempfile, jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     step = cache.append(jnp.ones((1, 3, 1, 4)), jnp.ones((1, 3, 1, 4))).save(directory)
          ...     restored = distattn.KVCache.restore(directory)
          >>> step, restored.next_position.tolist()
          (0, [3])
        """
        check_processes(self.layout.mesh)
        check_not_traced("save", self.positions)
        arrays = {name: x for name, x in self.arrays.items() if name != "counts"}
        return save_step(directory, step, arrays, self._sizes())

    @staticmethod
    def restore(
        directory: str | os.PathLike[str],
        step: int | None = None,
        *,
        capacity: int | None = None,
        sharding: Sharding = None,
        placement: str | None = None,
        replicas: int = 1,
    ) -> KVCache:
        """Read a saved cache, on these devices, whatever devices it was saved from.

        Each device reads its own shard of the slots.

        Args:
          directory: as in `save`.
          step: its number; None: the largest, with a warning if a later save was interrupted.
          capacity: tokens of a sequence, S; None: as saved, rounded up to a multiple of the devices.
          sharding: as in `create`; None: one device.
          placement: for new tokens from now on; None: as saved.
          replicas: as in `create`; one copy is saved, however many there were.

        Returns:
          The cache, which continues as the saved one would have.

        Raises:
          FileNotFoundError: no such step; the message lists the steps, and those that were interrupted.
          OSError: a file of the step is missing or has changed; the message names an earlier step that is
            whole.
          ValueError: an error of `create` or `resize`; a step in another format.
          ModuleNotFoundError: Orbax is not installed.
          NotImplementedError: a mesh without devices of some process of the program.

        Examples:
          >>> import tempfile, jax, jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
          >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))  # not the devices that it was saved from
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     step = cache.save(directory, step=7)
          ...     sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
          ...     restored = distattn.KVCache.restore(directory, sharding=sharding)
          >>> step, restored.layout.devices == mesh.size
          (7, True)
        """
        layout = read_layout(sharding)
        check_replicas(replicas, layout)
        check_processes(layout.mesh)
        folder, sizes = open_step(directory, step)
        like = empty_like(layout, sizes)
        with layout.context():
            letters = letters_in(shapes := like.arrays)
            shapes = {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.target(letters[name]))
                for name, x in shapes.items()
                if name != "counts"
            }
            arrays = read_arrays(folder, shapes, sizes["capacity"])
            cache = dataclasses.replace(like, **counted(layout, arrays))
        if placement is None and capacity is None and replicas == 1:
            return cache
        return cache.resize(capacity, placement=placement, replicas=replicas)

    def recover(
        self,
        mesh: Mesh,
        *,
        expected: Sequence[ArrayLike] | None = None,
        replicas: int | None = None,
    ) -> tuple[KVCache, tuple[np.ndarray, ...]]:
        """Return the cache on the remaining ones of its devices, and the positions that are lost.

        With two replicas no position is lost with one host. The capacity stays, and the tokens are spread
        evenly over the remaining devices. Meanwhile a device needs memory for twice its shard of the old
        cache, beside the old and the new one. You can compute the lost positions again from their tokens:
        reserve slots for them (`reserve(..., positions=lost)`), and attend by `query_positions`.

        Args:
          mesh: the mesh of the cache without the lost devices: some indices along one axis are left out.
            The axis shards slots, or nothing. `distattn.distributed.all_or_none` gives it.
          expected: int32[n] for each sequence, the positions that it had; None: all below its next one.
            Pass it if some had been evicted.
          replicas: from now on, 1 or 2; None: as before, or 1 if the remaining devices are on one host.

        Returns:
          The cache, and for each sequence the positions that it had and has no more, int32[n], ascending.

        Raises:
          ValueError: another mesh than that; expected positions that were not there, if some are lost.

        Examples:
          >>> import jax, jax.numpy as jnp, distattn
          >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
          >>> sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
          >>> cache = distattn.KVCache.create(1, 16, 1, 4, dtype=jnp.float32, sharding=sharding)
          >>> cache = cache.append(jnp.ones((1, 8, 1, 4)), jnp.ones((1, 8, 1, 4)))
          >>> half = mesh.devices[: -(-mesh.size // 2)]
          >>> half = jax.sharding.Mesh(half, ("x",), axis_types=mesh.axis_types)
          >>> cache, lost = cache.recover(half)
          >>> sorted([*lost[0].tolist(), *(p for p in cache.positions[0].tolist() if p >= 0)])
          [0, 1, 2, 3, 4, 5, 6, 7]
        """
        check_not_traced("recover", self.positions)
        check_mesh(mesh, devices=True)
        shards = shards_left(self.layout, mesh)
        layout = dataclasses.replace(self.layout, mesh=mesh)
        if replicas is None:
            replicas = self.replicas if replicas_fit(layout) else 1
        check_replicas(replicas, layout)
        with layout.context():
            arrays, count = recovered(self.layout, self.arrays, self.replica, layout, shards)
            tags, ends = (layout.fetch(arrays[name]) for name in ("positions", "next_position"))
            lost = lost_positions(tags, ends, count, expected)
            arrays = with_slots(layout, arrays, layout.rounded(self.capacity))
        cache = dataclasses.replace(self, **arrays, layout=layout)
        return cache._with_replicas(replicas), lost

    # Shared by several methods.

    def _sizes(self) -> dict[str, Any]:
        """Return the arguments of `create`, other than those about devices."""
        return {
            "batch": self.positions.shape[0],
            "capacity": self.capacity,
            "num_kv_heads": self.key.shape[-2],
            "head_dim": self.key.shape[-1],
            "value_dim": self.value.shape[-1],
            "layers": self.layers,
            "dtype": self.key.dtype.name,
            "placement": self.placement,
        }

    def _with_replicas(self, replicas: int) -> KVCache:
        """Return the cache with 1 or 2 copies of each token, the second made anew."""
        if replicas == 1:
            return dataclasses.replace(self, replica=None)
        with self.layout.context():
            return dataclasses.replace(self, replica=replicated(self.layout, self.arrays))

    def _changed(self, change: Callable[[Layout, Arrays], Arrays]) -> KVCache:
        """Return the cache with the arrays that change(layout, arrays) returns, in the replica too."""
        changed, replica = change(self.layout, self.arrays), self.replica
        if replica is not None:
            replica = replica | change(replica_layout(self.layout), replica)
        return dataclasses.replace(self, **changed, replica=replica)

    def _retagged(self, edit: Edit, *arguments: jax.Array) -> KVCache:
        """Return the cache with the tags edit(tags, *arguments), on the devices that store them."""
        letters = ["B" + "." * (x.ndim - 1) for x in arguments]

        def edited(layout: Layout, arrays: Arrays) -> Arrays:
            names = [name for name in ("positions", "counts") if name in arrays]
            changed = layout.run(
                retag,
                ("BS", *letters),
                [LETTERS[name] for name in names],
                *(arrays["positions"], *arguments),
                static=(edit, "counts" in names),
            )
            return dict(zip(names, changed, strict=True))

        return self._changed(edited)


def empty_like(layout: Layout, sizes: dict[str, Any]) -> KVCache:
    """Return an empty cache of these sizes as shapes, or raise the error of `create`."""
    create = functools.partial(KVCache.create, **sizes, sharding=layout.sharding("BSKH"))
    with layout.context():
        return jax.eval_shape(create)
