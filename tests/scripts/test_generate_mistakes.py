"""scripts/generate.py: one line for every mistake, before anything heavy."""

from __future__ import annotations

import pytest

from tests.scripts.support import CONFIG
from treespec_jax import checkpoints
from treespec_jax.commands import loading, runtime

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--max_tokens=0", "max_tokens"),
        ("--temperature=-1", "temperature"),
        ("--temperature=nan", "nan"),
        ("--temperature=warm", "warm"),
        ("--top_p=0", "top_p"),
        ("--top_p=1.5", "1.5"),
        ("--top_k=-2", "top_k"),
        ("--min_p=2", "min_p"),
        ("--seed=-2", "seed"),
        ("--stop=", "stop"),
        ("--repetition_penalty=0", "repetition_penalty"),
        ("--presence_penalty=3", "presence_penalty"),
        ("--frequency_penalty=-3", "frequency_penalty"),
        ("--logit_bias=5", "--logit_bias='5'"),
        ("--logit_bias=99999=1", "99999"),
        ("--allowed_token_ids=5,99999", "99999"),
        ("--allowed_token_ids=few", "few"),
        ("--min_tokens=1000", "min_tokens"),
        ("--max_time=0", "max_time"),
        ("--max_nodes_per_level=0", "max_nodes_per_level"),
        ("--bad_words=", "bad_words"),
        ("--logprobs=many", "many"),
        ("--beams=-1", "beams"),
        ("--n_best=2", "--beams"),
        ("--rule=tokn", "tokn"),
        ("--cascade=chao", "chao"),
        ("--alpha=2", "alpha"),
        ("--max_batch=0", "max_batch"),
        ("--page_size=7", "page_size"),
        ("--steps_per_dispatch=0", "steps_per_dispatch"),
        ("--max_len=1", "max_len"),
        ("--max_len=4000", "max_len"),
        ("--dtype=int8", "int8"),
        ("--cache_dtype=int4", "int4"),
        ("--mesh=tensor:4096", "asks for 4096 devices"),
        ("--tree=regular:0", "regular:0"),
        ("--tree=chain:-1", "chain:-1"),
        ("--tree=chain:5000", "5000"),
        ("--tree=dynamic:3@4", "dynamic:3@4"),
        ("--prompts_file=x.txt", "both"),
        ("--temprature=1", "temprature"),
        ("--target=/no/such/folder", "no target at /no/such/folder"),
        ("--draft=/no/such/folder", "/no/such/folder"),
        ("--tokenizer=/no/such/file", "/no/such/file"),
        ("--config=/no/such/config.py", "/no/such/config.py"),
        ("--config.speculative.tree=none", "config.speculative.tree"),
        ("--recycle_table=t.npz", "of no use to method 'draft_model'"),
        ("stray", "stray"),
    ],
)
def test_bad_flags(refuses, files, flag, expected):
    args = [f"--target={files.target}", f"--draft={files.draft}", "--prompt=the cat"]
    refuses(expected, "generate.py", *args, flag)


@pytest.mark.parametrize(
    ("lines", "override", "expected"),
    [
        ("config.speculative.tree = 'bush:3'", "", "bush:3"),
        ("config.forest = 1", "", "forest"),
        ("config.sampling.warmth = 1", "", "warmth"),
        ("config.sampling.top_p = 3.0", "", "top_p"),
        ("", "--config.forest=1", "forest"),
        ("", "--config.sampling.max_tokens=0", "max_tokens"),
        ("", "--config.sampling.max_tokens=few", "few"),
        ("config = 3", "", "ConfigDict"),
        ("return {}[1]", "", "1"),
        ("config = (", "", "config.py"),
    ],
)
def test_bad_configuration(refuses, files, tmp_path, lines, override, expected):
    source = CONFIG.replace('config.speculative.tree = "none"', lines or "pass")
    (tmp_path / "config.py").write_text(source)
    if lines == "config = 3":
        (tmp_path / "config.py").write_text("def get_config():\n    return 3\n")
    args = [f"--config={tmp_path / 'config.py'}", f"--target={files.target}"]
    args += [f"--draft={files.draft}", "--prompt=a", *([override] if override else [])]
    refuses(expected, "generate.py", *args)


def test_other_text_cannot_be_verified(refuses, files):
    args = [f"--target={files.target}", f"--draft={files.draft}", "--prompt=a"]
    args += ["--rule=token", "--tree=chain:2", "--temperature=1", "--verify_lossless"]
    refuses("take --rule=exact", "generate.py", *args)


def test_texts_that_end_anywhere_are_not_compared(refuses, files):
    args = [f"--target={files.target}", f"--draft={files.draft}", "--prompt=a"]
    refuses("max_time=2 ends", "generate.py", *args, "--max_time=2", "--compare")


