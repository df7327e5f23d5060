"""`mmclip serve`: the numbers of the API, and nothing for those who should not ask."""

import asyncio
import base64
import csv
import io
import json
import logging
import re
import shlex
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate

import mmclip
from mmclip.data.decode_worker import DecodeWorker
from mmclip.model_loading import ModelRequest
from mmclip.retrieval.retrieve import SearchRequest, search
from mmclip.serving import decoding
from mmclip.serving.app import create_app
from mmclip.serving.batching import Batcher, BusyError
from mmclip.serving.limits import Access, Limits, RateLimit, name_in
from mmclip.serving.server import unlogged
from mmclip.serving.service import ServeRequest, Service, open_service
from tests.commands import mmclip as command
from tests.dual_encoders import save_clip, save_siglip
from tests.made_files import NAME, NUMBER, dicom, encoded, huge_png, ramp
from tests.test_cli import COMMANDS

FINDINGS = ["pleural effusion", "pneumothorax"]
HERE = "http://127.0.0.1"
TOKEN = "a-token-of-some-length"
PLENTY = Limits(per_minute=1_000_000)


@pytest.fixture(scope="module")
def service(made_run: Path, made_data: Path, made_results: Path) -> Service:
    return open_service(ServeRequest(str(made_run), (made_data,), made_results, "cpu"))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service, Access(), PLENTY), base_url=HERE) as client:
        yield client


@pytest.fixture(scope="module")
def files(made_raw: Path) -> list[Path]:
    return sorted((made_raw / "images").iterdir())[:6]


def sent(*paths: Path) -> list[tuple[str, tuple[str, bytes]]]:
    """Files as a form has them."""
    return [("image", (path.name, path.read_bytes())) for path in paths]


def one(content: bytes, name: str = "a.png") -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", (name, content))]


def picture_in(url: str) -> Image.Image:
    head, _, body = url.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


# The numbers.


def test_scores_are_those_of_python_to_the_last_digit(
    client: TestClient, made_run: Path, files: list[Path]
):
    expected = mmclip.load(made_run).classify([str(f) for f in files], FINDINGS).probabilities
    form = {"finding": FINDINGS}
    answer = client.post("/api/classify", files=sent(*files), data=form).json()
    assert [image["probabilities"] for image in answer["images"]] == expected.tolist()
    assert [image["name"] for image in answer["images"]] == [f.name for f in files]
    alone = client.post("/api/classify", files=sent(files[3]), data=form).json()
    assert alone["images"][0]["probabilities"] == expected[3].tolist()
    first = client.post("/api/classify", files=sent(files[3]), data={"finding": FINDINGS[:1]})
    assert first.json()["images"][0]["probabilities"] == expected[3, :1].tolist()


def test_the_command_that_is_shown_gives_the_same_numbers(
    client: TestClient, files: list[Path], tmp_path: Path
):
    path = tmp_path / "an image.png"
    path.write_bytes(files[0].read_bytes())
    answer = client.post("/api/classify", files=sent(path), data={"finding": FINDINGS}).json()
    words = shlex.split(answer["command"])[1:]
    words[words.index(path.name)] = str(path)
    words[-1] = str(tmp_path / "p.csv")
    assert command(tmp_path, *words).code == 0
    (row,) = csv.DictReader((tmp_path / "p.csv").open())
    assert [float(row[name]) for name in FINDINGS] == answer["images"][0]["probabilities"]


def test_embeddings_and_similarities_are_those_of_python(
    client: TestClient, made_run: Path, files: list[Path]
):
    model = mmclip.load(made_run)
    images, texts = model.encode_images([str(f) for f in files[:2]]), ["Clear lungs.", "A nodule."]
    got = client.post("/api/embed/image", files=sent(*files[:2])).json()
    assert got["embeddings"] == np.asarray(images).tolist()
    encoded_texts = model.encode_texts(texts)
    got = client.post("/api/embed/text", json={"texts": texts}).json()
    assert got["embeddings"] == encoded_texts.tolist()
    got = client.post("/api/similarity", files=sent(*files[:2]), data={"text": texts}).json()
    assert got["similarity"] == model.similarity(images, encoded_texts).tolist()
    assert got["logit_scale"] == model.logit_scale


