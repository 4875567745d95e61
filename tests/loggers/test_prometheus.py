"""The endpoint is that of Prometheus' text format, also while a run trains."""

from __future__ import annotations

import math
import socket
import urllib.error
import urllib.request
from functools import partial

import pytest
import torch
from torch import nn

from ditty_di.callbacks import Callback
from ditty_di.data import Loader
from ditty_di.loggers import MetricsProcessor, Prometheus
from ditty_di.training.trainer import Trainer


def scraped(port, path="/metrics"):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def values(page):
    return {line.split()[0]: float(line.split()[1]) for line in page.splitlines() if line[0] != "#"}


class Scrape(Callback):
    def __init__(self, endpoint):
        self.endpoint, self.found = endpoint, []

    def on_step_end(self, trainer):
        self.found.append(values(scraped(self.endpoint.port)))


def test_a_running_training_is_scraped(runtime):
    endpoint = Prometheus(":0")
    scrape = Scrape(endpoint)
    points = torch.randn(64, 2)
    trainer = Trainer(
        runtime=runtime,
        model=nn.Linear(2, 1),
        loss_fn=nn.MSELoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        dataloader=partial(Loader, [(p, p[:1]) for p in points], micro_batch_size=8),
        logger=MetricsProcessor([endpoint], log_interval=2),
        callbacks={"scrape": scrape},
        max_steps=4,
    )
    trainer.train()
    port = endpoint.port
    trainer.close()
    assert [found["ditty_di_step"] for found in scrape.found] == [1, 2, 2, 4]
    assert scrape.found[-1]["ditty_di_max_steps"] == 4
    assert scrape.found[1]["ditty_di_loss"] > 0 and scrape.found[1]["ditty_di_lr"] == 0.1
    with pytest.raises(urllib.error.URLError):
        scraped(port)


def test_the_page_is_prometheus_text_format():
    endpoint = Prometheus(":0", labels={"run": 'a "b"\\'})
    endpoint.start(step=0, max_steps=9)
    endpoint.write(3, {"loss": 1.5, "validation/loss": math.nan, "grad_norm": math.inf})
    endpoint.text(3, "sample", "words")
    page = scraped(endpoint.port)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        scraped(endpoint.port, "/etc/passwd")
    endpoint.close()
    assert page.splitlines()[:2] == [
        "# TYPE ditty_di_grad_norm gauge",
        'ditty_di_grad_norm{run="a \\"b\\"\\\\"} +Inf',
    ]
    parser = pytest.importorskip("prometheus_client.parser")
    found = {f.name: f.samples[0] for f in parser.text_string_to_metric_families(page)}
    assert found["ditty_di_loss"].value == 1.5 and found["ditty_di_step"].value == 3
    assert math.isnan(found["ditty_di_validation_loss"].value)
    assert found["ditty_di_loss"].labels == {"run": 'a "b"\\'}


def test_only_programs_on_this_machine_can_connect_unless_told():
    local, open_to_all = Prometheus(":0"), Prometheus("0.0.0.0:0")
    for endpoint in (local, open_to_all):
        endpoint.start(step=0, max_steps=1)
    addresses = [endpoint._server.server_address[0] for endpoint in (local, open_to_all)]
    for endpoint in (local, open_to_all):
        endpoint.close()
    assert addresses == ["127.0.0.1", "0.0.0.0"]


def test_a_port_in_use_is_said_in_one_line_and_the_training_goes_on(runtime, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        metrics = MetricsProcessor([Prometheus(f":{port}")], log_interval=1)
        metrics.start(model_parts=[nn.Linear(2, 2)], max_steps=3, runtime=runtime)
        metrics.log(1, {"loss": 1.0})
    (said,) = caplog.messages
    assert f":{port} cannot be listened on (Address already in use)" in said
    assert "the training goes on" in said and "logger.loggers.prometheus.address=:9401" in said


@pytest.mark.parametrize("address", ["9400", "localhost", ":http", ":99999"])
def test_an_address_without_a_port_is_refused(address):
    with pytest.raises(ValueError, match=r"write HOST:PORT, or :PORT"):
        Prometheus(address)
