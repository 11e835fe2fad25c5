# SPDX-License-Identifier: Apache-2.0
"""Batches left out: which batch a step is trained on, that it stays so after a stop, and what a batch held."""

import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.batches import batch_number, data_offset, decoded_examples, say_if_data_moved, skipped_ranges
from train.data import DataConfig, build_train_dataset, build_train_loader, iter_from_step
from train.mixture import mixture_news

from .test_data import BATCH_SIZE, SEQ_LEN, batches, mesh_of, texts_of, tiny_data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("cache"))


entry = st.integers(0, 40) | st.tuples(st.integers(0, 40), st.integers(0, 8))


@given(st.lists(entry, max_size=6))
def test_a_step_is_trained_on_the_next_batch_that_is_not_left_out(entries):
    texts = [str(e) if isinstance(e, int) else f"{e[0]}-{e[0] + e[1]}" for e in entries]
    left_out = {n for e in entries for n in ([e] if isinstance(e, int) else range(e[0], e[0] + e[1] + 1))}
    skipped = skipped_ranges(texts)
    assert {n for one in skipped for n in one} == left_out
    remaining = [n for n in range(200) if n not in left_out]
    assert [batch_number(step, skipped) for step in range(101)] == [-1, *remaining[:100]]
    assert data_offset(7, 8, skipped) == 8 * remaining[7]


@pytest.mark.parametrize("wrong", ["5-", "-5", "9-5", "1,2", "all"])
def test_what_is_no_batch_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"skip_batches: '{wrong}' is neither the number of a batch, such as 57"):
        DataConfig(skip_batches=(wrong,))


def test_one_number_instead_of_a_list_is_refused():
    with pytest.raises(ValueError, match=r"skip_batches: 57 is no list; write \[57\]"):
        DataConfig(skip_batches=57)
    assert DataConfig(skip_batches=[57, "60-61"]).skip_batches == ("57", "60-61")


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_the_others_are_the_same_batches_from_any_step_on(prepared):
    everything = batches(prepared, 10)
    cfg = DataConfig(vocab_size=300, skip_batches=("0", "3-5", "7"))
    expected = [everything[number] for number in (1, 2, 6, 8, 9)]
    for start in range(5):
        resumed = batches(prepared, 5 - start, cfg=cfg, start=start)
        assert all(same(a, b) for a, b in zip(expected[start:], resumed, strict=True)), start


def test_a_batch_found_bad_is_left_out_from_the_checkpoint_before_it(prepared, caplog):
    """Steps 1 to 4 are done; batch 5 turns out bad; the run goes on, and nothing else is missed or read twice."""
    everything = batches(prepared, 8)
    cfg = DataConfig(vocab_size=300, skip_batches=("5",))
    resumed = {"step": 4, "data_offset": data_offset(4, BATCH_SIZE, ())}
    say_if_data_moved(resumed, SimpleNamespace(trainer=SimpleNamespace(batch_size=BATCH_SIZE), data=cfg))
    assert not [record for record in caplog.records if record.name.startswith("train")]
    with caplog.at_level(logging.INFO):
        dataset = build_train_dataset(prepared, cfg, SEQ_LEN, BATCH_SIZE, 0)
    assert "batches left out (data.skip_batches): 5" in caplog.text
    with iter_from_step(build_train_loader(dataset, mesh_of(1, 1), BATCH_SIZE), 4) as iterator:
        went_on = [next(iterator) for _ in range(3)]
    assert all(same(a, b) for a, b in zip([everything[n] for n in (4, 6, 7)], went_on, strict=True))
    assert mixture_news(dataset, 5) == ""
    assert mixture_news(dataset, 6) == "step 6: batch 5 is left out (data.skip_batches)"


@pytest.mark.parametrize(
    ("batch_size", "skip", "said"),
    [
        (8, ("2",), "stands before sequence 32 of the data, and this run goes on with number 40: 8 are trained on by"),
        (16, (), "goes on with number 64: 32 are trained on by no step"),
        (4, (), "goes on with number 16: 16 come a second time"),
    ],
)
def test_data_that_does_not_go_on_where_it_stopped_is_said(caplog, batch_size, skip, said):
    config = SimpleNamespace(trainer=SimpleNamespace(batch_size=batch_size), data=DataConfig(skip_batches=skip))
    say_if_data_moved({"step": 4, "data_offset": 32}, config)
    assert said in caplog.text


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_batch_can_be_read_as_text(prepared, packing):
    cfg = DataConfig(vocab_size=300, packing=packing, skip_batches=("1",))
    dataset = build_train_dataset(prepared, cfg, SEQ_LEN, BATCH_SIZE, 0)
    with iter_from_step(build_train_loader(dataset, mesh_of(1, 1), BATCH_SIZE), 1) as iterator:
        batch = next(iterator)  # of step 2: batch 2, since 1 is left out
    decoded = decoded_examples(dataset, prepared.tokenizer_dir, batch_number(2, dataset.skipped))
    assert [example.place for example in decoded] == list(range(BATCH_SIZE))
    for example, text in zip(decoded, texts_of(prepared, batch), strict=True):
        assert example.component == ("prose" if any(c in "aeinorst" for c in text) else "code")
        assert all(part.endswith("<|endoftext|>") for part in example.texts[:-1])
        without_ends = "".join(example.texts).replace("<|endoftext|>", "")
        assert without_ends.rstrip() == text.rstrip() if packing == "stream" else without_ends in text
        stored = dataset.mixture.datasets[example.component].as_sync_dataset()[example.number]
        assert np.array_equal(stored.tokens, batch.tokens[example.place])
    assert decoded_examples(dataset, prepared.tokenizer_dir, 2, limit=2) == decoded[:2]
