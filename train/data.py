# SPDX-License-Identifier: Apache-2.0
"""From texts to batches on the mesh: prepare once (corpus, tokenizer, token caches), then mix, shuffle and load.

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
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train import lev
from train.corpus import COMPONENTS, SPLITS, Corpus, build_corpus, build_once, python_documents
from train.tokenizer import TokenizerFiles, build_tokenizer, read_tokenizer, token_byte_lengths

if TYPE_CHECKING:
    from jax.sharding import Mesh

# Mesh axes that share the sequences of a batch.
BATCH_AXES = ("replica_dcn", "data")

# Part of every cache's name: raise it when the same texts and tokenizer would give other files.
CACHE_FORMAT = 1

Weights = dict[str, float]


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which proportions."""

    # Where corpus, tokenizer and token caches are kept. None: $GRUG_CACHE_DIR, or else ~/.cache/grug.
    cache_dir: str | None = None
    # Share of each component in the sequences trained on; or stages of (first step, shares), the first from step 0.
    # One sequence in eight is prose: it is a twentieth of the text, and is read through almost three times as often.
    weights: Weights | list[tuple[int, Weights]] = field(default_factory=lambda: {"prose": 0.125, "code": 0.875})
    # Directory of a byte-level BPE tokenizer. None: one with `vocab_size` tokens, trained on the corpus.
    tokenizer: str | None = None
    vocab_size: int = 4096
    # Sequences within which the shares hold exactly; stages begin at multiples of it.
    mixture_block_size: int = 64


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

    corpus: Corpus
    tokenizer: TokenizerFiles
    token_cache: Path  # <component>/<split>/, each a Levanter cache
    token_counts: dict[str, dict[str, int]]  # component -> split -> tokens
    baselines: dict[str, UnigramBaseline]
    byte_lengths: np.ndarray  # int32 [vocab_size]: bytes of text that a token stands for

    @property
    def tokenizer_dir(self) -> Path:
        return self.tokenizer.directory

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def components(self) -> tuple[str, ...]:
        return COMPONENTS


def tag_of(component: str) -> str:
    """A component's name in the metrics: eval/python/prose/loss; its parent is "python"."""
    return f"python/{component}"


def prepare(cfg: DataConfig, progress: Callable[[str], None] = print) -> PreparedData:
    """Builds corpus, tokenizer and token caches where they are missing (seconds), then reads what is known of them.

    Safe to stop at any moment and to start twice at once. Levanter is imported only if something must be tokenized.

    Raises:
      ValueError: a weight names no component; the tokenizer is none we can use; the cache is another tokenizer's.
    """
    weight_stages(cfg)
    cache_dir = cache_directory(cfg)
    corpus = build_corpus(cache_dir, python_documents(), progress)
    return prepare_corpus(cfg, cache_dir, corpus, progress)


def cache_directory(cfg: DataConfig) -> Path:
    return Path(cfg.cache_dir or os.environ.get("GRUG_CACHE_DIR") or "~/.cache/grug").expanduser()


def prepare_corpus(cfg: DataConfig, cache_dir: Path, corpus: Corpus, progress: Callable[[str], None]) -> PreparedData:
    """`prepare` from the tokenizer on, for a corpus that is there."""
    if cfg.tokenizer is None:
        tokenizer = build_tokenizer(cache_dir, corpus, cfg.vocab_size, progress)
    else:
        tokenizer = read_tokenizer(Path(cfg.tokenizer))
    byte_lengths = token_byte_lengths(tokenizer.directory)
    key = hashlib.sha256(f"{CACHE_FORMAT} {corpus.digest} {tokenizer.digest}".encode()).hexdigest()[:16]
    token_cache = build_once(
        cache_dir / f"tokens-{key}",
        lambda directory: _write_token_caches(directory, corpus, tokenizer, byte_lengths, progress),
        progress,
    )
    manifest = json.loads((token_cache / "manifest.json").read_text())
    _check_tokenizer(token_cache, manifest["tokenizer"], tokenizer)
    baselines = {name: UnigramBaseline(**values) for name, values in manifest["baselines"].items()}
    return PreparedData(corpus, tokenizer, token_cache, manifest["token_counts"], baselines, byte_lengths)


def weight_stages(cfg: DataConfig) -> list[tuple[int, Weights]]:
    """`cfg.weights` as stages of (first step, shares).

    Raises:
      ValueError: a name that is no component, shares that are negative or all zero, stages not in order from step 0.
    """
    stages = [(0, cfg.weights)] if isinstance(cfg.weights, dict) else [(step, shares) for step, shares in cfg.weights]
    steps = [step for step, _ in stages]
    if not steps or steps[0] != 0 or steps != sorted(set(steps)):
        raise ValueError(f"DataConfig.weights: stages begin at steps {steps}; they must ascend from step 0.")
    for step, shares in stages:
        if unknown := [name for name in shares if name not in COMPONENTS]:
            raise ValueError(
                f"DataConfig.weights: no component is called {', '.join(map(repr, unknown))} (stage of step {step})."
                f" Those there are: {', '.join(COMPONENTS)}."
            )
        if min(shares.values(), default=0) < 0 or sum(shares.values()) <= 0:
            raise ValueError(
                f"DataConfig.weights: {shares} (stage of step {step}); shares are at least 0 and their sum is above 0."
            )
    return stages


