"""Generation by Hugging Face's `transformers`, as decoders of a benchmark.

torch and transformers are imported on use; the extra `peers` brings them. All but the
request is as the library ships it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.tokenizers import TextStream, Tokenizer
from treespec_jax.config import SamplingParams
from treespec_jax.engine.stats import Stats
from treespec_jax.errors import UserError
from treespec_jax.measurement.decoders import Answer
from treespec_jax.measurement.machine import usable_cpus

PACKAGES = ("torch", "transformers")
# How it generates; the second needs a drafter.
KINDS = ("plain", "assisted", "prompt_lookup")
# Candidates of a prompt lookup, as in the library's documentation.
_LOOKUP_TOKENS = 10


def check(target: str, draft: str | None, sampling: SamplingParams) -> None:
    """Raises UserError for what `transformers` cannot be asked for.

    Packages that are missing, a checkpoint that is no Hugging Face folder, or settings
    without a counterpart. Imports nothing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--peers=transformers needs {' and '.join(missing)}: pip install "
            "'treespec-jax[peers]'"
        )
    for path in filter(None, (target, draft)):
        if not (Path(path).expanduser() / "config.json").is_file():
            raise UserError(
                f"--peers=transformers reads Hugging Face folders, and {path} is none; "
                "name one, or leave --peers out"
            )
    default = SamplingParams()
    penalties = "presence_penalty", "frequency_penalty", "logit_bias"
    forbidden = "min_tokens", "bad_words", "allowed_token_ids", "logits_processors"
    for name in (*penalties, *forbidden, "stop", "stop_token_ids"):
        if getattr(sampling, name) != getattr(default, name):
            raise UserError(
                f"--peers=transformers has no counterpart of {name}; leave one out"
            )


def versions() -> dict[str, str]:
    """Of the packages, which are imported."""
    return {name: importlib.import_module(name).__version__ for name in PACKAGES}


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """What the decoders share.

    Attributes:
      target: path of a Hugging Face folder.
      draft: path of the drafter's, or None.
      dtype: name of the weights' dtype.
      tokenizer: that reads their texts.
      eos_ids: tokens that end a text.
    """

    target: str
    draft: str | None
    dtype: str
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]


def load(checkpoints: Checkpoints) -> dict[str, TransformersDecoder]:
    """A decoder for each of KINDS, but for `assisted` without a drafter.

    Raises:
      UserError: weights that the library does not read.
    """
    torch, transformers = map(importlib.import_module, PACKAGES)
    torch.set_num_threads(usable_cpus())
    transformers.utils.logging.set_verbosity_error()

    def model(path: str):
        folder = Path(path).expanduser()
        dtype = getattr(torch, checkpoints.dtype)
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            message = f"--peers=transformers cannot read {path}: {reason:.200}"
            raise UserError(message) from None
        # What a request leaves open would be filled in from here.
        loaded.generation_config = transformers.GenerationConfig()
        return loaded.eval()

    target = model(checkpoints.target)
    draft = model(checkpoints.draft) if checkpoints.draft else None
    kinds = [kind for kind in KINDS if draft is not None or kind != "assisted"]
    made = {}
    for kind in kinds:
        helper = draft if kind == "assisted" else None
        made[kind] = TransformersDecoder(kind, target, helper, checkpoints)
    return made


class TransformersDecoder:
    """See `decoders.Decoder`; answers one turn at a time.

    Args:
      kind: one of KINDS.
      target: the model whose text is wanted.
      draft: of kind `assisted`, else None.
      checkpoints: that both come from.
    """

    def __init__(self, kind: str, target, draft, checkpoints: Checkpoints):
        self._kind = kind
        self._target, self._draft = target, draft
        self._checkpoints = checkpoints

    @property
    def memory_bytes(self) -> int:
        """Of the weights."""
        models = filter(None, (self._target, self._draft))
        return sum(p.numel() * p.element_size() for m in models for p in m.parameters())

    def warm_up(self, params: SamplingParams) -> None:
        params = dataclasses.replace(params, max_tokens=2, ignore_eos=True)
        # No id is past the end of a vocabulary.
        self._generate([0, 0], params)

    def reset(self) -> None:
        """Nothing is learnt."""

    def answer(self, turns, params, streaming=False):
        return [
            self._answer(turn, each) for turn, each in zip(turns, params, strict=True)
        ]

    def _answer(self, turn, params: SamplingParams) -> Answer:
        tokens, arrivals = self._generate(turn.ids, params)
        # An answer is a text of its own, not the continuation of a line.
        context = turn.ids if isinstance(turn.prompt, str) else ()
        stream = TextStream(self._checkpoints.tokenizer, context)
        text = stream.push(tokens) + stream.flush()
        counts = [count for _, count in arrivals]
        stats = Stats(
            prompt_tokens=len(turn.ids),
            tokens=len(tokens),
            steps=len(arrivals),
            emitted_counts=[counts.count(n) for n in range(max(counts) + 1)],
        )
        return Answer(text, tokens, arrivals, stats)

    def _generate(
        self, ids: Sequence[int], params: SamplingParams
    ) -> tuple[list[int], list[tuple[float, int]]]:
        """Emitted tokens, and when they came."""
        torch, transformers = map(importlib.import_module, PACKAGES)
        torch.manual_seed(params.seed)
        rows = torch.tensor([list(ids)])
        arrivals = _Arrivals()
        with torch.inference_mode():
            out = self._target.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                generation_config=transformers.GenerationConfig(**self._wanted(params)),
                streamer=arrivals,
                **({"assistant_model": self._draft} if self._draft else {}),
            )
        return out[0, len(ids) :].tolist(), arrivals.found

    def _wanted(self, params: SamplingParams) -> dict[str, Any]:
        """Fields of a `GenerationConfig`."""
        ends = list(self._checkpoints.eos_ids)
        wanted = {
            "max_new_tokens": params.max_tokens,
            "do_sample": params.temperature > 0,
            "repetition_penalty": params.repetition_penalty,
            "eos_token_id": None if params.ignore_eos else ends,
            "pad_token_id": ends[0] if ends else 0,
        }
        if params.temperature > 0:
            names = "temperature", "top_k", "top_p"
            wanted |= {name: getattr(params, name) for name in names}
            wanted["min_p"] = params.min_p or None
        if self._kind == "prompt_lookup":
            wanted["prompt_lookup_num_tokens"] = _LOOKUP_TOKENS
        return wanted


class _Arrivals:
    """A streamer of the library that notes when tokens come, and how many."""

    def __init__(self):
        self.found: list[tuple[float, int]] = []
        self._began: float = time.perf_counter()
        self._prompt = True

    def put(self, tokens: Any) -> None:
        # The prompt comes first.
        if self._prompt:
            self._prompt = False
            return
        self.found.append((time.perf_counter() - self._began, int(tokens.numel())))

    def end(self) -> None:
        pass
