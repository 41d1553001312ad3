"""The chat page of the server, in Chromium: what its users do, and what it must not let happen."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server is not installed: pip install '.[serve]'")
from browser import chromium
from fake_api import PAGE, FakeAPI
from serve_processes import process

ATTACK = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
PHONE = {"width": 375, "height": 667}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def api() -> Iterator[FakeAPI]:
    with FakeAPI() as running:
        yield running


class Tab:
    """A page that was opened, and what went wrong on it."""

    def __init__(self, context: Any, url: str):
        self.page = context.new_page()
        self.page.set_default_timeout(20_000)
        self.problems: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.until("document.getElementById('model').length > 0")

    def until(self, expression: str, argument: object = None, seconds: float = 20.0) -> None:
        """Wait for a JavaScript expression to be true. Playwright's own function needs `eval`, which is forbidden."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression, argument):
            assert time.monotonic() < end, (expression, self.texts())
            self.page.wait_for_timeout(20)

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def say(self, text: str, answered: bool = True) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")
        if answered:
            self.wait_for_end()

    def wait_for_end(self) -> None:
        self.page.get_by_role("button", name="Send", exact=True).wait_for()

    def texts(self) -> list[str]:
        return self.page.locator("#messages .text").all_inner_texts()

    def set(self, label: str, value: str) -> None:
        self.page.get_by_role("button", name="Settings").click()
        self.page.get_by_label(label, exact=True).fill(value)
        self.page.get_by_role("button", name="Close").click()


@pytest.fixture
def tab(browser: Any, api: FakeAPI) -> Iterator[Tab]:
    context = browser.new_context(accept_downloads=True)
    opened = Tab(context, api.url)
    yield opened
    # What holds for every test: nothing is blocked by the policy, no error, nothing from elsewhere.
    assert opened.problems == []
    assert [url for url in opened.asked if not url.startswith((api.url, "data:", "blob:"))] == []
    assert set(api.paths) <= {"/", "/v1/models", "/v1/chat/completions", "/tokenize"}
    context.close()


# The file


def test_the_file_has_nothing_that_could_run_or_come_from_elsewhere() -> None:
    text = PAGE.read_text()
    assert len(re.findall(r"<(?:script|style)>", text)) == 2 == len(re.findall(r"<(?:script|style)\b", text))
    for forbidden in (
        *(
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "Function(",
            "srcdoc",
            "importScripts",
        ),
        *("http:", "https:", "//cdn", "@import", "url(", ' style="', "<iframe", "<object", "<base"),
    ):
        assert forbidden not in text, forbidden
    html = text[: text.index("<script>")]
    assert not re.search(r"\son\w+=", html.partition("-->")[2]) and "javascript:" not in text


# Talking


def test_an_answer_is_streamed_and_the_conversation_is_sent(tab: Tab, api: FakeAPI) -> None:
    api.pauses_after = 2
    tab.say("Good morrow!", answered=False)
    tab.until("document.querySelector('.assistant .text')?.textContent === 'Well met'")  # not yet all
    api.goes_on.set()
    tab.wait_for_end()
    assert tab.texts() == ["Good morrow!", "Well met, sir."]
    stats = tab.page.locator(".stats").inner_text()
    assert re.fullmatch(r"4 tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt of 9, 7 of them cached", stats), (
        stats
    )
    tab.say("Again")
    assert api.requests[-1] == {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "user", "content": "Good morrow!"},
            {"role": "assistant", "content": "Well met, sir."},
            {"role": "user", "content": "Again"},
        ],
    }


