"""The hashed list of packages is that of the lock, but for torch."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_locked_version_but_torch_has_hashes():
    locked = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.M)
    text = (ROOT / "requirements.hashes").read_text()
    hashed = re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.M)

    def plain(pairs: list[tuple[str, str]]) -> set[tuple[str, str]]:
        return {(name.lower().replace("_", "-"), version) for name, version in pairs}

    assert len(locked) > 100
    assert plain(hashed) == {pair for pair in plain(locked) if pair[0] != "torch"}
