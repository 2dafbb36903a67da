"""Eight fake CPU devices and strict promotion for every test, set before JAX starts."""

import collections
import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import jax
import pytest

DEVICES = 8
# The compilers of TPUs and GPUs, with the default version of JAX: scripts/setup puts them where only this
# looks, since JAX looks for their devices in every process that finds them.
sys.path.append(str(Path(sys.prefix, "compilers")))


def _start_jax() -> None:
    """Configures JAX and starts its backend, so that no test can find, or make, another one."""
    # Half the time to compile, and the same HLO: what is tested is what programs compute and send.
    # If bits matter, a test asks for all optimisations (`FULLY_OPTIMIZED`).
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):  # and half of it again; the flag is gone since
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has started already: its devices will tell
        jax.config.update("jax_num_cpu_devices", DEVICES)
    devices = jax.devices()
    if [device.platform for device in devices] != ["cpu"] * DEVICES:
        raise pytest.UsageError(
            f"the tests need JAX with {DEVICES} CPU devices, but it has started with {devices}: "
            "let nothing that pytest loads before tests/conftest.py (a plugin, say) use JAX"
        )


_start_jax()


# Tests that run whole programs, mostly in new processes, or do not depend on the version of JAX: minutes.
DEFAULT_VERSION_ALONE = {
    "test_align.py",
    "test_cache_replicas.py",
    "test_check.py",
    "test_cluster_bench.py",
    "test_cluster_files.py",
    "test_compile.py",
    "test_distributed.py",
    "test_examples.py",
    "test_fixed_point.py",
    "test_cudnn.py",
    "test_fused.py",
    "test_generation.py",
    "test_kernels.py",
    "test_kernels_chosen.py",
    "test_kernels_compiled.py",
    "test_kernels_cores.py",
    "test_kernels_gpu.py",
    "test_kernels_masked.py",
    "test_kernels_quantised.py",
    "test_language_model.py",
    "test_launch.py",
    "test_reproducible.py",
    "test_reproducible_cache.py",
    "test_reproducible_training.py",
    "test_streaming.py",
    "test_training.py",
}
# The tests among these that show that a job of several processes starts, computes and survives on a
# version, that results are bitwise equal, and that kernels are right.
ON_ALL_VERSIONS = {
    "test_a_healthy_job",
    "test_a_host_is_lost_and_no_key",
    "test_any_number_of_devices",
    "test_around_cudnn",
    "test_blocks_that_no_row_can_see_are_not_visited",
    "test_devices_and_strategies",
    "test_inside",
    "test_reproducible_sum_over_devices",
    "test_those_who_are_left_go_on",
}


def pytest_sessionstart() -> None:
    """Interrupts are heard, and garbage is looked for less.

    A shell has those that it starts in the background ignore interrupts, and so would all whom tests start.
    Looking for garbage among the modules and what JAX caches took a twentieth of the time, or more.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--thin N`: every N-th of the parameters of a test, and nothing for the default version alone."""
    parser.addoption("--thin", type=int, default=1, help=pytest_addoption.__doc__)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Thins out what one test is run with; the same in every process, and at least one of each."""
    every = config.getoption("--thin")
    if every < 1:
        raise pytest.UsageError(f"--thin is {every}; it must be 1 (all) or more")
    if every == 1:
        return
    seen: collections.Counter[str] = collections.Counter()
    kept, left = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        whole = item.path.name in DEFAULT_VERSION_ALONE
        whole = whole and test.rpartition("::")[2] not in ON_ALL_VERSIONS
        drop = whole or seen[test] % every
        (left if drop else kept).append(item)
        seen[test] += 1
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


@pytest.fixture(scope="module")
def example(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Import the example that a test module names as `EXAMPLE`, with its neighbours importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent / "examples")
        yield importlib.import_module(request.module.EXAMPLE)


@pytest.fixture
def elsewhere() -> dict[str, Any]:
    """Return shardings and a strategy, none of them the default."""
    mesh = jax.make_mesh((8,), ("kv",))
    query, key = (jax.NamedSharding(mesh, jax.P(None, *axes)) for axes in (("kv", None), ("kv",)))
    return {"query_sharding": query, "key_value_sharding": key, "strategy": "ring"}


@pytest.fixture
def arriving(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], dict[str, Any]]:
    """arriving(adapter): the keywords that its attention gets from then on; it returns the query."""

    def record(adapter: ModuleType) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def attention(query: Any, *arrays: Any, **keywords: Any) -> Any:
            del arrays
            seen.update(keywords)
            return query

        monkeypatch.setattr(adapter, "dot_product_attention", attention)
        return seen

    return record


@pytest.fixture(scope="module")
def standard_promotion() -> Iterator[None]:
    """Not strict in here: optax takes a float to the power of an int32 (Adam's bias correction)."""
    with jax.numpy_dtype_promotion("standard"):
        yield


hypothesis.settings.register_profile(
    "distattn",
    deadline=None,  # the first example of each shape compiles
    derandomize="CI" in os.environ,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # arrays are drawn on a busy machine
)
hypothesis.settings.load_profile("distattn")
