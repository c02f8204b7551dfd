"""The command rnndyn: options, one-line errors, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rnndyn_fast import __version__
from rnndyn_fast.cli import main
from rnndyn_fast.cli.arguments import command_parser
from rnndyn_fast.cli.parser import normalise
from rnndyn_fast.cli.table import COMMANDS
from rnndyn_fast.data import ImageFile, make_dataset
from rnndyn_fast.train import TrainConfig, read_checkpoint, read_metrics

RNNDYN = [sys.executable, "-c", "import sys; from rnndyn_fast.cli import main; sys.exit(main())"]
QUICK = [
    "--widths",
    "4,6,8,10,12",
    "--timesteps",
    "3",
    "--batch-size",
    "32",
    "--backend",
    "reference",
    "--threads",
    "1",
]


def rnndyn(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*RNNDYN, *map(str, words)], capture_output=True, text=True, env=env, timeout=120)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=96, num_val=40, num_test=20, num_testplus=40)


def test_every_command_of_the_main_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a newcomer types them, one after another."""
    data, runs, result, untrained = (tmp_path / name for name in ("i.h5", "run", "r.h5", "u.h5"))
    sizes = ["--num-train", "96", "--num-val", "40", "--num_test", "20", "--num_testplus=40"]
    assert main(["data", "make", "--source", "digits", "--size", "16", "--out", str(data), *sizes]) == 0
    assert "train 96, val 40, test 20, testplus 40" in capfd.readouterr().out
    assert main(["train", "--data", str(data), "--out", str(runs), "--epochs", "1", *QUICK]) == 0
    assert "epoch 1/1" in capfd.readouterr().out
    checkpoint = str(runs / "last.pt")
    words = ["extract", checkpoint, str(data), "--split", "testplus", "--backend", "reference", "--keep-samples"]
    assert main([*words, "--out", str(result), "--save", "gap,it"]) == 0
    told = capfd.readouterr().out
    assert "40 trajectories" in told
    assert str(tmp_path / "r_trajectories.h5") in told
    assert main([*words, "--out", str(untrained), "--untrained"]) == 0
    assert main(["analyse", str(result), "--compare", str(untrained), "--out", str(tmp_path / "analysis")]) == 0
    assert "Representations keep changing after stable correct classification:" in capfd.readouterr().out
    assert (tmp_path / "analysis" / "groups.csv").exists()
    assert (tmp_path / "analysis" / "accuracy.svg").exists()


