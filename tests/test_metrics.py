import time

import pytest

from shardemb.metrics import progress


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, True), (1.1, True), (1.1, False)])
def test_a_bar_appears_for_what_takes_long(capsys: pytest.CaptureFixture[str], seconds: float, shown: bool) -> None:
    seen = []
    for item in progress(range(4), "filling table 'people'", 1000, shown):
        time.sleep(seconds)
        seen.append(item)
    assert seen == [0, 1, 2, 3]
    text = capsys.readouterr().err
    assert ("filling table 'people'" in text) == (seconds > 0 and shown)
    assert "4.00k" in text or not text
