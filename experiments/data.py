"""The data sets of the experiments: real digits, checked before use, with no dependency on a fixed
machine.

``digits`` comes with scikit-learn (8 x 8 pixels). ``mnist`` and ``cifar10`` are read from a
directory, or downloaded once into the user's cache; either way SHA-256 sums are verified, so a
broken file is one clear error and never bad training.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import tarfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MNIST_FILES = {  # name: (SHA-256, length of the idx header in bytes, shape)
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609", 16, (60000, 1, 28, 28),
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c", 8, (60000,),
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6", 16, (10000, 1, 28, 28),
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6", 8, (10000,),
    ),
}  # fmt: skip
MNIST_HOMES = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
# SHA-256 of the files as they are in the archive; the last one holds the test images
CIFAR_FILES = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
DATA_VARIABLE = "DNI_FX_DATA"
NEIGHBOUR = Path(__file__).resolve().parents[2] / "shared" / "data"


class DataError(RuntimeError):
    """A data set is missing or damaged; the message says which file and what to do."""


class Digits(NamedTuple):
    """Images ``(samples, channels, height, width)`` as float32 in [0, 1] and labels ``(samples,)``
    as int64.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def pixels(self) -> int:
        """Number of values of one image."""
        return self.train_x[0].numel()


def digits() -> Digits:
    """1,797 real handwritten digits of 8 x 8 pixels, a fifth of each class held out (always the
    same fifth).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = bunch.images[:, None].astype(np.float32) / 16.0
    labels = bunch.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return Digits("digits", train_x, train_y, test_x, test_y)


def mnist(directory: str | Path | None = None) -> Digits:
    """MNIST: 60,000 training and 10,000 test digits of 28 x 28 pixels.

    Args:
        directory: where the four original ``.gz`` files are, or the folder above their ``mnist``
            folder. By default the environment variable ``DNI_FX_DATA``, else ``../shared/data``
            beside the repository where it exists, else the user's cache, filled by a download from
            MNIST's public home.

    Raises:
        DataError: a file is missing, damaged or cannot be downloaded.
    """
    found = find_mnist(directory)
    folder = found or cache_directory() / "mnist"
    arrays = []
    for name, (_, header, shape) in MNIST_FILES.items():
        packed = read_verified(folder / name) if found else read_or_download(folder / name)
        arrays.append(
            np.frombuffer(gzip.decompress(packed), np.uint8, offset=header).reshape(shape)
        )
    train_x, train_y, test_x, test_y = arrays
    return Digits(
        "mnist",
        torch.from_numpy(train_x.astype(np.float32) / 255.0),
        torch.from_numpy(train_y.astype(np.int64)),
        torch.from_numpy(test_x.astype(np.float32) / 255.0),
        torch.from_numpy(test_y.astype(np.int64)),
    )


def cifar10(directory: str | Path | None = None) -> Digits:
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 pixels in three colours.

    Args:
        directory: where the six binary files are, plain or packed (``.bin`` or ``.bin.xz``), or the
            folder above their ``cifar10`` or ``cifar-10-batches-bin`` folder. By default as for
            :func:`mnist`.

    Raises:
        DataError: a file is missing, damaged or cannot be downloaded.
    """
    contents = _cifar_files(directory)
    images, labels = [], []
    for name in CIFAR_FILES:
        records = np.frombuffer(contents[name], np.uint8).reshape(-1, 3073)
        labels.append(torch.from_numpy(records[:, 0].astype(np.int64)))
        images.append(
            torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / 255.0)
        )
    return Digits("cifar10", torch.cat(images[:-1]), torch.cat(labels[:-1]), images[-1], labels[-1])


