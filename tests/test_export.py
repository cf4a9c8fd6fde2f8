"""Networks as they ship, and those that the method's authors published: the same predictions, and nothing executed."""

import io
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import tarfile
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import TINY, invoke
from torch import Tensor, nn
from typer.testing import Result

import micronet
from micronet import (
    NETWORKS,
    build_network,
    fold_batch_norms,
    fold_network,
    layer_costs,
    load_checkpoint,
    load_network,
    read_metadata,
    save_checkpoint,
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
def best(trained: Path) -> Path:
    """A checkpoint of a network that has seen a few images."""
    return trained / "ckpt" / "first" / "best.safetensors"


@pytest.mark.parametrize("kind", ["safetensors", "onnx", "pt2"])
def test_an_export_predicts_the_same(kind: str, best: Path, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    out, stage = tmp_path / "new" / f"network.{kind}", read_metadata(best).stage
    tested = micronet.load_images(stage, Path("data"), train=False)
    pixels, rounded = micronet.normalize(tested.pixels / 255), fold_network(load_network(best)).half().float()
    before, after = (network(pixels).argmax(1) for network in (load_network(best), rounded))
    (result,) = json.loads(invoke("export", best, out, "--json").stdout)
    assert (result["images"], result["on"], result["agree"]) == (50, "test images", int((before == after).sum()))
    top1 = [2 * int((predicted == tested.labels).sum()) for predicted in (before, after)]  # in percent of 50
    assert [result["top1_before"], result["top1"]] == top1
    assert result["difference"] < 0.01 * result["largest"]
    assert result["bytes"] == out.stat().st_size > result["counted_bytes"]
    state = fold_network(load_network(best)).state_dict()
    assert result["counted_bytes"] == 2 * sum(tensor.numel() for tensor in state.values())

    images = torch.randn(7, 3, 32, 32)  # another batch size than it was exported with
    expected = fold_network(load_network(best)).half().float()(images)
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


def test_an_exported_checkpoint_is_evaluated_and_scored(best: Path, tmp_path: Path) -> None:
    out = tmp_path / "network.safetensors"
    assert invoke("export", best, out).exit_code == 0
    tensors, metadata = load_checkpoint(out)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert metadata.exported.file == "best.safetensors" and metadata.class_names[0] == "disc"
    (tested,) = json.loads(invoke("evaluate", out, "--json").stdout)
    assert tested["top1"] == metadata.exported.top1
    assert tested["loss"] is None
    scores = json.loads(invoke("score", out, best, "--rules", "official", "--json").stdout)
    assert scores[0]["params"] == sum(tensor.numel() for tensor in tensors.values()) < scores[1]["params"]
    assert [score["top1"] for score in scores] == [tested["top1"], read_metadata(best).best.top1]


@pytest.mark.parametrize(
    ("out", "message"),
    [("x.tflite", "expected a name that ends in .safetensors, .onnx, .pt2"), ("x", "expected a name")],
)
def test_another_format_is_refused(out: str, message: str, best: Path, tmp_path: Path) -> None:
    result = invoke("export", best, tmp_path / out)
    assert (result.exit_code, result.output.count("\n")) == (2, 1) and message in result.stderr
    assert not (tmp_path / out).exists()


def test_an_export_is_neither_exported_again_nor_a_teacher(
    best: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    out = tmp_path / "network.safetensors"
    assert invoke("export", best, out).exit_code == 0
    again = invoke("export", out, tmp_path / "again.onnx")
    assert again.exit_code == 2 and "exported already" in again.stderr
    stages = write(TINY.replace('teacher = "first"', f'teacher = "{out}"'))
    result = invoke("run-stage", "second", "--stages", stages, "--ckpt", tmp_path)
    assert (result.exit_code, result.output.count("\n")) == (2, 1) and "with no cosines" in result.stderr


@pytest.mark.parametrize("command", ["export x.safetensors", "export x.onnx", "export x.pt2", "import", "show"])
def test_nothing_is_replaced_that_the_command_has_not_written(
    command: str, trained: Path, plain: ModuleType, tmp_path: Path
) -> None:
    """A stage's files, another checkpoint, what cannot be read; an older output may go, a link stays."""
    ckpt = shutil.copytree(trained / "ckpt", tmp_path / "ckpt")
    best, name = ckpt / "first" / "best.safetensors", command.partition(" ")[2] or "x.safetensors"
    published_file = tmp_path / "x.pytar"
    torch.save(published(plain, "efficientnet_exx")[1], published_file)

    def write(target: Path) -> Result:
        match command.split():
            case ["export", _]:
                return invoke("export", best, target)
            case ["import"]:
                return invoke("import", published_file, "--network", "efficientnet_exx", "--out", target)
        return invoke("show", "--ckpt", ckpt, "--svg", target)

    imported, exported = tmp_path / "imported.safetensors", tmp_path / "exported.safetensors"
    assert invoke("import", published_file, "--network", "efficientnet_exx", "--out", imported).exit_code == 0
    assert invoke("export", best, exported).exit_code == 0
    foreign = {
        "checkpoint": best.read_bytes(),
        "import": imported.read_bytes(),
        "text": b"precious",
        "zip": b"PK\x03\x04",
    }
    if not name.endswith("x.safetensors") or command == "import":
        foreign["export"] = b"" if "export" in command else exported.read_bytes()
    for content in filter(None, foreign.values()):
        (target := tmp_path / name).write_bytes(content)
        result = write(target)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and "expected another name" in result.stderr
        assert target.read_bytes() == content
    target.unlink()
    for within in (ckpt / "first" / "best.safetensors", ckpt / "first" / f"new{Path(name).suffix}"):
        result = write(within.with_suffix(Path(name).suffix))
        assert result.exit_code == 2 and "keeps a stage: expected a name elsewhere" in result.stderr
    (leftover := tmp_path / f".{name}.999999999.part").write_bytes(b"of a writer that was killed")
    assert write(target).exit_code == 0 and not leftover.exists()
    if command != "import":
        target.rename(real := tmp_path / "elsewhere")
        target.symlink_to(real)
        written = real.stat().st_mtime_ns
        assert write(target).exit_code == 0 and target.is_symlink() and real.stat().st_mtime_ns > written


def test_a_pipe_and_a_device_are_written_to(best: Path, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe.safetensors")
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    assert invoke("export", best, pipe).exit_code == 0 and pipe.is_fifo()
    (tmp_path / "read.safetensors").write_bytes(reader.communicate()[0])
    assert load_checkpoint(tmp_path / "read.safetensors")[1].exported.file == "best.safetensors"


@pytest.mark.parametrize(("weight", "command", "message"), [
    ("nan", "export", "stem.0.weight is not finite"), ("nan", "evaluate", "stem.0.weight is not finite"),
    ("nan", "score", "stem.0.weight is not finite"), ("1e5", "export", "its outputs are not finite"),
    ("1e30", "evaluate", "its outputs in fp16 are not finite"),
])  # fmt: skip
def test_what_is_not_finite_is_refused(weight: str, command: str, message: str, best: Path, tmp_path: Path) -> None:
    tensors, about = load_checkpoint(best)
    name = "embedding.bias" if weight != "nan" else "stem.0.weight"
    tensors[name].flatten()[:] = float(weight)
    if command == "evaluate" and weight != "nan":
        tensors["cosine.kernel"][:, 0] = 0.0
    save_checkpoint(path := tmp_path / "x.safetensors", tensors, about)
    words = {"export": [path, tmp_path / "y.safetensors"], "evaluate": [path, "--precision", "fp16"], "score": [path]}
    result = invoke(command, *words[command])
    assert (result.exit_code, result.stderr.count("\n")) == (3, 1), result.output
    assert message in result.stderr and not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(package: str, best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    result = invoke("export", best, out := tmp_path / "network.onnx")
    assert (result.exit_code, result.output.count("\n")) == (2, 1) and not out.exists()
    assert result.stderr.startswith(f"error: {out}: the package {package} is missing: uv sync --extra onnx")


# ------------------------------------------------------------------------------------------------------------- import


def published(plain: ModuleType, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a plain network and its state under the names that the authors' checkpoints have."""
    network = worn(plain.PlainNetwork(100, *NETWORKS[name]))

    def place(layers: nn.Sequential, index: str) -> int:  # where an activation is part of the unit before it
        return sum(not isinstance(layer, plain.Swish) for layer in layers[: int(index)])

    def renamed(ours: str) -> str:
        part, index, *rest = ours.split(".")
        if part != "features":
            return {"embedding": "classifier.0.", "cosine": "classifier.2."}[part] + index
        if rest[0] == "layers":
            inner = place(network.features[int(index)].layers, rest[1])
            gate = {"reduce": "se.1", "expand": "se.3"}
            rest = ["conv", str(inner), *(gate.get(word, word) for word in rest[2:])]
        return ".".join(["features", str(place(network.features, index)), *rest])

    return network, {renamed(ours): tensor for ours, tensor in network.state_dict().items()}


def import_file(path: Path, network: str = "efficientnet_exx") -> object:
    return invoke("import", path, "--network", network, "--out", path.with_suffix(".safetensors"))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["efficientnet_exx", "efficientnet_b0"])
def test_a_published_network_computes_the_same(
    name: str, prefix: str, zipped: bool, plain: ModuleType, tmp_path: Path
) -> None:
    network, state = published(plain, name)
    state = OrderedDict((prefix + name, tensor) for name, tensor in state.items())
    state._metadata = {"": {"version": 1}}  # as state_dict() has it
    if not zipped:  # torch 0.4.0 had no num_batches_tracked
        for name_ in [name for name in state if name.endswith("num_batches_tracked")]:
            del state[name_]
    path = tmp_path / "net.pytar"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    result = import_file(path, name)
    assert result.exit_code == 0, result.output
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            load_network(path.with_suffix(".safetensors"))(images), network(images), rtol=1e-4, atol=1e-5
        )
    if name == "efficientnet_exx" and not zipped:
        (score, _) = json.loads(invoke("score", path.with_suffix(".safetensors"), "--json").stdout)
        assert score["params"] == 2_418_650 and score["top1"] is None


def test_an_imported_network_teaches(plain: ModuleType, tmp_path: Path, write: Callable[..., Path]) -> None:
    path = tmp_path / "net.pytar"
    torch.save(published(plain, "efficientnet_exx")[1], path)
    assert import_file(path).exit_code == 0
    text = TINY.replace('teacher = "first"', f'teacher = "{path.with_suffix(".safetensors")}"')
    stages = write(re.sub(r"\[stage.first\][^[]*", "", text.replace('"synthetic"', '"cifar100"')))
    from micronet import load_stages, load_teacher

    teacher, facts = load_teacher(load_stages(stages)["second"], tmp_path, None)
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, 100) and facts.tested.top1 is None


def refused(path: Path, message: str) -> None:
    result = import_file(path)
    assert (result.exit_code, result.output.count("\n")) == (3, 1), result.output
    assert message in result.stderr and not path.with_suffix(".safetensors").exists()


def test_another_networks_file_is_refused(plain: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "b0.pytar"
    torch.save(published(plain, "efficientnet_b0")[1], path)
    refused(path, "")
    state = published(plain, "efficientnet_exx")[1]
    torch.save(state | {"extra": torch.zeros(1)}, path)
    refused(path, '"extra" is not in this network')
    torch.save({name: tensor for name, tensor in state.items() if name != "classifier.2.kernel"}, path)
    refused(path, "cosine.kernel is missing")


BIAS = torch.ones(200)
with warnings.catch_warnings(action="ignore"):  # of kinds that torch calls beta, or about to go
    TENSORS = {  # of every kind that torch can save, in the place of a bias of 200 floats
        "nan": BIAS * float("nan"),
        "infinite once it is float32": BIAS.double() * 1e300,
        "bool": BIAS.bool(),
        "int": BIAS.int(),
        "long": BIAS.long(),
        "complex": BIAS * 1j,
        "conjugated": (BIAS * 1j).conj(),
        "negated": torch.complex(BIAS, BIAS).conj().imag,
        "sparse": BIAS.to_sparse(),
        "compressed": torch.eye(200).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(BIAS, 0.1, 0, torch.qint8),
        "float8": BIAS.to(torch.float8_e4m3fn),
        "meta": BIAS.to("meta"),
        "parameter": nn.Parameter(BIAS),
        "huge": torch.ones(1).expand(10**12),
        "of another shape": torch.ones(1, 200),
        "text": "a bias",
        "nothing": None,
    }


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_that_is_no_weight_is_refused(kind: str, zipped: bool, plain: ModuleType, tmp_path: Path) -> None:
    state, path = published(plain, "efficientnet_exx")[1] | {"classifier.0.bias": TENSORS[kind]}, tmp_path / "x.pytar"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    refused(path, "embedding.bias" if kind in ("nan", "infinite once it is float32", "long", "huge") else str(path))


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double"])
def test_weights_of_other_widths_are_taken(kind: str, plain: ModuleType, tmp_path: Path) -> None:
    network, state = published(plain, "efficientnet_exx")
    state = {name: tensor.to(getattr(torch, kind)) if tensor.dim() else tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "x.pytar")
    assert import_file(tmp_path / "x.pytar").exit_code == 0
    taken = load_network(tmp_path / "x.safetensors").state_dict()
    assert all(torch.equal(ours.float(), theirs.float()) for ours, theirs in zip(taken.values(), state.values()))


def nested(depth: int) -> bytes:
    """A tuple of two tuples of two tuples ..., each pair one object: hashing it takes 2^depth steps."""
    return b"(t" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(depth))


@pytest.mark.parametrize("kind", ["key", "deep", "value", "many", "zip bomb", "overlap"])
def test_a_file_that_would_eat_the_machine_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.pytar"
    pickles = {
        "key": b"\x80\x02}" + nested(40) + b"K\x01s.",
        "value": b"\x80\x02}X\x01\x00\x00\x00a" + nested(40) + b"s.",
        "deep": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
        "many": b"\x80\x02]" + b"K\x01a" * 10**6 + b".",
    }
    if kind in pickles:
        path.write_bytes(pickles[kind] * 5)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if kind == "zip bomb" else zipfile.ZIP_STORED) as archive:
            archive.writestr("x/data.pkl", b"\x00" * 10**7 if kind == "zip bomb" else pickles["key"])
    begun = time.process_time()
    refused(path, str(path))
    assert time.process_time() - begun < 3


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pytar")
    refused(tmp_path / "pipe.pytar", "not a file")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_truncated_file_is_refused(zipped: bool, plain: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "net.pytar"
    torch.save(published(plain, "efficientnet_exx")[1], path, _use_new_zipfile_serialization=zipped)
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
    refused(tmp_path, "not a file")


@pytest.mark.parametrize(
    ("network", "out", "message"), [("resnet", "x.safetensors", "--network"), ("efficientnet_ex", "x.pt", "--out")]
)
def test_bad_options_of_import(network: str, out: str, message: str, tmp_path: Path) -> None:
    result = invoke("import", tmp_path / "x.pytar", "--network", network, "--out", tmp_path / out)
    assert (result.exit_code, result.output.count("\n")) == (2, 1) and message in result.stderr
