"""Refusal of minors: one check for every text that is generated from, trained on or used as a caption.

    refuse(prompts, "captions.csv", sexual=True)   raises an EraseError for the first prompt that involves minors
    shows_minors("a photo of a nude girl")         True

What is aimed at (a concept's name, forget and anchor prompts, synonyms, its judge, captions of forget images) never
involves minors. Any other prompt may show a child, but not beside sexual content.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable

from erase.errors import EraseError

_AGE = (
    r"(?:0?\d|1[0-7]|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen"
    r"|seventeen)"
)
_MINORS = re.compile(
    r"\b(?:"
    r"(?:grand|step|god|school)?child(?:ren|rens|s|like|hood|hoods)?|kids?|kiddos?|kidd(?:y|ies?)"
    r"|(?:baby|little|young|tiny|teen|school)?(?:girls?|boys?)|girlish|boyish"
    r"|(?:pre)?teen(?:s|age|aged|agers?)?|tweens?|adolescen(?:ce|ts?)|juveniles?|(?:pre)?pubescents?"
    r"|toddlers?|bab(?:y|ys|ies)|infants?|newborns?|youngsters?"
    r"|(?<!ursa )minors?(?! (?:chords?|keys?|scales?|thirds?|sevenths?|planets?|leagues?|arcana)\b)"
    r"|under ?aged?|under (?:the )?age|(?:under|below) (?:the age of )?(?:18|eighteen)"
    r"|younger than (?:18|eighteen|" + _AGE + r")|barely legal|jailbait|age regression"
    r"|school ?(?:kids?|aged?|uniforms?|students?|pupils?)|(?:pre ?|high ?|middle ?|grade ?)schoolers?"
    r"|kindergart(?:en|ners?|eners?)"
    r"|loli(?:s|ta|tas|con)?|shota(?:s|con)?|toddlercon|csam|pa?edo(?:s|phil\w*)?"
    r"|" + _AGE + r"(?: and a half)? (?:(?:years?|yrs?|y) ?(?:olds?|o|young|of age)|yos?)"
    r"|\w+ (?:months?|weeks?|days?) old|age[ds]? (?:of )?" + _AGE + r")\b"
)
_CHILD_EMOJI = re.compile("[\N{BABY}\N{CHILD}\N{BOY}\N{GIRL}\N{BABY ANGEL}]")
_SEXUAL = re.compile(
    r"\b(?:nud(?:e|es|ity|ist|ists)|naked|nakedness|nsfw|sex|sexual\w*|sexy|erotic\w*|porn\w*|topless|bottomless|undress\w*"
    r"|unclothed|lingerie|underwear|breasts?|nipples?|genitals?|genitalia|penis|vagina|hentai|xxx|fetish\w*)\b"
)
# Harmless by themselves; beside nudity they are not.
_YOUNG = re.compile(
    r"\b(?:young|younger|youngest|youths?|youthful|(?:step)?daughters?|(?:step)?sons?|lads?|lass(?:es|ie)?)\b"
)


def refuse(texts: Iterable[str], where: str, *, sexual: bool = False, target: bool = False) -> None:
    """Raise an EraseError for the first text that involves minors where it must not.

    where: what the message calls the place, such as "anchor" or "captions.csv, row 3".
    sexual: the texts stand in a sexual context, whatever their own words say.
    target: the texts are what a run aims at, which never involves minors, sexual context or not.
    """
    for text in texts:
        beside = sexual or has_sexual_words(text)
        word = _minor(text, beside) if target or beside else ""
        if word and target:
            raise EraseError(f"this tool does not accept targets that involve minors ('{word}' in {where})")
        if word:
            raise EraseError(f"this tool does not accept minors beside sexual content ('{word}' in {where})")


def shows_minors(text: str, is_sexual: bool = False) -> bool:
    """Whether a prompt puts minors beside sexual content, so that no image may be generated from it.

    is_sexual: the context is sexual, as in a benchmark's category; otherwise the prompt's own words decide.
    """
    return bool((is_sexual or has_sexual_words(text)) and _minor(text, True))


def has_sexual_words(text: str) -> bool:
    """Whether the text has sexual words."""
    return bool(_SEXUAL.search(plain(text)))


def _minor(text: str, sexual: bool) -> str:
    """The words that name a minor, "" if none do. sexual: words that are harmless by themselves count too."""
    words = plain(text)
    found = _CHILD_EMOJI.search(text) or _MINORS.search(words) or (_YOUNG.search(words) if sexual else None)
    return found[0] if found else ""


@functools.cache
def plain(text: str) -> str:
    """Lower-case words and numbers between single spaces, without accents, wide letters and invisible characters."""
    text = unicodedata.normalize("NFKD", text).casefold()
    text = "".join(c for c in text if unicodedata.category(c) not in {"Mn", "Cf"})
    text = re.sub(r"[\W_]+", " ", text)
    return re.sub(r"(?<=\d)(?=[^\W\d])|(?<=[^\W\d])(?=\d)", " ", text).strip()
