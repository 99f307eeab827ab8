"""One conversation as a pure state machine: events in, actions out. No I/O, no tasks, no clock, no logging.

The driver reports an event, performs the actions that come back, and sets one timer::

    perform(conversation.ask(turn, now))
    set_timer(conversation.deadline())        # at which it calls conversation.tick(now)

A turn is a request and its answer. One turn at a time is between WAITING and DONE::

    WAITING ──► ADMITTING ──admitted──► STREAMING ──streamed──► STORING ──stored──► DONE
       │            │ failed                │ failed               │ failed           ▲
       └────────────┴───────────────────────┴──────────────────────┴── interrupted ───┘

A cancel, an explicit signal, barge-in, the deletion of the session and the end of the process interrupt a turn.

An interruption ends the turn within the same event: its complete is queued, the next turn starts, and the row is
stored afterwards. What the driver still reports about a turn that is DONE only decides whether its row is stored.

The outbox (bemore/outbox.py) decides when each frame leaves. All times are seconds on one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any, NamedTuple

from bemore.counsellor import Emotion
from bemore.failures import ErrorCode, Failure
from bemore.outbox import Kind, Outbox, Peer, Ping, Reply, Send

MAX_WAITING = 16  # requests of a session
MAX_REPLY_CHARACTERS = 16_000  # ten minutes of speech
QUIET_TURNS = 2  # after a helpline sentence, in which a further signal is left to the model
# The signals whose sentence also answers this signal. They are plain strings, so that this module does not load the
# word detector.
COVERED_BY = {
    "explicit": ("explicit",),
    "violence": ("violence",),
    "indirect": ("indirect", "explicit", "violence"),
}
TOO_MANY_WAIT = Failure(ErrorCode.RATE_LIMITED, retry_after_ms=1_000)
SHUTTING_DOWN = Failure(ErrorCode.AI_UNAVAILABLE, "shutting down")
ERASED = Failure(ErrorCode.SESSION_EXPIRED)
NO_TEXT = Failure(ErrorCode.AI_UNAVAILABLE, "model: no text")


class Phase(Enum):
    WAITING = auto()  # behind another turn
    ADMITTING = auto()  # the driver takes a token and reads the history
    STREAMING = auto()  # the driver asks the model
    STORING = auto()  # the last text is sent; then the driver writes the row
    DONE = auto()


@dataclass(frozen=True, slots=True)
class Utterance:
    """A person's words, checked and ready to be stored."""

    message: str = ""
    emotion: Emotion | None = None
    timestamp: int = 0  # milliseconds since the epoch, by the client's clock if it sent one


@dataclass(eq=False, slots=True)
class Turn:
    """A request and its answer. Only the conversation writes its fields after `ask`."""

    asker: Peer
    utterance: Utterance = Utterance()
    signal: str | None = None  # "explicit", "indirect" or "violence"; set before `ask` if the word detector found one
    failure: Failure | None = None  # set before `ask` for a frame that is no valid request
    phase: Phase = Phase.WAITING
    asked_at: float = 0.0
    reply: Reply | None = None  # from ADMITTING on
    room: int = MAX_REPLY_CHARACTERS
    detected_by: str = ""  # "words" or "model" if there was a signal
    sentence_for: str | None = None  # the signal whose helpline sentence the reply contains
    may_store: bool | None = None  # whether the row may be stored; None until the admission was reported


class Admit(NamedTuple):
    """Take a token and read the history; report admitted() or failed()."""

    turn: Turn


class Stop(NamedTuple):
    """Cancel the model's stream; nothing is to be reported."""

    turn: Turn


class Store(NamedTuple):
    """Write the row; report stored() or failed()."""

    turn: Turn


class Mark(NamedTuple):
    """Mark the session as at risk in the database."""


class Ended(NamedTuple):
    """Write the log line of a turn: its last frame was sent."""

    turn: Turn
    outcome: str


class Forget(NamedTuple):
    """Drop the conversation: it has no peers and nothing to do."""


Action = Send | Ping | Admit | Stop | Store | Mark | Ended | Forget


