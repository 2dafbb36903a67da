"""Numbers as words of int32 on a lattice: how they are cut into digits, and how digits move.

The derivation is that of `fixed_point`, which sums them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from distattn import elementary
from distattn.gauge import EMPTY, POISON

# Added to a number of up to 2^22 in size, it leaves the nearest whole number in the low bits.
_WHOLE = np.float32(1.5 * 2**23)
_WHOLE_BITS = np.int32(0x4B400000)


@dataclasses.dataclass(frozen=True)
class Lattice:
    """How many words a number has, and how many bits apart they are."""

    bits: int
    words: int


def lattice(terms: int) -> Lattice:
    """The lattice for sums of so many terms; see the derivation above.

    Args:
      terms: n, at most 2^24.

    Raises:
      ValueError: more terms than that.
    """
    if terms > 2**24:
        raise ValueError(
            f"a reproducible sum has at most 2^24 terms, and this one has {terms}; sum parts of it first"
        )
    # By 1.9 times a power of 16, which no length that is a round number comes near: a length that is
    # padded for the devices at hand must not change the lattice.
    log = next(log for log in range(8, 25, 4) if terms < 1.9 * 2**log)
    bits = 31 - log
    return Lattice(bits, 1 + math.ceil((25 + log) / bits))


def scaling(
    largest: jax.Array, steps: jax.Array, factor: jax.Array, least: jax.Array, scale: Lattice
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The top of sums, and two factors that bring the numbers of C terms into its units.

    Args:
      largest: f32[C, ...], the largest magnitude in each row; broadcasts to the rows.
      steps: int32[C, ...], as for `quantise`.
      factor: f32[C, ...].
      least: int32[...], below which the top shall not be.
      scale: the lattice.

    Returns:
      int32[...], and f32[C, ...] twice.
    """
    exponent = elementary.exponent_of(largest)
    # What is below the normal numbers counts as nothing; processors disagree about it.
    none, odd = (exponent < -126) | (steps == EMPTY), (exponent > 127) | (steps >= POISON)
    shift = jnp.clip(exponent, -126, 126)
    exponent = shift + elementary.exponent_of(largest * elementary.power_of_two(-shift) * factor)
    top = steps + (exponent + 1) // scale.bits
    top = jnp.where(odd, POISON, jnp.where(none, EMPTY, top))
    high = jnp.maximum(top.max(axis=0), least)
    # In two parts, since 2^(L below) alone may be no normal number; that of x with the factor is rounded.
    below = jnp.clip(steps - high[None], -(512 // scale.bits), 512 // scale.bits)
    half = jnp.clip(-shift, -100, 100)
    dead = none | (high == POISON)[None]
    first = jnp.where(dead, 0.0, factor * elementary.power_of_two(half))
    second = jnp.where(dead, 0.0, elementary.power_of_two(scale.bits * below - half))
    return high, first, second


def digits(
    x: jax.Array, first: jax.Array, second: jax.Array, scale: Lattice
) -> tuple[jax.Array, ...]:
    """The words of x * first * second, finite, in units of the highest."""
    rest, words = x * first * second, []
    for _ in range(scale.words):
        # Up to 2^22 in size, a number is rounded to the nearest whole one by adding 1.5 * 2^23, and is in
        # the low bits then: half the time of a conversion, for which XLA asks about all other numbers.
        digit = lax.bitcast_convert_type(rest + _WHOLE, jnp.int32) - _WHOLE_BITS
        words.append(digit)
        rest = (rest - digit.astype(jnp.float32)) * np.float32(2.0**scale.bits)
    return tuple(words)


def moved_down(words: tuple[jax.Array, ...], steps: jax.Array) -> tuple[jax.Array, ...]:
    """The words of sums whose top rises by so many steps, int32 that broadcasts to them."""
    moved = []
    for place, word in enumerate(words):
        for step in range(1, place + 1):
            word = jnp.where(steps == step, words[place - step], word)
        moved.append(jnp.where(steps > place, 0, word))
    return tuple(moved)
