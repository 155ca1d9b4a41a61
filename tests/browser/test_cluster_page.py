"""The page of a cluster's frontend: the pools of all workers, in processes elsewhere."""

from __future__ import annotations

import asyncio

import openai
import pytest

from pshare_jax.serve.process import running_server
from tests.browser.chromium import browser
from tests.browser.test_page import CONTEXT
from tests.e2e.conftest import write_config

pytestmark = pytest.mark.browser

PROMPTS = [f"{word} {CONTEXT * 4}" for word in ("red", "green", "blue")]


async def test_a_cluster(tiny_folder, tmp_path):
    """Contexts of several prefill workers, and who reads them; also a picture of the docs."""
    flags = ["--launcher=local", "--prefill.engines=2", "--decode.engines=2"]
    with running_server([f"--config={write_config(tiny_folder)}", *flags]) as url:
        async with (
            browser() as page,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api,
        ):
            await page.resize(1280, 1100)
            await page.open(f"{url}/ui")
            await page.until("document.getElementById('status').textContent === 'ready'")
            # A frontend is ready with a worker of each kind; the others join while it serves.
            workers = "[...document.querySelectorAll('#workers td:first-child')]"
            names = f"{workers}.map((cell) => cell.textContent)"
            await page.until(f"{names}.length === 4")
            found = await page.evaluate(names)
            assert sorted(found) == ["decode0", "decode1", "prefill0", "prefill1"]

            async def ask(model: str, prompt: str, tokens: int):
                return await api.completions.create(
                    model=model, prompt=prompt, max_tokens=tokens, extra_body={"ignore_eos": True}
                )

            await asyncio.gather(*(ask("planner", prompt, 4) for prompt in PROMPTS))
            asked = [
                asyncio.create_task(ask(model, prompt + model, 900))
                for model in ("coder", "critic")
                for prompt in PROMPTS
            ]
            labels = "[...document.querySelectorAll('#map .page')].map((page) => page.title)"
            read = f"{labels}.some((text) => text.includes('read now by coder, critic'))"
            await page.until(read)
            assert "read by several models now" in await page.text("#map-summary")
            assert await page.evaluate(f"{labels}.some((text) => text.includes('prefill'))")
            await page.screenshot("ui-cluster.png", tmp_path)
            await asyncio.gather(*asked)
            assert page.problems == []
