"""Where the scripts are."""

from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
