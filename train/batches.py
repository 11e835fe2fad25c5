# SPDX-License-Identifier: Apache-2.0
"""Which batch a step is trained on, and what was in it.

Batches are numbered from 0, steps from 1: step s is trained on batch s - 1, unless batches are left out.

    batch_number(58, ())                        57
    batch_number(58, skipped_ranges(["57"]))    58: batch 57 is trained on by nobody

A batch number means the same whatever is left out, so that a list of bad batches can grow, and a run that goes on from
any checkpoint knows from its step and the list alone where it stands.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

# Ascending ranges of batch numbers that neither touch nor overlap.
Skipped = Sequence[range]


def skipped_ranges(entries: Iterable[str]) -> list[range]:
    """Batch numbers ("57") and ranges with both ends in ("100-120") as ascending ranges.

    Raises:
      ValueError: an entry is neither.
    """
    ranges: list[range] = []
    for entry in entries:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", entry.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if first > last:
            raise ValueError(
                f"DataConfig.skip_batches: {entry!r} is neither the number of a batch, such as 57, nor a range of them,"
                " such as 100-120."
            )
        ranges.append(range(first, last + 1))
    merged: list[range] = []
    for one in sorted(ranges, key=lambda one: one.start):
        if merged and one.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, one.stop))
        else:
            merged.append(one)
    return merged


def batch_number(step: int, skipped: Skipped) -> int:
    """The batch that step `step` is trained on, steps counted from 1 as in metrics; -1 for step 0, before the first."""
    batch = step - 1
    for left_out in skipped:
        if step > 0 and left_out.start <= batch:
            batch += len(left_out)
    return batch


def data_offset(step: int, batch_size: int, skipped: Skipped) -> int:
    """Number of the first sequence of the mixture that is not dealt with after `step` steps: of the next batch."""
    return batch_number(step + 1, skipped) * batch_size


def say_if_data_moved(resumed: dict[str, Any] | None, config: Any) -> None:
    """Warns where the data does not go on where the checkpoint left it. resumed: the checkpoint's metadata.

    Another batch size, or a batch left out that is behind us already, moves everything that follows.
    """
    if not resumed or "data_offset" not in resumed:
        return
    step, before = resumed["step"], resumed["data_offset"]
    now = data_offset(step, config.trainer.batch_size, skipped_ranges(config.data.skip_batches))
    if now != before:
        consequence = (
            f"{now - before} are trained on by no step" if now > before else f"{before - now} come a second time"
        )
        log.warning(
            "the checkpoint of step %d stands before sequence %d of the data, and this run goes on with number %d: %s."
            " data.skip_batches or trainer.batch_size is another; batches that are left out should be ahead.",
            *(step, before, now, consequence),
        )


class TrainSequences:
    """The mixture without the batches that are left out: what Levanter's DataLoader asks of a dataset, and no more.

    Sequence i belongs to step i // batch_size + 1.
    """

    def __init__(self, mixture: Any, batch_size: int, skipped: Skipped):
        self.mixture = mixture  # a Levanter MixtureDataset
        self.batch_size = batch_size
        self.skipped = skipped

    def is_finite(self) -> bool:
        return False

    async def getitem_async(self, index: int) -> Any:
        return await self.mixture.getitem_async(self._in_mixture(index))

    async def get_batch(self, indices: Sequence[int]) -> Sequence[Any]:
        return await self.mixture.get_batch([self._in_mixture(index) for index in indices])

    def _in_mixture(self, index: int) -> int:
        step, place = divmod(int(index), self.batch_size)
        return batch_number(step + 1, self.skipped) * self.batch_size + place


class DecodedExample(NamedTuple):
    """One sequence of a batch. `place` is its row in the batch, `number` its own in the component's shuffled ones."""

    place: int
    component: str
    number: int
    texts: list[str]  # of each document, or part of one, in the sequence


def decoded_examples(
    dataset: TrainSequences, tokenizer_dir: Path, batch: int, limit: int | None = None
) -> list[DecodedExample]:
    """What batch number `batch` holds, as text: its first `limit` sequences, or all."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    first = batch * dataset.batch_size
    numbers = range(first, first + min(limit or dataset.batch_size, dataset.batch_size))
    decoded = []
    for number, example in zip(numbers, dataset.mixture.as_sync_dataset().get_batch(numbers), strict=True):
        tokens = np.asarray(example.tokens)
        segment_ids = np.asarray(example.attn_mask.segment_ids[0])
        parts = [tokens[part] for part in documents_in(segment_ids) if segment_ids[part.start] >= 0]
        component, index = _origin(dataset.mixture, number)
        texts = [tokenizer.decode(part.tolist(), skip_special_tokens=False) for part in parts]
        decoded.append(DecodedExample(number - first, component, index, texts))
    return decoded


def documents_in(segment_ids: "np.ndarray") -> list[slice]:
    """The runs of equal ids in a row; those of a negative id are padding."""
    import numpy as np

    ends = [*(np.flatnonzero(np.diff(segment_ids)) + 1).tolist(), len(segment_ids)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _origin(mixture: Any, number: int) -> tuple[str, int]:
    """Component and sequence in it of sequence `number`: the mixture's own arithmetic, which has no public name."""
    block, place = divmod(number, mixture.block_size)
    component, index = mixture._index_into_dataset_for_id(mixture._get_block(block)[place], block)
    name = mixture.dataset_index[component]
    return name, index % len(mixture.datasets[name].as_sync_dataset())
