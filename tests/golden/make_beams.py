"""Makes tests/golden/beams.json: beam search of transformers over llama_grouped.

    python tests/golden/make_beams.py     (torch, transformers; see make_golden.py)

Made with torch 2.13.0 and transformers 5.24.0, in float32. Every case holds the
settings, and per prompt the generated tokens and scores of all K texts, best first;
`scores` is null for one beam, which transformers takes for greedy decoding.
"""

from __future__ import annotations

import itertools
import json
import pathlib

import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
PROMPTS = [[1], [1, 17, 40, 9, 63], [1, *range(30, 50)]]
TOKENS = 14
# They come up early, and now and then.
ENDS = [85, 60]


def search(model, case):
    found = []
    for prompt in PROMPTS:
        done = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=case["beams"],
            num_return_sequences=case["beams"],
            max_new_tokens=TOKENS,
            length_penalty=case["length_penalty"],
            early_stopping=case["early_stopping"],
            eos_token_id=ENDS,
            pad_token_id=0,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        texts = []
        for row in done.sequences[:, len(prompt) :].tolist():
            ends = [place for place, token in enumerate(row) if token in ENDS]
            texts.append(row[: min(ends, default=TOKENS) + 1])
        scores = None if case["beams"] == 1 else done.sequences_scores.tolist()
        found.append({"texts": texts, "scores": scores})
    return found


def main() -> None:
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE / "llama_grouped")
    model = model.float().eval()
    cases = []
    for beams, penalty, early in itertools.product(
        (1, 2, 4, 8), (0.0, 1.0, 2.0), (True, False, "never")
    ):
        case = dict(beams=beams, length_penalty=penalty, early_stopping=early)
        if beams == 1 and (penalty, early) != (1.0, False):
            continue
        cases.append({**case, "found": search(model, case)})
    text = ",\n".join(json.dumps(case) for case in cases)
    head = json.dumps(dict(prompts=PROMPTS, max_tokens=TOKENS, eos_ids=ENDS))
    found = f'{head[:-1]}, "cases": [\n{text}\n]}}\n'
    (HERE / "beams.json").write_text(found)


if __name__ == "__main__":
    main()
