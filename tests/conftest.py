"""Small networks, made images, a training and a sweep that the tests share."""

import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import export, files_of, sweep
from PIL import Image
from torch import nn

from sparsity.data.images import Split
from sparsity.figures import style

CLASSES = ("green", "red", "violet")
TINY = ["--arch", "resnet18", "--width", "4", "--image_size", "8", "--batch_size", "16", "--precision", "fp32"]


def pytest_configure(config):
    """Tests run side by side, one process a core; more threads than that, here or in what is started, only wait.

    Only tests marked `cuda` see a GPU.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Where there is no GPU, its tests are skipped."""
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish():
    """What was imported and collected stays: to look through it for garbage over and over takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


class SmallNet(nn.Module):
    """Two convolutions with BatchNorm, a hidden linear layer, and an output layer with an innocent name."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.down_bn = nn.BatchNorm2d(8)
        self.result = nn.Linear(10, classes)  # defined before the hidden layer, runs after it
        self.hidden = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(self.down_bn(self.down(x)))
        x = F.avg_pool2d(x, x.shape[-2:]).flatten(1)
        return self.result(F.relu(self.hidden(x)))


def awaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give BatchNorm statistics and weights as training leaves them, so that folding has something to get wrong."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=draw) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=draw)
            nn.init.normal_(module.bias, 0, 0.3, generator=draw)
    return model.eval()


@pytest.fixture
def small_net() -> nn.Module:
    torch.manual_seed(0)
    return awaken(SmallNet())


@pytest.fixture
def small_split() -> Split:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=draw)
    return Split(images, torch.arange(50) % 4, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.fixture
def files(tmp_path):
    """The files of a test's own sweep."""
    return files_of(tmp_path, "net_pruning")


def write_image_folder(root: Path, train: int = 16, test: int = 8, size: int = 8) -> Path:
    """A folder dataset of noisy images, one colour a class."""
    draw = np.random.default_rng(0)
    colours = {"green": (40, 160, 60), "red": (170, 60, 40), "violet": (120, 40, 160)}
    for split, count in (("train", train), ("test", test)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = draw.normal(colours[name], 70, (size, size, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("data") / "colours")


def train_arguments(folder: Path, out: Path, *extra: str) -> list[str]:
    """Flags of a training that takes a second."""
    places = ["--checkpoint_dir", str(out / "checkpoints"), "--images_dir", str(out / "images")]
    return ["--dataset", "folder", "--data_dir", str(folder), *places, *TINY, "--threads", "1", *extra]


def train(folder: Path, out: Path, *extra: str) -> Path:
    """Train a small network; returns the folder of its outputs."""
    import run  # here, so that tests of a room run whatever state the scripts are in

    assert run.main(train_arguments(folder, out, *extra)) == 0
    return out


@pytest.fixture(scope="session")
def trained(image_folder, tmp_path_factory) -> Path:
    """A folder with the checkpoints and pictures of a finished training of three epochs."""
    return train(image_folder, tmp_path_factory.mktemp("trained"), "--epochs", "3", "--save_every", "2")


@pytest.fixture(scope="session")
def tiny_checkpoint(trained) -> Path:
    return trained / "checkpoints" / "colours_resnet18_ckpt_epoch3.pth"


NET = """from torch import nn
def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))
"""


@pytest.fixture(scope="session")
def accurate(tmp_path_factory) -> list[str]:
    """Flags that name a network of 2,500 parameters that gets nearly all of its 180 test images right."""
    out = tmp_path_factory.mktemp("accurate")
    (out / "small.py").write_text(NET)
    arch = ["--arch", f"{out / 'small.py'}:net"]
    images = write_image_folder(out / "colours", train=16, test=60)
    places = ["--checkpoint_dir", str(out / "checkpoints"), "--images_dir", str(out / "images")]
    import run

    flags = ["--dataset", "folder", "--data_dir", str(images), *places, *arch, *TINY[4:], "--threads", "1"]
    assert run.main([*flags, "--epochs", "8", "--learning_rate", "0.05"]) == 0
    return ["--checkpoint", str(out / "checkpoints" / "colours_small_net_ckpt_epoch8.pth"), *arch]


@pytest.fixture(scope="session")
def sweep_of_two(tiny_checkpoint, tmp_path_factory) -> Path:
    """The folder of a finished sweep of `tiny_checkpoint` at 0 and 50 percent, with --precision fp32 --threads 1."""
    out = tmp_path_factory.mktemp("two")
    assert sweep(out, "--checkpoint", tiny_checkpoint, "--levels", "0,50") == 0
    return out


@pytest.fixture
def swept_at_two(sweep_of_two, tmp_path) -> Path:
    """A test's own folder, in which that sweep has run: the table."""
    shutil.copytree(sweep_of_two, tmp_path, dirs_exist_ok=True)
    return tmp_path / "colours_resnet18_pruning.csv"


@pytest.fixture(scope="session")
def program_sweep(tiny_checkpoint, tmp_path_factory) -> Path:
    """The folder of a sweep of whole filters of `tiny_checkpoint` whose networks are in `files/*.pt2`."""
    out = tmp_path_factory.mktemp("programs")
    flags = ["--criterion", "filter_l1", "--export", "0,50,100", "--export_format", "program"]
    assert export(out, "--checkpoint", tiny_checkpoint, *flags) == 0
    return out


@pytest.fixture
def without_pictures(monkeypatch):
    """For trainings whose pictures no test looks at."""
    for name in ("plot_training", "plot_confusion"):
        monkeypatch.setattr(f"run.{name}", lambda *args: None)


@pytest.fixture(autouse=True)
def threads_as_found():
    """The scripts set the number of threads of the whole process; put it back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are made, which are not drawn."""
    made = []
    keep = lambda figure, path, *title: made.append(figure) or figure.suptitle("\n".join(title))  # noqa: E731
    monkeypatch.setattr(style, "save_figure", keep)
    return made


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of the folder that the fixture `made` of a test file makes, to work in."""
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"
