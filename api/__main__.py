"""`python -m autoeff.api` writes the contract, `openapi.json`, beside this file."""

from __future__ import annotations

import json
from pathlib import Path

from autoeff.api.app import openapi_document

if __name__ == "__main__":
    Path(__file__).with_name("openapi.json").write_text(json.dumps(openapi_document(), indent=1, ensure_ascii=False) + "\n")
