"""Writes the files beside this script: prompts that ask for JSON, and a few answers to begin with.

    python lora/json/make.py

The speeches are those of `lora/instruct`, from Shakespeare's plays (public domain). The files are always the same.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

SEED = 7
# The numbers of prompts, and of answers to begin with.
SIZES = {"train": 240, "valid": 32, "test": 32}
ANSWERS = 120

NAMES = (
    "Hamlet|Ophelia|Romeo|Juliet|Othello|Iago|Macbeth|Banquo|Portia|Shylock|Brutus|Cassius|Rosalind|Orlando|Falstaff|"
    "Hotspur|Kent|Cordelia|Edgar|Cleopatra|Petruchio|Troilus|Cressida|Imogen|Timon|Mercutio|Horatio|Emilia"
)
ASK = (
    "What says {name}?|Let {name} speak.|Speak as {name}.|Give me a line of {name}'s.|Be {name} for a moment.|"
    "Answer me as {name} would.|I would hear {name}.|Say something, {name}.|A word from {name}, pray.|"
    "Tell me what {name} says.|How would {name} say it?"
)
IN_JSON = "{request} Answer in JSON."


def requests(draw: random.Random) -> list[tuple[str, str]]:
    """Every request with the name in it, in random order."""
    pairs = [(name, ask.format(name=name)) for name, ask in itertools.product(NAMES.split("|"), ASK.split("|"))]
    draw.shuffle(pairs)
    return pairs


def speeches(folder: Path) -> list[str]:
    """The first lines of the speeches in `lora/instruct`, each once."""
    found = []
    for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
        for message in json.loads(line)["messages"]:
            first = message["content"].splitlines()[0]
            if message["role"] == "assistant" and 20 <= len(first) <= 50 and re.fullmatch(r"[A-Za-z ',;]+[.!?,;]", first):
                found.append(first.rstrip(",;"))
    return list(dict.fromkeys(found))


def main() -> None:
    here = Path(__file__).parent
    draw = random.Random(SEED)
    said = speeches(here.parent / "instruct")
    left = requests(draw)
    for split, size in SIZES.items():
        rows = [{"prompt": IN_JSON.format(request=request), "speaker": name} for name, request in left[:size]]
        left = left[size:]
        write(here / f"{split}.jsonl", rows)
    draw.shuffle(said)
    pairs = requests(draw)[:ANSWERS]
    (here / "answers").mkdir(exist_ok=True)
    rows = [
        {
            "prompt": IN_JSON.format(request=request),
            "completion": json.dumps({"speaker": name, "line": line}),
        }
        for (name, request), line in zip(pairs, said, strict=False)
    ]
    write(here / "answers" / "train.jsonl", rows)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
