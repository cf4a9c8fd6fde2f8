"""Draw accuracy over bytes, pruning.svg, from RESULTS.md's table of what pruning buys: python benchmarks/pruning.py."""

import math
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 60, 30, 40, 50  # pixels
BYTES, TOP1 = (32_000, 180_000), (80, 90)  # what the axes show
PEER = ("ResNet-8 int8, MLPerf Tiny", 98_496, 86.97)
SHAPES = {16: '<circle cx="{x}" cy="{y}" r="5" fill="#0072b2"/>',
          8: '<path d="M{x} {y} m-6 5 l6 -11 l6 11 z" fill="#d55e00"/>',
          0: '<path d="M{x} {y} m-6 0 l6 -6 l6 6 l-6 6 z" fill="#555555"/>'}  # fmt: skip


def points(results: str) -> list[tuple[str, int, int, float]]:
    """Return name, bits, bytes and top-1 of every network in the table."""
    rows = results.partition("## What pruning buys")[2].partition("\n## ")[0]
    found = []
    for line in rows.splitlines():
        if row := re.match(r"\| (\S+) \| \d+ \|.*\| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \|$", line):
            for bits, top1, size in ((16, row[2], row[3]), (8, row[4], row[5])):
                found.append((row[1], bits, int(size.replace(",", "")), float(top1)))
    return found


def place(size: float, top1: float) -> dict[str, float]:
    """Return where a file of some bytes, logarithmic, and an accuracy in percent are drawn."""
    across = math.log(size / BYTES[0]) / math.log(BYTES[1] / BYTES[0])
    down = (TOP1[1] - top1) / (TOP1[1] - TOP1[0])
    x, y = LEFT + across * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)
    return {"x": round(x, 1), "y": round(y, 1)}


def drawn(results: str) -> str:
    """Return the picture as SVG."""
    text = '<text x="{x}" y="{y}" text-anchor="{at}">{words}</text>'
    line = '<line x1="{a}" y1="{b}" x2="{c}" y2="{d}" stroke="#cccccc"/>'
    parts = [text.format(x=LEFT, y=22, at="start", words="CIFAR-10: top-1 in percent over the bytes of the ONNX file")]
    for top1 in range(TOP1[0], TOP1[1] + 1, 2):
        y = place(BYTES[0], top1)["y"]
        parts += [line.format(a=LEFT, b=y, c=WIDTH - RIGHT, d=y), text.format(x=LEFT - 8, y=y + 4, at="end", words=top1)]
    for size in (40_000, 60_000, 80_000, 100_000, 150_000):
        x = place(size, TOP1[0])["x"]
        parts += [line.format(a=x, b=TOP, c=x, d=HEIGHT - BOTTOM)]
        parts += [text.format(x=x, y=HEIGHT - BOTTOM + 18, at="middle", words=f"{size // 1000} kB")]
    for name, bits, size, top1 in [*points(results), (PEER[0], 0, *PEER[1:])]:
        at = place(size, top1)
        parts.append(SHAPES[bits].format(**at))
        if bits != 8:
            parts.append(text.format(x=at["x"] + 9, y=at["y"] - 7, at="start", words=name))
        else:  # joined with the same network at 16 bits, the point before it
            was = place(*before)
            parts.insert(1, line.format(a=was["x"], b=was["y"], c=at["x"], d=at["y"]).replace("#cccccc", "#888888"))
        before = size, top1
    for n, (bits, words) in enumerate({16: "16-bit weights", 8: "8 bits", 0: "the yardstick"}.items()):
        x, y = LEFT + 12 + 140 * n, HEIGHT - 10
        parts += [SHAPES[bits].format(x=x, y=y - 4), text.format(x=x + 12, y=y, at="start", words=words)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
    body = "\n".join(parts)
    return f'{head} font-size="12">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'


if __name__ == "__main__":
    (HERE / "pruning.svg").write_text(drawn((HERE.parent / "RESULTS.md").read_text()))
