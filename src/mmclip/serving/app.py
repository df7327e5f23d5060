"""The routes: from a request to a call of `Service`, and from its answer to JSON."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from PIL import Image
from starlette.datastructures import UploadFile as StarletteUploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartParser

import mmclip
from mmclip.config_io import RESOURCES
from mmclip.prompts import known_prompt_sets
from mmclip.serving.batching import Batcher, BusyError
from mmclip.serving.decoding import DecodePool, Upload, UploadError
from mmclip.serving.limits import HEADERS, Access, Guard, Limits
from mmclip.serving.schemas import (
    ClassifyAnswer,
    ErrorBody,
    ExplainAnswer,
    Health,
    ImageEmbeddingsAnswer,
    ModelAnswer,
    ScoreName,
    SearchAnswer,
    SimilarityAnswer,
    TextEmbeddingsAnswer,
    TextsBody,
)
from mmclip.serving.service import Question, Service, data_url, png

DESCRIPTION = """Scores, embeddings, saliency maps and search by the model that `mmclip serve`
holds. Images are PNG, JPEG, TIFF, DICOM or the like. Nothing that is sent is stored or logged.
Research software, not a medical device."""

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The request cannot be parsed.",
        401: "The token is missing or wrong.",
        403: "The Host header, or the site that sent the request, is refused.",
        413: "The request is too large.",
        422: "An image cannot be read, or something that was asked for cannot be answered.",
        429: "Too many requests.",
        503: "The server is busy, or the answer takes too long.",
    }.items()
}

Images = Annotated[
    list[UploadFile], File(alias="image", description="Image files; repeat for several.")
]
OneImage = Annotated[UploadFile, File(alias="image", description="An image file.")]
Findings = Annotated[
    list[str],
    Form(
        alias="finding",
        description="What to look for; repeat for several. None: all that a fine-tuned model knows",
        examples=[["pleural effusion", "pneumothorax"]],
    ),
]
PromptsName = Annotated[str, Form(description="Prompt set that words the findings, by name.")]
Phrase = Annotated[
    str, Form(description="In a report's words.", examples=["right pleural effusion"])
]

_T = TypeVar("_T")


def create_app(service: Service, access: Access, limits: Limits) -> FastAPI:
    """The application.

    Args:
        service: What it answers by.
        access: From where and by whom it may be asked.
        limits: How much it answers.
    """
    # Starlette writes larger uploads to a file otherwise, and images of patients stay off disks.
    MultiPartParser.spool_max_size = limits.request_bytes + 1
    routes = _Routes(service, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        routes.close()

    app = FastAPI(
        title="MMCLIP",
        description=DESCRIPTION,
        version=mmclip.__version__,
        docs_url=None,  # its page would load scripts from another site
        redoc_url=None,
        openapi_url="/api/openapi.json",
        lifespan=lifespan,
    )
    app.add_middleware(Guard, access=access, limits=limits)
    _add_errors(app)
    for path, method, route, gives in routes.table():
        kind = gives if isinstance(gives, str) else "application/json"
        found: dict[int | str, dict[str, Any]] = {200: {"content": {kind: {}}}}
        app.add_api_route(
            path,
            route,
            methods=[method],
            response_model=None if isinstance(gives, str) else gives,
            responses=found | REFUSALS if path.startswith("/api") else found,
            response_class=Response if isinstance(gives, str) else JSONResponse,
        )
    app.mount("/", StaticFiles(directory=str(RESOURCES / "serve"), html=True), name="page")
    return app


class _Routes:
    """The routes of one service."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self._service, self._limits = service, limits
        self._pool, self._batcher = DecodePool(), Batcher()

    def table(self) -> list[tuple[str, str, Callable[..., Any], type | str]]:
        """Path, method, function, and the answer of each: a model, or a media type."""
        return [
            ("/health", "GET", self.health, Health),
            ("/api/model", "GET", self.model, ModelAnswer),
            ("/api/classify", "POST", self.classify, ClassifyAnswer),
            ("/api/embed/image", "POST", self.embed_image, ImageEmbeddingsAnswer),
            ("/api/embed/text", "POST", self.embed_text, TextEmbeddingsAnswer),
            ("/api/similarity", "POST", self.similarity, SimilarityAnswer),
            ("/api/explain", "POST", self.explain, ExplainAnswer),
            ("/api/search", "POST", self.search, SearchAnswer),
            ("/api/image", "POST", self.image, "image/png"),
            ("/api/image/values", "POST", self.values, "application/octet-stream"),
        ]

    def close(self) -> None:
        """Ends threads and processes."""
        self._batcher.close()
        self._pool.close()

    async def health(self) -> Health:
        """Says that the server answers."""
        return Health()

    async def model(self) -> dict[str, Any]:
        """Says what is served."""
        limits = self._limits
        return {
            **self._service.about,
            "limits": {
                "request_mb": limits.request_bytes / (1 << 20),
                "images": limits.images,
                "texts": limits.texts,
                "text_chars": limits.text_chars,
                "per_minute": limits.per_minute,
                "timeout_s": limits.timeout_s,
            },
        }

    async def classify(
        self,
        image: Images,
        finding: Findings | None = None,
        prompts: PromptsName = "default",
    ) -> dict[str, Any]:
        """Probabilities of findings in images: the numbers of `mmclip predict`."""
        question = Question(tuple(self._texts(finding or [], "finding")), _prompt_set(prompts))
        if not question.findings and self._service.about["has_text_encoder"]:
            raise HTTPException(
                422, "no finding is named; name what to look for, such as finding=pleural effusion"
            )
        uploads = await self._uploads(image)
        pixels = await self._decoded(uploads)
        answers = await self._batcher.ask(
            ("classify", question), pixels, lambda images: self._service.classify(question, images)
        )
        return {
            "findings": self._service.about_findings(answers[0], prompts),
            "images": [
                {
                    "name": upload.name,
                    "width_px": grey.shape[1],
                    "height_px": grey.shape[0],
                    "probabilities": answer.probabilities.tolist(),
                    "below": [
                        self._service.place_of(name, float(p), prompts)
                        for name, p in zip(answer.findings, answer.probabilities, strict=True)
                    ],
                }
                for upload, grey, answer in zip(uploads, pixels, answers, strict=True)
            ],
            "warnings": list(answers[0].warnings),
            "command": self._service.predict_command([u.name for u in uploads], question),
        }

    async def embed_image(self, image: Images) -> dict[str, Any]:
        """Embeddings of images."""
        uploads = await self._uploads(image)
        return {
            "names": [upload.name for upload in uploads],
            "embeddings": [row.tolist() for row in await self._embedded(uploads)],
        }

    async def embed_text(self, body: TextsBody) -> dict[str, Any]:
        """Embeddings of texts."""
        rows = await self._embedded_texts(self._texts(body.texts, "text"))
        return {"embeddings": [row.tolist() for row in rows]}

    async def similarity(
        self,
        image: Images,
        text: Annotated[
            list[str], Form(description="Repeat for several.", examples=[["Clear lungs."]])
        ],
    ) -> dict[str, Any]:
        """Cosines of images and texts."""
        texts = self._texts(text, "text")
        uploads = await self._uploads(image)
        model = self._service.model
        images, encoded = await self._embedded(uploads), await self._embedded_texts(texts)
        return {
            "names": [upload.name for upload in uploads],
            "texts": texts,
            "similarity": model.similarity(np.stack(images), np.stack(encoded)).tolist(),
            "logit_scale": model.logit_scale,
        }

    async def explain(
        self,
        image: OneImage,
        phrase: Phrase,
        score: Annotated[ScoreName, Form(description="What the map shows.")] = "contribution",
        prompts: PromptsName = "default",
    ) -> dict[str, Any]:
        """A saliency map of a phrase: the numbers of `mmclip explain`."""
        (text,) = self._texts([phrase], "phrase")
        name = _prompt_set(prompts)
        (upload,) = await self._uploads([image])
        ((facts, overlay),) = await self._batcher.ask(
            ("explain", text, score, name),
            await self._decoded([upload]),
            lambda images: self._service.explain(text, score, name, images),
        )
        return {
            "name": upload.name,
            "facts": facts,
            "overlay": await asyncio.to_thread(data_url, overlay),
            "command": self._service.explain_command(upload.name, text, score),
        }

    async def search(
        self,
        image: Annotated[
            UploadFile | None, File(description="An image file, or give a phrase.")
        ] = None,
        phrase: Annotated[str, Form(description="In place of an image.")] = "",
        top: Annotated[int, Form(ge=1, le=50, description="How many patients.")] = 5,
    ) -> dict[str, Any]:
        """The nearest patients in the indexed folders: the numbers of `mmclip retrieve`."""
        if (image is None) == (not phrase.strip()):
            raise HTTPException(422, "give either an image or a phrase to search for")
        patient, name = None, None
        if image is None:
            (vector,) = await self._embedded_texts(self._texts([phrase], "phrase"))
        else:
            (upload,) = await self._uploads([image])
            patient = self._service.patient_of(upload.content)
            name = upload.name
            (vector,) = await self._embedded([upload])
        (found,) = await self._batcher.ask(
            ("search", top), [(vector, patient)], lambda q: self._service.search(q, top)
        )
        return {"found": found, "command": self._service.search_command(name, phrase, top)}

    async def image(self, image: OneImage) -> Response:
        """The image as the model reads it before resizing, as PNG: 8 bits, upright, air dark."""
        (upload,) = await self._uploads([image])
        (grey,) = await self._decoded([upload])
        content = await asyncio.to_thread(png, Image.fromarray(grey))
        kind = "dicom" if upload.is_dicom else "raster"
        return Response(content, media_type="image/png", headers={"X-Image-Kind": kind})

    async def values(self, image: OneImage) -> Response:
        """A DICOM image's values before any window: 16 bits a pixel, the low byte first.

        The header X-Values says in JSON: width, height, low, step (a value is low + step times what
        is sent), window (centre and width, or null) and is_inverted. 204 where there are no more
        than 8 bits.
        """
        (upload,) = await self._uploads([image])
        found = await self._in_thread(self._pool.values, upload)
        if found is None:
            return Response(status_code=204)
        said = {
            "width": found.steps.shape[1],
            "height": found.steps.shape[0],
            "low": found.low,
            "step": found.step,
            "window": found.window,
            "is_inverted": found.is_inverted,
        }
        return Response(
            found.steps.astype("<u2").tobytes(),
            media_type="application/octet-stream",
            headers={"X-Values": json.dumps(said)},
        )

    def _texts(self, texts: Sequence[str], what: str) -> list[str]:
        limits = self._limits
        if len(texts) > limits.texts:
            raise HTTPException(422, f"{len(texts)} {what}s, at most {limits.texts} are taken")
        for text in texts:
            if not text.strip():
                raise HTTPException(422, f"a {what} is empty; give words to look for")
            if len(text) > limits.text_chars:
                raise HTTPException(
                    422, f"a {what} has {len(text):,} characters, at most {limits.text_chars:,}"
                )
        return [text.strip() for text in texts]

    async def _uploads(self, files: Sequence[StarletteUploadFile]) -> list[Upload]:
        if len(files) > self._limits.images:
            raise HTTPException(
                422, f"{len(files)} images, at most {self._limits.images} are taken at once"
            )
        return [Upload(_plain(file.filename), await file.read()) for file in files]

    async def _decoded(self, uploads: Sequence[Upload]) -> list[np.ndarray]:
        return [await self._in_thread(self._pool.image, upload) for upload in uploads]

    async def _in_thread(self, read: Callable[[Upload], _T], upload: Upload) -> _T:
        return await asyncio.to_thread(read, upload)

    async def _embedded(self, uploads: Sequence[Upload]) -> list[np.ndarray]:
        pixels = await self._decoded(uploads)
        encode = self._service.model.encode_images
        return await self._batcher.ask("embed", pixels, lambda images: np.asarray(encode(images)))

    async def _embedded_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        # Not with those of others: the numbers of a text may follow from the longest beside it.
        return await self._batcher.ask(object(), texts, self._service.model.encode_texts)


