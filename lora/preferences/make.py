"""Writes the preference pairs beside it: `python lora/preferences/make.py`.

A customer's message, a considerate reply (chosen) and a curt one (rejected). The considerate reply names the thing,
says sorry or thanks, and says what happens next; the curt one blames the customer or sends them away. Both are of
similar length, so that length is hardly a clue. The test set has things and wordings that occur nowhere else.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent
NUMBERS = {"train": 320, "valid": 40, "test": 40}

# fmt: off
THINGS = {
    "train": ("lamp", "kettle", "chair", "desk", "coat", "scarf", "watch", "radio", "mirror", "clock", "carpet", "tent",
              "bicycle", "helmet", "guitar", "printer", "camera", "blanket", "teapot", "suitcase", "umbrella",
              "bookshelf", "heater", "toaster"),
    "valid": ("drill", "vase", "rucksack"),
    "test": ("ladder", "piano", "kite", "saucepan"),
}
# What happened: messages of the customer, and what a considerate reply says next. The last message is for the test.
CASES = {
    "late": (
        ("The {0} I ordered has not come yet.", "I am still waiting for my {0}.",
         "Where is my {0}? It should be here.", "A week has passed and there is no sign of the {0}."),
        ("I will ask the driver today and write to you by this evening",
         "I have found it, and it will be with you tomorrow"),
    ),
    "broken": (
        ("The {0} arrived broken.", "My {0} came with a crack in it.", "I opened the box and the {0} was in pieces.",
         "There is a dent in the {0} you sent."),
        ("A new one leaves us today, and you need not send the old one back",
         "We will send another or give the money back, as you like"),
    ),
    "wrong": (
        ("You sent me a {0}, which I did not order.", "I got a {0} in the wrong color.",
         "The {0} is too small for me.", "This {0} is not the one in the picture."),
        ("We will fetch it and bring you the right one",
         "Please keep it until our driver brings the right one on Friday"),
    ),
    "question": (
        ("Can I return the {0}?", "How do I clean the {0}?", "Does the {0} come with a guarantee?",
         "Is there a smaller {0} as well?"),
        ("I have put the answer into a letter to you, with a picture", "The page that I am sending you says how"),
    ),
    "bill": (
        ("I was charged twice for the {0}.", "The bill for the {0} is wrong.",
         "I paid for the {0} but you ask me again.", "Why is the {0} dearer now than when I ordered it?"),
        ("You will have the money back within two days", "I have corrected the bill, and you owe us nothing"),
    ),
}
# fmt: on
OPENINGS = (
    "I am sorry about the {0}.",
    "Thank you for telling us about the {0}, and I am sorry.",
    "I am sorry that the {0} gave you trouble.",
)
FOR_QUESTIONS = ("Thank you for asking about the {0}.", "It is good that you ask about the {0}.")
CLOSINGS = ("Please tell me if there is anything else.", "I will see to it myself.", "Thank you for your patience.")
CURT = (
    "That is not our fault. Read the page about the {0} before you write to us again.",
    "You should have been more careful with the {0}. We can do nothing for you.",
    "Everyone else is content with the {0}. Wait, and do not ask us again.",
    "We have no time for this. Look for the {0} on the page and help yourself.",
    "It is your own mistake. Nobody told you to order the {0} from us.",
)
CURT_ENDS = ("There is nothing more to say.", "Other customers are waiting for me.", "I have better things to do.")


def pair(split: str, draw: random.Random) -> dict[str, str]:
    """A pair of a split, drawn at random."""
    thing, case = draw.choice(THINGS[split]), draw.choice(list(CASES))
    messages, steps = CASES[case]
    message = messages[-1] if split == "test" else draw.choice(messages[:-1])
    opening = draw.choice(FOR_QUESTIONS if case == "question" else OPENINGS)
    reply = f"{opening} {draw.choice(steps)}. {draw.choice(CLOSINGS)}"
    return {
        "prompt": f"Customer: {message}\nReply:".format(thing),
        "chosen": f" {reply}".format(thing),
        "rejected": f" {draw.choice(CURT)} {draw.choice(CURT_ENDS)}".format(thing),
    }


def main() -> None:
    draw = random.Random(0)
    seen: set[str] = set()
    for split, number in NUMBERS.items():
        lines: list[str] = []
        while len(lines) < number:
            line = json.dumps(pair(split, draw))
            if line not in seen:
                seen.add(line)
                lines.append(line + "\n")
        (FOLDER / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
