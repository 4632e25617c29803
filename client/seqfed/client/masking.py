"""What a client brings to masked sums: its own key, whose keys it trusts, how many it is one of, and what it was in before.

The key lies in the state folder for all the client's runs; where there is a certificate, that binds it (`masking.trust`).
A client trusts a key because it is bound to a certificate of the federation's CA, because it stands in a list that the client's
owner has made (peers.toml), or, where there are both, if both say so. One that has neither would believe whatever the server
shows it, so it takes part only where the run's operator says that the server is trusted not to lie.

The log is why no sum is replayed: the highest number of each run that it has been in, noted before anything secret is sent, and
what may stand in a sum that is opened, noted before anything of it is sent.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field

from seqfed.client.durable import Durable
from seqfed.common import identity
from seqfed.common.config import load_toml
from seqfed.common.errors import ConfigError, MaskingRefused, PolicyRefused
from seqfed.common.homomorphic import scheme
from seqfed.common.identity import Identity, read_private, write_private
from seqfed.common.masking.client import Client
from seqfed.common.masking.keys import Signer
from seqfed.common.masking.trust import bind, bound
from seqfed.common.model import layout_of
from seqfed.common.spec import Settings
from seqfed.common.wire import check_client_name

if TYPE_CHECKING:
    from seqfed.client.encrypted import Half
    from seqfed.common.masking.messages import Advert
    from seqfed.common.masking.terms import Terms
    from seqfed.common.spec import RunSpec
    from seqfed.common.views import TaskKey

KEY: Final = "masking.key"
LOG: Final = "masking.db"
KIND: Final = "ed25519:"  # before a key in hex


class Peers(Settings):
    """The content of peers.toml."""

    peers: dict[str, Annotated[str, Field(pattern=r"^ed25519:[0-9a-f]{64}$")]] = Field(
        description="the masking key of every client, by its name, as `seqfed client key` prints it there"
    )


def load_peers(path: Path) -> dict[str, bytes]:
    """The keys by client; raises ConfigError, InvalidName."""
    found = load_toml(Peers, path).peers
    return {check_client_name(name): bytes.fromhex(key.removeprefix(KIND)) for name, key in found.items()}


def own_key(folder: Path) -> Signer:
    """The client's masking key, which lies in its state folder and is made there at first.

    Raises ConfigError if it is damaged or others may read it, StorageError, StorageFull.
    """
    path = folder / KEY
    if not path.exists():
        identity.make_folder(folder)
        write_private(path, secrets.token_bytes(32))
    private = read_private(path)
    if len(private) != 32:
        raise ConfigError(
            f"{path}: {len(private)} bytes, and a masking key has 32; put it back from a copy, or remove it"
        )
    return Signer(private)


def line(name: str, public: bytes) -> str:
    """The client's line in the others' peers.toml."""
    return f'"{name}" = "{KIND}{public.hex()}"'


class Trust:
    """Raises MaskingRefused for an advertisement whose key is not known to be that client's.

    own: this client's name and its key. ca: PEM. pinned: keys by client. clock: the time in UTC.
    """

    def __init__(
        self,
        own: tuple[str, Signer],
        ca: bytes | None = None,
        pinned: Mapping[str, bytes] | None = None,
        clock: Callable[[], datetime] = identity.now,
    ) -> None:
        self._own = own
        self._ca = ca
        self._pinned = pinned
        self._clock = clock
        self._bound: dict[str, tuple[tuple[bytes, bytes, bytes], Identity]] = {}  # by client: what was verified last

    @property
    def knows(self) -> bool:
        """Whether it has anything to judge a key by."""
        return self._ca is not None or self._pinned is not None

    def __call__(self, advert: Advert) -> None:
        name, key = advert.client, advert.identity_key
        if name == self._own[0]:
            if key != self._own[1].public:
                raise MaskingRefused(
                    f"the server shows another masking key for '{name}', which is this client, than its own"
                )
            return
        if self._pinned is not None and self._pinned.get(name) != key:
            why = "is not the one in" if name in self._pinned else "is not in"
            raise MaskingRefused(
                f"the masking key of '{name}' {why} this client's list of peers; if it is right, its line is what "
                "`seqfed client key` prints there"
            )
        if self._ca is not None:
            self._require_bound(advert, self._ca)

    def _require_bound(self, advert: Advert, ca: bytes) -> None:
        name, now = advert.client, self._clock()
        shown = (advert.certificate, advert.identity_key, advert.binding)
        known = self._bound.get(name)
        if known is None or known[0] != shown or not known[1].not_before <= now <= known[1].not_after:
            self._bound[name] = shown, bound(advert, ca, now)


class Log:
    """Which masked sums this client was in, in its state folder. Raises StorageFull, StorageError where it cannot be kept."""

    def __init__(self, folder: Path) -> None:
        self._durable = Durable(
            folder / LOG,
            (
                "CREATE TABLE IF NOT EXISTS sums (run TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID",
                """CREATE TABLE IF NOT EXISTS opened (
                    run TEXT NOT NULL, round INTEGER NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (run, round, digest)
                ) WITHOUT ROWID""",
            ),
            without="this client cannot note which masked sums it was in, and takes part in none",
            remedy="put the file back from a copy of today, or, if no run goes on, remove it",
        )

    def begin(self, run: str, number: int) -> None:
        """Note the sum; raises MaskingRefused unless its number is higher than all before it in its run."""
        with self._durable.changing() as database:
            row = database.execute("SELECT number FROM sums WHERE run = ?", (run,)).fetchone()
            if row is not None and number <= row[0]:
                raise MaskingRefused(
                    f"masked sum {number} of run {run}: this client was in number {row[0]}, and takes none twice; "
                    "was the server's store put back from a copy, or was this client restarted within it?"
                )
            database.execute("INSERT OR REPLACE INTO sums VALUES (?, ?)", (run, number))

    def note_opened(self, key: TaskKey, digest: bytes) -> None:
        """Note what stands in a sum of this round that is to be opened."""
        with self._durable.changing() as database:
            database.execute("INSERT OR IGNORE INTO opened VALUES (?, ?, ?)", (key.run, key.round, digest))

    def opened(self, key: TaskKey) -> frozenset[bytes]:
        """The digests of all that was in sums of this round that were, or may have been, opened."""
        with self._durable.changing() as database:
            rows = database.execute("SELECT digest FROM opened WHERE run = ? AND round = ?", (key.run, key.round))
            return frozenset(digest for (digest,) in rows)

    def close(self) -> None:
        self._durable.close()


class Masking:
    """This client's side of all its masked sums.

    credentials: the folder of its certificate, if it has one. min_cohort: the fewest clients in whose sum it lets itself be,
    unless the run's privacy.min_survivors is more. shared: the file of the CKKS key, for encrypted sums.
    """

    def __init__(
        self,
        name: str,
        signer: Signer,
        trust: Trust,
        log: Log,
        credentials: Path | None = None,
        min_cohort: int | None = None,
        shared: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._signer = signer
        self._trust = trust
        self._credentials = credentials
        self._min_cohort = min_cohort or 0
        self._shared = shared
        self._bound: tuple[bytes, bytes] | None = None  # our key (PEM), and its signature of our masking key

    def require(self, spec: RunSpec) -> None:
        """Raise PolicyRefused or ConfigError if this client can be in no masked sum of the run."""
        if spec.privacy.homomorphic:
            self._require_key()
            scheme.check(spec, layout_of(spec).size)
        if spec.privacy.mode == "malicious" and not self._trust.knows:
            raise PolicyRefused(
                f"client '{self.name}' knows nobody's masking key, and a server that lies could invent the others; enrol it "
                '(seqfed client enroll), or set peers = "peers.toml" with all clients\' keys (seqfed client key); '
                "privacy.mode = 'semi_honest' is for a server that does not lie"
            )

    def begin(self, spec: RunSpec, terms: Terms) -> Client:
        """This client's half of a new masked sum of the run."""
        floor = max(spec.privacy.min_survivors, self._min_cohort)
        binding, certificate = self._certified()
        return Client(
            terms, self.name, self._signer, floor, self._trust, self.log.begin, binding=binding, certificate=certificate
        )

    def encrypting(self, spec: RunSpec, terms: Terms) -> Half:
        """This client's half of a new encrypted sum of the run; raises ConfigError for a key that is none."""
        from seqfed.client.ckks import load_key
        from seqfed.client.encrypted import Half

        floor = max(spec.privacy.min_survivors, self._min_cohort)
        return Half(terms, self.name, load_key(self._require_key()), floor, self.log.begin)

    def _require_key(self) -> Path:
        if self._shared is None:
            raise ConfigError(
                f"client '{self.name}' has no CKKS key, which privacy.homomorphic needs; one client makes it (seqfed client key "
                "--homomorphic FILE), all get a copy, and name it in homomorphic_key"
            )
        return self._shared

    def _certified(self) -> tuple[bytes, bytes]:
        if self._credentials is None:
            return b"", b""
        found = identity.load_credentials(self._credentials)  # each time: it renews itself
        if self._bound is None or self._bound[0] != found.key:
            self._bound = found.key, bind(self.name, self._signer.public, found.key)
        return self._bound[1], found.certificate


def masking_of(
    name: str,
    state: Path,
    credentials: Path | None,
    peers: Path | None,
    min_cohort: int | None = None,
    shared: Path | None = None,
) -> Masking:
    """By a client's name, state folder, credentials folder and peers.toml; raises ConfigError, InvalidName, StorageError."""
    signer = own_key(state)
    ca = None if credentials is None else identity.load_credentials(credentials).ca
    trust = Trust((name, signer), ca, None if peers is None else load_peers(peers))
    if shared is not None:
        from seqfed.client.ckks import require_tenseal

        require_tenseal()
        read_private(shared)  # raises now, not amid a round
    return Masking(name, signer, trust, Log(state), credentials, min_cohort, shared)
