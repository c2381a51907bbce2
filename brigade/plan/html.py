"""The answer as one HTML file without network: tables, and plots as inline SVG. English or Chinese."""

from collections.abc import Callable, Sequence
from html import escape
from itertools import accumulate

from brigade.plan.ask import serve
from brigade.plan.explained import Line, explain
from brigade.plan.memory import memory
from brigade.plan.plots import COLOURS, Plot, bar
from brigade.plan.question import Answer, Option
from brigade.plan.rates import Calibration
from brigade.plan.reasons import NAMES, ROLES
from brigade.plan.say import Say, say
from brigade.plan.search import search
from brigade.plan.serving import Workload
from brigade.plan.units import Slo

FAMILY_COLOUR = dict(zip(("boxes", "cluster", "wide mixed", "two kinds", "pipeline"), COLOURS, strict=False))
PROMISES = (0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1)
STYLE = (
    "body{font:15px/1.5 system-ui,'Noto Sans CJK SC','PingFang SC','Microsoft YaHei',sans-serif;max-width:64em;"
    "margin:2em auto;padding:0 1em;color:#222}table{border-collapse:collapse;width:100%}"
    "td,th{border-bottom:1px solid #ddd;padding:.3em .5em;text-align:left;vertical-align:top}"
    "td{overflow-wrap:break-word}td:last-child{min-width:13em}td.n{white-space:nowrap}.wide{overflow-x:auto}.lead{font-size:1.2em}"
    "svg{width:100%;height:auto}svg text{font:12px system-ui,'Noto Sans CJK SC','PingFang SC',sans-serif}"
)
Tell = Callable[[Say | str], str]
"""Says something in the report's language."""


