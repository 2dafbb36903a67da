"""Checks of the arguments of a cache's methods.

Python's and numpy's values are always checked. A `jax.Array` is read only if the call waits for the devices
anyway, or is an edit of whole sequences: reading waits for the computation of the array. A tracer has no
values. An unchecked value out of range has a meaning that harms no other sequence; see the docstrings.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from distattn.local.inputs import integers

INT32 = np.iinfo(np.int32)
LOCAL = "local"  # owner of a token that stays on its device


def known(x: Any) -> np.ndarray | None:
    """Return the values of x if this process can read all of them: not of tracers or other hosts."""
    leaves = jax.tree.leaves(x)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return None
    readable = (
        leaf.is_fully_addressable or (leaf.is_fully_replicated and leaf.addressable_shards)
        for leaf in leaves
        if isinstance(leaf, jax.Array)
    )
    return np.asarray(x) if all(readable) else None


def on_host(x: Any) -> np.ndarray | None:
    """Return the values of x if they are Python's or numpy's, so that no device is waited for."""
    arrays = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))
    return None if arrays else np.asarray(x)


def check_not_traced(method: str, x: Any) -> None:
    """Raise ValueError in a method that can't be called under a trace of the cache."""
    if isinstance(x, Tracer):
        raise ValueError(f"{method} was called under a trace of the cache; call it outside of jit")


def check_sizes(sizes: dict[str, Any]) -> None:
    """Raise ValueError unless each argument is a positive int."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name} is {size!r}; it must be an int of at least 1")


def check_range(
    name: str, values: np.ndarray | None, low: int, high: int | np.ndarray, remedy: str
) -> None:
    """Raise ValueError if a known value is out of range.

    Args:
      name: of the argument.
      values: int of any shape, or None.
      low: the least that is allowed.
      high: the largest that is allowed; int[B]: for each sequence, with values int[B] or int[].
      remedy: what to do.
    """
    if values is None:
        return
    wrong = np.argwhere((values < low) | (values > high))
    if not len(wrong):
        return
    first = tuple(int(i) for i in wrong[0])
    index = first[: values.ndim]
    limit, where = high, ""
    if isinstance(high, np.ndarray):
        limit, where = high[first], f"for sequence {first[0]} "
    raise ValueError(
        f"{name}{list(index) if index else ''} is {values[index]}; {where}it must be {low} .. {limit}: "
        f"{remedy}"
    )


def per_sequence(
    name: str,
    x: ArrayLike,
    batch: int,
    *,
    high: int | np.ndarray = INT32.max,
    remedy: str,
    read: bool = False,
) -> jax.Array:
    """Return int32[B] from int32[B] or one integer for all sequences, each in 0 .. high.

    Args:
      name: of the argument.
      x: the argument.
      batch: B.
      high: the largest that is allowed, for all sequences or for each.
      remedy: what to do if one is out of range.
      read: read a `jax.Array` to check it.
    """
    array = _integers(name, x)
    if array.shape not in ((), (batch,)):
        raise ValueError(
            f"{name} has shape {array.shape}; it must be int32[B] = [{batch}], one for each sequence, "
            "or one for all"
        )
    check_range(name, known(x) if read else on_host(x), 0, high, remedy)
    return jnp.broadcast_to(array, (batch,))


def per_token(name: str, x: ArrayLike, batch: int, tokens: int) -> jax.Array:
    """Return int32[B, T] from int32[T] or int32[B, T]."""
    array = _integers(name, x)
    if array.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"{name} has shape {array.shape} for B={batch}, T={tokens}; it must be int32[T] or "
            "int32[B, T]: one for each new token"
        )
    return jnp.broadcast_to(array if array.ndim == 2 else array[None], (batch, tokens))


def up_to_lengths(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Return int32[B, T] with -1, no token, from the length int32[B] of each sequence on."""
    if lengths is None:
        return x
    index = np.arange(x.shape[1], dtype=np.int32)[None]
    return jnp.where(index < lengths[:, None], x, -1)


