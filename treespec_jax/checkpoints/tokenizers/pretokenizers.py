"""How byte-level vocabularies cut a text into words before they merge, by name.

The names are those of `tokenizer.ggml.pre` in GGUF files, the regular expressions those
that the vocabularies were trained with (`tokenizer.json` of the models).
"""

from __future__ import annotations

import dataclasses

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE = rf"(?i:{_CONTRACTIONS})"
_SPACES = r"\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LINES = r"\s*[\r\n]+"
_LLAMA3 = rf"{_ANY_CASE}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_LINES}|{_SPACES}"
_QWEN2 = rf"{_ANY_CASE}|{_WORD}|{_DIGIT}|{_SIGNS}|{_LINES}|{_SPACES}"
_SEED = rf"{_ANY_CASE}|{_WORD}|{_DIGIT}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}|{_SPACES}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    rf"|{_DIGIT}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}|{_SPACES}"
)
# From U+0800 to the end of Hangul, as these models were trained.
_ASIAN = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_WIDE_SIGNS = r"\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}"


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut.

    Attributes:
      patterns: regular expressions, applied in order; each cuts its matches out of what
        the ones before it left.
      whole_words: a word that is a token is that token, whatever the merges say.
      adds_bos: whether a text begins with the token for that, where a file does not
        say.
      composes: whether characters are composed first (NFC).
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    composes: bool = False


_BY_DIGIT = PreTokenizer((_DIGIT, _GPT2))
_BY_GPT2 = PreTokenizer((_GPT2,))
_BY_LLAMA3 = PreTokenizer((_LLAMA3,), whole_words=True, adds_bos=True)
_BY_QWEN2 = PreTokenizer((_QWEN2,), composes=True)
# What llama.cpp does for files that do not name theirs.
DEFAULT = "default"
PRE_TOKENIZERS = {
    DEFAULT: PreTokenizer(
        (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
    **dict.fromkeys(("gpt-2", "a.x-4.0", "mellum", "trillion"), _BY_GPT2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"),
        _BY_DIGIT,
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0", "pixtral"),
        _BY_LLAMA3,
    ),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, adds_bos=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _BY_QWEN2),
    **dict.fromkeys(("megrez", "kormo"), PreTokenizer((_QWEN2,))),
    "seed-coder": PreTokenizer((_SEED,)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
            rf"\s?[!-/:-~{_WIDE_SIGNS}]+",
            r"\s+$",
            _ASIAN,
            _DIGIT,
        )
    ),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, _DIGIT)
    ),
}
