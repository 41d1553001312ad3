"""Conversations: what is processed at each turn, and what commands and failures leave behind."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_openelm import generate, load
from mlx_openelm.cli.chat_commands import Session, complete, is_command, obey
from mlx_openelm.cli.chat_input import HISTORY_LENGTH, _whole, append_history, read_history
from mlx_openelm.cli.main import main
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.generation.chat import Conversation, StopAnswerError
from mlx_openelm.generation.options import GenerationOptions
from mlx_openelm.model import OpenELM

import mlx.core as mx
import pytest

SAID = ("Good morrow!", "Who art thou?", "Insult me.", "Goodbye.")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load("tiny-instruct")


@pytest.fixture(scope="module")
def draft() -> OpenELM:
    return load("tiny-draft")[0]


@pytest.fixture
def processed(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each call of the model processes, in order; of this model alone, not of the draft model."""
    counts: list[int] = []
    whole = OpenELM.hidden_states

    def counted(self: OpenELM, tokens: Any, *rest: Any, **named: Any) -> Any:
        if self is tiny[0]:
            counts.append(tokens.size)
        return whole(self, tokens, *rest, **named)

    monkeypatch.setattr(OpenELM, "hidden_states", counted)
    yield counts


def answer(chat: Conversation, text: str) -> str:
    return "".join(piece.text for piece in chat.say(text))


def chats(tiny: Any, said: Sequence[str] = SAID, **settings: Any) -> Conversation:
    options = {name: settings.pop(name) for name in list(settings) if name in GenerationOptions.__dataclass_fields__}
    chat = Conversation(*tiny, options=GenerationOptions(**{"max_tokens": 24} | options), **settings)
    for text in said:
        answer(chat, text)
    return chat


def test_the_answers_are_those_of_whole_prompts(tiny: Any) -> None:
    """Against `generate`, which renders and processes the whole conversation for every answer."""
    model, tokenizer = tiny
    chat = Conversation(model, tokenizer, system="Speak plainly.", options=GenerationOptions(max_tokens=24))
    messages = [{"role": "system", "content": "Speak plainly."}]
    for text in SAID:
        messages.append({"role": "user", "content": text})
        alone = generate(model, tokenizer, tokenizer.apply_chat_template(messages), max_tokens=24)
        assert answer(chat, text) == alone
        messages.append({"role": "assistant", "content": alone})
    assert chat.all_messages() == messages


KINDS = [{}, {"kv_bits": 8}, {"max_kv_size": 16}, {"max_kv_size": 400}, {"kv_bits": 4, "quantized_kv_start": 40}]


