"""Continues prompts with a target model and a drafter; see --help and README.md."""

import time

_STARTED = time.perf_counter()

from absl import flags  # noqa: E402

from treespec_jax import cli  # noqa: E402
from treespec_jax.experiments import (  # noqa: E402
    common_flags,
    generate,
    prompts,
    settings,
)

_CONFIG = cli.define_config()
_SHARED = common_flags.define(
    "target",
    "draft",
    "tokenizer",
    "rule",
    "proposal",
    "cascade",
    "alpha",
    "dtype",
    "max_tokens",
    "temperature",
    "seed",
    "max_batch",
    "max_len",
    "compilation_cache",
)
_TREE = flags.DEFINE_string("tree", None, "none, chain:5, regular:4x2x1, dynamic:15@5")
_PROMPT = flags.DEFINE_string("prompt", None, "the text to continue")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    "a prompt a line, or .jsonl with a prompt (or messages, with --chat) in each",
)
_CHAT = flags.DEFINE_bool(
    "chat",
    False,
    "answer prompts by the checkpoint's chat template; without any, talk on stdin",
)
_SYSTEM = flags.DEFINE_string("system", None, "system message, with --chat")
_CHAT_OPTION = flags.DEFINE_multi_string(
    "chat_option", None, "NAME=JSON for the chat template to see; repeatable"
)
_TOP_K = flags.DEFINE_integer("top_k", None, "keep the k likeliest tokens; 0: all")
_TOP_P = flags.DEFINE_float("top_p", None, "keep this mass of likeliest tokens")
_MIN_P = flags.DEFINE_float("min_p", None, "keep tokens this likely against the best")
_REPETITION = flags.DEFINE_float(
    "repetition_penalty", None, "> 1 puts off tokens of the prompt and the output"
)
_PRESENCE = flags.DEFINE_float(
    "presence_penalty", None, "taken off the logits of tokens that were emitted"
)
_FREQUENCY = flags.DEFINE_float(
    "frequency_penalty", None, "taken off once per time that one was emitted"
)
_LOGIT_BIAS = flags.DEFINE_multi_string(
    "logit_bias", None, "TOKEN=NUMBER, added to the logit of a token id; repeatable"
)
_STOP = flags.DEFINE_multi_string("stop", None, "text that ends the output; repeatable")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", None, "go on past the end of text")
_LOGPROBS = flags.DEFINE_bool("logprobs", None, "log p of every token, with --json")
_PAGE_SIZE = flags.DEFINE_integer("page_size", None, "cache rows per page")
_CACHE_DTYPE = flags.DEFINE_string("cache_dtype", None, "int8: half the cache, LOSSY")
_MESH = flags.DEFINE_string("mesh", None, "devices that share the models: tensor:4")
_STEPS = flags.DEFINE_integer("steps_per_dispatch", None, "steps per host round trip")
_COMPARE = flags.DEFINE_bool("compare", False, "decode plainly too and compare")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object instead of text")


def main(_):
    texts, opening = prompts.gather(
        _CHAT.value, _PROMPT.value, _PROMPTS_FILE.value, _SYSTEM.value
    )
    experiment = settings.build(
        _CONFIG.value,
        {
            **_SHARED.settings(),
            "tree": _TREE.value,
            "sampling.top_k": _TOP_K.value,
            "sampling.top_p": _TOP_P.value,
            "sampling.min_p": _MIN_P.value,
            "sampling.repetition_penalty": _REPETITION.value,
            "sampling.presence_penalty": _PRESENCE.value,
            "sampling.frequency_penalty": _FREQUENCY.value,
            "sampling.logit_bias": settings.logit_bias(_LOGIT_BIAS.value),
            "sampling.stop": _STOP.value,
            "sampling.ignore_eos": _IGNORE_EOS.value,
            "sampling.logprobs": _LOGPROBS.value,
            "mesh": _MESH.value,
            "engine.cache_dtype": _CACHE_DTYPE.value,
            "engine.page_size": _PAGE_SIZE.value,
            "engine.steps_per_dispatch": _STEPS.value,
        },
    )
    experiment = experiment.with_paths(needs_drafter=not experiment.plain)

    generate.run(
        generate.Job(
            experiment,
            texts,
            opening=opening,
            options=prompts.options(_CHAT_OPTION.value),
            compare=_COMPARE.value,
            as_json=_JSON.value,
            compilation_cache=_SHARED["compilation_cache"],
            started=_STARTED,
        )
    )


if __name__ == "__main__":
    cli.run(main)
