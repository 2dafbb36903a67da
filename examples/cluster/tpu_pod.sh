#!/usr/bin/env bash
# A job on a Cloud TPU slice of several hosts: one process on each, with all chips of the host.
#
#     TPU=my-slice ZONE=us-east5-a examples/cluster/tpu_pod.sh          # from the folder above
#
# To change: the variables
#   TPU, ZONE  of a slice that is running (gcloud compute tpus tpu-vm create ...)
#   PROJECT    where it is not gcloud's default
#   PYTHON     on each host, 3.11 or later: that of an image with Ubuntu 22.04 is 3.10, and does not do
#   INSTALL    what its pip installs there, or an empty string: nothing. distattn itself is not released: this
#              clone of it is copied beside the script
# and the script with its arguments behind them: examples/cluster/job.py, or another that calls
# distattn.distributed.initialize() without arguments.
#
# Nothing is passed: JAX reads the hosts, their number and the rank of each from the metadata of the slice
# (with several slices from MEGASCALE_*), and never restricts a process to one chip there.
#
# What goes wrong elsewhere:
# * All hosts must run the script: --worker=all. With one fewer the others wait, by
#   `initialize(initialization_timeout_s=...)` for 300 s.
# * A program that still runs holds the chips ("The TPU is already in use"): end it on every host.
# * The coordinator listens on port 8482 of the first host (JAX_COORDINATOR_PORT): the default network of
#   a project lets its hosts reach each other, one with rules of its own must say so.
# * For a host without an external address: TUNNEL=1, which goes through Identity-Aware Proxy.
# * On GKE no script is needed: in a JobSet like kubernetes-jobset.yaml with google.com/tpu in place of
#   nvidia.com/gpu, the variables TPU_WORKER_ID and TPU_WORKER_HOSTNAMES are there, and job.py needs no
#   arguments.
set -euo pipefail

: "${TPU:?the name of the slice}" "${ZONE:?the zone of the slice}"
(($#)) || set -- examples/cluster/job.py
script=$1 library=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../distattn" && pwd)
shift
where=("--zone=$ZONE" --worker=all)
[[ -z ${PROJECT:-} ]] || where+=("--project=$PROJECT")
[[ -z ${TUNNEL:-} ]] || where+=(--tunnel-through-iap)

everywhere() { gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --command="$1"; }

python=${PYTHON:-python3} install=${INSTALL-"'jax[tpu]' absl-py"}
[[ -z $install ]] || everywhere "$python -m pip install --quiet $install"
gcloud compute tpus tpu-vm scp --recurse "$library" "$script" "$TPU:" "${where[@]}"
everywhere "$python $(printf '%q ' "$(basename "$script")" "$@")"
