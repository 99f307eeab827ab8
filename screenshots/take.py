"""Take the pictures of the page anew: python screenshots/take.py. Needs Chromium, fonts-nanum and pngquant."""

import asyncio
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from page import Visit, running_browser, visiting  # noqa: E402
from playwright.async_api import expect  # noqa: E402
from support import ScriptedCounsellor, make_settings, serve  # noqa: E402

SCREENS = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1024, "height": 700}}
FIRST = "오늘 회사에서 크게 혼나서 하루 종일 마음이 무거웠어요"
REPLY = "종일 마음이 무거우셨다니 많이 속상하셨겠어요. 그때 어떤 말이 가장 마음에 남았나요?"
# README shows these two under names of their own.
NAMES = {"reply-phone": "reply", "history-phone": "conversation"}


async def take(visit: Visit, name: str, screen: str) -> None:
    file = HERE / f"{NAMES.get(f'{name}-{screen}', f'{name}-{screen}')}.png"
    await visit.page.screenshot(path=file)
    command = ("pngquant", "--force", "--ext", ".png", "--strip", "--speed", "1", "--nofs", "64", str(file))
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0, "pngquant failed"


async def take_all(visit: Visit, counsellor: ScriptedCounsellor, screen: str) -> None:
    await take(visit, "first", screen)
    await visit["#begin"].click()
    await visit.state("연결됨")
    await visit["#microphone"].click()
    await visit.page.evaluate("words => ear.hear(words)", FIRST)
    await take(visit, "listening", screen)
    talk = counsellor.expect()
    await visit["#microphone"].click()
    await visit.state("생각 중")
    await take(visit, "waiting", screen)
    talk.say(REPLY[:26])
    await visit.state("말하는 중")
    await take(visit, "reply", screen)
    talk.say(REPLY[26:]).end()
    await visit.replied(REPLY)
    counsellor.expect().say("지금 곁에 누가 함께 있나요?").end()
    await visit["#feeling"].select_option("슬픔")
    await visit.write("이제 그만 죽고 싶어요")
    await expect(visit[".calls:visible"]).to_have_count(1)
    await visit.state("연결됨")
    await take(visit, "helpline", screen)
    await visit["#open-history"].click()
    await expect(visit["dialog .mine"]).to_have_count(2)
    await take(visit, "history", screen)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with running_browser(Path(folder)) as browser:
            for screen, viewport in SCREENS.items():
                counsellor = ScriptedCounsellor()
                settings = make_settings(f"sqlite:///{folder}/{screen}.db", MAX_AI_REQUESTS_PER_MINUTE=600)
                async with serve(settings, counsellor) as site:
                    async with visiting(
                        browser, site, first_screen=True, viewport=viewport, reduced_motion="reduce"
                    ) as visit:
                        await take_all(visit, counsellor, screen)


asyncio.run(main())
