"""The tables of a report in wandb: columns and rows as they are, and nothing without a key."""

from config.settings import WandbSettings
from trainers.run.metrics_log import log_tables


class FakeWandb:
    """Records what `log_tables` sends."""

    def __init__(self, monkeypatch):
        import wandb

        self.started, self.logged, self.finished = [], [], 0
        monkeypatch.setattr(wandb, "init", self.init)

    def init(self, **settings):
        self.started.append(settings)
        return self

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_tables_of_a_report_are_logged_as_tables(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeWandb(monkeypatch)
    rows = [["dpo", "harmful_rate", None], ["sft", "harmful_rate", 0.5]]
    tables = {"rates": (["model", "rate", "value"], rows)}
    log_tables(WandbSettings(mode="offline"), name="report", folder=str(tmp_path), tables=tables)
    (started,), (logged,) = fake.started, fake.logged
    assert (started["mode"], started["job_type"], started["dir"]) == ("offline", "evaluate", str(tmp_path))
    assert logged["rates"].columns == ["model", "rate", "value"]
    assert logged["rates"].data == rows
    assert fake.finished == 1


def test_tables_wait_for_a_key(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    fake = FakeWandb(monkeypatch)
    for settings in (WandbSettings(), WandbSettings(enabled=False, mode="online"), WandbSettings(mode="disabled")):
        log_tables(settings, name="report", folder=str(tmp_path), tables={})
    assert fake.started == []
