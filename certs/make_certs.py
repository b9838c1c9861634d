"""Laptop certificates: one CA, a server's certificate, and its clients'.

Owns the making of throw-away certificates for the demo, the tests, and a cluster on a
laptop. Must never be used for a cluster that others can reach: the certificates of a
real one come from its own CA (cert-manager, Strimzi), and are renewed by it.

The CA's private key is never written. It signs this one set and is forgotten, so that
nobody can add a certificate to the set later: whoever needs another name makes the
whole set again. `trustme` is not used for it: its CAs last until the year 3000, and its
certificates serve as a server's and as a client's at once.
"""

import dataclasses
import datetime as dt
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOSTS_DEFAULT = ("localhost", "127.0.0.1", "::1")
#: Long enough for a demo that is tried again, short enough to be worth little if lost.
DAYS_DEFAULT = 30
#: A laptop's clock and its virtual machine's may differ by this much.
CLOCK_SKEW = dt.timedelta(minutes=5)
#: Less than the skew: everything begins to be valid that much before it is made.
EXPIRED_FOR = dt.timedelta(minutes=1)

# The name becomes a file's name and a Kafka principal; both dislike anything else.
_CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Certificates:
    """Where one set of certificates lies; all are PEM, all keys PKCS#8."""

    #: The CA's certificate: what a client needs to trust the server, and vice versa.
    ca: Path
    server_cert: Path
    server_key: Path
    #: Common name -> (certificate, private key).
    clients: Mapping[str, tuple[Path, Path]]


def make_certs(
    directory: Path,
    *,
    hosts: Iterable[str] = HOSTS_DEFAULT,
    client_names: Iterable[str] = ("topup-function",),
    ca_name: str = "topup laptop CA",
    days: int = DAYS_DEFAULT,
    force: bool = False,
    is_server_expired: bool = False,
    expired_client_names: Iterable[str] = (),
) -> Certificates:
    """Make a CA, a server certificate for `hosts`, and one for each client name.

    The directory is made if needed and closed to others (0700); private keys are 0600.
    A client's subject is its common name alone, so that Kafka knows it as `CN=name`.
    `hosts` are DNS names or IP addresses; `days` is how long everything is valid. What
    shall be expired has been so for a minute, under the same valid CA: for who tests
    that it is refused.

    Raises FileExistsError when a file would be overwritten and `force` is not given,
    ValueError for a client name that can't be a file's name or days below 1.
    """
    expired = frozenset(expired_client_names)
    names = (*client_names, *sorted(expired))
    for name in names:
        if not _CLIENT_NAME.fullmatch(name):
            raise ValueError(f"client name {name!r}: letters, digits and ._- only")
    if days < 1:
        raise ValueError(f"days is {days}: at least 1")
    made = Certificates(
        ca=directory / "ca.pem",
        server_cert=directory / "server.pem",
        server_key=directory / "server-key.pem",
        clients={
            name: (
                directory / f"client-{name}.pem",
                directory / f"client-{name}-key.pem",
            )
            for name in names
        },
    )
    # Made whole first, so that no half set is written.
    issuer = _Issuer(ca_name, days)
    host_names = tuple(hosts)
    files = {made.ca: issuer.cert_pem}
    files[made.server_cert], files[made.server_key] = issuer.issue(
        host_names[0],
        ExtendedKeyUsageOID.SERVER_AUTH,
        host_names,
        is_expired=is_server_expired,
    )
    for name, (cert, key) in made.clients.items():
        files[cert], files[key] = issuer.issue(
            name, ExtendedKeyUsageOID.CLIENT_AUTH, is_expired=name in expired
        )
    _write_all(directory, files, force=force)
    return made


def _write_all(directory: Path, files: Mapping[Path, bytes], *, force: bool) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    there = sorted(path.name for path in files if path.exists())
    if there and not force:
        raise FileExistsError(f"{directory} already has {', '.join(there)}")
    for path, content in files.items():
        path.unlink(missing_ok=True)
        # O_EXCL and the mode at creation: a key is at no instant readable by others.
        mode = 0o600 if path.stem.endswith("-key") else 0o644
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


class _Issuer:
    """A CA that lives in memory only."""

    def __init__(self, common_name: str, days: int) -> None:
        now = dt.datetime.now(dt.UTC)
        self._not_before = now - CLOCK_SKEW
        self._not_after = now + dt.timedelta(days=days)
        self._expired_at = now - EXPIRED_FOR
        self._name = _subject(common_name)
        # P-256: made in a millisecond, and every client here reads it (Java, OpenSSL,
        # Go), which is not so for Ed25519.
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._key_id = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        certificate = (
            self._builder(self._name, self._key.public_key(), self._not_after)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.cert_pem = certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        common_name: str,
        usage: x509.ObjectIdentifier,
        hosts: Iterable[str] = (),
        *,
        is_expired: bool,
    ) -> tuple[bytes, bytes]:
        """A new certificate and its private key, both PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        # The key identifier of the issuer is demanded by Python 3.13's strict check.
        authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
            self._key_id
        )
        not_after = self._expired_at if is_expired else self._not_after
        builder = (
            self._builder(_subject(common_name), key.public_key(), not_after)
            .add_extension(
                x509.BasicConstraints(ca=False, path_length=None), critical=True
            )
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(authority, critical=False)
        )
        alternatives = [_alternative_name(host) for host in hosts]
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        certificate = builder.sign(self._key, hashes.SHA256())
        return (
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                # The KafkaSource and Java refuse the older "BEGIN EC PRIVATE KEY".
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def _builder(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        not_after: dt.datetime,
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._not_before)
            .not_valid_after(not_after)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False
            )
        )


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--name", default="topup", show_default=True, help="Names the CA.")
@click.option(
    "--client",
    "clients",
    multiple=True,
    help="Common name of a client; repeatable.  [default: NAME-function]",
)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    help="A further name or address of the server, beside localhost; repeatable.",
)
@click.option(
    "--days",
    type=click.IntRange(min=1),
    default=DAYS_DEFAULT,
    show_default=True,
    help="How long everything is valid.",
)
@click.option("--force", is_flag=True, help="Overwrite what is there.")
def main(
    directory: Path,
    name: str,
    clients: tuple[str, ...],
    hosts: tuple[str, ...],
    days: int,
    *,
    force: bool,
) -> None:
    """Make throw-away certificates for a laptop in DIRECTORY."""
    try:
        made = make_certs(
            directory,
            hosts=(*HOSTS_DEFAULT, *hosts),
            client_names=clients or (f"{name}-function",),
            ca_name=f"{name} laptop CA",
            days=days,
            force=force,
        )
    except FileExistsError as error:
        raise click.ClickException(f"{error}; --force makes them anew") from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    pairs = [(made.server_cert, made.server_key), *made.clients.values()]
    for path in (made.ca, *(path for pair in pairs for path in pair)):
        click.echo(path)


if __name__ == "__main__":
    main()
