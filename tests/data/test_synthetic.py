"""The synthetic data: the same bytes everywhere, nothing to see in its colours, and learnable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cifar_hpc.config.spec import AugmentConfig
from cifar_hpc.data import synthetic
from cifar_hpc.data.augment import kernels
from cifar_hpc.data.augment import pipeline as A
from cifar_hpc.data.info import DatasetInfo
from cifar_hpc.data.synthetic import CLASSES, make_synthetic
from cifar_hpc.randomness import Stream, mix, permutation, uniform


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations on many threads crawl when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


Data = tuple[Tensor, Tensor, Tensor, Tensor]


def digest(data: Data) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in data)).hexdigest()


@pytest.fixture(scope="module")
def data() -> Data:
    return make_synthetic(8000, 2000)


def test_golden_digest(data: Data) -> None:
    first = make_synthetic(300, 200)
    assert digest(first) == "d231c2d54d5f629a1dcd5a938af6218bfbbb05b8682c92489e7ec2dd4c5720ea"
    other = make_synthetic(30, 20, seed=12345)
    assert digest(other) == "45663dcf6d5ba7437299c666d19d6c95c62a3b090ebba8cc1b1ff0e7d89f19bd"
    assert digest(data) == "450a52e8c388b91613800443cd2335ce374c4f93b898a555cc5c648c8f6f6b1e"


def test_shapes_types_and_balance(data: Data) -> None:
    train, train_labels, test, test_labels = data
    assert train.shape == (8000, 3, 32, 32) and test.shape == (2000, 3, 32, 32)
    assert train.dtype == test.dtype == torch.uint8
    assert train_labels.dtype == test_labels.dtype == torch.int64
    assert torch.bincount(train_labels).tolist() == [800] * 10
    assert torch.bincount(test_labels).tolist() == [200] * 10
    assert torch.bincount(make_synthetic(123, 0)[1], minlength=10).tolist() == [13] * 3 + [12] * 7
    runs = int((train_labels[1:] == train_labels[:-1]).sum())
    assert 700 < runs < 900  # shuffled: a tenth of the neighbours agree
    assert [t.shape[0] for t in make_synthetic(0, 1)] == [0, 0, 1, 1]


def test_does_not_depend_on_threads_chunks_or_global_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, threads = digest(make_synthetic(300, 20)), torch.get_num_threads()
    torch.manual_seed(5)
    monkeypatch.setattr(synthetic, "_CHUNK", 77)
    try:
        torch.set_num_threads(3)
        assert digest(make_synthetic(300, 20)) == expected
    finally:
        torch.set_num_threads(threads)


def test_seeds_and_sets_differ(data: Data) -> None:
    other = make_synthetic(2000, 2000, seed=1)
    assert not torch.equal(other[3], data[3])
    images = torch.cat([data[0], data[2], other[0], other[2]]).flatten(1)
    assert len(torch.unique(images, dim=0)) == len(images)


def test_refuses_a_negative_size() -> None:
    with pytest.raises(ValueError, match="size"):
        make_synthetic(-1, 1)


def colours(images: Tensor, deviation: bool, squares: bool) -> Tensor:
    x = images.double() / 255
    features = x.mean((2, 3))
    if deviation:
        features = torch.cat([features, x.std((2, 3))], 1)
    if squares:
        features = torch.cat([features, (features[:, :, None] * features[:, None]).flatten(1)], 1)
    return torch.cat([features, torch.ones(len(x), 1, dtype=torch.float64)], 1)


def least_squares_accuracy(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    targets = nn.functional.one_hot(labels, 10).double()
    weights = torch.linalg.lstsq(features, targets, driver="gelsd").solution
    return float(((test_features @ weights).argmax(1) == test_labels).double().mean())


@pytest.mark.parametrize("deviation", [False, True])
@pytest.mark.parametrize("squares", [False, True])
def test_colours_do_not_tell_the_class(data: Data, deviation: bool, squares: bool) -> None:
    train, labels, test, test_labels = data
    a, b = colours(train, deviation, squares), colours(test, deviation, squares)
    assert least_squares_accuracy(a, labels, b, test_labels) < 0.20


def test_that_classifier_would_see_colours(data: Data) -> None:
    """The check above can fail: a slight tint for each class is enough."""
    train, labels, test, test_labels = data
    tint = (uniform(1, torch.arange(10), 3) * 100)[:, :, None, None]
    a = colours((train * 0.6 + tint[labels]).to(torch.uint8), False, False)
    b = colours((test * 0.6 + tint[test_labels]).to(torch.uint8), False, False)
    assert least_squares_accuracy(a, labels, b, test_labels) > 0.3


def test_a_small_network_learns_it_under_augmentation(data: Data) -> None:
    train, labels, test, test_labels = data
    steps, batch, config = 260, 64, AugmentConfig()

    def layer(channels: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *layer(3, 8),
            nn.MaxPool2d(2),
            *layer(8, 16),
            nn.MaxPool2d(2),
            *layer(16, 32),
            nn.MaxPool2d(2),
            *layer(32, 32),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, len(CLASSES)),
        )
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    epochs = steps * batch // len(labels) + 1
    order = torch.cat([permutation(0, epoch, len(labels)) for epoch in range(epochs)])
    for step in range(steps):
        samples = order[step * batch : (step + 1) * batch]
        draws = uniform(mix(0, Stream.AUGMENT, step), samples, kernels.DRAWS)
        loss = nn.functional.cross_entropy(
            net(A.augment(train[samples], draws, config, DatasetInfo())), labels[samples]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        accuracy = float((net(A.normalize(test, DatasetInfo())).argmax(1) == test_labels).float().mean())
    assert accuracy > 0.85, accuracy
