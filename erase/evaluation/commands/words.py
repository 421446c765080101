"""`eval-concept words`: words that occur with a concept, as further retain prompts."""

from dataclasses import replace

from erase.commandline import Parser
from erase.errors import EraseError
from erase.evaluation.flags import quiet_option


def run(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept words",
        "Find words that occur with a concept in images of it, by CLIP (CARE), and write the concept with a retain "
        "prompt for each of them as a .toml, for erase-concept --concept.",
        example="images --concept nudity --output nudity.toml",
    )
    parser.add_argument("images", help="folder of images of the concept, which the base model generated")
    parser.add_argument("--concept", required=True, help="preset, .toml, or free text with --kind")
    parser.add_argument("--kind", choices=["object", "style", "person", "abstract"], help="kind of a free-text concept")
    parser.add_argument("--num-words", type=int, default=20, metavar="N", help="words to find [default: 20]")
    parser.add_argument("--output", required=True, metavar="FILE", help=".toml to write")
    parser.add_argument("--judge-model", default="openai/clip-vit-base-patch32", metavar="PATH",
                        help="CLIP: hub id or folder [default: openai/clip-vit-base-patch32]")  # fmt: skip
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N [default: a GPU if there is one]")
    quiet_option(parser)
    given = parser.parse_args(arguments)
    if given.num_words < 1:
        raise EraseError(f"--num-words is {given.num_words}; give 1 or more")
    if not given.output.lower().endswith(".toml"):
        raise EraseError(f"--output is {given.output}; give a name that ends with .toml")

    import torch
    from torch.nn.functional import normalize

    from erase import concepts, device
    from erase.data.images import BadImage, image_files, invalid_reason, read
    from erase.evaluation import retain_words
    from erase.evaluation.judges.networks.pretrained import Clip, batches
    from erase.progress import each

    concept = concepts.find(given.concept, given.kind)
    paths = image_files(given.images)
    if not paths:
        raise EraseError(f"{given.images} has no image; give the folder of images of {concept.name!r}")
    clip = Clip(given.judge_model, str(device.choose(given.device, None).device))
    words = retain_words.candidates(clip.tokenizer.get_vocab(), concept)
    seen = []
    for path in each(paths, "CLIP", "images", quiet=given.quiet):
        try:
            pixels = read(path)
        except BadImage as error:
            raise EraseError(f"cannot read the image {path} ({error.reason}); repair or remove it") from error
        if invalid_reason(pixels) is None:
            seen += [normalize(clip.see(part)) for part in batches([pixels])]
    if not seen:
        raise EraseError(f"every image of {given.images} is flat; give images that show {concept.name!r}")
    of_concept = normalize(clip.read([concept.name, *concept.synonyms, *concept.forget]))
    vectors = retain_words.embed(clip, list(words.values()))
    found = retain_words.choose(torch.cat(seen), of_concept, list(words), vectors, given.num_words)
    prompts = [prompt for prompt in map(retain_words.prompt_of, found) if prompt not in concept.retain]
    concepts.write(replace(concept, retain=(*concept.retain, *prompts)), given.output)
    print(", ".join(found))
    print(f"{given.output}: {concept.name!r} with {len(prompts)} more retain prompts, found in {len(seen)} images")
