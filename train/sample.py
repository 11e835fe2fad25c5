# SPDX-License-Identifier: Apache-2.0
"""`python -m train.sample`: what a checkpoint writes.

python -m train.sample --checkpoint runs/NAME "def main(" "import "
python -m train.sample --checkpoint runs/NAME/checkpoints/step-100 --temperature 0 "The for statement is used"

The newest checkpoint of a run, or the one that is named; on any number of devices. Text is shown as it comes.
"""

import json
from dataclasses import dataclass, field
from time import perf_counter
from typing import Annotated, Any, Literal

import tyro

from train.command import errors_explained
from train.data import cache_directory
from train.rundir import say
from train.saved import open_saved
from train.tokenizer import TokenizerFiles


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, and how many of them."""

    # Tokens to write after each prompt; fewer where the document ends or the model's longest row does.
    new_tokens: int = 100
    # 1: as the model says; below: what is likely is likelier; 0: the likeliest, always.
    temperature: float = 0.8
    # Draw from this many of the likeliest tokens.
    top_k: int | None = None
    # Draw from the fewest tokens that together have this probability.
    top_p: float | None = None
    # Another seed draws other tokens.
    seed: int = 0

    def __post_init__(self):
        if self.new_tokens < 1 or self.temperature < 0:
            raise ValueError(
                f"sample: new_tokens={self.new_tokens} is at least 1, temperature={self.temperature} at least 0 (0: the"
                " likeliest token, always)."
            )
        if self.top_k is not None and self.top_p is not None:
            raise ValueError(f"sample: top_k={self.top_k} and top_p={self.top_p}; choose one of them.")
        if (self.top_k is not None and self.top_k < 1) or (self.top_p is not None and not 0 < self.top_p <= 1):
            raise ValueError(f"sample: top_k={self.top_k} is at least 1, top_p={self.top_p} above 0 and at most 1.")


# The lines that the summary of a run ends with.
PROMPTS = ("def main(", "The for statement is used", "import ")
LINES = Sampling(new_tokens=40, temperature=0.7)


@dataclass(frozen=True)
class Options:
    """What to continue, from which checkpoint, and how."""

    # A run's folder, its checkpoints folder, or one directory step-<n>.
    checkpoint: str
    # Texts to continue, one after the other.
    prompts: tyro.conf.Positional[tuple[str, ...]]
    # The weights that were trained, or their moving average.
    weights: Literal["current", "ema"] = "current"
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)


class Text:
    """A prompt as token ids, as training had the beginnings of documents; and the text that further ids add to it."""

    def __init__(self, files: TokenizerFiles, prompt: str):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(files.directory / "tokenizer.json"))
        first = json.loads((files.directory / "tokenizer_config.json").read_text()).get("bos_token")
        name = first["content"] if isinstance(first, dict) else first
        beginning = [] if name is None else [self._tokenizer.token_to_id(name)]
        self.prompt = beginning + self._tokenizer.encode(prompt, add_special_tokens=False).ids

    def after(self, ids: list[int]) -> str:
        """The text of `ids`. Bytes at its end that are no whole character are shown as U+FFFD."""
        return self._tokenizer.decode(self.prompt + ids)[len(self._tokenizer.decode(self.prompt)) :]


def sample(
    params: Any, files: TokenizerFiles, prompts: tuple[str, ...] = PROMPTS, sampling: Sampling = LINES
) -> list[str]:
    """Each prompt with what the model writes after it, all of them at once; for the mesh of `jax.set_mesh`.

    params: a variant's Transformer. A model that reads few tokens sees the beginning of a prompt.
    """
    from train.generate import generate

    texts = [Text(files, prompt) for prompt in prompts]
    for text in texts:
        del text.prompt[params.config.max_seq_len // 2 :]
    written: list[list[int]] = [[] for _ in texts]
    for step in generate(params, [text.prompt for text in texts], sampling, eos_id=files.eos_id):
        for ids, token in zip(written, step, strict=True):
            ids += [] if token is None else [token]
    return [prompt + text.after(ids) for prompt, text, ids in zip(prompts, texts, written, strict=True)]


def main(argv: list[str] | None = None) -> None:
    with errors_explained():
        options = tyro.cli(
            Options, args=argv, prog="python -m train.sample", description="Continues texts with a checkpoint's model."
        )
        if not all(options.prompts) or not options.prompts:
            raise ValueError('sample: there is nothing to continue. Name texts of at least a character: "def main(".')
        saved = open_saved(options.checkpoint, weights=options.weights)
        import jax

        from train.compiled import keep_compiled_programs

        keep_compiled_programs(cache_directory(saved.config.data))
        texts = [Text(saved.data.tokenizer, prompt) for prompt in options.prompts]
        prompt_len = max(len(text.prompt) for text in texts)
        with jax.set_mesh(saved.mesh):
            for prompt, text in zip(options.prompts, texts, strict=True):
                stream(saved.params, saved.data.tokenizer, prompt, text, options.sampling, prompt_len)


def stream(params: Any, files: TokenizerFiles, prompt: str, text: Text, sampling: Sampling, prompt_len: int) -> None:
    """Prints a prompt and, as it comes, what the model writes after it; on stderr, how fast."""
    from train.generate import generate

    ids: list[int] = []
    shown, start, first = 0, perf_counter(), 0.0
    tokens = generate(params, [text.prompt], sampling, eos_id=files.eos_id, prompt_len=prompt_len)
    for step in tokens:
        if not ids:
            first = perf_counter()
            print(prompt, end="")
        ids += [token for token in step if token is not None]
        whole = text.after(ids).rstrip("\ufffd")  # a character is shown when its last byte is there
        print(whole[shown:], end="", flush=True)
        shown = max(shown, len(whole))
    print(text.after(ids)[shown:], flush=True)
    rate = f", then {(len(ids) - 1) / (perf_counter() - first):.0f} tokens/s" if len(ids) > 1 else ""
    why = "the document ended" if ids[-1] == files.eos_id else "as many as were asked for"
    if ids[-1] != files.eos_id and len(ids) < sampling.new_tokens:
        why = f"the model reads {params.config.max_seq_len} tokens and no more"
    say(f"-- {len(ids)} tokens: {why}. The first after {first - start:.1f} s{rate}")


if __name__ == "__main__":
    from train.sample import main as command  # the module that others import, not this second copy of it

    command()
