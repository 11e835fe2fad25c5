# SPDX-License-Identifier: Apache-2.0
"""The report on what a variant changes: its numbers and its page."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grug_model import diff, diff_facts
from grug_model.base.launch import PRESETS
from grug_model.diff_code import closest, code_lines, distance, side_by_side, variants_in
from grug_model.diff_page import Comparison, diff_page, summary
from tests.model.conftest import ROOT, edit

MODELS = ROOT / "grug_model"
pytestmark = pytest.mark.usefixtures("laptop_facts")

# Text.

CODE = '''"""Docstring
of two lines."""

import os  # why


class A:
    """One line."""

    x = "# no comment"  # a comment

    def f(self):
        """Two

        lines."""
        return """no
docstring"""
'''


def test_code_is_what_is_neither_docstring_nor_comment_nor_blank():
    assert code_lines(CODE) == (
        "import os",
        "class A:",
        '    x = "# no comment"',
        "    def f(self):",
        '        return """no',
        'docstring"""',
    )


def test_of_what_is_no_python_every_line_counts_on_both_sides(tmp_path):
    left = write_variant(tmp_path / "left", model=CODE)
    right = write_variant(tmp_path / "right", model=CODE.replace("class A:", "class A("))
    found = distance(left, right)
    assert (found.changed, found.of) == (1, len([line for line in CODE.splitlines() if line.strip()]))


