"""Imported before the suites: a failed assertion in them shows the values on both sides, as in a test file."""

import pytest

pytest.register_assert_rewrite("cl.testing.backbone", "cl.testing.strategy", "cl.testing.stream", "cl.testing.probe")
