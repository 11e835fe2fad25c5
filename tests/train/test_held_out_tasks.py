# SPDX-License-Identifier: Apache-2.0
"""Tasks for lm-eval out of held-out text: the same every time, and fair."""

import dataclasses
import json
import random

import pytest

from tests.train.tiny import FLAGS
from train.corpus import COMPONENTS, Document, build_corpus
from train.data import DataConfig, held_out_texts, prepare, prepare_corpus
from train.held_out_tasks import CONTINUATION_LENGTH, MAX_CHARACTERS, held_out_tasks, passages_of, questions_of


@pytest.fixture(scope="module")
def prepared(grug_cache):
    return prepare(DataConfig(cache_dir=str(grug_cache), vocab_size=FLAGS["--data.vocab-size"]), lambda _: None)


def test_questions_are_the_same_every_time_and_their_answers_are_not_given_away(prepared):
    texts = held_out_texts(prepared, "prose")
    questions = questions_of(texts)
    random.seed(1)
    assert questions_of(texts) == questions
    labels = [question["label"] for question in questions]
    assert all(labels.count(label) > len(labels) / 8 for label in range(4))
    for question in questions:
        choices = question["choices"]
        assert len(set(choices)) == 4
        right = [
            document for document, text in enumerate(texts) if question["context"] + choices[question["label"]] in text
        ]
        assert right
        own = {passage.continuation for document in right for passage in passages_of(texts[document], document)}
        assert own & set(choices) == {choices[question["label"]]}  # the others are of other documents
        assert all(choice[0].isspace() and not choice[-1].isspace() for choice in choices)
        assert not question["context"][-1].isspace()


def test_passages_follow_one_another_and_leave_out_what_has_no_words():
    text = "one two three " * 100 + "x" * 5000 + " four five six" * 100
    passages = list(passages_of(text, 3))
    assert len(passages) >= 5
    for passage in passages:
        assert passage.context + passage.continuation in text
        assert CONTINUATION_LENGTH <= len(passage.continuation) < CONTINUATION_LENGTH + 10
        assert "xx" not in passage.context + passage.continuation


def test_tasks_are_written_once_and_say_what_they_leave_out(prepared, tmp_path):
    prepared = dataclasses.replace(prepared, cache_dir=tmp_path)
    said = []
    folder = held_out_tasks(prepared, said.append)
    assert held_out_tasks(prepared, lambda text: pytest.fail(text)) == folder
    documents = [json.loads(line) for line in (folder / "grug_held_out.jsonl").open()]
    for component in COMPONENTS:
        texts = held_out_texts(prepared, component)
        length = sum(len(row["text"]) for row in documents if row["component"] == component)
        assert length == min(MAX_CHARACTERS, sum(map(len, texts)))
        assert any(f"of {len(texts)} held-out documents of {component}, {length} characters" in line for line in said)


def test_too_little_text_makes_no_task_and_that_is_said(tmp_path):
    short = [Document(component, str(i), "a few words") for component in COMPONENTS for i in range(4)]
    corpus = build_corpus(tmp_path, short, lambda _: None)
    prepared = prepare_corpus(DataConfig(vocab_size=300), tmp_path, corpus, lambda _: None)
    said = []
    folder = held_out_tasks(prepared, said.append)
    assert [file.name for file in folder.glob("*.yaml")] == ["grug_held_out.yaml"]
    assert "lm_eval: too little held-out text for grug_continuation: there will be no such task" in said
