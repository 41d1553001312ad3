"""The folder `lora/`: its data, parsed independently of `make.py`, and the commands of its README, with `tiny`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, get_type_hints

from mlx_openelm import convert, load
from mlx_openelm.cli.main import PROGRAM, main
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.training.options import FineTuneOptions

import pytest
from processes import environment
from test_readme import blocks

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "lora"
SPLITS = ("train", "valid", "test")
SYMBOLS = {"$": "USD", "dollars": "USD", "€": "EUR", "euros": "EUR", "£": "GBP", "pounds": "GBP", "francs": "CHF"}
SYMBOLS |= {code: code for code in SYMBOLS.values()}
CATEGORIES = {"food", "transport", "office", "travel", "software", "utilities"}
DATES = {
    r"\d{4}-\d\d-\d\d": "%Y-%m-%d",
    r"\d{1,2} [A-Z][a-z]{3,} \d{4}": "%d %B %Y",
    r"[A-Z][a-z]+ \d{1,2}, \d{4}": "%B %d, %Y",
    r"[A-Z][a-z]{2} \d{1,2} \d{4}": "%b %d %Y",
    r"\d{1,2} [A-Z][a-z]{2} \d{4}": "%d %b %Y",
    r"\d{1,2} of [A-Z][a-z]+ \d{4}": "%d of %B %Y",
}


# The data.


def examples(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def read_note(note: str) -> dict[str, Any]:
    """Date, amount and currency of a note, found by regular expressions."""
    plain = re.sub(r"(\d)(st|nd|rd|th) of", r"\1 of", note)
    dates = set()
    for pattern, form in DATES.items():
        for found in re.findall(rf"(?<![\w-]){pattern}(?![\w-])", plain):
            try:
                dates.add(datetime.strptime(found, form).date().isoformat())
            except ValueError:
                continue  # a short month name where a long one is expected, or the reverse
    signs = "|".join(map(re.escape, SYMBOLS))
    amounts = re.findall(rf"({signs}) ?(\d+(?:\.\d\d)?)(?![\d-])|(?<![\d.])(\d+(?:\.\d\d)?) ({signs})\b", note)
    assert len(dates) == 1 and len(amounts) == 1, note
    before, first, second, after = amounts[0]
    return {"date": dates.pop(), "amount": float(first or second), "currency": SYMBOLS[before or after]}


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_matches_its_note(split: str) -> None:
    for example in examples(split):
        assert set(example) == {"prompt", "completion"}
        note = re.fullmatch(r"Note: (.+[.?]) JSON:", example["prompt"])
        assert note is not None and example["completion"].startswith(" {")
        answer = json.loads(example["completion"])
        assert list(answer) == ["date", "shop", "amount", "currency", "category"]
        assert {key: answer[key] for key in ("date", "amount", "currency")} == read_note(note[1])
        assert answer["shop"] in note[1] and answer["category"] in CATEGORIES


def test_notes_are_unique_and_the_splits_share_no_shop() -> None:
    read = {split: examples(split) for split in SPLITS}
    assert {split: len(found) for split, found in read.items()} == {"train": 320, "valid": 40, "test": 40}
    prompts = [example["prompt"] for found in read.values() for example in found]
    assert len(set(prompts)) == len(prompts)
    shops = {split: {json.loads(e["completion"])["shop"] for e in found} for split, found in read.items()}
    assert not shops["train"] & shops["valid"] and not (shops["train"] | shops["valid"]) & shops["test"]
    # Each shop has one category, so that it can be learned, and each category occurs in every split.
    categories: dict[str, set[str]] = {}
    for found in read.values():
        answers = [json.loads(example["completion"]) for example in found]
        assert {answer["category"] for answer in answers} == CATEGORIES
        for answer in answers:
            categories.setdefault(answer["shop"], set()).add(answer["category"])
    assert all(len(found) == 1 for found in categories.values())


def test_the_script_writes_these_files(tmp_path: Path) -> None:
    script = Path(shutil.copy(FOLDER / "data" / "make.py", tmp_path))
    spec = importlib.util.spec_from_file_location("make", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / "data" / f"{split}.jsonl").read_bytes()


# The README, and the guide.

README, GUIDE, PREFERENCES, REWARDS = (
    FOLDER / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("fine-tuning", "preference", "grpo")),
)


def commands(document: Path) -> list[str]:
    return [line for block in blocks(document, "bash") for line in block.splitlines() if line.strip()]


def ours(document: Path) -> list[str]:
    return [line for line in commands(document) if line.startswith((PROGRAM, "python lora/"))]


def adapted(command: str) -> list[str]:
    """A command's words, with `tiny` instead of the published sizes, and only two steps."""
    words = shlex.split(command)
    file = words[words.index("-c") + 1] if "-c" in words else ""
    if "configs" in file:  # the file sets a size
        words += ["--model", "270m"]
    elif file:
        words += ["--iters", "2", "--batch-size", "8"]
    if words[1] == "generate":
        words += ["--max-tokens", "8"]
    for index, word in enumerate(words[:-1]):
        if word == "--model" and words[index + 1] == "270m":
            words[index + 1] = "tiny-unpacked"
        if word in ("--iters", "--epochs"):
            words[index : index + 2] = ["--iters", "2"]
        smaller = {"--warmup": "1", "--num-layers": "2"}
        words[index + 1] = smaller.get(word, words[index + 1])
    return words


