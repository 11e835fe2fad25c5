# SPDX-License-Identifier: Apache-2.0
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

from bench.tpu import production
from bench.tpu.production import Outcome
from bench.tpu.record import Record
from bench.tpu.topology import LIBTPU_IS_MISSING, has_libtpu
from grug_kernels.dispatch import UnsupportedError


def outcome(refusal=None):
    return Outcome("v6e, loss, huge", 1.0, 0, refusal)


def test_a_refusal_fails_unless_it_is_listed_with_its_sentence():
    assert outcome().failure is None
    assert outcome("needs 18 MiB of VMEM").failure == "refused: needs 18 MiB of VMEM"
    with mock.patch.dict(production.EXPECTED, {"v6e, loss, huge": "18 MiB"}):
        assert outcome("needs 18 MiB of VMEM").failure is None
        assert outcome("no such layout").failure == "refused: no such layout (expected '18 MiB')"
        assert "take it off the list" in (outcome().failure or "")


def test_what_is_expected_to_be_refused_is_compiled():
    assert set(production.EXPECTED) <= set(production.names())


def test_every_shape_is_compiled_for_some_chip():
    everywhere, names = list(production.names(everywhere=True)), list(production.names())
    cases = {f"{op}, {shape}" for op, (_, shapes) in production.OPS.items() for shape in shapes}
    assert len(everywhere) == len(set(everywhere)) == len(production.CHIPS) * len(cases)
    assert set(names) < set(everywhere)
    assert {name.partition(", ")[2] for name in names} == cases
    assert set(production.SOME_CHIPS) < cases


@pytest.mark.parametrize("chip", production.CHIPS)
def test_every_op_is_compiled_for_every_chip(chip):
    compiled = {name.split(", ")[1] for name in production.names() if name.startswith(chip)}
    assert compiled >= {"attention", "loss", "token losses"}


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
@pytest.mark.parametrize("chip", production.CHIPS)
def test_what_is_sharded_is_compiled_for_eight_devices(chip, monkeypatch):
    seen = []

    def record(_, *args, topology):
        shapes = [arg.sharding.shard_shape(arg.shape) for arg in args]
        seen.append((topology.chip.name, len(topology.devices), shapes))
        return Record(topology)

    monkeypatch.setattr(production, "compile_record", record)
    for op in ("sharded loss", "sharded token losses"):
        production.compiled(f"{chip}, {op}, 16384x4096x128256 vocabulary/4")
    assert seen == [(chip, 8, [(8192, 4096), (2048, 32064), (8192,)])] * 2


def test_words_that_no_case_has_are_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["production", "v7"])
    with pytest.raises(SystemExit, match="2"):
        production.main()
    assert "no case has 'v7'" in capsys.readouterr().err


@pytest.mark.skipif(not has_libtpu(), reason=LIBTPU_IS_MISSING)
@pytest.mark.parametrize("refuses", [False, True])
def test_the_exit_status_is_that_of_the_compiles(monkeypatch, capsys, refuses):
    """Compiled here and not in a process of its own, so that the refusal can be put in."""

    def refusing(*args, **kwargs):
        raise UnsupportedError("18 MiB needed, 16 allowed")

    if refuses:
        monkeypatch.setattr(production, "token_losses", refusing)
    monkeypatch.setattr(production, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(1))
    monkeypatch.setattr(sys, "argv", ["production", "v6e", "token losses", "4096x768x50257"])
    with pytest.raises(SystemExit) as exit:
        production.main()
    assert exit.value.code == refuses
    assert ("18 MiB needed, 16 allowed" in capsys.readouterr().out) == refuses
