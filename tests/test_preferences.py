"""Reading preferences and turning them into tokens and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_openelm.errors import RequestError
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.data.answers import Preferences, tokenize_preferences
from mlx_openelm.training.data.kinds import Record
from mlx_openelm.training.data.pairs import PreferenceBatches, PreferenceMaker
from mlx_openelm.training.data.preferences import LABELED, PAIRS, read_preferences
from mlx_openelm.training.data.read import read_splits

import pytest

ASSETS = Path(__file__).parent.parent / "mlx_openelm" / "assets" / "tiny"
USER, OTHER = {"role": "user", "content": "Who is there?"}, {"role": "user", "content": "Who comes?"}
GOOD, BAD = {"role": "assistant", "content": "A friend."}, {"role": "assistant", "content": "Nobody at all."}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(ASSETS)


def records(*values: dict[str, Any]) -> list[Record]:
    return [Record(value, f"train.jsonl, line {number}") for number, value in enumerate(values, 1)]


def read_one(values: dict[str, Any], labeled: bool = False) -> Any:
    return read_preferences(records(values), labeled=labeled)[1][0]


@pytest.mark.parametrize(
    ("values", "prompt", "completions"),
    [
        ({"prompt": "A", "chosen": " b", "rejected": " c"}, "A", (" b", " c")),
        ({"chosen": "To be or not", "rejected": "To be a king"}, "To be", (" or not", " a king")),
        ({"chosen": "ab", "rejected": "cd"}, "", ("ab", "cd")),
        ({"chosen": " ab", "rejected": " cd"}, "", (" ab", " cd")),
        # As in TRL, one that begins with the other leaves the other's last character.
        ({"chosen": "ab", "rejected": "abc"}, "a", ("b", "bc")),
        ({"prompt": None, "chosen": "xb", "rejected": "xc"}, "x", ("b", "c")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], ([GOOD], [BAD])),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], ([GOOD], [BAD])),
        ({"prompt": "Who is there?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], ([GOOD], [BAD])),
        ({"prompt": "Who is there?", "chosen": [GOOD], "rejected": [BAD]}, [USER], ([GOOD], [BAD])),
        ({"prompt": [USER], "chosen": "A friend.", "rejected": "Nobody at all."}, [USER], ([GOOD], [BAD])),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, [USER], ([GOOD], [GOOD])),
        ({"prompt": "Who is there?", "chosen": GOOD, "rejected": BAD}, [USER], ([GOOD], [BAD])),
    ],
)  # fmt: skip
def test_forms_of_pairs(values, prompt, completions):
    found = read_one(values)
    assert (found.prompt, found.completions, found.label) == (prompt, completions, None)
    if "prompt" not in values and values["chosen"] not in (values["rejected"], "ab"):  # TRL misplaces a first space
        trl = pytest.importorskip("trl.data_utils", exc_type=ImportError)
        if values["chosen"] != " ab":
            assert trl.extract_prompt(values) == dict(
                zip(("prompt", "chosen", "rejected"), (prompt, *completions), strict=True)
            )


def test_messages_beside_the_answers_are_the_prompt():
    """As in LLaMA-Factory's data sets: ShareGPT's conversations, and one message as each answer."""
    spoken = {
        "conversations": [{"from": "human", "value": "Who is there?"}],
        "chosen": {"from": "gpt", "value": "A friend."},
        "rejected": {"from": "gpt", "value": "Nobody at all."},
    }
    for values in (
        spoken,
        {"messages": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [USER], **ANSWERS},
        {"prompt": None, "conversations": [USER], "messages": None, **ANSWERS},
        {"prompt": "", "conversations": [USER], "messages": [USER], **ANSWERS},
    ):  # fmt: skip
        found = read_one(values)
        assert (found.prompt, found.completions, found.is_cut) == ([USER], ([GOOD], [BAD]), False)
    found = read_one({**spoken, "system": "Be brief."})
    assert found.prompt == [SYSTEM, USER] and not found.system
    # Where answers have their prompt, what stands beside them is a copy.
    found = read_one({"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]})
    assert (found.prompt, found.completions) == ([USER], ([GOOD], [BAD]))


SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERS = {"chosen": "A friend.", "rejected": "Nobody at all."}


@pytest.mark.parametrize(
    ("values", "prompt", "system"),
    [
        ({"system": "", "question": "Who?"}, "Who?", ""),
        ({"system": "Be brief.", "question": "Who?"}, "Who?", "Be brief."),
        ({"system": "Be brief.", "prompt": "Who?", "question": "Where?"}, "Who?", "Be brief."),
        ({"instruction": "Translate.", "input": "Qui?"}, "Translate.\n\nQui?", ""),
        ({"instruction": "Translate.", "input": None}, "Translate.", ""),
        ({"system": "Be brief.", "input": "Who?"}, "Who?", "Be brief."),
        ({"system": "Be brief.", "prompt": [USER]}, [SYSTEM, USER], ""),
        ({"system": "Be brief.", "prompt": [SYSTEM, USER]}, [SYSTEM, USER], ""),
        ({"system": "Be brief.", "question": "Who is there?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
         [SYSTEM, USER], ""),
        ({"input": ["what is no prompt"], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], ""),
    ],
)  # fmt: skip
def test_prompts_have_other_names_and_a_system_beside_them(values, prompt, system):
    found = read_one({**ANSWERS, **values})
    assert (found.prompt, found.system, found.is_cut) == (prompt, system, False)
    assert len(found.completions) == 2 and len(found.completions[0]) in (1, len(ANSWERS["chosen"]))


def test_labeled_completions_and_pairs_for_kto():
    kind, found = read_preferences(
        records({"prompt": "A", "completion": "b", "label": True}, {"prompt": "C", "completion": "d", "label": 0}),
        labeled=True,
    )
    assert kind is LABELED
    assert [(one.prompt, one.completions, one.label) for one in found] == [("A", ("b",), True), ("C", ("d",), False)]
    # As in TRL: first all that are chosen, so that no prompt is mismatched with an answer to itself.
    kind, found = read_preferences(
        records({"prompt": "A", "chosen": "b", "rejected": "c"}, {"prompt": "D", "chosen": "e", "rejected": "f"}),
        labeled=True,
    )
    assert kind is PAIRS
    assert [(*one.completions, one.label) for one in found] == [("b", True), ("e", True), ("c", False), ("f", False)]


def test_labeled_conversations_for_kto():
    spoken = [{"from": "human", "value": "Who is there?"}, {"from": "gpt", "value": "A friend."}]
    for values in ({"messages": [USER, GOOD], "conversations": None}, {"conversations": spoken, "messages": None}):
        found = read_one({**values, "label": False}, labeled=True)
        assert (found.prompt, found.completions, found.label) == ([USER], ([GOOD],), False)
    found = read_one({"messages": [USER, GOOD], "label": 1, "system": "Be brief."}, labeled=True)
    assert (found.prompt, found.completions, found.label) == ([SYSTEM, USER], ([GOOD],), True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "A", "chosen": "b"}, "known sets of keys (chosen, rejected; prompt, completion, label; "),
        ({"prompt": "A", "chosen": "b", "rejected": None}, "line 1: 'rejected' is null; give it a value"),
        ({"prompt": "A", "completion": "b", "label": None}, "line 1: 'label' is null; give it a value"),
        ({"messages": [USER, GOOD], "label": 2}, "'label' must be true or false, got 2"),
        ({"messages": [USER], "label": True}, "The last message must be the assistant's"),
        ({"messages": [], "label": True}, "The last message must be the assistant's"),
        ({"messages": "A", "label": True}, "A conversation must be a list of messages"),
        ({"conversations": [GOOD], "label": True}, "an answer needs the messages before it"),
        ({"messages": [USER, GOOD], "label": True}, "labeled messages (messages, label), which loss_type kto"),
        ({"messages": [USER], "conversations": [OTHER], **ANSWERS}, "and 'messages' have different messages"),
        ({"prompt": "A", "chosen": {"from": "human", "value": "b"}, "rejected": GOOD}, "'chosen' must be the assi"),
        ({"messages": [USER, GOOD]}, "it has 'messages'"),
        ({"chosen": 1, "rejected": "b"}, "'chosen' is a number, not text or messages"),
        ({"prompt": {}, "chosen": "a", "rejected": "b"}, "'prompt' is an object, not text or messages"),
        ({"chosen": "a", "rejected": [USER, BAD]}, "is text and the other holds messages"),
        ({"chosen": [USER, GOOD], "rejected": [OTHER, BAD]}, "begin with different messages, so they have no prompt"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "the last message of 'rejected' must be the assist"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "the last message of 'chosen' must be the assistant's"),
        ({"prompt": "A", "completion": "b", "label": "yes"}, "'label' must be true or false, got 'yes'"),
        ({"prompt": "A", "completion": "b", "label": True}, "which loss_type kto learns from; other losses"),
        ({"chosen": "a", "rejected": "b", "images": ["x"]}, "'images' is not offered"),
        ({**ANSWERS, "prompt": "A", "history": [["b", "c"]]}, "'history' is not offered"),
        ({**ANSWERS, "question": "A", "instruction": "B"}, "'question' stands beside an 'instruction' or 'input'"),
        ({**ANSWERS, "question": ["A"]}, "'question' is a list, not text"),
        ({**ANSWERS, "system": "A"}, "'system' stands beside texts without a 'prompt'"),
        ({**ANSWERS, "conversations": [USER, GOOD]}, "'conversations' ends with an answer"),
        ({**ANSWERS, "messages": "A"}, "A conversation must be a list of messages"),
        ({"prompt": "A", "chosen": {"from": "gpt"}, "rejected": "b"}, "is text and the other holds messages"),
        ({**ANSWERS, "prompt": "A", "system": 1}, "'system' is a number, not text"),
        ({**ANSWERS, "prompt": [SYSTEM, USER], "system": "Talk."}, "have different texts"),
        ({"chosen": [{"from": "alien", "value": "a"}], "rejected": [USER]}, "Message 0 is from 'alien'"),
    ],
)  # fmt: skip
def test_bad_records_are_refused(values, expected):
    with pytest.raises(RequestError) as error:
        read_preferences(records(values), labeled=False)
    assert str(error.value).startswith("train.jsonl, line 1: ") and expected in str(error.value)


def test_files_of_several_kinds_and_parquet_tables(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"text": "c"}\n')
    with pytest.raises(RequestError, match="line 2: has no 'chosen'"):
        read_splits(tmp_path, kinds=(PAIRS, LABELED))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "train.jsonl").unlink()
    rows = [{"chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 1.5}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    found = read_splits(tmp_path, valid_fraction=0, kinds=(PAIRS, LABELED)).train
    assert [record.values for record in found] == [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}] * 3


def tokenize(tokenizer: Tokenizer, *values: dict[str, Any], length: int = 64, **options: Any) -> Preferences:
    return tokenize_preferences(records(*values), tokenizer, max_seq_length=length, **options)


PAIR = {"prompt": "The king is", "chosen": " dead, long live the king!", "rejected": " well."}


def test_texts_end_with_eos_and_share_the_prompt(tokenizer):
    (item,) = tokenize(tokenizer, PAIR).examples
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt = tokenizer.encode(PAIR["prompt"])
    assert prompt[0] == bos
    for answer, key in zip(item.answers, ("chosen", "rejected"), strict=True):
        assert list(answer.tokens) == [*tokenizer.encode(PAIR["prompt"] + PAIR[key]), eos]
        assert list(answer.tokens[: answer.start]) == prompt
        assert answer.learned == ((answer.start, len(answer.tokens)),)
    assert item.num_positions == max(len(answer.tokens) - 1 for answer in item.answers)


def test_a_token_over_the_boundary_belongs_to_the_completions(tokenizer):
    """As in TRL, both completions begin where the first of them departs from the prompt's tokens."""
    values = {"prompt": "The ki", "chosen": "ng is dead.", "rejected": "d!"}
    (item,) = tokenize(tokenizer, values).examples
    alone = tokenizer.encode("The ki")
    whole = [tokenizer.encode("The ki" + values[key]) for key in ("chosen", "rejected")]
    common = min(next(i for i, pair in enumerate(zip(alone, ids, strict=False)) if pair[0] != pair[1]) for ids in whole)
    assert common < len(alone)
    assert [answer.start for answer in item.answers] == [common, common]