def test_stop_keeps_what_came(tab: Tab, api: FakeAPI) -> None:
    api.tokens, api.delay = [f"{n} " for n in range(200)], 0.05
    tab.say("Count", answered=False)
    tab.until("document.querySelector('.assistant .text')?.textContent.startsWith('0 1 2')")
    tab.page.get_by_role("button", name="Stop").click()
    tab.wait_for_end()
    shown = tab.texts()[1]
    assert shown.startswith("0 1 2") and "stopped" in tab.page.locator(".stats").inner_text()
    end = time.monotonic() + 20
    while not api.left:  # the server was left, not only the text
        assert time.monotonic() < end and api.sent < 200
        tab.page.wait_for_timeout(20)
    assert tab.texts()[1] == shown
    api.delay = 0.05
    tab.say("Again", answered=False)
    tab.page.get_by_role("button", name="Stop").wait_for()
    tab.until("document.querySelectorAll('.assistant')[1]?.innerText.includes('0 1')")
    tab.page.keyboard.press("Escape")
    tab.wait_for_end()
    assert api.requests[-1]["messages"][1]["content"] == shown


def test_edit_and_regenerate(tab: Tab, api: FakeAPI) -> None:
    tab.say("first")
    api.tokens = ["another"]
    tab.page.get_by_role("button", name="Regenerate answer").click()
    tab.wait_for_end()
    assert tab.texts() == ["first", "another"]
    assert [message["content"] for message in api.requests[-1]["messages"]] == ["first"]
    tab.say("second")
    tab.page.once("dialog", lambda dialog: dialog.accept())  # what follows is removed
    tab.page.get_by_role("button", name="Edit message").first.click()
    tab.page.get_by_label("Text", exact=True).fill("changed")
    api.tokens = ["third"]
    tab.page.get_by_role("button", name="Send", exact=True).first.click()
    tab.until("document.querySelector('.assistant .text')?.textContent === 'third'")
    assert tab.texts() == ["changed", "third"]
    tab.page.get_by_role("button", name="Edit answer").click()
    tab.page.get_by_label("Text", exact=True).fill("put into its mouth")
    tab.page.get_by_role("button", name="Save").click()
    tab.say("next")
    assert [message["content"] for message in api.requests[-1]["messages"]] == ["changed", "put into its mouth", "next"]
    tab.page.get_by_role("button", name="Edit message").last.click()
    tab.page.keyboard.press("Escape")
    assert tab.texts()[2:] == ["next", "third"]


