# SPDX-License-Identifier: Apache-2.0
"""Every peer traces for a chip at a tiny shape, with kernels where it should have some, and says what it ran with."""

import importlib.util
import re
from types import SimpleNamespace

import pytest
from jax._src.interpreters import mlir
from jaxlib.mlir import ir

from bench import peers
from bench.peers import attention, cross_entropy
from bench.shapes import AttentionShape, LossShape
from bench.tpu import dump
from bench.tpu.core import core_of
from bench.tpu.topology import Topology

ATTENTION = AttentionShape("tiny", 1, 512, 4, 2, 128)
LOSS = LossShape("tiny", 1024, 512, 2048)

needs_tokamax = pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed: uv sync --extra peers"
)


def of(names):
    return [pytest.param(name, marks=needs_tokamax if name.startswith("tokamax") else ()) for name in names]


def stablehlo(case, chip: str) -> str:
    """Needs no libtpu: of the topology only the chip is asked for."""
    topology = Topology(chip, core_of(chip).chip, (SimpleNamespace(id=0),))
    with dump.targeting(topology):
        lowered = dump.lower(dump.trace(*case), topology)
    with mlir.make_ir_context():
        return str(ir.Module.parse(lowered.module))


def kernels(case, chip: str) -> list[str]:
    return re.findall(r"custom_call @tpu_custom_call", stablehlo(case, chip))


def results(text: str) -> list[str]:
    """Types of what the main function returns."""
    main = next(line for line in text.splitlines() if "func.func public @main" in line)
    return re.findall(r"tensor<([^>]*)>", main.split("->")[1])


@pytest.mark.parametrize("sliding_window", [None, 256])
@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("peer", of(attention.PEERS))
def test_attention_traces(peer, passes, sliding_window):
    if peer == "tokamax_op" and sliding_window:
        with pytest.raises(ValueError, match="tokamax_op: sliding_window=256"):
            attention.attention_case(peer, ATTENTION, passes, "v6e", sliding_window=sliding_window)
        return
    case = attention.attention_case(peer, ATTENTION, passes, "v6e", sliding_window=sliding_window)
    is_split = peer == "levanter_grug" and passes == "backward"
    assert len(kernels(case, "v6e")) == (2 if is_split else 1)
    # Gradients of q, k, v come out as q, k and v went in: the backward pass is whole.
    wanted = case.args[:1] if passes == "forward" else case.args[:3]
    assert results(stablehlo(case, "v6e")) == ["x".join(map(str, x.shape)) + "xbf16" for x in wanted]


@pytest.mark.parametrize("peer", of(attention.PEERS))
def test_what_attention_ran_with_is_told(peer):
    blocks = attention.block_sizes_of(peer, ATTENTION, "forward", "v6e")
    assert (blocks["query"], blocks["key"]) == (512, 512)  # no longer than the sequence


@pytest.mark.parametrize("peer", of(cross_entropy.PEERS))
def test_loss_traces(peer):
    has_kernel = {"tokamax_pallas": (1, 2), "levanter_pallas": (1, 1)}
    for number, passes in enumerate(("forward", "forward_backward")):
        case = cross_entropy.loss_case(peer, LOSS, passes, "v6e")
        text = stablehlo(case, "v6e")
        assert text.count("custom_call @tpu_custom_call") == has_kernel.get(peer, (0, 0))[number]
        if passes == "forward_backward":
            dtype = "f32" if peer in ("tokamax_xla", "tokamax_pallas") else "bf16"
            assert results(text)[-2:] == [f"1024x512x{dtype}", f"512x2048x{dtype}"]
        assert cross_entropy.block_sizes_of(peer, LOSS, passes, "v6e")


@pytest.mark.parametrize("peer", of(cross_entropy.PEERS))
def test_only_tokamax_has_a_backward_pass_alone(peer):
    if peer.startswith("tokamax"):
        assert len(cross_entropy.loss_case(peer, LOSS, "backward", "v6e").args) == 4  # lse too
    else:
        with pytest.raises(ValueError, match=f"{peer} has no backward pass to call alone"):
            cross_entropy.loss_case(peer, LOSS, "backward", "v6e")


def test_levanters_kernel_is_told_the_chip():
    """It asks jax for the machine's devices; on a chip with two cores its grid starts with a core axis of two."""
    on_v6e, on_v5p = (
        stablehlo(cross_entropy.loss_case("levanter_pallas", LOSS, "forward", chip, blocks=(512, 512, 1024)), chip)
        for chip in ("v6e", "v5p")
    )
    assert on_v6e != on_v5p


def test_an_unknown_peer_is_an_error():
    with pytest.raises(ValueError, match="no peer is called 'flash3'; there are jax_splash, tokamax_splash"):
        attention.attention_case("flash3", ATTENTION, "forward", "v6e")
    with pytest.raises(ValueError, match="no peer is called 'liger'; there are naive, tokamax_xla"):
        cross_entropy.loss_case("liger", LOSS, "forward", "v6e")


def test_blocks_for_a_peer_that_chooses_its_own_are_an_error():
    with pytest.raises(ValueError, match="Levanter chooses its own"):
        attention.attention_case("levanter_grug", ATTENTION, "forward", "v6e", blocks=attention.Blocks(128, 128, 128))


def test_a_peer_that_is_not_installed_says_how_to_get_it():
    with pytest.raises(ModuleNotFoundError, match="uv sync --extra peers"):
        peers.require("tokamax_of_tomorrow.kernels")