def test_a_map_is_that_of_python_and_as_large_as_the_image(
    client: TestClient, made_run: Path, tmp_path: Path
):
    path = tmp_path / "large.png"
    path.write_bytes(encoded(ramp(90, 130)))
    expected = mmclip.load(made_run).explain(str(path), "pleural effusion")
    got = client.post("/api/explain", files=sent(path), data={"phrase": "pleural effusion"}).json()
    assert {k: v for k, v in got["facts"].items() if k != "warnings"} == expected.facts()
    overlay = picture_in(got["overlay"])
    assert overlay.size == (130, 90)
    alpha = np.asarray(overlay.convert("RGBA"))[..., 3]
    assert np.array_equal(alpha, np.asarray(expected.overlay().convert("RGBA"))[..., 3])
    top = np.nan_to_num(expected.values, nan=-np.inf) == np.nanmax(expected.values)
    assert (alpha[top] == 255).all() and (alpha[~top] < 255).all()
    assert (alpha[expected.values <= np.median(expected.values)] == 0).all()


def test_the_nearest_patients_are_those_of_the_command_without_the_patient_asked_for(
    client: TestClient, made_run: Path, made_data: Path, files: list[Path]
):
    asked = ModelRequest(str(made_run))
    for given, form in (
        ({"image": str(files[1])}, {"files": sent(files[1])}),
        ({"phrase": "pneumothorax"}, {"data": {"phrase": "pneumothorax"}}),
    ):
        expected = list(search(SearchRequest(asked, (made_data,), top=4, **given)).records())
        form["data"] = {**form.get("data", {}), "top": "4"}
        found = client.post("/api/search", **form).json()["found"]
        assert [{k: v for k, v in each.items() if k != "image"} for each in found] == expected
        assert picture_in(found[0]["image"]).size == (32, 32)
    assert files[1].stem not in [each["image_id"] for each in expected] or "phrase" in given


def test_each_finding_says_how_training_named_it_and_where_its_score_lies(
    client: TestClient, made_results: Path, files: list[Path]
):
    asked = [*FINDINGS, "left-handedness"]
    answer = client.post("/api/classify", files=sent(files[0]), data={"finding": asked}).json()
    known, _, other = answer["findings"]
    stored = np.load(made_results / "scores.npz")
    val, labels = stored["val_scores"][:, 0], stored["val_labels"][:, 0]
    p = answer["images"][0]["probabilities"][0]
    assert answer["images"][0]["below"][0] == {
        "all": float((val < p).mean()),
        "present": float((val[labels == 1] < p).mean()),
        "absent": float((val[labels == 0] < p).mean()),
    }
    reference = known["reference"]
    assert reference["n"] == len(val) and sum(reference["present"]) == (labels == 1).sum()
    assert known["threshold"] is not None and known["seen"] == "report"
    assert other == {
        "finding": "left-handedness", "seen": "none", "threshold": None, "reference": None,
    }  # fmt: skip
    assert answer["images"][0]["below"][2] is None


def test_reference_scores_of_another_prompt_set_or_model_are_not_taken(
    service: Service, made_run: Path, made_results: Path, tmp_path: Path
):
    assert set(service.references) == {"default"}
    older = next(iter(sorted((made_run / "checkpoints").iterdir())))
    with pytest.raises(ValueError, match="another model, run or step"):
        open_service(ServeRequest(str(older), (), made_results, "cpu"))
    assert open_service(ServeRequest(str(made_run), (), None, "cpu")).references == {}


@pytest.mark.parametrize("change", [{"format": 1}, {"note": "edited"}])
def test_results_that_cannot_be_read_beside_a_run_are_told_once(
    made_run: Path, made_results: Path, tmp_path: Path, change: dict, caplog
):
    run = tmp_path / "run"
    shutil.copytree(made_run, run)
    shutil.copytree(made_results, run / "test")
    assert open_service(ServeRequest(str(run), (), None, "cpu")).references and not caplog.text
    path = run / "test/results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert open_service(ServeRequest(str(run), (), None, "cpu")).references == {}
    assert caplog.text.count("give no reference scores") == 1 and str(path) in caplog.text


def test_words_that_the_model_cannot_read_are_told_each_time(client: TestClient, files: list[Path]):
    form = {"finding": ["xyzzyq effusion"]}
    answers = [client.post("/api/classify", files=sent(f), data=form).json() for f in files[:2]]
    assert "xyzzyq" in " ".join(answers[0]["warnings"])
    assert answers[1]["warnings"] == answers[0]["warnings"]
    refused = client.post("/api/classify", files=sent(files[0]), data={"finding": ["\u4e2d\u6587"]})
    assert refused.status_code == 422 and "\u4e2d\u6587" in refused.json()["error"]


