"""The part of a family's contract that is about folders and files: reading, writing, and how they are opened."""
# pyright: strict, reportPrivateImportUsage=false

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from diffusers import ModelMixin
from torch import Tensor

from erase import delta
from erase.errors import EraseError


class Stored(ABC):
    """What a model of one architecture is on disk; a part of `erase.families.protocol.Family`.

    checkpoint_dtype: of the weights in the single checkpoint files that are written.
    """

    family: ClassVar[str] = ""
    pipelines: ClassVar[tuple[str, ...]] = ()
    pipeline_module: ClassVar[str] = "diffusers"
    licences: ClassVar[Mapping[str, str]] = {}
    checkpoint_dtype: ClassVar[Literal["fp16", "fp32"]] = "fp16"

    @classmethod
    def other_kind(cls, folder: Path) -> str | None:
        """What a pipeline folder of one of `pipelines` is, if this family cannot load it; None if it can."""
        return None

    @classmethod
    @abstractmethod
    def from_folder(
        cls, source: str | Path, folder: Path, *, allow_pickle: bool = False, weights_file: str | Path | None = None
    ) -> Self:
        """The model of a diffusers folder, in float32 on the CPU, with its parts checked.

        source: what the user gave, for messages and the model's name.
        allow_pickle: accept weights that are not safetensors.
        weights_file: weights of the network, all or some, that replace the folder's.

        Raises:
            EraseError: a part is missing, damaged or of another model.
        """

    @classmethod
    @abstractmethod
    def read_network(
        cls,
        folder: Path,
        *,
        allow_pickle: bool = False,
        weights_file: str | Path | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> ModelMixin:
        """The network alone of a diffusers folder, in float32 on the CPU, as `from_folder` reads it.

        tell: called with lines for the user about `weights_file`.
        """

    @classmethod
    def knows_file(cls, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether `convert` reads the single .safetensors file that holds tensors of these names and shapes."""
        return False

    @classmethod
    def convert(
        cls, path: Path, *, allow_pickle: bool = False, config: str | None = None, cache_dir: Path | None = None
    ) -> tuple[Path, list[str]]:
        """The diffusers folder of a single checkpoint file, made in the cache once, and lines for the user about it.

        config: a diffusers folder whose configs and tokenizer are used; None asks the hub for them.

        Raises:
            EraseError: this family reads folders only, or the file cannot be read.
        """
        raise EraseError(f"{path}: {cls.family} is read from folders only; give a diffusers folder")

    @classmethod
    def no_checkpoint(cls, folder: Path) -> str | None:
        """Why a pipeline folder cannot be written as a single checkpoint file; None if it can, see `checkpoint`."""
        return f"{cls.family} models are written as folders only"

    @classmethod
    def checkpoint(cls, folder: Path, network: delta.State | None = None) -> dict[str, Tensor]:
        """All weights of a pipeline folder under their names in single checkpoint files.

        network: the trained network's weights; those in the folder if None.

        Raises:
            EraseError: see `no_checkpoint`; or a component has no weights.
        """
        raise EraseError(f"{folder}: {cls.no_checkpoint(folder)}; use the folder")

    @classmethod
    def licence(cls, source: str) -> str | None:
        """The hub's identifier of the licence of a model on the hub; None if it is not known."""
        return next((licence for start, licence in cls.licences.items() if source.startswith(start)), None)

    @classmethod
    def keep(cls, pipeline: Any, cache_dir: Path | None = None) -> Path:
        """The folder of a pipeline in memory, written to the cache once with the same bits.

        Raises:
            EraseError: this family reads folders only, or the pipeline is incomplete.
        """
        raise EraseError(f"a {type(pipeline).__name__} in memory cannot be read; save it, and give its folder")

    @classmethod
    def needs_dtype(cls, folder: Path) -> bool:
        """Whether `from_pretrained` opens a written folder correctly only with dtype=torch.float32."""
        return False

    @classmethod
    def loading_code(cls, folder: Path, shown: str, alias: str = "") -> list[str]:
        """Lines of Python that open a written folder as a pipeline. shown: the folder as the code names it."""
        name, dtype = cls.pipelines[0], ", dtype=torch.float32" if cls.needs_dtype(folder) else ""
        return [
            *(["import torch"] if dtype else []),
            f"from {cls.pipeline_module} import {name}{alias and f' as {alias}'}",
            f"pipeline = {alias or name}.from_pretrained({shown}{dtype})",
        ]
