"""scripts/compare_rules.py end to end on tiny models; no figure is judged."""

from __future__ import annotations

import json

import pytest

from treespec_jax.commands import compare_rules
from treespec_jax.commands.settings import Experiment, RuleComparison
from treespec_jax.errors import UserError
from treespec_jax.measurement import plots


@pytest.mark.slow
def test_comparison(run_script, files, tmp_path):
    (tmp_path / "p.txt").write_text("the cat\na dog\n")
    folder = tmp_path / "results"
    result = run_script(
        "compare_rules.py",
        f"--target={files.target}",
        f"--draft={files.draft}",
        f"--prompts_file={tmp_path / 'p.txt'}",
        "--rules=exact,block,typical",
        "--shapes=regular:2",
        "--temperatures=0,1",
        "--max_tokens=6",
        "--max_len=32",
        "--rounds=2",
        "--record",
        f"--output={folder}",
    )
    assert result.code == 0, result.err
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["results.json", "results.md", "results.png"]
    shown = (folder / "results.md").read_text()
    assert shown.strip() in result.out
    assert "refused: block on regular:2: rule 'block' judges chains only" in shown
    assert "lossy" in shown

    report = json.loads((folder / "results.json").read_text())
    assert [(r["rule"], r["shape"]) for r in report["refused"]] == [
        ("block", "regular:2")
    ]
    seen = [(f["rule"], f["shape"], f["temperature"]) for f in report["figures"]]
    pairs = [("exact", "none"), ("exact", "regular:2"), ("typical", "regular:2")]
    assert seen == [(*pair, t) for t in (0.0, 1.0) for pair in pairs]
    for figures in report["figures"]:
        assert figures["tokens"] == 2 * 2 * 6
        assert figures["tokens_per_second"]["median"] > 0
        assert len(figures["tokens_per_step"]["rounds"]) == 2
        assert figures["lossless"] == (figures["rule"] != "typical")
        if figures["shape"] == "none":
            assert figures["tokens_per_step"]["max"] == 1
            assert figures["ratio_to_plain"]["median"] == 1
        else:
            assert len(figures["acceptance_by_depth"]) == 1
            assert len(figures["acceptance_by_rank"]) <= 2
            nodes = sum(row["nodes"] for row in figures["reliability"]["bins"])
            assert 2 * figures["steps"] == nodes
    rows = [[cell.strip() for cell in line.split("|")] for line in shown.splitlines()]
    for temperature in "01":
        for kind, rule in {"lossless": "exact", "LOSSY": "typical"}.items():
            (row,) = (r for r in rows if r[1:4] == [temperature, "regular", kind])
            assert row[4] == f"{rule} on regular:2" and float(row[5]) > 0
    assert "mean gap" in shown and "by rank" in shown


def test_what_is_refused_is_said_with_its_reason():
    possible, refused = compare_rules.combinations(
        Experiment(comparison=RuleComparison(shapes=("chain:2", "dynamic:4@2")))
    )
    assert ("block", "chain:2") in possible and ("exact", "dynamic:4@2") in possible
    reasons = {(one["rule"], one["shape"]): one["reason"] for one in refused}
    names = "token", "block", "traversal"
    assert set(reasons) == {(name, "dynamic:4@2") for name in names}
    assert "chains only" in reasons["block", "dynamic:4@2"]
    assert "take tree='allotted:4@2'" in reasons["token", "dynamic:4@2"]


def test_bars_stand_on_their_ticks(monkeypatch, tmp_path):
    """Also where a shape is refused by some rules; a rule has one colour."""
    from matplotlib.figure import Figure

    value = dict.fromkeys(("median", "min", "max"), 2.0)
    pairs = [("exact", "none"), ("exact", "a"), ("token", "a"), ("block", "a")]
    pairs += [("exact", "b"), ("block", "b"), ("block", "c")]
    figures = [
        dict(rule=rule, shape=shape, temperature=0.0, lossless=True)
        | dict(tokens_per_step=value, tokens_per_second=value)
        for rule, shape in pairs
    ]
    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: drawn.append(figure)
    )
    results = {"comparison": {"temperatures": [0.0]}, "figures": figures}
    plots.save_rules(results, tmp_path / "x.png")
    for axes in drawn[0].axes:
        centres, colours = {0: [], 1: [], 2: []}, {}
        for bars in axes.containers:
            for bar in getattr(bars, "patches", ()):
                middle = bar.get_x() + bar.get_width() / 2
                centres[round(middle)].append(middle)
                colours.setdefault(bars.get_label(), set()).add(bar.get_facecolor())
        assert [len(group) for group in centres.values()] == [3, 2, 1]
        for tick, group in centres.items():
            assert sum(group) / len(group) == pytest.approx(tick)
        assert len(colours) == 3 and all(len(c) == 1 for c in colours.values())


def test_mistakes(refuses, files, tmp_path):
    def check(expected, *args):
        refuses(expected, "compare_rules.py", *pair, *args)
        assert list(tmp_path.iterdir()) == []

    pair = [f"--target={files.target}", f"--draft={files.draft}"]
    out = f"--output={tmp_path / 'results'}"
    check("--output")
    check("tokne", out, "--rules=tokne")
    check("--shapes=none", out, "--shapes=none")
    check("regular:0", out, "--shapes=regular:0")
    check("--temperatures", out, "--temperatures=hot")
    check("temperature", out, "--temperatures=-1")
    check("rounds", out, "--rounds=0")
    check("--rules", out, "--rules=")
    check("chains only", out, "--rules=block", "--shapes=regular:2")
    check("none.txt", out, f"--prompts_file={tmp_path / 'none.txt'}")
    check("/no/such", out, "--draft=/no/such")
    check("vocabular", out, f"--draft={files.foreign}")


def test_a_comparison_checks_itself():
    with pytest.raises(UserError, match="hot"):
        RuleComparison(temperatures=("hot",))
    assert RuleComparison(temperatures=("0", "0.0", "1")).temperatures == (0.0, 1.0)
