"""The conversation as a pure state machine: random lives, mistakes planted in it, and its rules one by one."""

from __future__ import annotations

import itertools
import os
import random
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import bemore.conversation
from bemore.conversation import Admit, Conversation, Forget, Mark, Phase, Stop, Store, Turn, Utterance
from bemore.failures import ErrorCode, Failure
from bemore.outbox import Frame, Kind, Peer, Ping, Send

FIRST = {signal: f"<first {signal}>" for signal in ("explicit", "indirect", "violence")}
SHORT = {signal: f"<short {signal}>" for signal in FIRST}
SENTENCES = (*FIRST.values(), *SHORT.values())
KEEP = 35.0
EPSILON = 1e-6
LIVES = int(os.environ.get("LIVES", "10000"))
SEED = int(os.environ.get("SEED", "0"))


class Peers:
    """What two peers receive: `steady` is always there, `phone` loses its connection and comes back."""

    def __init__(self) -> None:
        self.steady: list[tuple[float, Frame]] = []
        self.refusals: list[Frame] = []
        self.phone: dict[int, Frame] = {}  # by number: the client ignores a number that it has seen


class World:
    """One random life of a conversation, and a driver that reports in any order."""

    def __init__(self, seed: int, module: types.ModuleType) -> None:
        self.random = random.Random(seed)
        self.module = module
        self.gap = self.random.choice([0, 0.02])
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.barge_in = self.random.random() < 0.2
        self.core = module.Conversation(
            FIRST,
            SHORT,
            lambda: next(self.numbers),
            gap=self.gap,
            interval=self.random.choice([self.gap, 2.5 * self.gap]),
            keep=KEEP,
            barge_in=self.barge_in,
        )
        self.peers = Peers()
        self.turns: list[Any] = []
        self.reports: list[tuple[str, Any]] = []  # what the driver still has to report
        self.rows: list[tuple[Any, str]] = []
        self.ended: Counter[Any] = Counter()
        self.outcomes: dict[Any, str] = {}
        self.admits: Counter[Any] = Counter()
        self.stores: Counter[Any] = Counter()
        self.started: list[Any] = []
        self.asked: set[Any] = set()  # turns whose model has not ended
        self.withdrawn: set[Any] = set()
        self.sentences: list[tuple[int, str, Any]] = []
        self.marks = 0
        self.forgotten = False
        self.erased = self.stopped = False
        self.phone_away_since: float | None = None
        self.phone_last = 0  # the number of the last frame on this connection
        self.absences: list[tuple[float, float]] = []
        self.urgent: set[float] = set()  # times of events that may send what is held without its gaps
        self.perform(self.core.join("steady", 0.0))
        self.perform(self.core.join("phone", 0.0))

    # The driver

    def perform(self, actions: Iterable[Any]) -> None:
        assert not self.forgotten, "an action after Forget"
        for action in actions:
            match action:
                case self.module.Send(peers, frame):
                    self.receive(peers, frame)
                case self.module.Ping(peers, seq):
                    self.reports += [("pong", (peer, seq)) for peer in peers if peer == "steady" or self.chance(0.7)]
                case self.module.Admit(turn):
                    assert turn.phase is not self.module.Phase.WAITING
                    self.admits[turn] += 1
                    self.started.append(turn)
                    self.reports.append(("admit", turn))
                case self.module.Stop(turn):
                    assert turn in self.asked, "a model that is stopped and was not asked, or has ended"
                    # Some reports of a stopped task come late.
                    self.reports = [each for each in self.reports if each != ("model", turn) or self.chance(0.3)]
                case self.module.Store(turn):
                    assert not self.erased, "a row of an erased session"
                    self.stores[turn] += 1
                    self.reports.append(("store", turn))
                case self.module.Mark():
                    assert not self.erased, "a mark of an erased session"
                    self.marks += 1
                case self.module.Ended(turn, outcome):
                    self.ended[turn] += 1
                    self.outcomes[turn] = outcome
                case self.module.Forget():
                    self.forgotten = True

    def receive(self, peers: tuple[Peer, ...], frame: Frame) -> None:
        if frame.seq == 0:
            assert peers == ("steady",)
            self.peers.refusals.append(frame)
            return
        if "steady" in peers:
            self.peers.steady.append((self.now, frame))
        if "phone" in peers:
            assert self.phone_away_since is None
            assert frame.seq > self.phone_last, "a late peer that gets frames out of order"
            self.phone_last = frame.seq
            self.peers.phone[frame.seq] = frame
        if frame.kind is self.module.Kind.COMPLETE and "steady" in peers:
            shown = self.shown_before(frame)
            assert any(text == shown for _, text in self.rows), "a complete before its row"

    def shown_before(self, end: Frame) -> str:
        texts: list[str] = []
        for _, frame in reversed(self.peers.steady[:-1]):
            if frame.kind is not self.module.Kind.CHUNK:
                break
            texts.insert(0, frame.text)
        return "".join(texts)

    def is_current(self, turn: Any) -> bool:
        return turn.phase not in (self.module.Phase.WAITING, self.module.Phase.DONE)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def wait(self, seconds: float) -> None:
        """Let time pass, and call tick() at each deadline."""
        until = self.now + seconds
        for _ in range(10_000):
            deadline = self.core.deadline()
            if deadline is None or deadline > until or self.forgotten:
                break
            self.now = max(self.now, deadline)
            self.perform(self.core.tick(self.now))
        else:
            raise AssertionError("a deadline that never passes")
        self.now = until

    # Events

    def step(self) -> None:
        self.wait(self.random.choice([0, 0, 0.001, 0.03]))
        event = self.random.choice([self.ask] * 4 + [self.report] * 9 + [self.cancel, self.pause, self.flap, self.end])
        event()

    def ask(self) -> None:
        kind = self.random.choice(["plain", "plain", "explicit", "indirect", "violence", "bad"])
        turn = self.module.Turn("steady", self.module.Utterance(f"m{len(self.turns)}."))
        if kind == "bad":
            turn.failure = self.module.Failure(self.module.ErrorCode.EMPTY_MESSAGE)
        elif kind != "plain":
            turn.signal = kind
        if self.barge_in and kind != "bad":
            self.note_withdrawn()
        self.turns.append(turn)
        self.urgent.add(self.now)
        asked = len(self.peers.steady)
        self.perform(self.core.ask(turn, self.now))
        if kind == "explicit":
            self.wait(2 * self.gap + EPSILON)
            assert turn.phase is not self.module.Phase.WAITING, "an explicit signal waits"
            quiet = turn.sentence_for is None
            assert quiet or any(frame.text.startswith(SENTENCES) for _, frame in self.peers.steady[asked:])

    def note_withdrawn(self) -> None:
        waiting = [turn for turn in self.turns if turn.phase is self.module.Phase.WAITING]
        self.withdrawn |= {turn for turn in waiting if not turn.signal and not turn.failure}

    def cancel(self) -> None:
        self.note_withdrawn()
        self.urgent.add(self.now)
        current = next(filter(self.is_current, self.turns), None)
        self.perform(self.core.cancel(self.now))
        if current is not None:
            self.wait(2 * self.gap + EPSILON)
            assert self.ended[current] == 1, "a cancel that waits"

    def pause(self) -> None:
        self.wait(self.random.choice([0.02, 0.05, 0.5]))

    def flap(self) -> None:
        """Lose the phone's connection, or let it come back, always within the time that replies are kept."""
        if self.phone_away_since is None:
            self.phone_away_since = self.now
            self.perform(self.core.leave("phone", self.now, said_goodbye=False))
        else:
            self.absences.append((self.phone_away_since, self.now))
            self.phone_away_since, self.phone_last = None, 0
            self.perform(self.core.join("phone", self.now))

    def end(self) -> None:
        if self.chance(0.2):
            self.stopped = True
            self.perform(self.core.stop(self.now))
        elif self.chance(0.1):
            self.erased = True
            # What waits to be written is cancelled by the driver.
            self.reports = [each for each in self.reports if each[0] == "pong"]
            self.perform(self.core.erase(self.now))

    def report(self) -> None:
        if self.reports:
            self.carry_out(*self.reports.pop(self.random.randrange(len(self.reports))))

    def carry_out(self, kind: str, subject: Any) -> None:
        core, now = self.core, self.now
        if kind == "pong":
            peer, seq = subject
            if peer == "steady" or self.phone_away_since is None:
                self.perform(core.receipt(peer, seq, now))
        elif kind == "admit":
            if self.chance(0.8):
                self.perform(core.admitted(subject, now, at_risk=self.chance(0.1)))
                if subject.phase is self.module.Phase.STREAMING:
                    self.reports.append(("model", subject))
                    self.asked.add(subject)
            else:
                code = self.random.choice(
                    [
                        self.module.ErrorCode.RATE_LIMITED,
                        self.module.ErrorCode.SESSION_EXPIRED,
                        self.module.ErrorCode.AI_UNAVAILABLE,
                    ]
                )
                self.perform(core.failed(subject, self.module.Failure(code), now))
        elif kind == "model":
            self.speak(subject)
        elif self.chance(0.85):
            self.rows.append((subject, "".join(subject.reply.said)))
            self.perform(core.stored(subject, now))
        else:
            self.perform(core.failed(subject, self.module.Failure(self.module.ErrorCode.AI_UNAVAILABLE), now))

    def speak(self, turn: Any) -> None:
        draw = self.random.random()
        if draw < 0.55:
            self.perform(self.core.said(turn, turn.utterance.message, self.now))
            self.reports.append(("model", turn))
        elif draw < 0.65:
            self.perform(self.core.noticed(turn, self.random.choice(["explicit", "violence"]), self.now))
            self.reports.append(("model", turn))
        elif draw < 0.9:
            self.asked.discard(turn)
            self.perform(self.core.streamed(turn, self.now))
        elif self.is_current(turn) and turn.phase is self.module.Phase.STREAMING:
            self.asked.discard(turn)
            self.perform(self.core.failed(turn, self.module.Failure(self.module.ErrorCode.AI_UNAVAILABLE), self.now))

    # The end of a life

    def rest(self) -> None:
        for _ in range(2_000):
            if self.reports:
                self.carry_out(*self.reports.pop(0))
                self.wait(0.03)
            elif not self.core.idle:
                self.wait(0.5)
            else:
                break
        assert self.core.idle
        if self.phone_away_since is not None:
            self.flap()
        self.wait(5)  # What the phone has missed is sent with gaps.
        for peer in ("steady", "phone"):
            assert not self.forgotten, "forgotten with peers"
            self.perform(self.core.leave(peer, self.now, said_goodbye=True))
        if not self.forgotten:
            self.wait(KEEP + 1)
        assert self.forgotten, "never forgotten"

    def check(self) -> None:
        frames = [frame for _, frame in self.peers.steady]
        replies = split_replies(frames)
        self.check_replies(replies)
        self.check_turns(len(replies))
        self.check_rows(replies)
        self.check_gaps()
        self.check_phone(frames)
        self.check_sentences()

    def check_replies(self, replies: list[list[Frame]]) -> None:
        numbers = [frame.seq for reply in replies for frame in reply]
        assert numbers == sorted(set(numbers)), "numbers that do not grow"
        for reply in replies:
            kinds = [frame.kind for frame in reply]
            assert kinds[-1].ends
            if len(kinds) > 1:
                assert kinds[0] is self.module.Kind.BEGIN
                assert set(kinds[1:-1]) <= {self.module.Kind.CHUNK}
                assert self.module.Kind.CHUNK in kinds or kinds[-1] is self.module.Kind.ERROR
            else:
                assert kinds[0] is not self.module.Kind.COMPLETE, "a whole reply without text"
            words = "".join(frame.text for frame in reply)
            for sentence in SENTENCES:
                words = words.replace(sentence, "")
            spoken = {word.strip() for word in words.split(".")} - {""}
            assert len(spoken) <= 1, "two replies are mixed"

    def check_turns(self, replies: int) -> None:
        done = [turn for turn in self.turns if turn not in self.withdrawn]
        assert all(turn.phase is self.module.Phase.DONE for turn in self.turns)
        assert [self.ended[turn] for turn in done] == [1] * len(done), "a turn that does not end once"
        assert not any(self.ended[turn] for turn in self.withdrawn)
        assert replies + len(self.peers.refusals) == len(done)
        assert all(count == 1 for count in self.admits.values())
        for turn in self.turns:
            if turn.signal and turn.detected_by == "words":
                assert self.outcomes[turn] in ("complete", "interrupted"), "an error after a signal"
                assert turn.reply.said, "a signal without a sentence or an answer"
                if turn.sentence_for == turn.signal and not turn.failure:
                    assert any(text.strip().startswith(SENTENCES) for text in turn.reply.said)

    def check_rows(self, replies: list[list[Frame]]) -> None:
        shown = Counter("".join(frame.text for frame in reply) for reply in replies)
        assert not Counter(text for _, text in self.rows) - shown, "a row that was not shown"
        assert all(count == 1 for count in self.stores.values()), "a row that is stored twice"
        for turn in self.turns:
            if turn.may_store and turn.reply.said and not self.erased and self.outcomes[turn] != "ai_unavailable":
                assert self.stores[turn], "a reply that was shown and is not stored"
            if turn.may_store is False:
                assert not self.stores[turn], "a row beyond the rate"

    def check_gaps(self) -> None:
        for (before, _), (after, frame) in itertools.pairwise(self.peers.steady):
            if frame.kind is not self.module.Kind.BEGIN and after not in self.urgent:
                assert after - before >= self.gap - EPSILON, "two frames of a reply within the gap"

    def check_phone(self, frames: list[Frame]) -> None:
        assert all(frame in frames for frame in self.peers.phone.values())
        times = {frame.seq: time for time, frame in self.peers.steady}
        for reply in split_replies(frames):
            begun, ended = times[reply[0].seq], times[reply[-1].seq]
            away = any(left <= begun and ended <= returned for left, returned in self.absences)
            if not away and not self.erased:
                missed = [frame for frame in reply if frame.seq not in self.peers.phone]
                assert not missed, "a reply that the phone lost"

    def check_sentences(self) -> None:
        told: dict[str, int] = {}  # the number of the turn that last had the sentence of a signal
        for number, turn in enumerate(self.started):
            texts = [text.strip() for text in turn.reply.said if text.strip().startswith(SENTENCES)]
            if (signal := turn.sentence_for) is None:
                assert not texts
                continue
            before = [told[other] for other in bemore.conversation.COVERED_BY[signal] if other in told]
            assert texts == [(SHORT if before else FIRST)[signal]]
            if before and number - max(before) <= 2:
                assert turn.failure or self.outcomes[turn] == "interrupted", "a sentence in every turn"
            told[signal] = number
        assert self.marks <= 1
        assert self.marks or not told or self.core.at_risk


