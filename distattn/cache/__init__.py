"""A key/value cache for decoding whose slots lie on many devices.

A slot is tagged with the position of the key that it holds, and the order of slots never matters. So all
that happens to a row in its life is an edit of tags: a new token goes to any device, a rejected draft is
rewound, old tokens are evicted, a row is reset for the next request.
"""

from distattn.cache.kv_cache import KVCache
from distattn.cache.slots import Slots

__all__ = ["KVCache", "Slots"]
