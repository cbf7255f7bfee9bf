"""One HTTP server over registered models: MLflow's scoring protocol behind limits, and a page to try them on.

POST /invocations                   the first model, as `mlflow models serve` answers it
POST /models/<name>/invocations     any of them; /ping, /health and /version as there
GET  /                              the page
GET  /api/models                    what is served
GET  /api/pictures?start=&count=    evaluation pictures;  GET /pictures/<key> one of them
POST /api/search                    {"text": ...}: the pictures that match it
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from blip_pipelines.inference.gallery import RERANKED, Gallery
from blip_pipelines.inference.limits import Limits, LimitsConfig

PAGE = Path(__file__).with_name("page.html")
MOST_TEXT_CHARACTERS = 1000
MOST_PICTURES = 60
SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src "
    "'self' 'unsafe-inline'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
KINDS = {  # by their first bytes; anything else is not shown
    b"\x89PNG": "image/png",
    b"\xff\xd8": "image/jpeg",
    b"RIFF": "image/webp",
    b"GIF8": "image/gif",
}


@dataclass(frozen=True)
class ServedModel:
    """A registered model behind the server.

    Args:
        inputs: the columns that it reads.
        stage, gate: which made it, and what the gate said.
    """

    name: str
    version: str
    alias: str
    inputs: tuple[str, ...]
    stage: str = ""
    gate: str = ""

    @property
    def does(self) -> str:
        """What the page offers it for: caption, retrieve, judge or answer."""
        if {"question", "instruction"} & set(self.inputs):
            return "answer"
        if "texts" in self.inputs:
            return "judge" if self.name.endswith("filter") else "retrieve"
        return "caption"


def make_app(
    models: Sequence[ServedModel],
    scoring: Mapping[str, Any],
    gallery: Gallery | None,
    limits: LimitsConfig | None = None,
    page: bool = True,
) -> Any:
    """The application.

    Args:
        models: the first is also at the root.
        scoring: MLflow's scoring application of each, by name.
        gallery: None where there is no retriever or no data.
        page: whether the root is the page.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/api/models")
    def list_models() -> Any:
        described = [{**asdict(model), "does": model.does} for model in models]
        return {"models": described, "pictures": len(gallery.row_of) if gallery else 0}

    @app.get("/api/pictures")
    def list_pictures(start: int = 0, count: int = 24) -> Any:
        return gallery.page(max(start, 0), min(max(count, 0), MOST_PICTURES)) if gallery else []

    @app.get("/pictures/{key}")
    def show_picture(key: str) -> Response:
        content = gallery.picture(key) if gallery else None
        kind = next((kind for start, kind in KINDS.items() if content and content.startswith(start)), None)
        if content is None or kind is None:
            return JSONResponse({"error": f"no picture {key[:64]} to show"}, 404)
        return Response(content, media_type=kind, headers={"cache-control": "max-age=3600"})

    @app.post("/api/search")
    async def search(request: Request) -> Response:
        try:
            text = (await request.json())["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return JSONResponse({"error": 'send {"text": "..."}'}, 400)
        if not isinstance(text, str) or not text.strip() or len(text) > MOST_TEXT_CHARACTERS:
            return JSONResponse({"error": f"text: wanted 1 to {MOST_TEXT_CHARACTERS} characters"}, 400)
        if gallery is None or gallery.ask is None:
            return JSONResponse({"error": "no retriever is served, or there are no evaluation pictures"}, 404)
        return JSONResponse(await asyncio.to_thread(gallery.search, text, RERANKED))

    if page:

        @app.get("/")
        def show_page() -> Response:
            return HTMLResponse(PAGE.read_text("utf-8"), headers=SECURITY)

    for model in models:
        app.mount(f"/models/{model.name}", scoring[model.name])
    if models:
        app.mount("/", scoring[models[0].name])
    return Limits(app, limits or LimitsConfig())
