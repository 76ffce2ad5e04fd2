"""Size and speed against perplexity: two plots with their Pareto fronts, and a page that holds them and the table."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_comp.evaluation import Evaluation
from optimum_comp.report.table import comparison_rows


SIZE_PLOT, SPEED_PLOT, PAGE = "size.png", "speed.png", "report.html"

_MARKERS = "osD^vP*Xph<>"

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%;margin:1rem 0}"
)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other is at least as good as in both coordinates, by the first coordinate.

    Args:
        points: smaller is better in both; of equal ones the first counts.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def write_report(results: Mapping[str, Evaluation], folder: Path, title: str) -> Path:
    """Write two plots and a page with them and the table.

    Args:
        results: name -> measurements; those without perplexity are in the table only.
        folder: where to; made if it isn't there.
        title: of the page.

    Returns:
        The page.

    Raises:
        ImportError: matplotlib isn't installed; says how.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    known = {name: result for name, result in results.items() if result.perplexity is not None}
    sizes = {name: (result.size_bytes / 1e6, result.perplexity) for name, result in known.items()}
    speeds = {
        name: (result.decode_tokens_per_second, result.perplexity)
        for name, result in known.items()
        if result.decode_tokens_per_second is not None
    }
    images = []
    if sizes:
        images.append(_plot(sizes, folder / SIZE_PLOT, "MB on disk", larger_is_better=False))
    if speeds:
        images.append(_plot(speeds, folder / SPEED_PLOT, "tokens/s while generating", larger_is_better=True))
    page = folder / PAGE
    page.write_text(_page(results, images, title), encoding="utf-8")
    return page


def require_matplotlib() -> None:
    """Refuse before anything is measured.

    Raises:
        ImportError: matplotlib isn't installed; says how.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the report needs matplotlib: pip install 'optimum-comp[report]'. {error}") from error


def _plot(points: Mapping[str, Any], path: Path, label: str, *, larger_is_better: bool) -> Path:
    # Without pyplot: no window system is looked for, and nothing global is changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = list(points.values())
    sign = -1 if larger_is_better else 1
    front = pareto_front([(sign * x, y) for x, y in values])
    axes.plot(
        *zip(*(values[i] for i in front), strict=True), color="gray", linewidth=1, label="Pareto front", zorder=1
    )
    # Shapes as well as colours, which repeat and which not everybody can tell apart. Names beside the plot: models of
    # one size lie too close together for them.
    for index, (name, (x, y)) in enumerate(points.items()):
        axes.plot(x, y, _MARKERS[index % len(_MARKERS)], color=f"C{index % 10}", markersize=8, label=name)
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.08, y=0.1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path)
    return path


def _page(results: Mapping[str, Evaluation], images: Sequence[Path], title: str) -> str:
    header, *rows = comparison_rows(results)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    # In the page itself, so that it can be sent as one file.
    pictures = "".join(
        f'<img alt="{image.stem} against perplexity" src="data:image/png;base64,'
        f'{base64.b64encode(image.read_bytes()).decode("ascii")}">'
        for image in images
    )
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
        f"<h1>{name}</h1><table><tr>{head}</tr>{body}</table>{pictures}</html>\n"
    )
