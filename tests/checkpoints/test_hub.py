"""Names of the Hugging Face Hub: by its client, from its cache and from a server."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.checkpoints.hub_server import HubServer, commit
from treespec_jax.checkpoints import describe, hub, names
from treespec_jax.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def files_of(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (GOLDEN / folder).iterdir()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The client's cache, empty; a user's own token stays at home."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch):
    """A hub that nobody answers for."""
    use(monkeypatch, "http://127.0.0.1:9")


@pytest.fixture
def server(monkeypatch):
    running = HubServer()
    use(monkeypatch, running.url)
    yield running
    running.stop()


def use(monkeypatch, url):
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def put_into_cache(cache, name, files, refs):
    """What the client leaves of a download: blobs, a snapshot of links, references."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit(files)
    for part in (folder / "blobs", folder / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        blob = folder / "blobs" / f"{commit({file: data})}"
        blob.write_bytes(data)
        (snapshot / file).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        (folder / "refs" / ref).write_text(commit(files))
    return snapshot


def refusal(name) -> str:
    with pytest.raises(UserError) as caught:
        describe(name).open()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/na.me-1B@v1.0", ("org/na.me-1B", "v1.0", None)),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3", None)),
        ("org/name-GGUF:name.Q4_0.gguf", ("org/name-GGUF", None, "name.Q4_0.gguf")),
        ("org/name@main:sub/a.gguf", ("org/name", "main", "sub/a.gguf")),
        ("name", None),
        ("a/b/c", None),
        ("/org/name", None),
        ("./org/name", None),
        ("../name", None),
        ("~/name", None),
        ("org/", None),
        ("org/name.gguf", None),
        ("org/name.bin", None),
        ("org/name@", None),
        ("org/name:", None),
        ("C:/name", None),
    ],
)
def test_forms_of_a_name(text, expected):
    found = hub.parse(text)
    assert found == (expected and hub.HubName(*expected))
    if found is not None:
        assert str(found) == text


