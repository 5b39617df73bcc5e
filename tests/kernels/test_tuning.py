"""The search over block sizes: its choice, its journal, its file and its script."""

from __future__ import annotations

import json
import shutil

import pytest

from pallas_kernels.tree_attention import sizes, tuning
from pallas_kernels.tree_attention.sizes import BlockSizes
from pallas_kernels.tree_attention.tuning import Trial

SMALL = tuning.Shape(slots=2, prefix=512, kv_heads=2)


def trial(cost, **fields):
    return Trial(BlockSizes(**fields), cost, {})


def test_choice():
    slow, quick = trial(200.0), trial(100.0, unroll=4)
    tied = trial(100.5, unroll=2)
    assert tuning.best([slow, quick]) is quick
    assert tuning.best([slow, quick, tied]) is tied
    assert tuning.best([quick, tied]) is quick  # the default stays
    assert tuning.best([slow, trial(None)]) is slow
    assert tuning.best([trial(None)]) is None


def test_candidates_are_different_programs():
    for rows in sizes.CLASSES:
        given = list(tuning.candidates(rows))
        assert len(set(given)) == len(given) > 1
        assert all(x.rows <= max(64, rows) for x in given)
    assert len(list(tuning.candidates(256))) > len(list(tuning.candidates(64)))


def test_journal_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "new" / "trials.jsonl"
    key = ("v5e:2x2", 64, {"unroll": 2})
    found = tuning.Journal(path).run(key, lambda: trial(3.0, unroll=2))
    assert found.cost == 3.0

    def fail():
        raise KeyboardInterrupt

    # A later process neither repeats a trial nor one that ended its process.
    assert tuning.Journal(path).run(key, fail) == found
    other = ("v5e:2x2", 64, {"unroll": 4})
    with pytest.raises(KeyboardInterrupt):
        tuning.Journal(path).run(other, fail)
    path.write_text(path.read_text() + '{"key": ["v5')
    again = tuning.Journal(path)
    assert again.run(other, fail).figures == {"refused": "it ended the process"}
    assert again.run(key, fail) == found


def test_data_file(tmp_path, monkeypatch):
    """What is saved is what is chosen, for that kind and class alone."""
    path = tmp_path / "sizes.json"
    shutil.copy(sizes.SIZES_FILE, path)
    monkeypatch.setattr(sizes, "SIZES_FILE", path)
    before = json.loads(path.read_text())
    few, many = BlockSizes(block_rows=1024), BlockSizes(rows=64, unroll=4)
    try:
        sizes.save({"TPU v9": {256: many, 8: few, 16: None}})
        chosen = [sizes.choose("TPU v9", rows) for rows in (1, 8, 16, 129, 4096)]
        assert chosen == [few, few, sizes.choose(None, 16), many, many]
        assert sizes.choose(None, 8) == sizes.choose("TPU v10", 8) != few
        sizes.save({"TPU v9": {256: None, 8: None}})
        assert json.loads(path.read_text()) == before
    finally:
        sizes._table.cache_clear()


def test_every_entry_of_the_data_file_is_reached():
    table = json.loads(sizes.SIZES_FILE.read_text())
    assert set(table["default"]) == {str(most) for most in sizes.CLASSES}
    for kind, classes in table.items():
        for most, fields in classes.items():
            assert sizes.choose(kind, int(most)) == BlockSizes(**fields)
            same = sizes.choose(None, int(most)) == BlockSizes(**fields)
            assert same == (kind == "default")


def test_trial_by_the_compiler(tpu_compiler):
    """Longer blocks hide latency; what the kernel refuses is a trial without a cost."""
    costs = [
        tuning.estimate_trial("v5e:2x2", SMALL, 64, BlockSizes(block_rows=rows))
        for rows in (128, 512)
    ]
    assert costs[0].figures["cycles"] > 1.5 * costs[1].figures["cycles"]
    assert costs[0].cost > costs[0].figures["cycles"]  # half-filled last blocks
    refused = tuning.estimate_trial(
        "v5e:2x2", SMALL, 64, BlockSizes(vmem_bytes=1 << 16, rows=64)
    )
    assert refused.cost is None and "bytes" in refused.figures["refused"]
