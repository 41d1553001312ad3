"""Conversations in the formats of OpenAI, ShareGPT and TRL: what is rendered, learned, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from mlx_openelm.errors import RequestError
from mlx_openelm.text.chat_template import CORENET_TEMPLATE
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.data.conversations import conversation
from mlx_openelm.training.data.examples import Example, tokenize
from mlx_openelm.training.data.kinds import Record, recognize
from mlx_openelm.training.data.rendering import render_chat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

FIXTURES = Path(__file__).parent / "fixtures"
tokenizer = Tokenizer.from_folder(FIXTURES / "shakespeare-hf")
EOS = tokenizer.eos_token_id

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Who is there?"}
KING = {"role": "assistant", "content": "Nay, answer me."}
MORE = {"role": "user", "content": "Long live the king!"}
LAST = {"role": "assistant", "content": "He."}
CALLS = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at":"door","times":2}'}}]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look", "parameters": {}}}]
TOOL_TEMPLATE = """{{ bos_token }}{% for t in tools or [] %}{{ t.function | tojson }}
{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] -%}
{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def make(values: dict[str, Any], **options: Any) -> Example:
    return tokenize([Record(values, "train.jsonl, line 1")], tokenizer, max_seq_length=2048, **options).examples[0]


def marked(values: dict[str, Any], **options: Any) -> str:
    """The example's text with learned spans in brackets and special tokens spelled out."""
    records = [Record(values, "train.jsonl, line 1")]
    return tokenize(records, tokenizer, max_seq_length=2048, **options).report.sample_text()


def refusal(values: dict[str, Any], **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        make(values, **options)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("train.jsonl, line 1: ")
    return str(caught.value)


@pytest.fixture
def tool_template(tmp_path):
    path = tmp_path / "tools.jinja"
    path.write_text(TOOL_TEMPLATE)
    return path


# Weights


def test_a_turn_of_weight_0_is_not_learned():
    turns = [USER, {**KING, "weight": 0}, MORE, {**LAST, "weight": 1}]
    head, middle = (
        "<|user|>\nWho is there?</s> \n<|assistant|>\n",
        " \n<|user|>\nLong live the king!</s> \n<|assistant|>\n",
    )
    assert marked({"messages": turns}) == f"<s>⟦{head}⟧Nay, answer me.</s>⟦{middle}He.</s> \n⟧"
    assert marked({"messages": turns}, mask_prompt=True) == f"<s>{head}Nay, answer me.</s>{middle}⟦He.</s>⟧"
    # The weight is not part of the text.
    without = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
    assert make({"messages": turns}).tokens == make({"messages": without}).tokens
    # Everything after the last learned turn is dropped.
    turned = [USER, {**KING, "weight": None}, MORE, {**LAST, "weight": 0.0}]
    assert marked({"messages": turned}, mask_prompt=True) == f"<s>{head}⟦Nay, answer me.</s>⟧"


def test_the_published_example_of_weights():
    path = Path(__file__).parents[2] / "shared" / "cases" / "data" / "openai-weight.jsonl"
    if not path.exists():
        pytest.skip("needs the published cases")
    text = marked(json.loads(path.read_text()), mask_prompt=True)
    assert "first</s>" in text and text.endswith("⟦second</s>⟧") and text.count("⟦") == 1


def test_a_user_may_have_a_weight_too():
    """Data sets in ShareGPT's format may weight every message, 0 for all but the assistant's."""
    turns = [{**SYSTEM, "weight": 0}, {**USER, "weight": 0}, {**KING, "weight": 1}]
    assert marked({"messages": turns}) == (
        "<s><|system|>\nBe brief.</s>⟦ \n⟧<|user|>\nWho is there?</s>⟦ \n<|assistant|>\nNay, answer me.</s> \n⟧"
    )


def test_the_eos_added_to_a_turn_of_weight_0_is_not_learned():
    turns = [USER, KING, MORE, {**LAST, "weight": 0}]
    example = make({"messages": turns}, chat_template="plain")
    assert example.tokens[-1] == EOS and example.learned[-1][1] < len(example.tokens) - 1
    masked = make({"messages": turns}, chat_template="plain", mask_prompt=True)
    assert EOS not in masked.tokens and len(masked.learned) == 1


@pytest.mark.parametrize("key", ["train", "training", "loss"])
def test_flags_of_other_programs_are_weights(key):
    """Axolotl's and ms-swift's."""
    flagged = [USER, {**KING, key: False}, MORE, {**LAST, key: True}]
    weighted = [USER, {**KING, "weight": 0}, MORE, LAST]
    for mask in (True, False):
        assert make({"messages": flagged}, mask_prompt=mask) == make({"messages": weighted}, mask_prompt=mask)
    named = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", key: None}]
    assert make({"conversations": named}) == make({"conversations": [{**turn, "weight": 1} for turn in named]})
    assert f"Message 1: {key} must be true or false, got 0" in refusal({"messages": [USER, {**KING, key: 0}]})
    assert "Message 1: train_detail is not offered" in refusal({"messages": [USER, {**KING, "train_detail": [{}]}]})


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [USER, KING]},
        {"prompt": [USER], "completion": [KING]},
        {"prompt": USER["content"], "completion": KING["content"]},
        {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": KING["content"]}]},
        # As its first message too.
        {"messages": [SYSTEM, USER, KING]},
        {"conversations": [{"from": "system", "value": SYSTEM["content"]}, USER, KING]},
    ],
)
def test_a_system_beside_the_turns_is_the_first_of_them(values):
    options = {"chat_template": "corenet", "mask_prompt": True}
    whole = make({"messages": [SYSTEM, USER, KING]}, **options)
    assert make({**values, "system": SYSTEM["content"]}, **options) == whole


