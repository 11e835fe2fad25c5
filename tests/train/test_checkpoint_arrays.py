# SPDX-License-Identifier: Apache-2.0
import asyncio

import pytest

from train import checkpoint_arrays, lev


def test_when_one_read_fails_the_others_end_and_none_is_cancelled(monkeypatch):
    """Cancelling a TensorStore read that ends just then never returns."""
    ends = []

    async def fails():
        raise OSError("a damaged file")

    async def reads():
        try:
            await asyncio.sleep(0.05)
            ends.append("read")
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async def read_all():
        return await asyncio.gather(fails(), reads())

    monkeypatch.setattr(lev, "load_checkpoint", lambda *_, **__: asyncio.run(read_all()), raising=False)
    run = asyncio.run
    with pytest.raises(OSError, match="a damaged file"):
        checkpoint_arrays.load("somewhere", {}, None, None)
    assert ends == ["read"]
    assert asyncio.run is run
