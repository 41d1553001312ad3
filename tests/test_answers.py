"""The file of answers: what a killed run leaves is used, and never asked again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.harness.answers import Answers

import pytest


def test_answers_are_kept_by_setting_method_arguments_and_repeat(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    with Answers({"model": "a"}, path) as answers:
        key = answers.key("loglikelihood", ("To be", " or not"))
        others = [
            answers.key("generate_until", ("To be", " or not")),
            answers.key("loglikelihood", ("To be ", "or not")),
            answers.key("loglikelihood", ("To be", " or not"), 1),
            Answers({"model": "b"}).key("loglikelihood", ("To be", " or not")),
        ]
        assert len({key, *others}) == 5
        answers.add({key: [-1.25, True]})
    with Answers({"model": "a"}, path) as answers:
        assert answers.get(key) == [-1.25, True]
        assert answers.get(others[0]) is None


@pytest.mark.parametrize("end", ['{"key": "b", "ans', '{"key": "b"', "", "{}\n", "\x00\x00\n"])
def test_a_damaged_last_line_is_dropped(tmp_path, end):
    path = tmp_path / "answers.jsonl"
    whole = '{"key": "a", "answer": 1}\n'
    path.write_text(whole + end)
    with Answers({}, path) as answers:
        assert answers.get("a") == 1
        assert path.read_text() == whole
        answers.add({"c": 2})
    assert path.read_text() == whole + '{"key": "c", "answer": 2}\n'


def test_other_files_and_files_in_use_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('no answer\n{"key": "a", "answer": 1}\n')
    with pytest.raises(RequestError, match="answers.jsonl, line 1, is no answer"):
        Answers({}, path)
    assert path.read_text().startswith("no answer")
    path.write_text("")
    with Answers({}, path), pytest.raises(RequestError, match="in use by another run"):
        Answers({}, path)
    Answers({}, path).close()
    with pytest.raises(RequestError, match="cannot be opened"):
        Answers({}, tmp_path)


def test_every_answer_survives_kill_9(tmp_path):
    path = tmp_path / "answers.jsonl"
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from mlx_openelm.harness.answers import Answers

        answers = Answers({}, Path(sys.argv[1]))
        for number in range(1000):
            answers.add({f"key {number}": number})
            if number == 500:
                print("ready", flush=True)
                sys.stdin.read()
        """
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        os.kill(process.pid, signal.SIGKILL)
    with Answers({}, path) as answers:
        assert [answers.get(f"key {number}") for number in range(502)] == [*range(501), None]


def test_what_does_not_fit_on_the_disk_ends_the_run(tmp_path):
    """A write may take a part, after which nothing may follow."""

    class Full:
        def write(self, content: bytes) -> int:
            return len(content) // 2

    answers = Answers({})
    answers.path, answers._file = tmp_path / "answers.jsonl", Full()
    with pytest.raises(OpenELMError, match="answers.jsonl cannot be written: the disk is full"):
        answers.add({"key": 1})
