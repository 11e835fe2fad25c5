# SPDX-License-Identifier: Apache-2.0
"""The corpus: what is in it, and that it appears whole or not at all."""

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from train.corpus import HOLD_OUT_EVERY, Document, build_corpus, build_once, python_documents

DOCUMENTS = [
    Document(
        component, f"{index}.txt", f"{component} text number {index}: naïve 世界, def f(x): return x + {index}\n" * 5
    )
    for component in ("prose", "code")
    for index in range(50)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("cache"), DOCUMENTS)


def test_python_brings_prose_and_code():
    documents = python_documents()
    ids = [document.id for document in documents if document.component == "code"]
    assert {"argparse.py", "asyncio/events.py", "json/decoder.py"} <= set(ids)
    assert len(ids) == len(set(ids)) > 300
    assert sum(document.component == "prose" for document in documents) > 50
    # A path of this machine in an id would make the split, and so the results, differ between machines.
    assert not [name for name in ids if Path(name).is_absolute() or name.startswith(("test/", "_sysconfigdata"))]


def test_python_without_its_topics_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match=r"came without pydoc_data\.topics"):
        python_documents()


def test_python_without_its_sources_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="found 0 modules of the standard library below"):
        python_documents()


@pytest.mark.parametrize("component", ["prose", "code"])
def test_every_nth_document_by_sha256_is_held_out(corpus, component):
    mine = [document for document in DOCUMENTS if document.component == component]
    mine.sort(key=lambda document: hashlib.sha256(f"{component}/{document.id}".encode()).hexdigest())
    every = HOLD_OUT_EVERY[component]
    assert corpus.texts(component, "validation") == [document.text for document in mine[::every]]
    assert corpus.texts(component, "train") == [document.text for i, document in enumerate(mine) if i % every]


def test_corpus_does_not_depend_on_the_order_of_reading(corpus, tmp_path):
    assert build_corpus(tmp_path, DOCUMENTS[::-1]).digest == corpus.digest


def test_one_changed_letter_is_another_corpus(corpus):
    changed = [*DOCUMENTS[:-1], Document("code", DOCUMENTS[-1].id, DOCUMENTS[-1].text + ".")]
    other = build_corpus(corpus.directory.parent, changed)
    assert other.directory != corpus.directory
    assert other.digest != corpus.digest


def test_manifest_says_what_is_in_the_files(corpus):
    for name, facts in corpus.manifest["files"].items():
        content = (corpus.directory / f"{name}.jsonl").read_bytes()
        texts = corpus.texts(*name.split("/"))
        assert facts == {
            "documents": len(texts),
            "text_bytes": sum(len(text.encode()) for text in texts),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert corpus.manifest["python_version"] == sys.version.split()[0]


def test_a_corpus_that_is_there_is_not_written_again(corpus):
    said = []
    assert build_corpus(corpus.directory.parent, DOCUMENTS, said.append) == corpus
    assert said == []


def test_a_component_with_one_document_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match="1 documents of 'prose'; at least 2 are needed"):
        build_corpus(tmp_path, DOCUMENTS[:1] + DOCUMENTS[50:])


SLOW_BUILD = """
import sys, time
from pathlib import Path
from train.corpus import build_once
def build(directory):
    with open(sys.argv[1] + ".log", "a") as log: log.write("built\\n")
    (directory / "first").write_text("1")
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
    (directory / "second").write_text("2")
build_once(Path(sys.argv[1]), build, progress=lambda text: print(text, flush=True))
"""


def start_slow_build(target: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW_BUILD, str(target), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_killed_half_way_nothing_appears_and_the_next_one_starts_afresh(tmp_path, caplog):
    target = tmp_path / "target"
    with start_slow_build(target, seconds=60) as victim:
        assert victim.stdout.readline() == "half\n"
        victim.kill()
    assert not target.exists()
    assert (tmp_path / "target.tmp" / "first").exists()

    build_once(target, lambda directory: (directory / "only").touch())
    assert [path.name for path in target.iterdir()] == ["only"]
    assert "clearing away what a stopped process had begun" in caplog.text


def test_where_building_fails_nothing_is_left(tmp_path):
    def fails(directory):
        (directory / "half").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        build_once(tmp_path / "target", fails)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_of_two_at_once_one_builds_and_the_other_waits(tmp_path):
    target = tmp_path / "target"
    with start_slow_build(target, seconds=1) as first:
        assert first.stdout.readline() == "half\n"
        with start_slow_build(target, seconds=1) as second:
            assert "waiting for another process that is building" in second.stdout.readline()
            assert (first.wait(20), second.wait(20)) == (0, 0)
    assert Path(f"{target}.log").read_text() == "built\n"
    assert {path.name for path in target.iterdir()} == {"first", "second"}
