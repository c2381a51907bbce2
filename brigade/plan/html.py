"""The answer as one HTML file without network: tables, and plots as inline SVG. English or Chinese."""

from collections.abc import Sequence
from html import escape

from brigade.plan.ask import Answer, Option, serve
from brigade.plan.explained import explain
from brigade.plan.memory import memory
from brigade.plan.rates import Calibration
from brigade.plan.search import Slo, search
from brigade.plan.serving import Workload

COLOURS = ("#2f6f9f", "#c8553d", "#5b8e3e", "#8a5aa8", "#d19a2a", "#4aa3a3", "#a33d6b", "#777777", "#3d5aa3", "#b08968")
FAMILY_COLOUR = {"boxes": COLOURS[0], "wide mixed": COLOURS[2], "cluster": COLOURS[1]}
PROMISES = (0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1)

ZH = {
    "Which deployment should these servers run?": "这些服务器该怎么部署？",
    "Options": "方案",
    "deployment": "部署",
    "most users (80 %)": "最多用户（80 % 区间）",
    "output tok/s/card": "每卡输出 tok/s",
    "nodes": "节点数",
    "Throughput per card against speed per user": "每卡吞吐与单用户速度",
    "tokens/s of one user": "单用户 tok/s",
    "Time of a step by term": "一步的时间构成",
    "Memory of a card": "单卡显存",
    "Nodes needed by number of users": "不同用户数所需节点",
    "concurrent users": "并发用户数",
    "Every term": "每一项",
    "Assumed": "假设",
    "boxes": "一体机",
    "wide mixed": "跨节点专家并行（混合）",
    "cluster": "专家并行集群（预填充与解码分离）",
    "why": "理由",
    "formula": "公式",
    "source": "出处",
    "value": "数值",
    "term": "项",
}


