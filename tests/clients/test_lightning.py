"""Lightning: Trainer and Fabric."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..pages import Block, blocks


@pytest.mark.parametrize("block", blocks("docs/integrations.md", "Lightning"), ids=Block.title)
def test_example(block: Block, tmp_path: Path) -> None:
    block.run_here(tmp_path)
