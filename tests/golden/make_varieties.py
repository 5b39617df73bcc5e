"""Makes tests/golden/varieties.json: tokenizers as families differ.

    python tests/golden/make_varieties.py     (transformers, tokenizers, jinja2)

Vocabularies are trained on a few lines; how a text is normalised, cut, marked and put
together again is that of the family. Each is held with what
`transformers.PreTrainedTokenizerFast` makes of texts.
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import tokenizers as tk
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

FILE = pathlib.Path(__file__).resolve().parent / "varieties.json"
MARK = "\u2581"
CORPUS = [
    "The cat sat on the mat, and looked at 12345 dogs. It's o'clock! they'll",
    "café Zoë naïve 你好世界 한국어 привет",
    "def f(x):\n    return x + 1\n\n",
] * 4
TEXTS = [
    "",
    " ",
    "   ",
    "the cat sat",
    " the  cat   sat ",
    "\n",
    "\n\n\n  the\n\t cat\r\n\r\nsat \n ",
    "CAN'T we'll I'M 'tis",
    "1234567 3.14 1,000 ١٢٣ ½ x2y",
    "cafe\u0301 café a\u0323\u0307 ﬁ Å",
    "你好世界，日本語 한국어 \u1112\u1161\u11ab",
    "👩🏽\u200d🚀👨\u200d👩\u200d👧 🇩🇪 ❤️ok",
    "a\u0000b\u0007c\u001b[0m\u007f\u0085\ufeff\u200b",
    "x\u00a0y\u3000z\u2028w\u2581v",
    'if (a!=b) {return "c";} // …—«»',
    "a<end>b <end> c<|tool|>  d <|tool|>e",
    "<0x41><0xE4> ▁▁ Ġ Ċ",
    "שלום مرحبا हिन्दी ไทย",
    "hello , world . do n't i 'm",
]
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FRONT = ["<unk>", "<begin>", "<end>"]


def trained(model, trainer, pre, normalizer=None) -> dict:
    made = tk.Tokenizer(model)
    made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator(CORPUS, trainer)
    return json.loads(made.to_str())["model"]


def by_bytes(pre, normalizer=None, **options) -> tk.Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    model = trained(models.BPE(), trainer, pre, normalizer)
    merges = [tuple(pair) for pair in model["merges"]]
    made = tk.Tokenizer(models.BPE(model["vocab"], merges, **options))
    made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<begin>", "<end>"])
    made.add_tokens([tk.AddedToken("<|tool|>", normalized=False)])
    return made


def cut(*patterns: str):
    splits = [pre_tokenizers.Split(tk.Regex(p), "isolated") for p in patterns]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, whole])


def front(made: tk.Tokenizer, *before) -> None:
    begin = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", made.token_to_id("<begin>"))]
    )
    made.post_processor = processors.Sequence([*before, begin]) if before else begin


def llama3() -> tk.Tokenizer:
    pattern = rf"{ENGLISH}|{WORD}|\p{{N}}{{1,3}}|{SIGNS}"
    made = by_bytes(cut(pattern), ignore_merges=True)
    front(made, processors.ByteLevel(trim_offsets=False))
    return made


def qwen() -> tk.Tokenizer:
    made = by_bytes(cut(rf"{ENGLISH}|{WORD}|\p{{N}}|{SIGNS}"), normalizers.NFC())
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


def deepseek() -> tk.Tokenizer:
    asian = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
    cuts = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", asian, r"\p{N}")
    made = by_bytes(cut(*cuts))
    front(made)
    return made


def tekken() -> tk.Tokenizer:
    made = by_bytes(cut(TEKKEN), ignore_merges=True)
    front(made)
    return made


def neox() -> tk.Tokenizer:
    """Runs of spaces are added tokens, which are found in the normalised text."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = by_bytes(plain, normalizers.NFC())
    made.add_tokens([" " * n for n in range(8, 1, -1)])
    return made


def prefixed() -> tk.Tokenizer:
    return by_bytes(pre_tokenizers.ByteLevel(add_prefix_space=True))


def smollm() -> tk.Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return by_bytes(pre_tokenizers.Sequence([digits, plain]))