def test_chats_go_through_the_template(tokenizer):
    found = tokenize(tokenizer, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})
    prompt = tokenizer.apply_chat_template([USER], "corenet")
    for answer, last in zip(found.examples[0].answers, (GOOD, BAD), strict=True):
        assert list(answer.tokens[: answer.start]) == prompt
        assert answer.tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(list(answer.tokens[answer.start :])).strip() == last["content"]
    assert found.report.chat_template == "corenet"
    # A prompt of its own goes through a template that was asked for, and texts without one do not.
    asked = tokenize(tokenizer, {"prompt": "Who is there?", "chosen": "A friend.", "rejected": "Nobody at all."},
                     chat_template="corenet")  # fmt: skip
    assert asked.examples[0].answers[0].tokens == found.examples[0].answers[0].tokens
    with pytest.raises(RequestError, match="^chat_template needs prompts"):
        tokenize(tokenizer, {"chosen": "To be", "rejected": "To go"}, chat_template="corenet")


def test_a_system_is_a_turn_of_the_template_and_needs_one(tokenizer):
    pair = {**ANSWERS, "system": "Be brief.", "question": "Who is there?"}
    whole = {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}
    (item,) = tokenize(tokenizer, pair, length=200, chat_template="corenet").examples
    (other,) = tokenize(tokenizer, whole, length=200, chat_template="corenet").examples
    assert item == other
    for values in (pair, {**PAIR, "tools": [{"name": "look"}]}):
        with pytest.raises(RequestError, match="line 1: '(system|tools)' needs a chat template"):
            tokenize(tokenizer, values)


