"""Makes tests/golden/tokenizers: a small tokenizer of every family.

    python tests/golden/make_tokenizers.py     (transformers, tokenizers, sentencepiece)

Every folder holds the files that a checkpoint of the family has, the chat template
included (written for this purpose, in the manner of the family's own), and
expected.json: what `transformers.AutoTokenizer` makes of texts and conversations.
"""

from __future__ import annotations

import io
import json
import pathlib
import shutil

import sentencepiece
import tokenizers as tk
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

ROOT = pathlib.Path(__file__).resolve().parent / "tokenizers"
SPACE = "\u2581"
CORPUS = [
    "once upon a time there was a little girl named lily who liked the red ball",
    "The cat sat on the mat, and looked at the dog. It's 12345 o'clock!",
    "Le café était fermé; naïve Zoë went to Zürich.",
    "你好世界 日本語 한국어 привет мир",
    "def f(x):\n    return x + 1\n",
] * 6
TEXTS = [
    "",
    " ",
    "the little girl",
    "  two  spaces   and more ",
    "tab\tand\nline\n\n  indented",
    "Naïve cafe\u0301 e\u0301\u0301 Zoë",
    "你好世界 😀👩\u200d👧\u200d👦 ok",
    "It's 12345 o'clock, they'll say",
    "\ufeff\u00a0odd\u3000spaces\u200b",
    "unknown ﷽ ꙮ 𒀱 characters",
    "a <s>b</s> c",
    "<|end|>",
    "x <|end|> y<|end|>  z",
    "<think> so </think>and <tool>  the <tool> end",
    "the <mask>  cat <sep>\n dog",
]
CONVERSATIONS = [
    [{"role": "user", "content": "hello there"}],
    [
        {"role": "system", "content": "  be kind "},
        {"role": "user", "content": "who sat on the mat?"},
    ],
    [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": " sat on it\n"},
        {"role": "user", "content": "é 你好 😀"},
    ],
    [
        {"role": "user", "content": "first"},
        {"role": "user", "content": "second"},
    ],
    [{"role": "user", "content": 'say <|end|> and </s>, "please" & thanks'}],
]
ALTERNATE = """\
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must take turns, the user first') }}
    {%- endif %}
{%- endfor %}
"""
HEADERS = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|head|>' + message['role'] + '<|body|>\\n\\n' }}
    {{- message['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|body|>\\n\\n' }}
{%- endif %}
"""
CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|start|>system\\nYou help.<|end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {% generation %}
        {{- '<|start|>assistant\\n' ~ message.content.strip('\\n') ~ '<|end|>\\n' }}
        {% endgeneration %}
        {%- continue %}
    {%- endif %}
    {{- '<|start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|end|>\\n' }}
{%- endfor %}
{%- set last = namespace(said='') %}
{%- for message in messages %}{% set last.said = message %}{% endfor %}
{{- last.said | tojson }}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
BRACKETS = (
    """\
{%- if messages[0]['role'] == 'system' %}
    {%- set front, turns = messages[0]['content'] | trim + '\\n\\n', messages[1:] %}
{%- else %}
    {%- set front, turns = '', messages %}
{%- endif %}
"""
    + ALTERNATE
    + """\
{{- bos_token }}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (front if loop.first else '') }}
        {{- message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
)
TURNS = (
    """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- raise_exception('no system here') }}
{%- endif %}
{%- set turns = messages %}
"""
    + ALTERNATE
    + """\
{% for message in turns %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
<|start|>{{ role }}
{{ message['content'] | trim }}<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|start|>model
{% endif %}"""
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CONTROL = ["<|start|>", "<|head|>", "<|body|>", "<|end|>"]


def bpe(size: int, pre, special: list[str], alphabet=(), normalizer=None):
    """Vocabulary and merges of a byte pair encoding of the corpus."""
    trained = tk.Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = normalizer, pre
    trainer = tk.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def with_byte_fallback(front: list[str]) -> tk.Tokenizer:
    """As converters of sentencepiece models make it; no normaliser, no decoder yet."""
    metaspace = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    vocab, merges = bpe(360, metaspace, [*front, *BYTES])
    return tk.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )


def byte_level(splitter, special: list[str]) -> tk.Tokenizer:
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter is None)
    pre = pre if splitter is None else pre_tokenizers.Sequence([splitter, pre])
    vocab, merges = bpe(340, pre, [], pre_tokenizers.ByteLevel.alphabet())
    made = tk.Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


def template(*tokens: str, made: tk.Tokenizer):
    return processors.TemplateProcessing(
        single=" ".join([*tokens, "$A"]),
        special_tokens=[(token, made.token_to_id(token)) for token in tokens],
    )


def strip_decoder():
    return decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def added(content: str) -> dict:
    """A token as older configurations write it."""
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    return {"__type": "AddedToken", "content": content, **dict.fromkeys(flags, False)}


