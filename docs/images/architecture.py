"""Draws architecture.svg beside it: python docs/images/architecture.py"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1080, 612
LIGHT = {
    "ground": "#ffffff",
    "frame": "#f6f8fa",
    "line": "#d0d7de",
    "text": "#1f2328",
    "soft": "#59636e",
    "controller": "#0969da",
    "rollout": "#1a7f37",
    "learner": "#8250df",
    "reward": "#9a6700",
    "weights": "#bf3989",
}
DARK = {
    "ground": "#0d1117",
    "frame": "#151b23",
    "line": "#3d444d",
    "text": "#f0f6fc",
    "soft": "#9198a1",
    "controller": "#4493f8",
    "rollout": "#3fb950",
    "learner": "#ab7df8",
    "reward": "#d29922",
    "weights": "#db61a2",
}
STYLE = """
text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--text) }
.title { font-weight: 600; font-size: 15px }
.soft { fill: var(--soft); font-size: 12px }
.code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 11.5px }
.frame { fill: var(--frame); stroke: var(--line) }
.box { fill: var(--ground); stroke-width: 1.5 }
.arrow { fill: none; stroke-width: 1.8 }
"""


def variables(colours: dict[str, str]) -> str:
    """Return colours as CSS variables."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    """Return a line of text."""
    return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>'


def frame(x: float, y: float, width: float, height: float) -> str:
    """Return the frame around what one process holds."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" class="frame"/>'


def box(x: float, y: float, width: float, height: float, colour: str, *lines: str) -> str:
    """Return a box with its title and what is said under it."""
    title, *rest = lines
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="box" '
        f'style="stroke: var(--{colour})"/>',
        text(x + 14, y + 25, title, "title"),
    ]
    parts += [text(x + 14, y + 46 + 18 * i, line, "soft") for i, line in enumerate(rest)]
    return "\n".join(parts)


def stack(x: float, y: float, width: float, height: float, colour: str, *lines: str) -> str:
    """Return a box of which there are several."""
    cards = [
        f'<rect x="{x + shift}" y="{y - shift}" width="{width}" height="{height}" rx="8" '
        f'class="box" style="stroke: var(--{colour}); opacity: {opacity}"/>'
        for shift, opacity in ((12, 0.45), (6, 0.7))
    ]
    return "\n".join([*cards, box(x, y, width, height, colour, *lines)])


def arrow(points: str, colour: str, dashes: str = "none", *, both_ways: bool = False) -> str:
    """Return a line that ends in a head; ``points`` as in SVG."""
    start = f'marker-start="url(#{colour})" ' if both_ways else ""
    return (
        f'<polyline points="{points}" class="arrow" marker-end="url(#{colour})" {start}'
        f'style="stroke: var(--{colour}); stroke-dasharray: {dashes}"/>'
    )


def slots(x: float, y: float) -> str:
    """Return ten slots of the buffer, and what their colours mean."""
    states = {
        "trained": ("learner", 3),
        "finished": ("controller", 2),
        "sampled": ("rollout", 3),
        "waiting": ("soft", 1),
        "free": ("ground", 1),
    }
    fills = [fill for fill, count in states.values() for _ in range(count)]
    squares = [
        f'<rect x="{x + 25 * i}" y="{y}" width="19" height="19" rx="4" '
        f'style="fill: var(--{fill}); stroke: var(--line)"/>'
        for i, fill in enumerate(fills)
    ]
    names = [
        f'<tspan dx="{11 if i else 0}" style="fill: var(--{fill if name != "free" else "soft"})">'
        f"{name}</tspan>"
        for i, (name, (fill, _)) in enumerate(states.items())
    ]
    legend = f'<text x="{x}" y="{y + 39}" class="soft">{"".join(names)}</text>'
    return "\n".join([*squares, legend])


