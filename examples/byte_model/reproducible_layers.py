"""Layers that are bitwise reproducible on any number of devices that share the tokens.

Attention needs only `reproducible=True`. In the other layers four things depend on the devices:

1. Sums over tokens: the loss, and the gradients of weights. `distattn.reproducible_sum` adds integers,
   so the order does not matter. The terms of a matrix are matmuls over blocks of `BLOCK` tokens, of one
   shape on any mesh.
2. Matmuls with a weight. XLA:CPU chooses its loops by the shape. For whole blocks of rows the bits do not
   depend on their number (measured, not promised), so each device must have whole blocks.
3. Sums in one token, whose order the compiler chooses by the number of rows: they are written as a tree.
4. Rounding in one token. For each program the compiler decides whether a multiply and an add are fused,
   and it has two exponentials, for the vectors of a loop and for its remainder. Therefore `prevent_fma`
   rounds a multiply before an add, gradients are written out, and exp and log are those of attention.

The optimizer needs nothing, because weights are replicated.
"""

import functools
from typing import Any

import jax
from flax import nnx
from jax import lax

import distattn
from distattn.algebra.deterministic_math import exp, log, ordered_sum, prevent_fma

BLOCK = 64  # tokens


def row_sum(terms: jax.Array) -> jax.Array:
    """Sum over the last axis, kept with size 1, in an order that does not depend on the number of rows."""
    return ordered_sum(prevent_fma(terms), -1)[..., None]


# ------------------------------------------------------------------------ weights


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x [B, T, E] @ kernel [E, F]; T must be a multiple of `BLOCK`."""
    return x @ kernel


def _linear_gradients(saved: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple:
    x, kernel = saved
    x, by_block = (y.reshape(y.shape[0], -1, BLOCK, y.shape[-1]) for y in (x, d))
    terms = lax.dot_general(x, by_block, (((2,), (2,)), ((0, 1), (0, 1))))  # [B, T / BLOCK, E, F]
    return d @ kernel.T, distattn.reproducible_sum(terms, axis=(0, 1))


linear.defvjp(lambda x, kernel: (linear(x, kernel), (x, kernel)), _linear_gradients)


def dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **_: Any) -> jax.Array:
    """Call `linear` with the arguments that `nnx.Linear` passes."""
    assert dimensions == (((2,), (0,)), ((), ())), dimensions
    return linear(x, kernel)


@jax.custom_vjp
def scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Return x [B, T, E] * scale [E]."""
    return x * scale[None, None]


def _scaled_gradients(saved: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple:
    x, scale = saved
    return prevent_fma(scaled(d, scale)), distattn.reproducible_sum(d * x, axis=(0, 1))


scaled.defvjp(lambda x, scale: (scaled(x, scale), (x, scale)), _scaled_gradients)


# ------------------------------------------------------------------------ within a token


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def normed(x: jax.Array, epsilon: float) -> jax.Array:
    """Divide x [B, T, E] by its root mean square over E."""
    return _normed(x, epsilon)[0]


def _normed(x: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    inverse = lax.rsqrt(row_sum(x * x) / x.shape[-1] + epsilon)
    normed = x * inverse
    return normed, (normed, inverse)


def _normed_gradient(_: float, saved: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple:
    normed, inverse = saved
    along = row_sum(d * normed) / d.shape[-1]
    return (prevent_fma(inverse * (d - prevent_fma(normed * along))),)


normed.defvjp(_normed, _normed_gradient)


class RMSNorm(nnx.RMSNorm):
    """An `nnx.RMSNorm` of [B, T, E] over E."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [B, T, E] to [B, T, E]."""
        return scaled(normed(x, self.epsilon), self.scale[...])


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
    """Return x / (1 + exp(-x))."""
    return x * _sigmoid(x)


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + exp(-x))


def _silu_gradient(x: jax.Array, d: jax.Array) -> tuple:
    gate = _sigmoid(x)
    return (d * (gate + prevent_fma(x * gate * (1 - gate))),)


silu.defvjp(lambda x: (silu(x), x), _silu_gradient)


@jax.custom_vjp
def rotate_pair(first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple:
    """Rotate the point (first, second) by an angle."""
    return (
        prevent_fma(first * cos) - prevent_fma(second * sin),
        prevent_fma(second * cos) + prevent_fma(first * sin),
    )


def _rotate_pair_gradients(saved: tuple[jax.Array, jax.Array], d: tuple) -> tuple:
    cos, sin = saved
    return (
        *rotate_pair(*d, cos, -sin),
        None,
        None,
    )  # angles depend on positions only, which are data


rotate_pair.defvjp(lambda *x: (rotate_pair(*x), x[2:]), _rotate_pair_gradients)


# ------------------------------------------------------------------------ the loss


@jax.custom_vjp
def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return f32[B, T], in nats, of logits and one-hot labels [B, T, F]."""
    return _cross_entropy(logits, labels)[0]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, tuple]:
    high = logits.max(axis=-1, keepdims=True)
    lse = log(row_sum(exp(logits - high))) + high
    return (lse - (logits * labels).sum(axis=-1, keepdims=True))[..., 0], (logits, labels, lse)


def _cross_entropy_gradients(saved: tuple, d: jax.Array) -> tuple:
    logits, labels, lse = saved
    return (exp(logits - lse) - labels) * d[..., None], None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_gradients)


def mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean of `cross_entropy` over all tokens."""
    losses = cross_entropy(logits, labels)
    return distattn.reproducible_sum(losses) / losses.size
