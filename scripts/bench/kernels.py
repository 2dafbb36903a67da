"""The kernels, compiled for every target, width and dtype by the real compilers, with no TPU or GPU.

    python scripts/bench/kernels.py compile                    # all of it: some minutes
    python scripts/bench/kernels.py compile --target v6e:2x2   # one target
    python scripts/bench/kernels.py caches                     # over keys and values of 8 bits
    python scripts/bench/kernels.py compile --strategy fused    # with the exchange in a kernel too
    python scripts/bench/kernels.py memory                     # temp bytes beside the plain XLA form's
    python scripts/bench/kernels.py time                       # on a TPU or GPU, beside others' kernels

The first three need the extras `tpu` and `cuda-aot`. They compile whole calls, keys sharded over
the devices of the target.
The last one runs on the first device here: ours against theirs, ratios, and percent of the roofline.
"""

import argparse
import collections
import json
import statistics
import sys
import time
from pathlib import Path

import jax

sys.path[:0] = [str(Path(__file__).parents[2])]

from tests.kernel_calls import (  # noqa: E402
    CACHE_SLOTS,
    CALLS,
    GPU_TARGETS,
    TARGETS,
    arrays_like_keys,
    arrays_of_size,
    caches,
    compiled,
    decode_of_a_cache,
    launches,
    matrix,
)

# How many kernels the programs have, by strategy: where rows are few, fold and exchange are one.
KERNELS = {
    "butterfly": {"gradient": 3},
    "fused": {"prefill": 2, "gradient": 4},
}


def compile_all(targets: list[str], out: str | None, every: int, strategy: str) -> int:
    """Prints what fails, and a line for each target and call; returns how many failed."""
    failed, lines = 0, []
    seconds = collections.defaultdict(list)
    for target, call, width, dtype in matrix()[::every]:
        if target not in targets:
            continue
        if out:
            Path(out).write_text(json.dumps(lines, indent=1), encoding="utf-8")
        what = {"target": target, "call": call, "width": width, "dtype": dtype.__name__}
        began = time.monotonic()
        try:
            report = compiled(target, call, width, dtype, strategy=strategy)
        except Exception as error:  # noqa: BLE001 - all of them are listed
            failed += 1
            lines.append(what | {"error": str(error)[:1000]})
            print("FAILED", *what.values(), str(error)[:300].replace("\n", " "), flush=True)
            continue
        copies = arrays_like_keys(report, call, width)
        lines.append(
            what
            | {
                "seconds": round(report.seconds, 2),
                "kernels": launches(report),
                "temp_bytes": report.temp_bytes,
                "collectives": report.collectives,
                "copies": copies,
            }
        )
        # Gradients of float16 are rounded from float32 on a TPU.
        rounded = target not in GPU_TARGETS and (call, dtype) == ("gradient", jax.numpy.float16)
        copied = copies and not rounded
        # The query's gradient is summed by XLA.
        sent = strategy == "fused" and call != "gradient" and report.collectives
        if launches(report) != KERNELS[strategy].get(call, 1) or copied or sent:
            failed += 1
            print("WRONG", *what.values(), launches(report), copies, sent, flush=True)
        seconds[target, call].append(time.monotonic() - began)
    for (target, call), each in seconds.items():
        print(
            f"{target:12}{call:16}{len(each):4} programs, seconds: median "
            f"{statistics.median(each):.2f}, worst {max(each):.2f}"
        )
    if out:
        Path(out).write_text(json.dumps(lines, indent=1), encoding="utf-8")
    print(f"{len(lines)} programs, {failed} failed")
    return failed


def compile_caches(targets: list[str], every: int) -> int:
    """Compile decode over quantised caches; print what fails, and return how many did."""
    chosen = [x for x in caches()[::every] if x[0] in targets]
    failed = 0
    for target, dtype, width, kv_heads, layers in chosen:
        report = decode_of_a_cache(target, dtype, width, kv_heads, layers)
        copies = arrays_of_size(report, 2 * CACHE_SLOTS * kv_heads * width)
        if launches(report) != 1 or copies:
            failed += 1
            what = target, dtype.__name__, width, kv_heads, layers
            print("WRONG", *what, launches(report), copies, flush=True)
    print(f"{len(chosen)} programs over caches, {failed} failed")
    return failed


def memory(targets: list[str]) -> None:
    """Temp bytes of the kernels' programs and of the plain XLA form's."""
    print(f"{'target':12}{'call':16}{'kernels':>14}{'xla':>14}{'arguments':>14}")
    for target in targets:
        for call in CALLS:
            ours, theirs = (
                compiled(target, call, 128, jax.numpy.bfloat16, implementation=name)
                for name in (None, "xla")
            )
            print(
                f"{target:12}{call:16}{ours.temp_bytes:14,}{theirs.temp_bytes:14,}"
                f"{ours.argument_bytes:14,}",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("compile", "caches", "memory", "time"))
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--thin", type=int, default=1, help="every N-th program")
    parser.add_argument("--strategy", choices=tuple(KERNELS), default="butterfly")
    parser.add_argument("--out", help="JSON, a row for each program")
    parser.add_argument("--repeats", type=int, default=30, help="of what is timed")
    parser.add_argument("--small", action="store_true", help="time cases that a CPU can run")
    arguments = parser.parse_args()
    if arguments.what == "time":
        from kernel_contenders import time_all

        time_all(arguments.repeats, arguments.out, tiny=arguments.small)
        return 0
    sys.path.append(str(Path(sys.prefix, "compilers")))
    jax.config.update("jax_platforms", "cpu")
    targets = arguments.target or list(TARGETS)
    if arguments.what == "memory":
        memory(targets)
        return 0
    if arguments.what == "caches":
        return int(compile_caches(targets, arguments.thin) > 0)
    return int(compile_all(targets, arguments.out, arguments.thin, arguments.strategy) > 0)


if __name__ == "__main__":
    sys.exit(main())
