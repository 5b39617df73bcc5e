"""Makes tests/golden/oddities.json: tokenizers and messages that trip programs.

    python tests/golden/make_oddities.py     (transformers, tokenizers, jinja2)

Each tokenizer is held with its configuration, and with what
`transformers.AutoTokenizer` makes of texts and conversations.
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import tokenizers as tk
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

FILE = pathlib.Path(__file__).resolve().parent / "oddities.json"
TEXTS = ["", "the cat", "the  cat sat , on the mat", "café été", "a café<end>b", "x"]
CORPUS = ["the cat sat on the mat , in the café on an old red sofa été"] * 4
KEYS = "{% for m in messages %}[{{ m.role }}{% for k in m %} {{ k }}{% endfor %}"
TEMPLATE = KEYS + " {{ m.content }}]{% endfor %}{{ messages | tojson }}"
CALL = {"type": "function", "function": {"name": "look", "arguments": None}}
CONVERSATIONS = [
    [{"role": "user", "content": "hello"}],
    [
        {"role": "user", "content": "hello", "name": None, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ],
    [{"role": "assistant", "reasoning": None, "tool_calls": []}],
]


def words() -> tk.Tokenizer:
    """No decoder: a text is its tokens with spaces between them."""
    made = tk.Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<begin>", "<end>"])
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(["<tool>"])
    return made


def bytes_(added=()) -> tk.Tokenizer:
    made = tk.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<begin>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(list(added))
    return made


def main() -> None:
    named = {"bos_token": "<begin>", "eos_token": "<end>", "chat_template": TEMPLATE}
    named["clean_up_tokenization_spaces"] = False
    cases = {"words": (words(), "PreTrainedTokenizerFast", {})}
    for kind in ("PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer"):
        cases[f"begins {kind}"] = bytes_(), kind, {"add_bos_token": True}
    cases["accents"] = bytes_(["café", "été"]), "PreTrainedTokenizerFast", {}
    found = {}
    for name, (made, kind, more) in cases.items():
        config = {"tokenizer_class": kind, **named, **more}
        with tempfile.TemporaryDirectory() as folder:
            made.save(f"{folder}/tokenizer.json")
            path = pathlib.Path(folder, "tokenizer_config.json")
            path.write_text(json.dumps(config))
            reader = transformers.AutoTokenizer.from_pretrained(folder)
            data = json.loads(pathlib.Path(folder, "tokenizer.json").read_text())
        ids = [reader(text)["input_ids"] for text in TEXTS]
        found[name] = {
            "tokenizer": data,
            "config": config,
            "texts": TEXTS,
            "ids": ids,
            "decoded": [reader.decode(i, skip_special_tokens=True) for i in ids],
            "conversations": CONVERSATIONS,
            "rendered": [
                reader.apply_chat_template(messages, tokenize=False)
                for messages in CONVERSATIONS
            ],
        }
        print(name, ids[4], found[name]["decoded"][4], found[name]["rendered"][1])
    FILE.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
