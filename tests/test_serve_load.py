"""`mmclip serve` under load and under whatever its own description allows to be sent."""

import gc
import http.client
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings

import mmclip
from mmclip.serving.app import create_app
from mmclip.serving.limits import Access, Limits
from mmclip.serving.service import ServeRequest, open_service
from tests.test_serve import attacks

pytestmark = pytest.mark.slow

FINDINGS = ("pleural effusion", "pneumothorax")


@pytest.fixture(scope="module")
def port(made_run: Path, made_data: Path) -> Iterator[int]:
    """A server on this process's own threads, whose rate is not limited."""
    service = open_service(ServeRequest(str(made_run), (made_data,), None, "cpu"))
    app = create_app(service, Access(), Limits(per_minute=1_000_000))
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, access_log=False, log_level="warning", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield bound.getsockname()[1]
    server.should_exit = True
    thread.join()


def form(content: bytes, name: str) -> tuple[bytes, str]:
    """A multipart body and its content type."""
    mark = "0123456789abcdef"
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="finding"\r\n\r\n{finding}\r\n'.encode()
        for finding in FINDINGS
    ]
    head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
    parts.append(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + content)
    return b"".join(parts) + f"\r\n--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


def classify(port: int, name: str, content: bytes) -> tuple[int, dict]:
    body, kind = form(content, name)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/api/classify", body, {"Content-Type": kind})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def resident_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_500_requests_16_at_once_a_third_of_them_attacks_and_memory_stays_flat(
    port: int, made_run: Path, made_raw: Path
):
    files = {path.name: path.read_bytes() for path in sorted((made_raw / "images").iterdir())[:12]}
    paths = [str(made_raw / "images" / name) for name in files]
    expected = mmclip.load(made_run, "cpu").classify(paths, FINDINGS).probabilities.tolist()
    of = dict(zip(files, expected, strict=True))
    bad = {name: content for name, content in attacks().items() if name != "loop.dcm"}
    loop = {"loop.dcm": attacks()["loop.dcm"]}  # takes 20 s of CPU before it is killed
    chooser = random.Random(0)
    asked = [chooser.choice(list((bad if i % 3 == 0 else files).items())) for i in range(500)]
    asked[30] = next(iter(loop.items()))

    def ask(request: tuple[str, bytes]) -> tuple[str, int, dict]:
        return request[0], *classify(port, *request)

    memory_kb = []
    counts: Counter[int] = Counter()
    with ThreadPoolExecutor(16) as threads:
        for start in range(0, len(asked), 100):
            for name, status, answer in threads.map(ask, asked[start : start + 100]):
                counts[status] += 1
                if name in files:
                    assert status == 200, (name, answer)
                    assert answer["images"][0]["probabilities"] == of[name]
                else:
                    assert status == 422 and answer["error"].startswith(f"{name}: "), name
            gc.collect()
            memory_kb.append(resident_kb())
    assert set(counts) == {200, 422} and sum(counts.values()) == 500
    # The first hundred fill caches and pools; what comes after must not add to them.
    assert memory_kb[-1] - memory_kb[0] < 30_000, memory_kb


def test_whatever_the_description_allows_is_never_a_500(port: int):
    import schemathesis  # it takes seconds, and the quick suite reads this file, too

    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/api/openapi.json")
    counts: Counter[str] = Counter()
    bounds = settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    for result in schema.get_all_operations():
        operation = result.ok()

        @bounds
        @given(case=operation.as_strategy())
        def run(case: schemathesis.Case) -> None:
            answer = case.call()
            counts[case.operation.path] += 1
            assert answer.status_code < 500, (case.operation.path, answer.text)

        run()
    assert len(counts) == 10 and min(counts.values()) >= 1
