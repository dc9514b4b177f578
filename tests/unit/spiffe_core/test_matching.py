"""Who may peer with whom."""

import pytest

from spiffe_core.errors import ErrorKind
from spiffe_core.matching import MismatchError, any_id, exactly, member_of, one_of
from spiffe_core.spiffeid import SpiffeId, TrustDomain
from tests.support.store import TD, an_id

FOREIGN = SpiffeId.parse("spiffe://partner.test/web")


def test_exactly_one() -> None:
    """`exactly` accepts its ID and no other of its own or another trust domain."""
    check = exactly(an_id("/web"))
    check(an_id("/web"))
    for other in (an_id("/db"), an_id("/web/x"), TD.id, FOREIGN):
        with pytest.raises(MismatchError, match="not the expected identity"):
            check(other)


def test_one_of_several() -> None:
    """`one_of` accepts its members alone."""
    check = one_of([an_id("/a"), FOREIGN])
    check(an_id("/a"))
    check(FOREIGN)
    with pytest.raises(MismatchError):
        check(an_id("/web"))


def test_an_empty_list_is_a_failure() -> None:
    """No ID to expect accepts nobody, rather than everybody."""
    with pytest.raises(MismatchError):
        one_of(())(an_id("/a"))


def test_the_list_is_taken_once() -> None:
    """A list that is changed later does not change what is accepted."""
    wanted = [an_id("/a")]
    check = one_of(wanted)
    wanted.append(an_id("/b"))
    with pytest.raises(MismatchError):
        check(an_id("/b"))


@pytest.mark.parametrize(
    "name",
    ["example.org.", "xexample.org", "org", "sub.example.org", "example.orgx", "example"],
)
def test_members_are_those_of_one_domain(name: str) -> None:
    """`member_of` compares names whole: no suffix, prefix or parent domain."""
    check = member_of(TD)
    check(an_id("/a"))
    with pytest.raises(MismatchError, match="not a member of"):
        check(SpiffeId(TrustDomain(name), "/a"))


def test_any_id_accepts_each() -> None:
    """`any_id` accepts what was verified, from wherever."""
    any_id()(an_id("/a"))
    any_id()(FOREIGN)


def test_a_mismatch_is_a_refusal() -> None:
    """The peer proved who it is, so the kind is FORBIDDEN."""
    assert MismatchError.kind is ErrorKind.FORBIDDEN
