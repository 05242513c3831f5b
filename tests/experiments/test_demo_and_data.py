"""The demo runs from another directory, says what it should, and the data of all experiments is
checked before it is used.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from ..helpers.paths import EXPERIMENTS
from .kit import data, load_experiment, rows, run_experiment


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """What the demo prints, on both channels, and where it draws."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_experiment(
        "digits", "--steps", "25", "--seed", "3", "--out", str(folder / "made"), cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, folder / "made"


def test_demo_compares_all_methods_and_draws_a_picture(demo: tuple[str, str, Path]) -> None:
    printed, progress, folder = demo
    table = rows(printed)
    assert list(table) == ["backprop", "exact", "dni", "cdni", "zero", "stale"]
    assert table["exact"][:2] == table["backprop"][:2]
    assert "exact mode equals backprop bit for bit" in printed
    assert "100%" in progress
    picture = folder / "digits.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_repeats_itself_for_one_seed(
    demo: tuple[str, str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In another process, too."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    digits = load_experiment("digits")
    accuracies = [[row[:3] for row in rows(demo[0]).values()]]
    for seed in ("3", "4"):
        arguments = ["--steps", "25", "--seed", seed, "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["digits.py", *arguments])
        assert digits.main() == 0
        accuracies.append([row[:3] for row in rows(capsys.readouterr().out).values()])
    assert accuracies[0] == accuracies[1] != accuracies[2]


def test_demo_fails_loudly_where_exact_mode_is_not_backprop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        digits = load_experiment("digits")
    finally:
        sys.path.remove(str(EXPERIMENTS))
    runs = [
        digits.Run(method, steps=[1], state={"w": torch.ones(2)})
        for method in ("backprop", "exact")
    ]
    assert digits.compare_exact(runs)
    runs[1].state["w"] = torch.ones(2).nextafter(torch.full((2,), 2.0))
    assert not digits.compare_exact(runs)
    assert "DIFFERS from backprop in 1 of 1 tensors" in capsys.readouterr().out


def test_mnist_has_the_published_shapes(mnist_folder: Path) -> None:
    mnist = data.mnist(mnist_folder)
    assert mnist.train_x.shape == (60000, 1, 28, 28)
    assert mnist.test_x.shape == (10000, 1, 28, 28)
    assert mnist.train_x.mean().item() == pytest.approx(0.130660, abs=1e-6)
    assert mnist.train_y.bincount().sum() == 60000


def test_digits_are_split_without_overlap() -> None:
    digits = data.digits()
    assert digits.train_x.dtype == torch.float32
    assert digits.train_x.shape[1:] == (1, 8, 8)
    assert len(digits.train_x) + len(digits.test_x) == 1797
    assert (digits.train_x.min(), digits.train_x.max()) == (0.0, 1.0)
    assert digits.test_y.bincount().min() >= 34
    assert torch.equal(digits.test_x, data.digits().test_x)


def test_named_directory_without_mnist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"no MNIST in .*expected train-images"):
        data.mnist(tmp_path)


def test_environment_names_the_directory(tmp_path: Path) -> None:
    done = run_experiment("paper_feedforward", cwd=tmp_path, DNI_FX_DATA=str(tmp_path))
    assert done.returncode == 1
    assert f"no MNIST in {tmp_path} (from DNI_FX_DATA)" in done.stderr
    assert "Traceback" not in done.stderr


def test_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"not MNIST"))
    with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        data.mnist(tmp_path)


def test_missing_file_beside_others_is_an_error(tmp_path: Path, mnist_folder: Path) -> None:
    shutil.copy(mnist_folder / "train-images-idx3-ubyte.gz", tmp_path)
    with pytest.raises(data.DataError, match=r"cannot read .*train-labels"):
        data.mnist(tmp_path)


