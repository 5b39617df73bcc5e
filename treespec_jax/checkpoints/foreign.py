"""Folders that hold something else than a whole model in plain numbers; free of jax.

They often come with a `config.json` of a model, so that their tensors would merely seem
to be missing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.files import read_json
from treespec_jax.errors import UserError

ADAPTER, _CONFIG = "adapter_config.json", "config.json"
# Files of quantisers that do not write `quantization_config` into config.json.
QUANTISERS = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
# Keys of config.json, and who writes them.
_KEYS = {
    "quantization_config": "",
    "compression_config": "compressed-tensors",
    "quantization": "MLX",
}
_DRAFTER = "which cannot speak without its target; name it as the drafter, with --draft"
# What tensors of such names are of. The first pattern that one of them matches counts.
_QUANTISED = {
    r".*\.weight\.(absmax|quant_map|quant_state\..*|nested_absmax|SCB)": "bitsandbytes",
    r".*\.SCB": "bitsandbytes",
    r".*\.weight_packed": "compressed-tensors",
    r".*\.(qweight|qzeros|g_idx)": "GPTQ or AWQ",
    r".*\.weight_scale(_inv)?": "FP8 or INT8",
    r".*\.scales": "MLX",
}
_PARTS = {
    r".*\.lora_[AB](\..*)?\.weight": "a LoRA adapter, not a model; merge it into its "
    "base model first (merge_and_unload of peft)",
    r"(.*\.)?medusa_head\..*|\d+\.\d+\.linear\.weight": f"Medusa heads, {_DRAFTER}",
    r"fc\.weight": f"a drafter of method 'eagle', {_DRAFTER}",
}


def check_folder(path: Path) -> None:
    """Checks the small files of a folder.

    Raises:
      UserError: an adapter, drafting heads, or quantised weights; says what to give.
    """
    if not path.is_dir():
        return
    about = path / _CONFIG
    adapter = path / ADAPTER
    if adapter.is_file() and not (about.is_file() and _has_model(path)):
        base = read_json(adapter).get("base_model_name_or_path")
        base = f" ({base})" if isinstance(base, str) and base else ""
        raise UserError(
            f"{path} holds a LoRA adapter, not a model; merge it into its base model"
            f"{base} first (merge_and_unload of peft)"
        )
    for name, method in QUANTISERS.items():
        if (path / name).is_file():
            raise _quantised(path / name, method)
    if about.is_file():
        values = read_json(about)
        named = values.get("architectures")
        if "medusa_num_heads" in values and not named:
            raise UserError(f"{path} holds Medusa heads, {_DRAFTER}")


def check_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Raises UserError if the `config.json` at `path` says that weights are quantised.

    Args:
      values: its contents, or a part of them.
    """
    for key, method in _KEYS.items():
        said = values.get(key)
        if said is None:
            continue
        if not method and isinstance(said, Mapping):
            method = said.get("quant_method")
        raise _quantised(f"{path}: {key}", method if isinstance(method, str) else "")


def check_names(path: Path, names: Collection[str]) -> None:
    """Raises UserError if tensors of such names are not of a whole, plain model."""
    for pattern, method in _QUANTISED.items():
        found = next((n for n in names if re.fullmatch(pattern, n)), None)
        if found is not None:
            raise _quantised(f"{path}: tensor {found}", method)
    for pattern, what in _PARTS.items():
        if any(re.fullmatch(pattern, name) for name in names):
            raise UserError(f"{path} holds {what}")


def _has_model(path: Path) -> bool:
    files = (file.name for file in path.glob("*.safetensors"))
    return any(not name.startswith("adapter_") for name in files)


def _quantised(where: Path | str, method: str) -> UserError:
    how = f" ({method})" if method else ""
    return UserError(
        f"{where} says that the weights are quantised{how}, which is not supported; "
        "give the original checkpoint in float32, bfloat16 or float16, or a GGUF file"
    )