def build_train_dataset(prepared: PreparedData, cfg: DataConfig, seq_len: int, batch_size: int, seed: int):
    """The endless training mixture: a Levanter `MixtureDataset` of `GrugLmExample`s of seq_len tokens.

    Each component is one stream of whole documents, cut into sequences and shuffled; when it is exhausted it starts
    again (`mixture_metrics` says how often it has). Documents are told apart by segment ids.

    Raises:
      ValueError: a stage does not begin on a mixture block; a component is shorter than one sequence.
    """
    import jax

    stages = weight_stages(cfg)
    for step, _ in stages:
        if step * batch_size % cfg.mixture_block_size:
            raise ValueError(
                f"DataConfig.weights: the stage of step {step} begins at sequence {step} x batch_size {batch_size} ="
                f" {step * batch_size}, which is not a multiple of mixture_block_size={cfg.mixture_block_size}."
                f" {_nearest_stage_steps(step, batch_size, cfg.mixture_block_size)}"
            )
    for component in {name for _, shares in stages for name, share in shares.items() if share > 0}:
        if (tokens := prepared.token_counts[component]["train"]) < seq_len:
            raise ValueError(
                f"data: {component} has {tokens} tokens to train on, less than one sequence of seq_len={seq_len}."
                " Choose a smaller seq_len, or a weight of 0."
            )
    config = _levanter_config(prepared, stages, cfg.mixture_block_size)
    schedule = lev.BatchSchedule(batch_size)
    return config.train_mixture(lev.Axis("position", seq_len), schedule, key=jax.random.PRNGKey(seed))


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
    shards = mesh.shape["replica_dcn"] * mesh.shape["data"]
    if batch_size % shards:
        raise ValueError(
            f"data: batch_size={batch_size} is not a multiple of the mesh's {shards} data shards (replica_dcn"
            f" {mesh.shape['replica_dcn']} x data {mesh.shape['data']}): choose a multiple of it, or fewer shards."
        )


def iter_from_step(loader: Any, step: int) -> contextlib.closing:
    """Batches from number `step` on, as a context manager.

    Leave it before the process ends: an iterator that is not closed keeps its reading thread, and the interpreter
    aborts (exit code 134) at the end of an otherwise successful run.
    """
    return contextlib.closing(loader.iter_from_step(step))


