"""Many processes: start, meshes, arrays from the data of each process, agreement, failover.

JAX's distributed runtime does the work: cluster detection, coordination service, collectives. A rank is the
number of a process.
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
