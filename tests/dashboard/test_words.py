"""Other people's text, and values for people."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from autoeff.dashboard.words import age, axis, chart, duration, figure, markdown, plain, sentence, titled, unit_of
from autoeff.errors import Forbidden, InputError, Unavailable

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)


def test_nothing_invisible_stays_invisible() -> None:
    assert plain("a\x00b\x1b[31mc\u202ed\u200be") == "a\u2400b\u241b[31mc\ufffdd\ufffde"
    assert plain("a\nb\tc") == "a b c"
    assert plain("\u05e9\u05dc\u05d5\u05dd") == "\u05e9\u05dc\u05d5\u05dd"  # letters that run right to left are letters


def test_long_text_is_cut_and_says_so() -> None:
    assert plain("x" * 10_000, 20) == "x" * 19 + "…"
    assert plain("x" * 20, 20) == "x" * 20


@pytest.mark.parametrize("mark", ["**a**", "[a](javascript:b)", "<script>", "`a`", "$x$", "# a", "~~a~~", "![a](b)", ":red[a]", "&lt;"])
def test_markdown_shows_every_character_as_itself(mark: str) -> None:
    escaped = markdown(mark)
    assert escaped.replace("\\", "").replace("\u2060", "") == mark
    assert all(escaped[i - 1] == "\\" for i, character in enumerate(escaped) if character in "*[]()<>`$#~!&_")


def test_dashes_and_arrows_stay_what_they_are() -> None:
    for sign in ("--", "->", "<=", "~="):
        assert sign not in markdown(f"a {sign} b").replace("\\", "")
        assert markdown(f"a {sign} b").replace("\\", "").replace("\u2060", "") == f"a {sign} b"
    assert "\u2060" not in markdown("avg_bits<=3.5")  # what people copy


def test_charts_show_markup_as_text() -> None:
    assert chart("<b>x</b>&") == "&lt;b&gt;x&lt;/b&gt;&amp;"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "\u2013"), (0, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (7500, "2 h 5 min"), (90_000, "1 d 1 h")],
)
def test_durations_have_two_parts(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_ages() -> None:
    assert age("2026-01-02T11:59:30+00:00", NOW) == "just now"
    assert age("2026-01-02T09:00:00", NOW) == "3 h ago"  # of a server that names no zone, which is UTC


def test_values_and_axes_carry_units() -> None:
    assert figure("weight_bytes", 1_240_000) == "1.24 MB"
    assert figure("kl", None) == "\u2013"
    assert axis("kl") == "kl, nats/token"
    assert axis("decode_ms", "predicted") == "decode_ms, ms (predicted)"
    assert titled("kl_held_out") == "kl held out, nats/token"
    assert titled("weight_bytes") == "weight_bytes"  # `figure` writes the unit
    assert unit_of("bytes_per_token", 2.5e6) == ("MB", 1e6)
    assert unit_of("kl", 2.5e6) == ("nats/token", 1.0)
    assert axis("<b>own</b>") == "&lt;b&gt;own&lt;/b&gt;"


def test_errors_are_sentences() -> None:
    assert sentence(InputError("the limit cannot be kept")) == "The limit cannot be kept."
    assert sentence(Unavailable("cannot reach the server at http://x (refused); is it?")) == "Cannot reach the server at http://x."
    key = Forbidden("the key is unknown, expired or revoked; send one as `Authorization: Bearer ae_…`")
    assert sentence(key) == "The key is unknown, expired or revoked."
