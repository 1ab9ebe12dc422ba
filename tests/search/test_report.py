"""The report says what was found, marks the baselines, and needs nothing outside itself."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from autoeff.search.job import JobSpec
from autoeff.search.report import picture_of, verdict, write_report
from autoeff.search.storage.records import Counts, Job, JobState
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Decision, SearchSpace

WEIGHTS = 4096
BLOCKS = 4
LEVELS = (16, 8, 4, 3, 2)
COST = "linear_bytes"


def bits(block: int, site: str, parent: int | None) -> Decision:
    costs = tuple({"linear_bytes": (level - 16) * WEIGHTS // 8} if level < 16 else {} for level in LEVELS)
    return Decision(f"model.layers.{block}.{site}", "bits", block, LEVELS, {(): costs} if parent is None else {(0,): costs}, parent)


def space() -> SearchSpace:
    decisions: list[Decision] = []
    for block in range(BLOCKS):
        skipped: tuple[Mapping[str, int], ...] = ({}, {"linear_bytes": -4 * WEIGHTS})
        skip = len(decisions)
        decisions.append(Decision(f"model.layers.{block}.self_attn", "skip", block, ("keep", "skip"), {(): skipped}, None, (0, None)))
        decisions += [bits(block, site, skip) for site in ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj")]
        decisions.append(bits(block, "mlp.down_proj", None))
    linear = 3 * BLOCKS * WEIGHTS
    dense = {"linear_bytes": 2 * linear, "linear_parameters": linear, "other_bytes": 9000, "lookup_bytes": 100}
    return SearchSpace(tuple(decisions), dense | {"kv_bytes_per_token": 64, "flops_per_token": 2 * linear})


class Sample:
    """A finished search over `space()` in the form in which it is stored."""

    def __init__(self, quality: str = "kl", limits: tuple[str, ...] = ("linear_bytes<=0.30x",)) -> None:
        self.space, self.quality = space(), quality
        self.costs = CostModel(self.space, batch=1, context=64)
        self.rows: list[dict[str, Any]] = []
        self.end: list[dict[str, Any]] = []
        spec = JobSpec.parse({"model": "demo", "knobs": ["bits", "skip"], "limits": limits, "objectives": ["quality", COST]})
        rng = random.Random(1)
        n = len(self.space.decisions)
        self.add((0,) * n, 0.0, "dense", role="dense")
        for i, level in enumerate(LEVELS[1:], start=1):
            self.add(tuple(i if d.knob == "bits" else 0 for d in self.space.decisions), 0.001 * 6**i, "uniform", f"bits={level}", "uniform")
        for _ in range(80):
            self.add(self.space.sample(rng), 10 ** rng.uniform(-1.5, 1), rng.choice(["random", "table", "searched"]))
        self.add((*(3 if d.knob == "bits" else 0 for d in self.space.decisions[:-1]), 2), 0.15, "additive", None, "additive")
        self.add(self.space.sample(rng), 1.9, "random", "best of 32", "random")
        found = [3 if d.knob == "bits" else 0 for d in self.space.decisions]
        found[0], found[3] = 1, 2
        self.found = self.add(tuple(found), 0.11, "searched", None, "found", "linear_bytes<=0.30x")
        self.fail("oom_host", "out of memory: <script>alert(1)</script>")
        self.summary: dict[str, Any] = {
            "quality": quality,
            "limits": list(limits),
            "state": "feasible",
            "rows": self.end,
            "front": [row["trial"] for row in self.rows[1:5]] + [self.found],
            "found": self.found,
            "closest": None,
            "completions": {"prompt": "def f(x):", "dense": " return x", "uniform": " x x x", "found": " return <x>"},
            "table": {
                "form": "cheap",
                "damage": {d.key: {str(d.levels[-1]): 0.01 * (i + 1)} for i, d in enumerate(self.space.decisions)},
            },
            "additivity": {"spearman": 0.93, "n": 40},
            "seconds": 61.2,
            "evaluations": 299.5,
            "notices": ["text of another version: 1.2 <2.0>"],
        }
        preflight = {
            "model": {
                "path": "/models/demo",
                "model_type": "llama",
                "task": "decoder",
                "digest": "ab" * 32,
                "parameters": 3_000_000,
                "blocks": BLOCKS,
                "context": 64,
            },
            "text": {"search": {"digest": "cd" * 32, "source": "package:x", "windows": 16, "length": 64, "tokens": 1024}},
            "quality": quality,
            "decisions": n,
            "configurations": str(self.space.size),
            "memory_bytes": 10**7,
            "hardware": "cpu x1",
            "notices": [],
        }
        now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        self.job = Job(
            "0123456789ab",
            JobState.SUCCEEDED,
            spec.model_dump(mode="json"),
            preflight,
            self.space.to_json(),
            "ef" * 32,
            None,
            now,
            now,
            None,
            Counts(len(self.rows), len(self.rows) - 1, 1, 0, 299.5),
        )

    def add(
        self,
        indices: tuple[int, ...],
        value: float,
        origin: str,
        label: str | None = None,
        role: str | None = None,
        point: str | None = None,
    ) -> int:
        number, configuration, costs = len(self.rows), self.space.at(indices), self.costs.values(indices)
        measured = {name: {"value": cost, "unit": "bytes"} for name, cost in costs.items()}
        measured[self.quality] = {"value": value, "unit": "nats/token", "split": "search", "tokens": 1024}
        row = {
            "trial": number,
            "digest": configuration.digest,
            "origin": origin,
            "state": "succeeded",
            "configuration": dict(configuration.levels),
            "measurements": measured,
        }
        self.rows.append(row)
        rank = 0.87 - value / 10 if self.quality == "damage_cosine" else None
        if rank:
            measured["spearman_held_out"] = {"value": rank, "unit": "rank correlation", "split": "held_out", "tokens": 100}
        if role:
            perplexity = None if rank else 8 + value
            self.end.append(
                {
                    "role": role,
                    "label": label or role,
                    "trial": number,
                    "point": point,
                    "feasible": True,
                    "costs": costs,
                    "search": value,
                    "held_out": value * 1.05,
                    "perplexity_held_out": perplexity,
                    "spearman_held_out": rank,
                }
            )
        return number

    def fail(self, kind: str, message: str) -> None:
        row = dict(self.rows[-1], trial=len(self.rows), state="failed", failure={"class": kind, "message": message})
        row["measurements"] = {name: value for name, value in row["measurements"].items() if name != self.quality}
        self.rows.append(row)

    def write(self, folder: Path) -> str:
        write_report(folder, self.job, self.rows, self.summary)
        return (folder / "report.html").read_text()


class Links(HTMLParser):
    """Collects whatever a browser would fetch, and checks that tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        wanted = {"src", "href", "xlink:href", "action", "data"}
        self.fetched += [value for name, value in attrs if name in wanted and value and not value.startswith(("#", "data:"))]
        if tag not in ("meta", "br", "link", "use", "path", "image", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "br", "link", "use", "path", "image", "img"):
            assert self.open.pop() == tag


