"""Flags of settings, made from the fields of their classes and one table of texts."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from treespec_jax.commands import config_file, settings
from treespec_jax.commands.flags import numbers
from treespec_jax.commands.settings import Setting
from treespec_jax.drafting import METHODS
from treespec_jax.errors import UserError

# --help shows the flags below as those of the command that defines them.
flags.disclaim_key_flags()

# A text for every field; "default: …" is added where the default is a value that says
# it all.
HELP: dict[str, dict[str, str]] = {
    "": {
        "target": "target's checkpoint: a path, org/name of the Hugging Face Hub, or a "
        "name of list_models",
        "tokenizer": "tokenizer file or name; default: the checkpoint's own",
        "dtype": "of activations: float32, bfloat16 or float16; default: float32 on a "
        "CPU, else the checkpoint's",
        "weights": "float32, bfloat16, float16, int8 or int8:128 (a scale per 128 "
        "inputs); int8 is LOSSY; default: as --dtype, or int8 where so stored",
        "mesh": "devices that share the models: tensor:4; default: one device",
    },
    "sampling": {
        "max_tokens": "tokens to emit per prompt, at most",
        "min_tokens": "tokens to emit before one that ends the text",
        "temperature": "0 is greedy",
        "adaptive_temperature": "LOSSY: the temperature over --temperature: entropy:S "
        "(0.8^(S / entropy)), depth:S (S^depth in the tree) or siblings:S "
        "(number of children^S); default: none",
        "top_k": "keep the k likeliest tokens; 0 or -1: all",
        "top_p": "keep the likeliest tokens that have this probability together",
        "min_p": "keep tokens of at least this fraction of the greatest probability",
        "seed": "of the first prompt's noise, those of the others follow; -1: a fresh "
        "one, which --json reports",
        "stop": "text that ends the output; repeatable; default: none",
        "stop_token_ids": "tokens that end the output; default: none",
        "include_stop_str_in_output": "keep the stop text that ended the output",
        "ignore_eos": "go on past the end of text",
        "n": "texts per prompt, with seeds that follow; needs a temperature",
        "best_of": "texts per prompt that are tried; the n of the greatest mean log p "
        "are kept, best first; default: n",
        "logprobs": "log p of every token and of so many likelier ones, with --json; "
        "true: of the token alone; default: none",
        "prompt_logprobs": "the same of the prompt's tokens; default: none",
        "bad_words": "text whose tokens must not come about; repeatable; default: none",
        "allowed_token_ids": "the only tokens that may be emitted; default: all",
        "repetition_penalty": "> 1 makes tokens of prompt and output less likely",
        "presence_penalty": "taken off the logits of tokens that were emitted",
        "frequency_penalty": "taken off once per time that a token was emitted",
        "logit_bias": "TOKEN=NUMBER, added to the logit of a token id; repeatable; "
        "default: none",
        "speculate": "grow trees; --nospeculate decodes plainly",
        "max_time": "seconds per text, waiting and compiling included; default: any",
    },
    "speculative": {
        "method": f"what drafts: {', '.join(METHODS)}; default: that of the "
        "drafter, else auto",
        "model": "drafter's checkpoint: a small model, EAGLE or Medusa; default: the "
        "one for that name, if the target is a name of list_models",
        "tree": "auto (a choice at every step), none, chain:5, regular:4x2x1, "
        "dynamic:15@5, dynamic:15@5~cost (levels that are worth their time), "
        "allotted:15@5, static:0.0.0+0.1+1 (paths of child ranks), "
        "medusa:mc_sim_7b_63, medusa:mc_sim_7b_63@3 or file:PATH (docs/shapes.md); "
        "default: auto under the rule exact, else the method's",
        "max_nodes_per_level": "drafted nodes of equal depth; larger trees are cut; "
        "default: the tree's",
        "max_total_nodes": "drafted nodes of a tree; larger trees are cut; default: "
        "the tree's",
        "tau": "temperature of the drafter's estimates; default: the one fitted by "
        "calibrate_drafter, else 0.7",
        "adaptive_temperature": "the drafter's temperature over the request's: depth:S "
        "(S^depth), siblings:S (number^S) or entropy:S (0.8^(S / entropy)); default: "
        "none",
        "rule": "exact, token, block, traversal, terminal or (LOSSY) typical",
        "proposal": "how nodes are proposed: shared, sampled, with_replacement, best "
        "or best_kept; default: the usual one of the rule",
        "cascade": "LOSSY: chow, diff, opt, token_v1, token_v2 or token_v3; default: "
        "none",
        "alpha": "of the cascade, in [0, 1]",
        "typical_eps": "typical rule: a token of this probability always passes",
        "typical_delta": "typical rule: its bound is min(eps, delta exp(-entropy))",
        "options": "NAME=VALUE, a setting of the method; repeatable; default: none",
        "recycle_table": "file of successors that methods recycle and auto begin with; "
        "generate writes it at the end; default: none",
        "check_drafter": "try an EAGLE or Medusa drafter on the target's own text, "
        "and refuse one that reads the wrong rows",
    },
    "engine": {
        "max_batch": "texts decoded together",
        "max_len": "tokens per text, prompt included; default: the models' limit, 4096 "
        "at most",
        "page_size": "cache rows per page",
        "num_pages": "pages in all; default: enough for max_batch texts of max_len",
        "steps_per_dispatch": "steps per host round trip",
        "prefill_chunks": "rows of the compiled prefill passes, ascending",
        "lanes": "cache rows are padded to a multiple of it; default: 128 on a TPU, "
        "else 1",
        "cache_dtype": "float32, bfloat16, float16, or int8: half the cache, LOSSY; "
        "default: as --dtype",
        "exact": "bitwise: the target's logits have the same bits whatever tree, batch "
        "and pages, so that no tie is left to rounding; int8 weights and cache, LOSSY; "
        "default: rounding as it comes",
        "prefix_cache": "texts that begin alike share the pages of their beginning",
        "record": "also say how often the drafter's estimates come true",
    },
    "benchmark": {
        "suite": "mini, stories, spec-bench:PATH, mt-bench:PATH, humaneval:PATH, "
        "gsm8k:PATH or file:PATH; default: mini for chat models, stories for others",
        "questions": "of each category, the first so many; 0: all",
        "methods": "methods of drafting to compare; default: --method",
        "shapes": "tree shapes to compare",
        "rules": "acceptance rules to compare; default: --rule",
        "temperatures": "of the requests, to compare; default: --temperature",
        "batches": "texts decoded together, to compare; default: --max_batch",
        "weights": "types of weights to compare: float32, bfloat16, float16, int8 or "
        "int8:128; int8 is LOSSY; default: as --dtype, or int8 where so stored",
        "peers": "transformers: also time Hugging Face's generation; default: none",
        "rounds": "each runs all combinations on all questions",
        "latency_tokens": "tokens per turn of the pass that times a stream; 0: none",
        "breakdown": "also time the parts of a step, and verifying T nodes",
        "chat_options": "NAME=VALUE for the chat template to see; repeatable; "
        "default: none",
    },
    "comparison": {
        "rules": "acceptance rules to compare",
        "shapes": "tree shapes to compare them on",
        "temperatures": "of the requests",
        "rounds": "each runs everything on all prompts",
        "prompts_file": "a prompt a line, or .jsonl; default: story openings",
    },
}
# A field that has a flag of another name.
_NAMES = {
    "speculative.model": "draft",
    "speculative.adaptive_temperature": "draft_adaptive_temperature",
    "speculative.options": "drafter_option",
    "benchmark.chat_options": "chat_option",
}
# Settings of several texts, each of which may hold commas.
_TEXTS = ("sampling.stop", "sampling.bad_words")
# How many texts a prompt has, which few commands can use.
_SAMPLES = ("sampling.n", "sampling.best_of")
# Settings that say how many, or by true and false whether.
_COUNTS = ("sampling.logprobs", "sampling.prompt_logprobs")
_DEFINE = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    tuple: flags.DEFINE_list,
}


@dataclasses.dataclass(frozen=True)
class SettingFlags:
    """--config, and a flag for every setting that decides how a model runs.

    These are the settings outside of sections (`target`, `dtype`, …) and those of the
    sections `settings.MODEL`. A flag that is not given changes nothing.

    Attributes:
      more: names of further sections.
      defaults: of one command, by dotted name, in force without a --config.
      without: dotted names of settings that the command chooses by itself.
      samples: whether a prompt may have several texts (--n, --best_of).
    """

    more: Sequence[str] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    without: Collection[str] = ()
    samples: bool = False

    def __iter__(self) -> Iterator[Setting]:
        for section in ("", *settings.MODEL, *self.more):
            for setting in settings.fields_of(section):
                several = setting.dotted in _SAMPLES and not self.samples
                if setting.dotted not in self.without and not several:
                    default = self.defaults.get(setting.dotted, setting.default)
                    yield dataclasses.replace(setting, default=default)

    def define(self) -> None:
        """Defines the flags, each by the type of its field."""
        config_file.define()
        for setting in self:
            words = HELP[setting.section][setting.name]
            if setting.default not in (None, "", ()):
                words += f"; default: {_shown(setting.default)}"
            if setting.dotted in _COUNTS:
                _define_count(name_of(setting), words)
                continue
            define = flags.DEFINE_multi_string
            if setting.dotted not in _TEXTS and not _is_mapping(setting.kind):
                define = _DEFINE[typing.get_origin(setting.kind) or setting.kind]
            define(name_of(setting), None, words)

    def experiment(self, preset: Mapping[str, Any] | None = None):
        """The settings in force, once the command line is parsed.

        Args:
          preset: values by dotted name that win over a --config, not over flags.

        Returns:
          a `settings.Experiment`.

        Raises:
          UserError: an unknown key or a bad value, named.
        """
        config = flags.FLAGS.config
        given = {} if config is not None else dict(self.defaults)
        given |= preset or {}
        for setting in self:
            value = flags.FLAGS[name_of(setting)].value
            if value is not None:
                given[setting.dotted] = _parsed(setting, value)
        built = settings.build(config, given)
        if not self.samples and built.sampling.samples > 1:
            raise UserError(
                f"sampling.n={built.sampling.n} and best_of={built.sampling.best_of}: "
                "this command takes one text of a prompt; leave them to generate"
            )
        return built


class _CountParser(flags.ArgumentParser):
    """A whole number, or true or false as of a flag without a value."""

    syntactic_help = "a whole number, true or false"

    def parse(self, argument: Any) -> int | bool:
        text = str(argument).lower()
        if text in ("true", "false"):
            return text == "true"
        if not text.isdecimal():
            raise ValueError(f"expected {self.syntactic_help}, got {argument!r}")
        return int(text)


def _define_count(name: str, words: str) -> None:
    """A flag --name=5 that --name alone, and --noname, are too."""
    parser, serializer = _CountParser(), flags.ArgumentSerializer()
    flags.DEFINE_flag(flags.Flag(parser, serializer, name, None, words, boolean=True))


def name_of(setting: Setting) -> str:
    """The name of a setting's flag."""
    return _NAMES.get(setting.dotted, setting.name)


