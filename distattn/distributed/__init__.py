"""Many processes: start-up, meshes, arrays from what each process has, telling who differs or is missing.

JAX's own distributed runtime does the work: its cluster detection, its coordination service, its
collectives. A rank is a process, by its number.
"""

from distattn.distributed.agreement import assert_same, barrier
from distattn.distributed.arrays import fetch, from_process_local, make_mesh
from distattn.distributed.failover import HostsLost, all_or_none
from distattn.distributed.start import initialize

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
