"""The other screens of the page in a real browser: tree, race, long prompt, server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import visit
from conftest import random_drafter
from scripted_engine import Running, ScriptedEngine, running
from tiny_chat import write_chat_model

from mlx_redrafter import load
from mlx_redrafter.api import Model
from mlx_redrafter.server import pages
from mlx_redrafter.server.engine import ModelEngine

SCREENS = ("chat", "tree", "race", "long", "server")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ScriptedEngine(context=100_000), parallel=2) as found:
        yield found


def test_a_step_is_shown_as_a_tree(chromium: Any, server: Running) -> None:
    """Boxes for all candidates and the bonus; scrubbing goes through the steps of the answer."""
    server.engine.says("<b>ab", step=4)
    with visit(chromium, server.url, "/#tree") as seen:
        page = seen.page
        page.get_by_role("button", name="Watch").click()
        page.get_by_role("heading", name="Step 2 of 2").wait_for()
        assert server.engine.asked[-1].trees
        page.get_by_label("Step before").click()
        page.get_by_role("heading", name="Step 1 of 2").wait_for()
        drawn = page.locator("svg.draft")
        kinds = {kind: drawn.locator(f".node.{kind}").count() for kind in ("root", "kept", "own")}
        assert kinds == {"root": 1, "kept": 3, "own": 1}
        assert drawn.locator(".node.checked").count() == 1
        assert drawn.locator(".node.left").count() == 2
        told = "6 candidates, 4 checked, kept 3: “<” “b” “>”; bonus: “a”."
        assert drawn.get_attribute("aria-label") == told
        assert page.get_by_text(told).is_visible()
        page.get_by_text("As a table").click()
        assert page.locator("#tree tbody tr").count() == 7
        page.locator("svg.draft").click()
        page.keyboard.press("ArrowRight")
        page.get_by_role("heading", name="Step 2 of 2").wait_for()
        page.locator(".step[data-step='0']").click()
        page.get_by_role("heading", name="Step 1 of 2").wait_for()


def test_an_answer_of_the_chat_is_watched(chromium: Any, server: Running) -> None:
    server.engine.says("hello")
    with visit(chromium, server.url) as seen:
        seen.ask("What?")
        seed = server.engine.asked[-1].sampling.seed
        seen.page.get_by_text("Steps").click()
        seen.page.locator("svg.draft").wait_for()
        assert server.engine.asked[-1].sampling.seed == seed
        assert server.engine.tokenizer.last["text"] == "[user]What?[assistant]"


@pytest.mark.parametrize("texts", [("same text", "same text"), ("same text", "some text")])
def test_a_race_has_a_verdict(chromium: Any, server: Running, texts: tuple[str, ...]) -> None:
    """Twice warm-up and run, with one seed; drafted steps write more in the same time."""
    server.engine.says(*["warm"] * 2, *texts, step=3, pause=0.002)
    with visit(chromium, server.url, "/#race") as seen:
        page = seen.page
        page.get_by_role("button", name="Race").click()
        verdict = page.locator(".verdict")
        verdict.wait_for()
        asked = server.engine.asked
        assert [one.draft for one in asked] == [False, True] * 2
        assert all(one.alone for one in asked)
        assert len({one.sampling.seed for one in asked}) == 1
        if texts[0] == texts[1]:
            assert "yes, all 10 tokens are identical" in verdict.inner_text()
            assert page.locator(".lane .drafted").count() > 4
        else:
            assert "no, they part at token 2" in verdict.inner_text()
            assert page.locator(".lane mark").all_inner_texts() == ["ame text", "ome text"]


def test_a_long_prompt_is_read_in_every_way(chromium: Any, server: Running) -> None:
    server.engine.says(*["warm"] * 3, "dense answer", "dense answer", "other")
    with visit(chromium, server.url, "/#long") as seen:
        page = seen.page
        file = {"name": "a.txt", "mimeType": "text/plain", "buffer": b"word " * 900}
        page.set_input_files("#long input[type=file]", file)
        page.get_by_text("4.5 kB, about 1,125 tokens").wait_for()
        page.get_by_label("MInference").check()
        page.get_by_role("button", name="Read it").click()
        page.get_by_text("the answers part at token 1").wait_for()
        asked = server.engine.asked[3:]
        assert len(asked) == 3
        sparse = [one.sparse_prefill for one in asked]
        assert sparse[0] is None and not any(one.cached for one in asked)
        modes = [(one.mode, one.min_context) for one in sparse[1:] if one is not None]
        assert modes == [("trianglemix", 1024), ("minference", 1024)]
        assert "the same answer" in page.locator("#long .lane").nth(1).inner_text()
        assert "100 % of attention computed" in page.locator("#long .lane").nth(0).inner_text()


def test_the_server_is_watched(chromium: Any, server: Running) -> None:
    server.engine.says("word " * 300, step=2, pause=0.01)
    with visit(chromium, server.url, "/#server") as seen:
        page = seen.page
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=20):
            page.get_by_role("cell", name="decoding").wait_for()
            assert "1 of 2" in page.locator(".cards").inner_text()
        page.get_by_text("Nothing runs.").wait_for()


@pytest.mark.parametrize(("width", "scheme"), [(1100, "dark"), (390, "light")])
def test_the_screens_have_no_serious_faults(
    chromium: Any, server: Running, width: int, scheme: str
) -> None:
    server.engine.says("a text")
    size = {"width": width, "height": 844}
    with visit(chromium, server.url, viewport=size, color_scheme=scheme) as seen:
        page = seen.page
        for number, name in enumerate(SCREENS, 1):
            page.keyboard.press(f"Alt+{number}")
            page.locator(f"#{name}").wait_for()
            if name == "tree":
                page.get_by_role("button", name="Watch").click()
                page.locator("svg.draft").wait_for()
            assert seen.serious() == [], name
            assert page.evaluate("document.documentElement.scrollWidth") == width, name
        page.get_by_role("button", name="Keys").click()
        assert seen.serious() == []


@pytest.mark.slow
def test_a_real_model_races_and_shows_its_trees(chromium: Any, tmp_path: Path) -> None:
    """A tiny random model and drafter behind the engine thread that answers in company."""
    model, tokenizer = load(write_chat_model(tmp_path / "chat"))
    drafter = random_drafter(model.target)
    drafting = Model.of(model.name, model.folder, model.target, drafter, compiled=False)
    with (
        running(ModelEngine(drafting, tokenizer), parallel=4) as server,
        visit(chromium, server.url, "/#race") as seen,
    ):
        page = seen.page
        page.fill("#race textarea", "ba be bi ba be bi ba be")
        page.get_by_role("button", name="Race").click()
        page.locator(".verdict").wait_for()
        assert "Same text: yes" in page.locator(".verdict").inner_text()
        page.keyboard.press("Alt+2")
        page.fill("#tree-question", "ba be bi ba be bi ba be")
        page.get_by_role("button", name="Watch").click()
        page.get_by_role("button", name="Watch").wait_for()
        page.locator("svg.draft .node.own").wait_for()
        assert page.locator("svg.draft .node.checked, svg.draft .node.kept").count() > 2


def test_the_page_is_small_and_written_by_hand() -> None:
    """Under 80 kB beside the two libraries, in files that are read."""
    files = [file for file in pages.FOLDER.rglob("*") if file.is_file()]
    own = [file for file in files if file.parent.name != "vendor"]
    assert sum(file.stat().st_size for file in own) < 80_000
    for file in own:
        lines = file.read_text().splitlines()
        assert len(lines) < 400, file.name
        assert "http://" not in file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in file.read_text()
        assert "innerHTML" not in file.read_text()
    kept = {file.name for file in files if file.parent.name == "vendor"}
    assert kept == {"marked.js", "purify.js", "marked.LICENSE", "purify.LICENSE"}


def test_what_is_sent_with_the_page(server: Running) -> None:
    """A policy on every file; the browser's copy is asked for; --no-ui leaves the API alone."""
    found = httpx.get(server.url + "/")
    assert found.headers["content-security-policy"] == pages.POLICY
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    again = httpx.get(server.url + "/", headers={"if-none-match": found.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    script = httpx.get(server.url + "/page/app.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert httpx.get(server.url + "/page/../app.py").status_code == 404
    assert httpx.get(server.url + "/page/%2e%2e/app.py").status_code == 404
    with running(ScriptedEngine(), page=False, api_key="right") as bare:
        assert httpx.get(bare.url + "/health").status_code == 200
        assert httpx.get(bare.url + "/").status_code == 404
        assert httpx.get(bare.url + "/v1/models").status_code == 401
