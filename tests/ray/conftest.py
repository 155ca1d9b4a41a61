"""Ray is large: these tests are collected where the extra `ray` is installed."""

import importlib.util

from tests.e2e.conftest import tiny_folder, tiny_server

__all__ = ["tiny_folder", "tiny_server"]

collect_ignore_glob = [] if importlib.util.find_spec("ray") else ["test_*.py"]