def split_replies(frames: list[Frame]) -> list[list[Frame]]:
    replies: list[list[Frame]] = [[]]
    for frame in frames:
        replies[-1].append(frame)
        if frame.kind.ends:
            replies.append([])
    assert not replies[-1], "a reply without an end"
    return replies[:-1]


def live(seed: int, module: types.ModuleType = bemore.conversation) -> Counter[str]:
    world = World(seed, module)
    for _ in range(world.random.randint(5, 40)):
        world.step()
    world.rest()
    world.check()
    return Counter(world.outcomes.values())


def test_random_lives_keep_every_rule() -> None:
    """Every seed is one life; a failure names the seed, and `SEED=n LIVES=1` repeats it."""
    outcomes: Counter[str] = Counter()
    for seed in range(SEED, SEED + LIVES):
        try:
            outcomes += live(seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    if LIVES >= 100:
        assert set(outcomes) >= {"complete", "interrupted", "rate_limited", "session_expired", "ai_unavailable"}


# The rules one by one

GAP, INTERVAL = 0.02, 0.05


class Talk:
    """A conversation with one peer, and what it was told to do."""

    def __init__(self, *peers: str, gap: float = GAP, **options: Any) -> None:
        self.core = Conversation(
            FIRST, SHORT, itertools.count(1).__next__, gap=gap, interval=2.5 * gap, keep=KEEP, **options
        )
        self.now = 0.0
        self.actions: list[Any] = []
        self.sent: dict[Peer, list[Frame]] = defaultdict(list)
        for peer in peers or ("page",):
            self.do(self.core.join(peer, self.now))

    def do(self, actions: Iterable[Any]) -> None:
        for action in actions:
            self.actions.append(action)
            if isinstance(action, Send):
                for peer in action.peers:
                    self.sent[peer].append(action.frame)

    def ask(self, message: str = "하나", **fields: Any) -> Turn:
        turn = Turn("page", Utterance(message), **fields)
        self.do(self.core.ask(turn, self.now))
        return turn

    def admit(self, turn: Turn) -> Turn:
        self.do(self.core.admitted(turn, self.now))
        return turn

    def stream(self, turn: Turn, *texts: str) -> Turn:
        for text in texts:
            self.do(self.core.said(turn, text, self.now))
        return turn

    def finish(self, turn: Turn) -> None:
        """Let the model end, the text be sent and the row be stored."""
        self.do(self.core.streamed(turn, self.now))
        self.wait()
        self.do(self.core.stored(turn, self.now))
        self.wait()

    def fail(self, turn: Turn, code: ErrorCode = ErrorCode.AI_UNAVAILABLE) -> None:
        self.do(self.core.failed(turn, Failure(code), self.now))
        self.wait()

    def wait(self, seconds: float = 1.0) -> None:
        until = self.now + seconds
        while (deadline := self.core.deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            self.do(self.core.tick(self.now))
        self.now = until

    def frames(self, peer: str = "page") -> list[str]:
        """Take what a peer has received: the kind of each frame, or the text of a chunk."""
        frames, self.sent[peer] = self.sent[peer], []
        return [frame.text if frame.kind is Kind.CHUNK else frame.kind.name.lower() for frame in frames]

    def count(self, kind: type) -> int:
        return sum(isinstance(action, kind) for action in self.actions)


def test_a_reply_is_begin_chunks_complete_after_its_row() -> None:
    talk = Talk()
    turn = talk.admit(talk.ask())
    talk.stream(turn, "가")
    assert talk.frames() == ["begin"]
    talk.wait(GAP)
    talk.stream(turn, "나", "다")
    talk.do(talk.core.streamed(turn, talk.now))
    assert talk.frames() == ["가"]
    talk.wait()
    assert (talk.frames(), turn.phase, talk.count(Store)) == (["나다"], Phase.STORING, 1)
    talk.do(talk.core.stored(turn, talk.now))
    talk.wait()
    assert (talk.frames(), turn.phase, talk.core.idle) == (["complete"], Phase.DONE, True)


def test_requests_are_answered_in_order_and_refusals_too() -> None:
    talk = Talk()
    first, bad, second = talk.ask(), talk.ask(failure=Failure(ErrorCode.EMPTY_MESSAGE)), talk.ask("둘")
    talk.finish(talk.stream(talk.admit(first), "가"))
    talk.finish(talk.stream(talk.admit(second), "나"))
    assert talk.frames() == ["begin", "가", "complete", "error", "begin", "나", "complete"]
    assert bad.phase is Phase.DONE


def test_the_seventeenth_waiting_request_is_refused_in_its_turn() -> None:
    talk = Talk()
    turns = [talk.ask() for _ in range(18)]
    assert talk.frames() == []
    assert turns[17].failure is not None
    assert turns[17].failure.code is ErrorCode.RATE_LIMITED
    for turn in turns[:17]:
        talk.fail(turn)
    assert talk.frames() == ["error"] * 18


def test_a_cancel_ends_the_reply_and_drops_what_waits() -> None:
    talk = Talk()
    turn, waiting = talk.admit(talk.ask()), talk.ask("둘")
    talk.stream(turn, "가")
    talk.wait(GAP)
    talk.stream(turn, "나")
    talk.do(talk.core.cancel(talk.now))
    talk.wait(GAP)
    assert talk.frames() == ["begin", "가", "interrupted"]
    assert waiting.phase is Phase.DONE
    assert turn.reply is not None
    assert (turn.reply.said, talk.count(Store), talk.count(Stop)) == (["가"], 1, 1)


def test_a_cancel_before_the_first_text_stores_nothing() -> None:
    talk = Talk()
    turn = talk.admit(talk.ask())
    talk.do(talk.core.cancel(talk.now))
    talk.wait()
    assert (talk.frames(), talk.count(Store), turn.phase) == (["interrupted"], 0, Phase.DONE)
    talk.do(talk.core.cancel(talk.now))
    assert talk.frames() == []


def test_a_begin_is_followed_by_its_chunk_before_a_cancel() -> None:
    talk = Talk()
    talk.stream(talk.admit(talk.ask()), "가", "나")
    talk.do(talk.core.cancel(talk.now))
    talk.wait(2 * GAP)
    assert talk.frames() == ["begin", "가나", "interrupted"]


def test_barge_in_interrupts_unless_the_frame_is_bad() -> None:
    talk = Talk(barge_in=True)
    turn = talk.stream(talk.admit(talk.ask()), "가")
    talk.wait(GAP)
    talk.ask(failure=Failure(ErrorCode.EMPTY_MESSAGE))
    assert turn.phase is Phase.STREAMING
    talk.ask("둘")
    talk.wait()
    assert talk.frames() == ["begin", "가", "interrupted", "error"]


@pytest.mark.parametrize("signal", FIRST)
def test_a_signal_gets_its_sentence_before_the_database_answers(signal: str) -> None:
    talk = Talk()
    turn = talk.ask(signal=signal)
    talk.wait(GAP)
    assert talk.frames() == ["begin", FIRST[signal]]
    assert (turn.phase, talk.count(Mark), turn.detected_by) == (Phase.ADMITTING, 1, "words")


def test_an_explicit_signal_interrupts_an_indirect_one_waits() -> None:
    talk = Talk()
    talk.stream(talk.admit(talk.ask()), "가")
    talk.wait(GAP)
    waiting, indirect = talk.ask("둘"), talk.ask(signal="indirect")
    assert (waiting.phase, indirect.phase) == (Phase.WAITING, Phase.WAITING)
    talk.ask(signal="explicit")
    talk.wait(2 * GAP)
    assert talk.frames() == ["begin", "가", "interrupted", "begin", FIRST["explicit"]]
    assert (waiting.phase, indirect.phase) == (Phase.WAITING, Phase.WAITING)


def test_a_sentence_is_said_again_short_at_the_third_turn() -> None:
    talk = Talk()
    for _ in range(6):
        talk.finish(talk.stream(talk.admit(talk.ask(signal="explicit")), "네"))
    said = [text for text in talk.frames() if text.strip().startswith(SENTENCES)]
    assert said == [FIRST["explicit"], SHORT["explicit"]]


@pytest.mark.parametrize(("later", "expected"), [("indirect", None), ("violence", FIRST["violence"])])
def test_a_sentence_answers_a_milder_signal_but_no_other_kind(later: str, expected: str | None) -> None:
    talk = Talk()
    talk.finish(talk.stream(talk.admit(talk.ask(signal="explicit")), "네"))
    talk.frames()
    talk.finish(talk.stream(talk.admit(talk.ask(signal=later)), "네"))
    assert talk.frames() == ["begin", *([expected] if expected else []), "네", "complete"]


@pytest.mark.parametrize("code", [ErrorCode.AI_UNAVAILABLE, ErrorCode.RATE_LIMITED, ErrorCode.SESSION_EXPIRED])
def test_a_failure_in_a_quiet_turn_gives_the_short_sentence(code: ErrorCode) -> None:
    talk = Talk()
    talk.finish(talk.stream(talk.admit(talk.ask(signal="explicit")), "네"))
    talk.frames()
    turn = talk.ask(signal="explicit")
    talk.fail(turn, code)
    if code is ErrorCode.AI_UNAVAILABLE:  # The row is stored, since a token may have been taken.
        talk.do(talk.core.stored(turn, talk.now))
        talk.wait()
    end = "complete" if code is ErrorCode.AI_UNAVAILABLE else "interrupted"
    assert talk.frames() == ["begin", SHORT["explicit"], end]


def test_a_cancel_behind_a_signal_leaves_its_sentence() -> None:
    talk = Talk()
    talk.stream(talk.admit(talk.ask()), "가")
    talk.wait()
    talk.frames()
    waiting = talk.ask(signal="indirect")
    talk.do(talk.core.cancel(talk.now))
    talk.wait()
    assert talk.frames() == ["interrupted", "begin", FIRST["indirect"], "interrupted"]
    talk.admit(waiting)
    assert talk.count(Store) == 2


@pytest.mark.parametrize("refusal", [ErrorCode.RATE_LIMITED, ErrorCode.SESSION_EXPIRED])
def test_a_refused_signal_gets_its_sentence_and_no_row(refusal: ErrorCode) -> None:
    talk = Talk()
    talk.fail(talk.ask(signal="explicit"), refusal)
    assert (talk.frames(), talk.count(Store)) == (["begin", FIRST["explicit"], "interrupted"], 0)


def test_a_refusal_is_seen_by_its_asker_alone() -> None:
    talk = Talk("page", "tab")
    talk.fail(talk.ask(), ErrorCode.RATE_LIMITED)
    assert (talk.frames(), talk.frames("tab")) == (["error"], [])
    talk.fail(talk.ask())
    assert (talk.frames(), talk.frames("tab")) == (["error"], ["error"])


def test_a_notice_puts_the_sentence_where_the_marker_stood() -> None:
    talk = Talk()
    turn = talk.admit(talk.ask())
    talk.do(talk.core.noticed(turn, "violence", talk.now))
    talk.finish(talk.stream(turn, "네"))
    assert talk.frames() == ["begin", FIRST["violence"], "네", "complete"]
    assert (turn.detected_by, talk.count(Mark)) == ("model", 1)


def test_a_reply_is_cut_at_its_longest_and_is_complete() -> None:
    talk = Talk(gap=0)
    turn = talk.stream(talk.admit(talk.ask()), "가" * 15_999, "나다", "라")
    talk.do(talk.core.stored(turn, talk.now))
    assert turn.reply is not None
    assert len("".join(turn.reply.said)) == 16_000
    assert (talk.frames()[-1], talk.count(Stop)) == ("complete", 1)


def test_a_model_without_a_word_is_a_failure() -> None:
    talk = Talk()
    talk.do(talk.core.streamed(talk.admit(talk.ask()), talk.now))
    assert talk.frames() == ["error"]


def test_a_stop_lets_the_reply_end_and_refuses_all_but_signals() -> None:
    talk = Talk()
    turn, waiting = talk.stream(talk.admit(talk.ask()), "가"), talk.ask("둘")
    talk.do(talk.core.stop(talk.now))
    talk.ask(signal="explicit")
    late = talk.ask("셋")
    talk.wait()
    assert talk.frames() == ["begin", "가", "interrupted", "begin", FIRST["explicit"], "interrupted", "error", "error"]
    assert {waiting.phase, late.phase, turn.phase} == {Phase.DONE}


def test_an_erased_session_stores_nothing_and_refuses() -> None:
    talk = Talk()
    turn = talk.stream(talk.admit(talk.ask()), "가")
    talk.do(talk.core.erase(talk.now))
    talk.ask("둘")
    talk.wait()
    assert (talk.frames()[-2:], talk.count(Store), turn.phase) == (["interrupted", "error"], 0, Phase.DONE)


def test_a_late_peer_gets_the_reply_from_its_begin_with_gaps() -> None:
    talk = Talk()
    turn = talk.stream(talk.admit(talk.ask()), "가")
    talk.wait()
    talk.do(talk.core.join("tab", talk.now))
    assert talk.frames("tab") == ["begin"]
    talk.wait(GAP)
    assert talk.frames("tab") == ["가"]
    talk.finish(talk.stream(turn, "나"))
    assert talk.frames("tab") == ["나", "complete"]


def test_a_confirmed_reply_is_not_sent_again() -> None:
    talk = Talk()
    talk.finish(talk.stream(talk.admit(talk.ask()), "가"))
    (ping,) = (action for action in talk.actions if isinstance(action, Ping))
    talk.do(talk.core.receipt("page", ping.seq, talk.now))
    talk.do(talk.core.leave("page", talk.now, said_goodbye=False))
    talk.do(talk.core.join("later", talk.now))
    talk.wait()
    assert talk.frames("later") == []


def test_a_lost_reply_is_sent_to_every_peer_that_joins() -> None:
    """Only the peer itself knows whether it lost the reply; a client ignores numbers that it has seen."""
    talk = Talk()
    talk.finish(talk.stream(talk.admit(talk.ask()), "가"))
    talk.do(talk.core.leave("page", talk.now, said_goodbye=False))
    for peer in ("tab", "page again"):
        talk.do(talk.core.join(peer, talk.now))
        talk.wait()
        assert talk.frames(peer) == ["begin", "가", "complete"]


def test_the_row_of_an_interrupted_turn_precedes_the_next_admission() -> None:
    """The model that answers the next turn is to see it in the history."""
    talk = Talk()
    talk.stream(talk.admit(talk.ask()), "가")
    talk.wait(GAP)
    talk.ask(signal="explicit")
    talk.wait()
    order = [type(action) for action in talk.actions if isinstance(action, Store | Admit)]
    assert order == [Admit, Store, Admit]


def test_a_reply_that_outlives_its_peers_has_no_past_deadline() -> None:
    talk = Talk()
    talk.finish(talk.stream(talk.admit(talk.ask()), "가"))
    turn = talk.stream(talk.admit(talk.ask("둘")), "나")
    talk.do(talk.core.leave("page", talk.now, said_goodbye=False))
    talk.wait(2 * KEEP)
    assert talk.core.deadline() is None
    talk.finish(turn)
    deadline = talk.core.deadline()
    assert deadline is not None
    assert deadline > talk.now


def test_a_cancel_while_the_last_text_waits_ends_the_reply() -> None:
    talk = Talk()
    turn = talk.stream(talk.admit(talk.ask()), "가")
    talk.wait(GAP)
    talk.stream(turn, "나")
    talk.do(talk.core.streamed(turn, talk.now))
    talk.do(talk.core.cancel(talk.now))
    talk.wait()
    assert talk.frames() == ["begin", "가", "interrupted"]
    assert (turn.phase, talk.count(Stop), talk.count(Store)) == (Phase.DONE, 0, 1)


def test_a_lost_reply_is_kept_for_its_time_and_then_forgotten() -> None:
    talk = Talk()
    talk.finish(talk.stream(talk.admit(talk.ask()), "가"))
    talk.do(talk.core.leave("page", talk.now, said_goodbye=False))
    talk.wait(KEEP - 0.001)
    assert not talk.count(Forget)
    talk.wait(0.002)
    assert talk.count(Forget) == 1


# Mistakes that the random lives must find

PLANTED = {
    "text after the end": (
        "if turn.phase is not Phase.STREAMING or not text:",
        "if turn.phase is Phase.ADMITTING or not text:",
    ),
    "an explicit signal that waits": (
        "            self._interrupt()\n            self._outbox.flush_if_more_than(now, 1)",
        "            self._outbox.flush_if_more_than(now, 1)",
    ),
    "a helpline sentence that waits for the chunk interval": ("sentence, urgent=True)", "sentence)"),
    "a cancel that drops a signal": ("if turn.signal or turn.failure:\n", "if turn.failure:\n"),
    "a row that is stored twice": ("        if not being_stored:\n", "        if True:\n"),
    "a failure of a turn that is over": (
        "        if turn is self._current:\n            self._fail",
        "        if True:\n            self._fail",
    ),
    "a complete before the row": (
        "self._store_after_queue(turn)\n            else:\n                self._fail(turn, NO_TEXT)",
        "self._end(turn, Kind.COMPLETE)\n            else:\n                self._fail(turn, NO_TEXT)",
    ),
    "an error after a signal": (
        "        if turn.signal:\n            if turn.sentence_for",
        "        if False:\n            if turn.sentence_for",
    ),
    "a row beyond the rate": ("if turn.reply.said and turn.may_store and", "if turn.reply.said and"),
    "a row of an erased session": (
        " and self._closed is not ERASED:\n            self._unreported",
        ":\n            self._unreported",
    ),
    "a sentence in every turn": ("if told and min(told) <= QUIET_TURNS and not even_if_recent:", "if False:"),
    "a session that is forgotten with its peers": (
        "if self.idle and not self._outbox.wanted:",
        "if self.idle:",
    ),
    "an interrupted reply without a row": ("        if not being_stored:\n", "        if False:\n"),
    "a lost reply that is not kept": ("reply.lost, reply.expires_at = True, now", "reply.expires_at = now"),
    "a model that is stopped after its end": (
        "self._outbox.holds(turn.reply):\n                turn.phase = Phase.STORING\n",
        "self._outbox.holds(turn.reply):\n",
    ),
    "a mark of an erased session": (
        "            if self._closed is not ERASED:\n                self._actions.append(Mark())",
        "            self._actions.append(Mark())",
    ),
    "a late peer that gets new frames first": (
        "        if self._behind:\n            peers = tuple",
        "        if False:\n            peers = tuple",
    ),
    "no gap between frames": (
        "        self._due = now + self._gap\n        if kind",
        "        self._due = now\n        if kind",
    ),
    "a sentence that an interruption drops": (
        "kept = [item for item in items if item.urgent]",
        "kept: list[Held] = []",
    ),
    "a receipt that proves every reply": ("if reply.ended and reply.frames[-1].seq <= seq:", "if True:"),
    "missed frames that nothing sends": ("        if self._behind:\n            return self._due\n", ""),
}


def with_mistake(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Return the conversation, and the outbox below it, with one piece of their source replaced."""
    folder = Path(bemore.conversation.__file__).parent
    sources = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in ("outbox", "conversation")}
    assert sum(source.count(before) for source in sources.values()) == 1, before
    for name, source in sources.items():
        module = types.ModuleType(f"planted_{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        text = source.replace(before, after).replace("bemore.outbox", "planted_outbox")
        exec(compile(text, f"{name} with a mistake", "exec"), module.__dict__)
    return sys.modules["planted_conversation"]


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found_within_100_lives(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = with_mistake(*PLANTED[mistake], monkeypatch)

    def hundred_lives() -> None:
        for seed in range(100):
            live(seed, module)

    # An assertion of the core, or an error that the mistake causes, counts as well as an assertion of the test.
    with pytest.raises(Exception):  # noqa: B017, PT011
        hundred_lives()
