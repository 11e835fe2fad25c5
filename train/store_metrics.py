# SPDX-License-Identifier: Apache-2.0
"""`data/tensorstore/*`: how often TensorStore read and wrote, and from where, every N steps.

LEVANTER_LOG_TENSORSTORE_METRICS_EVERY=N turns it on. Names of those that Levanter has are Levanter's; it has them in a
module that imports its trainer, which takes ten seconds.
"""

import os
from typing import Any

VARIABLE = "LEVANTER_LOG_TENSORSTORE_METRICS_EVERY"

COUNTERS = {
    "cache_hit_count": "/tensorstore/cache/hit_count",
    "cache_miss_count": "/tensorstore/cache/miss_count",
    "cache_evict_count": "/tensorstore/cache/evict_count",
    "cache_chunk_reads": "/tensorstore/cache/chunk_cache/reads",
    "cache_chunk_writes": "/tensorstore/cache/chunk_cache/writes",
    "gcs_read_count": "/tensorstore/kvstore/gcs/read",
    "gcs_bytes_read": "/tensorstore/kvstore/gcs/bytes_read",
    "gcs_grpc_read_count": "/tensorstore/kvstore/gcs_grpc/read",
    "gcs_grpc_bytes_read": "/tensorstore/kvstore/gcs_grpc/bytes_read",
    # Not among Levanter's: local files.
    "file_read_count": "/tensorstore/kvstore/file/read",
    "file_bytes_read": "/tensorstore/kvstore/file/bytes_read",
    "file_write_count": "/tensorstore/kvstore/file/write",
    "file_bytes_written": "/tensorstore/kvstore/file/bytes_written",
}


def store_metrics_every() -> int | None:
    """Steps between two rows, as the environment says; None where it says nothing, or 0: no rows.

    Raises:
      ValueError: it says something that is no such number.
    """
    text = os.environ.get(VARIABLE, "0").strip()
    if not text.isdecimal():
        raise ValueError(
            f"{VARIABLE}={text!r} is no number of steps. Expected a whole number, such as 100, for data/tensorstore/*"
            " of every 100th step; 0, or the variable unset, for none."
        )
    return int(text) or None


class StoreMetrics:
    """What TensorStore has counted since the process began, and since the row before. every: None, for no rows."""

    def __init__(self, every: int | None):
        self._every = every
        self._before = _totals() if every else {}

    def of(self, step: int) -> dict[str, float]:
        """If it is due, `data/tensorstore/<counter>_total`, `_delta`, and what share of reads the cache answered."""
        if not self._every or step % self._every:
            return {}
        before, now = self._before, _totals()
        self._before = now
        metrics = {f"{name}_total": total for name, total in now.items()}
        metrics |= {f"{name}_delta": total - before.get(name, 0.0) for name, total in now.items()}
        for ending in ("total", "delta"):
            hits, misses = (metrics.get(f"cache_{kind}_count_{ending}", 0.0) for kind in ("hit", "miss"))
            if hits + misses:
                metrics[f"cache_hit_rate_{ending}"] = hits / (hits + misses)
        return {f"data/tensorstore/{name}": value for name, value in metrics.items()}


def _totals() -> dict[str, float]:
    """Counters that TensorStore's build knows; those of a store that was never opened are zero."""
    import tensorstore

    found: dict[str, Any] = {}
    for metric in tensorstore.experimental_collect_matching_metrics("/tensorstore/", include_zero_metrics=True):
        found[metric["name"]] = metric["values"]
    return {
        name: float(sum(value.get("value", 0) for value in found[path]))
        for name, path in COUNTERS.items()
        if path in found
    }
