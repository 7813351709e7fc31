"""The page as a reader sees it, in headless Chromium.

Nothing here is timed. 10,000 rollouts stay smooth because the page never holds them all.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from synthetic_run import HOSTILE, samples, write_run

from rpt_lightning.evaluation.report.report_command import report
from rpt_lightning.records.rollout_samples import read_samples, write_samples

pytestmark = pytest.mark.browser

MAX_ELEMENTS = 1500  # in the rollout browser: about 20 rows, and one task with at most 16 completions


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_run(folder / "one", hostile=True, num_tasks=7)
    write_run(folder / "two", hostile=True, num_tasks=1, num_steps=5, sampled_steps=(1,))
    report([folder / "one", folder / "two"], output=folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def large_page(tmp_path_factory):
    """Write a small step, then one with 10,000 rollouts."""
    folder = tmp_path_factory.mktemp("large")
    write_run(folder, sampled_steps=(1,))
    write_samples(
        samples(1250, 8, 0.4, step=30, hostile=(), draw=random.Random(1)),
        folder / "rollouts" / "step-000030.jsonl",
    )
    report([folder], output=folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def hostile(browser, hostile_page):
    browser.open(hostile_page)
    return browser


@pytest.fixture
def large(browser, large_page):
    browser.open(large_page)
    return browser


def chosen(browser):
    """Return the list position of the selected task, counted from 1, as assistive technology is told."""
    active = browser.run("return document.getElementById('list').getAttribute('aria-activedescendant')")
    return int(browser.find(f"#{active}").get_attribute("aria-posinset"))


def outcomes(browser):
    return set(
        browser.run(
            "return [...document.querySelectorAll('#task .mark')].map((mark) => mark.textContent.slice(2))"
        )
    )


def count(browser, name):
    return int(browser.text(f"[data-count={name}]").replace(",", ""))


def test_opens_without_an_error_and_asks_for_nothing(hostile, hostile_page):
    assert hostile.draw_figures() >= 10
    assert hostile.console() == []
    assert hostile.requests() == [hostile_page.as_uri()]
    assert hostile.run("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []


def test_the_policy_refuses_scripts_and_requests(hostile):
    """The guard itself works: forbidden behaviour of a page is detected."""
    hostile.run(
        "window.refused = [];"
        "addEventListener('securitypolicyviolation', (event) => refused.push(event.effectiveDirective))"
    )
    hostile.run(
        "const harm = document.createElement('script'); harm.textContent = 'window.harmed = 1'; "
        "document.body.append(harm)"
    )
    hostile.run("document.body.append(Object.assign(new Image(), {src: 'https://example.invalid/x.png'}))")
    hostile.wait("return refused.length === 2")
    assert hostile.run("return refused") == ["script-src-elem", "img-src"]
    assert hostile.run("return window.harmed ?? null") is None
    assert hostile.console() != []


def test_what_a_run_recorded_stays_text(hostile):
    shown = hostile.text("#task")
    for _ in range(6):
        hostile.find("#task .next").click()
        shown += hostile.text("#task")
    for text in HOSTILE:
        assert text in shown
    assert hostile.run("return window.harmed ?? null") is None
    assert hostile.run("return document.querySelectorAll('#browser img, #browser script').length") == 0
    assert hostile.console() == []


def test_truth_has_its_token_boundaries_and_tokens_their_probability(hostile, hostile_page):
    rows = [
        json.loads(line)
        for line in (hostile_page.parent / "one" / "rollouts" / "step-000001.jsonl").read_text().split("\n")
        if line
    ]
    first = rows[0]
    shown = hostile.run("return [...document.querySelectorAll('.truth')].map((token) => token.textContent)")
    assert shown == [token.replace(" ", "·").replace("\n", "⏎") for token in first["truth"]]
    tokens = hostile.run(
        "return [...document.querySelector('.completion').querySelectorAll('.tok')]"
        ".map((t) => [t.textContent, t.className])"
    )
    assert [text.replace("⏎", "") for text, _ in tokens] == first["tokens"]
    answer_from = [text for text, _ in tokens].index("\\boxed{")
    assert ["answer" in name for _, name in tokens] == [index >= answer_from for index in range(len(tokens))]
    limits = [-0.10536, -0.69315, -1.60944, -2.99573]  # logarithms of 0.9, 0.5, 0.2 and 0.05
    assert [name.split()[-1] for _, name in tokens] == [
        f"p{sum(logprob < limit for limit in limits)}" for logprob in first["logprobs"]
    ]


def test_filters(hostile):
    total = count(hostile, "all")
    assert sum(count(hostile, name) for name in ("right", "wrong", "truncated")) == total == 28
    for name in ("right", "wrong", "truncated"):
        hostile.find(f"input[value={name}]").click()
        assert outcomes(hostile) == {name}
        assert hostile.text("#status").startswith(f"{count(hostile, name)} completions of ")
    hostile.find("input[value=all]").click()
    assert hostile.text("#status").startswith("28 completions of 7 tasks")
    hostile.find("#find").send_keys("doc-3:")
    hostile.wait("return /4 completions of 1 tasks/.test(document.getElementById('status').textContent)")
    hostile.find("#find").send_keys("nowhere")
    hostile.wait("return /No completion/.test(document.getElementById('task').textContent)")


def test_keys(hostile):
    from selenium.webdriver.common.keys import Keys

    hostile.find("#list").click()  # focus
    hostile.press(Keys.HOME)
    assert chosen(hostile) == 1
    hostile.press(Keys.ARROW_DOWN, "j")
    assert chosen(hostile) == 3
    assert "doc-2:" in hostile.text("#task h3")
    hostile.press("k", Keys.ARROW_UP, Keys.ARROW_UP)
    assert chosen(hostile) == 1
    hostile.press(Keys.END)
    assert chosen(hostile) == 7
    hostile.press("]")
    hostile.wait(
        "return document.getElementById('step').value === '21' "
        "&& /doc-0:/.test(document.querySelector('#task h3').textContent)"
    )
    hostile.press("[")
    hostile.wait("return document.getElementById('step').value === '1'")
    hostile.press("w")
    assert outcomes(hostile) == {"wrong"}
    hostile.press("t")
    assert outcomes(hostile) == {"truncated"}
    hostile.press("a", "/", "j", Keys.ESCAPE)  # in the search field a letter is only a letter
    assert hostile.run("return [document.getElementById('find').value, document.activeElement.id]") == [
        "j",
        "list",
    ]
    assert hostile.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    hostile.press(Keys.ENTER)
    assert hostile.run("return document.activeElement.id") == "task"


def test_keys_go_on_after_what_had_the_focus_is_gone(hostile):
    hostile.find("#task .next").click()
    hostile.press("j")
    hostile.press("j")
    assert chosen(hostile) == 4
    for _ in range(3):
        hostile.find("#task .next").click()
    hostile.press("k")  # the button ends at the last task
    assert chosen(hostile) == 6


def test_every_control_has_a_name_and_can_be_reached(hostile):
    nameless = """return [...document.querySelectorAll('button, input, select, [tabindex="0"], [role=img]')]
        .filter((one) => !(one.getAttribute('aria-label') || one.textContent.trim()
          || one.labels?.[0]?.textContent.trim()))
        .map((one) => one.outerHTML)"""
    assert hostile.run(nameless) == []
    assert (
        hostile.run(
            'return document.querySelectorAll(\'[tabindex]:not([tabindex="0"]):not([tabindex="-1"])\').length'
        )
        == 0
    )


def test_runs_can_be_hidden_and_chosen(hostile):
    hostile.run("document.getElementById('training').scrollIntoView()")
    hostile.wait("return document.querySelector('.charts-training .chart .main-svg')")
    shown = (
        "return document.querySelector('.charts-training .chart').data"
        ".filter((trace) => trace.visible).length"
    )
    before = hostile.run(shown)
    hostile.find("[data-run-toggle='1']").click()
    hostile.wait(f"return (() => {{ {shown} }})() < {before}")
    hostile.run(
        "const run = document.getElementById('run'); run.value = 1; run.dispatchEvent(new Event('change'))"
    )
    hostile.wait("return /4 completions of 1 tasks/.test(document.getElementById('status').textContent)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_keep_their_contrast(hostile_page, browser, scheme):
    """Every kind of text has WCAG 2's contrast of 4.5, with the colours that the browser computes."""
    browser.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    try:
        browser.open(hostile_page)
        assert browser.run("return document.documentElement.dataset.theme") == scheme
        assert browser.run(_CONTRAST) == []
        browser.find("#theme").click()
        assert browser.run("return document.documentElement.dataset.theme") != scheme
        browser.open(hostile_page)
        assert browser.run("return document.documentElement.dataset.theme") != scheme  # the choice is kept
    finally:
        browser.run("localStorage.clear()")
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


