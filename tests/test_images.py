"""Images of one's own: folders, files of every kind, sides, and a stage that trains on them."""

import io
import itertools
import json
import os
import re
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ONE_EPOCH, ROOT, TINY, build_network, drawn, invoke, refused
from PIL import Image
from test_training import same_training
from torch import Tensor, nn
from torchvision.models import efficientnet_b0
from torchvision.transforms import functional as transforms

import micronet
from micronet import Refused, Stage, load_images, open_run, read_metadata, scan_folder

PHOTOS = TINY.replace('"synthetic"', '"folder:pets"').replace("train_images = 40\ntest_images = 50\n", "side = 64\n")


def photo(label: int, i: int, size: tuple[int, int]) -> Image.Image:
    """A photograph of nothing: a bright or dark ground with some noise."""
    noise = torch.Generator().manual_seed(1000 * label + i)
    grey = 60 + 120 * label + torch.randint(-40, 40, (3, size[1], size[0]), generator=noise)
    return transforms.to_pil_image(grey.to(torch.uint8))


def messy(folder: Path, parts: dict[str, int]) -> Path:
    """Fill a folder with two classes of photographs as people have them, so many a class and part, and return it."""
    for part, n in parts.items():
        for label, name in enumerate(("cat", "dog")):
            (inner := folder / part / name / "2026 été").mkdir(parents=True)
            for i in range(n):
                image = photo(label, i, (70 + 7 * i, 90))
                mode, ending = [("RGB", "JPG"), ("L", "png"), ("P", "png"), ("CMYK", "jpeg"), ("RGBA", "webp")][i % 5]
                (exif := Image.Exif())[0x112] = 1 + i % 8
                place = inner if i % 2 else folder / part / name
                image.convert(mode).save(place / f"{i}.{ending}", exif=exif)
            for litter in (".DS_Store", "Thumbs.db", ".hidden.png", "desktop.ini"):
                (folder / part / name / litter).write_bytes(b"x")
            (folder / part / name / ".ipynb_checkpoints").mkdir()
            (folder / part / name / ".ipynb_checkpoints" / "0.png").write_bytes(b"x")
        (folder / part / "notes.txt").write_text("in no class")
        (folder / part / ".git").mkdir()
    return folder


def shapes(folder: Path, images: micronet.Images, part: str) -> None:
    """Write images as PNG files, named so that a folder has them in the same order."""
    classes = [f"{k:03} {name}" for k, name in enumerate(images.class_names)]
    names, step = itertools.count(), 2**63 // len(images.labels)
    for i, (pixels, label) in enumerate(zip(images.pixels, images.labels)):
        tried = (Path(classes[label], f"{name}.png") for name in names)
        path = next(path for path in tried if micronet.stream_seed(path.as_posix()) // step == i)  # its place
        (folder / part / path).parent.mkdir(parents=True, exist_ok=True)
        transforms.to_pil_image(pixels).save(folder / part / path)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage trained on photographs, in a folder that nobody may change: stages.toml, data and ckpt."""
    home = tmp_path_factory.mktemp("pets")
    messy(home / "data" / "pets", {"train": 20, "val": 6, "test": 8})
    (home / "stages.toml").write_text(PHOTOS)
    for name in ("first", "second"):
        assert train(home, name).exit_code == 0
    return home


def train(home: Path, name: str, *options: object) -> object:
    given = ["--stages", home / "stages.toml", "--data", home / "data", "--ckpt", home / "ckpt"]
    return invoke("run-stage", name, *given, *options)


# ------------------------------------------------------------------------------------------------------------- folders


def test_the_order_mixes_classes_and_knows_no_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names as Linux and as macOS write them, listed in either order; two folders of validation images are one."""
    orders = []
    for form, step, names in (("é", 1, ["val", "val"]), ("e\u0301", -1, ["validation", "val"])):
        folder = tmp_path / str(step) / "x"
        for part in ("train", "test", *names):
            for label in "ab":
                (folder / part / f"{label}{form}").mkdir(parents=True, exist_ok=True)
        for label in "ab":
            for i in range(20):
                for part in ("train", "test", names[i % 2]):
                    photo(0, i, (32, 32)).save(folder / part / f"{label}{form}" / f"{i}{form}.png")
        walk = os.walk
        with monkeypatch.context() as patch:
            patch.setattr(os, "walk", lambda *a, **k: ((at, d, sorted(f)[::step]) for at, d, f in walk(*a, **k)))
            stage = Stage("s", network="b0", dataset="folder:x", folder=scan_folder(folder))
            orders.append([load_images(stage, folder.parent, part) for part in ("train", "validation", "test")])
    for one, other in zip(*orders):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)
        assert one.class_names == other.class_names == ["aé", "bé"]
        assert 5 < (one.labels[1:] != one.labels[:-1]).sum() < 35  # 19.5 expected
    train, validation, test = orders[0]
    assert torch.equal(train.pixels, validation.pixels) and torch.equal(train.pixels, test.pixels)


