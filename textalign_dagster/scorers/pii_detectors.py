"""The detectors: each is a function from a text to the (start, end) of every match.

They follow scrubadub 2, which produced the published scores; tests/textalign_dagster/scorers/published_pii.json
contains its matches, and docs/scorers.md lists the differences. Every pattern is bounded (no unbounded repeat inside
a repeat), so time grows linearly with the text, whatever a model writes.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version

from stdnum import luhn
from stdnum.us import ssn

DETECTORS_VERSION = f"2+phonenumbers{version('phonenumbers')}"
"""Changed with every change to what is detected."""

Place = tuple[int, int]

_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%-]{1,64}"
    r"(?:@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}"
    # "jane at mail dot com": only top-level domains that are not words, because "at" is one.
    r"|\sat\s(?:[a-z0-9-]{1,63}(?:\.|\sdot\s)){1,8}(?:com|org|net|edu|gov|info|co|io|uk|de|fr|ca))(?![\w-])",
    re.IGNORECASE,
)
_URL = re.compile(r"(?<!\w)(?:https?://|ftp://|www\.)[^\s<>\"'`{}|\\^]{2,2000}", re.IGNORECASE)
_SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])")
_CREDENTIAL = re.compile(
    r"\b(?:(?:user(?:[ _-]?name)?|login|e-?mail)[ \t]{0,4}[:=]|u:)[ \t]{0,4}\S{1,128}[ \t]{0,4}[,;]?\s{1,4}"
    r"(?:and )?(?:(?:pass(?:word|code|phrase)?|pw|pwd)[ \t]{0,4}[:=]|p:)[ \t]{0,4}(\S{1,128})",
    re.IGNORECASE,
)
_TWITTER = re.compile(r"(?<![\w@/.])@(?!admin|twitter)(?=\w*[a-z])\w{2,15}(?![\w@]|\.\w)", re.IGNORECASE)
_SKYPE = re.compile(
    r"\bskype(?:[ _-]?(?:id|name|user(?:name)?|handle))?[ \t]{0,4}(?:[:=-]|is\b)[ \t]{0,4}([A-Za-z][\w.,:-]{4,30}\w)",
    re.IGNORECASE,
)
_STREET = (
    r"Avenue|Ave|Street|St|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq|Terrace|"
    r"Parkway|Pkwy|Highway|Hwy|Way|Circle|Cir"
)
_STATES = (
    "AL|AK|AZ|AR|CA|CO|CT|DE|DC|FL|GA|HI|ID|IL|IN|IA|KS|KY|LA|ME|MD|MA|MI|MN|MS|MO|MT|NE|NV|NH|NJ|NM|NY|NC|"
    "ND|OH|OK|OR|PA|RI|SC|SD|TN|TX|UT|VT|VA|WA|WV|WI|WY"
)
_ADDRESS = re.compile(
    rf"(?<![\w.-])\d{{1,6}}[A-Za-z]?,? (?:(?:N|S|E|W|NE|NW|SE|SW|North|South|East|West)\.? )?"
    rf"(?:(?:[A-Z][\w'.-]{{0,30}}|\d{{1,3}}(?:st|nd|rd|th)) ){{1,4}}(?:{_STREET})\b\.?"
    rf"(?:,? (?:Apt|Suite|Ste|Unit|Floor|#)\.? ?\w{{1,6}})?"
    rf"(?:[,\s]{{1,3}}(?:[A-Z][A-Za-z'.-]{{1,30}} ?){{1,3}},? (?:{_STATES})\b(?: \d{{5}}(?:-\d{{4}})?)?)?"
)
_MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_MONTH = rf"({_MONTHS})[a-z]{{0,6}}\.?"
_DATES = (
    (re.compile(r"(?<![\w/.-])(\d{4})-(\d{1,2})-(\d{1,2})(?![\w/-])"), "ymd"),
    (re.compile(r"(?<![\w/.-])(\d{1,2})[/.-](\d{1,2})[/.-](\d{4})(?![\w/-])"), "mdy"),
    (re.compile(rf"\b{_MONTH} (\d{{1,2}})(?:st|nd|rd|th)?,? (\d{{4}})\b", re.IGNORECASE), "mdy"),
    (re.compile(rf"\b(\d{{1,2}})(?:st|nd|rd|th)? (?:of )?{_MONTH},? (\d{{4}})\b", re.IGNORECASE), "dmy"),
    (re.compile(r"\bin (\d{4})\b(?!-)"), "y"),
)
_BIRTH = re.compile(r"\b(?:birth\w*|born|dob|d\.o\.b)\b", re.IGNORECASE)
_YOUNGEST = 2008  # the published detector computes ages as of today, so its scores change over time


def _whole(pattern: re.Pattern[str], group: int = 0) -> Callable[[str], Iterator[Place]]:
    return lambda text: (match.span(group) for match in pattern.finditer(text))


def _url(text: str) -> Iterator[Place]:
    for match in _URL.finditer(text):
        kept = match[0].rstrip(".,;:!?)]*_")
        if len(kept) > len("www."):
            yield match.start(), match.start() + len(kept)


def _phone(text: str) -> Iterator[Place]:
    """Phone numbers of the United States, and of any country if they begin with +."""
    import phonenumbers  # takes 60 ms, which commands that score nothing are spared

    return ((match.start, match.end) for match in phonenumbers.PhoneNumberMatcher(text, "US"))


def _ssn(text: str) -> Iterator[Place]:
    """Social security numbers that can have been issued."""
    return (match.span() for match in _SSN.finditer(text) if ssn.is_valid(match[0]))


def _credit_card(text: str) -> Iterator[Place]:
    """Payment card numbers (first digit 2 to 6) with a correct check digit (ISO/IEC 7812-1)."""
    for match in _CARD.finditer(text):
        digits = re.sub(r"[ -]", "", match[0])
        if digits[0] in "23456" and luhn.is_valid(digits) and len(set(digits)) > 1:
            yield match.span()


def _birth_date(text: str) -> Iterator[Place]:
    """Dates from 1900 to 2008 with a word for birth at most two lines before or one line after."""
    if not _BIRTH.search(text):
        return
    starts = [0, *(i + 1 for i, character in enumerate(text) if character == "\n")]
    near: set[int] = set()
    for match in _BIRTH.finditer(text):
        line = bisect_right(starts, match.start())
        near.update((line - 1, line, line + 1, line + 2))
    for pattern, order in _DATES:
        for match in pattern.finditer(text):
            if bisect_right(starts, match.start()) in near and _is_birth_date(match.groups(), order):
                yield match.span()


def _is_birth_date(parts: tuple[str, ...], order: str) -> bool:
    given = {"m": "1", "d": "1"} | dict(zip(order, parts, strict=True))
    month = given["m"].lower()[:3]
    numbers = {key: int(value) for key, value in given.items() if value.isdigit()}
    if not month.isdigit():
        numbers["m"] = _MONTHS.split("|").index(month) + 1
    elif numbers["m"] > 12:  # 25/12/1980
        numbers["m"], numbers["d"] = numbers["d"], numbers["m"]
    try:
        date(numbers["y"], numbers["m"], numbers["d"])
    except ValueError:
        return False
    return 1900 <= numbers["y"] <= _YOUNGEST


def _address(text: str) -> Iterator[Place]:
    # Insurance texts have "coverage" where a street name would be.
    return (match.span() for match in _ADDRESS.finditer(text) if "coverage" not in match[0].lower())


DETECTORS: dict[str, Callable[[str], Iterator[Place]]] = {
    "email": _whole(_EMAIL),
    "url": _url,
    "phone": _phone,
    "ssn": _ssn,
    "credit_card": _credit_card,
    "credential": _whole(_CREDENTIAL),
    "twitter": _whole(_TWITTER),
    "skype": _whole(_SKYPE, 1),
    "birth_date": _birth_date,
    "address": _address,
}
"""Name → detector."""
