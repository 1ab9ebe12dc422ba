"""What the hub's refusals mean, in one line each with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from autoeff.errors import InputError

__all__ = ["refused_by_hub"]

_FOLDER = {"model": "", "dataset": "datasets/"}


def refused_by_hub(kind: Literal["model", "dataset"], name: str, error: BaseException) -> InputError:
    """The error to raise where the hub's client raised `error` over the repository `name`.

    The client wraps what happened in what it tried next (its cache), so the whole chain of causes is looked at.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    what = f"{kind} {name!r}"
    chain = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        return InputError(f"{what} is not at hand and HF_HUB_OFFLINE forbids asking the hub; unset it, or give a local {_LOCAL[kind]}")
    if any(isinstance(cause, GatedRepoError) for cause in chain):
        where = f"{constants.ENDPOINT}/{_FOLDER[kind]}{name}"
        return InputError(f"{what} is gated: accept its terms at {where}, then set HF_TOKEN or run `hf auth login`")
    if any(isinstance(cause, RepositoryNotFoundError) for cause in chain):
        return InputError(f"{what} is not on the hub, or it is private: check the name, or set HF_TOKEN to a token that may read it")
    answer = next((cause.response for cause in chain if isinstance(cause, HfHubHTTPError) and cause.response is not None), None)
    if answer is not None and answer.status_code in (401, 403):
        return InputError(f"the hub refuses {what} ({answer.status_code}): set HF_TOKEN to a token that may read it")
    if answer is not None:
        return InputError(
            f"the hub fails over {what} ({answer.status_code} {answer.reason_phrase}); try again, or give a local {_LOCAL[kind]}"
        )
    reason = (str(chain[-1]).strip() or type(chain[-1]).__name__).splitlines()[0][:160]
    return InputError(f"{what} is not at hand and {constants.ENDPOINT} cannot be reached ({reason}); give a local {_LOCAL[kind]}")


_LOCAL = {"model": "directory", "dataset": "file"}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, until the client of HTTP, whose own causes say less."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        yield error
        error = None if isinstance(error, HfHubHTTPError) else error.__cause__ or error.__context__
