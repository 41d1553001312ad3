"""A message's text never becomes a special token, whatever a template does with it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from mlx_openelm.errors import RequestError
from mlx_openelm.text import chat_marker, chat_template
from mlx_openelm.text.tokenizer import Tokenizer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = Path(__file__).parent / "fixtures" / "shakespeare-hf"
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = {"<s>": 1, "</s>": 2, "<image>": 3, "<|im_end|>": 4}
THINKING = "{% set parts = m.content.split('</think>') %}{{ parts[-1] }}"


def render(source: str, content: Any, special: dict[str, int] = SPECIAL, **fields: Any) -> list[str | int]:
    source = "{{ bos_token }}{% for m in messages %}" + source + "{{ eos_token }}{% endfor %}"
    return chat_template.render([{"role": "user", "content": content, **fields}], source, special, named=NAMED)


# A template, a message, and the text, or None where text and token cannot be told apart.
BUILT = [
    ("{{ m.content | replace('\n', '') }}", "a</\ns>b", "a</s>b"),
    ("{{ m.content.replace('<image>', '') }}", "a<<image>/s>b", None),
    ("{{ m.content.replace('<image>', '') }}", "a </<image>s>b", None),
    ("{{ m.content | lower }}", "a</S>b", "a</s>b"),
    ("{{ m.content.split() | join }}", "a </ s > b", "a</s>b"),
    ("{{ m.content | striptags }}", "a &lt;/s&gt; b", None),
    ("{{ m.content | reverse }}", ">s/<", None),
    ("{{ m.content[1:] }}", "<</s>", "</s>"),
    ("{{ '<' ~ m.content }}", "/s> b", "</s> b"),
    ("{{ m.content ~ '>' }}", "a </s", "a </s>"),
    ("<{{ m.content }}>", "/s", "</s>"),
    ("<{{ m.content | trim | lower }}>", " S ", None),
    ("<|{{ m.name }}|>", "", "<|im_end|>"),
    ("{{ m.content | replace('x', '') | upper | lower }}", "<|IMx_END|>", "<|im_end|>"),
    ("{{ m.x | tojson }}", "", '{"</s>": ["<s>"]}'),
]


@pytest.mark.parametrize(("source", "content", "text"), BUILT)
def test_typed_text_never_becomes_a_token(source, content, text):
    fields = {"name": "im_end", "x": {"</s>": ["<s>"]}}
    if text is None:
        with pytest.raises(RequestError, match="alters a special token that a message quotes") as caught:
            render(source, content, **fields)
        assert "\n" not in str(caught.value)
    else:
        assert render(source, content, **fields) == [1, text, 2]


@pytest.mark.parametrize(
    ("source", "content", "text"),
    [
        (THINKING, "<think>1 < 2</think>\nso <b>", "\nso <b>"),
        (THINKING, "<think>a</think>so </s>", "so </s>"),
        ("{{ m.content | length }}", "a < b & c > d", "13"),
        ("{{ m.content | escape }}", "a </s>", "a &lt;/s&gt;"),
        ("{{ m.content | striptags }}", "<b>a</b> > c", "a > c"),
        ("{{ 'yes' if m.content == 's' }}", "s", "yes"),
        ("{{ m.content | trim }}", " <a>\n", "<a>"),
    ],
)
def test_templates_may_inspect_texts(source, content, text):
    assert render(source, content) == [1, text, 2]


def test_a_role_may_be_part_of_a_token():
    assert render("<|{{ m.role }}|>{{ m.content }}", "user", {**SPECIAL, "<|user|>": 5}) == [1, 5, "user", 2]


def test_special_tokens_made_of_letters():
    special = {**SPECIAL, "PAD": 5, "kB": 6}
    assert render("{{ m.content }}", "PAD kB pad", special) == [1, "PAD kB pad", 2]
    for source, content in (
        ("{{ m.content | upper }}", "pad"),
        ("{{ m.content | lower | replace('b', 'B') }}", "\N{KELVIN SIGN}b"),
    ):
        with pytest.raises(RequestError, match="alters a special token"):
            render(source, content, special)


def test_typed_added_tokens_are_text_too(tmp_path):
    shutil.copy(FOLDER / "tokenizer.model", tmp_path)
    added = {"2048": {"content": "<|a|>", "special": True}, "2049": {"content": "<b>", "special": False}}
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = tmp_path / "t.jinja"
    template.write_text("<|a|>{{ messages[0].content | replace('\n', '') | lower }}<|a|>")
    tokenizer = Tokenizer.from_folder(tmp_path)
    for content in ("x<|\na|>y", "x<|A|>y", "x<|a|>y", "<|a<|a|>|>"):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": content}], template)
        assert ids.count(2048) == 2 and ids[1] == ids[-1] == 2048
        assert tokenizer.decode(ids) == content.replace("\n", "").lower()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "x<b>y"}], template)
    assert ids.count(2049) == 1


def test_keys_that_are_not_text_are_refused_in_one_line(tmp_path):
    with pytest.raises(RequestError, match="cannot be written as JSON"):
        render("{{ m.content }}", "a", **{"x": {("x",): 1}})
    message = {"role": "user", "content": "a", ("x",): 1}
    with pytest.raises(RequestError, match="cannot be written as JSON"):
        chat_template.render([message], "{{ messages }}", SPECIAL, named=NAMED)
    assert render("{{ m.x }}", "a", x={5: "b"}) == [1, "{'5': 'b'}", 2]


def test_deeply_nested_messages_are_refused_in_one_line():
    for depth in (700, 100_000):
        value: list = []
        for _ in range(depth):
            value = [value]
        with pytest.raises(RequestError, match=r"nested too deeply|recursion"):
            render("{{ m.content }}", "a", x=value)


def test_a_long_text_with_one_token_is_rendered_quickly():
    mark, content = chat_marker.Marker(tuple(SPECIAL)), "a b" * 700_000
    seconds = []
    for text in (content, content + "<s>"):
        before = time.process_time()
        mark.hide({"content": text})
        seconds.append(time.process_time() - before)
    assert seconds[1] < 5 * seconds[0] + 0.03


@settings(max_examples=150, deadline=None)
@given(
    content=st.lists(st.sampled_from([*SPECIAL, *"<>/sSmM|_ \nx&;", "&lt;", "&gt;", "im", "end"]), max_size=7),
    change=st.lists(
        st.sampled_from(
            [
                "trim",
                "lower",
                "upper",
                "title",
                "striptags",
                "escape",
                "reverse",
                "tojson",
                "first",
                "last",
                "capitalize",
                "urlencode",
                "sort|join",
                "replace('x','')",
                "replace('<image>','')",
                "replace('&lt;','<')",
                "list|unique|join",
                "truncate(5,true,'')",
                "wordcount",
                "indent",
                "wordwrap(2)",
                "batch(2)|map('join')|join",
            ]
        ),
        min_size=1,
        max_size=3,
    ),
    around=st.sampled_from(["{}", "<{}", "{}>", "</{}", "<|{}", "{0}{0}"]),
)
def test_whatever_a_template_does_only_its_own_tokens_are_found(content, change, around):
    expression = "{{ " + "|".join(["m.content", *change]) + " }}"
    try:
        runs = render(around.format(expression), "".join(content))
    except RequestError as error:
        assert "alters a special token" in str(error) or "The chat template failed" in str(error)
    else:
        assert [run for run in runs if isinstance(run, int)] == [1, 2]
