"""What the tests of the loopback Hub share."""

import json
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from optvq_hf import OptVQModel
from optvq_hf.training.digests import weights_digest


WEIGHTS = bytes(range(256)) * 400


def sent(hub, method, part) -> list[int]:
    """Statuses of the requests of this test whose path contains `part`."""
    return [status for used, path, status in hub.requests if used == method and part in path]


def call(hub, method, path, body=b"", token=None) -> tuple[int, dict]:
    """A request without any client of the Hub in between."""
    connection = HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, json.loads(answer) if answer else {}


def raises_status(status):
    return pytest.raises(HfHubHTTPError, check=lambda error: error.response.status_code == status)


def move_codes(run) -> OptVQModel:
    """Changes the weights, and says in the records that they are of these."""
    model = OptVQModel.from_pretrained(run)
    before = weights_digest(model)
    with torch.no_grad():
        model.quantizer.embedding.weight.add_(1)
    model.save_pretrained(run)
    records = [path for path in run.iterdir() if path.suffix in (".json", ".yaml", ".jsonl")]
    for path in records:
        path.write_text(path.read_text().replace(before, weights_digest(model)))
    return model


def fails(command, argv, capsys) -> str:
    """The one line that it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command.main([str(word) for word in argv])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 1 and ": error: " in line
    return line
