"""The application: every route, one form of error, and the edge around it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from bise.errors import BiseError
from bise.server import absent, anthropic, chat, completions, embeddings, fim, models, responses, tokens
from bise.server.edge import AsgiApp, Edge, Reach
from bise.server.gate import StoreGate
from bise.server.hosted import HostedModels
from bise.server.limits import HttpLimits
from bise.server.openapi import describe
from bise.server.problem import ApiError, as_api_error, error_response
from bise.server.replay import Replaying
from bise.server.service import ClientGoneError, Models, Service
from bise.server.shelf import MemoryShelf, StoreShelf
from bise.server.ticket import Gate, OpenGate

if TYPE_CHECKING:
    from collections.abc import Callable

_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    fleet: Models,
    gate: Gate | None = None,
    *,
    limits: HttpLimits | None = None,
    reach: Reach | None = None,
    routers: Sequence[APIRouter] = (),
    prepare: Callable[[FastAPI], None] | None = None,
    hosted: HostedModels | None = None,
) -> Application:
    """Return the ASGI application over `fleet`; `application.service` is its state.

    `routers` are further routes (files, batches, admin, metrics); `prepare` may put things on `app.state`;
    `hosted` are models on other machines.
    """
    bounds = limits or HttpLimits()
    service = Service(fleet, gate or OpenGate(), bounds, hosted)
    app = FastAPI(
        openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, title="bise", lifespan=None
    )
    app.state.service = service
    is_stored = isinstance(gate, StoreGate)
    app.state.shelf = StoreShelf(gate) if is_stored else MemoryShelf()
    own = (chat, completions, fim, embeddings, responses, anthropic, tokens, models)
    for router in (*(module.router for module in own), *routers, absent.router):
        app.include_router(router)
    _add_page(app)
    app.add_exception_handler(BiseError, _refuse)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(Exception, _refuse)
    app.add_exception_handler(ClientGoneError, _nobody)
    app.add_exception_handler(ClientDisconnect, _nobody)
    app.add_exception_handler(RequestValidationError, _refuse_arguments)
    app.add_exception_handler(HTTPException, _refuse_route)
    if prepare is not None:
        prepare(app)
    inner = Replaying(app, gate) if is_stored else app
    return Application(inner, app, service, bounds, reach or Reach())


class Application(Edge):
    """The edge with the application inside."""

    def __init__(
        self, inner: AsgiApp, app: FastAPI, service: Service, limits: HttpLimits, reach: Reach
    ) -> None:
        super().__init__(inner, limits=limits, reach=reach, is_draining=lambda: service.is_draining)
        self.service = service
        self.routes = app.routes
        self.lifespan = partial(app.router.lifespan_context, app)
        """What the routes begin and end with the server; a context for as long as it serves."""


def _add_page(app: FastAPI) -> None:
    page: list[dict[str, Any]] = []

    async def openapi(request: Request) -> Response:
        await app.state.service.gate.authenticate(request)
        if not page:
            page.append(describe(app))
        return JSONResponse(page[0])

    app.add_route("/openapi.json", openapi, methods=["GET"], include_in_schema=False)


async def _refuse(request: Request, error: Exception) -> Response:
    return error_response(error, path=request.scope["path"])


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _refuse_arguments(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])[:100]
    refusal = ApiError(400, f"{place}: {first['msg']}", code="invalid_request", param=place)
    return error_response(refusal, path=request.scope["path"])


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    known = {
        404: "there is no such route; GET /openapi.json lists them",
        405: f"{request.method} is not possible here",
    }
    refusal = ApiError(
        status,
        known.get(status, str(error.detail)),
        code=_CODES.get(status, "invalid_request"),
        headers=error.headers,
    )
    return error_response(as_api_error(refusal), path=request.scope["path"])