def write_variant(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for part in ("model", "train", "launch"):
        (folder / f"{part}.py").write_text(files.get(part, ""))
    return folder


@pytest.mark.parametrize(
    ("variant", "changed"),
    [
        ("a = 1\nb = 2\nc = 3\n", 0),
        ('"""More."""\n\na = 1  # yes\nb = 2\n\n\nc = 3\n', 0),
        ("a = 1\nb = 3\nc = 3\n", 1),
        ("a = 1\nb = 3\nd = 4\ne = 5\nc = 3\n", 3),  # one became three
        ("c = 3\n", 2),
        ("", 3),
    ],
)
def test_distance_counts_changed_lines_of_code(tmp_path, variant, changed):
    template = write_variant(tmp_path / "template", model="a = 1\nb = 2\nc = 3\n", train="d = 4\n")
    other = write_variant(tmp_path / "other", model=variant, train="d = 4\n")
    found = distance(template, other)
    assert (found.changed, found.of) == (changed, 4)
    assert found.percent == 25 * changed


def test_a_file_that_only_one_of_them_has_changed_whole(tmp_path):
    template = write_variant(tmp_path / "template", model="a = 1\n")
    other = write_variant(tmp_path / "other", model="a = 1\n")
    (other / "more.py").write_text("b = 2\nc = 3\n")
    assert distance(template, other).changed == distance(other, template).changed == 2


LINES = st.lists(
    st.sampled_from(["", "x = f(a, b)", "x = f(a, c)", "return y", "    z", "a b c d", "a b e d"]), max_size=9
)


@settings(deadline=None, max_examples=150)
@given(left=LINES, right=LINES)
def test_side_by_side_shows_every_line_of_both_once_and_in_order(left, right):
    rows = side_by_side("\n".join(left), "\n".join(right))
    for side, lines in (("left", left), ("right", right)):
        shown = [line for row in rows if (line := getattr(row, side)) is not None]
        assert [line.number for line in shown] == list(range(1, len(shown) + 1))
        assert ["".join(text for text, _ in line.pieces) for line in shown] == "\n".join(lines).splitlines()
    for row in rows:
        if not row.changed:
            assert row.left.pieces == row.right.pieces
    # A line beside its equal is no change, and where nothing changed there is nothing to see.
    assert any(row.changed for row in rows) == ("\n".join(left).splitlines() != "\n".join(right).splitlines())


def test_words_that_changed_are_marked_within_lines_that_grew_out_of_each_other():
    rows = side_by_side("a\nx = jax.nn.silu(gate) * up\nb", "a\nnew = 1\nx = jax.nn.relu(gate) * up\nb")
    assert [(row.left is None, row.right is None, row.changed) for row in rows] == [
        (False, False, False),
        (True, False, True),
        (False, False, True),
        (False, False, False),
    ]
    assert [text for text, changed in rows[2].left.pieces if changed] == ["silu"]
    assert [text for text, changed in rows[2].right.pieces if changed] == ["relu"]


def test_the_closest_is_the_variant_that_it_was_copied_from(repository):
    models = repository / "grug_model"
    mine = models / "mine"
    edit(models / "attn_sink", mine, "jax.nn.silu(gate)", "jax.nn.relu(gate)")
    nearest, found = closest(mine, [models / name for name in variants_in(models)])
    assert (nearest.name, found.changed) == ("attn_sink", 1)


# What they compute.


@pytest.fixture
def sinks() -> Comparison:
    return diff.compare(MODELS / "base", MODELS / "attn_sink")


def test_sinks_are_four_more_arrays_of_eight_and_nothing_else(sinks):
    assert sinks.problems == []
    assert diff_facts.changed_arrays(sinks.left_facts, sinks.right_facts) == [
        ("blocks/*/attention/sinks", "–", "4 × float32[8] over (model)")
    ]
    assert sinks.right_facts.parameters["laptop"] == sinks.left_facts.parameters["laptop"] + 4 * 8
    assert diff_facts.changed_knobs(sinks.left_facts, sinks.right_facts) == []
    assert sinks.left_facts.flops == sinks.right_facts.flops
    assert sinks.closest is None


def test_parameters_are_those_that_one_counts_by_hand(sinks):
    cfg = PRESETS["laptop"].model
    attention = 2 * cfg.hidden_dim * cfg.head_dim * (cfg.num_heads + cfg.num_kv_heads)
    block = attention + 3 * cfg.hidden_dim * cfg.intermediate_dim + 2 * cfg.hidden_dim
    others = 2 * cfg.vocab_size * cfg.hidden_dim + cfg.hidden_dim
    assert sinks.left_facts.parameters["laptop"] == cfg.num_layers * block + others


def test_kernels_are_those_that_the_platform_would_run(kernels):
    assert dict(diff.facts_of(MODELS / "base").kernels) == {
        ("attention", "cpu"): "xla",
        ("cross_entropy", "cpu"): "xla",
        ("attention", "tpu"): "pallas_tpu",
        ("cross_entropy", "tpu"): "pallas_tpu",
    }


def test_a_knob_a_preset_and_a_kernel_that_differ_are_shown(repository, kernels):
    models = repository / "grug_model"
    edit(models / "base", models / "mine", "attention(q, k, v, mask)", 'attention(q, k, v, mask, implementation="xla")')
    for file, old, new in (
        ("model.py", "rope_theta: float = 10_000.0", "rope_theta: float = 500.0"),
        ("launch.py", '"laptop": Grug', '"small": Grug'),
        ("launch.py", "PRESETS = {", 'PRESETS = {"laptop": GrugBaseLaunchConfig(model=GrugModelConfig(num_layers=2)),'),
    ):
        path = models / "mine" / file
        assert path.read_text().count(old) == 1
        path.write_text(path.read_text().replace(old, new))
    found = diff.compare(models / "base", models / "mine", root=repository)
    knobs = {name: rest for name, *rest in diff_facts.changed_knobs(found.left_facts, found.right_facts)}
    assert knobs["model.rope_theta"] == ["defaults, laptop, 130m", "10000.0", "500.0"]
    assert knobs["preset small"] == ["small", "–", "there"]
    assert knobs["model.num_layers"] == ["laptop", "4", "2"]
    kernels = diff_facts.kernels_beside(found.left_facts, found.right_facts)
    assert ("attention on tpu", "pallas_tpu", "xla") in kernels
    text = summary(found)
    assert "| attention on tpu | pallas_tpu | xla |" in text
    assert "| `model.rope_theta` (defaults, laptop, 130m) | 10000.0 | 500.0 |" in text


@pytest.mark.parametrize(
    ("old", "new", "what", "why"),
    [
        ("class RMSNorm(", "class RMSNorm((", "anything but its text", "SyntaxError: "),
        ("GrugModelParameters = Transformer", "GrugModelParameters = Missing", "anything but its text", "NameError: "),
        ("head=2 * d", "head=2 * missing", "its FLOPs", "NameError: "),
    ],
)
def test_a_variant_that_does_not_work_is_compared_as_far_as_can_be(repository, capsys, old, new, what, why):
    models = repository / "grug_model"
    edit(models / "base", models / "mine", old, new)
    diff.main(["grug_model/base", "mine", "--out", "out"], root=repository)
    page, text, said = Path("out/index.html").read_text(), Path("out/summary.md").read_text(), capsys.readouterr().err
    assert f"<b>mine: {what} could not be computed.</b> {why}" in page
    assert f"> **mine: {what} could not be computed.** {why}" in text
    assert f"warning: mine: {what} could not be computed. {why}" in said
    assert "<mark>" in page.partition("<h2>Code</h2>")[2]
    if what == "anything but its text":
        # Of configuration, arrays, and kernels, which are not looked for here: nothing that reads as "nothing differs".
        assert page.count("Not known: see above.") == 3


# The page.


class Tags(HTMLParser):
    """Raises where a tag is closed that is not open."""

    VOID = ("meta", "col", "br")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        assert not [value for _, value in attrs if "//" in (value or "")], attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(sinks):
    tags = Tags()
    text = diff_page(sinks)
    tags.feed(text)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe"} & tags.seen
    assert "prefers-color-scheme: dark" in text
    assert "@import" not in text
    assert "url(" not in text


def test_the_page_shows_changes_and_folds_what_is_alike(sinks):
    text = diff_page(sinks)
    model = text.partition("<h3>model.py")[2]
    assert '<td class="more">        mixed = attention(q, k, v, mask<mark>, sinks=self.sinks</mark>)</td>' in model
    assert re.search(r"<details><summary>\d+ lines alike</summary>", model)
    shown = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert "class RMSNorm" in text
    assert "class RMSNorm" not in shown
    assert "The same in both, letter by letter: train.py, launch.py, __init__.py." in shown
    assert "3 of 5" in shown  # lines of code


def test_text_of_a_variant_is_no_html(tmp_path):
    left = write_variant(tmp_path / "left", model="a = 1\n")
    right = write_variant(tmp_path / "right", model='a = "<b>&"\n')
    text = diff_page(diff.compare(left, right))
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;" in text.replace("<mark>", "").replace("</mark>", "")


def test_two_directories_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    left, right = (write_variant(tmp_path / name / "mine", model="a = 1\n") for name in ("one", "two"))
    found = diff.compare(left, right)
    assert (found.left, found.right) == (str(left), str(right))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["base", "grog", "--out", "out"],
            "grog: no directory with a variant's files, and no name of one. Variants: array_",
        ),
        (["base", "--out", "out"], "give LEFT and RIGHT, or --added-since REF"),
        (["base", "mine", "--added-since", "main", "--out", "out"], "give LEFT and RIGHT, or --added-since REF"),
        (["--added-since", "grog", "--out", "out"], "grog^{commit}"),
    ],
)
def test_commands_that_cannot_be_done_say_why(repository, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        diff.main(arguments, root=repository)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()