class Conversation:
    """The rules of a session: order, interruption, helpline sentences, refusals and the end of a turn.

    `first` and `short` are the helpline sentences by signal; see Outbox for `gap`, `interval` and `keep`.
    """

    def __init__(
        self,
        first: Mapping[Any, str],
        short: Mapping[Any, str],
        next_seq: Callable[[], int],
        *,
        gap: float,
        interval: float,
        keep: float,
        barge_in: bool = False,
    ) -> None:
        self._first, self._short, self._barge_in = first, short, barge_in
        self._actions: list[Action] = []
        self._outbox = Outbox(self._actions.append, next_seq, gap=gap, interval=interval, keep=keep)
        self.at_risk = False
        self._current: Turn | None = None
        self._waiting: list[Turn] = []
        self._closed: Failure | None = None  # the answer to every request from now on
        self._turns_since: dict[str, int] = {}  # for each signal the number of turns since its sentence
        self._unreported: set[Turn] = set()  # turns of which the driver still has to report an Admit or Store

    # Events from sockets

    def join(self, peer: Peer, now: float) -> list[Action]:
        """Add a peer, and send it the replies that it may have missed."""
        self._outbox.join(peer, now)
        return self._settle(now)

    def leave(self, peer: Peer, now: float, *, said_goodbye: bool) -> list[Action]:
        """Remove a peer; a reply that it may not have whole is kept for its return."""
        self._outbox.leave(peer, now, said_goodbye=said_goodbye)
        return self._settle(now)

    def receipt(self, peer: Peer, seq: int, now: float) -> list[Action]:
        """Note that a peer has received every frame up to `seq`."""
        self._outbox.receipt(peer, seq)
        return self._settle(now)

    def ask(self, turn: Turn, now: float) -> list[Action]:
        """Take a request, or a frame to be refused. An explicit signal interrupts, and goes ahead of what waits."""
        turn.asked_at = now
        turn.detected_by = "words" if turn.signal else ""
        if self._barge_in and not turn.failure:
            self._cancel(now)
        if not turn.signal and not turn.failure:
            full = sum(not other.failure for other in self._waiting) >= MAX_WAITING
            turn.failure = self._closed or (TOO_MANY_WAIT if full else None)
        if turn.signal == "explicit":
            self._interrupt()
            self._outbox.flush_if_more_than(now, 1)  # The sentence is sent at most two gaps later.
            self._waiting.insert(0, turn)
        else:
            self._waiting.append(turn)
        return self._settle(now)

    def cancel(self, now: float) -> list[Action]:
        """Stop the reply in progress and drop the requests that wait; those with a signal get their sentence."""
        self._cancel(now)
        return self._settle(now)

    # Events from the driver

    def admitted(self, turn: Turn, now: float, *, at_risk: bool = False) -> list[Action]:
        """Note that a token was taken; `at_risk` is the session's mark in the database."""
        self.at_risk |= at_risk
        self._unreported.discard(turn)
        turn.may_store = True
        if turn.phase is Phase.ADMITTING:
            turn.phase = Phase.STREAMING
        else:
            self._store_late_admitted(turn)
        return self._settle(now)

    def said(self, turn: Turn, text: str, now: float) -> list[Action]:
        """Take text of the model's; beyond MAX_REPLY_CHARACTERS the reply is cut, and complete."""
        if turn.phase is not Phase.STREAMING or not text:
            return []
        assert turn.reply is not None
        self._outbox.say(turn.reply, text[: turn.room])
        turn.room = max(0, turn.room - len(text))
        if not turn.room:
            self._actions.append(Stop(turn))
            turn.phase = Phase.STORING
            self._store_after_queue(turn)
        return self._settle(now)

    def noticed(self, turn: Turn, signal: str, now: float) -> list[Action]:
        """Note that the model saw a risk."""
        if turn.phase is Phase.STREAMING and turn.sentence_for is None:
            turn.signal, turn.detected_by = turn.signal or signal, turn.detected_by or "model"
            self._queue_sentence(turn, signal)
        return self._settle(now)

    def streamed(self, turn: Turn, now: float) -> list[Action]:
        """Note that the model's reply is whole."""
        if turn.phase is Phase.STREAMING:
            assert turn.reply is not None
            if turn.reply.begun or self._outbox.holds(turn.reply):
                turn.phase = Phase.STORING
                self._store_after_queue(turn)
            else:
                self._fail(turn, NO_TEXT)
        return self._settle(now)

    def stored(self, turn: Turn, now: float) -> list[Action]:
        """Note that the row is committed."""
        self._unreported.discard(turn)
        if turn.phase is Phase.STORING:
            self._end(turn, Kind.COMPLETE)
        return self._settle(now)

    def failed(self, turn: Turn, failure: Failure, now: float) -> list[Action]:
        """Note that the admission, the model or the database failed."""
        self._unreported.discard(turn)
        admitting = turn.may_store is None
        if admitting:
            # If the database gave no answer, a token may have been taken, and the row may be stored.
            turn.may_store, turn.failure = failure.code is ErrorCode.AI_UNAVAILABLE, failure
        if turn is self._current:
            self._fail(turn, failure)
        elif admitting:
            self._store_late_admitted(turn)
        return self._settle(now)

    # Events from the process

    def stop(self, now: float) -> list[Action]:
        """Let the reply in progress end, since the process does; what waits and what comes is refused after it."""
        self._close(SHUTTING_DOWN)
        return self._settle(now)

    def erase(self, now: float) -> list[Action]:
        """End the reply in progress, keep nothing, and refuse what waits and what comes.

        The driver cancels what it has under way, and reports nothing of it.
        """
        self._close(ERASED)
        self._interrupt()
        self._unreported.clear()
        self._outbox.discard_all()
        return self._settle(now)

    def tick(self, now: float) -> list[Action]:
        """Do what is due."""
        return self._settle(now)

    def deadline(self) -> float | None:
        """Return when tick() is wanted, if no other event comes before; None for never."""
        return self._outbox.deadline()

    @property
    def idle(self) -> bool:
        """Whether nothing is answered, sent or stored."""
        return not (self._current or self._waiting or self._unreported) and self._outbox.empty

    # The course of turns

    def _settle(self, now: float) -> list[Action]:
        """Apply the rules that an event may have made true, and hand over the actions."""
        self._outbox.flush(now)
        while self._current is None and self._waiting:
            self._start(self._waiting.pop(0))
            self._outbox.flush(now)
        self._outbox.expire_replies(now)
        if self.idle and not self._outbox.wanted:
            self._actions.append(Forget())
        actions = self._actions.copy()
        self._actions.clear()
        return actions

    def _start(self, turn: Turn) -> None:
        """Begin a turn; after stop() or erase() it ends at once, with its helpline sentence."""
        assert self._current is None
        assert turn.phase is Phase.WAITING
        if turn.failure:
            self._refuse(turn, turn.failure)
            return
        self._current, turn.phase, turn.reply = turn, Phase.ADMITTING, self._outbox.open_reply(turn.asker)
        self._turns_since = {signal: turns + 1 for signal, turns in self._turns_since.items()}
        # The admission reads the history, so it follows the row of the turn before, which follows its last frame.
        self._unreported.add(turn)
        self._outbox.then(None, partial(self._admit, turn))
        if turn.signal:
            self._queue_sentence(turn, turn.signal)
        if self._closed:
            self._interrupt()

    def _admit(self, turn: Turn) -> None:
        if self._closed is ERASED:
            self._unreported.discard(turn)
        else:
            self._actions.append(Admit(turn))

    def _refuse(self, turn: Turn, failure: Failure) -> None:
        """Send an error to the asker alone."""
        turn.phase, turn.failure = Phase.DONE, failure
        self._outbox.refuse(turn.asker, failure)
        self._outbox.then(None, partial(self._actions.append, Ended(turn, failure.code)))

    def _fail(self, turn: Turn, failure: Failure) -> None:
        """End the current turn by an error; after a signal by a helpline sentence in place of the error."""
        assert turn.reply is not None
        self._outbox.drop_text(turn.reply)
        turn.failure = failure
        if turn.signal:
            if turn.sentence_for is None:
                self._queue_sentence(turn, turn.signal, even_if_recent=True)
            if turn.may_store and turn.phase is not Phase.STORING:
                turn.phase = Phase.STORING
                self._store_after_queue(turn)
            else:
                # The row is not stored, and a complete without `interrupted` would say that it is.
                self._end(turn, Kind.INTERRUPTED)
        elif failure.code is not ErrorCode.AI_UNAVAILABLE and not turn.reply.begun:
            self._outbox.discard(turn.reply)
            self._current = None
            self._refuse(turn, failure)
        else:
            self._end(turn, Kind.ERROR, failure)

    def _interrupt(self) -> None:
        """End the current turn as it stands; what was shown is stored afterwards."""
        if (turn := self._current) is None:
            return
        assert turn.reply is not None
        self._outbox.send_missed()
        self._outbox.drop_text(turn.reply)
        if turn.signal and turn.sentence_for is None and not turn.reply.begun:
            self._queue_sentence(turn, turn.signal, even_if_recent=True)
        if turn.phase is Phase.STREAMING:
            self._actions.append(Stop(turn))
        being_stored = turn.phase is Phase.STORING and turn in self._unreported
        self._end(turn, Kind.INTERRUPTED)
        if not being_stored:
            self._store_after_queue(turn)

    def _cancel(self, now: float) -> None:
        """Interrupt the current turn, drop what waits, and end the turns that wait with a signal."""
        waiting, self._waiting = self._waiting, []
        self._interrupt()
        self._outbox.flush_if_more_than(now, 2)  # The complete is sent at most two gaps later.
        for turn in waiting:
            if turn.signal or turn.failure:
                self._start(turn)
                self._interrupt()
            else:
                turn.phase = Phase.DONE

    def _close(self, failure: Failure) -> None:
        if self._closed is not ERASED:
            self._closed = failure
        for turn in self._waiting:
            if not turn.signal:
                turn.failure = turn.failure or failure

    def _end(self, turn: Turn, kind: Kind, failure: Failure | None = None) -> None:
        """Queue a turn's last frame, and let the next turn start."""
        assert turn is self._current
        assert turn.reply is not None
        turn.phase, self._current = Phase.DONE, None
        self._outbox.end(turn.reply, kind, failure)
        outcome = failure.code if failure else kind.name.lower()
        self._outbox.then(turn.reply, partial(self._actions.append, Ended(turn, outcome)))

    def _store_after_queue(self, turn: Turn) -> None:
        """Ask for the row once the text that is queued was sent."""
        assert turn.reply is not None
        self._outbox.then(turn.reply, partial(self._store, turn))

    def _store_late_admitted(self, turn: Turn) -> None:
        """Ask for the row of a turn that was over before its admission was known."""
        if turn.reply is not None and not self._outbox.holds(turn.reply):
            self._store(turn)

    def _store(self, turn: Turn) -> None:
        """Ask for the row of a turn, unless the admission is unknown, was refused, or the session is erased."""
        assert turn.reply is not None
        if turn.reply.said and turn.may_store and self._closed is not ERASED:
            self._unreported.add(turn)
            self._actions.append(Store(turn))

    def _queue_sentence(self, turn: Turn, signal: str, *, even_if_recent: bool = False) -> None:
        """Put the helpline sentence into a reply, unless it was said in one of the last QUIET_TURNS turns."""
        assert turn.reply is not None
        if not self.at_risk:
            self.at_risk = True
            if self._closed is not ERASED:
                self._actions.append(Mark())
        told = [self._turns_since[other] for other in COVERED_BY[signal] if other in self._turns_since]
        if told and min(told) <= QUIET_TURNS and not even_if_recent:
            return
        sentence = (self._short if told else self._first)[signal]
        self._turns_since[signal] = 0
        turn.sentence_for = signal
        self._outbox.say(turn.reply, f" {sentence}" if turn.reply.begun else sentence, urgent=True)
