"""Settings of a whole experiment: defaults, then a file, then the command line.

Light to import, so that a bad setting is found before jax starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treespec_jax.acceptance import compatibility
from treespec_jax.config import (
    EngineConfig,
    SamplingParams,
    check_bool,
    check_float,
    check_int,
    check_optional,
    from_mapping,
)
from treespec_jax.errors import UserError
from treespec_jax.trees import shapes

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class EngineSettings(EngineConfig):
    """`EngineConfig`, where `max_len` None is the model's own limit."""

    max_len: int | None = None

    def __post_init__(self):
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.max_len is None:
            del values["max_len"]
        checked = EngineConfig(**values)
        object.__setattr__(self, "prefill_chunks", checked.prefill_chunks)


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """What scripts/benchmark.py compares.

    Attributes:
      shapes: tree shapes; `none` is added where it lacks.
      repeat: rounds; each runs every shape on every prompt.
      prompts: a file of prompts; empty: the built-in story openings.
      record: also tabulate how often the drafter's estimates come true.
    """

    shapes: tuple[str, ...] = (
        "none",
        "chain:3",
        "chain:5",
        "regular:3x2x1",
        "dynamic:15@5",
    )
    repeat: int = 3
    prompts: str = ""
    record: bool = False

    def __post_init__(self):
        check_bool("record", self.record)
        named = (self.shapes,) if isinstance(self.shapes, str) else tuple(self.shapes)
        if not named:
            raise UserError("no shape to compare; give --shapes=none,chain:3")
        for name in named:
            shapes.parse(name)
        if "none" not in named:
            named = ("none", *named)
        object.__setattr__(self, "shapes", tuple(dict.fromkeys(named)))
        check_int("repeat", self.repeat, 1)


@dataclasses.dataclass(frozen=True)
class RuleComparison:
    """What scripts/compare_rules.py compares.

    Attributes:
      rules: names of `acceptance.compatibility.RULES`.
      shapes: tree shapes other than `none`, which is always measured.
      temperatures: of the requests.
      repeat: rounds; each runs every rule, shape and temperature on every prompt, by
        other seeds than the last.
      prompts: a file of prompts; empty: the built-in story openings.
      record: also tabulate how often the drafter's estimates come true.
    """

    rules: tuple[str, ...] = compatibility.RULES
    shapes: tuple[str, ...] = ("chain:3", "regular:3x2x1", "dynamic:7@4")
    temperatures: tuple[float, ...] = (0.0, 0.5, 1.0)
    repeat: int = 2
    prompts: str = ""
    record: bool = False

    def __post_init__(self):
        check_bool("record", self.record)
        for name in self.rules:
            if name not in compatibility.RULES:
                raise UserError(
                    f"rule {name!r} is unknown; choose from {', '.join(compatibility.RULES)}"
                )
        for name in self.shapes:
            if shapes.parse(name).depth == 0:
                raise UserError(
                    f"--shapes={name}: plain decoding is measured anyway; leave it out"
                )
        try:
            temperatures = tuple(float(t) for t in self.temperatures)
        except ValueError:
            raise UserError(
                f"--temperatures must be numbers, got {','.join(self.temperatures)}"
            ) from None
        for value in temperatures:
            check_float("temperature", value, 0)
        for name, values in {
            "rules": self.rules,
            "shapes": self.shapes,
            "temperatures": temperatures,
        }.items():
            if not values:
                raise UserError(f"nothing to compare: --{name} is empty")
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        check_int("repeat", self.repeat, 1)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run, checked.

    Attributes:
      target: path of the model whose text is wanted; empty: the bundled one.
      draft: path of the drafter; empty: the bundled one if the target is.
      tokenizer: a file to use instead of the one found with the weights.
      tree: a tree shape, see `trees.shapes.parse`.
      tau: temperature of the drafter's estimate that a child is right; None: the one
        fitted for the drafter, else `config.DEFAULT_TAU`.
      rule: which drafted tokens are kept, see `config.SpeculativeConfig`.
      proposal: how the drafter draws a tree, see `acceptance.compatibility`.
      cascade: a lossy policy between drafter and target, see `acceptance.cascade`.
      alpha: of the cascade.
      dtype: of weights, activations and cache; empty: see `LLM`.
      mesh: of devices that share the models, such as "tensor:4"; empty: one device.
      sampling: what each prompt asks for.
      engine: fixed sizes.
      benchmark: what scripts/benchmark.py compares.
    """

    target: str = ""
    draft: str = ""
    tokenizer: str = ""
    tree: str = "chain:5"
    tau: float | None = None
    rule: str = "exact"
    proposal: str = ""
    cascade: str = ""
    alpha: float = 0.1
    dtype: str = ""
    mesh: str = ""
    sampling: SamplingParams = SamplingParams()
    engine: EngineSettings = EngineSettings()
    benchmark: BenchmarkSettings = BenchmarkSettings()

    def __post_init__(self):
        for name in (
            "target",
            "draft",
            "tokenizer",
            "tree",
            "rule",
            "proposal",
            "cascade",
            "dtype",
            "mesh",
        ):
            value = getattr(self, name)
            if not isinstance(value, (str, Path)):
                raise UserError(f"{name} must be a text, got {value!r}")
            object.__setattr__(self, name, str(value))
        shape = shapes.parse(self.tree)
        depth = shape.depth
        check_optional("tau", self.tau)
        check_float("alpha", self.alpha, 0, 1)
        if depth or self.cascade:
            compatibility.choose_proposal(self.rule, self.proposal, shape, self.cascade)
        if self.dtype and self.dtype not in DTYPES:
            raise UserError(
                f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}"
            )
        longest = self.engine.max_len
        if longest is not None and depth >= longest:
            raise UserError(
                f"tree {self.tree!r} is {depth} deep and does not fit "
                f"max_len={longest}; take a shallower one or raise max_len"
            )

    @property
    def plain(self) -> bool:
        """Whether this is decoding without a drafter."""
        return shapes.parse(self.tree).depth == 0

    @property
    def compares_trees(self) -> bool:
        """Whether a benchmark of this needs a drafter."""
        return any(shapes.parse(name).depth for name in self.benchmark.shapes)

    def with_paths(self, needs_drafter: bool) -> Experiment:
        """The same with the bundled pair filled in, all paths looked up.

        Args:
          needs_drafter: whether a drafter will be loaded.

        Raises:
          UserError: a checkpoint is missing, or a drafter is wanted and none is named.
        """
        target, draft = self.target, self.draft
        if not target:
            target = str(BUNDLED / "target")
            draft = draft or str(BUNDLED / "draft")
        if not needs_drafter:
            draft = ""
        for what, path in {
            "target": target,
            "drafter": draft,
            "tokenizer": self.tokenizer,
        }.items():
            if path and not Path(path).expanduser().exists():
                raise UserError(f"no {what} at {path}; check the path")
        if needs_drafter and not draft:
            raise UserError(
                f"tree {self.tree!r} needs a drafter: give --draft=PATH, or "
                "--tree=none for plain decoding"
            )
        return dataclasses.replace(self, target=target, draft=draft)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON; takes the form of a configuration file."""
        return dataclasses.asdict(self)


