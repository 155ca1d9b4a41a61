from tests.e2e.conftest import tiny_folder, tiny_server  # noqa: F401
