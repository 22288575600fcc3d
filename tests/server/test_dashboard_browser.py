"""The dashboard in a real headless Chromium, of a real server with real reports."""

from __future__ import annotations

import pytest

from chromium import browsing
from remote import Served

PHONE = {"width": 375, "height": 812}
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"


def a_round(served, devices) -> None:
    version = served.run.service.status(served.run.id)["version"]
    served.until(lambda told: told["open"])
    for device in devices:
        device.take_part(served.dim)
    served.until(lambda told: told["version"] > version)


def test_a_browser_sees_rounds_come(tmp_path):
    with Served(tmp_path, count=2, minimum=1.0, selection_seconds=8.0) as served:
        devices = [served.device(), served.device()]
        a_round(served, devices)
        link = served.operator.post("dashboard")["link"]
        with browsing(tmp_path / "profile", viewport={"width": 1280, "height": 900}) as page:
            page.goto(link)
            page.wait_for_url("**/dashboard")
            assert "#" not in page.url
            page.wait_for_selector("#connection.live")
            assert "committed" in page.text_content("#rounds tbody")
            page.evaluate("window.sameDocument = true")
            assert page.locator("#rounds .committed").count() == 1

            a_round(served, devices)
            page.wait_for_selector("#rounds .committed >> nth=1")

            served.until(lambda told: told["open"] and told["open"]["number"] == 3)
            devices[0].assigned()  # and no other comes: the selection is over before there are two
            reason = "the selection deadline passed: 1 devices of at least 2"
            page.wait_for_selector(f"#abandoned >> text={reason}")
            assert page.evaluate("window.sameDocument") is True
            assert page.locator("#charts svg").count() >= 2
            for size in ({"width": 1280, "height": 900}, PHONE):
                page.set_viewport_size(size)
                assert page.evaluate(FITS)
            page.get_by_text("Configuration").click()
            assert page.get_by_text("client_lr").is_visible()
            assert page.evaluate(FITS)
            assert page.asked == {served.server.address.removeprefix("https://")}
            assert page.errors == []

            page.get_by_role("button", name="Sign out").click()
            page.wait_for_url("**/sign-in")
            page.goto(served.server.address + "/dashboard")
            assert page.url.endswith("/sign-in")


def test_a_used_link_says_so_and_a_server_that_is_back_is_found(tmp_path):
    with Served(tmp_path, count=1) as served:
        link = served.operator.post("dashboard")["link"]
        with browsing(tmp_path / "profile", viewport=PHONE) as page:
            page.goto(link)
            page.wait_for_selector("#connection.live")
            page.context.clear_cookies()
            page.goto("about:blank")
            page.goto(link)
            page.wait_for_selector("[role=alert]")
            assert "unknown, used or too old" in page.text_content("[role=alert]")
            assert page.evaluate(FITS)

            page.goto("about:blank")
            page.goto(served.operator.post("dashboard")["link"])
            page.wait_for_selector("#connection.live")
            page.evaluate("window.sameDocument = true")
            served.__exit__()
            page.wait_for_selector("#connection:not(.live)")
            served.__enter__()
            a_round(served, [served.device()])
            page.wait_for_selector("#rounds .committed")
            assert page.evaluate("window.sameDocument") is True


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(tmp_path, scheme):
    with (
        Served(tmp_path, count=1) as served,
        browsing(tmp_path / "profile", viewport=PHONE, color_scheme=scheme) as page,
    ):
        a_round(served, [served.device()])
        page.goto(served.operator.post("dashboard")["link"])
        page.wait_for_selector("#connection.live")
        ratios = page.evaluate(_CONTRAST)
        assert min(ratios.values()) >= 4.5, ratios  # WCAG 2.2, AA


_CONTRAST = """() => {
  const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = numbers(colour).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const told = {};
  for (const rule of ["h1", "dt", "dd", "small", "caption", "td", ".committed", "#connection",
                      "figcaption", "figure text"]) {
    const element = document.querySelector(rule);
    const style = getComputedStyle(element);
    const words = light(element.closest("svg") ? style.fill : style.color);
    let at = element;
    while (numbers(getComputedStyle(at).backgroundColor)[3] === 0) at = at.parentElement;
    const ground = light(getComputedStyle(at).backgroundColor);
    told[rule] = (Math.max(words, ground) + 0.05) / (Math.min(words, ground) + 0.05);
  }
  return told;
}"""
