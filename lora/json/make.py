"""Writes the files beside this script: requests to be answered in JSON, and a few answers to begin with.

    python lora/json/make.py

The files are always the same.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

SEED = 7
# The numbers of prompts, and of answers to begin with.
SIZES = {"train": 480, "valid": 32, "test": 32}
ANSWERS = 160

NAMES = (
    "Hamlet|Ophelia|Romeo|Juliet|Othello|Iago|Macbeth|Banquo|Portia|Shylock|Brutus|Cassius|Rosalind|Orlando|Falstaff|"
    "Hotspur|Kent|Cordelia|Edgar|Cleopatra|Petruchio|Troilus|Cressida|Imogen|Timon|Mercutio|Horatio|Emilia"
)
TOPICS = (
    "love|death|war|gold|night|grief|fortune|music|sleep|time|virtue|heaven|wine|marriage|revenge|beauty|truth|fear|"
    "hope|pity|patience|blood"
)
ASK = "{name}, speak of {topic}.|What says {name} of {topic}?|Let {name} speak of {topic}."
PROMPT = "{request} Who, and of what? Answer in JSON."


def requests() -> list[dict[str, str]]:
    """Every request, with the values of its answer."""
    return [
        {"prompt": PROMPT.format(request=ask.format(name=name, topic=topic)), "speaker": name, "topic": topic}
        for name, topic, ask in itertools.product(NAMES.split("|"), TOPICS.split("|"), ASK.split("|"))
    ]


def main() -> None:
    here = Path(__file__).parent
    left = requests()
    random.Random(SEED).shuffle(left)
    for split, size in SIZES.items():
        write(here / f"{split}.jsonl", left[:size])
        left = left[size:]
    answers = [
        {"prompt": row["prompt"], "completion": json.dumps({key: row[key] for key in ("speaker", "topic")})}
        for row in left[:ANSWERS]
    ]
    (here / "answers").mkdir(exist_ok=True)
    write(here / "answers" / "train.jsonl", answers)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