def test_conversations_stay_after_a_reload_and_are_exported(tab: Tab, api: FakeAPI, tmp_path: Path) -> None:
    tab.set("System prompt", "Speak plainly.")
    tab.say("one")
    tab.page.get_by_role("button", name="New conversation").click()
    assert tab.texts() == []
    tab.say("two")
    assert [message["content"] for message in api.requests[-1]["messages"]] == ["two"]
    tab.page.get_by_label("Title of the conversation").fill("A/second: talk")
    tab.page.reload()
    tab.page.get_by_role("button", name="one", exact=True).click()
    assert tab.texts() == ["one", "Well met, sir."]
    assert "4 tokens" in tab.page.locator(".stats").inner_text()
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Export", exact=True).click()
    file = tmp_path / "one.json"
    download.value.save_as(file)
    assert download.value.suggested_filename == "one.json"
    messages = [
        {"role": "system", "content": "Speak plainly."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Well met, sir."},
    ]
    assert json.loads(file.read_text())["messages"] == messages
    from mlx_openelm.generation.chat_files import load_messages

    assert load_messages(file)[0] == messages  # /load of `mlx-openelm chat`
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Export all").click()
    download.value.save_as(tmp_path / "all.json")
    both = json.loads((tmp_path / "all.json").read_text())["conversations"]
    assert {one["title"] for one in both} == {"one", "A/second: talk"}
    tab.page.once("dialog", lambda dialog: dialog.accept())
    tab.page.get_by_role("button", name="Delete").click()
    tab.page.reload()
    assert tab.page.locator("#list button").all_inner_texts() == ["A/second: talk"]
    tab.page.locator("#file").set_input_files(file)
    tab.until("document.querySelectorAll('#list button').length === 2")
    assert tab.texts() == ["one", "Well met, sir."]
    tab.say("more")
    assert api.requests[-1]["messages"][0] == messages[0]
    bad = tmp_path / "bad.json"
    bad.write_text('{"messages": [{"role": "user"}]}')
    tab.page.locator("#file").set_input_files(bad)
    tab.page.get_by_role("alert").get_by_text("bad.json has no conversation").wait_for()


def test_an_answer_goes_on_while_another_conversation_is_shown(tab: Tab, api: FakeAPI) -> None:
    api.delay = 0.1
    tab.say("first", answered=False)
    tab.until("document.querySelector('.assistant .text')?.textContent.startsWith('Well')")
    tab.page.get_by_role("button", name="New conversation").click()
    tab.wait_for_end()
    assert tab.texts() == []
    tab.page.get_by_role("button", name="first", exact=True).click()
    assert tab.texts() == ["first", "Well met, sir."]


def test_what_another_tab_writes_is_shown_and_disturbs_nothing(tab: Tab, api: FakeAPI) -> None:
    tab.say("one")
    other = Tab(tab.page.context, api.url)
    tab.page.get_by_role("button", name="Edit").first.click()
    area = tab.page.get_by_role("textbox", name="Text", exact=True)
    area.fill("one, edited")
    other.say("two")  # in the same conversation, the last one that was open
    other.page.get_by_role("button", name="New conversation").click()
    other.say("elsewhere")
    tab.page.get_by_role("button", name="elsewhere", exact=True).wait_for()
    assert area.input_value() == "one, edited"
    tab.page.get_by_role("button", name="Cancel").click()
    assert tab.texts() == ["one", "Well met, sir.", "two", "Well met, sir."]
    other.page.get_by_role("button", name="one", exact=True).click()
    other.say("three")
    tab.until("document.querySelectorAll('#messages .text').length === 6")
    other.page.once("dialog", lambda dialog: dialog.accept())
    other.page.get_by_role("button", name="Delete").click()
    tab.page.get_by_role("button", name="one", exact=True).wait_for(state="detached")
    assert tab.texts() == ["elsewhere", "Well met, sir."] and other.problems == []


def test_damaged_storage_and_a_deleted_conversation_do_no_harm(tab: Tab, api: FakeAPI) -> None:
    tab.page.evaluate(
        """() => {
            for (const [id, value] of [["a", "{"], ["b", "3"], ["c", '{"messages": [1]}'], ["d", "null"]])
                localStorage.setItem(`mlx-openelm:chat:${id}`, value);
            localStorage.setItem("mlx-openelm:current", "{");
            localStorage.setItem("mlx-openelm:settings", '{"stop": 3, "temperature": [], "theme": "green"}');
        }"""
    )
    tab.page.reload()
    api.tokens, api.delay = ["x"] * 50, 0.05
    tab.say("gone", answered=False)
    tab.until("document.querySelector('.assistant .text')?.textContent.startsWith('xx')")
    tab.page.once("dialog", lambda dialog: dialog.accept())
    tab.page.get_by_role("button", name="Delete").click()
    tab.wait_for_end()
    assert tab.texts() == []
    tab.page.reload()
    assert tab.page.locator("#list button").all_inner_texts() == ["New"]


def test_without_room_in_the_browser_the_page_goes_on(tab: Tab, api: FakeAPI) -> None:
    tab.page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); }; }"
    )
    tab.say("hello")
    assert tab.texts() == ["hello", "Well met, sir."]
    assert "no room" in tab.page.get_by_role("alert").inner_text()
    tab.say("more")
    assert len(api.requests[-1]["messages"]) == 3


