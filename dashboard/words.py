"""Values and other people's text for pages.

Names of models, keys, workers and the like are whatever somebody typed. Where a page takes plain text they go through `plain`, where it
takes Markdown through `markdown`, and where a chart takes its own markup through `chart`.
"""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime
from html import escape

from autoeff.errors import AutoeffError, Forbidden, Unavailable
from autoeff.spaces.measurements import described

__all__ = [
    "NOTHING",
    "STATES",
    "age",
    "axis",
    "chart",
    "duration",
    "figure",
    "file_bytes",
    "markdown",
    "moment",
    "plain",
    "sentence",
    "short_model",
    "titled",
    "unit_of",
]

STATES = {
    "pending": ":material/schedule:",
    "running": ":material/play_circle:",
    "paused": ":material/pause_circle:",
    "cancelling": ":material/hourglass_bottom:",
    "succeeded": ":material/check_circle:",
    "failed": ":material/error:",
    "cancelled": ":material/cancel:",
}
"""States of a job and their signs."""
NOTHING = "\N{EN DASH}"
_CUT = 160
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_SIGNS = re.compile(r"(?<!\S)(?:<->|<-|->|--|>=|<=|~=)(?!\S)")
_WORD_JOINER = "\u2060"
_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def plain(text: object, most: int = _CUT) -> str:
    """One line of at most `most` characters in which nothing is invisible: control characters and turns of direction become signs."""
    shown = "".join(_visible(character) for character in str(text)[: most + 1])
    return shown if len(str(text)) <= most else shown[: most - 1] + "…"


def markdown(text: object, most: int = _CUT) -> str:
    """The same for places that read Markdown: it shows every character as itself.

    Names in colons would become icons even so, and arrows and dashes that stand alone signs, which an invisible character prevents.
    """
    apart = _SIGNS.sub(lambda sign: _WORD_JOINER.join(sign[0]), plain(text, most))
    return _PUNCTUATION.sub(r"\\\1", apart).replace("\\:", "\\:" + _WORD_JOINER)


def chart(text: object, most: int = _CUT) -> str:
    """The same for texts of a chart, which reads some HTML."""
    return escape(plain(text, most), quote=False)


def figure(name: str, value: float | None) -> str:
    """A value of a measurement with its unit's prefix, or a dash."""
    return NOTHING if value is None else described(name).text(value)


def axis(name: str, method: str | None = None) -> str:
    """What to write at an axis: the measurement, its unit, and how values came about where they are not exact."""
    unit = described(name).unit
    return chart(", ".join(part for part in (name, "" if unit == "bytes" else unit) if part) + (f" ({method})" if method else ""))


def titled(name: str) -> str:
    """What to write above a value of `figure`: the measurement, and its unit where that does not stand behind the value."""
    unit, words = described(name).unit, name.replace("_held_out", " held out")
    return f"{words}, {unit}" if unit and not unit.startswith(("bytes", "FLOP")) else words


def unit_of(name: str, largest: float) -> tuple[str, float]:
    """The unit in which values of a measurement up to `largest` are written, with its prefix, and how many of its own make one of it."""
    unit = described(name).unit
    word = next((short for long, short in (("bytes", "B"), ("FLOP", "FLOP")) if unit.startswith(long)), None)
    if word is None:
        return unit, 1.0
    prefix, factor = next(((prefix, factor) for prefix, factor in _PREFIXES if largest >= factor), ("", 1.0))
    return prefix + word, factor


def duration(seconds: float | None) -> str:
    """`2 h 5 min`: the two largest parts; a dash where it is not known."""
    if seconds is None:
        return NOTHING
    left = max(0.0, seconds)
    parts: list[str] = []
    for size, unit in _UNITS:
        if left >= size or (parts and unit != "s"):
            parts.append(f"{int(left // size)} {unit}")
            left %= size
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if not part.startswith("0 ")) or "0 s"


def moment(text: str) -> datetime:
    """The instant that an answer names."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def age(text: str, now: datetime) -> str:
    """How long ago: `5 min ago`."""
    seconds = (now - moment(text)).total_seconds()
    if seconds < 60:
        return "just now"
    size, unit = next((size, unit) for size, unit in _UNITS if seconds >= size)
    return f"{int(seconds // size)} {unit} ago"


def file_bytes(count: int | None) -> str:
    """The size of a file."""
    return NOTHING if count is None else described("weight_bytes").text(count)


def short_model(name: str) -> str:
    """The last parts of a model's name, which tell more than the first."""
    return plain("/".join(str(name).rstrip("/").split("/")[-2:]) or name, 60)


def sentence(told: AutoeffError | str) -> str:
    """What went wrong or is to be known, as a sentence for a page: without what only a terminal has."""
    text = plain(told, 600)
    text = text.removesuffix("; send one as `Authorization: Bearer ae_…`")
    if isinstance(told, Unavailable):
        text = text.split(" (")[0].removesuffix(";")
    elif isinstance(told, Forbidden):
        text = text.replace("there is no key", "no key was given")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?", "…")) else ".")


def _visible(character: str) -> str:
    if character in "\n\t":
        return " "
    if character < " ":
        return chr(0x2400 + ord(character))
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") else character
