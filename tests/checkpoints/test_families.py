"""config.json of every family, in every spelling, and what is refused."""

import dataclasses
import json
import pathlib

import pytest

from treespec_jax.checkpoints.families import FAMILIES, name_table
from treespec_jax.checkpoints.formats.huggingface_config import read_config
from treespec_jax.config import RotaryConfig
from treespec_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
)


@pytest.fixture
def read(tmp_path):
    def read(values, **changes):
        values = {**values, **changes}
        values = {k: v for k, v in values.items() if v != "DELETE"}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return read_config(tmp_path / "config.json")

    return read


@pytest.fixture
def refuses(read, tmp_path):
    def refuses(expected, values, **changes):
        with pytest.raises(UserError) as error:
            read(values, **changes)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / 'config.json'}: ")
        assert expected in message and "\n" not in message

    return refuses


def golden(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


def plain(family):
    return dict(SIZES, architectures=FAMILIES[family].architectures[:1]) | dict(
        model_type=FAMILIES[family].model_types[0]
    )


def test_features_of_the_golden_folders():
    read = {name: read_config(GOLDEN / name / "config.json") for name in NAMES}
    assert {config.family for config in read.values()} == set(FAMILIES)
    # Factors of their own are what GGUF files have.
    assert {config.rotary.scaling for config in read.values()} == {
        *RotaryConfig.SCALINGS
    } - {"factors"}
    grouped, tied = read["llama_grouped"], read["llama_tied"]
    assert (grouped.num_kv_heads, grouped.queries_per_kv) == (2, 2)
    assert not grouped.tied_embeddings
    assert grouped.norm_eps == 1e-5
    assert tied.tied_embeddings
    assert tied.head_dim == 8 != tied.embed_dim // tied.num_heads
    assert read["llama3"].rotary == RotaryConfig(
        5e5, "llama3", 8.0, 16, low_freq_factor=1.0, high_freq_factor=4.0
    )
    assert read["llama3"].eos_ids == (2, 5)
    assert read["llama_linear"].rotary == RotaryConfig(5000.0, "linear", 2.5)
    assert read["llama_yarn"].rotary == RotaryConfig(
        500.0,
        "yarn",
        4.0,
        16,
        beta_fast=1.0,
        beta_slow=0.25,
        truncate=False,
        mscale=0.8,
        mscale_all_dim=0.5,
    )
    assert read["qwen2"].qkv_bias and not read["qwen2"].local_layers
    assert read["qwen2"].rotary.scaling == "yarn"
    window = read["qwen2_window"]
    assert (window.window, window.local_layers) == (6, (1, 2))
    assert read["qwen3"].qk_norm and read["qwen3"].rotary.attention_factor == 1.3
    mistral = read["mistral"]
    assert (mistral.window, mistral.local_layers, mistral.head_dim) == (7, (0, 1), 12)
    gemma = read["gemma"]
    assert gemma.scaled_embeddings and gemma.unit_offset_norms and not gemma.post_norms
    assert (gemma.activation, gemma.tied_embeddings) == ("gelu_tanh", True)
    gemma2 = read["gemma2"]
    assert gemma2.post_norms and not gemma2.qk_norm
    assert (gemma2.attention_soft_cap, gemma2.logit_soft_cap) == (1.5, 4.0)
    assert gemma2.attention_scale == 12**-0.5
    assert (gemma2.window, gemma2.local_layers) == (6, (0, 2))
    text, images = read["gemma3_text"], read["gemma3_multimodal"]
    for config in (text, images):
        assert config.qk_norm and config.post_norms
        assert config.local_rotary == RotaryConfig(100.0)
        assert config.bos_id == 2 and config.eos_ids == (1, 5)
    assert text.rotary == RotaryConfig(5e4, "linear", 4.0)
    assert images.rotary == RotaryConfig(5e4, "linear", 8.0)
    assert (text.local_layers, images.local_layers) == ((0, 1, 3), (0, 2))


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_of_rotary_settings(read, name):
    """What newer files nest in `rope_parameters` and older ones do not, turned over."""
    values = golden(name)
    config = read(values)
    text = values.get("text_config", values)
    nested = text.pop("rope_parameters", None)
    if nested is None:
        nested = {
            **(text.pop("rope_scaling", None) or {}),
            "rope_theta": text.pop("rope_theta"),
        }
        local = text.pop("rope_local_base_freq", None)
        if local:
            nested = {
                "full_attention": nested,
                "sliding_attention": {"rope_theta": local},
            }
        text["rope_parameters"] = nested
    else:
        if "full_attention" in nested:
            text["rope_local_base_freq"] = nested["sliding_attention"]["rope_theta"]
            nested = nested["full_attention"]
        text["rope_theta"] = nested.pop("rope_theta")
        nested["type"] = nested.pop("rope_type")
        text["rope_scaling"] = nested
    assert read(values) == config


def test_defaults_of_each_family(read):
    """transformers 5.23: what a file that leaves all of it out means."""
    found = {
        family: read(plain(family), num_attention_heads=32, hidden_size=256)
        for family in FAMILIES
    }
    for family, config in found.items():
        assert config.family == family
        assert config.norm_eps == 1e-6
        assert config.tied_embeddings == family.startswith("gemma")
        assert config.rotary == RotaryConfig(1e6 if family == "gemma3" else 1e4)
        ids = {"qwen2": (None, ()), "qwen3": (None, ())}
        ids |= dict.fromkeys(["gemma", "gemma2", "gemma3"], (2, (1,)))
        assert (config.bos_id, config.eos_ids) == ids.get(family, (1, (2,)))
    assert {f: c.max_positions for f, c in found.items()} == {
        "llama": 2048,
        "mistral": 131072,
        "qwen2": 32768,
        "qwen3": 32768,
        "gemma": 8192,
        "gemma2": 8192,
        "gemma3": 131072,
    }
    assert {f: c.head_dim for f, c in found.items()} == {
        "llama": 8,
        "mistral": 8,
        "qwen2": 8,
        "qwen3": 128,
        "gemma": 256,
        "gemma2": 256,
        "gemma3": 256,
    }
    assert {f: c.num_kv_heads for f, c in found.items()} == {
        "llama": 32,
        "mistral": 8,
        "qwen2": 32,
        "qwen3": 32,
        "gemma": 16,
        "gemma2": 4,
        "gemma3": 4,
    }
    assert {f: (c.window, c.local_layers) for f, c in found.items()} == {
        "llama": (None, ()),
        "mistral": (4096, (0, 1, 2, 3)),
        "qwen2": (None, ()),
        "qwen3": (None, ()),
        "gemma": (None, ()),
        "gemma2": (4096, (0, 2)),
        "gemma3": (4096, (0, 1, 2, 3)),
    }
    assert found["gemma2"].attention_scale == found["gemma3"].attention_scale == 1 / 16
    soft = (found["gemma2"].attention_soft_cap, found["gemma2"].logit_soft_cap)
    assert soft == (50.0, 30.0)
    assert found["gemma3"].local_rotary == RotaryConfig(1e4)


@pytest.fixture
def read_plain(read):
    return lambda family, **changes: read(
        dict(plain(family), num_key_value_heads=2), **changes
    )


def test_windows(read_plain):
    config = read_plain("mistral", sliding_window=None)
    assert (config.window, config.local_layers) == (None, ())
    on = dict(use_sliding_window=True, sliding_window=5)
    assert read_plain("qwen2", **on, max_window_layers=3).local_layers == (3,)
    assert read_plain("qwen3", **on, max_window_layers=0).local_layers == (0, 1, 2, 3)
    assert read_plain("qwen3", **on).window is None
    kinds = ["full_attention", "sliding_attention"] * 2
    assert read_plain("qwen2", **on, layer_types=kinds).local_layers == (1, 3)
    assert read_plain("gemma2", layer_types=kinds).local_layers == (1, 3)
    config = read_plain("gemma3", sliding_window_pattern=2)
    assert config.local_layers == (0, 2)
    config = read_plain("gemma3", layer_types=["full_attention"] * 4)
    assert (config.window, config.local_rotary) == (None, None)


def test_settings_of_other_families_do_not_count(read_plain):
    config = read_plain(
        "llama",
        sliding_window=7,
        query_pre_attn_scalar=3,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.0,
    )
    assert config == read_plain("llama")


def test_old_files_name_the_family_once(read):
    values = golden("llama_grouped")
    config = read(values)
    assert read(values, architectures="DELETE") == config
    assert read(values, model_type="DELETE") == config
    assert read(values, head_dim=None, num_key_value_heads=2) == config


def test_yarn(read):
    """Texts may be as long as the stretching says; zero and null are defaults."""
    scaling = dict(type="yarn", factor=4.0, original_max_position_embeddings=1024)
    config = read(golden("qwen2"), rope_scaling=scaling, max_position_embeddings=1024)
    assert config.max_positions == 4096
    assert config.rotary == RotaryConfig(500.0, "yarn", 4.0, 1024)
    scaling.update(factor=None, beta_fast=0, truncate=None, attention_factor=None)
    config = read(golden("qwen2"), rope_scaling=scaling, max_position_embeddings=8192)
    assert (config.rotary.factor, config.max_positions) == (8.0, 8192)
    assert config.rotary == RotaryConfig(500.0, "yarn", 8.0, 1024)
    del scaling["original_max_position_embeddings"]
    scaling["factor"] = 2.0
    config = read(golden("qwen2"), rope_scaling=scaling, max_position_embeddings=512)
    assert (config.rotary.original_max_positions, config.max_positions) == (512, 1024)
    config = read(
        golden("qwen2"), rope_scaling=scaling, original_max_position_embeddings=64
    )
    assert config.rotary.original_max_positions == 64


def test_chat_ends_come_from_the_generation_settings(read, tmp_path):
    settings = {"eos_token_id": [2, 9, 11]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert read(golden("llama_grouped")).eos_ids == (2, 9, 11)


def test_text_part_of_a_sparse_multimodal_file(read):
    """As published for Gemma 3: what equals the defaults is left out."""
    config = read(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152},
        }
    )
    assert config.vocab_size == 262208
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.rotary == RotaryConfig(1e6, "linear", 8.0)
    assert config.eos_ids == (1, 106)
    assert len(config.local_layers) == 29 and config.window == 1024


