"""Messages of other programs are shown without secrets, and otherwise unchanged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.hub.errors import explain_upload, host

import pytest
from huggingface_hub.errors import HfHubHTTPError

MIXED, SMALL = "AbCdEfGhIjKlMnOpQrStUvWxYz01234567", "abcdefghijklmnopqrstuvwxyzabcdefgh"


def cleaned(text: str) -> str:
    """A message of the hub as shown to the user."""
    response: Any = SimpleNamespace(status_code=418, headers={}, request=None)
    answer = HfHubHTTPError("", response=response, server_message=text)
    shown = str(explain_upload(answer, "me/model", sending=False))
    start = f"{host()} refused the upload to me/model (HTTP 418): "
    assert shown.startswith(start)
    return shown.removeprefix(start)


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


@pytest.mark.parametrize(
    "text",
    [
        "install hf_transfer or hf_xet",
        "hf_hub_download and hf_raise_for_status failed, unset HF_HUB_ENABLE_HF_TRANSFER=1",
        "hf_model_7b of hf_s3 in hf_file_system",
        "HTTPSConnectionPool(host='huggingface.co', port=443): Read timed out.",
        "[Errno 110] Connection timed out: ('10.0.0.1', 443) at 12:30:45",
        "Bearer token is invalid, Basic authentication required, Authorization header missing",
        "Why? x = 3, tokenizer=llama, api_version 3",
    ],
)
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert cleaned(text) == str(OpenELMError(text))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"hf_{MIXED} is refused", "hf_... is refused"),
        (f"'hf_{SMALL}'", "'hf_...'"),
        ("hf_oauth_eyJhbGciOi.eyJzdWI.sig-x_y!", "hf_...!"),
        (f"api_org_{MIXED}, api_{SMALL}", "api_..., api_..."),
        (f"Authorization: Bearer {SMALL}", "Authorization: Bearer ..."),
        (f"{{'authorization': 'Bearer hf_{MIXED}'}}", "{'authorization': 'Bearer hf_...'}"),
        ("Authorization: Basic dXNlcjpwYXNzd29yZDEyMw==", "Authorization: Basic ..."),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.abc_d-e", "..."),
        ("https://me:secret@host/x?Signature=y and more", "the hub and more"),
        ("with url: /api/x?X-Amz-Signature=abc&token=def (Caused by", "with url: /api/x?... (Caused by"),
        ("proxy me:secret@proxy.corp:8080", "proxy ...@proxy.corp:8080"),
        (f"HF_TOKEN={SMALL}, password=x; access_token='y'", "HF_TOKEN=..., password=...; access_token='...'"),
        ("{'token': 'abc', \"password\": \"x\"}", "{'token': '...', \"password\": \"...\"}"),
    ],
)
def test_secrets_are_removed(text: str, shown: str) -> None:
    assert cleaned(text) == str(OpenELMError(shown))


def test_the_token_in_use_is_removed_whatever_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "my-own-mirror-token")
    assert cleaned("401 for my-own-mirror-token.") == "401 for ...."


def test_long_texts_are_cheap_and_show_no_part_of_a_secret() -> None:
    for text in ("a" * 1_000_000, "a:" * 500_000, "word " * 397 + f"mine: hf_{MIXED}", "x" * 1990 + f" hf_{MIXED}"):
        shown = cleaned(text)
        assert len(shown) <= 2010 and MIXED[:5] not in shown