def _cifar_files(directory: str | Path | None) -> dict[str, bytes]:
    named = directory or os.environ.get(DATA_VARIABLE)
    cache = cache_directory() / "cifar10"
    for folder in [Path(named)] if named else [cache, NEIGHBOUR]:
        for candidate in (folder, folder / "cifar10", folder / "cifar-10-batches-bin"):
            found = [candidate / f"{name}{end}" for name in CIFAR_FILES for end in ("", ".xz")]
            found = [path for path in found if path.exists()]
            if len({path.name.removesuffix(".xz") for path in found}) == len(CIFAR_FILES):
                contents = {path.name.removesuffix(".xz"): _unpacked(path) for path in found}
                if candidate != cache and any(path.suffix == ".xz" for path in found):
                    _keep(cache, contents)  # unpacking takes some seconds a file
                return contents
    if named:
        raise DataError(
            f"no CIFAR-10 in {named}: expected {', '.join(CIFAR_FILES)} there, plain or as .xz"
        )
    try:
        with urllib.request.urlopen(CIFAR_HOME, timeout=60) as response:
            archive = response.read()
    except (OSError, HTTPException) as error:
        raise DataError(
            f"cannot download {CIFAR_HOME}: {error}. Put CIFAR-10's binary files in a directory "
            f"and name it in {DATA_VARIABLE}."
        ) from error
    contents = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        for member in opened:
            name = Path(member.name).name
            if name in CIFAR_FILES and (file := opened.extractfile(member)) is not None:
                contents[name] = file.read()
                check(name, contents[name], CIFAR_HOME)
    _keep(cache, contents)
    return contents


def _unpacked(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        content = lzma.decompress(content) if path.suffix == ".xz" else content
    except (OSError, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    check(
        path.name.removesuffix(".xz"), content, f"{path}: delete it or put the original file there"
    )
    return content


def _keep(folder: Path, contents: dict[str, bytes]) -> None:
    """Write into the cache, every file at once, so that an interruption leaves no broken one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        partial = folder / f"{name}.{os.getpid()}"
        partial.write_bytes(content)
        partial.replace(folder / name)


def load(name: str, directory: str | Path | None = None) -> Digits:
    """The data set called ``name``: ``"digits"`` or ``"mnist"``."""
    if name == "digits":
        return digits()
    if name == "mnist":
        return mnist(directory)
    raise DataError(f"unknown data set {name!r}: choose 'digits' or 'mnist'")


def find_mnist(directory: str | Path | None = None) -> Path | None:
    """The folder that holds MNIST's files, or None where only a download can help.

    A folder that the user names must hold them: it is an error, not a download, where it does not.
    """
    named = directory or os.environ.get(DATA_VARIABLE)
    for folder in [Path(named)] if named else [NEIGHBOUR]:
        for candidate in (folder, folder / "mnist"):
            if any((candidate / name).exists() for name in MNIST_FILES):
                return candidate
    if named:
        source = "" if directory else f" (from {DATA_VARIABLE})"
        raise DataError(
            f"no MNIST in {named}{source}: expected {', '.join(MNIST_FILES)} there or in its mnist/"
        )
    return None


def cache_directory() -> Path:
    """The user's cache for downloaded data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dni_fx"


def read_verified(path: Path) -> bytes:
    """The file's bytes, once its SHA-256 is known to be right."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    check(path.name, content, f"{path}: delete it or put the original file there")
    return content


def read_or_download(path: Path) -> bytes:
    """The cached file, or a fresh download of it; a damaged cached file is replaced."""
    if path.exists():
        try:
            return read_verified(path)
        except DataError:
            path.unlink()
    problems = []
    for home in MNIST_HOMES:
        try:
            with urllib.request.urlopen(home + path.name, timeout=30) as response:
                content: bytes = response.read()
            check(path.name, content, home)
        except (OSError, HTTPException, DataError) as error:  # urllib's own errors are OSErrors
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            problems.append(f"  {home}: {reason}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)  # at once, so that an interrupted download leaves no broken file
        return content
    raise DataError(
        f"cannot download {path.name}:\n"
        + "\n".join(problems)
        + f"\nPut MNIST's four .gz files in a directory and "
        f"name it in {DATA_VARIABLE}."
    )


def check(name: str, content: bytes, where: str) -> None:
    """Raise a DataError unless the bytes are the published file."""
    expected = CIFAR_FILES[name] if name in CIFAR_FILES else MNIST_FILES[name][0]
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"{name} is damaged (SHA-256 {found[:12]}..., expected {expected[:12]}...) in {where}"
        )
