"""`autoeff.Client`: the REST API of a server, typed.

    with autoeff.Client("http://127.0.0.1:8423", key) as client:
        job = client.submit({"model": "demo", "limits": ["avg_bits<=3.5"]})
        for event in client.events(job.job):
            print(event.kind, event.body)
        print(client.pareto(job.job).best)

Answers are the models of `autoeff.api.schemas`; problems become the errors of `autoeff.errors`. What may be asked twice is asked again
when a connection breaks or the server is busy; a submission carries an `Idempotency-Key` of its own, so that it may.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential_jitter

from autoeff.api.schemas import (
    Accepted,
    Artifact,
    ArtifactPage,
    AttemptPage,
    AttemptRow,
    ComparisonRow,
    DataPage,
    Front,
    HardwarePage,
    JobDetail,
    JobPage,
    JobSummary,
    KeyMade,
    KeyPage,
    KeyRow,
    LatencyPage,
    ModelPage,
    Points,
    Preflight,
    ResolutionRow,
    TrialDetail,
    TrialPage,
    TrialRow,
)
from autoeff.errors import AutoeffError, Conflict, Forbidden, InputError, NotFound, Stale, Unavailable, UnreachableLimit
from autoeff.search.job import JobSpec

__all__ = ["Client", "JobEvent"]

_PROBLEMS: Mapping[str, type[AutoeffError]] = {
    "conflict": Conflict,
    "forbidden": Forbidden,
    "not-found": NotFound,
    "precondition-failed": Stale,
    "stale": Stale,
    "unauthorized": Forbidden,
    "unreachable-limit": UnreachableLimit,
}


class _Working(Unavailable):
    """The server is at work on the answer."""

    problem = "working"


_BUSY = frozenset({429, 502, 503, 504})
_ATTEMPTS = 6
_WAIT_S = 20.0
"""A server that asks for more patience than this gets none."""
_WORK_S = 3600.0
_EXPORT_LOOK_S = 1.0
_CHUNK = 1 << 20
_PAGE = 500

Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job.

    Attributes:
        seq: Its number; None for `end`, which is no event of the job but the end of the stream.
        kind: Such as `trial.succeeded`.
    """

    seq: int | None
    kind: str
    body: Mapping[str, Any]


