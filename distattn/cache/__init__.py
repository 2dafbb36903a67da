"""A key/value cache for decoding whose slots are sharded over devices.

`kv_cache` is the class. Its methods call functions on arrays: `slots` places, tags and writes tokens,
`resize` changes the number of slots and devices, `replicas` keeps second copies, `checkpoint` writes to
disk.
"""

from distattn.cache.kv_cache import KVCache
from distattn.cache.slots import Slots

__all__ = ["KVCache", "Slots"]
