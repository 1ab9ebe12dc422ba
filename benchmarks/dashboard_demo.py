"""Makes `dashboard/demo.db.xz`, the finished search that `autoeff dashboard --demo` shows: `python benchmarks/dashboard_demo.py`.

Names of this machine are taken out: of its folders, its processes and its processor.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "dashboard" / "demo.db.xz"
SEARCH = [
    *("search", "demo", "--knobs", "bits,skip,kv_bits", "--limit", "avg_bits<=3.5", "--limit", "kv_bytes<=0.5x"),
    *("--trials", "150", "--windows", "8", "--eval-windows", "16", "--seed", "0"),
]
MOST = 300_000
WORKER = "demo-worker"
_MODELS = re.compile(r"(/[\w.-]+)+/autoeff/models/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", type=Path, help="take this one instead of searching")
    given = parser.parse_args().database
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given is None:
            command = [sys.executable, "-m", "autoeff.cli", *SEARCH, "--out", str(folder / "run")]
            subprocess.run(command, check=True, env={**_environment(), "AUTOEFF_HOME": name})
        else:
            (folder / "autoeff.db").write_bytes(given.read_bytes())
        content = _cleaned(folder / "autoeff.db")
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    if len(packed) > MOST:
        raise SystemExit(f"{TARGET.name} would have {len(packed):,} bytes; {MOST:,} are allowed")
    TARGET.write_bytes(packed)
    print(f"{TARGET.relative_to(ROOT)}: {len(packed):,} bytes, unpacked {len(content):,}")


def _environment() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if not key.startswith("AUTOEFF_")}


def _cleaned(path: Path) -> bytes:
    """The database with nothing of this machine in it, in one file."""
    with sqlite3.connect(path) as base:
        triggers = base.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:  # they protect what has ended
            base.execute(f'DROP TRIGGER "{name}"')
        tables = [name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            columns = [row[1] for row in base.execute(f'PRAGMA table_info("{table}")')]
            for column in columns:
                rows = base.execute(f'SELECT rowid, "{column}" FROM "{table}" WHERE typeof("{column}") = \'text\'').fetchall()  # noqa: S608
                for row, text in rows:
                    if (clean := _clean(text)) != text:
                        base.execute(f'UPDATE "{table}" SET "{column}" = ? WHERE rowid = ?', (clean, row))  # noqa: S608
        for (sql,) in [(sql,) for _, sql in triggers]:
            base.execute(sql)
    base.close()
    with sqlite3.connect(path, isolation_level=None) as base:
        base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        base.execute("PRAGMA journal_mode = DELETE")
        base.execute("VACUUM")
    base.close()
    return path.read_bytes()


def _clean(text: str) -> str:
    """Paths and names of processes give way, in plain text and inside JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return _clean_text(text)
    cleaned = _clean_value(value)
    return text if cleaned == value else json.dumps(cleaned)


def _clean_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean_value(item) for item in value]
    return _clean_text(value) if isinstance(value, str) else value


def _clean_text(text: str) -> str:
    text = _MODELS.sub("", text)
    parts = text.split("/")
    looks_like_process = len(parts) >= 4 and parts[-2].isdecimal() and parts[-1].replace(".", "").isdecimal()
    return WORKER if looks_like_process else text


if __name__ == "__main__":
    main()
