# SPDX-License-Identifier: Apache-2.0
"""The report on what a variant changes: its numbers, its page, and the comment on a pull request."""

import os
import re
import shlex
import stat
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grug_model import diff, diff_facts
from grug_model.base.launch import PRESETS
from grug_model.diff_code import closest, code_lines, distance, side_by_side, sources, variants_in
from grug_model.diff_facts import Facts
from grug_model.diff_page import Comparison, diff_page, summary
from tests.model.conftest import ROOT, commit, git

MODELS = ROOT / "grug_model"

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


def edit(origin: Path, variant: Path, old: str, new: str, file: str = "model.py") -> None:
    """A copy of `origin` with `old` replaced once."""
    variant.mkdir()
    for path in origin.glob("*.py"):
        text = path.read_text()
        if path.name == file:
            assert text.count(old) == 1, f"{text.count(old)} times: {old}"
            text = text.replace(old, new)
        (variant / path.name).write_text(text)


# What they compute.


FACTS: dict[tuple, Facts] = {}


@pytest.fixture(autouse=True)
def small(monkeypatch, request):
    """Facts of the laptop preset, of the same text once; kernels, which take seconds, where a test asks for them."""
    monkeypatch.setattr(diff_facts, "PRESET", "laptop")
    monkeypatch.setattr("grug_model.diff_page.PRESET", "laptop")
    kernels = "kernels" in request.fixturenames

    def facts_of(variant: Path) -> Facts:
        key = (*sources(variant).items(), kernels)
        if key not in FACTS:
            FACTS[key] = diff_facts.facts_of(variant, kernels=kernels)
        return FACTS[key]

    monkeypatch.setattr(diff, "facts_of", facts_of)


@pytest.fixture
def kernels():
    pass


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


# On a pull request.


@pytest.fixture
def pull_request(repository) -> Path:
    """What is checked out to test one: main with a branch merged that adds a copy of attn_sink."""
    models = repository / "grug_model"
    git(repository, "checkout", "--quiet", "-b", "idea")
    edit(models / "attn_sink", models / "mine", "jax.nn.silu(gate)", "jax.nn.relu(gate)")
    commit(repository, "an idea")
    git(repository, "checkout", "--quiet", "main")
    (repository / "more").write_text("")
    commit(repository, "main goes on")
    git(repository, "merge", "--quiet", "--no-edit", "idea")
    return repository


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def test_a_pull_request_gets_a_report_on_each_variant_that_it_adds(pull_request):
    """By the very command of the workflow."""
    steps = workflow("variant-diff")["jobs"]["report"]["steps"]
    [command] = [step["run"] for step in steps if "grug_model" in step.get("run", "")]
    prefix = ["uv", "run", "python", "-m", "grug_model.diff"]
    words = shlex.split(command)
    assert words[:5] == prefix
    diff.main(words[5:], root=pull_request)
    [upload] = [step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", "")]
    comment = (pull_request / upload / "comment.md").read_text()
    assert comment.startswith(f"{diff.MARKER.format(1)}\n\nNew variants: `mine`.")
    assert "### `attn_sink` → `mine`" in comment
    assert "**Distance** 0.2 % (1 of 5" in comment
    assert {path.name for path in (pull_request / upload).iterdir()} == {"comment.md", "mine"}
    assert (pull_request / upload / "mine" / "index.html").is_file()


def test_a_variant_that_is_not_committed_yet_is_added_too(repository, kernels):
    models = repository / "grug_model"
    edit(models / "base", models / "mine", "jax.nn.silu(gate)", "jax.nn.sulu(gate)")
    diff.main(["--added-since", "main", "--out", "out"], root=repository)
    comment = Path("out/comment.md").read_text()
    for platform in ("cpu", "tpu"):
        assert f"> **mine: its kernels on {platform} could not be computed.** AttributeError" in comment
    diff.main(["--added-since", commit(repository, "mine"), "--out", "out"], root=repository)
    assert Path("out/comment.md").read_text() == f"{diff.MARKER.format(0)}\n\nThis pull request adds no variant.\n"


def test_a_comment_longer_than_github_takes_is_cut_and_says_so(repository, monkeypatch):
    monkeypatch.setattr(diff, "LONGEST_COMMENT", 300)
    models = repository / "grug_model"
    edit(models / "base", models / "mine", "jax.nn.silu(gate)", "jax.nn.relu(gate)")
    diff.main(["--added-since", "main", "--out", "out"], root=repository)
    comment = Path("out/comment.md").read_text()
    assert len(comment) < 300 + 60
    assert comment.endswith("\n\n**Cut here**: the pages have the rest.\n")


def test_code_of_a_pull_request_is_never_run_with_rights_to_write():
    report, comment = workflow("variant-diff"), workflow("variant-diff-comment")
    assert report[True] == "pull_request"  # YAML reads `on` as true
    assert report["permissions"] == {"contents": "read"}
    assert "secrets" not in str(report)
    assert comment[True] == {"workflow_run": {"workflows": [report["name"]], "types": ["completed"]}}
    assert comment["permissions"] == {}
    [job] = comment["jobs"].values()
    assert job["permissions"] == {"actions": "read", "pull-requests": "write"}
    assert not [step for step in job["steps"] if "checkout" in step.get("uses", "")]
    # What a pull request names itself, such as its branch, reaches the script as data alone.
    assert not [step for step in job["steps"] if "${{" in step.get("run", "")]


GH = """#!/usr/bin/env bash
echo "$@" >> calls
case "$*" in
  *repos/o/r/pulls*) echo "$FAKE_PULL" ;;
  *--paginate*) echo "$FAKE_COMMENT" ;;
esac
"""


@pytest.mark.parametrize(
    ("pull", "old", "added", "call"),
    [
        ("7", "", 1, "api --method POST repos/o/r/issues/7/comments -F body=@body.md --silent"),
        ("7", "99", 1, "api --method PATCH repos/o/r/issues/comments/99 -F body=@body.md --silent"),
        ("7", "99", 0, "api --method PATCH repos/o/r/issues/comments/99 -F body=@body.md --silent"),
        ("7", "", 0, None),
        ("", "", 1, None),
    ],
)
def test_there_is_one_comment_which_is_written_anew(tmp_path, pull, old, added, call):
    [job] = workflow("variant-diff-comment")["jobs"].values()
    [step] = [step for step in job["steps"] if "run" in step]
    fake = tmp_path / "bin" / "gh"
    fake.parent.mkdir()
    fake.write_text(GH)
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "variant-diff").mkdir()
    (tmp_path / "variant-diff" / "comment.md").write_text(f"{diff.MARKER.format(added)}\n\nNews.\n")
    env = dict.fromkeys(step["env"], "x") | {
        "REPO": "o/r",
        "RUN": "https://there",
        "FAKE_PULL": pull,
        "FAKE_COMMENT": old,
    }
    env["PATH"] = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-c", step["run"]], cwd=tmp_path, env=env, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line for line in calls if "--method P" in line] == ([call] if call else [])
    if call:
        body = (tmp_path / "body.md").read_text()
        assert body.startswith(diff.MARKER.format(added))
        assert "News." in body
        assert "https://there#artifacts" in body


def test_the_command_of_the_seeds_is_there():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"grug-dir-diff": "grug_model.diff:main"}