# Images of every kind, and files that attack.


def test_the_image_that_is_shown_is_the_one_that_the_model_reads(client: TestClient):
    pixels = np.arange(600, 600 + 24 * 32, dtype=np.uint16).reshape(24, 32)
    filed = {"WindowCenter": 900, "WindowWidth": 200}
    for name, content in {
        "a.png": encoded(ramp()), "b.tif": encoded(ramp(), "TIFF"), "c.dcm": dicom(pixels, **filed),
    }.items():  # fmt: skip
        answer = client.post("/api/image", files=one(content, name))
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-image-kind"] == ("dicom" if name == "c.dcm" else "raster")
        shown = np.asarray(Image.open(io.BytesIO(answer.content)))
        expected = decoding.refuse_blank(shown)
        assert np.array_equal(shown, expected) and shown.shape == (24, 32)
    values = client.post("/api/image/values", files=one(dicom(pixels, **filed), "c.dcm"))
    said = json.loads(values.headers["x-values"])
    found = np.frombuffer(values.content, "<u2").reshape(said["height"], said["width"])
    np.testing.assert_array_equal(found * said["step"] + said["low"], pixels)
    assert said["window"] == [900, 200]
    assert client.post("/api/image/values", files=one(encoded(ramp()))).status_code == 204


NOISE = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)
LOOP = bytes.fromhex("0000000c6a5020200d0a870a") + bytes(200)


def attacks() -> dict[str, bytes]:
    """Files that are no images, each by what it does."""
    looped = pydicom.dcmread(io.BytesIO(dicom(ramp())))
    looped.file_meta.TransferSyntaxUID = uid.JPEG2000
    looped.PixelData = encapsulate([LOOP])
    looped["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    looped.save_as(file, enforce_file_format=True)
    whole = dicom(ramp())
    return {
        "loop.dcm": file.getvalue(),
        "huge.png": huge_png(20_000),
        "cut.dcm": whole[: len(whole) - 300],
        "cut.png": encoded(NOISE)[:3000],
        "empty.png": b"",
        "text.png": b"no image at all",
        "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "blank.png": encoded(np.full((30, 30), 7, np.uint8)),
        "zeros.dcm": whole[:400] + bytes(1_000_000),
    }


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "DECODE_CPU_S", 1.0)


def test_files_that_attack_are_refused_by_name_and_the_next_image_is_answered(
    service: Service, files: list[Path], impatient: None
):
    with TestClient(create_app(service, Access(), PLENTY), base_url=HERE) as client:
        for name, content in attacks().items():
            answer = client.post(
                "/api/classify", files=one(content, name), data={"finding": FINDINGS}
            )
            assert answer.status_code == 422, name
            assert answer.json()["error"].startswith(f"{name}: "), name
            assert "\n" not in answer.json()["error"]
            for path in ("/api/image", "/api/image/values") if name != "loop.dcm" else ():
                # The values of what is no DICOM are none; those of a DICOM may exceed its window.
                assert client.post(path, files=one(content, name)).status_code in (422, 204), name
        sound = client.post("/api/classify", files=sent(files[0]), data={"finding": FINDINGS})
        assert sound.status_code == 200


def test_a_name_of_a_file_is_never_a_path(client: TestClient):
    form = {"finding": FINDINGS}
    for name in ("../../etc/passwd", "C:\\secret\\a.png", "a\x00\x1b[31m.png", "", "x" * 5000):
        answer = client.post("/api/classify", files=one(encoded(ramp()), name or "-"), data=form)
        if answer.status_code in (400, 422):  # no part of a form may have such a name
            assert "\n" not in answer.json()["error"]
            continue
        shown = answer.json()["images"][0]["name"]
        assert shown.isprintable() and 0 < len(shown) <= 200
        assert "/" not in shown and "\\" not in shown


def test_no_file_of_this_machine_can_be_named_as_a_prompt_set(client: TestClient, tmp_path: Path):
    path = tmp_path / "own.toml"
    path.write_text("secret = 1")
    form = {"finding": FINDINGS, "prompts": str(path)}
    answer = client.post("/api/classify", files=one(encoded(ramp())), data=form)
    assert answer.status_code == 422
    assert "is none of default, pair, sentence" in answer.json()["error"]


