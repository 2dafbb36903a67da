"""job.py by Ray: one actor on each node, with all GPUs of the node.

    ray job submit --working-dir examples/cluster -- python ray_job.py --actors 2 --gpus-per-actor 8
    python ray_job.py --actors 2 --cpu-devices 2     # on this machine, without a cluster

To change: the counts, and the program, which is `job.run` in each actor. All nodes need a Python with
jax and distattn; `ray job submit` sends this folder to them. JAX does not detect Ray: the first actor
says where it is, and each is told that, how many there are and which of them it is.

Elsewhere:

* Each node gets one actor (STRICT_SPREAD), so there must be as many nodes with that many free GPUs; for
  several actors on a node pass --strategy PACK. An actor sees the GPUs that Ray gives it: do not pass
  `local_device_ids`. Without --gpus-per-actor it sees none.
* The driver must not use the accelerators: Ray gives them to the actors. Nothing here uses JAX outside
  of an actor, and each actor is a separate process, which `initialize` needs.
* NCCL and gloo use arbitrary ports between all nodes, and the coordinator one that is free on its node.
* Ray would start an actor again that died, alone, and it could not join the others: max_restarts=0, and
  the first that fails ends all. To start all of them again, call `run_all` again.
"""

import argparse
import socket

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class Process:
    """Process of the job."""

    def address(self) -> str:
        """Return an address for the coordinator: this node, and a port that is free here."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, coordinator: str, processes: int, rank: int, cpu_devices: int | None) -> str:
        """Run the job, as the process of this rank."""
        import job  # here: it imports JAX, which only the actors use

        return job.run(coordinator, processes, rank, cpu_devices)


def run_all(options: argparse.Namespace) -> list[str]:
    """Return the result of each process, by rank, or raise the exception of the first that fails."""
    bundle = {"CPU": options.cpus_per_actor, "GPU": options.gpus_per_actor}
    group = placement_group(
        [{name: n for name, n in bundle.items() if n}] * options.actors, options.strategy
    )
    if not group.wait(options.timeout):
        raise TimeoutError(
            f"Ray has no place for {options.actors} actors with {bundle} each by {options.strategy} after "
            f"{options.timeout:g} s; it has {ray.available_resources()}"
        )
    actors = [
        ray.remote(Process)
        .options(
            num_cpus=options.cpus_per_actor,
            num_gpus=options.gpus_per_actor,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=rank
            ),
        )
        .remote()
        for rank in range(options.actors)
    ]
    try:
        coordinator = ray.get(actors[0].address.remote())
        running = [
            actor.run.remote(coordinator, options.actors, rank, options.cpu_devices)
            for rank, actor in enumerate(actors)
        ]
        waited_for = running
        while waited_for:
            done, waited_for = ray.wait(waited_for)
            ray.get(done)  # raises the exception of one, while others wait for it
        return ray.get(running)
    finally:
        for actor in actors:
            ray.kill(actor)
        ray.util.remove_placement_group(group)


def main() -> None:
    """Run the job in the existing cluster, or in one that ends with this script."""
    parser = argparse.ArgumentParser(description="job.py as actors of Ray.")
    argument = parser.add_argument
    argument("--actors", type=int, default=2, metavar="N", help="how many processes")
    argument("--gpus-per-actor", type=int, default=0, metavar="N")
    argument("--cpus-per-actor", type=int, default=1, metavar="N")
    argument("--cpu-devices", type=int, metavar="N", help="run on the CPU, as N devices each")
    argument("--strategy", help="of the placement group (STRICT_SPREAD; PACK on one machine)")
    argument("--timeout", type=float, default=300, metavar="S", help="wait so long for nodes")
    options = parser.parse_args()
    ray.init()
    if options.strategy is None:
        options.strategy = "PACK" if len(ray.nodes()) == 1 else "STRICT_SPREAD"
    print(run_all(options)[0])


if __name__ == "__main__":
    main()
