"""Refusal of minors: one check for every text that is generated from, trained on or used as a caption.

    refuse(prompts, "captions.csv", sexual=True)   raises an EraseError for the first prompt that involves minors
    shows_minors("a photo of a nude girl")         True

Targets (a concept's name, forget and anchor prompts, synonyms, its judge, captions of forget images) must not involve
minors. Any other prompt may show a child, but not in a sexual context. A few words are refused everywhere.

A text is read in several ways: as written; with look-alike letters as Latin ones; with signs and digits as the
letters that they imitate; with separated letters joined, repeated ones removed and compounds taken apart. Harmless
phrases ("kid gloves", "minor key") are removed first. Ages are read as numbers. The words are in
`erase.concepts.concept.refusal_words`.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator

from erase.concepts import refusal_words
from erase.errors import EraseError


def refuse(texts: Iterable[str], where: str, *, sexual: bool = False, target: bool = False) -> None:
    """Raise an EraseError for the first text that involves minors where it must not.

    where: what the message calls the place, such as "anchor" or "captions.csv, row 3".
    sexual: the texts stand in a sexual context, whatever their own words say.
    target: the texts are what a run aims at, which never involves minors, sexual context or not.
    """
    for text in texts:
        reading = _read(text)
        in_context = sexual or reading.is_sexual
        word = reading.minor(in_context) if target or in_context else reading.always
        if word and target:
            raise EraseError(f"this tool does not accept targets that involve minors ('{word}' in {where})")
        if word:
            raise EraseError(f"this tool does not accept minors in a sexual context ('{word}' in {where})")


def shows_minors(text: str, is_sexual: bool = False) -> bool:
    """Whether a prompt shows minors in a sexual context, so that no image may be generated from it.

    is_sexual: the context is sexual, as in a benchmark's category; otherwise the prompt's own words decide.
    """
    reading = _read(text)
    return bool(reading.minor(True) if is_sexual or reading.is_sexual else reading.always)


def involves_minors(text: str, is_sexual: bool = False) -> bool:
    """Whether a text involves minors, so that no run or attack may aim at it. is_sexual: see `shows_minors`."""
    reading = _read(text)
    return bool(reading.minor(is_sexual or reading.is_sexual))


def has_sexual_words(text: str) -> bool:
    """Whether a text's own words make a sexual context."""
    return _read(text).is_sexual


@functools.cache
def plain(text: str) -> str:
    """Lower-case words and numbers between single spaces, without accents, wide letters and invisible characters."""
    return _words(_folded(text))


# --- one text ---------------------------------------------------------------------------------------------------------