_SECTIONS = {
    "sampling": SamplingParams,
    "engine": EngineSettings,
    "benchmark": BenchmarkSettings,
}


def build(
    values: Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None
) -> Experiment:
    """Turns a configuration file's values and the command line into settings.

    Args:
      values: a ConfigDict or nested mapping; what lacks takes its default.
      overrides: by dotted name ("sampling.max_tokens"); None means not given.

    Raises:
      UserError: an unknown key or a bad value, named.
    """
    tree = dict(values.to_dict() if hasattr(values, "to_dict") else values or {})
    for name in _SECTIONS:
        section = tree.get(name)
        if section is not None and not isinstance(section, Mapping):
            raise UserError(f"{name} must hold settings by name, got {section!r}")
        tree[name] = dict(section or {})
    for dotted, value in (overrides or {}).items():
        if value is not None:
            *section, name = dotted.split(".")
            (tree[section[0]] if section else tree)[name] = value
    for name, cls in _SECTIONS.items():
        tree[name] = _checked(cls, tree[name], name)
    return _checked(Experiment, tree, "configuration")


def _checked(cls, values: Mapping[str, Any], what: str):
    try:
        return from_mapping(cls, values, what)
    except TypeError as error:
        # A number where a list belongs, for example.
        raise UserError(f"{what}: {error}; check its values") from None


def comparison(values: Mapping[str, Any]) -> RuleComparison:
    """Of flags; None means not given.

    Raises:
      UserError: a bad value, named.
    """
    given = {name: value for name, value in values.items() if value is not None}
    return _checked(RuleComparison, given, "comparison")


def logit_bias(texts: Sequence[str] | None) -> tuple[tuple[int, float], ...] | None:
    """Pairs from TOKEN=NUMBER texts.

    Raises:
      UserError: not of that form.
    """
    if texts is None:
        return None
    pairs = []
    for text in texts:
        token, _, value = text.partition("=")
        try:
            pairs.append((int(token), float(value)))
        except ValueError:
            raise UserError(
                f"--logit_bias={text!r} is not TOKEN=NUMBER, such as 13=-100"
            ) from None
    return tuple(pairs)


def default_config():
    """All settings as a locked ConfigDict, for a file in configs/ to change.

    Unknown names are refused at the line that writes them.
    """
    from ml_collections import config_dict

    def to_config(values: Mapping[str, Any]):
        config = config_dict.ConfigDict()
        for name, value in values.items():
            if isinstance(value, Mapping):
                value = to_config(value)
            elif value is None:
                kind = float if name == "tau" else int
                value = config_dict.placeholder(kind)
            config[name] = value
        return config

    return to_config(Experiment().as_dict()).lock()
