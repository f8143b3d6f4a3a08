"""The page in a real browser: no errors, no requests, nothing wider than a phone, every section there."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmft.reports.write import write_report
from llmft.runs.predictions import Predictions
from tests.reports.runs import make_run, make_sweep, trial

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--allow-file-access-from-files", "--virtual-time-budget=3000"),
)
PROBE = """<script>(() => {
const errors = [];
addEventListener("error", (e) => errors.push("error: " + (e.message || e.target.outerHTML)), true);
addEventListener("securitypolicyviolation", (e) => errors.push("refused: " + e.blockedURI));
for (const kind of ["error", "warn"]) console[kind] = (...words) => errors.push(kind + ": " + words.join(" "));
addEventListener("load", () => setTimeout(() => {
  const page = document.documentElement;
  const shape = document.querySelector("[data-tip]");
  let tip = null;
  if (shape) { shape.focus(); tip = document.getElementById("tip").textContent; }
  const wide = [...document.querySelectorAll("main *")].filter((e) =>
    e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".box, .draw")).map((e) => e.tagName);
  const small = [...document.querySelectorAll("svg text")].map((e) =>
    parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a);
  parent.postMessage(JSON.stringify({ errors, width: innerWidth, scroll: page.scrollWidth, wide, tip,
    requests: performance.getEntriesByType("resource").map((r) => r.name),
    sections: [...document.querySelectorAll("section[id]")].map((s) => s.id),
    unnamed: [...document.querySelectorAll("svg.figure")].filter((s) => !s.querySelector("title")).length,
    smallest: Math.min(...small, 99), background: getComputedStyle(document.body).backgroundColor }), "*");
}, 300));
})();</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    executable = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no browser found: {', '.join(BROWSERS)}")
    return executable


def look(browser: str, page: str, folder: Path, *options: str, width: int = 390) -> dict[str, Any]:
    """The probe's facts about the page in a frame of `width` pixels."""
    folder.mkdir(exist_ok=True)
    (folder / "page.html").write_text(page.replace("<head>", f"<head>{PROBE}", 1))
    frame = f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="told"></pre>'
    frame += "<script>onmessage = (e) => { document.getElementById('told').textContent = e.data; };</script>"
    (folder / "frame.html").write_text(frame)
    command = [
        browser,
        *OPTIONS,
        *options,
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,1000",
        "--dump-dom",
    ]
    result = subprocess.run([*command, (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=90)
    match = re.search(r'<pre id="told">(.*?)</pre>', result.stdout, re.S)
    assert match is not None, result.stderr
    assert match[1], result.stderr
    return dict(json.loads(html.unescape(match[1])))


CLASSES = [f"{'a<b>class' * 5}{number}" for number in range(12)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with every section, and very long and hostile names."""
    root = tmp_path_factory.mktemp("study")
    samples = [
        {
            "where": f"rows.jsonl:{i}",
            "prompt": f"<script>throw 1</script> {'long' * 60} {word} {i}",
            "reference": word,
            "generated": "<img src='https://example.org/x.png' onerror='throw 2'>" if i % 3 else word,
        }
        for i, word in enumerate(["cats purr", "dogs bark", "cows low"] * 5)
    ]
    trials = []
    for r in (4, 8):
        for name in ("mistral-7b-instruct", "a-model-with-a-name-that-does-not-end-" * 3):
            for seed in (0, 1):
                value = 1.0 + r / 100 + len(name) / 1e3 + seed / 500
                run = make_run(root, value, lora__r=r, model__name=name, seed=seed, samples=samples, num_rows=20)
                values = np.full((20, 12), 1 / 12)
                predictions = Predictions([str(row) for row in range(20)], CLASSES, values, targets=[CLASSES[3]] * 20)
                predictions.save(run / "predictions" / "val")
                trials.append(trial(root, run, len(trials), command=f"python -m llmft {'x' * 300}"))
    trials.append(
        {"number": 99, "run": "runs/no", "status": "failed", "error": "e" * 400, "command": "python -m llmft"}
    )
    sweep = make_sweep(root, trials, swept={"lora.r": [], "model": [], "seed": []}, notes="n" * 300)
    scores = {Path(str(t["run"])).name: 0.5 + i / 10 for i, t in enumerate(trials[:4])}
    return write_report([], sweep / "report", sweep=sweep, leaderboard_scores=scores).html.read_text()


def test_on_a_phone_the_page_is_whole_readable_and_silent(browser: str, page: str, tmp_path: Path) -> None:
    seen = look(browser, page, tmp_path / "phone")
    assert seen["width"] == 390
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["scroll"] <= 390
    assert seen["wide"] == []
    expected = [
        "leaderboard",
        "metrics",
        "verdicts",
        "curves",
        "keys",
        "scores",
        "samples",
        "clusters",
        "failures",
        "cost",
        "commands",
    ]
    assert seen["sections"] == expected
    assert seen["unnamed"] == 0
    assert seen["tip"]
    assert seen["smallest"] >= 8


def test_the_page_follows_the_readers_choice_of_light_or_dark(browser: str, page: str, tmp_path: Path) -> None:
    light = look(browser, page, tmp_path / "light", "--blink-settings=preferredColorScheme=1", width=1200)
    dark = look(browser, page, tmp_path / "dark", "--blink-settings=preferredColorScheme=0", width=1200)
    brightness = [sum(map(int, re.findall(r"\d+", seen["background"])[:3])) for seen in (light, dark)]
    assert brightness[0] > 600 > 150 > brightness[1]
    assert light["errors"] == dark["errors"] == []


def test_the_browser_test_sees_a_request_an_error_and_an_overflow(browser: str, page: str, tmp_path: Path) -> None:
    bad = '<img src="https://example.org/x.png"><script>throw new Error("seen")</script>'
    bad += '<p style="width:900px">wide</p>'
    seen = look(browser, page.replace("<main>", f"<main>{bad}", 1), tmp_path / "bad")
    assert any("seen" in error for error in seen["errors"])
    assert any("example.org" in error for error in seen["errors"])
    assert seen["scroll"] > 390
    assert "P" in seen["wide"]