def page_text(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page.partition("</style>")[2]).split())


def test_page_fetches_nothing_and_is_well_formed(tmp_path: Path) -> None:
    page = Sample().write(tmp_path)
    links = Links()
    links.feed(page)
    assert links.fetched == []
    assert links.open == []
    assert "@import" not in page
    assert "url(http" not in page
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["front.png", "report.html"]


def test_page_states_the_result_against_uniform(tmp_path: Path) -> None:
    text = page_text(Sample().write(tmp_path))
    assert "demo within linear_bytes&lt;=0.30x" in text
    assert "49% less kl than uniform bits=3" in text
    for part in ("first additive optimum", "best of 32", "additivity near the best", "llama, 4 blocks"):
        assert part in text


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    page = Sample().write(tmp_path)
    assert "<script>" not in page
    assert "return <x>" not in page
    assert "out of memory: &lt;script&gt;" in page


def test_found_levels_stand_in_their_cells_and_void_decisions_are_dashes(tmp_path: Path) -> None:
    page = Sample().write(tmp_path)
    levels = page[page.index('class="map levels"') :]
    cells = dict(re.findall(r'title="([^"]+)">([^<]+)</td>', levels[: levels.index("</table>")]))
    assert cells["model.layers.0.self_attn:skip"] == "skip"
    assert cells["model.layers.0.self_attn.o_proj:bits"] == "\N{EN DASH}"
    assert cells["model.layers.0.mlp.down_proj:bits"] == "4"
    assert cells["model.layers.3.mlp.down_proj:bits"] == "3"
    assert len(cells) == len(space().decisions)


def test_encoder_report_ranks_pairs(tmp_path: Path) -> None:
    text = page_text(Sample("damage_cosine").write(tmp_path))
    assert "Spearman held out" in text
    assert "Spearman, held out" in text
    assert "perplexity" not in text