def test_links_have_targets() -> None:
    for document in (README, FOLDER / "data" / "README.md", FOLDER / "json" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).is_file(), target


def test_all_commands_but_those_of_other_programs_are_run() -> None:
    assert len(ours(README)) > 18 and len(ours(GUIDE)) > 5
    others = [line.split()[0] for path in (README, GUIDE) for line in commands(path) if line not in ours(path)]
    assert others == ["python3", "head", "mlx.launch"]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a clone, with a few of the examples, and `tiny` unpacked."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER, "lora")
    for file in (tmp_path / "lora").rglob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[: 8 if file.stem == "train" else 2]), encoding="utf-8")
    convert("tiny", "tiny-unpacked", dequantize=True)
    return tmp_path


def run(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Run a document's command, adapted; it must succeed and print something: after a step or two, a model may not."""
    words = adapted(command)
    if words[0] == "python":
        done = subprocess.run(
            [sys.executable, *words[1:]], env=environment(), capture_output=True, text=True, timeout=120
        )
        code, output, errors = done.returncode, done.stdout, done.stderr
    else:
        with pytest.raises(SystemExit) as stop:
            main(words[1:])
        code, (output, errors) = stop.value.code, capfd.readouterr()
    assert code == 0, (command, errors)
    assert output.strip() or (words[1] == "generate" and errors.strip()), command


@pytest.mark.pictures
@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_order(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ours(README):
        run(command, capfd)
    assert (clone / "expenses" / "losses.png").stat().st_size > 1000
    assert not mlx_format.read(clone / "expenses-unpacked").quantization
    for folder in ("tiny-fused", "expenses-270m-4bit", "expenses-packed"):
        assert mlx_format.read(clone / folder).quantization
    load("expenses-mixed")


@pytest.mark.slow
def test_the_guide_runs_in_order(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With stand-ins for the reader's files: data, two other adapters, a quantized model."""
    shutil.copytree(clone / "lora" / "data", "my_data")
    first, *rest = ours(GUIDE)
    run(first, capfd)
    for name in ("my_other", "my_qlora"):
        shutil.copytree("my_adapter", name)
    convert("tiny-unpacked", "my_4bit", quantize=True)
    for command in rest:
        if "--save-path my_model" in command:
            shutil.rmtree("my_model", ignore_errors=True)
        run(command, capfd)
    (snippet,) = blocks(GUIDE, "python")
    exec(snippet.replace("270m", "tiny-unpacked"), {})
    assert "my_model-bf16 " in capfd.readouterr().out


@pytest.mark.slow
def test_the_guide_to_preferences_runs_in_order(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(clone / "lora" / "preferences", "my_pairs")
    for command in ours(PREFERENCES):
        run(command, capfd)
    (snippet,) = blocks(PREFERENCES, "python")
    exec(snippet, {})
    assert 0 <= float(capfd.readouterr().out.splitlines()[-1]) <= 1


@pytest.mark.slow
def test_the_guide_to_rewards_runs_in_order(clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(clone / "lora" / "json", "my_prompts")
    first, second = blocks(REWARDS, "python")
    (clone / "rewards.py").write_text(first)
    for command in ours(REWARDS):
        run(command, capfd)
    exec(second, {})
    assert 0 <= float(capfd.readouterr().out.splitlines()[-1]) <= 1


def rewards() -> Any:
    spec = importlib.util.spec_from_file_location("rewards", FOLDER / "json" / "rewards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_in_json_are_rewarded() -> None:
    module = rewards()
    right = '{"speaker": "Kent", "topic": "war"}'
    texts = [right, '{"speaker": "Kent", "topic": ""}', '{"speaker": "Kent"', "Ay, sir.", right + "x", "3"]
    assert module.form(texts) == [1.0, 7 / 9, 4 / 9, 0.0, 8 / 9, 0.0]
    assert module.is_json(texts) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert module.is_right([right] * 3 + ["x"], ["Kent", "Kent", "Edgar", "x"], ["war", "love", "love", "x"]) == [
        *(1.0, 0.5, 0.0, 0.0),
    ]


def test_the_prompts_and_answers_in_json_are_those_of_their_script(tmp_path: Path) -> None:
    module = rewards()
    script = Path(shutil.copy(FOLDER / "json" / "make.py", tmp_path))
    subprocess.run([sys.executable, script], check=True, timeout=60)
    files = sorted(path.relative_to(FOLDER / "json") for path in (FOLDER / "json").rglob("*.jsonl"))
    assert len(files) == 4
    read = {}
    for file in files:
        assert (tmp_path / file).read_bytes() == (FOLDER / "json" / file).read_bytes()
        read[file.parent.name + file.stem] = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
    answers = read.pop("answerstrain")
    rows = [row for found in read.values() for row in found]
    assert {name: len(found) for name, found in read.items()} == {"train": 480, "valid": 32, "test": 32}
    prompts = {row["prompt"] for row in (*rows, *answers)}
    assert len(prompts) == len(rows) + len(answers) == 704
    assert all(row["speaker"] in row["prompt"] and row["topic"] in row["prompt"] for row in rows)
    texts = [row["completion"] for row in answers]
    assert module.form(texts) == module.is_json(texts) == [1.0] * len(answers)
    for row in answers:
        assert all(value in row["prompt"] for value in json.loads(row["completion"]).values())


@pytest.mark.slow
def test_grpo_learns_to_answer_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the README, whole."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER, "lora")
    answers, fuse, before, learn, *_ = [line for line in ours(README) if "json" in line]
    shares = []
    for command in (answers, fuse, before, learn):
        words = [sys.executable, "-m", "mlx_openelm", *shlex.split(command)[1:], "--json"]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shares.append(json.loads(done.stdout).get("test_rewards/is_json/mean"))
    assert 0.1 < shares[2] < 0.5 and shares[3] > shares[2] + 0.2


@pytest.mark.parametrize("split", SPLITS)
def test_every_pair_names_its_thing_in_both_replies(split: str) -> None:
    lines = (FOLDER / "preferences" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == {"train": 320, "valid": 40, "test": 40}[split]
    for pair in map(json.loads, lines):
        message = re.fullmatch(r"Customer: (.+[.?])\nReply:", pair["prompt"])
        assert message is not None and set(pair) == {"prompt", "chosen", "rejected"}
        words = [set(re.findall(r"[a-z]+", text)) for text in (message[1], pair["chosen"], pair["rejected"])]
        common = set.intersection(*words) - {
            "the",
            "is",
            "and",
            "for",
            "to",
            "you",
            "it",
            "me",
            "of",
            "a",
            "not",
            "with",
        }
        assert common, pair
        assert re.match(r" (I am sorry|Thank you|It is good)", pair["chosen"]), pair
        assert not re.search(r"sorry|[Tt]hank", pair["rejected"]), pair


def test_the_preferences_are_those_of_their_script(tmp_path: Path) -> None:
    script = Path(shutil.copy(FOLDER / "preferences" / "make.py", tmp_path))
    subprocess.run([sys.executable, script], check=True, timeout=60)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / "preferences" / f"{split}.jsonl").read_bytes()
    lines = {split: (tmp_path / f"{split}.jsonl").read_text().splitlines() for split in SPLITS}
    assert not set(lines["train"]) & {*lines["valid"], *lines["test"]}


def test_the_guide_names_every_setting_with_its_default() -> None:
    settings = GUIDE.read_text().partition("## Settings")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `(--[\w-]+)` \| (\S*) ?\| (.*) \|$", settings, flags=re.MULTILINE)
    rows = {flag: (default, text) for flag, default, text in found}
    texts = get_type_hints(FineTuneOptions, include_extras=True)
    for field in dataclasses.fields(FineTuneOptions):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if field.name == "sample_prompts":
            flag, default = "--sample-prompt", None
        elif default is True:
            flag, default = flag.replace("--", "--no-", 1), None
        is_off = default is None or default is False or default == ()
        expected = f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
        default_there, text = rows.pop(flag)
        assert default_there == ("" if is_off else expected), flag
        words = texts[field.name].__metadata__[0].help.rstrip(".")
        assert flag.startswith("--no-") or text.startswith(words), flag
    assert not rows


def test_the_json_of_the_readme_is_json() -> None:
    rows = [json.loads(line) for block in blocks(README, "json") for line in block.splitlines()]
    assert rows[0] == examples("train")[0]
    assert len(rows) == 7
    assert rows[1].keys() == {"prompt", "chosen", "rejected"}
    assert rows[2] in [json.loads(line) for line in (FOLDER / "json" / "train.jsonl").read_text().splitlines()]
