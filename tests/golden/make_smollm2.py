"""Makes tests/golden/smollm2.json: what SmolLM2-135M-Instruct reads and writes.

    python tests/golden/make_smollm2.py MODEL.gguf       (torch, transformers, gguf)

MODEL.gguf is the file that scripts/fetch_model.py smollm2-135m-instruct fetches. Made
with torch 2.13.0, transformers 5.24.0, tokenizers 0.23.3 and gguf 0.19.0. The file
holds:

  file: sha256 of the model.
  lines, ids: varied texts, and their tokens.
  answers: prompts as tokens, and the 64 tokens and the text that follow, greedily.
  near_ties: where the two likeliest tokens of an answer are closer than NEAR.
  words: how the vocabularies of other families cut some of the lines, by the name of
    the pre-tokeniser.

The weights are read by transformers' own reader of GGUF files, in float32. The
tokenizer is put together here as the model's tokenizer.json has it (digits one by one,
then GPT-2's words), from the vocabulary and merges in the file: without a network that
file cannot be had, and transformers' reader of GGUF tokenizers leaves the digits
together. The patterns of `words` are transformers' own.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
import sys

import gguf
import tokenizers as tk
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers
from transformers.integrations.gguf import gguf_tokenizer_mapping

OUTPUT = pathlib.Path(__file__).with_name("smollm2.json")
TOKENS, NEAR = 64, 2e-3
CHATS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Give me three tips for learning to cook.",
    "What is 17 + 25? Answer with the number alone.",
    "Explain in one sentence why the sky is blue.",
    "Rewrite politely: give me the report now!",
    "Name five animals that can fly.",
]
TEXTS = [
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "The three primary colours are",
]
LINES = [
    "",
    " ",
    "   ",
    "\n",
    "\t",
    " leading space",
    "  two leading spaces",
    "     five, and trailing     ",
    "\ttab first",
    "Hello, world!",
    "It's 12345 o'clock; they'll say we've won, I'm sure you'd agree.",
    "IT'S SHOUTED, THEY'LL SAY",
    "1 22 333 4444 55555 3.14159 1,000,000 0x1F 1e-10 ½ ² Ⅳ ٣",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # comment\n',
    "for (int i = 0; i < n; ++i) { a[i] *= 2; }",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    '<html><body class="a">&nbsp;</body></html>',
    "\\begin{equation} e^{i\\pi} + 1 = 0 \\end{equation}",
    "if __name__ == '__main__':\n\tmain()\n",
    '#include <stdio.h>\n\nint main(void) {\n    printf("%d\\n", 42);\n}\n',
    '{"key": [1, 2.5, null, true], "nested": {"a": "b"}}',
    "你好，世界！",
    "今天天气很好，我们去公园吧。",
    "日本語のテキストです。カタカナとひらがな。",
    "한국어 문장도 있습니다.",
    "漢字 and English mixed 文字列 123",
    "😀",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumbs",
    "🚀🚀🚀 to the moon 🌕",
    "Привет, мир! Ёлка.",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Ünïcödé ñandú façade naïve Zoë café",
    "cafe\u0301 e\u0301\u0302 combining",
    "ﬁ ligature, ﷽, ꙮ, 𒀱, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "zero\u200bwidth\u200djoiner\ufeffmark",
    "non\u00a0breaking\u3000ideographic\u2003em spaces",
    "line one\nline two\r\nline three\rline four",
    "\n\n\nthree newlines first",
    "spaces before newline   \n   after",
    "a\n \n  \n   b",
    "word" * 20,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---===___***",
    "http://example.com/path?query=1&b=2#frag",
    "user@example.com, C:\\path\\file.txt, /usr/bin/env",
    "$100, €50, £20, ¥3000, 50%",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_start|>",
    "<|endoftext|>",
    "before<|endoftext|>after",
    " <|im_end|> ",
    "<|im_end|><|im_end|>\n<|im_start|>assistant\n",
    "<|im_start |> is no token, nor is <|imstart|>",
    "<repo_name>a/b<file_sep>x.py\nprint(1)",
    "<filename>main.c<gh_stars>10-100<issue_start>",
    "<jupyter_code>1+1<jupyter_output>2<empty_output>",
    "Ġ is the stand-in for a space, Ċ for a line break",
    "  <|im_end|>  spaces around",
    "The quick brown fox jumps over the lazy dog.",
    "\"Quoted,\" she said, 'twice'—and left…",
    "«guillemets» „low“ ‘single’ “double”",
    "α ≤ β ⇒ ∀x ∈ ℝ: x² ≥ 0",
    "I\u2019ve curly apostrophes; don\u2019t they\u2019re fun",
    "\x00\x01\x7f control characters",
    "ÿþýü Latin-1 tail",
    "snake_case camelCase PascalCase kebab-case SCREAMING_SNAKE",
]


def lines() -> list[str]:
    """200 of them: those above, and random fragments of them put together."""
    draw = random.Random(0)
    found = list(LINES)
    while len(found) < 200:
        parts = [draw.choice(LINES) for _ in range(draw.randint(2, 3))]
        cuts = [part[: draw.randint(1, 24)] for part in parts]
        found.append(draw.choice(["", " ", "\n"]).join(cuts))
    return found


def make_tokenizer(reader: gguf.GGUFReader):
    def values(name):
        return reader.fields[f"tokenizer.ggml.{name}"].contents()

    vocabulary = {text: token for token, text in enumerate(values("tokens"))}
    merges = [tuple(merge.split(" ")) for merge in values("merges")]
    made = tk.Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    made.decoder = decoders.ByteLevel()
    control = [
        text
        for text, kind in zip(values("tokens"), values("token_type"), strict=True)
        if kind == gguf.TokenType.CONTROL
    ]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        additional_special_tokens=control,
        chat_template=reader.fields["tokenizer.chat_template"].contents(),
    )


def answer(model, ids: list[int]) -> tuple[list[int], list[tuple[int, int, float]]]:
    """The likeliest tokens one by one; places of near ties, runner-up and distance."""
    tokens, ties, cache = [], [], None
    feed = torch.tensor([ids])
    for step in range(TOKENS):
        with torch.no_grad():
            done = model(feed, past_key_values=cache, use_cache=True)
        cache = done.past_key_values
        (best, second), (first, other) = done.logits[0, -1].float().topk(2)
        tokens.append(int(first))
        if best - second < NEAR:
            ties.append((step, int(other), round(float(best - second), 6)))
        feed = torch.tensor([[int(first)]])
    return tokens, ties


def cut(pattern: str, text: str) -> list[str]:
    split = pre_tokenizers.Split(tk.Regex(pattern), "isolated")
    return [word for word, _ in split.pre_tokenize_str(text)]


def main(path: str) -> None:
    file = pathlib.Path(path).resolve()
    reader = gguf.GGUFReader(file)
    tokenizer = make_tokenizer(reader)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for text in CHATS
    ]
    answers, near_ties = [], []
    for index, prompt in enumerate([*prompts, *TEXTS]):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tokens, ties = answer(model, ids)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        answers.append({"prompt": ids, "tokens": tokens, "text": text})
        near_ties += [
            dict(answer=index, step=step, other=other, distance=distance)
            for step, other, distance in ties
        ]
        print(repr(text))
    texts = lines()
    splits = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS
    found = {
        "file": hashlib.sha256(file.read_bytes()).hexdigest(),
        "lines": texts,
        "ids": [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts],
        "answers": answers,
        "near_ties": near_ties,
        "words": {
            name: [cut(splits[name], text) for text in LINES]
            for name in ("llama-bpe", "qwen2", "tekken")
        },
    }
    values = [f"{json.dumps(name)}: {json.dumps(v)}" for name, v in found.items()]
    OUTPUT.write_text("{\n" + ",\n".join(values) + "\n}\n")
    print(len(texts), "lines,", near_ties)


if __name__ == "__main__":
    main(sys.argv[1])
