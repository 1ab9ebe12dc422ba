"""The engine as the processes of the back room share it: they are forked from one that has imported this."""

from __future__ import annotations

import gc
import importlib

gc.disable()  # all of it stays, and looking through it for garbage takes a fifth of the time
importlib.import_module("autoeff.search.submission")
gc.freeze()
gc.enable()
