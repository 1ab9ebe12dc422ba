"""The engine as the processes of the back room share it: they are forked from one that has imported this."""

from __future__ import annotations

from autoeff.evaluators.fork_server import load

load("autoeff.search.submission")