def by_pieces(pre=None, normalizer=None, strip=True) -> tk.Tokenizer:
    trainer = tk.trainers.BpeTrainer(
        vocab_size=310, special_tokens=[*FRONT, *BYTES], show_progress=False
    )
    words = pre_tokenizers.Metaspace(MARK, prepend_scheme="always")
    model = trained(models.BPE(), trainer, words)
    options = dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    merges = [tuple(pair) for pair in model["merges"]]
    made = tk.Tokenizer(models.BPE(model["vocab"], merges, **options))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre is not None:
        made.pre_tokenizer = pre
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if strip else []
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(FRONT)
    front(made)
    return made


def llama2() -> tk.Tokenizer:
    """With tokens that take the space behind them along, as Phi-3 has them."""
    steps = [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
    made = by_pieces(normalizer=normalizers.Sequence(steps))
    made.add_tokens([tk.AddedToken("<|tool|>", rstrip=True, special=True)])
    return made


def metaspace(scheme: str, split: bool) -> tk.Tokenizer:
    pre = pre_tokenizers.Metaspace(MARK, prepend_scheme=scheme, split=split)
    made = by_pieces(pre)
    if split:
        inner = decoders.Metaspace(MARK, prepend_scheme=scheme)
        steps = [decoders.ByteFallback(), inner, decoders.Fuse()]
        made.decoder = decoders.Sequence(steps)
    made.add_tokens([tk.AddedToken("<|tool|>", normalized=True)])
    return made


def gemma() -> tk.Tokenizer:
    pre = pre_tokenizers.Split(" ", "merged_with_previous")
    made = by_pieces(pre, normalizers.Replace(" ", MARK), strip=False)
    runs = [token * n for token in ("\n", MARK) for n in range(5, 1, -1)]
    made.add_tokens([tk.AddedToken(run, normalized=False) for run in runs])
    return made


def unigram() -> tk.Tokenizer:
    trainer = tk.trainers.UnigramTrainer(
        vocab_size=120, special_tokens=FRONT, unk_token="<unk>", show_progress=False
    )
    pre = pre_tokenizers.Metaspace(MARK, prepend_scheme="always")
    made = tk.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(tk.Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre
    made.train_from_iterator(CORPUS, trainer)
    # The last digits, and the order of equals, depend on the run.
    data = json.loads(made.to_str())
    pieces = [[piece, round(score, 3)] for piece, score in data["model"]["vocab"]]
    named = len(FRONT)
    pieces[named:] = sorted(pieces[named:], key=lambda each: (-each[1], each[0]))
    data["model"]["vocab"] = pieces
    made = tk.Tokenizer.from_str(json.dumps(data))
    made.decoder = decoders.Metaspace(MARK, prepend_scheme="always")
    front(made)
    return made


NAMED = {"bos_token": "<begin>", "eos_token": "<end>"}
KINDS = {
    "llama3": (llama3, {"clean_up_tokenization_spaces": True}),
    "qwen": (qwen, {"clean_up_tokenization_spaces": False}),
    "deepseek": (deepseek, {}),
    "tekken": (tekken, {}),
    "neox": (neox, {"add_prefix_space": False}),
    "prefixed": (prefixed, {"add_prefix_space": True}),
    "prefixed, not said": (prefixed, {}),
    "smollm, prefixed": (smollm, {"add_prefix_space": True}),
    "llama2": (llama2, {"legacy": False}),
    "metaspace always": (lambda: metaspace("always", True), {}),
    "metaspace first": (lambda: metaspace("first", False), {}),
    "metaspace never": (lambda: metaspace("never", True), {}),
    "gemma": (gemma, {"clean_up_tokenization_spaces": False}),
    "unigram": (unigram, {}),
}


def tokenizers() -> dict:
    found = {}
    for name, (make, more) in KINDS.items():
        made = make()
        kind = "PreTrainedTokenizerFast"
        config = {"tokenizer_class": kind, **NAMED, **more}
        with tempfile.TemporaryDirectory() as folder:
            made.save(f"{folder}/tokenizer.json")
            path = pathlib.Path(folder, "tokenizer_config.json")
            path.write_text(json.dumps(config))
            reader = transformers.AutoTokenizer.from_pretrained(folder)
            data = json.loads(pathlib.Path(folder, "tokenizer.json").read_text())
        ids = [reader(text)["input_ids"] for text in TEXTS]
        decoded = [reader.decode(i, skip_special_tokens=True) for i in ids]
        found[name] = dict(tokenizer=data, config=config, ids=ids, decoded=decoded)
    return found


def main() -> None:
    found = {"texts": TEXTS, "kinds": tokenizers()}
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