@pytest.mark.parametrize("offline", [False, True])
def test_a_prepared_cache_does_without_a_network(
    cache, no_network, monkeypatch, offline
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    now, before = files_of("llama_tied"), files_of("llama_grouped")
    snapshot = put_into_cache(cache, "org/tiny", now, ["main"])
    old = put_into_cache(cache, "org/tiny", before, ["v1"])
    about = describe("org/tiny")
    assert about.config == describe(GOLDEN / "llama_tied").config
    assert about.path == snapshot and about.name == "org/tiny"
    assert about.open().source.files() == [snapshot / "model.safetensors"]
    for revision in ("v1", commit(before)):
        about = describe(f"org/tiny@{revision}")
        assert about.path == old and about.name == f"org/tiny@{revision}"
        assert about.config == describe(GOLDEN / "llama_grouped").config
        assert about.open().source.shapes()
    assert "v2" in refusal("org/tiny@v2")
    file = names.locate("org/tiny:config.json")
    assert file.path == snapshot / "config.json"


def test_without_a_network_one_line_names_the_cache(cache, no_network, monkeypatch):
    for name in ("org/tiny", "org/tiny@v1", "org/tiny:a.gguf"):
        message = refusal(name)
        assert name in message and "cannot be reached" in message
        assert str(cache) in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal("org/tiny")
    assert "HF_HUB_OFFLINE is set" in message and str(cache) in message


def test_weights_that_are_not_in_the_cache(cache, no_network):
    """What describes a model may be there alone."""
    files = files_of("llama_tied")
    del files["model.safetensors"]
    put_into_cache(cache, "org/tiny", files, ["main"])
    assert describe("org/tiny").config.num_layers == 2
    assert "org/tiny" in refusal("org/tiny")


def test_a_folder_or_file_of_that_name_wins(tmp_path, no_network):
    folder = tmp_path / "org" / "tiny"
    folder.mkdir(parents=True)
    for name, data in files_of("llama_tied").items():
        (folder / name).write_bytes(data)
    about = describe("org/tiny")
    assert about.path == Path("org/tiny") and about.repository is None
    assert about.name == "tiny" and about.open().source.shapes()
    # A path is never looked up elsewhere.
    assert "no checkpoint at org/other" in refusal(Path("org/other"))


def test_only_what_is_needed_is_downloaded(server, cache, capfd):
    files = files_of("llama_tied")
    weights = files.pop("model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    table = describe(GOLDEN / "llama_tied").open().source.shapes()
    index = {"metadata": {}, "weight_map": dict.fromkeys(table, shard)}
    files |= {
        shard: weights,
        "model.safetensors.index.json": json.dumps(index).encode(),
        "generation_config.json": b"{}",
        "consolidated.safetensors": weights,
        "model.safetensors": weights,
        "pytorch_model.bin": b"x",
        "original/consolidated.00.pth": b"x",
        "onnx/model.safetensors": b"x",
        "tiny.Q4_0.gguf": b"x",
        "README.md": b"x",
    }
    files["chat_template.jinja"] = b"{{ messages }}"
    server.repositories["org/tiny"] = {"main": files}
    about = describe("org/tiny")
    small = {"config.json", "model.safetensors.index.json", "generation_config.json"}
    assert set(server.downloads) == {*small, "chat_template.jinja"}
    about.open()
    assert set(server.downloads) == {*small, "chat_template.jinja", shard}
    count = len(server.downloads)
    describe("org/tiny").open()
    assert len(server.downloads) == count
    assert about.path.is_relative_to(cache)
    assert capfd.readouterr().out == ""


def test_the_weights_are_those_of_the_description(server):
    """The branch may move between the two; without an index, no other folder's."""
    others = "onnx/model.safetensors", "adapter_model.safetensors"
    before = files_of("llama_tied") | dict.fromkeys(others, b"x")
    server.repositories["org/tiny"] = {"main": before}
    about = describe("org/tiny")
    server.repositories["org/tiny"] = {
        "main": files_of("llama_grouped"),
        "before": before,
    }
    assert about.open().source.shapes().keys() == (
        describe(GOLDEN / "llama_tied").open().source.shapes().keys()
    )
    assert not set(others) & set(server.downloads)
    assert describe("org/tiny").config == describe(GOLDEN / "llama_grouped").config


def test_one_file_of_a_repository(server, capfd):
    files = {"sub/a.gguf": b"not read here", "b.gguf": b"x", "config.json": b"{}"}
    server.repositories["org/tiny-GGUF"] = {"main": files}
    found = names.locate("org/tiny-GGUF:sub/a.gguf")
    assert found.path.read_bytes() == b"not read here"
    assert server.downloads == ["sub/a.gguf"]
    message = refusal("org/tiny-GGUF:c.gguf")
    assert "has no file 'c.gguf'" in message
    assert capfd.readouterr().err == ""


def test_a_tokenizer_of_the_hub(server):
    vocabulary = files_of("tokenizers/llama2")
    server.repositories["org/words"] = {"main": vocabulary}
    model = files_of("llama_tied")
    values = json.loads(model["config.json"]) | {"vocab_size": 360}
    model["config.json"] = json.dumps(values).encode()
    server.repositories["org/tiny"] = {"main": model}
    about = describe("org/tiny", tokenizer="org/words")
    assert about.tokenizer.vocab_size == 360


def test_what_cannot_be_had_is_one_line(server, capfd):
    tiny = files_of("llama_tied")
    bare = {k: v for k, v in tiny.items() if not k.endswith(".safetensors")}
    server.gated.add("org/gated")
    server.repositories |= {
        "org/tiny": {"main": tiny},
        "org/gated": {"main": tiny},
        "org/bin": {"main": {**bare, "pytorch_model.bin": b"x"}},
        "org/gguf": {"main": {"a.gguf": b"x", "b.gguf": b"x"}},
        "org/both": {"main": {**bare, "a.gguf": b"x"}},
        "org/data": {"main": {"README.md": b"x"}},
    }
    assert "no repository of the Hugging Face Hub" in refusal("org/gone")
    assert "no revision 'v9'" in refusal("org/tiny@v9")
    assert "org/gated is gated" in refusal("org/gated")
    assert "holds no *.safetensors" in refusal("org/bin")
    assert "org/gguf:FILE, of a.gguf, b.gguf" in refusal("org/gguf")
    assert "org/both:FILE, of a.gguf" in refusal("org/both")
    assert "org/data holds no config.json" in refusal("org/data")
    assert "no checkpoint at a--b/c" in refusal("a--b/c")
    # Of the client only the progress bars are shown.
    shown = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert all(not line or "it/s]" in line or "B/s" in line for line in shown)


def test_a_full_disk_is_one_line(monkeypatch, cache):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    message = refusal("org/tiny")
    assert os.strerror(errno.ENOSPC) in message and str(cache) in message
