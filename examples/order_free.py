"""The parts of a model, such that its bits do not depend on how many devices share the tokens.

Attention does that by `reproducible=True`. Elsewhere four things depend on the devices:

1. Sums over tokens: the loss, and the gradients of weights, which belong to all tokens. They are made by
   `distattn.reproducible_sum`, which adds integers; so the order does not count. For a matrix, its
   terms are products over blocks of `BLOCK` tokens, of one shape wherever they are made.
2. Products with a weight. XLA:CPU chooses its loops by the shape; of whole blocks of rows, few or many,
   the bits are the same (measured, not promised). So each device must have whole blocks.
3. Sums in one token, whose order a compiler chooses by the number of rows: they are made by halves.
4. Roundings in one token. A compiler may round a product before it is added, or not (fused multiply-add),
   and has one exponential for the vectors of a loop and another for its rest. It decides for each program.
   So a product that is added is `prevent_fma` first; gradients, which would be such sums as well, are written
   out; and exp and log are those that attention uses.

The optimizer needs nothing: weights lie whole on every device, and are the same there.
"""

import functools
from typing import Any

import jax
from flax import nnx
from jax import lax

import distattn
from distattn.algebra.deterministic_math import exp, log, ordered_sum, prevent_fma

BLOCK = 64  # tokens


def total(products: jax.Array) -> jax.Array:
    """The sum over the last axis, which stays with size 1, in one order, however many rows there are."""
    return ordered_sum(prevent_fma(products), -1)[..., None]


# ------------------------------------------------------------------------ weights


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, T, E] @ [E, F]; T must be a multiple of `BLOCK`."""
    return x @ kernel


def _linear_gradients(saved: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple:
    x, kernel = saved
    x, by_block = (y.reshape(y.shape[0], -1, BLOCK, y.shape[-1]) for y in (x, d))
    terms = lax.dot_general(x, by_block, (((2,), (2,)), ((0, 1), (0, 1))))  # [B, T / BLOCK, E, F]
    return d @ kernel.T, distattn.reproducible_sum(terms, axis=(0, 1))


linear.defvjp(lambda x, kernel: (linear(x, kernel), (x, kernel)), _linear_gradients)


def dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, **_: Any) -> jax.Array:
    """`linear`, as `nnx.Linear` calls it."""
    assert dimensions == (((2,), (0,)), ((), ())), dimensions
    return linear(x, kernel)


@jax.custom_vjp
def scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """[B, T, E] * [E]."""
    return x * scale[None, None]


def _scaled_gradients(saved: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple:
    x, scale = saved
    return prevent_fma(scaled(d, scale)), distattn.reproducible_sum(d * x, axis=(0, 1))


scaled.defvjp(lambda x, scale: (scaled(x, scale), (x, scale)), _scaled_gradients)


# ------------------------------------------------------------------------ each token alone


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def normed(x: jax.Array, epsilon: float) -> jax.Array:
    """[B, T, E] over the root of the mean square of E."""
    return _normed(x, epsilon)[0]


def _normed(x: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    inverse = lax.rsqrt(total(x * x) / x.shape[-1] + epsilon)
    normed = x * inverse
    return normed, (normed, inverse)


def _normed_gradient(_: float, saved: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple:
    normed, inverse = saved
    along = total(d * normed) / d.shape[-1]
    return (prevent_fma(inverse * (d - prevent_fma(normed * along))),)


normed.defvjp(_normed, _normed_gradient)


class RMSNorm(nnx.RMSNorm):
    """`nnx.RMSNorm` of [B, T, E] over E."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, E]."""
        return scaled(normed(x, self.epsilon), self.scale[...])


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
    """x / (1 + exp(-x))."""
    return x * _sigmoid(x)


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + exp(-x))


def _silu_gradient(x: jax.Array, d: jax.Array) -> tuple:
    gate = _sigmoid(x)
    return (d * (gate + prevent_fma(x * gate * (1 - gate))),)


silu.defvjp(lambda x: (silu(x), x), _silu_gradient)


@jax.custom_vjp
def turn(first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple:
    """The point (first, second), turned by an angle."""
    return (
        prevent_fma(first * cos) - prevent_fma(second * sin),
        prevent_fma(second * cos) + prevent_fma(first * sin),
    )


def _turn_gradients(saved: tuple[jax.Array, jax.Array], d: tuple) -> tuple:
    cos, sin = saved
    return *turn(*d, cos, -sin), None, None  # angles go with positions, and these are data


turn.defvjp(lambda *x: (turn(*x), x[2:]), _turn_gradients)


# ------------------------------------------------------------------------ the loss


@jax.custom_vjp
def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """f32[B, T], in nats, from logits and labels [B, T, F], which are 1 in one place and 0 elsewhere."""
    return _cross_entropy(logits, labels)[0]


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, tuple]:
    high = logits.max(axis=-1, keepdims=True)
    lse = log(total(exp(logits - high))) + high
    return (lse - (logits * labels).sum(axis=-1, keepdims=True))[..., 0], (logits, labels, lse)


def _cross_entropy_gradients(saved: tuple, d: jax.Array) -> tuple:
    logits, labels, lse = saved
    return (exp(logits - lse) - labels) * d[..., None], None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_gradients)


def mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean of `cross_entropy` over all tokens."""
    losses = cross_entropy(logits, labels)
    return distattn.reproducible_sum(losses) / losses.size
