# SPDX-License-Identifier: Apache-2.0
"""Two tasks for lm-eval out of a run's own held-out text: no download, and the same for every run on that text.

grug_continuation   which of four continues a passage? The others are continuations of passages of other documents.
grug_held_out       whole documents: bits per byte, perplexity per word and per byte
"""

import bisect
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from train.corpus import build_once
from train.data import PreparedData, held_out_texts

CONTINUATION, HELD_OUT = "grug_continuation", "grug_held_out"

# Characters of a passage and of its continuation, which both end where a word does.
CONTEXT_LENGTH, CONTINUATION_LENGTH = 300, 100
NUM_CHOICES = 4
# Of each component: its documents come in the order of a hash, so that the first are a sample of all.
MAX_DOCUMENTS, MAX_CHARACTERS, MAX_PASSAGES, MAX_QUESTIONS = 1000, 200_000, 2000, 200

# Part of the folder's name: raise it when the same texts would give other tasks.
_FORMAT = 1

_WORD_END = re.compile(r"(?<=\S)(?=\s)")


class Passage(NamedTuple):
    document: int
    context: str
    continuation: str


def held_out_tasks(prepared: PreparedData, progress: Callable[[str], None] = print) -> Path:
    """The folder of both tasks, as lm-eval reads them (`--include`); written if it is not there."""
    # Absolute, since a task names its data by path: a folder that was moved is another one.
    root = prepared.cache_dir.resolve()
    texts_of = [[name, str(cache.splits["validation"]), cache.manifest] for name, cache in prepared.caches.items()]
    key = hashlib.sha256(json.dumps([_FORMAT, str(root), texts_of]).encode()).hexdigest()[:16]
    folder = root / f"lm-eval-{key}"

    def write(unfinished: Path) -> None:
        questions, documents = [], []
        for component, cache in prepared.caches.items():
            texts = held_out_texts(prepared, component, MAX_DOCUMENTS)
            questions += [question | {"component": component} for question in questions_of(texts)]
            sample = sample_of(texts)
            documents += [{"text": text, "component": component} for text in sample]
            progress(
                f"lm_eval: {HELD_OUT} has {len(sample)} of"
                f" {cache.manifest['splits']['validation']['documents']} held-out documents of {component},"
                f" {sum(map(len, sample))} characters"
            )
        for task, rows in ((CONTINUATION, questions), (HELD_OUT, documents)):
            random.Random(0).shuffle(rows)  # so that the first few (`limit`) are of every component
            if not rows:
                progress(f"lm_eval: too little held-out text for {task}: there will be no such task")
                continue
            (unfinished / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (unfinished / f"{task}.yaml").write_text(yaml.safe_dump(_task(task, folder), sort_keys=False))

    return build_once(folder, write, progress)


def passages_of(text: str, document: int) -> Iterator[Passage]:
    """Cuts a text into passages and their continuations, one after the other."""
    ends = [match.start() for match in _WORD_END.finditer(text)]
    start = 0
    while True:
        cut = bisect.bisect_left(ends, start + CONTEXT_LENGTH)
        end = bisect.bisect_left(ends, ends[cut] + CONTINUATION_LENGTH) if cut < len(ends) else len(ends)
        if end == len(ends):
            return
        # A "word" that goes on and on is data, not text.
        if ends[end] - start <= 2 * (CONTEXT_LENGTH + CONTINUATION_LENGTH):
            yield Passage(document, text[start : ends[cut]].strip(), text[ends[cut] : ends[end]])
        start = ends[end]


def questions_of(texts: Sequence[str]) -> list[dict[str, Any]]:
    """context, choices, label: at most MAX_QUESTIONS of them; none where too few documents are long enough."""
    draw = random.Random(0)
    passages = [passage for document, text in enumerate(texts) for passage in passages_of(text, document)]
    draw.shuffle(passages)
    passages, questions = passages[:MAX_PASSAGES], []
    for right in passages:
        if len(questions) == MAX_QUESTIONS:
            break
        others = {p.continuation for p in passages if p.document != right.document} - {right.continuation}
        if len(others) < NUM_CHOICES - 1:
            continue
        choices = draw.sample(sorted(others), NUM_CHOICES - 1)
        label = draw.randrange(NUM_CHOICES)
        choices.insert(label, right.continuation)
        questions.append({"context": right.context, "choices": choices, "label": label})
    return questions


def sample_of(texts: Sequence[str]) -> list[str]:
    """The first documents, MAX_CHARACTERS in all; the last of them is cut short."""
    sample, room = [], MAX_CHARACTERS
    for text in texts:
        if text[:room].strip():
            sample.append(text[:room])
            room -= len(sample[-1])
    return sample


def _task(task: str, folder: Path) -> dict[str, Any]:
    """What lm-eval reads. Fields are named, not put into templates, which would take a text "[1]" for a list."""
    where = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / f"{task}.jsonl")},
            "cache_dir": str(folder / "arrow"),
        },
        "test_split": "test",
        "metadata": {"version": _FORMAT},
    }
    if task == CONTINUATION:
        metrics = [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ]  # acc_norm: by the character
        return where | {
            "output_type": "multiple_choice",
            "fewshot_split": "test",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": "",  # a continuation begins with its own space
            "metric_list": metrics,
        }
    metrics = {
        "word_perplexity": "weighted_perplexity",
        "byte_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
    }
    return where | {
        "output_type": "loglikelihood_rolling",
        "num_fewshot": 0,
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": False} for name, how in metrics.items()
        ],
    }
