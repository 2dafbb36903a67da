"""Going on in place when processes are lost: who is left agrees on what counts.

JAX finds out who is alive (`jax.experimental.multihost_utils.live_devices`, of which its documentation
says that it may still change), and makes all of them wait for the same answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator
from typing import Any

from jax.experimental import multihost_utils
from jax.sharding import Mesh

from distattn._compat import coordination
from distattn.collectives.mesh import check_mesh
from distattn.distributed.agreement import go_on_without, ranks
from distattn.distributed.arrays import without


class HostsLost(RuntimeError):
    """Processes have ended. What was computed meanwhile counts nowhere; the others can go on without them.

    Attributes:
      ranks: of the processes that ended.

    Example:
      >>> import distattn
      >>> lost = distattn.distributed.HostsLost(distattn.distributed.make_mesh(), {2, 3})
      >>> lost.ranks, str(lost).partition(";")[0]
      ((2, 3), 'lost ranks 2-3')
    """

    ranks: tuple[int, ...]

    def __init__(self, mesh: Mesh, lost: Collection[int]):
        super().__init__(
            f"lost {ranks(lost)}; what was computed meanwhile does not count, in any process: go on from "
            "what was there before, on the mesh of this error (KVCache.recover)"
        )
        self.ranks = tuple(sorted(lost))
        self._mesh = mesh

    @property
    def mesh(self) -> Mesh:
        """The mesh of the block without their devices; ValueError where no mesh is left of it."""
        return without(self._mesh, self.ranks)


@contextlib.contextmanager
def all_or_none(mesh: Mesh) -> Generator[None, None, None]:
    """What is computed in the block counts in all processes or in none, even where some of them end.

    The process needs to have been started with `initialize(recoverable=True)`. Every process of the mesh
    enters the block, and leaves it together with the others. Where one has ended meanwhile all of them get
    `HostsLost`, even those that had all their results. So keep what was there before until the block is
    over: donate nothing of it in the first call of the block.

        while len(answer) < wanted:
            try:
                with all_or_none(mesh):
                    token, new = step(weights, cache, answer[-1])  # cache is not donated
                    token = int(token)  # what is not waited for may fail after the block
            except HostsLost as lost:
                mesh = lost.mesh
                cache, _ = cache.recover(mesh)
            else:
                cache = new
                answer.append(token)

    A block costs two messages to rank 0 and back. Rank 0 itself cannot be lost: it is the one that knows.
    In a process that is alone the block is what it is without.

    Args:
      mesh: of the devices that compute.

    Returns:
      A context manager, of nothing.

    Raises:
      ValueError: a mesh that is none.
      HostsLost: processes have ended. It takes up to `heartbeat_timeout_s` until that is known.

    Example:
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
            _check(mesh, alive)
            yield
    except HostsLost:
        raise
    except Exception as error:
        with multihost_utils.live_devices(devices) as alive:
            pass
        try:
            _check(mesh, alive)
        except HostsLost as lost:
            raise lost from error
        raise


def _check(mesh: Mesh, alive: Collection[Any]) -> None:
    lost = {d.process_index for d in mesh.devices.flat} - {d.process_index for d in alive}
    if lost:
        go_on_without(lost)
        raise HostsLost(mesh, lost)
