"""The page in the browser: static files, and the stream of events that they show."""

from __future__ import annotations

import contextlib
from importlib import resources

from aiohttp import web
from aiohttp.typedefs import Handler

from pshare_jax.serve.access import tells_of_all
from pshare_jax.serve.service import SERVICE
from pshare_jax.serve.sse import EventStream

_FILES = {
    "/ui": ("index.html", "text/html"),
    "/ui/style.css": ("style.css", "text/css"),
    "/ui/main.js": ("main.js", "text/javascript"),
    "/ui/api.js": ("api.js", "text/javascript"),
    "/ui/sharing_map.js": ("sharing_map.js", "text/javascript"),
    "/ui/figures.js": ("figures.js", "text/javascript"),
    "/ui/playground.js": ("playground.js", "text/javascript"),
}

EVENTS = "/ui/events"

PUBLIC_PATHS = frozenset(_FILES)
"""What needs no key: the page asks for one, and holds nothing itself."""

# Scripts and styles are files of this server, and requests go to it alone: whatever a model
# writes, nothing of it is run, and nothing is sent elsewhere.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_routes(app: web.Application) -> None:
    """Adds the page's files and its stream to an application."""
    folder = resources.files(__name__)
    for path, (name, content_type) in _FILES.items():
        handler = _serve(folder.joinpath(name).read_bytes(), content_type)
        for spelling in (path, f"{path}/"):
            app.router.add_get(spelling, handler)
    app.router.add_get(EVENTS, events)


def _serve(body: bytes, content_type: str) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=_HEADERS)

    return handler


@tells_of_all
async def events(request: web.Request) -> web.StreamResponse:
    """`GET /ui/events`: what the engine is doing, as long as the client listens."""
    service = request.app[SERVICE]
    stream = EventStream(request, service.config.write_timeout_seconds)
    async with contextlib.aclosing(service.live.watch()) as looks:
        opened = False
        async for look in looks:
            if not opened:
                await stream.open()
                opened = True
            for event in look:
                stream.add(event)
            await stream.flush()
    return stream.response