@pytest.mark.parametrize("dataset", ["synthetic", "cifar10"])
def test_png_files_train_the_same_network_to_the_bit(dataset: str, tmp_path: Path) -> None:
    if dataset == "cifar10" and not (ROOT / "data" / "cifar-10-batches-py").exists():
        pytest.skip("no CIFAR-10 in data/")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-batches-py").symlink_to(ROOT / "data" / "cifar-10-batches-py")
    stage = Stage("first", network="efficientnet_b0", dataset=dataset, train_images=40, test_images=50)
    found = {}
    for part in ("train", "test"):
        found[part] = load_images(stage, tmp_path / "data", part)
        shapes(tmp_path / "data" / "png", found[part], part)
    stage = replace(stage, dataset="folder:png", folder=scan_folder(tmp_path / "data" / "png"))
    for part in list(found):
        images = load_images(stage, tmp_path / "data", part)
        assert torch.equal(images.pixels, found[part].pixels) and torch.equal(images.labels, found.pop(part).labels)
    for kind in (dataset, "folder:png"):
        (tmp_path / "stages.toml").write_text(ONE_EPOCH.replace('"synthetic"', f'"{kind}"'))
        assert train(tmp_path, "first", "--restart").exit_code == 0  # which a changed stage needs
    assert same_training(*(tmp_path / "ckpt" / name / "last.safetensors" for name in ("first.old1", "first")))


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {  # what is done to a sound folder, and what is said
    "none": (lambda f: f.rename(f.with_name("cats")), "{folder}: no such folder: expected images in train/CLASS/"),
    "no test": (lambda f: (f / "test").rename(f / "tests"), "class cat has no images in test/"),
    "one class": (lambda f: [(f / p / "dog").rename(f / f"{p}.dog") for p in ("train", "test")], "1 class in train/CLASS/"),
    "no class": (lambda f: [(f / p).rename(f / f"{p}.old") for p in ("train", "test")], "0 classes in train/CLASS/"),
    "missing in train": (lambda f: (f / "train" / "cat").rename(f / "cat"), "class cat has no images in train/"),
    "missing in val": (lambda f: messy(f / "x", {"val": 1}).joinpath("val").rename(f / "val").joinpath("dog").rename(f / "dog"),
                       "class dog has no images in validation/"),
    "empty": (lambda f: [path.unlink() for path in (f / "test" / "dog").rglob("[0-9]*") if path.is_file()],
              "class dog has no images in test/"),
    "control": (lambda f: [(f / p / "dog").rename(f / p / "d\x1b\n") for p in ("train", "test")],
                'class "d\\u001b\\n": expected a name that can be printed'),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistaken_folder_is_one_line_and_exit_code_2(kind: str, tmp_path: Path) -> None:
    change, message = MISTAKES[kind]
    folder = messy(tmp_path / "data" / "pets", {"train": 1, "test": 1})
    (tmp_path / "stages.toml").write_text(PHOTOS.replace("batch_size = 20", "batch_size = 2"))
    change(folder)
    begun = f'error: {tmp_path / "stages.toml"}: stage first: dataset = "folder:pets": {folder}: '
    assert refused(train(tmp_path, "first"), begun, message.format(folder=folder))


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = messy(tmp_path / "data" / "pets", {"train": 20, "test": 1}) / "train" / "dog" / "2026 été"
    (tmp_path / "stages.toml").write_text(PHOTOS)
    scan = os.scandir

    def scandir(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    (gone := tmp_path / "data" / "pets" / "train" / "fox").symlink_to("nowhere")
    assert refused(train(tmp_path, "first"), f"error: {gone}: No such file or directory\n", code=5)
    gone.unlink()
    monkeypatch.setattr(os, "scandir", scandir)
    assert refused(train(tmp_path, "first"), f"error: {closed}: Permission denied\n", code=5)


# -------------------------------------------------------------------------------------------------------------- pixels


def read(image: Image.Image, kind: str, tmp_path: Path, side: int = 32, **options: object) -> Tensor:
    image.save(path := tmp_path / f"image.{kind}", **options)
    return micronet.read_images([path], side)[0]


def test_a_square_of_that_side_is_kept_to_the_bit(tmp_path: Path) -> None:
    image = photo(0, 0, (64, 64))
    assert torch.equal(read(image, "png", tmp_path, 64), transforms.pil_to_tensor(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns(orientation: int, tmp_path: Path) -> None:
    """Where the first row and the first column of what is stored belong, by the EXIF standard."""
    rows, columns = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    stored = torch.zeros(3, 32, 32, dtype=torch.uint8)
    stored[0, 0], stored[1, :, 0] = 255, 255  # red: row 0; green: column 0
    (exif := Image.Exif())[0x112] = orientation
    seen = read(transforms.to_pil_image(stored), "png", tmp_path, exif=exif)
    edges = {"top": seen[:, 0], "bottom": seen[:, -1], "left": seen[:, :, 0], "right": seen[:, :, -1]}
    assert edges[rows][0].min() == 255 and edges[columns][1].min() == 255
    assert seen[0].sum() == 32 * 255 == seen[1].sum()


def test_colours(tmp_path: Path) -> None:
    """Every mode of files that people have, of one colour each; what is transparent is laid over white."""
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    for image, kind, options, expected in (
        (Image.new("RGB", (40, 40), (10, 200, 30)), "png", {}, (10, 200, 30)),
        (Image.new("L", (40, 40), 77), "png", {}, (77, 77, 77)),
        (Image.new("1", (40, 40), 1), "png", {}, (255, 255, 255)),
        (palette, "png", {}, (10, 200, 30)),
        (palette, "gif", {"transparency": 1}, (255, 255, 255)),
        (Image.new("RGBA", (40, 40), (10, 200, 30, 51)), "png", {}, (206, 244, 210)),  # 0.2 c + 0.8 x 255
        (Image.new("LA", (40, 40), (0, 0)), "png", {}, (255, 255, 255)),
        (Image.new("CMYK", (40, 40), (255, 0, 0, 0)), "jpg", {"quality": 100}, (0, 255, 255)),
        (Image.new("CMYK", (40, 40), (0, 0, 0, 155)), "tiff", {}, (100, 100, 100)),
    ):
        seen = read(image, kind, tmp_path, **options).float()
        assert (seen - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 2, (image.mode, kind)


def test_the_middle_square_is_resized_with_antialiasing(tmp_path: Path) -> None:
    for size in ((96, 160), (160, 96)):
        image = photo(0, 1, size)
        middle = transforms.center_crop(image, [96, 96])
        expected = transforms.pil_to_tensor(transforms.resize(middle, [32, 32], transforms.InterpolationMode.BICUBIC))
        seen = read(image, "png", tmp_path)  # at whose edges the filter takes pixels beyond the square, too
        assert torch.equal(seen[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2])
        assert (seen.float() - expected.float()).abs().max() < 12
    lines = torch.arange(512).remainder(2).mul(255).to(torch.uint8).expand(3, 512, 512)  # finer than 32 pixels can show
    assert (read(transforms.to_pil_image(lines), "png", tmp_path).float() - 127.5).abs().max() < 8


def test_a_large_jpeg_looks_as_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.radial_gradient("L").resize((1600, 1600)).convert("RGB")
    drafted, sizes = read(image, "jpg", tmp_path, quality=95).float(), []
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda image, mode, size: sizes.append(size))
    assert (drafted - read(image, "jpg", tmp_path, quality=95).float()).abs().max() < 4 and sizes == [(64, 64)]


def png16(path: Path) -> None:
    """Write a PNG of 16 bits a channel, RGB, which Pillow reads as if it had 8."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header, rows = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0), (b"\0" + bytes(24)) * 4
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_what_cannot_be_read_is_counted_and_three_are_named(tmp_path: Path) -> None:
    folder = messy(tmp_path / "data" / "pets", {"train": 20, "val": 2, "test": 2}) / "train" / "cat"
    (tmp_path / "stages.toml").write_text(PHOTOS)
    buffer = io.BytesIO()
    photo(0, 0, (90, 90)).save(buffer, "jpeg")
    bad = {
        "cut.jpg": (lambda p: p.write_bytes(buffer.getvalue()[:-500]), "truncated"),
        "empty.png": (lambda p: p.write_bytes(b""), "no image, or of a kind"),
        "notes.txt": (lambda p: p.write_text("x"), "no image, or of a kind"),
        "pipe.png": (os.mkfifo, "not a file"),
        "gone.png": (lambda p: p.symlink_to("nowhere"), "No such file"),
        "folder": (lambda p: p.symlink_to("."), "not a file"),
        "grey16.png": (lambda p: Image.new("I;16", (9, 9)).save(p), "more than 8 bits a channel"),
        "rgb48.png": (png16, "more than 8 bits a channel"),
        "float.tiff": (lambda p: Image.new("F", (9, 9)).save(p), "more than 8 bits a channel"),
    }
    for name, (make, message) in bad.items():
        make(folder / name)
        begun = f"error: 1 of 41 images cannot be read: {folder / name}: "
        assert refused(train(tmp_path, "first"), begun, message, code=3) and not (tmp_path / "ckpt" / "first").exists()
        (folder / name).unlink()
    for name in list(bad)[:5]:
        bad[name][0](folder / name)
    result = train(tmp_path, "first")
    assert result.exit_code == 3 and "error: 5 of 45 images cannot be read: " in result.stderr
    assert sum(name in result.stderr for name in bad) == 3


def test_a_signal_does_not_wait_for_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Path] = []
    monkeypatch.setattr(micronet, "read_image", lambda path, side: (begun.append(path), time.sleep(0.01))[1] or "bad")

    def watch(items: list[Path], what: str) -> object:
        yield items[0]
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        micronet.read_images([tmp_path] * 1000, 32, watch)
    assert len(begun) < 500


def test_images_that_do_not_fit_are_refused_with_the_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "1,000,000 images of 96 x 96 pixels take 26,367 MiB, 2,048 MiB of memory are free"
    with pytest.raises(Refused, match=words):
        micronet.check_memory(torch.Size((10**6, 3, 96, 96)), 2**31)
    read(photo(0, 0, (32, 32)), "png", tmp_path)
    for kb in (3, 2):  # of which it takes three
        monkeypatch.setattr(Path, "read_text", lambda path, kb=kb: f"MemFree: 99999 kB\nMemAvailable:   {kb} kB\n")
        if kb == 3:
            micronet.read_images([tmp_path / "image.png"], 32)
    with pytest.raises(Refused, match="1 image of 32 x 32 pixels take 0 MiB, 0 MiB of memory are free: lower side"):
        micronet.read_images([tmp_path / "image.png"], 32)


# -------------------------------------------------------------------------------------------------------------- stages


def test_the_best_epoch_is_chosen_on_validation_images_and_test_left_to_evaluate(pets: Path) -> None:
    about = read_metadata(pets / "ckpt" / "second")
    names = ("cat", "dog")
    assert about.stage.folder == scan_folder(pets / "data" / "pets") == micronet.Dataset(40, 16, 2, 12, names)
    assert about.stage.folder.test == 16 and about.class_names == names
    assert {round(r.test_top1 * 12 / 100, 6) % 1 for r in about.history} == {0}  # twelfths: 12 validation images
    result = invoke("evaluate", pets / "ckpt" / "second", "--data", pets / "data", "--json")
    (found,) = json.loads(result.stdout)
    assert found["images"] == 16 and found["top5"] == 100  # of two classes
    network = micronet.load_network(pets / "ckpt" / "second")
    images = load_images(about.stage, pets / "data", "test")
    right = network(micronet.normalize(images.pixels / 255)).argmax(1) == images.labels
    assert found["top1"] == pytest.approx(100 * right.float().mean().item())


def test_other_images_end_a_stage_and_another_place_does_not(pets: Path, tmp_path: Path) -> None:
    """Test images may change, as none was looked at; the folder may move, as no path is kept."""
    home, text = tmp_path / "moved", PHOTOS.replace("epochs = 3", "epochs = 2").replace(", [3, 0.002]]", "]")
    folder = messy(home / "data" / "pets", {"train": 20, "val": 6, "test": 8})
    (home / "stages.toml").write_text(text)
    assert train(home, "first").exit_code == 0
    assert str(tmp_path).encode() not in (home / "ckpt" / "first" / "last.safetensors").read_bytes()
    (home / "stages.toml").write_text(PHOTOS)
    photo(1, 99, (80, 80)).save(folder / "test" / "cat" / "0.JPG")
    for part in ("val", "train"):
        path = folder / part / "cat" / "0.JPG"
        content = path.read_bytes()
        photo(1, 99, (80, 80)).save(path)
        assert refused(train(home, "first"), "the images of folder:pets have changed since it began", code=3)
        path.write_bytes(content)
    (folder / "train" / "cat" / "new.png").symlink_to(folder / "train" / "cat" / "0.JPG")
    assert refused(train(home, "first"), "comes from another definition: folder was ")
    (folder / "train" / "cat" / "new.png").unlink()
    (home / "data").rename(home / "elsewhere")
    photo(0, 7, (80, 80)).save(home / "elsewhere" / "pets" / "test" / "cat" / "more.png")
    assert train(home, "first", "--data", home / "elsewhere").exit_code == 0
    one, other = (read_metadata(h / "ckpt" / "first" / "last.safetensors") for h in (home, pets))
    assert one.tensors == other.tensors and one.images == other.images


def test_every_part_of_the_images_counts() -> None:
    images = micronet.synthetic_images(20, train=True)
    others = {"labels": images.labels.clone(), "pixels": images.pixels.clone(), "class_names": [*images.class_names]}
    others["labels"][3], others["pixels"][3, 0, 0, 0], others["class_names"][3] = 7, images.pixels[3, 0, 0, 0] ^ 1, "x"
    digests = {micronet.images_digest(images._replace(**{name: other})) for name, other in others.items()}
    assert len(digests | {micronet.images_digest(images)}) == 4


def test_a_folder_that_changes_while_it_is_read_is_refused(pets: Path, tmp_path: Path) -> None:
    stage = read_metadata(pets / "ckpt" / "first").stage
    for name in ("train", "validation"):
        fewer = replace(stage.folder, **{name: getattr(stage.folder, name) - 1})
        with pytest.raises(Refused, match="images of folder:pets have changed"):
            open_run(replace(stage, folder=fewer), pets / "data", tmp_path, micronet.open_accelerator(), None)


def test_an_export_calls_images_what_they_are(pets: Path, tmp_path: Path) -> None:
    """Those of its epochs, or others of the same classes: test images where the validation images are gone, say."""
    shutil.copytree(pets / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "pets" / "val")
    given = ["export", pets / "ckpt" / "second", tmp_path / "x" / "x.safetensors", "--card", "--json"]
    (result,) = json.loads(invoke(*given, "--data", tmp_path / "data").stdout)
    assert (result["on"], result["images"]) == ("other images", 16)
    card = (tmp_path / "x" / "README.md").read_text()
    assert "of 16 other images |" in card and "was chosen" not in card and "validation" not in card
    assert read_metadata(tmp_path / "x" / "x.safetensors").exported.top1 is None
    for name, words in (("best", ", on which its epoch was chosen |"), ("last", " of epoch 3, the last |")):
        given[1:3] = pets / "ckpt" / "second" / f"{name}.safetensors", tmp_path / name / "x.safetensors"
        assert invoke(*given, "--data", pets / "data").exit_code == 0
        assert f"validation images{words}" in (tmp_path / name / "README.md").read_text()


def test_an_imported_network_exports(tmp_path: Path, few: None) -> None:
    origin, unknown = micronet.Origin("ex.pytar", "0" * 64), micronet.Tested(70, None, None)
    network = micronet.build_network(stage := Stage("imported", network="efficientnet_exx", width=0.1, depth=0.1))
    about = micronet.Metadata(stage, (), 70, unknown, unknown, imported=origin)
    micronet.save_checkpoint(tmp_path / "exx.safetensors", network.state_dict(), about)
    out = tmp_path / "out" / "exx.safetensors"
    assert invoke("export", tmp_path / "exx.safetensors", out, "--card", "--data", tmp_path).exit_code == 0
    assert "efficientnet_exx for 100 classes, as published in ex.pytar." in (out.parent / "README.md").read_text()
    assert not (out.parent / "labels.txt").exists()
    photo(0, 0, (50, 50)).save(tmp_path / "x.png")
    assert len(json.loads(invoke("predict", out, tmp_path / "x.png", "--json").stdout)[0]["classes"]) == 3


def test_a_checkpoint_needs_no_folder_and_a_changed_one_is_named(pets: Path, tmp_path: Path, few: None) -> None:
    path = pets / "ckpt" / "second"
    assert invoke("show", "--ckpt", pets / "ckpt").exit_code == 0 and invoke("score", path).exit_code == 0
    assert micronet.load_network(path)(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    out = tmp_path / "out.safetensors"
    assert "random images" in invoke("export", path, out, "--data", tmp_path).stdout
    assert refused(invoke("evaluate", path, "--data", tmp_path), f"{tmp_path / 'pets'}: no such folder")
    folder = messy(tmp_path / "pets", {"train": 1, "test": 3})
    assert invoke("evaluate", path, "--data", tmp_path).exit_code == 0  # on other images of the same classes
    for part in ("train", "test"):
        (folder / part / "dog").rename(folder / part / "wolf")
    words = "its classes are cat, wolf: expected those of the stage, cat, dog"
    assert refused(invoke("evaluate", path, "--data", tmp_path), words, code=3)


def test_test_images_limit_both_parts(pets: Path, tmp_path: Path) -> None:
    """Validation images and test images, of which there are 12 and 16 here."""
    for n, sizes in ((14, (12, 14)), (10, (10, 10)), (17, None)):
        (tmp_path / "stages.toml").write_text(PHOTOS + f"test_images = {n}")
        if sizes:
            stage = micronet.load_stages(tmp_path / "stages.toml", pets / "data")["second"]
            parts = (load_images(stage, pets / "data", part).labels for part in ("validation", "test"))
            assert tuple(map(len, parts)) == sizes and stage.test_size == sizes[0]
        else:
            result = invoke("chain", "--dry-run", "--stages", tmp_path / "stages.toml", "--data", pets / "data")
            assert "test_images = 17: expected at most 16" in result.stderr
    folder = micronet.Dataset(40, 4, 2, 8, ("a", "b"))
    fewer = Stage("s", network="b0", dataset="folder:x", folder=folder, batch_size=8, test_images=7)
    assert micronet.typed(Stage, micronet.plain(fewer), "s").test_size == 7


def test_a_teacher_sees_what_its_student_sees(pets: Path, tmp_path: Path) -> None:
    path = pets / "ckpt" / "first" / "best.safetensors"
    for line, error in (("side = 96", "side = 64: expected 96"), ("side = 64", None)):
        text = PHOTOS.replace('teacher = "first"', f"teacher = '{path.parent}'").replace("side = 64", line)
        (tmp_path / "stages.toml").write_text(text)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "pets").unlink(missing_ok=True)
        (tmp_path / "data" / "pets").symlink_to(pets / "data" / "pets")
        result = train(tmp_path, "second")
        assert result.exit_code == (3 if error else 0) and (error or "") in result.stderr
    (tmp_path / "stages.toml").write_text(PHOTOS + "side = 32")
    assert "side = 32: expected that of its teacher first, 64" in train(tmp_path, "second").stderr


# --------------------------------------------------------------------------------------------------------------- sides


def maps(network: nn.Module, side: int) -> tuple[list[int], int]:
    """Return the height of what each convolution of more than one pixel puts out, and the sum of their MACs."""
    sides, macs = [], 0

    def note(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()
        sides.append(output.shape[-1])

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return sides, macs


def test_at_224_the_strides_are_torchvisions_own() -> None:
    assert maps(build_network("efficientnet_b0", side=224), 224) == maps(efficientnet_b0(), 224)


@pytest.mark.parametrize("side", micronet.SIDES)
def test_the_last_map_has_eight_by_eight_values_or_less(side: int) -> None:
    network = build_network("efficientnet_ex", 10, 0.1, 0.1, side=side)
    sides, macs = maps(network, side)
    halved = [m.stride for m in network.modules() if isinstance(m, nn.Conv2d)].count((2, 2))
    assert 4 < sides[-1] <= 8 and sides[-1] * 2**halved == side
    assert network(torch.zeros(2, 3, side, side)).shape == (2, 10) and network.pool.kernel_size == sides[-1]
    counted = micronet.layer_costs(network, "official")
    modules = dict(network.named_modules())
    assert sum(c.mults for layer, c in counted.items() if isinstance(modules.get(layer), nn.Conv2d)) == macs


# ------------------------------------------------------------------------------------------------ shipped and looked at


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have exports without images look at 20 random ones."""
    drawn = micronet.random_images
    monkeypatch.setattr(micronet, "random_images", lambda stage, n: drawn(stage, 20))


@pytest.fixture(scope="module")
def shipped(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of the stage in both formats that `predict` takes, with their cards."""
    folder = tmp_path_factory.mktemp("shipped")
    for kind in ("safetensors", "onnx"):
        out = folder / kind / f"pets.{kind}"
        result = invoke("export", pets / "ckpt" / "second", out, "--data", pets / "data", "--card", "--json")
        assert result.exit_code == 0, result.output
        (folder / kind / "result.json").write_text(result.stdout)
    return folder


def test_an_export_says_what_a_device_needs_to_know(pets: Path, shipped: Path) -> None:
    import onnx
    from huggingface_hub import ModelCard

    expected = {"side": 64, "order": "RGB", "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]}
    model = onnx.load(shipped / "onnx" / "pets.onnx")
    about = json.loads(next(each.value for each in model.metadata_props if each.key == "micronet"))
    assert about["input"] == expected and about["class_names"] == ["cat", "dog"]
    assert micronet.plain(read_metadata(shipped / "safetensors" / "pets.safetensors").input) == expected
    for kind in ("safetensors", "onnx"):
        (result,) = json.loads((shipped / kind / "result.json").read_text())
        assert result["on"] == "validation images" and result["images"] == 12 and result["score"] is None
        assert (shipped / kind / "labels.txt").read_text() == "cat\ndog\n"
        card = ModelCard.load(shipped / kind / "README.md")
        (tested,) = card.data.eval_results
        assert (card.data.pipeline_tag, tested.dataset_name) == ("image-classification", "folder:pets")
        assert (tested.metric_type, tested.metric_value) == ("accuracy", result["top1"])
        assert "MicroNet score" not in card.text and f"| bytes | {result['bytes']:,} |" in card.text
        snippet = card.text.split("```python\n")[1].split("```")[0]
        names = {"images": torch.zeros(1, 3, 64, 64) if kind == "safetensors" else torch.zeros(1, 3, 64, 64).numpy()}
        here = os.getcwd()
        os.chdir(shipped / kind)
        try:
            exec(snippet, names)
        finally:
            os.chdir(here)
        assert names["outputs"].shape == (1, 2)


def test_a_card_takes_no_others_place(pets: Path, tmp_path: Path) -> None:
    given = ["export", pets / "ckpt" / "first", tmp_path / "x.safetensors", "--card", "--data", pets / "data"]
    for name, content in (("README.md", "# mine"), ("labels.txt", "cat\n")):
        (tmp_path / name).write_text(content)
        assert refused(invoke(*given), f"{tmp_path / name}: holds what this command has not written")
        assert (tmp_path / name).read_text() == content and not (tmp_path / "x.safetensors").exists()
        (tmp_path / name).unlink()
    assert [invoke(*given).exit_code for _ in range(2)] == [0, 2]  # somebody may have written on the card since
    (tmp_path / "README.md").unlink()
    assert invoke(*given).exit_code == 0


def test_predictions_are_the_networks(pets: Path, shipped: Path) -> None:
    paths = [path for files in micronet.image_files(pets / "data" / "pets", "test").values() for path in files]
    network, pixels = micronet.load_network(pets / "ckpt" / "second"), micronet.read_images(paths, 64)
    expected = (5 * network(micronet.normalize(pixels / 255))).softmax(1)  # scale 5
    for path, tolerance in (("ckpt", 1e-5), ("safetensors", 0.2), ("onnx", 0.2)):  # exports know a mean length alone
        path = pets / "ckpt" / "second" if path == "ckpt" else shipped / path / f"pets.{path}"
        results = json.loads(invoke("predict", path, *paths, "--json").stdout)
        assert [result["image"] for result in results] == [str(each) for each in paths]
        for result, probabilities in zip(results, expected.tolist()):
            shown = {each["class"]: each["probability"] for each in result["classes"]}
            assert list(shown) == (["cat", "dog"] if probabilities[0] > probabilities[1] else ["dog", "cat"])
            assert [shown["cat"], shown["dog"]] == pytest.approx(probabilities, abs=tolerance)
    table = invoke("predict", pets / "ckpt" / "second", paths[0]).stdout
    assert f"{max(expected[0].tolist()) * 100:.1f}" in table and paths[0].name in table


def test_an_export_on_random_images_knows_no_probabilities(pets: Path, tmp_path: Path, few: None) -> None:
    invoke("export", pets / "ckpt" / "second", out := tmp_path / "x.safetensors", "--data", tmp_path)
    photo(0, 0, (40, 40)).save(tmp_path / "x.png")
    (result,) = json.loads(invoke("predict", out, tmp_path / "x.png", "--json").stdout)
    assert {each["class"]: each["probability"] for each in result["classes"]} == {"cat": None, "dog": None}
    assert "cat" in invoke("predict", out, tmp_path / "x.png").stdout


def test_what_predict_refuses(pets: Path, shipped: Path, tmp_path: Path) -> None:
    import onnx

    image, best = pets / "data" / "pets" / "test" / "cat" / "0.JPG", pets / "ckpt" / "second"
    stranger = onnx.load(shipped / "onnx" / "pets.onnx")
    del stranger.metadata_props[:]
    onnx.save(stranger, tmp_path / "stranger.onnx")
    (tmp_path / "no.onnx").write_bytes(b"no model")
    about = json.loads(onnx.load(shipped / "onnx" / "pets.onnx").metadata_props[0].value)
    about["stage"]["side"] = about["input"]["side"] = 32
    stranger.metadata_props.add(key="micronet", value=json.dumps(about))
    onnx.save(stranger, tmp_path / "smaller.onnx")
    for network, path, code, message in (
        (best, tmp_path / "none.png", 3, "1 of 1 image cannot be read: "),
        (best, tmp_path / "no.onnx", 3, "no image, or of a kind"),
        (tmp_path / "x.pt2", image, 2, "loading a .pt2 runs what is in it"),
        (tmp_path / "x.onnx", image, 3, "No such file"),
        (tmp_path / "no.onnx", image, 3, f"{tmp_path / 'no.onnx'}: "),
        (tmp_path / "stranger.onnx", image, 3, "not exported by micronet"),
        (tmp_path / "smaller.onnx", image, 3, "its metadata are of another network"),
    ):
        assert refused(invoke("predict", network, path), message, code=code), message


def test_classes_come_worst_first_with_what_they_are_taken_for() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    predicted = torch.tensor([1, 1, 2, 0, 1, 1, 1, 2, 0, 2])
    images = micronet.Images(torch.zeros(10, 3, 1, 1), labels, ["ape", "bee", "cow", "dog"])  # of dogs none is there
    results = micronet.class_results(predicted, images)
    assert [(r["class"], r["images"], round(r["top1"], 2), r["taken_for"], r["times"]) for r in results] == [
        ("ape", 4, 25.0, "bee", 2), ("cow", 3, 66.67, "ape", 1), ("bee", 3, 100.0, None, 0),
    ]  # fmt: skip


def test_hits_are_counted_exactly_at_any_precision(pets: Path, tmp_path: Path) -> None:
    """An export's outputs are bfloat16 under autocast, which counts no further than 256."""
    labels = torch.zeros(1000, dtype=torch.int64)
    images = micronet.Images(torch.zeros(1000, 3, 1, 1, dtype=torch.uint8), labels, ["a", "b"])
    ones = lambda x: torch.ones(len(x), 2, dtype=torch.bfloat16) * torch.tensor([1, 0])  # noqa: E731
    cosines = micronet.outputs(tmp_path, ones, images.pixels)
    assert micronet.tally(cosines, labels, 1.0)[0] == 1000 and cosines.dtype == torch.float32


def test_evaluate_shows_classes(pets: Path) -> None:
    given = ["evaluate", pets / "ckpt" / "second", "--classes", "--data", pets / "data"]
    (found,) = json.loads(invoke(*given, "--json").stdout)
    assert sum(r["images"] * r["top1"] for r in found["classes"]) == pytest.approx(found["top1"] * found["images"])
    lines = [line.split() for line in invoke(*given).stdout.splitlines()]
    for r in found["classes"]:
        wrong = [r["taken_for"], f"({r['times']}", "times)" if r["times"] > 1 else "time)"] if r["times"] else ["-"]
        assert [r["class"], str(r["images"]), f"{r['top1']:.2f}", *wrong] in lines


def test_the_score_is_for_cifar100_alone(pets: Path) -> None:
    path = pets / "ckpt" / "first"
    assert refused(invoke("score", path, "--board"), f"--board: {path} was not trained on CIFAR-100")
    for score in json.loads(invoke("score", path, "--layers", "--json").stdout):
        assert score["score"] is score["score_32bit"] is None and score["ops"] > 0 and score["params"] > 0
        assert {layer["score"] for layer in score["layers"]} == {None}
    shown = invoke("score", path, "--layers").stdout
    assert "score" not in shown and "operations" in shown and "MACs" in shown
    shares = map(float, re.findall(r" (\d+\.\d) % ", shown))
    assert sum(shares) == pytest.approx(200, abs=3)  # of two counts, rounded
    assert "score" not in train(pets, "first").stdout
    table = "\n".join(drawn(micronet.outcome_table([micronet.read_kept(read_metadata(path).stage, pets / "ckpt")])))
    assert "score" not in table and "Validation accuracy" in table
