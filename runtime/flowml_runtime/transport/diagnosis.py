"""Explains why a connection could not be made.

gRPC reports "OK" or "Socket closed" if one side refuses a certificate. After a failure this module therefore makes one
handshake with Python's TLS, which names the reason, and one in memory, which checks our own certificate.
"""

from __future__ import annotations

import contextlib
import socket
import ssl

from flowml_runtime.transport.security import TLS, split_address

HANDSHAKE_S = 3.0
"""Deadline for each answer of the other end. If it takes longer, there is no diagnosis."""

_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_OTHER_AUTHORITY = frozenset({18, 19, 20, 21})
"""OpenSSL's codes for a certificate that none of the given authorities signed."""


def diagnose(address: str, tls: TLS | None) -> str:
    """Why a connection to `address` cannot be made; "" if the reason is not found."""
    host, port = split_address(address)
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=HANDSHAKE_S) as link:
        link.settimeout(HANDSHAKE_S)
        if tls is None:
            return _takes_tls(link)
        return _handshake(link, host, tls) or _own_certificate(tls)
    return ""


def _takes_tls(link: socket.socket) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(OSError), context.wrap_socket(link):
        return "it speaks TLS and we do not; give tls={'cert': ..., 'key': ..., 'ca': ...}"
    return ""


def _handshake(link: socket.socket, host: str, tls: TLS) -> str:
    """The reason for which a handshake with the other end fails; "" if none is found."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls.ca)
    context.load_cert_chain(tls.cert, tls.key)
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(link, server_hostname=host) as secured:
            secured.sendall(_HTTP2)
            # no deadline: the socket has a timeout
            secured.recv(1)  # the other end's refusal of our certificate arrives only here
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not accepted: {_refusal(error, tls)}"
    except ssl.SSLError as error:
        reason = error.reason or ""
        if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return "it does not speak TLS and we do; start it with tls= too, or leave tls= out here"
        if "ALERT" in reason:
            alert = reason.partition("ALERT_")[2].replace("_", " ").lower()
            return f"it refuses our certificate {tls.cert}: {alert}"
    except OSError:
        return ""
    return ""


def _own_certificate(tls: TLS) -> str:
    """Why peers with the same authority refuse our certificate, found by an in-memory handshake with ourselves."""
    judge = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    shower = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    shower.check_hostname = False
    shower.verify_mode = ssl.CERT_NONE
    judge.verify_mode = ssl.CERT_REQUIRED
    judge.load_verify_locations(tls.ca)
    for context in (judge, shower):
        context.load_cert_chain(tls.cert, tls.key)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (shower.wrap_bio(down, up), judge.wrap_bio(up, down, server_side=True))
    try:
        for _ in range(3):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return f"it refuses our certificate {tls.cert}: {_refusal(error, tls)}"
    except ssl.SSLError:
        return ""
    return ""


def _refusal(error: ssl.SSLCertVerificationError, tls: TLS) -> str:
    if error.verify_code in _OTHER_AUTHORITY:
        return f"it was not signed by the authority in {tls.ca} ({error.verify_message})"
    return error.verify_message.rstrip(".")
