# SPDX-License-Identifier: Apache-2.0
"""Examples with named axes, where something of Levanter's wants or gives them. Our own loop and evaluation never do.

`GrugLmExample` (plain arrays) is the one example of this project. Levanter has the ways from one to the other, and
`train.lev` their names: `grug_lm_example_from_named`, `named_lm_example_from_grug`, `grug_attention_mask_from_named`,
`named_attention_mask_from_grug`, `LmEvalExample`, `_ensure_named_lm_example`. What Levanter has not is here.
"""

from typing import Any

from train import lev


def grug_examples(dataset: Any) -> Any:
    """A Levanter dataset of either kind of example as one of `GrugLmExample`s: to be called before it is batched."""
    return dataset.map(_ensure_grug_lm_example)


def _ensure_grug_lm_example(example: Any) -> Any:
    """An `LmEvalExample` as a `GrugLmExample`.

    Raises:
      TypeError: it is neither kind of example.
      NotImplementedError: its attention mask is none that a `GrugLmExample` can have: explicit, or with an offset.
    """
    if isinstance(example, lev.GrugLmExample):
        return example
    if isinstance(example, lev.LmExample):
        return lev.grug_lm_example_from_named(example)
    raise TypeError(f"an example to evaluate is an LmExample or a GrugLmExample, and this is a {type(example)}.")
