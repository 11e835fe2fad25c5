# SPDX-License-Identifier: Apache-2.0
"""The executor's folders: what makes another one, what a step's function gets, and what is refused."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.train import executor_steps as steps
from tests.train.executor_steps import Write, after, path_of, step
from train.executor import (
    Resources,
    marked,
    output_path_of,
    this_output_name,
    this_output_path,
    versioned,
)
from train.executor_steps import plan

CPU = Resources(accelerator=False)


def test_the_folder_is_prefix_name_and_eight_digits():
    path = path_of(step("grug/base"), "there")
    assert path.parent == Path("there/grug")
    assert path.name.removeprefix("base-").isalnum()
    assert len(path.name) == len("base-") + 8


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (step(text="a"), step(text="b"), True),
        (step(text=versioned("a")), step(text=versioned("a")), True),
        (step(text=versioned("a")), step(text=versioned("b")), False),
        (step(text=versioned("a")), step(text="a"), False),
        (step(text=versioned(1)), step(text=versioned(True)), False),
        (step(parts={"a": [versioned(1)]}), step(parts={"a": [versioned(2)]}), False),
        (step(parts={"a": versioned(1)}), step(parts={"b": versioned(1)}), False),
        (step(text=versioned(Path("a"))), step(text=versioned(Path("b"))), False),
        (step("a"), step("b"), False),
        (step("a/write"), step("b/write"), False),
        (step(), step(how="raise", resources=CPU), True),
        (after(step(text="a")), after(step(text="b")), True),
        (after(step(text=versioned("a"))), after(step(text=versioned("b"))), False),
        (after(after(step(text=versioned("a")))), after(after(step(text=versioned("b")))), False),
        (after(step("a")), after(step("b")), False),
        (step(reads=output_path_of(step("a"), "x")), step(reads=output_path_of(step("a"), "y")), False),
        (step(reads=output_path_of(step("a"))), step(reads=step("a")), True),
        (step(reads=versioned(output_path_of(step("a"), "x"))), step(reads=versioned(step("a"))), False),
        (step(reads=versioned([step("a")])), step(reads=versioned([step("b")])), False),
    ],
)
def test_versions_and_what_is_read_make_the_folder_and_nothing_else(one, other, same):
    assert (path_of(one).name == path_of(other).name) is same


def test_the_prefix_is_no_part_of_the_version():
    assert path_of(after(step()), "here").name == path_of(after(step()), "there/or/here").name


@dataclass(frozen=True)
class Checked:
    steps: int = 3
    log_every: int = 10

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}")


def test_a_dataclass_that_checks_itself_is_versioned_whole_but_for_what_does_not_count():
    def path(checked):
        return path_of(step(parts=versioned(checked, but=["log_every"])))

    assert path(Checked()) == path(Checked(log_every=1))
    assert path(Checked()) != path(Checked(steps=4))
    with pytest.raises(ValueError, match=r"config.parts is versioned but for \['log_evry'\], which are none"):
        path_of(step(parts=versioned(Checked(), but=["log_evry"])))


def test_marks_in_a_dataclass_that_checks_itself_are_seen_by_nobody_but_the_executor():
    def planned(steps):
        return plan([step(parts=marked(Checked(), steps=versioned(steps)))], Path("runs"))[0]

    assert planned(4).config.parts == Checked(steps=4)
    assert planned(4).path != planned(5).path
    with pytest.raises(ValueError, match="steps=0"):  # its own check, before anything runs
        planned(0)
    with pytest.raises(ValueError, match=r"marked: \['stepz'\] is no field of Checked: \['log_every', 'steps'\]"):
        marked(Checked(), stepz=versioned(1))


class Pair(NamedTuple):
    one: Any
    other: Any


def test_the_function_gets_plain_values():
    texts = step("texts")
    parts = {"a": [versioned(Checked(steps=5))], "b": (texts, this_output_name()), "c": versioned([versioned(1)])}
    parts["d"] = Pair(versioned(2), 3)
    [_, planned] = plan([step(text=versioned("a"), reads=output_path_of(texts, "x"), parts=parts)], Path("runs"))
    own, read = str(planned.path), str(path_of(texts))
    assert planned.config == Write(
        text="a",
        out=f"{own}/out.txt",
        reads=f"{read}/x",
        parts={"a": [Checked(steps=5)], "b": (read, planned.path.name), "c": [1], "d": Pair(2, 3)},
    )
    assert planned.versions["config.parts.a.0"] == {"steps": 5, "log_every": 10}


def test_what_is_read_comes_first_and_once():
    base = step("base")
    left, right = after(base, "left"), after(base, "right")
    last = step("last", reads=[left, right])
    names = [one.step.name for one in plan([last, right, base], Path("runs"))]
    assert names == ["base", "left", "right", "last"]


def test_two_that_are_alike_are_one_and_two_that_are_not_are_refused():
    assert len(plan([step(text="a"), step(text="a")], Path("runs"))) == 1
    said = r"two steps have the folder runs/write-\w{8}: config.text is 'a' and 'b'. Mark"
    with pytest.raises(ValueError, match=said):
        plan([step(text="a"), step(text="b")], Path("runs"))
    with pytest.raises(ValueError, match=r"their functions are .*write.* and .*slow"):
        plan([step(), dataclasses.replace(step(), fn=steps.slow)], Path("runs"))


def test_a_step_that_reads_itself_is_refused():
    parts = {}
    first = step("first", parts=parts)
    parts["x"] = [after(first, "second")]
    with pytest.raises(ValueError, match="first -> second -> first: a step cannot read what is made of its own output"):
        plan([first], Path("runs"))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda: step(text=versioned({1, 2})),
            r"config.text = \{1, 2\} is versioned, and cannot be written",
        ),
        (lambda: step(text=versioned([object()])), "config.text.0 = <object object .* it is a object"),
        (lambda: step(text=versioned({1: 2})), "config.text = {1: 2} is versioned, .*dicts with texts for keys"),
        (lambda: step(text=versioned(this_output_path())), "config.text is versioned, and is the step's own folder"),
        (lambda: step("../up"), "the name '../up' cannot be that of a folder"),
        (lambda: step(""), "the name '' cannot be"),
    ],
)
def test_what_cannot_be_named_is_refused(made, said):
    with pytest.raises(ValueError, match=said):
        plan([made()], Path("runs"))
