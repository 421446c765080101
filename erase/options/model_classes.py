"""Class names of a class-conditional model, and the concept that one of its classes is."""

from pathlib import Path

from erase.concepts import Concept, of_class
from erase.errors import EraseError
from erase.files import read_json

MINI_PIXEL = "mini-pixel"
MINI_PIXEL_DIR = Path(__file__).parents[1] / "mini" / "pixel" / "weights"

PIPELINES = ("DDIMPipeline", "DDPMPipeline")  # of pixel models
# --config's names for the classes of published checkpoints, in the order of their labels
PUBLISHED = {
    "ddpm-cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "ddpm-stl10": ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
}


def read_classes(folder: Path) -> tuple[str, ...]:
    """The class names in a pipeline folder's model_index.json, in the order of their labels; () if it has none.

    They are under "id2label", {"0": "airplane", "1": ...}, as in diffusers' DiTPipeline.

    Raises:
        EraseError: the labels are not 0, 1, 2 and so on, or two classes have one name.
    """
    path = folder / "model_index.json"
    stated = read_json(path).get("id2label") if path.is_file() else None
    if stated is None:
        return ()
    names = [stated.get(str(label)) for label in range(len(stated))] if isinstance(stated, dict) else [None]
    texts = [name.strip() for name in names if isinstance(name, str) and name.strip()]
    if len(texts) < max(2, len(names)) or len({name.lower() for name in texts}) < len(texts):
        raise EraseError(
            f"{path}: id2label must name two or more different classes by their labels, such as "
            '{"0": "airplane", "1": "automobile"}'
        )
    return tuple(texts)


def classes_of(model: str, config: str | None = None) -> tuple[str, ...]:
    """The class names of a model folder, or of the embedded pixel model; () for every other model.

    config: for a checkpoint file, a key of `PUBLISHED` or a folder that has the names.
    """
    path = MINI_PIXEL_DIR if model == MINI_PIXEL else Path(model).expanduser()
    if config is None or path.is_dir():
        return read_classes(path)
    return PUBLISHED.get(config) or read_classes(Path(config).expanduser())


def class_concept(name: str, model: str, config: str | None = None) -> Concept | None:
    """The concept that a class of this model is; None for a model without classes, and for a .toml file.

    config: see `classes_of`.

    Raises:
        EraseError: the model has class names, but not this one; or it is a folder or a checkpoint that should have them
            and has none.
    """
    if name.lower().endswith(".toml"):
        return None
    if classes := classes_of(model, config):
        return of_class(name, classes)
    index = Path(model).expanduser() / "model_index.json"
    if index.is_file() and read_json(index).get("_class_name") in PIPELINES:
        raise no_classes(index.parent)
    if _is_pixel_checkpoint(Path(model).expanduser()):
        raise unnamed(model, config)
    return None


def _is_pixel_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint in DDIM's layout. No code in it runs: its names are text near the beginning."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"temb.dense.0.weight" in file.read(2**20)


def unnamed(path: str | Path, config: str | None) -> EraseError:
    """What to say of a checkpoint of a pixel model whose classes --config does not name."""
    given = "" if config is None else f", and --config {config} names no classes"
    return EraseError(
        f"{path} is a pixel model without class names{given}; give --config {' or '.join(PUBLISHED)}, or --config DIR "
        "where DIR/model_index.json has id2label"
    )


def no_classes(folder: Path) -> EraseError:
    """What to say of a pixel model's folder without class names."""
    return EraseError(
        f"{folder}/model_index.json has no class names; add them by their labels, such as "
        '"id2label": {"0": "airplane", "1": "automobile"}'
    )