def _prompt_set(name: str) -> str:
    """The name itself: a client may name no file of this machine."""
    if name not in (known := known_prompt_sets()):
        raise HTTPException(422, f"prompts {name[:100]!r} is none of {', '.join(known)}")
    return name


def _plain(filename: str | None) -> str:
    """What a browser calls a file, without folders and control characters."""
    name = (filename or "").replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in name if c.isprintable())[:200] or "image"


def _add_errors(app: FastAPI) -> None:
    """Every refusal is {"error": one line}."""

    @app.exception_handler(StarletteHTTPException)
    async def of_route(_: Request, error: StarletteHTTPException) -> JSONResponse:
        said = {404: "there is nothing here; the routes are in /api/openapi.json"}
        detail = said.get(error.status_code, str(error.detail))
        return JSONResponse({"error": detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_form(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return JSONResponse({"error": f"{where}: {first['msg'].lower()}"}, 422)

    @app.exception_handler(UploadError)
    @app.exception_handler(ValueError)
    async def of_model(_: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": " ".join(str(error).split())}, 422)

    @app.exception_handler(BusyError)
    async def of_queue(_: Request, error: BusyError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 503, {"Retry-After": "2"})

    @app.exception_handler(Exception)
    async def of_fault(_: Request, error: Exception) -> JSONResponse:
        # Outside the guard, and so with headers of its own; the traceback goes to the terminal.
        text = f"unexpected {type(error).__name__}; the terminal of `mmclip serve` says where"
        return JSONResponse({"error": text}, 500, HEADERS)