_CONTRAST = """
const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
const over = ([r, g, b, a = 1], under) => [r, g, b].map((value, i) => a * value + (1 - a) * under[i]);
const luminance = (rgb) => rgb.map((v) => v / 255)
  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (one) => {
  const own = parse(getComputedStyle(one).backgroundColor);
  if (own.length === 3 || own[3] === 1 || !one.parentElement) return own.slice(0, 3);
  return over(own, ground(one.parentElement));
};
const texts = [...document.querySelectorAll('main *, header *, footer')]
  .filter((one) => !one.closest('.chart, .hidden, :disabled, .skip')
  && [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()));
return texts.map((one) => {
  const under = ground(one), own = luminance(over(parse(getComputedStyle(one).color), under));
  const [high, low] = [own, luminance(under)].sort((a, b) => b - a);
  const name = one.tagName + '.' + one.className + ': ' + one.textContent.slice(0, 30);
  return [(high + 0.05) / (low + 0.05), name];
}).filter(([contrast]) => contrast < 4.5).slice(0, 5);
"""


def test_a_phone_shows_it_without_scrolling_sideways(hostile_page, browser):
    browser.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        browser.open(hostile_page)
        browser.draw_figures()
        assert browser.run("return document.documentElement.scrollWidth") == 390
        assert browser.run(
            "return [...document.querySelectorAll('.chart')]"
            ".every((chart) => chart.getBoundingClientRect().right <= 390)"
        )
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_ten_thousand_rollouts_are_never_in_the_page_at_once(large):
    from selenium.webdriver.common.keys import Keys

    def elements():
        return large.run("return document.querySelectorAll('#browser *').length")

    assert large.text("#status") == "32 completions of 8 tasks."
    large.find("#list").click()
    large.press("]")
    large.wait(
        "return document.getElementById('status').textContent === '10,000 completions of 1,250 tasks.'"
    )
    assert count(large, "all") == 10_000
    assert elements() < MAX_ELEMENTS
    large.press(Keys.END)
    assert chosen(large) == 1250
    assert "doc-1249:" in large.text("#task h3")
    assert elements() < MAX_ELEMENTS
    large.press("r")
    assert outcomes(large) == {"right"}
    assert 0 < count(large, "right") < 10_000
    assert elements() < MAX_ELEMENTS
    large.run("document.getElementById('list').scrollTop = 20000")
    large.wait(
        "return [...document.querySelectorAll('.row')].some((row) => Number(row.dataset.position) > 340)"
    )
    assert elements() < MAX_ELEMENTS
    assert large.console() == []


