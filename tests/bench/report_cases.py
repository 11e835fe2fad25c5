# SPDX-License-Identifier: Apache-2.0
"""Saved runs as pytest-benchmark writes them, small and made up."""

import json
import math
from pathlib import Path
from typing import Any

GIB = 2**30
MACHINE = {"node": "here", "machine": "x86_64", "system": "Linux", "release": "6.1", "python_version": "3.12.1"}
MACHINE |= {"cpu": {"brand_raw": "A Processor @ 2.00GHz", "count": 2}}


def benchmark(
    name: str, group: str | None, seconds: float, *, rounds: int = 7, iqr: float = 0.0, **facts: Any
) -> dict[str, Any]:
    """One entry. In the names of facts, "__" stands for "/"."""
    return {
        "group": group,
        "name": name,
        "fullname": f"bench/bench_{group}.py::{name}",
        "params": {},
        "extra_info": {key.replace("__", "/"): value for key, value in facts.items()},
        "stats": {"median": seconds, "min": seconds, "mean": seconds, "iqr": iqr, "rounds": rounds},
    }


def saved(path: Path, benchmarks: list[dict[str, Any]], **overrides: Any) -> Path:
    content = {
        "machine_info": MACHINE,
        "commit_info": {"id": "0123456789abcdef", "dirty": True, "branch": "main"},
        "benchmarks": benchmarks,
        "datetime": "2026-11-21T13:00:00.123456+00:00",
        "version": "5.3.1",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | overrides))
    return path


def measured() -> list[dict[str, Any]]:
    facts = {"basis": "measured", "op": "attention", "dtype": "float32", "device": "cpu", "devices": 1}
    times = {("laptop", "xla"): 0.0151, ("laptop", "reference"): 0.0741, ("1x2048", "xla"): 0.075}
    return [
        benchmark(
            f"bench_attention[{shape}-{implementation}]",
            "attention",
            seconds,
            iqr=seconds / 10,
            shape=shape,
            implementation=implementation,
            passes="forward",
            temporary_mib=8.16,
            **facts,
        )
        for (shape, implementation), seconds in times.items()
    ]


def predicted() -> list[dict[str, Any]]:
    """Kernels of one shape for two chips; one of them is refused."""
    found = []
    for chip, speed in (("v5p", 1.0), ("v6e", 0.7)):
        facts = {"basis": "predicted", "op": "attention", "shape": "1x8192", "passes": "forward", "dtype": "bfloat16"}
        for i, implementation in enumerate(("pallas_tpu", "jax_splash", "tokamax_splash")):
            seconds = speed * 1e-3 * (1.2 + 0.45 * i)
            wave = [abs(math.sin((i + 1) * position / 9)) for position in range(64)]
            units = {f"strip__{unit}": [share * (1 - j / 9) for share in wave] for j, unit in enumerate(UNITS)}
            counted = {
                "cycles": int(seconds * 1.75e9),
                "matrix_busy": 0.71 - i / 5,
                "dma_wait_share": 0.02,
                "spills": i,
            }
            name = f"bench_attention_tpu[{chip}-{implementation}]"
            found.append(
                benchmark(
                    name, "attention", seconds, implementation=implementation, chip=chip, **facts, **counted, **units
                )
            )
    refusal = "VMEM: 18 MiB needed, 16 allowed; try block_q=512"
    found.append(benchmark("bench_attention_tpu[v6e-big]", "attention", 1e-9, implementation="pallas_tpu", chip="v6e"))
    found[-1]["extra_info"] |= facts | {"block_sizes": "2048x2048", "unsupported": refusal, "cycles": 7}
    return found


UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "SALU")


def compiled() -> list[dict[str, Any]]:
    """A step at three depths, unrolled and stacked, for a chip that it fills and one that it does not."""
    found = []
    for chip, available in (("v5p", 95.7 * GIB), ("v6e", 1.2 * GIB)):
        for variant, slope in (("base", 2.9), ("array_stacked", 0.02)):
            for layers in (12, 24, 48):
                size, code = GIB * layers // 200, int(2**20 * slope * layers)
                hbm = {
                    "hbm__arguments__parameters_bytes": size,
                    "hbm__arguments__optimizer_bytes": 2 * size,
                    "hbm__arguments__ema_bytes": size,
                    "hbm__arguments__batch_bytes": 8192,
                    "hbm__arguments__other_bytes": 512,
                    "hbm__arguments__padding_bytes": 4096,
                    "hbm__temporaries_bytes": size // 2,
                    "hbm__code_bytes": code,
                    "hbm__reserved_bytes": 4 * size + size // 2 + code + 12800,
                    "hbm__available_bytes": available,
                    "hbm__left_bytes": available - 4 * size - size // 2 - code - 12800,
                }
                seconds = 14 + slope * layers
                found.append(
                    benchmark(
                        f"bench_depth[{chip}-{variant}-{layers}]",
                        "depth",
                        seconds,
                        rounds=1,
                        basis="compiled",
                        op="train_step",
                        passes="step",
                        variant=variant,
                        num_layers=layers,
                        chip=chip,
                        topology=f"{chip}:2x2x1",
                        devices=4,
                        compile_cpu_seconds=seconds,
                        compile_seconds=seconds * 0.8,
                        stablehlo_lines=int(900 + 300 * slope * layers),
                        **hbm,
                    )
                )
    return found


def steps() -> list[dict[str, Any]]:
    flops = {"projections": 3e5, "attention": 1e5, "attention_causal": 5e4, "mlp": 6e5, "head": 4e5, "recompute": 1e6}
    return [
        benchmark(
            f"bench_step[{variant}]",
            "train_step",
            seconds,
            op="train_step",
            passes="step",
            variant=variant,
            device="cpu",
            devices=1,
            mfu_percent=18 / seconds,
            mfu_causal_percent=17.4 / seconds,
            hfu_percent=22.3 / seconds,
            tokens_per_second=2048 / seconds,
            peak_source="float32 matmul measured on this CPU",
            **{f"flops__{component}": count for component, count in flops.items()},
        )
        for variant, seconds in (("base", 0.41), ("levanter_base", 0.52), ("array_stacked", 0.43))
    ]


def everything() -> list[dict[str, Any]]:
    return [*measured(), *predicted(), *compiled(), *steps()]
