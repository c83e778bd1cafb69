"""With REFQLORA_REQUIRE_ORACLES=1, a parity test whose library is missing fails instead of being skipped."""

import os

import pytest

REQUIRED = os.environ.get("REFQLORA_REQUIRE_ORACLES", "") not in ("", "0")


def _fail_if_oracle_is_missing(node, report):
    if not (REQUIRED and report.skipped and node.path.name.startswith("test_parity_")):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if "could not import" in reason:
        report.outcome = "failed"
        report.longrepr = f"{node.nodeid}: REFQLORA_REQUIRE_ORACLES is set, and this was to be skipped: {reason}"


@pytest.fixture
def uncompiled():
    """bitsandbytes' fallback for odd sizes and large blocks is compiled for each shape: the same result, a minute
    later, and not without a C++ compiler."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _fail_if_oracle_is_missing(collector, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    _fail_if_oracle_is_missing(item, report)
    return report
