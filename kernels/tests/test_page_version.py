"""Stored bytes do not change under those who keep them: not without a new version."""

import json

import golden_blocks

from turboquant_kernels.packing import PAGE_LAYOUT_VERSION


def test_stored_bytes_change_with_the_version_of_the_layout_alone():
    """After a change that is meant: raise `packing.PAGE_LAYOUT_VERSION`, run golden_blocks.py."""
    record = json.loads(golden_blocks.RECORD.read_text())
    found = golden_blocks.digests()
    assert record["version"] == PAGE_LAYOUT_VERSION, "the record is of another version: run golden_blocks.py"
    assert found.keys() == record["blocks"].keys()
    changed = [name for name in found if found[name] != record["blocks"][name]]
    assert not changed, (
        "other bytes are stored than before: raise the version, since kept pages are of no use"
    )
