"""The command line of widen_checkpoint.py."""

import pytest

from tests.checkpoints.support import greedy
from treespec_jax.checkpoints import load

SCRIPT = "widen_checkpoint.py"


def test_widens(files, run_script, tmp_path):
    """Every size; the pair keeps its vocabulary and its text."""
    result = run_script(
        SCRIPT,
        f"--input={files.target}",
        f"--output={tmp_path / 'wide'}",
        *("--embed_dim=40", "--mlp_dim=64", "--num_layers=2", "--num_heads=6"),
        *("--num_kv_heads=3", "--head_dim=16", "--vocab_size=320"),
    )
    assert result.code == 0, result.err
    small, wide = load(files.target), load(tmp_path / "wide")
    assert result.out.startswith(f"wrote {tmp_path / 'wide'}: ")
    sizes = wide.config.embed_dim, wide.config.mlp_dim, wide.config.num_layers
    assert sizes == (40, 64, 2)
    assert wide.config.vocab_size == 320
    assert wide.tokenizer.vocab_size == small.tokenizer.vocab_size
    prompt = small.tokenizer.encode("a cat")
    assert greedy(wide.model, prompt, 8) == greedy(small.model, prompt, 8)


def test_sizes_of_a_known_model(files, refuses, tmp_path):
    """A flag wins over the model's size, which is named where it cannot be reached."""
    arguments = f"--input={files.target}", f"--output={tmp_path / 'wide'}"
    refuses(
        "mlp_dim=3 is below the model's 48",
        *(SCRIPT, *arguments, "--like=llama-3-8b", "--mlp_dim=3"),
    )
    refuses("no model is called 'llama-9'", SCRIPT, *arguments, "--like=llama-9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mlp_dim=47"], "mlp_dim=47 is below the model's 48; a model can only grow"),
        (["--vocab_size=300"], "vocab_size=300 needs two more channels"),
        (["--num_heads=7"], "num_heads=7 is not a multiple of num_kv_heads=2"),
        (["--mlp_dim=wide"], "flag --mlp_dim=wide"),
        (["--input=/nowhere"], "no checkpoint at /nowhere"),
        (["--output=LICENSE"], "LICENSE is a file"),
    ],
)
def test_mistakes_are_one_line(files, refuses, tmp_path, arguments, message):
    output = tmp_path / "wide"
    flags = f"--input={files.target}", f"--output={output}"
    refuses(message, SCRIPT, *flags, *arguments)
    assert not list(tmp_path.iterdir())
