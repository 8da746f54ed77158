"""What a user can do wrong, as types.

Every message says what was wrong, where, and what to do. `exit_code` is what the CLI exits with.
Our own mistakes are `assert`s, not these.
"""


class FathomError(Exception):
    """Base of every error that a user can mend."""

    exit_code = 1


class ConfigError(FathomError):
    """A config, recipe or command-line value is wrong: nothing ran."""

    exit_code = 2


class InputError(FathomError):
    """Data that a stage was given cannot be used."""

    exit_code = 3


class ArtifactNotFound(FathomError):
    """No artifact, tag or unique prefix of that name."""

    exit_code = 4


class TamperedArtifact(FathomError):
    """A committed file differs from the manifest's size or SHA-256."""

    exit_code = 5


class StoreError(FathomError):
    """The store refused a read or a write (disk full, no permission, not a store)."""

    exit_code = 6


class StageFailed(FathomError):
    """A stage's work died outside its own code (a worker killed, out of memory)."""

    exit_code = 7


class PromotionRefused(FathomError):
    """A checkpoint does not meet the requirements of the tag that it was to get."""

    exit_code = 9