def test_rendering_ends_where_an_example_is_cut(monkeypatch):
    """Each turn takes the time to render all before it, so those beyond the cut are not looked for."""
    messages = [USER, KING] * 40
    whole = tokenize([Record({"messages": messages}, "a")], tokenizer, max_seq_length=4000, mask_prompt=True)
    rendered = []
    render = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *given, **named: rendered.append(1) or render(*given, **named)
    )
    cut = tokenize([Record({"messages": messages}, "a")], tokenizer, max_seq_length=60, mask_prompt=True)
    assert cut.report.longest == whole.report.longest > 1000
    [example], [other] = cut.examples, whole.examples
    assert example.learned == tuple((start, min(end, 61)) for start, end in other.learned if start < 61)
    assert len(rendered) < 12


@pytest.mark.parametrize("weight", [2, -1, 0.5, "0", "1", True, False, [0], {}])
def test_other_weights_are_refused(weight):
    what = refusal({"messages": [USER, {**KING, "weight": weight}]})
    assert "Message 1: weight must be 0 or 1, got " in what


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0, 1, None]), min_size=1, max_size=5),
    contents=st.lists(st.text("aé <s>/\n😀", max_size=8), min_size=10, max_size=10),
    mask=st.booleans(),
)
def test_spans_match_a_rendering_by_hand(weights, contents, mask):
    """Against CoreNet's template written out here, turn by turn, each run encoded separately."""
    messages, expected, learned = [], [tokenizer.bos_token_id], [False]
    breaks = ""
    for index, weight in enumerate(weights):
        question, answer = contents[2 * index : 2 * index + 2]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "weight": weight}]
        run = tokenizer.encode(f"{breaks}<|user|>\n{question}", add_bos=False)
        expected += [*run, EOS]
        learned += [not mask] * (len(run) + 1)
        head = tokenizer.encode("\n<|assistant|>\n", add_bos=False)
        run = tokenizer.encode(f"\n<|assistant|>\n{answer}", add_bos=False)
        same = next((i for i, (a, b) in enumerate(zip(head, run, strict=False)) if a != b), min(len(head), len(run)))
        expected += [*run, EOS]
        learned += [not mask] * same + [weight != 0] * (len(run) + 1 - same)
        breaks = "\n"
    run = tokenizer.encode("\n", add_bos=False)
    expected += run
    learned += [not mask] * len(run)
    if mask and not any(learned):
        return
    example = make({"messages": messages}, mask_prompt=mask)
    if mask:
        length = max(index for index, is_learned in enumerate(learned) if is_learned) + 1
        expected, learned = expected[:length], learned[:length]
    assert list(example.tokens) == expected
    ours = [any(start <= index < end for start, end in example.learned) for index in range(len(example.tokens))]
    assert ours == learned


