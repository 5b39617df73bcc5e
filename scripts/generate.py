"""Continues prompts with a target model and a drafter; see --help and README.md."""

import time

_STARTED = time.perf_counter()

from absl import flags  # noqa: E402

from treespec_jax import cli  # noqa: E402
from treespec_jax.experiments import generate, prompts, settings  # noqa: E402

_CONFIG = cli.define_config()
_TARGET = flags.DEFINE_string(
    "target", None, "target's checkpoint; else the bundled one"
)
_DRAFT = flags.DEFINE_string("draft", None, "drafter's checkpoint")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer file, if not the own")
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
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "tokens to emit at most")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0 is greedy")
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
_SEED = flags.DEFINE_integer("seed", None, "of the noise")
_STOP = flags.DEFINE_multi_string("stop", None, "text that ends the output; repeatable")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", None, "go on past the end of text")
_LOGPROBS = flags.DEFINE_bool("logprobs", None, "log p of every token, with --json")
_RULE = flags.DEFINE_string("rule", None, "exact, token, block, traversal, typical")
_DRAWS = flags.DEFINE_string(
    "draws", None, "shared, sampled, with_replacement, best; else as the rule has it"
)
_CASCADE = flags.DEFINE_string(
    "cascade", None, "LOSSY: chow, diff, opt, token_v1, token_v2 or token_v3"
)
_ALPHA = flags.DEFINE_float("alpha", None, "of the cascade, in [0, 1]")
_DTYPE = flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16")
_MAX_LEN = flags.DEFINE_integer("max_len", None, "tokens per text, prompt included")
_MAX_BATCH = flags.DEFINE_integer("max_batch", None, "texts decoded together")
_PAGE_SIZE = flags.DEFINE_integer("page_size", None, "cache rows per page")
_STEPS = flags.DEFINE_integer("steps_per_dispatch", None, "steps per host round trip")
_COMPARE = flags.DEFINE_bool("compare", False, "decode plainly too and compare")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object instead of text")
_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "its folder; else the user's cache folder; '' is none"
)


def main(_):
    texts, opening = prompts.gather(
        _CHAT.value, _PROMPT.value, _PROMPTS_FILE.value, _SYSTEM.value
    )
    experiment = settings.build(
        _CONFIG.value,
        {
            "target": _TARGET.value,
            "draft": _DRAFT.value,
            "tokenizer": _TOKENIZER.value,
            "tree": _TREE.value,
            "rule": _RULE.value,
            "draws": _DRAWS.value,
            "cascade": _CASCADE.value,
            "alpha": _ALPHA.value,
            "dtype": _DTYPE.value,
            "sampling.max_tokens": _MAX_TOKENS.value,
            "sampling.temperature": _TEMPERATURE.value,
            "sampling.top_k": _TOP_K.value,
            "sampling.top_p": _TOP_P.value,
            "sampling.min_p": _MIN_P.value,
            "sampling.repetition_penalty": _REPETITION.value,
            "sampling.presence_penalty": _PRESENCE.value,
            "sampling.frequency_penalty": _FREQUENCY.value,
            "sampling.logit_bias": settings.logit_bias(_LOGIT_BIAS.value),
            "sampling.seed": _SEED.value,
            "sampling.stop": _STOP.value,
            "sampling.ignore_eos": _IGNORE_EOS.value,
            "sampling.logprobs": _LOGPROBS.value,
            "engine.max_len": _MAX_LEN.value,
            "engine.max_batch": _MAX_BATCH.value,
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
            compilation_cache=_CACHE.value,
            started=_STARTED,
        )
    )


if __name__ == "__main__":
    cli.run(main)
