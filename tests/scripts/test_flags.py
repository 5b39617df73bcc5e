"""Flags made from the fields of settings, and the console command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

import treespec_jax
from tests.scripts.support import SCRIPTS
from treespec_jax import commands
from treespec_jax.commands import COMMANDS, setting_flags, settings

ALL = [s for name in ("", *settings.SECTIONS) for s in settings.fields_of(name)]
# A text on the command line and what becomes of it, by the type of a field.
SAMPLES = {
    "bool": ("true", True),
    "int": ("3", 3),
    "float": ("0.25", 0.25),
    "str": ("a,b", "a,b"),
    "tuple[str, ...]": ("a,b", ("a", "b")),
    "tuple[int, ...]": ("3,5", (3, 5)),
    "tuple[float, ...]": ("0.5,1", (0.5, 1.0)),
    "tuple[tuple[int, float], ...]": ("5=-1.5", ((5, -1.5),)),
    "tuple[tuple[str, typing.Any], ...]": ("longest=3", (("longest", 3),)),
    "repeatable": ("a,b", ("a,b",)),
}


def sample(setting):
    kind = getattr(setting.kind, "__name__", "")
    kind = str(setting.kind) if kind == "tuple" else kind
    repeatable = ("sampling.stop", "sampling.bad_words")
    if setting.dotted in ("sampling.logprobs", "sampling.prompt_logprobs"):
        return "5", 5
    return SAMPLES["repeatable" if setting.dotted in repeatable else kind]


@pytest.fixture
def own_flags():
    """Removes the flags that a test defines."""
    known = set(flags.FLAGS)
    yield
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def test_every_field_has_a_help_text_and_every_text_a_field():
    texts = {(s, n) for s, section in setting_flags.HELP.items() for n in section}
    assert texts == {(s.section, s.name) for s in ALL}


@pytest.mark.parametrize("section", ["benchmark", "comparison"])
def test_every_field_has_a_flag(own_flags, monkeypatch, section):
    """Sections beside those of the model have flags in their own commands."""
    without = ("weights",) if section == "benchmark" else ()
    made = setting_flags.SettingFlags((section,), without=without, samples=True)
    made.define()
    wanted = [
        s
        for s in ALL
        if s.section in ("", *settings.MODEL, section) and s.dotted not in without
    ]
    assert [s.dotted for s in made] == [s.dotted for s in wanted]
    given = {setting_flags.name_of(s): sample(s)[0] for s in wanted}
    assert len(given) == len(wanted), "two fields share a flag"
    for name in given:
        assert "default: " in flags.FLAGS[name].help, name
    flags.FLAGS(["program", *(f"--{name}={text}" for name, text in given.items())])
    monkeypatch.setattr(settings, "build", lambda config, given: (config, given))
    assert made.experiment() == (None, {s.dotted: sample(s)[1] for s in wanted})


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("--logprobs", True),
        ("--logprobs=true", True),
        ("--nologprobs", False),
        ("--logprobs=0", 0),
        ("--logprobs=7", 7),
    ],
)
def test_counts_are_switches_too(own_flags, given, found):
    setting_flags.SettingFlags().define()
    flags.FLAGS(["program", given])
    assert flags.FLAGS.logprobs is found or (flags.FLAGS.logprobs, found) == (7, 7)
    with pytest.raises(flags.IllegalFlagValueError, match="a whole number, true or"):
        flags.FLAGS(["program", "--logprobs=many"])


def test_every_field_is_in_configuration_files_and_json():
    config = settings.default_config()
    values = settings.Experiment().as_dict()
    for setting in ALL:
        for tree in (config, values):
            assert setting.name in (tree[setting.section] if setting.section else tree)


def test_defaults_of_a_command_give_way(own_flags, tmp_path):
    """To flags and to any configuration file; --help shows them."""
    made = setting_flags.SettingFlags(defaults={"engine.max_batch": 3, "dtype": "x"})
    (tmp_path / "c.py").write_text(
        "from treespec_jax.commands.settings import default_config as get_config\n"
    )
    made.define()
    assert "default: 3" in flags.FLAGS["max_batch"].help
    flags.FLAGS(["program", "--dtype=float32"])
    assert made.experiment().engine.max_batch == 3
    flags.FLAGS(["program", f"--config={tmp_path / 'c.py'}"])
    assert made.experiment().engine.max_batch == 8


@pytest.mark.slow
def test_settings_in_force_are_complete(run_script, files, tmp_path):
    """Those of flags, of a file and of neither; the whole can be given again."""
    (tmp_path / "c.py").write_text(
        "from treespec_jax.commands.settings import default_config as get_config\n"
    )
    given = [f"--target={files.target}", f"--draft={files.draft}", "--prompt=a dog"]
    given += [f"--config={tmp_path / 'c.py'}", "--config.speculative.rule=typical"]
    given += ["--config.speculative.typical_eps=0.2", "--typical_delta=0.4"]
    given += ["--tree=regular:2x1", "--max_len=64", "--prefill_chunks=8,32"]
    given += ["--lanes=1", "--tau=0.6", "--record", "--stop=a,b", "--max_tokens=8"]
    report = json.loads(run_script("generate.py", *given, "--json").out)
    found = report["settings"]
    for setting in ALL:
        if setting.section in ("", *settings.MODEL):
            part = found[setting.section] if setting.section else found
            assert setting.name in part, setting
    speculative, engine = found["speculative"], found["engine"]
    assert speculative["model"] == files.draft and speculative["tau"] == 0.6
    assert (speculative["typical_eps"], speculative["typical_delta"]) == (0.2, 0.4)
    assert speculative["method"] == "draft_model"
    assert engine["prefill_chunks"] == [8, 32] and engine["record"] is True
    assert found["sampling"]["stop"] == ["a,b"]
    assert sum(row["nodes"] for row in report["reliability"]["bins"]) > 0
    again = json.loads(json.dumps(settings.build(found).as_dict()))
    assert again | found == again
    plain = run_script("generate.py", *given, "--method=none", "--json", "--norecord")
    stats = json.loads(plain.out)["stats"]
    assert stats["drafted"] == 0 and stats["tokens"] > 0


def test_flags_without_effect_are_refused(refuses):
    refuses("tree", "benchmark.py", "--output=x", "--tree=chain:2")
    refuses("rule", "compare_rules.py", "--output=x", "--rule=token")
    refuses("--prefill_chunks=1,x", "generate.py", "--prompt=a", "--prefill_chunks=1,x")


def test_subcommands_are_the_scripts(run_script):
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(COMMANDS)
    listed = run_script("--help")
    assert listed.code == 0 and listed.err == ""
    for name in COMMANDS:
        (line,) = [s for s in listed.out.splitlines() if s.split()[:1] == [name]]
        told = run_script(name, "--help")
        assert told.code == 0 and told.out.startswith(line.split(maxsplit=1)[1])
        source = Path(commands.__file__).with_name(f"{name}.py").read_text()
        configured = "SettingFlags(" in source or "config_file." in source
        configured |= "shape_study." in source
        assert ("--config:" in told.out) == configured, name
        if configured and "config_file." not in source:  # it runs a model
            for flag in ("mesh", "cache_dtype", "top_p"):
                assert f"--{flag}:" in told.out, (name, flag)
        assert "--" in told.out and run_script(f"{name}.py", "-h").out == told.out


def test_subcommands_run(run_script, refuses):
    asked = ["--model=llama-3-8b", "--json"]
    told = run_script("list_models", *asked)
    assert told.code == 0 and json.loads(told.out)["models"][0]["parameters"] > 8e9
    assert run_script("list_models.py", *asked).out == told.out
    refuses("--input is missing", "convert_checkpoint")
    refuses("unknown command 'generat'; did you mean 'generate'?", "generat")
    refuses("unknown command '--prompt=a'; see treespec --help", "--prompt=a")


def test_listing_imports_little():
    code = (
        "import sys\nfrom treespec_jax import cli\n"
        "try:\n    cli.main(['treespec'])\n"
        "except SystemExit as e:\n"
        "    print(e.code, *sorted({'jax', 'numpy'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert told.stdout.splitlines()[-1] == "0", told


def test_measurement_knows_nothing_of_commands():
    for path in (Path(treespec_jax.__file__).parent / "measurement").glob("*.py"):
        assert "treespec_jax.commands" not in path.read_text(), path
