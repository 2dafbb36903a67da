"""Failover: the processes that are left agree on which steps count, and go on.

JAX finds out who is alive (`jax.experimental.multihost_utils.live_devices`, documented as unstable), and
gives all of them the same answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator
from typing import Any

from jax.experimental import multihost_utils
from jax.sharding import Mesh

from distattn._compat import coordination
from distattn.collectives.mesh import check_mesh
from distattn.distributed.agreement import exclude, ranks
from distattn.distributed.arrays import without


class HostsLost(RuntimeError):
    """Processes have died; the step under way counts nowhere, and the others can go on.

    Attributes:
      ranks: ranks that died.

    Examples:
      >>> import distattn
      >>> lost = distattn.distributed.HostsLost(distattn.distributed.make_mesh(), {2, 3})
      >>> lost.ranks, str(lost).partition(";")[0]
      ((2, 3), 'lost ranks 2-3')
    """

    ranks: tuple[int, ...]

    def __init__(self, mesh: Mesh, lost: Collection[int]):
        super().__init__(
            f"lost {ranks(lost)}; the step under way does not count, in any process: go on from the state "
            "before it, on the mesh of this error (KVCache.recover)"
        )
        self.ranks = tuple(sorted(lost))
        self._mesh = mesh

    @property
    def mesh(self) -> Mesh:
        """Mesh without the devices of the lost ranks; ValueError if the rest is not a mesh."""
        return without(self._mesh, self.ranks)


@contextlib.contextmanager
def all_or_none(mesh: Mesh) -> Generator[None, None, None]:
    """Make the block count in all processes or in none, even if some die in it.

    Start the processes with `initialize(recoverable=True)`. Every process of the mesh enters the block and
    leaves it together with the others. If one has died, all others get `HostsLost`, even if they have all
    their results. So keep the state from before until the block is over, and donate none of it:

        while len(answer) < wanted:
            try:
                with all_or_none(mesh):
                    token, new = step(weights, cache, answer[-1])  # cache is not donated
                    token = int(token)  # wait for it: it could still fail after the block
            except HostsLost as lost:
                mesh = lost.mesh
                cache, _ = cache.recover(mesh)
            else:
                cache = new
                answer.append(token)

    A block costs two messages to rank 0 and back. The job ends if rank 0 dies, because it keeps the list of
    processes. In a process that is alone the block does nothing.

    Args:
      mesh: mesh of the devices that compute.

    Returns:
      A context manager that yields None.

    Raises:
      ValueError: `mesh` is not a mesh of devices.
      HostsLost: processes have died. This is known after up to `heartbeat_timeout_s`.

    Examples:
      >>> import jax.numpy as jnp, distattn
      >>> with distattn.distributed.all_or_none(distattn.distributed.make_mesh()):
      ...     total = int(jnp.arange(4).sum())
      >>> total
      6
    """
    check_mesh(mesh, devices=True)
    if coordination()[0] is None:
        yield
        return
    devices = list(mesh.devices.flat)
    try:
        with multihost_utils.live_devices(devices) as alive:
            _check_lost(mesh, alive)
            yield
    except HostsLost:
        raise
    except Exception as error:
        with multihost_utils.live_devices(devices) as alive:
            pass
        try:
            _check_lost(mesh, alive)
        except HostsLost as lost:
            raise lost from error
        raise


def _check_lost(mesh: Mesh, alive: Collection[Any]) -> None:
    lost = {d.process_index for d in mesh.devices.flat} - {d.process_index for d in alive}
    if lost:
        exclude(lost)
        raise HostsLost(mesh, lost)
