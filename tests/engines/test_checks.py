"""engines/checks.py: a verdict on several is no better than the worst of them."""

from __future__ import annotations

import pytest

from engines.checks import all_passed


@pytest.mark.parametrize(
    ("outcomes", "verdict"), [([], True), ([True, True], True), ([True, None], None), ([None, False], False), ([True, False], False)]
)
def test_what_was_not_judged_is_no_pass_and_no_failure(outcomes: list[bool | None], verdict: bool | None) -> None:
    assert all_passed(outcomes) is verdict