def test_two_tabs_do_not_overwrite_each_other(tab: Tab, api: FakeAPI) -> None:
    tab.say("one")
    other = Tab(tab.page.context, api.url)
    other.page.get_by_role("button", name="New conversation").click()
    other.say("two")
    tab.page.locator("#list button", has_text="two").wait_for()
    assert tab.texts() == ["one", "Well met, sir."]
    tab.say("three")
    other.page.reload()
    assert sorted(other.page.locator("#list button").all_inner_texts()) == ["one", "two"]
    other.page.get_by_role("button", name="one", exact=True).click()
    assert other.texts()[2] == "three"


# Settings


def test_settings_are_explained_sent_and_kept(tab: Tab, api: FakeAPI) -> None:
    tab.page.get_by_role("button", name="Settings").click()
    for label, value in (
        ("Temperature", "0.7"),
        ("Longest answer", "64"),
        ("Top-p", "0.9"),
        ("Top-k", "40"),
        ("Min-p", "0.05"),
        ("Repetition penalty", "1.2"),
        ("Presence penalty", "0.5"),
        ("Frequency penalty", "0.25"),
        ("Seed", "7"),
        ("Stop at", "ROMEO\nJULIET"),
        ("System prompt", "Be brief."),
    ):
        field = tab.page.get_by_label(label, exact=True)
        field.fill(value)
        described = field.get_attribute("aria-describedby").split()[0]
        assert len(tab.page.locator(f"#{described}").inner_text()) > 20
    tab.page.get_by_label("Temperature", exact=True).fill("3")
    tab.page.keyboard.press("Tab")
    assert tab.page.get_by_label("Temperature", exact=True).get_attribute("aria-invalid") == "true"
    assert "2" in tab.page.locator("#setting-temperature-wrong").inner_text()
    tab.page.keyboard.press("Escape")  # closes the settings
    tab.page.reload()
    tab.until("document.getElementById('model').length > 0")
    tab.say("hello")
    sent = api.requests[-1]
    expected = {
        **{"temperature": 0.7, "max_tokens": 64, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.2},
        **{"presence_penalty": 0.5, "frequency_penalty": 0.25, "seed": 7, "stop": ["ROMEO", "JULIET"]},
    }
    assert {name: sent[name] for name in expected} == expected
    tab.set("Temperature", "")
    tab.say("again")
    assert "temperature" not in api.requests[-1]
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.get_by_role("button", name="Back to the defaults").click()
    tab.page.get_by_role("button", name="Close").click()
    tab.say("again")
    assert set(api.requests[-1]) == {"model", "stream", "stream_options", "messages"}


def test_models_and_adapters_are_chosen(tab: Tab, api: FakeAPI) -> None:
    model, adapter = tab.page.get_by_label("Model", exact=True), tab.page.get_by_label("Adapter", exact=True)
    assert model.locator("option").all_inner_texts() == ["tiny", "other"]
    assert adapter.locator("option").all_inner_texts() == ["none", "polite", "rude"]
    adapter.select_option("rude")
    tab.say("hello")
    assert api.requests[-1]["model"] == "tiny:rude"
    model.select_option("other")
    assert not adapter.is_visible()
    tab.page.reload()
    tab.until("document.getElementById('model').length > 0")
    tab.say("hello")
    assert api.requests[-1]["model"] == "other"


def test_a_json_schema_is_checked_and_sent(tab: Tab, api: FakeAPI) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    tab.page.get_by_role("button", name="Settings").click()
    field = tab.page.get_by_label("JSON schema", exact=True)
    for text, problem in (("{'a'", "This is not JSON"), ("[1]", "A schema is an object.")):
        field.fill(text)
        tab.page.keyboard.press("Tab")
        assert problem in tab.page.locator("#setting-response_format-wrong").inner_text()
    field.fill(json.dumps(schema))
    tab.page.get_by_role("button", name="Close").click()
    tab.say("hello")
    assert api.requests[-1]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema},
    }


