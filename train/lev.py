# SPDX-License-Identifier: Apache-2.0
"""The only door to Levanter: every name this project takes from it, in one table.

`from train import lev; lev.DataLoader(...)` imports Levanter at first use, not before: it costs nine seconds, which
`--help`, the kernels, the models and their tests do not pay. `import_in_background()` hides some of them.
"""

import importlib
import os
import threading
from typing import Any

SOURCES = {
    # data
    "Axis": "haliax",
    "axis_mapping": "haliax",
    "LmDataConfig": "levanter.data.text.datasets",
    "DatasetComponent": "levanter.data.text.datasets",
    "BlockShuffleConfig": "levanter.data.text.datasets",
    "TextLmDatasetFormat": "levanter.data.text.formats",
    "preprocessor_for_format": "levanter.data.text.formats",
    "GrugLmExample": "levanter.data.text.examples",
    "DataLoader": "levanter.data.loader",
    "BatchSchedule": "levanter.schedule",
    "load_tokenizer": "levanter.tokenizers",
    "SerialCacheWriter": "levanter.store.cache",
    "CacheLedger": "levanter.store.cache",
    "CacheMetadata": "levanter.store.cache",
    "load_lm_dataset_cache": "levanter.data.text.cache",
    # files of texts
    "url_to_fs": "fsspec.core",
    "ParquetFile": "pyarrow.parquet",
    "ArrowInvalid": "pyarrow",
    "ZstdDecompressor": "zstandard",
    "ZstdError": "zstandard",
    "load_dataset": "datasets",
    # examples with named axes, for what else of Levanter's one may want to call
    "LmExample": "levanter.models.lm_model",
    "LmEvalExample": "levanter.eval",
    "_ensure_named_lm_example": "levanter.eval",
    "grug_attention_mask_from_named": "levanter.data.text.examples",
    "named_attention_mask_from_grug": "levanter.data.text.examples",
    "grug_lm_example_from_named": "levanter.data.text.examples",
    "named_lm_example_from_grug": "levanter.data.text.examples",
    # evaluation
    "TaggedEvaluator": "levanter.eval",
    "eval_model": "levanter.eval",
    # checkpoints
    "Checkpointer": "levanter.checkpoint",
    "CheckpointInterval": "levanter.checkpoint",
    "save_checkpoint": "levanter.checkpoint",
    "load_checkpoint": "levanter.checkpoint",
    "TensorStoreReadConfig": "levanter.tensorstore_serialization",
    "read_manifest": "levanter.checkpoint_manifest",
    "discover_checkpoint_candidates": "levanter.checkpoint",
    # tracking
    "BackgroundTracker": "levanter.tracker",
    "SummaryStats": "levanter.tracker.histogram",
    "Histogram": "levanter.tracker.histogram",
    "JsonLoggerConfig": "levanter.tracker.json_logger",
    "TensorboardConfig": "levanter.tracker.tensorboard",
    "WandbConfig": "levanter.tracker.wandb",
}

# Read by Levanter and its dependencies while they are imported: without git, without a network, without an account.
_QUIET = {
    "GIT_PYTHON_REFRESH": "quiet",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def __getattr__(name: str) -> Any:
    if name not in SOURCES:
        raise AttributeError(f"train.lev has no {name!r}: add it to train.lev.SOURCES with the module it comes from")
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    return getattr(importlib.import_module(SOURCES[name]), name)


def import_in_background() -> threading.Thread:
    """Starts importing everything in the table; a later use waits for what it needs."""
    thread = threading.Thread(target=lambda: [__getattr__(name) for name in SOURCES], daemon=True)
    thread.start()
    return thread
