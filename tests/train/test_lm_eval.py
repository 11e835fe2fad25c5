# SPDX-License-Identifier: Apache-2.0
"""lm-eval end to end, offline: in a run, on its checkpoint, on tasks of held-out text and on one's own."""

import contextlib
import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import lm_eval as lm_eval_package
import numpy as np
import pytest
import yaml
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer

from tests.train.tiny import FLAGS, Ended, flags, run, run_tiny
from train import harness as harness_module
from train import lev, lm_eval
from train.data import DataConfig, prepare
from train.harness import HarnessConfig, check_installed, metrics_of
from train.harness_model import HarnessModel
from train.held_out_tasks import held_out_tasks
from train.mesh import BATCH_AXES

pytestmark = pytest.mark.usefixtures("folder")
BOTH = "grug_continuation,grug_held_out"
LIMIT = 6
# The same sums over float32 losses, of other packings.
CLOSE = 1e-5

SPELLING = {
    "task": "spelling",
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
ROWS = [
    {"question": "import", "choices": ["sys", "xyz"], "label": 0},
    {"question": "def __init__(", "choices": ["qq", "self"], "label": 1},
    {"question": "return", "choices": ["None", "Nnoe"], "label": 0},
]


@pytest.fixture(scope="module")
def prepared(grug_cache):
    return prepare(DataConfig(cache_dir=str(grug_cache), vocab_size=FLAGS["--data.vocab-size"]), lambda _: None)


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """A run that evaluated itself at steps 4 and 6, its last; positions split over two devices."""
    changed = {"--eval.harness.tasks": BOTH, "--eval.harness.every": 4, "--eval.harness.limit": LIMIT}
    changed["--trainer.context-axis"] = 2  # and whoever evaluates what it saved has no such axis
    ended = run_tiny("harnessed", **changed)
    assert ended.code == 0, ended.text
    return Path("runs/harnessed")


def own_task(folder: Path, **changed) -> Path:
    """A folder with a task file and its data."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    where = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "arrow")}
    (folder / "spelling.yaml").write_text(yaml.safe_dump(SPELLING | {"dataset_kwargs": where} | changed))
    return folder


def evaluated(*argv: object) -> tuple[Ended, str]:
    """`python -m train.lm_eval argv...` in this process: how it ended, with stderr, and its stdout."""
    said, printed, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        try:
            lm_eval.main([str(part) for part in argv])
        except SystemExit as end:
            code = end.code
    return Ended(code, said.getvalue()), printed.getvalue()


def metrics_at(run_dir: Path, step: int) -> dict[str, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        if row.get("step") == step:
            found |= {name: value for name, value in row["metrics"].items() if name.startswith("lm_eval/")}
    return found


def test_a_run_logs_its_tasks_where_they_are_due(trained):
    assert {step for step in range(1, 7) if metrics_at(trained, step)} == {4, 6}
    metrics = metrics_at(trained, 6)
    assert set(metrics) == {
        *(f"lm_eval/grug_continuation/{name}" for name in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr")),
        *(f"lm_eval/grug_held_out/{name}" for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")),
        *(f"lm_eval/{task}/sample_len" for task in ("grug_continuation", "grug_held_out")),
        *(
            f"lm_eval/averages/{kind}_avg_{name}"
            for kind in ("macro", "micro")
            for name in ("acc", "acc_norm", "bits_per_byte", "byte_perplexity", "word_perplexity")
        ),
    }
    assert metrics["lm_eval/grug_continuation/sample_len"] == LIMIT
    # Of a model that has learnt next to nothing: ten bits for each of its tokens, which are two to three bytes long.
    assert 3 < metrics["lm_eval/grug_held_out/bits_per_byte"] < 5
    assert (
        metrics["lm_eval/grug_held_out/bits_per_byte"] < metrics_at(trained, 4)["lm_eval/grug_held_out/bits_per_byte"]
    )


def test_its_checkpoint_gets_the_same_from_the_command_line(trained):
    """In batches of another size."""
    ended, printed = evaluated(
        "--checkpoint", trained, "--tasks", BOTH, "--limit", LIMIT, "--json", "out.json", "--batch-size", 64
    )
    assert ended.code == 0, ended.text
    out = json.loads(Path("out.json").read_text())
    assert out["metrics"] == pytest.approx(metrics_at(trained, 6), rel=CLOSE)
    assert (out["step"], out["weights"], out["seq_len"]) == (6, "current", 32)
    assert out["checkpoint"].endswith("runs/harnessed/checkpoints/step-6")
    assert out["n-samples"]["grug_continuation"] == {"original": 400, "effective": LIMIT}
    assert "|grug_continuation|" in printed
    assert "bits_per_byte" in printed
    # 32 tokens are too few for these passages.
    [remark] = out["remarks"]
    assert remark.startswith(f"{4 * LIMIT} requests of grug_continuation are longer than 32 tokens")
    assert "lm_eval: done in" in ended.text


def test_bits_per_byte_of_documents_is_the_sum_of_all_nats_over_all_bytes(trained, prepared):
    """By hand: windows of 31 predicted tokens, which follow the end of a document or the windows before."""
    import jax

    from grug_kernels.attention import AttentionMask
    from train.saved import open_saved

    texts = [json.loads(line)["text"] for line in (held_out_tasks(prepared) / "grug_held_out.jsonl").open()][:2]
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer_dir / "tokenizer.json"))
    saved = open_saved(trained)
    rows, scored = [], []
    for text in texts:
        sequence = [prepared.tokenizer.eos_id, *tokenizer.encode(text).ids]
        for start in range(1, len(sequence), 31):
            end = min(start + 31, len(sequence))
            rows.append(sequence[max(0, end - 32) : end])
            scored.append(end - start)
    nats = 0.0
    with jax.set_mesh(saved.mesh):
        logits_of = jax.jit(lambda params, tokens: params.logits(tokens, AttentionMask(causal=True)))
        for first in range(0, len(rows), 64):
            some = rows[first : first + 64]
            tokens = np.zeros((64, 32), np.int32)
            for row, part in zip(tokens, some, strict=False):
                row[: len(part)] = part
            placed = jax.device_put(tokens, jax.P(BATCH_AXES, None))
            logits = np.asarray(logits_of(saved.params, placed), np.float64)
            loss = np.logaddexp.reduce(logits[:, :-1], axis=-1)
            loss -= np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
            for row, part, count in zip(loss, some, scored[first : first + 64], strict=False):
                nats += row[len(part) - 1 - count : len(part) - 1].sum()
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    evaluated("--checkpoint", trained, "--tasks", "grug_held_out", "--limit", 2, "--json", "two.json")
    found = json.loads(Path("two.json").read_text())["metrics"]
    assert found["lm_eval/grug_held_out/bits_per_byte"] == pytest.approx(expected, rel=CLOSE)


def test_texts_are_encoded_and_cut_as_lm_eval_does(prepared):
    """Spaces at the end of a context go with the continuation; both are encoded as one text."""
    tokenizer = lev.load_tokenizer(str(prepared.tokenizer_dir))
    nothing: Any = None
    ours = HarnessModel(tokenizer, seq_len=16, batch_size=1, score=nothing, say=nothing, remarks={})

    class Theirs(TemplateLM):
        eot_token_id = tokenizer.eos_token_id
        tok_encode = staticmethod(lambda string, **_: tokenizer.encode(string, add_special_tokens=False))
        _loglikelihood_tokens = loglikelihood_rolling = generate_until = nothing

    for pair in [
        ("The for statement", " is used"),
        ("The for statement ", "is used"),
        ("def f(x):\n    ", "return x"),
        ("impo", "rt sys"),
        ("naïve caf", "é"),
        ("a\n\n", "\n b"),
    ]:
        assert ours._encoded(*pair) == Theirs()._encode_pair(*pair), pair
    assert ours._encoded(" ", "is") == ([tokenizer.eos_token_id], tokenizer.encode(" is"))


def test_ones_own_task_file(trained, tmp_path):
    own = own_task(tmp_path / "own")
    command = ("--checkpoint", trained, "--tasks", "spelling", "--include", own, "--json", "own.json")
    ended, _ = evaluated(*command)
    assert ended.code == 0, ended.text
    zero = json.loads(Path("own.json").read_text())
    assert zero["metrics"]["lm_eval/spelling/acc"] in {0, 1 / 3, 2 / 3, 1}
    assert zero["n-shot"] == {"spelling": 0}
    ended, _ = evaluated(*command, "--num-fewshot", 2)
    assert ended.code == 0, ended.text
    assert json.loads(Path("own.json").read_text())["n-shot"] == {"spelling": 2}


@pytest.mark.parametrize(
    ("tasks", "changed", "parts"),
    [
        ("spelling", {"output_type": "generate_until"}, ["spelling: generated text (generate_until) cannot"]),
        ("spelling", {"doc_to_choice": "{{colour}}"}, ["the task spelling cannot be loaded: UndefinedError: 'colour'"]),
        # Of the second row alone.
        (
            "spelling",
            {"doc_to_text": "{{1 // (1 - label)}}"},
            ["the task spelling cannot be loaded: ZeroDivisionError"],
        ),
        (" ,", {}, ["tasks=' ,' names none"]),
    ],
)
def test_a_task_that_cannot_be_evaluated(trained, tmp_path, tasks, changed, parts):
    ended, _ = evaluated("--checkpoint", trained, "--tasks", tasks, "--include", own_task(tmp_path / "own", **changed))
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text
    for part in parts:
        assert part in ended.text


def test_unknown_tasks_are_told_near_names_and_files_that_lm_eval_passes_over_in_silence(trained, tmp_path):
    own = own_task(tmp_path / "own")
    (own / "broken.yaml").write_text("task: [broken")
    ended, _ = evaluated("--checkpoint", trained, "--tasks", "grug_continuatoin,hellaswg,spelling", "--include", own)
    assert ended.code == 2
    assert "there is no task grug_continuatoin, hellaswg. Like grug_continuatoin: grug_continuation" in ended.text
    assert re.search("Like hellaswg: .*hellaswag", ended.text)
    assert "Of held-out text and your own: grug_continuation, grug_held_out, spelling." in ended.text
    assert f"Files without a task that lm-eval can read: {own}/broken.yaml." in ended.text


def test_a_task_whose_data_are_to_be_downloaded_says_so(trained):
    file = Path(lm_eval_package.__file__).parent / "tasks/hellaswag/hellaswag.yaml"
    ended, _ = evaluated("--checkpoint", trained, "--tasks", file)
    assert (ended.code, "Traceback" in ended.text) == (2, False)
    assert "hellaswag.yaml are not on this machine" in ended.text
    assert "Nothing is downloaded unless HF_HUB_OFFLINE=0 is set" in ended.text


def test_other_mistakes_on_the_command_line(trained, tmp_path):
    command = ("--checkpoint", trained, "--tasks", BOTH)
    for more, part in {
        ("--json", "nowhere/out.json"): "there is no folder nowhere",
        ("--batch-size", 0): "--batch-size 0: it is at least 1",
        ("--limit", 0): "limit=0; it is at least 1",
        ("--include", tmp_path): "is no folder with task files",
        ("--weights", "ema"): "the run kept no moving average",
    }.items():
        ended, _ = evaluated(*command, *more)
        assert (ended.code, part in ended.text) == (2, True), ended.text


def test_without_lm_eval_nothing_starts(monkeypatch, folder):
    monkeypatch.setattr(harness_module.importlib.util, "find_spec", lambda name: None)
    message = "grug_held_out need lm-eval, which is not installed. Run `uv sync --extra eval`"
    ended, _ = evaluated("--checkpoint", "runs/harnessed", "--tasks", "grug_held_out")
    assert (ended.code, message in ended.text) == (2, True)
    ended = run(*flags({"--eval.harness.tasks": "grug_held_out"}), "--run-id", "without")
    assert (ended.code, message in ended.text) == (2, True)
    assert not Path("runs/without/config.json").exists()
    check_installed(HarnessConfig())  # a run that names no task does not need it


def test_averages_are_levanters():
    """Macro: tasks alike; micro: documents alike. A group is no task, and a standard error has no average."""
    results = {
        "results": {
            "a": {
                "alias": "a",
                "sample_len": 10,
                "acc,none": 0.5,
                "acc_stderr,none": 0.1,
                "f1,strict": np.float64(1.0),
            },
            "b": {"alias": "b", "sample_len": 30, "acc,none": 0.9, "acc_stderr,none": "N/A"},
            "group": {"alias": "group", "acc,none": 0.8},
        },
        "n-samples": {"a": {"original": 20, "effective": 10}, "b": {"original": 30, "effective": 30}},
    }
    assert metrics_of(results, "lm_eval/ema") == pytest.approx(
        {
            "lm_eval/ema/a/acc": 0.5,
            "lm_eval/ema/a/acc_stderr": 0.1,
            "lm_eval/ema/a/f1,strict": 1.0,
            "lm_eval/ema/a/sample_len": 10,
            "lm_eval/ema/b/acc": 0.9,
            "lm_eval/ema/b/sample_len": 30,
            "lm_eval/ema/group/acc": 0.8,
            "lm_eval/ema/averages/macro_avg_acc": 0.7,
            "lm_eval/ema/averages/micro_avg_acc": 0.8,
            "lm_eval/ema/averages/macro_avg_f1,strict": 1.0,
            "lm_eval/ema/averages/micro_avg_f1,strict": 1.0,
        }
    )


def test_numbers_drawn_by_others_go_on_as_if_no_task_had_drawn_any():
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    with harness_module.quiet_and_seeded():
        drawn = random.random(), np.random.rand()
    with harness_module.quiet_and_seeded():
        assert (random.random(), np.random.rand()) == drawn
    assert (random.random(), np.random.rand()) == expected