def test_log_probabilities_on_hover_and_by_keyboard(tab: Tab, api: FakeAPI) -> None:
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.get_by_label("Log-probabilities", exact=True).check()
    tab.page.get_by_role("button", name="Close").click()
    tab.say("hello")
    assert (api.requests[-1]["logprobs"], api.requests[-1]["top_logprobs"]) == (True, 5)
    assert tab.texts()[1] == "Well met, sir."
    tip = tab.page.get_by_role("tooltip")
    tab.page.locator(".token").nth(1).hover()
    assert tip.inner_text().splitlines()[:2] == ['" met" 75.0 %', "log-probability -0.288"]
    assert '"<b>"' in tip.inner_text() and "20.0 %" in tip.inner_text()
    tab.page.get_by_label("Message", exact=True).hover()
    assert not tip.is_visible()
    tab.page.locator(".assistant .text").focus()
    for text in ("Well", " met", ", sir"):
        tab.page.keyboard.press("ArrowRight")
        tab.until("text => document.getElementById('tip').innerText.startsWith(text)", f'"{text}"')
    tab.page.keyboard.press("ArrowLeft")
    tab.until("document.getElementById('status').textContent.startsWith('\" met\" 75.0 %')")


def test_an_api_key_is_sent_and_not_kept_with_the_conversations(tab: Tab, api: FakeAPI) -> None:
    api.key = "secret-key"
    tab.say("hello")
    assert "The API key is missing or wrong. Enter it in the settings." in tab.page.get_by_role("alert").inner_text()
    tab.set("API key", "secret-key")
    tab.page.get_by_role("button", name="Try again").wait_for(state="detached")
    tab.page.get_by_role("button", name="Edit message").click()
    tab.page.keyboard.press("Control+Enter")
    tab.page.locator(".assistant .stats", has_text="prompt of").wait_for()
    assert tab.texts() == ["hello", "Well met, sir."]
    assert "secret-key" not in tab.page.evaluate("JSON.stringify(localStorage)")


# Failures


def test_errors_say_what_to_do_and_can_be_tried_again(tab: Tab, api: FakeAPI) -> None:
    api.status, api.error, api.headers = 429, "The queue is full.", {"Retry-After": "3"}
    tab.say("hello")
    alert = tab.page.get_by_role("alert")
    assert alert.inner_text().startswith("The queue is full. Try again in 3 seconds.")
    assert tab.texts() == ["hello"]
    api.status = 200
    tab.page.get_by_role("button", name="Try again").click()
    tab.page.locator(".assistant .stats", has_text="prompt of").wait_for()
    assert tab.texts() == ["hello", "Well met, sir."] and alert.inner_text() == ""
    api.breaks_after = 2
    tab.say("more")
    assert "ended the answer too early" in alert.inner_text() and tab.texts()[-1] == "Well met"


def test_an_error_is_shown_with_its_own_conversation(tab: Tab, api: FakeAPI) -> None:
    api.delay, api.breaks_after = 0.2, 3
    tab.say("first", answered=False)
    tab.until("document.querySelector('.assistant .text')?.textContent.startsWith('Well')")
    new, first = (tab.page.get_by_role("button", name=name, exact=True) for name in ("New conversation", "first"))
    new.click()
    tab.wait_for_end()
    alert = tab.page.get_by_role("alert")
    assert alert.inner_text() == ""
    for _ in range(2):  # it stays until the conversation goes on
        first.click()
        assert "ended the answer too early" in alert.inner_text()
        new.click()
        assert alert.inner_text() == ""
    first.click()
    api.delay, api.breaks_after = 0.1, None
    new.click()
    tab.say("second", answered=False)
    first.click()
    again = tab.page.get_by_role("button", name="Try again")
    assert again.is_disabled()  # while another conversation is answered
    tab.wait_for_end()
    assert again.is_enabled()
    api.delay = 0
    tab.page.get_by_role("button", name="Try again").click()
    tab.page.locator(".assistant .stats", has_text="prompt of").wait_for()
    assert tab.texts() == ["first", "Well met, sir."] and alert.inner_text() == ""