GENERATION = """{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' -%}
{% generation %}{{ m.content + eos_token }}{% endgeneration %}
{%- else %}{{ m.content + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


@pytest.mark.parametrize("turns", [[USER, LAST], [SYSTEM, USER, KING, MORE, LAST], [USER, KING, MORE]])
def test_learned_tokens_are_those_in_generation_blocks(tmp_path, turns):
    """The turns we find without those blocks match transformers' mask of assistant tokens."""
    transformers = pytest.importorskip("transformers", minversion="5")
    tokenizer.save(tmp_path, chat_template=GENERATION)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    example = make({"messages": turns}, chat_template=tmp_path / "chat_template.jinja", mask_prompt=True)
    ours = [any(start <= index < end for start, end in example.learned) for index in range(len(example.tokens))]
    length = max(index for index, mask in enumerate(expected["assistant_masks"]) if mask) + 1
    assert list(example.tokens) == expected["input_ids"][:length]
    assert ours == [bool(mask) for mask in expected["assistant_masks"][:length]]


# ShareGPT and TRL


def test_sharegpt_gives_the_same_conversation():
    expected = make({"messages": [SYSTEM, USER, KING]})
    conversation = {"system": "Be brief.", "human": "Who is there?", "gpt": "Nay, answer me."}
    turns = [{"from": who, "value": text} for who, text in conversation.items()]
    assert make({"conversations": turns}) == expected
    assert make({"conversations": turns[1:], "system": "Be brief."}) == expected
    assert make({"conversations": turns, "system": "", "tools": "[]"}) == expected
    assert make({"messages": turns}) == expected
    assert make({"conversations": [SYSTEM, USER, KING]}) == expected
    weighted = [{**turn, "weight": weight} for turn, weight in zip(turns, (None, 0, 1), strict=True)]
    assert make({"conversations": weighted}, mask_prompt=True) == make(
        {"messages": [SYSTEM, USER, KING]}, mask_prompt=True
    )
    other = [{"from": "user", "value": "Who is there?"}, {"from": "chatgpt", "value": "Nay, answer me."}]
    assert make({"conversations": other}) == make({"messages": [USER, KING]})
    table = [
        *({**turn, "role": None, "content": None, "weight": None} for turn in turns[:2])
    ]  # columns of both formats
    table.append({**KING, "from": None, "value": None})
    assert make({"conversations": table}) == make({"messages": table}) == expected


@pytest.mark.parametrize("who", ["function_call", "observation", "tool"])
def test_sharegpt_tool_calls_are_refused(who):
    what = refusal({"conversations": [{"from": "human", "value": "a"}, {"from": who, "value": "{}"}]})
    assert f"Message 1 is from '{who}', and tool calls in ShareGPT's form are not offered" in what


def test_trl_prompts_and_completions_of_messages():
    values = {"prompt": [USER, KING, MORE], "completion": [LAST]}
    whole = {"messages": [USER, KING, MORE, LAST]}
    assert make(values) == make(whole)  # everything is learned, as with a text prompt
    masked = make(values, mask_prompt=True)
    assert masked.tokens == make(whole, mask_prompt=True).tokens
    assert len(masked.learned) == 1 and masked.learned[0] == make(whole, mask_prompt=True).learned[-1]
    assert "'completion' is a list, not text" in refusal({"prompt": "a", "completion": [LAST]})
    assert "'prompt' is a list, not text" in refusal({"prompt": [USER], "completion": "a"})


# Content, roles and tools


def test_content_parts_are_joined_unless_the_template_reads_them(tmp_path):
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is there?"}]
    expected = make({"messages": [USER, KING]})
    assert make({"messages": [{"role": "user", "content": parts}, KING]}) == expected
    path = tmp_path / "joined.jinja"
    path.write_text(CORENET_TEMPLATE + "{# #}")
    assert make({"messages": [{"role": "user", "content": parts}, KING]}, chat_template=path) == expected
    path.write_text("{% for p in messages[0].content %}[{{ p.text }}]{% endfor %}{{ messages[-1].content }}")
    text = marked({"messages": [{"role": "user", "content": parts}, KING]}, chat_template=path)
    assert "[Who ][is there?]" in text


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "refusal"])
def test_content_parts_other_than_text_are_refused_by_name(kind):
    content = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}]
    what = refusal({"messages": [{"role": "user", "content": content}, KING]})
    assert f"Part 1 of the content of message 0 is of type '{kind}', which is not supported" in what