def sequence_indices(name: str, x: ArrayLike, batch: int) -> jax.Array:
    """Return int32[n] from the index of one sequence or of several."""
    indices = jnp.atleast_1d(_integers(name, x))
    if indices.ndim != 1:
        raise ValueError(
            f"{name} has shape {indices.shape}; it must be the index of a sequence, or int32[n]"
        )
    check_range(name, known(x), 0, batch - 1, f"an index of a sequence (B={batch})")
    return indices


def sequence_mask(name: str, x: ArrayLike, batch: int) -> jax.Array:
    """Return bool[B] from bool[B], or from indices; a tracer's indices out of range are ignored."""
    mask = _as_array(x)
    if mask.dtype != jnp.bool_:
        indices = sequence_indices(name, x, batch)
        return (np.arange(batch, dtype=np.int32)[:, None] == indices[None]).any(axis=1)
    if mask.shape != (batch,):
        raise ValueError(
            f"{name} has shape {mask.shape}; a mask of sequences must be bool[B] = [{batch}]: or "
            "pass indices"
        )
    return mask


def layer_index(x: ArrayLike | None, layers: int | None) -> jax.Array | None:
    """Return int32[]; None in a cache without layers, or for all layers."""
    if x is None:
        return None
    if layers is None:
        raise ValueError(
            f"layer is {x}, but the cache has no layers; create it with layers=, or pass layer=None"
        )
    index = _integers("layer", x)
    if index.shape:
        raise ValueError(f"layer has shape {index.shape}; it must be one integer, int32[]")
    check_range("layer", on_host(x), 0, layers - 1, f"the cache has {layers} layers")
    return index


def attended_layer(x: ArrayLike | None, layers: int | None) -> jax.Array | None:
    """Return the layer that a query attends to: the nearest one if an unchecked index is out of range."""
    if (x is None) != (layers is None):
        raise ValueError(
            f"layer is {x}, and the cache has "
            f"{'no layers: pass None' if layers is None else f'{layers} layers: say which'}"
        )
    index = layer_index(x, layers)
    if index is None or on_host(x) is not None:
        return index
    return jnp.clip(index, 0, layers - 1)


def check_new(
    new: dict[str, jax.Array], stored: dict[str, jax.Array], tokens: int, *, all_layers: bool
) -> None:
    """Raise ValueError unless new keys and values are [B, T, K, H], for all layers [L, B, T, K, H]."""
    for name, x in new.items():
        *lead, batch, _, heads, width = stored[name].shape
        expected = (*(lead if all_layers else ()), batch, tokens, heads, width)
        if x.shape != expected:
            letters, hint = "[B, T, K, .]", ""
            if len(expected) == 5:
                letters = "[L, B, T, K, .]"
                hint = "; to write one layer, reserve slots and pass layer to write"
            raise ValueError(
                f"{name} has shape {x.shape}; this cache needs {letters} = {list(expected)}{hint}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} has dtype {x.dtype}; it must be floating point, cast it with .astype"
            )


def new_positions(
    tokens: int, positions: ArrayLike | None, lengths: ArrayLike | None, next_position: jax.Array
) -> jax.Array:
    """Return int32[B, T], the positions of new tokens, -1 for no token."""
    if isinstance(tokens, bool) or not isinstance(tokens, int | np.integer) or tokens < 1:
        raise ValueError(
            f"tokens is {tokens!r}; it must be an int of at least 1: pass lengths for sequences that "
            "get none"
        )
    (batch,) = next_position.shape
    if positions is None:
        new = next_position[:, None] + np.arange(tokens, dtype=np.int32)[None]
    else:
        new = per_token("positions", positions, batch, tokens)
        remedy = "positions are int32, and the next one must be too; negative is no token"
        check_range("positions", known(positions), INT32.min, INT32.max - 1, remedy)
    if lengths is not None:
        remedy = f"the first ones of the T={tokens} tokens; append more tokens, or 0 for no token"
        lengths = per_sequence("lengths", lengths, batch, high=tokens, remedy=remedy, read=True)
    return up_to_lengths(new, lengths)