def mixture_metrics(dataset: Any, step: int, batch_size: int) -> dict[str, float]:
    """The stage and shares that batch `step` is drawn with, and how many times each component has been read before."""
    block = step * batch_size // dataset.block_size
    starts = [start // dataset.block_size for start, _ in dataset.weight_stages]
    stage = sum(start <= block for start in starts) - 1
    metrics: dict[str, float] = {"mixture/stage": stage}
    for name, share in dataset.weight_stages[stage][1].items():
        metrics[f"mixture/weight/{name}"] = share
    for name, sequences in dataset.sequence_counts_before_block(block).items():
        metrics[f"mixture/epochs/{name}"] = sequences / len(dataset.datasets[name].as_sync_dataset())
    return metrics


def build_validation_sets(prepared: PreparedData, cfg: DataConfig, seq_len: int) -> dict[str, Any]:
    """Tag -> the held-out sequences of a component, as `GrugLmExample`s.

    They come in one fixed shuffled order, so that the first few of them are a sample of all documents.

    Raises:
      ValueError: there is a component without one whole sequence of held-out text.
    """
    import jax

    for component, counts in prepared.token_counts.items():
        if counts["validation"] < seq_len:
            raise ValueError(
                f"data: {component} has {counts['validation']} held-out tokens, less than one sequence of"
                f" seq_len={seq_len}: there is nothing to evaluate on. Choose a smaller seq_len."
            )
    config = _levanter_config(prepared, weight_stages(cfg), cfg.mixture_block_size)
    sequences = lev.Axis("position", seq_len)
    datasets = config.build_token_datasets(config.build_caches("validation"), sequences, split="validation")
    return {tag_of(name): dataset.shuffle(jax.random.PRNGKey(0)) for name, dataset in datasets.items()}


def _levanter_config(prepared: PreparedData, stages: list[tuple[int, Weights]], mixture_block_size: int):
    """Levanter's own configuration of what was prepared, after a look at who wrote the caches."""
    config = lev.LmDataConfig(
        tokenizer=str(prepared.tokenizer_dir),
        cache_dir=str(prepared.token_cache),
        auto_build_caches=False,
        components={name: lev.DatasetComponent(tags=[tag_of(name)]) for name in prepared.components},
        train_weights=stages,
        mixture_block_size=mixture_block_size,
        shuffle=lev.BlockShuffleConfig(io_block_size=16, window_blocks=32),
    )
    expected = _preprocessor(prepared.tokenizer_dir).metadata
    for component, split in itertools.product(prepared.components, SPLITS):
        path = prepared.token_cache / component / split
        written = lev.CacheLedger.load(str(path)).metadata.preprocessor_metadata
        # Levanter warns of a difference and goes on with the wrong ids. The path may differ: folders can be moved.
        if {**written, "tokenizer": None} != {**expected, "tokenizer": None}:
            raise ValueError(
                f"data: the token cache {path} was written by {written}, and this run would write it by {expected}."
                f" Delete {prepared.token_cache}; it is made anew at the next start."
            )
    return config


def _preprocessor(tokenizer_dir: Path):
    """Text to token ids; each document ends with the end-of-document token."""
    tokenizer = lev.load_tokenizer(str(tokenizer_dir))
    return lev.preprocessor_for_format(lev.TextLmDatasetFormat(), tokenizer, enforce_bos=True, enforce_eos=True)


def _write_token_caches(
    directory: Path, corpus: Corpus, tokenizer: TokenizerFiles, lengths: np.ndarray, progress: Callable[[str], None]
) -> None:
    """Fills `directory` with a Levanter cache for each component and split, and a manifest of what is in them."""
    progress("tokens: loading the data pipeline")
    preprocessor = _preprocessor(tokenizer.directory)
    token_counts, baselines, validation_bytes = {}, {}, {}
    for component in COMPONENTS:
        counts = {split: np.zeros(tokenizer.vocab_size, np.int64) for split in SPLITS}
        for split in SPLITS:
            texts = corpus.texts(component, split)
            for done, ids in _write_cache(directory / component / split, preprocessor, texts):
                counts[split] += np.bincount(ids, minlength=tokenizer.vocab_size)
                progress(f"tokens: {component}/{split} {done}/{len(texts)} documents")
        token_counts[component] = {split: int(counts[split].sum()) for split in SPLITS}
        held_out = "".join(corpus.texts(component, "validation")).encode()
        baselines[tag_of(component)] = _unigram_baseline(held_out, counts["train"], counts["validation"], lengths)
        validation_bytes[tag_of(component)] = int(counts["validation"] @ lengths)
    baselines |= {
        "macro": _mean(baselines, dict.fromkeys(baselines, 1)),
        "overall": _mean(baselines, validation_bytes),
    }
    manifest = {
        "tokenizer": asdict(tokenizer) | {"directory": str(tokenizer.directory)},
        "corpus_sha256": corpus.digest,
        "token_counts": token_counts,
        "baselines": {name: asdict(baseline) for name, baseline in baselines.items()},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _write_cache(directory: Path, preprocessor: Any, texts: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Writes one Levanter cache; yields, as it goes, the number of documents done and the newest token ids."""
    metadata = lev.CacheMetadata(preprocessor_metadata=preprocessor.metadata)
    with lev.SerialCacheWriter(str(directory), preprocessor.output_exemplar, metadata=metadata) as writer:
        for chunk in itertools.batched(enumerate(texts, 1), 64):
            rows = preprocessor([{"text": text} for _, text in chunk])
            writer.write_batch(rows)
            yield chunk[-1][0], np.concatenate([row["input_ids"] for row in rows])


def _unigram_baseline(text: bytes, train: np.ndarray, validation: np.ndarray, byte_lengths: np.ndarray):
    """train, validation [vocab_size]: how often each token occurs; text: the validation text."""
    byte_counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    byte_counts = byte_counts[byte_counts > 0]
    byte_entropy = -(byte_counts * np.log2(byte_counts / byte_counts.sum())).sum() / byte_counts.sum()
    # Adding one keeps a token that the training text never used from costing infinitely many bits.
    token_bits = -np.log2((train + 1) / (train + 1).sum())
    return UnigramBaseline(float(byte_entropy), float(validation @ token_bits / (validation @ byte_lengths)))


def _mean(baselines: dict[str, UnigramBaseline], weights: dict[str, int]) -> UnigramBaseline:
    rows = [[baseline.byte_bpb, baseline.token_bpb] for baseline in baselines.values()]
    return UnigramBaseline(*np.average(rows, axis=0, weights=[weights[tag] for tag in baselines]).tolist())


def _check_tokenizer(token_cache: Path, written_by: dict[str, Any], tokenizer: TokenizerFiles) -> None:
    """Ids of another tokenizer would be silently clamped to the vocabulary by the embedding lookup."""
    if written_by["digest"] != tokenizer.digest:
        raise ValueError(
            f"data: the token cache {token_cache} was written with the tokenizer {written_by['directory']}"
            f" ({written_by['vocab_size']} tokens, sha256 {written_by['digest'][:12]}), and this run uses"
            f" {tokenizer.directory} ({tokenizer.vocab_size} tokens, sha256 {tokenizer.digest[:12]}). Delete the cache;"
            " it is made anew at the next start."
        )


def _nearest_stage_steps(step: int, batch_size: int, block_size: int) -> str:
    """The steps around `step` at which a stage may begin."""
    every = block_size // np.gcd(batch_size, block_size)
    return f"Begin it at a multiple of {every} steps: {step // every * every} or {(step // every + 1) * every}."
