"""Images and views: every operation against torchvision's own, image by image."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torchvision.datasets import CIFAR100
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as transforms

import micronet
from micronet import MEAN, STD, VIEWS, Augmentation, Stage, augment, load_images, plan_epoch, synthetic_images

N = 64
STAGE = Stage("s", network="efficientnet_b0", dataset="synthetic", train_images=100, test_images=50, batch_size=30)


def test_crop_and_resize() -> None:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=generator)
    height, width = torch.randint(1, 33, (2, N), generator=generator)
    height[0], width[1], height[2], width[2] = 1, 1, 32, 32
    top, left = ((torch.rand(N, generator=generator) * (33 - side)).long() for side in (height, width))
    box = torch.stack([top, left, height, width])
    images = augment(pixels, Augmentation(torch.arange(N), *torch.ones(2, N), *box.float(), torch.zeros(N) > 0))
    assert images.is_contiguous(memory_format=torch.channels_last)
    for image, pixel, corner in zip(images, pixels, box.T.tolist()):
        expected = transforms.resized_crop(pixel.float() / 255, *corner, [32, 32], antialias=True)
        torch.testing.assert_close(image, transforms.normalize(expected, MEAN, STD), atol=4e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [32, 96])
def test_all_at_once_in_the_published_order(side: int) -> None:
    pixels = torch.randint(0, 256, (N, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    plan = plan_epoch(replace(STAGE, batch_size=100, side=side), 1).each(lambda t: t[0])
    for i, image in enumerate(augment(pixels[plan.image % N], plan)):
        how = [value[i].item() for value in plan]
        expected = pixels[how[0] % N].float() / 255
        expected = transforms.adjust_brightness(expected, how[1])
        expected = transforms.adjust_contrast(expected, how[2])
        expected = transforms.resized_crop(expected, *(int(v) for v in how[3:7]), [side, side], antialias=True)
        expected = transforms.hflip(expected) if how[7] else expected
        torch.testing.assert_close(image, transforms.normalize(expected, MEAN, STD), atol=8e-5, rtol=1e-5)
    crops = plan.height < side
    assert (plan.top[crops] + plan.height[crops] > 0.8 * side).any() and (plan.height[crops] > side / 2).any()


@pytest.mark.parametrize("name", VIEWS)
def test_views_draw_from_torchvisions_distributions(name: str) -> None:
    """Means and quantiles of 20,000 boxes beside as many of RandomResizedCrop; 0.2 px is four standard errors."""
    n, view = 20_000, VIEWS[name]
    plan = plan_epoch(replace(STAGE, train_images=n, batch_size=n, views=(name,)), 1).each(lambda t: t[0])
    image = torch.empty(3, 32, 32)
    torch.manual_seed(0)
    boxes = torch.tensor([RandomResizedCrop.get_params(image, list(view.area), list(view.aspect)) for _ in range(n)])
    ours = torch.stack([plan.top, plan.left, plan.height, plan.width], 1)
    assert (ours.mean(0) - boxes.float().mean(0)).abs().max() < 0.2
    steps = torch.linspace(0, 1, 11)
    assert (ours.quantile(steps, 0) - boxes.float().quantile(steps, 0)).abs().max() <= 1
    assert abs(plan.flip.float().mean() - 0.5) < 0.02
    for factor in (plan.brightness, plan.contrast):
        assert factor.min() >= 1 - view.jitter and factor.max() <= 1 + view.jitter
        assert abs(factor.std() - 2 * view.jitter / math.sqrt(12)) < 0.005
    assert torch.corrcoef(torch.stack([plan.brightness, plan.contrast]))[0, 1].nan_to_num().abs() < 0.03


def test_an_epoch_is_every_image_once_under_every_view() -> None:
    plan = plan_epoch(replace(STAGE, batch_size=50), 3)
    assert plan.image.shape == (6, 50)
    assert plan.image.flatten().bincount().tolist() == [3] * 100
    jittered = plan.brightness != 1
    whole = (plan.height == 32) & (plan.width == 32)
    assert 190 <= jittered.sum() <= 200  # jitter, jitter-crop
    assert 100 <= whole.sum() <= 115  # jitter, and now and then a crop


def test_the_last_batch_is_filled_from_the_start_of_the_order() -> None:
    order, stage = plan_epoch(STAGE, 1).image, replace(STAGE, batch_size=70)
    filled = plan_epoch(stage, 1).image.flatten()
    assert order.shape == (10, 30) and stage.steps_per_epoch == 5
    assert torch.equal(filled[:300], order.flatten()) and torch.equal(filled[300:], filled[:50])


def test_the_plan_is_a_function_of_seed_stage_and_epoch() -> None:
    others = [(STAGE, 1), (STAGE, 2), (replace(STAGE, seed=1), 1), (replace(STAGE, name="t"), 1)]
    plans = [tuple(plan_epoch(*which).image[0].tolist()) for which in others]
    assert plan_epoch(STAGE, 1).image[0].tolist() == list(plans[0]) and len(set(plans)) == 4


def test_synthetic_images_are_the_same_everywhere() -> None:
    images = synthetic_images(1500, train=True)
    assert images.pixels.shape == (1500, 3, 32, 32) and images.pixels.dtype == torch.uint8
    assert images.labels.bincount().tolist() == [150] * 10 and len(images.class_names) == 10
    assert torch.equal(images.pixels[:10], synthetic_images(10, train=True).pixels)
    assert not torch.equal(images.pixels[:10], synthetic_images(10, train=False).pixels)
    assert images.pixels[:4, :, 0, 0].tolist() == [[96, 131, 153], [203, 83, 222], [224, 88, 120], [87, 96, 178]]


def test_synthetic_shapes_survive_a_flip() -> None:
    u = torch.linspace(-1.2, 1.2, 49).expand(49, 49)
    for name, shape in micronet.SHAPES.items():
        drawn = shape(u, u.T)
        assert torch.equal(drawn, drawn.flip(1)), name
        assert 0.05 < drawn.float().mean() < 0.8, name


def test_cifar100_is_torchvisions(cifar100: Path) -> None:
    stage = replace(STAGE, dataset="cifar100", train_images=200, test_images=None)
    for part in ("train", "validation", "test"):
        images, oracle = load_images(stage, cifar100, part), CIFAR100(cifar100, train=part == "train")
        assert len(images.labels) == (200 if part == "train" else 10_000)
        assert images.class_names == oracle.classes and images.class_names[0] == "apple"
        for i in (0, 7, 199):
            picture, label = oracle[i]
            assert torch.equal(images.pixels[i], transforms.pil_to_tensor(picture)) and images.labels[i] == label


def test_mean_and_deviation_are_those_of_cifar10() -> None:
    """Which the method's authors take for CIFAR-100 [1]."""
    if not (data := ROOT / "data" / "cifar-10-batches-py").exists():
        pytest.skip("no CIFAR-10 in data/")
    pixels = load_images(Stage("s", network="efficientnet_b0", dataset="cifar10"), data.parent, "train").pixels
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([pixels[:, channel].flatten().bincount(minlength=256) for channel in range(3)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    mean, square = shares @ values, shares @ values**2
    assert [round(v, 4) for v in mean.tolist()] == list(MEAN)
    assert (square - mean**2).sqrt().tolist() == pytest.approx(STD, abs=2e-4)


def test_missing_cifar100_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    stage = replace(STAGE, dataset="cifar100")
    with pytest.raises(micronet.Refused, match="no CIFAR100 here that matches .*no network.*name --data") as error:
        load_images(stage, tmp_path, "train")
    assert "\n" not in str(error.value)
