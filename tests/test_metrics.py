import sys
import time

import pytest

from shardemb.metrics import progress


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, True), (1.1, True), (1.1, False)])
def test_a_bar_appears_for_what_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seconds: float, shown: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # a log file gets a line every ten seconds
    clock = [time.time()]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    seen = []
    for item in progress(range(4), "filling table 'people'", 1000, shown):
        clock[0] += seconds
        seen.append(item)
    assert seen == [0, 1, 2, 3]
    text = capsys.readouterr().err
    assert ("filling table 'people'" in text) == (seconds > 0 and shown)
    assert "4.00k" in text or not text