def test_a_long_conversation_leaves_out_its_oldest_exchanges(tab: Tab, api: FakeAPI) -> None:
    """As on the terminal: until half of the context is free, and a line says where the model's view begins."""
    api.context = 6
    for text in ("one", "two", "three"):
        tab.say(text)
    note = tab.page.locator(".left-out")
    assert note.count() == 0
    tab.say("four")
    sent = [message["content"] for message in api.requests[-1]["messages"]]
    assert sent == ["three", "Well met, sir.", "four"] and len(tab.texts()) == 8
    assert "does not see the messages above" in note.inner_text()
    assert tab.page.locator("#messages > li").nth(4).locator(".left-out").count() == 1
    count = len(api.requests)
    tab.say("five")  # it goes on from there
    assert len(api.requests) == count + 1 and api.requests[-1]["messages"][0]["content"] == "three"
    tab.page.get_by_label("Model", exact=True).select_option("other")  # whose context may be longer
    assert note.count() == 0
    api.context = 1
    tab.say("six")
    assert [message["content"] for message in api.requests[-1]["messages"]] == ["six"] and note.count() == 1
    api.context = 0
    tab.say("seven")
    assert tab.page.get_by_role("alert").inner_text().startswith("messages has too many tokens.")
    assert tab.texts()[-1] == "seven"


def test_a_server_that_is_gone(tab: Tab, api: FakeAPI) -> None:
    tab.page.route("**/v1/chat/completions", lambda route: route.abort())
    tab.say("hello")
    assert "The server cannot be reached" in tab.page.get_by_role("alert").inner_text()
    tab.problems.clear()  # the browser's own line about the failed request


# Safety


def test_what_is_written_is_text_and_never_runs(tab: Tab, api: FakeAPI, tmp_path: Path) -> None:
    api.tokens, api.models = [ATTACK[:20], ATTACK[20:]], [ATTACK]
    tab.page.reload()
    tab.until("document.getElementById('model').length > 0")
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.get_by_label("Log-probabilities", exact=True).check()
    tab.page.get_by_role("button", name="Close").click()
    tab.say(ATTACK)
    tab.page.get_by_label("Title of the conversation").fill(ATTACK)
    tab.page.locator(".token").first.hover()
    api.status, api.error = 400, ATTACK
    tab.say("again")
    tab.page.reload()
    api.status = 200
    assert tab.texts()[:2] == [ATTACK, ATTACK]
    assert tab.page.locator("img, iframe, #messages script, #list script").count() == 0
    assert tab.page.title() == f"{ATTACK} – mlx-openelm"
    file = tmp_path / "attack.json"
    file.write_text(json.dumps({"title": ATTACK, "messages": [{"role": "user", "content": ATTACK}]}))
    tab.page.locator("#file").set_input_files(file)
    tab.until("document.querySelectorAll('#list button').length === 2")
    assert tab.page.locator("img").count() == 0


def test_the_policy_stops_scripts_and_other_hosts(tab: Tab, api: FakeAPI) -> None:
    """The policy, not only the code: what an attacker would try is blocked."""
    blocked = tab.page.evaluate(
        """async () => {
            const seen = [];
            document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            const image = document.createElement("img");
            image.src = "http://127.0.0.1:1/x.png";
            document.body.append(image);
            await fetch("http://127.0.0.1:1/").catch(() => 0);
            await new Promise((done) => setTimeout(done, 200));
            return [window.ran ?? false, ...seen.sort()];
        }"""
    )
    assert blocked == [False, "connect-src", "img-src", "script-src-elem"]
    tab.problems.clear()
    tab.asked.clear()


