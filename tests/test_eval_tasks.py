"""Tasks that are measured during training: on the weights of the moment, at their steps, in every kind of run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from mlx_openelm import FineTuneOptions, PreferenceOptions, dpo, finetune, load, pretrain
from mlx_openelm.errors import RequestError
from mlx_openelm.harness import during_training, lm_tasks
from mlx_openelm.harness.evaluating import evaluate
from mlx_openelm.harness.options import EvaluateOptions
from mlx_openelm.harness.scorer import Scorer
from mlx_openelm.training.data.corpus import packed
from mlx_openelm.training.run.metrics import read
from mlx_openelm.training.run.preparing import Loading

import pretraining_runs
import pytest

DATA = Path(__file__).parent / "fixtures/evaluation/commonsense"
TASKS = {"eval_tasks": "commonsense/openbookqa", "eval_tasks_data": str(DATA), "eval_tasks_limit": 2}
PAIR = [("To be, or not", " to be, that is the question")]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(packed, "WINDOW", pretraining_runs.WINDOW)


@pytest.fixture
def measured(monkeypatch):
    """The likelihood of a text at each measurement."""
    found: list[float] = []
    measure = during_training.measure

    def spy(model, tokenizer, *rest, **given):
        found.append(Scorer(model, tokenizer).log_likelihoods(PAIR)[0][0])
        return measure(model, tokenizer, *rest, **given)

    monkeypatch.setattr(during_training, "measure", spy)
    return found


def scores(folder: Path) -> dict[int, float]:
    """The logged accuracy by step."""
    return {
        record["step"]: record["openbookqa_acc"]
        for record in read(folder / "metrics.jsonl")
        if "openbookqa_acc" in record
    }


def write(folder: Path, records: list[dict[str, str]]) -> Path:
    folder.mkdir()
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


def test_lora_measures_the_weights_of_the_moment(tmp_path, measured):
    data = write(tmp_path / "data", [{"text": f"The king said {word}."} for word in ("no", "yes", "so", "go")])
    options = FineTuneOptions(
        train=True, data=str(data), iters=3, batch_size=2, learning_rate=1e-2, dropout=0.5,
        adapter_path=str(tmp_path / "adapter"), eval_tasks_every=2, val_batches=0, **TASKS,
    )  # fmt: skip
    finetune("tiny", options)
    assert list(scores(tmp_path / "adapter")) == [2, 3]
    assert len(set(measured)) == 2
    trained = Scorer(*load("tiny", tmp_path / "adapter", exact_activations=True))
    assert measured[-1] == pytest.approx(trained.log_likelihoods(PAIR)[0][0], abs=1e-3)
    asked = EvaluateOptions(suite="commonsense", tasks=("openbookqa",), data=str(DATA), limit=2)
    result = evaluate("tiny", asked, adapter_path=tmp_path / "adapter", progress=False)
    assert result.results["openbookqa"]["acc"] == scores(tmp_path / "adapter")[3]


def test_dpo_and_pretraining_measure_too(tmp_path, measured):
    pairs = [{"prompt": "The king said", "chosen": " yes.", "rejected": f" {word}."} for word in ("no", "so")]
    options = PreferenceOptions(
        train=True, data=str(write(tmp_path / "pairs", pairs)), iters=2, batch_size=1, val_batches=0,
        adapter_path=str(tmp_path / "dpo"), eval_tasks_every=1, **TASKS,
    )  # fmt: skip
    dpo("tiny", options)
    assert list(scores(tmp_path / "dpo")) == [1, 2]
    (tmp_path / "run").mkdir()
    folder = pretraining_runs.write_folder(tmp_path / "run")
    settings = pretraining_runs.options(
        data=(str(folder / "data"),), output=str(tmp_path / "pretrained"), iters=3, eval_tasks_every=2, **TASKS
    )
    loading = Loading(tokenizer=str(folder / "tokenizer"))
    pretrain(pretraining_runs.SIZES, settings, loading=loading)
    assert list(scores(tmp_path / "pretrained")) == [2, 3]
    assert len(measured) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_tasks": "commonsense/piqa"}, "has no piqa/test.json"),
        ({"eval_tasks": "commonsense/gsm8k"}, "has no task 'gsm8k'"),
        ({"eval_tasks": " , "}, "names no task"),
        ({"eval_tasks": "commonsense/obqa,openbookqa"}, "eval_tasks names openbookqa of lm-eval and of CoreNet"),
        ({"eval_tasks_every": 0}, "eval_tasks_every must be 1 or more"),
        ({"eval_tasks_limit": 0}, "eval_tasks_limit must be 1 or more"),
        ({"eval_tasks_data": "/nowhere"}, "data must be a folder"),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, changes, message, hub):
    data = write(tmp_path / "data", [{"text": "The king said no."}] * 4)
    values = {"iters": 1, "val_batches": 0, **TASKS, **changes}
    options = FineTuneOptions(train=True, data=str(data), adapter_path=str(tmp_path / "adapter"), **values)
    with pytest.raises(RequestError, match=message):
        finetune("tiny", options)


def test_a_mistake_leaves_the_run_that_would_be_replaced(tmp_path, hub):
    kept = tmp_path / "adapter/run.json"
    data = write(tmp_path / "data", [{"text": "The king said no."}] * 4)
    options = FineTuneOptions(
        train=True, data=str(data), adapter_path=str(kept.parent), iters=1, batch_size=1, val_batches=0
    )  # fmt: skip
    finetune("tiny", options)
    before = kept.read_bytes()
    wrong = {**TASKS, "eval_tasks": "commonsense/gsm8k"}
    with pytest.raises(RequestError, match="has no task 'gsm8k'"):
        finetune("tiny", dataclasses.replace(options, **wrong), overwrite=True)
    assert kept.read_bytes() == before and (kept.parent / "adapters.safetensors").exists()
    kept = tmp_path / "pretrained/run.json"
    (tmp_path / "run").mkdir()
    folder = pretraining_runs.write_folder(tmp_path / "run")
    given = {"data": (str(folder / "data"),), "output": str(kept.parent), "iters": 1, "warmup": 0}
    loading = Loading(tokenizer=str(folder / "tokenizer"))
    pretrain(pretraining_runs.SIZES, pretraining_runs.options(**given), loading=loading)
    before = kept.read_bytes()
    with pytest.raises(RequestError, match="has no task 'gsm8k'"):
        pretrain(pretraining_runs.SIZES, pretraining_runs.options(**given, **wrong), loading=loading, overwrite=True)
    assert kept.read_bytes() == before


def test_data_that_is_nowhere_is_given_with_trainings_own_flag(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")

    def absent(*given):
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(lm_tasks, "_load", absent)
    with pytest.raises(RequestError, match="arc_easy: its data is neither in .*give a folder .* eval_tasks_data"):
        during_training.TrainingTasks("arc_easy", str(tmp_path), 1)
    with pytest.raises(RequestError, match="^eval_tasks_data must be a folder; .*none is none"):
        during_training.TrainingTasks("arc_easy", str(tmp_path / "none"), 1)
