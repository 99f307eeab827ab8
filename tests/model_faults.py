"""What can go wrong with the model, by name: what it answers in turn, and what a person gets."""

from dataclasses import dataclass
from email.utils import formatdate

from standin import Answer, event, reset_after, silent_after, status, stream

from bemore.care import BLOCKED_REPLY

WHOLE = "네, 듣고 있어요."  # what the stand-in says where nothing is scripted
HANGUL = event("가나다", "STOP")
MIDDLE = HANGUL.index("나".encode()) + 1
THOUGHT = b'data: {"candidates": [{"content": {"parts": [{"text": "hm", "thought": true}]}}]}\n\n'
BLOCKED_PROMPT = b'data: {"promptFeedback": {"blockReason": "SAFETY"}}\n\n'


@dataclass(frozen=True)
class Fault:
    answers: list[Answer]  # after which the stand-in says WHOLE
    text: str
    end: str = "complete"


MODEL_FAULTS = {
    "status 400": Fault([status(400)], "", "error"),
    "status 401": Fault([status(401)], "", "error"),
    "status 403": Fault([status(403)], "", "error"),
    "status 404": Fault([status(404)], "", "error"),
    "status 429 once": Fault([status(429)], WHOLE),
    "status 429 with a short Retry-After": Fault([status(429, Retry_After="0")], WHOLE),
    "status 429 with a Retry-After beyond the time left": Fault([status(429, Retry_After="30")], "", "error"),
    "status 429 with a Retry-After in years": Fault(
        [status(429, Retry_After=formatdate(4e9, usegmt=True))], "", "error"
    ),
    "status 429 with a Retry-After that is no date": Fault(
        [status(429, Retry_After="Mon, 01 Jan 2024 00:00:00 -9999999999999999")], WHOLE
    ),
    "status 500 once": Fault([status(500)], WHOLE),
    "status 503 twice": Fault([status(503)] * 2, WHOLE),
    "reset before the first text": Fault([reset_after()], WHOLE),
    "silence before the first text": Fault([silent_after()], "", "error"),
    "silence after text": Fault([silent_after(event("가"))], f"가 {WHOLE}"),
    "silence after text, twice": Fault([silent_after(event("가")), silent_after(event("나"))], "가 나", "error"),
    "reset after text": Fault([reset_after(event("가"))], f"가 {WHOLE}"),
    "reset after text, twice": Fault([reset_after(event("가")), reset_after(event("나"))], "가 나", "error"),
    "no finish reason": Fault([stream(event("가"))], f"가 {WHOLE}"),
    "no finish reason, twice": Fault([stream(event("가")), stream(event("나"))], "가 나", "error"),
    "malformed event after text": Fault([stream(event("가"), b"data: {\n\n")], f"가 {WHOLE}"),
    "HTML with status 200": Fault([stream(b"<html>\n<p>data: x</p>\n", headers={"Content-Type": "text/html"})], WHOLE),
    "STOP without text": Fault([stream(event("", "STOP"))], WHOLE),
    "MAX_TOKENS inside a sentence": Fault([stream(event("가"), event(finish="MAX_TOKENS"))], f"가 {WHOLE}"),
    "MAX_TOKENS without text": Fault([stream(event(finish="MAX_TOKENS"))], WHOLE),
    "SAFETY before text": Fault([stream(event(finish="SAFETY"))], BLOCKED_REPLY),
    "SAFETY after text": Fault([stream(event("가"), event(finish="SAFETY"))], f"가 {BLOCKED_REPLY}"),
    "blocked prompt": Fault([stream(BLOCKED_PROMPT)], BLOCKED_REPLY),
    "thought before text": Fault([stream(THOUGHT, HANGUL)], "가나다"),
    "text cut inside a character": Fault([stream(HANGUL[:MIDDLE], HANGUL[MIDDLE:])], "가나다"),
    "text byte by byte": Fault([stream(*(bytes([byte]) for byte in HANGUL))], "가나다"),
    "a line of 900 KiB": Fault([stream(event("가", "STOP", signature="A" * 900 * 1024))], "가"),
}