def _shown(default: Any) -> str:
    """A default as the command line takes it."""
    if isinstance(default, tuple):
        return ",".join(map(_shown, default))
    if isinstance(default, bool):
        return str(default).lower()
    return format(default, "g") if isinstance(default, float) else str(default)


def _is_mapping(kind: Any) -> bool:
    """Whether a field holds pairs."""
    origin, items = typing.get_origin(kind), typing.get_args(kind)
    return origin is Mapping or (
        origin is tuple and typing.get_origin(items[0]) is tuple
    )


def _parsed(setting: Setting, value: Any) -> Any:
    """The setting's value of what absl parsed."""
    name, items = name_of(setting), typing.get_args(setting.kind)
    if setting.dotted in _TEXTS:
        return tuple(value)
    if _is_mapping(setting.kind):
        pair = _option if typing.get_args(items[0])[0] is str else _bias
        return tuple(pair(name, text) for text in value)
    if typing.get_origin(setting.kind) is tuple:
        return tuple(value) if items[0] is str else numbers(name, value, items[0])
    return value


def _option(flag: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UserError(f"--{flag}={text!r} is not NAME=VALUE, such as longest=3")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _bias(flag: str, text: str) -> tuple[int, float]:
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        example = "such as 13=-100"
        raise UserError(f"--{flag}={text!r} is not TOKEN=NUMBER, {example}") from None
