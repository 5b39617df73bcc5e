"""predict_speedup and search_shape end to end on tiny models; no time is judged."""

from __future__ import annotations

import json

import pytest

from treespec_jax.trees import shapes
from treespec_jax.trees.topology import Topology
from treespec_jax.tuning import theory
from treespec_jax.tuning.theory import Acceptance, Costs


def read(values) -> tuple[Acceptance, Costs]:
    """What a command wrote of acceptance and costs."""
    acceptance = Acceptance(
        tuple(map(tuple, values["acceptance"]["rates"])),
        tuple(values["acceptance"]["families"]),
    )
    costs = {
        name: part if isinstance(part, float) else tuple(map(tuple, part))
        for name, part in values["costs"].items()
    }
    return acceptance, Costs(**costs)


@pytest.mark.slow
def test_search_and_prediction(run_script, files, tmp_path):
    """The tree that the search wrote is read, grown and predicted alike."""
    (tmp_path / "p.txt").write_text("the cat\na dog\nthe end\n")
    same = (
        f"--target={files.target}",
        f"--draft={files.draft}",
        f"--prompts_file={tmp_path / 'p.txt'}",
        "--probe_width=3",
        "--probe_depth=2",
        "--max_tokens=12",
        "--max_len=64",
        "--rounds=1",
        "--steps_per_dispatch=2",
    )
    file = tmp_path / "best.json"
    limits = "--nodes=6", "--depth=3"
    result = run_script("search_shape.py", *same, *limits, f"--output={file}")
    assert result.code == 0, result.err
    values = json.loads(file.read_text())
    acceptance, costs = read(values)
    assert acceptance.families[0] > 0 and len(acceptance.rates) == 2
    best = shapes.parse(f"file:{file}").topology
    listed = [shapes.parse(one["tree"]).topology for one in values["by_nodes"]]
    assert best in listed
    for one, topology in zip(values["by_nodes"], listed, strict=True):
        tokens = theory.expected_tokens(topology, acceptance)
        assert one["tokens"] == pytest.approx(tokens)
        assert one["seconds"] == pytest.approx(costs.step(topology))
        assert one["speedup"] == pytest.approx(costs.speedup(topology, tokens))
        assert one["nodes"] == topology.num_nodes - 1 <= 6 and topology.depth <= 3
    # Plain decoding is among them.
    assert listed[0] == Topology((-1,)) and values["by_nodes"][0]["speedup"] == 1
    assert values["speedup"] == max(one["speedup"] for one in values["by_nodes"])
    assert values["measured"]["tokens"] == 3 * 12
    assert "Best: " in result.out and "Predicted / measured tokens per" in result.out

    folder = tmp_path / "results"
    trees = "file:" + str(tmp_path / "again.json"), "regular:2x2"
    (tmp_path / "again.json").write_text(json.dumps({"tree": "static:0.0+1"}))
    result = run_script(
        "predict_speedup.py",
        *same,
        f"--shapes={','.join(trees)}",
        f"--output={folder}",
    )
    assert result.code == 0, result.err
    values = json.loads((folder / "results.json").read_text())
    acceptance, costs = read(values)
    assert values["prompts"] == 3
    for figure, tree in zip(values["figures"], trees, strict=True):
        topology = shapes.parse(tree).topology
        assert figure["shape"] == tree and figure["nodes"] == topology.num_nodes - 1
        tokens = theory.expected_tokens(topology, acceptance)
        # Of both halves together, but each is predicted by the other.
        assert figure["tokens"] == pytest.approx(tokens, rel=0.3)
        speedup = costs.speedup(topology, figure["tokens"])
        assert figure["speedup"] == pytest.approx(speedup)
        assert figure["milliseconds"] == pytest.approx(1e3 * costs.step(topology))
        assert (figure["closed"] is None) == tree.startswith("file")
        assert figure["measured"]["tokens"] == 36 and figure["measured"]["lossless"]
    closed = values["figures"][1]["closed"]
    assert closed["textbook"] == theory.textbook_survival(closed["alpha"], 2, 2)
    shown = (folder / "results.md").read_text()
    assert shown.strip() in result.out and "independent nodes" in shown


def test_mistakes(refuses, files, tmp_path):
    pair = f"--target={files.target}", f"--draft={files.draft}"
    (tmp_path / "one.txt").write_text("the cat\n")

    def check(expected, name, *args):
        refuses(expected, f"{name}.py", *pair, *args)

    for name in ("predict_speedup", "search_shape"):
        output = f"--output={tmp_path / 'x.json'}"
        check("grows no trees", name, output, "--method=none")
        one = f"--prompts_file={tmp_path / 'one.txt'}"
        check("one prompt cannot be divided", name, output, one)
        check("lower --probe_width", name, output, "--probe_width=64")
        check("probe_depth", name, output, "--probe_depth=0")
    for tree in ("dynamic:7@4", "allotted:7@4"):
        check("takes another form", "predict_speedup", f"--shapes={tree}")
    check("plain decoding is measured", "predict_speedup", "--shapes=none")
    check("--shapes is empty", "predict_speedup", "--shapes=")
    check("lacks node 0", "predict_speedup", "--shapes=static:1")
    check("give --output=FILE.json", "search_shape")
    check("cannot write", "search_shape", "--output=/no/such/x.json")
    output = f"--output={tmp_path / 'x.json'}"
    check("--trunk=9 does not fit", "search_shape", output, "--trunk=9")
    check("1023 fit at most", "search_shape", output, "--nodes=1024")
