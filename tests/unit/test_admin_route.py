"""A change that an admin request has begun is finished, even if its client disconnects."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, FastAPI, Request

from vllm_atomic_moe.control.access import Access, AdminRoute

router = APIRouter(route_class=AdminRoute)
done: list[str] = []


@router.get("/slow")
async def slow(request: Request) -> str:
    await asyncio.sleep(0.2)
    done.append("slow")
    return "slow"


def test_a_request_that_is_cut_off_is_finished():
    app = FastAPI()
    app.include_router(router)
    app.state.atomic_moe_access = Access("key", [])
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/slow",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer key")],
    }

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        raise AssertionError("nobody is there any more")

    async def cut_off() -> None:
        request = asyncio.create_task(app(scope, receive, send))
        await asyncio.sleep(0.05)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        assert done == []
        await asyncio.sleep(0.5)

    asyncio.run(cut_off())
    assert done == ["slow"]