def test_help_version_and_no_arguments(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.strip() == f"rnndyn {__version__}"
    assert main([]) == 0
    text = capfd.readouterr().out
    assert all(name.split()[0] in text for name in COMMANDS)
    for name in COMMANDS:
        assert main([*name.split(), "--help"]) == 0
        assert "usage: rnndyn" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bogus"], "unknown command 'bogus' (see rnndyn --help)"),
        (["trian"], "unknown command 'trian', did you mean 'train'"),
        (["phase", "sweeep"], "unknown command 'phase sweeep', did you mean 'phase sweep'"),
        (["data", "mkae"], "did you mean 'data make'"),
        (["train", "--data", "d", "--out", "o", "--lr", "nan"], "--lr: expected a finite number, got nan"),
        (["train", "--data", "d", "--out", "o", "--lr", "inf"], "--lr: expected a"),
        (["train", "--data", "d", "--out", "o", "--clip", "nan"], "--clip: expected a finite number, got nan"),
        (["train", "--data", "d", "--out", "o", "--epochs", "1", "--keep", "99"], "--keep: expected epochs from 1 to 1, got 99"),
        (["train", "--data", "d", "--out", "o", "--lt-interaction", "sum"], "--lt-interaction: expected one of additive, multiplicative"),
        (["train", "--data", "d", "--out", "o", "--batch_size", "0"], "--batch-size: expected at least 1, got 0"),
        (["train", "--data", "d", "--out", "o", "--epohcs", "3"], "did you mean '--epochs'"),
        (["train", "--data", "d", "--out", "o.h5"], "--out: expected a folder, o.h5 is the name of a file"),
        (["train"], "missing: --data, --out"),
        (["train", "--data", "d", "--out", "o", "--epochs", ""], "--epochs: expected a whole number, got nothing"),
        (["train", "--data", "d", "--out", ""], "--out: expected a path, got an empty text"),
        (["train", "--data", "", "--out", "o"], "--data: expected a path, got an empty text"),
        (["extract", "", "d.h5", "--out", "o"], "checkpoint: expected a path, got an empty text"),
        (["train", "--data", "d", "--out", "o", "--topdown-connections", "maybe"], "--topdown-connections: expected true or false, or"),
        (["train", "--data", "d", "--out", "o", "--epochs", "many"], "--epochs: expected a whole number, got many"),
        (["train", "--data", "d", "--out", "o", "--backend", "fast"], "backend: expected one of"),
        (["train", "--data", "d", "--out", "o", "--depth", "3"], "--depth"),
        (["train", "--data", "absent.h5", "--out", "o"], "no such file"),
        (["train", "--config", "absent/train.yaml"], "absent/train.yaml'"),
        (["train", "--data", "absent.h5", "--out", "o", "--engine", "fused", "--device", "cpu"], "--engine fused: it runs on CUDA"),
        (["plan", "blt_net_64", "--dtype", "int8"], "dtype: expected one of float32, float64, float16, bfloat16, got 'int8'"),
        (["data", "make"], "missing: --out"),
        (["data", "make", "--out", "i.h5", "--size", "3"], "size: expected 8..512, got 3"),
        (["plan", "blt_net_65"], "model: unknown model 'blt_net_65'"),
        (["plan", "blt_net_64", "--image-size", "20"], "image-size: expected a multiple of 8"),
        (["plan", "blt_net_64", "--unroll", "sideways"], "--unroll: expected one of engineering, biological, got 'sideways'"),
        (["plan", "blt_net_64", "--engine", "fft"], "engine: expected one of"),
        (["plan", "blt_net_64", "--lesion", "v5:lateral"], "--lesion: 'v5:lateral': unknown area 'v5'"),
        (["extract", "absent.pt", "i.h5", "--out", "r.h5"], "checkpoint: no such file: absent.pt"),
        (["analyse", "absent.h5", "--out", "a"], "absent.h5"),
        (["demo", "--epochs", "0"], "epochs: expected at least 1"),
        (["demo", "--size", "20"], "size: expected a multiple of 8, got 20"),
        (["demo", "--backend", "cuda"], "backend: expected one of"),
        (["data", "make", "--out", "i.h5", "--source", "imagenet"], "source: expected 'fashion-mnist'"),
        (["extract", "absent.pt", "i.h5", "--out", "r.h5", "--split", "all"], "split: expected one of"),
        (["extract", "absent.pt", "i.h5", "--out", "r.h5", "--limit", "two"], "--limit: expected a whole number, got two"),
        (["train", "--data", "d", "--out", "o", "--widths", "4,a"], "--widths: expected a whole number, got a"),
    ],
)
def test_errors_are_one_line_and_exit_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("rnndyn: error: ")
    assert told.err.count("\n") == 1
    assert message in told.err
    assert list(tmp_path.iterdir()) == []


