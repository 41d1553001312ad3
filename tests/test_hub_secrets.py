"""Messages of other programs, as they are shown: without secrets, and otherwise as they were."""

from __future__ import annotations

from mlx_openelm.hub.errors import _clean

import pytest

MIXED, SMALL = "AbCdEfGhIjKlMnOpQrStUvWxYz01234567", "abcdefghijklmnopqrstuvwxyzabcdefgh"


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_what_is_no_secret_stays(text: str) -> None:
    assert _clean(text) == text


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
def test_secrets_are_left_out(text: str, shown: str) -> None:
    assert _clean(text) == shown


def test_the_token_in_use_is_left_out_whatever_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "my-own-mirror-token")
    assert _clean("401 for my-own-mirror-token.") == "401 for ...."


def test_long_texts_cost_little_and_show_no_half_of_a_secret() -> None:
    for text in ("a" * 1_000_000, "a:" * 500_000, "word " * 397 + f"mine: hf_{MIXED}", "x" * 1990 + f" hf_{MIXED}"):
        shown = _clean(text)
        assert len(shown) <= 2010 and MIXED[:5] not in shown
