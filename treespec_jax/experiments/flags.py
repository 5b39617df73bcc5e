"""The --config flag, with every mistake in one line."""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags


def define_config() -> flags.FlagHolder:
    """Defines --config=FILE with overrides --config.NAME=VALUE.

    The file is a program and its overrides are read by reflection, so that about any
    exception may come out of parsing; all of them become a flag error that names the
    file. A value that is there is a ConfigDict.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "settings, a file of configs/; --config.NAME=VALUE changes one of them, and "
        "the flags below win over both",
    )
    flag = flags.FLAGS["config"]
    parse = flag.parse

    def parse_in_one_line(argument):
        def refuse(reason: str, cause: Exception | None = None):
            raise flags.IllegalFlagValueError(
                f"--config={argument}: {reason}"
            ) from cause

        try:
            parse(argument)
            # A file that cannot be read is kept for the first look at the value: here.
            if flag.value is not None and not hasattr(flag.value, "to_dict"):
                refuse(f"get_config() must return a ConfigDict, not {flag.value!r:.40}")
        except flags.Error:
            raise
        except OSError as error:
            refuse("the file cannot be read; check the path", error)
        except Exception as error:
            refuse(_reason(error), error)

    flag.parse = parse_in_one_line
    return holder


def _reason(error: Exception) -> str:
    """The telling part of what is often a page of text."""
    # ml_collections hands on reprs of reprs.
    text = str(error).replace("\\n", "\n").replace("\\'", "'").strip("'\"")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "Traceback" in text:
        return lines[-1]
    if isinstance(error, (AttributeError, KeyError)):
        # An unknown key; all the known ones follow.
        text = " ".join(lines).split(" Other fields present")[0].replace("'", "")
        return text if " " in lines[0] else f"unknown key {text}"
    return lines[0]