# Looks, keyboard, screen readers


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG's contrast of two colors, https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio."""

    def luminance(color: list[int]) -> float:
        parts = [value / 255 for value in color]
        linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colors_can_be_read(tab: Tab) -> None:
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        check_colors(tab, scheme)
    for shown, scheme in (("light", "dark"), ("dark", "light")):
        tab.page.emulate_media(color_scheme=scheme)
        tab.page.get_by_role("button", name="Settings").click()
        tab.page.get_by_label("Appearance").select_option(shown)
        tab.page.reload()
        assert tab.page.evaluate("document.documentElement.dataset.theme") == shown


def check_colors(tab: Tab, scheme: str) -> None:
    tab.until("scheme => document.documentElement.dataset.theme === scheme", scheme)
    names = ["page", "panel", "text", "quiet", "accent", "on-accent", "mine", "bad", "p0", "p1", "p2", "p3"]
    found = tab.page.evaluate(
        "names => names.map((name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`))", names
    )
    colors = {
        name: [int(text.strip()[i : i + 2], 16) for i in (1, 3, 5)] for name, text in zip(names, found, strict=True)
    }
    assert (sum(colors["page"]) < 128) == (scheme == "dark")
    for front, backs in (
        ("text", ("page", "panel", "mine", "p0", "p1", "p2", "p3")),
        ("quiet", ("page", "panel")),
        ("bad", ("page",)),
        ("accent", ("page",)),
        ("on-accent", ("accent",)),
    ):
        for back in backs:
            assert contrast(colors[front], colors[back]) >= 4.5, (front, back)


def test_a_phone_shows_everything_without_scrolling_sideways(tab: Tab, api: FakeAPI) -> None:
    tab.page.set_viewport_size(PHONE)
    api.tokens = ["word " * 30, "x" * 300, "\n", "y" * 100]
    tab.page.reload()
    tab.until("document.getElementById('model').length > 0")

    def overflow() -> int:
        return tab.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    menu = tab.page.get_by_role("button", name="Conversations")
    assert menu.get_attribute("aria-expanded") == "false" and overflow() == 0
    tab.say("a" * 200)
    assert overflow() == 0
    for selector in ("#scroll", "#messages", "#bar", "#say", "header"):
        box = tab.page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 375, selector
        assert (
            tab.page.evaluate(
                "s => { const e = document.querySelector(s); return e.scrollWidth - e.clientWidth; }", selector
            )
            <= 0
        )
    menu.click()
    assert overflow() == 0 and tab.page.get_by_role("button", name="Export all").is_visible()
    tab.page.get_by_role("button", name="New conversation").click()
    assert menu.get_attribute("aria-expanded") == "false"
    tab.page.get_by_role("button", name="Settings").click()
    assert overflow() == 0
    dialog = tab.page.locator("#settings")
    assert dialog.evaluate("e => e.scrollWidth - e.clientWidth") <= 0
    tab.page.get_by_role("button", name="Close").click()