def llama2():
    made = with_byte_fallback(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    made.decoder = strip_decoder()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = template("<s>", made=made)
    return made, {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": added("<s>"),
        "eos_token": added("</s>"),
        "unk_token": added("<unk>"),
        "chat_template": BRACKETS,
    }


def llama3():
    regex = tk.Regex(
        r"(?i:'s|'t|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(regex, "isolated")
    made = byte_level(split, ["<|begin|>", "<|text_end|>", *CONTROL])
    made.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template("<|begin|>", made=made)]
    )
    return made, {
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": [
            {"name": "other", "template": "{{ messages }}"},
            {"name": "default", "template": HEADERS},
        ],
    }


def qwen():
    """With what training left in the file, a plain added token and two control ones."""
    made = byte_level(None, ["<|text_end|>", *CONTROL])
    made.normalizer = normalizers.NFC()
    made.add_tokens(["<think>", "</think>"])
    made.enable_truncation(4)
    made.enable_padding(length=12)
    return made, {
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|end|>",
        "pad_token": "<|text_end|>",
        "additional_special_tokens": ["<|start|>", "<|end|>"],
        "chat_template.jinja": CHATML,
    }


def gemma():
    made = with_byte_fallback(["<pad>", "</s>", "<s>", "<unk>"])
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens(["<pad>", "</s>", "<s>", "<unk>", *CONTROL])
    made.add_tokens([tk.AddedToken("\n\n", normalized=False)])
    made.post_processor = template("<s>", made=made)
    return made, {
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": TURNS,
    }


def mistral():
    """Metaspace, and added tokens that take the space beside them along; two more
    that the configuration only names."""
    made = with_byte_fallback(["<unk>", "<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.Metaspace(
        SPACE, prepend_scheme="first", split=False
    )
    made.decoder = strip_decoder()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.add_tokens(
        [
            tk.AddedToken("<mask>", lstrip=True),
            tk.AddedToken("<sep>", rstrip=True, special=True),
            tk.AddedToken("<tool>", normalized=True, single_word=True),
        ]
    )
    made.post_processor = template("<s>", made=made)
    return made, {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["[INST]", "[/INST]"],
        "chat_template": BRACKETS,
    }


def smollm():
    """No token in front, and tokens that only the configuration knows."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    made = byte_level(digits, ["<|text_end|>"])
    size = made.get_vocab_size()
    added = {size - 1: ("<|text_end|>", True), size: ("<|start|>", True)}
    added |= {size + 1: ("<|end|>", True), size + 2: ("<tool>", False)}
    return made, {
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "added_tokens_decoder": {
            str(token): {
                "content": content,
                "special": special,
                "normalized": False,
                "lstrip": False,
                "rstrip": not special,
                "single_word": False,
            }
            for token, (content, special) in added.items()
        },
        "chat_template": CHATML,
    }


def sentencepiece_model(legacy: bool):
    def write(folder: pathlib.Path):
        # To a buffer: a model that is written to a path holds that path.
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        named = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|end|>": 400}
        (folder / "added_tokens.json").write_text('{"<|end|>": 400, "<tool>": 401}')
        plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        return {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": legacy,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "added_tokens_decoder": {
                str(token): {"content": content, "special": True, **plain}
                for content, token in named.items()
            }
            | {"401": {"content": "<tool>", "special": False, **plain}},
            "chat_template": BRACKETS,
        }

    return write


KINDS = {
    "llama2": llama2,
    "llama3": llama3,
    "qwen": qwen,
    "gemma": gemma,
    "mistral": mistral,
    "smollm": smollm,
}


def expectations(folder: pathlib.Path) -> dict:
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [reader(text)["input_ids"] for text in TEXTS]
    chats = []
    for messages in CONVERSATIONS:
        chat = {"messages": messages}
        try:
            chat["text"] = reader.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            chat["ids"] = reader(chat["text"], add_special_tokens=False)["input_ids"]
        except Exception as error:
            chat["error"] = str(error)
        chats.append(chat)
    thinking = reader.apply_chat_template(
        CONVERSATIONS[0],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return {
        "texts": TEXTS,
        "ids": ids,
        "decoded": [reader.decode(i, skip_special_tokens=True) for i in ids],
        "size": len(reader),
        "bos": reader.bos_token_id,
        "eos": reader.eos_token_id,
        "chats": chats,
        "not_thinking": thinking,
    }


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    for name in [*KINDS, "sentencepiece", "sentencepiece_new"]:
        folder = ROOT / name
        folder.mkdir(parents=True)
        if name in KINDS:
            made, config = KINDS[name]()
            made.save(str(folder / "tokenizer.json"), pretty=False)
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        else:
            config = sentencepiece_model(name == "sentencepiece")(folder)
        jinja = config.pop("chat_template.jinja", None)
        if jinja:
            (folder / "chat_template.jinja").write_text(jinja)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
        expected = expectations(folder)
        (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        print(name, expected["size"], expected["ids"][2][:8])


if __name__ == "__main__":
    main()