@pytest.mark.parametrize("asked", [None, "corenet"])
def test_pairs_with_and_without_a_prompt_are_not_mixed(tokenizer, asked):
    """One pair without a prompt would turn the chat template off for all."""
    with pytest.raises(RequestError, match="line 2: has texts without a prompt, and .* line 1 has a prompt"):
        tokenize(tokenizer, PAIR, {"chosen": "To be", "rejected": "To go"}, chat_template=asked)


def test_long_answers_lose_their_end_and_long_prompts_their_beginning(tokenizer):
    prompt, chosen = (tokenizer.encode(text) for text in (PAIR["prompt"], PAIR["prompt"] + PAIR["chosen"]))
    found = tokenize(tokenizer, PAIR, length=len(prompt) + 3)
    assert list(found.examples[0].answers[0].tokens) == chosen[: len(prompt) + 3]
    assert (found.report.num_truncated, found.report.num_dropped, found.report.num_prompts_cut) == (1, 0, 0)
    found = tokenize(tokenizer, PAIR, max_prompt_length=2)
    for answer, whole in zip(found.examples[0].answers, (chosen, None), strict=True):
        assert answer.start == 2 and list(answer.tokens[:2]) == [prompt[0], prompt[-1]]
        assert whole is None or list(answer.tokens[2:-1]) == whole[len(prompt) :]
    assert (found.report.num_prompts_cut, found.report.num_truncated) == (1, 0)
    short = {"prompt": "A", "chosen": " b", "rejected": " c"}
    found = tokenize(tokenizer, PAIR, short, length=len(prompt))
    assert (found.report.num_dropped, found.report.num_examples) == (1, 1)
    lines = list(found.report.lines("train", len(prompt)))
    assert any("1 preference was left out: the prompt alone fills" in line for line in lines)
    assert lines[0].startswith("train: 1 preference pair, ")
    with pytest.raises(RequestError, match="Nothing is left to learn: the prompts alone fill"):
        tokenize(tokenizer, PAIR, length=len(prompt))
    with pytest.raises(RequestError, match=r"line 1: takes \d+ tokens, and max_seq_length is 5"):
        tokenize(tokenizer, PAIR, length=5, refuse_long=True)


