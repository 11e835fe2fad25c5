# SPDX-License-Identifier: Apache-2.0
"""What is written after a prompt: with keys and values remembered, on any devices, and by the command."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grug_kernels.attention import AttentionMask
from tests.model.variants import BATCH, one_device, part, tiny_config
from tests.train.checkpointed import mesh_of
from tests.train.saved_runs import write_run
from train.generate import filtered, generate
from train.mesh import create_mesh
from train.sample import Sampling, Text, main, sample
from train.saved import open_saved

ROOT = Path(__file__).parents[2]
GREEDY = Sampling(new_tokens=12, temperature=0)
NO_END = 96  # no token of the tiny model
TOKENS = [[5, 11, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8]]


@functools.cache
def tiny_model(*, sharded: bool):
    """(mesh, parameters) of a base model of one layer: on one device, or on data=4, model=2."""
    mesh = create_mesh(8, model=2) if sharded else one_device()
    with jax.set_mesh(mesh):
        init = functools.partial(part("base", "model").Transformer.init, tiny_config("base", num_layers=1))
        return mesh, jax.jit(init)(key=jax.random.key(3))


def written(prompts, sampling, *, sharded=False, eos_id=NO_END, **options) -> list[list[int | None]]:
    """What `generate` gives for each prompt."""
    mesh, params = tiny_model(sharded=sharded)
    with jax.set_mesh(mesh):
        steps = list(generate(params, prompts, sampling, eos_id=eos_id, **options))
    return [list(of_prompt) for of_prompt in zip(*steps, strict=True)]


def test_the_likeliest_token_is_that_of_the_whole_row_read_at_once():
    """Prompts of several lengths."""
    found = written(TOKENS, GREEDY)
    mesh, params = tiny_model(sharded=False)
    rows = np.zeros((len(TOKENS), 24), np.int32)
    for row, prompt, tokens in zip(rows, TOKENS, found, strict=True):
        row[: len(prompt) + 12] = prompt + tokens
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda params, rows: params.logits(rows, AttentionMask()))(params, jax.device_put(rows, BATCH))
    likeliest = np.asarray(logits).argmax(axis=-1)
    for row, prompt, tokens in zip(likeliest, TOKENS, found, strict=True):
        assert tokens == row[len(prompt) - 1 :][:12].tolist()
    assert len({token for tokens in found for token in tokens}) > 6  # not one token again and again


def test_what_is_drawn_depends_on_seed_place_and_position_alone():
    """Not on the devices: three prompts do not fill the batch of eight. And not on what stands beside a prompt."""
    drawing = Sampling(new_tokens=12, temperature=1.5)
    drawn = written(TOKENS, drawing)
    assert drawn == written(TOKENS, drawing, sharded=True)
    assert drawn != written(TOKENS, Sampling(new_tokens=12, temperature=1.5, seed=1))
    same = written([TOKENS[0]] * 3, drawing, prompt_len=8)
    assert drawn[0] == same[0] != same[1]
    # One candidate leaves nothing to draw.
    assert written(TOKENS, Sampling(new_tokens=12, temperature=1.5, top_k=1)) == written(TOKENS, GREEDY)


def test_a_row_ends_with_its_document_and_all_end_with_the_last():
    greedy = written(TOKENS, GREEDY)
    end = greedy[1][3]
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in greedy]
    found = written(TOKENS, GREEDY, eos_id=end)
    assert len(found[0]) == max(map(len, expected))
    assert [[token for token in tokens if token is not None] for tokens in found] == expected


def test_the_model_reads_no_more_than_it_can():
    assert len(written([[1] * 31], GREEDY)[0]) == 1
    long, short = written([[1] * 30, TOKENS[1]], GREEDY)  # of 32
    assert (long[2:], short) == ([None] * 10, written(TOKENS, GREEDY)[1])
    with pytest.raises(ValueError, match=r"prompts have 3, 32 tokens.*the model reads 32.*at most 31"):
        written([[1] * 3, [1] * 32], GREEDY)
    with pytest.raises(ValueError, match=r"prompts have 0 tokens\. A prompt has at least 1"):
        written([[]], GREEDY)


def test_filters_leave_the_likeliest():
    scores = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]))

    def left(**options) -> list[list[int]]:
        kept = np.isfinite(np.asarray(filtered(scores, Sampling(**options))))
        return [np.flatnonzero(row).tolist() for row in kept]

    assert left() == left(top_k=9) == left(top_p=1.0) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert left(top_k=2)[0] == [1, 3]
    assert left(top_p=0.65) == [[1, 3], [0]]
    assert left(top_p=0.75)[0] == [1, 2, 3]
    kept = np.asarray(filtered(scores, Sampling(top_k=2)))[0, [1, 3]]
    np.testing.assert_array_equal(kept, np.asarray(scores)[0, [1, 3]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"new_tokens": 0}, "new_tokens=0 is at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 at least 0"),
        ({"top_k": 5, "top_p": 0.5}, "top_k=5 and top_p=0.5; choose one of them"),
        ({"top_k": 0}, "top_k=0 is at least 1"),
        ({"top_p": 1.5}, "top_p=1.5 above 0 and at most 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


@pytest.fixture(scope="module")
def run(folder) -> Path:
    return write_run("array_stacked", "sampled", mesh_of(1, 1))


def test_the_command_continues_texts_one_after_the_other(run, capsys: pytest.CaptureFixture[str]):
    asked = ["--checkpoint", str(run), "--new-tokens", "6", "--temperature", "0", "import os", "déf"]
    main(asked)
    out, err = capsys.readouterr()
    saved = open_saved(run)
    long = "a model that reads few tokens sees but the beginning of a long text " * 9
    with jax.set_mesh(saved.mesh):
        *expected, cut = sample(saved.params, saved.data.tokenizer, ("import os", "déf", long), Sampling(6, 0))
    assert out == "".join(f"{text}\n" for text in expected)
    assert cut.startswith(long)
    assert len(cut) > len(long)
    assert (
        len(re.findall(r"-- 6 tokens: as many as were asked for\. The first after [\d.]+ s, then \d+ tokens/s", err))
        == 2
    )
    capsys.readouterr()
    main(asked)
    assert capsys.readouterr().out == out


def test_half_a_character_is_not_shown(run):
    """Bytes of "é" are two tokens here: the first of them is U+FFFD by itself, and nothing once the second is there."""
    text = Text(open_saved(run).data.tokenizer, "x")
    first, second = Text(open_saved(run).data.tokenizer, "é").prompt
    assert text.after([first]) == "\ufffd"
    assert text.after([first, second]) == "é"


def refused(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_continued_is_said(run, capsys):
    where = ["--checkpoint", str(run)]
    assert "error: sample: there is nothing to continue" in refused(where, capsys)
    assert "error: sample: there is nothing to continue" in refused([*where, "a", ""], capsys)
    assert "error: sample: top_k=2 and top_p=0.5" in refused([*where, "a", "--top-k", "2", "--top-p", "0.5"], capsys)
    assert "the model reads 32 with those it writes" in refused([*where, "word " * 50], capsys)
    assert "error: no complete checkpoint at runs/none" in refused(["--checkpoint", "runs/none", "a"], capsys)


@pytest.mark.parametrize("command", ["train.sample", "train.evaluate"])
def test_help_does_not_wait_for_jax(command):
    code = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_module('{command}', run_name='__main__')\n"
    code += "except SystemExit: print(sorted({'jax', 'levanter', 'tokenizers'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "--checkpoint" in said
    assert said.splitlines()[-1] == "[]"
