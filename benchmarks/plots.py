"""Draws a benchmark's result.

``python benchmarks/plots.py RESULT.json ...`` writes PNG files beside each.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Drawing = Callable[[dict[str, Any]], dict[str, Figure]]


def _figure(
    title: str, document: Mapping[str, Any], columns: int = 1, height: float = 4.0
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 * columns + 1, height), layout="constrained")
    FigureCanvasAgg(figure)
    where = (
        f"{document['machine']['cores']} cores, {document['machine']['cpu']}, torch"
        f" {document['versions'].get('torch')}"
    )
    figure.suptitle(f"{title}\n{where}, {document['date']}", fontsize=10)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _bars(axes: Axes, values: Mapping[str, float], label: str, log: bool = False) -> None:
    names = list(values)[::-1]
    bars = axes.barh(names, [values[name] for name in names], color="tab:blue")
    axes.bar_label(bars, fmt="{:,.3g}", padding=3, fontsize=8)
    axes.set_xlabel(label)
    axes.tick_params(labelsize=8)
    if log:
        axes.set_xscale("log")
    axes.margins(x=0.15)


def _step(document: dict[str, Any]) -> dict[str, Figure]:
    records = [
        record
        for record in document["sections"].get("A", [])
        if record["baseline"] == "FBGEMM" and record["ratio"] is not None
    ]
    if not records:
        return {}
    kinds = sorted({(record["ids"], record["kind"]) for record in records})
    figure, axes = _figure(
        "a training step against FBGEMM's table, CPU time", document, len(kinds), 3.5
    )
    for place, (ids, kind) in zip(axes, kinds, strict=True):
        chosen = {r["name"]: r["ratio"] for r in records if (r["ids"], r["kind"]) == (ids, kind)}
        _bars(place, chosen, f"time over FBGEMM's, {ids:,} {kind} ids")
    return {"": figure}


def _train(document: dict[str, Any]) -> dict[str, Figure]:
    figure, (axes,) = _figure("training on a synthetic graph", document)
    _bars(
        axes,
        {name: found["triples_per_s"] for name, found in document["synthetic"].items()},
        "triples a second (log)",
        True,
    )
    return {"": figure}


def _rank(document: dict[str, Any]) -> dict[str, Figure]:
    figure, (axes,) = _figure(
        f"exact ranking at {document['rows']:,} x {document['dim']}, one thread", document
    )
    shares = {
        f"{r['scorer']}, {r['ranks']}": r["share_of_the_product"] for r in document["one worker"]
    }
    _bars(axes, shares, "share of the matrix product's speed")
    return {"": figure}


def _checkpoint(document: dict[str, Any]) -> dict[str, Figure]:
    figure, (axes,) = _figure(
        f"a checkpoint of {document['rows']:,} x {document['dim']}, beside the disk itself",
        document,
    )
    _bars(axes, document["files"]["gigabytes_per_s"], "GB a second")
    return {"": figure}


def _scaling(document: dict[str, Any]) -> dict[str, Figure]:
    drawn = {}
    ways = {f"weak, {name}": found for name, found in document.get("weak", {}).items()}
    ways |= {"strong": document["strong"]} if "strong" in document else {}
    if ways:
        drawn["ranks"], axes = _figure(
            "training with more ranks (hollow: more ranks than cores)", document, len(ways)
        )
        for place, (name, found) in zip(axes, ways.items(), strict=True):
            _ranks(place, name, found)
        drawn["model"], axes = _figure("what the plan predicts, and what was measured", document, 2)
        cases = {
            f"{name}, {ranks}": case
            for name, found in ways.items()
            for ranks, case in found.items()
            if ranks != "2 alone"
        }
        _compare(axes[0], cases, "step_ms", "predicted_step_ms", "ms a step")
        several = {name: case for name, case in cases.items() if case["ranks"] > 1}
        _compare(
            axes[1],
            several,
            "sent_bytes_per_rank",
            "predicted_sent_bytes_per_rank",
            "bytes that a rank sends in a step",
        )
    if "growth" in document:
        drawn["growth"], (left, right) = _figure("more rows, one rank", document, 2)
        found = list(document["growth"].values())
        rows = [one["rows"] for one in found]
        left.plot(rows, [one["step_ms"] for one in found], "o-", label="measured")
        left.plot(
            rows,
            [one["predicted_step_ms"] for one in found],
            "x--",
            color="tab:gray",
            label="predicted",
        )
        left.set(
            xscale="log",
            xlabel="rows",
            ylabel=f"ms a step of 1024 triples, {found[0]['dim']} floats a row",
            ylim=(0, None),
        )
        left.legend()
        right.plot(
            rows,
            [one["resident_bytes"] for one in found],
            "o-",
            label="resident, beyond the bare process",
        )
        limit = [one["rows"] * one["rows_and_state_bytes_per_row"] for one in found]
        right.plot(rows, limit, "--", color="tab:gray", label="rows and state")
        right.set(xscale="log", yscale="log", xlabel="rows", ylabel="bytes")
        right.legend()
    if "modelled" in document:
        kinds = document["modelled"]
        drawn["modelled"], axes = _figure(
            "MODELLED, not measured: ComplEx, dim 128, 4096 triples a rank", document, len(kinds)
        )
        for place, (name, told) in zip(axes, kinds.items(), strict=True):
            for rows in sorted({one["rows"] for one in told["found"]}):
                chosen = [one for one in told["found"] if one["rows"] == rows and one["fits"]]
                line = [one["ranks"] for one in chosen], [one["triples_per_s"] for one in chosen]
                place.plot(*line, "o--", label=f"{rows:.0e} rows, where they fit")
            place.set(
                xscale="log",
                yscale="log",
                xlabel="ranks",
                ylabel="triples a second, modelled",
                title=name,
            )
            place.title.set_fontsize(8)
            place.legend(fontsize=8)
    return drawn


def _ranks(axes: Axes, name: str, found: Mapping[str, Any]) -> None:
    cases = {ranks: case for ranks, case in found.items() if ranks != "2 alone"}
    base, numbers = found["1"]["triples_per_s"], [case["ranks"] for case in cases.values()]
    axes.plot(numbers, [base * number for number in numbers], ":", color="tab:gray", label="ideal")
    axes.plot(numbers, [case["triples_per_s"] for case in cases.values()], "-", color="tab:blue")
    for case in cases.values():
        face = "none" if case["oversubscribed"] else "tab:blue"
        axes.plot(case["ranks"], case["triples_per_s"], "o", color="tab:blue", markerfacecolor=face)
    if "2 alone" in found:
        axes.plot(
            2, found["2 alone"]["triples_per_s"], "x", color="tab:red", label="two processes alone"
        )
    axes.set(xlabel="ranks", ylabel="triples a second", title=name, ylim=(0, None), xticks=numbers)
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)


def _compare(
    axes: Axes, cases: Mapping[str, Mapping[str, Any]], measured: str, said: str, label: str
) -> None:
    places: Sequence[float] = range(len(cases))
    axes.barh(
        [p - 0.2 for p in places],
        [case[measured] for case in cases.values()],
        0.4,
        label="measured",
    )
    axes.barh(
        [p + 0.2 for p in places],
        [case[said] for case in cases.values()],
        0.4,
        label="predicted",
        color="tab:gray",
    )
    axes.set_yticks(list(places), list(cases), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(fontsize=8)


#: by the beginning of the file's name
DRAWINGS: dict[str, Drawing] = {
    "step": _step,
    "train": _train,
    "rank": _rank,
    "checkpoint": _checkpoint,
    "scaling": _scaling,
}


def draw(path: Path) -> list[Path]:
    """Draw a result if there is a drawing for it, and return the pictures' files."""
    document = json.loads(path.read_text())
    drawing = DRAWINGS.get(path.stem.split("_")[0])
    written = []
    for name, figure in drawing(document).items() if drawing else ():
        written.append(path.with_name(f"{path.stem}{'_' * bool(name)}{name}.png"))
        figure.savefig(written[-1], dpi=100)
    return written


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(*draw(Path(argument)), sep="\n")
