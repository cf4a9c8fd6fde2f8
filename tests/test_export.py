"""Networks as they ship, and those that the method's authors published: the same predictions, and nothing executed."""

import copy
import importlib.util
import io
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import BinaryIO

import pytest
import torch
from conftest import TINY, build_network, invoke, refused
from torch import Tensor, nn
from typer.testing import Result

import micronet
from micronet import fold_network, load_checkpoint, load_network, read_metadata

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


def test_folding_changes_no_prediction() -> None:
    """Without batch norms the same cosines; with one linear layer for the classifier these times a positive factor."""
    network = worn(build_network("efficientnet_b0", width=0.25, depth=0.5)).double()
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        embedding, cosines = nn.Sequential(*list(network)[:-1])(images), network(images)
        folded = micronet.fold_batch_norms(copy.deepcopy(network))
        torch.testing.assert_close(folded(images), cosines, rtol=1e-10, atol=1e-10)
        logits = fold_network(network)(images)
    for each in (folded, network):
        assert not any(isinstance(module, nn.BatchNorm2d) for module in each.modules())
    torch.testing.assert_close(logits / embedding.norm(dim=1, keepdim=True), cosines.double(), rtol=1e-6, atol=1e-6)
    assert (logits.argmax(1) == cosines.argmax(1)).all()


# ------------------------------------------------------------------------------------------------------------- export


Exported = dict[str, tuple[Path, dict[str, object]]]


@pytest.fixture(scope="module")
def best(trained: Path) -> Path:
    """A checkpoint of a network that has seen a few images."""
    return trained / "ckpt" / "first" / "best.safetensors"


