"""The files in examples/cluster: their program under each scheduler's variables, and what must agree.

The scripts run as they stand, where a few lines of shell are the scheduler: `srun` and `mpirun` that
start two processes on this machine with the variables that the real ones set.
"""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples" / "cluster"
JOB = FOLDER / "job.py"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])
LIMIT_S = 100  # of a job
SETTING = ("DISTATTN_", "JAX_", "OMPI_", "PMI_", "SLURM_", "TPU_", "KUBERNETES_")
SAID = r"{} x {} cpu devices: 8 queries attended to [\d +]+ keys, .* from what one process computes"

# The processes have the variables of their rank, and end together with the first that fails.
START_BOTH = """
for rank in 0 1; do start "$@" & done
wait -n && wait -n
"""
SRUN = f"""#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
start() {{
  SLURM_JOB_ID=$JOB_ID SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2 SLURM_PROCID=$rank SLURM_LOCALID=0 \
    exec "$@"
}}
{START_BOTH}"""
MPIRUN = f"""#!/usr/bin/env bash
until [[ $1 == bash ]]; do shift; done
start() {{ OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_LOCAL_RANK=$rank exec "$@"; }}
{START_BOTH}"""


def environment(**variables: str) -> dict[str, str]:
    """This process's, but for what would say that it is part of some job."""
    rest = {k: v for k, v in os.environ.items() if not k.startswith(SETTING)}
    return rest | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | variables


