"""The page's chat in a real browser, over a scripted engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import visit
from scripted_engine import Running, ScriptedEngine, running

EVIL = """<img src="http://evil.example/x.png" onerror="document.title='stolen'"> stays.

<script>document.title = 'stolen'</script>

![picture](http://evil.example/y.png) [bad](javascript:alert(1)) [good](https://example.org)

```python
print("<b>hi</b>")
```

**bold** and `code`
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ScriptedEngine(context=100_000)) as found:
        yield found


def last(page: Any) -> Any:
    return page.locator(".message").last


def test_an_answer_streams_and_is_there_after_a_reload(chromium: Any, server: Running) -> None:
    """It grows while it is made (an answer shown at its end only would have no busy message)."""
    server.engine.says("one two three four five", step=4)
    seen_it, begun = threading.Event(), server.engine.steps
    server.engine.before_step = lambda step: step != begun + 2 or seen_it.wait(30)
    with visit(chromium, server.url) as seen:
        page = seen.page
        page.fill("#input", "Count")
        page.press("#input", "Enter")
        page.locator("[aria-busy] > .said").get_by_text("one").wait_for()
        assert not last(page).inner_text().endswith("five")
        seen_it.set()
        last(page).get_by_text("Retry").wait_for()
        assert last(page).locator(".body").inner_text() == "one two three four five"
        figures = last(page).locator(".meter").inner_text()
        assert "24 tokens" in figures and "4.00 tokens per step" in figures
        assert "0 of 22 prompt tokens cached" in figures
        shares = last(page).locator(".depths").get_attribute("aria-label")
        assert shares == "drafts kept by depth: 1: 100 %, 2: 100 %, 3: 100 %"
        page.reload()
        assert last(page).locator(".body").inner_text() == "one two three four five"
        assert page.locator("aside li").inner_text().startswith("Count")


def test_stop_keeps_what_there_is(chromium: Any, server: Running) -> None:
    server.engine.says("word " * 400, step=5, pause=0.02)
    with visit(chromium, server.url) as seen:
        page = seen.page
        page.fill("#input", "Go")
        page.press("#input", "Enter")
        page.locator("[aria-busy] .meter").wait_for()
        page.keyboard.press("Escape")
        last(page).get_by_text("stopped").wait_for()
        kept = last(page).locator(".body").inner_text()
        assert kept.startswith("word") and len(kept) < 1500
        server.idle()
        server.engine.says("again")
        seen.ask("And now")
        asked = server.engine.tokenizer.last["messages"]
        assert [m["role"] for m in asked] == ["user", "assistant", "user"]
        assert asked[1]["content"].strip() == kept.strip()


def test_retry_and_edit_make_versions(chromium: Any, server: Running) -> None:
    server.engine.says("first", "second", "third")
    with visit(chromium, server.url) as seen:
        page = seen.page
        seen.ask("Say")
        last(page).get_by_text("Retry").click()
        page.get_by_text("second").wait_for()
        assert "2/2" in last(page).inner_text()
        page.get_by_label("Version before").click()
        assert last(page).locator(".body").inner_text() == "first"
        page.press("#input", "ArrowUp")  # edits
        assert page.input_value("#input") == "Say"
        page.fill("#input", "Tell")
        page.press("#input", "Enter")
        page.get_by_text("third").wait_for()
        assert server.engine.tokenizer.last["text"] == "[user]Tell[assistant]"
        page.get_by_label("Version before").click()
        assert page.locator(".message.user .said").inner_text() == "Say"
        assert page.locator(".message").count() == 2


def test_what_a_model_writes_is_never_markup(chromium: Any, server: Running) -> None:
    """Without the renderer's `html` the picture would be an element, DOMPurify or not."""
    server.engine.says(EVIL, step=40)
    with visit(chromium, server.url) as seen:
        seen.ask("<img src=q onerror=\"document.title='stolen'\">")
        page = seen.page
        body = last(page).locator(".body")
        assert 'onerror="document.title' in body.inner_text()
        assert "<script>" in body.inner_text()
        assert "![picture]" in body.inner_text()
        assert page.locator("main img, main script").count() == 0
        assert body.locator("strong").inner_text() == "bold"
        hrefs = [link.get_attribute("href") for link in body.locator("a").all()]
        assert hrefs == [None, "https://example.org"]
        assert body.locator("pre").inner_text() == 'print("<b>hi</b>")'
        last(page).get_by_text("Origin").click()
        assert last(page).locator(".tokens .drafted").count() > 50
        assert page.locator("main img, main script").count() == 0
        assert "stolen" not in page.title()
        trying = "try { document.body.innerHTML = '<b>x</b>' } catch (error) { error.name }"
        assert seen.complaints == [] and page.evaluate(trying) == "TypeError"
        seen.complaints.clear()  # that was the test itself


