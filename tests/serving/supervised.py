"""What stands in for vLLM where only its dying matters: a real process with its `/health` and `/v1/models`, on command ill."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from memupdate.serving import engine as engine_module
from memupdate.serving.engine import EngineSettings

SERVER = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

folder, port = sys.argv[1], int(sys.argv[sys.argv.index("--port") + 1])
if os.path.exists(f"{folder}/broken"):
    print("ValueError: the model cannot be read", file=sys.stderr)
    sys.exit(1)
while os.path.exists(f"{folder}/slow"):
    time.sleep(0.05)
status = 200

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": "tiny"}]}).encode()
        self.send_response(status if self.path == "/health" else 200)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        global status
        if self.path == "/hang":
            time.sleep(600)
        status = 503
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSettings:
    """Settings of an engine that is the process above; `folder/broken` makes it fail to start, `folder/slow` hang there."""
    script = folder / "server.py"
    script.write_text(SERVER)

    def command(settings: EngineSettings) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, str(script), str(folder), "--port", str(settings.port)], {}

    monkeypatch.setattr(engine_module, "engine_command", command)
    monkeypatch.setattr(engine_module, "_STOP_GRACE_S", 0.5)
    return EngineSettings("tiny", "tiny", folder / "registry", folder / "logs" / "engine.log", ("down_proj",), 8)
