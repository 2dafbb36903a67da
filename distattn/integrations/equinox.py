"""distattn as `equinox.nn.MultiheadAttention`, which can't be given another attention."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distattn._compat import needed
from distattn.attention.api import dot_product_attention
from distattn.attention.sharding import Sharding
from distattn.attention.strategy import StrategyLike
from distattn.local.inputs import Window

with needed("equinox", by=__name__, extra="equinox"):
    import equinox as eqx


class MultiheadAttention(eqx.nn.MultiheadAttention):
    """`equinox.nn.MultiheadAttention` over keys and values that may be sharded over devices.

    It has the parameters and arguments of Equinox's module, and three more settings. A call has no batch:
    `jax.vmap` adds one, which may be sharded over another Auto axis of the mesh.
    """

    query_sharding: Sharding = eqx.field(static=True)
    key_value_sharding: Sharding = eqx.field(static=True)
    strategy: StrategyLike = eqx.field(static=True)

    def __init__(
        self,
        *args: Any,
        query_sharding: Sharding = None,
        key_value_sharding: Sharding = None,
        strategy: StrategyLike = "auto",
        **kwargs: Any,
    ):
        """Initialize the module, with the parameters that Equinox's module has for the same key.

        Args:
          *args: as in `equinox.nn.MultiheadAttention`.
          query_sharding: as in `distattn.dot_product_attention`, of [T, N, H].
          key_value_sharding: as in `distattn.dot_product_attention`, of [S, N, H].
          strategy: how devices exchange.
          **kwargs: as in `equinox.nn.MultiheadAttention`.
        """
        super().__init__(*args, **kwargs)
        self.query_sharding = query_sharding
        self.key_value_sharding = key_value_sharding
        self.strategy = strategy

    @classmethod
    def from_equinox(
        cls,
        module: eqx.nn.MultiheadAttention,
        *,
        query_sharding: Sharding = None,
        key_value_sharding: Sharding = None,
        strategy: StrategyLike = "auto",
    ) -> Self:
        """Return this module with the fields of Equinox's module, trained or replaced.

        To replace it in a model:
        `eqx.tree_at(lambda model: model.attention, model, from_equinox(model.attention))`.

        Args:
          module: an `equinox.nn.MultiheadAttention`.
          query_sharding: as in `distattn.dot_product_attention`, of [T, N, H].
          key_value_sharding: as in `distattn.dot_product_attention`, of [S, N, H].
          strategy: how devices exchange.

        Returns:
          The module; it shares its arrays with the other.
        """
        fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
        fields |= {
            "query_sharding": query_sharding,
            "key_value_sharding": key_value_sharding,
            "strategy": strategy,
        }
        copy = object.__new__(cls)
        for name, value in fields.items():
            object.__setattr__(copy, name, value)  # as Equinox does: modules are frozen
        return copy

    def __call__(
        self,
        query: jax.Array,
        key_: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads: Callable[..., Any] | None = None,
        is_causal: bool = False,
        local_window_size: Window = None,
        query_positions: ArrayLike | None = None,
        key_positions: ArrayLike | None = None,
        query_segment_ids: ArrayLike | None = None,
        key_value_segment_ids: ArrayLike | None = None,
    ) -> jax.Array:
        """Compute Equinox's attention. A query that attends to no key gets 0, not the mean of all values.

        Args:
          query: [T, query_size].
          key_: [S, key_size].
          value: [S, value_size].
          mask: bool[T, S] or bool[N, T, S]; True = attend.
          key: PRNG key of dropout; not used.
          inference: whether dropout is off; None: the module's setting.
          deterministic: the old name of inference.
          process_heads: (query [T, N, H], key [S, N, H], value [S, N, V]) -> arrays of these shapes. If you
            pass positions, a rotary embedding in it must use them.
          is_causal: attend if key position <= query position.
          local_window_size: int or (left, right), in positions.
          query_positions: int32[T]; None: 0, 1, 2, ...
          key_positions: int32[S]; negative = empty slot.
          query_segment_ids: int32[T]; attend if equal.
          key_value_segment_ids: int32[S].

        Returns:
          [T, output_size].

        Raises:
          ValueError: as in `distattn.dot_product_attention`, or process_heads changes a shape.
          NotImplementedError: dropout_p > 0 without inference.

        Examples:
          >>> import jax, jax.numpy as jnp
          >>> from distattn.integrations.equinox import MultiheadAttention
          >>> layer = MultiheadAttention(num_heads=4, query_size=32, key=jax.random.key(0))
          >>> x = jnp.ones((2, 16, 32))
          >>> jax.vmap(lambda x: layer(x, x, x, is_causal=True))(x).shape
          (2, 16, 32)
        """
        del key
        if deterministic is not None:
            inference = deterministic
            warnings.warn("deterministic is deprecated in Equinox, pass inference", stacklevel=2)
        self._check_dropout(inference)
        self._check_mask(mask, query.shape[0], key_.shape[0])
        projections = (self.query_proj, self.key_proj, self.value_proj)
        heads = tuple(
            jax.vmap(project)(x).reshape(x.shape[0], self.num_heads, -1)
            for project, x in zip(projections, (query, key_, value), strict=True)
        )
        if process_heads is not None:
            shapes = [x.shape for x in heads]
            heads = process_heads(*heads)
            if [x.shape for x in heads] != shapes:
                raise ValueError(
                    f"process_heads made {[x.shape for x in heads]} of {shapes}; it must not change the "
                    "shapes of query, key and value"
                )
        dtype = jnp.result_type(*heads)
        out = dot_product_attention(
            *(x.astype(dtype) for x in heads),
            mask=mask,
            is_causal=is_causal,
            local_window_size=local_window_size,
            query_positions=query_positions,
            key_positions=key_positions,
            query_segment_ids=query_segment_ids,
            key_value_segment_ids=key_value_segment_ids,
            query_sharding=self.query_sharding,
            key_value_sharding=self.key_value_sharding,
            strategy=self.strategy,
        )
        return jax.vmap(self.output_proj)(jnp.reshape(out, (query.shape[0], -1)))

    def _check_mask(self, mask: jax.Array | None, queries: int, keys: int) -> None:
        shapes = ((queries, keys), (self.num_heads, queries, keys))
        if mask is not None and mask.shape not in shapes:
            raise ValueError(
                f"mask has shape {mask.shape}; it must be bool[T, S] = {list(shapes[0])} or "
                f"bool[N, T, S] = {list(shapes[1])}, as in Equinox: broadcast it"
            )

    def _check_dropout(self, inference: bool | None) -> None:
        rate = self.dropout.p
        off = self.dropout.inference if inference is None else inference
        if not (isinstance(rate, int | float) and rate == 0) and not off:
            raise NotImplementedError(
                f"dropout_p is {rate} and inference is {off}: dropout of attention weights is not "
                "supported; make the module with dropout_p=0, drop from its output if needed, or pass "
                "inference=True"
            )
