"""Who is owed the frames of a reply: the rules of resuming, without a socket."""

from bemore_voice import RESUME_SECONDS, Delivery

PROOF = b"7"


def test_a_reply_in_progress_is_wanted_and_one_that_all_have_is_not() -> None:
    delivery = Delivery({"page"})
    assert delivery.wanted(0)
    delivery.finish(PROOF, {"page"}, 0)
    assert delivery.wanted(0)  # the last frames may be on the way
    delivery.prove("page", PROOF)
    assert not delivery.wanted(0)


def test_only_the_answer_to_the_ping_after_the_end_proves_anything() -> None:
    delivery = Delivery({"page"})
    delivery.prove("page", b"")  # before the end there is no such ping
    delivery.finish(PROOF, {"page"}, 0)
    for other in (b"", b"6"):
        delivery.prove("page", other)
    assert delivery.wanted(0)


def test_a_page_that_is_lost_in_the_middle_is_owed_the_reply_until_it_comes_back_and_proves_it() -> None:
    delivery = Delivery({"page"})
    delivery.leave("page", 0, said_goodbye=True)  # nobody means to leave in the middle of a reply
    delivery.finish(PROOF, set(), 1)
    assert delivery.wanted(1 + RESUME_SECONDS - 0.1)
    assert delivery.join("page again") == set()
    delivery.prove("page again", PROOF)
    assert not delivery.wanted(2)


def test_a_reply_that_nobody_came_back_for_is_let_go() -> None:
    delivery = Delivery({"page"})
    delivery.leave("page", 0, said_goodbye=False)
    delivery.finish(PROOF, set(), 1)
    assert delivery.until() == 1 + RESUME_SECONDS
    assert not delivery.wanted(1 + RESUME_SECONDS)


def test_a_page_that_says_goodbye_after_the_end_is_owed_nothing() -> None:
    delivery = Delivery({"page"})
    delivery.finish(PROOF, {"page"}, 0)
    delivery.leave("page", 0, said_goodbye=True)
    assert not delivery.wanted(0)


def test_a_page_that_vanishes_after_the_end_without_proof_is_owed_the_reply_from_then_on() -> None:
    delivery = Delivery({"page"})
    delivery.finish(PROOF, {"page"}, 0)
    delivery.leave("page", 20, said_goodbye=False)
    assert delivery.until() == 20 + RESUME_SECONDS


def test_a_reply_whose_asker_was_lost_while_it_waited_is_kept_for_the_return() -> None:
    delivery: Delivery[str] = Delivery(set(), lost=1)
    delivery.finish(PROOF, set(), 0)
    assert delivery.wanted(1)


def test_a_reply_that_ends_before_nobody_is_owed_to_whoever_comes() -> None:
    delivery: Delivery[str] = Delivery(set())
    delivery.finish(PROOF, set(), 0)
    assert delivery.wanted(1)


def test_a_page_that_came_back_while_its_old_socket_still_looked_alive_is_not_owed_twice() -> None:
    delivery = Delivery({"old"})
    assert delivery.join("new") == {"old"}  # which is asked whether it is still there
    delivery.finish(PROOF, {"old", "new"}, 0)
    delivery.leave("old", 5, said_goodbye=False)  # it was not
    delivery.prove("new", PROOF)
    assert not delivery.wanted(6)


def test_a_second_page_that_answers_is_owed_the_reply_when_it_is_lost_after_all() -> None:
    delivery = Delivery({"one"})
    delivery.join("two")
    delivery.hear("one")
    delivery.finish(PROOF, {"one", "two"}, 0)
    delivery.prove("two", PROOF)
    delivery.leave("one", 5, said_goodbye=False)
    assert delivery.wanted(6)


def test_two_pages_that_lose_the_same_network_are_both_owed_the_reply() -> None:
    delivery = Delivery({"one", "two"})
    for page in ("one", "two"):
        delivery.leave(page, 0, said_goodbye=False)
    delivery.finish(PROOF, set(), 1)
    for page in ("one again", "two again"):
        assert delivery.wanted(2)
        delivery.join(page)
        delivery.prove(page, PROOF)
    assert not delivery.wanted(3)


def test_who_was_never_sent_the_reply_may_leave_without_a_trace() -> None:
    delivery = Delivery({"page"})
    delivery.finish(PROOF, {"page"}, 0)
    delivery.prove("page", PROOF)
    delivery.leave("page", 5, said_goodbye=False)
    assert not delivery.wanted(5)