def test_nothing_of_an_image_is_stored_or_logged(
    client: TestClient,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rolled = []
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: rolled.append(self))
    large = np.random.default_rng(0).integers(0, 4096, (1200, 1200), dtype=np.uint16)
    sound, broken = dicom(large), dicom(ramp(), PhotometricInterpretation=NAME)
    assert len(sound) > 2_000_000
    caplog.clear()  # of what pydicom said of the file that was made
    answers = []
    with caplog.at_level(logging.DEBUG):
        for content in (sound, broken):
            for path, data in (
                ("/api/classify", {"finding": FINDINGS}), ("/api/image", {}), ("/api/search", {}),
                ("/api/explain", {"phrase": "nodule"}), ("/api/image/values", {}),
            ):  # fmt: skip
                answers.append(client.post(path, files=one(content, "a.dcm"), data=data))
    assert [a.status_code for a in answers] == [200] * 5 + [422] * 5
    said = caplog.text + "".join(capfd.readouterr()) + "".join(a.text for a in answers[5:])
    assert "Doe" not in said and NUMBER not in said and "a.dcm" not in caplog.text
    assert not rolled and not list(tmp_path.iterdir())


# Who may ask, and how much.


@pytest.mark.parametrize("phrase", ["pnemothorax of Smith", "xyzzy, Smith", "There is a Smith."])
def test_no_word_of_a_request_reaches_the_log(
    client: TestClient, files: list[Path], phrase: str, capfd: pytest.CaptureFixture[str]
):
    shown = logging.StreamHandler()
    logging.getLogger().addHandler(shown)
    try:
        with unlogged():
            asked = {"finding": phrase, "phrase": phrase, "text": phrase}
            for route in ("classify", "explain", "similarity", "search"):
                image = {} if route == "search" else {"files": {"image": files[0].read_bytes()}}
                answer = client.post(f"/api/{route}", data=asked, **image)
                assert answer.status_code == 200, answer.json()
                if route == "classify":
                    assert phrase in " ".join(answer.json()["warnings"])
        assert "Smith" not in "".join(capfd.readouterr())
        logging.getLogger("mmclip.embed").warning("behind it")
        assert "behind it" in capfd.readouterr().err
    finally:
        logging.getLogger().removeHandler(shown)


def test_the_host_header_must_name_this_machine(service: Service):
    client = TestClient(create_app(service, Access(), PLENTY), base_url=HERE)
    for host in ("127.0.0.1", "127.0.0.1:7860", "localhost:7860", "LOCALHOST", "[::1]:7860"):
        assert client.get("/health", headers={"Host": host}).status_code == 200, host
    for host in (
        "evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", "192.168.0.5",
        "127.0.0.1@evil.example", "", "[", "0.0.0.0", "127.0.0.1 evil.example",
    ):  # fmt: skip
        for path in ("/health", "/", "/api/model"):
            answer = client.get(path, headers={"Host": host})
            assert answer.status_code == 403, host
            assert "does not name this machine" in answer.json()["error"]
    named = Access(TOKEN, frozenset({"ward.hospital"}))
    client = TestClient(create_app(service, named, PLENTY), base_url=HERE)
    for host, status in (("ward.hospital:80", 200), ("10.1.2.3", 200), ("evil.example", 403)):
        assert client.get("/health", headers={"Host": host}).status_code == status


def test_names_in_host_headers():
    assert name_in("A.b:80") == "a.b" and name_in("[::1]:7") == "::1" and name_in("[") == ""


def test_requests_of_other_sites_are_refused(client: TestClient):
    image = one(encoded(ramp()))
    for headers in (
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://127.0.0.1:8000"},
        {"Origin": "http://evil.example", "Sec-Fetch-Mode": "navigate"},
        {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "cross-site"},
    ):  # fmt: skip
        answer = client.post("/api/image", files=image, headers=headers)
        assert answer.status_code == 403, headers
        assert "another site" in answer.json()["error"]
        assert not [name for name in answer.headers if name.startswith("access-control")]
    own = {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"}
    answer = client.post("/api/image", files=image, headers=own)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
    linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=linked).status_code == 200  # a link to the page may be followed
    asked = client.options("/api/image", headers={"Origin": "http://evil.example"})
    assert asked.status_code == 403


