"""A headless Chromium that a test drives with real keys and clicks, by the DevTools protocol over a pipe.

Messages are JSON, each ended by a NUL byte: the browser reads them from descriptor 3 and writes to 4
(`--remote-debugging-pipe`), so no port, no driver and no client library is needed.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe", "about:blank",
]  # fmt: skip
KEY_CODES = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32, "Backspace": 8}


def find_chromium() -> str:
    """The browser's path; skips the test where there is none. Where apt may be used, it is installed."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        install = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(install, capture_output=True, check=False, env=environment)
        found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium here, and it cannot be installed: apt-get install chromium")
    return found


class Browser:
    """One browser with one page."""

    def __init__(self, chromium: str, folder: Path) -> None:
        read_commands, self._commands = os.pipe()
        self._events, write_events = os.pipe()
        command = [chromium, *ARGUMENTS[:-1], f"--user-data-dir={folder}/profile", ARGUMENTS[-1]]
        # Through a shell, which puts our descriptors at the numbers that the browser expects.
        arrange = f'exec "$@" 3<&{read_commands} 4>&{write_events}'
        self._process = subprocess.Popen(
            ["bash", "-c", arrange, "bash", *command],
            pass_fds=(read_commands, write_events),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(read_commands)
        os.close(write_events)
        self._stream = os.fdopen(self._events, "rb")
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session = ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")

    def close(self) -> None:
        self._stream.close()
        os.close(self._commands)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda found: found.get("id") == number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _wait(self, wanted: Any) -> dict[str, Any]:
        while True:
            while b"\0" not in self._buffer:
                chunk = self._stream.read1(1 << 20)
                assert chunk, "the browser has ended"
                self._buffer += chunk
            line, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(line)
            if wanted(message):
                return message

    def open(self, path: Path | str) -> None:
        """Open a file, and wait until it is loaded."""
        self.send("Page.navigate", url=path.as_uri() if isinstance(path, Path) else path)
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def reload(self) -> None:
        self.send("Page.reload")
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression, of a promise what it resolves to."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for what the browser does in a task of its own, such as the toggle event of a <details>."""
        self.run(f"new Promise(done => {{ const look = () => {condition} ? done() : setTimeout(look, 5); look(); }})")

    def press(self, key: str) -> None:
        """Press and release a key: a letter, or a name of KEY_CODES."""
        text = {"Enter": "\r", "Tab": "", "Escape": "", "Backspace": ""}.get(key, key)
        code = KEY_CODES.get(key, ord(key[0].upper()))
        shared = {"key": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **shared)
        self.send("Input.dispatchKeyEvent", type="keyUp", **shared)

    def click(self, selector: str) -> None:
        """Press the left button of the mouse over the middle of an element, which must be seen there."""
        x, y, on_top = self.run(
            f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: "center"}}); const r = e.getBoundingClientRect();
            const x = r.x + r.width / 2, y = r.y + r.height / 2, top = document.elementFromPoint(x, y);
            return [x, y, e === top || e.contains(top)] }})()"""
        )
        assert on_top, f"{selector} is not to be seen"
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int = 900) -> None:
        """Show the page as a screen of this size does; a phone's width, too, which no window has."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, *, dark: bool = False, media: str = "") -> None:
        """Prefer dark or light; `media`: screen or print."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self, path: Path) -> None:
        found = self.send("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def faults(self) -> list[str]:
        """The serious and critical faults that axe-core finds on the page as it stands: rule and place."""
        if self.run("typeof axe") == "undefined":
            self.run(axe_script() + "; true")
        found = self.run(
            """axe.run({resultTypes: ["violations"]}).then(found => found.violations
            .filter(one => ["serious", "critical"].includes(one.impact))
            .flatMap(one => one.nodes.map(node => `${one.id}: ${node.target} ${node.failureSummary}`)))"""
        )
        return list(found)


def axe_script() -> str:
    """axe-core's source from the package that brings it; skips the test without."""
    package = importlib.util.find_spec("axe_core_python")
    if package is None or package.origin is None:
        pytest.skip("no axe-core here: pip install axe-core-python")
    return (Path(package.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def screenshot_folder(tmp_path: Path) -> Path:
    """Where CI keeps them (SCREENSHOTS=FOLDER), else the test's own folder."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
