"""Settings of a whole experiment: defaults, then a file, then the command line.

Light to import, so that a bad setting is found before jax starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from treespec_jax import limits
from treespec_jax.acceptance import compatibility
from treespec_jax.checkpoints import catalogue, drafters, names
from treespec_jax.checks import check_bool, check_float, check_int, from_mapping
from treespec_jax.config import EngineSettings, SamplingParams, SpeculativeConfig
from treespec_jax.drafting import METHODS
from treespec_jax.errors import UserError
from treespec_jax.models.weight_types import FLOATS, check_weights
from treespec_jax.trees import shapes


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """What scripts/benchmark.py compares, and on which questions.

    An empty tuple of the grid stands for the one value of the model's settings.

    Attributes:
      suite: name of a suite, see `commands.suites.find`; empty: the model's usual one.
      questions: of each category, the first so many; 0: all.
      methods: of drafting, names of `drafting.METHODS`; plain decoding is always
        measured.
      shapes: tree shapes.
      rules: names of `acceptance.compatibility.RULES`.
      temperatures: of the requests.
      batches: texts decoded together.
      weights: types of the matrices of target and drafter, see `models.weight_types`;
        with several, all are also compared with plain decoding by the first.
      peers: other programs to time, names of `PEERS`.
      rounds: each runs every combination on every question.
      latency_tokens: tokens per turn of the pass that times a stream; 0: no such pass.
      breakdown: also time the parts of a step, and what verifying T nodes costs.
      chat_options: variables of the chat template: a mapping, turned into pairs.
    """

    suite: str = ""
    questions: int = 0
    methods: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ("chain:3", "chain:5", "regular:3x2x1", "dynamic:15@5")
    rules: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = ()
    batches: tuple[int, ...] = ()
    weights: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    rounds: int = 3
    latency_tokens: int = 32
    breakdown: bool = True
    chat_options: tuple[tuple[str, Any], ...] = ()

    PEERS: ClassVar = ("transformers",)

    def __post_init__(self):
        texts = "methods", "shapes", "rules", "weights", "peers"
        kinds: dict[str, type] = dict.fromkeys(texts, str)
        for value in self.temperatures:
            check_float("temperature", _number(value), 0)
        for value in self.batches:
            check_int("batches", value, 1)
        _take_lists(self, kinds | {"temperatures": float, "batches": int})
        if not self.shapes:
            raise UserError("no shape to compare; give --shapes=chain:3 for example")
        for name in self.shapes:
            shapes.parse(name)
        for name in self.weights:
            check_weights(name)
        _check_names("method", self.methods, METHODS)
        _check_names("rule", self.rules, compatibility.RULES)
        _check_names("peer", self.peers, self.PEERS)
        check_int("questions", self.questions, 0)
        check_int("rounds", self.rounds, 1)
        check_int("latency_tokens", self.latency_tokens, 0)
        check_bool("breakdown", self.breakdown)
        options = self.chat_options
        pairs = options.items() if isinstance(options, Mapping) else options
        object.__setattr__(self, "chat_options", tuple(map(tuple, pairs)))


@dataclasses.dataclass(frozen=True)
class RuleComparison:
    """What scripts/compare_rules.py compares.

    Attributes:
      rules: names of `acceptance.compatibility.RULES`.
      shapes: tree shapes other than `none`, which is always measured.
      temperatures: of the requests.
      rounds: each runs every rule, shape and temperature on every prompt, by other
        seeds than the last.
      prompts_file: a file of prompts; empty: the built-in story openings.
    """

    rules: tuple[str, ...] = tuple(compatibility.RULES)
    shapes: tuple[str, ...] = (
        "chain:3",
        "regular:3x2x1",
        "dynamic:7@4",
        "allotted:7@4",
    )
    temperatures: tuple[float, ...] = (0.0, 0.5, 1.0)
    rounds: int = 2
    prompts_file: str = ""

    def __post_init__(self):
        _check_names("rule", self.rules, compatibility.RULES)
        for name in self.shapes:
            if shapes.parse(name).depth == 0:
                raise UserError(
                    f"--shapes={name}: plain decoding is measured anyway; leave it out"
                )
        for value in self.temperatures:
            check_float("temperature", _number(value), 0)
        _take_lists(self, {"rules": str, "shapes": str, "temperatures": float})
        for name in ("rules", "shapes", "temperatures"):
            if not getattr(self, name):
                raise UserError(f"nothing to compare: --{name} is empty")
        check_int("rounds", self.rounds, 1)


def _take_lists(settings: Any, kinds: Mapping[str, type]) -> None:
    """Turns fields into tuples of one type, each value once; a text is one value."""
    for name, kind in kinds.items():
        given = getattr(settings, name)
        values = (given,) if isinstance(given, str) else given
        object.__setattr__(settings, name, tuple(dict.fromkeys(map(kind, values))))


def _number(value: Any) -> Any:
    """The number that a flag's text says; anything else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            choice = ", ".join(known)
            raise UserError(f"{what} {name!r} is unknown; choose from {choice}")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run, checked.

    Attributes:
      target: the model whose text is wanted: a path, a name of the catalogue, or
        org/name of the Hugging Face Hub; empty: the bundled one.
      tokenizer: a file or name to use instead of the one found with the weights.
      dtype: of activations; empty: see `LLM`.
      weights: type of the matrices, see `models.weight_types`; empty: that of `dtype`.
      mesh: of devices that share the models, such as "tensor:4"; empty: one device.
      sampling: what each prompt asks for.
      speculative: the drafter, its trees, and the rule that judges them; `model` is a
        path or name.
      engine: fixed sizes.
      benchmark: what scripts/benchmark.py compares.
      comparison: what scripts/compare_rules.py compares.
    """

    target: str = catalogue.DEFAULT
    tokenizer: str = ""
    dtype: str = ""
    weights: str = ""
    mesh: str = ""
    sampling: SamplingParams = SamplingParams()
    speculative: SpeculativeConfig = SpeculativeConfig()
    engine: EngineSettings = EngineSettings()
    benchmark: BenchmarkSettings = BenchmarkSettings()
    comparison: RuleComparison = RuleComparison()

    def __post_init__(self):
        for name in ("target", "tokenizer", "dtype", "weights", "mesh"):
            value = getattr(self, name)
            if not isinstance(value, (str, Path)):
                raise UserError(f"{name} must be a text, got {value!r}")
            object.__setattr__(self, name, str(value))
        object.__setattr__(self, "target", self.target or catalogue.DEFAULT)
        if self.dtype and self.dtype not in FLOATS:
            raise UserError(
                f"dtype must be one of {', '.join(FLOATS)}, got {self.dtype!r}"
            )
        if self.weights:
            check_weights(self.weights)
        limits.check_exact(self.engine.exact, self.weights, self.dtype, self.mesh)
        shape = limits.check_speculation(self.speculative)
        if self.engine.max_len is not None:
            limits.check_tree(shape.depth, self.engine.max_len)

    @property
    def plain(self) -> bool:
        """Whether this is decoding without a drafter."""
        return limits.check_speculation(self.speculative).depth == 0

    @property
    def needs_drafter(self) -> bool:
        """Whether the weights of a drafter have to be loaded."""
        resolved = limits.resolve(self.speculative)
        method, named = METHODS[resolved.method], bool(resolved.model)
        wanted = method.needs_model or (method.takes_model and named)
        return wanted and not self.plain

    def with_tree(self, tree: str, **changes) -> Experiment:
        """The same with another tree shape and further changes of `speculative`.

        Nothing else of `speculative` applies to the shape `none`, plain decoding, and
        no recycle table to a method that has none. With another method comes the
        catalogue's drafter of that method, unless another drafter was named.

        Raises:
          UserError: a rule or a cascade that does not take the shape.
        """
        if shapes.parse(tree).depth == 0:
            speculative = SpeculativeConfig(method="none", tree="none")
        else:
            speculative = dataclasses.replace(self.speculative, tree=tree, **changes)
            if "method" in changes:
                speculative = names.of_method(self.target, speculative)
            if not METHODS[limits.resolve(speculative).method].has_table:
                speculative = dataclasses.replace(speculative, recycle_table="")
        return dataclasses.replace(self, speculative=speculative)

    def with_paths(self, needs_drafter: bool | None = None) -> Experiment:
        """The same with method and tree, without a drafter that is not needed.

        All paths are looked up; names of the hub are not, which takes a network.

        Args:
          needs_drafter: whether a drafter will be loaded; None: if the tree needs one.

        Raises:
          UserError: a checkpoint is missing, or a drafter is wanted and none is named.
        """
        if needs_drafter is None:
            needs_drafter = self.needs_drafter
        draft = (self.speculative.model or None) if needs_drafter else None
        given = {"target": self.target, "drafter": draft, "tokenizer": self.tokenizer}
        for what, name in given.items():
            if name:
                names.check(name, what)
        resolved = limits.resolve(self.speculative)
        if needs_drafter and not draft:
            raise UserError(
                f"tree {resolved.tree!r} needs a drafter: give --draft=PATH, or "
                "--tree=none for plain decoding"
            )
        speculative = dataclasses.replace(resolved, model=draft)
        return dataclasses.replace(self, speculative=speculative)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON; takes the form of a configuration file."""
        values = dataclasses.asdict(self)
        if self.speculative.model is not None:
            values["speculative"]["model"] = str(self.speculative.model)
        return values