def test_a_token_opens_the_api_and_nothing_else_does(service: Service):
    client = TestClient(create_app(service, Access(TOKEN), PLENTY), base_url=HERE)
    for given in ("", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ", "Basic x"):
        answer = client.get("/api/model", headers={"Authorization": given} if given else {})
        assert answer.status_code == 401, given
        assert answer.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in answer.text
    assert client.get("/api/model", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.get("/", headers={}).status_code == 200  # the page, which asks for the token
    assert client.get("/api/openapi.json").status_code == 401


def test_every_answer_forbids_caches_other_sites_and_scripts_from_elsewhere(client: TestClient):
    for path in ("/", "/main.js", "/health", "/api/model", "/nothing", "/api/nothing"):
        answer = client.get(path)
        assert "default-src 'none'" in answer.headers["content-security-policy"], path
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_too_much_is_refused_with_the_rule(service: Service):
    limits = Limits(request_bytes=20_000, images=2, texts=3, text_chars=40, per_minute=10**6)
    client = TestClient(create_app(service, Access(), limits), base_url=HERE)
    small, form = encoded(ramp()), {"finding": FINDINGS}

    def refusal(status: int, **given) -> str:
        answer = client.post("/api/classify", **given)
        assert answer.status_code == status, answer.text
        return answer.json()["error"]

    assert "at most" in refusal(413, files=one(encoded(NOISE)), data=form)

    def streamed() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1000)

    assert "MB" in refusal(413, content=streamed())  # without a Content-Length
    assert "3 images, at most 2" in refusal(422, files=one(small) * 3, data=form)
    assert "4 findings, at most 3" in refusal(
        422, files=one(small), data={"finding": ["a", "b", "c", "d"]}
    )
    assert "at most 40" in refusal(422, files=one(small), data={"finding": ["x" * 41]})
    assert "is empty" in refusal(422, files=one(small), data={"finding": [" "]})
    assert "no finding is named" in refusal(422, files=one(small))
    assert "image" in refusal(422, data=form)
    assert "named twice" in refusal(422, files=one(small), data={"finding": ["Mass", "mass"]})


def test_a_flood_of_requests_is_slowed_down_by_address():
    limit = RateLimit(8)
    assert [limit.wait_s("a") for _ in range(2)] == [0, 0]
    assert 0 < limit.wait_s("a") <= 7.5
    assert limit.wait_s("b") == 0
    for i in range(5000):
        limit.wait_s(str(i))
    assert len(limit._left) <= 1000


def test_the_rate_limit_answers_429_and_when_to_come_again(service: Service):
    client = TestClient(create_app(service, Access(), Limits(per_minute=8)), base_url=HERE)
    found = [client.get("/api/model") for _ in range(3)]
    assert [answer.status_code for answer in found] == [200, 200, 429]
    assert 1 <= int(found[2].headers["retry-after"]) <= 9
    assert client.get("/health").status_code == 200


def test_an_answer_that_takes_too_long_is_503(service: Service, monkeypatch: pytest.MonkeyPatch):
    wait = threading.Event()
    monkeypatch.setattr(DecodeWorker, "decode", lambda *_: wait.wait(10) and ramp())
    limits = Limits(timeout_s=0.3, per_minute=10**6)
    with TestClient(create_app(service, Access(), limits), base_url=HERE) as client:
        answer = client.post("/api/image", files=one(encoded(ramp())))
        wait.set()
    assert answer.status_code == 503 and "more than 0.3 s" in answer.json()["error"]


# Batches.


def test_requests_that_wait_for_the_model_are_answered_by_one_call():
    async def run() -> tuple[list[list[int]], list[list[list[int]]]]:
        batcher = Batcher(max_items=4)
        calls: list[list[int]] = []
        held = threading.Event()

        def double(items: list[int]) -> list[list[int]]:
            calls.append(items)
            held.wait(5)
            return [[2 * item] for item in items]

        asked = [asyncio.create_task(batcher.ask("k", [0], double))]
        await asyncio.sleep(0.05)
        for key, items in (("k", [1]), ("other", [2]), ("k", [3, 4]), ("k", [5, 6]), ("k", [7])):
            asked.append(asyncio.create_task(batcher.ask(key, items, double)))
        await asyncio.sleep(0.05)
        held.set()
        found = await asyncio.gather(*asked)
        batcher.close()
        return calls, found

    calls, found = asyncio.run(run())
    assert found == [[[0]], [[2]], [[4]], [[6], [8]], [[10], [12]], [[14]]]
    assert calls == [[0], [1, 3, 4, 7], [2], [5, 6]]


def test_a_fault_of_one_batch_is_told_to_its_requests_alone_and_who_left_is_passed_over():
    async def run() -> list[object]:
        batcher = Batcher(max_waiting=3)
        held = threading.Event()

        def wait(items: list[int]) -> list[int]:
            held.wait(5)
            return items

        def fail(items: list[int]) -> list[int]:
            raise ValueError("no such finding")

        first = asyncio.create_task(batcher.ask("a", [1], wait))
        await asyncio.sleep(0.05)
        bad = asyncio.create_task(batcher.ask("b", [2], fail))
        gone = asyncio.create_task(batcher.ask("c", [3], fail))
        good = asyncio.create_task(batcher.ask("a", [4], wait))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await batcher.ask("d", [5], wait)
        gone.cancel()
        held.set()
        found = await asyncio.gather(first, bad, good, return_exceptions=True)
        batcher.close()
        return [*found, batcher.n_calls]

    first, bad, good, n_calls = asyncio.run(run())
    assert (first, good, n_calls) == ([1], [4], 3)
    assert isinstance(bad, ValueError)


def test_concurrent_requests_have_the_numbers_of_single_ones(client: TestClient, files: list[Path]):
    form = {"finding": FINDINGS}
    alone = [client.post("/api/classify", files=sent(f), data=form).json() for f in files]
    found: dict[int, dict] = {}

    def ask(i: int) -> None:
        path = files[i % len(files)]
        found[i] = client.post("/api/classify", files=sent(path), data=form).json()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(16)] == [alone[i % len(files)] for i in range(16)]