@pytest.fixture(scope="module")
def odd_page(tmp_path_factory):
    """Write very long completions, and more of one task than are shown at once, at step 1.

    Step 2 has what earlier versions wrote.
    """
    folder = tmp_path_factory.mktemp("odd")
    write_run(folder, num_tasks=1, sampled_steps=(1, 2))
    first, second = (folder / "rollouts" / f"step-{step:06d}.jsonl" for step in (1, 2))
    long = replace(
        read_samples(first)[0],
        tokens=("x ",) * 2500,
        logprobs=(-0.01,) * 2500,
        thought="",
        completion="x " * 2500,
    )
    write_samples([long] * 20, first)
    rows = [json.loads(line) for line in second.read_text().split("\n") if line]
    later = ("tokens", "logprobs", "entropy")
    second.write_text(
        "".join(
            json.dumps({name: value for name, value in row.items() if name not in later}) + "\n"
            for row in rows
        )
    )
    report([folder], output=folder / "report.html")
    return folder / "report.html"


def test_a_long_completion_is_shown_in_parts(odd_page, browser):
    browser.open(odd_page)
    assert browser.run(
        "return [document.querySelectorAll('.completion').length, "
        "document.querySelectorAll('.said .tok').length]"
    ) == [16, 6400]
    assert browser.text(".said .more") == "Show 2,100 more tokens"
    browser.find(".said .more").click()
    assert browser.run("return document.querySelector('.said').querySelectorAll('.tok').length") == 2400
    assert browser.text("#task > .more") == "Show 4 more completions"
    browser.run("document.querySelector('#task > .more').click()")
    assert browser.run("return document.querySelectorAll('.completion').length") == 20


def test_files_of_an_earlier_version_are_shown_and_named(odd_page, browser):
    browser.open(odd_page)
    browser.find("#list").click()
    browser.press("]")
    browser.wait("return document.querySelectorAll('.completion').length === 4")
    assert "Recorded by an earlier version, without tokens and their probabilities." in browser.text(
        "#status"
    )
    written = [
        sample.completion for sample in read_samples(odd_page.parent / "rollouts" / "step-000002.jsonl")
    ]
    assert (
        browser.run("return [...document.querySelectorAll('.said')].map((said) => said.textContent)")
        == written
    )
    assert browser.console() == []
