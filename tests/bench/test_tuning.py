# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

from bench import tuning
from bench.tuning import Case, Result, counted, sweep
from grug_kernels.dispatch import UnsupportedError


def test_the_fastest_comes_first_and_what_was_refused_last(capsys):
    milliseconds = {1: 2.0, 2: None, 3: 1.0}

    def measure(change):
        ms = milliseconds[change["block_q"]]
        if ms is None:
            return Result(change, refusal="takes 70 MiB")
        return Result(change, ms, 1.5, 0.5, 0.25, 7, 20.5, 3.0)

    sweep(measure, [{"block_q": n} for n in milliseconds], "forward, v6e")
    heading, *as_it_went, empty, title, again, first, second, last = capsys.readouterr().out.splitlines()
    assert heading == again == tuning.HEADING
    assert as_it_went[0].split() == ["2.000", "1.500", "50%", "25%", "7", "20.5", "3.0", "block_q=1"]
    assert as_it_went == [second, last, first]
    assert (empty, title) == ("", "forward, v6e: predicted, best first")
    assert last == "refused  block_q=2: takes 70 MiB"


def test_what_is_counted_is_the_pallas_kernel_and_all_its_calls(monkeypatch):
    count = SimpleNamespace(cycles=3e6, matrix_busy=0.5, slots={"VALU": 0.25}, spills=7, vmem_bytes=2**20)
    of_xla = SimpleNamespace(is_pallas=False)
    kernel = SimpleNamespace(is_pallas=True, predicted_ms=1.5, count=count)
    schedule = SimpleNamespace(kernels=[of_xla, kernel], compile_seconds=3.0)
    monkeypatch.setattr(tuning, "analyze", lambda function, args, chip, *, smem: schedule)
    result = counted({}, lambda change: Case(abs, (), {}, calls=4), "v6e")
    assert (result.ms, result.mcycles) == (6.0, 12.0)
    assert (result.spills, result.vmem_mib) == (7, 1.0)


def test_a_refused_case_is_a_result():
    def case_of(change):
        raise UnsupportedError("takes 70 MiB\nof 64")

    assert counted({"rows": 8}, case_of, "v6e") == Result({"rows": 8}, refusal="takes 70 MiB")
