"""The contract, tried with generated requests: no server error, no answer that it does not describe, nothing accepted that it forbids.

What the schema allows may still be refused: whether a model is there, or a limit can be reached, no schema says.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from autoeff.api.app import openapi_document

CASES = 6
LONG = 250
"""Of each of about 25 operations: more than 5,000 together."""


CONTRACT = schemathesis.openapi.from_dict(openapi_document())


@dataclass(frozen=True)
class Asked:
    """Where requests go, and as whom."""

    base_url: str
    headers: dict[str, str]


@pytest.fixture(scope="module")
def asked(served: Any, live: str) -> Asked:
    """Somebody who owns a finished job; where a request names a job, it is that one."""
    CONTRACT.config.update(parameters={"job_id": served.job}, request_timeout=60)
    served.app.state.context.backroom.start(os.getpid)
    return Asked(live, {"Authorization": f"Bearer {served.keys['alice']}"})


excluded = [positive_data_acceptance]
quick = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@CONTRACT.parametrize()
@quick
def test_every_answer_is_in_the_contract(case: schemathesis.Case, asked: Asked) -> None:
    case.call_and_validate(asked.base_url, headers=asked.headers, excluded_checks=excluded)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@CONTRACT.parametrize()
@settings(quick, max_examples=LONG, derandomize=False)
def test_every_answer_is_in_the_contract_at_length(case: schemathesis.Case, asked: Asked) -> None:
    case.call_and_validate(asked.base_url, headers=asked.headers, excluded_checks=excluded)
