"""Text as it sounds, so that spelling, spaces and signs between letters make little difference."""

from __future__ import annotations

import itertools
import re
import unicodedata

INITIALS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
FINALS = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"
PARTS = {
    "ㄲ": "ㄱㄱ", "ㄸ": "ㄷㄷ", "ㅃ": "ㅂㅂ", "ㅆ": "ㅅㅅ", "ㅉ": "ㅈㅈ", "ㄳ": "ㄱㅅ", "ㄵ": "ㄴㅈ", "ㄶ": "ㄴㅎ",
    "ㄺ": "ㄹㄱ", "ㄻ": "ㄹㅁ", "ㄼ": "ㄹㅂ", "ㄽ": "ㄹㅅ", "ㄾ": "ㄹㅌ", "ㄿ": "ㄹㅍ", "ㅀ": "ㄹㅎ", "ㅄ": "ㅂㅅ",
}  # fmt: skip
# Vowels that are often written for one another: 쥭고 for 죽고, 되요 for 돼요.
ALIKE = dict(zip("ㅐㅒㅖㅑㅕㅛㅠㅙㅚㅞㅢㅟ", "ㅔㅔㅔㅏㅓㅗㅜㅔㅔㅔㅣㅣ", strict=True))
# The Korean letter on the key of each Latin letter.
KEYS = dict(zip("qwertyuiopasdfghjklzxcvbnm", "ㅂㅈㄷㄱㅅㅛㅕㅑㅐㅔㅁㄴㅇㄹㅎㅗㅓㅏㅣㅋㅌㅊㅍㅠㅜㅡ", strict=True))
SOUNDS = "".join(dict.fromkeys("".join(PARTS.get(letter, ALIKE.get(letter, letter)) for letter in INITIALS + VOWELS)))
# Where a text begins, where a sentence ends, and any other letter; 0 stands between letters.
START, PAUSE, OTHER = b"\x01", b"\x02", b"\x03"
# NFKC turns a lone ㅈ into the first letter of a syllable (U+110C); people write it as U+3148.
LONE = {0x1100 + at: letter for at, letter in enumerate(INITIALS)}
LONE |= {0x1161 + at: letter for at, letter in enumerate(VOWELS)}


def sound(letters: str) -> bytes:
    """Return letters as one byte a sound."""
    parts = "".join(PARTS.get(letter, ALIKE.get(letter, letter)) for letter in letters)
    return bytes(16 + SOUNDS.index(part) for part in parts)


def sounds_of_syllable(number: int) -> bytes:
    """Return a syllable's sounds, by its number from 가 on; a silent ㅇ is none, so that 싶어 is 시퍼."""
    initial, rest = divmod(number, 21 * 28)
    vowel, final = divmod(rest, 28)
    return sound((INITIALS[initial].replace("ㅇ", "") + VOWELS[vowel] + FINALS[final]).rstrip())


SOUND = {chr(0xAC00 + number): sounds_of_syllable(number) for number in range(19 * 21 * 28)}
SOUND |= {letter: sound(letter) for letter in INITIALS + VOWELS + FINALS.strip()}
SOUND |= {letter: bytes([200 + at]) for at, letter in enumerate(KEYS)}
SOUND |= {" ": b"", "0": b"", "|": PAUSE}

# A word of two or more syllables typed with the keyboard switched, as the jamo of its keys: wnrrh is ㅈㅜㄱㄱㅗ.
CONSONANT, VOWEL = "[ㄱ-ㅎ]", "(?:ㅗ[ㅏㅐㅣ]|ㅜ[ㅓㅔㅣ]|ㅡㅣ|[ㅏ-ㅣ])"
TYPED = re.compile(f"({CONSONANT})({VOWEL})({CONSONANT}{{0,2}})(?={CONSONANT}{VOWEL}|$)")
TWO_JAMO = {"ㅗㅏ": "ㅘ", "ㅗㅐ": "ㅙ", "ㅗㅣ": "ㅚ", "ㅜㅓ": "ㅝ", "ㅜㅔ": "ㅞ", "ㅜㅣ": "ㅟ", "ㅡㅣ": "ㅢ"}
TWO_JAMO |= {two: one for one, two in PARTS.items() if one in FINALS}


def typed(word: re.Match[str]) -> str:
    """Return the Korean word that the keys of a Latin word write; the word itself where they write none."""
    jamo = "".join(KEYS[key] for key in word[0])
    syllables = TYPED.findall(jamo)
    if len(syllables) < 2 or "".join(itertools.chain(*syllables)) != jamo:
        return word[0]
    parts = [[TWO_JAMO.get(part, part) for part in syllable] for syllable in syllables]
    if any(final and final not in FINALS for *_, final in parts):
        return word[0]
    return "".join(
        chr(0xAC00 + (INITIALS.index(initial) * 21 + VOWELS.index(vowel)) * 28 + FINALS.index(final or " "))
        for initial, vowel, final in parts
    )


# Letters that show nothing: Hangul fillers, soft hyphens, joiners and other signs of no width.
UNSEEN = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u3164\ufe00-\ufe0f\ufeff\uffa0]+"
)
# Signs and letters of other scripts become spaces, before NFKC, which would write some (U+FDFA) as 18 letters.
UNHEARD = re.compile(
    "[^0-9A-Za-z０-９Ａ-Ｚａ-ｚ\u1100-\u11ff\u3131-\u318e가-힣\uffa1-\uffdc㉠-㉻㈀-㈜\u4e00-\u9fff.!?…。~]+"
)


def plain(message: str) -> str:
    """Return a message in simple letters, with a bar where a sentence ends."""
    seen = UNHEARD.sub(" ", UNSEEN.sub("", message))
    text = unicodedata.normalize("NFKC", seen).translate(LONE).lower()
    # Runs of full stops are shortened first, because the next pattern takes the square of their length.
    text = re.sub(r"[.!?。]+", ".", text)
    text = re.sub(r"\.(?=\s|$)|(?<=[다요죠까])\.(?=[가-힣])", "|", text)
    text = re.sub(r"[^\w|]+", " ", re.sub("[0-9]+", "0", text))
    text = re.sub(r"(\w)\1{2,}", r"\1\1", text)
    text = re.sub("[a-z]{4,}", typed, text)
    return re.sub(" *\\|[ |]*", "|", text).strip(" |")


def heard(text: str) -> list[bytes]:
    """Return the sounds of each letter of a plain text."""
    return [SOUND.get(letter, OTHER) for letter in text]