def controller() -> list[str]:
    """Return the controller and its parts."""
    return [
        frame(24, 24, 1032, 272),
        text(44, 54, "Controller", "title"),
        text(138, 54, "one process; controller/loop.py is the only training loop", "soft"),
        box(44, 78, 190, 84, "controller", "Prompts", "source, template, tokens,", "curriculum"),
        box(
            44,
            192,
            190,
            84,
            "controller",
            "Draft exchange",
            "samples of one worker for",
            "the drafters of others",
        ),
        box(
            306,
            78,
            280,
            198,
            "controller",
            "Work buffer",
            "a group holds a slot until engines serve",
            "the weights it was trained into",
        ),
        slots(320, 152),
        text(320, 222, "Freshness budget", "title"),
        text(320, 243, "B = (S + 1) P − (W − 1) slots, so that", "soft"),
        text(320, 261, "no trained token is older than S versions", "soft"),
        box(
            652, 78, 180, 84, "controller", "Assembly", "P groups with a signal,", "of the W oldest"
        ),
        box(
            652,
            192,
            180,
            84,
            "controller",
            "Ledger",
            "events, finished samples;",
            "SQLite or Redis",
        ),
        box(
            890,
            78,
            146,
            198,
            "controller",
            "Step v",
            "trains version v;",
            "asserts that no",
            "token is too old;",
            "runs while engines",
            "take version v",
        ),
        arrow("234,120 302,120", "controller"),
        arrow("586,120 648,120", "controller"),
        arrow("832,120 886,120", "controller"),
        arrow("586,234 648,234", "controller", "5 4"),
        arrow("890,234 836,234", "controller", "5 4"),
    ]


def workers() -> list[str]:
    """Return the other processes, and the memory through which weights travel."""
    return [
        stack(
            24,
            384,
            388,
            100,
            "rollout",
            "Rollout workers",
            "stock vLLM; updates between two engine steps",
            "suffix drafter with a measured draft budget",
            "every token: log-probability and weight version",
        ),
        box(480, 384, 168, 100, "reward", "Graders", "processes with a", "time limit"),
        stack(
            716,
            384,
            328,
            100,
            "learner",
            "Learner ranks",
            "forward_backward → optimizer_step → publish",
            "FSDP2, tensor, sequence, pipeline; or ZeRO",
            "any mesh computes what one process computes",
        ),
        '<rect x="24" y="544" width="1032" height="44" rx="8" class="box" '
        'style="stroke: var(--weights)"/>',
        text(
            540,
            571,
            "Weights v + 1 in shared memory: one layout for every mesh, checksums that workers "
            "acknowledge",
            anchor="middle",
        ),
    ]


def between() -> list[str]:
    """Return what passes between the processes."""
    return [
        arrow("96,368 96,280", "rollout", both_ways=True),
        text(106, 326, "tokens to", "soft"),
        text(106, 342, "draft from", "soft"),
        arrow("326,371 326,280", "weights", "5 4"),
        text(316, 326, "v + 1 acknowledged:", "soft", "end"),
        text(316, 342, "slots are freed", "soft", "end"),
        arrow("386,276 386,368", "controller"),
        text(396, 326, "claim: a prompt,", "soft"),
        text(396, 342, "n samples", "soft"),
        arrow("424,434 476,434", "rollout"),
        arrow("548,384 548,280", "reward"),
        text(558, 326, "a group with", "soft"),
        text(558, 342, "its rewards", "soft"),
        arrow("963,276 963,368", "controller"),
        text(953, 334, "batch of arrays", "soft", "end"),
        arrow("880,484 880,540", "learner"),
        text(890, 518, "every rank its shards", "soft"),
        arrow("218,544 218,488", "weights"),
        text(228, 518, "load, repack, acknowledge", "soft"),
    ]


def drawing() -> str:
    """Return the whole file."""
    heads = "\n".join(
        f'<marker id="{colour}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto-start-reverse"><path d="M0,0 L10,5 L0,10 z" '
        f'style="fill: var(--{colour})"/></marker>'
        for colour in ("controller", "rollout", "learner", "reward", "weights")
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            "<title>A controller hands prompts to rollout workers and batches to learner ranks; "
            "weights go back through shared memory</title>",
            f"<style>svg {{ {variables(LIGHT)} }}",
            f"@media (prefers-color-scheme: dark) {{ svg {{ {variables(DARK)} }} }}{STYLE}</style>",
            f"<defs>{heads}</defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" style="fill: var(--ground)"/>',
            *controller(),
            *workers(),
            *between(),
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawing())