# What is served, and the command.


def test_the_model_says_what_it_is_and_that_it_knows_little(client: TestClient, made_run: Path):
    about = client.get("/api/model").json()
    assert about["name"] == str(made_run) and about["has_text_encoder"] and about["has_reference"]
    assert "not a medical device" in about["caution"]
    assert "knows next to nothing" in about["caution"]
    assert about["index"]["n_images"] > 0
    assert {each["name"] for each in about["prompt_sets"]} == {"default", "pair", "sentence"}
    assert client.get("/health").json() == {"status": "ok"}


def test_the_description_has_every_route_with_examples_and_refusals(client: TestClient):
    described = client.get("/api/openapi.json").json()
    assert set(described["paths"]) == {
        "/health", "/api/model", "/api/classify", "/api/embed/image", "/api/embed/text",
        "/api/similarity", "/api/explain", "/api/search", "/api/image", "/api/image/values",
    }  # fmt: skip
    assert "examples" in json.dumps(described["components"]["schemas"])
    for path, methods in described["paths"].items():
        if path.startswith("/api"):
            (operation,) = methods.values()
            assert {"401", "403", "413", "422", "429", "503"} <= set(operation["responses"])
            assert operation["description"]


def test_the_page_is_whole_and_asks_for_nothing_from_elsewhere(client: TestClient):
    page = client.get("/").text
    named = re.findall(r'(?:src|href)="([^"#]+)"', page)
    for name in named:
        assert client.get(f"/{name}").status_code == 200, name
    for name in (
        "/",
        "/main.js",
        "/api.js",
        "/viewer.js",
        "/findings.js",
        "/files.js",
        "/style.css",
    ):
        text = client.get(name).text
        others = set(re.findall(r"https?://[^\s\"'<>)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not others, name
        assert "innerHTML" not in text  # reports and names are text, never markup


def test_unknown_paths_and_methods_are_json_errors(client: TestClient):
    assert client.get("/api/nothing").status_code == 404
    assert "openapi.json" in client.get("/api/nothing").json()["error"]
    answer = client.get("/api/classify")
    assert answer.status_code in (404, 405) and "error" in answer.json()
    assert client.post("/api/embed/text", content=b"{").status_code == 422
    assert client.post("/api/embed/text", json={"texts": []}).status_code == 422


def test_a_fine_tuned_model_scores_and_says_what_it_cannot(
    made_run: Path, made_data: Path, tmp_path: Path
):
    out = tmp_path / "tuned"
    ended = command(
        tmp_path, "finetune", "--model", made_run, "--data", made_data, "--out", out, "--method",
        "probe", "--fraction", "1", "--seed", "0", "--n-resamples", "10",
        "--finding", "pleural effusion",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    path = next(out.glob("probe*"))
    served = open_service(ServeRequest(str(path), device="cpu"))
    client = TestClient(create_app(served, Access(), PLENTY), base_url=HERE)
    about = client.get("/api/model").json()
    assert not about["has_text_encoder"] and about["prompt_sets"] == []
    image = one(encoded(ramp()))
    answer = client.post("/api/classify", files=image).json()
    assert [each["finding"] for each in answer["findings"]] == ["pleural effusion"]
    assert answer["findings"][0]["seen"] == "label"
    for path, data in (("/api/explain", {"phrase": "nodule"}), ("/api/embed/image", {})):
        refused = client.post(path, files=image, data=data)
        assert refused.status_code == 422 and "without a text encoder" in refused.json()["error"]


@pytest.mark.parametrize("save", [save_clip, save_siglip], ids=lambda save: save.__name__)
def test_a_model_of_others_is_served_with_its_own_numbers(
    save: Callable[[Path], Path], made_data: Path, files: list[Path], tmp_path: Path
):
    path = save(tmp_path / "other")
    served = open_service(ServeRequest(str(path), (made_data,), None, "cpu"))
    client = TestClient(create_app(served, Access(), PLENTY), base_url=HERE)
    about = client.get("/api/model").json()
    assert about["has_text_encoder"] and not about["has_reference"] and about["index"]
    answer = client.post("/api/classify", files=sent(*files[:2]), data={"finding": FINDINGS}).json()
    expected = mmclip.load(path).classify([str(f) for f in files[:2]], FINDINGS).probabilities
    assert [image["probabilities"] for image in answer["images"]] == expected.tolist()
    assert [each["seen"] for each in answer["findings"]] == [None, None]
    assert client.post("/api/search", files=sent(files[0])).status_code == 200
    got = client.post("/api/explain", files=sent(files[0]), data={"phrase": "nodule"}).json()
    facts = mmclip.load(path).explain(str(files[0]), "nodule").facts()
    assert {k: v for k, v in got["facts"].items() if k != "warnings"} == facts


@pytest.mark.parametrize("rule", ["similarity", "sigmoid"])
def test_another_rule_is_served_as_it_is_asked_for(rule: str, files: list[Path], tmp_path: Path):
    path = save_siglip(tmp_path / "other")
    served = open_service(ServeRequest(str(path), device="cpu", rule=rule))
    client = TestClient(create_app(served, Access(), PLENTY), base_url=HERE)
    assert client.get("/api/model").json()["zeroshot_rule"] == rule
    answer = client.post("/api/classify", files=sent(files[0]), data={"finding": FINDINGS}).json()
    expected = mmclip.load(path, rule=rule).classify(str(files[0]), FINDINGS).probabilities
    assert answer["images"][0]["probabilities"] == expected[0].tolist()
    assert f"--rule {rule}" in answer["command"]


def test_the_commands_that_are_shown_can_be_typed(client: TestClient, files: list[Path]):
    odd = [("image", ("an image; rm -rf.png", files[0].read_bytes()))]
    for path, data in (
        ("classify", {"finding": ["it's 'here'"], "prompts": "sentence"}),
        ("explain", {"phrase": "a 'nodule'", "score": "prompt_pair"}), ("search", {}),
    ):  # fmt: skip
        said = client.post(f"/api/{path}", files=odd, data=data).json()["command"]
        program, name, *words = shlex.split(said)
        assert program == "mmclip" and "an image; rm -rf.png" in words
        COMMANDS[(name,)].make_context("mmclip", words)  # raises where it cannot be parsed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nothing"], "nothing"),
        ([], "`mmclip demo`, then `mmclip serve`"),
        (["--model", "RUN", "--host", "0.0.0.0"], "add --token"),
        (["--model", "RUN", "--token", "short"], "at least 16"),
        (["--model", "RUN", "--index", "nothing"], "nothing"),
        (["--model", "RUN", "--reference", "nothing"], "nothing"),
        (["--model", "RUN", "--host", "256.0.0.1", "--token", TOKEN], "cannot listen"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
):
    monkeypatch.chdir(tmp_path)
    given = [str(made_run) if word == "RUN" else word for word in arguments]
    if "--host" not in given:
        given += ["--port", "0"]
    ended = command(tmp_path, "serve", *given, "--cpu")
    assert said in ended.error()
