"""From settings to loaded weights and engines that share them."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from treespec_jax import limits
from treespec_jax.checkpoints import drafters
from treespec_jax.commands.prompts import Prompt
from treespec_jax.commands.settings import MODEL, SECTIONS, Experiment
from treespec_jax.drafting import METHODS
from treespec_jax.errors import UserError
from treespec_jax.trees import shapes


@dataclasses.dataclass(frozen=True)
class Pair:
    """A target and, unless decoding is plain, what drafts for it.

    Attributes:
      target: a `checkpoints.LoadedModel`.
      draft: the same, a `checkpoints.drafters.LoadedDrafter`, or None.
    """

    target: Any
    draft: Any | None

    def checked(self) -> Pair:
        """The same, its drafter known to fit the target."""
        if not getattr(self.draft, "method", ""):
            return self
        draft = dataclasses.replace(self.draft, known=True)
        return dataclasses.replace(self, draft=draft)

    def draft_for(self, method: str) -> Any | None:
        """The drafter, if it is one that the method takes."""
        own = getattr(self.draft, "method", "")
        if own:
            return self.draft if method in drafters.users_of(own) else None
        return self.draft if METHODS[method].takes_model else None


def check(
    settings: Experiment,
    prompts: Iterable[Prompt],
    trees: Iterable[str],
    options: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of the prompts, once all that weights are not needed for is right.

    Takes milliseconds and does not start jax.

    Args:
      settings: with their paths looked up.
      prompts: texts, or conversations.
      trees: shapes that will be grown.
      options: further values for a chat template to see.

    Raises:
      UserError: a checkpoint whose configuration or tokenizer cannot be read, a pair
        of different vocabularies, max_len past the models' positions, a tree that is
        deeper than max_len, no tokenizer, no chat template, a prompt without room in
        max_len, a recycle table that does not fit, or a logit bias for a token that
        the target lacks.
    """
    target, max_len = check_models(settings, trees)
    tokenizer = target.tokenizer
    encoded = [
        tokenizer.encode(p) if isinstance(p, str) else tokenizer.encode_chat(p, options)
        for p in prompts
    ]
    for ids in encoded:
        limits.check_tokens(ids, target.config.vocab_size)
        limits.check_prompt(ids, max_len)
    return encoded


def check_models(settings: Experiment, trees: Iterable[str]) -> tuple[Any, int]:
    """The target's `checkpoints.Description`, with a tokenizer, and tokens per text.

    Arguments as for `check`; it raises what that does of the models and the trees.
    """
    from treespec_jax.checkpoints import describe
    from treespec_jax.checkpoints.recycle_table import TableFile
    from treespec_jax.checkpoints.tokenizers import check_pair

    tokenizer = settings.tokenizer or None
    target = describe(settings.target, tokenizer)
    draft = None
    if settings.speculative.model:
        draft = drafters.describe_draft(target, settings.speculative, tokenizer)
        check_pair(target, draft)
    if settings.speculative.recycle_table and not settings.plain:
        TableFile(settings.speculative.recycle_table, target).read()
    max_len = limits.text_length(settings.engine.max_len, target, draft)
    for tree in trees:
        limits.check_tree(shapes.parse(tree).depth, max_len)
    if target.tokenizer is None:
        raise UserError(
            "the target's checkpoint has no tokenizer; name one with --tokenizer=PATH"
        )
    limits.check_bias(settings.sampling.logit_bias, target.config.vocab_size)
    return target, max_len


def load_pair(settings: Experiment) -> Pair:
    """Reads the weights that `settings` name.

    Raises:
      UserError: an option that the method does not have, a checkpoint that cannot be
        read, or a mesh that cannot be had.
    """
    import jax

    from treespec_jax import speculation
    from treespec_jax.checkpoints import load
    from treespec_jax.sharding import make_mesh

    if not settings.plain:
        speculation.find(settings.speculative)
    dtype = settings.dtype or None
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    shared = {
        "tokenizer": settings.tokenizer or None,
        "mesh": make_mesh(settings.mesh) if settings.mesh else None,
    }
    target = load(settings.target, dtype, **shared)
    if not settings.speculative.model:
        return Pair(target, None)
    found = drafters.describe_draft(target, settings.speculative, shared["tokenizer"])
    if isinstance(found, drafters.DrafterDescription):
        return Pair(target, drafters.load_drafter(found, target))
    return Pair(target, load(found, target.dtype, mesh=shared["mesh"]))


def make_llm(settings: Experiment, pair: Pair):
    """An `LLM` with an engine of its own over the shared weights.

    Raises:
      UserError: vocabularies that differ, or sizes that do not fit.
    """
    from treespec_jax import LLM

    engine, speculative = settings.engine, settings.speculative
    draft = pair.draft_for(limits.resolve(speculative).method)
    return LLM(
        pair.target,
        speculative=dataclasses.replace(speculative, model=draft),
        **{f.name: getattr(engine, f.name) for f in dataclasses.fields(engine)},
    )


def make_llms(variants: Mapping[Any, Experiment], pair: Pair) -> dict[Any, Any]:
    """An `LLM` for each of some settings; says on stderr what is to know of them."""
    llms = {}
    for name, settings in variants.items():
        llms[name] = make_llm(settings, pair)
        if llms[name].drafter.module is not None:
            # Once is enough.
            pair = pair.checked()
    for note in dict.fromkeys(note for llm in llms.values() for note in llm.notes):
        print(f"note: {note}", file=sys.stderr)
    return llms


@contextlib.contextmanager
def keeping_table(llm) -> Iterator[None]:
    """Writes the recycle table of an `LLM` in the end, if its settings name a file.

    Also when the block is interrupted or fails. What ended it is raised then, whatever
    becomes of the file.
    """
    if llm.recycle_table is None:
        yield
        return
    try:
        yield
    except BaseException:
        try:
            llm.save_recycle_table()
        except Exception as error:
            print(f"note: no recycle table was written: {error}", file=sys.stderr)
        raise
    llm.save_recycle_table()


def in_force(settings: Experiment, llm, *sections: str) -> dict[str, Any]:
    """The settings for JSON, with what was left to the models filled in.

    Args:
      settings: as given.
      llm: made of them.
      *sections: those besides MODEL.
    """
    unused = set(SECTIONS) - {*MODEL, *sections}
    values = {k: v for k, v in settings.as_dict().items() if k not in unused}
    values["dtype"] = llm.dtype
    chosen = limits.resolve(settings.speculative)
    values["speculative"] |= {"method": chosen.method, "tree": chosen.tree}
    values["engine"] |= dataclasses.asdict(llm.engine.config)
    values["speculative"]["tau"] = llm.drafter.tau
    return values
