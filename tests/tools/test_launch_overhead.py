"""The measurement of Python per call runs without a GPU, on kernels that are really compiled."""

from __future__ import annotations

import json

import pytest
from triton.runtime import driver

from tools import launch_overhead


@pytest.mark.slow
def test_every_launcher_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_overhead.main(["--stub", "--calls", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["microseconds"]) == set(launch_overhead.CASES)
    assert all(0 < tenth <= middle for middle, tenth in found["microseconds"].values())


def test_named_cases_and_the_driver_before(capsys: pytest.CaptureFixture[str]) -> None:
    before = driver._active
    assert launch_overhead.main(["--stub", "--calls", "1", "QuickGELU forward"]) == 0
    assert driver._active is before
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["QuickGELU forward"]
    with pytest.raises(SystemExit):
        launch_overhead.main(["GELU"])
    assert "got GELU" in capsys.readouterr().err


def test_launches_reach_the_stub() -> None:
    launched: list[object] = []
    with launch_overhead.stubbed(launch_overhead.StubDriver(launched=lambda *args: launched.append(args))):
        found = dict(launch_overhead.rows(1, ["QuickGELU forward"]))
    assert set(found) == {"QuickGELU forward"}
    assert len(launched) == 1 + launch_overhead._BATCH
