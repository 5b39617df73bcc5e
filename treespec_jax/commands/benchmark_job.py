"""What the benchmark measures, checked before jax starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from treespec_jax import limits
from treespec_jax.checkpoints import drafters, names
from treespec_jax.commands import loading, suites
from treespec_jax.commands.settings import Experiment
from treespec_jax.drafting import METHODS
from treespec_jax.errors import UserError
from treespec_jax.measurement import machine, peers, tables
from treespec_jax.measurement.grid import PEER, Combination, Task, schedule
from treespec_jax.measurement.suite import Conversation, Question, Suite
from treespec_jax.models.weight_types import is_int8

# Lengths of texts are rounded up to it, so that compiled programs serve several runs.
_ROUNDING = 128
# Tokens that an answer may be longer by when it is read back as part of a prompt.
_SLACK = 16


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
      settings: with their paths looked up, and max_len.
      variants: settings by combination, plain decoding first.
      skipped: "what" cannot be measured, and the "reason".
      suite: the questions that fit.
      left_out: ids of those that do not.
      target: the target's `checkpoints.Description`.
    """

    settings: Experiment
    variants: dict[Combination, Experiment]
    skipped: list[dict[str, str]]
    suite: Suite
    left_out: list[str]
    target: Any

    @property
    def chat(self) -> bool:
        """Whether questions are asked by the chat template."""
        return _by_template(self.suite, self.target.tokenizer)

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that decide the results, as plain values."""
        values = self.settings.as_dict()
        del values["comparison"], values["speculative"]["tree"]
        return {**values, "questions": self.suite.digest}

    @property
    def tasks(self) -> list[Task]:
        """All cells, in order."""
        grid, questions = self.settings.benchmark, self.suite.questions
        streams = grid.latency_tokens > 0
        return list(schedule(list(self.variants), questions, grid.rounds, streams))

    @property
    def keep_text(self) -> list[Combination]:
        """Combinations that promise the very text of plain decoding."""
        return [
            combination
            for combination, settings in self.variants.items()
            if not (combination.plain or combination.peer)
            and tables.verdict(settings.as_dict()) is None
        ]

    def encode(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """Token ids of a prompt."""
        return _encode(self.target.tokenizer, prompt, self.settings)


def make(settings: Experiment) -> Job:
    """Checks all that weights are not needed for.

    Raises:
      UserError: as `loading.check_models`, `suites.find`, `combinations` and
        `peers.check`; or no question fits.
    """
    settings = settings.with_paths(_wants_drafter(settings))
    grid = settings.benchmark
    target, limit = loading.check_models(settings, grid.shapes)
    if grid.peers:
        peers.check(*folders(settings), settings.sampling)
    tokenizer = target.tokenizer
    suite = suites.find(grid.suite, tokenizer.has_chat_template).first(grid.questions)
    chat = _by_template(suite, tokenizer)
    needed = {q: longest(q, settings, tokenizer, chat) for q in suite.questions}
    fitting = tuple(
        question for question in suite.questions if needed[question] <= limit
    )
    if not fitting:
        raise UserError(
            f"no question of suite {suite.name} fits max_len={limit}: they need "
            f"{min(needed.values())} tokens and more; lower --max_tokens or raise "
            "--max_len"
        )
    if settings.engine.max_len is None:
        length = -(-max(needed[q] for q in fitting) // _ROUNDING) * _ROUNDING
        engine = dataclasses.replace(settings.engine, max_len=min(length, limit))
        settings = dataclasses.replace(settings, engine=engine)
    variants, skipped = combinations(settings)
    return Job(
        settings,
        variants,
        skipped,
        dataclasses.replace(suite, questions=fitting),
        [question.id for question in suite.questions if question not in fitting],
        target,
    )


def check_memory(job: Job, types: Iterable[str]) -> None:
    """Checks that a CPU has room for the target in several types of weights.

    Raises:
      UserError: it has not; the answers could not be timed in turn.
    """
    import jax

    from treespec_jax.checkpoints.placement import Parameters

    types, free = list(types), machine.available_bytes()
    if len(types) < 2 or free is None or jax.default_backend() != "cpu":
        return
    dtype = job.settings.dtype or "float32"
    sizes = [
        sum(item.nbytes for item in Parameters(job.target, dtype, weights=kind).items)
        for kind in types
    ]
    if sum(sizes) > free:
        raise UserError(
            f"--weights={','.join(types)}: the target takes {sum(sizes) / 1e9:.1f} GB "
            f"in these types, which are in memory together, and {free / 1e9:.1f} GB "
            "are free; give fewer types"
        )


def folders(settings: Experiment) -> tuple[str, str | None]:
    """Paths of the target and of the draft model, if any, for peers to read."""
    draft = settings.speculative.model
    return (
        str(names.locate(settings.target, "target").path),
        str(names.locate(draft, "drafter").path) if _has_model(settings) else None,
    )


def _has_model(settings: Experiment) -> bool:
    """Whether the drafter is a model, and does not read the target's rows."""
    if not settings.speculative.model:
        return False
    path = names.here(settings.speculative.model)
    return path is None or not drafters.method_of(path)


