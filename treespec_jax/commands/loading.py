"""From settings to loaded weights and engines that share them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from treespec_jax import distributed, limits
from treespec_jax.arguments import with_token_ids
from treespec_jax.checkpoints import drafters
from treespec_jax.commands.prompts import Prompt
from treespec_jax.commands.settings import MODEL, SECTIONS, Experiment
from treespec_jax.config import SamplingParams, SpeculativeConfig
from treespec_jax.errors import UserError
from treespec_jax.trees import shapes


class Pair:
    """A target, and what drafts for it, each loaded once.

    Args:
      target: a `checkpoints.LoadedModel`.
      tokenizer: to use instead of a drafter's own; None: its own.
      mesh: of the target; None: one device.
    """

    def __init__(self, target: Any, tokenizer: str | None = None, mesh: Any = None):
        self.target = target
        self._shared = tokenizer, mesh
        self._drafts: dict[str, Any] = {}

    def draft(self, settings: Experiment) -> Any | None:
        """The drafter of some settings, or None if their method takes none.

        Returns:
          a `checkpoints.LoadedModel` or a `checkpoints.drafters.LoadedDrafter`.

        Raises:
          UserError: a checkpoint that cannot be read, or is not for that target.
        """
        speculative = settings.speculative
        if not speculative.model or not settings.needs_drafter:
            return None
        name = str(speculative.model)
        if name not in self._drafts:
            self._drafts[name] = self._load(speculative)
        return self._drafts[name]

    def make(self, settings: Experiment) -> Any:
        """An `LLM` with an engine of its own over the shared weights.

        Raises:
          UserError: vocabularies that differ, or sizes that do not fit.
        """
        from treespec_jax import LLM

        engine, speculative = settings.engine, settings.speculative
        made = LLM(
            self.target,
            speculative=dataclasses.replace(speculative, model=self.draft(settings)),
            **{f.name: getattr(engine, f.name) for f in dataclasses.fields(engine)},
        )
        # Once is enough.
        self._checked(settings)
        return made

    def _checked(self, settings: Experiment) -> None:
        """Notes that the drafter of some settings is known to fit the target."""
        found = self.draft(settings)
        if getattr(found, "method", ""):
            name = str(settings.speculative.model)
            self._drafts[name] = dataclasses.replace(found, known=True)

    def _load(self, speculative: SpeculativeConfig) -> Any:
        from treespec_jax.checkpoints import load

        tokenizer, mesh = self._shared
        about = drafters.describe_draft(self.target, speculative, tokenizer)
        if isinstance(about, drafters.DrafterDescription):
            return drafters.load_drafter(about, self.target)
        return load(about, self.target.dtype, mesh=mesh, weights=self.target.weights)


def check(
    settings: Experiment,
    prompts: Iterable[Prompt],
    trees: Iterable[str],
    options: Mapping[str, Any] | None = None,
    params: Iterable[SamplingParams] = (),
) -> list[list[int]]:
    """Token ids of the prompts, once all that weights are not needed for is right.

    Takes milliseconds and does not start jax.

    Args:
      settings: with their paths looked up.
      prompts: texts, or conversations.
      trees: shapes that will be grown.
      options: further values for a chat template to see.
      params: of the prompts, where they are not those of `settings`.

    Raises:
      UserError: a checkpoint whose configuration or tokenizer cannot be read, a pair
        of different vocabularies, max_len past the models' positions, a tree that is
        deeper than max_len, no tokenizer, no chat template, a prompt without room in
        max_len, a recycle table that does not fit, or settings that name a token that
        the target lacks.
    """
    target, max_len = check_models(settings, trees)
    tokenizer = target.tokenizer
    encoded = [
        tokenizer.encode(p) if isinstance(p, str) else tokenizer.encode_chat(p, options)
        for p in prompts
    ]
    for one in dict.fromkeys(params):
        _check_params(one, target)
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
        shape = shapes.parse(tree)
        limits.check_tree(shape.depth, max_len)
        limits.check_policy(settings.sampling, getattr(shape, "shapes", (shape,)))
    if target.tokenizer is None:
        raise UserError(
            "the target's checkpoint has no tokenizer; name one with --tokenizer=PATH"
        )
    _check_params(settings.sampling, target)
    return target, max_len


def _check_params(params: SamplingParams, target: Any) -> None:
    about, params = target.config, with_token_ids(params, target.tokenizer)
    limits.check_params(params, about.vocab_size, about.eos_ids)


class _Loader:
    """Reads weights, in every process that has a part of them."""

    def load(self, settings: Experiment) -> Pair:
        """See `load_pair`."""
        import jax

        from treespec_jax import speculation
        from treespec_jax.checkpoints import load
        from treespec_jax.sharding import make_mesh

        if not settings.plain:
            speculation.find(settings.speculative)
        dtype = settings.dtype or None
        if dtype is None and jax.default_backend() == "cpu":
            dtype = "float32"
        tokenizer = settings.tokenizer or None
        mesh = make_mesh(settings.mesh) if settings.mesh else None
        target = load(
            settings.target,
            dtype,
            tokenizer=tokenizer,
            mesh=mesh,
            weights=limits.check_exact(settings.engine.exact, settings.weights) or None,
        )
        pair = Pair(target, tokenizer, mesh)
        pair.draft(settings)
        return distributed.repeated(pair, ("make",), mesh)


@functools.cache
def _loader() -> Any:
    return distributed.repeated(_Loader(), ("load",))


def load_pair(settings: Experiment) -> Pair:
    """Reads the weights that `settings` name.

    Raises:
      UserError: an option that the method does not have, a checkpoint that cannot be
        read, or a mesh that cannot be had.
    """
    return _loader().load(settings)


def follow() -> None:
    """Does as process 0 does, to its end; for the other processes."""
    _loader()
    distributed.follow()


def make_llms(variants: Mapping[Any, Experiment], pair: Pair) -> dict[Any, Any]:
    """An `LLM` for each of some settings; says on stderr what is to know of them."""
    llms = {name: pair.make(settings) for name, settings in variants.items()}
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
    values["dtype"], values["weights"] = llm.dtype, llm.weights
    chosen = limits.resolve(settings.speculative)
    values["speculative"] |= {"method": chosen.method, "tree": chosen.tree}
    values["engine"] |= dataclasses.asdict(llm.engine.config)
    values["speculative"]["tau"] = llm.drafter.tau
    return values
