"""Whatever the OpenAPI document lets one send, or just does not, is answered as the document says (schemathesis)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from moe_forward.api.keys import HEALTH

KEY = "0123456789abcdef"
EXAMPLES = 5  # of each operation and each mode; more are slow where rows of H numbers are made
OPERATIONS = (
    *("/v1/moe/forward", "/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"),
    *("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/{model}", "/v2/models/{model}/ready"),
    *("/v2/models/{model}/versions/{version}", "/v2/models/{model}/versions/{version}/ready"),
    *("/v1/placement", "/v1/ranks", "/v1/drain"),
)


@pytest.mark.parametrize("path", OPERATIONS)
def test_the_operation_answers_as_documented(make_front: Any, kit: Any, tmp_path: Path, path: str) -> None:
    (tmp_path / "keys").write_text(KEY)
    front = make_front(api_keys_file=tmp_path / "keys")
    document = schemathesis.openapi.from_asgi("/openapi.json", front.app)
    assert {found.ok().path for found in document.get_all_operations()} == set(OPERATIONS)
    (operation,) = document[path].values()
    headers = {"X-API-Key": KEY, "Authorization": f"Bearer {kit.token}"}
    # JSON Schema cannot say which tensors go together, nor that they have equally many rows.
    excluded = CHECKS.get_by_names(["positive_data_acceptance"]) if operation.tags == ["forward"] else []
    modes = list(GenerationMode) if path not in HEALTH else [GenerationMode.POSITIVE]  # they take nothing
    for mode in modes:

        @hypothesis.seed(1)
        @hypothesis.settings(
            max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def holds(case: Any) -> None:
            case.call_and_validate(headers=headers, excluded_checks=excluded)

        holds()
    front.check_idle()