def test_text_part_that_is_none(refuses):
    message = 'text_config="gemma" must hold settings'
    refuses(message, golden("gemma3_multimodal"), text_config="gemma")


def test_damaged_generation_settings(read, tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text("{")
    with pytest.raises(UserError, match=f"^{path} is not JSON"):
        read(golden("llama_grouped"))
    path.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match='eos_token_id="</s>" must be a token'):
        read(golden("llama_grouped"))


LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama_grouped", "attention_bias", True),
        ("llama_grouped", "mlp_bias", True),
        ("llama_grouped", "hidden_act", "gelu"),
        ("llama_grouped", "hidden_act", "relu"),
        ("llama_grouped", "partial_rotary_factor", 0.5),
        ("llama_grouped", "attention_chunk_size", 8192),
        ("llama_grouped", "no_rope_layers", [0, 1]),
        ("llama_grouped", "num_local_experts", 8),
        ("llama_grouped", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("llama_grouped", "rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("llama_grouped", "rope_scaling", {"type": "mrope", "mrope_section": [1]}),
        ("llama_grouped", "rope_scaling", {"type": "default", "mrope_section": [1]}),
        ("llama_grouped", "rope_scaling", "linear"),
        ("llama_grouped", "rope_parameters", {"partial_rotary_factor": 0.5}),
        ("llama_grouped", "rope_parameters", {"full_attention": {}}),
        ("llama_grouped", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen2", "layer_types", ["full_attention", "chunked_attention"]),
        ("qwen2", "layer_types", ["full_attention"]),
        ("qwen3", "attention_bias", True),
        ("gemma", "hidden_act", "silu"),
        ("gemma", "hidden_activation", "gelu"),
        ("gemma", "use_bidirectional_attention", True),
        ("gemma2", "hidden_activation", "gelu"),
        ("gemma2", "sliding_window", None),
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "rope_parameters", {"rope_theta": 1e6}),
    ],
)
def test_settings_that_are_not_supported(refuses, name, key, value):
    text = json.dumps(value)
    expected = f"{key}={text if len(text) <= 60 else text[:57] + '...'} is not suppor"
    refuses(expected, golden(name), **{key: value})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rms_norm_eps", "1e-5", 'rms_norm_eps="1e-5" must be a number'),
        ("rope_parameters", {"rope_theta": "x"}, 'rope_theta="x" must be a number'),
        ("rope_scaling", {"type": "linear"}, '"rope_type": "linear"} lacks factor'),
        ("rope_scaling", {**LLAMA3, "factor": None}, "lacks factor"),
        (
            "rope_scaling",
            {**LLAMA3, "low_freq_factor": 4.0},
            "low_freq_factor=4.0 must",
        ),
        ("rope_scaling", {"type": "linear", "factor": 0}, "rotary.factor must be"),
        ("tie_word_embeddings", "yes", 'tie_word_embeddings="yes" must be true or'),
        ("eos_token_id", ["</s>"], 'eos_token_id=["</s>"] must be a token'),
        ("bos_token_id", -1, "bos_token_id=-1 must be a token"),
        ("num_key_value_heads", 3, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ("head_dim", 7, "head_dim must be even, got 7"),
        ("max_position_embeddings", 0, "max_position_embeddings=0 must be a whole"),
    ],
)
def test_values_that_cannot_be(refuses, key, value, expected):
    refuses(expected, golden("llama_grouped"), **{key: value})


