# SPDX-License-Identifier: Apache-2.0
"""The archive of variants: what it says is so, and what it cannot say is told."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grug_model import archive
from grug_model.archive import ARCHIVE, FIELDS, Entry, find, lint, read, write

SHA = "0123456789ab"
FIELDS_OF_MINE = {
    "Path": "`grug_model/mine`",
    "Origin": "base",
    "Bucket": "MLP/activation",
    "Introduced": "TBD",
    "Status": "active",
    "Purpose": "To try.",
}


def test_the_archive_and_the_directories_agree():
    assert lint() == []


def test_the_entries_of_the_document_before_are_kept():
    kept = {entry.id: entry for entry in read() if entry.section == archive.HISTORY}
    assert list(kept) == ["grugformer-attnsink", "grugformer-starter-speedrun", "grugformer-vs-hackable-125m"]
    assert kept["grugformer-attnsink"].path == "experiments/speedrun/grugformer_attnsink/grugformer_attn_sink.py"
    assert {entry.status for entry in kept.values()} == {"active"}


def test_the_template_in_the_document_names_every_field_in_order():
    text = (archive.ROOT / ARCHIVE).read_text()
    block = text.partition("```text\n")[2].partition("```")[0]
    assert tuple(line.split(":")[0].removeprefix("- ") for line in block.splitlines()[1:]) == FIELDS


def test_an_entry_goes_behind_the_last_experiment_and_is_replaced_in_its_place(repository):
    before = (repository / ARCHIVE).read_text()
    names = [entry.id for entry in read(repository)]
    at = names.index("grugformer-attnsink")
    write(repository, Entry("mine", FIELDS_OF_MINE))
    assert [entry.id for entry in read(repository)] == [*names[:at], "mine", *names[at:]]
    assert find(repository, "mine").fields == FIELDS_OF_MINE
    write(repository, dataclasses.replace(find(repository, "array_stacked"), fields=FIELDS_OF_MINE))
    assert [entry.id for entry in read(repository)] == [*names[:at], "mine", *names[at:]]
    # And nothing else has changed.
    write(repository, find(archive.ROOT, "array_stacked"))
    text = (repository / ARCHIVE).read_text()
    assert text.replace(f"{find(repository, 'mine')}\n", "") == before


# Words of anything that Markdown or the archive itself gives a meaning to.
WORDS = st.lists(
    st.sampled_from(["#", "###", "-", "Status:", "a", "`b`", "|", "```", "x" * 130, "–", "1."]), min_size=1
)


@settings(deadline=None, max_examples=60)
@given(values=st.lists(WORDS.map(" ".join), min_size=len(FIELDS), max_size=len(FIELDS)))
def test_what_is_written_is_read_again(values):
    entry = Entry("mine", dict(zip(FIELDS, values, strict=True)))
    [again] = archive._entries(f"# Archive\n\n## {archive.LIVE}\n\n{entry}\n## {archive.HISTORY}\n")
    assert (again.fields, again.strange) == (entry.fields, ())


def changed(**fields):
    """The entry of `mine` with fields changed; None removes one."""
    fields = FIELDS_OF_MINE | {
        name.replace("_", " ").replace("known good", "known-good"): v for name, v in fields.items()
    }
    return Entry("mine", {name: value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    ("entry", "there", "problem"),
    [
        (changed(), False, "it is active, and grug_model/mine does not exist"),
        (changed(Status="deleted", Last_known_good=SHA), True, "it is deleted, and grug_model/mine exists"),
        (changed(Status="deleted"), False, "it is deleted: Last known-good names the commit"),
        (changed(Status="deleted", Last_known_good="TBD"), False, "it is deleted: Last known-good names the commit"),
        (changed(Status="superseded", Last_known_good=SHA), False, "'nothing' is none"),
        (changed(Status="superseded", Last_known_good=SHA, Superseded_by="grog"), False, "'grog' is none"),
        (changed(Status="lost"), True, "Status: 'lost' is none of active, superseded, deleted"),
        (changed(Bucket="everything"), True, "Bucket: 'everything' is none of: attention/masking; "),
        (changed(Purpose=None), True, "Purpose: missing"),
        (changed(Origin=None), True, "Origin: missing"),
        (changed(Origin="grog"), True, "Origin: grog is neither base nor an entry"),
        (changed(Budget="some"), True, "Budget: 'some' is no share of code lines"),
        (changed(Budget="0.1 %"), True, "code lines) from base, over its budget of 0.1 %"),
        (changed(Colour="red"), True, "Colour: no such field"),
    ],
)
def test_what_is_not_so_is_told(repository, monkeypatch, entry, there, problem):
    with monkeypatch.context() as patch:
        patch.setattr(archive, "FIELDS", (*FIELDS, "Colour"))
        write(repository, entry)
    if there:
        variant(repository, "mine")
    [found] = lint(repository)
    assert found.startswith("mine (line ")
    assert problem in found


def variant(root, name):
    """base with a line of code changed."""
    folder = root / "grug_model" / name
    folder.mkdir()
    for file in (root / "grug_model" / "base").glob("*.py"):
        (folder / file.name).write_text(file.read_text().replace("jax.nn.silu(gate)", "jax.nn.relu(gate)"))


def test_endings_that_are_told_in_full_are_right(repository):
    for name, fields in (("one", {"Superseded by": "base"}), ("two", {"Superseded by": SHA}), ("three", {})):
        ended = {
            "Status": "superseded" if fields else "deleted",
            "Last known-good": SHA,
            "Path": f"`grug_model/{name}`",
        }
        write(repository, Entry(name, FIELDS_OF_MINE | ended | fields))
    assert lint(repository) == []


def test_a_directory_without_an_entry_and_an_entry_written_twice_are_told(repository):
    variant(repository, "mine")
    [found] = lint(repository)
    assert found.startswith("grug_model/mine has no entry")
    write(repository, changed())
    assert lint(repository) == []
    file = repository / ARCHIVE
    file.write_text(file.read_text().replace("## History", f"{changed()}- colour red\n\n## History"))
    problems = lint(repository)
    assert problems[0] == "mine has 2 entries. Keep one."
    assert "'- colour red' is no `- Field: value`" in problems[1]


def test_a_variant_is_held_against_base_where_its_origin_is_gone(repository):
    variant(repository, "mine")
    write(repository, Entry("gone", FIELDS_OF_MINE | {"Path": "x", "Status": "deleted", "Last known-good": SHA}))
    write(repository, changed(Origin="gone", Budget="0.1 %"))
    [found] = lint(repository)
    assert "from base, over its budget" in found


def test_without_an_archive_it_is_said_where_one_should_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"grug-archive\.md does not exist"):
        read(tmp_path)
