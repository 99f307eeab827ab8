"""The frames that a session sends: in order, with gaps between them, and again to a peer that lost its connection.

No I/O and no clock: it calls `act` with the actions that the driver is to perform.

Frames pass two queues. `_held` has the frames of replies that wait for their gap; a frame gets its number when it
leaves this queue. `_behind` has, for each peer that joined late, the frames that it still has to receive; meanwhile new
frames are appended there. So every peer receives all frames of a reply in order, and no two of them within the gap,
except where an interruption or a helpline sentence needs the queues empty.

A peer confirms a reply by its pong to the ping that follows the last frame. A reply is kept for `keep` seconds while a
peer has not confirmed it, or left before it did. All times are seconds on one monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

from bemore.failures import Failure

Peer = Any  # a handle of the driver's, which is only compared and hashed


class Kind(Enum):
    """The kinds of frames; `ends` tells whether a frame of this kind is the last one of its reply."""

    BEGIN = 1, False
    CHUNK = 2, False
    COMPLETE = 3, True
    INTERRUPTED = 4, True  # a complete with the mark `interrupted`
    ERROR = 5, True

    def __init__(self, _: int, ends: bool) -> None:
        self.ends = ends


class Frame(NamedTuple):
    """A frame of a reply; `seq` is 0 for an error that only its asker receives."""

    kind: Kind
    seq: int
    text: str = ""
    failure: Failure | None = None


class Send(NamedTuple):
    """Send a frame to these peers."""

    peers: tuple[Peer, ...]
    frame: Frame


class Ping(NamedTuple):
    """Send a protocol ping; the pong proves that every frame up to `seq` has arrived."""

    peers: tuple[Peer, ...]
    seq: int


@dataclass(eq=False, slots=True)
class Reply:
    """The frames of one reply that were sent. Only the outbox writes its fields."""

    unproven: set[Peer]  # peers that were sent frames and have not confirmed the last one
    lost: bool  # a peer left before it confirmed the last one; whoever joins may be that peer
    frames: list[Frame] = field(default_factory=list)
    began_at: float = 0.0
    expires_at: float = 0.0

    @property
    def said(self) -> list[str]:
        """The chunks that were sent."""
        return [frame.text for frame in self.frames if frame.kind is Kind.CHUNK]

    @property
    def begun(self) -> bool:
        return bool(self.frames)

    @property
    def ended(self) -> bool:
        return bool(self.frames) and self.frames[-1].kind.ends

    def wanted(self, now: float) -> bool:
        return not self.ended or (now < self.expires_at and bool(self.unproven or self.lost))


class Held(NamedTuple):
    """A frame that waits for its gap, or in place of a frame a call to make once all before it was sent."""

    reply: Reply | None
    kind: Kind | None
    text: str = ""
    failure: Failure | None = None
    urgent: bool = False  # a text that waits for the gap between frames alone, and is joined with no other
    call: Callable[[], None] | None = None


class Outbox:
    """The frames of one session on their way to its peers.

    `gap` is the least time between two frames of a reply, `interval` between two chunks, `keep` how long a reply is
    kept for a peer that lost its connection.
    """

    def __init__(
        self,
        act: Callable[[Send | Ping], None],
        next_seq: Callable[[], int],
        *,
        gap: float,
        interval: float,
        keep: float,
    ) -> None:
        self._act, self._next_seq = act, next_seq
        self._gap, self._interval, self._keep = gap, interval, keep
        self.peers: tuple[Peer, ...] = ()
        self._held: list[Held] = []  # a deque would take 0.7 KiB for each silent session
        self._due = self._chunk_due = 0.0  # the earliest times of the next frame, and of the next chunk
        self._behind: dict[Peer, deque[Frame]] = {}
        self._replies: list[Reply] = []

    # Peers

    def join(self, peer: Peer, now: float) -> None:
        """Add a peer, and send it the replies that it may have missed."""
        self.peers += (peer,)
        missed: deque[Frame] = deque()
        for reply in self._replies:
            if reply.wanted(now):
                reply.unproven.add(peer)
                missed += reply.frames
        if missed:
            self._behind[peer] = missed

    def leave(self, peer: Peer, now: float, *, said_goodbye: bool) -> None:
        """Remove a peer; a reply that it may not have whole is kept for its return."""
        self.peers = tuple(other for other in self.peers if other is not peer)
        self._behind.pop(peer, None)
        for reply in self._replies:
            if peer in reply.unproven:
                reply.unproven.remove(peer)
                if not (said_goodbye and reply.ended):
                    reply.lost, reply.expires_at = True, now + self._keep

    def receipt(self, peer: Peer, seq: int) -> None:
        """Note that a peer has received every frame up to `seq`."""
        for reply in self._replies:
            if reply.ended and reply.frames[-1].seq <= seq:
                reply.unproven.discard(peer)

    # Replies

    def open_reply(self, asker: Peer) -> Reply:
        """Return a reply without frames yet; one whose asker has left is kept for it."""
        self._replies.append(Reply(set(self.peers), lost=asker not in self.peers))
        return self._replies[-1]

    def discard(self, reply: Reply) -> None:
        """Drop a reply of which nothing was sent or held."""
        assert not reply.begun
        self._replies = [other for other in self._replies if other is not reply]

    def discard_all(self) -> None:
        """Keep no reply for anyone."""
        self._replies.clear()

    def say(self, reply: Reply, text: str, *, urgent: bool = False) -> None:
        """Queue text as a chunk, or join it to a chunk that waits; the first text brings the begin."""
        last = self._held[-1] if self._held else None
        if last is not None and last.reply is reply and last.kind is Kind.CHUNK and not (urgent or last.urgent):
            text = self._held.pop().text + text
        elif not reply.begun and not self.holds(reply):
            self._held.append(Held(reply, Kind.BEGIN))
        self._held.append(Held(reply, Kind.CHUNK, text, urgent=urgent))
        if urgent:
            self.send_missed()

    def end(self, reply: Reply, kind: Kind, failure: Failure | None = None) -> None:
        """Queue the last frame of a reply."""
        assert kind.ends
        self._held.append(Held(reply, kind, failure=failure))

    def then(self, reply: Reply | None, call: Callable[[], None]) -> None:
        """Call once all that is queued so far was sent."""
        self._held.append(Held(reply, None, call=call))

    def refuse(self, peer: Peer, failure: Failure) -> None:
        """Queue an error that belongs to no reply, for one peer."""
        self._held.append(Held(None, Kind.ERROR, call=partial(self._send_refusal, peer, failure)))

    def _send_refusal(self, peer: Peer, failure: Failure) -> None:
        if peer in self.peers:
            self._act(Send((peer,), Frame(Kind.ERROR, 0, failure=failure)))

    def holds(self, reply: Reply) -> bool:
        return any(item.reply is reply for item in self._held)

    def drop_text(self, reply: Reply) -> None:
        """Drop unsent frames except urgent text. If only the begin was sent, its chunk is kept too."""
        items = [item for item in self._held if item.reply is reply]
        kept = [item for item in items if item.urgent]
        if not kept and len(reply.frames) == 1:
            kept = [item for item in items if item.kind is Kind.CHUNK]
        if kept and not reply.begun:
            kept.insert(0, items[0])
        self._held = [*(item for item in self._held if item.reply is not reply), *kept]

    # Time

    @property
    def empty(self) -> bool:
        return not (self._held or self._behind)

    @property
    def wanted(self) -> bool:
        """Whether there is a peer, or a reply that one may come back for."""
        return bool(self.peers or self._replies)

    def expire_replies(self, now: float) -> None:
        """Drop the replies that no peer can come back for."""
        self._replies = [reply for reply in self._replies if reply.wanted(now)]

    def deadline(self) -> float | None:
        """Return when flush() is wanted; without frames to send, when the last kept reply expires."""
        if self._behind:
            return self._due
        if self._held:
            return self._ready_at(self._held[0])
        if self.peers or not all(reply.ended for reply in self._replies):
            return None
        return max((reply.expires_at for reply in self._replies), default=None)

    def _ready_at(self, item: Held) -> float:
        """Return the time at which an item may leave the queue. A begin does not wait: it starts another reply."""
        if item.kind is Kind.CHUNK and not item.urgent:
            return max(self._due, self._chunk_due)
        return 0.0 if item.kind in (Kind.BEGIN, None) else self._due

    def flush(self, now: float) -> None:
        """Send what is due: to each peer at most one frame of a reply."""
        catching_up = now >= self._due
        while self._held and now >= self._ready_at(self._held[0]):
            self._leave_queue(now)
        while self._behind and catching_up:
            self._due = now + self._gap
            catching_up = not self._gap
            for peer in list(self._behind):
                self._send_missed_to(peer, 1)

    def flush_if_more_than(self, now: float, frames: int) -> None:
        """Send all frames that wait without their gaps if there are more than `frames`: what comes next is urgent."""
        if sum(item.kind not in (Kind.BEGIN, None) for item in self._held) > frames:
            while self._held:
                self._leave_queue(now)

    def _leave_queue(self, now: float) -> None:
        item = self._held.pop(0)
        if item.call is not None:
            item.call()
        else:
            self._send(item, now)

    def _send(self, item: Held, now: float) -> None:
        """Give a frame its number, and send it to the peers that have all frames before it."""
        reply, kind = item.reply, item.kind
        assert kind is not None
        assert reply is not None
        assert not reply.ended
        frame = Frame(kind, self._next_seq(), item.text, item.failure)
        reply.frames.append(frame)
        self._due = now + self._gap
        if kind is Kind.CHUNK:
            self._chunk_due = now + self._interval
        elif kind is Kind.BEGIN:
            reply.began_at, self._chunk_due = now, 0.0
        peers = self.peers
        if self._behind:
            peers = tuple(peer for peer in peers if peer not in self._behind)
            for missed in self._behind.values():
                missed.append(frame)
        self._act(Send(peers, frame))
        if kind.ends:
            reply.expires_at = now + self._keep
            reply.lost = reply.lost or not self.peers
            self._act(Ping(peers, frame.seq))

    def send_missed(self) -> None:
        """Send all missed frames without a gap: what follows is urgent."""
        for peer in list(self._behind):
            self._send_missed_to(peer, len(self._behind[peer]))

    def _send_missed_to(self, peer: Peer, most: int) -> None:
        missed = self._behind[peer]
        for _ in range(min(most, len(missed))):
            frame = missed.popleft()
            self._act(Send((peer,), frame))
            if frame.kind.ends:
                self._act(Ping((peer,), frame.seq))
        if not missed:
            del self._behind[peer]
