"""What these tests need is large: they are collected where the extra `deploy` is installed."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("helm_python") else ["test_*.py"]