class Home:
    """A small stand-in for MNIST and its homes on the web, as directories."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken, self.good = folder / "broken", folder / "good"
        self.cache = folder / "cache" / "dni_fx" / "mnist"
        files = {}
        for name, (_, header, _) in data.MNIST_FILES.items():
            shape = (2, 1, 28, 28) if header == 16 else (2,)
            packed = gzip.compress(bytes(header + 2 * (784 if header == 16 else 1)), mtime=0)
            files[name] = (hashlib.sha256(packed).hexdigest(), header, shape)
            for home, content in ((self.broken, b"<html>moved</html>"), (self.good, packed)):
                home.mkdir(exist_ok=True)
                (home / name).write_bytes(content)
        monkeypatch.setattr(data, "MNIST_FILES", files)
        monkeypatch.setattr(data, "NEIGHBOUR", folder / "nowhere")
        monkeypatch.setattr(
            data, "MNIST_HOMES", tuple(f"{home.as_uri()}/" for home in (self.broken, self.good))
        )
        monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """MNIST is nowhere on the machine; the first of its homes serves something else."""
    return Home(tmp_path, monkeypatch)


def test_download_goes_to_the_next_home_and_is_kept(home: Home) -> None:
    assert data.mnist().train_x.shape == (2, 1, 28, 28)
    assert sorted(path.name for path in home.cache.iterdir()) == sorted(data.MNIST_FILES)
    shutil.rmtree(home.good)
    assert data.mnist().test_y.tolist() == [0, 0]


def test_damaged_cache_is_downloaded_again(home: Home) -> None:
    data.mnist()
    name = next(iter(data.MNIST_FILES))
    (home.cache / name).write_bytes(b"half a fi")
    data.mnist()
    assert (home.cache / name).read_bytes() == (home.good / name).read_bytes()


def test_failed_download_names_each_home_and_leaves_nothing(home: Home) -> None:
    shutil.rmtree(home.good)
    with pytest.raises(data.DataError, match="cannot download train-images") as caught:
        data.mnist()
    assert "is damaged" in str(caught.value)
    assert home.good.as_uri() in str(caught.value)
    assert data.DATA_VARIABLE in str(caught.value)
    assert not home.cache.exists()


class CifarHome:
    """A small stand-in for CIFAR-10: two images a file, packed as on the web, or file by file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache, archive = (
            folder / "files",
            folder / "cache" / "dni_fx" / "cifar10",
            folder / "all.tgz",
        )
        self.folder.mkdir()
        sums = {}
        with tarfile.open(archive, "w:gz") as packed:
            for number, name in enumerate(data.CIFAR_FILES):
                content = bytes([number, *[7] * 3072] * 2)
                sums[name] = hashlib.sha256(content).hexdigest()
                (self.folder / f"{name}.xz").write_bytes(lzma.compress(content))
                (folder / name).write_bytes(content)
                packed.add(folder / name, f"cifar-10-batches-bin/{name}")
        monkeypatch.setattr(data, "CIFAR_FILES", sums)
        monkeypatch.setattr(data, "CIFAR_HOME", archive.as_uri())
        monkeypatch.setattr(data, "NEIGHBOUR", folder / "nowhere")
        monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.fixture
def cifar_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CifarHome:
    """CIFAR-10 is nowhere on the machine but at its home and in a folder."""
    return CifarHome(tmp_path, monkeypatch)


@pytest.mark.parametrize("named", [False, True])
def test_cifar10_is_downloaded_or_read_and_then_kept(cifar_home: CifarHome, named: bool) -> None:
    for folder in (cifar_home.folder if named else None, None):  # the second time from the cache
        images = data.cifar10(folder)
        assert images.train_x.shape == (10, 3, 32, 32)
        assert images.train_y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert images.test_y.tolist() == [5, 5]
        assert images.test_x.unique().tolist() == pytest.approx([7 / 255])
        assert sorted(path.name for path in cifar_home.cache.iterdir()) == sorted(data.CIFAR_FILES)


def test_damaged_cifar10_is_an_error(cifar_home: CifarHome, tmp_path: Path) -> None:
    (cifar_home.folder / "test_batch.bin.xz").write_bytes(lzma.compress(b"something else"))
    with pytest.raises(data.DataError, match=r"test_batch\.bin is damaged"):
        data.cifar10(cifar_home.folder)
    (cifar_home.folder / "test_batch.bin.xz").write_bytes(b"no xz")
    with pytest.raises(data.DataError, match=r"cannot read .*test_batch\.bin\.xz"):
        data.cifar10(cifar_home.folder)
    with pytest.raises(data.DataError, match="no CIFAR-10 in"):
        data.cifar10(tmp_path / "cache")


def test_the_choice_of_cuts_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On noise of the images' shape: unpacking the real ones takes longer than the rest."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    monkeypatch.chdir(tmp_path)
    choice = load_experiment("cut_choice")
    parts = torch.rand(48, 3, 32, 32), torch.arange(48) % 10
    monkeypatch.setattr(choice, "cifar10", lambda _: data.Digits("cifar10", *parts, *parts))
    arguments = ["--steps", "2", "--stages", "2", "--seeds", "0", "--limit", "32"]
    monkeypatch.setattr(sys, "argv", ["cut_choice.py", *arguments])
    assert choice.main() == 0
    first = capsys.readouterr().out
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 7  # backprop, and three sources at two kinds of cuts
    monkeypatch.delattr(choice, "run_one")  # nothing is left to do
    assert choice.main() == 0
    assert capsys.readouterr().out == first