def test_settings_system_prompt_and_files_reach_the_model(
    chromium: Any, server: Running, tmp_path: Path
) -> None:
    server.engine.says("fine")
    note = tmp_path / "note.txt"
    note.write_text("the secret is 42")
    with visit(chromium, server.url) as seen:
        page = seen.page
        page.get_by_role("button", name="Settings").click()
        page.fill("[name=temperature]", "0.5")
        page.fill("[name=seed]", "9")
        page.fill("[name=max_tokens]", "100")
        page.select_option("[name=drafting]", "3x4/8")
        page.get_by_text("Done").click()
        page.locator(".system summary").click()
        page.fill(".system textarea", "Be brief.")
        page.set_input_files(".composer input[type=file]", note)
        page.get_by_text("note.txt, 16 B").wait_for()
        seen.ask("What is it?")
        (asked,) = server.engine.asked
        assert (asked.sampling.temp, asked.sampling.seed, asked.max_tokens) == (0.5, 9, 100)
        assert (asked.tree.width, asked.tree.depth, asked.tree.nodes) == (3, 4, 8)
        text = server.engine.tokenizer.last["text"]
        assert text.startswith("[system]Be brief.[user]File note.txt:\n```\nthe secret is 42\n```")
        assert text.endswith("What is it?[assistant]")
        page.reload()
        page.get_by_role("button", name="Settings").click()
        assert page.input_value("[name=temperature]") == "0.5"


def test_conversations_are_exported_and_imported(
    chromium: Any, server: Running, tmp_path: Path
) -> None:
    server.engine.says("fine")
    with visit(chromium, server.url) as seen:
        seen.ask("Hello")
        with seen.page.expect_download() as download:
            seen.page.get_by_text("Export all").click()
        file = tmp_path / "talks.json"
        download.value.save_as(file)
    stored = json.loads(file.read_text())
    stored["talks"][0]["nodes"][0]["content"] = "<b>Hello</b>"
    stored["talks"][0]["nodes"][0]["parent"] = stored["talks"][0]["nodes"][1]["id"]  # a circle
    file.write_text(json.dumps(stored))
    with visit(chromium, server.url) as seen:
        seen.page.set_input_files("aside input[type=file]", file)
        seen.page.get_by_text("<b>Hello</b>").wait_for()
        assert last(seen.page).locator(".body").inner_text() == "fine"
        file.write_text('{"some": "thing"}')
        seen.page.set_input_files("aside input[type=file]", file)
        seen.page.get_by_text("holds no conversations").wait_for()
        seen.page.get_by_label("Delete Hello").click()
        seen.page.get_by_text("Sure?").click()
        assert seen.page.locator("aside li").count() == 0


def test_thoughts_are_folded_and_a_long_prompt_shows_its_progress(chromium: Any) -> None:
    engine = ScriptedEngine(["<think>hm hm</think>Well."], context=100_000, chunk=30, pause=0.1)
    engine.tokenizer.has_thinking = True
    engine.tokenizer.think_start, engine.tokenizer.think_end = "<think>", "</think>"
    with running(engine) as server, visit(chromium, server.url) as seen:
        page = seen.page
        page.fill("#input", "long " * 80)
        page.press("#input", "Enter")
        page.get_by_text("Reading: ").wait_for()
        assert page.locator("#chat progress").get_attribute("max") is not None
        last(page).get_by_text("Retry").wait_for()
        assert last(page).locator(".body").inner_text() == "Well."
        thoughts = last(page).locator(".thoughts")
        assert thoughts.get_attribute("open") is None
        thoughts.locator("summary").click()
        assert thoughts.locator(".said").inner_text() == "hm hm"


def test_a_key_is_asked_for_and_faults_are_said(chromium: Any) -> None:
    """The page itself needs no key; a wrong one is asked for again."""
    with running(ScriptedEngine(["fine"]), api_key="right") as server:
        context = visit(chromium, server.url)
        with pytest.raises(AssertionError), context as seen:  # the browser reports each 401
            page = seen.page
            for key in ("wrong", "right"):
                page.locator("#key[open]").wait_for()
                page.fill("#key-value", key)
                page.press("#key-value", "Enter")
            page.get_by_text("scripted").wait_for()
            seen.ask("Hello")
            page.fill("#input", "long " * 400)
            page.press("#input", "Enter")
            page.get_by_text("prompt is too long").wait_for()
            assert last(page).get_by_text("Ask again").is_visible()


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_the_chat_has_no_serious_faults(
    chromium: Any, server: Running, width: int, scheme: str
) -> None:
    server.engine.says("Some `code`:\n\n```\nx = 1\n```\n\n| a |\n|---|\n| 1 |")
    size = {"width": width, "height": 800}
    with visit(chromium, server.url, viewport=size, color_scheme=scheme) as seen:
        seen.ask("Hello")
        assert seen.serious() == []
        last(seen.page).get_by_text("Origin").click()
        seen.page.get_by_role("button", name="Settings").click()
        assert seen.serious() == []
        wide = "document.documentElement.scrollWidth"
        assert seen.page.evaluate(wide) == width
