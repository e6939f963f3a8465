"""What the fuzzer once failed on: answered or refused, at once, by name."""

import signal

import pytest

from kolmo.cli import main
from validation.corpus import CORPUS


@pytest.mark.parametrize("what", CORPUS)
def test_what_once_failed(what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, text = CORPUS[what]
    (tmp_path / "e.toml").write_text(text, encoding="utf-8", errors="surrogateescape")

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, 10.0)
    try:
        assert main([command, "e.toml", "--quiet"]) in (0, 1, 2)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "mistake in kolmo" not in shown.err
    assert "Timeout" not in shown.err