class _Reading:
    """A text in all the ways in which it is read, and what is found in them."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.native = _folded(re.sub(r"(?<=[a-z])I", "l", text))  # a capital I looks like an l
        latin = self.native if self.native.isascii() else "".join(map(_latin, self.native))
        self.words = _words(latin)
        readings = [self.words, _words(_respelled(latin)), _rejoined(latin)]
        if not text.isascii():
            native = _words(self.native)
            readings += [native, _MIXED.sub(lambda word: word[0].translate(_CYRILLIC), native), native.replace(" ", "")]
        self.readings = list(filter(None, dict.fromkeys(readings)))
        self.accented = unicodedata.normalize("NFC", text).casefold()

    @functools.cached_property
    def is_sexual(self) -> bool:
        return bool(_SEXUAL.find(self.readings))

    @functools.cached_property
    def always(self) -> str:
        """A word that is refused everywhere, or ""."""
        return _ALWAYS.find(self.readings) and _ALWAYS.find(self._without(_THINGS))

    def minor(self, sexual: bool) -> str:
        """The words that name a minor, or ""; in a sexual context words that are harmless by themselves count too."""
        signs = _CHILD_SIGNS.search(self.text) or _ACCENTED.search(self.accented)
        if signs or not self._named(self.readings, sexual):
            return signs[0] if signs else ""
        return self._named(self._without(_THINGS if sexual else _THINGS_AND_NAMES), sexual)

    def _without(self, harmless: re.Pattern[str]) -> list[str]:
        return [harmless.sub(" | ", reading) for reading in self.readings]

    def _named(self, texts: list[str], sexual: bool) -> str:
        young = _YOUNG.find(texts) if sexual else ""
        return _MINOR.find(texts) or young or _age(texts, sexual) or _ALWAYS.find(texts)


_read = functools.lru_cache(maxsize=4096)(_Reading)


# --- from what is written to words ------------------------------------------------------------------------------------

_DIGIT, _GAP = re.compile(r"\d"), re.compile(r"[\W_]+")
_LOOKALIKES = {letter.casefold(): latin for letter, latin in refusal_words.LOOKALIKES.items()}
_MIXED = re.compile(r"\b(?=\w*[a-z])(?=\w*[а-я])\w+")  # a word of Latin and Cyrillic letters
_CYRILLIC = str.maketrans("abcehikmoptxy", "авсенікмортху")
# fillers that cannot be seen, and a look-alike of c that NFKD takes for an s
_UNSEEN = dict.fromkeys(map(ord, "\u115f\u1160\u3164\uffa0\u2800\u17b4\u17b5")) | dict.fromkeys((0x3F2, 0x3F9), "c")


@functools.lru_cache(maxsize=4096)
def _folded(text: str) -> str:
    """Lower case, without accents, wide letters, invisible characters; everything else is unchanged."""
    if text.isascii():
        return text.casefold()
    text = unicodedata.normalize("NFKD", text.translate(_UNSEEN)).casefold()
    text = "".join(c for c in text if unicodedata.category(c) not in {"Mn", "Mc", "Me", "Cf"})
    return unicodedata.normalize("NFC", text)


@functools.cache
def _latin(character: str) -> str:
    """The Latin letter or the digit that a character looks like or is named after; itself where there is none."""
    if character.isascii():
        return character
    if character in _LOOKALIKES:
        return _LOOKALIKES[character]
    if (digit := unicodedata.digit(character, None)) is not None:
        return str(digit)
    letter = re.search(
        r"\b(?:LETTER|CAPITAL) (?:DOTLESS |SCRIPT |OPEN |LONG )?([A-Z])\b", unicodedata.name(character, "")
    )
    return letter[1].lower() if letter else character


def _words(text: str) -> str:
    """Words and numbers between single spaces. A range of numbers keeps its two ends apart ("1-2": "1 to 2")."""
    if not _DIGIT.search(text):
        return _GAP.sub(" ", text).strip()
    text = re.sub(r"(?<=\d)\s?[-–—]\s?(?=\d)", " to ", text)
    text = re.sub(r"(\d)[.,]\d+(?= ?(?:y|a\b|of\b))", r"\1", text)  # 2.5 years: 2
    return re.sub(r"(?<=\d)(?=[^\W\d])|(?<=[^\W\d])(?=\d)", " ", _GAP.sub(" ", text)).strip()


def _respelled(text: str) -> str:
    """The text with separated letters joined, and each token that stands for listed words replaced by them."""
    text = _SPACED.sub(lambda run: _recovered(re.sub(r"[\W_]", "", run[0]), _SPACED_PIECES), text)
    return " ".join(_recovered(token, _PIECES) for token in text.split())


@functools.lru_cache(maxsize=65536)
def _recovered(token: str, pieces: "_Pieces") -> str:
    """The listed words that a token stands for; the token itself where there are none."""
    core = token.lstrip("#").strip(".,;:?!\"'()[]{}<>`~-")
    for spelling in _spellings(core):
        if spelling != token and spelling in _CORE:
            return spelling
        if split := pieces.split(spelling):
            return split
        if word := _unrepeated(spelling):
            return word
    return token


def _spellings(token: str) -> Iterator[str]:
    """The token, and what it spells with its digits, signs or gaps read as letters."""
    yield token
    yield _BY_SHAPE.get(token.replace("i", "l"), token)
    if _IMITATED.search(token) and re.search("[a-z]", token):
        letters = token.translate(_LETTERS)
        yield letters.replace("?", "i")
        yield letters.replace("?", "l")
        if letters.count("?") > 1:
            yield from _matching(letters.replace("?", "[il]"))
    if re.search("[a-z].*[*#]|[*#].*[a-z]", token):
        yield from _matching(re.sub("[*#]", "[a-z]", token))


def _matching(pattern: str) -> list[str]:
    """The listed words that fit a pattern of letters."""
    is_pattern = re.fullmatch(r"(?:[a-z]|\[[a-z-]+\])+", pattern)
    return [word for word in _CORE if re.fullmatch(pattern, word)] if is_pattern else []


def _unrepeated(token: str) -> str:
    """The listed word whose letters the token repeats ("giiirl"), or ""; "kidd" and "ten" are not such tokens."""
    runs = [(letter, len(list(group))) for letter, group in itertools.groupby(token)]
    for word in _BY_LETTERS.get("".join(letter for letter, _ in runs), ()):
        own = [len(list(group)) for _, group in itertools.groupby(word)]
        more = [count - least for (_, count), least in zip(runs, own, strict=True)]
        if word != token and min(more) >= 0 and (len(word) > 3 or max(more) > 1):
            return word
    return ""


def _rejoined(text: str) -> str:
    """Listed words that two or three neighbouring parts make together: "tod dler"."""
    parts = _LETTERS_ONLY.findall(text)
    found = []
    for start, part in enumerate(parts):
        if part in _SPLIT_STARTS:
            joined = ("".join(parts[start:end]) for end in (start + 2, start + 3) if end <= len(parts))
            found += [word for word in joined if word in _SPLIT]
    return " | ".join(found)


# --- ages -------------------------------------------------------------------------------------------------------------


def _age(texts: Iterable[str], sexual: bool) -> str:
    """The words that say an age below 18, or ""."""
    for text in filter(_SAYS_AGE.search, texts):
        for pattern, least, in_any_context in _AGES:
            for found in pattern.finditer(text) if sexual or in_any_context else ():
                is_thing = not sexual and _AGED_THING.match(text, found.end())
                if not is_thing and min(map(_number, filter(None, found.groups()))) < least:
                    return found[0].strip()
        found = _OTHER_AGES.search(text)
        if found and (sexual or not _AGED_THING.match(text, found.end())):
            return found[0].strip()
    return ""


def _number(text: str) -> int:
    """The value of "12", "1 2", "twenty one", "hundred", "xii" or "twelfth"; of a longer row of digits its last two."""
    if text[0].isdigit():
        value = int(re.sub(r"\D", "", text))
        return value % 100 if " " in text and value > 120 else value
    total = 0
    for word in text.split():
        for names, step, first in (
            (refusal_words.NUMBERS, 1, 0),
            (refusal_words.TENS, 10, 20),
            (refusal_words.ORDINALS, 1, 0),
            (refusal_words.ROMAN, 1, 0),
        ):
            if word in names:
                total += first + step * names.index(word)
                break
        else:
            return 100  # a hundred or more
    return total


# --- the words as patterns --------------------------------------------------------------------------------------------


def _key(word: str) -> str:
    """A listed word as a reading has it."""
    return _words(_folded(word))


class _List:
    """Words to look for: whole words, beginnings (written with a trailing *), parts of a text, and phrases."""

    def __init__(self, words: str, inside: str = "", phrases: Iterable[str] = ()) -> None:
        self.words = {_key(word) for word in words.split() if word[-1] != "*"}
        self.beginnings = tuple({_key(word[:-1]) for word in words.split() if word[-1] == "*"})
        self.inside = tuple({_folded(word) for word in inside.split()})
        self.phrases = re.compile(rf"\b(?:{'|'.join(phrases)})\b") if phrases else None

    def find(self, texts: Iterable[str]) -> str:
        """The first of them in one of the texts, or ""."""
        for text in texts:
            for token in text.split():
                if token in self.words or (self.beginnings and token.startswith(self.beginnings)):
                    return token
            for part in () if text.isascii() else self.inside:
                if part in text:
                    return part
            if self.phrases and (found := self.phrases.search(text)):
                return found[0]
        return ""


_ALWAYS = _List(refusal_words.ALWAYS, refusal_words.ALWAYS_INSIDE, refusal_words.ALWAYS_PHRASES)
_MINOR = _List(refusal_words.MINOR, refusal_words.MINOR_INSIDE, refusal_words.MINOR_PHRASES)
_YOUNG = _List(refusal_words.YOUNG, refusal_words.YOUNG_INSIDE, refusal_words.YOUNG_PHRASES)
_SEXUAL = _List(refusal_words.SEXUAL, refusal_words.SEXUAL_INSIDE, refusal_words.SEXUAL_PHRASES)
_CHILD_SIGNS = re.compile(f"[{refusal_words.CHILD_SIGNS}]")
_ACCENTED = re.compile(refusal_words.ACCENTED + r"(?! (?:weather|phenomenon|event|southern|storm))")
_THINGS = re.compile(rf"\b(?:{'|'.join(refusal_words.THINGS)})\b")
_THINGS_AND_NAMES = re.compile(rf"\b(?:{'|'.join((*refusal_words.THINGS, *refusal_words.NAMES))})\b")

# single letters or digits with one to three other characters between them, at least three
_SPACED = re.compile(r"(?<![^\W_])[^\W_](?:[\W_]{1,3}[^\W_](?![^\W_])){2,}")
_SPLIT = set(refusal_words.SPLIT.split())
_SPLIT_STARTS = {word[:end] for word in _SPLIT for end in range(1, len(word))}
_LETTERS_ONLY = re.compile(r"[^\W\d_]+")
_CORE = {*refusal_words.COMPOUNDED.split(), *_SPLIT, *refusal_words.NUMBERS, *refusal_words.CORE.split()}
_BY_LETTERS: dict[str, list[str]] = {}
for _word in sorted(_CORE):
    _BY_LETTERS.setdefault("".join(letter for letter, _ in itertools.groupby(_word)), []).append(_word)
_BY_SHAPE = {word.replace("i", "l"): word for word in _CORE if "i" in word and not word.startswith("l")}
_IMITATED = re.compile(r"[0-9@$!|+€¡£(¥®]")
_LETTERS = str.maketrans("0123456789@$!|+€¡£(¥®", "o?zeasgtbgas??te?lcyr")


class _Pieces:
    """Splits a token that is made of listed pieces, one of which names a minor or has several letters removed."""

    def __init__(self, around: str) -> None:
        self.named = re.compile("|".join(_by_length(refusal_words.COMPOUNDED)))
        self.any = re.compile("|".join(_by_length(f"{refusal_words.COMPOUNDED} {around}")))
        self.whole = re.compile(f"(?:{self.any.pattern})+")

    def split(self, token: str) -> str:
        """The pieces with spaces between, or "" for a token that is not made of several."""
        if self.named.search(token) and self.whole.fullmatch(token):
            pieces = self.any.findall(token)
            return " ".join(pieces) if len(pieces) > 1 else ""
        return ""


def _by_length(words: str) -> list[str]:
    return sorted(words.split(), key=len, reverse=True)


_PIECES = _Pieces(refusal_words.AROUND)
_SPACED_PIECES = _Pieces(f"{refusal_words.AROUND} {refusal_words.SMALL_WORDS}")


def _ages() -> list[tuple[re.Pattern[str], int, bool]]:
    """Patterns of ages, the age from which each is an adult's, and whether it counts outside a sexual context."""
    words = "|".join(
        [
            *refusal_words.NUMBERS[::-1],
            *refusal_words.TENS,
            *filter(lambda n: n != "-", refusal_words.ROMAN),
            "hundred",
            "thousand",
        ]
    )
    number = rf"(\d(?: \d){{1,3}}|\d+|\b(?:{words})(?: (?:{words}))*)"
    both = rf"\b{number}(?: (?:to|and|or) {number})?"
    ordinal = rf"\b(\d+ (?:st|nd|rd|th)|{'|'.join(refusal_words.ORDINALS)})"
    year = r"(?:years?|yrs?|winters?|summers?)"
    unit = rf"(?:{year} ?(?:olds?|o|young|of age)|y ?(?:olds?|o)|yos?)"
    foreign = "|".join([*map(_key, refusal_words.YEARS.split()), r"jahrig\w*", f"[{refusal_words.YEARS_INSIDE}]"])
    person = r"(?= (?:years?|yrs?|yo?s?|s|old|or|and|only|person|people|models?|wom[ae]n|m[ae]n|(?:fe)?males?)\b|$| \|)"
    no_unit = r"(?! (?:k|mm|d|p|x|st|nd|rd|th|s)\b)"
    younger = r"(?:under|below|younger than|less than|not (?:yet|even)|sub|almost|nearly|barely)(?: (?:the )?age of)?"
    parts = [
        (rf"{both}(?: and a half| half| ish)? {unit}\b(?! yos?\b)", 18, True),
        (rf"\b(?:she|he|they|girl|who)(?: s| is| are| was|re)? (?:only |just |about )?{number}$", 18, True),
        (rf"{both} (?:{foreign})", 18, True),
        (rf"{both} {year}$", 18, True),
        (rf"\b(?:aged?|ages) (?:of |between |about |around |only |just |at |is )?{both}\b{no_unit}", 18, True),
        (rf"\b{younger} {number}\b{person}", 19, True),
        (rf"\b{younger} (1[2-8]|eighteen|sixteen)\b(?! (?:{refusal_words.UNITS})\b)", 19, True),
        (rf"\bnot {number} yet\b", 19, True),
        (rf"\bin (?:her|his|their) {ordinal} year\b", 19, True),
        (rf"\bu (1[2-9])\b{person}", 19, True),
        (rf"\bturn(?:ing|ed|s) {number}\b{person}", 18, True),
        (rf"{ordinal} (?:birthday|bday)(?! (?:cakes?|cards?|balloons?|candles?))", 19, True),
        (rf"{ordinal} grad(?:ers?|e (?:students?|pupils?|class))\b", 13, True),
        (rf"\bin (?:the )?{ordinal} grade\b", 13, True),
        (rf"{both} {year}\b", 18, False),
        (rf"\b(?:looks?|looking|appears?) (?:like )?(?:an? )?{number}\b{no_unit}", 18, False),
    ]
    return [(re.compile(pattern), least, anywhere) for pattern, least, anywhere in parts]


_AGES = _ages()
_SAYS_AGE = re.compile(  # a quick look; most texts say none
    r"\by|[^\x00-\x7f]|year|yr|yo|winter|summer|age|under|below|than|not |sub|almost|nearly|barely|\bu \d|turn|day|grad"
    r"|look|appear|she |he |they |who |month|week|jahr|\b(?:anos?|ans|anni|jaar|yas|tahun|tuoi|vuot|eves)"
)
_AGED_THING = re.compile(rf" (?:\w+ )?(?:{refusal_words.AGED_THINGS}|{refusal_words.ANIMALS})\b")
_OTHER_AGES = re.compile(
    r"\b\w+ (?:months?|weeks?|days?) old\b"
    rf"|\b(?:{'|'.join(refusal_words.RUSSIAN)})летн\w*"
    rf"|\b(?:{'|'.join(refusal_words.GERMAN)})jahrig\w*"
    rf"|(?<![二三四五六七八九])(?:十[一二三四五六七]?|(?<!十)[一二三四五六七八九])[{refusal_words.YEARS_INSIDE}]"
)