def report(a: Answer, c: Calibration, lang: str = "en") -> str:
    """The whole file. `lang`: 'en' or 'zh' (headings and axes; sentences stay in English)."""

    def t(text: str) -> str:
        return ZH.get(text, text) if lang == "zh" else text

    best = a.options[0]
    q = a.question
    w = Workload(best.users, q.n_in, q.n_out, q.hit)
    parts = [
        f"<h1>{escape(t('Which deployment should these servers run?'))}</h1>",
        f"<p class=lead>{escape(a.sentence)}</p>",
        f"<h2>{escape(t('Options'))}</h2>{_options(a.options, t)}",
        f"<h2>{escape(t('Throughput per card against speed per user'))}</h2>{_pareto(a, c, t)}",
        f"<h2>{escape(t('Time of a step by term'))}</h2>{_terms(best, c, w)}",
        f"<h2>{escape(t('Memory of a card'))}</h2>{_memory(best)}",
        f"<h2>{escape(t('Nodes needed by number of users'))}</h2>{_crossover(a, t)}<p>{escape(a.crossover)}</p>",
        *(f"<p>{escape(note)}</p>" for note in a.notes),
        f"<h2>{escape(t('Assumed'))}</h2><ul>{''.join(f'<li>{escape(x)}</li>' for x in a.assumptions)}</ul>",
        f"<details><summary>{escape(t('Every term'))}</summary>{_lines(best, c, w, t)}</details>",
    ]
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
        "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.3em .5em;"
        "text-align:left;vertical-align:top}.lead{font-size:1.2em}"
        "svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif}"
    )
    return (
        f'<!doctype html><html lang="{lang}"><meta charset="utf-8"><title>brigade plan</title><style>{style}</style>'
        + "".join(parts)
        + "</html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(x)}</td>" for x in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _options(options: Sequence[Option], t) -> str:  # type: ignore[no-untyped-def]
    rows = [
        (
            f"{o.model}: {o.name}",
            f"{o.most_users:,.0f} ({o.most_users_range[0]:,.0f}-{o.most_users_range[1]:,.0f})",
            f"{o.layout.nodes:g}",
            f"{o.tokens_per_gpu:,.0f}",
            "/".join(f"{x:.2f}" for x in o.ttft) + " s",
            "/".join(f"{x * 1e3:.0f}" for x in o.tpot) + " ms",
            "-" if o.cost is None else f"${o.cost:.2f}",
            f"{o.kilowatts:,.0f}",
            o.why,
        )
        for o in options
    ]
    head = (
        "deployment",
        "most users (80 %)",
        "nodes",
        "output tok/s/card",
        "TTFT p50/p90/p99",
        "TPOT p50/p90/p99",
        "$/M",
        "kW",
        "why",
    )
    return _table([t(h) for h in head], rows)


class _Plot:
    """Axes and marks of one SVG, 720 x 320."""

    WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 320, 70, 45, 15, 20

    def __init__(self, x_most: float, y_most: float, x_name: str, y_name: str) -> None:
        self.x_most, self.y_most = x_most or 1.0, y_most or 1.0
        self.out: list[str] = []
        for i in range(5):
            x, y = self.x_most * i / 4, self.y_most * i / 4
            self.out.append(f'<path d="M{self.x(0):.1f} {self.y(y):.1f}H{self.x(self.x_most):.1f}" stroke="#e4e4e4"/>')
            self.text(self.LEFT - 6, self.y(y) + 4, f"{y:,.4g}", "end")
            self.text(self.x(x), self.HEIGHT - self.BOTTOM + 16, f"{x:,.4g}", "middle")
        self.text((self.WIDTH + self.LEFT) / 2, self.HEIGHT - 8, x_name, "middle")
        self.out.append(
            f'<text transform="translate(14 {self.HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_name)}</text>"
        )

    def x(self, value: float) -> float:
        return self.LEFT + value / self.x_most * (self.WIDTH - self.LEFT - self.RIGHT)

    def y(self, value: float) -> float:
        return self.HEIGHT - self.BOTTOM - value / self.y_most * (self.HEIGHT - self.BOTTOM - self.TOP)

    def text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        self.out.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], colour: str, dots: bool = True) -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if dots:
            self.out += [
                f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in points
            ]

    def legend(self, names: Sequence[tuple[str, str]]) -> None:
        for i, (name, colour) in enumerate(names):
            y = self.TOP + 14 + 18 * i
            self.out.append(f'<rect x="{self.WIDTH - 270}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
            self.text(self.WIDTH - 252, y, name)

    def svg(self) -> str:
        return f'<svg viewBox="0 0 {self.WIDTH} {self.HEIGHT}" role="img">{"".join(self.out)}</svg>'


def _pareto(a: Answer, c: Calibration, t) -> str:  # type: ignore[no-untyped-def]
    """For each promise of time per token, the best throughput per card of each family on the first fleet."""
    q = a.question
    fleet = q.fleets[0]
    f = q.model.facts(q.precision)
    w = Workload(q.users, q.n_in, q.n_out, q.hit)
    curves: dict[str, list[tuple[float, float]]] = {}
    for tpot in PROMISES:
        found = search(f, fleet, q.engine, c, w, Slo(tpot, q.slo.ttft), q.draft and q.model.spec.n_mtp > 0, q.loads)
        for family in FAMILY_COLOUR:
            rates = [x.rate * q.n_out / (x.nodes * fleet.per_node) for x in found.layouts if x.family == family]
            if rates:
                curves.setdefault(family, []).append((1 / tpot, max(rates)))
    top = max((y for line in curves.values() for _, y in line), default=1.0)
    plot = _Plot(1 / PROMISES[0], top * 1.1, t("tokens/s of one user"), t("output tok/s/card"))
    for family, points in curves.items():
        plot.line(sorted(points), FAMILY_COLOUR[family])
    plot.legend([(t(family), FAMILY_COLOUR[family]) for family in curves])
    return plot.svg()


def _bar(parts: Sequence[tuple[str, float]], unit: str) -> str:
    """A horizontal bar in pieces, with a legend below."""
    total = sum(v for _, v in parts) or 1.0
    out, x = [], 0.0
    for i, (name, v) in enumerate(parts):
        width = 700 * v / total
        colour = COLOURS[i % len(COLOURS)]
        out.append(
            f'<rect x="{10 + x:.1f}" y="8" width="{width:.1f}" height="34" fill="{colour}">'
            f"<title>{escape(name)}</title></rect>"
        )
        column, row = i % 3, i // 3
        out.append(f'<rect x="{10 + 235 * column}" y="{54 + 20 * row}" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{28 + 235 * column}" y="{64 + 20 * row}">{escape(name)}: {v:,.3g} {unit}</text>')
        x += width
    height = 62 + 20 * -(-len(parts) // 3)
    return f'<svg viewBox="0 0 720 {height}" role="img">{"".join(out)}</svg>'


def _terms(o: Option, c: Calibration, w: Workload) -> str:
    served = serve(o.layout, c, w)
    out = []
    for name, step in ("decode", served.decode), ("prefill", served.prefill):
        parts: dict[str, float] = {}
        for term in step.terms:
            parts[term.name] = max(parts.get(term.name, 0.0), term.seconds * 1e3)
        how = "computing and sending overlap" if step.overlapped else "one after the other"
        out.append(f"<p>{name}: {step.seconds * 1e3:.1f} ms ({how})</p>" + _bar(list(parts.items()), "ms"))
    return "".join(out)


def _memory(o: Option) -> str:
    out = []
    for u, _ in o.layout.units:
        m = memory(u.pool.f, u.grid, o.device, drafts=u.pool.setup.draft)
        parts = [
            ("attention and dense", m.dense), ("routed experts", m.experts), ("shared experts", m.shared),
            ("head, embedding", m.head), ("kept free", m.reserved), ("cache", max(m.free, 0.0)),
        ]  # fmt: skip
        out.append(f"<p>{u.role}</p>" + _bar([(n, v / 1e9) for n, v in parts], "GB"))
    return "".join(out)


def _crossover(a: Answer, t) -> str:  # type: ignore[no-untyped-def]
    most = max((users for users, _ in a.curve), default=1)
    top = max((n for _, row in a.curve for n in row.values()), default=1.0)
    plot = _Plot(float(most), top * 1.1, t("concurrent users"), t("nodes"))
    names = []
    for family, colour in FAMILY_COLOUR.items():
        points: list[tuple[float, float]] = []
        before = 0.0
        for users, row in a.curve:
            if family in row:
                points += [(before, row[family]), (float(users), row[family])]
            before = float(users)
        if points:
            plot.line(points, colour, dots=False)
            names.append((t(family), colour))
    for i, (name, colour) in enumerate(names):  # the curves rise to the right, so there is room at the left
        plot.out.append(f'<rect x="90" y="{14 + 18 * i}" width="12" height="12" fill="{colour}"/>')
        plot.text(108, 24 + 18 * i, name)
    return plot.svg()


def _lines(o: Option, c: Calibration, w: Workload, t) -> str:  # type: ignore[no-untyped-def]
    rows = [(x.part, x.name, x.value, x.formula, x.source) for x in explain(o, c, w)]
    return _table(["", t("term"), t("value"), t("formula"), t("source")], rows)
