# SPDX-License-Identifier: Apache-2.0
"""From texts to batches on the mesh: prepare once (texts, tokenizer, token caches), then mix, shuffle and load.

    prepared = prepare(cfg)
    dataset = build_train_dataset(prepared, cfg, seq_len, batch_size, seed)
    loader = build_train_loader(dataset, mesh, batch_size)
    with iter_from_step(loader, step) as batches:
        batch = next(batches)

Example number i of the mixture is a function of (i, seed): batch k is the same whether or not the run was stopped
before it, and a step number is all a checkpoint has to know about data.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train import lev, together
from train.batches import TrainSequences, skipped_ranges
from train.corpus import COMPONENTS, Corpus, CorpusComponent, build_corpus, python_documents
from train.data_config import DataConfig, cache_directory, components_of, tag_of, weight_stages
from train.mesh import BATCH_AXES, batch_shards
from train.mixture import check_blocks, trained_on
from train.sources import Source
from train.token_cache import (
    TokenCache,
    adopt_token_cache,
    build_token_cache,
    check_preprocessor,
    is_levanter_cache,
    levanter_caches,
)
from train.tokenizer import TokenizerFiles, build_tokenizer, check_byte_lengths, read_tokenizer, token_byte_lengths

if TYPE_CHECKING:
    from jax.sharding import Mesh

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnigramBaseline:
    """Bits per byte of a model that knows how often things occur and nothing of their order: the ones to be below."""

    byte_bpb: float  # entropy of the validation text's own bytes
    token_bpb: float  # its tokens, coded with their (add-one smoothed) frequencies in the training text


@dataclass(frozen=True)
class PreparedData:
    """Everything on disk, and what is known of it.

    `baselines` has a row per tag, over the whole of its validation text; "macro", the mean of the tags, to compare with
    eval/macro_bpb; and "overall", weighted by bytes. (eval/bpb weights the tags by what was evaluated of each.)
    """

    tokenizer: TokenizerFiles
    cache_dir: Path
    caches: dict[str, TokenCache]  # component -> its tokens
    baselines: dict[str, UnigramBaseline]
    byte_lengths: np.ndarray  # [vocab_size]: bytes of text that a token stands for

    @property
    def tokenizer_dir(self) -> Path:
        return self.tokenizer.directory

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.caches)

    @property
    def token_counts(self) -> dict[str, dict[str, int]]:
        """Component -> split -> tokens."""
        return {name: cache.token_counts for name, cache in self.caches.items()}


def prepare(cfg: DataConfig, progress: Callable[[str], None] = print) -> PreparedData:
    """Builds corpus, tokenizer and token caches where they are missing, then reads what is known of them.

    Safe to stop at any moment and to start twice at once. Levanter is imported only if something must be tokenized.
    Of several processes process 0 builds; the others find what it built, or, on a disk of their own, build it again.

    Raises:
      ValueError: a weight names no component; a source or the tokenizer is none we can use; a cache is another's; the
        processes of the run have other texts.
      FileNotFoundError: there is no such file.
    """
    with together.first_process_first("preparing data"):
        prepared = _prepare(cfg, progress)
    facts = {"tokenizer": prepared.tokenizer.digest}
    facts |= {name: cache.manifest["splits"] | cache.manifest["baseline"] for name, cache in prepared.caches.items()}
    together.check_same(
        "data", facts, "Give all processes the same files, and the same Python where its texts are used."
    )
    return prepared


def _prepare(cfg: DataConfig, progress: Callable[[str], None]) -> PreparedData:
    weight_stages(cfg)
    for source in _sources(cfg):
        source.check()
    _adopted(cfg)
    cache_dir = cache_directory(cfg)
    corpus = None
    if set(components_of(cfg)) & set(COMPONENTS):
        corpus = build_corpus(cache_dir, python_documents(), progress)
    return prepare_corpus(cfg, cache_dir, corpus, progress)


def prepare_corpus(
    cfg: DataConfig, cache_dir: Path, corpus: Corpus | None, progress: Callable[[str], None]
) -> PreparedData:
    """`prepare` from the tokenizer on, for a corpus that is there; None: there are sources alone."""
    built_in = [CorpusComponent(corpus, name) for name in components_of(cfg) if corpus and name in COMPONENTS]
    texts = built_in + _sources(cfg)
    tokenizer = _tokenizer(cfg, cache_dir, texts, progress)
    lengths = token_byte_lengths(tokenizer)
    caches = {
        component.name: build_token_cache(cache_dir, component, tokenizer, lengths, progress) for component in texts
    }
    for name, splits in _adopted(cfg).items():
        caches[name] = adopt_token_cache(cache_dir, name, splits, tokenizer, lengths, progress)
    caches = {name: caches[name] for name in components_of(cfg)}
    held_out_bytes = {name: cache.manifest["held_out_bytes"] for name, cache in caches.items()}
    byte_lengths = check_byte_lengths(lengths, held_out_bytes)
    return PreparedData(tokenizer, cache_dir, caches, _baselines(caches), byte_lengths)


def _sources(cfg: DataConfig) -> list[Source]:
    """The sources that are to be tokenized."""
    held_out, fields = cfg.held_out or {}, cfg.text_fields or {}
    return [
        Source(name, path, held_out.get(name), fields.get(name, "text"), cfg.hold_out_every)
        for name, path in sorted((cfg.sources or {}).items())
        if not is_levanter_cache(path)
    ]


def _adopted(cfg: DataConfig) -> dict[str, dict[str, Path]]:
    """The sources that are Levanter caches already, by split."""
    return {
        name: levanter_caches(name, path, (cfg.held_out or {}).get(name))
        for name, path in sorted((cfg.sources or {}).items())
        if is_levanter_cache(path)
    }


def _tokenizer(cfg: DataConfig, cache_dir: Path, texts: list[Any], progress: Callable[[str], None]) -> TokenizerFiles:
    if cfg.tokenizer is not None:
        return read_tokenizer(Path(cfg.tokenizer))
    if adopted := ", ".join(_adopted(cfg)):
        raise ValueError(
            f"data.sources: {adopted}: a Levanter cache holds the ids of the tokenizer it was written"
            " with; name its directory in data.tokenizer."
        )
    digest = hashlib.sha256(" ".join(component.digest for component in texts).encode()).hexdigest()

    def training_texts() -> list[Any]:
        return [
            (record.text for split, record in component.documents() if split == "train" and not record.problem)
            for component in texts
        ]

    return build_tokenizer(cache_dir, digest, training_texts, cfg.vocab_size, progress)


def _baselines(caches: dict[str, TokenCache]) -> dict[str, UnigramBaseline]:
    rows = {tag_of(name): UnigramBaseline(**cache.manifest["baseline"]) for name, cache in caches.items()}
    held_out_bytes = {tag_of(name): cache.manifest["held_out_bytes"][0] for name, cache in caches.items()}
    return rows | {"macro": _mean(rows, dict.fromkeys(rows, 1)), "overall": _mean(rows, held_out_bytes)}


def build_train_dataset(
    prepared: PreparedData, cfg: DataConfig, seq_len: int, batch_size: int, seed: int
) -> TrainSequences:
    """The endless training mixture: Levanter's, of `GrugLmExample`s of seq_len tokens, without what is to be skipped.

    Each component is one stream of whole documents, cut into sequences and shuffled (or, with packing="documents", rows
    of whole documents, shuffled); when it is exhausted it starts again (`mixture_metrics` says how often it has).
    Documents are told apart by segment ids, and padding has id -1.

    Raises:
      ValueError: a stage does not begin on a mixture block; a component is shorter than one sequence.
    """
    import jax

    stages = weight_stages(cfg)
    check_blocks(stages, batch_size, cfg.mixture_block_size)
    _check_enough(prepared, cfg, "train", trained_on(stages), seq_len)
    config = _levanter_config(prepared, cfg)
    schedule = lev.BatchSchedule(batch_size)
    mixture = config.train_mixture(lev.Axis("position", seq_len), schedule, key=jax.random.PRNGKey(seed))
    if cfg.packing == "documents":
        for name, dataset in mixture.datasets.items():
            _say_what_is_cut(name, dataset.dataset, seq_len)
    skipped = skipped_ranges(cfg.skip_batches)
    if skipped:
        log.info("batches left out (data.skip_batches): %s", ", ".join(cfg.skip_batches))
    return TrainSequences(mixture, batch_size, skipped)


def build_train_loader(dataset: Any, mesh: "Mesh", batch_size: int):
    """A loader of `GrugLmExample` batches on `mesh`, sequences split over `BATCH_AXES`, read ahead in the background.

    tokens int32 [batch, seq_len]; loss_weight float32 [batch, seq_len], 0 at the last position, which has no next
    token; attn_mask.segment_ids: a pair (queries, keys) of int32 [batch, seq_len].

    Raises:
      ValueError: the batch does not divide over the mesh.
    """
    check_batch_size(batch_size, mesh)
    return lev.DataLoader(
        dataset,
        batch_size,
        mesh=mesh,
        axis_resources={"batch": BATCH_AXES},
        max_buffered_batches=8,
        fetch_batch_size=8,
    )


def check_batch_size(batch_size: int, mesh: "Mesh") -> None:
    """Raises ValueError unless every data shard of `mesh` gets the same number of sequences."""
    if batch_size % (shards := batch_shards(mesh)):
        axes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
        raise ValueError(
            f"data: batch_size={batch_size} is not a multiple of the mesh's {shards} data shards ({axes}): choose a"
            " multiple of it, or fewer shards."
        )


def iter_from_step(loader: Any, step: int) -> contextlib.closing:
    """Batches from number `step` on, as a context manager.

    Leave it before the process ends: an iterator that is not closed keeps its reading thread, and the interpreter
    aborts (exit code 134) at the end of an otherwise successful run.
    """
    return contextlib.closing(loader.iter_from_step(step))


def build_validation_sets(prepared: PreparedData, cfg: DataConfig, seq_len: int) -> dict[str, Any]:
    """Tag -> the held-out sequences of a component, as `GrugLmExample`s.

    They come in one fixed shuffled order, so that the first few of them are a sample of all documents.

    Raises:
      ValueError: there is a component without one whole sequence of held-out text.
    """
    import jax

    _check_enough(prepared, cfg, "validation", set(prepared.components), seq_len)
    config = _levanter_config(prepared, cfg)
    caches = {
        name: lev.load_lm_dataset_cache(
            str(cache.splits["validation"]), lev.TextLmDatasetFormat(), config.the_tokenizer
        )
        for name, cache in prepared.caches.items()
    }
    datasets = config.build_token_datasets(caches, lev.Axis("position", seq_len), split="validation")
    if cfg.packing == "documents":
        for name, dataset in datasets.items():
            _say_what_is_cut(f"{name}, held out", dataset, seq_len)
    return {tag_of(name): dataset.shuffle(jax.random.PRNGKey(0)) for name, dataset in datasets.items()}


def held_out_texts(prepared: PreparedData, component: str, limit: int | None = None) -> list[str]:
    """The first `limit` held-out documents of a component, or all, as text."""
    from tokenizers import Tokenizer

    cache = _load_cache(prepared, component, "validation")
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_dir / "tokenizer.json"))
    rows = cache.get_batch_sync(list(range(min(len(cache), limit or len(cache)))))
    # Levanter writes a space before the end of a document.
    return [text.removesuffix(" ") for text in tokenizer.decode_batch([row["input_ids"].tolist() for row in rows])]


def _load_cache(prepared: PreparedData, component: str, split: str) -> Any:
    path, tokenizer = prepared.caches[component].splits[split], lev.load_tokenizer(str(prepared.tokenizer_dir))
    return lev.load_lm_dataset_cache(str(path), lev.TextLmDatasetFormat(), tokenizer)


def _check_enough(prepared: PreparedData, cfg: DataConfig, split: str, components: set[str], seq_len: int) -> None:
    """Raises ValueError where a stream is shorter than one sequence. (A single document makes a padded one.)"""
    meant, advice = {
        "train": ("tokens to train on", "Choose a smaller seq_len, or a weight of 0."),
        "validation": ("held-out tokens", "There is nothing to evaluate on: choose a smaller seq_len."),
    }[split]
    for name in filter(components.__contains__, prepared.components):
        if cfg.packing == "stream" and (tokens := prepared.token_counts[name][split]) < seq_len:
            raise ValueError(
                f"data: {name} has {tokens} {meant}, less than one sequence of seq_len={seq_len}. {advice}"
            )


def _levanter_config(prepared: PreparedData, cfg: DataConfig) -> Any:
    """Levanter's own configuration of what was prepared, after a look at who wrote the caches."""
    for cache in prepared.caches.values():
        for path in cache.splits.values():
            check_preprocessor(path, prepared.tokenizer)
    components = {
        name: lev.DatasetComponent(
            cache_dir=str(cache.splits["train"]),
            flat_cache=True,  # the path as it is, no /train after it
            pack=cfg.packing == "documents",
            tags=[tag_of(name)],
        )
        for name, cache in prepared.caches.items()
    }
    return lev.LmDataConfig(
        tokenizer=str(prepared.tokenizer_dir),
        auto_build_caches=False,
        components=components,
        train_weights=weight_stages(cfg),
        mixture_block_size=cfg.mixture_block_size,
        shuffle=lev.BlockShuffleConfig(io_block_size=16, window_blocks=32),
    )


def _say_what_is_cut(name: str, dataset: Any, seq_len: int) -> None:
    """Levanter keeps the first seq_len tokens of a longer document, and drops the rest."""
    lengths = dataset.packed._lengths["input_ids"]
    rows = len(dataset.packed._pack_indices)
    lost = np.maximum(lengths - seq_len, 0)
    log.info("%s: %d documents in %d sequences, %.0f %% of them text", name, len(lengths), rows,
             100 * (lengths.sum() - lost.sum()) / (rows * seq_len))  # fmt: skip
    if lost.any():
        log.warning(
            "%s: %d of %d documents are longer than seq_len=%d and lose their ends, %.1f %% of all tokens."
            " --data.packing stream keeps them.",
            *(name, np.count_nonzero(lost), len(lengths), seq_len, 100 * lost.sum() / lengths.sum()),
        )


def _mean(baselines: dict[str, UnigramBaseline], weights: dict[str, int]) -> UnigramBaseline:
    rows = [[baseline.byte_bpb, baseline.token_bpb] for baseline in baselines.values()]
    return UnigramBaseline(*np.average(rows, axis=0, weights=[weights[tag] for tag in baselines]).tolist())