def run(*commands: list[str], env: list[Mapping[str, str]]) -> tuple[list[int], str]:
    """Exit codes and output of these processes, at once; nothing that they have started is left."""
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command, variables in zip(commands, env, strict=True)
    ]
    try:
        texts = [process.communicate(timeout=LIMIT_S)[0] for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [process.returncode for process in started], "".join(texts)


def scheduler(folder: Path, name: str, text: str, **variables: str) -> dict[str, str]:
    """An environment in which that command is this text."""
    command = folder / name
    command.write_text(text, encoding="utf-8")
    command.chmod(0o755)
    return environment(PATH=f"{folder}{os.pathsep}{os.environ['PATH']}", **variables)


def free_port(low: int = 20000, high: int = 30000) -> int:
    while True:
        port = random.randrange(low, high)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


def said(text: str, processes: int, devices: int) -> bool:
    return len(re.findall(f"^{SAID.format(processes, devices)}$", text, re.M)) == 1


def test_the_job_alone():
    command = [sys.executable, "-W", "error", str(JOB), "--cpu-devices", "3"]
    codes, text = run(command, env=[environment()])
    assert codes == [0], text
    assert said(text, 1, 3), text


def test_slurm(tmp_path):
    """JAX detects it, coordinator and port too, and the first of two hosts says what both saw."""
    port = free_port(61440, 65536)  # where JAX looks, by the number of the job
    env = scheduler(tmp_path, "srun", SRUN, JOB_ID=str(port - 61440), CPU_DEVICES="2")
    codes, text = run(["bash", str(FOLDER / "slurm.sbatch")], env=[env])
    assert codes == [0], text
    assert said(text, 2, 2), text


@pytest.mark.parametrize(
    ("tasks", "gpus", "ids"), [("1", "8", "0,1,2,3,4,5,6,7"), ("8", "8", ""), ("1", "", "")]
)
def test_slurm_gives_a_process_that_is_alone_on_its_node_all_gpus(tmp_path, tasks, gpus, ids):
    env = scheduler(
        tmp_path, "srun", '#!/usr/bin/env bash\necho "ids=${JAX_LOCAL_DEVICE_IDS:-} $*"'
    )
    env |= {"SLURM_GPUS_ON_NODE": gpus, "SLURM_NTASKS_PER_NODE": tasks}
    codes, text = run(["bash", str(FOLDER / "slurm.sbatch")], env=[env])
    assert codes == [0], text
    assert text.startswith(f"ids={ids} --kill-on-bad-exit=1 "), text
    assert text.endswith(f"{sys.executable} examples/cluster/job.py\n")


@pytest.mark.parametrize("per_host", [1, 2])
def test_mpirun_tells_each_process_which_it_is(tmp_path, per_host):
    """By arguments, as the pods of Kubernetes are told, whichever MPI it is."""
    scheduler(tmp_path, "program", '#!/usr/bin/env bash\necho "ids=${JAX_LOCAL_DEVICE_IDS:-} $*"')
    hosts = ",".join("ab"[: 2 // per_host])
    env = scheduler(
        tmp_path,
        "mpirun",
        MPIRUN,
        PYTHON="program",
        HOSTS=hosts,
        PER_HOST=str(per_host),
        PORT="9911",
    )
    codes, text = run(["bash", str(FOLDER / "mpirun.sh"), "job.py", "two words"], env=[env])
    assert codes == [0], text
    told = "job.py two words --coordinator a:9911 --processes 2 --rank"
    ids = ["", ""] if per_host == 1 else ["0", "1"]  # all devices, or one
    assert sorted(text.splitlines()) == [f"ids={ids[rank]} {told} {rank}" for rank in range(2)]


@pytest.mark.parametrize(
    ("hosts", "per_host", "says"),
    [
        ("a,b", "1", "-n 2 --host a:1,b:1 --map-by ppr:1:node --bind-to none "),
        ("a,b,c", "8", "-n 24 --host a:8,b:8"),
    ],
)
def test_mpirun_counts_processes(tmp_path, hosts, per_host, says):
    text = '#!/usr/bin/env bash\necho "$* at $COORDINATOR"'
    env = scheduler(tmp_path, "mpirun", text, HOSTS=hosts, PER_HOST=per_host, PORT="9911")
    codes, text = run(["bash", str(FOLDER / "mpirun.sh")], env=[env])
    assert codes == [0], text
    assert text.startswith(says), text
    assert text.endswith("at a:9911\n"), text
    assert ("-x ONE_DEVICE_EACH" in text) == (per_host != "1")


def test_open_mpi_4_is_detected():
    """By the variables of its mpirun, with nothing said but the devices."""
    port = free_port(61440, 65536)
    ranks = [
        environment(
            OMPI_MCA_orte_hnp_uri=f"{(port - 61440) * 2**12}.0;tcp://127.0.0.1:44009",
            OMPI_COMM_WORLD_SIZE="2",
            OMPI_COMM_WORLD_RANK=str(rank),
            OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
    command = [sys.executable, str(JOB), "--cpu-devices", "2"]
    codes, text = run(command, command, env=ranks)
    assert codes == [0, 0], text
    assert said(text, 2, 2), text


def test_processes_of_an_mpi_that_jax_does_not_see_are_not_alone():
    """Open MPI 5: this JAX does not know of it, or has no mpi4py for it; each would work alone."""
    env = environment(
        OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_LOCAL_RANK="0"
    )
    codes, text = run([sys.executable, str(JOB), "--cpu-devices", "1"], env=[env])
    assert codes == [1], text
    assert re.search(r"^RuntimeError: .*Open MPI 5", text, re.M), text


def test_tpu_pod(tmp_path):
    """What gcloud is asked to do, in its order, and how the shells of the hosts read it."""
    text = """#!/usr/bin/env bash
printf '<%s>' "$@" && echo"""
    env = scheduler(tmp_path, "gcloud", text, TPU="slice", ZONE="zone", PYTHON="py", TUNNEL="1")
    script = [str(FOLDER / "tpu_pod.sh"), "some/program.py", "two words"]
    codes, text = run(["bash", *script], env=[env])
    assert codes == [0], text
    where = "<--zone=zone><--worker=all><--tunnel-through-iap>"
    ssh = f"<compute><tpus><tpu-vm><ssh><slice>{where}"
    assert text.splitlines() == [
        f"{ssh}<--command=py -m pip install --quiet 'jax[tpu]' absl-py>",
        f"<compute><tpus><tpu-vm><scp><--recurse><{ROOT / 'distattn'}><some/program.py><slice:>{where}",
        rf"{ssh}<--command=py program.py two\ words >",
    ]
    codes, text = run(["bash", *script], env=[env | {"ZONE": ""}])
    assert codes == [1]
    assert "the zone of the slice" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell(path):
    codes, text = run(["bash", "-n", str(path)], env=[environment()])
    assert (codes, text) == ([0], "")
    assert os.access(path, os.X_OK)


def manifests() -> dict[str, list[dict]]:
    return {
        path.name: list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        for path in FOLDER.glob("*.yaml")
    }


def test_kubernetes_says_one_thing():
    """As many pods as processes, and the coordinator is the first of them."""
    documents = manifests()
    service, job = documents["kubernetes-indexed-job.yaml"]
    (jobset,) = documents["kubernetes-jobset.yaml"]
    (workers,) = jobset["spec"]["replicatedJobs"]
    first_pods = (
        (job["spec"], f"{job['metadata']['name']}-0.{service['metadata']['name']}"),
        (
            workers["template"]["spec"],
            "{0}-{1}-0-0.{0}".format(jobset["metadata"]["name"], workers["name"]),
        ),
    )
    assert workers["replicas"] == 1
    pods = [spec["template"]["spec"] for spec, _ in first_pods]
    (container,), (other,) = (pod["containers"] for pod in pods)
    assert container | {"command": 0} == other | {"command": 0}
    assert container["command"][3:] == other["command"][3:]
    assert pods[0]["volumes"] == pods[1]["volumes"]
    for spec, first_pod in first_pods:
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        arguments = dict(a[2:].split("=") for a in container["command"] if a.startswith("--"))
        assert arguments == {
            "coordinator": f"{first_pod}:{container['ports'][0]['containerPort']}",
            "processes": str(spec["completions"]),
            "rank": "$(JOB_COMPLETION_INDEX)",
        }
        assert "JOB_COMPLETION_INDEX" in {variable["name"] for variable in container["env"]}
        assert spec["completionMode"] == "Indexed"
        assert spec["parallelism"] == spec["completions"] > 1
        assert (spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"  # a string: headless
    assert service["spec"]["ports"][0]["port"] == pod["containers"][0]["ports"][0]["containerPort"]
    assert jobset["spec"]["network"]["enableDNSHostnames"]


def test_the_commands_of_the_pods_are_a_job():
    """As Kubernetes starts them, but for names that only it has; it is asked nothing."""
    _, job = manifests()["kubernetes-indexed-job.yaml"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    python, path, coordinator, *rest = container["command"]
    assert (python, path) == ("python", f"/job/{JOB.name}")
    coordinator = re.sub(r"=.*", f"=127.0.0.1:{free_port()}", coordinator)
    command = [sys.executable, "-W", "error", str(JOB), coordinator, *rest, "--cpu-devices=1"]
    commands = [[a.replace("$(JOB_COMPLETION_INDEX)", str(i)) for a in command] for i in range(2)]
    pod = environment(KUBERNETES_SERVICE_HOST="10.0.0.1")  # JAX would warn of what it lacks to ask
    codes, text = run(*commands, env=[pod, pod])
    assert codes == [0, 0], text
    assert said(text, 2, 1), text


def test_every_file_stands_in_the_table():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in FOLDER.iterdir() if path.is_file()} - {"README.md"}
    assert {name for name in names if f"| `{name}` |" not in table} == set()
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.M)) == names