def test_labeled_answers_have_the_completion_before_them_as_the_mismatched_one(tokenizer):
    texts = [(" one", True), (" two!", False), (" three things", True)]
    values = [{"prompt": f"P{n}", "completion": text, "label": label} for n, (text, label) in enumerate(texts)]
    items = tokenize(tokenizer, *values, labeled=True).examples
    for number, item in enumerate(items):
        own, mismatched = item.answers
        before = items[number - 1].answers[0]
        assert mismatched.tokens[: own.start] == own.tokens[: own.start]
        assert mismatched.tokens[own.start :] == before.tokens[before.start :]
    assert [item.label for item in items] == [True, False, True]


def test_the_fingerprint_changes_with_all_that_a_loss_depends_on(tokenizer):
    other = {**PAIR, "rejected": " well!"}
    labeled = {"prompt": "A", "completion": "b", "label": True}, {"prompt": "A", "completion": "b", "label": False}
    found = [
        tokenize(tokenizer, PAIR),
        tokenize(tokenizer, other),
        tokenize(tokenizer, {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}),
        tokenize(tokenizer, PAIR, learns_prompts=True),
        tokenize(tokenizer, PAIR, max_prompt_length=3),
        *(tokenize(tokenizer, value, labeled=True) for value in labeled),
    ]
    prints = [preferences.fingerprint() for preferences in found]
    assert len(set(prints)) == len(prints)
    assert tokenize(tokenizer, PAIR).fingerprint() == prints[0]


