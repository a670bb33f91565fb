"""Headless Chromium over its debugging pipe: opens pages, says what they ask for and complain of, takes pictures."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60


def chromium() -> str | None:
    """The browser of this machine; None where it has none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab.

    Attributes:
        requests: addresses that it asked for, in order.
        complaints: what it wrote to its console, and errors of scripts and of the content policy.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._rest, self._number = reading, writing, b"", 0
        self._events: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a file in a window of this size."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read()

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path: Path) -> Path:
        """A picture of the whole page."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Give the tab a command, and wait for its answer."""
        return self._send(method, self._session, **parameters)

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._writing, json.dumps({**message, "sessionId": session} if session else message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            assert time.monotonic() < end, "the browser does not answer"
            part = os.read(self._reading, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        text, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
            self._note(message["method"], message["params"])
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(params)[:500])
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])


@contextmanager
def browsing() -> Iterator[Page]:
    """A tab in a browser that is ended afterwards."""
    browser = chromium()
    assert browser is not None
    from_us, ours = os.pipe()
    theirs, to_them = os.pipe()
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
    arguments += ["--disable-background-networking", "--hide-scrollbars"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:

        def wired() -> None:  # the browser reads from 3 and writes to 4
            kept = os.dup(theirs), os.dup(ours)
            os.dup2(kept[0], 3)
            os.dup2(kept[1], 4)

        process = subprocess.Popen(
            [browser, *arguments, f"--user-data-dir={profile}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=wired,
            close_fds=False,
        )
        os.close(theirs)
        os.close(ours)
        try:
            yield Page(from_us, to_them)
        finally:
            os.close(to_them)
            process.terminate()
            process.wait(SECONDS)
            os.close(from_us)
