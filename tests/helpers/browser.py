"""Pages as Chromium shows them: at any width, light or dark, with what a script finds in them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal

__all__ = ["CHROMIUM", "Shot", "look"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The browser, if there is one."""

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
]
NARROWEST = 500
"""A window is not narrower; a page is, in a frame."""

Theme = Literal["light", "dark"]
Shot = dict[str, Any]
"""What the script has found."""


def look(page: Path, script: str, width: int, height: int, theme: Theme = "light", picture: Path | None = None) -> Shot:
    """Open a page in a frame, run a script in it once its charts are drawn, and take a picture if asked.

    Args:
        page: the file.
        script: the body of a function of `page` (a document) and `view` (its window) that returns plain values.
        width: of the frame, in pixels.
        height: of the frame.
        theme: that the system asks for.
        picture: the file to write.
    """
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(
            f"""<!doctype html><meta charset="utf-8"><style>body {{ margin: 0 }} iframe {{ border: 0 }}</style>
            <iframe src="{page.resolve().as_uri()}" width="{width}" height="{height}"></iframe>
            <pre id="found" hidden></pre><script>
            const frame = document.querySelector("iframe");
            const wait = () => {{
              const page = frame.contentDocument, view = frame.contentWindow;
              if (!page || !page.documentElement.dataset.ready) return setTimeout(wait, 50);
              const found = (() => {{ {script} }})();
              document.getElementById("found").textContent = JSON.stringify({{...page.documentElement.dataset, ...found}});
            }};
            frame.addEventListener("load", wait);
            </script>""",
            encoding="utf-8",
        )
        options = [*FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={max(width, NARROWEST)},{height}"]
        options += [f"--blink-settings=preferredColorScheme={int(theme == 'light')}", "--virtual-time-budget=60000"]
        command = [CHROMIUM, *options, "--dump-dom", frame.as_uri()]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        if picture is not None:
            command = [CHROMIUM, *options, f"--screenshot={picture}", frame.as_uri()]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
    match = re.search(r'<pre id="found"[^>]*>(.+?)</pre>', said, flags=re.S)
    assert match is not None, "the page was never ready"
    found: Shot = json.loads(html.unescape(match[1]))
    return found
