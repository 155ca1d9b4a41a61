import pkgutil
import subprocess
import sys

import pshare_jax.frontend


def test_the_frontend_knows_no_http_and_no_device():
    """It is for the offline engine and the evaluations too."""
    modules = [
        module.name
        for module in pkgutil.walk_packages(pshare_jax.frontend.__path__, "pshare_jax.frontend.")
    ]
    assert "pshare_jax.frontend.tool_calls.parser" in modules
    code = (
        f"import sys, {', '.join(modules)}\n"
        "print([m for m in ('aiohttp', 'pshare_jax.serve', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
