"""Networks as they ship, and those that the method's authors published: the same predictions, and nothing executed."""

import io
import importlib.util
import json
import os
import pickle
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, invoke
from torch import Tensor, nn

from micronet import (
    BLOCKS,
    NETWORKS,
    build_network,
    fold_batch_norms,
    fold_network,
    layer_costs,
    load_checkpoint,
    load_network,
    read_metadata,
    scaled_channels,
    total_cost,
)

# ------------------------------------------------------------------------------------------------------------ folding


def worn(network: nn.Module) -> nn.Module:
    """Give a network's batch norms and biases values that are not their initial ones."""
    torch.manual_seed(1)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_var", "1.weight")) and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1:
            tensor.normal_(0, 0.1)
    return network.eval()


def test_folding_batch_norm_changes_nothing() -> None:
    network = worn(build_network("efficientnet_b0", width=0.25, depth=0.5)).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(fold_batch_norms(network)(images), expected, rtol=1e-10, atol=1e-10)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_the_folded_classifier_is_the_cosine_times_a_positive_factor() -> None:
    network = worn(build_network("efficientnet_b0", width=0.25, depth=0.5)).double()
    images = torch.randn(16, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        embedding = nn.Sequential(*list(network)[:-1])(images)  # (N, D)
        cosines = network(images).double()
        logits = fold_network(network)(images)
    factor = embedding.norm(dim=1, keepdim=True)
    torch.testing.assert_close(logits / factor, cosines, rtol=1e-6, atol=1e-6)
    assert (logits.argmax(1) == cosines.argmax(1)).all()


FOLDED = {"efficientnet_ex": (2_652_292, "0.072284"), "efficientnet_exx": (2_280_006, "0.064391")}


@pytest.mark.parametrize("name", FOLDED)
def test_the_published_cost_of_a_folded_network(name: str) -> None:
    cost = total_cost(layer_costs(fold_network(build_network(name)), "official").values())
    assert (cost.params, f"{cost.score:.6f}") == FOLDED[name]


# ------------------------------------------------------------------------------------------------------------- export


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network that has seen a few images."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "stages.toml").write_text(TINY.replace("train_images = 40", "train_images = 60"))
    result = invoke("run-stage", "first", "--stages", folder / "stages.toml", "--ckpt", folder)
    assert result.exit_code == 0, result.output
    return folder / "first" / "best.safetensors"


@pytest.mark.parametrize("kind", ["safetensors", "onnx", "pt2"])
def test_an_export_predicts_the_same(kind: str, trained: Path, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    out = tmp_path / "new" / f"network.{kind}"
    (result,) = json.loads(invoke("export", trained, out, "--json").stdout)
    assert result["agree"] == result["images"] == 50 and result["on"] == "test images"
    assert result["difference"] < 0.01 * result["largest"]
    assert result["top1_before"] == read_metadata(trained)["best"]["top1"] == result["top1"]
    assert result["bytes"] == out.stat().st_size > result["counted_bytes"]
    state = fold_network(load_network(trained)).state_dict()
    assert result["counted_bytes"] == 2 * sum(tensor.numel() for tensor in state.values())

    images = torch.randn(7, 3, 32, 32)  # another batch size than it was exported with
    expected = fold_network(load_network(trained)).half().float()(images)
    torch.testing.assert_close(run(out, images), expected, rtol=1e-4, atol=1e-4)
    assert run(out, images[:1]).shape == (1, 10)


def run(path: Path, images: Tensor) -> Tensor:
    """Run an exported file as its user would, without micronet where it needs none."""
    if path.suffix == ".safetensors":
        return load_network(path)(images)
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def test_an_exported_checkpoint_is_evaluated_and_scored(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "network.safetensors"
    assert invoke("export", trained, out).exit_code == 0
    tensors, metadata = load_checkpoint(out)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert metadata["exported"]["file"] == "best.safetensors" and metadata["class_names"][0] == "disc"
    (tested,) = json.loads(invoke("evaluate", out, "--json").stdout)
    assert tested["top1"] == read_metadata(trained)["best"]["top1"] == metadata["exported"]["top1"]
    assert tested["loss"] is None
    scores = json.loads(invoke("score", out, trained, "--rules", "official", "--json").stdout)
    assert scores[0]["params"] == sum(tensor.numel() for tensor in tensors.values()) < scores[1]["params"]
    assert scores[0]["top1"] == scores[1]["top1"] == tested["top1"]


@pytest.mark.parametrize(
    ("out", "message"),
    [("x.tflite", "expected a name that ends in .safetensors, .onnx, .pt2"), ("x", "expected a name")],
)
def test_another_format_is_refused(out: str, message: str, trained: Path, tmp_path: Path) -> None:
    result = invoke("export", trained, tmp_path / out)
    assert (result.exit_code, result.output.count("\n")) == (2, 1) and message in result.stderr
    assert not (tmp_path / out).exists()


def test_an_export_is_neither_exported_again_nor_a_teacher(
    trained: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    out = tmp_path / "network.safetensors"
    assert invoke("export", trained, out).exit_code == 0
    again = invoke("export", out, tmp_path / "again.onnx")
    assert again.exit_code == 2 and "exported already" in again.stderr
    stages = write(TINY.replace('teacher = "first"', f'teacher = "{out}"'))
    result = invoke("run-stage", "second", "--stages", stages, "--ckpt", tmp_path)
    assert (result.exit_code, result.output.count("\n")) == (2, 1) and "has no cosines" in result.stderr


def test_an_export_replaces_no_checkpoint(trained: Path, tmp_path: Path) -> None:
    before, out = trained.read_bytes(), tmp_path / "out.safetensors"
    for target in (trained, trained.with_name("last.safetensors")):
        result = invoke("export", trained, target)
        assert (result.exit_code, result.output.count("\n")) == (2, 1) and "expected another name" in result.stderr
    assert trained.read_bytes() == before
    assert [invoke("export", trained, out).exit_code for _ in range(2)] == [0, 0]  # an older export may go


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(
    package: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    result = invoke("export", trained, out := tmp_path / "network.onnx")
    assert (result.exit_code, result.output.count("\n")) == (2, 1) and not out.exists()
    assert result.stderr.startswith(f"error: {out}: the package {package} is missing: uv sync --extra onnx")


# ------------------------------------------------------------------------------------------------------------- import


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Padding, convolution and batch norm as the authors have them."""
    first, last = (kernel - stride) // 2, (kernel - stride + 1) // 2
    pad = nn.ZeroPad2d((first, last, first, last))
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(pad, convolution, nn.BatchNorm2d(outputs), Swish())


class Gate(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(channels, squeezed, 1), Swish(), nn.Conv2d(squeezed, channels, 1), nn.Sigmoid()]
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [unit(inputs, hidden, 1)] if expansion > 1 else []
        layers += [unit(hidden, hidden, kernel, stride, hidden), Gate(hidden, max(1, inputs // 4))]
        self.conv = nn.Sequential(*layers, nn.Conv2d(hidden, outputs, 1), nn.BatchNorm2d(outputs))
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(200, 100) * 2 - 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ (self.kernel / self.kernel.norm(dim=0))).clamp(-1, 1)


class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x)


class Published(nn.Module):
    """A network under the names that the authors' checkpoints have, in their arithmetic."""

    def __init__(self, name: str) -> None:
        super().__init__()
        width, depth = NETWORKS[name]
        channels = scaled_channels(32, width)
        layers: list[nn.Module] = [unit(3, channels, 3)]
        for expansion, base, repeats, stride, kernel in BLOCKS:
            for i in range(-int(-repeats * depth // 1)):
                outputs = scaled_channels(base, width)
                layers.append(Block(channels, outputs, expansion, kernel, stride if i == 0 else 1))
                channels = outputs
        head = scaled_channels(1280, width)
        self.features = nn.Sequential(*layers, unit(channels, head, 1))
        self.classifier = nn.Sequential(nn.Linear(head, 200), Normalize(), Kernel())

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def import_file(path: Path, network: str = "efficientnet_exx") -> object:
    return invoke("import", path, "--network", network, "--out", path.with_suffix(".safetensors"))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["efficientnet_exx", "efficientnet_b0"])
def test_a_published_network_computes_the_same(name: str, prefix: str, zipped: bool, tmp_path: Path) -> None:
    published = worn(Published(name))
    state = {prefix + name: tensor for name, tensor in published.state_dict().items()}
    if not zipped:  # torch 0.4.0 had no num_batches_tracked
        state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    path = tmp_path / "net.pytar"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    result = import_file(path, name)
    assert result.exit_code == 0, result.output
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            load_network(path.with_suffix(".safetensors"))(images), published(images), rtol=1e-4, atol=1e-5
        )
    if name == "efficientnet_exx" and not zipped:
        (score, _) = json.loads(invoke("score", path.with_suffix(".safetensors"), "--json").stdout)
        assert score["params"] == 2_418_650 and score["top1"] is None


def test_an_imported_network_teaches(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = tmp_path / "net.pytar"
    torch.save(Published("efficientnet_exx").state_dict(), path)
    assert import_file(path).exit_code == 0
    text = TINY.replace('teacher = "first"', f'teacher = "{path.with_suffix(".safetensors")}"')
    stages = write(re.sub(r"\[stage.first\][^[]*", "", text.replace('"synthetic"', '"cifar100"')))
    from micronet import load_stages, load_teacher

    teacher, facts = load_teacher(load_stages(stages)["second"], tmp_path, None)
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, 100) and facts["top1"] is None


def refused(path: Path, message: str) -> None:
    result = import_file(path)
    assert (result.exit_code, result.output.count("\n")) == (3, 1), result.output
    assert message in result.stderr and not path.with_suffix(".safetensors").exists()


def test_another_networks_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b0.pytar"
    torch.save(Published("efficientnet_b0").state_dict(), path)
    refused(path, "another network's: ")
    state = Published("efficientnet_exx").state_dict()
    torch.save(state | {"extra": torch.zeros(1)}, path)
    refused(path, "another network's: 1 tensor of it not in this one")
    torch.save({name: tensor for name, tensor in state.items() if name != "classifier.2.kernel"}, path)
    refused(path, "classifier.2.kernel is missing")
    state["classifier.0.bias"][3] = float("nan")
    torch.save(state, path)
    refused(path, "classifier.0.bias is not finite")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_truncated_file_is_refused(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.pytar"
    torch.save(Published("efficientnet_exx").state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:length])
        refused(path, "")


class Payload:
    """Something that runs a function where it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def payloads(marker: Path) -> dict[str, object]:
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "system": Payload(os.system, f"touch {marker}"),
        "popen": Payload(os.popen, f"touch {marker}"),
        "eval": Payload(eval, touch),
        "exec": Payload(exec, touch),
        "open": Payload(open, str(marker), "w"),
        "mkdir": Payload(os.mkdir, str(marker)),
        "import": Payload(__import__, "antigravity"),
        "getattr": {"features.0.1.weight": Payload(getattr, Path(marker), "touch")},
        "in a tensor's place": {"features.0.1.weight": Payload(os.system, f"touch {marker}")},
        "as a key": {Payload(os.system, f"touch {marker}"): torch.zeros(1)},
        "module": nn.Sequential(nn.Linear(2, 2)),
        "list": [torch.zeros(1)],
        "number": {"features.0.1.weight": 3},
    }


@pytest.mark.parametrize("kind", ["old", "zip", "pickle"])
@pytest.mark.parametrize("name", payloads(Path("marker")))
def test_no_payload_runs(name: str, kind: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pytar", tmp_path / "marker"
    thing = payloads(marker)[name]
    if kind == "pickle":
        if name == "module":
            pytest.skip("torch pickles its tensors with torch.save only")
        path.write_bytes(pickle.dumps(thing))
    else:
        torch.save(thing, path, _use_new_zipfile_serialization=kind == "zip")
    refused(path, str(path))
    assert not marker.exists()


def test_archives_that_torch_has_not_written_are_refused(tmp_path: Path) -> None:
    path, buffer = tmp_path / "bomb.pytar", io.BytesIO()
    torch.save({"features.0.1.weight": torch.zeros(10_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000  # of 40 MB
    refused(path, "a compressed archive")
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "../../evil")
    refused(path, "expected a dict of tensors")
    refused(tmp_path / "missing.pytar", "No such file")
    refused(tmp_path, "directory")


@pytest.mark.parametrize(
    ("network", "out", "message"), [("resnet", "x.safetensors", "--network"), ("efficientnet_ex", "x.pt", "--out")]
)
def test_bad_options_of_import(network: str, out: str, message: str, tmp_path: Path) -> None:
    result = invoke("import", tmp_path / "x.pytar", "--network", network, "--out", tmp_path / out)
    assert (result.exit_code, result.output.count("\n")) == (2, 1) and message in result.stderr
