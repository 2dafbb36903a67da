"""One step of a reproducible fold: what it loads, and products whose bits depend on their blocks alone.

Logits lie as [b, s, K, m], m being the rows of all query heads of a key/value head: maxima and products
over keys then go along dimensions that XLA:CPU vectorises.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn import elementary
from distattn.block import Block, Scoring, finish_logits
from distattn.tiles import Place, Tiles, fresh

# Up to so many columns XLA:CPU is twice as fast with the wide operand on the right.
FEW_COLUMNS = 32
# Products are of so many keys at least: of one, XLA:CPU makes another kind of loop.
LEAST_KEYS = 16


@dataclasses.dataclass(frozen=True)
class Columns:
    """The rows of all query heads of a key/value head, side by side, in m columns, the last ones empty."""

    groups: int
    queries: int
    unit: int

    @property
    def count(self) -> int:
        """m, a multiple of the unit."""
        return -(-self.groups * self.queries // self.unit) * self.unit

    def join(self, x: jax.Array, axis: int) -> jax.Array:
        """[.., G|1, q|1, ..] from the axis on to [.., m, ..]; 1 where both are."""
        before, sizes, after = x.shape[:axis], x.shape[axis : axis + 2], x.shape[axis + 2 :]
        if sizes == (1, 1) != (self.groups, self.queries):
            return x.reshape(*before, 1, *after)
        x = jnp.broadcast_to(x, (*before, self.groups, self.queries, *after))
        return _filled(x.reshape(*before, -1, *after), axis, self.count)

    def part(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse."""
        x = lax.slice_in_dim(x, 0, self.groups * self.queries, axis=axis)
        return x.reshape(*x.shape[:axis], self.groups, self.queries, *x.shape[axis + 1 :])


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of a loop computes with; b, rows of the batch, is 1, and products are made by heads."""

    place: Place
    scoring: Scoring
    query: jax.Array  # [b, K, m, H], times the scale
    key: jax.Array  # [b, s, K, H]
    value: jax.Array  # [b, s, K, V]
    block: Block  # for bias [b|1, s|1, K|1, m|1] and allowed, the same

    def scores(self) -> tuple[jax.Array, jax.Array | None]:
        """Logits [b, s, K, m] and slope, as `block_logits`."""
        scores = self.with_keys(self.query, self.key)
        return finish_logits(scores, self.block, self.scoring, elementary.tanh)

    def with_keys(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        """[b, s, K, m] from x [b, K, m, H] and keys [b, s, K, H]: products over H."""
        count, keys = keys.shape[1], _filled(keys, 1)
        parts = [
            self._dot(keys[0, :, k], x[0, k], (((1,), (1,)), ((), ()))) for k in range(x.shape[1])
        ]
        return jnp.stack(parts, axis=1)[None, :count]

    def over_keys(self, weights: jax.Array, x: jax.Array, keys: int) -> jax.Array:
        """[c, V, b, K, m] from weights [b, s, K, m] and x [b, s, K, V]: sums over blocks of keys."""
        if keys == 1:
            return jnp.moveaxis(x, (1, 3), (0, 1))[..., None] * jnp.moveaxis(weights, 1, 0)[:, None]
        weights, x = (y.reshape(y.shape[0], -1, keys, *y.shape[2:]) for y in (weights, x))
        over = ((1,), (1,)), ((0,), (0,))
        pairs = [(weights[0, :, :, k], x[0, :, :, k]) for k in range(x.shape[3])]
        # XLA:CPU is twice as fast with the wide operand on the right.
        if weights.shape[-1] <= FEW_COLUMNS:
            parts = jnp.stack([self._dot(w, x, over) for w, x in pairs])
            return parts.transpose(1, 3, 0, 2)[:, :, None]
        return jnp.stack([self._dot(x, w, over) for w, x in pairs], axis=2)[:, :, None]

    def over_rows(self, weights: jax.Array, x: jax.Array, rows: int) -> jax.Array:
        """[r, V, b, K, s] from weights [b, s, K, m] and x [b, K, m, V]: sums over blocks of rows."""
        count, weights = weights.shape[1], _filled(weights, 1)
        weights = weights.reshape(*weights.shape[:3], -1, rows)
        x = x.reshape(*x.shape[:2], -1, rows, x.shape[-1])
        over = ((1,), (2,)), ((0,), (1,))
        parts = [self._dot(x[0, k], weights[0, :, k], over) for k in range(x.shape[1])]
        return jnp.stack(parts, axis=2)[:, :, None, :, :count]

    def _dot(self, a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
        return lax.dot_general(a, b, dimensions, precision=self.scoring.precision)


def load(
    tiles: Tiles,
    columns: Columns,
    scoring: Scoring,
    index: tuple[Any, Any, Any, Any],
    query: jax.Array,
    *,
    sums_rows: bool,
) -> Step:
    """The step at an index of rows of the batch, heads, queries and keys; query [b, K, G, q, H].

    Blocks at the end of the keys may overlap the block before, in whole units, and what is in both is left
    out of the second; so are rows where they are summed over.
    """
    *_, row, column = index
    place = tiles.place(*index)
    block = tiles.block(
        place,
        query,
        tiles.mask(place),
        fresh_keys=fresh(column, place.key, tiles.keys),
        fresh_queries=fresh(row, place.query, tiles.queries) if sums_rows else None,
    )
    bias, allowed = (None if x is None else columns.join(x, 3) for x in (block.bias, block.allowed))
    block = dataclasses.replace(block, bias=bias, allowed=allowed)
    return Step(place, scoring, columns.join(query, 2), block.key, block.value, block)


def _filled(x: jax.Array, axis: int, least: int = LEAST_KEYS) -> jax.Array:
    """x with zeros behind it along an axis that is shorter."""
    missing = max(least - x.shape[axis], 0)
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
