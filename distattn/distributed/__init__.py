"""Many processes: start-up, meshes, arrays from what each process has, telling who differs or is missing.

JAX's own distributed runtime does the work: its cluster detection, its coordination service, its
collectives. A rank is a process, by its number.
"""

from distattn.distributed.arrays import fetch, from_process_local
from distattn.distributed.health import assert_same, barrier
from distattn.distributed.meshes import make_mesh
from distattn.distributed.start import initialize
from distattn.distributed.surviving import HostsLost, all_or_none

__all__ = [
    "HostsLost",
    "all_or_none",
    "assert_same",
    "barrier",
    "fetch",
    "from_process_local",
    "initialize",
    "make_mesh",
]
