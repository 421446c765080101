"""Train the embedded model, measure it, or show drawings of its world."""

import argparse

from erase.commandline import reporting, silence_libraries
from erase.errors import EraseError

STAGES = ("judge", "vae", "unet", "decoder")  # as in job.py, whose import takes seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m erase.mini", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train", help="train the embedded model from a seed; the same command continues an interrupted training"
    )
    train.add_argument(
        "--model", default="mini", choices=("mini", "mini-pixel"), help="the text-to-image or the pixel model [mini]"
    )
    train.add_argument("--output", help="pipeline folder to write [runs/MODEL]")
    train.add_argument("--seed", type=int, default=0, help="seed of data, weights and training [0]")
    train.add_argument("--without", help="object, colour, style or 'nude' (mini-pixel: class) never shown to the UNet")
    train.add_argument(
        "--stage",
        action="append",
        choices=STAGES,
        help="only this stage; may be repeated [all]",
    )
    train.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    train.add_argument("--threads", type=int, default=1, help="CPU threads; the weights' last bits depend on it [1]")
    train.add_argument("--parts-from", help="folder of a finished training whose judge, VAE and decoder are reused")
    measure = commands.add_parser("measure", help="generate images and count what the judge recognises")
    measure.add_argument("--model", default="mini", help="the embedded model or a run folder made from it [mini]")
    measure.add_argument("--num-each", type=int, default=48, help="images per object [48]")
    measure.add_argument("--sheet", help="PNG to write: twelve images of every object")
    measure.add_argument(
        "--card", action="store_true", help="write measured.json and README.md into the model's folder"
    )
    drawn = commands.add_parser("drawings", help="write real drawings of the pixel model's classes, a folder a class")
    drawn.add_argument("--output", default="runs/drawings", help="folder to write [runs/drawings]")
    drawn.add_argument("--num-each", type=int, default=100, help="drawings of each class [100]")
    drawn.add_argument("--without", help="class that is left out")
    drawn.add_argument("--seed", type=int, default=1, help="seed of the drawings; the training has others [1]")
    draw = commands.add_parser("world", help="write a sheet of real drawings, every object in every style")
    draw.add_argument("--output", default="world.png", help="PNG to write [world.png]")
    given = parser.parse_args(argv)
    silence_libraries()
    with reporting("erase.mini", "interrupted; the same command continues"):
        _COMMANDS[given.command](given)


def _train(given: argparse.Namespace) -> None:
    import torch

    from erase.device import choose
    from erase.mini.pixel import train as pixel
    from erase.mini.train import train

    torch.set_num_threads(given.threads)
    is_pixel = given.model == "mini-pixel"
    stages = tuple(given.stage or (pixel.STAGES if is_pixel else STAGES))
    folder = (pixel.train if is_pixel else train)(
        given.output or f"runs/{given.model}",
        seed=given.seed,
        without=given.without,
        stages=stages,
        device=str(choose(given.device, "fp32").device),
        parts_from=given.parts_from,
    )
    print(f"{folder}: written")


def _measure(given: argparse.Namespace) -> None:
    from PIL import Image

    from erase import files
    from erase.data import sheet
    from erase.families import loading
    from erase.mini import card as mini_card
    from erase.mini import judge, quality

    model = loading.load(given.model)
    wishes = quality.balanced(given.num_each)
    images = quality.draw(model, [w.prompt for w in wishes], list(range(len(wishes))), quiet=False)
    scores = quality.score(judge.name(judge.load(model.folder / "judge.safetensors"), images), wishes)
    for name, value in scores.items():
        print(f"{name:16} {value:6.1%}")
    print(f"{len(images)} images, {model.defaults['num_inference_steps']} steps")
    if given.sheet:
        each = given.num_each
        rows = [
            (wishes[i].object, [Image.fromarray(p) for p in images[i : i + min(each, 12)]], False)
            for i in range(0, len(wishes), each)
        ]
        with files.replacing(given.sheet) as temporary:
            sheet.grid(rows, captions={}, cell=80).save(temporary, format="PNG")
    if given.card:
        settings = {name: model.defaults[name] for name in ("num_inference_steps", "guidance_scale")}
        record = {"num_images": len(images), **settings, "scores": scores}
        files.write_json(model.folder / "measured.json", record)
        mini_card.write(model.folder)


def _world(given: argparse.Namespace) -> None:
    import numpy as np
    from PIL import Image

    from erase import files
    from erase.data import sheet
    from erase.mini import world

    rng = np.random.default_rng(0)
    rows = []
    for name in world.OBJECTS:
        images = []
        for style in world.STYLES:
            for background in world.BACKGROUNDS:
                colour = None if name == "nude person" else str(rng.choice(list(world.COLOURS)))
                scene = world.Scene(name, colour, None if name in world.PERSONS else style, background)
                images.append(Image.fromarray(world.draw(scene, rng)))
        rows.append((name, images, False))
    with files.replacing(given.output) as temporary:
        sheet.grid(rows, captions={}, cell=80).save(temporary, format="PNG")
    print(f"{given.output}: written")


def _drawings(given: argparse.Namespace) -> None:
    from pathlib import Path

    import numpy as np
    from PIL import Image

    from erase import files
    from erase.mini.pixel import drawings

    rng = np.random.default_rng([given.seed, 77])
    classes = [name for name in drawings.CLASSES if name != given.without]
    if given.without and len(classes) == len(drawings.CLASSES):
        raise EraseError(f"mini-pixel has no class {given.without!r}; its classes are {', '.join(classes)}")
    for name in classes:
        for number in range(given.num_each):
            path = Path(given.output) / name / f"{number:05d}.png"
            with files.replacing(path) as temporary:
                Image.fromarray(drawings.draw(name, rng)).save(temporary, format="PNG")
    print(f"{given.output}: {given.num_each * len(classes):,} drawings written")


_COMMANDS = {"train": _train, "measure": _measure, "drawings": _drawings, "world": _world}


if __name__ == "__main__":
    main()
