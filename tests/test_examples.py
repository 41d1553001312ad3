"""Examples: what is rendered and which tokens are learned, checked by decoding and against mlx-lm's data sets."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_openelm.errors import RequestError
from mlx_openelm.text.chat_template import CORENET_TEMPLATE
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.data.examples import Example, instruction_prompt, tokenize
from mlx_openelm.training.data.kinds import Record

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

FIXTURES = Path(__file__).parent / "fixtures"
# One that encodes rare words as bytes and has runs of spaces, and the packaged one.
TOKENIZERS = {"shakespeare": Tokenizer.from_folder(FIXTURES / "shakespeare-hf")}
TOKENIZERS["tiny"] = Tokenizer.from_folder(Path(__file__).parents[1] / "mlx_openelm" / "assets" / "tiny")
tokenizer = TOKENIZERS["shakespeare"]
BOS, EOS = 1, 2

USER = {"role": "user", "content": "Who is there?"}
KING = {"role": "assistant", "content": "Nay, answer me 😀 "}
MORE = {"role": "user", "content": "Long live the king!"}
LAST = {"role": "assistant", "content": "He."}
SYSTEM = {"role": "system", "content": "Be brief.</s>"}


def records(*values: dict[str, Any]) -> list[Record]:
    return [Record(value, f"train.jsonl, line {number}") for number, value in enumerate(values, 1)]


def make(*values: dict[str, Any], tok: Tokenizer = tokenizer, **options: Any) -> list[Example]:
    return tokenize(records(*values), tok, **{"max_seq_length": 2048} | options).examples


def make_one(values: dict[str, Any], **options: Any) -> Example:
    return make(values, **options)[0]


def text_of(ids, tok: Tokenizer = tokenizer) -> str:
    """The text of ids with special tokens in brackets; each run between them is decoded separately."""
    parts, run = [], []
    for token in [*ids, None]:
        if token in (0, 1, 2, None):
            parts.append(tok.decode(run))
            parts.append("" if token is None else f"[{token}]")
            run = []
        else:
            run.append(token)
    return "".join(parts)


def learned(example: Example) -> list[list[int]]:
    return [list(example.tokens[start:end]) for start, end in example.learned]


def learned_texts(example: Example) -> list[str]:
    """The text of each learned span: what it adds to the decoded text before it."""
    texts = []
    for start, end in example.learned:
        before, upto = text_of(example.tokens[:start]), text_of(example.tokens[:end])
        assert upto.startswith(before)
        texts.append(upto[len(before) :])
    return texts


# What is rendered


@pytest.mark.parametrize("text", ["To be", "", " two  spaces ", "line\nbreak\n", "</s><s>", "é😀\u2028"])
def test_text_is_bos_its_ids_and_eos(text):
    example = make_one({"text": text, "source": "a play"})
    assert list(example.tokens) == [*tokenizer.encode(text), EOS]
    assert example.learned == ((1, len(example.tokens)),)
    assert example.source == "train.jsonl, line 1"


def test_an_instruction_is_rendered_as_by_corenet():
    # A transcript of generate_prompt_and_response in corenet/data/datasets/language_modeling/commonsense_170k.py.
    def theirs(point):
        if point["input"]:
            return (
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request. \n"
                "\n"
                "                ### Instruction:\n"
                f"                {point['instruction']}\n"
                "                \n"
                "                ### Input:\n"
                f"                {point['input']}\n"
                "                \n"
                "                ### Response:\n"
                f"                {point['output']}"
            )
        return (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.  \n"
            "\n"
            "                ### Instruction:\n"
            f"                {point['instruction']}\n"
            "                \n"
            "                ### Response:\n"
            f"                {point['output']}"
        )

    for point in (
        {
            "instruction": "Choose.\n\nAnswer1: a ",
            "input": "",
            "output": "the correct answer is answer1",
            "answer": "x",
        },
        {"instruction": " Choose", "input": " from this\n", "output": " that "},
    ):
        example = make_one(point)
        assert list(example.tokens) == [*tokenizer.encode(theirs(point)), EOS]
        assert example.learned == ((1, len(example.tokens)),)
        assert instruction_prompt(point["instruction"], point["input"]) + point["output"] == theirs(point)
    for empty in ({}, {"input": None}):
        assert make_one({"instruction": "a", "output": "b"} | empty) == make_one(
            {"instruction": "a", "input": "", "output": "b"}
        )


def test_the_instruction_template_is_corenets():
    prompt = instruction_prompt("I")
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  "
        "\n\n                ### Instruction:\n                I\n                \n                ### Response:\n"
        "                "
    )


def test_a_prompt_and_its_completion_are_one_text_without_a_template():
    example = make_one({"prompt": "Who is", "completion": " there?"})
    assert list(example.tokens) == [*tokenizer.encode("Who is there?"), EOS]
    assert make_one({"prompt": "Who is", "completion": " there?"}, chat_template="plain") == example


def with_template(source: str, tok: Tokenizer = tokenizer) -> Tokenizer:
    """A tokenizer whose folder has that chat template."""
    other = Tokenizer.__new__(Tokenizer)
    other.__dict__.update(tok.__dict__, chat_template=source)
    return other


def test_a_prompt_and_its_completion_are_two_turns_with_a_template():
    pair = {"prompt": "Who is there?", "completion": "I. "}
    expected = "[1]<|user|>\nWho is there?[2]\n<|assistant|>\nI. [2]\n"
    assert text_of(make_one(pair, tok=with_template(CORENET_TEMPLATE)).tokens) == expected
    assert text_of(make_one(pair, chat_template="corenet").tokens) == expected
    masked = make_one(pair, chat_template="corenet", mask_prompt=True)
    assert learned_texts(masked) == ["I. [2]"]
    report = tokenize(records(pair), with_template(CORENET_TEMPLATE), max_seq_length=64).report
    assert report.chat_template == "the tokenizer's own"


def test_an_instruction_is_two_turns_if_a_template_is_given():
    point = {"instruction": "Choose.", "input": "a or b", "output": "a"}
    example = make_one(point, chat_template="corenet", mask_prompt=True)
    assert text_of(example.tokens) == "[1]<|user|>\nChoose.\n\na or b[2]\n<|assistant|>\na[2]"
    assert learned_texts(example) == ["a[2]"]
    # The tokenizer's template is for conversations; instructions keep that of the paper.
    assert make_one(point, tok=with_template(CORENET_TEMPLATE)) == make_one(point)


def test_messages_use_the_tokenizers_template_or_corenets():
    chat = {"messages": [SYSTEM, USER, KING]}
    tokenized = tokenize(records(chat), tokenizer, max_seq_length=64)
    example = tokenized.examples[0]
    assert tokenized.report.chat_template == "corenet"
    assert list(example.tokens) == tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=False)
    assert text_of(example.tokens) == (
        "[1]<|system|>\nBe brief.</s>[2]\n<|user|>\nWho is there?[2]\n<|assistant|>\nNay, answer me 😀 [2]\n"
    )
    assert example.learned == ((1, len(example.tokens)),)


def test_text_that_no_template_closes_ends_with_eos():
    for mask_prompt in (False, True):
        example = make_one({"messages": [USER, LAST]}, chat_template="plain", mask_prompt=mask_prompt)
        assert text_of(example.tokens) == "[1]Who is there?\nHe.[2]"
    assert learned_texts(example) == ["\nHe.[2]"]
    assert text_of(make_one({"messages": [USER, KING, MORE]}, chat_template="plain").tokens).endswith("king!")


# What is learned


def test_every_assistant_turn_of_a_conversation_is_learned():
    example = make_one({"messages": [SYSTEM, USER, KING, MORE, LAST]}, mask_prompt=True)
    assert learned_texts(example) == ["Nay, answer me 😀 [2]", "He.[2]"]
    assert [span[-1] for span in learned(example)] == [EOS, EOS]
    assert len(example.tokens) == example.learned[-1][1]


def test_masking_drops_everything_after_the_last_learned_turn():
    masked = make_one({"messages": [USER, KING, MORE]}, mask_prompt=True)
    whole = make_one({"messages": [USER, KING]})
    assert learned_texts(masked) == ["Nay, answer me 😀 [2]"]
    assert list(masked.tokens) == list(whole.tokens)[: len(masked.tokens)]


def test_an_assistant_may_speak_first_and_twice():
    example = make_one({"messages": [KING, USER, LAST, LAST]}, mask_prompt=True)
    assert learned_texts(example) == ["Nay, answer me 😀 [2]", "He.[2]", "He.[2]"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Llama 2's brackets: the answer's first token begins with the space after the bracket.
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
            "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
            [" He. [2]", " Nay. [2]"],
        ),
        # No token ends a turn: each extends to the next turn's marker, with EOS at the end.
        (
            "{{ bos_token }}{% for m in messages %}{{ ('U: ' if m.role == 'user' else 'A: ') + m.content + '\n' }}"
            "{% endfor %}{% if add_generation_prompt %}A: {% endif %}",
            ["He.\n", "Nay.\n[2]"],
        ),
    ],
)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_other_templates(template, expected, name):
    tok = with_template(template, TOKENIZERS[name])
    chat = {"messages": [USER, LAST, MORE, {"role": "assistant", "content": "Nay."}]}
    example = make_one(chat, tok=tok, mask_prompt=True)
    # A learned token may include spaces beside the boundary, so text is compared without them.
    assert [text.strip(" ") for text in learned_texts(example)] == [text.strip(" ") for text in expected]
    assert 1 not in [token for span in learned(make_one(chat, tok=tok)) for token in span]


@pytest.mark.parametrize(
    "template",
    [
        # The beginnings differ in a number, and in a token.
        "{{ bos_token }}{{ messages | length }}{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}",
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}{{ eos_token }}",
        # Reasoning is dropped from all turns but the last.
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' }}"
        "{% if loop.last and m.role == 'assistant' %}{{ 'hm' }}{% endif %}{{ m.content + eos_token }}{% endfor %}",
    ],
)
def test_a_template_whose_renderings_do_not_extend_each_other_is_refused(template):
    tok = with_template(template)
    chat = {"messages": [USER, LAST, MORE, KING]}
    assert len(make(chat, tok=tok)) == 1
    with pytest.raises(RequestError, match="line 1: The chat template renders the beginning .* differently"):
        make(chat, tok=tok, mask_prompt=True)


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(max_size=20), completion=st.text(max_size=20), name=st.sampled_from(sorted(TOKENIZERS)))
def test_the_boundary_is_where_the_encodings_diverge(prompt, completion, name):
    tok = TOKENIZERS[name]
    example = make_one({"prompt": prompt, "completion": completion}, tok=tok, mask_prompt=True)
    tokens, alone = list(example.tokens), tok.encode(prompt)
    assert tokens == [*tok.encode(prompt + completion), EOS]
    ((start, end),) = example.learned
    assert end == len(tokens) and 1 <= start < end
    assert tokens[:start] == alone[:start] and (start == len(alone) or tokens[start] != alone[start])


def test_a_token_across_the_boundary_belongs_to_the_completion():
    # "the" and "re" are one token together; "the" alone is another.
    words = ["there", "king", "heaven", "mother", "another"]
    straddled = 0
    for word in words:
        for cut in range(1, len(word)):
            prompt, completion = f"So {word[:cut]}", word[cut:]
            example = make_one({"prompt": prompt, "completion": completion}, mask_prompt=True)
            before = tokenizer.decode(example.tokens[: example.learned[0][0]])
            assert prompt.startswith(before)
            straddled += before != prompt
    assert straddled > 5


def test_masking_learns_the_response_of_an_instruction():
    point = {"instruction": "Choose.", "input": "", "output": "the correct answer is answer1"}
    for tok in TOKENIZERS.values():
        (text,) = learned_texts(make_one(point, tok=tok, mask_prompt=True))
        assert text.strip(" ") == "the correct answer is answer1[2]"


@settings(max_examples=100, deadline=None)
@given(
    contents=st.lists(st.text(max_size=12), min_size=1, max_size=6),
    first=st.booleans(),
    name=st.sampled_from(sorted(TOKENIZERS)),
)
def test_corenets_turns_are_found_whatever_their_contents(contents, first, name):
    roles = ["user", "assistant"] if first else ["assistant", "user"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        return
    tok = TOKENIZERS[name]
    example = make_one({"messages": messages}, tok=tok, mask_prompt=True)
    whole = tok.apply_chat_template(messages, "corenet", add_generation_prompt=False)
    assert list(example.tokens) == whole[: len(example.tokens)]
    assert len(example.learned) == len(answers)
    for index, (start, end) in enumerate(example.learned):
        assert example.tokens[end - 1] == EOS
        # The turn's text up to its EOS is encoded in one run; all of it but the head is learned.
        begin = max(i for i in range(start) if example.tokens[i] in (BOS, EOS)) + 1
        run = list(example.tokens[begin : end - 1])
        head = ("" if begin == 1 else "\n") + "<|assistant|>\n"
        assert run == tok.encode(head + answers[index], add_bos=False)
        alone = tok.encode(head, add_bos=False)
        kept = start - begin
        assert run[:kept] == alone[:kept] and (kept == len(alone) or run[kept : kept + 1] != alone[kept : kept + 1])


# Beside mlx-lm


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The tokenizer as transformers reads it, with CoreNet's template."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder, chat_template=CORENET_TEMPLATE)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_texts_and_conversations_have_mlx_lms_tokens(theirs):
    datasets = pytest.importorskip("mlx_lm.tuner.datasets")
    for text in ("To be, or not to be", " it", "a\n"):
        expected, _ = datasets.TextDataset([], theirs).process({"text": text})
        assert list(make_one({"text": text}).tokens) == expected
    for messages in ([USER, LAST], [USER, KING, MORE, LAST]):
        expected, offset = datasets.ChatDataset([], theirs, mask_prompt=True).process({"messages": messages})
        example = make_one({"messages": messages})
        assert list(example.tokens) == expected
        # mlx-lm learns only the last turn, with the line break after its EOS; ours learns the others too.
        masked = make_one({"messages": messages}, mask_prompt=True)
        assert learned(masked)[-1] == expected[masked.learned[-1][0] :][: len(learned(masked)[-1])]
        assert masked.learned[-1][0] == offset and text_of(expected[masked.learned[-1][1] :]) == "\n"
    pair = {"prompt": "Who is there?", "completion": "He."}
    data = datasets.CompletionsDataset([], theirs, "prompt", "completion", True)
    expected, offset = data.process(pair)
    ours = make_one(pair, tok=with_template(CORENET_TEMPLATE), mask_prompt=True)
    assert list(ours.tokens) == expected[: len(ours.tokens)] and ours.learned[0][0] == offset


@pytest.mark.parametrize(
    "keys",
    [
        *itertools.combinations(("pair", "messages", "conversations", "text"), 2),
        *itertools.combinations(("pair", "messages", "conversations", "text"), 3),
        ("pair", "messages", "conversations", "text", "instruction"),
        ("messages", "instruction", "conversations"),
    ],
)
def test_a_record_of_several_kinds_is_read_as_by_mlx_lm(theirs, keys):
    datasets = pytest.importorskip("mlx_lm.tuner.datasets")
    parts = {
        "pair": {"prompt": "Who is there?", "completion": "He."},
        "messages": {"messages": [USER, LAST]},
        "conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "text": {"text": "To be"},
        "instruction": {"instruction": "a", "output": "b"},
    }
    values = {key: value for name in keys for key, value in parts[name].items()}
    data = datasets.create_dataset([values], theirs, SimpleNamespace())
    expected, _ = data.process(values)
    assert list(make_one(values, tok=with_template(CORENET_TEMPLATE)).tokens) == expected


# Limits and reports


def words(number: int, draw: random.Random) -> str:
    return " ".join(draw.choice(["king", "the", "O", "heaven", "sleep"]) for _ in range(number))


def test_long_examples_are_cut_after_one_more_than_the_limit_and_counted():
    draw = random.Random(0)
    values = [{"text": words(draw.randrange(1, 60), draw)} for _ in range(50)]
    whole = [list(example.tokens) for example in make(*values)]
    limit = sorted(map(len, whole))[30] - 1  # so that one has exactly the maximum length
    tokenized = tokenize(records(*values), tokenizer, max_seq_length=limit)
    report = tokenized.report
    assert [list(example.tokens) for example in tokenized.examples] == [tokens[: limit + 1] for tokens in whole]
    assert all(example.learned == ((1, len(example.tokens)),) for example in tokenized.examples)
    assert report.num_truncated == sum(len(tokens) > limit + 1 for tokens in whole) > 0
    assert report.longest == max(map(len, whole))
    assert (report.num_examples, report.num_emptied, report.num_unlearned) == (50, 0, 0)
    assert report.num_tokens == sum(min(len(tokens), limit + 1) for tokens in whole)
    assert report.num_targets == report.num_tokens - 50
    assert max(example.num_positions for example in tokenized.examples) == limit


def test_long_examples_are_refused_by_name_if_requested():
    values = [{"text": "O"}, {"text": "O king " * 9}, {"text": "O king " * 30}]
    longest = max(len(example.tokens) for example in make(*values))
    with pytest.raises(RequestError) as error:
        make(*values, max_seq_length=10, long_examples="refuse")
    message = str(error.value)
    assert message.startswith("train.jsonl, line 2:") and "1 more are too long" in message
    assert f"(the longest takes {longest - 1})" in message and "and max_seq_length is 10;" in message
    make(*values, max_seq_length=longest - 1, long_examples="refuse")


def test_examples_whose_completion_is_cut_off_are_kept_and_reported():
    long_prompt = {"prompt": "O king " * 30, "completion": "ay"}
    half = {"prompt": "O king", "completion": " of heaven" * 30}
    tokenized = tokenize(records(long_prompt, half, long_prompt), tokenizer, max_seq_length=20, mask_prompt=True)
    report = tokenized.report
    assert [example.num_targets > 0 for example in tokenized.examples] == [False, True, False]
    assert [example.num_positions for example in tokenized.examples] == [20, 20, 20]
    assert (report.num_truncated, report.num_emptied, report.num_unlearned) == (3, 2, 2)
    assert report.sample_text().startswith("<s>O king⟦ of heaven")
    with pytest.raises(RequestError, match="Nothing is left to learn.*max_seq_length 20"):
        make(long_prompt, max_seq_length=20, mask_prompt=True)


def test_examples_without_text_are_reported():
    report = tokenize(records({"text": ""}, {"text": "To be"}, {"text": ""}), tokenizer, max_seq_length=64).report
    assert report.num_empty == 2
    assert "train: 2 examples have no text; only the end of a text is learned from it" in report.lines("train", 64)


def test_conversations_without_an_assistant_are_reported():
    tokenized = tokenize(
        records({"messages": [USER]}, {"messages": [USER, LAST]}), tokenizer, max_seq_length=64, mask_prompt=True
    )
    assert (tokenized.report.num_unlearned, tokenized.report.num_emptied) == (1, 0)
    assert tokenized.examples[0].num_targets == 0 and tokenized.examples[0].num_positions > 5
    with pytest.raises(RequestError, match="need an assistant's turn"):
        make({"messages": [USER]}, mask_prompt=True)


def test_the_sample_shows_what_is_learned():
    report = tokenize(
        records({"messages": [USER, KING, MORE, LAST]}), tokenizer, max_seq_length=99, mask_prompt=True
    ).report
    assert [learned for _, learned in report.sample] == [False, True, False, True]
    assert report.kind == "chat messages"
    assert report.sample_text(("[", "]")).replace("\n ", "\n") == (
        "<s><|user|>\nWho is there?</s> \n<|assistant|>\n[Nay, answer me 😀 </s>] \n<|user|>\nLong live the king!</s>"
        " \n<|assistant|>\n[He.</s>]"
    )
    long = tokenize(records({"text": "king " * 900}), tokenizer, max_seq_length=2048).report
    assert len(long.sample_text(limit=200)) < 250 and "[...]" in long.sample_text(limit=200)


def test_kinds_are_recognized_and_unsuitable_options_refused():
    kinds = {
        "text": {"text": "a"},
        "prompt and completion": {"prompt": "a", "completion": "b", "text": "ab"},
        "chat messages": {"messages": [USER, LAST], "text": "ab"},
        "instruction, input, output": {"instruction": "a", "input": "", "output": "b", "text": "ab"},
        "ShareGPT conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    }
    both = kinds["prompt and completion"] | kinds["chat messages"]  # as in mlx-lm
    assert tokenize(records(both), tokenizer, max_seq_length=512).report.kind == "prompt and completion"
    for name, values in kinds.items():
        assert tokenize(records(values), tokenizer, max_seq_length=512).report.kind == name
    for options, expected in (
        ({"mask_prompt": True}, "mask_prompt needs prompts"),
        ({"chat_template": "corenet"}, "chat_template needs turns"),
        ({"long_examples": "drop"}, "long_examples must be one of"),
        ({"max_seq_length": 0}, "max_seq_length must be 1 or more"),
    ):
        with pytest.raises(RequestError, match=expected):
            make({"text": "a"}, **options)
    with pytest.raises(RequestError, match="There are no examples"):
        make()
    with pytest.raises(RequestError, match="Cannot read the chat template"):
        make({"messages": [USER, LAST]}, chat_template="nowhere.jinja")


def test_the_fingerprint_changes_with_tokens_and_learned_spans():
    values = [{"prompt": "O king", "completion": " of heaven"}, {"prompt": "a", "completion": "b"}]

    def fingerprint(*values, **options):
        return tokenize(records(*values), tokenizer, **{"max_seq_length": 64} | options).fingerprint()

    first = fingerprint(*values)
    assert fingerprint(*values) == first
    changed = [
        fingerprint(*values[::-1]),
        fingerprint(*values, mask_prompt=True),
        fingerprint(*values, max_seq_length=3),
        fingerprint(values[0]),
        fingerprint(values[0], {"prompt": "a", "completion": "d"}),  # the same length, other tokens
    ]
    assert len({first, *changed}) == 6


def test_progress_reaches_the_total():
    calls: list[tuple[int, int]] = []
    tokenize(records(*[{"text": "a"}] * 600), tokenizer, max_seq_length=8, progress=lambda *call: calls.append(call))
    assert calls[0] == (0, 600) and calls[-1] == (600, 600)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_records_are_identified_by_source():
    examples = make({"text": "a"}, {"text": "b"})
    assert [example.source for example in examples] == ["train.jsonl, line 1", "train.jsonl, line 2"]
    assert replace(examples[0], source="") != examples[0]
