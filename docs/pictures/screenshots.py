"""The pictures of the page, the report and a lineage, from the project's last run.

    .venv/bin/python docs/pictures/screenshots.py

Needs chromium or chrome; starts the server by itself and stops it.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHOWN = "twemoji"  # source of the pictures, whose licence (CC-BY) asks for no more than its credit
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ASKED = (
    "picture={picture}&caption=&answer=What%20is%20the%20skin%20tone%3F&judge=a%20woman%20tipping%20a%20hand%20with%20dark%20skin%20tone"
    "&search=a%20handshake%20with%20medium%20and%20light%20skin%20tones"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=5099)
    parser.add_argument("--picture", type=int, default=7, help="which of the first held-out pictures the page shows")
    parser.add_argument("--model", default="models:/blip-captioner@champion", help="whose lineage is drawn")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed")

    def shoot(name: str, address: str, width: int, height: int) -> None:
        with tempfile.TemporaryDirectory() as profile:
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            command += [f"--user-data-dir={profile}", "--virtual-time-budget=60000", f"--window-size={width},{height}"]
            subprocess.run(
                [*command, f"--screenshot={HERE / name}", address], check=True, capture_output=True, timeout=300
            )
        with Image.open(HERE / name) as picture:  # 256 colours are all that these pages have
            picture.quantize(256, dither=Image.Dither.NONE).save(HERE / name, optimize=True)
        sys.stdout.write(f"{HERE / name}\n")

    kedro = Path(sys.executable).with_name("kedro")
    shoot("report.png", (ROOT / "data" / "08_reporting" / "report.html").as_uri(), 1000, 1400)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "lineage.html"
        subprocess.run([kedro, "lineage", options.model, "--page", page], cwd=ROOT, check=True, capture_output=True)
        shoot("lineage.png", page.as_uri(), 760, 700)
    server = subprocess.Popen([kedro, "serve", "--port", str(options.port), "--source", SHOWN], cwd=ROOT)
    try:
        address = f"http://127.0.0.1:{options.port}/"
        wait_for(f"{address}api/models", server)
        asked = ASKED.format(picture=options.picture)
        shoot("page.png", f"{address}?{asked}", 1100, 1150)
        shoot("page_on_a_phone.png", f"{address}?{asked}", 500, 1100)
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address: str, server: subprocess.Popen, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"{address} did not answer")


if __name__ == "__main__":
    main()
