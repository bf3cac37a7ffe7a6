"""The characters that tokenizers are compared on."""

import sys
import unicodedata

ALIKE = ("CJK UNIFIED", "HANGUL SYLLABLE", "TANGUT", "CUNEIFORM", "EGYPTIAN", "ANATOLIAN", "BAMUM", "YI SYLLABLE")
"""How the names of letters start that no tokenizer tells apart from their neighbors."""


def every_character() -> list[str]:
    """Return every character there is; of the private planes, which are alike, some."""
    codes = [i for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    return [chr(i) for i in codes if i < 0x40000 or (i >= 0xE0000 and i % 61 == 0)]


def each_kind_of_character() -> list[str]:
    """Return every character, but only some of those that are alike: a third as many."""
    return [c for c in every_character() if ord(c) % 61 == 0 or not _is_like_its_neighbors(c)]


def _is_like_its_neighbors(character: str) -> bool:
    if unicodedata.category(character) in ("Cn", "Co"):
        # below, another version of Unicode may know it as a letter or a mark: beyond are ideographs only
        return ord(character) >= 0x20000
    return unicodedata.name(character, "").startswith(ALIKE)