@pytest.mark.covering
@pytest.mark.parametrize("drafts", ["no drafts", "a draft model", "lookup"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_only_new_tokens_are_processed(
    tiny: Any, draft: OpenELM, processed: list[int], kind: dict[str, Any], drafts: str
) -> None:
    """Each token of the conversation once: counted at the model, for every kind of cache."""
    settings: dict[str, Any] = {
        "prompt_lookup": drafts == "lookup",
        "num_draft_tokens": 0 if drafts == "lookup" else None,
    }
    chat = chats(tiny, (), draft_model=draft if drafts == "a draft model" else None, **kind, **settings)
    earlier = 0
    for text in SAID:
        processed.clear()
        answer(chat, text)
        assert chat.stats is not None
        message = tiny[1].apply_chat_template([{"role": "user", "content": text}])
        new = chat.stats.prompt_tokens - chat.stats.cached_tokens
        # The message, what the template writes around it, and at most one token of the answer before.
        assert chat.stats.cached_tokens >= earlier - 1 and new <= len(message) + 3
        drafted = 0 if chat.stats.last.drafts is None else chat.stats.last.drafts.drafted
        assert sum(processed) <= new + chat.stats.last.generation_tokens + drafted
        earlier = chat.stats.prompt_tokens + chat.stats.last.generation_tokens


def test_a_draft_model_reads_the_conversation_once_too(
    tiny: Any, draft: OpenELM, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    whole = OpenELM.hidden_states

    def counted(self: OpenELM, tokens: Any, *rest: Any, **named: Any) -> Any:
        if self is draft:
            counts.append(tokens.size)
        return whole(self, tokens, *rest, **named)

    monkeypatch.setattr(OpenELM, "hidden_states", counted)
    chat = chats(tiny, (), draft_model=draft, num_draft_tokens=2)
    for text in SAID:
        counts.clear()
        answer(chat, text)
        assert chat.stats is not None
        unread = chat.stats.prompt_tokens - chat.stats.cached_tokens
        assert counts and sum(counts) < unread + 4 * chat.stats.last.generation_tokens + 8
    assert chat.stats.prompt_tokens > 100


def test_a_full_sliding_cache_repeats_one_turn_at_most(tiny: Any, processed: list[int]) -> None:
    """It cannot go back, as `/retry` and the plain template ask for; then it goes on from before the last answer."""
    chat = chats(tiny, max_kv_size=16)
    before = chat.stats
    list(chat.retry())
    assert before is not None and chat.stats is not None
    assert chat.stats.cached_tokens == before.cached_tokens > 80
    plain = chats(tiny, SAID * 2, max_kv_size=16, template="plain", temp=0.5, seed=2)
    assert plain.stats is not None and plain.stats.cached_tokens > 40
    assert plain.stats.prompt_tokens - plain.stats.cached_tokens < 24 + 10  # the last answer, and the message


def test_going_back_keeps_what_is_still_true(tiny: Any) -> None:
    chat = chats(tiny)
    answers = [message["content"] for message in chat.messages[1::2]]
    whole = chat.stats
    chat.undo()
    assert [message["content"] for message in chat.messages[::2]] == list(SAID[:3])
    assert answer(chat, SAID[3]) == answers[3]
    assert chat.stats is not None and whole is not None
    assert (chat.stats.prompt_tokens, chat.stats.cached_tokens) == (whole.prompt_tokens, whole.prompt_tokens - 1)
    assert "".join(piece.text for piece in chat.retry()) == answers[3]
    assert chat.stats.cached_tokens == whole.prompt_tokens - 1
    chat.reset()
    assert answer(chat, SAID[0]) == answers[0]
    with pytest.raises(RequestError, match="no message"):
        chat.reset()
        next(chat.retry())
    with pytest.raises(RequestError, match="no message"):
        chat.undo()


def test_a_seed_gives_a_conversation_and_another_answer_when_tried_again(tiny: Any) -> None:
    texts = []
    for _ in range(2):
        chat = chats(tiny, SAID[:2], temp=1.5, seed=7)
        texts.append([message["content"] for message in chat.messages])
        assert chat.stats is not None and chat.stats.seed == 8
    assert texts[0] == texts[1]
    assert "".join(piece.text for piece in chat.retry()) != texts[0][-1]
    model, tokenizer = tiny
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": SAID[0]}])
    assert texts[0][1] == generate(model, tokenizer, prompt, temp=1.5, seed=7, max_tokens=24)
    chat.options = GenerationOptions(temp=1.5, seed=8, max_tokens=24)  # as /stats showed it
    assert "".join(piece.text for piece in chat.retry()) == texts[0][-1]


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(tiny: Any, processed: list[int]) -> None:
    chat = chats(tiny, SAID[:1], logit_bias={2: -mx.inf}, max_tokens=40)
    pieces = chat.say(SAID[1])
    text = "".join(next(pieces).text for _ in range(5))
    pieces.close()
    assert chat.messages[-1]["content"] == text and chat.stats is not None and chat.stats.stopped
    processed.clear()
    answer(chat, SAID[2])
    assert chat.stats.prompt_tokens - chat.stats.cached_tokens < 30 and processed[0] < 30


@pytest.mark.parametrize("drafts", [False, True])
def test_a_stop_within_the_prompt_takes_the_message_back(tiny: Any, draft: OpenELM, drafts: bool) -> None:
    chat = chats(tiny, SAID[:1], prefill_step_size=8, draft_model=draft if drafts else None)

    def stop(done: int, total: int) -> None:
        if done >= 8:
            raise StopAnswerError

    with pytest.raises(StopAnswerError):
        list(chat.say("a long message " * 10, stop))
    assert len(chat.messages) == 2
    assert answer(chat, SAID[1]) == answer(chats(tiny, SAID[:1]), SAID[1])


def test_an_interrupt_in_the_middle_of_a_step_costs_only_the_cache(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chats(tiny, SAID[:2])
    expected = answer(chats(tiny, SAID[:2]), SAID[2])
    whole = OpenELM.hidden_states

    def interrupted(self: OpenELM, tokens: Any, cache: Any = None, **named: Any) -> Any:
        for layer in cache[:2]:  # some layers have seen the tokens, others have not
            layer.offset += tokens.shape[1]
        raise KeyboardInterrupt

    monkeypatch.setattr(OpenELM, "hidden_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(chat, SAID[2])
    monkeypatch.setattr(OpenELM, "hidden_states", whole)
    assert len(chat.messages) == 4 and answer(chat, SAID[2]) == expected
    assert chat.stats is not None and chat.stats.cached_tokens == 0


def test_a_failure_leaves_the_conversation_as_it_was(tiny: Any, tmp_path: Path) -> None:
    chat = chats(tiny, SAID[:1])
    messages = list(chat.messages)
    for text, reason in (("", "The message is empty"), ("word " * 2000, "The prompt is too long")):
        with pytest.raises(RequestError, match=reason):
            list(chat.say(text))
        assert chat.messages == messages
    with pytest.raises(RequestError, match="--temp|temp must"):
        chat.options = GenerationOptions(temp=-1)
    with pytest.raises(RequestError, match="Message 0"):
        chat.load([{"role": "user"}])
    strict = tmp_path / "strict.jinja"
    strict.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    refusing = chats(tiny, ("a",), template=strict)
    refusing.system = "x"
    with pytest.raises(RequestError, match="no system"):
        list(refusing.say("b"))
    with pytest.raises(RequestError, match="no system"):
        list(refusing.retry())
    refusing.system = None
    assert [message["content"] for message in refusing.messages[::2]] == ["a"]
    assert answer(chat, SAID[1]) == answer(chats(tiny, SAID[:1]), SAID[1])


def test_a_long_conversation_leaves_out_its_oldest_exchanges(tiny: Any, processed: list[int]) -> None:
    """The system prompt and all that is left are seen; the next turns process only what is new again."""
    model, tokenizer = tiny
    chat = Conversation(model, tokenizer, system="Be brief.", options=GenerationOptions(max_tokens=24))
    lengths, dropped = [], []
    for number in range(24):
        processed.clear()
        answer(chat, f"Question {number}: who is there?")
        assert chat.stats is not None
        lengths.append(chat.stats.prompt_tokens)
        if chat.left_out > (dropped[-1] if dropped else 0):
            dropped.append(chat.left_out)
            seen = [{"role": "system", "content": "Be brief."}, *chat.messages[chat.left_out : -1]]
            assert lengths[-1] == len(tokenizer.apply_chat_template(seen)) < 256 + 60
        elif number:
            assert sum(processed) < 60 + 24
    assert 2 <= len(dropped) <= 5 and max(lengths) <= 512 - 24
    assert len(chat.messages) == 48  # all of them are saved
    chat.reset()
    answer(chat, SAID[0])
    assert chat.left_out == 0


def test_a_message_beyond_the_context_alone_is_answered_with_a_warning(tiny: Any) -> None:
    chat = chats(tiny, SAID[:2], max_tokens=4)
    with pytest.warns(UserWarning, match="more than the 512"):
        answer(chat, "word " * 520)
    assert chat.left_out == 4 and len(chat.messages) == 6


def test_the_default_template_is_the_folders_own_else_plain(tiny: Any) -> None:
    assert chats(tiny, ()).template == "own"
    assert chats(load("tiny"), ()).template == "plain"
    plain = Conversation(*load("tiny"), options=GenerationOptions(max_tokens=4))
    assert answer(plain, "ROMEO.") == generate(*load("tiny"), "ROMEO.", max_tokens=4)


def test_the_folders_own_template_by_name(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny[1]
    messages = [{"role": "user", "content": SAID[0]}]
    ids = tokenizer.apply_chat_template(messages, "corenet")  # which is what the folder has
    assert tokenizer.apply_chat_template(messages, "own") == ids
    prompt = ["generate", "--prompt", SAID[0], "--max-tokens", "1", "--json"]
    own = ["--chat-template", "own"]
    plain, bare = (tokenizer.apply_chat_template(messages, "plain"), tokenizer.encode(SAID[0]))
    for flags, expected in (
        ([], ids),  # the model's own, as in a chat
        (own, ids),
        (["--chat-template", "plain"], plain),
        (["--ignore-chat-template"], bare),
    ):
        with pytest.raises(SystemExit):
            main([*prompt, *flags, "--model", "tiny-instruct"])
        assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(expected)
    with pytest.raises(SystemExit, match="^2$"):
        main([*prompt, *own])  # `tiny`
    assert "no chat template of its own; give plain, corenet or a file" in capsys.readouterr().err


def test_text_cut_at_a_stop_string_is_what_the_next_turn_sees(tiny: Any) -> None:
    model, tokenizer = tiny
    first = answer(chats(tiny, ()), SAID[0])
    stop = first[4:7]
    chat = chats(tiny, SAID[:1], stop=stop)
    assert chat.messages[-1]["content"] == first.partition(stop)[0]
    ids = tokenizer.apply_chat_template([*chat.messages, {"role": "user", "content": SAID[1]}])
    assert answer(chat, SAID[1]) == generate(model, tokenizer, ids, max_tokens=24, stop=stop)
    assert chat.stats is not None and chat.stats.prompt_tokens == len(ids)


def test_constraints_and_penalties_work_in_a_chat(tiny: Any) -> None:
    pytest.importorskip("llguidance")
    chat = chats(tiny, (), choice=["yes, my lord", "no, my lord"])
    assert {answer(chat, text) for text in SAID} <= {"yes, my lord", "no, my lord"}
    pieces = chat.say("again")
    next(pieces)
    pieces.close()  # tokens that were forced may have been processed already
    chat.options = GenerationOptions(max_tokens=24, repetition_penalty=1.3)
    ids = chat.tokenizer.apply_chat_template([*chat.messages, {"role": "user", "content": "why?"}])
    text = answer(chat, "why?")
    assert chat.stats is not None
    if chat.stats.prompt_tokens == len(ids):
        assert text == generate(*tiny, ids, max_tokens=24, repetition_penalty=1.3)


# Commands


def session_of(tiny: Any) -> Session:
    return Session(chats(load("tiny-instruct"), ()), "tiny-instruct")


def told(capsys: pytest.CaptureFixture[str], session: Session, text: str) -> str:
    def show(message: str | None) -> None:
        chat = session.conversation
        list(chat.retry() if message is None else chat.say(message))

    obey(session, text, show)
    return capsys.readouterr().err


@pytest.mark.parametrize("text", ["/undo", " /set temp 1", "/save a\nb", "/SAVE x", "/nothing"])
def test_commands(text: str) -> None:
    assert is_command(text)


@pytest.mark.parametrize("text", ["/usr/bin", "//undo", "/", "a /undo", "/2", ""])
def test_messages_that_begin_with_a_slash(text: str) -> None:
    assert not is_command(text)


def test_conversations_are_saved_and_loaded(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = session_of(tiny)
    with pytest.raises(RequestError, match="nothing to save"):
        told(capsys, session, "/save talk")
    told(capsys, session, "/system Speak plainly.")
    answer(session.conversation, SAID[0])
    messages = session.conversation.all_messages()
    assert told(capsys, session, "/save 'my talk'") == "Saved 2 messages to my talk.json.\n"
    assert json.loads(Path("my talk.json").read_text()) == {"messages": messages}
    answer(session.conversation, SAID[1])
    told(capsys, session, "/save")  # the same file, which is this conversation's
    Path("other.json").write_text("keep")
    with pytest.raises(RequestError, match=r"other.json exists; choose another name, or replace it with"):
        told(capsys, session, "/save other")
    assert Path("other.json").read_text() == "keep"
    told(capsys, session, "/save other --overwrite")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    fresh = session_of(tiny)
    assert told(capsys, fresh, "/load other") == "Loaded 4 messages from other.json.\n"
    assert fresh.conversation.system == "Speak plainly."
    assert answer(fresh.conversation, SAID[2]) == answer(session.conversation, SAID[2])
    # A bare list, that ends with a question
    Path("list.json").write_text(json.dumps(messages[1:2]))
    assert told(capsys, fresh, "/load list.json").endswith("; /retry answers the last one.\n")
    told(capsys, fresh, "/retry")
    assert fresh.conversation.system is None and len(fresh.conversation.messages) == 2
    for name, content, reason in (
        ("a", "{", "it is not JSON"),
        ("b", "[" * 100_000, "it is not JSON"),
        ("c", "{}", "no list of messages"),
        ("d", '{"messages": []}', "at least one"),
        ("e", '[{"role": "robot", "content": "x"}]', "role 'robot'"),
        ("f", '[{"role": "user", "content": 3}]', "must be text"),
    ):
        Path(f"{name}.json").write_text(content)
        with pytest.raises(RequestError, match=reason):
            told(capsys, fresh, f"/load {name}")
    with pytest.raises(RequestError, match="nowhere"):
        told(capsys, fresh, "/load nowhere")
    with pytest.raises(OpenELMError, match="folder"):
        Path("folder.json").mkdir()
        told(capsys, fresh, "/save folder --overwrite")
    assert len(fresh.conversation.messages) == 2  # as before all that


def test_settings_are_shown_and_changed(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    session = session_of(tiny)
    chat = session.conversation
    for text, shown in (
        ("/set temp 0.7", "temp: 0.7\n"),
        ("/set --top-p=0.9", "top-p: 0.9\n"),
        ("/set max_tokens 5", "max-tokens: 5\n"),
        ("/set stop no more", "stop: 'no more'\n"),
        ("/set kv-bits 8", "kv-bits: 8\n"),
        ("/set json-object on", "json-object: on\n"),
        ("/set json-object default", "json-object: off\n"),
        ("/set logit-bias 5=-inf", "logit-bias: {5: -inf}\n"),
        ("/set temp", "temp: 0.7\n"),
    ):
        assert told(capsys, session, text) == shown
    assert chat.options == GenerationOptions(
        temp=0.7, top_p=0.9, max_tokens=5, stop=("no more",), kv_bits=8, logit_bias={5: -mx.inf}
    )
    shown = told(capsys, session, "/set")
    assert "kv-bits: 8\n" in shown and "As by default: " in shown and "echo" not in shown
    before = chat.options
    for text, reason in (
        ("/set tmp 1", "did you mean temp"),
        ("/set temp hot", "must be a number"),
        ("/set temp -1", "between 0 and"),
        ("/set echo on", "There is no setting 'echo'"),
        ("/set max-kv-size 64", "cannot be combined"),
        ("/set num-draft-tokens 3", "draft.model"),
        ("/set max-tokens", ""),
    ):
        if reason:
            with pytest.raises(RequestError, match=reason):
                told(capsys, session, text)
        assert chat.options == before


def test_an_adapter_changes_the_answers_and_drops_the_cache(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_openelm import FineTuneOptions, finetune

    data = tmp_path / "data"
    data.mkdir()
    line = json.dumps({"messages": [{"role": "user", "content": SAID[0]}, {"role": "assistant", "content": "Ay."}]})
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text(line)
    options = FineTuneOptions(
        train=True, data=str(data), adapter_path=str(tmp_path / "ay"), iters=12, batch_size=1, learning_rate=5e-3
    )
    finetune("tiny-instruct", options)
    capsys.readouterr()
    session = session_of(tiny)
    chat = session.conversation
    before = answer(chat, SAID[0])
    assert told(capsys, session, f"/adapter {tmp_path / 'ay'}") == f"Adapter: {tmp_path / 'ay'}\n"
    told(capsys, session, "/retry")
    assert chat.messages[-1]["content"] == "Ay." != before
    assert chat.stats is not None and chat.stats.cached_tokens == 0
    with pytest.raises(RequestError, match="nothing"):
        told(capsys, session, "/adapter nothing")
    told(capsys, session, f"/adapter {tmp_path / 'ay'}")  # again, such as after more training
    told(capsys, session, "/retry")
    assert chat.messages[-1]["content"] == "Ay."
    told(capsys, session, f"/adapter {tmp_path / 'ay'}=0.0001")
    told(capsys, session, "/retry")
    assert chat.messages[-1]["content"] == before
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{SAID[0]}\n".encode())))
    with pytest.raises(SystemExit, match="^0$"):
        main(["chat", "--adapter-path", str(tmp_path / "ay")])
    assert capsys.readouterr().out == "Ay.\n"
    assert told(capsys, session, "/adapter none") == "Adapter: none\n"
    told(capsys, session, "/retry")
    assert chat.messages[-1]["content"] == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("/undone", "did you mean /undo"),
        ("/xyz", "/help lists them"),
        ("/reset now", "takes no argument"),
        ("/load", "Give one file"),
        ("/load 'a", "cannot be read"),
        ("/save a b", "Give one file"),
        ("/undo", "no message"),
    ],
)
def test_a_wrong_command_says_what_to_do(tiny: Any, capsys: pytest.CaptureFixture[str], text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        told(capsys, session_of(tiny), text)


def test_help_names_every_command(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, session_of(tiny), "/help")
    for name in ("reset", "undo", "retry", "save", "load", "system", "set", "stats", "adapter", "help", "exit"):
        assert f"/{name}" in shown


def test_completion(tmp_path: Path) -> None:
    (tmp_path / "talk.json").touch()
    assert complete("/s") == ["/system ", "/set ", "/save ", "/stats "]
    assert complete("/set top") == ["top-p ", "top-k "]
    assert complete(f"/load {tmp_path}/ta") == [f"{tmp_path}/talk.json "]
    assert complete("hello /s") == complete("/load /nowhere/x") == []


# Input


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["plain"], "plain"),
        (["a\\", "b\\", "c"], "a\nb\nc"),
        (['"""a"""'], "a"),
        (['"""', "a", '  b"""'], "a\n  b"),
        (['"""a', "b"], "a\nb"),  # the input ends
        (['/system """a', 'b"""'], "/system a\nb"),
        (['say """this"""'], 'say """this"""'),
        (['"""doc"""\ndef f(): ...'], '"""doc"""\ndef f(): ...'),  # pasted
        (['"""one """ two', '"""'], 'one """ two'),
    ],
)
def test_messages_of_several_lines(lines: list[str], message: str) -> None:
    given = iter(lines)
    assert _whole(lambda prompt: next(given, None)) == message
    assert next(given, None) is None


def test_the_history_is_bounded_and_survives_damage(tmp_path: Path) -> None:
    file = tmp_path / "state" / "history.jsonl"
    assert read_history(file) == []
    append_history(file, "one\ntwo")
    with file.open("ab") as stream:
        stream.write(b'{"not": "text"}\n\xff\n"cut of')
    append_history(file, "lost with the cut line")
    append_history(file, "three")
    assert read_history(file) == ["one\ntwo", "three"]
    for number in range(2 * HISTORY_LENGTH):
        append_history(file, str(number))
    assert read_history(file)[-1] == str(2 * HISTORY_LENGTH - 1)
    assert len(file.read_text().splitlines()) == HISTORY_LENGTH and file.stat().st_mode & 0o777 == 0o600
    append_history(tmp_path / "state" / "history.jsonl" / "no-folder", "x")  # nothing happens