def test_an_infeasible_search_says_so(tmp_path: Path) -> None:
    sample = Sample()
    sample.summary |= {"state": "infeasible", "found": None, "closest": 2, "rows": sample.end[:-1]}
    text = page_text(sample.write(tmp_path))
    assert "No feasible configuration was found; the closest is trial 2." in text
    assert "Where the levels went: trial 2" in text


def test_a_search_without_text_or_table_still_reports(tmp_path: Path) -> None:
    sample = Sample(limits=())
    sample.summary |= {"completions": None, "additivity": None, "table": {"form": "cheap", "damage": {}}, "notices": []}
    text = page_text(sample.write(tmp_path))
    assert "The same prompt" not in text
    assert "What each level costs" not in text


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample()
    first = sample.write(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    sample.summary["seconds"] = 1.0
    with pytest.raises(OSError, match="No space"):
        sample.write(tmp_path)
    assert (tmp_path / "report.html").read_text() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["front.png", "report.html"]


def test_equal_results_give_equal_reports(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    pages = [Sample().write(tmp_path / name).replace(str(tmp_path / name), "DIR") for name in "ab"]
    assert pages[0] == pages[1]


def test_only_trials_on_the_whole_text_are_drawn() -> None:
    sample = Sample()
    drawn = picture_of(sample.job, sample.rows, sample.summary)
    found = next(row for row in sample.rows if row["trial"] == sample.found)
    found["measurements"]["kl"]["tokens"] = 512
    without = picture_of(sample.job, sample.rows, sample.summary)
    assert sum(map(len, without.points.values())) == sum(map(len, drawn.points.values())) - 1
    assert len(without.front) == len(drawn.front) - 1
    assert without.guests == drawn.guests


def test_a_limit_is_drawn_on_whichever_axis_it_binds() -> None:
    sample = Sample(limits=("linear_bytes<=0.30x", "avg_bits<=6", "flops_per_token<=0.9x"))
    dense = sample.costs.dense(COST)
    assert picture_of(sample.job, sample.rows, sample.summary).limit == pytest.approx(0.3 * float(dense))
    over_weights = replace(sample.job, spec=dict(sample.job.spec) | {"objectives": ["kl", "weight_bytes"]})
    assert picture_of(over_weights, sample.rows, sample.summary).limit == pytest.approx(0.3 * float(dense) + 9000)
    over_flops = replace(sample.job, spec=dict(sample.job.spec) | {"objectives": ["kl", "flops_per_token"]})
    assert picture_of(over_flops, sample.rows, sample.summary).limit == pytest.approx(0.9 * float(sample.costs.dense("flops_per_token")))


@pytest.mark.parametrize(
    ("cost", "value", "words"),
    [
        (300, 0.108, "50% less kl than uniform bits=3 at the same linear_bytes"),
        (240, 0.108, "50% less kl than uniform bits=3 at 20.0% less linear_bytes"),
        (400, 0.108, "50% less kl than uniform bits=3, the best that costs no more"),
        (900, 0.001, "90% less kl than uniform bits=8, the best that costs no more"),
        (300, 0.216, "nothing was found that beats uniform bits=3"),
        (400, 0.300, "nothing was found that beats uniform bits=3"),
        (100, 9.000, "every uniform level costs more"),
    ],
)
def test_verdict_compares_with_uniform_at_no_less_or_no_more_cost(cost: int, value: float, words: str) -> None:
    uniform = [end_row("bits=8", 1, 800, 0.01), end_row("bits=3", 3, 300, 0.216), end_row("bits=2", 4, 200, 5.0)]
    sentence = verdict(end_row("", 9, cost, value), {"quality": "kl", "rows": uniform}, COST)
    assert sentence == f"trial 9: kl {value:#.4g} at linear_bytes {cost} B; {words}"


@pytest.mark.parametrize(
    ("dense", "words"),
    [
        (0.96, "it tells 25% of the passkeys, the dense model 96%"),
        (0.04, "the dense model tells 4% of the passkeys, too few to judge a cache by"),
    ],
)
def test_verdict_says_what_a_cache_does_to_passkeys(dense: float, words: str) -> None:
    rows = [end_row("", 0, 1000, 0.0) | {"role": "dense", "passkey_accuracy": dense}]
    sentence = verdict(end_row("", 9, 300, 0.1) | {"passkey_accuracy": 0.25}, {"quality": "kl", "rows": rows}, COST)
    assert sentence == f"trial 9: kl 0.1000 at linear_bytes 300 B; every uniform level costs more; {words}"


def end_row(label: str, trial: int, cost: int, value: float) -> dict[str, Any]:
    return {"role": "uniform", "label": label, "trial": trial, "feasible": True, "costs": {COST: cost}, "search": value}