def _wants_drafter(settings: Experiment) -> bool:
    """Whether a drafter is loaded: for a method, or for a peer if one is named."""
    named = bool(settings.speculative.model)
    methods = [METHODS[method] for method in _methods(settings)]
    if settings.benchmark.shapes != ("none",) and any(
        method.needs_model or (method.takes_model and named) for method in methods
    ):
        return True
    return bool(settings.benchmark.peers and named)


def _methods(settings: Experiment) -> tuple[str, ...]:
    """Of the grid, or the one that goes with the models."""
    return settings.benchmark.methods or (limits.resolve(settings.speculative).method,)


def combinations(
    settings: Experiment,
) -> tuple[dict[Combination, Experiment], list[dict[str, str]]]:
    """What can be measured, and what cannot, with its reason.

    Plain decoding comes first at every temperature, batch size and type of weights.

    Raises:
      UserError: nothing but plain decoding can be measured, and more was asked for.
    """
    grid = settings.benchmark
    possible: dict[Combination, Experiment] = {}
    refused: dict[str, str] = {}
    for batch in grid.batches or (settings.engine.max_batch,):
        for temperature in grid.temperatures or (settings.sampling.temperature,):
            for weights in weight_types(settings):
                sized = _sized(settings, temperature, batch, weights)
                here = temperature, batch, weights
                plain = Combination("none", "none", "exact", *here)
                possible[plain] = sized.with_tree("none")
                for method, shape, rule in _drafted(settings):
                    made = Combination(method, shape, rule, *here)
                    try:
                        variant = sized.with_tree(shape, method=method, rule=rule)
                        limits.check_drafter(variant.speculative)
                        if variant.needs_drafter:
                            drafters.choose(None, variant.speculative)
                        possible[made] = variant
                    except UserError as error:
                        refused.setdefault(made.label, str(error))
                for kind in peers.KINDS if PEER in grid.peers else ():
                    made = Combination(PEER, kind, "-", *here)
                    reason = _refusal(made, settings)
                    if reason is None:
                        possible[made] = possible[plain]
                    else:
                        refused.setdefault(f"{made.label}, batch {batch}", reason)
    skipped = [{"what": what, "reason": reason} for what, reason in refused.items()]
    if skipped and all(combination.plain for combination in possible):
        first = skipped[0]
        raise UserError(f"nothing to compare: {first['what']}: {first['reason']}")
    return possible, skipped


def _drafted(settings: Experiment) -> list[tuple[str, str, str]]:
    """Method, shape and rule of all that is not plain decoding."""
    grid, speculative = settings.benchmark, settings.speculative
    return [
        (method, shape, rule)
        for method in _methods(settings)
        for shape in grid.shapes
        for rule in grid.rules or (speculative.rule,)
        if "none" not in (method, shape)
    ]


def weight_types(settings: Experiment) -> tuple[str, ...]:
    """Of the grid, or the one that the settings name; "": the checkpoint's own."""
    return settings.benchmark.weights or (settings.weights,)


def _sized(
    settings: Experiment, temperature: float, batch: int, weights: str
) -> Experiment:
    sampling = dataclasses.replace(settings.sampling, temperature=temperature)
    engine = dataclasses.replace(settings.engine, max_batch=batch)
    sized = {"sampling": sampling, "engine": engine, "weights": weights}
    return dataclasses.replace(settings, **sized)


def _refusal(peer: Combination, settings: Experiment) -> str | None:
    """Why a peer's combination cannot be; None if it can."""
    if peer.batch > 1:
        return "peers are timed one text at a time"
    if is_int8(peer.weights):
        return "peers are timed with weights in floating point; add --weights=float32"
    if peer.shape == "assisted" and not _has_model(settings):
        return "it needs a drafter that is a model of its own; give --draft=PATH"
    return None


def _by_template(suite: Suite, tokenizer) -> bool:
    return tokenizer.has_chat_template and not suite.as_text


def longest(question: Question, settings: Experiment, tokenizer, chat: bool) -> int:
    """Tokens of a question with all its turns and the longest answers.

    Args:
      question: to be asked.
      settings: of the answers.
      tokenizer: of the target.
      chat: ask by the chat template.

    Raises:
      UserError: the chat template refuses it.
    """
    conversation = Conversation(question, chat)
    turns = len(question.turns)
    for _ in range(turns - 1):
        conversation.answered("")
    ids = _encode(tokenizer, conversation.prompt(), settings)
    return len(ids) + turns * settings.sampling.max_tokens + (turns - 1) * _SLACK


def _encode(tokenizer, prompt, settings: Experiment) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.encode_chat(prompt, dict(settings.benchmark.chat_options))
