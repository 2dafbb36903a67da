#!/usr/bin/env bash
# A job by Open MPI, 4 or 5: one process on each host, with all GPUs of the host.
#
#     HOSTS=node1,node2 examples/cluster/mpirun.sh                      # from the folder above
#     HOSTS=localhost PER_HOST=2 examples/cluster/mpirun.sh examples/cluster/job.py --cpu-devices 2
#
# To change: the variables
#   HOSTS     names that all of them can resolve; the first becomes the coordinator
#   PER_HOST  processes on each: 1, with all GPUs there are, or as many as there are GPUs, with one each
#   PORT      free on the first host, and reachable from the others (one of 10000 at random)
#   PYTHON    a Python with jax and distattn, at the same path on all hosts
# and the program with its arguments behind them: examples/cluster/job.py, or another that passes
# --coordinator, --processes and --rank on to distattn.distributed.initialize.
#
# Why these are passed, where `initialize()` alone could do: JAX finds Open MPI 4 by itself, but expects
# rank 0 on the machine where mpirun was typed, which may be a login node. Open MPI 5 it does not see
# before jax 0.12, which needs mpi4py for it. And mpirun inside of a SLURM job can look like SLURM.
# Arguments that are all given leave nothing to be detected, whichever MPI it is.
#
# What goes wrong elsewhere:
# * mpirun binds each process to one core (or a few), and JAX's threads with it: --bind-to none.
# * Where JAX detects Open MPI it takes one GPU per process, that with the local rank. Here it is told:
#   all, or by JAX_LOCAL_DEVICE_IDS (`initialize(local_device_ids=...)`) one.
# * NCCL and gloo use arbitrary ports between all hosts, also where a firewall lets PORT through.
#   gloo, on CPUs, goes by the address of a host's own name: one that says 127.0.1.1 in /etc/hosts hangs.
# * mpirun ends all when a process fails. How long they wait for each other at the start:
#   `initialize(initialization_timeout_s=...)`, 300 by default.
# * As root, in a container: OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
set -euo pipefail

IFS=, read -ra hosts <<<"${HOSTS:-localhost}"
per_host=${PER_HOST:-1}
export PYTHON=${PYTHON:-python} COORDINATOR=${hosts[0]}:${PORT:-$((20000 + RANDOM % 10000))}
((per_host == 1)) || export ONE_DEVICE_EACH=1
(($#)) || set -- examples/cluster/job.py

# What each rank runs: the variables in it are its own.
# shellcheck disable=SC2016
rank='[[ -z ${ONE_DEVICE_EACH:-} ]] || export JAX_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK
exec "$PYTHON" "$@" --coordinator "$COORDINATOR" \
  --processes "$OMPI_COMM_WORLD_SIZE" --rank "$OMPI_COMM_WORLD_RANK"'

exec mpirun -n $((${#hosts[@]} * per_host)) --host "$(IFS=, && echo "${hosts[*]/%/:$per_host}")" \
  --map-by "ppr:$per_host:node" --bind-to none -x PYTHON -x COORDINATOR ${ONE_DEVICE_EACH:+-x ONE_DEVICE_EACH} \
  bash -c "$rank" rank "$@"
