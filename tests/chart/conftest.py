"""The real helm, 4 and 3; without them the tests that need one are skipped."""

from __future__ import annotations

import pytest

from .charts import BINARIES, Helm

REASON = "no {} on PATH; `.ci/helm.py FOLDER` puts helm 4 and helm 3 there"


@pytest.fixture(scope="session")
def helm() -> Helm:
    """Helm 4."""
    found = Helm.found("helm")
    if found is None:
        pytest.skip(REASON.format("helm"))
    return found


@pytest.fixture(scope="session", params=BINARIES)
def each_helm(request: pytest.FixtureRequest) -> Helm:
    """Helm 4, then helm 3."""
    found = Helm.found(request.param)
    if found is None:
        pytest.skip(REASON.format(request.param))
    return found
