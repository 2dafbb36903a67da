"""What would make a step fit that does not: less of one thing, or more devices, in numbers."""

import math
from dataclasses import replace

from distattn.amounts import bytes_text
from distattn.memory import bytes_per_device, key_value_bytes, largest, largest_context
from distattn.traffic import QUERY_SHARDED
from distattn.workload import Workload

# More devices than this, times as many, are no advice.
MOST_TIMES = 1 << 16
SCALE_BYTES = 2 * 4  # of a quantised key and of its value, in float32


def remedies(
    combine: str, workload: Workload, sizes: tuple[int, ...], limit: int, groups: int = 1
) -> tuple[str, ...]:
    """Each by itself lets `bytes_per_device` be at most `limit`, but for one that says that it does not.

    Args:
      combine: by name.
      workload: of the devices that share the keys: see `division`.
      sizes: of the axes over which they are sharded.
      limit: bytes of a device.
      groups: over which sequences are divided, each of the batch of `workload`.
    """
    w, (*slow, fast) = workload, sizes or (1,)

    def held(step: Workload) -> int:
        return bytes_per_device(combine, step, sizes)

    def held_over(times: int) -> int:
        """With so many times the devices, over which queries may be sharded then, or no longer."""
        axes = (*slow, fast * times)
        sharded, name = w.queries >= math.prod(axes), combine
        if sharded != (combine in QUERY_SHARDED):
            name = "ring" if sharded else "butterfly"
        return bytes_per_device(name, w, axes)

    found: list[str] = []
    if context := largest_context(combine, w, sizes, limit):
        found.append(f"a context of at most {context:,}, the largest that fits")
    times = 2
    while times <= MOST_TIMES and held_over(times) > limit:
        times *= 2
    if times <= MOST_TIMES:
        each = bytes_text(held_over(times))
        found.append(f"{times} times as many devices for the keys, which then hold {each} each")
    if w.layers > 1 and (layers := largest(lambda n: held(replace(w, layers=n)) <= limit)):
        found.append(
            f"at most {layers:,} of the {w.layers:,} layers, and the others on other devices"
        )
    if w.batch > 1 and (batch := largest(lambda n: held(replace(w, batch=n)) <= limit)):
        found.append(f"a batch of at most {batch * groups:,}, not {w.batch * groups:,}")
    if w.dtype_bytes > 1 and not w.training:
        small = replace(w, dtype_bytes=1)
        saved = key_value_bytes(w, sizes) - key_value_bytes(small, sizes, SCALE_BYTES)
        enough = "" if held(w) - saved <= limit else ", which alone is not enough"
        found.append(
            f"a KVCache of dtype int8, with which a device holds {bytes_text(held(w) - saved)}{enough}"
        )
    return tuple(found)
