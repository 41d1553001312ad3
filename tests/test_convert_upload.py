import os, subprocess, sys
from pathlib import Path
import mlx_openelm
from fake_hub import FakeHub

ROOT = Path(__file__).parent.parent
S = ROOT / "tests/fixtures/shakespeare-hf"


def run(*a, env):
    return subprocess.run(
        [sys.executable, "-m", "mlx_openelm", *map(str, a)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test(hub, hub_env, tmp_path):
    print(mlx_openelm.__file__)
    out = tmp_path / "out"
    d = run(
        "convert", "--model", S, "--mlx-path", out, "-q", "--q-group-size", 64, "--upload-repo", "me/x", env=hub_env
    )
    assert d.returncode == 1 and not out.exists(), d
    d = run("convert", "--model", S, "--mlx-path", out, "--private", env=hub_env)
    assert d.returncode == 2 and not out.exists(), d
    d = run(
        "convert",
        "--model",
        S,
        "--mlx-path",
        out,
        "-q",
        "--q-group-size",
        64,
        "--upload-repo",
        "me/x",
        "--dry-run",
        env=hub_env,
    )
    assert d.returncode == 0 and hub.requests == [], d
    d = run(
        "convert",
        "--model",
        S,
        "--mlx-path",
        out,
        "-q",
        "--q-group-size",
        64,
        "--upload-repo",
        "me/x",
        "--overwrite",
        env=hub_env | {"HF_TOKEN": "hf_writer"},
    )
    print(d.stdout, d.stderr, (out / "README.md").read_text())
    assert d.returncode == 0
    assert hub.commits
    d = run("convert", "--model", "me/x", "--mlx-path", tmp_path / "again", "-d", env=hub_env)
    print(d.stdout, d.stderr, (tmp_path / "again" / "README.md").read_text()[:600])
