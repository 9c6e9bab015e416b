"""The operator's page: static files with nothing about the server, so that they need no key.

The page asks the admin endpoint for what it shows, with the key that its user enters; the browser
keeps the key for the tab only.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # No inline code, no other hosts, no text that becomes markup, no frame around the page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # the files of one release fit together
}

router = APIRouter(prefix="/atomic", include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def get_page() -> Response:
    """The page."""
    return _answer("index.html")


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def get_file(name: str) -> Response:
    """One of the page's files; 404 for any other name."""
    return _answer(name)


def _answer(name: str) -> Response:
    if name not in files():
        raise HTTPException(404, "Not Found")
    return Response(files()[name], media_type=TYPES[Path(name).suffix], headers=HEADERS)


@functools.cache
def files() -> Mapping[str, bytes]:
    """The page's files by name. Requests look names up here, so no name is ever a path."""
    directory = Path(__file__).parent
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in TYPES}
