"""The page at /ui in a real browser. `make test-browser` selects these tests."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from pshare_jax.serve.process import running_server as running_server_process
from pshare_jax.text.tokenizer import Tokenizer
from tests.browser.chromium import browser
from tests.e2e.conftest import write_config
from tests.serve.fake import fake_config, fake_engine
from tests.serve.server import running_server
from tests.serve.test_completions import script
from tests.serve.test_tools import TEMPLATE
from tests.text.tiny import write_byte_level

pytestmark = pytest.mark.browser

CONTEXT = "the quick brown fox jumps over the lazy dog and then "
XSS = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
CALL = f'<tool_call>\n{{"name": "find", "arguments": {{"q": {json.dumps(XSS)}}}}}\n</tool_call>'
TOOLS = json.dumps([{"type": "function", "function": {"name": "find", "parameters": {}}}])


@pytest.fixture
def scripted(tmp_path):
    """A server with a key whose answers the test writes."""
    tokenizer = Tokenizer.load(write_byte_level(tmp_path / "tokenizer", TEMPLATE))
    config = fake_config(max_model_len=4096, api_key="secret")
    with running_server(fake_engine(tokenizer, config)) as client:
        yield client


async def test_pages_become_shared(tiny_server, tmp_path):
    """Also makes the picture of the documentation, where `SCREENSHOTS` names a folder."""
    async with (
        browser() as page,
        openai.AsyncOpenAI(base_url=f"{tiny_server}/v1", api_key="none", max_retries=0) as api,
    ):
        await page.resize(1280, 1100)
        await page.open(f"{tiny_server}/ui")
        await page.until("document.getElementById('status').textContent === 'ready'")
        assert "No pool holds a context yet" in await page.text("#map-summary")
        names = await page.evaluate(
            "[...document.querySelectorAll('#legend li')].map((item) => item.textContent)"
        )
        assert names == ["planner", "coder", "critic", "own"]

        async def ask(model: str, prompt: str, tokens: int):
            return await api.completions.create(
                model=model, prompt=prompt, max_tokens=tokens, extra_body={"ignore_eos": True}
            )

        await ask("planner", CONTEXT * 8, 4)
        await page.until("document.querySelectorAll('#map .page').length > 4")
        label = "document.querySelector('#map .page').getAttribute('aria-label')"
        first = await page.until(label)
        assert first.startswith("16 tokens; 16 computed for planner; read by nobody now; in ")
        # Two others read what the planner's call has computed, each with an end of its own.
        asked = [
            asyncio.create_task(ask(model, CONTEXT * 8 + model, 900))
            for model in ("coder", "critic")
        ]
        await page.until(f"{label}.includes('16 computed for planner; read now by coder, critic')")
        marks = "document.querySelector('#map .page .readers').children.length"
        assert await page.evaluate(marks) == 2
        assert "read by several models now" in await page.text("#map-summary")
        await page.screenshot("ui-sharing-map.png", tmp_path)
        await asyncio.gather(*asked)
        await page.until(f"{label}.includes('read by nobody now')")
        # The keyboard reaches a page, and its words are shown.
        await page.evaluate("document.querySelector('#map .page').focus()")
        assert await page.text("#page-details") == await page.evaluate(label)
        await page.press("Tab")
        second = "document.querySelectorAll('#map .page')[1]"
        assert await page.evaluate(f"document.activeElement === {second}")
        figures = await page.text("#models")
        assert "planner" in figures
        # No KV store, so nothing is said of one.
        assert await page.evaluate("document.getElementById('tiers-table').hidden")
        assert "0 on their way" in await page.text("#map-summary")
        assert page.problems == []


async def test_sessions(tiny_server):
    """Whatever a client calls its session is text, too."""
    async with (
        browser() as page,
        openai.AsyncOpenAI(base_url=f"{tiny_server}/v1", api_key="none", max_retries=0) as api,
    ):
        await page.open(f"{tiny_server}/ui")
        await page.until("document.getElementById('status').textContent === 'ready'")
        assert await page.evaluate("document.getElementById('sessions-table').hidden")
        for model in ("planner", "coder"):
            extra = {"session_id": XSS, "ignore_eos": True}
            await api.completions.create(
                model=model, prompt=CONTEXT * 4 + "of a session", max_tokens=4, extra_body=extra
            )
        cells = "[...document.querySelectorAll('#sessions td')].map((cell) => cell.textContent)"
        await page.until(f"{cells}[2] === 'planner, coder' && {cells}[3].endsWith(' ago')")
        name, key, _, _, prompt, cached, shared, written = await page.evaluate(cells)
        assert (name, key, written) == (XSS, "–", "8")
        assert int(prompt) > int(cached.partition(" ")[0]) >= int(shared) > 0
        assert await page.evaluate("document.querySelectorAll('#sessions img').length") == 0
        assert await page.evaluate("window.hacked === undefined")
        assert not await page.evaluate("document.getElementById('sessions-table').hidden")
        assert page.problems == []


async def test_tiers_of_the_store(tiny_folder, tmp_path):
    """Pages that the store has are marked, and its table is there."""
    store = {"path": str(tmp_path / "pool"), "bytes": 1 << 22}
    config = write_config(tiny_folder, kv_store=store)
    with running_server_process([f"--config={config}"]) as url:
        async with (
            browser() as page,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api,
        ):
            await page.open(f"{url}/ui")
            await page.until("document.getElementById('status').textContent === 'ready'")
            await api.completions.create(model="planner", prompt=CONTEXT * 8, max_tokens=4)
            label = "document.querySelector('#map .page')?.getAttribute('aria-label')"
            await page.until(f"{label}?.includes('kept in shared memory')")
            await page.until("document.querySelectorAll('#map .page.kept').length > 4")
            assert "in the KV store" in await page.text("#map-summary")
            assert (await page.text("#tiers td")) == "shared memory"
            assert not await page.evaluate("document.getElementById('tiers-table').hidden")
            assert page.problems == []


async def test_the_key_is_asked_for_and_kept(scripted):
    async with browser() as page:
        await page.open(f"{scripted.url}/ui")
        await page.until("document.getElementById('status').textContent.includes('API key')")
        assert await page.evaluate("document.activeElement.id") == "key"
        await page.type("#key", "secret")
        await page.press("Enter")
        await page.until("document.getElementById('status').textContent === 'ready'")
        await page.call("Page.reload")
        await page.until("document.getElementById('status')?.textContent === 'ready'")


async def test_the_playground(scripted):
    async with browser() as page:
        await page.open(f"{scripted.url}/ui")
        await page.evaluate("sessionStorage.setItem('pshare-key', 'secret')")
        await page.call("Page.reload")
        await page.until("document.querySelectorAll('#choices input').length === 3")
        page.problems.clear()  # the stream was refused before there was a key
        await page.press("Enter")
        await page.type("#question", "why?")
        script(scripted.engine, "because")
        await page.press("Enter", ctrl=True)
        await page.until("document.querySelectorAll('.answer[aria-busy=false]').length === 3")
        texts = "[...document.querySelectorAll('.answer .text')].map((part) => part.textContent)"
        assert await page.evaluate(texts) == ["because"] * 3
        cost = await page.text(".answer .cost")
        assert "first token after" in cost
        assert "computed" in cost
        assert cost.endswith("stop")
        assert page.problems == []


async def test_what_a_model_writes_is_text(scripted):
    async with browser() as page:
        await page.open(f"{scripted.url}/ui")
        await page.evaluate("sessionStorage.setItem('pshare-key', 'secret')")
        await page.call("Page.reload")
        await page.until("document.querySelectorAll('#choices input').length === 3")
        page.problems.clear()
        await page.type("#context", XSS)
        await page.evaluate("document.querySelector('details').open = true")
        await page.type("#tools", TOOLS)
        await page.evaluate("document.getElementById('max-tokens').value = 2000")
        script(scripted.engine, f"<think>{XSS}</think>{XSS}{CALL}")
        await page.evaluate("document.getElementById('ask').click()")
        await page.until("document.querySelectorAll('.answer[aria-busy=false]').length === 3")
        assert await page.text(".answer .call") == f"find({json.dumps({'q': XSS})})"
        assert XSS in await page.text(".answer .text")
        assert (
            await page.evaluate("document.querySelectorAll('.answer img, .answer script').length")
            == 0
        )
        assert await page.evaluate("window.hacked === undefined")
        # Nor would the policy let it be run.
        refused = "(() => { try { document.body.innerHTML = '<b>x'; } catch { return true; } })()"
        assert await page.evaluate(refused)
        assert page.problems == [] or all("TrustedHTML" in text for text in page.problems)


async def test_answers_can_be_stopped_and_errors_are_shown(scripted):
    async with browser() as page:
        await page.open(f"{scripted.url}/ui")
        await page.evaluate("sessionStorage.setItem('pshare-key', 'secret')")
        await page.call("Page.reload")
        await page.until("document.querySelectorAll('#choices input').length === 3")
        await page.evaluate("document.getElementById('ask').click()")
        assert "write a context" in await page.text("#playground-error")
        await page.type("#question", "why?")
        await page.evaluate("document.querySelector('details').open = true")
        await page.type("#tools", "no json")
        await page.evaluate("document.getElementById('ask').click()")
        assert (await page.text("#playground-error")).startswith("Tools: ")
        await page.evaluate("document.getElementById('tools').value = ''")
        scripted.engine.gate.clear()
        await page.evaluate("document.getElementById('ask').click()")
        await page.until("!document.getElementById('stop').disabled")
        await page.evaluate("document.getElementById('stop').click()")
        await page.until("document.querySelectorAll('.answer[aria-busy=false]').length === 3")
        assert (await page.text(".answer .cost")).startswith("stopped")
        scripted.engine.gate.set()
        await page.evaluate("document.getElementById('max-tokens').value = 100000")
        await page.evaluate("document.getElementById('max-tokens').removeAttribute('max')")
        await page.evaluate("document.getElementById('ask').click()")
        await page.until("document.querySelectorAll('.answer .bad').length === 3")
        assert "context length" in await page.text(".answer .cost")


async def test_a_narrow_screen(scripted, tmp_path):
    async with browser() as page:
        await page.resize(360, 740)
        await page.open(f"{scripted.url}/ui")
        await page.evaluate("sessionStorage.setItem('pshare-key', 'secret')")
        await page.call("Page.reload")
        await page.until("document.querySelectorAll('#choices input').length === 3")
        await page.type("#question", "why?")
        script(scripted.engine, "because " * 20 + "x" * 60)
        await page.press("Enter", ctrl=True)
        await page.until("document.querySelectorAll('.answer[aria-busy=false]').length === 3")
        await page.until("document.querySelectorAll('#models tr').length === 3")
        # Tables and the map scroll in themselves; the page does not.
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        await page.screenshot("ui-narrow.png", tmp_path)
