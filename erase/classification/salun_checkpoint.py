"""Checkpoints of SalUn's code (0model_SA_best.pth.tar), read as our ResNets."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from erase import pickles
from erase.classification import networks
from erase.classification.data import Dataset
from erase.classification.networks import Classifier, Shape
from erase.delta import layout_of, require_layout
from erase.errors import EraseError, no_file

SUFFIXES = {".tar", ".pth", ".pt", ".bin", ".ckpt"}
NETWORKS = ("resnet18", "resnet18_imagenet", "resnet50")

# Modules by torchvision's names, which SalUn's ResNets have, and by those of transformers, which ours have.
_MODULES = {
    "conv1": "network.resnet.embedder.embedder.convolution",
    "bn1": "network.resnet.embedder.embedder.normalization",
    "fc": "network.classifier.1",
}
_BLOCKS = {"conv": "layer.{}.convolution", "bn": "layer.{}.normalization"}
_SHORTCUT = {"downsample.0": "shortcut.convolution", "downsample.1": "shortcut.normalization"}


def load(
    path: str | Path,
    network: str,
    dataset: Dataset,
    *,
    allow_pickle: bool,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Classifier, Shape]:
    """The classifier of a file of `torch.save`, as a network for the data set's image size.

    tell: called with notes: what in the file was not built, and whether its normalisation is missing.

    Raises:
        EraseError: no such file, pickles are not allowed, or it holds another network.
    """
    if not Path(path).is_file():
        raise EraseError(no_file(path))
    if not allow_pickle:
        raise EraseError(
            f"{path} is a pickle, which can run code when loaded; pass --allow-pickle if you trust its source"
        )
    if network not in NETWORKS:
        raise EraseError(f"{path} is read as a ResNet, not as {network}; give --network {', '.join(NETWORKS)}")
    tensors, stubs = pickles.tensors(path)
    if stubs:
        tell(pickles.stubbed(path, stubs))
    state = {_renamed(name.removeprefix("module."), path): tensor for name, tensor in tensors.items()}
    first, last = "network.resnet.embedder.embedder.convolution.weight", "network.classifier.1.weight"
    if first not in state or last not in state:
        raise EraseError(f"{path} holds no ResNet: it has no conv1.weight or no fc.weight")
    if "mean" not in state or "std" not in state:
        tell(f"{path} does not say how images are normalised; that of {dataset.name} is used")
        state |= {"mean": torch.tensor(dataset.mean), "std": torch.tensor(dataset.std)}
    mean, std = (tuple(state[name].float().flatten().tolist()) for name in ("mean", "std"))
    shape = Shape(network, len(state[last]), state[first].shape[1], dataset.size, mean, std)
    state |= {name: state[name].float().view(-1, 1, 1) for name in ("mean", "std")}
    model = networks.build(shape, seed=0)
    state = {name: state[name] for name in model.state_dict() if name in state} | state  # in our order
    try:
        require_layout(layout_of(state), layout_of(model.state_dict()), network)
    except EraseError as error:
        raise EraseError(f"{path} is no {network}: {error}; give the --network that it was trained as") from error
    model.load_state_dict(state)
    return model, shape


def _renamed(name: str, path: str | Path) -> str:
    module, _, tensor = name.rpartition(".")
    if module == "normalize" and tensor in {"mean", "std"}:
        return tensor
    if module in _MODULES:
        return f"{_MODULES[module]}.{tensor}"
    block = re.fullmatch(r"layer([1-4])\.(\d+)\.(?:(conv|bn)([1-3])|(downsample\.[01]))", module)
    if block:
        stage, layer, kind, number, shortcut = block.groups()
        inside = _SHORTCUT[shortcut] if shortcut else _BLOCKS[kind].format(int(number) - 1)  # theirs count from 1
        return f"network.resnet.encoder.stages.{int(stage) - 1}.layers.{layer}.{inside}.{tensor}"
    raise EraseError(f"{path} has a weight {name!r}, which SalUn's ResNets do not have; give a checkpoint of its code")
