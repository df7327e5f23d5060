"""Tries the page of an installed mmclip[serve] on what smoke.py left, in Chromium if it is there.

It imports nothing but Python's own library.
"""

import csv
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

FINDING = "pleural effusion"


def main() -> None:
    """Starts the server, asks for the page and a score, and ends it."""
    here = Path(sys.argv[1] if len(sys.argv) > 1 else "smoke")
    started = ["mmclip", "serve", "--model", here / "run", "--index", here / "data"]
    server = subprocess.Popen(
        [*map(str, started), "--port", "0", "--cpu"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), url
        with (here / "scores.csv").open(encoding="utf-8", newline="") as file:
            row = next(csv.DictReader(file))
        assert classify(url, Path(row["image_id"])) == float(row[FINDING])
        said = "page and API work"
        browser = shutil.which("chromium") or shutil.which("chromium-browser")
        if browser is not None:
            given = ["--headless", "--no-sandbox", "--virtual-time-budget=10000", "--dump-dom", url]
            shown = subprocess.run([browser, *given], capture_output=True, text=True, timeout=120)
            assert 'data-ready="true"' in shown.stdout, shown.stderr[-2000:]
            said += ", and the page loads in Chromium"
        print(f"mmclip serve: {said}")
    finally:
        server.terminate()
        server.wait(30)


def classify(url: str, image: Path) -> float:
    """The probability that the API gives an image."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert b"<title>MMCLIP</title>" in answer.read()
    mark = "mark-between-parts"
    head = f'--{mark}\r\nContent-Disposition: form-data; name="finding"\r\n\r\n{FINDING}\r\n'
    head += f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    body = head.encode() + image.read_bytes() + f"\r\n--{mark}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    request = urllib.request.Request(f"{url}api/classify", body, kind)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["images"][0]["probabilities"][0]


if __name__ == "__main__":
    main()
