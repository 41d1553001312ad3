"""`mlx-openelm embed`: a vector for each text."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_openelm import load
from mlx_openelm.cli.main import main

import mlx.core as mx
import numpy as np
import pytest

TEXTS = ["ROMEO.\u2028O.\x0bO.\x85", "Enter a KING, with attendants. " * 20]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["embed", *words])
    output, messages = capsys.readouterr()
    return int(stop.value.code or 0), output, messages


def means(texts: list[str]) -> list[Any]:
    """Means of the hidden states of one call each."""
    model, tokenizer = load("tiny")
    return [np.array(model.hidden_states(mx.array([tokenizer.encode(text)]))[0]).mean(axis=0) for text in texts]


def test_vectors_are_means_of_hidden_states(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "texts"
    file.write_text("".join(f"{text}\n\n" for text in TEXTS))
    for words in (TEXTS, ["--text-file", str(file)]):
        code, output, _ = call(capsys, *words)
        assert code == 0
        found = [json.loads(line) for line in output.rstrip("\n").split("\n")]
        assert [one["text"] for one in found] == TEXTS
        assert found[1]["tokens"] == len(load("tiny")[1].encode(TEXTS[1])) > 64
        for one, mean in zip(found, means(TEXTS), strict=True):
            assert one["embedding"] == pytest.approx(mean.tolist(), abs=1e-3)


def test_dimensions_and_length(capsys: pytest.CaptureFixture[str]) -> None:
    _, output, _ = call(capsys, "ROMEO.", "--dimensions", "7", "--normalize")
    vector = json.loads(output)["embedding"]
    (mean,) = means(["ROMEO."])
    assert vector == pytest.approx((mean[:7] / np.linalg.norm(mean[:7])).tolist(), abs=1e-4)
    assert math.hypot(*vector) == pytest.approx(1)


def test_standard_input() -> None:
    command = [sys.executable, "-m", "mlx_openelm", "embed", "--dimensions", "2"]
    done = subprocess.run(command, input="a\nb\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2 and not done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--dimensions", "0"], "--dimensions must be from 1 to"),
        (["a", "--dimensions", "100000"], "--dimensions must be from 1 to"),
        (["a", "--text-file", "b"], "Give the texts once"),
        (["--text-file", "nothing"], "nothing does not exist"),
        ([""], "A text is empty"),
        (["word " * 5000], "and the model's context has"),
    ],
)
def test_wrong_texts_and_flags(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, output, messages = call(capsys, *words)
    assert code == 2 and not output and message in messages