def owners_of(
    owner: ArrayLike | str | None, batch: int, tokens: int, devices: int
) -> tuple[jax.Array | None, bool]:
    """Return int32[B, T] or None, and whether each token stays on its device."""
    if owner is None:
        return None, False
    if not isinstance(owner, str):
        owners = per_token("owner", owner, batch, tokens)
        check_range("owner", known(owner), 0, devices - 1, f"slots are on {devices} devices")
        return owners, False
    if owner != LOCAL:
        raise ValueError(f"owner is {owner!r}; it must be int32[B, T], 'local' or None")
    if tokens % devices:
        raise ValueError(
            f"owner='local' shards T={tokens} tokens evenly over {devices} devices; pad them to a "
            "multiple, and pass lengths"
        )
    return None, True


def check_room(
    new: jax.Array, overflow: jax.Array, counts: jax.Array, slots: int, placement: str
) -> None:
    """Raise ValueError outside of jit if a sequence has no room for its new tokens.

    Args:
      new: int32[B, T], their positions.
      overflow: bool[B].
      counts: int32[B, D], before.
      slots: of a sequence on a device.
      placement: of the cache.
    """
    refused = known(overflow)
    if refused is None or not refused.any():
        return
    sequences = np.flatnonzero(refused)
    first = sequences[0]
    wanted, free = (np.asarray(new)[first] >= 0).sum(), slots - np.asarray(counts)[first]
    raise ValueError(
        f"sequence {first} gets {wanted} new tokens, and its free slots are {free.tolist()} on the devices "
        f"of the cache (sequences that overflow: {sequences.tolist()}; placement {placement!r}); nothing "
        "was written: evict, rewind or reset the sequence, resize the cache, or append less"
    )


def token_tree(tree: ArrayLike, batch: int, tokens: int) -> jax.Array:
    """Return bool[B, T, T] from bool[T, T] or bool[B, T, T]."""
    tree = jnp.asarray(tree)
    if tree.dtype != jnp.bool_ or tree.shape not in ((tokens, tokens), (batch, tokens, tokens)):
        raise ValueError(
            f"tree_mask is {tree.dtype}{list(tree.shape)}; it must be bool[T, T] or bool[B, T, T] with "
            f"T={tokens}, B={batch}: which query attends to which of the last {tokens} tokens"
        )
    return jnp.broadcast_to(tree if tree.ndim == 3 else tree[None], (batch, tokens, tokens))


def check_path(paths: list[np.ndarray], appended: np.ndarray | None) -> None:
    """Raise ValueError if a path has a node twice, or a node that the last append did not add."""
    for sequence, path in enumerate(paths):
        nodes = path[path >= 0].tolist()
        if len(set(nodes)) < len(nodes):
            raise ValueError(
                f"nodes is {path.tolist()} for sequence {sequence}; a path has each node once: pass -1 for "
                "no node, or lengths if sequences keep fewer"
            )
        if appended is not None and 0 < appended[sequence] <= max(nodes, default=-1):
            raise ValueError(
                f"nodes is {path.tolist()} for sequence {sequence}, and the last append added "
                f"{appended[sequence]} tokens to it; they must be 0 .. {appended[sequence] - 1}, or "
                "negative for no node: pass -1, or lengths if sequences keep fewer"
            )


def _integers(name: str, x: ArrayLike) -> jax.Array:
    return integers(name, _as_array(x))


def _as_array(x: ArrayLike) -> jax.Array:
    """Return Python's numbers as numpy has them, so that checks of ranges see those above int32."""
    values = on_host(x)
    return jnp.asarray(x if values is None else values)
