"""The bundled calibration text: well-formed, varied, and disjoint from the text we measure on."""

import importlib.resources
import json
from collections import Counter
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
PLAYS, OWN = "Shakespeare: ", "written for this project: "


def calibration_text() -> str:
    return (importlib.resources.files("mlx_openelm") / "assets" / "calibration.jsonl").read_text("utf-8")


def documents() -> list[dict[str, str]]:
    return [json.loads(line) for line in calibration_text().splitlines()]


def one_line(text: str) -> str:
    """Normalize whitespace, so that layout does not hide a copied passage."""
    return " ".join(text.split())


def held_out_pieces(length: int) -> set[str]:
    """Every run of `length` characters in the validation documents of the fixtures."""
    pieces = set()
    for path in FIXTURES.rglob("*valid*.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            text = one_line(json.loads(line)["text"])
            pieces.update(text[start : start + length] for start in range(len(text) - length + 1))
    return pieces


def shares_a_piece(text: str, pieces: set[str], length: int) -> bool:
    text = one_line(text)
    return any(text[start : start + length] in pieces for start in range(len(text) - length + 1))


def test_every_line_is_a_document_with_text_and_source():
    text = calibration_text()
    assert text.endswith("}\n")
    assert "\\u" not in text  # written as UTF-8, not as escapes
    for document in documents():
        assert sorted(document) == ["source", "text"]
        assert document["text"] == document["text"].strip("\n")
        assert 800 <= len(document["text"].encode()) <= 6000, document["source"]
        assert document["source"].startswith((PLAYS, OWN)), document["source"]


def test_it_is_large_enough_to_calibrate_and_small_enough_to_ship():
    assert 100_000 <= sum(len(document["text"].encode()) for document in documents()) <= 200_000
    assert len(calibration_text().encode()) <= 200_000


def test_no_document_occurs_twice():
    counts = Counter(document["source"] for document in documents())
    assert max(counts.values()) == 1, counts.most_common(3)
    # A passage repeated in two documents would count double in every statistic.
    seen: set[str] = set()
    for document in documents():
        text = one_line(document["text"])
        pieces = {text[start : start + 100] for start in range(len(text) - 99)}
        assert not pieces & seen, document["source"]
        seen |= pieces


def test_any_long_prefix_mixes_plays_and_other_text():
    sizes = {PLAYS: 0, OWN: 0}
    for document in documents():
        kind = next(kind for kind in sizes if document["source"].startswith(kind))
        sizes[kind] += len(document["text"])
        if sum(sizes.values()) >= 20_000:
            assert 0.35 <= sizes[PLAYS] / sum(sizes.values()) <= 0.65


def test_it_contains_code_other_languages_and_numbers():
    text = "\n".join(document["text"] for document in documents())
    code = ["def ", "#include", "const ", "SELECT ", "<!DOCTYPE html>", '{"', "| "]
    for sign in [*code, "https://", "°C", "ß", "ç", "ñ", "ã"]:
        assert sign in text, sign


def test_held_out_text_is_not_in_it():
    pieces = held_out_pieces(200)
    assert len(pieces) > 50_000  # the validation play exists
    for document in documents():
        assert not shares_a_piece(document["text"], pieces, 200), document["source"]


def test_a_held_out_passage_is_detected():
    line = (FIXTURES / "valid.jsonl").read_text("utf-8").splitlines()[2]
    passage = json.loads(line)["text"][300:800]
    contaminated = documents()[0]["text"] + "\n  " + passage.replace("\n", "\n\n   ")
    assert shares_a_piece(contaminated, held_out_pieces(200), 200)
