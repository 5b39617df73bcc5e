"""Three kinds of tokenizer files behind one protocol, and streams of text."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints.support import (
    CHARACTERS,
    check_stream,
    train_sentencepiece,
    write_llama2c_tokenizer,
)
from treespec_jax.checkpoints.tokenizers import (
    TextStream,
    Tokenizer,
    compare_vocabularies,
    load_tokenizer,
)
from treespec_jax.checkpoints.tokenizers.sentencepiece import SentencePieceTokenizer
from treespec_jax.errors import UserError

TEXTS = [
    "the little girl",
    "one day tom went to the park",
    "Naïve 你好世界 😀👩‍👧 ok",
    "a  b   c",
    "",
    "tab\tand\nline",
]
# As llama2.c's exporter spells them: spaces, not U+2581.
MERGES = [
    (" t", -1.0),
    ("he", -2.0),
    (" the", -3.0),
    ("th", -4.0),
    ("in", -5.0),
    ("the", -6.0),
    (" ", -7.0),
    *((chr(c), -10.0 - i) for i, c in enumerate(range(ord("a"), ord("z") + 1))),
    ("é", -50.0),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of every kind, by name."""
    import tokenizers as tk

    root = tmp_path_factory.mktemp("tokenizers")
    found = {
        "sentencepiece": train_sentencepiece(root),
        "plain_sentencepiece": train_sentencepiece(
            root, "plain", add_dummy_prefix=False, remove_extra_whitespaces=False
        ),
        "keeping_sentencepiece": train_sentencepiece(
            root, "keeping", remove_extra_whitespaces=False
        ),
        "llama2c": write_llama2c_tokenizer(root / "tok.bin", MERGES),
    }
    pieces = [(t.replace(" ", "\u2581"), s) for t, s in MERGES]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    vocab += [text for text, _ in pieces]
    ids = {text: i for i, text in enumerate(vocab)}
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("t", "h"), ("i", "n")]
    llama = tk.Tokenizer(
        tk.models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    llama.normalizer = tk.normalizers.Sequence(
        [tk.normalizers.Prepend("\u2581"), tk.normalizers.Replace(" ", "\u2581")]
    )
    llama.decoder = tk.decoders.Sequence(
        [
            tk.decoders.Replace("\u2581", " "),
            tk.decoders.ByteFallback(),
            tk.decoders.Fuse(),
            tk.decoders.Strip(" ", 1, 0),
        ]
    )
    llama.post_processor = tk.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    llama.add_special_tokens(["<unk>", "<s>", "</s>"])
    found["json"] = root / "llama.json"
    llama.save(str(found["json"]))

    gpt = tk.Tokenizer(tk.models.BPE())
    gpt.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    gpt.train_from_iterator(TEXTS * 3, trainer)
    found["bytes"] = root / "gpt" / "tokenizer.json"
    found["bytes"].parent.mkdir()
    gpt.save(str(found["bytes"]))
    about = {"eos_token": {"content": "<|end|>"}, "add_bos_token": False}
    (found["bytes"].parent / "tokenizer_config.json").write_text(json.dumps(about))
    return found


KINDS = [
    "sentencepiece",
    "plain_sentencepiece",
    "keeping_sentencepiece",
    "llama2c",
    "json",
    "bytes",
]


@pytest.fixture(params=KINDS)
def tokenizer(request, files):
    return load_tokenizer(files[request.param])


@pytest.fixture(scope="module")
def every(files):
    return {name: load_tokenizer(path) for name, path in files.items()}


def test_follow_the_protocol(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode("the little")
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    if tokenizer.bos_id is not None:
        assert ids == [tokenizer.bos_id, *tokenizer.encode("the little", add_bos=False)]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    # Sentencepiece squeezes spaces and normalises characters.
    expected = text
    if isinstance(tokenizer, SentencePieceTokenizer):
        expected = tokenizer._model.decode(tokenizer._model.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_ends_and_beginnings(every):
    assert (every["sentencepiece"].bos_id, every["sentencepiece"].eos_ids) == (1, (2,))
    assert (every["llama2c"].bos_id, every["llama2c"].eos_ids) == (1, (2,))
    assert every["json"].bos_id == 1
    end = every["bytes"].encode("<|end|>")
    assert every["bytes"].bos_id is None
    assert list(every["bytes"].eos_ids) == end
    for reader in every.values():
        assert all(reader.token_bytes(i) == b"" for i in reader.eos_ids)


def test_overrides_win(files):
    found = load_tokenizer(files["json"], bos_id=2, eos_ids=(1, 7))
    assert (found.bos_id, found.eos_ids) == (2, (1, 7))


@pytest.mark.parametrize("name", ["sentencepiece", "json", "bytes"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_decoding_agrees_with_the_library(every, name, text):
    reader = every[name]
    ids = reader.encode(text, add_bos=False)
    assert reader.decode(ids) == reader._model.decode(ids)


@pytest.mark.parametrize("name", ["sentencepiece", "keeping_sentencepiece", "json"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_decoding_any_ids_agrees_with_the_library(every, name, data):
    """But for byte tokens, whose broken runs every library marks in its own way, and
    the unknown one, whose mark sentencepiece begins with a space even in front."""
    reader = every[name]
    usual = [i for i in range(reader.vocab_size) if i >= 259]
    ids = data.draw(st.lists(st.sampled_from(usual), max_size=8))
    assert reader.decode(ids) == reader._model.decode(ids)


def naive_llama2c(pieces, scores, text):
    """The loop of llama2.c: find the best pair in the whole text, join it, repeat."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokens = []
    for char in " " + text:
        known = ids.get(char)
        tokens += [b + 3 for b in char.encode()] if known is None else [known]
    while True:
        best = max(
            (
                (scores[ids[pieces[a] + pieces[b]]], -i)
                for i, (a, b) in enumerate(zip(tokens, tokens[1:], strict=False))
                if pieces[a] + pieces[b] in ids
            ),
            default=None,
        )
        if best is None:
            return tokens
        first = -best[1]
        pair = tokens[first : first + 2]
        tokens[first : first + 2] = [ids[pieces[pair[0]] + pieces[pair[1]]]]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="the in é?", min_size=1, max_size=40))
def test_llama2c_merges_as_the_original(every, text):
    reader = every["llama2c"]
    front = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    pieces = front + [piece for piece, _ in MERGES]
    scores = [0.0] * len(front) + [score for _, score in MERGES]
    assert reader.encode(text, add_bos=False) == naive_llama2c(pieces, scores, text)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_stream_is_what_decode_gives(every, name, data):
    reader = every[name]
    ids = data.draw(st.lists(st.integers(0, reader.vocab_size - 1), max_size=24))
    text = data.draw(st.sampled_from(TEXTS))
    context = reader.encode(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    stream = TextStream(reader, context)
    pushed = [
        stream.push(ids[a:b])
        for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)
    ]
    whole = reader.decode([*context, *ids])
    before = reader.decode(context)
    assert before + "".join(pushed) + stream.flush() == whole


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("text", ["😀 你好 été", "👩‍👧‍👦", "日本"])
def test_stream_never_splits_a_character(every, name, text):
    reader = every[name]
    ids = reader.encode(text, add_bos=False)
    stream = TextStream(reader)
    pieces = [stream.push([i]) for i in ids]
    assert len(ids) > len(text) or name == "bytes"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == reader.decode(ids)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(CHARACTERS, max_size=16), share=st.floats(0, 1))
def test_stream_behind_any_part_of_a_text(every, name, text, share):
    check_stream(every[name], text, share)


def test_stream_keeps_the_space_of_a_continuation(every):
    for name in ["sentencepiece", "llama2c", "json"]:
        reader = every[name]
        more = [i for i in range(reader.vocab_size) if reader.piece(i) == "\u2581the"]
        prompt = reader.encode("one")
        assert TextStream(reader, prompt).push(more) == " the"
        assert TextStream(reader).push(more) == "the"
        front = [reader.bos_id]
        assert TextStream(reader, front).push(more) == "the"


def test_incomplete_character_is_marked_at_the_end(every):
    stream = TextStream(every["llama2c"])
    euro = [3 + byte for byte in "€".encode()]
    assert stream.push(euro[:2]) == ""
    assert stream.flush() == "\ufffd"


def test_save_makes_a_folder_self_contained(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path, tokenizer.bos_id, tokenizer.eos_ids)
    assert again.source == str(tmp_path / tokenizer.file_name)
    assert again.encode("the girl 😀") == tokenizer.encode("the girl 😀")
    compare_vocabularies(tokenizer, again)


def test_save_needs_no_file_of_the_original(files, tmp_path):
    copy = tmp_path / "a.bin"
    copy.write_bytes(files["llama2c"].read_bytes())
    reader = load_tokenizer(copy)
    copy.unlink()
    reader.save(tmp_path)
    saved = tmp_path / "tokenizer.bin"
    assert saved.read_bytes() == files["llama2c"].read_bytes()


def test_same_vocabulary_across_formats(every):
    compare_vocabularies(every["llama2c"], every["json"])


def test_different_vocabularies_are_named(every, tmp_path):
    changed = [("in", -5.0) if text == " the" else (text, s) for text, s in MERGES]
    other = load_tokenizer(write_llama2c_tokenizer(tmp_path / "tok.bin", changed))
    with pytest.raises(UserError, match="token 261 is '▁the' in .* and 'in' in the dr"):
        compare_vocabularies(every["llama2c"], other)
    longer = load_tokenizer(
        write_llama2c_tokenizer(tmp_path / "tok2.bin", [*MERGES, ("zz", -99.0)])
    )
    size = every["llama2c"].vocab_size
    note = compare_vocabularies(every["llama2c"], longer)
    assert note.startswith(f"the target's vocabulary is the first {size} of the")
    note = compare_vocabularies(longer, every["llama2c"])
    assert note.startswith(f"the drafter's vocabulary is the first {size} of the")


@pytest.mark.parametrize("name", KINDS)
def test_ids_outside_the_vocabulary(every, name):
    """Rows of an embedding that is padded stand for no text."""
    reader = every[name]
    ids = reader.encode("the girl")
    padding = reader.vocab_size
    assert reader.decode([*ids, padding, 10**6]) == reader.decode(ids)
    with pytest.raises(UserError, match="token id -1 is outside"):
        reader.decode([-1])
    for token in (-1, padding):
        with pytest.raises(UserError, match=f"token id {token} is outside"):
            reader.piece(token)


def test_unreadable_files(tmp_path, files):
    for suffix in ("model", "json", "bin"):
        with pytest.raises(UserError, match=f"no tokenizer at .*none.{suffix}"):
            load_tokenizer(tmp_path / f"none.{suffix}")
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    for name, kind in [
        ("bad.json", "a tokenizer.json"),
        ("bad.model", "a sentencepiece model"),
        ("bad.bin", "a llama2.c tokenizer"),
    ]:
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(UserError, match=f"{name} is not {kind}, or is damaged"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="unknown kind; give a .model"):
        load_tokenizer(tmp_path / "a.txt")


@pytest.mark.parametrize("cut", [1, 3, 5, 9])
def test_llama2c_file_cut_short(files, tmp_path, cut):
    data = files["llama2c"].read_bytes()
    (tmp_path / "tok.bin").write_bytes(data[:-cut])
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path / "tok.bin")
    (tmp_path / "tok.bin").write_bytes(struct.pack("<ifi", 4, 0.0, -5))
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path / "tok.bin")


def test_decoder_without_meaning_per_token(tmp_path):
    import tokenizers as tk

    model = tk.Tokenizer(tk.models.WordLevel({"a": 0}, "a"))
    model.decoder = tk.decoders.CTC()
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="decoder 'CTC' is not supported"):
        load_tokenizer(tmp_path)


def test_only_llama2c_file_of_a_folder_is_found(files, tmp_path):
    data = files["llama2c"].read_bytes()
    (tmp_path / "tok512.bin").write_bytes(data)
    assert load_tokenizer(tmp_path).source == str(tmp_path / "tok512.bin")
    (tmp_path / "tok1024.bin").write_bytes(data)
    with pytest.raises(UserError, match="holds no"):
        load_tokenizer(tmp_path)