@pytest.fixture(scope="module")
def exported(best: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An export of every kind, and what the command prints."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("exported") / "new"
    outs = {kind: folder / f"network.{kind}" for kind in ("safetensors", "onnx", "pt2")}
    return {kind: (out, *json.loads(invoke("export", best, out, "--json").stdout)) for kind, out in outs.items()}


@pytest.mark.parametrize("kind", ["safetensors", "onnx", "pt2"])
def test_an_export_predicts_the_same(kind: str, best: Path, exported: Exported) -> None:
    """What is said of its predictions, tests/test_tables.py checks with a network that 16 bits change."""
    (out, result), folded = exported[kind], fold_network(load_network(best))
    size, rounded = total_size(folded.state_dict()), folded.half().float()
    assert (result["images"], result["on"]) == (50, "test images") and result["agree"] > 45
    assert result["top1_before"] == read_metadata(best).best.top1 == pytest.approx(result["top1"], abs=10)
    assert result["difference"] < 0.01 * result["largest"]
    assert result["bytes"] == out.stat().st_size > result["counted_bytes"] == 2 * size

    images = torch.randn(7, 3, 32, 32)  # another batch size than it was exported with
    torch.testing.assert_close(run(out, images), rounded(images), rtol=1e-4, atol=1e-4)
    assert run(out, images[:1]).shape == (1, 10)


def total_size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def run(path: Path, images: Tensor) -> Tensor:
    """Run an exported file as its user would, without micronet where it needs none."""
    if path.suffix == ".safetensors":
        return load_network(path)(images)
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def test_an_exported_checkpoint_is_evaluated_scored_and_exported_as_another_kind_but_no_teacher(
    best: Path, exported: Exported, tmp_path: Path, write: Callable[..., Path]
) -> None:
    out, _ = exported["safetensors"]
    tensors, metadata = load_checkpoint(out)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert metadata.exported.file == "best.safetensors" and metadata.class_names[0] == "disc"
    (tested,) = json.loads(invoke("evaluate", out, "--json").stdout)
    assert tested["top1"] == metadata.exported.top1 and tested["loss"] is None
    scores = json.loads(invoke("score", out, best, "--rules", "official", "--json").stdout)
    assert scores[0]["params"] == total_size(tensors) < scores[1]["params"]
    assert [score["top1"] for score in scores] == [tested["top1"], read_metadata(best).best.top1]
    again, (onnx, said) = tmp_path / "again.onnx", exported["onnx"]
    (result,) = json.loads(invoke("export", out, again, "--json").stdout)
    assert all(result[name] == said[name] for name in ("counted_bytes", "images", "on", "top1"))
    assert result["top1_before"] == tested["top1"] and result["agree"] == 50 and result["difference"] < 1e-4
    assert torch.equal(run(again, images := torch.randn(3, 3, 32, 32)), run(onnx, images))
    assert read_metadata(out).exported.scale == pytest.approx(micronet.open_network(again)[1].exported.scale)
    assert refused(invoke("export", out, out), "is what is to be exported")
    drawn = replace(metadata, exported=metadata.exported._replace(scale=None))  # on random images
    micronet.save_checkpoint(tmp_path / "drawn.safetensors", tensors, drawn)
    (result,) = json.loads(invoke("export", tmp_path / "drawn.safetensors", tmp_path / "x.onnx", "--json").stdout)
    assert result["probabilities_off"] is None
    stages = write(TINY.replace('teacher = "first"', f'teacher = "{out}"'))
    assert refused(invoke("run-stage", "second", "--stages", stages, "--ckpt", tmp_path), "with no cosines")


@pytest.mark.parametrize(("words", "absent", "message"), [
    ("export x x.tflite", None, "x.tflite: expected a name that ends in .safetensors, .onnx, .pt2"),
    ("export x x", None, "x: expected a name that ends in "),
    ("export x x.onnx", "onnxruntime", "x.onnx: the package onnxruntime is missing: uv sync --extra onnx"),
    ("export x x.onnx", "onnxscript", "x.onnx: the package onnxscript is missing: uv sync --extra onnx"),
    ("import x --network resnet --out x.safetensors", None, '--network = "resnet": expected one of efficientnet_b0, '),
    ("import x --network efficientnet_ex --out x.pt", None, "--out = x.pt: expected a name that ends in .safetensors"),
])  # fmt: skip
def test_another_format_or_network_or_a_missing_package_is_named_at_once(
    words: str, absent: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else real(name, *rest))
    monkeypatch.chdir(tmp_path)
    assert refused(invoke(*words.split()), f"error: {message}")


@pytest.mark.parametrize("command", ["export x.safetensors", "export x.onnx", "export x.pt2", "import", "show"])
def test_nothing_is_replaced_that_the_command_has_not_written(
    command: str, trained: Path, exported: Exported, tmp_path: Path
) -> None:
    """A stage's files, another command's, what cannot be read; an older output may go. Found out before all else."""
    ckpt, missing = shutil.copytree(trained / "ckpt", tmp_path / "ckpt"), tmp_path / "missing"
    command, _, name = command.partition(" ")
    target, suffix = tmp_path / (name or "x.safetensors"), Path(name or "x.safetensors").suffix
    words = {"export": [missing], "import": [missing, "--network", "efficientnet_exx", "--out"],
             "show": ["--ckpt", ckpt, "--svg"]}  # fmt: skip
    others = [(ckpt / "first" / "best.safetensors").read_bytes(), b"precious", b"PK\x03\x04"]
    if command != "export":
        others.append(exported["safetensors"][0].read_bytes())
    for content in others:
        target.write_bytes(content)
        assert refused(invoke(command, *words[command], target), "expected another name")
        assert target.read_bytes() == content
    for within in (ckpt / "first" / f"best{suffix}", ckpt / "first" / f"new{suffix}"):
        assert refused(invoke(command, *words[command], within), "keeps a stage: expected a name elsewhere")
    if command == "export":
        older = exported[suffix[1:]][0]
        assert refused(invoke(command, missing, older), f"error: {missing}: No such file or directory\n", code=3)


def test_a_link_and_a_pipe_are_written_to(best: Path, trained: Path, tmp_path: Path) -> None:
    (link := tmp_path / "x.svg").symlink_to(real := tmp_path / "elsewhere")
    (leftover := tmp_path / ".elsewhere.999999999.part").write_bytes(b"of a writer that was killed")
    for _ in ("new", "over an older one"):
        assert invoke("show", "--ckpt", trained / "ckpt", "--svg", link).exit_code == 0
        assert link.is_symlink() and b"<svg" in real.read_bytes() and not leftover.exists()
        real.write_bytes(real.read_bytes().replace(b"<svg", b"<old"))
    os.mkfifo(pipe := tmp_path / "pipe.safetensors")
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    assert invoke("export", best, pipe).exit_code == 0 and pipe.is_fifo()
    (tmp_path / "read.safetensors").write_bytes(reader.communicate()[0])
    assert load_checkpoint(tmp_path / "read.safetensors")[1].exported.file == "best.safetensors"


@pytest.mark.parametrize(("weight", "command", "message"), [
    ("nan", "export", "stem.0.weight is not finite"), ("nan", "evaluate", "stem.0.weight is not finite"),
    ("nan", "score", "stem.0.weight is not finite"), ("1e5", "export", "its outputs are not finite"),
    ("1e30", "evaluate", "its outputs are not finite"),
])  # fmt: skip
def test_what_is_not_finite_is_refused(weight: str, command: str, message: str, best: Path, tmp_path: Path) -> None:
    tensors, about = load_checkpoint(best)
    name = "embedding.bias" if weight != "nan" else "stem.0.weight"
    tensors[name].flatten()[:] = float(weight)
    if command == "evaluate" and weight != "nan":
        tensors["cosine.kernel"][:, 0] = 0.0
    micronet.save_checkpoint(path := tmp_path / "x.safetensors", tensors, about)
    words = {"export": [path, tmp_path / "y.safetensors"], "evaluate": [path, "--precision", "fp16"], "score": [path]}
    assert refused(invoke(command, *words[command]), message, code=3) and not (tmp_path / "y.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------- import


def published(plain: ModuleType, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a plain network and its state under the names that the authors' checkpoints have."""
    network = worn(plain.PlainNetwork(100, *micronet.NETWORKS[name]))

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


def load_here(command: list[str], stdin: BinaryIO, **_: object) -> bytes:
    """Run the loader of published files in this process, in place of seconds for one of its own."""
    streams = SimpleNamespace(buffer=stdin), SimpleNamespace(buffer=io.BytesIO())
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setattr(sys, "stdin", streams[0])
        patch.setattr(sys, "stdout", streams[1])
        patch.setattr(resource, "setrlimit", lambda *_: None)
        try:
            exec(command[-1], {})
        except Exception as error:
            raise subprocess.CalledProcessError(1, command) from error
    return streams[1].buffer.getvalue()


def import_file(path: Path, network: str = "efficientnet_exx", alone: bool = False) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        if not alone:
            patch.setattr(subprocess, "check_output", load_here)
        return invoke("import", path, "--network", network, "--out", path.with_suffix(".safetensors"))


Published = tuple[nn.Module, dict[str, Tensor], Path]


@pytest.fixture(scope="module")
def published_exx(plain: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """An exx with its state under the authors' names, and imported from a file as torch 0.4.0 wrote it."""
    network, state = published(plain, "efficientnet_exx")
    path = tmp_path_factory.mktemp("published") / "net.pytar"
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, path, _use_new_zipfile_serialization=False)
    assert import_file(path, alone=True).exit_code == 0
    return network, state, path.with_suffix(".safetensors")


def same_function(network: nn.Module, other: nn.Module) -> None:
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(images), other(images), rtol=1e-4, atol=1e-5)


def test_a_published_network_computes_the_same_and_teaches(
    published_exx: Published, tmp_path: Path, write: Callable[..., Path]
) -> None:
    network, _, path = published_exx
    same_function(load_network(path), network)
    (score, _) = json.loads(invoke("score", path, "--json").stdout)
    assert score["params"] == 2_418_650 and score["top1"] is None
    text = TINY.replace('teacher = "first"', f'teacher = "{path}"').replace('"synthetic"', '"cifar100"')
    stages = micronet.load_stages(write(re.sub(r"\[stage.first\][^[]*", "", text)))
    teacher, facts = micronet.load_parent(stages["second"], "teacher", tmp_path, None)
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, 100) and facts.tested.top1 is None


def test_a_file_of_a_later_torch_is_taken_at_any_width(plain: ModuleType, tmp_path: Path) -> None:
    network, state = published(plain, "efficientnet_b0")
    widths = itertools.cycle([torch.float32, torch.half, torch.bfloat16, torch.double])
    state = {name: tensor.to(width) if tensor.dim() else tensor for (name, tensor), width in zip(state.items(), widths)}
    saved = OrderedDict(("module." + name, tensor) for name, tensor in state.items())  # of several GPUs
    saved._metadata = {"": {"version": 1}}  # as state_dict() has it
    torch.save(saved, tmp_path / "x.pytar")
    assert import_file(tmp_path / "x.pytar", "efficientnet_b0").exit_code == 0
    network.load_state_dict(dict(zip(network.state_dict(), state.values())))
    same_function(load_network(tmp_path / "x.safetensors"), network)


def not_imported(path: Path, message: str, alone: bool = False) -> None:
    assert refused(import_file(path, alone=alone), message, code=3) and not path.with_suffix(".safetensors").exists()


NAME, BIAS = "classifier.0.bias", torch.ones(200)
OTHERS = {  # what an exx has in the place of that bias, or beside it, and what is said of it
    "infinite once it is float32": ({NAME: BIAS.double() * 1e300}, "embedding.bias is not finite"),
    "huge": ({NAME: torch.ones(1).expand(10**12)}, "expected a dict of dense tensors of floats"),
    "extra": ({"extra": BIAS}, '"extra" is not in this network'),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_networks_weights_are_refused(kind: str, published_exx: Published, tmp_path: Path) -> None:
    change, message = OTHERS[kind]
    torch.save(published_exx[1] | change, tmp_path / "x.pytar", _use_new_zipfile_serialization=kind != "huge")
    not_imported(tmp_path / "x.pytar", message)


class Payload:
    """Something that runs a function where it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def strangers(marker: Path) -> dict[str, object]:
    """Return what torch can save and is no dict of dense tensors of floats; some would touch `marker`, unpickled."""
    touch = Payload(os.system, f"touch {marker}")
    with warnings.catch_warnings(action="ignore"):  # of kinds that torch calls beta, or about to go
        in_place = {
            "bool": BIAS.bool(), "int": BIAS.int(), "float8": BIAS.to(torch.float8_e4m3fn), "complex": BIAS * 1j,
            "conjugated": (BIAS * 1j).conj(),
            "sparse": BIAS.to_sparse(), "compressed": torch.eye(200).to_sparse_csr(), "meta": BIAS.to("meta"),
            "quantised": torch.quantize_per_tensor(BIAS, 0.1, 0, torch.qint8), "parameter": nn.Parameter(BIAS),
            "text": "a bias", "number": 3, "nothing": None, "payload": touch,
            "getattr": Payload(getattr, Path(marker), "touch"),
        }  # fmt: skip
    alone = {
        "system": touch, "eval": Payload(eval, f"open({str(marker)!r}, 'w').close()"), "as a key": {touch: BIAS},
        "module": nn.Sequential(nn.Linear(2, 2)), "list": [BIAS, BIAS],
    }  # fmt: skip
    return {kind: {NAME: thing} for kind, thing in in_place.items()} | alone


NO_DICT = "expected a dict of dense tensors of floats that torch.save has written"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", strangers(Path("marker")))
def test_what_is_no_dict_of_dense_tensors_is_refused_and_nothing_runs(kind: str, zipped: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pytar", tmp_path / "marker"
    torch.save(strangers(marker)[kind], path, _use_new_zipfile_serialization=zipped)
    not_imported(path, NO_DICT)
    assert not marker.exists()


def nested(depth: int) -> bytes:
    """A tuple of two tuples of two tuples ..., each pair one object: hashing it takes 2^depth steps."""
    return b"(t" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(depth))


EATERS = {
    "key": b"\x80\x02}" + nested(40) + b"K\x01s.",
    "value": b"\x80\x02}X\x01\x00\x00\x00a" + nested(40) + b"s.",
    "deep": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "many": b"\x80\x02]" + b"K\x01a" * 10**6 + b".",
}


@pytest.mark.parametrize("kind", [*EATERS, "zipped"])
def test_a_file_that_would_eat_the_machine_is_refused_in_time(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micronet, "PATIENCE", 5)
    path = tmp_path / "evil.pytar"
    if kind in EATERS:
        path.write_bytes(EATERS[kind] * 5)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", EATERS["key"])
    begun = time.monotonic()
    not_imported(path, NO_DICT, alone=kind in ("key", "deep", "zipped"))
    assert time.monotonic() - begun < 60


def test_a_file_that_asks_for_too_much_time_or_memory_is_refused(published_exx: Published, tmp_path: Path) -> None:
    torch.save(published_exx[1], path := tmp_path / "net.pytar")
    for name, value in (("PATIENCE", 0.01), ("LOADER", micronet.LOADER.replace("2**33", "2**20"))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(micronet, name, value)
            not_imported(path, NO_DICT, alone=True)


def test_what_torch_save_has_not_written_is_refused(tmp_path: Path) -> None:
    """Cut short, a pickle or an archive of another kind, one that could unpack to any size, no file."""
    path, marker = tmp_path / "net.pytar", tmp_path / "marker"
    for zipped in (False, True):
        torch.save({NAME: BIAS}, path, _use_new_zipfile_serialization=zipped)
        not_imported(path, " is missing")  # of the rest; read it is
        content = path.read_bytes()
        for length in (0, 1, 100, len(content) // 2, len(content) - 10):
            path.write_bytes(content[:length])
            not_imported(path, NO_DICT)
    path.write_bytes(pickle.dumps(Payload(os.system, f"touch {marker}")))
    not_imported(path, NO_DICT)
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "../../evil")
    not_imported(path, NO_DICT)
    for method, times in ((zipfile.ZIP_DEFLATED, 1), (zipfile.ZIP_STORED, 50)):  # compressed, on top of each other
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("x/data.pkl", bytes(10**6))
            archive.filelist *= times
        not_imported(path, NO_DICT)
    not_imported(tmp_path / "missing.pytar", "No such file")
    os.mkfifo(tmp_path / "pipe.pytar")
    for no_file in (tmp_path, tmp_path / "pipe.pytar"):
        not_imported(no_file, "not a file")
    assert not marker.exists()