# Classes of the sections, by name.
SECTIONS: dict[str, type] = {
    field.name: type(field.default)
    for field in dataclasses.fields(Experiment)
    if dataclasses.is_dataclass(field.default)
}
# Sections of every command that runs a model.
MODEL = ("sampling", "speculative", "engine")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a settings class.

    Attributes:
      section: "" for a field of `Experiment` itself.
      name: of the field.
      kind: its type, without None; a text for a field of any type.
      default: of the field.
    """

    section: str
    name: str
    kind: Any
    default: Any

    @property
    def dotted(self) -> str:
        """The name in overrides, such as "sampling.max_tokens"."""
        return f"{self.section}.{self.name}".lstrip(".")


@functools.cache
def fields_of(section: str) -> tuple[Setting, ...]:
    """The settings of a section, "" for those outside any, from its dataclass.

    Not those that only Python can give, functions for example.
    """
    cls = SECTIONS[section] if section else Experiment
    hints, default = typing.get_type_hints(cls), cls()
    fields = [f for f in dataclasses.fields(cls) if not f.metadata.get("python")]
    found = []
    for name in (field.name for field in fields):
        kind = hints[name]
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            (kind,) = (t for t in typing.get_args(kind) if t is not types.NoneType)
        if section or name not in SECTIONS:
            kind = str if kind is Any else kind
            found.append(Setting(section, name, kind, getattr(default, name)))
    return tuple(found)


def build(
    values: Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None
) -> Experiment:
    """Turns a configuration file's values and the command line into settings.

    A target of the catalogue gets its drafter, unless one is chosen, and a drafter over
    the target's rows its method.

    Args:
      values: a ConfigDict or nested mapping; a missing key takes its default.
      overrides: by dotted name ("sampling.max_tokens"); None means not given.

    Raises:
      UserError: an unknown key or a bad value, named.
    """
    tree = dict(values.to_dict() if hasattr(values, "to_dict") else values or {})
    for name in SECTIONS:
        section = tree.get(name)
        if section is not None and not isinstance(section, Mapping):
            raise UserError(f"{name} must hold settings by name, got {section!r}")
        tree[name] = dict(section or {})
    for dotted, value in (overrides or {}).items():
        if value is not None:
            *section, name = dotted.split(".")
            (tree[section[0]] if section else tree)[name] = value
    for name, cls in SECTIONS.items():
        tree[name] = _checked(cls, tree[name], name)
    built = _checked(Experiment, tree, "configuration")
    speculative = drafters.choose(built.target, built.speculative)
    # A fresh seed is drawn here, so that a whole run has it and its report names it.
    sampling = built.sampling.for_text()
    return dataclasses.replace(built, speculative=speculative, sampling=sampling)


def _checked(cls, values: Mapping[str, Any], what: str):
    try:
        return from_mapping(cls, values, what)
    except TypeError as error:
        # A number where a list belongs, for example.
        raise UserError(f"{what}: {error}; check its values") from None


def default_config():
    """All settings as a locked ConfigDict, for a file in configs/ to change.

    Unknown names are refused at the line that writes them.
    """
    from ml_collections import config_dict

    config = config_dict.ConfigDict({section: {} for section in SECTIONS})
    for section in ("", *SECTIONS):
        for field in fields_of(section):
            value = field.default
            if value is None:
                kind = typing.get_origin(field.kind) or field.kind
                value = config_dict.placeholder(kind)
            (config[section] if section else config)[field.name] = value
    return config.lock()