def test_several_texts_where_one_is_wanted(refuses, files, chat_pair, tmp_path):
    pair = [f"--target={files.target}", f"--draft={files.draft}", "--temperature=1"]
    args = [*pair, "--prompt=a", "--n=2"]
    refuses("a prompt, not n=2", "generate.py", *args, "--beams=2")
    refuses("greedy texts are all the same", "generate.py", *args, "--temperature=0")
    refuses("less than n=2", "generate.py", *args, "--best_of=1")
    chat = [f"--target={chat_pair / 'target'}", "--chat", "--temperature=1"]
    refuses("one answer at a time", "generate.py", *chat, "--n=2")
    (tmp_path / "c.py").write_text(
        "from treespec_jax.commands.settings import default_config\n"
        "def get_config():\n    config = default_config()\n"
        "    config.sampling.n, config.sampling.temperature = 2, 1.0\n"
        "    return config\n"
    )
    config = f"--config={tmp_path / 'c.py'}"
    output = f"--output={tmp_path / 'out'}"
    refuses("takes one text of a prompt", "benchmark.py", *pair, config, output)


def test_bad_options_and_tables(refuses, files, tmp_path, monkeypatch):
    """Found before weights are read, and tables before jax starts."""
    monkeypatch.setattr(loading, "make_llms", lambda *_: pytest.fail("weights"))
    args = [f"--target={files.target}", "--method=recycle", "--prompt=a"]
    monkeypatch.setattr(checkpoints, "load", lambda *_, **__: pytest.fail("weights"))
    for option, expected in (
        ("scope=all", "scope 'all' is unknown"),
        ("longest=3", "'longest' in options of method 'recycle'"),
        ("successors=0", "successors must be a whole number >= 1"),
    ):
        refuses(expected, "generate.py", *args, f"--drafter_option={option}")
    monkeypatch.setattr(runtime, "set_up", lambda _: pytest.fail("jax starts"))
    (tmp_path / "t.npz").write_text("no table")
    for path, expected in (
        ("t.npz", "is no recycle table"),
        ("no/t.npz", "cannot write"),
        (".", "Is a directory"),
    ):
        refuses(expected, "generate.py", *args, f"--recycle_table={tmp_path / path}")
    table = ["--drafter_option=scope=request", f"--recycle_table={tmp_path / 'n.npz'}"]
    refuses("scope=request", "generate.py", *args, *table)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_unknown_keys_of_a_handmade_configuration(refuses, tmp_path):
    (tmp_path / "c.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({'engine': {'max_size': 3}})\n"
    )
    refuses("max_size", "generate.py", f"--config={tmp_path / 'c.py'}", "--prompt=a")


def test_bad_files(refuses, files, tmp_path):
    pair = [f"--target={files.target}", f"--draft={files.draft}"]
    refuses("neither", "generate.py", *pair)
    for name, text, expected in [
        ("none.txt", None, "none.txt"),
        ("empty.txt", " \n", "empty"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "bad.jsonl:2"),
    ]:
        if text is not None:
            (tmp_path / name).write_text(text)
        refuses(expected, "generate.py", *pair, f"--prompts_file={tmp_path / name}")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    refuses("UTF-8", "generate.py", *pair, f"--prompts_file={tmp_path / 'bytes.txt'}")


def test_bad_checkpoints(refuses, files, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.bin").write_bytes(b"abc")
    a = "--prompt=a"
    for name in ("empty", "short.bin"):
        target = f"--target={tmp_path / name}"
        refuses(name, "generate.py", target, "--tree=none", a)
    target = f"--target={files.target}"
    refuses("--draft", "generate.py", target, "--method=draft_model", a)
    refuses("no target at /no/such", "generate.py", "--target=/no/such", a)
    refuses("vocabular", "generate.py", target, f"--draft={files.foreign}", a)
    bare = f"--target={files.bare}"
    refuses("--tokenizer", "generate.py", bare, "--tree=none", a)


def test_mistakes_are_found_before_jax_starts(refuses, files, monkeypatch):
    """Everything that configuration and tokenizer can tell."""
    monkeypatch.setattr(runtime, "set_up", lambda _: pytest.fail("jax starts"))
    plain = [f"--target={files.target}", "--tree=none", "--prompt=the cat"]
    pair = [f"--target={files.target}", f"--draft={files.draft}", "--prompt=the cat"]
    refuses(
        "max_len is 16", "generate.py", *plain, "--max_len=16", f"--prompt={'a' * 40}"
    )
    refuses("positions", "generate.py", *plain, "--max_len=4000")
    deep = ["--tree=chain:300", "--max_len=300"]
    refuses("depth 300 does not fit max_len=300", "generate.py", *pair, *deep)
    refuses("depth 300", "generate.py", *pair, "--tree=chain:300")
    refuses("token 259", "generate.py", *pair, f"--draft={files.foreign}")
    refuses("--tokenizer", "generate.py", *plain, f"--target={files.bare}")