ODD = [None, "x", "", "2", [], {}, [[1]], {"a": {}}, -1, 0, 1.5, 1e400, True, [None]]


@pytest.mark.parametrize("name", NAMES)
def test_odd_values_are_read_or_refused_in_one_line(read, name):
    """Whatever a key holds: a configuration comes out, or a message about it."""

    def attempt(values, what):
        try:
            found = dataclasses.asdict(read(values))
            for part in (found, found["rotary"], found["local_rotary"] or {}):
                texts = {key for key, value in part.items() if isinstance(value, str)}
                assert texts <= {"family", "activation", "scaling"}, what
        except UserError as error:
            assert "\n" not in str(error)
        except (TypeError, ValueError, KeyError, ArithmeticError) as error:
            pytest.fail(f"{what}: {error!r}")

    values = golden(name)
    for part in [values, *(v for v in values.values() if isinstance(v, dict))]:
        for key, before in part.items():
            for odd in ODD:
                part[key] = odd
                attempt(values, f"{key}={odd!r}")
            part[key] = before
    read(values)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("GPT2LMHeadModel", "gpt2"),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("LlamaForSequenceClassification", "llama"),
        ("LlamaForCausalLM", "granite"),
        ("LlamaForCausalLM", "mistral"),
    ],
)
def test_unknown_architectures(refuses, architecture, kind):
    message = (
        f'architectures=["{architecture}"] model_type="{kind}" is not supported, only '
        "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"
    )
    changes = dict(architectures=[architecture], model_type=kind)
    refuses(message, golden("llama_grouped"), **changes)


def test_tables_take_the_prefixes_that_are_there():
    config = read_config(GOLDEN / "gemma3_multimodal" / "config.json")
    for root in ("model", "language_model.model", "model.language_model"):
        names = [f"{root}.embed_tokens.weight", "lm_head.weight"]
        table = name_table(config, [*names, "model.vision_tower.a", "vision_tower.b"])
        assert all(piece.name.startswith(f"{root}.") for piece in table.pieces)
        assert table.ignored == [
            "lm_head.weight",
            "model.vision_tower.a",
            "vision_tower.b",
        ]
    untied = dataclasses.replace(config, tied_embeddings=False)
    head = "language_model.lm_head.weight"
    names = ["language_model.model.embed_tokens.weight", head]
    assert name_table(untied, names).pieces[-1].name == head
