"""Settings of the whole suite: no network, one thread a process, hypothesis without deadlines."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support.fault_points import POINTS
from tests.support.lanes import begun_first, group_of, imported, is_fast, left_to_the_full_lane, may_be_fast

torch.set_num_threads(1)
# the gate draws the same examples each time, so that red means a change; the full lane looks for new ones
settings.register_profile(
    "fast", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("full", settings.get_profile("fast"), max_examples=500, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(autouse=True, scope="module")
def _settled():
    """What is there already is no more looked through for garbage: benchmarks collect before each run they time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def pytest_ignore_collect(collection_path, config):
    """The fast lane does not even import what it leaves out."""
    wanted = config.option.markexpr == "fast" and collection_path.suffix == ".py"
    return True if wanted and not may_be_fast(collection_path) else None


@pytest.hookimpl(tryfirst=True)  # xdist's own reads the groups
def pytest_collection_modifyitems(config, items):
    for item in left_to_the_full_lane(items):
        item.add_marker(pytest.mark.full)
    groups = {item: group_of(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
        if is_fast(item):
            item.add_marker(pytest.mark.fast)
    if hasattr(config, "workerinput"):  # one of several processes, none of which should be left with much at the end
        items.sort(key=begun_first(groups))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    """Groups stay together: not every pytest lets xdist see them."""
    if node.config.option.dist == "loadgroup" and not all("@" in name for name in ids):
        pytest.exit("pytest-xdist does not see the groups of tests: take the versions in constraints.txt", 4)


def pytest_sessionfinish(session):
    if session.config.option.markexpr == "fast" and (found := imported()):
        raise pytest.UsageError(f"a test of the fast lane imports {', '.join(found)}: see tests/support/lanes.py")


def pytest_terminal_summary(terminalreporter):
    """Tell how many faults were survived, also where several processes run the tests."""
    passed = terminalreporter.stats.get("passed", [])
    counts = [value for report in passed for name, value in report.user_properties if name == POINTS]
    if counts:
        terminalreporter.write_line(f"{sum(counts):,} fault points in {len(counts)} operations survived")
