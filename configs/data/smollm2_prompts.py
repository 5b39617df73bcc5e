"""Writes the prompts that SmolLM2 answers for the training of its drafters.

  python configs/data/smollm2_prompts.py --data=DATA --output=prompts.jsonl

DATA holds GSM8K's train.jsonl (MIT), The Wizard of Oz (public domain) and TinyStories
(CDLA-Sharing-1.0) as gsm8k/train.jsonl, oz/wizard_of_oz.txt and
tinystories/train_lower.txt; code comes from the Python that runs this. No question of
Spec-Bench, HumanEval, MT-bench or the suite `mini` is among them.
"""

import ast
import json
import pathlib
import random
import re
import sysconfig

from absl import app, flags

_DATA = flags.DEFINE_string("data", None, "folder of the texts", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "file to write", required=True)
_COUNT = flags.DEFINE_integer("count", 12000, "prompts in all")

_ABOUT_TEXT = (
    "Summarize the following text in two sentences.\n\n{}",
    "Write a short summary of this passage.\n\n{}",
    "Rewrite the following text in formal language.\n\n{}",
    "Rewrite this text so that it happens in the present tense. Keep everything "
    "else as it is.\n\n{}",
    "Correct the grammar and punctuation of this text, and return the whole text."
    "\n\n{}",
    "Make the following text shorter without losing anything important.\n\n{}",
    "Repeat the following text, but replace every name by another one.\n\n{}",
    "Who are the characters in this passage, and what do they want?\n\n{}",
    "Turn the following text into a list of bullet points.\n\n{}",
    "Continue this text for one more paragraph.\n\n{}",
    "{}\n\nWhat is the mood of this passage, and which words show it?",
)
_ABOUT_CODE = (
    "Explain what this Python function does, step by step.\n\n```python\n{}\n```",
    "Add comments to this Python function.\n\n```python\n{}\n```",
    "Write a docstring for this function.\n\n```python\n{}\n```",
    "Rename the variables of this function to clearer names and return the whole "
    "function.\n\n```python\n{}\n```",
)
_TO_WRITE = "Write a Python function for this description: {}"
_STORY = "Write a short story that begins with this sentence: {}"


def main(_) -> None:
    data = pathlib.Path(_DATA.value)
    rng = random.Random(0)
    oz = _passages((data / "oz/wizard_of_oz.txt").read_text(), 700)
    tales = (data / "tinystories/train_lower.txt").read_text()
    stories = [s.strip() for s in re.split(r"\n\s*\n|<\|endoftext\|>", tales)]
    stories = [s[:700] for s in stories if len(s) > 200]
    lines = (data / "gsm8k/train.jsonl").read_text().splitlines()
    sums = [json.loads(line)["question"] for line in lines]
    sources, descriptions = _functions()
    kinds = [
        lambda: rng.choice(_ABOUT_TEXT).format(rng.choice(oz)),
        lambda: rng.choice(_ABOUT_TEXT).format(rng.choice(stories)),
        lambda: _STORY.format(re.split(r"(?<=[.!?])\s", rng.choice(stories))[0]),
        lambda: rng.choice(sums),
        lambda: rng.choice(_ABOUT_CODE).format(rng.choice(sources)),
        lambda: _TO_WRITE.format(rng.choice(descriptions)),
    ]
    asked = dict.fromkeys(kinds[i % len(kinds)]() for i in range(_COUNT.value))
    rows = [json.dumps({"prompt": prompt}) for prompt in asked]
    pathlib.Path(_OUTPUT.value).write_text("\n".join(rows) + "\n")


def _passages(text: str, size: int) -> list[str]:
    """Runs of whole paragraphs of about so many characters."""
    found, current = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        current = f"{current}\n\n{paragraph.strip()}".strip()
        if len(current) >= size:
            found.append(current[: 2 * size])
            current = ""
    return found


def _functions() -> tuple[list[str], list[str]]:
    """Short functions of the standard library, and what their docstrings say."""
    sources, descriptions = [], []
    for file in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            source = ast.get_source_segment(text, node) or ""
            if 150 < len(source) < 900:
                sources.append(source)
            about = (ast.get_docstring(node) or "").split("\n\n")[0]
            if 40 < len(about) < 300:
                descriptions.append(" ".join(about.split()))
    return sources, descriptions


if __name__ == "__main__":
    app.run(main)
