"""A short campaign of random faults; the long one is a script (fault_campaign.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_campaign import campaign, table


@pytest.mark.slow
@pytest.mark.jobs
@pytest.mark.timeout(3600)
def test_twenty_random_faults_lose_no_byte_and_change_no_result(tmp_path: Path) -> None:
    found = campaign(tmp_path, 20)
    told = table(found)
    assert len(found) == 20, told
    assert not [one for one in found if one.changed or one.lost or one.problem], told
    # A second start has nothing to do.
    assert campaign(tmp_path, 20) == found
