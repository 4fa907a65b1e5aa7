import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import shardemb
from shardemb.utils.memory import available_bytes, container_bytes, free_bytes, total_bytes
from shardemb.utils.progress import progress, progress_bar


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, True), (1.1, True), (1.1, False)])
def test_a_bar_appears_for_what_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seconds: float, shown: bool
) -> None:
    monkeypatch.setattr(
        sys.stderr, "isatty", lambda: True
    )  # a log file gets a line every ten seconds
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


V1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "inactive_file 7\ntotal_inactive_file {}",
    str(2**63 - 4096),
)
V2 = ("memory.max", "memory.current", "anon 90\ninactive_file {}", "max")


@pytest.mark.parametrize(
    ("base", "lines", "names"),
    [("memory", "3:cpuset:/x\n9:cpu,memory:/job/step\n0::/\n", V1), ("", "0::/job/step\n", V2)],
)
def test_a_container_has_the_memory_of_its_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, lines: str, names: tuple[str, ...]
) -> None:
    limit, used, stat, unlimited = names
    groups, root = tmp_path / "cgroup", tmp_path / "root"
    found = partial(container_bytes, root, groups)
    assert found() is None  # not Linux
    groups.write_text(lines)
    assert found() is None

    def group(path: str, most: str, now: int, cached: int) -> None:
        folder = root / base / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in ((limit, most), (used, now), ("memory.stat", stat.format(cached))):
            (folder / name).write_text(f"{text}\n")

    group("", "900", 300, 40)  # a container's own, where it does not see those that it lies in
    assert found() == (900, 640)
    group("", unlimited, 300, 40)
    assert found() is None
    group("job", "1000", 300, 50)
    group("job/step", unlimited, 100, 0)
    assert found() == (1000, 750)
    group("job/step", "2000", 1900, 0)
    assert found() == (1000, 100)
    monkeypatch.setattr("shardemb.utils.memory.container_bytes", found)
    assert (total_bytes(), available_bytes(), free_bytes(torch.device("cpu"))) == (1000, 100, 100)
    with pytest.raises(
        MemoryError, match=r"table 'people', rank 0 of 1: 100 rows .*, 100 are free"
    ):
        shardemb.Embedding(100, shape=8, name="people")


def test_a_bar_leaves_tqdm_as_it_is() -> None:
    lock = tqdm.get_lock()
    progress_bar(total=1, disable=False, leave=False).close()
    assert tqdm.get_lock() is lock
    assert progress_bar(total=1, disable=True).get_lock() is not lock
