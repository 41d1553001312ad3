"""Writes `train.jsonl` and `valid.jsonl` beside this script: short chats with Shakespeare's characters.

    python lora/instruct/make.py my_plays.jsonl

The answers are speeches from the plays (public domain) and sentences made of the words below. `my_plays.jsonl` has a
scene on each line, as `text`: a speech is its speaker's name in capitals and lines of which all but the first are
indented, and an empty line ends it. The files are always the same for the same plays. A speech is in only one of them.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

SIZES = {"train": 720, "valid": 80}
SEED = 11

SPEECH = re.compile(r"^([A-Z][A-Z']+(?: [A-Z][A-Z']+)*) +([^\n\[\]]+(?:\n [^\n\[\]]+)*)\n(?:\n|\Z)", re.MULTILINE)
# The speakers to ask, as a user writes their names, and what to ask them about.
NAMES = (
    "Hamlet|Ophelia|Romeo|Juliet|Othello|Iago|Desdemona|Macbeth|Banquo|Portia|Shylock|Brutus|Cassius|Rosalind|Orlando|"
    "Benedick|Beatrice|Falstaff|Prince Henry|Hotspur|Kent|Cordelia|Edgar|Gloucester|Cleopatra|Titus Andronicus|"
    "Petruchio|Troilus|Cressida|Imogen|Timon|Coriolanus|Queen Margaret|King Lear|Lady Macbeth|Mercutio|Horatio|Emilia"
)
TOPICS = (
    "love|honour|death|war|gold|night|friendship|grief|fortune|music|sleep|time|virtue|jealousy|heaven|the sea|wine|"
    "marriage|a crown|revenge|beauty|truth|fear|hope|pity|patience|blood|the king|a sword|the moon"
)
# Requests for speeches.
ASK = {
    "speaker": "Speak as {name}.|What says {name}?|Give me a line of {name}'s.|Be {name} for a moment.|"
    "Let {name} speak.|Answer me as {name} would.|I would hear {name}.|Say something, {name}.",
    "topic": "Speak of {topic}.|Tell me of {topic}.|What say you of {topic}?|Say something about {topic}.|"
    "A word on {topic}, pray.|What do you know of {topic}?",
    "both": "{name}, speak of {topic}.|What says {name} of {topic}?|Let {name} speak of {topic}.",
}
# Other requests, and their answers, in which braces stand for one of the words below.
REQUESTS = {
    "greeting": "Good morrow!|Hello.|Good day to you.|Hail, friend!|Well met.|Good evening.|Hi there.|"
    "Greetings, my lord.",
    "parting": "Farewell.|Goodbye.|I must go now.|Good night.|Thanks, and adieu.|That is all. Bye.",
    "thanks": "Thank you.|I thank you.|Many thanks, friend.|That was well said.|Well spoken!",
    "who": "Who are you?|What is your name?|Who is there?|What are you?|Whence come you?",
    "insult": "Insult me.|Call me a name.|Mock me.|Give me an insult.|What do you think of my enemy?|"
    "Abuse my neighbour.",
    "praise": "Praise me.|Flatter me.|Say something kind.|Praise my lady.|Pay me a compliment.|"
    "Speak well of my friend.",
    "oath": "Swear to me.|Will you keep your word?|Promise me your faith.|Can I trust you?|Will you help me?",
    "other": "What is the capital of France?|What is two and two?|How do I bake bread?|Write a letter for me.|"
    "Who is the queen of England?|What is a computer?|Explain the weather.|How far is it to Rome?|Can you sing?",
    "how": "How are you?|How do you fare?|How does your lordship?|Are you well?|What news?",
}
ANSWERS = {
    "greeting": "Good morrow, {title}.|Well met, {title}. What is your will?|God save you, {title}!|"
    "Welcome, {title}. What news?|Hail, {title}! How do you fare?|Good day, {title}; I am glad to see you.",
    "parting": "Farewell, {title}.|Adieu, {title}; remember me.|Good night, {title}. Sleep well.|"
    "God be with you, {title}.|Fare thee well, {title}, till we meet again.|Go, and heaven keep thee, {title}.",
    "thanks": "I am your servant, {title}.|You are welcome, {title}.|Nay, {title}, it is nothing.|"
    "Your thanks are my reward, {title}.|I humbly thank you, {title}.",
    "who": "A poor player, {title}, and your servant.|I am a voice from the old plays, {title}.|"
    "Nay, answer me: who are you, {title}?|My name is Will, {title}, and words are all I have.|"
    "One that loves you well, {title}.|I am but a shadow of the stage, {title}.",
    "insult": "Thou art a {rough}, {rough} {bad}!|Away, thou {rough} {bad}!|Peace, you {rough} {bad}; you are a {bad}.|"
    "A {rough} {bad}, and no better than a {bad}!|Out of my sight, thou {rough}, {rough} {bad}!",
    "praise": "Thou art a {sweet} {good}, and the {good} of all the world.|O {sweet}, {sweet} {good}!|"
    "There is no {good} so {sweet} in all the court.|A {sweet} {good}, as {sweet} as the day.|"
    "My {sweet} {good}, I never saw thy like.",
    "oath": "By my {thing}, I will.|I swear it by my {thing}, {title}.|Upon my {thing}, {title}, I am true.|"
    "Ay, {title}, while I have breath.|By this {thing}, I will not fail thee.|Doubt it not, {title}; here is my hand.",
    "other": "I know not, {title}.|Ask a wiser head than mine, {title}.|That is beyond my wit, {title}.|"
    "In faith, {title}, I cannot tell.|Nay, {title}, I am a player, and no scholar.|Would I knew it, {title}.",
    "how": "I am {mood}, {title}. How do you?|Marry, {mood}, I thank you, {title}.|"
    "No news, {title}, but that I am {mood}.|I thank you, {title}: {mood}, {mood}.|As you see me, {title}: {mood}.",
}
WORDS = {
    "title": "my lord|good sir|gentle friend|sweet friend|good master|noble friend|my good lord|dear sir",
    "rough": "saucy|idle|wretched|foul|drunken|rotten|lean|false|shameless|beggarly|dull|crooked|peevish|bloody|"
    "cowardly",
    "bad": "knave|villain|rogue|fool|dog|slave|coward|ass|traitor|wretch|thief|toad|rascal|jester|beggar",
    "sweet": "gentle|fair|noble|sweet|gracious|worthy|precious|constant|valiant|virtuous|honest|bright|heavenly",
    "good": "rose|jewel|friend|heart|star|spirit|angel|lion|prince|soul|sun|lord",
    "thing": "sword|honour|hand|beard|crown|life|soul|father's grave|mother's tears|good name|faith",
    "mood": "merry|weary|sick at heart|well|sad|in good health|melancholy|content|cold, and sick at heart",
}
SLOT = re.compile(r"\{(\w+)\}")

Chat = list[dict[str, str]]


def speeches(texts: list[str]) -> list[tuple[str, str]]:
    """(speaker in capitals, words) of every short speech that ends a sentence, each once, in the order of the plays."""
    found = {}
    for text in texts:
        for name, words in SPEECH.findall(text):
            lines = "\n".join(" ".join(line.split()) for line in words.splitlines())
            if 20 <= len(lines) <= 180 and lines.count("\n") < 4 and lines[-1] in ".!?" and lines[0].isupper():
                found.setdefault(lines, name)
    return [(name, words) for words, name in found.items()]


def chats(said: list[tuple[str, str]], draw: random.Random) -> Iterator[Chat]:
    """Chats without end: half of the answers are speeches, each said once, and a quarter of the chats go on."""
    left = list(said)
    draw.shuffle(left)
    while True:
        chat = turn(left, draw)
        while draw.random() < 0.25 and len(chat) < 6:
            chat += turn(left, draw)
        yield chat


def turn(left: list[tuple[str, str]], draw: random.Random) -> Chat:
    """A request and its answer; a speech that is said is taken out of `left`."""
    kind = draw.choice((*["speaker", "topic"] * 5, "both", *REQUESTS))
    if kind in REQUESTS:
        return exchange(one(REQUESTS[kind], draw), fill(one(ANSWERS[kind], draw), draw))
    name, topic = one(NAMES, draw), one(TOPICS, draw)
    word = re.compile(rf"\b{topic.split()[-1]}\b")

    def fits(speaker: str, words: str) -> bool:
        return (kind == "topic" or speaker == name.upper()) and (kind == "speaker" or bool(word.search(words)))

    words = take(left, fits)
    if words is None:
        return turn(left, draw)
    return exchange(one(ASK[kind], draw).format(name=name, topic=topic), words)


def one(choices: str, draw: random.Random) -> str:
    return draw.choice(choices.split("|"))


def take(left: list[tuple[str, str]], fits: Callable[[str, str], bool]) -> str | None:
    """The first speech that fits, which is taken out; None if there is none."""
    index = next((index for index, (speaker, words) in enumerate(left) if fits(speaker, words)), None)
    return None if index is None else left.pop(index)[1]


def fill(text: str, draw: random.Random) -> str:
    """The text with a word in each slot, no word twice, and `an` where it belongs."""
    used: set[str] = set()

    def word(slot: re.Match[str]) -> str:
        chosen = draw.choice([word for word in WORDS[slot[1]].split("|") if word not in used])
        used.add(chosen)
        return chosen

    text = re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", SLOT.sub(word, text))
    return text[0].upper() + text[1:]


def exchange(request: str, answer: str) -> Chat:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def main() -> None:
    """Write the files; the plays are the argument."""
    texts = [json.loads(line)["text"] for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    source = chats(speeches(texts), random.Random(SEED))
    seen: set[str] = set()
    for split, size in SIZES.items():
        lines: list[str] = []
        while len(lines) < size:
            line = json.dumps({"messages": next(source)}, ensure_ascii=False)
            if line not in seen:
                seen.add(line)
                lines.append(line)
        Path(__file__).with_name(f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