class _Again(Exception):
    """The server is busy or was not reached.

    Args:
        error: What is raised when patience ends.
        after_s: How long the server asked to wait.
        working: Whether it is at work on what was asked.
    """

    def __init__(self, error: AutoeffError, after_s: float = 0.0, *, working: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.after_s, self.working = error, after_s, working


class _Patience:
    """Ends after some attempts that met nobody; a server that is at work on the answer has an hour."""

    def __init__(self, attempts: int) -> None:
        self._left, self._until = attempts, time.monotonic() + _WORK_S

    def __call__(self, state: RetryCallState) -> bool:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert isinstance(error, _Again)
        self._left -= not error.working
        return self._left <= 0 or time.monotonic() > self._until


class Client:
    """Speaks to a server. Safe to share between threads; close it, or use it in a `with`.

    Args:
        server: Such as `http://127.0.0.1:8423`.
        key: A key, `ae_…`.
        timeout_s: For one answer.
        attempts: How often it asks where nobody answers or the server is busy, for what may be asked twice.
        transport: Of httpx2, for tests.

    Raises:
        InputError: The server is no URL of http or https.
    """

    def __init__(
        self, server: str, key: str, *, timeout_s: float = 60.0, attempts: int = _ATTEMPTS, transport: httpx2.BaseTransport | None = None
    ) -> None:
        try:
            url = httpx2.URL(server)
        except (httpx2.InvalidURL, TypeError):
            url = httpx2.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise InputError(f"{server!r} is no server; write for example http://127.0.0.1:8423")
        if not key.isascii() or not key.isprintable():
            raise InputError("the key is none: it begins with ae_ and has 55 characters")
        self.server, self._attempts = str(url).rstrip("/"), attempts
        headers = {"Authorization": f"Bearer {key}", "User-Agent": "autoeff"}
        self._http = httpx2.Client(base_url=self.server, headers=headers, timeout=timeout_s, transport=transport)

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Jobs

    def submit(self, job: JobSpec | Mapping[str, Any], idempotency_key: str | None = None) -> Accepted:
        """Submits a job; one that was taken, although its answer was lost, is not taken twice.

        Raises:
            InputError: The server refuses it; the message is the one that the command would print.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._ask(Accepted, "POST", "/v1/jobs", json=_body(job), headers=headers)

    def validate(self, job: JobSpec | Mapping[str, Any]) -> Preflight:
        """What is known of a job before any weight is loaded. Raises as `submit`."""
        return self._ask(Preflight, "POST", "/v1/jobs:validate", json=_body(job))

    def jobs(self, states: Sequence[str] = ()) -> Iterator[JobSummary]:
        """The jobs of the key's owner, the newest first, of these states where any are named."""
        for page in self._pages(JobPage, "/v1/jobs", {"state": list(states)}):
            yield from page.items

    def job_page(self, states: Sequence[str] = (), *, limit: int = 100, cursor: str | None = None) -> JobPage:
        """One page of `jobs`; its `next` is the cursor of the following one."""
        return self._page(JobPage, "/v1/jobs", {"state": list(states)}, limit, cursor)

    def job(self, job_id: str, known: JobDetail | None = None) -> JobDetail:
        """A job; `known` itself where nothing has happened to it since that was seen, which costs both sides little.

        Raises:
            NotFound: There is none of this id, or it is somebody else's.
        """
        headers = {} if known is None else {"If-None-Match": _etag(known)}
        answer = self._send("GET", f"/v1/jobs/{_part(job_id)}", headers=headers)
        return known if known is not None and answer.status_code == 304 else self._read(JobDetail, answer)

    def space(self, job_id: str) -> dict[str, Any]:
        """What a job searches, as `autoeff.spaces.space.SearchSpace.from_json` takes it."""
        answer: dict[str, Any] = self._send("GET", f"/v1/jobs/{_part(job_id)}/space").json()
        return answer

    def change_budget(self, job: JobDetail, *, trials: int | None = None, seconds: float | None = None) -> JobDetail:
        """Changes the budget of a job as it was seen.

        Raises:
            Stale: It has changed since.
            Conflict: It has ended.
        """
        body = {name: value for name, value in (("trials", trials), ("seconds", seconds)) if value is not None}
        headers = {"If-Match": _etag(job)}
        return self._ask(JobDetail, "PATCH", f"/v1/jobs/{_part(job.job)}", json=body, headers=headers, again=False)

    def cancel(self, job_id: str) -> JobDetail:
        """Ends a job; Conflict where it has ended otherwise."""
        return self._ask(JobDetail, "POST", f"/v1/jobs/{_part(job_id)}/cancel")

    def pause(self, job_id: str, *, at_once: bool = False) -> JobDetail:
        """Stops proposing; what runs is finished, or with `at_once` given back. Conflict where the job has ended."""
        return self._ask(JobDetail, "POST", f"/v1/jobs/{_part(job_id)}/pause", params={"mode": "now" if at_once else "finish"})

    def resume(self, job_id: str) -> JobDetail:
        """Has a paused or failed job go on. Conflict where it has ended otherwise."""
        return self._ask(JobDetail, "POST", f"/v1/jobs/{_part(job_id)}/resume")

    def retry_failed(self, job_id: str, classes: Sequence[str] = ()) -> JobDetail:
        """Has the failed trials of a job tried again, of these classes of failure where any are named, and the job go on.

        Raises:
            Conflict: It has ended; submitted again, what was measured counts there too.
        """
        return self._ask(JobDetail, "POST", f"/v1/jobs/{_part(job_id)}/retry-failed", params={"class": list(classes)})

    def events(self, job_id: str, after: int = 0) -> Iterator[JobEvent]:
        """What happens to a job, from the event after `after` on, until it has ended; the last one is `end`.

        A stream that breaks is taken up where it was.
        """
        broken = 0
        while True:
            try:
                for event in self._stream(job_id, after):
                    broken = 0
                    after = after if event.seq is None else event.seq
                    yield event
                    if event.kind == "end":
                        return
            except _Again as again:
                broken += 1
                if broken >= self._attempts:
                    raise again.error from None
                time.sleep(max(again.after_s, min(2.0**broken / 4, _WAIT_S)))

    # Results

    def trials(self, job_id: str, states: Sequence[str] = (), origin: str | None = None) -> Iterator[TrialRow]:
        """The trials of a job by number."""
        query = {"state": list(states), "origin": [] if origin is None else [origin]}
        for page in self._pages(TrialPage, f"/v1/jobs/{_part(job_id)}/trials", query):
            yield from page.items

    def trial_page(
        self, job_id: str, states: Sequence[str] = (), origin: str | None = None, *, limit: int = 100, cursor: str | None = None
    ) -> TrialPage:
        """One page of `trials`; its `next` is the cursor of the following one."""
        query = {"state": list(states), "origin": [] if origin is None else [origin]}
        return self._page(TrialPage, f"/v1/jobs/{_part(job_id)}/trials", query, limit, cursor)

    def trial(self, job_id: str, number: int) -> TrialDetail:
        """One trial, with its attempts and their logs."""
        return self._ask(TrialDetail, "GET", f"/v1/jobs/{_part(job_id)}/trials/{number}")

    def attempts(self, job_id: str, number: int) -> list[AttemptRow]:
        """Every try at a trial, the first one first, with the end of what it printed."""
        return self._ask(AttemptPage, "GET", f"/v1/jobs/{_part(job_id)}/trials/{number}/attempts").items

    def pareto(self, job_id: str) -> Front:
        """The front of a job and its best trial."""
        return self._ask(Front, "GET", f"/v1/jobs/{_part(job_id)}/pareto")

    def points(self, job_id: str, x: str | None = None, y: str | None = None, most: int = 2000) -> Points:
        """At most `most` trials as points of a picture; front and baselines are whole.

        Args:
            job_id: The job.
            x: Name of a measurement, or `trial` for the number; None for the cost that the job is judged at.
            y: As `x`; None for its quality.
            most: How many points.
        """
        query = {name: value for name, value in (("x", x), ("y", y)) if value is not None}
        return self._ask(Points, "GET", f"/v1/jobs/{_part(job_id)}/points", params={**query, "max": str(most)})

    def result(self, job_id: str) -> dict[str, Any]:
        """The end table of a finished search and what else its report shows.

        Raises:
            NotFound: There is none yet.
        """
        answer: dict[str, Any] = self._send("GET", f"/v1/jobs/{_part(job_id)}/result").json()
        return answer

    def resolve(self, job_id: str, limits: Sequence[str], *, measure: bool = False) -> ResolutionRow:
        """The best configuration for a new budget, from what was measured.

        With `measure`, workers measure proposals first, which become trials of the job; that is waited for up to an hour, and asked again
        it goes on. Conflict where the job was begun without a server.
        """
        body = {"limits": list(limits), "measure": measure}
        return self._ask(ResolutionRow, "POST", f"/v1/jobs/{_part(job_id)}/resolve", json=body)

    def compare(self, jobs: Sequence[str]) -> ComparisonRow:
        """Jobs that searched the same, side by side.

        Raises:
            InputError: They did not; the message says in what they differ.
            NotFound: There is no such job, or it is somebody else's.
        """
        return self._ask(ComparisonRow, "GET", "/v1/jobs:compare", params={"job": list(jobs)})

    # Files

    def artifacts(self, job_id: str) -> list[Artifact]:
        """The files that a job left."""
        return self._ask(ArtifactPage, "GET", f"/v1/jobs/{_part(job_id)}/artifacts").items

    def download(self, artifact: Artifact, path: Path) -> None:
        """Writes a file of a job to `path`, whole or not at all.

        Raises:
            InputError: It cannot be written there.
            AutoeffError: What came is not what the server has.
        """
        digest = hashlib.sha256()
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with self._http.stream("GET", artifact.href) as answer, partial.open("wb") as file:
                if answer.status_code != 200:
                    answer.read()
                    raise _problem(answer)
                for chunk in answer.iter_bytes(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
            if artifact.sha256 not in (None, digest.hexdigest()):
                raise AutoeffError(f"{artifact.name} arrived damaged; fetch it again")
            partial.replace(path)
        except httpx2.TransportError as error:
            raise self._unreached(error) from None
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None
        finally:
            partial.unlink(missing_ok=True)

    def begin_export(self, job_id: str, number: int, format_name: str = "hf-dense") -> Artifact:
        """Has a trial written out and checked by the server; it is one of the job's `artifacts`, and `ready` or `failed` in the end."""
        return self._ask(Artifact, "POST", f"/v1/jobs/{_part(job_id)}/trials/{number}/export", json={"format": format_name})

    def export(self, job_id: str, number: int, folder: Path, format_name: str = "hf-dense") -> Artifact:
        """Has a trial written out and checked by the server, and unpacks it into `folder`, which must not exist.

        Raises:
            InputError: The folder exists or cannot be made, or the server refuses.
            AutoeffError: The server could not write it.
        """
        if folder.exists():
            raise InputError(f"{folder} exists already; name a folder that does not")
        artifact = self.begin_export(job_id, number, format_name)
        while artifact.state == "building":
            time.sleep(_EXPORT_LOOK_S)
            found = next((one for one in self.artifacts(job_id) if one.name == artifact.name), None)
            if found is None:
                raise AutoeffError(f"the server lost {artifact.name}, as one that was started again meanwhile does; export it again")
            artifact = found
        if artifact.state == "failed":
            raise AutoeffError(artifact.failure or f"{artifact.name} could not be written")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
                archive = Path(place) / artifact.name
                self.download(artifact, archive)
                with tarfile.open(archive) as tar:
                    tar.extractall(place, filter="data")
                (Path(place) / artifact.name.removesuffix(".tar")).rename(folder)
        except (OSError, tarfile.TarError) as error:
            raise InputError(f"cannot write to {folder}: {error}") from None
        return artifact

    # The plant

    def models(self) -> ModelPage:
        """Models that a job may name."""
        return self._ask(ModelPage, "GET", "/v1/models")

    def datasets(self) -> DataPage:
        """Texts that a job may name."""
        return self._ask(DataPage, "GET", "/v1/datasets")

    def hardware(self) -> HardwarePage:
        """Workers."""
        return self._ask(HardwarePage, "GET", "/v1/hardware")

    def kernel_latencies(self, operation: str = "", limit: int = 500) -> LatencyPage:
        """Measured operations, all or those of one name, by device."""
        return self._ask(LatencyPage, "GET", "/v1/kernel-latencies", params={"operation": operation, "limit": str(limit)})

    def contract(self) -> dict[str, Any]:
        """The server's OpenAPI document."""
        answer: dict[str, Any] = self._send("GET", "/openapi.json").json()
        return answer

    def own_key(self) -> KeyRow:
        """The key of this client: whose it is, and what it may do."""
        return self._ask(KeyRow, "GET", "/v1/keys/self")

    def keys(self) -> list[KeyRow]:
        """Every key, for admins."""
        return self._ask(KeyPage, "GET", "/v1/keys").items

    def make_key(self, name: str, owner: str, scopes: Sequence[str], expires_in_days: int | None = None) -> KeyMade:
        """Makes a key, for admins; its text is in this answer alone."""
        body = {"name": name, "owner": owner, "scopes": list(scopes), "expires_in_days": expires_in_days}
        return self._ask(KeyMade, "POST", "/v1/keys", json=body, again=False)

    def revoke_key(self, prefix: str) -> KeyRow:
        """Ends a key, for admins."""
        return self._ask(KeyRow, "DELETE", f"/v1/keys/{_part(prefix)}")

    # Asking

    def _pages(self, model: type[Answer], path: str, query: Mapping[str, list[str]]) -> Iterator[Answer]:
        cursor: str | None = None
        while True:
            page = self._page(model, path, query, _PAGE, cursor)
            yield page
            cursor = getattr(page, "next", None)
            if cursor is None:
                return

    def _page(self, model: type[Answer], path: str, query: Mapping[str, list[str]], limit: int, cursor: str | None) -> Answer:
        following = {} if cursor is None else {"cursor": cursor}
        return self._ask(model, "GET", path, params={**query, "limit": str(limit), **following})

    def _ask(self, model: type[Answer], method: str, path: str, *, again: bool = True, **options: Any) -> Answer:
        return self._read(model, self._send(method, path, again=again, **options))

    def _read(self, model: type[Answer], answer: httpx2.Response) -> Answer:
        try:
            return model.model_validate_json(answer.content)
        except ValidationError:
            raise AutoeffError(
                f"what the server at {self.server} answers is of another version; run the same version of autoeff on both sides"
            ) from None

    def _send(self, method: str, path: str, *, again: bool = True, **options: Any) -> httpx2.Response:
        retrying = Retrying(retry=retry_if_exception_type(_Again), stop=_Patience(self._attempts if again else 1), wait=_wait, reraise=True)
        try:
            return retrying(self._send_once, method, path, **options)
        except _Again as busy:
            raise busy.error from None

    def _send_once(self, method: str, path: str, **options: Any) -> httpx2.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx2.TransportError as error:
            raise _Again(self._unreached(error)) from None
        if answer.is_success or answer.status_code == 304:
            return answer
        refusal, wait = _problem(answer), _retry_after(answer)
        if answer.status_code in _BUSY and wait <= _WAIT_S:
            raise _Again(refusal, wait, working=getattr(refusal, "problem", "") == _Working.problem)
        raise refusal

    def _stream(self, job_id: str, after: int) -> Iterator[JobEvent]:
        timeout = httpx2.Timeout(10.0, read=45.0)  # the server sends a sign of life every 15 s
        headers = {"Last-Event-ID": str(after)}
        try:
            with self._http.sse(f"/v1/jobs/{_part(job_id)}/events", headers=headers, timeout=timeout) as source:
                if not source.response.is_success:
                    source.response.read()
                    refusal = _problem(source.response)
                    raise _Again(refusal, _retry_after(source.response)) if source.response.status_code in _BUSY else refusal
                for event in source:
                    yield JobEvent(int(event.id) if event.event != "end" else None, event.event, json.loads(event.data))
        except httpx2.TransportError as error:
            raise _Again(self._unreached(error)) from None
        raise _Again(Unavailable(f"the server at {self.server} ended the stream of events"))

    def _unreached(self, error: Exception) -> Unavailable:
        return Unavailable(f"cannot reach the server at {self.server} ({error or type(error).__name__}); is `autoeff serve` running there?")


def _wait(state: RetryCallState) -> float:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, _Again)
    return max(error.after_s, wait_exponential_jitter(multiplier=0.2, max=5.0)(state))


def _body(job: JobSpec | Mapping[str, Any]) -> Mapping[str, Any]:
    return job.model_dump(mode="json", exclude_unset=True) if isinstance(job, JobSpec) else job


def _etag(job: JobDetail) -> str:
    return f'"{job.version}.{job.events}"'


def _part(text: str) -> str:
    """One segment of a path, whatever the text is."""
    if not text.isalnum() or len(text) > 64:
        raise NotFound(f"{text[:80]!r} is no id of this server; `autoeff ls` shows those it has")
    return text


def _retry_after(answer: httpx2.Response) -> float:
    value = answer.headers.get("retry-after", "")
    return float(value) if value.isdigit() else 0.0


def _problem(answer: httpx2.Response) -> AutoeffError:
    """The error that an answer tells of."""
    try:
        body = answer.json()
        kind, detail = str(body["type"]).rpartition(":")[2], str(body["detail"])
    except (ValueError, KeyError, TypeError):
        kind, detail = "", f"the server answered {answer.status_code} {answer.reason_phrase}"
    known = _Working if kind == _Working.problem else _PROBLEMS.get(kind)
    if known is not None:
        return known(detail)
    if answer.status_code in _BUSY:
        return Unavailable(detail)
    return InputError(detail) if answer.status_code < 500 else AutoeffError(detail)
