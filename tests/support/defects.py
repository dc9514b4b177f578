"""
Single defects of a leaf, each with a good twin: the corpus of SEC-10.

A row is what makes the twin, what makes the bad one, and what the refusal says.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from spiffe_core.keys import spki_of
from tests.support import der
from tests.support.authorities import NOW, a_key, key_usage
from tests.support.ca import BOTH, Cert, Ext, algorithm_of, ext, name, uri_san

Oid = ExtensionOID
AKI = Oid.AUTHORITY_KEY_IDENTIFIER
EKU = ExtendedKeyUsageOID
UNKNOWN = x509.ObjectIdentifier("1.3.6.1.4.1.99999.1")
SECOND = timedelta(seconds=1)
Change = Callable[[Cert], Cert]


def put(value: x509.ExtensionType, critical: bool = False) -> Change:
    """Put in the place of its kind."""
    return lambda cert: cert.having(ext(value, critical))


def raw(oid: x509.ObjectIdentifier, value: bytes, critical: bool = False) -> Change:
    """Put bytes in the place of an extension."""
    return lambda cert: cert.having(Ext(oid, value, critical))


def lack(oid: x509.ObjectIdentifier) -> Change:
    """Leave an extension out."""
    return lambda cert: cert.without(oid)


def twice(oid: x509.ObjectIdentifier) -> Change:
    """Have an extension two times."""
    return lambda cert: cert.adding(cert.find(oid))


def uri(*uris: str) -> Change:
    """Have these URI SANs."""
    return lambda cert: cert.having(uri_san(*uris, critical=True))


def usage(*bits: str, critical: bool = True) -> Change:
    """Have this key usage."""
    return put(key_usage(*bits), critical)


def purposes(*oids: x509.ObjectIdentifier, critical: bool = False) -> Change:
    """Have this extended key usage."""
    return put(x509.ExtendedKeyUsage(oids), critical)


def fields(**changes: object) -> Change:
    """Have other fields."""
    return lambda cert: cert.but(**changes)


def key(kind: str) -> Change:
    """Have another public key."""
    return lambda cert: cert.but(spki=spki_of(a_key(kind, "workload").public_key()))


def same(cert: Cert) -> Cert:
    """Change nothing."""
    return cert


def _roca() -> bytes:
    """A modulus with the ROCA fingerprint: a power of 65537 modulo each of its primes."""
    primes = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73,
              79, 83, 89, 97, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163,
              167]  # fmt: skip
    product = 1
    for prime in primes:
        product *= prime
    modulus = pow(65537, 1234567, product) + product * (1 << (2047 - product.bit_length()))
    modulus += product * ((1 << 2047) // product)
    return spki_of(rsa.RSAPublicNumbers(65537, modulus).public_key())


TD_256 = "spiffe://" + "d" * 256 + "/w"

# name -> (good twin, bad, what the refusal says)
DEFECTS: dict[str, tuple[Change, Change, str]] = {
    # Exactly one URI SAN, a SPIFFE ID with a path.
    "no SAN": (same, lack(Oid.SUBJECT_ALTERNATIVE_NAME), "exactly one URI SAN"),
    "empty SAN": (same, uri(), "exactly one URI SAN"),
    "two URIs": (same, uri("spiffe://example.org/w", "spiffe://example.org/v"), "exactly one"),
    "one URI twice": (same, uri(*["spiffe://example.org/w"] * 2), "exactly one"),
    "a web URI beside": (same, uri("spiffe://example.org/w", "https://a/"), "exactly one"),
    "a web URI first": (same, uri("https://a/", "spiffe://example.org/w"), "exactly one"),
    "a hundred URIs": (same, uri(*["spiffe://example.org/w"] * 100), "exactly one"),
    "URI in a DNS name": (
        same,
        lambda c: c.having(
            Ext(Oid.SUBJECT_ALTERNATIVE_NAME,
                der.sequence(der.implicit(2, b"spiffe://example.org/w")), True)
        ),
        "exactly one",
    ),
    "SAN that is garbage": (same, raw(Oid.SUBJECT_ALTERNATIVE_NAME, b"\x04\x00", True), "read"),
    "SAN with a tail": (
        same,
        lambda c: raw(Oid.SUBJECT_ALTERNATIVE_NAME,
                      c.find(Oid.SUBJECT_ALTERNATIVE_NAME).value + b"\0", True)(c),
        "read",
    ),
    "two SAN extensions": (same, twice(Oid.SUBJECT_ALTERNATIVE_NAME), "read"),
    "SAN not critical, no subject": (
        fields(subject=name("w")),
        lambda c: c.but(subject=name()).having(
            uri_san("spiffe://example.org/w", critical=False)),
        "empty subject",
    ),
    "URI of other bytes": (
        same,
        raw(Oid.SUBJECT_ALTERNATIVE_NAME,
            der.sequence(der.implicit(6, b"spiffe://example.org/\xff")), True),
        "read",
    ),
    "URI in UTF-8": (
        same,
        raw(Oid.SUBJECT_ALTERNATIVE_NAME,
            der.sequence(der.implicit(6, "spiffe://example.org/ä".encode())), True),
        "not a SPIFFE ID",
    ),
    **{
        f"ID {text[:40]!r}": (same, uri(text), "not a SPIFFE ID|must have a path")
        for text in (
            "", " ", "spiffe://", "spiffe:///w", "spiffe://example.org", "spiffe://example.org/",
            "spiffe://example.org//", "spiffe://example.org//w", "spiffe://example.org/w/",
            "spiffe://example.org/.", "spiffe://example.org/..", "spiffe://example.org/a/../w",
            "spiffe://example.org/w\0", "spiffe://example.org\0/w", "spiffe://example.org\0.a/w",
            "spiffe://example.org/w\n", "spiffe://example.org/w\t", " spiffe://example.org/w",
            "spiffe://example.org/w ", "spiffe://example.org/w?", "spiffe://example.org/w?a=b",
            "spiffe://example.org/w#", "spiffe://example.org:443/w", "spiffe://a@example.org/w",
            "spiffe://@example.org/w", "spiffe://[::1]/w", "spiffe://example.org/%77",
            "spiffe://EXAMPLE.org/w", "SPIFFE://example.org/w", "Spiffe://example.org/w",
            "spiffe:/example.org/w", "spiffe:example.org/w", "http://example.org/w",
            "https://example.org/w", "urn:spiffe:example.org", "//example.org/w",
            "example.org/w", "spiffe://example.org\\w", "spiffe://example.org/w*",
            "spiffe://*.example.org/w", "spiffe://example.org/w;x", "spiffe://example.org/w,x",
            "spiffe://example.org/" + "w" * 2028, TD_256,
        )
    },
    # cA false.
    "cA TRUE": (same, put(x509.BasicConstraints(True, None), True), "cA TRUE"),
    "cA TRUE, path length 0": (same, put(x509.BasicConstraints(True, 0), True), "cA TRUE"),
    "cA TRUE, not critical": (same, put(x509.BasicConstraints(True, None)), "cA TRUE"),
    "constraints that are garbage": (same, raw(Oid.BASIC_CONSTRAINTS, b"\x05"), "read"),
    "constraints twice": (same, twice(Oid.BASIC_CONSTRAINTS), "read"),
    # Key usage.
    "no key usage": (same, lack(Oid.KEY_USAGE), "no key usage"),
    "keyCertSign": (same, usage("digital_signature", "key_cert_sign"), "keyCertSign"),
    "cRLSign": (same, usage("digital_signature", "crl_sign"), "cRLSign"),
    "keyCertSign alone": (same, usage("key_cert_sign"), "keyCertSign"),
    "keyCertSign, not critical": (
        usage("digital_signature", critical=False),
        usage("digital_signature", "key_cert_sign", critical=False),
        "keyCertSign",
    ),
    "no digitalSignature": (same, usage("key_encipherment"), "digitalSignature"),
    "keyAgreement alone": (same, usage("key_agreement"), "digitalSignature"),
    "nonRepudiation alone": (same, usage("content_commitment"), "digitalSignature"),
    "no bit at all": (same, usage(), "digitalSignature"),
    "usage that is garbage": (same, raw(Oid.KEY_USAGE, b"\x04\x01\x80", True), "read"),
    "usage twice": (same, twice(Oid.KEY_USAGE), "read"),
    # Extended key usage: both or none.
    "serverAuth alone": (purposes(*BOTH), purposes(EKU.SERVER_AUTH), "both"),
    "clientAuth alone": (purposes(*BOTH), purposes(EKU.CLIENT_AUTH), "both"),
    "any purpose": (same, purposes(EKU.ANY_EXTENDED_KEY_USAGE), "both"),
    "any purpose and one": (
        purposes(*BOTH, EKU.ANY_EXTENDED_KEY_USAGE),
        purposes(EKU.ANY_EXTENDED_KEY_USAGE, EKU.SERVER_AUTH),
        "both",
    ),
    "another purpose": (purposes(*BOTH, EKU.CODE_SIGNING), purposes(EKU.CODE_SIGNING), "both"),
    "no purpose": (lack(Oid.EXTENDED_KEY_USAGE),
                   raw(Oid.EXTENDED_KEY_USAGE, der.sequence()), "both|read"),
    "purpose that is garbage": (same, raw(Oid.EXTENDED_KEY_USAGE, b"\x30\x01"), "read"),
    "purposes twice": (same, twice(Oid.EXTENDED_KEY_USAGE), "read"),
    # Whose key signed it.
    "no AKI": (same, lack(AKI), "authority key identifier"),
    "AKI without a key ID": (
        same,
        put(x509.AuthorityKeyIdentifier(
            None, [x509.DirectoryName(x509.Name([]))], 1)),
        "authority key identifier",
    ),
    "AKI of another key": (
        same, put(x509.AuthorityKeyIdentifier(b"\1" * 20, None, None)), "no valid path"),
    "AKI critical": (
        same,
        lambda c: c.having(
            Ext(AKI, c.find(AKI).value, True)),
        "unknown critical",
    ),
    "AKI that is garbage": (same, raw(AKI, b"\x30\x05"), "read"),
    "AKI twice": (same, twice(AKI), "read"),
    "SKI critical": (
        lack(Oid.SUBJECT_KEY_IDENTIFIER),
        put(x509.SubjectKeyIdentifier(b"\1" * 20), True),
        "unknown critical",
    ),
    # Extensions that a leaf has no business with.
    "unknown critical extension": (
        raw(UNKNOWN, der.NULL), raw(UNKNOWN, der.NULL, True), "unknown critical"),
    "unknown extension twice": (
        raw(UNKNOWN, der.NULL),
        lambda c: c.adding(Ext(UNKNOWN, der.NULL), Ext(UNKNOWN, der.NULL)),
        "read",
    ),
    "critical policies": (
        put(x509.CertificatePolicies([x509.PolicyInformation(UNKNOWN, None)])),
        put(x509.CertificatePolicies([x509.PolicyInformation(UNKNOWN, None)]), True),
        "unknown critical",
    ),
    "name constraints": (
        same, put(x509.NameConstraints([x509.DNSName("a")], None)), "name constraints"),
    "critical name constraints": (
        same, put(x509.NameConstraints([x509.DNSName("a")], None), True), "unknown critical"),
    "AIA that is garbage": (same, raw(Oid.AUTHORITY_INFORMATION_ACCESS, b"\x04\x01a"), "read"),
    # Version and serial number.
    "version 1": (same, lambda c: c.but(version=None, extensions=()), "version 3"),
    "version 1 with extensions": (same, fields(version=None), "version 3|not a DER"),
    "version 2": (same, fields(version=1), "version 3|not a DER"),
    "version 4": (same, fields(version=3), "version 3|not a DER"),
    "serial 0": (fields(serial=1), fields(serial=0), "serial number"),
    "negative serial": (fields(serial=127), fields(serial=-1), "serial number|not a DER"),
    "serial of 21 octets": (
        fields(serial=2**159 - 1), fields(serial=2**159), "serial number|not a DER"),
    # Signatures.
    "another key's signature": (same, fields(signer=a_key("p256", "evil")), "no valid path"),
    "no signature": (same, fields(signature=b"\0"), "no valid path"),
    "a signature of zeros": (same, fields(signature=bytes(64)), "no valid path"),
    "signature with a tail": (
        same, lambda c: c.but(signature=_signature(c) + b"\0"), "no valid path"),
    "SHA-1": (fields(digest="sha512"), fields(digest="sha1"), "hash"),
    "SHA-224": (fields(digest="sha384"), fields(digest="sha224"), "hash"),
    "inner algorithm differs": (
        same,
        lambda c: c.but(inner_algorithm=algorithm_of(c.signer, "sha512")),
        "no valid path",
    ),
    "outer algorithm differs": (
        same,
        lambda c: c.but(outer_algorithm=algorithm_of(c.signer, "sha512")),
        "no valid path",
    ),
    "unknown algorithm": (
        same,
        lambda c: c.but(outer_algorithm=der.sequence(der.oid("1.2.3.4")),
                        inner_algorithm=der.sequence(der.oid("1.2.3.4"))),
        "not a DER|hash",
    ),
    # Instants.
    "expired": (fields(not_after=NOW), fields(not_after=NOW - SECOND), "expired"),
    "not valid yet": (fields(not_before=NOW), fields(not_before=NOW + SECOND), "not valid yet"),
    "ends before it begins": (
        same, fields(not_before=NOW, not_after=NOW - SECOND), "cannot be read"),
    "2050 in two digits": (
        fields(not_after=der.generalized_time(datetime(2050, 1, 1, tzinfo=UTC))),
        fields(not_after=der.utc_time(datetime(2050, 1, 1, tzinfo=UTC))),
        "cannot be read",
    ),
    "an instant of letters": (same, fields(not_after=b"\x17\x0dabcdefghijklZ"), "not a DER"),
    "an instant without seconds": (same, fields(not_after=b"\x17\x0b3001010000Z"), "not a DER"),
    "an instant with an offset": (
        same, fields(not_after=b"\x17\x11300101000000+0100"), "not a DER"),
    "an instant with a fraction": (
        same, fields(not_after=b"\x18\x1120300101000000.5Z"), "not a DER"),
    # Issuer and subject.
    "issuer of another name": (same, fields(issuer=name("nobody")), "no valid path"),
    "no issuer name": (same, fields(issuer=name()), "no valid path"),
    "issuer that is garbage": (same, fields(issuer=b"\x30\x02\x31\x00"), "not a DER"),
    "subject that is garbage": (
        same, fields(subject=b"\x30\x05\x31\x03\x30\x01\x05"), "not a DER"),
    # Keys (SEC-15).
    **{
        f"key {kind}": (key("p256"), key(kind), "RSA|EC|keys must be")
        for kind in ("p224", "k256", "brainpool", "rsa1024", "rsa-e3", "ed448", "dsa")
    },
    "key with ROCA": (key("rsa2048"), lambda c: c.but(spki=_roca()), "ROCA"),
    "key that is no point": (
        key("p256"),
        lambda c: c.but(spki=spki_of(a_key().public_key())[:-2] + b"\0\0"),
        "not a DER",
    ),
    "key at infinity": (
        same,
        fields(spki=der.sequence(
            der.sequence(der.oid("1.2.840.10045.2.1"), der.oid("1.2.840.10045.3.1.7")),
            der.bits(b"\0"))),
        "not a DER",
    ),
    "key of an unknown kind": (
        same,
        fields(spki=der.sequence(der.sequence(der.oid("1.2.3")), der.bits(b"key"))),
        "not a DER",
    ),
    "key that is garbage": (same, fields(spki=der.sequence(der.NULL)), "not a DER"),
    # Encoding.
    "a tail": (same, fields(trailer=b"\0"), "not a DER"),
    "another certificate behind": (same, lambda c: c.but(trailer=c.der), "not a DER"),
}  # fmt: skip


def _signature(cert: Cert) -> bytes:
    return x509.load_der_x509_certificate(cert.der).signature