def test_everything_can_be_reached_and_used_with_the_keyboard(tab: Tab, api: FakeAPI) -> None:
    tab.say("hello")
    tab.page.locator(".skip").focus()
    seen = [tab.page.evaluate("document.activeElement.textContent")]
    for _ in range(30):
        tab.page.keyboard.press("Tab")
        seen.append(tab.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        if seen[-1] == "send":
            break
    for name in ("menu", "model", "adapter", "open-settings", "new", "export-all", "title", "delete", "input", "send"):
        assert name in seen, name
    assert {"Edit", "Regenerate"} <= set(seen) and seen[0] == "Skip to the message"
    tab.page.locator("#open-settings").focus()
    tab.page.keyboard.press("Enter")
    assert tab.page.locator("#settings").evaluate("e => e.open && e.contains(document.activeElement)")
    tab.page.keyboard.press("Escape")
    assert tab.page.evaluate("document.activeElement.id") == "open-settings"  # where one was
    tab.page.locator("#input").focus()
    tab.page.keyboard.type("two")
    tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("lines")
    tab.page.keyboard.press("Enter")
    tab.wait_for_end()
    assert api.requests[-1]["messages"][-1]["content"] == "two\nlines"


def test_a_screen_reader_gets_names_and_news(tab: Tab, api: FakeAPI) -> None:
    api.pauses_after = 1
    tab.say("hello", answered=False)
    tab.until("document.getElementById('status').textContent === 'The model answers.'")
    api.goes_on.set()
    tab.wait_for_end()
    status = tab.page.locator("#status")
    assert status.get_attribute("aria-live") == "polite"
    assert status.text_content() == "The model said: Well met, sir."
    tab.page.get_by_role("button", name="Settings").click()
    nameless = tab.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, a[href], dialog, nav, [role=group]")]
            .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()
                || document.getElementById(e.getAttribute("aria-labelledby"))))
            .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    ids = tab.page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    dangling = tab.page.evaluate(
        """() => ["aria-describedby", "aria-labelledby", "aria-controls"].flatMap((name) =>
            [...document.querySelectorAll(`[${name}]`)].flatMap((e) => e.getAttribute(name).split(" "))
                .filter((id) => !document.getElementById(id)))"""
    )
    assert dangling == []
    assert tab.page.evaluate("document.documentElement.lang") == "en"
    assert tab.page.locator("h1").count() == 1 and tab.page.locator("main").count() == 1
    small = tab.page.evaluate(
        """() => [...document.querySelectorAll("button")].map((e) => e.getBoundingClientRect())
            .filter((box) => box.width && (box.width < 24 || box.height < 24)).length"""
    )
    assert small == 0  # https://www.w3.org/TR/WCAG22/#target-size-minimum


# The true server


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server of `tiny-instruct`."""
    with process("--model", "tiny-instruct") as running:
        yield f"{running.url}/"


def test_the_true_server(browser: Any, server: str) -> None:
    """Everything at once, with answers that `generate` gives too."""
    pytest.importorskip("llguidance")
    from mlx_openelm import generate, load

    model, tokenizer = load("tiny-instruct")
    tab = Tab(browser.new_context(color_scheme="dark"), server)
    said = ("Good morrow!", "Who art thou?")
    messages = []
    for text in said:
        tab.say(text)
        messages.append({"role": "user", "content": text})
        answer = generate(model, tokenizer, tokenizer.apply_chat_template(messages))
        messages.append({"role": "assistant", "content": answer})
    assert tab.texts() == [message["content"] for message in messages]
    stats = tab.page.locator(".stats").last.inner_text()
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt of \d+", stats), stats
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.get_by_label("Log-probabilities", exact=True).check()
    schema = {
        "type": "object",
        "properties": {"ay": {"type": "boolean"}},
        "required": ["ay"],
        "additionalProperties": False,
    }
    tab.page.get_by_label("JSON schema", exact=True).fill(json.dumps(schema))
    tab.page.get_by_role("button", name="Close").click()
    tab.say("Is it so?")
    assert set(json.loads(tab.texts()[-1])) == {"ay"}
    tab.page.locator(".token").last.hover()
    assert "log-probability" in tab.page.get_by_role("tooltip").inner_text()
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.get_by_role("button", name="Back to the defaults").click()
    tab.page.get_by_label("Temperature", exact=True).fill("1.9")
    tab.page.get_by_label("Longest answer", exact=True).fill("900")
    tab.page.get_by_role("button", name="Close").click()
    tab.say("Speak long.", answered=False)
    tab.page.locator(".assistant .text").last.get_by_text(re.compile(r"\w")).wait_for()
    tab.page.keyboard.press("Escape")
    tab.wait_for_end()
    tab.say("x " * 2000)
    assert "shorten it" in tab.page.get_by_role("alert").inner_text()
    tab.page.reload()
    assert tab.texts()[:4] == [message["content"] for message in messages]
    assert tab.problems == [] and all(url.startswith((server, "data:")) for url in tab.asked)
