"""The hub is asked once whether it answers, and within seconds. All servers here are on this machine."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time

import datasets
import huggingface_hub.utils
import pytest
from huggingface_hub import constants

from models import hub
from tests.conftest import ROOT


class Server(http.server.ThreadingHTTPServer):
    """Answers every request with one status, and remembers which they were."""

    def __init__(self, status):
        self.status, self.requests = status, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(handler):
                self.requests.append(handler.path)
                handler.send_response(status)
                handler.end_headers()

            def log_message(handler, *arguments):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def serve():
    servers = []

    def start(status=200):
        servers.append(Server(status))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def silent():
    """The address of something that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refusing():
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def online(monkeypatch):
    """As in a process of a user who has set nothing. Returns a function that says where the hub is."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for variable in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    huggingface_hub.utils.close_session()  # its client has read the proxies
    hub.go_offline_if_unreachable.cache_clear()
    yield lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)
    hub.go_offline_if_unreachable.cache_clear()
    huggingface_hub.utils.close_session()


# A refusal is an answer as well: what is wrong then the library says by itself.
@pytest.mark.parametrize("status", [200, 401, 403, 404, 405, 429, 501])
def test_hub_that_answers(online, serve, status):
    server = serve(status)
    online(server.url)
    assert hub.go_offline_if_unreachable() == ""
    assert len(server.requests) == 1
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


# A gateway that says so in the hub's stead, or the hub in trouble: the library would repeat its requests.
@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_hub_in_trouble(online, serve, status):
    online(serve(status).url)
    assert "cannot be reached" in hub.go_offline_if_unreachable()
    assert constants.HF_HUB_OFFLINE


def test_address_that_refuses(online, refusing):
    online(refusing)
    start = time.monotonic()
    assert hub.go_offline_if_unreachable() == f"{refusing} cannot be reached"
    assert time.monotonic() - start < 4
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


def test_address_that_never_answers(online, silent):
    online(silent)
    start = time.monotonic()
    assert silent in hub.go_offline_if_unreachable()
    assert time.monotonic() - start < 8
    assert constants.HF_HUB_OFFLINE


def test_name_that_is_looked_up_without_limit(online, monkeypatch):
    asked, end = threading.Event(), threading.Event()

    def lookup(*arguments, **options):
        asked.set()
        end.wait(60)
        raise OSError("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    start = time.monotonic()
    reason = hub.unreachable("http://hub.invalid", seconds=0.5)
    end.set()
    assert reason == "http://hub.invalid cannot be reached" and asked.is_set()
    assert time.monotonic() - start < 4


def test_it_is_asked_once(online, serve, refusing):
    server = serve()
    online(server.url)
    hub.go_offline_if_unreachable()
    online(refusing)
    assert hub.go_offline_if_unreachable() == ""
    assert len(server.requests) == 1 and not constants.HF_HUB_OFFLINE


def test_offline_mode_asks_nobody(online, serve, monkeypatch):
    server = serve()
    online(server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.go_offline_if_unreachable() == hub.unreachable(server.url) == "offline mode is on"
    assert server.requests == []


def test_the_network_can_be_insisted_on(online, refusing, monkeypatch):
    online(refusing)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert hub.go_offline_if_unreachable() == ""
    assert not constants.HF_HUB_OFFLINE


def test_proxy_of_the_environment(online, serve, monkeypatch):
    proxy = serve()
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "")
    online("http://hub.invalid")
    assert hub.go_offline_if_unreachable() == ""
    assert [url.rstrip("/") for url in proxy.requests] == ["http://hub.invalid"]


OFFLINE = """
import json, sys, time
import models
from models.encoders import FrozenEncoder
import datasets
result = {"lazy": "transformers" not in sys.modules}
for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        FrozenEncoder(name, 16)
    except ValueError as error:
        result[name] = [time.monotonic() - start, str(error)]
start = time.monotonic()
try:
    datasets.load_dataset("someone/images")
except Exception as error:
    result["datasets"] = [time.monotonic() - start, str(error)]
print(json.dumps(result))
"""


def test_hub_names_fail_within_seconds_without_network(tmp_path, refusing):
    """As a user without network meets it: nothing set, nothing cached."""
    # The largest models, since what takes time is to fill them with random numbers; I-JEPA is not on the hub.
    timm_names = ["dinov2-vit-g-reg", "ijepa-vit-h", "timm:vit_giant_patch14_dinov2", "CLIP-ViT-L"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if "proxy" not in name.lower() and name not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    }
    # No address is reached but through the proxy, which is not there.
    environment |= {
        "HF_ENDPOINT": refusing,
        "http_proxy": refusing,
        "https_proxy": refusing,
        "no_proxy": "127.0.0.1",
        "HF_HOME": str(tmp_path),
        "TORCH_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE, *timm_names, "hf:someone/vit"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result.pop("lazy")
    assert result.keys() == {*timm_names, "hf:someone/vit", "datasets"}
    for name, (seconds, message) in result.items():
        assert seconds < 40, f"{name}: {seconds:.0f} s"  # 1 or 2 of them where nothing else runs
        if name != "datasets":
            assert f"weights of encoder {name!r} could not be loaded" in message
            assert "--encoder" in message and "hf:FOLDER" in message
        if name in timm_names:
            assert "--encoder-weights FILE" in message and "timm's save_for_hf" in message
        if name not in ("ijepa-vit-h", "datasets"):
            assert f"{refusing} cannot be reached" in message
    assert "vit_huge_patch14_gap_224" in result["ijepa-vit-h"][1]