def test_developer_means_system_and_names_reach_the_template(tmp_path):
    assert make({"messages": [{**SYSTEM, "role": "developer"}, USER, KING]}) == make({"messages": [SYSTEM, USER, KING]})
    named = {"messages": [{**USER, "name": "Bernardo", "nothing": None}, KING]}
    assert make(named) == make({"messages": [USER, KING]})
    path = tmp_path / "names.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}({{ m.name }}{{ m.nothing is defined }}){% endfor %}")
    text = marked({"messages": [{**named["messages"][0], "role": "developer"}, KING]}, chat_template=path)
    assert "developer(BernardoFalse)assistant(False)" in text


def test_tool_calls_are_rendered_by_a_template_that_supports_them(tool_template):
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": CALLS}]
    turns += [{"role": "tool", "content": "A door", "tool_call_id": "c1"}, LAST]
    for tools in (TOOLS, json.dumps(TOOLS)):
        text = marked({"messages": turns, "tools": tools}, chat_template=tool_template, mask_prompt=True)
        schema = json.dumps(TOOLS[0]["function"])
        assert text == (
            f'<s>{schema}\n<user>Who is there?</s> <assistant>⟦look{{"at": "door", "times": 2}}</s>⟧ <tool>A door</s> '
            "<assistant>⟦He.</s>⟧"
        )
    pair = {"prompt": "Who is there?", "completion": "He.", "tools": TOOLS}
    assert marked(pair, chat_template=tool_template).startswith(f"<s>⟦{schema}\n<user>Who")


def test_tools_are_refused_if_the_template_would_drop_them(tmp_path):
    path = tmp_path / "none.jinja"
    path.write_text(CORENET_TEMPLATE + "{# #}")
    calls = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": CALLS}]}
    legacy = {"messages": [USER, {"role": "assistant", "content": None, "function_call": {"name": "look"}}]}
    result = {"messages": [USER, {"role": "tool", "content": "A door"}, KING]}
    for values in (calls, legacy, result, {"messages": [USER, KING], "tools": TOOLS}):
        assert "The chat template corenet does not render tools or their calls: give one" in refusal(values)
    assert "The chat template plain does not render" in refusal(calls, chat_template="plain")
    assert f"The chat template {path} does not render tool_calls" in refusal(calls, chat_template=path)
    assert "does not render function_call" in refusal(legacy, chat_template=path)
    assert "does not render tools" in refusal({"messages": [USER, KING], "tools": TOOLS}, chat_template=path)
    assert "'tools' needs a chat template" in refusal({"prompt": "a", "completion": "b", "tools": TOOLS})
    assert "'tools' needs a chat template" in refusal({"instruction": "a", "output": "b", "tools": TOOLS})
    assert make({"text": "<tools>look</tools> a", "tools": TOOLS}) == make({"text": "<tools>look</tools> a"})
    assert make({"messages": [USER, {**KING, "tool_calls": [], "function_call": None}], "tools": None})
    assert "'tools' is text that is not JSON" in refusal({"messages": [USER, KING], "tools": "look"})
    assert "'tools' must be a list" in refusal({"messages": [USER, KING], "tools": {"name": "look"}})
    assert "Message 0 has tool calls, which only an assistant can make" in refusal(
        {"messages": [{**USER, "tool_calls": CALLS}, KING]}
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"messages": [USER, KING], "functions": [{"name": "look"}]}, "'functions' is not offered"),
        ({"messages": [USER, KING], "images": ["x.png"]}, "'images' is not offered"),
        ({"prompt": [USER], "completion": [KING], "images": ["x.png"]}, "'images' is not offered"),
        ({"messages": [USER, KING], "chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs' is not offered"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history' is not offered"),
        ({"instruction": "a", "output": "b", "system": "c"}, "'system' needs a chat template"),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, "'history' is not offered"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "'system' needs a chat template"),
        ({"messages": [USER, KING], "system": ["c"]}, "'system' is a list, not text"),
        ({"conversations": [SYSTEM, USER, KING], "system": "c"}, "have different texts; keep one"),
        (
            {"prompt": [USER], "chosen": [KING], "rejected": [LAST]},
            "preference pairs (chosen, rejected), which `mlx-openelm dpo` learns from",
        ),
        ({"input_ids": [1, 2]}, "tokens (input_ids), which are not offered"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "Message 0 is from 'alien': use one of human"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "Message 0 is from ['human']: use one of human"),
        ({"conversations": [{"from": "human"}]}, "The content of message 0 must be text"),
        ({"conversations": "[]"}, "A conversation must be a list of messages"),
        ({"conversations": ["a"]}, 'Message 0 must be an object with "role" and "content"'),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "Part 0 of the content of message 0 must be"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "Part 0 of the content of message 0 must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": ["text"]}]}]},
            "Part 0 of the content of message 0 must be",
        ),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "The content of message 1 must be text"),
    ],
)
def test_unsupported_records_are_refused_by_name(values, expected):
    assert expected in refusal(values)