def report(a: Answer, c: Calibration, lang: str = "en") -> str:
    """The whole file, in a language of LANGUAGES."""

    def t(text: Say | str) -> str:
        return text.to(lang) if isinstance(text, Say) else text

    best = a.options[0]
    q = a.question
    w = Workload(best.users, q.n_in, q.n_out, q.hit)
    sections = (
        (say("Options"), _options(a.options, t)),
        (say("Throughput per card against speed per user"), _pareto(a, c, t)),
        (say("Time of a step by term"), _terms(best, c, w, t)),
        (say("Memory of a card"), _memory(best, t)),
        (say("Nodes needed by number of users"), _crossover(a, t) + _paragraph(t(a.crossover))),
        (say("To note"), "".join(_paragraph(t(note)) for note in a.notes)),
        (say("Assumed"), f"<ul>{''.join(f'<li>{escape(t(x))}</li>' for x in a.assumptions)}</ul>"),
    )
    title = t(say("Which deployment should these servers run?"))
    body = "".join(f"<h2>{escape(t(head))}</h2>{part}" for head, part in sections)
    every = f"<details><summary>{escape(t(say('Every term')))}</summary>{_lines(explain(best, c, w), t)}</details>"
    return (
        f'<!doctype html><html lang="{lang}"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{_question(a, t)}"
        f"<p class=lead>{escape(t(a.sentence))}</p>{body}{every}</body></html>\n"
    )


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _question(a: Answer, t: Tell) -> str:
    q = a.question
    have = " + ".join(f"{s.n} x {s.per_node} x {s.device.name}" for s in q.fleets)
    return _paragraph(
        t(
            say(
                "{model} on {have}: {users:,} users, {n_in:,} input and {n_out:,} output tokens, {hit:.0%} of the "
                "input cached; {tpot:g} ms a token and {ttft:g} s to the first at p90",
                model=q.model.name, have=have, users=q.users, n_in=q.n_in, n_out=q.n_out, hit=q.hit,
                tpot=q.slo.tpot * 1e3, ttft=q.slo.ttft,
            )
        )
    )  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """`numbers`: columns that are not broken."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if i in numbers else ''}>{escape(x)}</td>" for i, x in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<div class=wide><table><tr>{top}</tr>{body}</table></div>"


def _options(options: Sequence[Option], t: Tell) -> str:
    rows = [
        (
            f"{o.model}: {t(o.name)}",
            ("" if o.fits else t(say("only")) + " ")
            + f"{o.most_users:,.0f} ({o.most_users_range[0]:,.0f}-{o.most_users_range[1]:,.0f})",
            f"{o.layout.nodes:g}",
            f"{o.tokens_per_gpu:,.0f}",
            "/".join(f"{x:.2f}" for x in o.ttft) + f" s ×÷ {o.ttft_factor:.2g}",
            "/".join(f"{x * 1e3:.0f}" for x in o.tpot) + f" ms ×÷ {o.tpot_factor:.2g}",
            "-" if o.cost is None else f"${o.cost:.2f} ({o.cost_range[0]:.2f}-{o.cost_range[1]:.2f})",
            f"{o.kilowatts:,.0f}",
            t(o.why),
        )
        for o in options
    ]
    head = (
        *(say("deployment"), say("most users (80 %)"), say("nodes"), say("output tok/s/card")),
        *(say("TTFT p50/p90/p99 (80 %)"), say("TPOT p50/p90/p99 (80 %)"), say("$/M output"), "kW", say("why")),
    )
    return _table([t(h) for h in head], rows, (2, 3, 6, 7))


def _pareto(a: Answer, c: Calibration, t: Tell) -> str:
    """For each promise of time per token, the best throughput per card of each family on the first kind of servers."""
    q = a.question
    fleet = q.fleets[0]
    f = q.model.facts(q.precision)
    w = Workload(q.users, q.n_in, q.n_out, q.hit)
    curves: dict[str, list[tuple[float, float]]] = {}
    for tpot in PROMISES:
        found = search(f, fleet, q.engine, c, w, Slo(tpot, q.slo.ttft), q.can_draft, q.loads)
        for family in FAMILY_COLOUR:
            rates = [x.rate * q.n_out / x.n_gpus for x in found.layouts if x.family == family]
            if rates:
                curves.setdefault(family, []).append((1 / tpot, max(rates)))
    if not curves:
        return _paragraph(t(say("no layout keeps any of these promises")))
    top = max(y for line in curves.values() for _, y in line)
    plot = Plot(1 / PROMISES[0], top, t(say("tokens/s of one user")), t(say("output tok/s/card")))
    for family, points in curves.items():  # who keeps a promise keeps every looser one
        speeds = sorted(points, reverse=True)
        best = accumulate((rate for _, rate in speeds), max)
        plot.line([(speed, rate) for (speed, _), rate in zip(speeds, best, strict=True)], FAMILY_COLOUR[family])
    plot.legend([(t(NAMES[family]), FAMILY_COLOUR[family]) for family in curves], left=400)
    return plot.svg()


def _terms(o: Option, c: Calibration, w: Workload, t: Tell) -> str:
    served = serve(o.layout, c, w)
    out = []
    for name, step in ("decode", served.decode), ("prefill", served.prefill):
        parts: dict[str, float] = {}
        for term in step.terms:
            parts[term.name] = max(parts.get(term.name, 0.0), term.seconds * 1e3)
        how = say("computing and sending overlap") if step.overlapped else say("one after the other")
        head = say("{phase}: {ms:.1f} ms ({how})", phase=ROLES[name], ms=step.seconds * 1e3, how=how)
        out.append(_paragraph(t(head)) + bar([(t(say(n)), v) for n, v in parts.items()], "ms"))
    return "".join(out)


def _memory(o: Option, t: Tell) -> str:
    out = []
    for u, _ in o.layout.units:
        m = memory(u.pool.f, u.grid, u.pool.device, drafts=u.pool.setup.draft)
        parts = [
            ("attention, dense, gate", m.dense), ("routed experts", m.experts), ("shared experts", m.shared),
            ("head and embedding", m.head), ("kept free", m.reserved), ("cache", max(m.free, 0.0)),
        ]  # fmt: skip
        head = say("{role}: {device}", role=ROLES[u.role], device=u.pool.device.name)
        out.append(_paragraph(t(head)) + bar([(t(say(n)), v / 1e9) for n, v in parts], "GB"))
    return "".join(out)


def _crossover(a: Answer, t: Tell) -> str:
    if not a.curve:
        return ""
    most = max(users for users, _ in a.curve)
    top = max(n for _, row in a.curve for n in row.values())
    plot = Plot(float(most), top, t(say("concurrent users")), t(say("nodes")))
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
            names.append((t(NAMES[family]), colour))
    plot.legend(names, left=90)  # the curves rise to the right, so there is room at the left
    return plot.svg()


def _lines(lines: Sequence[Line], t: Tell) -> str:
    rows = [(t(x.part), t(x.name), t(x.value), t(x.formula), t(x.source)) for x in lines]
    return _table(["", *(t(h) for h in (say("term"), say("value"), say("formula"), say("source")))], rows, (2,))
