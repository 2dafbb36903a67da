"""A key/value cache for decoding whose slots lie on many devices.

A slot is tagged with the position of the key that it holds, and the order of slots never matters. So all
that happens to a row in its life is an edit of tags: a new token goes to any device, a rejected draft is
rewound, old tokens are evicted, a row is reset for the next request.

To be read from the bottom: `storage` and `layout` know of arrays on a mesh, `slots` of places for tokens,
`replicas` of second copies. Above them is a file for each group of methods, functions whose first argument
is the cache, and on top `kv_cache`, the class that imports them. They name it only for type checkers; what
is imported when they run points down, in the order that `tests/test_layers.py` lists.
"""

from distattn.cache.kv_cache import KVCache
from distattn.cache.slots import Slots

__all__ = ["KVCache", "Slots"]