def test_empty_table_columns_are_ignored():
    kind = recognize([Record({"messages": [USER, KING], "tools": None, "images": [], "functions": None}, "row 1")])
    assert kind.name == "chat messages"
    assert make({"instruction": "a", "output": "b", "system": "", "history": []}) == make(
        {"instruction": "a", "output": "b"}
    )


def test_template_errors_name_the_line(tmp_path):
    path = tmp_path / "strict.jinja"
    path.write_text("{{ raise_exception('Turns must alternate') }}")
    assert "failed: Turns must alternate" in refusal({"messages": [USER, KING]}, chat_template=path)


class OverlappingTokens:
    """A tokenizer whose generation prompt `b` merges with the previous turn, but not if a turn follows."""

    bos_token_id, eos_token_id, eos_token_ids, chat_template = 0, 1, {1}, "there is one"
    texts: ClassVar = {1: "", 2: "u", 3: "b", 4: "a", 5: "ab", 6: "bc"}
    tokens: ClassVar = {"ub": [2, 3], "uba": [2, 3, 4], "ubab": [2, 3, 5], "ubabc": [2, 3, 4, 6]}

    def apply_chat_template(self, messages, template, *, add_generation_prompt, **_):
        turns = ["b" * (message["role"] == "assistant") + message["content"] for message in messages]
        return list(self.tokens["".join(turns) + "b" * add_generation_prompt])

    def decode(self, ids):
        return "".join(self.texts[token] for token in ids)

    def streaming_decoder(self, _):
        return SimpleNamespace(add=self.texts.get, finish=lambda: "")


def test_a_token_belongs_to_only_one_of_two_consecutive_turns():
    turns = [{"role": "user", "content": "u"}, *({"role": "assistant", "content": content} for content in "ac")]
    tokens, learned = render_chat(conversation(turns), OverlappingTokens(), None, mask_prompt=True)
    assert (tokens, learned) == ([2, 3, 4, 6, 1], ((2, 3), (3, 5)))


@pytest.mark.parametrize(("source", "what"), [(CORENET_TEMPLATE, "tools or their calls"), ("{{ messages }}", "tools")])
def test_a_models_own_template_that_renders_no_tools_is_called_so(source, what):
    own = Tokenizer.from_folder(FIXTURES / "shakespeare-hf")
    own.chat_template = source
    records = [Record({"messages": [USER, KING], "tools": TOOLS}, "train.jsonl, line 1")]
    with pytest.raises(RequestError) as caught:
        tokenize(records, own, max_seq_length=99)
    assert str(caught.value) == (
        f"train.jsonl, line 1: The model's chat template does not render {what}: give one that does with "
        "chat_template FILE."
    )


def test_a_given_template_replaces_that_of_the_tokenizer():
    own = Tokenizer.from_folder(FIXTURES / "shakespeare-hf")
    own.chat_template = TOOL_TEMPLATE
    records = [Record({"messages": [USER, KING]}, "train.jsonl, line 1")]
    templates = [tokenize(records, own, max_seq_length=99, chat_template=given) for given in (None, "corenet")]
    assert [found.report.chat_template for found in templates] == ["the tokenizer's own", "corenet"]
