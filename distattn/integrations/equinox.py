"""distattn as the attention of Equinox, whose `MultiheadAttention` has no place to put one in."""

from __future__ import annotations

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
    """`equinox.nn.MultiheadAttention` over keys and values that lie on many devices.

    The same parameters in the same fields, the same arguments, and besides where the arrays lie. As there,
    a call has no batch: `jax.vmap` gives it one, which may be sharded over another axis of the mesh if
    that is an Auto axis.
    """

    query_sharding: Sharding = eqx.field(static=True)
    key_value_sharding: Sharding = eqx.field(static=True)
    strategy: StrategyLike = eqx.field(static=True)

    def __init__(
        self,
        num_heads: int,
        query_size: int,
        key_size: int | None = None,
        value_size: int | None = None,
        output_size: int | None = None,
        qk_size: int | None = None,
        vo_size: int | None = None,
        use_query_bias: bool = False,
        use_key_bias: bool = False,
        use_value_bias: bool = False,
        use_output_bias: bool = False,
        dropout_p: float = 0.0,
        inference: bool = False,
        dtype: Any = None,
        *,
        key: jax.Array,
        query_sharding: Sharding = None,
        key_value_sharding: Sharding = None,
        strategy: StrategyLike = "auto",
    ):
        """The arguments of `equinox.nn.MultiheadAttention`, and where the arrays lie.

        Args:
          num_heads: N.
          query_size: features of the query.
          key_size: features of the key; default query_size.
          value_size: features of the value; default query_size.
          output_size: features of the output; default query_size.
          qk_size: H; default query_size // num_heads.
          vo_size: V; default query_size // num_heads.
          use_query_bias: of the projection of the query.
          use_key_bias: of the projection of the key.
          use_value_bias: of the projection of the value.
          use_output_bias: of the projection of the output.
          dropout_p: of the attention weights; not built but for inference.
          inference: whether dropout is off.
          dtype: of the parameters.
          key: PRNG key of the parameters: they are those of Equinox's own module.
          query_sharding: as in `distattn.dot_product_attention`, of [T, N, H].
          key_value_sharding: as in `distattn.dot_product_attention`, of [S, K, H].
          strategy: how devices exchange.
        """
        super().__init__(
            num_heads,
            query_size,
            key_size,
            value_size,
            output_size,
            qk_size,
            vo_size,
            use_query_bias,
            use_key_bias,
            use_value_bias,
            use_output_bias,
            dropout_p,
            inference,
            dtype,
            key=key,
        )
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
        """The module with Equinox's own one's projections and dropout, trained or replaced as they are.

        In a model: `eqx.tree_at(lambda model: model.attention, model, from_equinox(model.attention))`.

        Args:
          module: an `equinox.nn.MultiheadAttention`.
          query_sharding: as in `distattn.dot_product_attention`, of [T, N, H].
          key_value_sharding: as in `distattn.dot_product_attention`, of [S, K, H].
          strategy: how devices exchange.

        Returns:
          The module; it shares its arrays with the other.
        """
        sizes = ("query_size", "key_size", "value_size", "output_size", "qk_size", "vo_size")
        biases = ("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias")
        empty = eqx.filter_eval_shape(
            cls,
            module.num_heads,
            **{name: getattr(module, name) for name in (*sizes, *biases)},
            key=jax.ShapeDtypeStruct((2,), jnp.uint32),
            query_sharding=query_sharding,
            key_value_sharding=key_value_sharding,
            strategy=strategy,
        )
        return eqx.tree_at(_parts, empty, _parts(module), is_leaf=lambda x: x is None)

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
        """Equinox's attention, but that a row which attends to no key takes 0 from it, not the mean value.

        Args:
          query: [T, query_size].
          key_: [S, key_size].
          value: [S, value_size].
          mask: bool[T, S] or bool[N, T, S]; True = attend.
          key: PRNG key of dropout; not used.
          inference: whether dropout is off; None: as the module says.
          deterministic: the old name of inference.
          process_heads: (query [T, N, H], key [S, N, H], value [S, N, V]) -> the same shapes; a rotary
            embedding, which must go by the positions if these are given.
          is_causal: attend iff key position <= query position.
          local_window_size: int or (left, right), on positions.
          query_positions: int32[T]; default 0, 1, 2, ...
          key_positions: int32[S]; negative = never attended.
          query_segment_ids: int32[T]; attend iff equal.
          key_value_segment_ids: int32[S].

        Returns:
          [T, output_size].

        Raises:
          ValueError: as `distattn.dot_product_attention`; or process_heads changed a shape.
          NotImplementedError: dropout_p > 0 without inference.

        Example:
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
        heads = tuple(
            jax.vmap(project)(x).reshape(x.shape[0], self.num_heads, -1)
            for project, x in zip(_parts(self)[:3], (query, key_, value), strict=True)
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
            mask=self._full(mask, query.shape[0], key_.shape[0]),
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

    def _full(self, mask: jax.Array | None, rows: int, keys: int) -> jax.Array | None:
        """The mask if it has one of Equinox's two shapes."""
        wanted = ((rows, keys), (self.num_heads, rows, keys))
        if mask is not None and mask.shape not in wanted:
            raise ValueError(
                f"mask has shape {mask.shape}; it must be bool[T, S] = {list(wanted[0])} or "
                f"bool[N, T, S] = {list(wanted[1])}, as in Equinox: broadcast it"
            )
        return mask

    def _check_dropout(self, inference: bool | None) -> None:
        rate = self.dropout.p
        off = self.dropout.inference if inference is None else inference
        if not (isinstance(rate, int | float) and rate == 0) and not off:
            raise NotImplementedError(
                f"dropout_p is {rate} and inference is {off}: dropout of attention weights is not built; "
                "make the module with dropout_p=0, and if need be drop from its output, or pass "
                "inference=True"
            )


def _parts(module: eqx.nn.MultiheadAttention) -> tuple[Any, ...]:
    """All of a module that is no setting."""
    return (
        module.query_proj,
        module.key_proj,
        module.value_proj,
        module.output_proj,
        module.dropout,
    )