@pytest.mark.parametrize("packing", [False, True])
def test_batches_hold_every_answer_with_its_place(tokenizer, packing):
    texts = ["a", "bb cc", "the king", "who goes there, I say?", "x"]
    values = [
        {"prompt": f"Say {text}:", "chosen": f" {text}", "rejected": " no " * n} for n, text in enumerate(texts, 1)
    ]
    found = tokenize(tokenizer, *values, packing=packing)
    reference = [(float(-n), float(-10 * n)) for n in range(len(values))]
    make = PreferenceMaker(found.examples, reference, 128 if packing else 64, packing)
    batches = PreferenceBatches(found.examples, batch_size=2, max_seq_length=64, packing=packing, make=make)
    seen: list[int] = []
    for index in range(batches.steps_per_epoch):
        step = batches.step(index)
        (batch,) = step.batches
        assert batch.num_targets == step.num_targets == len(batch.examples)
        assert step.num_tokens == batch.tokens.num_tokens
        owners, completed = batch.owners.tolist(), batch.completed.tolist()
        for number, item in enumerate(found.examples[i] for i in batch.examples):
            for side, answer in enumerate(item.answers):
                where = [
                    (r, c) for r, row in enumerate(owners) for c, own in enumerate(row) if own == 2 * number + side
                ]
                assert [batch.tokens.inputs[r, c].item() for r, c in where] == list(answer.tokens[:-1])
                counted = [batch.tokens.targets[r, c].item() for r, c in where if completed[r][c]]
                assert counted == list(answer.tokens[answer.start :])
                assert batch.lengths[2 * number + side].item() == len(counted)
                assert batch.reference[2 * number + side].item() == reference[batch.examples[number]][side]
        seen += batch.examples
        rows, length = batch.tokens.inputs.shape
        assert rows <= batches.largest_shape()[0] and length <= batches.largest_shape()[1]
    assert sorted(seen) == list(range(len(values)))


def test_every_process_has_the_mismatched_answers_of_the_whole_batch(tokenizer):
    values = [{"prompt": f"P{n}", "completion": f" {n}", "label": n % 2 == 0} for n in range(4)]
    items = tokenize(tokenizer, *values, labeled=True).examples
    make = PreferenceMaker(items, [(0.0, 0.0)] * 4, 64)
    parts = [make([(0,), (1,), (2,), (3,)], rank, 2) for rank in (0, 1)]
    assert [part.examples for part in parts] == [(0, 2), (1, 3)]
    assert [part.labels.tolist() for part in parts] == [[1, 1], [0, 0]]
    assert all(part.others.tokens.examples == parts[0].others.tokens.examples for part in parts)
    assert parts[0].others.lengths.size == 4
