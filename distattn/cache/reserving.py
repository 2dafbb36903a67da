"""Slots for new tokens: reserved, and tagged, once for all layers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distattn.cache.arguments import (
    INT32,
    check_range,
    known,
    row_numbers,
    token_numbers,
    up_to_lengths,
)
from distattn.cache.layout import Layout
from distattn.cache.replicas import replica_layout
from distattn.cache.slots import Slots, take_slots

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache

LOCAL = "local"


def reserve(
    self: KVCache,
    tokens: int,
    *,
    positions: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    owner: ArrayLike | str | None = None,
) -> tuple[KVCache, Slots]:
    """Slots for new tokens, tagged with their positions, in every row: the first half of an append.

    The second half is `write`, once for each layer, before anything attends to the cache: until then the
    slots hold what was there before. Nothing is sent between devices.

    Args:
      tokens: T, the most that a row gets.
      positions: int32[T] or int32[B, T]; default the row's next ones. Negative: no token. Two tokens of a
        row may have one position; both are attended to.
      lengths: int32[B] or one for all rows, 0 .. T; row b gets its first lengths[b] tokens; default T. Of a
        tracer, which cannot be checked, what is below 0 counts as 0 and what is above T as T.
      owner: int32[T] or int32[B, T], the device of each token, counted along the axes of the slots;
        'local': the device that holds the token already, keys and values being sharded along T over these
        axes; default by the cache's placement. Of a tracer, a device that is not there has no place.

    Returns:
      The cache with its tags, and the `Slots`. A row in which the tokens have no place is left as it was,
      whole, its `overflow` set, and its `refused` larger by their number.

    Raises:
      ValueError: a wrong shape, lengths that are not 0 .. T, devices that are not there: also of arrays on
        devices, since outside of jit the call waits for them anyway, to learn whether a row is full.
        Outside of jit also a row in which the tokens have no place. What lies on other hosts cannot be
        read, and is as under jit.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(2, 8, 1, 4, dtype=jnp.float32)
      >>> cache, slots = cache.reserve(3, lengths=jnp.array([3, 1]))
      >>> slots.positions.tolist(), cache.next_position.tolist()
      ([[0, 1, 2], [0, -1, -1]], [3, 1])
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int | np.integer) or tokens < 1:
        raise ValueError(
            f"tokens is {tokens!r}; it must be an int of at least 1: pass lengths for rows "
            "that get none"
        )
    batch, layout = self.positions.shape[0], self.layout
    local = isinstance(owner, str)
    if local and owner != LOCAL:
        raise ValueError(f"owner is {owner!r}; it must be int32[B, T], 'local' or None")
    if local and tokens % layout.devices:
        raise ValueError(
            f"owner='local' cuts T={tokens} tokens evenly over {layout.devices} devices; pad them to a "
            "multiple, and pass lengths"
        )
    devices = None
    if owner is not None and not local:
        devices = token_numbers("owner", owner, batch, tokens)
        remedy = f"the slots lie on {layout.devices} devices"
        check_range("owner", known(owner), 0, layout.devices - 1, remedy)
    if positions is None:
        new = self.next_position[:, None] + np.arange(tokens, dtype=np.int32)[None]
    else:
        new = token_numbers("positions", positions, batch, tokens)
        remedy = "positions are int32, and the next one must be too; negative is no token"
        check_range("positions", known(positions), INT32.min, INT32.max - 1, remedy)
    if lengths is not None:
        remedy = f"of the T={tokens} tokens the first ones; append more tokens, or 0 for a row without any"
        lengths = row_numbers("lengths", lengths, batch, high=tokens, remedy=remedy, read=True)
    new = up_to_lengths(new, lengths)

    def take(layout: Layout, tags: jax.Array) -> tuple[Any, ...]:
        return layout.run(
            take_slots,
            ("BS", "B.", "B", "B.", None if devices is None else "B."),
            ("BS", "B.", "DB.", "B.", "B"),
            *(tags, self.counts, self.placed, new, devices),
            static=(self.placement, local),
        )

    tags, counts, index, taken, overflow = take(layout, self.positions)
    _refuse(self, new, overflow)
    replica, replica_index = self.replica, None
    if replica is not None:
        copies, _, replica_index, _, _ = take(replica_layout(layout), replica.positions)
        replica = dataclasses.replace(replica, positions=copies)
    names = ("next_position", "appended", "placed", "refused")
    numbers = (self.next_position, self.placed, self.refused)
    tally = layout.run(_tally, ("B.", "B.", "B", "B", "B"), ("B",) * 4, new, taken, *numbers)
    cache = dataclasses.replace(
        self,
        positions=tags,
        counts=counts,
        overflow=overflow,
        replica=replica,
        **dict(zip(names, tally, strict=True)),
    )
    return cache, Slots(index, taken, overflow, replica_index, local)


def _refuse(cache: KVCache, new: jax.Array, overflow: jax.Array) -> None:
    """Outside of jit, an error for the rows that overflow."""
    refused = known(overflow)
    if refused is None or not refused.any():
        return
    rows = np.flatnonzero(refused)
    wanted, used = (np.asarray(x) for x in ((new >= 0).sum(axis=1), cache.counts))
    each = cache.capacity // cache.layout.devices
    row = rows[0]
    raise ValueError(
        f"row {row} gets {wanted[row]} new tokens, and its free slots are {(each - used[row]).tolist()} on "
        f"the devices of the cache (rows that overflow: {rows.tolist()}; placement {cache.placement!r}); "
        "nothing was written: evict, rewind or reset the row, resize the cache, or append less"
    )


# What one device does, in `Layout.run`.


def _tally(
    layout: Layout,
    new: jax.Array,
    taken: jax.Array,
    next_position: jax.Array,
    placed: jax.Array,
    refused: jax.Array,
) -> tuple[Any, ...]:
    """The numbers of a row after an append."""
    appended = (taken >= 0).sum(axis=1, dtype=jnp.int32)
    wanted = (new >= 0).sum(axis=1, dtype=jnp.int32)
    return (
        jnp.maximum(next_position, taken.max(axis=1) + 1),
        appended,
        placed + appended,
        refused + wanted - appended,
    )