def test_error_of_a_process_and_its_traceback_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["analyse", str(tmp_path / "absent.h5"), "--out", str(tmp_path / "a")]
    plain = rnndyn(*words, RNNDYN_DEBUG="0")
    assert plain.returncode == 2
    assert plain.stderr.startswith("rnndyn: error: ")
    assert "Traceback" not in plain.stderr
    monkeypatch.setenv("RNNDYN_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match=r"absent.h5"):
        main(words)


def test_truncated_files_are_told_in_one_line(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    half = tmp_path / "half.h5"
    half.write_bytes(images.read_bytes()[:4000])
    assert main(["train", "--data", str(half), "--out", str(tmp_path / "run")]) == 2
    assert "truncated" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_yaml_configuration_round_trip(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--data", str(images), "--out", str(tmp_path / "run"), "--epochs", "1", *QUICK]
    assert main(["train", *given, "--print-config"]) == 0
    printed = capfd.readouterr().out
    config = TrainConfig.from_dict(yaml.safe_load(printed))
    assert config.widths == (4, 6, 8, 10, 12)
    assert config.batch_size == 32
    path = tmp_path / "train.yaml"
    path.write_text(printed)
    # An option on the command line wins over the file.
    assert main(["train", "--config", str(path), "--seed", "3"]) == 0
    assert TrainConfig.from_dict(read_checkpoint(tmp_path / "run" / "last.pt")["config"]).seed == 3
    # The configuration that a run leaves behind goes on with it.
    saved = str(tmp_path / "run" / "train.yaml")
    assert main(["train", "--config", saved]) == 2
    assert "is not empty" in capfd.readouterr().err
    assert main(["train", "--config", saved, "--epochs", "2", "--resume"]) == 0
    assert [row.epoch for row in read_metrics(tmp_path / "run")] == [1, 2]


def test_configuration_with_an_unknown_option(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("data: d\nout: o\ndepth: 3\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "depth" in capfd.readouterr().err


def test_plan_prints_the_schedule(capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        "blt_net_64",
        "--timesteps",
        "4",
        "--topdown-connections",
        "true",
        "--LT_interaction",
        "multiplicative",
    ]
    assert main(words) == 0
    text = capfd.readouterr().out
    assert "4 time steps" in text
    assert "once" in text
    assert main(["plan", "blt_net_128", "--num-classes", "10"]) == 0
    assert "5 time steps" not in capfd.readouterr().out
    assert main(["plan", "blt_net_64", "--lesion", "v4:lateral@3-,it@2"]) == 0
    lesioned = capfd.readouterr().out
    assert "conv3(v4, v4.lateral){t=0..2}" in lesioned
    assert "it = it before{t=0..1,3..9} + it clamp 1{t=2}" in lesioned
    assert main(["plan", "blt_net_64", "--engine", "direct"]) == 0
    assert "winograd" not in capfd.readouterr().out


def test_doctor_says_what_runs(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capfd.readouterr().out
    for name in (
        "versions",
        "threads",
        "native core",
        "isa",
        "networks, native",
        "networks, reference",
        "h5py",
        "CUDA",
    ):
        assert name in text
    reference = next(line for line in text.splitlines() if "networks, reference" in line)
    assert reference.endswith("runs")
    for engine in ("auto", "direct", "winograd"):
        line = next(line for line in text.splitlines() if f"convolutions, {engine}" in line)
        assert " runs; " in line, line


def test_a_configuration_with_a_key_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("epochs: 3\nlr: 0.1\nepochs: 4\n")
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--data", "d", "--out", "o"]) == 2
    assert "c.yaml: the key 'epochs' is there twice" in capfd.readouterr().err


def test_a_file_for_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").write_text("x")
    assert main(["extract", "c.pt", "d.h5", "--out", str(tmp_path / "results")]) == 2
    assert "--out: expected a folder, or a file (.h5)" in capfd.readouterr().err


def test_repeated_options_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    """The last one counts."""
    words = ["plan", "blt_net_64", "--timesteps", "3", "--batch", "2", "--Batch=2", "--widths", "4,8,16,32,64"]
    assert main([*words, "--timesteps=4", "--widths=2,4,8,16,32"]) == 0
    told = capfd.readouterr()
    assert "4 time steps" in told.out
    assert told.err.splitlines() == [
        "rnndyn: --timesteps is there 2 times (3, 4); the last one counts",
        "rnndyn: --widths is there 2 times (4,8,16,32,64, 2,4,8,16,32); the last one counts",
    ]


def test_dashes_and_lists_are_normalised() -> None:
    extract, train = command_parser("extract"), command_parser("train")
    assert normalise(["--overwrite", "a.pt", "--untrained", "no", "--keep_samples"], extract) == [
        "--overwrite=true", "a.pt", "--untrained", "no", "--keep-samples=true",
    ]  # fmt: skip
    assert normalise(["--batch_size", "3", "--widths=1,2", "--widths", "3,4", "--out", "a_b", "--LT_interaction=additive"], train) == [
        "--batch-size", "3", "--widths=[1,2]", "--widths", "[3,4]", "--out", "a_b", "--lt-interaction=additive",
    ]  # fmt: skip


def test_interrupt_exits_130_and_keeps_what_is_complete(images: Path, tmp_path: Path) -> None:
    words = ["train", "--data", str(images), "--out", str(tmp_path / "run"), "--epochs", "100000", *QUICK]
    process = subprocess.Popen(
        [*RNNDYN, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "last.pt").exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "rnndyn: interrupted" in err
    assert "--resume" in out
    assert read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] >= 1


def test_output_into_a_closed_pipe_is_no_error() -> None:
    command = " ".join(f"'{word}'" for word in [*RNNDYN, "plan", "blt_net_64"])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("blt_net_64")


def test_missing_optional_package_names_the_extra() -> None:
    code = "import sys; sys.modules['jsonargparse'] = None\nfrom rnndyn_fast.cli import main\nsys.exit(main(['plan', 'blt_net_64']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert 'pip install "rnndyn-fast[cli]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_data_make_keeps_an_existing_file(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = images.read_bytes()
    assert main(["data", "make", "--source", "digits", "--size", "16", "--out", str(images)]) == 2
    assert "exists" in capfd.readouterr().err
    assert images.read_bytes() == before
    with ImageFile(images) as file:
        assert file.image_size == 16
