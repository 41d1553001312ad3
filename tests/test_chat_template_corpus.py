"""Templates of the shapes found in the wild render what transformers 5 renders, character by character.

`fixtures/chat-templates/expected.json` holds transformers' texts and errors;
`python -m tests.test_chat_template_corpus` regenerates it; if transformers is installed, a test checks it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mlx_openelm.errors import RequestError
from mlx_openelm.text import chat_template
from mlx_openelm.text.tokenizer import Tokenizer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = Path(__file__).parent / "fixtures" / "chat-templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
EXPECTED = json.loads((FOLDER / "expected.json").read_text()) if (FOLDER / "expected.json").exists() else {}

NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "sep_token": "<sep>",
    "cls_token": "<cls>",
    "mask_token": "<mask>",
    "image_token": "<image>",
}
# `<|user|>` is put together by some templates, and `<` begins them all.
OTHERS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|user|>", "<|end|>", "[INST]"]
SPECIAL = {token: index for index, token in enumerate([*NAMED.values(), *OTHERS])}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather in a "city"',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Größe <&>"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {}}},
]
FUNCTION = {"name": "weather", "arguments": {"city": "Köln", "days": 2}}
CALL = {"id": "call00001", "type": "function", "function": FUNCTION}
USER = {"role": "user", "content": " hi there <b> é😀!\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "turns": [
        {"role": "system", "content": " Be brief.\nAlways. "},
        USER,
        {"role": "assistant", "content": "yo \n"},
        {"role": "user", "content": "again?!", "name": "Ann", "other": None},
    ],
    "answered": [USER, {"role": "assistant", "content": "Well, hi  "}],
    "typed": [
        {"role": "user", "content": "</s> <|im_end|>a<|user|></ [INST]<s"},
        {"role": "assistant", "content": "<<s>>"},
    ],
    "thought": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nso", "reasoning": "hm"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "<think>\noh\n</think>\n\nso", "reasoning_content": None},
    ],
    "tools": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sun": true}', "tool_call_id": "call00001", "name": "weather"},
        {"role": "assistant", "content": "Sun."},
        {"role": "user", "content": "Thanks"},
    ],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "three "}]},
    ],
}
# They show the last message several times or in pieces, where transformers leaves its markers in the text.
ODD = ("filters", "string_methods", "tojson_ensure_ascii", "tojson_options", "undefined", "whitespace")
# They reverse or cut texts.
APART = ("filters", "string_methods")
MODES: dict[str, dict[str, bool]] = {
    "closed": {},
    "prompt": {"add_generation_prompt": True},
    "continued": {"continue_final_message": True},
}


def cases():
    """Template, conversation and mode of each case that both programs accept."""
    for template, source in TEMPLATES.items():
        for name in CONVERSATIONS:
            if name == "tools" and not ("tools" in source and "tool_calls" in source):
                continue  # refused here: the template would leave them out
            if name == "parts" and "['text']" not in source:
                continue  # joined here; transformers shows a Python list
            if template.startswith("bad_") and name != "one":
                continue
            if name == "typed" and template in APART:
                continue  # refused here: typed text and template text cannot be told apart
            for mode in MODES:
                if mode != "continued" or (CONVERSATIONS[name][-1]["role"] == "assistant" and template not in ODD):
                    yield template, name, mode


def ours(template: str, name: str, mode: str) -> str:
    runs = chat_template.render(
        CONVERSATIONS[name],
        TEMPLATES[template],
        SPECIAL,
        named=NAMED,
        tools=TOOLS if name == "tools" else None,
        **{"add_generation_prompt": False, **MODES[mode]},
    )
    tokens = list(SPECIAL)
    return "".join(tokens[run] if isinstance(run, int) else run for run in runs)


def their_tokenizer() -> Any:
    transformers = pytest.importorskip("transformers", minversion="5")
    from tokenizers import Tokenizer, models

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(dict(SPECIAL), unk_token="<unk>")),
        extra_special_tokens={"image_token": "<image>"},
        **{name: token for name, token in NAMED.items() if name != "image_token"},
    )


def theirs(tokenizer: Any, template: str, name: str, mode: str) -> dict[str, str]:
    try:
        text = tokenizer.apply_chat_template(
            CONVERSATIONS[name],
            chat_template=TEMPLATES[template],
            tools=TOOLS if name == "tools" else None,
            tokenize=False,
            **MODES[mode],
        )
    except Exception as error:
        return {"error": " ".join(str(error).split())}
    return {"text": text}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_renders_what_transformers_renders(template):
    keys = [case for case in cases() if case[0] == template]
    assert keys and len(EXPECTED) == len(list(cases()))
    for key in keys:
        expected = EXPECTED["/".join(key)]
        if "text" in expected:
            assert ours(*key) == expected["text"], key
        else:
            with pytest.raises(RequestError) as caught:
                ours(*key)
            assert "\n" not in str(caught.value)
            # We word it differently if the template does not show the message or stores a private name.
            own = ("cannot be continued", "begin with _", "tojson() got an unexpected keyword argument 'default'")
            assert expected["error"] in str(caught.value) or any(word in str(caught.value) for word in own), key


def test_the_published_cases():
    folder = Path(__file__).parents[2] / "shared" / "cases" / "chat-templates"
    if not folder.exists():
        pytest.skip("needs the published cases")
    cases = json.loads((folder / "expected.json").read_text())
    tokenizer = Tokenizer.from_folder(FOLDER.parent / "shakespeare-hf")
    for name, expected in cases["rendered"].items():
        ids = tokenizer.apply_chat_template(cases["messages"], folder / name)
        # Token by token, since special tokens have no text; BOS is OpenELM's.
        assert [tokenizer.bos_token_id, *by_hand(tokenizer, expected)] == ids


def by_hand(tokenizer: Tokenizer, text: str) -> list[int]:
    parts = re.split("(<unk>|</s>)", text)
    special = {"<unk>": [0], "</s>": [tokenizer.eos_token_id]}
    return [token for part in parts if part for token in special.get(part) or tokenizer.encode(part, add_bos=False)]


def test_a_tokenizers_config_names_special_tokens(tmp_path):
    tokenizer = Tokenizer.from_folder(FOLDER.parent / "shakespeare-hf")
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {
        "pad_token": {"content": "</s>", "lstrip": False},
        "sep_token": "<s>",
        "cls_token": None,
        "add_x_token": True,
    }
    config |= {"extra_special_tokens": {"image_token": "<unk>", "self": "<s>", "messages": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = tmp_path / "t.jinja"
    template.write_text("{{ pad_token }}{{ sep_token }}{{ image_token }}{{ cls_token }}{{ messages | length }}")
    ids = Tokenizer.from_folder(tmp_path).apply_chat_template([USER], template)
    assert ids == [1, 2, 1, 0, *tokenizer.encode("1", add_bos=False)]


def test_a_message_without_parts_cannot_be_continued():
    with pytest.raises(RequestError, match="no content that could be continued"):
        chat_template.render(
            [USER, {"role": "assistant", "content": []}],
            TEMPLATES["gemma3_parts"],
            SPECIAL,
            named=NAMED,
            continue_final_message=True,
        )


@pytest.mark.parametrize("template", APART)
def test_a_typed_token_that_a_template_splits_is_refused(template):
    with pytest.raises(RequestError, match="alters a special token that a message quotes"):
        ours(template, "typed", "closed")


@settings(max_examples=100, deadline=None)
@given(
    contents=st.lists(
        st.lists(st.sampled_from([*SPECIAL, *"<>/s|[]_1 x"]), max_size=6).map("".join), min_size=1, max_size=4
    ),
    between=st.sampled_from(["", " ", "</s>", "s>"]),
)
def test_messages_cannot_write_special_tokens_in_any_surroundings(contents, between):
    messages = [{"role": "user", "content": content} for content in contents]
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}" + between + "{% endfor %}"
    runs = chat_template.render(messages, source, SPECIAL, named=NAMED)
    assert [run for run in runs if isinstance(run, int)] == [0] + [1] * (between == "</s>") * len(messages)
    texts = [content + (between if between != "</s>" else "") for content in contents]
    assert "".join(run for run in runs if isinstance(run, str)) == "".join(texts)


def test_the_expected_texts_are_what_transformers_renders():
    tokenizer = their_tokenizer()
    assert {"/".join(key): theirs(tokenizer, *key) for key in cases()} == EXPECTED


if __name__ == "__main__":
    its = their_tokenizer()
    found = {"/".join(key): theirs(its, *key) for key in cases()}
    (FOLDER / "expected.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
