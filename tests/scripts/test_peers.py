"""transformers as a peer, behind modules that stand for torch and transformers."""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types

import numpy as np
import pytest

from tests.scripts.conftest import write_tokenizer
from treespec_jax.checkpoints import load_tokenizer
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError
from treespec_jax.measurement import peers
from treespec_jax.measurement.decoders import Turn

ANSWER = "dog sat"


class Tokens(np.ndarray):
    """As much of a tensor as is asked for."""

    def numel(self):
        return self.size


def tensor(values):
    return np.array(values).view(Tokens)


class Model:
    """Continues any prompt by ANSWER; two tokens at a time with a helper.

    Attributes:
      calls: the keyword arguments of every call.
    """

    def __init__(self, path, tokenizer):
        self.path = path
        self.calls = []
        self.ids = tokenizer.encode(ANSWER, add_bos=False)

    def eval(self):
        return self

    def parameters(self):
        return [types.SimpleNamespace(numel=lambda: 10, element_size=lambda: 4)]

    def generate(self, rows, streamer, **given):
        self.calls.append(given)
        config = given["generation_config"]
        size = 2 if "assistant_model" in given else 1
        new = self.ids[: config.max_new_tokens]
        streamer.put(rows)
        for start in range(0, len(new), size):
            streamer.put(tensor(new[start : start + size]))
        streamer.end()
        return tensor([[*rows[0], *new]])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("peers") / "tok.bin"))


@pytest.fixture
def libraries(monkeypatch, tokenizer):
    """Puts the modules in the place of the real ones; the models that are loaded."""
    loaded = []

    def from_pretrained(folder, dtype, local_files_only):
        assert dtype == "float32" and local_files_only
        if "broken" in folder.name:
            raise OSError("no file named\nmodel.safetensors")
        loaded.append(Model(folder, tokenizer))
        return loaded[-1]

    torch = types.SimpleNamespace(
        tensor=tensor,
        ones_like=np.ones_like,
        inference_mode=contextlib.nullcontext,
        seeds=[],
        set_num_threads=lambda count: None,
        float32="float32",
    )
    torch.manual_seed = torch.seeds.append
    transformers = types.SimpleNamespace(
        AutoModelForCausalLM=types.SimpleNamespace(from_pretrained=from_pretrained),
        GenerationConfig=types.SimpleNamespace,
        utils=types.SimpleNamespace(
            logging=types.SimpleNamespace(set_verbosity_error=lambda: None)
        ),
    )
    for name, module in {"torch": torch, "transformers": transformers}.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__version__ = "9.9"
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(torch=torch, loaded=loaded)


def checkpoints(tokenizer, draft="draft", target="target"):
    return peers.Checkpoints(target, draft, "float32", tokenizer, (2,))


def test_every_kind_is_asked_as_the_library_wants_it(libraries, tokenizer):
    made = peers.load(checkpoints(tokenizer))
    assert tuple(made) == peers.KINDS and peers.versions()["torch"] == "9.9"
    target, draft = libraries.loaded
    turn = Turn("the cat ", tokenizer.encode("the cat "))
    params = SamplingParams(max_tokens=5, temperature=0.7, top_p=0.9, seed=3)
    for kind, decoder in made.items():
        (answer,) = decoder.answer([turn], [params])
        assert answer.text == f" {ANSWER}"[:5]
        assert answer.token_ids == tokenizer.encode(ANSWER, add_bos=False)[:5]
        counts = [count for _, count in answer.arrivals]
        assert counts == ([2, 2, 1] if kind == "assisted" else [1] * 5)
        seconds = [seconds for seconds, _ in answer.arrivals]
        assert seconds == sorted(seconds) and seconds[0] > 0
        assert (answer.stats.steps, answer.stats.tokens) == (len(counts), 5)
        assert sum(answer.stats.emitted_counts) == len(counts)
        depths = answer.stats.acceptance_by_depth
        assert depths == ([pytest.approx(2 / 3)] if kind == "assisted" else [])
        given = target.calls[-1]
        assert ("assistant_model" in given) == (kind == "assisted")
        config = given["generation_config"]
        assert config.do_sample and config.temperature == 0.7 and config.top_p == 0.9
        assert config.top_k == 0 and config.min_p is None and config.eos_token_id == [2]
        wanted = 10 if kind == "prompt_lookup" else None
        assert getattr(config, "prompt_lookup_num_tokens", None) == wanted
        assert given["attention_mask"].tolist() == [[1] * len(turn.ids)]
        assert decoder.memory_bytes == (80 if kind == "assisted" else 40)
    assert libraries.torch.seeds == [3, 3, 3]
    assert draft.calls == [] and target.generation_config is not None


def test_greedy_answers_and_answers_without_an_end(libraries, tokenizer):
    plain = peers.load(checkpoints(tokenizer, draft=None))["plain"]
    turn = Turn([{"role": "user", "content": "a"}], [1, 5])
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    plain.warm_up(params)
    plain.answer([turn, turn], [params] * 2)
    config = libraries.loaded[0].calls[-1]["generation_config"]
    assert not config.do_sample and config.eos_token_id is None
    assert not hasattr(config, "temperature")
    assert len(libraries.loaded[0].calls) == 3


def test_without_a_drafter_nothing_assists(libraries, tokenizer):
    made = peers.load(checkpoints(tokenizer, draft=None))
    assert tuple(made) == ("plain", "prompt_lookup")


def test_weights_that_the_library_does_not_read(libraries, tokenizer):
    with pytest.raises(UserError, match="cannot read broken: no file named model"):
        peers.load(checkpoints(tokenizer, target="broken"))


def test_what_cannot_be_asked_is_refused(libraries, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    folder = str(tmp_path)
    peers.check(folder, folder, SamplingParams(repetition_penalty=1.2))
    peers.check(folder, None, SamplingParams())
    with pytest.raises(UserError, match="no counterpart of presence_penalty"):
        peers.check(folder, None, SamplingParams(presence_penalty=0.5))
    with pytest.raises(UserError, match="no counterpart of stop"):
        peers.check(folder, None, SamplingParams(stop="x"))
    with pytest.raises(UserError, match="model.bin is none"):
        peers.check(folder, "model.bin", SamplingParams())
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs torch and transformers: pip install"):
        peers.check(folder, None, SamplingParams())
